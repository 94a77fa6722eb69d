//! [`Array`]: memory that belongs to somebody else, described well enough to be checked before it is touched.

use crate::error::Error;
use flashattn::{DType, Element, View, ViewMut};
use std::ffi::c_void;
use std::fmt;
use std::ops::Range;

/// Element types that arguments can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Queries, keys, values and what is computed from them.
    Element(DType),
    /// Offsets and tables of integers.
    I32,
    /// The seed of dropout.
    I64,
    /// Whether an entry is kept.
    U8,
}

impl Kind {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Kind::Element(dtype) => dtype.size(),
            Kind::I32 => 4,
            Kind::I64 => 8,
            Kind::U8 => 1,
        }
    }

    /// The name that Python's array libraries give it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Element(dtype) => dtype_name(dtype),
            Kind::I32 => "int32",
            Kind::I64 => "int64",
            Kind::U8 => "uint8",
        }
    }
}

/// The name that Python's array libraries give an element type.
pub fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::Bf16 => "bfloat16",
        DType::F32 => "float32",
        DType::F64 => "float64",
    }
}

/// Where an array's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Memory of this process.
    Cpu,
    /// Memory of an NVIDIA GPU.
    Cuda {
        /// Its number.
        ordinal: u32,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Cpu => f.write_str("cpu"),
            Place::Cuda { ordinal } => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// An array of the caller's. Whoever makes one vouches that `data` is valid for all elements that shape and strides
/// reach (for reading, and for writing unless `read_only`) for as long as the value lives.
#[derive(Debug)]
pub struct Array {
    /// What errors call it.
    pub name: &'static str,
    /// The first element.
    pub data: *mut c_void,
    /// Sizes.
    pub shape: Vec<usize>,
    /// Strides in elements.
    pub strides: Vec<isize>,
    /// Element type.
    pub kind: Kind,
    /// Where the memory is.
    pub place: Place,
    /// Whether it must not be written.
    pub read_only: bool,
}

// SAFETY: a description of memory; those who read or write through it borrow the array, and the calls that run without
// the GIL check that what they write overlaps with nothing else.
unsafe impl Send for Array {}
// SAFETY: as above.
unsafe impl Sync for Array {}

impl Array {
    /// Elements.
    pub fn len(&self) -> usize {
        if self.shape.contains(&0) { 0 } else { self.shape.iter().fold(1, |n, &d| n.saturating_mul(d)) }
    }

    /// Fails unless the elements are of this type.
    pub fn expect(&self, kind: Kind) -> Result<(), Error> {
        if self.kind == kind {
            return Ok(());
        }
        Err(Error::Type(format!("{} is {}, expected {}", self.name, self.kind.name(), kind.name())))
    }

    fn layout_error(&self, reason: &str) -> Error {
        let Array { name, shape, strides, .. } = self;
        Error::Value(format!("{name} of shape {shape:?} with strides {strides:?} (in elements) {reason}"))
    }

    /// Strides in elements; those that mean nothing (of dimensions without a second element, of empty arrays) are 0.
    fn checked_strides(&self) -> Result<Vec<usize>, Error> {
        let empty = self.shape.contains(&0);
        let stride = |(&n, &s): (&usize, &isize)| {
            if n < 2 || empty {
                return Ok(0);
            }
            usize::try_from(s).map_err(|_| self.layout_error("runs backwards, expected strides of 0 or more"))
        };
        self.shape.iter().zip(&self.strides).map(stride).collect()
    }

    /// Elements from the first to one past the last.
    fn span(&self, strides: &[usize]) -> Result<usize, Error> {
        if self.shape.contains(&0) {
            return Ok(0);
        }
        let step = |last: usize, (&n, &s): (&usize, &usize)| last.checked_add((n - 1).checked_mul(s)?);
        let last = self.shape.iter().zip(strides).try_fold(0, step);
        last.and_then(|last| last.checked_add(1))
            .filter(|&n| n.checked_mul(self.kind.size()).is_some_and(|bytes| bytes <= isize::MAX as usize))
            .ok_or_else(|| self.layout_error("overflows the address space"))
    }

    /// The addresses that it reaches.
    pub fn bytes(&self) -> Result<Range<usize>, Error> {
        let span = self.span(&self.checked_strides()?)?;
        let start = self.data.addr();
        Ok(start..start.saturating_add(span * self.kind.size()))
    }

    fn check_memory<T>(&self, span: usize) -> Result<(), Error> {
        match self.place {
            Place::Cpu => {}
            Place::Cuda { ordinal } => {
                return Err(Error::Type(format!("{} is on cuda:{ordinal}, expected the CPU", self.name)));
            }
        }
        if span > 0 && (self.data.is_null() || !self.data.addr().is_multiple_of(align_of::<T>())) {
            let reason = format!(
                "is at address {:?}, expected one that is a multiple of {}",
                self.data,
                align_of::<T>()
            );
            return Err(self.layout_error(&reason));
        }
        Ok(())
    }

    fn slice<T>(&self, span: usize) -> Result<&[T], Error> {
        self.check_memory::<T>(span)?;
        if span == 0 {
            return Ok(&[]);
        }
        // SAFETY: the maker vouches for `span` elements from `data` on, which is aligned; types are plain numbers of the
        // size that `kind` says (callers check), for which every bit pattern is a value.
        Ok(unsafe { std::slice::from_raw_parts(self.data.cast::<T>(), span) })
    }

    fn slice_mut<T>(&mut self, span: usize) -> Result<&mut [T], Error> {
        self.check_memory::<T>(span)?;
        self.expect_writable()?;
        if span == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `slice`; it may be written, and the calls check that nothing else of theirs overlaps with it.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.data.cast::<T>(), span) })
    }

    /// As `[batch, seqlen, heads, head_dim]`; packed arrays `[total, heads, head_dim]` have batch 1.
    fn dims(&self, strides: &[usize]) -> Result<([usize; 4], [usize; 4]), Error> {
        let (s, t) = (&self.shape, strides);
        match (s.as_slice(), t) {
            (&[b, n, h, d], &[sb, sn, sh, sd]) => Ok(([b, n, h, d], [sb, sn, sh, sd])),
            (&[n, h, d], &[sn, sh, sd]) => Ok(([1, n, h, d], [0, sn, sh, sd])),
            _ => Err(Error::Value(format!("{} has shape {s:?}, expected 3 or 4 dimensions", self.name))),
        }
    }

    /// The shape as `[batch, seqlen, heads, head_dim]`.
    pub fn shape4(&self) -> Result<[usize; 4], Error> {
        Ok(self.dims(&vec![0; self.shape.len()])?.0)
    }

    /// Shape and strides as `[batch, seqlen, heads, head_dim]`, without a look at the memory.
    pub fn layout4(&self) -> Result<([usize; 4], [usize; 4]), Error> {
        let strides = self.checked_strides()?;
        self.span(&strides)?;
        let (shape, strides) = self.dims(&strides)?;
        Ok((shape, unit(shape, strides)))
    }

    /// Elements of a row-major array of this type, without a look at the memory.
    pub fn dense_len(&self, kind: Kind) -> Result<usize, Error> {
        self.expect(kind)?;
        self.expect_dense()
    }

    /// Fails if it must not be written.
    pub fn expect_writable(&self) -> Result<(), Error> {
        match self.read_only {
            true => Err(Error::Value(format!("{} is read-only, expected an array to write to", self.name))),
            false => Ok(()),
        }
    }

    /// To read as `[batch, seqlen, heads, head_dim]`.
    pub fn view<T: Element>(&self) -> Result<View<'_, T>, Error> {
        self.expect(Kind::Element(T::DTYPE))?;
        let strides = self.checked_strides()?;
        let (shape, strides4) = self.dims(&strides)?;
        let data = self.slice(self.span(&strides)?)?;
        View::with_strides(data, shape, unit(shape, strides4))
            .map_err(|error| Error::Value(format!("{}: {error}", self.name)))
    }

    /// To write as `[batch, seqlen, heads, head_dim]`.
    pub fn view_mut<T: Element>(&mut self) -> Result<ViewMut<'_, T>, Error> {
        self.expect(Kind::Element(T::DTYPE))?;
        let strides = self.checked_strides()?;
        let (shape, strides4) = self.dims(&strides)?;
        let (name, span) = (self.name, self.span(&strides)?);
        ViewMut::with_strides(self.slice_mut(span)?, shape, unit(shape, strides4))
            .map_err(|error| Error::Value(format!("{name}: {error}")))
    }

    /// Fails unless the elements lie one after the other, row-major.
    fn expect_dense(&self) -> Result<usize, Error> {
        let mut stride = 1isize;
        for (&n, &s) in self.shape.iter().zip(&self.strides).rev() {
            if n > 1 && s != stride && self.len() > 0 {
                return Err(self.layout_error("is not contiguous, expected row-major"));
            }
            stride = stride.saturating_mul(isize::try_from(n).unwrap_or(isize::MAX));
        }
        Ok(self.len())
    }

    /// To read as a row-major list.
    pub fn list<T: Number>(&self) -> Result<&[T], Error> {
        self.expect(T::KIND)?;
        self.slice(self.expect_dense()?)
    }

    /// To write as a row-major list.
    pub fn list_mut<T: Number>(&mut self) -> Result<&mut [T], Error> {
        self.expect(T::KIND)?;
        let len = self.expect_dense()?;
        self.slice_mut(len)
    }

    /// The bytes of a row-major array, whatever its type.
    pub fn raw(&self) -> Result<&[u8], Error> {
        let len = self.expect_dense()?;
        self.slice(len.saturating_mul(self.kind.size()))
    }
}

