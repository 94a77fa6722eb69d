//! Level 1: `c = a + b`.

use crate::{Kernel, Target, build};

/// `c[i] = a[i] + b[i]` for `i < n`; f32. Grid: at least `n / 256` blocks, rounded up.
pub fn vector_add() -> Kernel {
    build("vector_add", Target::Sm80, 256, |k| {
        let (a, b, c, n) = (k.param_ptr("a"), k.param_ptr("b"), k.param_ptr("c"), k.param_u32("n"));
        let i = k.ctaid(0) * 256 + k.tid(0);
        // Threads past the end do nothing.
        k.if_(i.lt(n), || {
            let at = |base| i.mad_wide(4, base).address();
            let sum = at(a).load::<f32>() + at(b).load::<f32>();
            at(c).store(sum);
        });
    })
}
