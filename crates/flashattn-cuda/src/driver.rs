//! The driver's library, probed before use: cudarc panics where it or one of its functions is missing.

use std::ffi::CStr;
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};

use crate::error::{Error, Version};

/// The first driver that takes the emitted `.version` ([`ptx::emit::PTX_VERSION`]).
const OLDEST: Version = Version(12_040);

/// Every function that this crate calls.
const FUNCTIONS: &[&str] = &[
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamGetCtx",
    "cuStreamGetId",
    "cuPointerGetAttributes",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventElapsedTime",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemsetD8Async",
    "cuModuleLoadDataEx",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuTensorMapEncodeTiled",
    "cuLaunchKernelEx",
];

/// What the probe found.
#[derive(Clone, Copy)]
enum Probe {
    NoLibrary,
    NoFunction(&'static str),
    Refused(&'static str, CUresult),
    Version(u32),
}

/// Loads and initialises the driver, once a process; its version.
pub(crate) fn load() -> Result<Version, Error> {
    static PROBE: OnceLock<Probe> = OnceLock::new();
    match *PROBE.get_or_init(probe) {
        Probe::NoLibrary => Err(Error::NoDriver),
        Probe::NoFunction(function) => Err(Error::MissingFunction { function, expected: OLDEST }),
        Probe::Refused(call, result) => check(call, result).map(|()| OLDEST),
        Probe::Version(version) if Version(version) < OLDEST => {
            Err(Error::OldDriver { got: Version(version), expected: OLDEST })
        }
        Probe::Version(version) => Ok(Version(version)),
    }
}

fn probe() -> Probe {
    // SAFETY: loading the driver's library runs its initialisers, which is what every CUDA program does.
    if !unsafe { sys::is_culib_present() } {
        return Probe::NoLibrary;
    }
    for &function in FUNCTIONS {
        // SAFETY: the library was found just now, so `culib` does not panic; the symbol is looked up, not called.
        if unsafe { sys::culib().get::<unsafe extern "C" fn()>(function.as_bytes()) }.is_err() {
            return Probe::NoFunction(function);
        }
    }
    // SAFETY: the function exists (above) and takes 0.
    let initialised = unsafe { sys::cuInit(0) };
    if initialised != CUresult::CUDA_SUCCESS {
        return Probe::Refused("cuInit", initialised);
    }
    let mut version = 0;
    // SAFETY: the pointer is to a local integer.
    match unsafe { sys::cuDriverGetVersion(&mut version) } {
        CUresult::CUDA_SUCCESS => Probe::Version(version.max(0) as u32),
        result => Probe::Refused("cuDriverGetVersion", result),
    }
}

/// A call's result as a typed error.
pub(crate) fn check(call: &'static str, result: CUresult) -> Result<(), Error> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |get: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = ptr::null();
        // SAFETY: the pointer is to a local pointer; the functions exist, as a call that fails was made after the probe.
        let found = unsafe { get(result, &mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
        // SAFETY: on success the driver gives a static string that ends with 0.
        if found { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() } else { String::new() }
    };
    let (name, text) = (text(sys::cuGetErrorName), text(sys::cuGetErrorString));
    Err(Error::Driver { call, code: result as u32, name, text })
}

/// An opaque handle of the driver.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Handle<T>(pub(crate) *mut T);

impl<T> Clone for Handle<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Handle<T> {}

// SAFETY: it is a token that only the driver follows, and the driver's functions may be called from every thread.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Handle<T> {}
