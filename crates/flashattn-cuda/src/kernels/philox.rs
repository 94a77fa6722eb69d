//! Dropout inside kernels: the spec's Philox 4x32-10 ([`flashattn_spec::philox`]), the same bits as on every executor.

use flashattn_spec::philox::{MULTIPLIERS, ROUNDS, WEYL};
use ptx::build::Reg;

/// The four random words of a counter under a key, as registers.
pub fn philox4x32<'k>(counter: [Reg<'k, u32>; 4], key: [Reg<'k, u32>; 2]) -> [Reg<'k, u32>; 4] {
    let ([mut c0, mut c1, mut c2, mut c3], [k0, k1]) = (counter, key);
    for round in 0..ROUNDS as u32 {
        // The key of a round is the first one and so many steps: the steps are constants.
        let k0 = k0 + WEYL[0].wrapping_mul(round);
        let k1 = k1 + WEYL[1].wrapping_mul(round);
        let ([lo0, hi0], [lo1, hi1]) = (c0.mul_halves(MULTIPLIERS[0]), c2.mul_halves(MULTIPLIERS[1]));
        (c0, c1, c2, c3) = (hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0);
    }
    [c0, c1, c2, c3]
}
