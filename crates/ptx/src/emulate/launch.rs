//! A launch: arguments checked, clusters run, reports added up.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use rayon::prelude::*;

use super::cluster::{Cluster, Device, Value};
use super::error::Error;
use super::global::Global;
use super::memory::{Buffer, Memory};
use super::program::Program;
use super::report::{Counters, Report};
use crate::kernel::{Kernel, ParamKind, TensorMap};

/// An argument of a launch.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// A 32-bit integer.
    U32(u32),
    /// A signed 32-bit integer.
    S32(i32),
    /// A float.
    F32(f32),
    /// A 64-bit integer.
    U64(u64),
    /// The address of a buffer, so many bytes in.
    Buffer(Buffer, u64),
    /// A tensor map over a buffer, from so many bytes on.
    TensorMap(TensorMap, Buffer, u64),
}

impl Arg {
    const fn kind(&self) -> &'static str {
        match self {
            Arg::U32(_) => "a u32",
            Arg::S32(_) => "an s32",
            Arg::F32(_) => "an f32",
            Arg::U64(_) => "a u64",
            Arg::Buffer(..) => "a buffer",
            Arg::TensorMap(..) => "a tensor map",
        }
    }
}

/// How a kernel is launched.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// Blocks, by dimension.
    pub grid: [u32; 3],
    /// Arguments in order.
    pub args: Vec<Arg>,
    /// Bytes of dynamic shared memory a block.
    pub shared_bytes: u32,
    /// Which interleaving: other seeds run warps in another order and complete copies at other times.
    pub seed: u64,
    /// Models an L2 cache of so many bytes; clusters then run on one thread, in an order that the seed gives.
    pub l2: Option<u64>,
    /// Clusters that run at a time. Above 1 they take turns on one thread: for an L2 model of a full GPU, and for blocks
    /// that wait for each other. With 1 and no L2 model they run one after the other on each of several threads.
    pub resident: u32,
}

impl Default for Launch {
    /// One block, no arguments, no shared memory, seed 0, no L2 model.
    fn default() -> Self {
        Launch { grid: [1; 3], args: Vec::new(), shared_bytes: 0, seed: 0, l2: None, resident: 1 }
    }
}

/// Turns that a cluster takes before another one's, when several are resident.
const TURNS: u64 = 16;

/// Runs a launch to its end.
pub fn emulate(kernel: &Kernel, memory: &mut Memory, launch: &Launch) -> Result<Report, Error> {
    let program = Program::new(kernel)?;
    let clusters = shape(kernel, launch, program.steps.len())?;
    let args = arguments(kernel, memory, &launch.args)?;
    let global = Global::new(memory, clusters, launch.l2);
    let device = Device {
        program: &program,
        args: &args,
        grid: launch.grid,
        shared_bytes: launch.shared_bytes,
        seed: launch.seed,
        global: &global,
    };
    let mut counters = Counters::new(memory.buffers().len());
    if launch.l2.is_none() && launch.resident <= 1 {
        parallel(&device, clusters, &mut counters)?;
    } else {
        in_turn(&device, clusters, launch.resident.max(1), &mut counters)?;
    }
    if let Some(mut l2) = global.into_l2() {
        l2.flush();
        counters.buffers.iter_mut().zip(&l2.traffic).for_each(|(traffic, l2)| {
            traffic.read_missed = l2.read_missed;
            traffic.written_back = l2.written_back;
        });
    }
    if launch.shared_bytes > kernel.shared_bytes {
        let (given, needed) = (launch.shared_bytes, kernel.shared_bytes);
        counters.warn(format!("launched with {given} bytes of shared memory, the kernel uses {needed}"));
    }
    Ok(counters.report(memory.buffers().iter().map(|buffer| buffer.name.as_str())))
}

/// Checks the launch's shape; returns the number of clusters.
fn shape(kernel: &Kernel, launch: &Launch, steps: usize) -> Result<u32, Error> {
    let refuse = |problem: String| Err(Error::LaunchShape { kernel: kernel.name.clone(), problem });
    let threads =
        kernel.block.iter().try_fold(1u32, |product, &size| product.checked_mul(size)).unwrap_or(u32::MAX);
    if threads == 0 || threads > 1024 {
        return refuse(format!("blocks of {:?} threads: expected 1 to 1024 in all", kernel.block));
    }
    let blocks =
        kernel.cluster.iter().try_fold(1u32, |product, &size| product.checked_mul(size)).unwrap_or(u32::MAX);
    if blocks == 0 || blocks > 16 {
        return refuse(format!("clusters of {:?} blocks: expected 1 to 16 in all", kernel.cluster));
    }
    for d in 0..3 {
        if launch.grid[d] == 0 || !launch.grid[d].is_multiple_of(kernel.cluster[d]) {
            return refuse(format!("a grid of {:?} blocks in clusters of {:?}", launch.grid, kernel.cluster));
        }
    }
    let limit = kernel.target.shared_limit();
    if launch.shared_bytes < kernel.shared_bytes || launch.shared_bytes > limit {
        let (given, needed) = (launch.shared_bytes, kernel.shared_bytes);
        return refuse(format!(
            "{given} bytes of shared memory: the kernel needs {needed}, {} has {limit}",
            kernel.target
        ));
    }
    let grid = launch
        .grid
        .iter()
        .try_fold(1u64, |product, &size| product.checked_mul(size as u64))
        .unwrap_or(u64::MAX);
    let clusters = grid / blocks as u64;
    if !Global::fits(clusters, steps) {
        return refuse(format!(
            "{clusters} clusters of a program of {steps} steps are more than the emulator counts"
        ));
    }
    Ok(clusters as u32)
}

