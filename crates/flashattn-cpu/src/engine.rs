//! [`Engine`]: how one kind of matrix unit holds operands and multiplies them. The attention algorithm
//! ([`crate::forward`], [`crate::backward`]) is written once over it; [`Fma`] is the vector unit of any ISA,
//! [`crate::arch::amx`] the tile unit.
//!
//! Scores are transposed: a *panel* is a few vectors of queries; `S` holds, for each vector, rows of `LANES`
//! scores, one row a key.

use crate::gemm::{BLOCK, Depth, Init, Scalars, Vectors};
use crate::simd::Simd;
use flashattn_spec::{DType, Element, View};
use std::marker::PhantomData;

/// Rows of one tensor head: where they start and how far apart they are.
#[derive(Clone, Copy, Debug)]
pub struct Rows<T> {
    /// First element of the first row.
    pub ptr: *const T,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Elements of a row.
    pub dim: usize,
}

impl<T: Element> Rows<T> {
    /// The rows of (batch, head) from position `start` on.
    pub fn of(view: &View<'_, T>, batch: usize, start: usize, head: usize) -> Self {
        let [sb, sn, sh, _] = view.strides();
        // `wrapping_add`: an empty tensor has no element to point at.
        let ptr = view.data().as_ptr().wrapping_add(batch * sb + start * sn + head * sh);
        Rows { ptr, stride: sn, dim: view.shape()[3] }
    }

    /// The rows from `n` on.
    pub fn skip(self, n: usize) -> Self {
        Rows { ptr: self.ptr.wrapping_add(n * self.stride), ..self }
    }
}

/// Panels and chunks of one pass: how many vectors of queries and how many keys a step works on.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Vectors of queries in a panel.
    pub vectors: usize,
    /// Keys of a chunk: the unit in which K and V are prepared.
    pub chunk: usize,
    /// Rows of S and dP for each vector: keys whose scores are held at a time.
    pub step: usize,
}

