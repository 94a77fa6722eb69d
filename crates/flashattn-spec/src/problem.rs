//! [`AttentionProblem`]: what is to be computed, as data, and its validation.

use crate::element::DType;
use crate::mask::{Mask, MaskError};
use crate::score_mod::{ScoreMod, ScoreModError};
use std::sync::Arc;

/// Why a problem, or the tensors given for it, were refused. Every message names the argument, what was got and
/// what was expected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ProblemError {
    /// Query heads must be a multiple of KV heads.
    #[error("heads_q = {heads_q} is not a multiple of heads_kv = {heads_kv}")]
    HeadsDoNotDivide {
        /// Query heads.
        heads_q: usize,
        /// Key/value heads.
        heads_kv: usize,
    },
    /// A size that must be at least 1 is 0.
    #[error("{name} is 0, expected at least 1")]
    Zero {
        /// The argument.
        name: &'static str,
    },
    /// A size is beyond what indices can hold.
    #[error("{name} is {got}, expected at most {max}")]
    TooLarge {
        /// The argument.
        name: &'static str,
        /// What was given.
        got: usize,
        /// The largest allowed.
        max: usize,
    },
    /// softmax_scale must be a finite number.
    #[error("softmax_scale is {got}, expected a finite number")]
    Scale {
        /// What was given.
        got: f32,
    },
    /// Dropout probability must be in [0, 1).
    #[error("dropout probability is {got}, expected 0 <= p < 1")]
    Dropout {
        /// What was given.
        got: f32,
    },
    /// cu_seqlens is malformed.
    #[error("{name}: {reason}")]
    CuSeqlens {
        /// The argument, `cu_seqlens_q` or `cu_seqlens_k`.
        name: &'static str,
        /// What is wrong, with the position and the values.
        reason: String,
    },
    /// A tensor's shape does not fit the problem.
    #[error("{name} has shape {got:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        name: &'static str,
        /// Shape that was given.
        got: Vec<usize>,
        /// Shape that the problem needs.
        expected: Vec<usize>,
    },
    /// A tensor's element type is not the problem's.
    #[error("{name} has dtype {got}, expected {expected}")]
    DType {
        /// The tensor.
        name: &'static str,
        /// What was given.
        got: DType,
        /// What the problem says.
        expected: DType,
    },
    /// An optional tensor is missing, or given although the problem does not have it.
    #[error("{name} is {got}, the problem expects it {expected}")]
    Presence {
        /// The tensor.
        name: &'static str,
        /// "given" or "absent".
        got: &'static str,
        /// "given" or "absent".
        expected: &'static str,
    },
    /// The mask does not fit the problem.
    #[error("mask: {0}")]
    Mask(#[from] MaskError),
    /// The score mod does not fit the problem.
    #[error("score mod: {0}")]
    ScoreMod(#[from] ScoreModError),
}

/// Dropout of attention probabilities: each is kept with probability 1 − p and then divided by 1 − p.
/// Which ones is a pure function of (seed, batch, head, q, kv); see [`crate::philox`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability that an entry is dropped, in [0, 1).
    pub p: f32,
    /// Seed of the Philox generator.
    pub seed: u64,
}

/// Sequences of different lengths packed one after the other: sequence b of q is rows
/// `cu_seqlens_q[b] .. cu_seqlens_q[b + 1]` of `[total_q, heads, head_dim]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Varlen {
    /// `batch + 1` offsets, from 0 to total_q, never decreasing.
    pub cu_seqlens_q: Arc<[i32]>,
    /// `batch + 1` offsets, from 0 to total_k, never decreasing.
    pub cu_seqlens_k: Arc<[i32]>,
}

/// One sequence (batch entry) of a problem: where its rows start in the tensors, and how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Index into the tensors' batch dimension (0 when packed).
    pub batch: usize,
    /// Row of the tensors' seqlen dimension where the queries start (0 when dense).
    pub q_row: usize,
    /// Row where keys and values start.
    pub kv_row: usize,
    /// First query token counted over all sequences: the `q_start` of expressions.
    pub q_start: usize,
    /// First key token counted over all sequences: the `kv_start` of expressions.
    pub kv_start: usize,
    /// Queries.
    pub seqlen_q: usize,
    /// Keys.
    pub seqlen_k: usize,
}

