//! AMX: bf16 products on tiles of 16 rows × 64 bytes. A tile product is `C[16×16 f32] += A[16×32 bf16] · B`, where
//! B holds 32 × 16 values as 16 rows of pairs (two successive k side by side, "VNNI").
//!
//! Operands are stored as whole tiles of 1 KiB one after the other, so that a tile load touches 16 adjacent cache
//! lines. The intrinsics are not stable: the instructions are written as inline assembly.

use crate::arch::avx512::{Avx512, exp2_by, transpose_16x16};
use crate::engine::{Engine, FusedStep, HEADROOM, Late, Left, Rows, Shape, round_up};
use crate::gemm::Init;
use crate::simd::Simd;
use flashattn_spec::Element;
use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::ops::Range;

/// Whether the CPU has AMX-BF16 (and AVX512-BF16 for the conversions) and the kernel lets this process use tiles.
pub fn available() -> bool {
    if !is_x86_feature_detected!("avx512bf16") {
        return false;
    }
    let leaf = __cpuid_count(7, 0);
    let (bf16, tile) = (leaf.edx >> 22 & 1, leaf.edx >> 24 & 1);
    bf16 == 1 && tile == 1 && permitted()
}

/// Asks Linux for the tile state (it is 8 KiB a thread, so it is off until asked for).
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: a system call without pointers; it fails on kernels that do not know it.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The tile unit, for T = bf16.
#[derive(Debug)]
pub struct Amx<T>(PhantomData<T>);
impl<T> Clone for Amx<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Amx<T> {}

/// Palette 1, all eight tiles 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig([u8; 64]);

const CONFIG: TileConfig = {
    let mut c = [0u8; 64];
    c[0] = 1;
    let mut i = 0;
    while i < 8 {
        c[16 + 2 * i] = 64;
        c[48 + i] = 16;
        i += 1;
    }
    TileConfig(c)
};

/// f32 slots of a tile of any type.
const TILE: usize = 256;
/// Keys or features that one tile of bf16 spans.
const DEPTH: usize = 32;

/// Tiles of an operand: `across` from one row (left) or column (right) of tiles to the next, `along` from one step
/// of the contraction to the next, in f32.
#[derive(Clone, Copy)]
struct Tiles {
    ptr: *const f32,
    across: usize,
    along: usize,
}

/// C (2×2 tiles, `c_row` and `c_col` apart) from zero or memory, plus `steps` products of two tiles of A and two
/// of B.
///
/// # Safety
/// All tiles addressed are valid; tiles are configured.
#[inline(always)]
unsafe fn block_2x2(steps: usize, a: Tiles, b: Tiles, c: *mut f32, c_row: usize, c_col: usize, add: bool) {
    // SAFETY: the caller's pointers are valid for every tile.
    unsafe {
        let c = [c, c.add(c_col), c.add(c_row), c.add(c_row + c_col)];
        if add {
            asm!(
                "tileloadd tmm0, [{0} + {s}*1]", "tileloadd tmm1, [{1} + {s}*1]",
                "tileloadd tmm2, [{2} + {s}*1]", "tileloadd tmm3, [{3} + {s}*1]",
                in(reg) c[0], in(reg) c[1], in(reg) c[2], in(reg) c[3], s = in(reg) 64usize, options(nostack),
            );
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack));
        }
        let (mut left, mut right) = (a.ptr, b.ptr);
        for _ in 0..steps {
            asm!(
                "tileloadd tmm4, [{a0} + {s}*1]", "tileloadd tmm6, [{b0} + {s}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {s}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {s}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                a0 = in(reg) left, a1 = in(reg) left.wrapping_add(a.across),
                b0 = in(reg) right, b1 = in(reg) right.wrapping_add(b.across),
                s = in(reg) 64usize, options(nostack),
            );
            left = left.wrapping_add(a.along);
            right = right.wrapping_add(b.along);
        }
        asm!(
            "tilestored [{0} + {s}*1], tmm0", "tilestored [{1} + {s}*1], tmm1",
            "tilestored [{2} + {s}*1], tmm2", "tilestored [{3} + {s}*1], tmm3",
            in(reg) c[0], in(reg) c[1], in(reg) c[2], in(reg) c[3], s = in(reg) 64usize, options(nostack),
        );
    }
}

