//! Dropout inside kernels: the spec's Philox 4x32-10 ([`flashattn_spec::philox`]), the same bits as on every executor.
//!
//! Four neighbouring keys share a counter, and no thread has all four: of a fragment whose rows are queries it has two, of a
//! transposed one's one. So the lanes that share counters take a part of them each, and then exchange what these say of the
//! keys: a bit an element, as all else would cost registers and shuffles for each word.

use std::ops::Range;

use flashattn_spec::philox::{MULTIPLIERS, ROUNDS, WEYL};
use ptx::build::{Builder, Reg};

use super::program::Place;

/// What dropout needs.
pub struct Dropout<'k> {
    /// Low and high half.
    seed: [Reg<'k, u32>; 2],
    /// Words below it drop.
    threshold: Reg<'k, u32>,
    /// 1 / (1 − p).
    pub keep_scale: Reg<'k, f32>,
}

/// Which registers of a thread's fragment are kept: a bit each, of 32 in a word.
pub struct Kept<'k> {
    words: Vec<Reg<'k, u32>>,
    /// Of the fragment.
    columns: u32,
}

impl<'k> Dropout<'k> {
    /// As a kernel's parameters.
    pub fn param(k: &'k Builder) -> Self {
        let seed = ["seed_low", "seed_high"].map(|name| k.param_u32(name));
        Dropout { seed, threshold: k.param_u32("threshold"), keep_scale: k.param_f32("keep_scale") }
    }

    /// The random words of the keys `4·fourth .. 4·fourth + 4` and a query.
    fn four(&self, place: &Place<'k>, q: Reg<'k, u32>, fourth: Reg<'k, u32>) -> [Reg<'k, u32>; 4] {
        philox4x32([fourth, q, place.head.bits(), place.batch.bits()], self.seed)
    }

    /// Which of these keys the query keeps.
    fn keeps_four(&self, place: &Place<'k>, q: Reg<'k, u32>, fourth: Reg<'k, u32>) -> [Reg<'k, bool>; 4] {
        self.four(place, q, fourth).map(|word| word.ge(self.threshold))
    }

    /// Whether a query keeps a key.
    pub fn keeps(&self, place: &Place<'k>, q: Reg<'k, u32>, kv: Reg<'k, u32>) -> Reg<'k, bool> {
        let [a, b, c, d] = self.four(place, q, kv >> 2);
        let odd = (kv & 1).ne(0);
        (kv & 2).ne(0).select(odd.select(d, c), odd.select(b, a)).ge(self.threshold)
    }

    /// Of a fragment whose rows are queries, of a multiple of 16 keys: `q` and `kv` are the thread's first, and those of the block
    /// multiples of 8. By whole warps.
    pub fn keep(&self, kept: &Kept<'k>, place: &Place<'k>, q: Reg<'k, u32>, kv: Reg<'k, u32>) {
        // Lanes 2i and 2i + 1 share the counters of both rows. Each takes every other eight keys, of which it has two of four.
        let fourth = (kv >> 2) + (q.builder().lane() & 1) * 2;
        self.words(kept, |own, eights| {
            for eight in eights.clone().step_by(2) {
                for row in 0..2 {
                    let kept = self.keeps_four(place, q + 8 * row, fourth + 2 * eight);
                    let first = (eight - eights.start) * 4 + 2 * row;
                    set_bits(own, kept, [first, first + 1, first + 4, first + 5]);
                }
            }
            exchange(own, 1, 4)
        });
    }

    /// The same of a fragment whose rows are keys.
    pub fn keep_transposed(&self, kept: &Kept<'k>, place: &Place<'k>, q: Reg<'k, u32>, kv: Reg<'k, u32>) {
        // Lanes that differ in bits 2 and 3 share counters. Of the four registers of eight queries, two of each row, each takes one.
        let register = (q.builder().lane() >> 2) & 3;
        let (fourth, q) = ((kv >> 2) + (register & 2), q + (register & 1));
        self.words(kept, |own, eights| {
            for eight in eights.clone() {
                let first = (eight - eights.start) * 4;
                let kept = self.keeps_four(place, q + 8 * eight, fourth);
                set_bits(own, kept, [0, 1, 2, 3].map(|key| first + key));
            }
            exchange(exchange(own, 4, 1), 8, 2)
        });
    }

    /// Of the fragment's columns in eights what `bits` makes of up to eight of these and a word, 0 at first.
    fn words(&self, kept: &Kept<'k>, bits: impl Fn(Reg<'k, u32>, Range<u32>) -> Reg<'k, u32>) {
        let k = self.threshold.builder();
        kept.words.iter().for_each(|word| word.set(u32::MAX));
        // No word is below 0. And ptxas moves nothing to before a branch: the products issued there are to run meanwhile.
        k.if_(self.threshold.ne(0), || {
            for (i, word) in (0..).zip(&kept.words) {
                word.set(bits(k.var(0u32), 8 * i..(8 * i + 8).min(kept.columns / 8)));
            }
        });
    }
}

