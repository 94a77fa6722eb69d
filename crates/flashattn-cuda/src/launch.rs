//! Launches with typed arguments.

use std::ffi::c_void;

use cudarc::driver::sys::{
    self, CUlaunchAttribute, CUlaunchAttributeID as Id, CUlaunchAttributeValue as Value,
};
use ptx::kernel::ParamKind;

use crate::device::Stream;
use crate::driver::check;
use crate::error::Error;
use crate::memory::Buffer;
use crate::module::{Module, Signature};
use crate::tensor_map::TensorMap;

/// An argument of a launch.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// A 32-bit integer.
    U32(u32),
    /// A signed 32-bit integer.
    S32(i32),
    /// A float.
    F32(f32),
    /// A 64-bit integer.
    U64(u64),
    /// The address of a buffer, so many bytes in.
    Buffer(&'a Buffer, u64),
    /// A tensor map.
    TensorMap(&'a TensorMap),
}

impl Arg<'_> {
    const fn kind(&self) -> &'static str {
        match self {
            Arg::U32(_) => "a u32",
            Arg::S32(_) => "an s32",
            Arg::F32(_) => "an f32",
            Arg::U64(_) => "a u64",
            Arg::Buffer(..) => "a buffer",
            Arg::TensorMap(_) => "a tensor map",
        }
    }
}

/// How a kernel is launched. Block, cluster and shared memory are the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks, by dimension: multiples of the cluster's.
    pub grid: [u32; 3],
    /// Programmatic dependent launch: the kernel may start while the one before it in the stream ends, and waits for it
    /// itself (`griddepcontrol.wait`).
    pub dependent: bool,
}

impl Launch {
    /// A launch that begins when the stream's earlier work has ended.
    pub const fn new(grid: [u32; 3]) -> Launch {
        Launch { grid, dependent: false }
    }
}

/// A parameter's bytes, aligned for every kind.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(128))]
pub(crate) struct Slot([u8; 128]);

impl Slot {
    pub(crate) fn new(bytes: &[u8]) -> Slot {
        let mut slot = [0; 128];
        slot.iter_mut().zip(bytes).for_each(|(to, &from)| *to = from);
        Slot(slot)
    }
}

