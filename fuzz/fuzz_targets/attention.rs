//! The CPU executor on small problems of every kind, in memory without a byte to spare: an error and nothing written,
//! or a result that does not depend on the number of threads and (for tame numbers) is the oracle's.
#![no_main]

use flashattn_cpu::arch::Isa;
use flashattn_cpu::plan::{CpuError, Options, Plan};
use flashattn_fuzz::{Result, Unstructured, numbers, problem};
use flashattn_spec::score_mod::ScoreMod;
use flashattn_spec::{
    AttentionProblem, Element, GradInputs, Gradients, Inputs, Outputs, View, ViewMut, reference,
};
use half::{bf16, f16};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let u = &mut Unstructured::new(data);
    let _ = match u.int_in_range(0..=2) {
        Ok(0) => run::<f32>(u),
        Ok(1) => run::<f16>(u),
        _ => run::<bf16>(u),
    };
});

/// A tensor whose memory ends where its last element does.
#[derive(Clone)]
struct Tensor<T> {
    data: Box<[T]>,
    shape: [usize; 4],
    strides: [usize; 4],
}

impl<T: Element> Tensor<T> {
    /// The first three dimensions lie in any order, with any gaps.
    fn new(u: &mut Unstructured, shape: [usize; 4]) -> Result<Self> {
        let orders = [[2, 1, 0], [1, 2, 0], [2, 0, 1], [0, 1, 2]];
        let (mut strides, mut stride) = ([1; 4], shape[3] + u.int_in_range(0..=2)?);
        for dim in *u.choose(&orders)? {
            strides[dim] = stride;
            stride = stride * shape[dim] + u.int_in_range(0..=2)?;
        }
        let last: usize = shape.iter().zip(strides).map(|(n, s)| n.saturating_sub(1) * s).sum();
        let len = if shape.contains(&0) { 0 } else { last + 1 };
        Ok(Tensor { data: vec![T::default(); len].into(), shape, strides })
    }

    fn filled(mut self, seed: u64) -> Self {
        let numbers = numbers(seed, self.data.len());
        self.data.iter_mut().zip(numbers).for_each(|(x, value)| *x = T::from_f32(value));
        self
    }

    fn view(&self) -> View<'_, T> {
        View::with_strides(&self.data, self.shape, self.strides).expect("as long as needed")
    }

    fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut::with_strides(&mut self.data, self.shape, self.strides).expect("elements are apart")
    }

    /// Elements, row-major.
    fn elements(&self) -> Vec<f64> {
        let ([b, n, h, _], view) = (self.shape, self.view());
        let rows = (0..b).flat_map(|b| (0..n).flat_map(move |i| (0..h).map(move |h| (b, i, h))));
        rows.flat_map(|(b, i, h)| view.row(b, i, h)).map(|x| x.to_f64()).collect()
    }

    fn bits(&self) -> &[u8] {
        // SAFETY: elements are plain numbers without padding.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr().cast(), size_of_val(&*self.data)) }
    }
}

struct Given<T> {
    q: Tensor<T>,
    k: Tensor<T>,
    v: Tensor<T>,
    d_o: Tensor<T>,
    sinks: Option<Box<[f32]>>,
    d_lse: Option<Box<[f32]>>,
}

impl<T: Element> Given<T> {
    fn inputs(&self) -> Inputs<'_, T> {
        Inputs { q: self.q.view(), k: self.k.view(), v: self.v.view(), sinks: self.sinks.as_deref() }
    }
}

#[derive(Clone)]
struct Results<T> {
    o: Tensor<T>,
    lse: Box<[f32]>,
    dq: Tensor<T>,
    dk: Tensor<T>,
    dv: Tensor<T>,
    d_sinks: Option<Box<[f32]>>,
    d_tables: Vec<Box<[f32]>>,
}

impl<T: Element> Results<T> {
    fn compute(&mut self, plan: &Plan, given: &Given<T>) -> std::result::Result<(), CpuError> {
        let inputs = given.inputs();
        plan.forward(&inputs, &mut Outputs { o: self.o.view_mut(), lse: &mut self.lse })?;
        let (d_o, d_lse) = (given.d_o.view(), given.d_lse.as_deref());
        let grad_inputs = GradInputs { o: self.o.view(), lse: &self.lse, d_o, d_lse };
        let mut gradients = Gradients {
            dq: self.dq.view_mut(),
            dk: self.dk.view_mut(),
            dv: self.dv.view_mut(),
            d_sinks: self.d_sinks.as_deref_mut(),
            d_tables: self.d_tables.iter_mut().map(|t| &mut t[..]).collect(),
        };
        plan.backward(&inputs, &grad_inputs, &mut gradients)
    }

    fn bits(&self) -> Vec<&[u8]> {
        let floats = [&self.lse].into_iter().chain(&self.d_sinks).chain(&self.d_tables);
        // SAFETY: f32 are plain numbers without padding.
        let floats =
            floats.map(|x| unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), size_of_val(&**x)) });
        [&self.o, &self.dq, &self.dk, &self.dv].map(|t| t.bits()).into_iter().chain(floats).collect()
    }
}

