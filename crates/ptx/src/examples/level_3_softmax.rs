//! Level 3: softmax of rows, reading each row from memory once for the statistics and once for the result.
//!
//! The running maximum `m` and sum `l` of each thread are kept as in online softmax: when the maximum grows from `m` to
//! `m'`, the sum so far is multiplied by `2^(m - m')`. Scores are scaled by log2(e) first, for the exponent unit knows
//! powers of two only.

use std::f32::consts::LOG2_E;

use crate::build::Reg;
use crate::{Kernel, Target, build};

/// `y[r] = softmax(x[r])`: rows of `columns` f32, a multiple of 4, densely packed; 16-byte aligned. Grid: a block a row.
pub fn softmax() -> Kernel {
    const THREADS: u32 = 128;
    build("softmax", Target::Sm80, THREADS, |k| {
        let (x, y, columns) = (k.param_ptr("x"), k.param_ptr("y"), k.param_u32("columns"));
        let scratch = k.shared("scratch", THREADS / 32 * 8, 16);
        let (tid, lane) = (k.tid(0), k.lane());
        let row = k.ctaid(0).mul_wide(columns) * 4;
        let (x, y) = (x + row, y + row);

        // (m, l) and (m', l') of two parts: the larger maximum, and both sums rescaled to it. Of a part without
        // elements, m is −∞ and l is 0; the difference of two −∞ would be NaN, so it is not taken.
        let merge = |m: Reg<'_, f32>, l: Reg<'_, f32>, other_m: Reg<'_, f32>, other_l: Reg<'_, f32>| {
            let new = m.max(other_m);
            let base = new.eq(f32::NEG_INFINITY).select(0.0, new);
            let sum = (m - base).exp2().fma(l, (other_m - base).exp2() * other_l);
            m.set(new);
            l.set(sum);
        };

        let (m, l) = (k.var(f32::NEG_INFINITY), k.var(0.0));
        k.for_(tid * 4, columns, THREADS * 4, |i| {
            let four: [Reg<'_, f32>; 4] = i.mad_wide(4, x).address().load_vec();
            let four = four.map(|v| v * LOG2_E);
            let most = four[0].max(four[1]).max(four[2].max(four[3]));
            let base = most.eq(f32::NEG_INFINITY).select(0.0, most);
            let [a, b, c, d] = four.map(|v| (v - base).exp2());
            merge(m, l, most, (a + b) + (c + d));
        });

        // All threads of the warp, then all warps.
        for distance in [16, 8, 4, 2, 1] {
            merge(m, l, m.shfl_bfly(distance), l.shfl_bfly(distance));
        }
        k.if_(lane.eq(0), || (scratch + (tid >> 5) * 8).store_vec([m, l]));
        k.sync_threads();
        m.set(f32::NEG_INFINITY);
        l.set(0.0);
        for warp in 0..THREADS / 32 {
            let [other_m, other_l] = scratch.at(warp as i32 * 8).load_vec();
            merge(m, l, other_m, other_l);
        }

        let base = m.eq(f32::NEG_INFINITY).select(0.0, m);
        let scale = l.rcp();
        k.for_(tid * 4, columns, THREADS * 4, |i| {
            let four: [Reg<'_, f32>; 4] = i.mad_wide(4, x).address().load_vec();
            i.mad_wide(4, y).address().store_vec(four.map(|v| v.fma(LOG2_E, -base).exp2() * scale));
        });
    })
}
