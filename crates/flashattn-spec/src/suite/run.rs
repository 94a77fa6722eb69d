//! Runs cases: makes their tensors, asks oracle, standard attention and executor, and compares.

use super::judge::{Verdict, floor, judge};
use super::memory::{Memory, Role};
use super::{Case, ExecError, Executor, Failure, InputKind, Layout, Place, Report, Skip, Worst};
use crate::args::{GradInputs, Gradients, Inputs, Outputs};
use crate::element::{DType, Element};
use crate::problem::{AttentionProblem, ProblemError};
use crate::reference::{self, rounding::deviations, standard::StandardAttention};
use half::{bf16, f16};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What is called with (cases done, all cases, name of the next).
type Progress<'a> = Box<dyn FnMut(usize, usize, &str) + 'a>;

/// Puts cases to an executor.
#[derive(Default)]
pub struct Runner<'a> {
    filter: Option<String>,
    progress: Option<Progress<'a>>,
}

impl<'a> Runner<'a> {
    /// Runs every case, quietly.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs only cases whose name contains this.
    pub fn filter(mut self, part_of_name: &str) -> Self {
        self.filter = Some(part_of_name.to_owned());
        self
    }

    /// Calls `progress(done, total, name)` before each case, and once after the last with an empty name.
    pub fn on_progress(mut self, progress: impl FnMut(usize, usize, &str) + 'a) -> Self {
        self.progress = Some(Box::new(progress));
        self
    }

    /// Runs the cases one after the other.
    pub fn run<E: Executor>(mut self, executor: &E, cases: &[Case]) -> Report {
        let wanted = |c: &&Case| self.filter.as_ref().is_none_or(|part| c.name.contains(part.as_str()));
        let cases: Vec<&Case> = cases.iter().filter(wanted).collect();
        let mut report = Report { device: executor.device(), cases: cases.len(), ..Report::default() };
        let mut progress = |done, name: &str| {
            if let Some(call) = &mut self.progress {
                call(done, cases.len(), name);
            }
        };
        for (done, case) in cases.iter().enumerate() {
            progress(done, &case.name);
            let outcome = match case.problem.dtype {
                DType::F32 => run::<f32, E>(executor, case),
                DType::F16 => run::<f16, E>(executor, case),
                DType::Bf16 => run::<bf16, E>(executor, case),
                DType::F64 => Err(ExecError::Unsupported { feature: "f64, the oracle's type,".to_owned() }),
            };
            record(&mut report, case, outcome);
        }
        progress(cases.len(), "");
        report
    }
}

