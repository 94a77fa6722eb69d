//! Warp-level matrices: `ldmatrix`, `stmatrix`, `mma`. Elements are decoded to f32, products are summed in f32.

use std::sync::LazyLock;

use half::f16;

use super::cluster::{Cluster, Context};
use super::error::Error;
use super::shared::ALL_LANES;
use crate::fp8;
use crate::instr::{Accumulator, Element, Lanes};

static E4M3: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|bits| fp8::from_e4m3(bits as u8)));
static E5M2: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|bits| fp8::from_e5m2(bits as u8)));

/// Decodes elements from memory's bytes.
pub(super) fn decode(element: Element, bytes: &[u8], mut put: impl FnMut(usize, f32)) {
    let half = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]);
    match element {
        Element::F16 => {
            bytes.chunks_exact(2).enumerate().for_each(|(i, x)| put(i, f16::from_bits(half(x)).to_f32()))
        }
        Element::BF16 => {
            bytes
                .chunks_exact(2)
                .enumerate()
                .for_each(|(i, x)| put(i, f32::from_bits((half(x) as u32) << 16)));
        }
        // The tensor core takes the upper 19 bits.
        Element::TF32 => bytes.chunks_exact(4).enumerate().for_each(|(i, x)| {
            put(i, f32::from_bits(u32::from_le_bytes([x[0], x[1], x[2], x[3]]) & 0xffff_e000));
        }),
        Element::E4M3 => bytes.iter().enumerate().for_each(|(i, &x)| put(i, E4M3[x as usize])),
        Element::E5M2 => bytes.iter().enumerate().for_each(|(i, &x)| put(i, E5M2[x as usize])),
    }
}

/// The fragment of an operand of 16 (A) or 8 (B) rows: `rows × k` values, row by row. Register `j` of lane `l` has
/// elements of row `l / 4` (+ 8 for odd registers of A), from element `l % 4` words of its 16-byte group on.
pub(super) fn fragment(element: Element, registers: &[Lanes], rows: usize, k: usize) -> Vec<f32> {
    let per_word = 4 / element.bytes() as usize;
    let groups = rows / 8;
    let mut values = vec![0.0; rows * k];
    for (j, register) in registers.iter().enumerate() {
        for (lane, &bits) in register.iter().enumerate() {
            let row = lane / 4 + 8 * (j % groups);
            let column = per_word * (lane % 4) + 4 * per_word * (j / groups);
            let to = &mut values[row * k + column..][..per_word];
            decode(element, &(bits as u32).to_le_bytes(), |i, x| to[i] = x);
        }
    }
    values
}

/// Adds to each sum of `m × n` the products of row-major `a` (m × k) and `b` (k × n), summed over k first.
pub(super) fn multiply(a: &[f32], b: &[f32], n: usize, k: usize) -> Vec<f32> {
    let m = a.len() / k;
    let mut sums = vec![0.0f32; m * n];
    for (row, sums) in a.chunks_exact(k).zip(sums.chunks_exact_mut(n)) {
        for (&x, b) in row.iter().zip(b.chunks_exact(n)) {
            for (sum, &y) in sums.iter_mut().zip(b) {
                *sum += x * y;
            }
        }
    }
    sums
}

/// Row and column of element `i` of lane `l` in a 16-row accumulator fragment.
pub(super) fn accumulator(i: usize, lane: usize) -> (usize, usize) {
    (lane / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2)
}

/// Adds sums to accumulator registers of a 16-row fragment; without `keep` what was there does not count.
pub(super) fn accumulate(
    kind: Accumulator,
    register: &mut Lanes,
    j: usize,
    sums: &[f32],
    n: usize,
    keep: bool,
) {
    for (lane, bits) in register.iter_mut().enumerate() {
        let sum = |i: usize| {
            let (row, column) = accumulator(i, lane);
            sums[row * n + column]
        };
        *bits = match kind {
            Accumulator::F32 => {
                let old = if keep { f32::from_bits(*bits as u32) } else { 0.0 };
                (old + sum(j)).to_bits() as u64
            }
            Accumulator::F16 => [0, 1].iter().fold(0, |word, &half| {
                let old = if keep { f16::from_bits((*bits >> (16 * half)) as u16).to_f32() } else { 0.0 };
                word | (f16::from_f32(old + sum(2 * j + half)).to_bits() as u64) << (16 * half)
            }),
        };
    }
}

