//! The passes over tensors in a GPU's memory: put into the caller's stream, awaited by nobody here.

use crate::array::{Array, Kind, Place};
use crate::call::{Allocate, Call, Given, Gradients, Results};
use crate::error::Error;
use crate::plans::{self, Planned};
use flashattn::cuda::{Buffer, DeviceSlice, DeviceView, Stream, Workspace};
use flashattn::{DType, Device, DeviceGradients, DeviceTensors, Element};
use std::ptr;
use std::sync::Arc;

/// Bytes of a workspace up to which a plan that is kept has its own, for each stream: it needs no memset, and stays bound to the
/// tensors of the last call. Larger ones (dQ in f32, above all) come from the caller's allocator, which knows what else the GPU's
/// memory is needed for: all the plans together would keep a lot.
const OWN_WORKSPACE: u64 = 1 << 18;

fn planned<T: Element>(call: &Call<'_>, ordinal: u32) -> Result<Arc<Planned<T>>, Error> {
    plans::get(call.options, [&call.q, &call.k, &call.v], &call.extras, Device::Cuda(ordinal))
}

/// What the GPU's side says of a GPU.
fn failed(ordinal: u32) -> impl Fn(flashattn::cuda::Error) -> Error {
    let executor = Device::Cuda(ordinal);
    move |error| flashattn::Error::Cuda { executor, error: error.into() }.into()
}

fn view<T: Element>(array: &Array, ordinal: u32) -> Result<DeviceView<'_>, Error> {
    array.expect(Kind::Element(T::DTYPE))?;
    let (shape, strides) = array.layout4()?;
    // SAFETY: the array's maker vouches for its memory; the caller gives arrays to a stream under its library's rules, by
    // which they live until the stream is done with them.
    unsafe { DeviceView::from_raw(ordinal, array.data.addr() as u64, T::DTYPE, shape, strides) }
        .map_err(|error| Error::Value(format!("{}: {error}", array.name)))
}

fn view_mut<T: Element>(array: &Array, ordinal: u32) -> Result<DeviceView<'_>, Error> {
    array.expect_writable()?;
    view::<T>(array, ordinal)
}

/// A row-major list of f32.
fn floats(array: &Array, ordinal: u32) -> Result<DeviceSlice<'_>, Error> {
    let len = array.dense_len(Kind::Element(DType::F32))?;
    // SAFETY: as in `view`.
    Ok(unsafe { DeviceSlice::from_raw(ordinal, array.data.addr() as u64, len) })
}

fn floats_mut(array: &Array, ordinal: u32) -> Result<DeviceSlice<'_>, Error> {
    array.expect_writable()?;
    floats(array, ordinal)
}

/// The call's stream on a GPU.
fn stream(call_stream: Option<usize>, device: &flashattn::cuda::Device) -> Stream {
    let raw = ptr::with_exposed_provenance_mut(call_stream.unwrap_or(0));
    // SAFETY: the caller's current stream on the GPU of its arrays (0: the default stream), which outlives the call.
    unsafe { device.stream_from_raw(raw) }
}

/// The bytes of a row-major array on the GPU.
fn buffer(array: &Array, device: &flashattn::cuda::Device) -> Result<Buffer, Error> {
    let bytes = array.dense_len(array.kind)?.saturating_mul(array.kind.size());
    // SAFETY: as in `view`.
    Ok(unsafe { device.buffer_from_raw(array.data.addr() as u64, bytes) })
}

/// The 32-bit words of a row-major array, on the host. Waits for the stream.
pub fn read(array: &Array, ordinal: u32, call_stream: Option<usize>) -> Result<Vec<u32>, Error> {
    let failed = |error: flashattn::cuda::Error| Error::Value(format!("{}: {error}", array.name));
    let device = flashattn::cuda::Device::open(ordinal).map_err(failed)?;
    buffer(array, &device)?.read(&stream(call_stream, &device)).map_err(failed)
}