fn run<T: Element>(u: &mut Unstructured) -> Result<()> {
    let wild = u.ratio(1, 4)?;
    let p = problem(u, T::DTYPE, wild)?;
    let isa = *u.choose(&Isa::available())?;
    let plan = |threads| Plan::new(&p, Options { isa: Some(isa), threads: Some(threads) });
    if p.validate().is_err() {
        assert!(plan(1).is_err(), "an invalid problem was planned");
        return Ok(());
    }
    let Ok(plan1) = plan(1) else { panic!("a valid problem was refused: {:?}", plan(1).err()) };

    let seed: u64 = u.arbitrary()?;
    let floats = |n: usize, seed| -> Box<[f32]> { numbers(seed, n).collect() };
    let mut given = Given {
        q: Tensor::new(u, p.q_shape())?.filled(seed),
        k: Tensor::new(u, p.k_shape())?.filled(seed ^ 1),
        v: Tensor::new(u, p.v_shape())?.filled(seed ^ 2),
        d_o: Tensor::new(u, p.o_shape())?.filled(seed ^ 3),
        sinks: p.sinks.then(|| floats(p.heads_q, seed ^ 4)),
        d_lse: u.arbitrary::<bool>()?.then(|| floats(p.lse_len(), seed ^ 5)),
    };
    let mut results = Results {
        o: Tensor::new(u, p.o_shape())?,
        lse: floats(p.lse_len(), 0),
        dq: Tensor::new(u, p.q_shape())?,
        dk: Tensor::new(u, p.k_shape())?,
        dv: Tensor::new(u, p.v_shape())?,
        d_sinks: p.sinks.then(|| floats(p.heads_q, 0)),
        d_tables: p.grad_tables().iter().map(|t| floats(t.data().len(), 0)).collect(),
    };
    if wild && !given.k.data.is_empty() {
        // Any bits at all: NaN, infinities, subnormals.
        for _ in 0..u.int_in_range(0..=4)? {
            let tensor = *u.choose(&[0, 1, 2, 3])?;
            let tensor = [&mut given.q, &mut given.k, &mut given.v, &mut given.d_o].into_iter().nth(tensor);
            if let Some(tensor) = tensor.filter(|t| !t.data.is_empty()) {
                let at = u.choose_index(tensor.data.len())?;
                tensor.data[at] = T::from_f32(f32::from_bits(u.arbitrary()?));
            }
        }
    }
    if u.ratio(1, 8)? {
        return refuse(u, &plan1, given, results);
    }
    let mut other = results.clone();
    results.compute(&plan1, &given).expect("tensors fit");
    if u.arbitrary()? {
        other.compute(&plan(3).expect("as before"), &given).expect("tensors fit");
        assert!(results.bits() == other.bits(), "results depend on the number of threads");
    }
    if !wild {
        compare(&p, &given, &results);
    }
    Ok(())
}

/// Arguments that do not fit are refused, and nothing is written.
fn refuse<T: Element>(
    u: &mut Unstructured,
    plan: &Plan,
    mut given: Given<T>,
    mut results: Results<T>,
) -> Result<()> {
    let longer = |x: &[f32]| -> Box<[f32]> { x.iter().copied().chain([0.0]).collect() };
    match u.int_in_range(0..=5)? {
        0 => given.sinks = if given.sinks.is_some() { None } else { Some(vec![0.0; 3].into()) },
        1 => results.lse = longer(&results.lse),
        2 => given.k = Tensor::new(u, given.k.shape.map(|n| n + 1))?,
        3 => given.v = Tensor::new(u, given.v.shape.map(|n| n + 1))?,
        4 => results.o = Tensor::new(u, results.o.shape.map(|n| n + 1))?,
        _ => given.q = Tensor::new(u, given.q.shape.map(|n| n + 1))?,
    }
    let before = results.clone();
    results.compute(plan, &given).expect_err("arguments do not fit");
    assert!(results.bits() == before.bits(), "something was written although the call was refused");
    Ok(())
}

/// Compares o and lse with the oracle's, as closely as can be promised without looking at the conditioning: the corpus
/// judges accuracy, this finds what is plainly wrong at sizes and layouts that the corpus does not have.
fn compare<T: Element>(p: &AttentionProblem, given: &Given<T>, results: &Results<T>) {
    let expected = reference::forward(p, &given.inputs()).expect("tensors fit");
    // |q|, |k|, |v| ≤ 2; score mods change scores by slope · distance ≤ 2 · 160 at most.
    let product = f64::from(p.scale().abs()) * 4.0 * p.head_dim as f64;
    let modified = if matches!(p.score_mod, ScoreMod::None) { 0.0 } else { 320.0 };
    let u32 = f64::from(f32::EPSILON);
    let score = u32 * (p.head_dim as f64 * product + 8.0 * (product + modified));
    let kept = 1.0 / (1.0 - p.dropout.map_or(0.0, |d| f64::from(d.p)));
    let near_o = 2.0 * kept * (2.0 * score + 16.0 * T::DTYPE.epsilon()) + 1e-6;
    let got = results.o.elements();
    assert_eq!(got.len(), expected.o.len());
    for (i, (got, want)) in got.iter().zip(&expected.o).enumerate() {
        assert!((got - want).abs() <= near_o, "o[{i}] is {got}, expected {want} ± {near_o:e}: {p:?}");
    }
    for (i, (&got, &want)) in results.lse.iter().zip(&expected.lse).enumerate() {
        let near = 2.0 * score + 1e-5 * (1.0 + want.abs());
        let right = f64::from(got) == want || (f64::from(got) - want).abs() <= near;
        assert!(right, "lse[{i}] is {got}, expected {want} ± {near:e}: {p:?}");
    }
}
