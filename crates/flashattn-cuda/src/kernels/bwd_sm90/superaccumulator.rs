//! Sums of f32 that are the same whatever the order of their terms, for gradients that many blocks add to as they come.
//!
//! An f32 is an integer of 24 bits times a power of two, so a fixed-point number that is wide enough holds any sum of them without
//! rounding (Kulisch's long accumulator, or superaccumulator). Integers can be added in any order:
//!
//! ```text
//! limbs of 24 bits each, in words of 64 bits: what goes beyond stays there until the end
//! add x = m·2^(p − 149):  limb[p / 24] += m·2^(p mod 24) mod 2^24,  limb[p / 24 + 1] += what is left of it     (red.add.u64)
//! total:                  carry from limb to limb, round once
//! ```
//!
//! ∞ and NaN have flags.

use ptx::build::Reg;
use ptx::instr::Order;

/// Bits that a limb stands for.
const BITS: u32 = 24;

/// Limbs: from 2⁻¹⁴⁹, the smallest f32, to beyond 2¹²⁸.
const LIMBS: usize = 12;

/// Where the flags lie, one u32 each: the sum has a term that is ∞ or NaN; that is −∞ or NaN.
const FLAGS: i32 = 8 * LIMBS as i32;

/// Bytes of a sum. All zeros are the empty one.
pub(crate) const BYTES: u32 = 8 * LIMBS as u32 + 8;

/// A sum is of fewer terms: each adds less than 2²⁴ to a limb's word, which has 63 bits and a sign.
pub(crate) const MAX_TERMS: u128 = 1 << (63 - BITS);

/// Adds a term to the sum at an address, a multiple of 8.
pub(super) fn add<'k>(at: Reg<'k, u64>, term: Reg<'k, f32>) {
    let k = term.builder();
    let bits = term.bits::<u32>();
    let exponent = (bits >> 23) & 0xff;
    // Subnormal numbers have the exponent of the smallest normal ones, but not their leading bit.
    let significand = (bits & 0x7f_ffff) | (exponent.min(1) << 23);
    let place = exponent.max(1) - 1;
    let left = significand.to_u64() << (place % BITS);
    let word = (place / BITS).mad_wide(8, at);
    // One piece or two. A loop, too, so that ptxas does not begin with the next term before, for which there are no registers.
    k.loop_(|| {
        k.break_if(left.eq(0u64));
        let piece = left & ((1u64 << BITS) - 1);
        word.address().red_add(bits.ge(0x8000_0000u32).select(k.var(0u64) - piece, piece));
        left.set(left >> BITS);
        word.set(word + 8);
    });
    let not_finite = [!term.lt(f32::INFINITY), !term.gt(f32::NEG_INFINITY)];
    let one = k.var(1u32);
    for (i, flag) in not_finite.into_iter().enumerate() {
        let to = at.address().at(FLAGS + 4 * i as i32);
        k.when(flag, || to.store_as([one], Order::Relaxed));
    }
}

