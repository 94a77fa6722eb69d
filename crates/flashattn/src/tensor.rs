//! [`Tensor`], the dense tensor that results come in, and [`AsView`], what all functions take: our own views
//! and tensors, and the arrays of other crates.

use crate::error::{Error, shape_error};
use flashattn_spec::{Element, View, ViewError, ViewMut};

/// Something that can be read as `[batch, seqlen, heads, head_dim]`: [`View`], [`ViewMut`], [`Tensor`], and
/// with the feature `ndarray` the arrays and array views of that crate.
pub trait AsView<T: Element> {
    /// The view. `name` is what an error calls the tensor.
    ///
    /// # Errors
    /// [`Error::Layout`] if the memory cannot be viewed as it is.
    fn to_view(&self, name: &'static str) -> Result<View<'_, T>, Error>;
}

/// Something that can be written as `[batch, seqlen, heads, head_dim]`; see [`AsView`].
pub trait AsViewMut<T: Element> {
    /// The view. `name` is what an error calls the tensor.
    ///
    /// # Errors
    /// [`Error::Layout`] if the memory cannot be viewed as it is.
    fn to_view_mut(&mut self, name: &'static str) -> Result<ViewMut<'_, T>, Error>;
}

impl<T: Element> AsView<T> for View<'_, T> {
    fn to_view(&self, _: &'static str) -> Result<View<'_, T>, Error> {
        Ok(*self)
    }
}

impl<T: Element> AsView<T> for ViewMut<'_, T> {
    fn to_view(&self, _: &'static str) -> Result<View<'_, T>, Error> {
        Ok(self.as_view())
    }
}

impl<T: Element> AsViewMut<T> for ViewMut<'_, T> {
    fn to_view_mut(&mut self, _: &'static str) -> Result<ViewMut<'_, T>, Error> {
        Ok(self.reborrow())
    }
}

/// A dense row-major tensor `[batch, seqlen, heads, head_dim]` with memory of its own; packed sequences
/// (varlen) are `[1, total, heads, head_dim]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor<T> {
    data: Vec<T>,
    shape: [usize; 4],
}

impl<T: Element> Tensor<T> {
    /// A tensor of the given elements, row-major.
    ///
    /// # Errors
    /// [`flashattn_spec::ProblemError::Shape`] unless there are as many as the shape says.
    pub fn new(data: Vec<T>, shape: [usize; 4]) -> Result<Self, Error> {
        // With a zero among the dimensions, the others may overflow together.
        let zero = shape.contains(&0).then_some(0);
        let len = zero.or_else(|| shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)));
        if len != Some(data.len()) {
            return Err(shape_error("tensor", &[data.len()], &shape));
        }
        Ok(Tensor { data, shape })
    }

    /// A tensor of zeros.
    pub(crate) fn zeros(name: &'static str, shape: [usize; 4]) -> Result<Self, Error> {
        Ok(Tensor { data: zeros(name, &shape)?, shape })
    }

    /// `[batch, seqlen, heads, head_dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The elements, row-major.
    pub fn data(&self) -> &[T] {
        &self.data
    }

    /// The elements, row-major.
    pub fn data_mut(&mut self) -> &mut [T] {
        &mut self.data
    }

    /// The elements, row-major.
    pub fn into_vec(self) -> Vec<T> {
        self.data
    }

    /// The row of `head_dim` elements at (batch, position, head); `None` if there is none.
    pub fn row(&self, batch: usize, position: usize, head: usize) -> Option<&[T]> {
        let [b, n, h, d] = self.shape;
        if batch >= b || position >= n || head >= h {
            return None;
        }
        let start = ((batch * n + position) * h + head) * d;
        self.data.get(start..start + d)
    }
}

impl<T: Element> AsView<T> for Tensor<T> {
    fn to_view(&self, name: &'static str) -> Result<View<'_, T>, Error> {
        View::new(&self.data, self.shape).map_err(named(name))
    }
}

impl<T: Element> AsViewMut<T> for Tensor<T> {
    fn to_view_mut(&mut self, name: &'static str) -> Result<ViewMut<'_, T>, Error> {
        ViewMut::new(&mut self.data, self.shape).map_err(named(name))
    }
}

/// Gives an error about a view the name of its tensor.
pub(crate) fn named(name: &'static str) -> impl Fn(ViewError) -> Error {
    move |source| Error::View { name, source }
}

/// Zeroed memory for a result. A view may be broadcast and so be far larger than its memory; then the
/// allocation of a dense result may fail, which must not end the process.
pub(crate) fn zeros<T: Element>(name: &'static str, shape: &[usize]) -> Result<Vec<T>, Error> {
    let len = if shape.contains(&0) { 0 } else { shape.iter().fold(1usize, |n, &d| n.saturating_mul(d)) };
    let mut data = Vec::new();
    data.try_reserve_exact(len).map_err(|_| Error::OutOfMemory {
        name,
        shape: shape.to_vec(),
        bytes: len.saturating_mul(size_of::<T>()),
    })?;
    data.resize(len, T::default());
    Ok(data)
}
