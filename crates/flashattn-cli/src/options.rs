//! What subcommands share: values of options, and numbers for people.

use crate::attention::AnyPlan;
use anyhow::{Result as AnyResult, ensure};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use comfy_table::{LineStyle, Table, TableStyle};
use flashattn::{Device, Plan};
use flashattn_cpu::arch::Isa;
use flashattn_cpu::plan::Options;
use flashattn_spec::{AttentionProblem, DType, Element};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

/// Parser of `--dtype`, for the executors' types.
pub fn dtype() -> impl TypedValueParser<Value = DType> {
    PossibleValuesParser::new(["f16", "bf16", "f32"]).map(|name| match name.as_str() {
        "f16" => DType::F16,
        "bf16" => DType::Bf16,
        _ => DType::F32,
    })
}

/// Options of subcommands that compute.
#[derive(clap::Args, Clone, Debug)]
pub struct ComputeArgs {
    /// Where to compute: cpu, cuda or cuda:N (NVIDIA GPUs of the Hopper generation; the forward pass, bf16 and f16)
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: Device,
    /// Instruction set, instead of the best of this CPU
    #[arg(long, value_parser = isa())]
    pub isa: Option<Isa>,
    /// Threads, instead of one for each core
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
}

impl ComputeArgs {
    /// Whether a GPU computes.
    pub fn on_gpu(&self) -> bool {
        matches!(self.device, Device::Cuda(_))
    }

    /// The CPU executor's options.
    ///
    /// # Errors
    /// If this CPU lacks the instruction set; if there is one for a GPU.
    pub fn options(&self) -> AnyResult<Options> {
        let all = Isa::available();
        if let Some(isa) = self.isa {
            let names: Vec<String> = all.iter().map(Isa::to_string).collect();
            ensure!(!self.on_gpu(), "--isa {isa} is for --device cpu, not {}", self.device);
            ensure!(all.contains(&isa), "--isa {isa}: this CPU has {} only", names.join(", "));
        }
        Ok(Options { isa: self.isa, threads: Some(self.threads()) })
    }

    /// How many threads compute.
    pub fn threads(&self) -> usize {
        self.threads.map_or_else(cores, usize::from)
    }

    /// A plan of the device for a problem. `sinks` are its sink logits, if it has any.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn plan<T: Element>(&self, p: &AttentionProblem, sinks: Option<&[f32]>) -> AnyResult<AnyPlan<T>> {
        Ok(match self.device {
            Device::Cpu => AnyPlan::Cpu(Box::new(flashattn_cpu::plan::Plan::new(p, self.options()?)?)),
            device => AnyPlan::Other(Box::new(Plan::from_problem(p.clone(), sinks.map(Into::into), device)?)),
        })
    }
}

/// Threads that the machine runs at once.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Starts so many threads for rayon; at most once in a process, before anything is computed.
///
/// # Errors
/// If the system refuses threads.
pub fn start_threads(threads: usize) -> AnyResult<()> {
    Ok(rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?)
}

/// A progress bar on standard error; hidden where that is not a terminal.
pub fn progress(length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {wide_msg}");
    ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// A table with a line below its header and no other.
pub fn table(header: &[&str]) -> Table {
    const LINES: TableStyle = TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));
    let mut table = Table::new();
    table.load_style(LINES);
    table.set_header(header.to_vec());
    table
}

fn isa() -> impl TypedValueParser<Value = Isa> {
    const ALL: [Isa; 5] = [Isa::Scalar, Isa::Neon, Isa::Avx2, Isa::Avx512, Isa::Amx];
    PossibleValuesParser::new(["scalar", "neon", "avx2", "avx512", "amx"])
        .map(|name| ALL.into_iter().find(|isa| isa.to_string() == name).unwrap_or(Isa::Scalar))
}

/// Which passes run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Pass {
    /// Forward: o and lse
    Fwd,
    /// Backward: dq, dk and dv, from o and lse
    Bwd,
    /// Forward, then backward
    FwdBwd,
}

impl Pass {
    /// Whether it computes o.
    pub fn has_forward(self) -> bool {
        self != Pass::Bwd
    }