/// The sum at an address, rounded to the nearest f32.
pub(super) fn total(at: Reg<'_, u64>) -> Reg<'_, f32> {
    let (k, at) = (at.builder(), at.address());
    let limbs: Vec<Reg<'_, u64>> = (0..LIMBS).map(|i| at.at(8 * i as i32).load()).collect();
    let negative = carried(&limbs)[LIMBS - 1].ge(1u64 << 63);
    let limbs: Vec<_> = limbs.into_iter().map(|limb| negative.select(k.var(0u64) - limb, limb)).collect();
    let mut digits = carried(&limbs);
    // The last one has more digits than its own; with these the sum is beyond f32 anyway.
    let last = &mut digits[LIMBS - 1];
    *last = last.lt(1u64 << BITS).select(*last, (1u64 << BITS) - 1);
    // The highest digit that is not 0, in bits 40 to 63, and what comes after it: the lowest bit is set, too, if any after it is.
    // So the conversion rounds as it would round the whole sum.
    let (window, unit, after) = (k.var(0u64), k.var(0.0f32), k.var(0u64));
    for (i, &digit) in digits.iter().enumerate() {
        let mut value = digit << 40;
        if let Some(&second) = i.checked_sub(1).and_then(|i| digits.get(i)) {
            value = value | (second << 16);
        }
        if let Some(&third) = i.checked_sub(2).and_then(|i| digits.get(i)) {
            let rest = after | (third & 0xffu64);
            value = value | (third >> 8) | rest.ne(0u64).select(1u64, 0u64);
            after.set(after | third);
        }
        let here = digit.ne(0u64);
        window.set(here.select(value, window));
        // 2^(24·i − 149); the first is subnormal.
        let bits = if i == 0 { 1 } else { (BITS * i as u32 - 149 + 127) << 23 };
        unit.set(here.select(f32::from_bits(bits), unit));
    }
    // The first product is exact. So is the second, but for what is beyond f32: of a subnormal sum there is the first digit only.
    let magnitude = window.to_f32() * (1.0 / (1u64 << 40) as f32) * unit;
    let finite = negative.select(-magnitude, magnitude);
    let flags = at.at(FLAGS).load_vec::<u32, 2>().map(|flag| flag.ne(0u32));
    let [plus, minus] = flags;
    let one_sided = plus.select(f32::INFINITY, f32::NEG_INFINITY);
    let not_finite = (plus & minus).select(f32::NAN, one_sided);
    (plus | minus).select(not_finite, finite)
}

/// The digits that limbs stand for, each below 2²⁴; the last one takes what is left, and the sign.
fn carried<'k>(limbs: &[Reg<'k, u64>]) -> Vec<Reg<'k, u64>> {
    let mut carry: Option<Reg<'k, u64>> = None;
    let digits = limbs.iter().enumerate().map(|(i, &limb)| {
        let sum = carry.map_or(limb, |carry| limb + carry);
        carry = Some((sum.bits::<i64>() >> BITS).bits());
        if i + 1 < LIMBS { sum & ((1u64 << BITS) - 1) } else { sum }
    });
    digits.collect()
}

#[cfg(test)]
mod tests {
    use ptx::emulate::{Arg, Launch, Memory, emulate};
    use ptx::{Kernel, Target, build};
    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;

    /// Sums of several blocks' threads, of which each adds a few terms, in an order that depends on the seed.
    fn emulated(sums: &[Vec<f32>], seed: u64) -> Vec<f32> {
        let run = |kernel: &Kernel, memory: &mut Memory, grid, args| {
            ptx::verify(kernel).unwrap();
            let launch = Launch { grid: [grid, 1, 1], args, seed, resident: 4, ..Launch::default() };
            emulate(kernel, memory, &launch).unwrap();
        };
        let adding = build("add", Target::Sm90, 32, |k| {
            let (terms, sums) = (k.param_ptr("terms"), k.param_ptr("sums"));
            let (from, to) = (k.param_u32("from"), k.param_u32("to"));
            let sum = (sums + k.param_u32("sum").mul_wide(BYTES)).address().reg();
            let first = from + k.ctaid(0) * 32 + k.tid(0);
            k.for_(first, to, k.nctaid(0) * 32, |i| {
                add(sum, i.mad_wide(4, terms).address().load());
            });
        });
        let rounding = build("total", Target::Sm90, 32, |k| {
            let (sums, totals, count) = (k.param_ptr("sums"), k.param_ptr("totals"), k.param_u32("count"));
            k.for_(k.tid(0), count, 32u32, |i| {
                i.mad_wide(4, totals).address().store(total(i.mad_wide(BYTES, sums)));
            });
        });
        let mut memory = Memory::new();
        let terms = memory.upload("terms", &sums.concat());
        let limbs = memory.upload("sums", &vec![0u8; sums.len() * BYTES as usize]);
        let totals = memory.alloc("totals", 4 * sums.len());
        let mut from = 0;
        for (i, sum) in sums.iter().enumerate() {
            let to = from + sum.len() as u32;
            let numbers = [from, to, i as u32].map(Arg::U32);
            let args = [Arg::Buffer(terms, 0), Arg::Buffer(limbs, 0)].into_iter().chain(numbers).collect();
            run(&adding, &mut memory, 5, args);
            from = to;
        }
        let count = Arg::U32(sums.len() as u32);
        run(&rounding, &mut memory, 1, vec![Arg::Buffer(limbs, 0), Arg::Buffer(totals, 0), count]);
        memory.read(totals).unwrap()
    }