impl<'k> Kept<'k> {
    /// Not yet written.
    pub fn new(k: &'k Builder, columns: u32) -> Self {
        Kept { words: k.regs(columns.div_ceil(64) as usize), columns }
    }

    /// Whether the fragment's register `i` is kept.
    pub fn at(&self, i: usize) -> Reg<'k, bool> {
        (self.words[i / 32] & (1 << (i % 32))).ne(0)
    }
}

fn set_bits<'k>(word: Reg<'k, u32>, on: [Reg<'k, bool>; 4], bits: [u32; 4]) {
    for (on, bit) in on.into_iter().zip(bits) {
        word.builder().when(on, || word.set(word | (1 << bit)));
    }
}

/// Between lanes whose index differs in this bit, of each two neighbouring fields of `width` bits: the lower lane gets both lower
/// ones, the upper both upper ones, its own in its own place.
fn exchange<'k>(own: Reg<'k, u32>, bit: u32, width: u32) -> Reg<'k, u32> {
    let (k, got) = (own.builder(), own.shfl_bfly(bit));
    let upper = (k.lane() & bit).ne(0);
    let lower_fields = u32::MAX / ((1 << width) + 1);
    let keep: Reg<'k, u32> = upper.select(lower_fields << width, lower_fields);
    (own & keep) | (upper.select(got >> width, got << width) & (keep ^ u32::MAX))
}

/// The four random words of a counter under a key, as registers.
fn philox4x32<'k>(counter: [Reg<'k, u32>; 4], key: [Reg<'k, u32>; 2]) -> [Reg<'k, u32>; 4] {
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

#[cfg(test)]
mod tests {
    use flashattn_spec::philox;
    use ptx::emulate::{Arg, Launch, Memory, emulate};
    use ptx::{Fragment, Target, build};

    use super::*;

    /// Every register of every thread of a warpgroup, of fragments that fill words and others.
    #[test]
    fn lanes_exchange_what_the_spec_keeps() {
        const PLACE: [u32; 4] = [3, 7, 40, 72];
        let [batch, head, q0, kv0] = PLACE;
        for (columns, transposed, p) in [
            (128, true, 0.1f32),
            (64, true, 0.5),
            (32, true, 0.9),
            (128, false, 0.1),
            (96, false, 0.5),
            (48, false, 0.9),
            (64, false, 0.0),
        ] {
            let seed = 0x1234_5678_9abc_def0;
            let kernel = build("kept", Target::Sm90a, 128, |k| {
                let [batch, head, q, kv] = ["batch", "head", "q", "kv"].map(|name| k.param_u32(name));
                let (dropout, out) = (Dropout::param(k), k.param_ptr("out"));
                let zero = k.var(0);
                let place = Place {
                    batch: batch.bits(),
                    head: head.bits(),
                    seqlen_q: zero,
                    seqlen_k: zero,
                    q_start: zero,
                    kv_start: zero,
                };
                let (row, column) = (Fragment::row(k), Fragment::column(k));
                let kept = Kept::new(k, columns);
                match transposed {
                    true => dropout.keep_transposed(&kept, &place, q + column, kv + row),
                    false => dropout.keep(&kept, &place, q + row, kv + column),
                }
                for i in 0..columns / 2 {
                    let kept = kept.at(i as usize).select(1u32, 0u32);
                    (k.tid(0) + 128 * i).mad_wide(4, out).address().store(kept);
                }
            });
            ptx::verify(&kernel).expect("lanes stay together");
            let mut memory = Memory::new();
            let out = memory.upload("out", &vec![2u32; 64 * columns as usize]);
            let mut args: Vec<Arg> = PLACE.map(Arg::U32).to_vec();
            args.extend(philox::key(seed).map(Arg::U32));
            args.extend([Arg::U32(philox::threshold(p)), Arg::F32(1.0), Arg::Buffer(out, 0)]);
            emulate(&kernel, &mut memory, &Launch { args, ..Launch::default() }).expect("runs");
            let got = memory.read::<u32>(out).expect("as written");
            for (at, &got) in got.iter().enumerate() {
                let (thread, i) = (at as u32 % 128, at / 128);
                let row = thread / 32 * 16 + thread % 32 / 4 + 8 * Fragment::half(i) as u32;
                let column = thread % 4 * 2 + Fragment::column_offset(i);
                let [q, kv] = if transposed { [column, row] } else { [row, column] };
                let expected = philox::keep(seed, batch, head, q0 + q, kv0 + kv, p);
                assert_eq!(got, u32::from(expected), "{columns} {transposed}: thread {thread}, register {i}");
            }
        }
    }
}
