//! What an emulated launch did: bytes, bank conflicts, instructions.

use std::collections::BTreeMap;

use crate::instr::Class;

/// Traffic of one buffer in global memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Read, as issued: bytes that active lanes asked for, and boxes clipped to the tensor.
    pub read: u64,
    /// Written, as issued; atomics count as read and written.
    pub written: u64,
    /// Read from memory because L2 did not have it (with [`Launch::l2`](super::Launch)).
    pub read_missed: u64,
    /// Written back from L2 to memory, what is left at the end included (with [`Launch::l2`](super::Launch)).
    pub written_back: u64,
}

impl Traffic {
    fn add(&mut self, other: &Traffic) {
        self.read += other.read;
        self.written += other.written;
        self.read_missed += other.read_missed;
        self.written_back += other.written_back;
    }
}

/// Accesses to shared memory by loads, stores, atomics and matrix loads and stores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedTraffic {
    /// Passes over the 32 banks.
    pub wavefronts: u64,
    /// Passes more than the bytes needed: bank conflicts.
    pub conflicts: u64,
}

/// What a launch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Traffic of each buffer, by name (buffers of one name are added up).
    pub buffers: BTreeMap<String, Traffic>,
    /// Accesses to shared memory.
    pub shared: SharedTraffic,
    /// Warp instructions by class.
    pub instructions: BTreeMap<Class, u64>,
    /// Floating-point operations of the tensor cores (two a product).
    pub matrix_flops: u64,
    /// What is legal and likely not meant.
    pub warnings: Vec<String>,
}

impl Report {
    /// All warp instructions.
    pub fn warp_instructions(&self) -> u64 {
        self.instructions.values().sum()
    }

    /// Traffic of all buffers.
    pub fn total(&self) -> Traffic {
        let mut total = Traffic::default();
        self.buffers.values().for_each(|traffic| total.add(traffic));
        total
    }
}

const CLASSES: [Class; 11] = [
    Class::Float,
    Class::Integer,
    Class::Convert,
    Class::Special,
    Class::Lanes,
    Class::Global,
    Class::Shared,
    Class::Atomic,
    Class::Copy,
    Class::Matrix,
    Class::Sync,
];

/// The report of one cluster, by index.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters {
    pub buffers: Vec<Traffic>,
    pub shared: SharedTraffic,
    pub classes: [u64; CLASSES.len()],
    pub matrix_flops: u64,
    pub warnings: Vec<String>,
}

impl Counters {
    pub(super) fn new(buffers: usize) -> Self {
        Counters { buffers: vec![Traffic::default(); buffers], ..Counters::default() }
    }

    pub(super) fn add(&mut self, other: &Counters) {
        self.buffers.iter_mut().zip(&other.buffers).for_each(|(a, b)| a.add(b));
        self.shared.wavefronts += other.shared.wavefronts;
        self.shared.conflicts += other.shared.conflicts;
        self.classes.iter_mut().zip(&other.classes).for_each(|(a, b)| *a += b);
        self.matrix_flops += other.matrix_flops;
        for warning in &other.warnings {
            self.warn(warning.clone());
        }
    }

    /// Adds a warning once.
    pub(super) fn warn(&mut self, warning: String) {
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    pub(super) fn report<'n>(&self, names: impl Iterator<Item = &'n str>) -> Report {
        let mut report = Report {
            shared: self.shared,
            matrix_flops: self.matrix_flops,
            warnings: self.warnings.clone(),
            ..Report::default()
        };
        for (name, traffic) in names.zip(&self.buffers) {
            report.buffers.entry(name.to_owned()).or_default().add(traffic);
        }
        for (class, &count) in CLASSES.into_iter().zip(&self.classes) {
            if count > 0 {
                report.instructions.insert(class, count);
            }
        }
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_counted_by_their_discriminant() {
        for (i, class) in CLASSES.into_iter().enumerate() {
            assert_eq!(class as usize, i);
        }
    }
}
