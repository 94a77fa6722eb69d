//! Extra memory, measured by an allocator that counts: linear in the sequence length, as large as plans say, and none
//! for tensors that nobody has.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use flashattn_cpu::{CpuError, Options, Plan};
use flashattn_spec::mask::Mask;
use flashattn_spec::{
    AttentionProblem, DType, Element, GradInputs, Gradients, Inputs, Outputs, ProblemError, View, ViewMut,
};
use half::bf16;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every method passes its arguments on to the system's allocator and returns what that gave; the counters
// allocate nothing. (The provided `realloc` allocates, copies and frees by these.)
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(IN_USE.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller keeps the contract of this method, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above; `at` came from the system's allocator with this layout.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Measuring tests take turns.
static TURN: Mutex<()> = Mutex::new(());

/// The most bytes in use while `call` runs beyond those before it.
fn peak_of(call: impl FnOnce()) -> usize {
    let before = IN_USE.load(Relaxed);
    PEAK.store(before, Relaxed);
    call();
    PEAK.load(Relaxed) - before
}

/// Extra bytes of (forward, backward) as measured, and as the plan says.
fn extra<T: Element>(problem: &AttentionProblem, threads: usize) -> ([usize; 2], [usize; 2]) {
    let elements = |shape: [usize; 4]| shape.iter().product::<usize>();
    let filled = |shape| vec![T::from_f32(0.25); elements(shape)];
    let p = problem;
    let (q, k, v, d_o) = (filled(p.q_shape()), filled(p.k_shape()), filled(p.v_shape()), filled(p.o_shape()));
    let (mut o, mut dq, mut dk, mut dv) = (d_o.clone(), q.clone(), k.clone(), v.clone());
    let mut lse = vec![0.0; p.lse_len()];
    let inputs = Inputs {
        q: View::new(&q, p.q_shape()).unwrap(),
        k: View::new(&k, p.k_shape()).unwrap(),
        v: View::new(&v, p.v_shape()).unwrap(),
        sinks: None,
    };
    let options = Options { isa: None, threads: Some(threads) };
    let said = Plan::new(p, options).unwrap();
    let said = [said.forward_workspace_bytes(), said.backward_workspace_bytes()];
    // Each from a plan of its own: a pass does not use what the other has left.
    let plan = Plan::new(p, options).unwrap();
    let forward = peak_of(|| {
        let mut out = Outputs { o: ViewMut::new(&mut o, p.o_shape()).unwrap(), lse: &mut lse };
        plan.forward(&inputs, &mut out).unwrap();
    });
    drop(plan);
    let plan = Plan::new(p, options).unwrap();
    let backward = peak_of(|| {
        let given = GradInputs {
            o: View::new(&o, p.o_shape()).unwrap(),
            lse: &lse,
            d_o: View::new(&d_o, p.o_shape()).unwrap(),
            d_lse: None,
        };
        let mut out = Gradients {
            dq: ViewMut::new(&mut dq, p.q_shape()).unwrap(),
            dk: ViewMut::new(&mut dk, p.k_shape()).unwrap(),
            dv: ViewMut::new(&mut dv, p.v_shape()).unwrap(),
            d_sinks: None,
            d_tables: vec![],
        };
        plan.backward(&inputs, &given, &mut out).unwrap();
    });
    ([forward, backward], said)
}

fn extra_of(problem: &AttentionProblem, threads: usize) -> ([usize; 2], [usize; 2]) {
    match problem.dtype {
        DType::F32 => extra::<f32>(problem, threads),
        _ => extra::<bf16>(problem, threads),
    }
}

#[test]
fn extra_memory_is_linear_in_the_sequence_length() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for dtype in [DType::F32, DType::Bf16] {
        for (heads, mask) in [(1, Mask::Full), (1, Mask::Causal), (3, Mask::Causal)] {
            let at = |n| {
                let problem = AttentionProblem::new(1, n, heads, 32, dtype);
                extra_of(&AttentionProblem { mask: mask.clone(), ..problem }, 1)
            };
            let rows: Vec<_> = [1024, 2048, 4096, 8192].map(at).into();
            for pass in 0..2 {
                for two in rows.windows(2) {
                    let (measured, said) =
                        ([two[0].0[pass], two[1].0[pass]], [two[0].1[pass], two[1].1[pass]]);
                    let name = format!("{dtype}, {heads} heads, {mask:?}, pass {pass}");
                    for [half, whole] in [measured, said] {
                        assert!(whole as f64 <= 2.02 * half as f64, "{name}: {half}, then {whole} bytes");
                    }
                    // Lists of tasks and blocks come on top: less than 2 % and 64 KiB.
                    let [got, said] = [measured[1], said[1]];
                    assert!(got >= said, "{name}: {got} bytes, the plan says {said}");
                    assert!(
                        got <= said + said / 50 + (64 << 10),
                        "{name}: {got} bytes, the plan says {said}"
                    );
                }
            }
        }
    }
}