/// A matrix unit and its operand formats. A *left* operand has rows of its own and is stored `[row][k]`; a *right*
/// operand has the lanes. Buffers are 64-byte aligned; `*_len` gives their sizes in f32.
///
/// Methods are unsafe: pointers are valid for the sizes stated, and the CPU has the instructions.
#[allow(clippy::missing_safety_doc, reason = "one contract for all, stated on the trait")]
pub trait Engine: Copy + Send + Sync + 'static {
    /// Vector unit that does the softmax.
    type S: Simd;
    /// Type of Q, K, V, O.
    type T: Element;
    /// Sizes in the forward pass.
    const FORWARD: Shape;
    /// Sizes in the backward pass.
    const BACKWARD: Shape;
    /// Scores are computed for a multiple of this many keys.
    const ROW_MULTIPLE: usize;
    /// Products are computed for a multiple of this many vectors of queries.
    const VECTOR_MULTIPLE: usize;
    /// Whether [`Engine::fused`] does anything.
    const FUSED: bool = false;
    /// Whether K and V are worth preparing once for all queries.
    const PREPARE: bool = false;
    /// Whether P and dS as operands are the f32 scores themselves, in place.
    const IN_PLACE: bool;

    /// Called once on each thread before any product of a task.
    unsafe fn enter();
    /// Called when a task ends.
    unsafe fn leave();
    /// 2^x as accurate as P's type deserves.
    unsafe fn exp2(x: F<Self>) -> F<Self>;

    /// f32 slots of scratch that the pack functions and the transposition of results need.
    fn scratch_len(dim: usize) -> usize;

    /// f32 slots of a panel of `vectors` vectors of queries, as right operand over features.
    fn q_len(dim: usize, vectors: usize) -> usize;
    /// Prepares `rows` query rows for Sᵀ = K Qᵀ (or dO for dPᵀ = V dOᵀ), negated if `negate`; missing rows are zero.
    unsafe fn pack_q(
        src: Rows<Self::T>,
        rows: usize,
        vectors: usize,
        negate: bool,
        dst: *mut f32,
        scratch: *mut f32,
    );
    /// f32 slots of `keys` keys as left operand over features.
    fn k_len(dim: usize, keys: usize) -> usize;
    /// Prepares `rows` keys (or values) for Sᵀ = K Qᵀ, dPᵀ = V dOᵀ.
    unsafe fn pack_k(src: Rows<Self::T>, rows: usize, dst: *mut f32) -> Left;
    /// The same operand from key `start` on, a multiple of 32.
    unsafe fn skip_k(k: Left, start: usize, dim: usize) -> Left;
    /// f32 slots of `keys` keys as left operand over keys.
    fn vt_len(dim: usize, keys: usize) -> usize;
    /// Prepares `rows` of V (or K) transposed, for Oᵀ += Vᵀ Pᵀ, dQᵀ += Kᵀ dSᵀ; made for `keys` keys.
    unsafe fn pack_vt(src: Rows<Self::T>, rows: usize, keys: usize, dst: *mut f32) -> Left;
    /// The same operand from key `start` on, a multiple of 32.
    unsafe fn skip_vt(vt: Left, start: usize) -> Left;
    /// f32 slots of a panel of queries as right operand over queries.
    fn right_len(dim: usize, vectors: usize) -> usize;
    /// Prepares `rows` rows of Q or dO for dK += dSᵀ Q, dV += Pᵀ dO; missing rows are zero.
    unsafe fn pack_right(src: Rows<Self::T>, rows: usize, vectors: usize, dst: *mut f32);

    /// S[0 .. rows] = K Qᵀ for `vectors` vectors of queries, whose scores lie `s_rows` rows apart. Rows up to the
    /// next `ROW_MULTIPLE` may be written with anything.
    unsafe fn scores(
        k: Left,
        rows: usize,
        dim: usize,
        q: *const f32,
        vectors: usize,
        s: *mut f32,
        s_rows: usize,
    );

    /// Scores, exponentials and sums of a whole stretch of keys that no mask or score mod changes, with the maximum of
    /// earlier keys as the reference, while the product of an earlier panel that is still due is done beside them
    /// (and is done when it returns). Returns whether every score was less than 2^[`HEADROOM`] above its reference;
    /// if not, the statistics are unchanged and the stretch must be done again with its true maximum.
    ///
    /// The exact result is kept: any reference cancels in O / l, and the headroom keeps sums far from overflow.
    unsafe fn fused(_step: FusedStep, _late: &mut Late) -> bool {
        false
    }
    /// Does what is left of a late product.
    unsafe fn finish(_late: &mut Late) {}
    /// The operands that `pack_k` and `pack_vt` have left in memory, made for `keys` keys.
    unsafe fn prepared(k: *mut f32, vt: *mut f32, keys: usize) -> (Left, Left);

    /// f32 slots of P or dS of `rows` keys as right operand over keys (0 if in place).
    fn p_len(vectors: usize, rows: usize) -> usize;
    /// Stores keys row, row + 1 (row even) of query vector v, for Oᵀ += Vᵀ Pᵀ. `rows`: as made with.
    unsafe fn store_p(p: *mut f32, rows: usize, v: usize, row: usize, p0: F<Self>, p1: F<Self>);
    /// Rows that Oᵀ (or dQᵀ) of a row of `dim` takes, with padding.
    fn o_rows(dim: usize) -> usize;
    /// Oᵀ (for each vector `o_rows` rows of LANES) from `init`, plus Vᵀ Pᵀ over `keys` keys.
    unsafe fn accumulate_o(
        vt: Left,
        keys: usize,
        dim: usize,
        p: *const f32,
        p_rows: usize,
        vectors: usize,
        o: *mut f32,
        init: Init,
    );

    /// f32 slots of P or dS as left operand over queries (0 if in place).
    fn left_len(vectors: usize, rows: usize) -> usize;
    /// Stores keys row, row + 1 of query vector v for dV += Pᵀ dO. `vectors`, `rows`: as made with.
    unsafe fn store_left(
        p: *mut f32,
        vectors: usize,
        rows: usize,
        v: usize,
        row: usize,
        p0: F<Self>,
        p1: F<Self>,
    );
    /// f32 slots of accumulators of dK or dV for `keys` keys.
    fn rows_len(dim: usize, keys: usize) -> usize;
    /// Where element (key, feature) of such accumulators is.
    fn rows_at(dim: usize, key: usize, feature: usize) -> usize;
    /// dV[0 .. keys] += Pᵀ dO, from a first key that is a multiple of 32.
    unsafe fn accumulate_rows(
        p: *const f32,
        p_rows: usize,
        keys: usize,
        right: *const f32,
        vectors: usize,
        dim: usize,
        c: *mut f32,
    );
}

/// See [`Engine::fused`].
pub const HEADROOM: f32 = 8.0;