/// An output's name and what is to be said of it.
type Judged = (&'static str, Verdict);

fn record(report: &mut Report, case: &Case, outcome: Result<Vec<Judged>, ExecError>) {
    match outcome {
        Err(ExecError::Unsupported { feature }) => {
            report.skipped += 1;
            report.skips.push(Skip { name: case.name.clone(), feature });
        }
        Err(ExecError::Failed(detail)) => {
            report.failed += 1;
            let (name, tensor) = (case.name.clone(), "-".to_owned());
            report.failures.push(Failure { name, tensor, error: f64::INFINITY, allowed: 0.0, detail });
        }
        Ok(judged) => {
            let right = judged.iter().all(|(_, v)| v.is_right());
            *(if right { &mut report.passed } else { &mut report.failed }) += 1;
            for (tensor, verdict) in judged {
                let worst = report.worst.entry(tensor.to_owned()).or_default();
                if verdict.ratio() > worst.ratio {
                    *worst = Worst { ratio: verdict.ratio(), case: case.name.clone() };
                }
                if !verdict.is_right() {
                    report.failures.push(verdict.failure(&case.name, tensor));
                }
            }
        }
    }
}

/// The inputs of a case.
struct Tensors<T> {
    q: Memory<T>,
    k: Memory<T>,
    v: Memory<T>,
    d_o: Memory<T>,
    sinks: Option<Vec<f32>>,
    d_lse: Option<Vec<f32>>,
}

/// Widths of q, k and v of a token.
fn widths(p: &AttentionProblem) -> [usize; 3] {
    [p.heads_q * p.head_dim, p.heads_kv * p.head_dim, p.heads_kv * p.head_dim_v]
}

impl<T: Element> Tensors<T> {
    fn new(case: &Case) -> Self {
        let p = &case.problem;
        let mut rng = StdRng::seed_from_u64(case.seed);
        let gap = T::from_f32(f32::NAN);
        let mut tensor = |shape, role, size: f32| {
            let mut memory = Memory::new(shape, case.layout, role, widths(p), false, gap);
            memory.set(|| T::from_f32(size * rng.sample::<f32, _>(StandardNormal)));
            memory
        };
        let q = tensor(p.q_shape(), Role::Q, if case.input == InputKind::Large { 30.0 } else { 1.0 });
        let [k, v, d_o] = [(p.k_shape(), Role::K), (p.v_shape(), Role::V), (p.o_shape(), Role::O)]
            .map(|(shape, role)| tensor(shape, role, 1.0));
        let mut floats = |n: usize| (0..n).map(|_| rng.sample::<f32, _>(StandardNormal)).collect();
        let sinks = p.sinks.then(|| floats(p.heads_q));
        let d_lse = case.d_lse.then(|| floats(p.lse_len()));
        let mut tensors = Tensors { q, k, v, d_o, sinks, d_lse };
        if case.input == InputKind::Growing {
            let [batch, seqlen, heads, _] = p.k_shape();
            for row in 0..batch * seqlen * heads {
                let (place, head) = ((row / heads % seqlen) as f32 / seqlen as f32, row % heads);
                let size = 1.0 + 400.0 * if head % 2 == 0 { place } else { 1.0 - place };
                for x in tensors.k.row_mut(row).into_iter().flatten() {
                    *x = T::from_f32(size * x.to_f32());
                }
            }
        }
        if let InputKind::NotFinite(place) = case.input {
            let (memory, shape) = match place {
                Place::Q => (&mut tensors.q, p.q_shape()),
                Place::K => (&mut tensors.k, p.k_shape()),
                Place::V => (&mut tensors.v, p.v_shape()),
                Place::Do => (&mut tensors.d_o, p.o_shape()),
            };
            let rows: usize = shape[..3].iter().product();
            let bad = if place == Place::V { [f32::NAN, f32::INFINITY] } else { [f32::NAN; 2] };
            for bad in bad {
                let (row, at) = (rng.random_range(0..rows.max(1)), rng.random_range(0..shape[3]));
                if let Some(row) = memory.row_mut(row) {
                    row[at] = T::from_f32(bad);
                }
            }
        }
        tensors
    }

    fn inputs(&self) -> Inputs<'_, T> {
        Inputs { q: self.q.view(), k: self.k.view(), v: self.v.view(), sinks: self.sinks.as_deref() }
    }
}

/// Everything that is computed, by the executor or by standard attention.
struct Results<T> {
    o: Memory<T>,
    lse: Vec<f32>,
    dq: Memory<T>,
    dk: Memory<T>,
    dv: Memory<T>,
    d_sinks: Option<Vec<f32>>,
    d_tables: Vec<Vec<f32>>,
}

impl<T: Element> Results<T> {
    /// Poisoned memory: what stays unwritten is found out. It is NaN, or where NaNs are expected a number that is not.
    fn new(case: &Case, layout: Layout) -> Self {
        let p = &case.problem;
        let poison = if matches!(case.input, InputKind::NotFinite(_)) { 777.0 } else { f32::NAN };
        let memory = |shape, role| Memory::new(shape, layout, role, widths(p), true, T::from_f32(poison));
        Results {
            o: memory(p.o_shape(), Role::O),
            lse: vec![poison; p.lse_len()],
            dq: memory(p.q_shape(), Role::Q),
            dk: memory(p.k_shape(), Role::K),
            dv: memory(p.v_shape(), Role::V),
            d_sinks: p.sinks.then(|| vec![poison; p.heads_q]),
            d_tables: p.grad_tables().iter().map(|t| vec![poison; t.data().len()]).collect(),
        }
    }