/// An attention problem: `O = dropout(softmax(mask(score_mod(scale · Q Kᵀ)))) V` for each batch and head.
///
/// Shapes: q `[batch, seqlen_q, heads_q, head_dim]`, k `[batch, seqlen_k, heads_kv, head_dim]`,
/// v `[batch, seqlen_k, heads_kv, head_dim_v]`, o `[batch, seqlen_q, heads_q, head_dim_v]`,
/// lse f32 `[batch, heads_q, seqlen_q]` (natural logarithm). With [`Varlen`] the tensors are
/// `[1, total, heads, head_dim]`, lse is `[heads_q, total_q]`, and `seqlen_q`, `seqlen_k` are the maxima.
#[derive(Clone, Debug)]
pub struct AttentionProblem {
    /// Sequences.
    pub batch: usize,
    /// Query heads; a multiple of `heads_kv`.
    pub heads_q: usize,
    /// Key/value heads: equal to `heads_q` (MHA), fewer (GQA) or 1 (MQA).
    pub heads_kv: usize,
    /// Queries a sequence (the longest when packed).
    pub seqlen_q: usize,
    /// Keys a sequence (the longest when packed).
    pub seqlen_k: usize,
    /// Elements of a query or key row.
    pub head_dim: usize,
    /// Elements of a value or output row.
    pub head_dim_v: usize,
    /// Type of q, k, v, o and gradients.
    pub dtype: DType,
    /// Which keys a query sees.
    pub mask: Mask,
    /// What happens to a score before the mask.
    pub score_mod: ScoreMod,
    /// Factor of q·k; `None` is 1/√head_dim.
    pub softmax_scale: Option<f32>,
    /// Dropout of probabilities.
    pub dropout: Option<Dropout>,
    /// Whether a learned sink logit per query head joins the softmax's denominator (f32 `[heads_q]`).
    pub sinks: bool,
    /// Packed sequences.
    pub varlen: Option<Varlen>,
}

/// Sequence lengths and head counts stay below this, so that indices fit i32 in every executor.
pub const MAX_INDEX: usize = i32::MAX as usize / 2;
/// head_dim and head_dim_v stay at or below this.
pub const MAX_HEAD_DIM: usize = 1 << 16;

impl AttentionProblem {
    /// A dense self-attention problem: as many KV heads as query heads, head_dim_v = head_dim, no mask.
    /// Change the public fields for anything else.
    pub fn new(batch: usize, seqlen: usize, heads: usize, head_dim: usize, dtype: DType) -> Self {
        AttentionProblem {
            batch,
            heads_q: heads,
            heads_kv: heads,
            seqlen_q: seqlen,
            seqlen_k: seqlen,
            head_dim,
            head_dim_v: head_dim,
            dtype,
            mask: Mask::Full,
            score_mod: ScoreMod::None,
            softmax_scale: None,
            dropout: None,
            sinks: false,
            varlen: None,
        }
    }