/// What [`Engine::fused`] works on.
#[derive(Clone, Copy, Debug)]
pub struct FusedStep {
    /// Keys, and how many: a multiple of `ROW_MULTIPLE`.
    pub k: Left,
    /// Number of keys.
    pub rows: usize,
    /// head_dim.
    pub dim: usize,
    /// The panel's queries.
    pub q: *const f32,
    /// Memory for scores.
    pub s: *mut f32,
    /// Where P goes, made for `p_rows` keys.
    pub p: *mut f32,
    /// See `p`.
    pub p_rows: usize,
    /// From score to exponent of 2.
    pub factor: f32,
    /// Reference of each query, base 2.
    pub reference: *const f32,
    /// Sum of each query.
    pub sum: *mut f32,
}

/// Oᵀ += Vᵀ Pᵀ of a panel, to be done beside later work; and how far it is.
#[derive(Clone, Copy, Debug)]
pub struct LateProduct {
    /// V.
    pub vt: Left,
    /// Keys.
    pub keys: usize,
    /// P, made for `p_rows` keys.
    pub p: *const f32,
    /// See `p`.
    pub p_rows: usize,
    /// Oᵀ.
    pub o: *mut f32,
    /// Rows of Oᵀ.
    pub o_rows: usize,
    /// Block of Oᵀ under way.
    pub block: usize,
    /// Step of the contraction to come.
    pub step: usize,
}

/// A product that is due, if any.
#[derive(Debug, Default)]
pub struct Late(pub Option<LateProduct>);

impl Late {
    /// Steps left, for blocks of 32 rows and `depth` keys a step.
    pub fn steps(&self, depth: usize) -> usize {
        self.0.map_or(0, |job| job.o_rows / 32 * job.keys.div_ceil(depth))
    }
}

/// The vector type of an engine.
pub type F<E> = <<E as Engine>::S as Simd>::F;

/// A left operand: prepared in a buffer, or the caller's own memory where that needs no preparation.
#[derive(Clone, Copy, Debug)]
pub struct Left {
    /// First element (f32, or the engine's own format).
    pub ptr: *const f32,
    /// Elements from one row to the next.
    pub stride: usize,
}

/// The fused multiply-add unit of ISA `S`, in f32, for tensors of `T` (widened when prepared).
#[derive(Debug)]
pub struct Fma<S, T>(PhantomData<(S, T)>);
impl<S, T> Clone for Fma<S, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<S, T> Copy for Fma<S, T> {}

/// Reads a vector of `T`, widened.
///
/// # Safety
/// `p` is valid for `LANES` elements; the CPU has S's instructions.
#[inline(always)]
pub unsafe fn load<S: Simd, T: Element>(p: *const T) -> S::F {
    // SAFETY: the caller's contract; f32 is the only other type that executors take.
    unsafe {
        match T::DTYPE {
            DType::F16 => S::load_f16(p.cast()),
            DType::Bf16 => S::load_bf16(p.cast()),
            _ => S::load(p.cast()),
        }
    }
}

/// Reads two vectors of `T`, widened; of bf16 the elements with even numbers, then the others.
///
/// # Safety
/// `p` is valid for `2 · LANES` elements; the CPU has S's instructions.
#[inline(always)]
pub unsafe fn load_pair<S: Simd, T: Element>(p: *const T) -> [S::F; 2] {
    // SAFETY: the caller's contract.
    unsafe {
        match T::DTYPE {
            DType::Bf16 => S::load_bf16_pair(p.cast()),
            _ => [load::<S, T>(p), load::<S, T>(p.add(S::LANES))],
        }
    }
}

/// Widens `n` elements into f32.
///
/// # Safety
/// `src` and `dst` are valid for `n` elements; the CPU has S's instructions.
#[inline(always)]
pub unsafe fn widen<S: Simd, T: Element>(src: *const T, n: usize, dst: *mut f32) {
    let mut i = 0;
    // SAFETY: i + LANES ≤ n in the vector loop, i < n in the tail.
    unsafe {
        while i + S::LANES <= n {
            S::store(dst.add(i), load::<S, T>(src.add(i)));
            i += S::LANES;
        }
        while i < n {
            *dst.add(i) = (*src.add(i)).to_f32();
            i += 1;
        }
    }
}

/// Widens `rows` rows into a dense f32 matrix of row length `width` ≥ dim; the rest of each row becomes zero.
///
/// # Safety
/// `src` is valid for `rows` rows, `dst` for `rows · width` f32.
#[inline(always)]
pub unsafe fn widen_rows<S: Simd, T: Element>(src: Rows<T>, rows: usize, dst: *mut f32, width: usize) {
    for r in 0..rows {
        // SAFETY: row r is inside both.
        unsafe {
            widen::<S, T>(src.ptr.add(r * src.stride), src.dim, dst.add(r * width));
            for i in src.dim..width {
                *dst.add(r * width + i) = 0.0;
            }
        }
    }
}

