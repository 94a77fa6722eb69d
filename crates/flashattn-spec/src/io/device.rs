//! [`Device`]: the few numbers of a machine that decide whether attention waits for arithmetic or for memory.

use crate::element::DType;
use serde::Serialize;
use std::fs;

/// Arithmetic rate by element type, FLOP/s (a fused multiply-add is two).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Peak {
    /// f16 products, accumulated in f32.
    pub f16: f64,
    /// bf16 products, accumulated in f32.
    pub bf16: f64,
    /// f32 products: full f32, not TF32.
    pub f32: f64,
    /// f64 products.
    pub f64: f64,
}

/// A two-level machine: `units` processors, each with its own fast memory, before one slow memory. A cache
/// that they share may stand between (L2 of a GPU).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Processors: SMs of a GPU, cores of a CPU.
    pub units: usize,
    /// Fast memory of one processor, in bytes: shared memory of an SM, L2 of a core. The paper's M, times the
    /// element size.
    pub sram_bytes: u64,
    /// Cache that the processors share, in bytes; 0 leaves the paper's two-level model.
    pub shared_cache_bytes: u64,
    /// Slow memory, bytes/s.
    pub bandwidth: f64,
    /// Arithmetic rate.
    pub peak: Peak,
    /// Where numbers come from that were not simply looked up: detected, estimated or assumed.
    pub notes: Vec<String>,
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

impl Device {
    fn gpu(name: &str, units: usize, sram_kib: u64, l2_mib: u64, bandwidth: f64, peak: [f64; 3]) -> Self {
        let [half, f32, f64] = peak.map(|tera| tera * 1e12);
        Device {
            name: name.into(),
            units,
            sram_bytes: sram_kib * KIB,
            shared_cache_bytes: l2_mib * MIB,
            bandwidth,
            peak: Peak { f16: half, bf16: half, f32, f64 },
            notes: Vec::new(),
        }
    }

    /// NVIDIA A100 40 GB, the paper's device: 192 KiB × 108 SMs, 1.5 TB/s (section 2.1).
    pub fn a100() -> Self {
        Self::gpu("A100 40GB", 108, 192, 40, 1.5e12, [312.0, 19.5, 19.5])
    }

    /// NVIDIA A100 80 GB: the same processors, 2.0 TB/s.
    pub fn a100_80() -> Self {
        Self::gpu("A100 80GB", 108, 192, 40, 2.0e12, [312.0, 19.5, 19.5])
    }

    /// NVIDIA H100 SXM: 227 KiB × 132 SMs, 50 MiB L2, 3.35 TB/s, 990 TFLOP/s dense 16-bit.
    pub fn h100() -> Self {
        Self::gpu("H100 SXM", 132, 227, 50, 3.35e12, [990.0, 67.0, 67.0])
    }

    /// The machine that this program runs on. Cache sizes and frequency are read from Linux's `/sys` and
    /// `/proc`, the SIMD width from the CPU; what cannot be read is assumed. Peak and bandwidth are estimates
    /// from these: replace them by measured ones with [`Device::with_peak`] and [`Device::with_bandwidth`].
    /// [`Device::notes`] says which is which.
    pub fn this_cpu() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |key: &str| {
            let line = cpuinfo.lines().find(|l| l.split(':').next().is_some_and(|k| k.trim() == key))?;
            line.split_once(':').map(|(_, value)| value.trim())
        };
        let mut notes = Vec::new();
        let units = std::thread::available_parallelism().map_or(1, |n| n.get());
        notes.push(format!("{units} cores: what the operating system gives this process"));

        let mut cache = |level: u32, assumed: u64| match cache_bytes(level) {
            Some(bytes) => {
                notes.push(format!("L{level} {} KiB: /sys/devices/system/cpu", bytes / KIB));
                bytes
            }
            None => {
                notes.push(format!("L{level} {} KiB: assumed", assumed / KIB));
                assumed
            }
        };
        let l1 = cache(1, 32 * KIB);
        let l2 = cache(2, MIB);
        if let Some(l3) = cache_bytes(3) {
            notes.push(format!("L3 {} KiB: not in the model, other cores and tenants use it too", l3 / KIB));
        }

        let cpufreq = "/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq";
        let khz = fs::read_to_string(cpufreq).ok().and_then(|s| s.trim().parse::<f64>().ok());
        let mhz = || field("cpu MHz").and_then(|s| s.parse::<f64>().ok());
        let (hertz, source) = match (khz.map(|x| x * 1e3), mhz().map(|x| x * 1e6)) {
            (Some(x), _) if x > 0.0 => (x, cpufreq),
            (_, Some(x)) if x > 0.0 => (x, "/proc/cpuinfo"),
            _ => (2.5e9, "assumed"),
        };
        notes.push(format!("{:.2} GHz: {source}", hertz / 1e9));

