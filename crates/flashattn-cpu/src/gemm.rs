//! The one f32 product of the FMA path: `C[r][lanes] (+)= Σ_k A[r, k] · B[k][lanes]`, with A broadcast element by
//! element from memory of any strides and B, C in vectors.
//!
//! Scores are kept transposed (keys down, queries across the lanes), so every product of attention has this
//! form, forward and backward, with K, V, Q and dO read as they lie in memory:
//!
//! | product            | r   | k   | lanes   |
//! |--------------------|-----|-----|---------|
//! | Sᵀ  = K Qᵀ         | key | d   | query   |
//! | dPᵀ = V dOᵀ        | key | d_v | query   |
//! | Oᵀ += Vᵀ Pᵀ        | d_v | key | query   |
//! | dQᵀ += Kᵀ dSᵀ      | d   | key | query   |
//! | dV += Pᵀ dO        | key | query | d_v   |
//! | dK += dSᵀ Q        | key | query | d     |

use crate::simd::Simd;

/// Strided access to the broadcast operand: element (r, k) at `r·row + k·col`, with a jump of `block` after each
/// [`BLOCK`] rows (prepared operands) and one of `outer` after `inner` steps of k (scores are stored as blocks of
/// `LANES` queries).
#[derive(Clone, Copy, Debug)]
pub struct Scalars {
    /// First element.
    pub ptr: *const f32,
    /// Stride of r inside a block.
    pub row: usize,
    /// Stride of blocks of [`BLOCK`] rows; `BLOCK · row` where there are none.
    pub block: usize,
    /// Stride of k.
    pub col: usize,
    /// Stride of the outer k loop.
    pub outer: usize,
}

/// Rows of a block of a prepared operand. A multiple of every `LANES` and `ROWS`.
pub const BLOCK: usize = 16;

impl Scalars {
    /// The rows from r on.
    #[inline(always)]
    fn skip(self, r: usize) -> Self {
        Scalars { ptr: self.ptr.wrapping_add(r / BLOCK * self.block + r % BLOCK * self.row), ..self }
    }
}

/// Strided access to vectors: vector v of row i at `v·vector + i·row`.
#[derive(Clone, Copy, Debug)]
pub struct Vectors<P> {
    /// First element.
    pub ptr: P,
    /// Stride of the vector index.
    pub vector: usize,
    /// Stride of the row.
    pub row: usize,
}

/// What the accumulators start from.
#[derive(Clone, Copy, Debug)]
pub enum Init {
    /// Zero: C is overwritten.
    Zero,
    /// C: the product is added.
    Add,
    /// C · α, with α one vector for each vector of the panel: rescales the output on the way (Alg. 1, line 12).
    Scale(*const f32),
}

/// The contraction: `outer` × `inner` steps of k.
#[derive(Clone, Copy, Debug)]
pub struct Depth {
    /// Steps between jumps of A.
    pub inner: usize,
    /// Number of jumps.
    pub outer: usize,
}

/// C of `rows` × `vectors` vectors; see the module's text.
///
/// # Safety
/// All addressed elements of A, B and C are valid; C does not overlap A or B; the CPU has S's instructions.
#[inline(always)]
pub unsafe fn product<S: Simd>(
    rows: usize,
    vectors: usize,
    depth: Depth,
    a: Scalars,
    b: Vectors<*const f32>,
    c: Vectors<*mut f32>,
    init: Init,
) {
    let mut v = 0;
    while v < vectors {
        // Two and two rather than three and one: a tile of one vector loads more than it multiplies.
        let n =
            if vectors - v == S::PANEL + 1 { (vectors - v).div_ceil(2) } else { (vectors - v).min(S::PANEL) };
        // SAFETY: vector v is inside B and C.
        unsafe {
            let b = Vectors { ptr: b.ptr.add(v * b.vector), ..b };
            let c = Vectors { ptr: c.ptr.add(v * c.vector), ..c };
            let init = match init {
                Init::Scale(alpha) => Init::Scale(alpha.add(v * S::LANES)),
                other => other,
            };
            match n {
                1 => panel::<S, 1>(rows, depth, a, b, c, init),
                2 => panel::<S, 2>(rows, depth, a, b, c, init),
                3 => panel::<S, 3>(rows, depth, a, b, c, init),
                _ => panel::<S, 4>(rows, depth, a, b, c, init),
            }
        }
        v += n;
    }
}

