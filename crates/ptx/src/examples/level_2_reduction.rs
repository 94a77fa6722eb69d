//! Level 2: the sum of an array.

use crate::{Kernel, Target, build};

/// Adds `x[0] + … + x[n - 1]` (f32) to `*sum`, which the caller has set to zero. Any grid: each block strides through
/// the array. The order of the blocks' additions varies from run to run.
pub fn reduction() -> Kernel {
    const THREADS: u32 = 256;
    build("reduction", Target::Sm80, THREADS, |k| {
        let (x, sum, n) = (k.param_ptr("x"), k.param_ptr("sum"), k.param_u32("n"));
        let parts = k.shared("parts", THREADS / 32 * 4, 16);
        let (tid, lane) = (k.tid(0), k.lane());

        // Each thread's own part: a loop on the GPU, not unrolled.
        let part = k.var(0.0);
        k.for_(k.ctaid(0) * THREADS + tid, n, k.nctaid(0) * THREADS, |i| {
            part.set(part + i.mad_wide(4, x).address().load::<f32>());
        });

        // A warp's: exchange with the lane 16, 8, 4, 2, 1 away. A Rust `for` unrolls.
        for distance in [16, 8, 4, 2, 1] {
            part.set(part + part.shfl_bfly(distance));
        }

        // The block's: through shared memory, then again within the first warp.
        k.if_(lane.eq(0), || (parts + (tid >> 5) * 4).store(part));
        k.sync_threads();
        k.if_(tid.lt(32), || {
            let warps = THREADS / 32;
            let total = k.var(0.0);
            k.if_(lane.lt(warps), || total.set((parts + lane * 4).load::<f32>()));
            for distance in [4, 2, 1] {
                total.set(total + total.shfl_bfly(distance));
            }
            k.if_(lane.eq(0), || sum.address().red_add(total));
        });
    })
}
