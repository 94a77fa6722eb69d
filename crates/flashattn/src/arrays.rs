//! Arrays of the `ndarray` crate as tensors.
//!
//! `Array`, `ArrayView` and `ArrayViewMut` of 4 dimensions `[batch, seqlen, heads, head_dim]`, or of 3 for
//! packed sequences `[total, heads, head_dim]` (which is `[1, total, heads, head_dim]`), can be given
//! wherever a function takes [`AsView`] or [`AsViewMut`]. They are read and written in place, in any order of
//! the dimensions whose last has stride 1: a `[batch, heads, seqlen, head_dim]` array with permuted axes is
//! such a one.
//!
//! An array with *gaps* between its elements, such as the q of a packed qkv, cannot be turned into a slice
//! without unsafe code, as the elements in the gaps might be borrowed by somebody else. Name the array it is
//! part of: [`view_of`] and [`view_of_mut`] borrow that as a whole.

use crate::error::Error;
use crate::output::Output;
use crate::tensor::{AsView, AsViewMut, Tensor, named};
use flashattn_spec::{Element, View, ViewMut};
use ndarray::{Array3, Array4, ArrayBase, ArrayView, Data, DataMut, Dimension};

const GAPS: &str = "has gaps or repeats between its elements, which cannot be borrowed; \
     make it with view_of / view_of_mut from the array it is part of, or copy it with as_standard_layout()";
const OUTSIDE: &str = "is no part of the array it should be a part of";

/// Shape and strides of an array as a 4-dimensional tensor.
fn layout(name: &'static str, shape: &[usize], strides: &[isize]) -> Result<([usize; 4], [usize; 4]), Error> {
    let refuse = |reason| Error::Layout { name, shape: shape.to_vec(), strides: strides.to_vec(), reason };
    let first = match shape.len() {
        4 => 0,
        3 => 1,
        _ => {
            return Err(refuse(
                "must have 4 dimensions [batch, seqlen, heads, head_dim], or 3 [total, heads, head_dim]",
            ));
        }
    };
    let (mut to_shape, mut to_strides) = ([1; 4], [0, 0, 0, 1]);
    for (d, (&n, &stride)) in shape.iter().zip(strides).enumerate() {
        to_shape[first + d] = n;
        // Strides mean nothing without a second element, nor in an empty array.
        if n > 1 && !shape.contains(&0) {
            to_strides[first + d] = usize::try_from(stride)
                .map_err(|_| refuse("runs backwards; copy it with as_standard_layout()"))?;
        }
    }
    if to_shape[3] > 1 && to_strides[3] != 1 {
        return Err(refuse("must have stride 1 in its last dimension; copy it with as_standard_layout()"));
    }
    Ok((to_shape, to_strides))
}

fn gaps(name: &'static str, shape: &[usize], strides: &[isize]) -> Error {
    Error::Layout { name, shape: shape.to_vec(), strides: strides.to_vec(), reason: GAPS }
}

