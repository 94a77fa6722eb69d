//! Kernels compiled once a process: a module for each (GPU, config), shared by all threads and plans.
//!
//! Modules stay loaded for the life of the process, some hundred KB each. There are as many as there are configs: tile
//! sizes, options, and the programs of masks and score mods; sizes of tensors and contents of tables are not in a config.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use ptx::Kernel;

use crate::device::Device;
use crate::error::Error;
use crate::kernels::{
    BwdConfig, CopyConfig, FwdConfig, copy_rows, flash_bwd_sm90, flash_bwd_sm90_preprocess,
    flash_bwd_sm90_queries, flash_fwd_sm90,
};
use crate::module::Module;

/// What a kernel is made of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KernelConfig {
    /// Attention forward.
    Forward(FwdConfig),
    /// Attention backward: what goes before its main kernel.
    Preprocess(BwdConfig),
    /// Attention backward.
    Backward(BwdConfig),
    /// What goes after it: dQ.
    Queries(BwdConfig),
    /// Rows into another layout.
    Copy(CopyConfig),
}

impl KernelConfig {
    /// The three kernels of a backward pass, in the order of their launches.
    pub fn backward(config: &BwdConfig) -> [KernelConfig; 3] {
        [KernelConfig::Preprocess, KernelConfig::Backward, KernelConfig::Queries]
            .map(|kernel| kernel(config.clone()))
    }

    /// Builds the kernel.
    pub fn kernel(&self) -> Kernel {
        match self {
            KernelConfig::Forward(config) => flash_fwd_sm90(config),
            KernelConfig::Preprocess(config) => flash_bwd_sm90_preprocess(config),
            KernelConfig::Backward(config) => flash_bwd_sm90(config),
            KernelConfig::Queries(config) => flash_bwd_sm90_queries(config),
            KernelConfig::Copy(config) => copy_rows(config),
        }
    }

    /// The compiled kernel: from the cache, or built, written as PTX and compiled by the driver now. Threads that ask for
    /// the same one wait for the first; others do not.
    ///
    /// # Errors
    /// As [`Module::load`]; the next call tries again.
    pub fn module(&self, device: &Device) -> Result<Arc<Module>, Error> {
        let slot = {
            let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
            modules.entry((device.ordinal(), self.clone())).or_default().clone()
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = &*slot {
            return Ok(module.clone());
        }
        let module = Arc::new(Module::load_trusted(device, &self.kernel())?);
        *slot = Some(module.clone());
        Ok(module)
    }
}

type Slot = Arc<Mutex<Option<Arc<Module>>>>;

static MODULES: LazyLock<Mutex<HashMap<(u32, KernelConfig), Slot>>> = LazyLock::new(Mutex::default);