/// Rounds up to a multiple.
pub const fn round_up(n: usize, multiple: usize) -> usize {
    n.div_ceil(multiple) * multiple
}

/// Reads the first `n` of `LANES` elements, widened; the others are zero.
///
/// # Safety
/// `p` is valid for `min(n, LANES)` elements; the CPU has S's instructions.
#[inline(always)]
pub(crate) unsafe fn load_part<S: Simd, T: Element>(p: *const T, n: usize) -> S::F {
    // SAFETY: the caller's contract.
    unsafe {
        if n >= S::LANES {
            return load::<S, T>(p);
        }
        let mut part = [0.0f32; 16];
        for (i, x) in part.iter_mut().enumerate().take(n) {
            *x = (*p.add(i)).to_f32();
        }
        S::load(part.as_ptr())
    }
}

/// Transposes up to `LANES` rows: element (row, c) goes to `c * stride + row`. Missing rows, and missing elements up to
/// the next multiple of `LANES`, are zero.
///
/// # Safety
/// `src` is valid for `rows` rows, `dst` for `round_up(dim, LANES)` vectors; the CPU has S's instructions.
#[inline(always)]
pub unsafe fn transpose_rows<S: Simd, T: Element>(src: Rows<T>, rows: usize, stride: usize, dst: *mut f32) {
    let l = S::LANES;
    let mut tile = [0.0f32; 16 * 16];
    for c in (0..src.dim).step_by(l) {
        // SAFETY: the rows exist; `tile` holds LANES vectors.
        unsafe {
            if T::DTYPE == DType::F32 && rows == l && c + l <= src.dim {
                S::transpose(src.ptr.add(c).cast(), src.stride, dst.add(c * stride), stride);
                continue;
            }
            for r in 0..rows {
                let x = load_part::<S, T>(src.ptr.add(r * src.stride + c), src.dim - c);
                S::store(tile.as_mut_ptr().add(r * l), x);
            }
            S::transpose(tile.as_ptr(), l, dst.add(c * stride), stride);
        }
    }
}

impl<S: Simd, T: Element> Engine for Fma<S, T> {
    type S = S;
    type T = T;
    const FORWARD: Shape = Shape { vectors: S::PANEL, chunk: 64, step: 64 };
    const BACKWARD: Shape = Shape { vectors: S::PANEL, chunk: 64, step: 64 };
    const ROW_MULTIPLE: usize = 2;
    const VECTOR_MULTIPLE: usize = 1;
    const IN_PLACE: bool = true;

    #[inline(always)]
    unsafe fn enter() {}
    #[inline(always)]
    unsafe fn leave() {}
    #[inline(always)]
    unsafe fn exp2(x: S::F) -> S::F {
        // SAFETY: the CPU has S's instructions.
        unsafe { S::exp2(x) }
    }

