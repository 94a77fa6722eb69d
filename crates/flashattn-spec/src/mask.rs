//! [`Mask`]: which keys a query sees.
//!
//! Every mask but [`Mask::Full`] is lowered to an expression over (batch, head, query, key), the named ones too.
//! So an executor knows one kind of mask, a kernel is keyed by the expression and not by the data in its tables,
//! and the block schedule ([`crate::blocks`]) finds out by interval analysis what it may skip.
//!
//! "The diagonal" of query q is the key position `q + seqlen_k − seqlen_q`: the last query is level with the last
//! key (bottom-right alignment), as when the keys of earlier tokens come from a cache.

use crate::expr::{Expr, ExprError, Index, Table, Term, Traced, Type, Value};
use crate::problem::{AttentionProblem, MAX_INDEX};
use std::sync::Arc;

/// Why a mask was refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MaskError {
    /// A list of numbers per sequence or per token has the wrong length.
    #[error("{name} has {got} entries, expected {expected}")]
    Length {
        /// The list.
        name: &'static str,
        /// Its length.
        got: usize,
        /// What the problem asks for, in words and numbers.
        expected: String,
    },
    /// A size that must be at least 1 is 0.
    #[error("{name} is 0, expected at least 1")]
    Zero {
        /// The argument.
        name: &'static str,
    },
    /// The dimensions of a block mask do not fit the problem.
    #[error(
        "block mask has shape {got:?}, expected {expected:?} (batch and heads_q may be 1) \
         for blocks of {block_q} queries x {block_kv} keys"
    )]
    BlockMaskShape {
        /// Its shape `[batch, heads_q, q blocks, kv blocks]`.
        got: [usize; 4],
        /// The shape that the problem asks for.
        expected: [usize; 4],
        /// Queries a block.
        block_q: usize,
        /// Keys a block.
        block_kv: usize,
    },
    /// `Mask::Or` of nothing would hide everything.
    #[error("the `or` of no masks hides everything; expected at least one mask")]
    EmptyOr,
    /// A custom mask is not a truth value.
    #[error("a custom mask must give a Bool, got {got}")]
    NotBool {
        /// The type of its result.
        got: Type,
    },
    /// A custom mask reads the score, but masks decide by place alone.
    #[error("a mask cannot read the score")]
    ReadsScore,
    /// The expression was refused.
    #[error(transparent)]
    Expr(#[from] ExprError),
}

/// Which keys a query sees. A row that sees none has o = 0, lse = −∞ and no gradient.
#[derive(Clone, Debug, Default)]
pub enum Mask {
    /// Every key.
    #[default]
    Full,
    /// Keys up to the diagonal: `kv <= q + seqlen_k − seqlen_q`.
    Causal,
    /// A sliding window around the diagonal: `diagonal − left <= kv <= diagonal + right`, both inclusive.
    Local {
        /// How far back it reaches; `None` is without bound.
        left: Option<usize>,
        /// How far ahead it reaches; `None` is without bound.
        right: Option<usize>,
    },
    /// Keys in the same chunk as the diagonal: `floor(diagonal / size) == floor(kv / size)`. It looks ahead inside
    /// the chunk; Llama 4's chunked attention is `Mask::chunked(size).and(Mask::causal())`.
    Chunked {
        /// Keys a chunk, at least 1.
        size: usize,
    },
    /// Causal, but all see the first `prefix` keys (the prompt of a prefix language model).
    PrefixLm {
        /// How many keys for each sequence, or one number for all.
        prefix: Arc<[usize]>,
    },
    /// Keys whose token belongs to the same document as the query's token.
    Document {
        /// Document of each query token, over all sequences: `[total_q]` (`[batch * seqlen_q]` when dense).
        q_ids: Arc<[i32]>,
        /// Document of each key token: `[total_k]`.
        kv_ids: Arc<[i32]>,
    },
    /// A given pattern of blocks (the block-sparse attention of arXiv 2205.14135, section 3.3).
    Block(BlockMask),
    /// Any other condition.
    Custom(Traced),
    /// Keys that all of these show; of none, every key.
    And(Vec<Mask>),
    /// Keys that any of these shows; at least one.
    Or(Vec<Mask>),
}