/// A tile of `ROWS` rows.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn full<S: Simd, const V: usize>(
    depth: Depth,
    a: Scalars,
    b: Vectors<*const f32>,
    c: Vectors<*mut f32>,
    init: Init,
) {
    // SAFETY: the caller's.
    unsafe {
        match S::ROWS {
            4 => tile::<S, V, 4>(depth, a, b, c, init),
            _ => tile::<S, V, 8>(depth, a, b, c, init),
        }
    }
}

/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn panel<S: Simd, const V: usize>(
    rows: usize,
    depth: Depth,
    a: Scalars,
    b: Vectors<*const f32>,
    c: Vectors<*mut f32>,
    init: Init,
) {
    let mut r = 0;
    // SAFETY: rows r .. r + R are inside A and C.
    unsafe {
        while r + S::ROWS <= rows {
            let a = a.skip(r);
            let c = Vectors { ptr: c.ptr.add(r * c.row), ..c };
            // Strides that the compiler knows become displacements: no registers for them, no additions.
            if a.row == 1 {
                full::<S, V>(depth, Scalars { row: 1, ..a }, b, c, init);
            } else if a.row == S::LANES {
                full::<S, V>(depth, Scalars { row: S::LANES, ..a }, b, c, init);
            } else {
                full::<S, V>(depth, a, b, c, init);
            }
            r += S::ROWS;
        }
        let a = a.skip(r);
        let c = Vectors { ptr: c.ptr.add(r * c.row), ..c };
        match rows - r {
            0 => {}
            1 => tile::<S, V, 1>(depth, a, b, c, init),
            2 => tile::<S, V, 2>(depth, a, b, c, init),
            3 => tile::<S, V, 3>(depth, a, b, c, init),
            4 => tile::<S, V, 4>(depth, a, b, c, init),
            5 => tile::<S, V, 5>(depth, a, b, c, init),
            6 => tile::<S, V, 6>(depth, a, b, c, init),
            _ => tile::<S, V, 7>(depth, a, b, c, init),
        }
    }
}

/// One step of k.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn step<S: Simd, const V: usize, const R: usize>(
    a: *const f32,
    row: usize,
    b: *const f32,
    vector: usize,
    acc: &mut [[S::F; V]; R],
) {
    // SAFETY: the step is inside A and B.
    unsafe {
        let mut x = [S::splat(0.0); V];
        for (v, x) in x.iter_mut().enumerate() {
            *x = S::load(b.add(v * vector));
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            let s = S::splat(*a.add(r * row));
            for v in 0..V {
                acc[v] = S::fma(s, x[v], acc[v]);
            }
        }
    }
}

/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn tile<S: Simd, const V: usize, const R: usize>(
    depth: Depth,
    a: Scalars,
    b: Vectors<*const f32>,
    c: Vectors<*mut f32>,
    init: Init,
) {
    // SAFETY: every address is inside A, B or C by the caller's contract.
    unsafe {
        let mut acc = [[S::splat(0.0); V]; R];
        let mut bp = b.ptr;
        let mut ap = a.ptr;
        for _ in 0..depth.outer {
            let mut ak = ap;
            for _ in 0..depth.inner / 2 {
                step::<S, V, R>(ak, a.row, bp, b.vector, &mut acc);
                step::<S, V, R>(ak.add(a.col), a.row, bp.add(b.row), b.vector, &mut acc);
                ak = ak.add(2 * a.col);
                bp = bp.add(2 * b.row);
            }
            if depth.inner % 2 == 1 {
                step::<S, V, R>(ak, a.row, bp, b.vector, &mut acc);
                bp = bp.add(b.row);
            }
            ap = ap.add(a.outer);
        }
        // C joins at the end: one sum of all keys, element after element, would lose more digits than sums of chunks.
        for v in 0..V {
            let alpha = match init {
                Init::Scale(alpha) => S::load(alpha.add(v * S::LANES)),
                _ => S::splat(1.0),
            };
            for (r, acc) in acc.iter().enumerate() {
                let at = c.ptr.add(r * c.row + v * c.vector);
                let x = match init {
                    Init::Zero => acc[v],
                    _ => S::fma(S::load(at), alpha, acc[v]),
                };
                S::store(at, x);
            }
        }
    }
}
