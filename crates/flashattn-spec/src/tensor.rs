//! Strided views over the caller's memory. A tensor is `[batch, seqlen, heads, head_dim]`; packed (varlen)
//! tensors are `[1, total, heads, head_dim]`. Strides are in elements, never negative, and the last is 1.

use crate::element::Element;

/// Why a view over memory was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ViewError {
    /// The last stride must be 1: a row of `head_dim` elements is contiguous.
    #[error("last stride is {got}, expected 1 (rows of head_dim elements must be contiguous)")]
    LastStride {
        /// The stride that was given.
        got: usize,
    },
    /// The view would reach past the end of the slice.
    #[error("shape {shape:?} with strides {strides:?} needs {needed} elements, the slice has {len}")]
    TooShort {
        /// Shape asked for.
        shape: [usize; 4],
        /// Strides asked for, in elements.
        strides: [usize; 4],
        /// Elements that the view spans.
        needed: usize,
        /// Elements of the slice.
        len: usize,
    },
    /// Shape or strides overflow the address space.
    #[error("shape {shape:?} with strides {strides:?} overflows")]
    Overflow {
        /// Shape asked for.
        shape: [usize; 4],
        /// Strides asked for, in elements.
        strides: [usize; 4],
    },
    /// Two elements of an output would share memory.
    #[error("strides {strides:?} of output shape {shape:?} overlap; every element needs memory of its own")]
    Overlap {
        /// Shape asked for.
        shape: [usize; 4],
        /// Strides asked for, in elements.
        strides: [usize; 4],
    },
}

/// Strides of a dense row-major tensor, in elements.
pub fn contiguous_strides(shape: [usize; 4]) -> [usize; 4] {
    let s2 = shape[3];
    let s1 = s2.saturating_mul(shape[2]);
    [s1.saturating_mul(shape[1]), s1, s2, 1]
}

/// Elements from the first to one past the last of a view, or `None` on overflow; 0 if the view is empty.
fn span(shape: [usize; 4], strides: [usize; 4]) -> Option<usize> {
    // An empty dimension makes an empty view whatever the others are.
    if shape.contains(&0) {
        return Some(0);
    }
    let mut last = 0usize;
    for (n, s) in shape.into_iter().zip(strides) {
        last = last.checked_add((n - 1).checked_mul(s)?)?;
    }
    let span = last.checked_add(1)?;
    (span <= isize::MAX as usize).then_some(span)
}

/// Elements from the first to one past the last of a tensor with these strides (in elements), wherever it lies; 0 if it is
/// empty.
///
/// # Errors
/// [`ViewError::LastStride`], [`ViewError::Overflow`].
pub fn check_strides(shape: [usize; 4], strides: [usize; 4]) -> Result<usize, ViewError> {
    if shape[3] > 1 && strides[3] != 1 {
        return Err(ViewError::LastStride { got: strides[3] });
    }
    span(shape, strides).ok_or(ViewError::Overflow { shape, strides })
}

/// As [`check_strides`], of an output: no two of its elements share memory.
///
/// # Errors
/// As [`check_strides`]; [`ViewError::Overlap`].
pub fn check_output_strides(shape: [usize; 4], strides: [usize; 4]) -> Result<usize, ViewError> {
    let needed = check_strides(shape, strides)?;
    if needed > 0 && !is_disjoint(shape, strides) {
        return Err(ViewError::Overlap { shape, strides });
    }
    Ok(needed)
}

fn check(shape: [usize; 4], strides: [usize; 4], len: usize) -> Result<(), ViewError> {
    let needed = check_strides(shape, strides)?;
    if needed > len {
        return Err(ViewError::TooShort { shape, strides, needed, len });
    }
    Ok(())
}

/// Whether all elements of a view are distinct: sorted by stride, each dimension steps over all smaller ones.
/// Sufficient, and necessary for every layout that permutes, slices or pads dimensions.
fn is_disjoint(shape: [usize; 4], strides: [usize; 4]) -> bool {
    let mut dims: Vec<(usize, usize)> = strides.into_iter().zip(shape).filter(|&(_, n)| n > 1).collect();
    dims.sort_unstable();
    let mut reach = 0usize;
    for (stride, n) in dims {
        if stride <= reach {
            return false;
        }
        reach = reach.saturating_add(stride.saturating_mul(n - 1));
    }
    true
}

/// A read-only strided view. Dimensions may be broadcast (stride 0) except the last.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T> {
    data: &'a [T],
    shape: [usize; 4],
    strides: [usize; 4],
}

impl<'a, T: Element> View<'a, T> {
    /// A dense row-major view of all of `data`, which must have exactly as many elements as `shape`, or more.
    pub fn new(data: &'a [T], shape: [usize; 4]) -> Result<Self, ViewError> {
        Self::with_strides(data, shape, contiguous_strides(shape))
    }

