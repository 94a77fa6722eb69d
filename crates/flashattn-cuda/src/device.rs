//! GPUs, streams and events.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{
    self, CUctx_st, CUdevice_attribute as Attribute, CUevent_st, CUstream_st,
    CUstreamCaptureStatus as Capture,
};
use ptx::instr::Target;

use crate::driver::{self, Handle, check};
use crate::error::{Error, Version};

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Its name.
    pub name: String,
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of L2 cache.
    pub l2_bytes: usize,
    /// Bytes of memory.
    pub memory_bytes: usize,
    /// Most bytes of shared memory that one block may ask for.
    pub shared_limit: u32,
    /// The newest CUDA that the driver supports.
    pub driver: Version,
}

/// A GPU, by its primary context: the one that PyTorch and the CUDA runtime use too. Clones are the same GPU.
#[derive(Clone, Debug)]
pub struct Device {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    ordinal: u32,
    device: i32,
    context: Handle<CUctx_st>,
    properties: Properties,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`, released once here; nothing of this crate outlives its device.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// The device's context is the thread's current one until this is dropped; then the caller's own is again.
pub(crate) struct Current;

impl Drop for Current {
    fn drop(&mut self) {
        let mut context = ptr::null_mut();
        // SAFETY: pops what `current` pushed on this thread (`Current` is made and dropped in one function).
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut context) };
    }
}

impl Device {
    /// GPUs of this machine.
    pub fn count() -> Result<u32, Error> {
        driver::load()?;
        let mut count = 0;
        // SAFETY: the pointer is to a local integer.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
        Ok(count.max(0) as u32)
    }

    /// Opens GPU `ordinal`, from 0.
    pub fn open(ordinal: u32) -> Result<Device, Error> {
        let (version, count) = (driver::load()?, Device::count()?);
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count });
        }
        let (mut device, mut context) = (0, ptr::null_mut());
        // SAFETY: the ordinal exists; the pointer is to a local.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, ordinal as i32) })?;
        let properties = properties(device, version)?;
        // SAFETY: the device is valid; the pointer is to a local.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })?;
        let context = Handle(context);
        Ok(Device { inner: Arc::new(Inner { ordinal, device, context, properties }) })
    }

    /// Its number.
    pub fn ordinal(&self) -> u32 {
        self.inner.ordinal
    }

    /// What it is.
    pub fn properties(&self) -> &Properties {
        &self.inner.properties
    }

    /// Whether it runs kernels of this target.
    pub fn runs(&self, target: Target) -> bool {
        runs(self.properties().compute_capability, target)
    }

    /// Makes the device's context current on this thread for as long as the result lives.
    pub(crate) fn current(&self) -> Result<Current, Error> {
        // SAFETY: the context is retained while the device lives.
        check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.inner.context.0) })?;
        Ok(Current)
    }

    pub(crate) fn same(&self, other: &Device, what: &'static str) -> Result<(), Error> {
        match other.ordinal() == self.ordinal() {
            true => Ok(()),
            false => Err(Error::OtherDevice { what, got: other.ordinal(), expected: self.ordinal() }),
        }
    }

    /// A new stream, which does not wait for the default stream.
    pub fn stream(&self) -> Result<Stream, Error> {
        let _current = self.current()?;
        let mut raw = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the pointer is to a local; a context is current.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut raw, flags) })?;
        Ok(Stream { device: self.clone(), raw: Handle(raw), owned: true })
    }

    /// The default stream.
    pub fn default_stream(&self) -> Stream {
        Stream { device: self.clone(), raw: Handle(ptr::null_mut()), owned: false }
    }

    /// A stream of the caller's (a `CUstream` or `cudaStream_t`), which stays the caller's.
    ///
    /// # Safety
    /// `raw` is a stream of this GPU's primary context, and lives as long as the result is used.
    pub unsafe fn stream_from_raw(&self, raw: *mut c_void) -> Stream {
        Stream { device: self.clone(), raw: Handle(raw.cast()), owned: false }
    }

    /// A new event.
    pub fn event(&self) -> Result<Event, Error> {
        let _current = self.current()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the pointer is to a local; a context is current; flags 0 is an event with a time.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut raw, 0) })?;
        Ok(Event { device: self.clone(), raw: Handle(raw) })
    }
}

fn properties(device: i32, driver: Version) -> Result<Properties, Error> {
    let attribute = |attribute: Attribute| {
        let mut value = 0;
        // SAFETY: the device is valid; the pointer is to a local integer.
        check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
        Ok::<u32, Error>(value.max(0) as u32)
    };
    let mut name = [0; 256];
    // SAFETY: the length given is the array's.
    check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device) })?;
    let mut memory_bytes = 0;
    // SAFETY: the pointer is to a local integer.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&mut memory_bytes, device) })?;
    Ok(Properties {
        name: CStr::from_bytes_until_nul(bytemuck::cast_slice(&name))
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        memory_bytes,
        shared_limit: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        driver,
    })
}

fn runs(capability: (u32, u32), target: Target) -> bool {
    match target {
        Target::Sm80 => capability >= (8, 0),
        Target::Sm89 => capability >= (8, 9),
        Target::Sm90 => capability >= (9, 0),
        Target::Sm90a => capability == (9, 0), // features of one architecture, which later ones do not keep
    }
}

/// A queue of work of a GPU. Dropping it does not wait for the work.
#[derive(Debug)]
pub struct Stream {
    device: Device,
    raw: Handle<CUstream_st>,
    owned: bool,
}

impl Stream {
    /// Its GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The driver's handle (`CUstream`), valid while this lives.
    pub fn raw(&self) -> *mut c_void {
        self.raw.0.cast()
    }

    pub(crate) fn handle(&self) -> sys::CUstream {
        self.raw.0
    }

    /// A number that no other stream of the process ever has, unlike handles, which the driver uses again.
    pub(crate) fn id(&self) -> Result<u64, Error> {
        /// The ids last seen, by context and handle: a stream that is captured does not tell its own.
        static SEEN: Mutex<BTreeMap<(usize, usize), u64>> = Mutex::new(BTreeMap::new());
        let key = (self.device.inner.context.0.addr(), self.raw.0.addr());
        let _current = self.device.current()?;
        let mut status = Capture::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream lives; the pointer is to a local.
        check("cuStreamIsCapturing", unsafe { sys::cuStreamIsCapturing(self.raw.0, &mut status) })?;
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        if status != Capture::CU_STREAM_CAPTURE_STATUS_NONE
            && let Some(&known) = seen.get(&key)
        {
            return Ok(known);
        }
        let mut id = 0;
        // SAFETY: the stream lives; the pointer is to a local; the per-thread default stream is resolved by the context.
        check("cuStreamGetId", unsafe { sys::cuStreamGetId(self.raw.0, &mut id) })?;
        seen.insert(key, id);
        Ok(id)
    }

    /// Refuses a stream of another context than the device's.
    pub(crate) fn check_context(&self) -> Result<(), Error> {
        let mut context = ptr::null_mut();
        let _current = self.device.current()?;
        // SAFETY: the stream lives; the pointer is to a local.
        check("cuStreamGetCtx", unsafe { sys::cuStreamGetCtx(self.raw.0, &mut context) })?;
        match context == self.device.inner.context.0 {
            true => Ok(()),
            false => Err(Error::OtherContext { expected: self.device.ordinal() }),
        }
    }

    /// Waits until all its work is done, and reports what went wrong in it.
    pub fn synchronize(&self) -> Result<(), Error> {
        let _current = self.device.current()?;
        // SAFETY: the stream lives.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.raw.0) })
    }

    /// Later work of this stream waits for the event, on the GPU.
    pub fn wait(&self, event: &Event) -> Result<(), Error> {
        let _current = self.device.current()?;
        // SAFETY: both live; the driver keeps what it needs of the event.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.raw.0, event.raw.0, 0) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let (true, Ok(_current)) = (self.owned, self.device.current()) {
            // SAFETY: made by `Device::stream` and destroyed once; the driver ends its work first.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.raw.0) };
        }
    }
}

/// A mark in a stream, with the time at which the GPU came to it.
#[derive(Debug)]
pub struct Event {
    device: Device,
    raw: Handle<CUevent_st>,
}

impl Event {
    /// Puts the mark after the work that the stream has now.
    pub fn record(&self, stream: &Stream) -> Result<(), Error> {
        self.device.same(&stream.device, "the stream")?;
        let _current = self.device.current()?;
        // SAFETY: both live and are of one context.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.raw.0, stream.raw.0) })
    }

    /// Waits until the GPU has come to the mark.
    pub fn synchronize(&self) -> Result<(), Error> {
        let _current = self.device.current()?;
        // SAFETY: the event lives.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.raw.0) })
    }

    /// Milliseconds from an earlier mark to this one; both have been reached.
    pub fn elapsed_ms(&self, since: &Event) -> Result<f64, Error> {
        self.device.same(&since.device, "the earlier event")?;
        let _current = self.device.current()?;
        let mut ms = 0f32;
        // SAFETY: both live and are of one context; the pointer is to a local.
        check("cuEventElapsedTime", unsafe { sys::cuEventElapsedTime(&mut ms, since.raw.0, self.raw.0) })?;
        Ok(ms.into())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.current() {
            // SAFETY: made by `Device::event` and destroyed once.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw.0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Here and on CI there is no driver: an error with its name, not a panic. Where there is one, the GPU is sane.
    #[test]
    fn a_missing_driver_or_gpu_is_an_error() {
        // SAFETY: only asks whether the driver's library is there.
        let present = unsafe { sys::is_culib_present() };
        match (Device::open(0), Device::count()) {
            (Err(Error::NoDriver), Err(Error::NoDriver)) => assert!(!present),
            (Err(Error::NoDevice { count: 0, .. }), Ok(0)) => {}
            (Ok(device), Ok(count)) => {
                let open = Device::open(count);
                assert!(matches!(open, Err(Error::NoDevice { .. })), "{open:?}");
                assert!(
                    device.properties().multiprocessors > 0 && device.properties().shared_limit >= 48 << 10
                );
            }
            (open, count) => {
                // A driver that cannot run (no permission, versions that do not match) still names its error.
                let (Err(open), Err(count)) = (open, count) else { panic!("one of two calls failed") };
                assert!(present && open.to_string() == count.to_string(), "{open}; {count}");
            }
        }
        assert!(Error::NoDriver.to_string().contains("cannot be loaded"));
    }

    #[test]
    fn architecture_specific_targets_run_on_one_architecture() {
        assert!(runs((9, 0), Target::Sm90a) && !runs((10, 0), Target::Sm90a) && !runs((8, 9), Target::Sm90a));
        assert!(runs((12, 0), Target::Sm90) && runs((8, 6), Target::Sm80) && !runs((8, 6), Target::Sm89));
    }

    #[test]
    fn versions_are_shown_as_nvidia_writes_them() {
        assert_eq!(Version(12_040).to_string(), "12.4");
        assert_eq!(Version(13_000).to_string(), "13.0");
    }
}
