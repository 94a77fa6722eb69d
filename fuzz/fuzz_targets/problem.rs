//! Validation: whatever numbers are given, a problem or a view is refused with an error, or what it says can be relied
//! on. Nothing is allocated for sizes that are only claimed (libFuzzer watches the memory).
#![no_main]

use flashattn_fuzz::{Result, Unstructured, mask, score_mod};
use flashattn_spec::blocks::BlockSchedule;
use flashattn_spec::problem::MAX_INDEX;
use flashattn_spec::{AttentionProblem, DType, Dropout, Varlen, View, ViewMut};
use std::collections::HashSet;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let u = &mut Unstructured::new(data);
    let _ = problem(u).and_then(|()| view(u));
});

/// Any number, often one at an edge.
fn size(u: &mut Unstructured) -> Result<usize> {
    Ok(match u.int_in_range(0..=5)? {
        0 => u.arbitrary()?,
        1 => *u.choose(&[MAX_INDEX, MAX_INDEX + 1, usize::MAX, isize::MAX as usize, 1 << 16, 1 << 32])?,
        2 => u.arbitrary::<u16>()?.into(),
        _ => u.int_in_range(0..=20)?,
    })
}

fn problem(u: &mut Unstructured) -> Result<()> {
    let dtype = *u.choose(&[DType::F32, DType::F16, DType::Bf16, DType::F64])?;
    let mut p = AttentionProblem::new(size(u)?, size(u)?, size(u)?, size(u)?, dtype);
    (p.heads_kv, p.seqlen_k, p.head_dim_v) = (size(u)?, size(u)?, size(u)?);
    if u.arbitrary()? {
        let mut offsets = || -> Result<Vec<i32>> {
            let mut cu: Vec<i32> = Vec::new();
            for _ in 0..u.int_in_range(0..=5)? {
                let last = cu.last().copied().unwrap_or(0);
                cu.push(if u.ratio(1, 8)? {
                    u.arbitrary()?
                } else {
                    last.saturating_add(u.arbitrary::<u8>()?.into())
                });
            }
            Ok(cu)
        };
        let (q, k) = (offsets()?, offsets()?);
        if u.arbitrary()? {
            p = p.with_varlen(&q, &k);
        } else {
            p.varlen = Some(Varlen { cu_seqlens_q: q.into(), cu_seqlens_k: k.into() });
        }
    }
    if u.arbitrary()? {
        p.softmax_scale = Some(f32::from_bits(u.arbitrary()?));
        p.dropout = Some(Dropout { p: f32::from_bits(u.arbitrary()?), seed: 0 });
    }
    // Tables have the size of the problem.
    let total = |cu: &[i32]| cu.last().map_or(0, |&x| x.max(0) as usize);
    let totals = p.varlen.as_ref().map_or([0, 0], |v| [total(&v.cu_seqlens_q), total(&v.cu_seqlens_k)]);
    let sizes = [p.batch, p.heads_q, p.seqlen_q.max(totals[0]), p.seqlen_k.max(totals[1])];
    if sizes.iter().fold(1, |n: usize, &d| n.saturating_mul(d.max(1))) < 1 << 16 {
        p.mask = mask(u, &p, 1)?;
        p.score_mod = score_mod(u, &p, true)?;
    }
    if p.validate().is_err() {
        return Ok(());
    }
    assert!(p.scale().is_finite() && p.group() * p.heads_kv == p.heads_q);
    let elements = |shape: [usize; 4]| shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    for shape in [p.q_shape(), p.k_shape(), p.v_shape(), p.o_shape()] {
        assert!(elements(shape).is_some_and(|n| n <= isize::MAX as usize), "{shape:?}");
    }
    assert!(p.lse_len() <= isize::MAX as usize);
    for b in [0, p.batch / 2, p.batch.wrapping_sub(1)] {
        if b < p.batch {
            let s = p.sequence(b);
            assert!(s.seqlen_q <= p.seqlen_q && s.seqlen_k <= p.seqlen_k);
            assert!(s.q_row + s.seqlen_q <= p.q_shape()[1] && s.kv_row + s.seqlen_k <= p.k_shape()[1]);
            assert!(p.lse_start(&s, p.heads_q - 1) + s.seqlen_q <= p.lse_len());
        }
    }
    p.lower().expect("a valid problem");
    if p.total_q().max(p.total_k()).max(p.heads_q) < 1 << 10 {
        let (m, n) = (u.int_in_range(1..=70)?, u.int_in_range(1..=70)?);
        let schedule = BlockSchedule::new(&p, m, n).expect("a valid problem");
        assert!(schedule.counts().density() <= 1.0 || schedule.counts().total() == 0);
    }
    Ok(())
}

fn view(u: &mut Unstructured) -> Result<()> {
    let (shape, strides) =
        ([size(u)?, size(u)?, size(u)?, size(u)?], [size(u)?, size(u)?, size(u)?, size(u)?]);
    let strides = if u.arbitrary()? { [strides[0], strides[1], strides[2], 1] } else { strides };
    let mut data = vec![0f32; u.int_in_range(0..=4000)?].into_boxed_slice();
    let elements = shape.iter().fold(1usize, |n, &d| n.saturating_mul(d));
    let rows =
        || (0..shape[0]).flat_map(|b| (0..shape[1]).flat_map(move |i| (0..shape[2]).map(move |h| (b, i, h))));
    if let Ok(view) = View::with_strides(&data, shape, strides)
        && elements > 0
    {
        // Broadcasting may make a small memory look huge.
        for (b, i, h) in rows().take(5000).chain([(shape[0] - 1, shape[1] - 1, shape[2] - 1)]) {
            assert_eq!(view.row(b, i, h).len(), shape[3]);
        }
    }
    if let Ok(mut view) = ViewMut::with_strides(&mut data, shape, strides)
        && elements > 0
    {
        let start = view.as_view().data().as_ptr().addr();
        let mut seen = HashSet::new();
        for (b, i, h) in rows() {
            let row = view.row_mut(b, i, h);
            let at = row.as_ptr().addr() - start;
            assert!((0..row.len()).all(|j| seen.insert(at + 4 * j)), "{shape:?} {strides:?} overlap");
        }
    }
    Ok(())
}