#[test]
fn plans_say_what_several_threads_take() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut problems: Vec<AttentionProblem> = [
        // A few queries; heads that share keys; more heads than parts are for; packed sequences.
        AttentionProblem { seqlen_k: 5000, heads_kv: 2, ..AttentionProblem::new(2, 1, 4, 64, DType::Bf16) },
        AttentionProblem { heads_kv: 2, ..AttentionProblem::new(1, 1500, 6, 40, DType::F32) },
        AttentionProblem::new(2, 300, 9, 64, DType::Bf16),
        AttentionProblem::new(1, 1, 2, 64, DType::F32)
            .with_varlen(&[0, 40, 1500, 1500], &[0, 1200, 1201, 1300]),
    ]
    .into();
    // Announced as longer than any sequence is.
    let mut announced = problems[3].clone();
    (announced.seqlen_q, announced.seqlen_k) = (1 << 29, 1 << 29);
    problems.push(announced);
    for problem in &problems {
        // The pool's own memory.
        extra_of(problem, 3);
        let (measured, said) = extra_of(problem, 3);
        for (got, said) in measured.into_iter().zip(said) {
            // A thread may find nothing left to do.
            assert!(got >= said / 4 && got <= said + said / 50 + (64 << 10), "{got}, {said}: {problem:?}");
        }
    }
}

#[test]
fn planning_takes_no_memory_for_tensors_that_nobody_has() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let huge = |batch, seqlen, heads| AttentionProblem::new(batch, seqlen, heads, 64, DType::Bf16);
    let by_place = Mask::custom(|ix| (ix.kv + ix.batch).gt(ix.head)).unwrap();
    for problem in [huge(1, 1_000_000_000, 1), huge(1 << 29, 1, 1 << 10), huge(1 << 14, 1 << 15, 1 << 10)] {
        for mask in [Mask::Full, Mask::Causal, by_place.clone()] {
            let problem = AttentionProblem { mask, ..problem.clone() };
            let mut plan = None;
            let bytes = peak_of(|| plan = Some(Plan::new(&problem, Options::default()).unwrap()));
            assert!(bytes < 1 << 20, "{bytes} bytes for a plan of {problem:?}");
            let plan = plan.unwrap();
            assert!(plan.backward_workspace_bytes() > 0 && plan.forward_workspace_bytes() > 0);
            let x = View::new(&[bf16::ONE; 64], [1, 1, 1, 64]).unwrap();
            let (mut o, mut lse) = ([bf16::ONE; 64], [0.5]);
            let mut out = Outputs { o: ViewMut::new(&mut o, [1, 1, 1, 64]).unwrap(), lse: &mut lse };
            let refused = plan.forward(&Inputs { q: x, k: x, v: x, sinks: None }, &mut out);
            assert!(matches!(refused, Err(CpuError::Problem(ProblemError::Shape { name: "q", .. }))));
            assert_eq!((o, lse), ([bf16::ONE; 64], [0.5]));
        }
    }
    let error = Plan::new(&huge(1, 1 << 40, 1), Options::default()).err().unwrap();
    assert_eq!(error.to_string(), "seqlen_q is 1099511627776, expected at most 1073741823");
}
