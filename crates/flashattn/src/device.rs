//! [`Device`]: where attention runs.

use std::fmt;
use std::str::FromStr;

/// Where attention runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// This machine's CPU, by the best instruction set it has.
    #[default]
    Cpu,
    /// The NVIDIA GPU of this number, from 0, of the Hopper generation (compute capability 9.0): the forward pass, in bf16
    /// and f16. With the cargo feature `cuda`, which is on by default; without a driver plans are refused.
    Cuda(u32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// A text is no [`Device`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device {0:?}: expected cpu, cuda or cuda:N")]
pub struct ParseDeviceError(pub String);

/// `cpu`, `cuda` (the first GPU) or `cuda:N`.
///
/// ```
/// # use flashattn::Device;
/// assert_eq!("cuda:1".parse(), Ok(Device::Cuda(1)));
/// assert_eq!("cuda:x".parse::<Device>().unwrap_err().to_string(), "device \"cuda:x\": expected cpu, cuda or cuda:N");
/// ```
impl FromStr for Device {
    type Err = ParseDeviceError;

    fn from_str(text: &str) -> Result<Self, ParseDeviceError> {
        match text.strip_prefix("cuda") {
            None if text == "cpu" => Ok(Device::Cpu),
            Some("") => Ok(Device::Cuda(0)),
            Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse().ok()).map(Device::Cuda).ok_or(()),
            None => Err(()),
        }
        .map_err(|()| ParseDeviceError(text.to_owned()))
    }
}
