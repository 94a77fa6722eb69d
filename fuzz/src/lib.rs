//! Makes expressions, masks, score mods and small problems from a fuzzer's bytes.

use flashattn_spec::expr::{BinOp, Builder, Expr, Node, NodeId, Slot, Table, Traced, Type, UnOp, Var};
use flashattn_spec::mask::{BlockMask, Mask};
use flashattn_spec::score_mod::ScoreMod;
use flashattn_spec::{AttentionProblem, DType, Dropout};
pub use libfuzzer_sys::arbitrary::{Result, Unstructured};

/// Every operation, so that a byte names one.
pub const UNARY: [UnOp; 8] =
    [UnOp::Neg, UnOp::Abs, UnOp::Not, UnOp::Exp2, UnOp::Log2, UnOp::Tanh, UnOp::ToFloat, UnOp::Floor];
/// See [`UNARY`].
pub const BINARY: [BinOp; 18] = {
    use BinOp::*;
    [Add, Sub, Mul, Div, Rem, Min, Max, Lt, Le, Eq, Ne, And, Or, BitAnd, BitOr, BitXor, Shl, Shr]
};

/// A table of one to four dimensions of up to 5.
pub fn table(u: &mut Unstructured, float: bool) -> Result<Table> {
    let dims: Vec<usize> =
        (0..u.int_in_range(1..=4)?).map(|_| u.int_in_range(1..=5)).collect::<Result<_>>()?;
    let n = dims.iter().product();
    let table = if float {
        Table::f32(&dims, (0..n).map(|_| small(u)).collect::<Result<_>>()?)
    } else {
        Table::i32(&dims, (0..n).map(|_| Ok(i32::from(u.arbitrary::<i8>()?))).collect::<Result<_>>()?)
    };
    Ok(table.expect("dimensions and data fit"))
}

/// A number from −2 to 2.
pub fn small(u: &mut Unstructured) -> Result<f32> {
    Ok(f32::from(u.arbitrary::<i8>()?) / 64.0)
}

/// An expression of this type over up to two tables; `None` if the bytes make none. What a builder refuses (operands
/// that do not exist, types that do not fit) it must refuse without panicking. With `exact` there are no floats, so
/// that every executor computes the same.
pub fn traced(u: &mut Unstructured, ty: Type, exact: bool) -> Result<Option<Traced>> {
    let mut builder = Builder::new();
    let mut tables = Vec::new();
    for _ in 0..u.int_in_range(0..=2)? {
        let float = !exact && u.arbitrary()?;
        let table = table(u, float)?;
        builder.slot(table.ty()).expect("few slots");
        tables.push(table);
    }
    let mut ids: Vec<NodeId> = Var::ALL.into_iter().filter_map(|v| builder.push(Node::Var(v)).ok()).collect();
    if !exact {
        ids.extend(builder.push(Node::Score));
    }
    for _ in 0..u.int_in_range(1..=40)? {
        let mut id = || -> Result<NodeId> {
            let i = usize::from(u.arbitrary::<u8>()?);
            // Sometimes one that does not exist.
            Ok(if i == 255 { NodeId(60_000) } else { ids[i % ids.len()] })
        };
        let (a, b, c, d) = (id()?, id()?, id()?, id()?);
        let node = match u.arbitrary::<u8>()? % 8 {
            0 => Node::Int(if u.arbitrary()? { u.arbitrary()? } else { u.arbitrary::<i8>()?.into() }),
            1 if !exact => Node::Float(if u.arbitrary()? { u.arbitrary()? } else { small(u)?.to_bits() }),
            1 | 2 => Node::Unary(UNARY[usize::from(u.arbitrary::<u8>()?) % 8], a),
            3 => Node::Select(a, b, c),
            4 => Node::Load { table: Slot(u16::from(u.arbitrary::<u8>()? % 3)), index: [a, b, c, d] },
            _ => Node::Binary(BINARY[usize::from(u.arbitrary::<u8>()?) % 18], a, b),
        };
        let float = |builder: &Builder, id| builder.ty(id) == Ok(Type::Float);
        if let Ok(id) = builder.push(node)
            && !(exact && float(&builder, id))
        {
            ids.push(id);
        }
    }
    let root = ids.iter().rev().find(|&&id| builder.ty(id) == Ok(ty));
    let expr = root.map(|&root| builder.finish(root).expect("a node of the builder's own"));
    Ok(expr.map(|expr: Expr| Traced { expr, tables }))
}

