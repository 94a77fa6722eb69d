//! A cache of plans: calls of the same kind come again and again, and a plan keeps its working memory, fresh pages of
//! which cost about as much as the work on them.

use crate::array::Array;
use crate::error::Error;
use crate::options::Options;
use flashattn::{DType, Device, Element, Plan, Shape, Table};
use std::any::Any;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Plans for CPUs and for each GPU that are kept at most; the one that has not been used for longest goes. Those for CPUs
/// keep working memory of the size of their tensors, those for GPUs next to none.
const PLANS: [usize; 2] = [16, 256];
/// Bytes of extras beyond which a plan is not kept: they are part of the key, and compared at each call.
const MAX_EXTRAS: usize = 1 << 16;

/// A plan and the tables of its options, by number.
pub struct Planned<T> {
    /// The plan.
    pub plan: Plan<T>,
    /// The tables.
    pub tables: Vec<Table>,
    /// Whether it is kept for later calls.
    pub kept: bool,
}

/// Where in the list of gradients of extras each of a plan's is.
pub struct GradPlaces {
    /// That of the sinks.
    pub sinks: Option<usize>,
    /// Those of the tables, in the plan's order.
    pub tables: Vec<usize>,
    /// Those of tables that nothing reads, which the plan leaves out: they are 0.
    pub unused: Vec<usize>,
}

impl<T: Element> Planned<T> {
    /// The places in a list of this length, which has the tables that get a gradient, in the options' order, then the sinks.
    pub fn grad_places(&self, given: usize) -> Result<GradPlaces, Error> {
        let wanted: Vec<_> = self.tables.iter().filter(|table| table.wants_grad()).collect();
        let sinks = self.plan.problem().sinks.then_some(wanted.len());
        let expected = wanted.len() + usize::from(sinks.is_some());
        if given != expected {
            return Err(Error::Value(format!(
                "got {given} gradients of extras to fill, expected {expected}"
            )));
        }
        let place = |table: &Table| wanted.iter().position(|t| t.is_same(table));
        let tables: Option<Vec<_>> = self.plan.grad_tables().iter().map(place).collect();
        let tables =
            tables.ok_or_else(|| Error::Value("a table of the plan is none of the call's".into()))?;
        let unused = (0..wanted.len()).filter(|i| !tables.contains(i)).collect();
        Ok(GradPlaces { sinks, tables, unused })
    }
}

#[derive(PartialEq)]
struct Key {
    device: Device,
    options: String,
    dtype: DType,
    shape: Shape,
    /// Shapes and elements of the extras.
    extras: Vec<(Vec<usize>, Vec<u8>)>,
}

type Entry = (Key, Arc<dyn Any + Send + Sync>);

static GRAPHS: Mutex<Vec<Arc<dyn Any + Send + Sync>>> = Mutex::new(Vec::new());
static CACHE: Mutex<VecDeque<Entry>> = Mutex::new(VecDeque::new());

/// Multiply-adds of QKᵀ below which one thread, the caller's, is faster than waking others up.
const SMALL: usize = 1 << 21;

/// Whether a call is best done by the caller's thread alone.
pub fn is_small(q: &Array, k: &Array) -> bool {
    // Every query with every key of its sequence; of all sequences, if they are packed.
    let keys = if k.shape.len() == 4 { k.shape[1] } else { k.shape.first().copied().unwrap_or(0) };
    q.len().saturating_mul(keys) < SMALL
}

/// The plan for these arrays, made now or by an earlier call.
pub fn get<T: Element>(
    options: &str,
    [q, k, v]: [&Array; 3],
    extras: &[Array],
    device: Device,
) -> Result<Arc<Planned<T>>, Error> {
    let shape = Shape::of(q.shape4()?, k.shape4()?, v.shape4()?)?;
    let bytes: usize = extras.iter().map(|e| e.len().saturating_mul(e.kind.size())).sum();
    let small = bytes <= MAX_EXTRAS;
    let contents = if small { extras } else { &[] };
    let contents = contents.iter().map(|e| Ok((e.shape.clone(), e.raw()?.to_vec())));
    let key = Key {
        device,
        options: options.into(),
        dtype: T::DTYPE,
        shape,
        extras: contents.collect::<Result<_, Error>>()?,
    };
    if small && let Some(planned) = find::<T>(&key) {
        return Ok(planned);
    }
    let parsed = Options::parse(options)?;
    let (attention, tables) = parsed.attention(extras)?;
    let attention = attention.device(device);
    let attention = if device == Device::Cpu && is_small(q, k) { attention.threads(1) } else { attention };
    // A seed is new at each call.
    let kept = small && parsed.dropout.is_none();
    let planned = Arc::new(Planned { plan: attention.plan::<T>(shape)?, tables, kept });
    if kept {
        let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = PLANS[usize::from(device != Device::Cpu)];
        let mut same = 0;
        cache.retain(|(known, _)| {
            same += usize::from(known.device == device);
            known.device != device || same < limit
        });
        cache.push_front((key, planned.clone()));
    }
    Ok(planned)
}

fn find<T: Element>(key: &Key) -> Option<Arc<Planned<T>>> {
    let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
    let place = cache.iter().position(|(known, _)| known == key)?;
    let entry = cache.remove(place)?;
    let planned = entry.1.clone().downcast().ok();
    cache.push_front(entry);
    planned
}

/// Keeps a plan for as long as the process runs: its memory is part of a CUDA graph.
pub fn keep<T: Element>(planned: Arc<Planned<T>>) {
    let mut graphs = GRAPHS.lock().unwrap_or_else(PoisonError::into_inner);
    let planned: Arc<dyn Any + Send + Sync> = planned;
    if !graphs.iter().any(|known| Arc::ptr_eq(known, &planned)) {
        graphs.push(planned);
    }
}

/// Drops all plans and their memory.
pub fn clear() {
    CACHE.lock().unwrap_or_else(PoisonError::into_inner).clear();
}
