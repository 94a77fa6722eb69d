//! What concerns the whole kernel: names, launch shape, parameters, shared memory.

use std::collections::HashSet;

use super::{Report, Rule};
use crate::emit::SHARED;
use crate::instr::Target;
use crate::kernel::{Kernel, ParamKind};

pub(super) fn check(kernel: &Kernel, report: &mut Report) {
    names(kernel, report);
    shape(kernel, report);
    parameters(kernel, report);
    shared(kernel, report);
}

fn names(kernel: &Kernel, report: &mut Report) {
    let mut seen = HashSet::from([SHARED]);
    for name in kernel.params.iter().map(|param| &param.name).chain([&kernel.name]) {
        if !identifier(name) {
            report.add(
                Rule::Name,
                None,
                format!("the name {name:?}"),
                "letters, digits, _ and $, no digit first",
            );
        } else if !seen.insert(name) {
            report.add(Rule::Name, None, format!("the name {name:?} twice"), "distinct names");
        }
    }
    for region in &kernel.shared {
        if region.name.chars().any(char::is_control) {
            report.add(Rule::Name, None, format!("the region {:?}", region.name), "a name of one line");
        }
    }
}

/// What PTX takes as a name, and is no constant of it.
fn identifier(name: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '$';
    let bare = matches!(name, "_" | "$" | "WARP_SZ");
    name.starts_with(|c: char| word(c) && !c.is_ascii_digit()) && name.chars().all(word) && !bare
}

/// Threads of a block, whatever its sizes.
pub(super) fn threads(kernel: &Kernel) -> u64 {
    product(kernel.block)
}

fn product(sizes: [u32; 3]) -> u64 {
    sizes.iter().fold(1, |product: u64, &n| product.saturating_mul(n.into()))
}

fn shape(kernel: &Kernel, report: &mut Report) {
    let ([x, y, z], threads) = (kernel.block, threads(kernel));
    if threads == 0 || threads > 1024 || z > 64 {
        let got = format!("a block of {x} x {y} x {z} threads");
        report.add(Rule::Launch, None, got, "1 to 1024 threads, at most 64 along z");
    } else if threads * u64::from(kernel.min_blocks) > 2048 || kernel.min_blocks == 0 {
        let got = format!("{} blocks of {threads} threads on a multiprocessor", kernel.min_blocks);
        report.add(Rule::Launch, None, got, "at least 1, at most 2048 threads in all");
    }
    let blocks = product(kernel.cluster);
    if blocks == 0 || blocks > 8 {
        report.add(Rule::Launch, None, format!("a cluster of {blocks} blocks"), "1 to 8, the portable size");
    } else if blocks > 1 && kernel.target < Target::Sm90 {
        report.add(Rule::Target, None, format!("a cluster on {}", kernel.target), "target sm_90");
    }
}

fn parameters(kernel: &Kernel, report: &mut Report) {
    let bytes = kernel.params.iter().fold(0u64, |end, param| {
        let (size, align) = match param.kind {
            ParamKind::U32 | ParamKind::S32 | ParamKind::F32 => (4, 4),
            ParamKind::U64 => (8, 8),
            ParamKind::TensorMap => (128, 64),
        };
        end.next_multiple_of(align) + size
    });
    if bytes > 4096 {
        report.add(Rule::Parameters, None, format!("{bytes} bytes of parameters"), "at most 4096");
    }
}

fn shared(kernel: &Kernel, report: &mut Report) {
    let limit = kernel.target.shared_limit();
    if kernel.shared_bytes > limit {
        let got = format!("{} bytes of shared memory", kernel.shared_bytes);
        report.add(Rule::Shared, None, got, format!("at most {limit} on {}", kernel.target));
    }
    let mut regions: Vec<_> = kernel.shared.iter().collect();
    regions.sort_by_key(|region| region.offset);
    let mut before: Option<(&str, u64)> = None;
    for region in regions {
        let (first, end) = (u64::from(region.offset), u64::from(region.offset) + u64::from(region.bytes));
        if end > u64::from(kernel.shared_bytes) {
            let got = format!("region {:?} at bytes {first} to {end}", region.name);
            report.add(Rule::Shared, None, got, format!("within the kernel's {} bytes", kernel.shared_bytes));
        }
        if let Some((name, last)) = before.filter(|&(_, last)| first < last && region.bytes > 0) {
            let got = format!("region {:?} from byte {first}, where {name:?} ends at {last}", region.name);
            report.add(Rule::Shared, None, got, "regions that do not overlap");
        }
        if before.is_none_or(|(_, last)| end > last) {
            before = Some((&region.name, end));
        }
    }
}
