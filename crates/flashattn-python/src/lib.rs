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
use dlpack::{Imported, import};
use pyo3::prelude::*;

/// A call's arrays, and what keeps them alive until it is over.
struct Held<'a> {
    call: Call<'a>,
    owners: Vec<dlpack::Owner>,
}

impl<'a> Held<'a> {
    fn new(
        options: &'a str,
        [q, k, v]: [&Bound<'_, PyAny>; 3],
        extras: &[Bound<'_, PyAny>],
        stream: Option<usize>,
    ) -> PyResult<Self> {
        let mut owners = Vec::new();
        let mut take = |name, object| -> PyResult<array::Array> {
            let Imported { array, owner } = import(name, object)?;
            owners.push(owner);
            Ok(array)
        };
        let (q, k, v) = (take("q", q)?, take("k", k)?, take("v", v)?);
        let extras = extras.iter().map(|e| take("extras", e)).collect::<PyResult<_>>()?;
        Ok(Held { call: Call { options, q, k, v, extras, stream, workspace: None }, owners })
    }

    fn take(&mut self, name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<array::Array> {
        let Imported { array, owner } = import(name, object)?;
        self.owners.push(owner);
        Ok(array)
    }
}

#[pymodule]
mod _native {
    use super::*;

    #[pymodule_export]
    use crate::tools::{
        clear_plans, dropout_mask, io_model, num_threads, set_num_threads, workspace_bytes, xla_handlers,
    };

    /// Fills o and lse.
    #[pyfunction]
    #[pyo3(signature = (options, q, k, v, extras, o, lse, stream=None, workspace=None))]
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
        workspace: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let mut held = Held::new(options, [q, k, v], &extras, stream)?;
        held.call.workspace = workspace.map(|workspace| held.take("workspace", workspace)).transpose()?;
        let mut results = Results { o: held.take("o", o)?, lse: held.take("lse", lse)? };
        let call = &held.call;
        Ok(py.detach(|| call.forward(&mut results))?)
    }

    /// Bytes of a workspace for a forward pass that is captured into a CUDA graph.
    #[pyfunction]
    fn forward_workspace(
        py: Python<'_>,
        options: &str,
        q: &Bound<'_, PyAny>,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        extras: Vec<Bound<'_, PyAny>>,
        o: &Bound<'_, PyAny>,
        lse: &Bound<'_, PyAny>,
    ) -> PyResult<u64> {
        let mut held = Held::new(options, [q, k, v], &extras, None)?;
        let results = Results { o: held.take("o", o)?, lse: held.take("lse", lse)? };
        let call = &held.call;
        Ok(py.detach(|| call.workspace_bytes(&results))?)
    }

    /// Fills dq, dk, dv and d_extras: gradients of the tables that get one, in order, then of the sinks.
    #[pyfunction]
    #[pyo3(signature = (options, q, k, v, extras, o, lse, do_, dlse, dq, dk, dv, d_extras, stream=None))]
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
    ) -> PyResult<()> {
        let mut held = Held::new(options, [q, k, v], &extras, stream)?;
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
        let call = &held.call;
        Ok(py.detach(|| call.backward(&given, &mut gradients))?)
    }
}