impl<T: Element, S: Data<Elem = T>, D: Dimension> AsView<T> for ArrayBase<S, D> {
    fn to_view(&self, name: &'static str) -> Result<View<'_, T>, Error> {
        let (shape, strides) = layout(name, self.shape(), self.strides())?;
        let data = match self.as_slice_memory_order() {
            Some(data) => data,
            None if self.is_empty() => &[],
            None => return Err(gaps(name, self.shape(), self.strides())),
        };
        View::with_strides(data, shape, strides).map_err(named(name))
    }
}

impl<T: Element, S: DataMut<Elem = T>, D: Dimension> AsViewMut<T> for ArrayBase<S, D> {
    fn to_view_mut(&mut self, name: &'static str) -> Result<ViewMut<'_, T>, Error> {
        let (shape, strides) = layout(name, self.shape(), self.strides())?;
        let data = if self.is_empty() {
            &mut []
        } else if self.as_slice_memory_order().is_some() {
            self.as_slice_memory_order_mut().unwrap_or_default()
        } else {
            return Err(gaps(name, self.shape(), self.strides()));
        };
        ViewMut::with_strides(data, shape, strides).map_err(named(name))
    }
}

/// A part of an array, with gaps or not, read in place: `part` is given a view of `array` and returns the
/// part.
///
/// ```
/// # use flashattn::{Attention, view_of};
/// # use ndarray::{Array5, s};
/// // Packed qkv: [batch, seqlen, 3, heads, head_dim].
/// let element = |(b, n, i, h, d)| ((b + n * i + h * d) as f32).sin();
/// let qkv = Array5::<f32>::from_shape_fn((2, 7, 3, 4, 16), element);
/// let [q, k, v] = [0, 1, 2].map(|i| view_of(&qkv, |x| x.slice_move(s![.., .., i, .., ..])));
/// let o = Attention::new().causal().forward(&q?, &k?, &v?)?;
/// assert_eq!(o.shape(), [2, 7, 4, 16]);
/// # Ok::<(), flashattn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Layout`] if `array` itself has gaps, if the part runs backwards or its last stride is not 1, or
/// if `part` returns something else than a part of its argument.
pub fn view_of<'a, T, S, D, E>(
    array: &'a ArrayBase<S, D>,
    part: impl FnOnce(ArrayView<'a, T, D>) -> ArrayView<'a, T, E>,
) -> Result<View<'a, T>, Error>
where
    T: Element,
    S: Data<Elem = T>,
    D: Dimension,
    E: Dimension,
{
    const NAME: &str = "view_of";
    let part = part(array.view());
    let (shape, strides) = layout(NAME, part.shape(), part.strides())?;
    if part.is_empty() {
        return View::with_strides(&[], shape, strides).map_err(named(NAME));
    }
    let refuse = || gaps(NAME, array.shape(), array.strides());
    let data = array.as_slice_memory_order().ok_or_else(refuse)?;
    let data = offset(data.as_ptr(), part.as_ptr())
        .and_then(|start| data.get(start..))
        .ok_or_else(|| outside(NAME, part.shape(), part.strides()))?;
    View::with_strides(data, shape, strides).map_err(named(NAME))
}

/// A part of an array, with gaps or not, to be written in place: `part` is given a view of `array` and
/// returns the part, of which only the place is used.
///
/// # Errors
/// As [`view_of`], and if the part has an element twice.
pub fn view_of_mut<'a, T, S, D, E>(
    array: &'a mut ArrayBase<S, D>,
    part: impl for<'p> FnOnce(ArrayView<'p, T, D>) -> ArrayView<'p, T, E>,
) -> Result<ViewMut<'a, T>, Error>
where
    T: Element,
    S: DataMut<Elem = T>,
    D: Dimension,
    E: Dimension,
{
    const NAME: &str = "view_of_mut";
    let view = part(array.view());
    let (shape, strides) = layout(NAME, view.shape(), view.strides())?;
    if view.is_empty() {
        return ViewMut::with_strides(&mut [], shape, strides).map_err(named(NAME));
    }
    let refuse = || gaps(NAME, array.shape(), array.strides());
    let base = array.as_slice_memory_order().ok_or_else(refuse)?.as_ptr();
    let error = outside(NAME, view.shape(), view.strides());
    let start = offset(base, view.as_ptr());
    let data = start.and_then(|start| array.as_slice_memory_order_mut()?.get_mut(start..)).ok_or(error)?;
    ViewMut::with_strides(data, shape, strides).map_err(named(NAME))
}

/// How many elements the start of a part is past that of the array's memory. If it is within that memory, it
/// is a part of the array, as nothing else may live there; if not, the checks against its length find it.
fn offset<T>(base: *const T, part: *const T) -> Option<usize> {
    Some(part.addr().checked_sub(base.addr())? / size_of::<T>())
}

fn outside(name: &'static str, shape: &[usize], strides: &[isize]) -> Error {
    Error::Layout { name, shape: shape.to_vec(), strides: strides.to_vec(), reason: OUTSIDE }
}

impl<T: Element> Tensor<T> {
    /// The same tensor as an `ndarray` array, without a copy.
    ///
    /// # Errors
    /// [`Error::Layout`] for an empty tensor whose other dimensions are too large for `ndarray`.
    pub fn into_array(self) -> Result<Array4<T>, Error> {
        let shape = self.shape();
        Array4::from_shape_vec(shape, self.into_vec()).map_err(|_| too_large("tensor", &shape))
    }
}

impl<T: Element> Output<T> {
    /// o `[batch, seqlen_q, heads_q, head_dim_v]` and lse `[batch, heads_q, seqlen_q]` as `ndarray` arrays,
    /// without a copy.
    ///
    /// # Errors
    /// [`Error::Layout`] as [`Tensor::into_array`], and if `lse` was changed to another length.
    pub fn into_arrays(self) -> Result<(Array4<T>, Array3<f32>), Error> {
        let shape = self.lse_shape();
        let lse = Array3::from_shape_vec(shape, self.lse).map_err(|_| too_large("lse", &shape))?;
        Ok((self.o.into_array()?, lse))
    }
}

fn too_large(name: &'static str, shape: &[usize]) -> Error {
    Error::Layout { name, shape: shape.to_vec(), strides: vec![], reason: "cannot be an array of ndarray" }
}