/// Scores for one or two feature tiles (head_dim ≤ 64): the queries stay in four tile registers, so that a tile
/// of keys is loaded once and nothing else.
///
/// # Safety
/// As [`block_2x2`]: `n` tiles of keys at `k`, 2 × `steps` tiles at `q`; `s` holds `n` tiles a vector.
#[inline(always)]
unsafe fn scores_stationary(n: usize, steps: usize, k: *const f32, q: *const f32, s: *mut f32, s_col: usize) {
    // SAFETY: the caller's pointers are valid for every tile.
    unsafe {
        asm!(
            "tileloadd tmm4, [{0} + {s}*1]", "tileloadd tmm6, [{1} + {s}*1]",
            in(reg) q, in(reg) q.add(steps * TILE), s = in(reg) 64usize, options(nostack),
        );
        if steps == 2 {
            asm!(
                "tileloadd tmm5, [{0} + {s}*1]", "tileloadd tmm7, [{1} + {s}*1]",
                in(reg) q.add(TILE), in(reg) q.add(3 * TILE), s = in(reg) 64usize, options(nostack),
            );
            for r in 0..n {
                asm!(
                    "tilezero tmm0", "tilezero tmm1",
                    "tileloadd tmm2, [{k0} + {s}*1]",
                    "tdpbf16ps tmm0, tmm2, tmm4",
                    "tdpbf16ps tmm1, tmm2, tmm6",
                    "tileloadd tmm3, [{k1} + {s}*1]",
                    "tdpbf16ps tmm0, tmm3, tmm5",
                    "tdpbf16ps tmm1, tmm3, tmm7",
                    "tilestored [{s0} + {s}*1], tmm0", "tilestored [{s1} + {s}*1], tmm1",
                    k0 = in(reg) k.add(2 * r * TILE), k1 = in(reg) k.add((2 * r + 1) * TILE),
                    s0 = in(reg) s.add(r * TILE), s1 = in(reg) s.add(s_col + r * TILE),
                    s = in(reg) 64usize, options(nostack),
                );
            }
        } else {
            for r in 0..n {
                asm!(
                    "tilezero tmm0", "tilezero tmm1",
                    "tileloadd tmm2, [{k0} + {s}*1]",
                    "tdpbf16ps tmm0, tmm2, tmm4",
                    "tdpbf16ps tmm1, tmm2, tmm6",
                    "tilestored [{s0} + {s}*1], tmm0", "tilestored [{s1} + {s}*1], tmm1",
                    k0 = in(reg) k.add(r * TILE),
                    s0 = in(reg) s.add(r * TILE), s1 = in(reg) s.add(s_col + r * TILE),
                    s = in(reg) 64usize, options(nostack),
                );
            }
        }
    }
}

/// Features of row r: none past the last row.
#[inline(always)]
fn have(r: usize, rows: usize, dim: usize) -> usize {
    if r < rows { dim } else { 0 }
}

