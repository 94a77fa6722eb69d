#![allow(missing_docs, clippy::all)]
use flashattn_cpu::plan::*;
use flashattn_cpu::arch::Isa;
use flashattn_spec::*;
use flashattn_spec::mask::Mask;
fn rnd(n: usize, seed: u32) -> Vec<f32> { let mut s = seed.wrapping_mul(2654435761).max(1); (0..n).map(|_| { let mut a = 0.0; for _ in 0..4 { s ^= s << 13; s ^= s >> 17; s ^= s << 5; a += s as f32 / 4294967296.0 - 0.5; } a * 1.7 }).collect() }
fn run<T: Element>(n: usize, d: usize, causal: bool, isa: Isa) {
    let h = 8;
    let mut p = AttentionProblem::new(1, n, h, d, T::DTYPE);
    if causal { p.mask = Mask::Causal; }
    let mk = |s| -> Vec<T> { rnd(n * h * d, s).into_iter().map(T::from_f32).collect() };
    let (q, k, v) = (mk(1), mk(2), mk(3));
    let shape = [1, n, h, d]; let st = [n * h * d, d, n * d, 1];
    let view = |x| View::with_strides(x, shape, st).unwrap();
    let inputs = Inputs { q: view(&q), k: view(&k), v: view(&v), sinks: None };
    let mut o = vec![T::default(); n * h * d]; let mut lse = vec![0.0; n * h];
    let plan = Plan::new(&p, Options { isa: Some(isa), threads: Some(2) }).unwrap();
    let mut best = f64::INFINITY;
    let reps = (1.5e10 / (4.0 * (n * n * d * h) as f64)).ceil().clamp(3.0, 200.0) as usize;
    for _ in 0..reps {
        let t = cpu();
        plan.forward(&inputs, &mut Outputs { o: ViewMut::with_strides(&mut o, shape, st).unwrap(), lse: &mut lse }).unwrap();
        best = best.min((cpu() - t) / 2.0);
    }
    let d_o = mk(4); let (mut dq, mut dk, mut dv) = (vec![T::default(); n*h*d], vec![T::default(); n*h*d], vec![T::default(); n*h*d]);
    let mut bb = f64::INFINITY;
    let threads = 2.0;
    if std::env::var("BWD").is_ok() { for _ in 0..(reps / 3).max(2) {
        let t = cpu();
        plan.backward(&inputs, &GradInputs { o: View::with_strides(&o, shape, st).unwrap(), lse: &lse, d_o: View::with_strides(&d_o, shape, st).unwrap(), d_lse: None }, &mut Gradients { dq: ViewMut::with_strides(&mut dq, shape, st).unwrap(), dk: ViewMut::with_strides(&mut dk, shape, st).unwrap(), dv: ViewMut::with_strides(&mut dv, shape, st).unwrap(), d_sinks: None, d_tables: vec![] }).unwrap();
        bb = bb.min((cpu() - t) / threads);
    } let fl = 10.0 * (h * n * n * d) as f64 * if causal { 0.5 } else { 1.0 };
    println!("   backward {:.2} ms {:.0} GF/s", bb * 1e3, fl / bb / 1e9); }
    // check a few rows
    let scale = 1.0 / (d as f64).sqrt(); let mut err = 0f64; let mut ref_max = 0f64;
    for &(hh, i) in &[(0, 0), (1, n / 3), (7, n - 1), (3, 17)] {
        let row = |x: &[T], j: usize| -> Vec<f64> { x[hh * n * d + j * d..][..d].iter().map(|a| a.to_f64()).collect() };
        let qr = row(&q, i);
        let m = if causal { i + 1 } else { n };
        let s: Vec<f64> = (0..m).map(|j| row(&k, j).iter().zip(&qr).map(|(a, b)| a * b).sum::<f64>() * scale).collect();
        let mx = s.iter().cloned().fold(f64::MIN, f64::max); let l: f64 = s.iter().map(|x| (x - mx).exp()).sum();
        let mut oo = vec![0.0; d];
        for j in 0..m { let vr = row(&v, j); for c in 0..d { oo[c] += (s[j] - mx).exp() / l * vr[c]; } }
        for c in 0..d { err = err.max((oo[c] - o[hh * n * d + i * d + c].to_f64()).abs()); ref_max = ref_max.max(oo[c].abs()); }
        err = err.max((lse[hh * n + i] as f64 - mx - l.ln()).abs() * 0.1);
    }
    let fl = 4.0 * (h * n * n * d) as f64 * if causal { 0.5 } else { 1.0 };
    println!("{:?} n={n} d={d} causal={causal} {isa}: {:.2} ms  {:.0} GF/s  err {err:.1e} of {ref_max:.2}", T::DTYPE, best * 1e3, fl / best / 1e9);
}
fn cpu() -> f64 { let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 }; unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) }; t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9 }
fn main() { if let Some(x) = std::env::args().nth(1) { if x == "m" { for (n, d) in [(2048,64),(2048,128)] { run::<half::bf16>(n,d,false,Isa::Amx); } return; } if x == "a" { for (n, d) in [(512,64),(2048,64),(8192,64),(2048,128)] { for c in [false,true] { run::<half::bf16>(n,d,c,Isa::Amx); } } return; } if x == "f" { run::<f32>(512,64,false,Isa::Avx512); run::<f32>(2048,64,false,Isa::Avx512); run::<f32>(2048,128,false,Isa::Avx512); return; } }
    for (n, d) in [(512, 64), (2048, 64), (2048, 128), (4096, 64)] { for c in [false, true] {
        run::<f32>(n, d, c, Isa::Avx512);
        run::<half::bf16>(n, d, c, Isa::Amx);
    } }
}