        let amx = field("flags").is_some_and(|flags| flags.split(' ').any(|f| f == "amx_bf16"));
        let (isa, f32_flops) = simd_flops();
        let f32 = units as f64 * hertz * f32_flops;
        // A tile product, 16 x 16 x 32 multiply-adds, starts every 16 cycles.
        let bf16 = if amx { units as f64 * hertz * 1024.0 } else { f32 };
        notes.push(format!(
            "peak: estimated as cores x frequency x {f32_flops} FLOP a cycle ({isa}){}",
            if amx { ", bf16 x 1024 (AMX)" } else { "" }
        ));
        let bandwidth = units as f64 * 10e9;
        notes.push("bandwidth: assumed, 10 GB/s a core".into());

        Device {
            name: field("model name").unwrap_or("this CPU").to_string(),
            units,
            sram_bytes: l2.max(l1),
            shared_cache_bytes: 0,
            bandwidth,
            peak: Peak { f16: f32, bf16, f32, f64: f32 / 2.0 },
            notes,
        }
    }

    /// Arithmetic rate for an element type, FLOP/s.
    pub fn peak(&self, dtype: DType) -> f64 {
        match dtype {
            DType::F16 => self.peak.f16,
            DType::Bf16 => self.peak.bf16,
            DType::F32 => self.peak.f32,
            DType::F64 => self.peak.f64,
        }
    }

    /// The same device with another arithmetic rate for one element type, FLOP/s.
    pub fn with_peak(mut self, dtype: DType, flops: f64) -> Self {
        match dtype {
            DType::F16 => self.peak.f16 = flops,
            DType::Bf16 => self.peak.bf16 = flops,
            DType::F32 => self.peak.f32 = flops,
            DType::F64 => self.peak.f64 = flops,
        }
        self.notes.push(format!("{dtype} peak {flops:.3e} FLOP/s: given"));
        self
    }

    /// The same device with another rate of slow memory, bytes/s.
    pub fn with_bandwidth(mut self, bandwidth: f64) -> Self {
        self.bandwidth = bandwidth;
        self.notes.push(format!("bandwidth {bandwidth:.3e} B/s: given"));
        self
    }

    /// The same device with another size of fast memory, bytes a processor.
    pub fn with_sram(mut self, bytes: u64) -> Self {
        self.sram_bytes = bytes;
        self.notes.push(format!("SRAM {bytes} B: given"));
        self
    }

    /// Arithmetic intensity, FLOP/B, from which on this device computes longer than it loads.
    pub fn ridge(&self, dtype: DType) -> f64 {
        self.peak(dtype) / self.bandwidth
    }
}

/// Size of the data cache of a level, as Linux knows it.
fn cache_bytes(level: u32) -> Option<u64> {
    let entries = fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    entries.flatten().find_map(|entry| {
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).ok();
        let is = read("level")?.trim().parse() == Ok(level) && read("type")?.trim() != "Instruction";
        if is { parse_size(read("size")?.trim()) } else { None }
    })
}

fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "K" => KIB,
        "M" => MIB,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// Instruction set and f32 FLOP a cycle and core, for two FMA units of that width.
fn simd_flops() -> (&'static str, f64) {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return ("AVX-512, two FMA units assumed", 64.0);
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            return ("AVX2, two FMA units assumed", 32.0);
        }
        ("SSE2, no FMA", 8.0)
    }
    #[cfg(target_arch = "aarch64")]
    {
        ("NEON, two FMA units assumed", 16.0)
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        ("no SIMD assumed", 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_linux_writes_them() {
        assert_eq!(parse_size("48K"), Some(48 << 10));
        assert_eq!(parse_size("480M"), Some(480 << 20));
        assert_eq!(parse_size("512"), Some(512));
        for bad in ["", "K", "4X", "99999999999999999999K", "18446744073709551615K", "é"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }

    #[test]
    fn this_cpu_is_usable_and_says_what_it_guessed() {
        let cpu = Device::this_cpu();
        assert!(cpu.units >= 1 && cpu.sram_bytes >= 16 << 10);
        assert!(cpu.bandwidth > 1e9 && cpu.peak.f32 > 1e9 && cpu.peak.bf16 >= cpu.peak.f32);
        for what in ["cores", "L1", "L2", "GHz", "peak", "bandwidth"] {
            assert!(cpu.notes.iter().any(|note| note.contains(what)), "{what}: {:?}", cpu.notes);
        }
        let given = cpu.with_peak(DType::F32, 1e11).with_bandwidth(2e10);
        assert_eq!(given.ridge(DType::F32), 5.0);
        assert!(given.notes.iter().filter(|note| note.ends_with("given")).count() == 2);
    }
}