impl Cluster<'_> {
    /// Block and offset of each row's 16 bytes.
    fn matrix_rows(&mut self, cx: Context<'_>, count: usize) -> Result<Vec<(usize, u32)>, Error> {
        if !matches!(count, 1 | 2 | 4) {
            return Err(self.unsupported(cx, format!("{count} matrices: expected 1, 2 or 4")));
        }
        let addresses = self.operand(cx, 0)?;
        let mut rows = Vec::with_capacity(8 * count);
        for (lane, &address) in addresses[..8 * count].iter().enumerate() {
            rows.push(self.shared_at(cx, lane, address as u32, 16, 16, false)?);
        }
        let lanes = if count == 4 { u32::MAX } else { (1 << (8 * count)) - 1 };
        self.count_wavefronts(&addresses.map(|a| a as u32), lanes, 16);
        Ok(rows)
    }

    fn matrix_access(
        &mut self,
        cx: Context<'_>,
        write: bool,
        lane: usize,
        (block, offset): (usize, u32),
    ) -> Result<&mut [u8], Error> {
        let access = self.warps[cx.warp].access(ALL_LANES, cx.step);
        self.check_shared((cx.warp, cx.step), Some(lane), write, (block, offset, 16), access)?;
        Ok(&mut self.blocks[block].shared.data[offset as usize..offset as usize + 16])
    }

    pub(super) fn ldmatrix(&mut self, cx: Context<'_>, count: usize, transpose: bool) -> Result<(), Error> {
        let rows = self.matrix_rows(cx, count)?;
        for m in 0..count {
            let mut matrix = [[0u16; 8]; 8];
            for (r, row) in matrix.iter_mut().enumerate() {
                let lane = 8 * m + r;
                let bytes = self.matrix_access(cx, false, lane, rows[lane])?;
                *row = std::array::from_fn(|i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]));
            }
            let element = |r: usize, c: usize| if transpose { matrix[c][r] } else { matrix[r][c] } as u64;
            let value = |lane: usize| {
                let (r, c) = (lane / 4, 2 * (lane % 4));
                element(r, c) | element(r, c + 1) << 16
            };
            self.set(cx, m, &std::array::from_fn(value))?;
        }
        Ok(())
    }

    pub(super) fn stmatrix(&mut self, cx: Context<'_>, count: usize, transpose: bool) -> Result<(), Error> {
        let rows = self.matrix_rows(cx, count)?;
        for m in 0..count {
            let values = self.operand(cx, 1 + m)?;
            for r in 0..8 {
                let lane = 8 * m + r;
                let bytes = self.matrix_access(cx, true, lane, rows[lane])?;
                for c in 0..8 {
                    let (r, c) = if transpose { (c, r) } else { (r, c) };
                    let word = values[4 * r + c / 2] >> (16 * (c % 2));
                    let at = if transpose { r } else { c };
                    bytes[2 * at..2 * at + 2].copy_from_slice(&(word as u16).to_le_bytes());
                }
            }
        }
        Ok(())
    }

    pub(super) fn mma(
        &mut self,
        cx: Context<'_>,
        k: usize,
        a: Element,
        b: Element,
        d: Accumulator,
    ) -> Result<(), Error> {
        let registers = cx.instr.dst.len();
        if a.bytes() != b.bytes() || !matches!(k as u32 * a.bytes(), 16 | 32) {
            return Err(self.unsupported(cx, format!("mma of {a:?} and {b:?} of depth {k}")));
        }
        let a_count = 16 * k * a.bytes() as usize / 128;
        let mut operands = Vec::with_capacity(cx.instr.src.len());
        for i in 0..cx.instr.src.len() {
            operands.push(self.operand(cx, i)?);
        }
        let expected = if d == Accumulator::F32 { 4 } else { 2 };
        if registers != expected || operands.len() != a_count + a_count / 2 + registers {
            return Err(self.unsupported(cx, format!("mma of depth {k} with {} operands", operands.len())));
        }
        let left = fragment(a, &operands[..a_count], 16, k);
        let right = fragment(b, &operands[a_count..a_count + a_count / 2], 8, k);
        let transposed: Vec<f32> = (0..8 * k).map(|i| right[i % 8 * k + i / 8]).collect();
        let sums = multiply(&left, &transposed, 8, k);
        for j in 0..registers {
            let mut register = operands[a_count + a_count / 2 + j];
            accumulate(d, &mut register, j, &sums, 8, true);
            self.set(cx, j, &register)?;
        }
        self.counters.matrix_flops += 2 * 16 * 8 * k as u64;
        Ok(())
    }
}
