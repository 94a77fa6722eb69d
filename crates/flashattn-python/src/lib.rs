//! The native part of the Python package `flashattn`: the facade's attention on arrays that come by DLPack (NumPy,
//! PyTorch, CuPy, …) or from XLA (JAX). It allocates no results: callers do, in their own library.
//!
//! Reading order: `array` (borrowed memory), `dlpack` and `xla` (where it comes from), `options` (what is asked
//! for), `plans`, `call` (what is done).

mod array;
mod call;
mod dlpack;
mod error;
mod gpu;
mod options;
mod plans;
mod threads;
mod tools;
mod xla;

use call::{Call, Given, Gradients, Results};
use dlpack::{Imported, Owner, import};
use pyo3::prelude::*;

/// A call's arrays, and what keeps them alive until it is over.
struct Held<'a> {
    call: Call<'a>,
    owners: Vec<Owner>,
}

impl<'a> Held<'a> {
    fn new(
        options: &'a str,
        [q, k, v]: [&Bound<'_, PyAny>; 3],
        extras: &[Bound<'_, PyAny>],
        stream: Option<usize>,
        captured: bool,
    ) -> PyResult<Self> {
        let mut owners = Vec::new();
        let mut take = |name, object| -> PyResult<array::Array> {
            let Imported { array, owner } = import(name, object)?;
            owners.push(owner);
            Ok(array)
        };
        let (q, k, v) = (take("q", q)?, take("k", k)?, take("v", v)?);
        let extras = extras.iter().map(|e| take("extras", e)).collect::<PyResult<_>>()?;
        Ok(Held { call: Call { options, q, k, v, extras, stream, captured }, owners })
    }

    fn take(&mut self, name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<array::Array> {
        let Imported { array, owner } = import(name, object)?;
        self.owners.push(owner);
        Ok(array)
    }
}

/// Memory from a Python function of the number of bytes, which returns an array or a DLPack capsule; `owner` keeps it alive.
fn from_python(
    function: &Py<PyAny>,
    owner: &mut Option<Owner>,
    bytes: u64,
) -> Result<array::Array, error::Error> {
    Python::attach(|py| {
        let imported = import("workspace", &function.bind(py).call1((bytes,))?)?;
        *owner = Some(imported.owner);
        Ok(imported.array)
    })
}

#[pymodule]
mod _native {
    use super::*;

    #[pymodule_export]
    use crate::tools::{
        clear_plans, dropout_mask, io_model, num_threads, set_num_threads, workspace_bytes, xla_handlers,
    };

    /// Fills o and lse. On a GPU: in the stream; `allocate`, if given, is asked for working memory, bytes to array; `captured` says
    /// whether the stream is being captured into a CUDA graph.
    #[pyfunction]
    #[pyo3(signature = (options, q, k, v, extras, o, lse, stream=None, allocate=None, captured=false))]
    fn forward(
        py: Python<'_>,
        options: &str,
        q: &Bound<'_, PyAny>,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        extras: Vec<Bound<'_, PyAny>>,
        o: &Bound<'_, PyAny>,
        lse: &Bound<'_, PyAny>,
        stream: Option<usize>,
        allocate: Option<Py<PyAny>>,
        captured: bool,
    ) -> PyResult<()> {
        let mut held = Held::new(options, [q, k, v], &extras, stream, captured)?;
        let mut results = Results { o: held.take("o", o)?, lse: held.take("lse", lse)? };
        let (call, mut owner) = (&held.call, None);
        Ok(py.detach(|| match &allocate {
            Some(f) => call.forward(&mut results, Some(&mut |bytes| from_python(f, &mut owner, bytes))),
            None => call.forward(&mut results, None),
        })?)
    }

    /// Fills dq, dk, dv and d_extras: gradients of the tables that get one, in order, then of the sinks. The rest as in `forward`.
    #[pyfunction]
    #[pyo3(signature = (options, q, k, v, extras, o, lse, do_, dlse, dq, dk, dv, d_extras, stream=None, allocate=None,
        captured=false))]
    fn backward(
        py: Python<'_>,
        options: &str,
        q: &Bound<'_, PyAny>,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        extras: Vec<Bound<'_, PyAny>>,
        o: &Bound<'_, PyAny>,
        lse: &Bound<'_, PyAny>,
        do_: &Bound<'_, PyAny>,
        dlse: Option<&Bound<'_, PyAny>>,
        dq: &Bound<'_, PyAny>,
        dk: &Bound<'_, PyAny>,
        dv: &Bound<'_, PyAny>,
        d_extras: Vec<Bound<'_, PyAny>>,
        stream: Option<usize>,
        allocate: Option<Py<PyAny>>,
        captured: bool,
    ) -> PyResult<()> {
        let mut held = Held::new(options, [q, k, v], &extras, stream, captured)?;
        let given = Given {
            o: held.take("o", o)?,
            lse: held.take("lse", lse)?,
            d_o: held.take("do", do_)?,
            d_lse: dlse.map(|dlse| held.take("dlse", dlse)).transpose()?,
        };
        let mut gradients = Gradients {
            dq: held.take("dq", dq)?,
            dk: held.take("dk", dk)?,
            dv: held.take("dv", dv)?,
            d_extras: d_extras.iter().map(|d| held.take("d_extras", d)).collect::<PyResult<_>>()?,
        };
        let (call, mut owner) = (&held.call, None);
        Ok(py.detach(|| match &allocate {
            Some(f) => {
                call.backward(&given, &mut gradients, Some(&mut |bytes| from_python(f, &mut owner, bytes)))
            }
            None => call.backward(&given, &mut gradients, None),
        })?)
    }
}