impl Mask {
    /// [`Mask::Full`].
    pub fn full() -> Self {
        Mask::Full
    }

    /// [`Mask::Causal`].
    pub fn causal() -> Self {
        Mask::Causal
    }

    /// [`Mask::Local`] with both sides bounded.
    pub fn window(left: usize, right: usize) -> Self {
        Mask::Local { left: Some(left), right: Some(right) }
    }

    /// [`Mask::Chunked`].
    pub fn chunked(size: usize) -> Self {
        Mask::Chunked { size }
    }

    /// [`Mask::PrefixLm`] with one length for all sequences, or one each.
    pub fn prefix_lm(prefix: &[usize]) -> Self {
        Mask::PrefixLm { prefix: prefix.into() }
    }

    /// [`Mask::Document`] for self-attention: one id for each token, in packed order.
    pub fn document(ids: &[i32]) -> Self {
        let ids: Arc<[i32]> = ids.into();
        Mask::Document { q_ids: ids.clone(), kv_ids: ids }
    }

    /// [`Mask::Custom`] from a closure that gives a Bool, such as
    /// `|ix| (ix.kv % 64).eq(0) | ix.kv.ge(ix.diagonal() - 128)`.
    ///
    /// # Errors
    /// [`MaskError::Expr`] if the closure mixes types or grows too large, [`MaskError::NotBool`].
    pub fn custom(condition: impl for<'t> FnOnce(Index<'t>) -> Term<'t>) -> Result<Self, MaskError> {
        Ok(Mask::Custom(Expr::trace_mask(condition)?))
    }

    /// What both show.
    pub fn and(self, other: Mask) -> Self {
        Mask::And(vec![self, other])
    }

    /// What either shows.
    pub fn or(self, other: Mask) -> Self {
        Mask::Or(vec![self, other])
    }

    /// The mask as an expression of type Bool with the tables it reads; `None` if every key is visible.
    ///
    /// # Errors
    /// What is wrong with the mask itself; [`Mask::validate`] also checks it against a problem.
    pub fn lower(&self) -> Result<Option<Traced>, MaskError> {
        let traced = match self {
            Mask::Full => None,
            Mask::Causal => Some(Expr::trace_mask(|ix| ix.kv.le(ix.diagonal()))?),
            Mask::Local { left, right } => {
                // Positions stay below MAX_INDEX, so a window that reaches farther has no edge on that side.
                let reach = |x: &Option<usize>| x.filter(|&x| x < MAX_INDEX).map(|x| x as i32);
                match (reach(left), reach(right)) {
                    (None, None) => None,
                    (Some(l), None) => Some(Expr::trace_mask(|ix| ix.kv.ge(ix.diagonal() - l))?),
                    (None, Some(r)) => Some(Expr::trace_mask(|ix| ix.kv.le(ix.diagonal() + r))?),
                    (Some(l), Some(r)) => Some(Expr::trace_mask(|ix| {
                        ix.kv.ge(ix.diagonal() - l) & ix.kv.le(ix.diagonal() + r)
                    })?),
                }
            }
            Mask::Chunked { size: 0 } => return Err(MaskError::Zero { name: "chunk size" }),
            Mask::Chunked { size } => {
                let size = clamp(*size);
                Some(Expr::trace_mask(|ix| (ix.diagonal() / size).eq(ix.kv / size))?)
            }
            Mask::PrefixLm { prefix } => {
                let lengths = prefix.iter().map(|&x| clamp(x)).collect();
                let (table, per_batch) = (table(&[prefix.len()], lengths)?, prefix.len() > 1);
                Some(Expr::trace_mask(|ix| {
                    let prefix = if per_batch { table[ix.batch] } else { table[Term::from(0)] };
                    ix.kv.lt(prefix) | ix.kv.le(ix.diagonal())
                })?)
            }
            Mask::Document { q_ids, kv_ids } => {
                let q = table(&[q_ids.len()], q_ids.to_vec())?;
                // One table, not two, for self-attention.
                let kv = if Arc::ptr_eq(q_ids, kv_ids) {
                    q.clone()
                } else {
                    table(&[kv_ids.len()], kv_ids.to_vec())?
                };
                Some(Expr::trace_mask(|ix| q[ix.q_token()].eq(kv[ix.kv_token()]))?)
            }
            Mask::Block(mask) => Some(mask.lower()?),
            Mask::Custom(traced) => {
                let expr = &traced.expr;
                if expr.ty() != Type::Bool {
                    return Err(MaskError::NotBool { got: expr.ty() });
                }
                if expr.uses_score() {
                    return Err(MaskError::ReadsScore);
                }
                expr.check_tables(&traced.tables)?;
                Some(traced.clone())
            }
            Mask::And(masks) => {
                let mut all: Option<Traced> = None;
                for mask in masks {
                    if let Some(next) = mask.lower()? {
                        all = Some(match all {
                            Some(all) => all.and(&next)?,
                            None => next,
                        });
                    }
                }
                all
            }
            Mask::Or(masks) => {
                let mut lowered = masks.iter().map(Mask::lower);
                let mut any = lowered.next().ok_or(MaskError::EmptyOr)??;
                for next in lowered {
                    any = match (any, next?) {
                        (Some(a), Some(b)) => Some(a.or(&b)?),
                        _ => None,
                    };
                }
                any
            }
        };
        Ok(traced.filter(|t| t.expr.as_const() != Some(Value::Bool(true))))
    }

    /// Checks the mask, and that its tables are as long as the problem's batch, tokens and blocks ask for.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub fn validate(&self, problem: &AttentionProblem) -> Result<(), MaskError> {
        match self {
            Mask::PrefixLm { prefix } if ![1, problem.batch].contains(&prefix.len()) => {
                let expected = format!("1 or batch = {}", problem.batch);
                Err(MaskError::Length { name: "prefix", got: prefix.len(), expected })
            }
            Mask::Document { q_ids, kv_ids } => {
                for (name, got, total, expected) in [
                    ("q_ids", q_ids.len(), "total_q", problem.total_q()),
                    ("kv_ids", kv_ids.len(), "total_k", problem.total_k()),
                ] {
                    if got != expected {
                        let expected = format!("{total} = {expected}");
                        return Err(MaskError::Length { name, got, expected });
                    }
                }
                Ok(())
            }
            Mask::Block(mask) => mask.validate(problem),
            Mask::And(masks) => masks.iter().try_for_each(|m| m.validate(problem)),
            Mask::Or(masks) if masks.is_empty() => Err(MaskError::EmptyOr),
            Mask::Or(masks) => masks.iter().try_for_each(|m| m.validate(problem)),
            Mask::Chunked { size: 0 } | Mask::Custom(_) => self.lower().map(drop),
            _ => Ok(()),
        }
    }
}