/// One step of a product that [`fused`] does beside the exponentials: Oᵀ += Vᵀ Pᵀ of an earlier panel, 2×2 tiles at a
/// time, which stay in tile registers 0 to 3 from step to step.
///
/// # Safety
/// The operands are valid; tiles are configured; nobody else uses tiles 0 to 3 while the product is under way.
#[inline(always)]
unsafe fn late_step(late: &mut Late) {
    let Some(job) = &mut late.0 else { return };
    let steps = job.keys.div_ceil(DEPTH);
    let width = job.p_rows.div_ceil(DEPTH) * TILE;
    // SAFETY: the caller's.
    unsafe {
        let c = job.o.add(job.block * 2 * TILE);
        let c = [c, c.add(job.o_rows * 16), c.add(TILE), c.add(TILE + job.o_rows * 16)];
        if job.step == 0 {
            asm!(
                "tileloadd tmm0, [{0} + {s}*1]", "tileloadd tmm1, [{1} + {s}*1]",
                "tileloadd tmm2, [{2} + {s}*1]", "tileloadd tmm3, [{3} + {s}*1]",
                in(reg) c[0], in(reg) c[1], in(reg) c[2], in(reg) c[3], s = in(reg) 64usize, options(nostack),
            );
        }
        let a = job.vt.ptr.add(job.block * 2 * job.vt.stride + job.step * TILE);
        let b = job.p.add(job.step * TILE);
        asm!(
            "tileloadd tmm6, [{a0} + {s}*1]", "tileloadd tmm7, [{b0} + {s}*1]",
            "tdpbf16ps tmm0, tmm6, tmm7",
            "tileloadd tmm7, [{b1} + {s}*1]",
            "tdpbf16ps tmm1, tmm6, tmm7",
            "tileloadd tmm6, [{a1} + {s}*1]",
            "tdpbf16ps tmm3, tmm6, tmm7",
            "tileloadd tmm7, [{b0} + {s}*1]",
            "tdpbf16ps tmm2, tmm6, tmm7",
            a0 = in(reg) a, a1 = in(reg) a.add(job.vt.stride), b0 = in(reg) b, b1 = in(reg) b.add(width),
            s = in(reg) 64usize, options(nostack),
        );
        job.step += 1;
        if job.step == steps {
            asm!(
                "tilestored [{0} + {s}*1], tmm0", "tilestored [{1} + {s}*1], tmm1",
                "tilestored [{2} + {s}*1], tmm2", "tilestored [{3} + {s}*1], tmm3",
                in(reg) c[0], in(reg) c[1], in(reg) c[2], in(reg) c[3], s = in(reg) 64usize, options(nostack),
            );
            (job.step, job.block) = (0, job.block + 1);
            if job.block * 32 == job.o_rows {
                late.0 = None;
            }
        }
    }
}

/// Scores of 16 keys, one tile for each of two vectors of queries: the steps `which` of the contraction. Between
/// calls the sums stay in tile registers 4 and 5; 6 and 7 are overwritten.
///
/// # Safety
/// `k` addresses the keys' `steps` tiles, `q` the queries'.
#[inline(always)]
unsafe fn scores_of_16(which: Range<usize>, steps: usize, k: *const f32, q: *const f32) {
    // SAFETY: the caller's.
    unsafe {
        if which.start == 0 && !which.is_empty() {
            asm!("tilezero tmm4", "tilezero tmm5", options(nostack));
        }
        for i in which {
            asm!(
                "tileloadd tmm6, [{k} + {s}*1]", "tileloadd tmm7, [{q0} + {s}*1]",
                "tdpbf16ps tmm4, tmm6, tmm7",
                "tileloadd tmm7, [{q1} + {s}*1]",
                "tdpbf16ps tmm5, tmm6, tmm7",
                k = in(reg) k.add(i * TILE), q0 = in(reg) q.add(i * TILE), q1 = in(reg) q.add((steps + i) * TILE),
                s = in(reg) 64usize, options(nostack),
            );
        }
    }
}

/// Writes what [`scores_of_16`] has summed.
///
/// # Safety
/// `s` holds two tiles.
#[inline(always)]
unsafe fn store_scores_of_16(s: *mut f32) {
    // SAFETY: the caller's.
    unsafe {
        asm!(
            "tilestored [{0} + {s}*1], tmm4", "tilestored [{1} + {s}*1], tmm5",
            in(reg) s, in(reg) s.add(TILE), s = in(reg) 64usize, options(nostack),
        );
    }
}

/// P = 2^(S·factor − reference) for 8 rows of a vector of queries, and their maximum and sums.
///
/// # Safety
/// `s` holds 8 rows; `p` the pairs that they make.
#[inline(always)]
unsafe fn exponentials_of_8(
    s: *const f32,
    factor: __m512,
    reference: __m512,
    max: &mut __m512,
    sum0: &mut __m512,
    sum1: &mut __m512,
    p: *mut f32,
) {
    for i in 0..4 {
        // SAFETY: the caller's.
        unsafe {
            let (s0, s1) = (_mm512_load_ps(s.add(i * 32)), _mm512_load_ps(s.add(i * 32 + 16)));
            *max = _mm512_max_ps(*max, _mm512_max_ps(s0, s1));
            let p0 = exp2_by(_mm512_fmsub_ps(s0, factor, reference), &EXP2_SHORT);
            let p1 = exp2_by(_mm512_fmsub_ps(s1, factor, reference), &EXP2_SHORT);
            *sum0 = _mm512_add_ps(*sum0, p0);
            *sum1 = _mm512_add_ps(*sum1, p1);
            _mm512_store_si512(p.add(i * 16).cast(), to_pairs(p0, p1));
        }
    }
}