impl Module {
    /// Puts the kernel into the stream, and does not wait: what goes wrong in it shows at the stream's next wait.
    ///
    /// # Safety
    /// With these arguments the kernel touches only memory that is the caller's to touch, that lives until the launch has
    /// ended, and that no other work touches at the same time in conflict.
    pub unsafe fn launch(&self, stream: &Stream, launch: &Launch, args: &[Arg<'_>]) -> Result<(), Error> {
        self.device.same(stream.device(), "the stream")?;
        for arg in args {
            if let Arg::Buffer(buffer, offset) = arg {
                self.device.same(buffer.device(), "a buffer")?;
                buffer.range("an argument", *offset, 0)?;
            }
        }
        let mut slots = pack(&self.kernel, args)?;
        // SAFETY: the caller's promise.
        unsafe { self.launch_packed(stream, launch, &mut slots) }
    }

    /// Arguments as the driver reads them, each of its parameter's kind.
    pub(crate) fn pack(&self, args: &[Arg<'_>]) -> Result<Vec<Slot>, Error> {
        pack(&self.kernel, args)
    }

    /// As [`Module::launch`], with arguments from [`Module::pack`] (of the stream's GPU).
    ///
    /// # Safety
    /// As [`Module::launch`].
    pub(crate) unsafe fn launch_packed(
        &self,
        stream: &Stream,
        launch: &Launch,
        slots: &mut [Slot],
    ) -> Result<(), Error> {
        check_grid(&self.kernel, launch.grid)?;
        if slots.len() != self.kernel.params.len() {
            let (got, expected) = (slots.len(), self.kernel.params.len());
            return Err(Error::ArgumentCount { kernel: self.kernel.name.clone(), got, expected });
        }
        let mut pointers: Vec<*mut c_void> = slots.iter_mut().map(|slot| (&raw mut *slot).cast()).collect();
        let mut attributes = attributes(&self.kernel, launch);
        let ([x, y, z], [bx, by, bz]) = (launch.grid, self.kernel.block);
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: self.kernel.shared_bytes,
            hStream: stream.handle(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        let _current = self.device.current()?;
        // SAFETY: the config and its attributes are locals; there is a pointer for each parameter of the kernel, to as many
        // bytes as the parameter has (`pack`), which the driver copies before it returns; what the kernel does with them is
        // the caller's promise.
        let result = unsafe {
            sys::cuLaunchKernelEx(&config, self.function.0, pointers.as_mut_ptr(), std::ptr::null_mut())
        };
        check("cuLaunchKernelEx", result)
    }
}

/// Arguments as the driver reads them, each of its parameter's kind.
fn pack(kernel: &Signature, args: &[Arg<'_>]) -> Result<Vec<Slot>, Error> {
    let (got, expected) = (args.len(), kernel.params.len());
    if got != expected {
        return Err(Error::ArgumentCount { kernel: kernel.name.clone(), got, expected });
    }
    let slot = |(index, (arg, param)): (usize, (&Arg<'_>, &ptx::kernel::Param))| {
        let expected = match (param.kind, arg) {
            (ParamKind::U32, Arg::U32(value)) => return Ok(Slot::new(&value.to_ne_bytes())),
            (ParamKind::S32, Arg::S32(value)) => return Ok(Slot::new(&value.to_ne_bytes())),
            (ParamKind::F32, Arg::F32(value)) => return Ok(Slot::new(&value.to_ne_bytes())),
            (ParamKind::U64, Arg::U64(value)) => return Ok(Slot::new(&value.to_ne_bytes())),
            (ParamKind::U64, Arg::Buffer(buffer, offset)) => {
                return Ok(Slot::new(&buffer.address().wrapping_add(*offset).to_ne_bytes()));
            }
            (ParamKind::TensorMap, Arg::TensorMap(map)) => {
                return Ok(Slot::new(map.bytes()));
            }
            (ParamKind::U32, _) => "a u32",
            (ParamKind::S32, _) => "an s32",
            (ParamKind::F32, _) => "an f32",
            (ParamKind::U64, _) => "a u64 or a buffer",
            (ParamKind::TensorMap, _) => "a tensor map",
        };
        let (kernel, name) = (kernel.name.clone(), param.name.clone());
        Err(Error::Argument { kernel, index, name, got: arg.kind(), expected })
    };
    args.iter().zip(&kernel.params).enumerate().map(slot).collect()
}

fn check_grid(kernel: &Signature, grid: [u32; 3]) -> Result<(), Error> {
    let most = [i32::MAX as u32, 65535, 65535];
    let fits = (0..3).all(|d| (1..=most[d]).contains(&grid[d]) && grid[d].is_multiple_of(kernel.cluster[d]));
    if fits {
        return Ok(());
    }
    let expected = format!("1 to {most:?}, in multiples of the cluster's {:?}", kernel.cluster);
    Err(Error::Grid { kernel: kernel.name.clone(), got: grid, expected })
}

fn attributes(kernel: &Signature, launch: &Launch) -> Vec<CUlaunchAttribute> {
    let attribute = |id, value| CUlaunchAttribute { id, pad: [0; 4], value };
    // The whole union is defined, whichever member is then set.
    let mut attributes = Vec::new();
    if kernel.cluster != [1; 3] {
        let [x, y, z] = kernel.cluster;
        let mut value = Value { pad: [0; 64] };
        value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
        attributes.push(attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, value));
    }
    if launch.dependent {
        let mut value = Value { pad: [0; 64] };
        value.programmaticStreamSerializationAllowed = 1;
        attributes.push(attribute(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, value));
    }
    attributes
}

#[cfg(test)]
mod tests {
    use super::*;
    use cudarc::driver::sys::CUtensorMap;
    use ptx::kernel::Param;

    fn signature(kinds: &[ParamKind]) -> Signature {
        Signature {
            name: "k".into(),
            params: kinds.iter().map(|&kind| Param { name: "n".into(), kind }).collect(),
            block: [128, 1, 1],
            cluster: [2, 1, 1],
            shared_bytes: 0,
        }
    }

    #[test]
    fn arguments_are_packed_as_their_parameters() {
        use ParamKind::*;
        let map = crate::TensorMap { raw: CUtensorMap { opaque: std::array::from_fn(|i| i as u64) } };
        let args = [Arg::U32(7), Arg::S32(-2), Arg::F32(1.5), Arg::U64(1 << 40), Arg::TensorMap(&map)];
        let slots = pack(&signature(&[U32, S32, F32, U64, TensorMap]), &args).unwrap();
        assert_eq!(slots[0].0[..4], 7u32.to_ne_bytes());
        assert_eq!(slots[1].0[..4], (-2i32).to_ne_bytes());
        assert_eq!(slots[2].0[..4], 1.5f32.to_ne_bytes());
        assert_eq!(slots[3].0[..8], (1u64 << 40).to_ne_bytes());
        assert_eq!(slots[4].0[120..], 15u64.to_ne_bytes());
        assert!(slots.iter().all(|slot| (&raw const *slot).addr().is_multiple_of(64)));
    }

    #[test]
    fn wrong_arguments_are_named() {
        let error = pack(&signature(&[ParamKind::U32]), &[]).err().unwrap();
        assert_eq!(error.to_string(), "kernel k got 0 arguments; expected 1");
        let error =
            pack(&signature(&[ParamKind::U32, ParamKind::U64]), &[Arg::U32(1), Arg::F32(1.0)]).err().unwrap();
        assert_eq!(error.to_string(), "argument 1 (n) of kernel k is an f32; expected a u64 or a buffer");
    }

    #[test]
    fn grids_are_whole_clusters() {
        let kernel = signature(&[]);
        assert!(check_grid(&kernel, [4, 65535, 1]).is_ok());
        for grid in [[3, 1, 1], [0, 1, 1], [2, 65536, 1], [2, 1, 0], [1 << 31, 1, 1]] {
            let error = check_grid(&kernel, grid).unwrap_err();
            assert!(matches!(error, Error::Grid { got, .. } if got == grid), "{error}");
        }
    }

    #[test]
    fn attributes_are_those_asked_for() {
        let mut kernel = signature(&[]);
        let all = attributes(&kernel, &Launch { grid: [2, 1, 1], dependent: true });
        assert_eq!(all.len(), 2);
        // SAFETY: the member that was set is read.
        assert_eq!(unsafe { all[0].value.clusterDim.x }, 2);
        // SAFETY: the member that was set is read.
        assert_eq!(unsafe { all[1].value.programmaticStreamSerializationAllowed }, 1);
        kernel.cluster = [1; 3];
        assert!(attributes(&kernel, &Launch::new([1; 3])).is_empty());
    }
}