/// A length as an i32. Positions stay below MAX_INDEX, so that longer ones mean the same.
fn clamp(length: usize) -> i32 {
    length.min(MAX_INDEX) as i32
}

/// A table of integers. A problem without tokens has tables without elements; no executor will read them, but the
/// kernel's key must not change, so they get one element.
fn table(dims: &[usize], mut data: Vec<i32>) -> Result<Table, ExprError> {
    if data.is_empty() {
        data.push(0);
        return Table::i32(&vec![1; dims.len()], data);
    }
    Table::i32(dims, data)
}

/// Which blocks of the score matrix are visible: `[batch or 1, heads_q or 1, q blocks, kv blocks]`, where a block is
/// `block_q` queries by `block_kv` keys counted from the start of each sequence. The blocks need not be the tiles of
/// an executor. In packed problems the number of blocks is that of the longest sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMask {
    visible: Arc<[bool]>,
    shape: [usize; 4],
    block_q: usize,
    block_kv: usize,
}

impl BlockMask {
    /// A block mask from row-major data: 0 is hidden, anything else visible.
    ///
    /// # Errors
    /// [`MaskError::Zero`] if a block size is 0, [`MaskError::Length`] if `visible` does not have as many elements
    /// as `shape`.
    pub fn new(
        shape: [usize; 4],
        block_q: usize,
        block_kv: usize,
        visible: &[u8],
    ) -> Result<Self, MaskError> {
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if elements != Some(visible.len()) {
            let expected = format!("those of shape {shape:?}");
            return Err(MaskError::Length { name: "block mask", got: visible.len(), expected });
        }
        Self::from_bools(shape, block_q, block_kv, visible.iter().map(|&x| x != 0).collect())
    }