    /// Makes this a packed problem: batch and the maximal lengths follow from the offsets.
    pub fn with_varlen(mut self, cu_seqlens_q: &[i32], cu_seqlens_k: &[i32]) -> Self {
        let longest = |cu: &[i32]| {
            cu.windows(2).map(|w| i64::from(w[1]) - i64::from(w[0])).max().unwrap_or(0).max(0) as usize
        };
        self.batch = cu_seqlens_q.len().saturating_sub(1);
        self.seqlen_q = longest(cu_seqlens_q);
        self.seqlen_k = longest(cu_seqlens_k);
        self.varlen = Some(Varlen { cu_seqlens_q: cu_seqlens_q.into(), cu_seqlens_k: cu_seqlens_k.into() });
        self
    }

    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.heads_q / self.heads_kv.max(1)
    }

    /// The factor of q·k: `softmax_scale`, or 1/√head_dim.
    pub fn scale(&self) -> f32 {
        self.softmax_scale.unwrap_or_else(|| (1.0 / (self.head_dim as f64).sqrt()) as f32)
    }

    /// Rows of q over all sequences.
    pub fn total_q(&self) -> usize {
        match &self.varlen {
            Some(v) => v.cu_seqlens_q.last().map_or(0, |&x| x.max(0) as usize),
            None => self.batch * self.seqlen_q,
        }
    }

    /// Rows of k over all sequences.
    pub fn total_k(&self) -> usize {
        match &self.varlen {
            Some(v) => v.cu_seqlens_k.last().map_or(0, |&x| x.max(0) as usize),
            None => self.batch * self.seqlen_k,
        }
    }

    fn tokens(&self, total: usize, seqlen: usize) -> [usize; 2] {
        if self.varlen.is_some() { [1, total] } else { [self.batch, seqlen] }
    }

    /// Shape of q and dq.
    pub fn q_shape(&self) -> [usize; 4] {
        let [b, n] = self.tokens(self.total_q(), self.seqlen_q);
        [b, n, self.heads_q, self.head_dim]
    }

    /// Shape of k and dk.
    pub fn k_shape(&self) -> [usize; 4] {
        let [b, n] = self.tokens(self.total_k(), self.seqlen_k);
        [b, n, self.heads_kv, self.head_dim]
    }

    /// Shape of v and dv.
    pub fn v_shape(&self) -> [usize; 4] {
        let [b, n, h, _] = self.k_shape();
        [b, n, h, self.head_dim_v]
    }

    /// Shape of o and do.
    pub fn o_shape(&self) -> [usize; 4] {
        let [b, n, h, _] = self.q_shape();
        [b, n, h, self.head_dim_v]
    }

    /// Elements of lse: `[batch, heads_q, seqlen_q]`, or `[heads_q, total_q]` when packed.
    pub fn lse_len(&self) -> usize {
        self.total_q() * self.heads_q
    }

    /// Where the lse of (sequence, head) starts; its queries follow one another.
    pub fn lse_start(&self, sequence: &Sequence, head: usize) -> usize {
        let [_, n, ..] = self.q_shape();
        (sequence.batch * self.heads_q + head) * n + sequence.q_row
    }

    /// Sequence `b` of a valid problem.
    pub fn sequence(&self, b: usize) -> Sequence {
        match &self.varlen {
            Some(v) => {
                let (q0, q1) = (v.cu_seqlens_q[b] as usize, v.cu_seqlens_q[b + 1] as usize);
                let (k0, k1) = (v.cu_seqlens_k[b] as usize, v.cu_seqlens_k[b + 1] as usize);
                Sequence {
                    batch: 0,
                    q_row: q0,
                    kv_row: k0,
                    q_start: q0,
                    kv_start: k0,
                    seqlen_q: q1 - q0,
                    seqlen_k: k1 - k0,
                }
            }
            None => Sequence {
                batch: b,
                q_row: 0,
                kv_row: 0,
                q_start: b * self.seqlen_q,
                kv_start: b * self.seqlen_k,
                seqlen_q: self.seqlen_q,
                seqlen_k: self.seqlen_k,
            },
        }
    }

    /// Checks everything that does not need the tensors. Executors call it when planning.
    pub fn validate(&self) -> Result<(), ProblemError> {
        for (name, x) in [
            ("heads_q", self.heads_q),
            ("heads_kv", self.heads_kv),
            ("head_dim", self.head_dim),
            ("head_dim_v", self.head_dim_v),
        ] {
            if x == 0 {
                return Err(ProblemError::Zero { name });
            }
        }
        for (name, got, max) in [
            ("batch", self.batch, MAX_INDEX),
            ("heads_q", self.heads_q, MAX_INDEX),
            ("seqlen_q", self.seqlen_q, MAX_INDEX),
            ("seqlen_k", self.seqlen_k, MAX_INDEX),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
            ("head_dim_v", self.head_dim_v, MAX_HEAD_DIM),
        ] {
            if got > max {
                return Err(ProblemError::TooLarge { name, got, max });
            }
        }
        if !self.heads_q.is_multiple_of(self.heads_kv) {
            return Err(ProblemError::HeadsDoNotDivide { heads_q: self.heads_q, heads_kv: self.heads_kv });
        }
        if !self.scale().is_finite() {
            return Err(ProblemError::Scale { got: self.scale() });
        }
        if let Some(d) = self.dropout
            && !(0.0..1.0).contains(&d.p)
        {
            return Err(ProblemError::Dropout { got: d.p });
        }
        if let Some(v) = &self.varlen {
            check_cu_seqlens("cu_seqlens_q", &v.cu_seqlens_q, self.batch, self.seqlen_q)?;
            check_cu_seqlens("cu_seqlens_k", &v.cu_seqlens_k, self.batch, self.seqlen_k)?;
        } else {
            // Token counts index per-token tables as i32.
            for (name, n) in [("batch * seqlen_q", self.seqlen_q), ("batch * seqlen_k", self.seqlen_k)] {
                let got = self.batch.saturating_mul(n);
                if got > MAX_INDEX {
                    return Err(ProblemError::TooLarge { name, got, max: MAX_INDEX });
                }
            }
        }
        for (name, rows, d) in [
            ("q", self.total_q().saturating_mul(self.heads_q), self.head_dim.max(self.head_dim_v)),
            ("k", self.total_k().saturating_mul(self.heads_kv), self.head_dim.max(self.head_dim_v)),
        ] {
            let got = rows.saturating_mul(d).saturating_mul(8);
            if got > isize::MAX as usize {
                return Err(ProblemError::TooLarge { name, got, max: isize::MAX as usize });
            }
        }
        self.mask.validate(self)?;
        self.score_mod.validate(self)?;
        Ok(())
    }
}