    /// The rounded sum of finite terms: in f64 without error as a sum of numbers of which each is small beside the next (Shewchuk),
    /// of which the last two decide.
    fn expected(terms: &[f32]) -> f32 {
        let mut parts: Vec<f64> = Vec::new();
        for &term in terms {
            let (mut carry, mut next) = (f64::from(term), Vec::new());
            for part in parts {
                let (large, small) = if carry.abs() < part.abs() { (part, carry) } else { (carry, part) };
                carry = large + small;
                let error = small - (carry - large);
                if error != 0.0 {
                    next.push(error);
                }
            }
            next.push(carry);
            parts = next;
        }
        let mut high = parts.pop().unwrap_or(0.0);
        let mut rest = 0.0;
        while let Some(part) = parts.pop() {
            let sum = high + part;
            rest = part - (sum - high);
            high = sum;
            if rest != 0.0 {
                break;
            }
        }
        // Rounded to odd, so that the second rounding sees that there was something.
        if rest != 0.0 && high.to_bits() & 1 == 0 {
            high = if (rest > 0.0) == (high > 0.0) { high.abs().next_up() } else { high.abs().next_down() }
                .copysign(high);
        }
        high as f32
    }

    #[test]
    fn sums_are_exact_and_rounded_once() {
        let (tiny, large, max) = (f32::from_bits(1), 2f32.powi(100), f32::MAX);
        let mut sums: Vec<Vec<f32>> = vec![
            vec![],
            vec![-0.0, 0.0],
            vec![1.0, large, 2f32.powi(-100), -large],
            vec![large, 2f32.powi(-100), -1.0, -large, 1.0],
            vec![tiny; 77],
            vec![tiny, -3.0 * tiny, f32::MIN_POSITIVE, -tiny],
            vec![-f32::MIN_POSITIVE, tiny],
            // Ties to even, and just beside them, by a term that is very small.
            vec![1.0, f32::EPSILON / 2.0],
            vec![1.0 + f32::EPSILON, f32::EPSILON / 2.0],
            vec![1.0, f32::EPSILON / 2.0, tiny],
            vec![-1.0 - f32::EPSILON, -f32::EPSILON / 2.0, tiny],
            // Beyond f32 and back, and not back.
            vec![max, max, -max, 3.0],
            vec![max; 1000].into_iter().chain(vec![-max; 999]).collect(),
            vec![-max, -max],
            vec![max, 2f32.powi(102)],
            vec![max, 2f32.powi(103)],
        ];
        let mut rng = SmallRng::seed_from_u64(5);
        for spread in [0, 3, 24, 60, 120, 253] {
            for count in [1, 2, 3, 40, 500] {
                let mut term = || {
                    let exponent = (127 - spread / 2 + rng.random_range(0..=spread)).clamp(0, 254) as u32;
                    f32::from_bits(rng.random::<u32>() & 0x807f_ffff | exponent << 23)
                };
                let mut terms: Vec<f32> = (0..count).map(|_| term()).collect();
                // Most of it cancels.
                let minus: Vec<f32> = terms.iter().skip(1).map(|x| -x).collect();
                sums.push(terms.clone());
                terms.extend(minus);
                terms.push(term());
                sums.push(terms);
            }
        }
        let expected: Vec<f32> = sums.iter().map(|terms| expected(terms)).collect();
        for seed in 0..3 {
            for ((got, expected), terms) in emulated(&sums, seed).iter().zip(&expected).zip(&sums) {
                assert!(got == expected, "{got:e} instead of {expected:e}: {terms:?}");
            }
            sums.iter_mut().for_each(|terms| terms.reverse());
        }
    }

    #[test]
    fn infinity_and_nan_stay() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let sums = [
            vec![1.0, inf, -5.0, inf],
            vec![-inf, f32::MAX, f32::MAX],
            vec![inf, 1.0, -inf],
            vec![2.0, nan, 1.0],
            vec![-nan, -inf],
            vec![f32::MAX, 7.0],
        ];
        let got = emulated(&sums, 0);
        assert!(got[..2] == [inf, -inf] && got[2..5].iter().all(|x| x.is_nan()) && got[5] == f32::MAX);
    }

    #[test]
    fn limbs_have_room_for_the_most_terms() {
        // The largest term's pieces, one less than the limit times; and what is carried into a limb.
        let most = (MAX_TERMS - 1) * ((1 << BITS) - 1);
        assert!(most + (most >> BITS) < i64::MAX as u128);
    }
}