    /// A block mask from a function of (batch, head, q block, kv block).
    ///
    /// # Errors
    /// [`MaskError::Zero`] if a block size is 0.
    pub fn from_fn(
        shape: [usize; 4],
        block_q: usize,
        block_kv: usize,
        mut visible: impl FnMut(usize, usize, usize, usize) -> bool,
    ) -> Result<Self, MaskError> {
        let mut data = Vec::new();
        for b in 0..shape[0] {
            for h in 0..shape[1] {
                for m in 0..shape[2] {
                    data.extend((0..shape[3]).map(|n| visible(b, h, m, n)));
                }
            }
        }
        Self::from_bools(shape, block_q, block_kv, data.into())
    }

    fn from_bools(
        shape: [usize; 4],
        block_q: usize,
        block_kv: usize,
        visible: Arc<[bool]>,
    ) -> Result<Self, MaskError> {
        for (name, size) in [("block_q", block_q), ("block_kv", block_kv)] {
            if size == 0 {
                return Err(MaskError::Zero { name });
            }
        }
        Ok(BlockMask { visible, shape, block_q, block_kv })
    }

    /// `[batch or 1, heads_q or 1, q blocks, kv blocks]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Queries and keys a block.
    pub fn block_size(&self) -> (usize, usize) {
        (self.block_q, self.block_kv)
    }

    /// Whether block (batch, head, q block, kv block) is visible. Batch and head may be any if their dimension is 1.
    /// `None` if there is no such block.
    pub fn is_visible(&self, batch: usize, head: usize, q_block: usize, kv_block: usize) -> Option<bool> {
        let mut offset = 0;
        for (i, (x, dim)) in [batch, head, q_block, kv_block].into_iter().zip(self.shape).enumerate() {
            let x = if i < 2 && dim == 1 { 0 } else { x };
            if x >= dim {
                return None;
            }
            offset = offset * dim + x;
        }
        self.visible.get(offset).copied()
    }

    fn lower(&self) -> Result<Traced, MaskError> {
        let table = table(&self.shape, self.visible.iter().map(|&x| x.into()).collect())?;
        let (block_q, block_kv) = (clamp(self.block_q), clamp(self.block_kv));
        let [per_batch, per_head] = [0, 1].map(|d| self.shape[d] > 1);
        Ok(Expr::trace_mask(|ix| {
            // An index that broadcasts is left out, so that the schedule sees that nothing depends on it.
            let (q, kv) = (ix.q / block_q, ix.kv / block_kv);
            let batch = if per_batch { ix.batch } else { 0.into() };
            let head = if per_head { ix.head } else { 0.into() };
            table[(batch, head, q, kv)].ne(0)
        })?)
    }

    fn validate(&self, problem: &AttentionProblem) -> Result<(), MaskError> {
        let expected = [
            problem.batch,
            problem.heads_q,
            problem.seqlen_q.div_ceil(self.block_q),
            problem.seqlen_k.div_ceil(self.block_kv),
        ];
        let fits = (0..4).all(|d| self.shape[d] == expected[d] || d < 2 && self.shape[d] == 1);
        if fits {
            return Ok(());
        }
        let (got, block_q, block_kv) = (self.shape, self.block_q, self.block_kv);
        Err(MaskError::BlockMaskShape { got, expected, block_q, block_kv })
    }
}

#[cfg(test)]
pub(crate) mod tests;