/// The caller's memory as a workspace, where a pass shall not use the plan's own.
fn workspace<T: Element>(
    call: &Call<'_>,
    planned: &Arc<Planned<T>>,
    stream: &Stream,
    bytes: u64,
    allocate: Option<&mut Allocate<'_>>,
) -> Result<Option<Workspace>, Error> {
    if call.captured {
        // The plan's uploads are part of the graph, whatever becomes of the plan.
        plans::keep(planned.clone());
    }
    let Some(allocate) = allocate else { return Ok(None) };
    // While a graph runs other calls may use the plan's own. A plan that is not kept would wait for the GPU to free it.
    if !call.captured && planned.kept && bytes <= OWN_WORKSPACE {
        return Ok(None);
    }
    let (array, ordinal) = (allocate(bytes)?, stream.device().ordinal());
    if array.place != (Place::Cuda { ordinal }) {
        return Err(Error::Type(format!("workspace is on {}, expected cuda:{ordinal}", array.place)));
    }
    array.expect(Kind::U8)?;
    array.expect_writable()?;
    let buffer = buffer(&array, stream.device())?;
    Ok(Some(Workspace::new(buffer, stream).map_err(failed(ordinal))?))
}

/// Puts the forward pass into the call's stream.
pub fn forward<T: Element>(
    call: &Call<'_>,
    results: &Results,
    ordinal: u32,
    allocate: Option<&mut Allocate<'_>>,
) -> Result<(), Error> {
    let planned = planned::<T>(call, ordinal)?;
    let gpu = planned.plan.gpu()?;
    let stream = stream(call.stream, gpu.device());
    let tensors = DeviceTensors {
        q: view::<T>(&call.q, ordinal)?,
        k: view::<T>(&call.k, ordinal)?,
        v: view::<T>(&call.v, ordinal)?,
        o: view_mut::<T>(&results.o, ordinal)?,
        lse: floats_mut(&results.lse, ordinal)?,
    };
    let bytes = gpu.workspace_bytes(&tensors.layout()).map_err(failed(ordinal))?;
    let workspace = workspace(call, &planned, &stream, bytes, allocate)?;
    Ok(planned.plan.forward_on(&stream, &tensors, workspace.as_ref())?)
}

/// Puts the backward pass into the call's stream.
pub fn backward<T: Element>(
    call: &Call<'_>,
    given: &Given,
    gradients: &Gradients,
    ordinal: u32,
    allocate: Option<&mut Allocate<'_>>,
) -> Result<(), Error> {
    let planned = planned::<T>(call, ordinal)?;
    let stream = stream(call.stream, planned.plan.gpu()?.device());
    let tensors = DeviceTensors {
        q: view::<T>(&call.q, ordinal)?,
        k: view::<T>(&call.k, ordinal)?,
        v: view::<T>(&call.v, ordinal)?,
        o: view::<T>(&given.o, ordinal)?,
        lse: floats(&given.lse, ordinal)?,
    };
    let Gradients { dq, dk, dv, d_extras } = gradients;
    let lists = d_extras.iter().map(|d| floats_mut(d, ordinal)).collect::<Result<Vec<_>, _>>()?;
    let places = planned.grad_places(lists.len())?;
    let d_tables: Vec<_> = places.tables.iter().map(|&i| lists[i]).collect();
    let args = DeviceGradients {
        d_o: view::<T>(&given.d_o, ordinal)?,
        d_lse: given.d_lse.as_ref().map(|d_lse| floats(d_lse, ordinal)).transpose()?,
        dq: view_mut::<T>(dq, ordinal)?,
        dk: view_mut::<T>(dk, ordinal)?,
        dv: view_mut::<T>(dv, ordinal)?,
        d_sinks: places.sinks.map(|i| lists[i]),
        d_tables: &d_tables,
        accumulate: false,
    };
    let layout = planned.plan.backward_args(&tensors, &args)?.layout();
    let bytes = planned.plan.gpu_backward()?.workspace_bytes(&layout).map_err(failed(ordinal))?;
    let workspace = workspace(call, &planned, &stream, bytes, allocate)?;
    planned.plan.backward_on(&stream, &tensors, &args, workspace.as_ref())?;
    for unused in places.unused {
        buffer(&d_extras[unused], stream.device())?.fill(&stream, 0).map_err(failed(ordinal))?;
    }
    Ok(())
}