/// Strides of a row-major array, in elements.
pub fn dense_strides(shape: &[usize]) -> Vec<isize> {
    let mut strides = vec![1isize; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d].saturating_mul(isize::try_from(shape[d]).unwrap_or(isize::MAX));
    }
    strides
}

/// Rows of one element may have any stride.
fn unit(shape: [usize; 4], mut strides: [usize; 4]) -> [usize; 4] {
    if shape[3] < 2 || shape.contains(&0) {
        strides[3] = 1;
    }
    strides
}

/// Rust types of lists.
pub trait Number {
    /// Their name at run time.
    const KIND: Kind;
}

impl Number for f32 {
    const KIND: Kind = Kind::Element(DType::F32);
}
impl Number for i32 {
    const KIND: Kind = Kind::I32;
}
impl Number for i64 {
    const KIND: Kind = Kind::I64;
}
impl Number for u8 {
    const KIND: Kind = Kind::U8;
}

/// Fails if an array that will be written shares memory with any other of the call.
pub fn check_disjoint(read: &[&Array], written: &[&Array]) -> Result<(), Error> {
    let ranges = |arrays: &[&Array]| arrays.iter().map(|a| a.bytes()).collect::<Result<Vec<_>, _>>();
    let (read_bytes, written_bytes) = (ranges(read)?, ranges(written)?);
    for (i, (out, a)) in written.iter().zip(&written_bytes).enumerate() {
        let others = read.iter().zip(&read_bytes).chain(written[..i].iter().zip(&written_bytes));
        for (other, b) in others {
            if a.start < b.end && b.start < a.end {
                let names = (out.name, other.name);
                return Err(Error::Value(format!(
                    "{} shares memory with {}, expected memory of its own",
                    names.0, names.1
                )));
            }
        }
    }
    Ok(())
}
