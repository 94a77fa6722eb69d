//! What the passes share: workspaces, uploads, and a plan's arguments bound to memory.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::cache::KernelConfig;
use crate::device::{Device, Stream};
use crate::error::Error;
use crate::launch::{Arg, Launch, Slot};
use crate::memory::Buffer;
use crate::module::Module;
use crate::plan::{Argument, Upload};
use crate::stage::Copy;
use crate::tensor_map::TensorMap;
use crate::views::check_pointer;

/// What everything in a workspace begins at a multiple of. It begins with the counter of work, which is 0 between runs.
pub(crate) const ALIGN: u64 = 256;

/// Device memory that a run needs besides its tensors. One run at a time may use it: runs of one stream, or of streams
/// that wait for each other.
#[derive(Debug)]
pub struct Workspace {
    buffer: Buffer,
    bound: Mutex<Bound>,
}

impl Workspace {
    /// Takes memory for a workspace, allocated by [`Device::alloc`] or the caller's, of [`crate::Forward::workspace_bytes`] or
    /// [`crate::Backward::workspace_bytes`]; the runs that use it come after this in the stream's order. One may serve passes
    /// of several plans.
    ///
    /// # Errors
    /// [`Error::Misaligned`] unless it begins at a multiple of 256; [`Error::Workspace`] if it is too small for any run.
    pub fn new(buffer: Buffer, stream: &Stream) -> Result<Workspace, Error> {
        let (address, bytes) = (buffer.address(), buffer.bytes() as u64);
        if bytes < ALIGN {
            return Err(Error::Workspace { got: bytes, expected: ALIGN });
        }
        if !address.is_multiple_of(ALIGN) {
            return Err(Error::Misaligned { name: "the workspace", address, expected: ALIGN as usize });
        }
        buffer.fill_first(stream, ALIGN as usize, 0)?;
        Ok(Workspace { buffer, bound: Mutex::default() })
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.buffer.bytes() as u64
    }

    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }

    pub(crate) fn bound(&self) -> MutexGuard<'_, Bound> {
        lock(&self.bound)
    }

    /// Refuses another GPU's, and one that is too small.
    pub(crate) fn expect(&self, device: &Device, expected: u64) -> Result<(), Error> {
        device.same(self.buffer.device(), "the workspace")?;
        match self.bytes() {
            got if got < expected => Err(Error::Workspace { got, expected }),
            _ => Ok(()),
        }
    }
}

/// The kernels' arguments of the last run with a workspace.
#[derive(Debug, Default)]
pub(crate) struct Bound {
    /// [`Prepared::id`]; 0: none yet.
    id: u64,
    addresses: Vec<u64>,
    pub slots: Vec<Slot>,
}

impl Bound {
    /// Whether the arguments are those of this plan at these addresses.
    pub fn holds(&self, id: u64, addresses: &[u64]) -> bool {
        self.id == id && self.addresses == addresses
    }

    /// Asks the driver about the addresses that the last run did not have; `tensors` are their names, and whether there is
    /// anything at them.
    pub fn check_pointers<'a>(
        &self,
        device: &Device,
        tensors: impl IntoIterator<Item = (&'static str, bool)>,
        addresses: impl IntoIterator<Item = &'a u64>,
    ) -> Result<(), Error> {
        let _current = device.current()?;
        for (i, ((name, any), &address)) in tensors.into_iter().zip(addresses).enumerate() {
            if any && (self.id == 0 || self.addresses.get(i) != Some(&address)) {
                check_pointer(device, name, address)?;
            }
        }
        Ok(())
    }

    /// Makes the kernels' arguments for these addresses; of the last run's, what is the same stays. `place`: where a kernel
    /// finds a tensor, with the caller's at these addresses.
    pub fn bind<T: std::marker::Copy>(
        &mut self,
        module: &Module,
        id: u64,
        addresses: &[u64],
        arguments: &[Argument<T>],
        place: impl Fn(T, &[u64]) -> u64,
    ) -> Result<(), Error> {
        // Whatever fails below leaves no half of two runs.
        let old = std::mem::take(&mut self.id) == id;
        let mut maps = Vec::new();
        for (i, argument) in arguments.iter().enumerate() {
            let Argument::TensorMap(map, tensor) = argument else { continue };
            let address = place(*tensor, addresses);
            if !old || address != place(*tensor, &self.addresses) {
                maps.push((i, TensorMap::encode(map, module.device(), address)?));
            }
        }
        if old {
            for (i, map) in &maps {
                self.slots[*i] = Slot::new(map.bytes());
            }
            for (slot, argument) in self.slots.iter_mut().zip(arguments) {
                if let Argument::Address(tensor) = argument {
                    *slot = Slot::new(&place(*tensor, addresses).to_ne_bytes());
                }
            }
        } else {
            let mut maps = maps.iter();
            let args: Vec<Arg<'_>> = arguments
                .iter()
                .filter_map(|argument| {
                    Some(match *argument {
                        Argument::U32(x) => Arg::U32(x),
                        Argument::S32(x) => Arg::S32(x),
                        Argument::F32(x) => Arg::F32(x),
                        Argument::U64(x) => Arg::U64(x),
                        Argument::Address(tensor) => Arg::U64(place(tensor, addresses)),
                        // Each has been encoded above.
                        Argument::TensorMap(..) => Arg::TensorMap(&maps.next()?.1),
                    })
                })
                .collect();
            self.slots = module.pack(&args)?;
        }
        self.id = id;
        self.addresses.clear();
        self.addresses.extend_from_slice(addresses);
        Ok(())
    }
}

