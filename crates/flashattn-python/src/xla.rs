//! Custom calls of XLA, for JAX: the same two passes on XLA's buffers, called by XLA's threads without Python.
//!
//! The structs are those of XLA's FFI, `xla/ffi/api/c_api.h` version 0.x, which is made to be extended at the ends of
//! structs: everything used here has been there since 0.1. (JAX's other way, `pure_callback`, goes through Python and
//! the GIL at each call, and on a GPU through host memory.)
//!
//! Operands: q, k, v, \[o, lse, do, dlse,\] extras. Results: o, lse; or dq, dk, dv, d_extras. One attribute, `options`.

use crate::array::{Array, Kind, Place};
use crate::call::{Call, Given, Gradients, Results};
use crate::error::Error;
use crate::gpu;
use flashattn::DType;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use std::ffi::{CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{NonNull, null_mut};

const METADATA: c_int = 1;
const EXECUTE: c_int = 3;
const BUFFER: c_int = 1;
const STRING: c_int = 4;
const INVALID_ARGUMENT: c_int = 3;
const UNIMPLEMENTED: c_int = 12;
const INTERNAL: c_int = 13;

#[repr(C)]
struct Extension {
    struct_size: usize,
    kind: c_int,
    next: *mut Extension,
}

#[repr(C)]
struct Version {
    struct_size: usize,
    extension: *mut Extension,
    major: c_int,
    minor: c_int,
}

#[repr(C)]
struct Metadata {
    struct_size: usize,
    api_version: Version,
    // More fields follow.
}

#[repr(C)]
struct MetadataExtension {
    base: Extension,
    metadata: *mut Metadata,
}

#[repr(C)]
struct ErrorArgs {
    struct_size: usize,
    extension: *mut Extension,
    message: *const c_char,
    code: c_int,
}

#[repr(C)]
struct Api {
    struct_size: usize,
    extension: *mut Extension,
    version: Version,
    internal: *const c_void,
    error_create: Option<unsafe extern "C" fn(*mut ErrorArgs) -> *mut c_void>,
    _error_message: *const c_void,
    error_destroy: Option<unsafe extern "C" fn(*mut DestroyArgs)>,
    _handler_register: *const c_void,
    stream_get: Option<unsafe extern "C" fn(*mut StreamArgs) -> *mut c_void>,
    _types_and_state: [*const c_void; 4],
    memory_allocate: Option<unsafe extern "C" fn(*mut AllocateArgs) -> *mut c_void>,
    memory_free: Option<unsafe extern "C" fn(*mut FreeArgs) -> *mut c_void>,
    _others: [*const c_void; 6],
    /// The last of 0.3; `struct_size` says whether it is there.
    ordinal_get: Option<unsafe extern "C" fn(*mut OrdinalArgs) -> *mut c_void>,
}

#[repr(C)]
struct DestroyArgs {
    struct_size: usize,
    extension: *mut Extension,
    error: *mut c_void,
}

#[repr(C)]
struct StreamArgs {
    struct_size: usize,
    extension: *mut Extension,
    context: *mut c_void,
    stream: *mut c_void,
}

#[repr(C)]
struct OrdinalArgs {
    struct_size: usize,
    extension: *mut Extension,
    context: *mut c_void,
    ordinal: i32,
}

#[repr(C)]
struct AllocateArgs {
    struct_size: usize,
    extension: *mut Extension,
    context: *mut c_void,
    size: usize,
    alignment: usize,
    data: *mut c_void,
}

#[repr(C)]
struct FreeArgs {
    struct_size: usize,
    extension: *mut Extension,
    context: *mut c_void,
    size: usize,
    data: *mut c_void,
}

#[repr(C)]
struct Buffer {
    struct_size: usize,
    extension: *mut Extension,
    dtype: c_int,
    data: *mut c_void,
    rank: i64,
    dims: *mut i64,
}

/// Arguments and results alike.
#[repr(C)]
struct Buffers {
    struct_size: usize,
    extension: *mut Extension,
    size: i64,
    kinds: *mut c_int,
    buffers: *mut *mut Buffer,
}

#[repr(C)]
struct Bytes {
    data: *const u8,
    len: usize,
}

#[repr(C)]
struct Attributes {
    struct_size: usize,
    extension: *mut Extension,
    size: i64,
    kinds: *mut c_int,
    names: *mut *mut Bytes,
    values: *mut *mut c_void,
}

/// What XLA calls a handler with.
#[repr(C)]
pub struct CallFrame {
    struct_size: usize,
    extension: *mut Extension,
    api: *const Api,
    context: *mut c_void,
    stage: c_int,
    arguments: Buffers,
    results: Buffers,
    attributes: Attributes,
    // More fields follow.
}

/// A handler: null is success.
pub type Handler = unsafe extern "C" fn(*mut CallFrame) -> *mut c_void;

/// A capsule for `jax.ffi.register_ffi_target`.
pub fn capsule(py: Python<'_>, handler: Handler) -> PyResult<Bound<'_, PyCapsule>> {
    let pointer = NonNull::new(handler as *mut c_void).ok_or_else(|| Error::Value("no handler".into()))?;
    // SAFETY: a function, which is there for as long as the program.
    unsafe { PyCapsule::new_with_pointer(py, pointer, c"xla._CUSTOM_CALL_TARGET") }
}

/// The forward pass as an XLA custom call, for the platform "CUDA" or "cpu".
///
/// # Safety
/// `frame` is a call frame of XLA's FFI.
pub unsafe extern "C" fn forward<const CUDA: bool>(frame: *mut CallFrame) -> *mut c_void {
    // SAFETY: as the caller says.
    unsafe {
        handle::<CUDA>(frame, |options, mut arguments, results, gpu| {
            let [o, lse] = exactly("results", results)?;
            let mut extras = arguments.split_off(3.min(arguments.len()));
            let [q, k, v] = exactly("operands", arguments)?;
            let stream = gpu.as_ref().map(|gpu| gpu.stream);
            let _memory = to_host(&mut extras, stream)?;
            let call = Call { options, q, k, v, extras, stream, captured: false };
            let mut results = Results { o, lse };
            match gpu {
                Some(mut gpu) => call.forward(&mut results, Some(&mut |bytes| gpu.allocate(bytes))),
                None => call.forward(&mut results, None),
            }
        })
    }
}

/// The backward pass as an XLA custom call, for the platform "CUDA" or "cpu".
///
/// # Safety
/// `frame` is a call frame of XLA's FFI.
pub unsafe extern "C" fn backward<const CUDA: bool>(frame: *mut CallFrame) -> *mut c_void {
    // SAFETY: as the caller says.
    unsafe {
        handle::<CUDA>(frame, |options, mut arguments, mut results, gpu| {
            let d_extras = results.split_off(3.min(results.len()));
            let [dq, dk, dv] = exactly("results", results)?;
            let mut extras = arguments.split_off(7.min(arguments.len()));
            let [q, k, v, o, lse, d_o, d_lse] = exactly("operands", arguments)?;
            let given = Given { o, lse, d_o, d_lse: Some(d_lse) };
            let stream = gpu.as_ref().map(|gpu| gpu.stream);
            let _memory = to_host(&mut extras, stream)?;
            let call = Call { options, q, k, v, extras, stream, captured: false };
            let mut gradients = Gradients { dq, dk, dv, d_extras };
            match gpu {
                Some(mut gpu) => {
                    call.backward(&given, &mut gradients, Some(&mut |bytes| gpu.allocate(bytes)))
                }
                None => call.backward(&given, &mut gradients, None),
            }
        })
    }
}

/// Extras are read on the host: those on a GPU are copied, into memory that is returned. Waits for the stream.
fn to_host(extras: &mut [Array], stream: Option<usize>) -> Result<Vec<Vec<u32>>, Error> {
    let mut memory = Vec::new();
    for extra in extras {
        if let Place::Cuda { ordinal } = extra.place {
            let words = gpu::read(extra, ordinal, stream)?;
            extra.data = words.as_ptr().cast_mut().cast();
            extra.place = Place::Cpu;
            memory.push(words);
        }
    }
    Ok(memory)
}

fn exactly<const N: usize>(what: &str, list: Vec<Array>) -> Result<[Array; N], Error> {
    list.try_into().map_err(|list: Vec<_>| Error::Value(format!("got {} {what}, expected {N}", list.len())))
}

/// What XLA tells of a call on a GPU, and the memory that it lent for it.
struct Gpu {
    api: *const Api,
    context: *mut c_void,
    stream: usize,
    ordinal: u32,
    /// From XLA's allocator: addresses and sizes. They go back when the call is over, with the work that uses them still in the
    /// stream: what XLA puts there next comes later.
    lent: Vec<(*mut c_void, usize)>,
}

impl Gpu {
    /// # Safety
    /// `frame` is a call frame of XLA's FFI, and outlives the result.
    unsafe fn of(frame: &CallFrame) -> Result<Gpu, Error> {
        let (context, extension, api) = (frame.context, null_mut(), frame.api);
        let mut stream =
            StreamArgs { struct_size: size_of::<StreamArgs>(), extension, context, stream: null_mut() };
        let mut device =
            OrdinalArgs { struct_size: size_of::<OrdinalArgs>(), extension, context, ordinal: -1 };
        // SAFETY: XLA's own functions, with their arguments; a field is read only if `struct_size` says that it is there.
        let failed = unsafe {
            if (*api).struct_size < size_of::<Api>() {
                return Err(Error::NotImplemented(
                    "this jaxlib does not tell the GPU's number; update it".into(),
                ));
            }
            let errors = [
                (*api).stream_get.map_or(null_mut(), |get| get(&mut stream)),
                (*api).ordinal_get.map_or(null_mut(), |get| get(&mut device)),
            ];
            // All of them, for each is to be destroyed.
            errors.map(|error| is_error(api, error)).contains(&true)
        };
        match u32::try_from(device.ordinal) {
            Ok(ordinal) if !failed => {
                Ok(Gpu { api, context, stream: stream.stream.expose_provenance(), ordinal, lent: Vec::new() })
            }
            _ => Err(Error::Value("XLA gives no stream or no device for this call".into())),
        }
    }

    /// Memory from XLA's allocator until the call is over.
    fn allocate(&mut self, bytes: u64) -> Result<Array, Error> {
        // XLA's FFI promises no more than 16, workspaces begin at multiples of 256.
        const ALIGN: usize = 256;
        let failed = || Error::Value(format!("XLA's allocator has no {bytes} bytes to work with"));
        let len = usize::try_from(bytes).map_err(|_| failed())?;
        let size = len.checked_add(ALIGN).ok_or_else(failed)?;
        let (context, extension, data) = (self.context, null_mut(), null_mut());
        let struct_size = size_of::<AllocateArgs>();
        let mut args = AllocateArgs { struct_size, extension, context, size, alignment: 16, data };
        // SAFETY: XLA's own function, with its arguments, while the frame's context is valid.
        unsafe {
            let allocate = (*self.api).memory_allocate.ok_or_else(failed)?;
            if is_error(self.api, allocate(&mut args)) || args.data.is_null() {
                return Err(failed());
            }
        }
        self.lent.push((args.data, size));
        let data = args.data.wrapping_byte_add(args.data.addr().next_multiple_of(ALIGN) - args.data.addr());
        let place = Place::Cuda { ordinal: self.ordinal };
        let (shape, strides) = (vec![len], vec![1]);
        Ok(Array { name: "workspace", data, shape, strides, kind: Kind::U8, place, read_only: false })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        for &(data, size) in &self.lent {
            let (context, extension, struct_size) = (self.context, null_mut(), size_of::<FreeArgs>());
            let mut args = FreeArgs { struct_size, extension, context, size, data };
            // SAFETY: XLA's own function, once for each that it lent, while the frame's context is valid.
            unsafe {
                if let Some(free) = (*self.api).memory_free {
                    is_error(self.api, free(&mut args));
                }
            }
        }
    }
}

/// Whether a function of XLA's failed; its error is destroyed.
///
/// # Safety
/// `api` is XLA's, `error` what one of its functions returned.
unsafe fn is_error(api: *const Api, error: *mut c_void) -> bool {
    if error.is_null() {
        return false;
    }
    let mut args = DestroyArgs { struct_size: size_of::<DestroyArgs>(), extension: null_mut(), error };
    // SAFETY: XLA's own function, which has been there from the first version on, with its arguments.
    unsafe {
        if let Some(destroy) = (*api).error_destroy {
            destroy(&mut args);
        }
    }
    true
}

/// Reads the frame, runs `f`, and makes an error of what it returns, or of a panic, which must not reach C++.
///
/// # Safety
/// `frame` is a call frame of XLA's FFI.
unsafe fn handle<const CUDA: bool>(
    frame: *mut CallFrame,
    f: impl FnOnce(&str, Vec<Array>, Vec<Array>, Option<Gpu>) -> Result<(), Error>,
) -> *mut c_void {
    // SAFETY: XLA gives a frame that is valid during the call, as are all the pointers in it.
    let frame = unsafe { &mut *frame };
    if let Some(extension) = NonNull::new(frame.extension) {
        // SAFETY: as above; an extension of this kind is a `MetadataExtension`, whose fields XLA has us fill.
        unsafe {
            if extension.as_ref().kind == METADATA {
                let metadata = &mut *extension.cast::<MetadataExtension>().as_ref().metadata;
                // Ours is every 0.x: see the module's documentation.
                metadata.api_version.major = 0;
                metadata.api_version.minor = (*frame.api).version.minor;
                return null_mut();
            }
        }
    }
    if frame.stage != EXECUTE {
        return null_mut();
    }
    let run = || {
        // SAFETY: as above; operands and results are buffers in the memory of this handler's platform, dense and row-major,
        // as is JAX's default layout.
        let (options, arguments, results, gpu) = unsafe {
            let (gpu, place) = match CUDA {
                true => {
                    let gpu = Gpu::of(frame)?;
                    let place = Place::Cuda { ordinal: gpu.ordinal };
                    (Some(gpu), place)
                }
                false => (None, Place::Cpu),
            };
            let (arguments, results) =
                (arrays(&frame.arguments, place, true)?, arrays(&frame.results, place, false)?);
            (options(&frame.attributes)?, arguments, results, gpu)
        };
        f(options, arguments, results, gpu)
    };
    let (code, message) = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => return null_mut(),
        Ok(Err(
            error @ (Error::NotImplemented(_) | Error::Attention(flashattn::Error::Unsupported { .. })),
        )) => (UNIMPLEMENTED, error.to_string()),
        Ok(Err(error)) => (INVALID_ARGUMENT, error.to_string()),
        Err(_) => (INTERNAL, "flashattn: a panic; please report it".into()),
    };
    let message = CString::new(message.replace('\0', "")).unwrap_or_default();
    let mut args = ErrorArgs {
        struct_size: size_of::<ErrorArgs>(),
        extension: null_mut(),
        message: message.as_ptr(),
        code,
    };
    // SAFETY: the frame's API, which has had this field from the first version on.
    match unsafe { (*frame.api).error_create } {
        // SAFETY: XLA's own function, with its arguments; it copies the message.
        Some(create) => unsafe { create(&mut args) },
        None => null_mut(),
    }
}

/// # Safety
/// `attributes` comes from a call frame of XLA's FFI.
unsafe fn options(attributes: &Attributes) -> Result<&str, Error> {
    for i in 0..usize::try_from(attributes.size).unwrap_or(0) {
        // SAFETY: `size` entries in each list; a string's value is a `Bytes`.
        let (kind, name, value) = unsafe {
            let name = &**attributes.names.add(i);
            (
                *attributes.kinds.add(i),
                std::slice::from_raw_parts(name.data, name.len),
                *attributes.values.add(i),
            )
        };
        if kind == STRING && name == b"options" {
            // SAFETY: as above.
            let text = unsafe {
                let value = &*value.cast::<Bytes>();
                std::slice::from_raw_parts(value.data, value.len)
            };
            return std::str::from_utf8(text).map_err(|error| Error::Value(format!("options: {error}")));
        }
    }
    Err(Error::Value("the attribute options is missing".into()))
}

/// # Safety
/// `buffers` comes from a call frame of XLA's FFI.
unsafe fn arrays(buffers: &Buffers, place: Place, read_only: bool) -> Result<Vec<Array>, Error> {
    let names: &[&'static str] = if read_only { &["q", "k", "v", "operand"] } else { &["result"] };
    let mut list = Vec::new();
    for i in 0..usize::try_from(buffers.size).unwrap_or(0) {
        // SAFETY: `size` entries in each list.
        let (kind, buffer) = unsafe { (*buffers.kinds.add(i), *buffers.buffers.add(i)) };
        let name = names[i.min(names.len() - 1)];
        if kind != BUFFER {
            return Err(Error::Type(format!("{name} {i} is no buffer")));
        }
        // SAFETY: it is a buffer.
        let buffer = unsafe { &*buffer };
        let kind = match buffer.dtype {
            10 => Kind::Element(DType::F16),
            11 => Kind::Element(DType::F32),
            12 => Kind::Element(DType::F64),
            16 => Kind::Element(DType::Bf16),
            4 => Kind::I32,
            5 => Kind::I64,
            6 => Kind::U8,
            other => return Err(Error::Type(format!("{name} {i} has XLA's data type {other}"))),
        };
        let shape: Vec<usize> = match usize::try_from(buffer.rank) {
            Ok(rank) if rank > 0 => {
                // SAFETY: `rank` sizes.
                let dims = unsafe { std::slice::from_raw_parts(buffer.dims, rank) };
                dims.iter().map(|&n| usize::try_from(n).unwrap_or(0)).collect()
            }
            _ => Vec::new(),
        };
        let strides = crate::array::dense_strides(&shape);
        list.push(Array { name, data: buffer.data, shape, strides, kind, place, read_only });
    }
    Ok(list)
}
