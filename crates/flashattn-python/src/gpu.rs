//! The passes over tensors in a GPU's memory: put into the caller's stream, awaited by nobody here.

use crate::array::{Array, Kind, Place};
use crate::call::{Call, Results};
use crate::error::Error;
use crate::plans::{self, Planned};
use flashattn::cuda::{DeviceSlice, DeviceView, Stream, Workspace};
use flashattn::{Device, DeviceTensors, Element};
use std::ptr;
use std::sync::Arc;

fn planned<T: Element>(call: &Call<'_>, ordinal: u32) -> Result<Arc<Planned<T>>, Error> {
    plans::get(call.options, [&call.q, &call.k, &call.v], &call.extras, Device::Cuda(ordinal))
}

fn view<T: Element>(array: &Array, ordinal: u32) -> Result<DeviceView<'_>, Error> {
    array.expect(Kind::Element(T::DTYPE))?;
    let (shape, strides) = array.layout4()?;
    // SAFETY: the array's maker vouches for its memory; the caller gives arrays to a stream under its library's rules, by
    // which they live until the stream is done with them.
    unsafe { DeviceView::from_raw(ordinal, array.data.addr() as u64, T::DTYPE, shape, strides) }
        .map_err(|error| Error::Value(format!("{}: {error}", array.name)))
}

fn tensors<'a, T: Element>(
    call: &'a Call<'_>,
    results: &'a Results,
    ordinal: u32,
) -> Result<DeviceTensors<'a>, Error> {
    for array in [&results.o, &results.lse] {
        array.expect_writable()?;
    }
    let len = results.lse.dense_len(Kind::Element(flashattn::DType::F32))?;
    // SAFETY: as in `view`.
    let lse = unsafe { DeviceSlice::from_raw(ordinal, results.lse.data.addr() as u64, len) };
    Ok(DeviceTensors {
        q: view::<T>(&call.q, ordinal)?,
        k: view::<T>(&call.k, ordinal)?,
        v: view::<T>(&call.v, ordinal)?,
        o: view::<T>(&results.o, ordinal)?,
        lse,
    })
}

fn stream<T: Element>(call: &Call<'_>, planned: &Planned<T>) -> Result<Stream, Error> {
    let raw = ptr::with_exposed_provenance_mut(call.stream.unwrap_or(0));
    // SAFETY: the caller's current stream on the GPU of its arrays (0: the default stream), which outlives the call.
    Ok(unsafe { planned.plan.gpu()?.device().stream_from_raw(raw) })
}

/// The 32-bit words of a row-major array, on the host. Waits for the stream.
pub fn read(array: &Array, ordinal: u32, stream: Option<usize>) -> Result<Vec<u32>, Error> {
    let bytes = array.dense_len(array.kind)?.saturating_mul(array.kind.size());
    let failed = |error: flashattn::cuda::Error| Error::Value(format!("{}: {error}", array.name));
    let device = flashattn::cuda::Device::open(ordinal).map_err(failed)?;
    let raw = ptr::with_exposed_provenance_mut(stream.unwrap_or(0));
    // SAFETY: the caller's stream, and an array whose maker vouches for its memory.
    let (stream, buffer) =
        unsafe { (device.stream_from_raw(raw), device.buffer_from_raw(array.data.addr() as u64, bytes)) };
    buffer.read(&stream).map_err(failed)
}

/// Puts the forward pass into the call's stream.
pub fn forward<T: Element>(call: &Call<'_>, results: &Results, ordinal: u32) -> Result<(), Error> {
    let planned = planned::<T>(call, ordinal)?;
    let (stream, tensors) = (stream(call, &planned)?, tensors::<T>(call, results, ordinal)?);
    let workspace = match &call.workspace {
        None => None,
        Some(array) => {
            if array.place != (Place::Cuda { ordinal }) {
                return Err(Error::Type(format!("workspace is on {}, expected cuda:{ordinal}", array.place)));
            }
            let bytes = array.dense_len(Kind::U8)?;
            // A workspace is for a graph, which has the plan's other memory in it, too.
            plans::keep(planned.clone());
            // SAFETY: as in `view`.
            let buffer =
                unsafe { planned.plan.gpu()?.device().buffer_from_raw(array.data.addr() as u64, bytes) };
            Some(Workspace::new(buffer, &stream).map_err(|error| Error::Value(error.to_string()))?)
        }
    };
    Ok(planned.plan.forward_on(&stream, &tensors, workspace.as_ref())?)
}

/// Bytes of the workspace that [`forward`] would need.
pub fn workspace_bytes<T: Element>(call: &Call<'_>, results: &Results, ordinal: u32) -> Result<u64, Error> {
    let planned = planned::<T>(call, ordinal)?;
    let layout = tensors::<T>(call, results, ordinal)?.layout();
    planned.plan.gpu()?.workspace_bytes(&layout).map_err(|error| Error::Value(error.to_string()))
}