/// See [`Engine::fused`]. The tile unit works on the scores of the next 16 keys, and on an earlier panel's output,
/// while the vector units do the exponentials of these 16: the two instruction streams are interleaved finely enough
/// for the core to run both at once.
///
/// # Safety
/// As [`Engine::fused`].
#[inline(always)]
unsafe fn fused(at: FusedStep, late: &mut Late) -> bool {
    let steps = at.dim.div_ceil(DEPTH);
    let blocks = at.rows / 16;
    let share = late.steps(DEPTH).div_ceil(blocks);
    // SAFETY: the caller's sizes; `s` holds at least four tiles.
    unsafe {
        let factor = _mm512_set1_ps(at.factor);
        let reference = [_mm512_load_ps(at.reference), _mm512_load_ps(at.reference.add(16))];
        let mut max = [_mm512_set1_ps(f32::NEG_INFINITY); 2];
        let mut sum = [_mm512_setzero_ps(); 4];
        let p = [at.p, at.p.add(at.p_rows.div_ceil(DEPTH) * TILE)];
        scores_of_16(0..steps, steps, at.k.ptr, at.q);
        store_scores_of_16(at.s);
        for r in 0..blocks {
            let s = at.s.add(r % 2 * 2 * TILE);
            let next = at.s.add((r + 1) % 2 * 2 * TILE);
            let k = at.k.ptr.add((r + 1) * steps * TILE);
            let more = r + 1 < blocks;
            // In quarters: the window in which the core looks for independent work is not long.
            for quarter in 0..4 {
                if more {
                    if quarter < 3 {
                        scores_of_16(
                            (quarter * steps).div_ceil(3)..((quarter + 1) * steps).div_ceil(3),
                            steps,
                            k,
                            at.q,
                        );
                    } else {
                        store_scores_of_16(next);
                    }
                }
                for _ in (quarter * share + 1) / 4..((quarter + 1) * share + 1) / 4 {
                    late_step(late);
                }
                let p = [p[0].add(r * 128 + quarter % 2 * 64), p[1].add(r * 128 + quarter % 2 * 64)];
                let s = s.add(quarter % 2 * 128);
                let [a, b, c, d] = &mut sum;
                if quarter < 2 {
                    exponentials_of_8(s, factor, reference[0], &mut max[0], a, b, p[0]);
                } else {
                    exponentials_of_8(s.add(TILE), factor, reference[1], &mut max[1], c, d, p[1]);
                }
            }
        }
        while late.0.is_some() {
            late_step(late);
        }
        let mut fits = true;
        for v in 0..2 {
            let limit = _mm512_add_ps(reference[v], _mm512_set1_ps(HEADROOM));
            fits &= !Avx512::any_gt(_mm512_mul_ps(max[v], factor), limit);
        }
        if fits {
            for v in 0..2 {
                let total = _mm512_add_ps(sum[2 * v], sum[2 * v + 1]);
                let at = at.sum.add(v * 16);
                _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), total));
            }
        }
        fits
    }
}

/// 32 bf16 of a row from feature `c` on, zero past `dim`.
///
/// # Safety
/// `row` is valid for `dim` elements.
#[inline(always)]
unsafe fn load_row(row: *const u16, c: usize, dim: usize) -> __m512i {
    let n = dim.saturating_sub(c).min(32);
    let mask = if n == 32 { u32::MAX } else { (1u32 << n) - 1 };
    // SAFETY: only the first n elements are read.
    unsafe { _mm512_maskz_loadu_epi16(mask, row.wrapping_add(c).cast()) }
}