    /// Whether it computes gradients.
    pub fn has_backward(self) -> bool {
        self != Pass::Fwd
    }
}

impl std::fmt::Display for Pass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Pass::Fwd => "fwd",
            Pass::Bwd => "bwd",
            Pass::FwdBwd => "fwd_bwd",
        })
    }
}

/// Runs `$body` with `$t` standing for the Rust type of a dtype of the executors.
macro_rules! with_dtype {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            flashattn_spec::DType::F16 => {
                type $t = half::f16;
                $body
            }
            flashattn_spec::DType::Bf16 => {
                type $t = half::bf16;
                $body
            }
            flashattn_spec::DType::F32 => {
                type $t = f32;
                $body
            }
            flashattn_spec::DType::F64 => {
                anyhow::bail!("dtype f64 is the oracle's alone; give f32, bf16 or f16")
            }
        }
    };
}
pub(crate) use with_dtype;

/// Parser of a length or a size in bytes: `4096`, `4k` (4096), `1M` (1048576).
pub fn count(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1 << 10),
        None => text.strip_suffix('M').map_or((text, 1), |digits| (digits, 1 << 20)),
    };
    let number: usize = digits.parse().map_err(|_| "expected a number such as 4096, 4k or 1M".to_string())?;
    number.checked_mul(unit).ok_or_else(|| "too large".to_string())
}

/// A number with three digits and a decimal prefix: `40.3 G`.
pub fn si(x: f64) -> String {
    const LARGE: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];
    const SMALL: [&str; 4] = ["", "m", "µ", "n"];
    if x == 0.0 || !x.is_finite() {
        return format!("{x} ");
    }
    let power = (x.abs().log10() / 3.0 + 1e-9).floor() as i32;
    let power = power.clamp(-(SMALL.len() as i32 - 1), LARGE.len() as i32 - 1);
    let prefix = if power < 0 { SMALL[power.unsigned_abs() as usize] } else { LARGE[power as usize] };
    let scaled = x / 1000f64.powi(power);
    let digits = if scaled.abs() >= 99.95 {
        0
    } else if scaled.abs() >= 9.995 {
        1
    } else {
        2
    };
    format!("{scaled:.digits$} {prefix}")
}

/// A length as people write it: `512`, `4k`, `1M`.
pub fn length(n: usize) -> String {
    const M: usize = 1 << 20;
    match n {
        0 => "0".into(),
        n if n.is_multiple_of(M) => format!("{}M", n / M),
        n if n.is_multiple_of(1024) => format!("{}k", n / 1024),
        n => n.to_string(),
    }
}

/// Whether standard output was closed by its reader.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = |e: &(dyn std::error::Error + 'static)| {
        e.downcast_ref::<std::io::Error>()
            .map(std::io::Error::kind)
            .or_else(|| e.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind))
    };
    error.chain().any(|e| kind(e) == Some(std::io::ErrorKind::BrokenPipe))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        assert_eq!(count("77"), Ok(77));
        assert_eq!(count("4k"), Ok(4096));
        assert_eq!(count("192K"), Ok(192 << 10));
        assert_eq!(count("1M"), Ok(1 << 20));
        for bad in ["", "k", "-1", "4kk", "1.5k", "99999999999999999999", "18446744073709551615k"] {
            assert!(count(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(si(40.3e9), "40.3 G");
        assert_eq!(si(4.379e9), "4.38 G");
        assert_eq!(si(1000.0), "1.00 k");
        assert_eq!(si(962.1e9), "962 G");
        assert_eq!(si(0.00731), "7.31 m");
        assert_eq!(si(2.5e-7), "250 n");
        assert_eq!(si(0.0), "0 ");
        assert_eq!((length(512), length(4096), length(1 << 20)), ("512".into(), "4k".into(), "1M".into()));
    }

    #[test]
    fn a_closed_pipe_is_recognised() {
        let io = || std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert!(is_broken_pipe(&anyhow::Error::from(io()).context("writing")));
        assert!(is_broken_pipe(&anyhow::Error::from(serde_json::Error::io(io()))));
        assert!(!is_broken_pipe(&anyhow::anyhow!("Broken pipe")));
    }
}
