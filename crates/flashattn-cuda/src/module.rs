//! Kernels on a GPU: verified, emitted, compiled by the driver.

use std::ffi::{CString, c_void};
use std::ptr;

use cudarc::driver::sys::{
    self, CUfunc_st, CUfunction_attribute_enum as FunctionAttribute, CUjit_option_enum as Jit, CUmod_st,
};
use ptx::assemble::explain;
use ptx::{Kernel, emit, verify};

use crate::device::Device;
use crate::driver::{Handle, check};
use crate::error::Error;

/// Bytes kept of what the driver's compiler prints.
const LOG: usize = 64 << 10;

/// What the driver made of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Registers a thread.
    pub registers: u32,
    /// Bytes of local memory a thread: spilled registers and stack.
    pub local_bytes: u32,
    /// Bytes of static shared memory.
    pub shared_bytes: u32,
    /// Most threads a block.
    pub max_threads: u32,
}

/// A kernel on a GPU, ready to launch.
#[derive(Debug)]
pub struct Module {
    pub(crate) device: Device,
    pub(crate) function: Handle<CUfunc_st>,
    pub(crate) kernel: Signature,
    _raw: Raw,
    attributes: Attributes,
    log: String,
}

/// What a launch must know of a kernel.
#[derive(Clone, Debug)]
pub(crate) struct Signature {
    pub(crate) name: String,
    pub(crate) params: Vec<ptx::kernel::Param>,
    pub(crate) block: [u32; 3],
    pub(crate) cluster: [u32; 3],
    pub(crate) shared_bytes: u32,
}

impl Module {
    /// Verifies a kernel, writes it as PTX, and has the driver compile it (which takes tens to hundreds of milliseconds,
    /// unless the driver's cache on disk has it).
    pub fn load(device: &Device, kernel: &Kernel) -> Result<Module, Error> {
        verify(kernel)?;
        Self::load_verified(device, kernel)
    }

    /// As [`Module::load`], of a kernel of this crate: tests verify every config of the corpus, and debug builds every one.
    /// (`verify` takes as long as writing the PTX, which a kernel that the driver's cache has would wait for.)
    pub(crate) fn load_trusted(device: &Device, kernel: &Kernel) -> Result<Module, Error> {
        if cfg!(debug_assertions) {
            verify(kernel)?;
        }
        Self::load_verified(device, kernel)
    }

    fn load_verified(device: &Device, kernel: &Kernel) -> Result<Module, Error> {
        let properties = device.properties();
        if !device.runs(kernel.target) {
            return Err(Error::Target {
                kernel: kernel.name.clone(),
                expected: kernel.target,
                device: properties.name.clone(),
                got: properties.compute_capability,
            });
        }
        if kernel.shared_bytes > properties.shared_limit {
            let (got, expected) = (kernel.shared_bytes, properties.shared_limit);
            return Err(Error::Shared { kernel: kernel.name.clone(), got, expected });
        }
        let (raw, log) = compile(device, &kernel.name, &emit(kernel))?;
        let _current = device.current()?;
        let function = raw.function(&kernel.name)?;
        if kernel.shared_bytes > 0 {
            let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of a loaded module.
            let result =
                unsafe { sys::cuFuncSetAttribute(function.0, attribute, kernel.shared_bytes as i32) };
            check("cuFuncSetAttribute", result)?;
        }
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: the function is of a loaded module; the pointer is to a local integer.
            check("cuFuncGetAttribute", unsafe {
                sys::cuFuncGetAttribute(&mut value, attribute, function.0)
            })?;
            Ok::<u32, Error>(value.max(0) as u32)
        };
        let attributes = Attributes {
            registers: attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local_bytes: attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            shared_bytes: attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            max_threads: attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        };
        let kernel = Signature {
            name: kernel.name.clone(),
            params: kernel.params.clone(),
            block: kernel.block,
            cluster: kernel.cluster,
            shared_bytes: kernel.shared_bytes,
        };
        Ok(Module { device: device.clone(), function, kernel, _raw: raw, attributes, log })
    }

    /// Its GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The kernel's name.
    pub fn name(&self) -> &str {
        &self.kernel.name
    }

    /// What the driver made of it.
    pub fn attributes(&self) -> Attributes {
        self.attributes
    }

    /// What the driver's compiler printed; nothing if the kernel came from its cache.
    pub fn log(&self) -> &str {
        &self.log
    }

    /// The driver's handle of the kernel (`CUfunction`), valid while this lives.
    pub fn raw(&self) -> *mut c_void {
        self.function.0.cast()
    }
}

/// A loaded module of the driver.
#[derive(Debug)]
struct Raw {
    device: Device,
    module: Handle<CUmod_st>,
}

impl Raw {
    fn function(&self, name: &str) -> Result<Handle<CUfunc_st>, Error> {
        let mut function = ptr::null_mut();
        // A verified kernel's name has no 0 in it.
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the module is loaded, the name ends with 0, the pointer is to a local.
        let result = unsafe { sys::cuModuleGetFunction(&mut function, self.module.0, name.as_ptr()) };
        check("cuModuleGetFunction", result)?;
        Ok(Handle(function))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.current() {
            // SAFETY: loaded once and unloaded once; the driver waits for launches of it.
            let _ = unsafe { sys::cuModuleUnload(self.module.0) };
        }
    }
}

/// Has the driver compile PTX; the module, and what the compiler printed.
fn compile(device: &Device, name: &str, text: &str) -> Result<(Raw, String), Error> {
    let _current = device.current()?;
    let image = CString::new(text.replace('\0', " ")).unwrap_or_default();
    let (mut info, mut errors) = (vec![0u8; LOG], vec![0u8; LOG]);
    let mut options = [
        Jit::CU_JIT_INFO_LOG_BUFFER,
        Jit::CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES,
        Jit::CU_JIT_ERROR_LOG_BUFFER,
        Jit::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
        Jit::CU_JIT_LOG_VERBOSE,
    ];
    // Values are passed in the place of pointers.
    let number = ptr::without_provenance_mut::<c_void>;
    let mut values =
        [info.as_mut_ptr().cast(), number(LOG), errors.as_mut_ptr().cast(), number(LOG), number(1)];
    let mut module = ptr::null_mut();
    // SAFETY: the image ends with 0; the options and values are arrays of the length given; the buffers have the sizes
    // given and live until the call returns.
    let result = unsafe {
        sys::cuModuleLoadDataEx(
            &mut module,
            image.as_ptr().cast(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    let read = |log: &[u8]| {
        let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
        explain(&String::from_utf8_lossy(&log[..end]), text)
    };
    match check("cuModuleLoadDataEx", result) {
        Ok(()) => Ok((Raw { device: device.clone(), module: Handle(module) }, read(&info))),
        Err(source) => {
            Err(Error::Compile { kernel: name.to_owned(), log: read(&errors), source: source.into() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs an NVIDIA GPU"]
    fn the_compilers_refusal_names_the_line() {
        let device = Device::open(0).unwrap();
        let text = emit(&ptx::examples::vector_add()).replace("add.rn.f32", "add.wrong.f32");
        let error = compile(&device, "vector_add", &text).err().unwrap();
        assert!(matches!(error, Error::Compile { .. }));
        let text = error.to_string();
        assert!(text.contains("add.wrong.f32") && text.contains("built at level_1_vector_add.rs:"), "{text}");
    }
}