/// A plan's uploads on a GPU, made once.
#[derive(Debug)]
pub(crate) struct Uploads {
    buffer: Buffer,
    /// Where in it each begins.
    offsets: Vec<u64>,
}

impl Uploads {
    pub fn new(device: &Device, uploads: &[Upload]) -> Result<Uploads, Error> {
        let (mut bytes, mut offsets) = (Vec::new(), Vec::new());
        for upload in uploads {
            bytes.resize(bytes.len().next_multiple_of(ALIGN as usize), 0u8);
            offsets.push(bytes.len() as u64);
            bytes.extend_from_slice(upload.bytes());
        }
        let buffer = match bytes.is_empty() {
            true => device.alloc(0)?,
            false => device.upload(&device.stream()?, &bytes)?,
        };
        Ok(Uploads { buffer, offsets })
    }

    pub fn address(&self, upload: usize) -> u64 {
        self.buffer.address() + self.offsets[upload]
    }
}

/// A pass for one layout.
#[derive(Debug)]
pub(crate) struct Prepared<P> {
    /// No other has it in this process.
    pub id: u64,
    pub plan: P,
    /// The kernels of its copies.
    pub copies: Vec<Arc<Module>>,
    /// Of a workspace.
    pub workspace_bytes: u64,
    /// A workspace for each stream by its id: what is in one stream runs in turn.
    pool: Mutex<HashMap<u64, Arc<Workspace>>>,
}

impl<P> Prepared<P> {
    pub fn new(plan: P, copies: Vec<Arc<Module>>, workspace_bytes: u64) -> Prepared<P> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let id = IDS.fetch_add(1, Relaxed);
        Prepared { id, plan, copies, workspace_bytes, pool: Mutex::default() }
    }

    /// The workspace that a layout's runs in a stream share.
    pub fn pooled(&self, device: &Device, stream: &Stream) -> Result<Arc<Workspace>, Error> {
        let mut pool = lock(&self.pool);
        let id = stream.id()?;
        if let Some(workspace) = pool.get(&id) {
            return Ok(workspace.clone());
        }
        stream.check_context()?;
        let buffer = device.alloc(self.workspace_bytes as usize)?;
        let workspace = Arc::new(Workspace::new(buffer, stream)?);
        pool.insert(id, workspace.clone());
        Ok(workspace)
    }
}

/// A pass for all layouts that have been asked for.
#[derive(Debug)]
pub(crate) struct Layouts<L, P>(Mutex<HashMap<L, Arc<Prepared<P>>>>);

impl<L, P> Default for Layouts<L, P> {
    fn default() -> Self {
        Layouts(Mutex::default())
    }
}

impl<L: Eq + Hash, P> Layouts<L, P> {
    pub fn get(
        &self,
        layout: L,
        make: impl FnOnce(&L) -> Result<Prepared<P>, Error>,
    ) -> Result<Arc<Prepared<P>>, Error> {
        if let Some(prepared) = lock(&self.0).get(&layout) {
            return Ok(prepared.clone());
        }
        // Not under the lock, which other layouts' runs need: twice at worst.
        let prepared = Arc::new(make(&layout)?);
        Ok(lock(&self.0).entry(layout).or_insert(prepared).clone())
    }
}

/// The kernels of copies.
pub(crate) fn copy_modules<'a, T: 'a>(
    device: &Device,
    copies: impl Iterator<Item = &'a Copy<T>>,
) -> Result<Vec<Arc<Module>>, Error> {
    copies.map(|copy| KernelConfig::Copy(copy.config).module(device)).collect()
}

/// Launches copies; `place`: where a tensor is of the caller's, and in the workspace.
///
/// # Safety
/// The caller's tensors lie as the copies were planned for and are the call's to touch, and the workspace has room for them.
pub(crate) unsafe fn copy<T: std::marker::Copy>(
    stream: &Stream,
    copies: &[Copy<T>],
    modules: &[Arc<Module>],
    place: impl Fn(T) -> [u64; 2],
) -> Result<(), Error> {
    for (copy, module) in copies.iter().zip(modules) {
        let [caller, staged] = place(copy.tensor);
        let (from, to) = if copy.back { (staged, caller) } else { (caller, staged) };
        let (long, short) = copy.arguments(from, to);
        let args: Vec<_> = long.map(Arg::U64).into_iter().chain(short.map(Arg::U32)).collect();
        // SAFETY: the caller's promise.
        unsafe { module.launch(stream, &Launch::new(copy.launch.grid), &args) }?;
    }
    Ok(())
}

/// Names kernel and config where the driver says that something has gone wrong.
pub(crate) fn failed(module: Option<&Module>, config: &impl Debug, error: Error) -> Error {
    match (module, error) {
        (Some(module), error @ Error::Driver { .. }) => Error::Kernel {
            kernel: module.name().to_owned(),
            config: format!("{config:?}"),
            error: error.into(),
        },
        (_, error) => error,
    }
}

/// Nothing panics while it holds one of the passes' locks in a state that others could not use.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
