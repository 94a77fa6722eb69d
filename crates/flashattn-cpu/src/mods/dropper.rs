//! Dropout of a strip of probabilities (or of their gradients).

use super::Strip;
use flashattn_spec::Dropout;
use flashattn_spec::philox::{self, threshold};

/// Dropout with what does not change from strip to strip. Which elements are dropped is a pure function of the
/// place, see [`flashattn_spec::philox`].
#[derive(Clone, Copy, Debug)]
pub struct Dropper {
    seed: u64,
    threshold: u32,
    factor: f32,
}

impl Dropper {
    /// For a valid dropout, 0 ≤ p < 1.
    pub fn new(dropout: Dropout) -> Self {
        Dropper { seed: dropout.seed, threshold: threshold(dropout.p), factor: 1.0 / (1.0 - dropout.p) }
    }

    /// What a kept value is multiplied by: 1 / (1 − p).
    pub fn factor(&self) -> f32 {
        self.factor
    }

    /// Dropped values become 0, the others are multiplied by 1 / (1 − p). `values` holds `rows · L` elements.
    #[inline(always)]
    pub fn apply<const L: usize>(&self, at: &Strip, values: &mut [f32]) {
        let [batch, head] = [at.batch as u32, at.head as u32];
        // The generator gives the words of four neighbouring keys; the strip may start among four.
        let first = at.kv0 as usize / 4;
        let last = (at.kv0 as usize + at.rows).div_ceil(4);
        for group in (first..last).step_by(WIDTH / L) {
            let key = std::array::from_fn(|i| (group + i / L) as u32);
            let query = std::array::from_fn(|i| (at.q0 as u32).wrapping_add((i % L) as u32));
            let words = philox([key, query, [head; WIDTH], [batch; WIDTH]], self.seed);
            for part in 0..(WIDTH / L).min(last - group) {
                for (j, words) in words.iter().enumerate() {
                    let row = (4 * (group + part) + j).wrapping_sub(at.kv0 as usize);
                    if row < at.rows {
                        self.row::<L>(&mut values[row * L..(row + 1) * L], &words[part * L..(part + 1) * L]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn row<const L: usize>(&self, values: &mut [f32], words: &[u32]) {
        let (values, words) = (&mut values[..L], &words[..L]);
        for l in 0..L {
            let kept = values[l] * self.factor;
            values[l] = if words[l] < self.threshold { 0.0 } else { kept };
        }
    }
}

/// Counters done at a time.
const WIDTH: usize = 16;
/// The generator's constants; a test compares with [`flashattn_spec::philox`].
const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Philox 4x32-10 of many counters, as [`flashattn_spec::philox::philox4x32`] does it for one.
///
/// Vector units multiply 32 × 32 bits to 64 in every other lane. So each u64 here holds two counters, and nothing
/// need be shuffled.
#[inline(always)]
fn philox(counter: [[u32; WIDTH]; 4], seed: u64) -> [[u32; WIDTH]; 4] {
    const HIGH: u64 = 0xffff_ffff_0000_0000;
    let [mut c0, mut c1, mut c2, mut c3] = counter.map(bytemuck::cast::<[u32; WIDTH], [u64; WIDTH / 2]>);
    let mut key = philox::key(seed);
    // High and low words of the products of both halves.
    let product = |x: u64, m: u32| {
        let (one, other) = ((x & !HIGH) * u64::from(m), (x >> 32) * u64::from(m));
        ((one >> 32) | (other & HIGH), (one & !HIGH) | (other << 32))
    };
    for _ in 0..ROUNDS {
        let both = key.map(|k| u64::from(k) << 32 | u64::from(k));
        for i in 0..WIDTH / 2 {
            let (high0, low0) = product(c0[i], MULTIPLIERS[0]);
            let (high1, low1) = product(c2[i], MULTIPLIERS[1]);
            (c0[i], c1[i], c2[i], c3[i]) = (high1 ^ c1[i] ^ both[0], low1, high0 ^ c3[i] ^ both[1], low0);
        }
        for k in 0..2 {
            key[k] = key[k].wrapping_add(WEYL[k]);
        }
    }
    [c0, c1, c2, c3].map(bytemuck::cast)
}
