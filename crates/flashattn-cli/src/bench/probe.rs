//! What the machine gives at the moment: the ceilings that rates are compared with.

use crate::memory::measure;
use anyhow::Result;
use ndarray::Array2;
use rayon::prelude::*;
use std::hint::black_box;

/// GFLOP/s of all threads together in f32 fused multiply-adds, as a matrix product in cache reaches them (ndarray's):
/// the best of three. By CPU time over threads.
///
/// # Errors
/// Never; like [`measure`].
pub fn fma(threads: usize) -> Result<f64> {
    const N: usize = 384;
    const REPEAT: usize = 6;
    let one = Array2::<f32>::from_elem((N, N), 0.5);
    let mut best = 0.0f64;
    for _ in 0..3 {
        let work = |_| (0..REPEAT).for_each(|_| drop(black_box(black_box(&one).dot(&one))));
        let ((), cost) = measure(|| {
            (0..threads).into_par_iter().with_max_len(1).for_each(work);
            Ok(())
        })?;
        best = best.max((2 * N * N * N * REPEAT * threads * threads) as f64 / cost.cpu_ms / 1e6);
    }
    Ok(best)
}

/// GB/s of all threads together, reading so many bytes: the best of five. By CPU time over threads.
///
/// # Errors
/// Never; like [`measure`].
pub fn read(threads: usize, bytes: usize) -> Result<f64> {
    let data = vec![1u64; bytes.div_ceil(8)];
    let mut best = 0.0f64;
    for _ in 0..5 {
        let (_, cost) = measure(|| {
            let parts = data.par_chunks(data.len().div_ceil(threads).max(1));
            Ok(black_box(parts.map(|part| part.iter().fold(0, |a: u64, x| a ^ x)).reduce(|| 0, |a, b| a ^ b)))
        })?;
        best = best.max((data.len() * 8 * threads) as f64 / cost.cpu_ms / 1e6);
    }
    Ok(best)
}