/// A right operand whose contraction runs along the rows' features (Sᵀ = K Qᵀ): for each vector of 16 rows and
/// each 32 features a tile of pairs. Missing rows are zero.
///
/// # Safety
/// `src` is valid for `rows` rows, `dst` for `vectors · ⌈dim/32⌉` tiles.
#[inline(always)]
unsafe fn pack_pairs_of_features<T>(src: Rows<T>, rows: usize, vectors: usize, flip: __m512i, dst: *mut f32) {
    let steps = src.dim.div_ceil(DEPTH);
    for v in 0..vectors {
        for t in 0..steps {
            // SAFETY: rows v·16 .. are read only below `rows`; the tile is inside `dst`.
            unsafe {
                let mut r = [_mm512_setzero_ps(); 16];
                for (i, r) in r.iter_mut().enumerate().take(rows.saturating_sub(v * 16).min(16)) {
                    let row = src.ptr.add((v * 16 + i) * src.stride).cast();
                    *r = _mm512_castsi512_ps(_mm512_xor_si512(load_row(row, t * DEPTH, src.dim), flip));
                }
                transpose_16x16(&mut r);
                for (i, r) in r.iter().enumerate() {
                    _mm512_store_ps(dst.add((v * steps + t) * TILE + i * 16), *r);
                }
            }
        }
    }
}

/// A left operand whose contraction runs along the rows' features (K in Sᵀ = K Qᵀ): tiles `[row/16][feature/32]`.
/// Rows up to the next multiple of 32 are zero.
///
/// # Safety
/// `src` is valid for `rows` rows, `dst` for the tiles.
#[inline(always)]
unsafe fn pack_rows<T>(src: Rows<T>, rows: usize, dst: *mut f32) {
    let steps = src.dim.div_ceil(DEPTH);
    for i in 0..round_up(rows, 32) {
        for t in 0..steps {
            // SAFETY: row i exists where it is read; the tile row is inside `dst`.
            unsafe {
                let x =
                    load_row(src.ptr.wrapping_add(i * src.stride).cast(), t * DEPTH, have(i, rows, src.dim));
                _mm512_store_si512(dst.add(((i / 16) * steps + t) * TILE + (i % 16) * 16).cast(), x);
            }
        }
    }
}

/// A left operand whose contraction runs over the rows (Vᵀ in Oᵀ = Vᵀ Pᵀ): tiles `[feature/16][row/32]`, `width`
/// row tiles apart, features padded to a multiple of 32, rows to one of 32.
///
/// # Safety
/// `src` is valid for `rows` rows, `dst` for the tiles.
#[inline(always)]
unsafe fn pack_transposed<T>(src: Rows<T>, rows: usize, width: usize, dst: *mut f32) {
    for k in 0..rows.div_ceil(DEPTH) {
        for c in (0..src.dim).step_by(DEPTH) {
            // SAFETY: rows are read only below `rows`; tiles are inside `dst`.
            unsafe {
                // Pairs of rows side by side give dwords; two dword transposes give 2 × 16 features.
                let mut low = [_mm512_setzero_ps(); 16];
                let mut high = [_mm512_setzero_ps(); 16];
                for i in 0..16 {
                    let r = k * DEPTH + 2 * i;
                    let x = load_row(src.ptr.wrapping_add(r * src.stride).cast(), c, have(r, rows, src.dim));
                    let y = load_row(
                        src.ptr.wrapping_add((r + 1) * src.stride).cast(),
                        c,
                        have(r + 1, rows, src.dim),
                    );
                    let (lo, hi) = interleave(x, y);
                    low[i] = _mm512_castsi512_ps(lo);
                    high[i] = _mm512_castsi512_ps(hi);
                }
                transpose_16x16(&mut low);
                transpose_16x16(&mut high);
                for i in 0..16 {
                    _mm512_store_ps(dst.add(((c / 16) * width + k) * TILE + i * 16), low[i]);
                    _mm512_store_ps(dst.add(((c / 16 + 1) * width + k) * TILE + i * 16), high[i]);
                }
            }
        }
    }
}