    fn forward_args(&mut self) -> Outputs<'_, T> {
        Outputs { o: self.o.view_mut(), lse: &mut self.lse }
    }

    /// The backward pass works on what the forward pass has left here.
    fn backward_args<'a>(&'a mut self, tensors: &'a Tensors<T>) -> (GradInputs<'a, T>, Gradients<'a, T>) {
        let (d_o, d_lse) = (tensors.d_o.view(), tensors.d_lse.as_deref());
        let grad_inputs = GradInputs { o: self.o.view(), lse: &self.lse, d_o, d_lse };
        let gradients = Gradients {
            dq: self.dq.view_mut(),
            dk: self.dk.view_mut(),
            dv: self.dv.view_mut(),
            d_sinks: self.d_sinks.as_deref_mut(),
            d_tables: self.d_tables.iter_mut().map(|t| &mut t[..]).collect(),
        };
        (grad_inputs, gradients)
    }

    /// The outputs' names and values.
    fn outputs(&self, backward: bool) -> Vec<(&'static str, Vec<f64>)> {
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect();
        let mut all = vec![("o", self.o.to_f64()), ("lse", wide(&self.lse))];
        if backward {
            all.extend([("dq", self.dq.to_f64()), ("dk", self.dk.to_f64()), ("dv", self.dv.to_f64())]);
            all.extend(self.d_sinks.iter().map(|x| ("dsinks", wide(x))));
            all.extend(self.d_tables.iter().map(|x| ("dtables", wide(x))));
        }
        all
    }
}

fn run<T: Element, E: Executor>(executor: &E, case: &Case) -> Result<Vec<Judged>, ExecError> {
    let (p, backward) = (&case.problem, case.backward);
    let tensors = Tensors::<T>::new(case);
    let mut results = Results::<T>::new(case, case.layout);
    let passes = || {
        executor.forward(p, &tensors.inputs(), &mut results.forward_args())?;
        if backward {
            let (grad_inputs, mut gradients) = results.backward_args(&tensors);
            executor.backward(p, &tensors.inputs(), &grad_inputs, &mut gradients)?;
        }
        Ok(())
    };
    let panicked = |_| Err(ExecError::Failed("panicked".to_owned()));
    catch_unwind(AssertUnwindSafe(passes)).unwrap_or_else(panicked)?;
    for (name, memory) in [("o", &results.o), ("dq", &results.dq), ("dk", &results.dk), ("dv", &results.dv)] {
        if let Some(at) = memory.written_gap() {
            let detail = format!("{name}: wrote to element {at} of the memory, which is none of its own");
            return Err(ExecError::Failed(detail));
        }
    }
    let judged = compare(case, &tensors, &results);
    judged.map_err(|error| ExecError::Failed(format!("the oracle refused: {error}")))
}

/// Compares results with the oracle's, by the yardstick of standard attention.
fn compare<T: Element>(
    case: &Case,
    tensors: &Tensors<T>,
    results: &Results<T>,
) -> Result<Vec<Judged>, ProblemError> {
    let (p, backward) = (&case.problem, case.backward);
    let forward = reference::forward(p, &tensors.inputs())?;
    let mut expected = vec![forward.o, forward.lse];
    if backward {
        let g = reference::backward(p, &tensors.inputs(), tensors.d_o.view(), tensors.d_lse.as_deref())?;
        expected.extend([g.dq, g.dk, g.dv]);
        if p.sinks {
            expected.push(g.d_sinks);
        }
        expected.extend(g.d_tables);
    }
    let mut attention = StandardAttention::new(p)?;
    let mut standard = Results::<T>::new(case, Layout::Dense);
    attention.forward(&tensors.inputs(), &mut standard.forward_args())?;
    if backward {
        let (grad_inputs, mut gradients) = standard.backward_args(tensors);
        attention.backward(&tensors.inputs(), &grad_inputs, &mut gradients)?;
    }
    let rounding = deviations(p, &tensors.inputs(), tensors.d_o.view(), tensors.d_lse.as_deref())?;
    let mut tables = rounding.tables.iter();
    let results = results.outputs(backward).into_iter().zip(standard.outputs(backward));
    Ok(results
        .zip(&expected)
        .map(|(((tensor, got), (_, standard)), expected)| {
            let deviation = match tensor {
                "o" => rounding.o,
                "lse" => rounding.lse,
                "dq" => rounding.dq,
                "dk" => rounding.dk,
                "dv" => rounding.dv,
                "dsinks" => rounding.sinks,
                _ => tables.next().copied().unwrap_or_default(),
            };
            (tensor, judge(tensor, &got, expected, &standard, floor(tensor, p.dtype, expected, deviation)))
        })
        .collect())
}