fn arguments(kernel: &Kernel, memory: &Memory, args: &[Arg]) -> Result<Vec<Value>, Error> {
    let name = || kernel.name.clone();
    if args.len() != kernel.params.len() {
        return Err(Error::ArgumentCount { kernel: name(), got: args.len(), expected: kernel.params.len() });
    }
    let mut values = Vec::with_capacity(args.len());
    for (index, (arg, param)) in args.iter().zip(&kernel.params).enumerate() {
        let parameter = || param.name.clone();
        let refuse =
            |problem: String| Error::Argument { kernel: name(), index, parameter: parameter(), problem };
        let storage = |buffer: &Buffer| {
            memory.storage(*buffer).ok_or_else(|| refuse("the buffer is not of this memory".to_owned()))
        };
        values.push(match (param.kind, arg) {
            (ParamKind::U32, Arg::U32(x)) => Value::Bits(*x as u64),
            (ParamKind::S32, Arg::S32(x)) => Value::Bits(*x as u32 as u64),
            (ParamKind::F32, Arg::F32(x)) => Value::Bits(x.to_bits() as u64),
            (ParamKind::U64, Arg::U64(x)) => Value::Bits(*x),
            (ParamKind::U64, Arg::Buffer(buffer, offset)) => {
                Value::Bits(storage(buffer)?.address.wrapping_add(*offset))
            }
            (ParamKind::TensorMap, Arg::TensorMap(map, buffer, offset)) => {
                let storage = storage(buffer)?;
                let address = storage.address.wrapping_add(*offset);
                map.check(address).map_err(|source| Error::TensorMap {
                    kernel: name(),
                    index,
                    parameter: parameter(),
                    source,
                })?;
                let tile =
                    map.tile.iter().map(|&size| size as u64).product::<u64>() * map.element.bytes() as u64;
                let limit = kernel.target.shared_limit();
                if tile > limit as u64 {
                    return Err(refuse(format!(
                        "a box of {tile} bytes, {} has {limit} of shared memory",
                        kernel.target
                    )));
                }
                let inner = map.shape[0] * map.element.bytes() as u64;
                let outer = map.shape[1..]
                    .iter()
                    .zip(&map.strides)
                    .map(|(&size, &stride)| (size - 1) as u128 * stride as u128);
                let end = *offset as u128 + inner as u128 + outer.sum::<u128>();
                if end > storage.bytes as u128 {
                    let (buffer, bytes) = (&storage.name, storage.bytes);
                    return Err(refuse(format!(
                        "the tensor ends at byte {end} of buffer {buffer}, which has {bytes}"
                    )));
                }
                let at = memory.near(storage.address).unwrap_or(0);
                Value::Map { map: map.clone(), address, buffer: at }
            }
            (kind, arg) => {
                let expected = match kind {
                    ParamKind::U32 => "a u32",
                    ParamKind::S32 => "an s32",
                    ParamKind::F32 => "an f32",
                    ParamKind::U64 => "a u64 or a buffer",
                    ParamKind::TensorMap => "a tensor map",
                };
                let got = arg.kind();
                return Err(Error::ArgumentKind {
                    kernel: name(),
                    index,
                    parameter: parameter(),
                    got,
                    expected,
                });
            }
        });
    }
    Ok(values)
}

/// Clusters one by one on each thread. Of several errors, the one of the first cluster is returned, whatever the number
/// of threads: clusters before a failing one all run.
fn parallel(device: &Device<'_>, clusters: u32, counters: &mut Counters) -> Result<(), Error> {
    let failed = AtomicU32::new(u32::MAX);
    let error: Mutex<Option<(u32, Error)>> = Mutex::new(None);
    let run = |id: u32| {
        if failed.load(Relaxed) < id {
            return None;
        }
        let mut cluster = Cluster::new(device, id);
        match cluster.advance(u64::MAX) {
            Ok(_) => Some(cluster.counters),
            Err(new) => {
                failed.fetch_min(id, Relaxed);
                let mut error = error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if error.as_ref().is_none_or(|(other, _)| id < *other) {
                    *error = Some((id, new));
                }
                None
            }
        }
    };
    let buffers = counters.buffers.len();
    let sum = (0..clusters)
        .into_par_iter()
        .fold(
            || Counters::new(buffers),
            |mut sum, id| {
                if let Some(counters) = run(id) {
                    sum.add(&counters);
                }
                sum
            },
        )
        .reduce(
            || Counters::new(buffers),
            |mut a, b| {
                a.add(&b);
                a
            },
        );
    counters.add(&sum);
    match error.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// `resident` clusters at a time, in turn, on this thread.
fn in_turn(device: &Device<'_>, clusters: u32, resident: u32, counters: &mut Counters) -> Result<(), Error> {
    let mut next = (0..clusters).map(|id| Cluster::new(device, id));
    let mut running: Vec<Cluster<'_>> = next.by_ref().take(resident as usize).collect();
    while !running.is_empty() {
        let mut i = 0;
        while i < running.len() {
            if !running[i].advance(TURNS)? {
                i += 1;
                continue;
            }
            counters.add(&running[i].counters);
            match next.next() {
                Some(cluster) => running[i] = cluster,
                None => {
                    running.remove(i);
                }
            }
        }
    }
    Ok(())
}