fn check_cu_seqlens(
    name: &'static str,
    cu: &[i32],
    batch: usize,
    longest: usize,
) -> Result<(), ProblemError> {
    let refuse = |reason: String| Err(ProblemError::CuSeqlens { name, reason });
    if cu.len() != batch + 1 {
        return refuse(format!("has {} offsets, expected batch + 1 = {}", cu.len(), batch + 1));
    }
    if cu[0] != 0 {
        return refuse(format!("starts at {}, expected 0", cu[0]));
    }
    for (i, w) in cu.windows(2).enumerate() {
        if w[1] < w[0] {
            return refuse(format!("decreases from {} to {} at position {}", w[0], w[1], i + 1));
        }
        if (w[1] - w[0]) as usize > longest {
            return refuse(format!(
                "sequence {i} has {} rows, the problem's maximum is {longest}",
                w[1] - w[0]
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_problems() {
        let mut p = AttentionProblem::new(2, 77, 6, 59, DType::F32);
        p.heads_kv = 3;
        p.head_dim_v = 40;
        p.seqlen_k = 101;
        p.validate().unwrap();
        assert_eq!(p.group(), 2);
        assert_eq!(p.v_shape(), [2, 101, 3, 40]);
        let v = p.clone().with_varlen(&[0, 5, 5, 12], &[0, 0, 7, 30]);
        v.validate().unwrap();
        assert_eq!((v.batch, v.seqlen_q, v.seqlen_k), (3, 7, 23));
        assert_eq!(v.q_shape(), [1, 12, 6, 59]);
        let s = v.sequence(2);
        assert_eq!((s.q_row, s.seqlen_q, s.kv_row, s.seqlen_k), (5, 7, 7, 23));
        assert_eq!(v.lse_start(&s, 4), 4 * 12 + 5);
    }

    #[test]
    fn bad_problems_name_the_argument() {
        let p = || AttentionProblem::new(2, 16, 6, 8, DType::F32);
        let refuse = |change: &dyn Fn(&mut AttentionProblem), text: &str| {
            let mut x = p();
            change(&mut x);
            assert_eq!(x.validate().unwrap_err().to_string(), text);
        };
        refuse(&|p| p.heads_kv = 4, "heads_q = 6 is not a multiple of heads_kv = 4");
        refuse(&|p| p.head_dim = 0, "head_dim is 0, expected at least 1");
        refuse(&|p| p.softmax_scale = Some(f32::NAN), "softmax_scale is NaN, expected a finite number");
        refuse(
            &|p| p.dropout = Some(Dropout { p: 1.0, seed: 0 }),
            "dropout probability is 1, expected 0 <= p < 1",
        );
        refuse(
            &|p| *p = p.clone().with_varlen(&[0, 5, 3], &[0, 1, 2]),
            "cu_seqlens_q: decreases from 5 to 3 at position 2",
        );
        refuse(
            &|p| *p = p.clone().with_varlen(&[0, 5, 6], &[0, 1]),
            "cu_seqlens_k: has 2 offsets, expected batch + 1 = 3",
        );
        refuse(&|p| *p = p.clone().with_varlen(&[1, 5], &[0, 1]), "cu_seqlens_q: starts at 1, expected 0");
        refuse(
            &|p| p.seqlen_k = usize::MAX,
            &format!("seqlen_k is {}, expected at most {MAX_INDEX}", usize::MAX),
        );
    }
}
