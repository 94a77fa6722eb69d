//! Arrays by DLPack (<https://dmlc.github.io/dlpack>), without a copy: from any object with `__dlpack__`, or from the
//! capsule that it gives. The layout of these structs is the protocol's ABI; they are too few for a dependency.

use crate::array::{Array, Kind, Place, dense_strides};
use crate::error::Error;
use flashattn::DType;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods, PyDict};
use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

const CPU: i32 = 1;
const CUDA: i32 = 2;
/// Page-locked host memory, which the CPU reads like any other.
const CUDA_HOST: i32 = 3;
const INT: u8 = 0;
const UINT: u8 = 1;
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;
const READ_ONLY: u64 = 1;

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

#[repr(C)]
struct Managed {
    tensor: DlTensor,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

#[repr(C)]
struct ManagedVersioned {
    major: u32,
    minor: u32,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedVersioned)>,
    flags: u64,
    tensor: DlTensor,
}

/// What was taken from a capsule; it is given back when this is dropped.
pub struct Owner(#[expect(dead_code, reason = "kept to be dropped")] Taken);

// SAFETY: whoever has it only drops it, which calls the producer's deleter; as the protocol has consumers without Python, such a
// deleter must not rely on a thread (those that touch Python objects take the GIL).
unsafe impl Send for Owner {}

enum Taken {
    /// From a producer older than DLPack 1.0.
    Legacy(NonNull<Managed>),
    /// From DLPack 1.0 on.
    Versioned(NonNull<ManagedVersioned>),
}

impl Drop for Taken {
    fn drop(&mut self) {
        match self {
            // SAFETY: it was taken out of its capsule, whose name now says so; the protocol has the taker call the
            // deleter once.
            Taken::Legacy(managed) => unsafe {
                if let Some(deleter) = managed.as_ref().deleter {
                    deleter(managed.as_ptr());
                }
            },
            // SAFETY: as above.
            Taken::Versioned(managed) => unsafe {
                if let Some(deleter) = managed.as_ref().deleter {
                    deleter(managed.as_ptr());
                }
            },
        }
    }
}

/// An array and what keeps its memory alive.
pub struct Imported {
    /// The array; its memory is valid for as long as the owner lives.
    pub array: Array,
    /// Dropped when nobody uses the array any more.
    pub owner: Owner,
}

/// The array of an object with `__dlpack__`, or of a DLPack capsule.
///
/// # Errors
/// `TypeError` for other objects, element types and devices; whatever `__dlpack__` raises.
pub fn import(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Imported> {
    if let Ok(capsule) = object.cast::<PyCapsule>() {
        return consume(name, capsule);
    }
    let Ok(method) = object.getattr("__dlpack__") else {
        let got = object.get_type().name()?;
        let text =
            format!("{name} is a {got}, expected an array with __dlpack__ (of NumPy, PyTorch, JAX, CuPy, …)");
        return Err(PyTypeError::new_err(text));
    };
    let options = PyDict::new(object.py());
    options.set_item("max_version", (1, 0))?;
    let capsule = match method.call((), Some(&options)) {
        // Producers older than DLPack 1.0.
        Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => method.call0()?,
        other => other?,
    };
    match capsule.cast::<PyCapsule>() {
        Ok(capsule) => consume(name, capsule),
        Err(_) => Err(PyTypeError::new_err(format!("{name}.__dlpack__() did not return a capsule"))),
    }
}

fn consume(name: &'static str, capsule: &Bound<'_, PyCapsule>) -> PyResult<Imported> {
    let take = |from: &CStr, to: &'static CStr| -> PyResult<Option<NonNull<c_void>>> {
        if !capsule.is_valid_checked(Some(from)) {
            return Ok(None);
        }
        let pointer = capsule.pointer_checked(Some(from))?;
        // SAFETY: a valid capsule, and a name that lives as long as the program. It tells everybody else, the capsule's
        // destructor among them, that the tensor has been taken.
        if unsafe { pyo3::ffi::PyCapsule_SetName(capsule.as_ptr(), to.as_ptr()) } != 0 {
            return Err(PyErr::fetch(capsule.py()));
        }
        Ok(Some(pointer))
    };
    if let Some(pointer) = take(c"dltensor_versioned", c"used_dltensor_versioned")? {
        let managed = pointer.cast::<ManagedVersioned>();
        let owner = Owner(Taken::Versioned(managed));
        // SAFETY: the capsule's name says what it points to; the owner keeps it.
        let managed = unsafe { managed.as_ref() };
        if managed.major != 1 {
            let (major, minor) = (managed.major, managed.minor);
            return Err(PyTypeError::new_err(format!(
                "{name}: DLPack version is {major}.{minor}, expected 1.x"
            )));
        }
        let array = describe(name, &managed.tensor, managed.flags & READ_ONLY != 0)?;
        return Ok(Imported { array, owner });
    }
    if let Some(pointer) = take(c"dltensor", c"used_dltensor")? {
        let managed = pointer.cast::<Managed>();
        let owner = Owner(Taken::Legacy(managed));
        // SAFETY: as above.
        let array = describe(name, unsafe { &managed.as_ref().tensor }, false)?;
        return Ok(Imported { array, owner });
    }
    Err(PyTypeError::new_err(format!(
        "{name} is a capsule, expected one with a DLPack tensor that is not yet taken"
    )))
}

fn describe(name: &'static str, tensor: &DlTensor, read_only: bool) -> Result<Array, Error> {
    let kind = match (tensor.code, tensor.bits, tensor.lanes) {
        (FLOAT, 16, 1) => Kind::Element(DType::F16),
        (FLOAT, 32, 1) => Kind::Element(DType::F32),
        (FLOAT, 64, 1) => Kind::Element(DType::F64),
        (BFLOAT, 16, 1) => Kind::Element(DType::Bf16),
        (INT, 32, 1) => Kind::I32,
        (INT, 64, 1) => Kind::I64,
        (UINT, 8, 1) => Kind::U8,
        (code, bits, lanes) => {
            let text = format!("{name} has DLPack type code {code}, {bits} bits, {lanes} lanes");
            return Err(Error::Type(format!("{text}, expected float16, bfloat16 or float32")));
        }
    };
    let place = match tensor.device_type {
        CPU | CUDA_HOST => Place::Cpu,
        CUDA if tensor.device_id >= 0 => Place::Cuda { ordinal: tensor.device_id.unsigned_abs() },
        other => {
            return Err(Error::Type(format!(
                "{name} is on DLPack device type {other}, expected CPU or CUDA"
            )));
        }
    };
    let ndim = usize::try_from(tensor.ndim).unwrap_or(0);
    let list = |pointer: *const i64| -> &[i64] {
        if ndim == 0 || pointer.is_null() {
            return &[];
        }
        // SAFETY: the protocol has `ndim` numbers there.
        unsafe { std::slice::from_raw_parts(pointer, ndim) }
    };
    let shape: Vec<usize> = list(tensor.shape).iter().map(|&n| usize::try_from(n).unwrap_or(0)).collect();
    let strides = match list(tensor.strides) {
        // No strides: row-major.
        [] => dense_strides(&shape),
        strides => strides.iter().map(|&s| isize::try_from(s).unwrap_or(isize::MAX)).collect(),
    };
    let offset = usize::try_from(tensor.byte_offset).unwrap_or(usize::MAX);
    let data = tensor.data.cast::<u8>().wrapping_add(offset).cast();
    Ok(Array { name, data, shape, strides, kind, place, read_only })
}