/// A mask, mostly one that fits the problem.
pub fn mask(u: &mut Unstructured, p: &AttentionProblem, depth: usize) -> Result<Mask> {
    let reach = |u: &mut Unstructured| -> Result<Option<usize>> {
        Ok(if u.arbitrary()? { Some(u.int_in_range(0..=90)?) } else { None })
    };
    Ok(match u.int_in_range(0..=if depth > 0 { 9 } else { 7 })? {
        0 => Mask::Full,
        1 => Mask::Causal,
        2 => Mask::Local { left: reach(u)?, right: reach(u)? },
        3 => Mask::chunked(u.int_in_range(0..=40)?),
        4 => {
            let n = if u.arbitrary()? { p.batch } else { u.int_in_range(0..=2)? };
            Mask::prefix_lm(&(0..n).map(|_| u.int_in_range(0..=90)).collect::<Result<Vec<_>>>()?)
        }
        5 => {
            let mut ids = |n: usize| -> Result<_> {
                let n = n + usize::from(u.ratio(1, 16)?);
                (0..n).map(|_| Ok(i32::from(u.arbitrary::<u8>()? % 3))).collect::<Result<Vec<_>>>()
            };
            Mask::Document { q_ids: ids(p.total_q())?.into(), kv_ids: ids(p.total_k())?.into() }
        }
        6 => {
            let (bq, bk) = (u.int_in_range(0..=33)?, u.int_in_range(0..=33)?);
            let blocks = |n: usize, b: usize| n.div_ceil(b.max(1));
            let shape = [
                if u.arbitrary()? { 1 } else { p.batch },
                if u.arbitrary()? { 1 } else { p.heads_q },
                blocks(p.seqlen_q, bq),
                blocks(p.seqlen_k, bk) + usize::from(u.ratio(1, 16)?),
            ];
            let bits: u64 = u.arbitrary()?;
            let visible = |b, h, m, n| bits >> ((b + 3 * h + 5 * m + 7 * n) % 64) & 1 == 1;
            BlockMask::from_fn(shape, bq, bk, visible).map_or(Mask::Full, Mask::Block)
        }
        7 => traced(u, Type::Bool, true)?.map_or(Mask::Full, Mask::Custom),
        8 => Mask::And((0..u.int_in_range(0..=3)?).map(|_| mask(u, p, depth - 1)).collect::<Result<_>>()?),
        _ => Mask::Or((0..u.int_in_range(0..=3)?).map(|_| mask(u, p, depth - 1)).collect::<Result<_>>()?),
    })
}

/// A score mod, mostly one that fits the problem. Those that are not `wild` change a score smoothly and by a few
/// hundred at most.
pub fn score_mod(u: &mut Unstructured, p: &AttentionProblem, wild: bool) -> Result<ScoreMod> {
    let learned = |t: Table, grad| if grad { t.with_grad().expect("floats") } else { t };
    Ok(match u.int_in_range(0..=if wild { 4 } else { 3 })? {
        0 => ScoreMod::None,
        1 => ScoreMod::softcap(f32::from(u.arbitrary::<u8>()?)),
        2 => {
            let n = p.heads_q + usize::from(u.ratio(1, 16)?);
            let slopes = (0..n).map(|_| small(u)).collect::<Result<Vec<_>>>()?;
            let grad = u.arbitrary()?;
            Table::f32(&[n], slopes).map_or(ScoreMod::None, |t| ScoreMod::Alibi(learned(t, grad)))
        }
        3 => {
            let mut dim = |n: usize| Ok(if u.arbitrary()? { n } else { 1 });
            let dims = [dim(p.batch)?, dim(p.heads_q)?, dim(p.seqlen_q)?, dim(p.seqlen_k)?];
            let (seed, grad) = (u.arbitrary()?, u.arbitrary()?);
            let data = numbers(seed, dims.iter().product()).collect();
            Table::f32(&dims, data).map_or(ScoreMod::None, |t| ScoreMod::bias(learned(t, grad)))
        }
        _ => match traced(u, Type::Float, false)? {
            Some(mut traced) => {
                for table in &mut traced.tables {
                    if table.ty() == Type::Float && u.arbitrary()? {
                        *table = table.clone().with_grad().expect("floats");
                    }
                }
                ScoreMod::Custom(traced)
            }
            None => ScoreMod::None,
        },
    })
}

/// A problem of a few thousand scores, mostly valid.
pub fn problem(u: &mut Unstructured, dtype: DType, wild: bool) -> Result<AttentionProblem> {
    let heads_kv = u.int_in_range(1..=3)?;
    let heads = heads_kv * u.int_in_range(1..=3)? + usize::from(u.ratio(1, 32)?);
    let length = |u: &mut Unstructured| -> Result<usize> {
        let longest = if u.arbitrary()? { 9 } else { 80 };
        u.int_in_range(0..=longest)
    };
    let (batch, head_dim) = (u.int_in_range(0..=3)?, u.int_in_range(0..=70)?);
    let mut p = AttentionProblem::new(batch, length(u)?, heads, head_dim, dtype);
    (p.heads_kv, p.seqlen_k, p.head_dim_v) = (heads_kv, length(u)?, u.int_in_range(0..=70)?);
    if u.arbitrary()? {
        let mut offsets = || -> Result<Vec<i32>> {
            let mut cu = vec![0];
            for _ in 0..p.batch {
                let step = if u.ratio(1, 64)? { -1 } else { u.int_in_range(0..=50)? };
                cu.push(cu[cu.len() - 1] + step);
            }
            Ok(cu)
        };
        let (q, k) = (offsets()?, offsets()?);
        p = p.with_varlen(&q, &k);
    }
    p.sinks = u.arbitrary()?;
    if u.arbitrary()? {
        p.dropout = Some(Dropout { p: f32::from(u.arbitrary::<u8>()?) / 250.0, seed: u.arbitrary()? });
    }
    if u.arbitrary()? {
        p.softmax_scale = Some(if wild { f32::from_bits(u.arbitrary()?) } else { small(u)? });
    }
    p.mask = mask(u, &p, 2)?;
    p.score_mod = score_mod(u, &p, wild)?;
    Ok(p)
}

/// Numbers from −2 to 2 (splitmix64), so that tensors do not eat up the fuzzer's bytes.
pub fn numbers(seed: u64, n: usize) -> impl Iterator<Item = f32> {
    (1..=n as u64).map(move |i| {
        let mut z = seed.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 22) as f32 - 2.0
    })
}