    fn scratch_len(dim: usize) -> usize {
        S::LANES * round_up(dim, S::LANES)
    }
    fn q_len(dim: usize, vectors: usize) -> usize {
        vectors * round_up(dim, S::LANES) * S::LANES
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
        let (l, width) = (S::LANES, round_up(src.dim, S::LANES));
        // SAFETY: sizes by `q_len`.
        unsafe {
            for v in 0..vectors {
                let n = rows.saturating_sub(v * l).min(l);
                transpose_rows::<S, T>(src.skip(v * l), n, l, dst.add(v * l * width));
            }
            if negate {
                for i in 0..vectors * l * width {
                    *dst.add(i) = -*dst.add(i);
                }
            }
        }
    }
    fn k_len(dim: usize, keys: usize) -> usize {
        round_up(keys, BLOCK) * round_up(dim, S::LANES)
    }
    #[inline(always)]
    unsafe fn pack_k(src: Rows<T>, rows: usize, dst: *mut f32) -> Left {
        let width = round_up(src.dim, S::LANES);
        for r in (0..rows).step_by(S::LANES) {
            // SAFETY: `dst` holds whole blocks of rows of whole vectors.
            unsafe {
                let to = dst.add(r / BLOCK * BLOCK * width + r % BLOCK);
                transpose_rows::<S, T>(src.skip(r), (rows - r).min(S::LANES), BLOCK, to);
            }
        }
        Left { ptr: dst, stride: width }
    }
    #[inline(always)]
    unsafe fn skip_k(k: Left, start: usize, _dim: usize) -> Left {
        Left { ptr: k.ptr.wrapping_add(start * k.stride), ..k }
    }
    fn vt_len(dim: usize, keys: usize) -> usize {
        keys * round_up(dim, BLOCK)
    }
    #[inline(always)]
    unsafe fn pack_vt(src: Rows<T>, rows: usize, keys: usize, dst: *mut f32) -> Left {
        // SAFETY: `dst` holds `keys` rows of whole blocks; block c / BLOCK has LANES elements at c % BLOCK.
        unsafe {
            for c in (0..src.dim).step_by(S::LANES) {
                let to = dst.add(c / BLOCK * keys * BLOCK + c % BLOCK);
                for r in 0..rows {
                    let row = src.ptr.add(r * src.stride + c);
                    S::store(to.add(r * BLOCK), load_part::<S, T>(row, src.dim - c));
                }
            }
        }
        Left { ptr: dst, stride: keys * BLOCK }
    }
    #[inline(always)]
    unsafe fn skip_vt(vt: Left, start: usize) -> Left {
        Left { ptr: vt.ptr.wrapping_add(start * BLOCK), ..vt }
    }
    unsafe fn prepared(k: *mut f32, vt: *mut f32, _keys: usize) -> (Left, Left) {
        // Never asked for: rows are read as they lie, or prepared for each tile.
        (Left { ptr: k, stride: 0 }, Left { ptr: vt, stride: 0 })
    }
    fn right_len(dim: usize, vectors: usize) -> usize {
        vectors * S::LANES * round_up(dim, S::LANES)
    }
    #[inline(always)]
    unsafe fn pack_right(src: Rows<T>, rows: usize, vectors: usize, dst: *mut f32) {
        let width = round_up(src.dim, S::LANES);
        // SAFETY: sizes by `right_len`.
        unsafe {
            widen_rows::<S, T>(src, rows, dst, width);
            for i in rows * width..vectors * S::LANES * width {
                *dst.add(i) = 0.0;
            }
        }
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
        let l = S::LANES;
        // SAFETY: the caller's sizes.
        unsafe {
            S::product(
                rows,
                vectors,
                Depth { inner: dim, outer: 1 },
                Scalars { ptr: k.ptr, row: 1, block: BLOCK * k.stride, col: BLOCK, outer: 0 },
                Vectors { ptr: q, vector: round_up(dim, l) * l, row: l },
                Vectors { ptr: s, vector: s_rows * l, row: l },
                Init::Zero,
            );
        }
    }

    fn p_len(_vectors: usize, _rows: usize) -> usize {
        0
    }
    #[inline(always)]
    unsafe fn store_p(p: *mut f32, rows: usize, v: usize, row: usize, p0: S::F, p1: S::F) {
        // SAFETY: P has the layout of S.
        unsafe {
            let at = p.add((v * rows + row) * S::LANES);
            S::store(at, p0);
            S::store(at.add(S::LANES), p1);
        }
    }
    fn o_rows(dim: usize) -> usize {
        round_up(dim, S::LANES)
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
        let l = S::LANES;
        // SAFETY: the caller's sizes.
        unsafe {
            S::product(
                dim,
                vectors,
                Depth { inner: keys, outer: 1 },
                Scalars { ptr: vt.ptr, row: 1, block: vt.stride, col: BLOCK, outer: 0 },
                Vectors { ptr: p, vector: p_rows * l, row: l },
                Vectors { ptr: o, vector: Self::o_rows(dim) * l, row: l },
                init,
            );
        }
    }

    fn left_len(_vectors: usize, _rows: usize) -> usize {
        0
    }
    #[inline(always)]
    unsafe fn store_left(
        p: *mut f32,
        _vectors: usize,
        rows: usize,
        v: usize,
        row: usize,
        p0: S::F,
        p1: S::F,
    ) {
        // SAFETY: in place, as `store_p`.
        unsafe { Self::store_p(p, rows, v, row, p0, p1) }
    }
    fn rows_len(dim: usize, keys: usize) -> usize {
        keys * round_up(dim, S::LANES)
    }
    fn rows_at(dim: usize, key: usize, feature: usize) -> usize {
        key * round_up(dim, S::LANES) + feature
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
        let l = S::LANES;
        let width = round_up(dim, l);
        // SAFETY: the caller's sizes.
        unsafe {
            S::product(
                keys,
                width / l,
                Depth { inner: l, outer: vectors },
                Scalars { ptr: p, row: l, block: BLOCK * l, col: 1, outer: p_rows * l },
                Vectors { ptr: right, vector: l, row: width },
                Vectors { ptr: c, vector: l, row: width },
                Init::Add,
            );
        }
    }
}