/// A right operand whose contraction runs over the rows (dO in dV = Pᵀ dO): for each 32 rows, tiles
/// `[feature/16]` of pairs of rows; features padded to a multiple of 32. Missing rows are zero.
///
/// # Safety
/// `src` is valid for `rows` rows, `dst` for `blocks · round_up(dim, 32) / 16` tiles.
#[inline(always)]
unsafe fn pack_pairs_of_rows<T>(src: Rows<T>, rows: usize, blocks: usize, dst: *mut f32) {
    let columns = round_up(src.dim, DEPTH) / 16;
    for k in 0..blocks {
        for c in 0..columns / 2 {
            for i in 0..16 {
                // SAFETY: rows are read only below `rows`; tiles are inside `dst`.
                unsafe {
                    let r = k * DEPTH + 2 * i;
                    let x = load_row(
                        src.ptr.wrapping_add(r * src.stride).cast(),
                        c * DEPTH,
                        have(r, rows, src.dim),
                    );
                    let y = src.ptr.wrapping_add((r + 1) * src.stride).cast();
                    let y = load_row(y, c * DEPTH, have(r + 1, rows, src.dim));
                    let (lo, hi) = interleave(x, y);
                    let at = dst.add((k * columns + 2 * c) * TILE + i * 16);
                    _mm512_store_si512(at.cast(), lo);
                    _mm512_store_si512(at.add(TILE).cast(), hi);
                }
            }
        }
    }
}

/// Elements of x and y in turn: (x0 y0 … x15 y15, x16 y16 … x31 y31).
///
/// # Safety
/// The CPU has AVX-512BW.
#[inline(always)]
unsafe fn interleave(x: __m512i, y: __m512i) -> (__m512i, __m512i) {
    // SAFETY: register-only operations; unpack works within 128-bit lanes, the permutation puts these in order.
    unsafe {
        let (a, b) = (_mm512_unpacklo_epi16(x, y), _mm512_unpackhi_epi16(x, y));
        let lo = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), b);
        let hi = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), b);
        (lo, hi)
    }
}

/// Rounds two vectors to bf16 and puts their elements in turn: (x0 y0 x1 y1 …).
///
/// # Safety
/// The CPU has AVX512-BF16.
#[inline(always)]
unsafe fn to_pairs(x: __m512, y: __m512) -> __m512i {
    // SAFETY: register-only operations; the two types are 64 plain bytes.
    unsafe {
        let both: __m512i = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(y, x));
        let order = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
            18, 2, 17, 1, 16, 0,
        );
        _mm512_permutexvar_epi16(order, both)
    }
}

/// All bits zero, or the sign bit of every bf16.
///
/// # Safety
/// The CPU has AVX-512BW.
#[inline(always)]
unsafe fn sign_flip(negate: bool) -> __m512i {
    // SAFETY: register-only operation.
    unsafe { _mm512_set1_epi16(if negate { i16::MIN } else { 0 }) }
}

impl<T: Element> Engine for Amx<T> {
    type S = Avx512;
    type T = T;
    const FORWARD: Shape = Shape { vectors: 2, chunk: 128, step: 128 };
    const FUSED: bool = true;
    const PREPARE: bool = true;
    const BACKWARD: Shape = Shape { vectors: 8, chunk: 128, step: 32 };
    const ROW_MULTIPLE: usize = 32;
    const VECTOR_MULTIPLE: usize = 2;
    const IN_PLACE: bool = false;

