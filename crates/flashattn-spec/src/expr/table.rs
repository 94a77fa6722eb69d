//! Captured data: per-head slopes, per-token document ids, bias tables, block masks.

use super::{ExprError, Type};
use std::fmt;
use std::sync::{Arc, OnceLock};

/// The elements of a [`Table`], row-major.
#[derive(Clone, PartialEq, Debug)]
pub enum TableData {
    /// Floats; may carry a gradient.
    F32(Vec<f32>),
    /// Integers.
    I32(Vec<i32>),
}

impl TableData {
    /// How many elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::I32(data) => data.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The least and greatest element of (a part of) a table; NaNs are left out of the range but remembered.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Extent {
    pub lo: f64,
    pub hi: f64,
    pub nan: bool,
}

impl Extent {
    const EMPTY: Self = Self { lo: f64::INFINITY, hi: f64::NEG_INFINITY, nan: false };

    fn add(&mut self, x: f64) {
        // `min` and `max` of std leave a NaN operand out.
        (self.lo, self.hi) = (self.lo.min(x), self.hi.max(x));
        self.nan |= x.is_nan();
    }
}

struct Store {
    data: TableData,
    /// Over all elements; found when first asked for.
    extent: OnceLock<Extent>,
}

/// Read-only data of one to four dimensions that an expression can index.
///
/// An index outside its dimension is clamped to the edge: never a panic, never a read out of bounds. So a dimension
/// of 1 accepts any index, which is how a bias of shape `[1, heads, q, kv]` is shared by the whole batch.
///
/// Cloning is cheap and keeps the identity: a table used twice, by whichever clone, takes one [`super::Slot`].
#[derive(Clone)]
pub struct Table {
    store: Arc<Store>,
    dims: [usize; 4],
    rank: usize,
    grad: bool,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Table({} {:?}, grad: {})", self.ty(), self.shape(), self.grad)
    }
}

impl Table {
    /// A table of floats with the given dimensions (one to four, each at least 1), row-major.
    ///
    /// # Errors
    /// [`ExprError::Rank`], [`ExprError::Dimension`], [`ExprError::DataLength`].
    pub fn f32(dims: &[usize], data: Vec<f32>) -> Result<Self, ExprError> {
        Self::new(dims, TableData::F32(data))
    }

    /// A table of integers with the given dimensions (one to four, each at least 1), row-major.
    ///
    /// # Errors
    /// As for [`Table::f32`].
    pub fn i32(dims: &[usize], data: Vec<i32>) -> Result<Self, ExprError> {
        Self::new(dims, TableData::I32(data))
    }

    /// One float for each query head, to be indexed with `ix.head`.
    ///
    /// # Errors
    /// [`ExprError::Dimension`] if there are none.
    pub fn per_head(data: Vec<f32>) -> Result<Self, ExprError> {
        Self::f32(&[data.len()], data)
    }

    /// A table of either element type.
    ///
    /// # Errors
    /// As for [`Table::f32`].
    pub fn new(dims: &[usize], data: TableData) -> Result<Self, ExprError> {
        if dims.is_empty() || dims.len() > 4 {
            return Err(ExprError::Rank { got: dims.len() });
        }
        let mut padded = [1; 4];
        let mut expected = Some(1usize);
        for (dim, &got) in dims.iter().enumerate() {
            // Indices are i32, so a larger dimension could not be reached.
            if got == 0 || i32::try_from(got).is_err() {
                return Err(ExprError::Dimension { dim, got });
            }
            padded[dim] = got;
            expected = expected.and_then(|n| n.checked_mul(got));
        }
        if expected != Some(data.len()) {
            let expected = expected.unwrap_or(usize::MAX);
            return Err(ExprError::DataLength { dims: dims.to_vec(), got: data.len(), expected });
        }
        let store = Arc::new(Store { data, extent: OnceLock::new() });
        Ok(Self { store, dims: padded, rank: dims.len(), grad: false })
    }

    /// The same table, for which the backward pass must return a gradient (of the same shape).
    ///
    /// # Errors
    /// [`ExprError::IntegerGradient`] for a table of integers.
    pub fn with_grad(mut self) -> Result<Self, ExprError> {
        if self.ty() != Type::Float {
            return Err(ExprError::IntegerGradient);
        }
        self.grad = true;
        Ok(self)
    }

    /// Whether the backward pass must return a gradient for it.
    pub fn wants_grad(&self) -> bool {
        self.grad
    }

    /// The elements, row-major.
    pub fn data(&self) -> &TableData {
        &self.store.data
    }

    /// The dimensions, as given.
    pub fn shape(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// The dimensions, with 1 for those that it does not have.
    pub fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// [`Type::Float`] or [`Type::Int`].
    pub fn ty(&self) -> Type {
        match self.data() {
            TableData::F32(_) => Type::Float,
            TableData::I32(_) => Type::Int,
        }
    }

    /// Whether both are the same data in memory under the same shape.
    pub fn is_same(&self, other: &Self) -> bool {
        let key = |t: &Self| (t.dims, t.rank, t.grad);
        Arc::ptr_eq(&self.store, &other.store) && key(self) == key(other)
    }

    /// Where in the data an element is; indices are clamped to the edge.
    pub fn offset(&self, index: [i32; 4]) -> usize {
        let mut offset = 0;
        for (&dim, i) in self.dims.iter().zip(index) {
            offset = offset * dim + usize::try_from(i).unwrap_or(0).min(dim - 1);
        }
        offset
    }

    /// The extent of the elements in the box from `lo` to `hi` (inclusive, `lo <= hi`), or of a larger part if
    /// looking at the box would take longer than looking at `budget` elements.
    pub(super) fn extent(&self, lo: [i32; 4], hi: [i32; 4], budget: usize) -> Extent {
        let clamp = |i: i32, dim: usize| usize::try_from(i).unwrap_or(0).min(dim - 1);
        let from: [usize; 4] = std::array::from_fn(|d| clamp(lo[d], self.dims[d]));
        let to: [usize; 4] = std::array::from_fn(|d| clamp(hi[d], self.dims[d]));
        let size = (0..4).fold(1usize, |n, d| n.saturating_mul(to[d] - from[d] + 1));
        if size > budget {
            return *self.store.extent.get_or_init(|| self.scan([0; 4], self.dims.map(|d| d - 1)));
        }
        self.scan(from, to)
    }

    fn scan(&self, from: [usize; 4], to: [usize; 4]) -> Extent {
        let mut extent = Extent::EMPTY;
        for a in from[0]..=to[0] {
            for b in from[1]..=to[1] {
                for c in from[2]..=to[2] {
                    let row = ((a * self.dims[1] + b) * self.dims[2] + c) * self.dims[3];
                    let row = row + from[3]..row + to[3] + 1;
                    match self.data() {
                        TableData::F32(data) => data[row].iter().for_each(|&x| extent.add(x.into())),
                        TableData::I32(data) => data[row].iter().for_each(|&x| extent.add(x.into())),
                    }
                }
            }
        }
        extent
    }
}