    /// A view with the given strides, in elements: packed QKV, transposed and sliced tensors need no copy.
    pub fn with_strides(data: &'a [T], shape: [usize; 4], strides: [usize; 4]) -> Result<Self, ViewError> {
        check(shape, strides, data.len())?;
        Ok(View { data, shape, strides })
    }

    /// `[batch, seqlen, heads, head_dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Strides in elements.
    pub fn strides(&self) -> [usize; 4] {
        self.strides
    }

    /// The memory under the view.
    pub fn data(&self) -> &'a [T] {
        self.data
    }

    /// The row of `head_dim` elements at (batch, position, head).
    #[inline]
    pub fn row(&self, batch: usize, position: usize, head: usize) -> &'a [T] {
        let [sb, sn, sh, _] = self.strides;
        let start = batch * sb + position * sn + head * sh;
        &self.data[start..start + self.shape[3]]
    }
}

/// A writable strided view: no two elements share memory.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    data: &'a mut [T],
    shape: [usize; 4],
    strides: [usize; 4],
}

impl<'a, T: Element> ViewMut<'a, T> {
    /// A dense row-major view.
    pub fn new(data: &'a mut [T], shape: [usize; 4]) -> Result<Self, ViewError> {
        Self::with_strides(data, shape, contiguous_strides(shape))
    }

    /// A view with the given strides, in elements; strides that make elements overlap are refused.
    pub fn with_strides(
        data: &'a mut [T],
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<Self, ViewError> {
        check(shape, strides, data.len())?;
        check_output_strides(shape, strides)?;
        Ok(ViewMut { data, shape, strides })
    }

    /// `[batch, seqlen, heads, head_dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Strides in elements.
    pub fn strides(&self) -> [usize; 4] {
        self.strides
    }

    /// The memory under the view, for executors that write from several threads at once.
    pub fn data_mut(&mut self) -> &mut [T] {
        self.data
    }

    /// The row of `head_dim` elements at (batch, position, head).
    #[inline]
    pub fn row_mut(&mut self, batch: usize, position: usize, head: usize) -> &mut [T] {
        let [sb, sn, sh, _] = self.strides;
        let start = batch * sb + position * sn + head * sh;
        &mut self.data[start..start + self.shape[3]]
    }

    /// The same view, read-only.
    pub fn as_view(&self) -> View<'_, T> {
        View { data: self.data, shape: self.shape, strides: self.strides }
    }

    /// A shorter-lived view of the same memory.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { data: self.data, shape: self.shape, strides: self.strides }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_does_not_fit() {
        let data = [0f32; 24];
        assert!(View::new(&data, [1, 2, 3, 4]).is_ok());
        assert_eq!(
            View::new(&data, [1, 2, 3, 5]).unwrap_err(),
            ViewError::TooShort { shape: [1, 2, 3, 5], strides: [30, 15, 5, 1], needed: 30, len: 24 }
        );
        assert!(matches!(
            View::with_strides(&data, [1, 1, 2, 2], [0, 0, 2, 2]),
            Err(ViewError::LastStride { got: 2 })
        ));
        assert!(matches!(
            View::with_strides(&data, [2, 2, 2, 2], [usize::MAX, 1, 1, 1]),
            Err(ViewError::Overflow { .. })
        ));
        assert!(View::new(&data, [usize::MAX, usize::MAX, 0, 7]).is_ok(), "empty views need no memory");
    }

    #[test]
    fn outputs_must_not_overlap() {
        let mut data = [0f32; 64];
        assert!(ViewMut::with_strides(&mut data, [2, 4, 2, 4], [32, 4, 16, 1]).is_ok(), "[b,h,n,d] memory");
        assert!(matches!(
            ViewMut::with_strides(&mut data, [2, 4, 2, 4], [0, 8, 4, 1]),
            Err(ViewError::Overlap { .. })
        ));
        assert!(matches!(
            ViewMut::with_strides(&mut data, [1, 4, 2, 4], [0, 4, 4, 1]),
            Err(ViewError::Overlap { .. })
        ));
        assert!(ViewMut::with_strides(&mut data, [1, 0, 2, 4], [0, 0, 0, 1]).is_ok());
    }

    #[test]
    fn rows_follow_strides() {
        let data: Vec<f32> = (0..48).map(|x| x as f32).collect();
        let v = View::with_strides(&data, [2, 3, 2, 4], [24, 4, 12, 1]).unwrap();
        assert_eq!(v.row(1, 2, 1), &[44.0, 45.0, 46.0, 47.0]);
    }
}