    #[inline(always)]
    unsafe fn enter() {
        // SAFETY: the CPU has AMX and the process its permission (`available`).
        unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack)) }
    }
    #[inline(always)]
    unsafe fn leave() {
        // SAFETY: as above. Gives the registers' 8 KiB back to the context switch.
        unsafe { asm!("tilerelease", options(nostack)) }
    }
    #[inline(always)]
    unsafe fn exp2(x: __m512) -> __m512 {
        // SAFETY: the CPU has AVX-512.
        unsafe { exp2_by(x, &EXP2_SHORT) }
    }

    fn scratch_len(dim: usize) -> usize {
        16 * round_up(dim, DEPTH)
    }
    fn q_len(dim: usize, vectors: usize) -> usize {
        vectors * dim.div_ceil(DEPTH) * TILE
    }
    #[inline(always)]
    unsafe fn pack_q(
        src: Rows<T>,
        rows: usize,
        vectors: usize,
        negate: bool,
        dst: *mut f32,
        _scratch: *mut f32,
    ) {
        // SAFETY: sizes by `q_len`.
        unsafe { pack_pairs_of_features(src, rows, vectors, sign_flip(negate), dst) }
    }
    fn k_len(dim: usize, keys: usize) -> usize {
        round_up(keys, DEPTH) / 16 * dim.div_ceil(DEPTH) * TILE
    }
    #[inline(always)]
    unsafe fn pack_k(src: Rows<T>, rows: usize, dst: *mut f32) -> Left {
        // SAFETY: sizes by `k_len`.
        unsafe { pack_rows(src, rows, dst) };
        Left { ptr: dst, stride: 0 }
    }
    #[inline(always)]
    unsafe fn skip_k(k: Left, start: usize, dim: usize) -> Left {
        Left { ptr: k.ptr.wrapping_add(start / 16 * dim.div_ceil(DEPTH) * TILE), ..k }
    }
    fn vt_len(dim: usize, keys: usize) -> usize {
        round_up(dim, DEPTH) / 16 * keys.div_ceil(DEPTH) * TILE
    }
    #[inline(always)]
    unsafe fn pack_vt(src: Rows<T>, rows: usize, keys: usize, dst: *mut f32) -> Left {
        let width = keys.div_ceil(DEPTH);
        // SAFETY: sizes by `vt_len`.
        unsafe { pack_transposed(src, rows, width, dst) };
        Left { ptr: dst, stride: width * TILE }
    }
    #[inline(always)]
    unsafe fn skip_vt(vt: Left, start: usize) -> Left {
        Left { ptr: vt.ptr.wrapping_add(start / DEPTH * TILE), ..vt }
    }
    fn right_len(dim: usize, vectors: usize) -> usize {
        vectors / 2 * round_up(dim, DEPTH) / 16 * TILE
    }
    #[inline(always)]
    unsafe fn pack_right(src: Rows<T>, rows: usize, vectors: usize, dst: *mut f32) {
        // SAFETY: sizes by `right_len`.
        unsafe { pack_pairs_of_rows(src, rows, vectors / 2, dst) }
    }

    #[inline(always)]
    unsafe fn scores(
        k: Left,
        rows: usize,
        dim: usize,
        q: *const f32,
        vectors: usize,
        s: *mut f32,
        s_rows: usize,
    ) {
        let steps = dim.div_ceil(DEPTH);
        let n = round_up(rows, 32) / 16;
        for v in (0..vectors).step_by(2) {
            // SAFETY: keys are padded to a multiple of 32, vectors of queries come in pairs.
            unsafe {
                let (q, s) = (q.add(v * steps * TILE), s.add(v * s_rows * 16));
                if steps <= 2 {
                    scores_stationary(n, steps, k.ptr, q, s, s_rows * 16);
                    continue;
                }
                for r in (0..n).step_by(2) {
                    let a = Tiles { ptr: k.ptr.add(r * steps * TILE), across: steps * TILE, along: TILE };
                    let b = Tiles { ptr: q, across: steps * TILE, along: TILE };
                    block_2x2(steps, a, b, s.add(r * TILE), TILE, s_rows * 16, false);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn fused(step: FusedStep, late: &mut Late) -> bool {
        // SAFETY: the contract is the same.
        unsafe { fused(step, late) }
    }

    #[inline(always)]
    unsafe fn finish(late: &mut Late) {
        while late.0.is_some() {
            // SAFETY: the contract is the same.
            unsafe { late_step(late) }
        }
    }
    unsafe fn prepared(k: *mut f32, vt: *mut f32, keys: usize) -> (Left, Left) {
        (Left { ptr: k, stride: 0 }, Left { ptr: vt, stride: keys.div_ceil(DEPTH) * TILE })
    }

    fn p_len(vectors: usize, rows: usize) -> usize {
        vectors * rows.div_ceil(DEPTH) * TILE
    }
    #[inline(always)]
    unsafe fn store_p(p: *mut f32, rows: usize, v: usize, row: usize, p0: __m512, p1: __m512) {
        // SAFETY: the pair's row is inside P.
        unsafe {
            let at = p.add(v * rows.div_ceil(DEPTH) * TILE + row / 2 * 16);
            _mm512_store_si512(at.cast(), to_pairs(p0, p1));
        }
    }
    fn o_rows(dim: usize) -> usize {
        round_up(dim, DEPTH)
    }
    #[inline(always)]
    unsafe fn accumulate_o(
        vt: Left,
        keys: usize,
        dim: usize,
        p: *const f32,
        p_rows: usize,
        vectors: usize,
        o: *mut f32,
        init: Init,
    ) {
        let o_rows = Self::o_rows(dim);
        let width = p_rows.div_ceil(DEPTH) * TILE;
        // SAFETY: key tiles are inside the operands; O holds o_rows rows a vector.
        unsafe {
            if let Init::Scale(alpha) = init {
                for v in 0..vectors {
                    let alpha = _mm512_load_ps(alpha.add(v * 16));
                    for r in 0..o_rows {
                        let at = o.add((v * o_rows + r) * 16);
                        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), alpha));
                    }
                }
            }
            for v in (0..vectors).step_by(2) {
                for r in (0..o_rows / 16).step_by(2) {
                    let a = Tiles { ptr: vt.ptr.add(r * vt.stride), across: vt.stride, along: TILE };
                    let b = Tiles { ptr: p.add(v * width), across: width, along: TILE };
                    let c = o.add(v * o_rows * 16 + r * TILE);
                    block_2x2(keys.div_ceil(DEPTH), a, b, c, TILE, o_rows * 16, !matches!(init, Init::Zero));
                }
            }
        }
    }

    fn left_len(vectors: usize, rows: usize) -> usize {
        vectors / 2 * round_up(rows, DEPTH) / 16 * TILE
    }
    #[inline(always)]
    unsafe fn store_left(
        p: *mut f32,
        _vectors: usize,
        rows: usize,
        v: usize,
        row: usize,
        p0: __m512,
        p1: __m512,
    ) {
        // SAFETY: half a tile row each: vectors 2i and 2i + 1 are the 32 queries of tile column i.
        unsafe {
            let at = p.add(v / 2 * (round_up(rows, DEPTH) / 16) * TILE + row * 16 + v % 2 * 8);
            let (x, y) = (_mm512_cvtneps_pbh(p0), _mm512_cvtneps_pbh(p1));
            _mm256_store_si256(at.cast(), std::mem::transmute::<__m256bh, __m256i>(x));
            _mm256_store_si256(at.add(16).cast(), std::mem::transmute::<__m256bh, __m256i>(y));
        }
    }
    fn rows_len(dim: usize, keys: usize) -> usize {
        round_up(keys, DEPTH) / 16 * (round_up(dim, DEPTH) / 16) * TILE
    }
    fn rows_at(dim: usize, key: usize, feature: usize) -> usize {
        ((key / 16) * (round_up(dim, DEPTH) / 16) + feature / 16) * TILE + key % 16 * 16 + feature % 16
    }
    #[inline(always)]
    unsafe fn accumulate_rows(
        p: *const f32,
        p_rows: usize,
        keys: usize,
        right: *const f32,
        vectors: usize,
        dim: usize,
        c: *mut f32,
    ) {
        let columns = round_up(dim, DEPTH) / 16;
        let p_width = round_up(p_rows, DEPTH) / 16 * TILE;
        for r in (0..round_up(keys, DEPTH) / 16).step_by(2) {
            for f in (0..columns).step_by(2) {
                // SAFETY: key tiles come in pairs (ROW_MULTIPLE), feature tiles too (padding).
                unsafe {
                    let a = Tiles { ptr: p.add(r * TILE), across: TILE, along: p_width };
                    let b = Tiles { ptr: right.add(f * TILE), across: TILE, along: columns * TILE };
                    let c = c.add((r * columns + f) * TILE);
                    block_2x2(vectors / 2, a, b, c, columns * TILE, TILE, true);
                }
            }
        }
    }
}

/// Coefficients of 2^r on [0, 1) with an error of 3e−6: P has 8 bits.
const EXP2_SHORT: [f32; 5] = [1.342_668_8e-2, 5.224_247e-2, 2.412_802_1e-1, 6.930_448_4e-1, 1.0];

crate::arch::compile_kernels!(
    Amx<T>,
    crate::engine::Fma<Avx512, T>,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
);
