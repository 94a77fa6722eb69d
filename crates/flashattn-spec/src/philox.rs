//! Dropout as a pure function of the place: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers:
//! as easy as 1, 2, 3. SC 2011), a counter-based generator. There is no state to carry, so that forward and
//! backward, every executor and every block size drop the same entries without storing a mask (the paper keeps
//! the generator's state for the same purpose: Algorithm 2, line 1).
//!
//! key = the seed's low and high half; counter = (kv / 4, q, head, batch); of the four words that come out,
//! word `kv % 4` decides about `kv`. An entry is dropped when its word is less than [`threshold`]`(p)`.
//! `q` and `kv` count from the start of their own sequence; `head` is the query head.

/// Rounds of the generator; 10 is the published default with a wide safety margin.
pub const ROUNDS: usize = 10;
/// Multipliers of a round.
pub const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Added to the key after each round: the golden ratio and √3 − 1.
pub const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// High and low half of the 64-bit product.
#[inline(always)]
const fn mul_hi_lo(a: u32, b: u32) -> (u32, u32) {
    let product = a as u64 * b as u64;
    ((product >> 32) as u32, product as u32)
}

/// The four random words that belong to a counter under a key.
#[inline(always)]
pub const fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    let mut round = 0;
    while round < ROUNDS {
        let (hi0, lo0) = mul_hi_lo(MULTIPLIERS[0], c0);
        let (hi1, lo1) = mul_hi_lo(MULTIPLIERS[1], c2);
        (c0, c1, c2, c3) = (hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0);
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
        round += 1;
    }
    [c0, c1, c2, c3]
}

/// The generator's key: the seed's low and high half.
#[inline(always)]
pub const fn key(seed: u64) -> [u32; 2] {
    [seed as u32, (seed >> 32) as u32]
}

/// ⌊p · 2³²⌋ for a drop probability in [0, 1): words below it mean "dropped".
#[inline]
pub fn threshold(p: f32) -> u32 {
    // Exact: an f32 times a power of two fits f64. The cast saturates, whatever p is.
    (f64::from(p) * 4_294_967_296.0) as u32
}

/// Whether the probability at this place is kept by dropout with drop probability `p` in [0, 1).
#[inline]
pub fn keep(seed: u64, batch: u32, head: u32, q: u32, kv: u32, p: f32) -> bool {
    philox4x32([kv / 4, q, head, batch], key(seed))[(kv % 4) as usize] >= threshold(p)
}

/// The words of four neighbouring keys for `L` neighbouring queries: `[kv % 4][lane]` for keys `4·kv4 .. 4·kv4 + 4`
/// and queries `q0 .. q0 + L`. The same numbers as [`philox4x32`], written so that the compiler keeps one lane of
/// a vector register a query.
#[inline(always)]
pub fn drop_words<const L: usize>(seed: u64, batch: u32, head: u32, q0: u32, kv4: u32) -> [[u32; L]; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = [[kv4; L], [q0; L], [head; L], [batch; L]];
    for (lane, q) in c1.iter_mut().enumerate() {
        *q = q.wrapping_add(lane as u32);
    }
    let [mut k0, mut k1] = key(seed);
    for _ in 0..ROUNDS {
        for lane in 0..L {
            let (hi0, lo0) = mul_hi_lo(MULTIPLIERS[0], c0[lane]);
            let (hi1, lo1) = mul_hi_lo(MULTIPLIERS[1], c2[lane]);
            (c0[lane], c1[lane], c2[lane], c3[lane]) = (hi1 ^ c1[lane] ^ k0, lo1, hi0 ^ c3[lane] ^ k1, lo0);
        }
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with Random123 (`kat_vectors`, philox4x32 with 10 rounds).
    #[test]
    fn known_answers() {
        let answers = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in answers {
            assert_eq!(philox4x32(counter, key), expected);
        }
        const AT_COMPILE_TIME: [u32; 4] = philox4x32([0; 4], [0; 2]);
        assert_eq!(AT_COMPILE_TIME[0], 0x6627_e8d5);
    }

    #[test]
    fn lanes_equal_the_scalar_generator() {
        let (seed, batch, head, kv4) = (0x1234_5678_9abc_def0, 3, 7, 41);
        for q0 in [0, 5, u32::MAX - 3] {
            let words = drop_words::<16>(seed, batch, head, q0, kv4);
            for lane in 0..16 {
                let q = q0.wrapping_add(lane);
                let expected = philox4x32([kv4, q, head, batch], key(seed));
                for (word, expected) in words.iter().zip(expected) {
                    assert_eq!(word[lane as usize], expected);
                }
            }
            for kv in 0..4 {
                let kept = words[kv as usize][0] >= threshold(0.3);
                assert_eq!(keep(seed, batch, head, q0, 4 * kv4 + kv, 0.3), kept);
            }
        }
    }

    #[test]
    fn thresholds() {
        assert_eq!(threshold(0.0), 0, "p = 0 drops nothing");
        assert_eq!(threshold(0.5), 1 << 31);
        assert_eq!(threshold(0.1), 429_496_736, "f32 0.1 is a little above 0.1");
        assert_eq!(threshold(1.0 - f32::EPSILON / 2.0), u32::MAX - 255, "the largest p below 1");
    }

    /// The share that is dropped, and how often neighbours are dropped together, are within five standard
    /// deviations of independent draws, along every coordinate.
    #[test]
    fn drops_look_independent() {
        let p = 0.2f32;
        let dropped = |seed, b, h, q, kv| !keep(seed, b, h, q, kv, p);
        let n = 1u32 << 16;
        let check = |count: usize, probability: f64, what: &str| {
            let mean = f64::from(n) * probability;
            let deviation = (mean * (1.0 - probability)).sqrt();
            assert!((count as f64 - mean).abs() < 5.0 * deviation, "{what}: {count}, expected {mean}");
        };
        let places = || (0..n).map(|i| (i >> 8, i & 255));
        let p = f64::from(p);
        check(places().filter(|&(q, kv)| dropped(1, 2, 3, q, kv)).count(), p, "share");
        let both = |other: &dyn Fn(u32, u32) -> bool| {
            places().filter(|&(q, kv)| dropped(1, 2, 3, q, kv) && other(q, kv)).count()
        };
        check(both(&|q, kv| dropped(1, 2, 3, q, kv + 1)), p * p, "next key");
        check(both(&|q, kv| dropped(1, 2, 3, q, kv + 4)), p * p, "next counter");
        check(both(&|q, kv| dropped(1, 2, 3, q + 1, kv)), p * p, "next query");
        check(both(&|q, kv| dropped(1, 2, 4, q, kv)), p * p, "next head");
        check(both(&|q, kv| dropped(1, 3, 3, q, kv)), p * p, "next sequence");
        check(both(&|q, kv| dropped(2, 2, 3, q, kv)), p * p, "next seed");
        check(both(&|q, kv| dropped(1 + (1 << 32), 2, 3, q, kv)), p * p, "seed's high half");
    }
}
