//! Registers of products in flight.

use super::*;

const SHAPE: WgmmaShape = WgmmaShape {
    n: 8,
    a: Element::BF16,
    b: Element::BF16,
    d: Accumulator::F32,
    a_in_registers: false,
    transpose_a: false,
    transpose_b: false,
};

/// A kernel with accumulators `d`, an A fragment `a` and a product to issue.
struct Products<'k> {
    k: &'k Builder,
    d: Vec<Reg<'k, f32>>,
    a: [Reg<'k, u32>; 4],
    b: Reg<'k, u64>,
    out: Address<'k, u64>,
    p: Reg<'k, bool>,
}

impl<'k> Products<'k> {
    #[track_caller]
    fn issue(&self) {
        self.k.wgmma(SHAPE, &self.d, WgmmaA::<u32>::Shared(self.b), self.b, self.p);
    }

    #[track_caller]
    fn issue_a(&self) {
        self.k.wgmma(SHAPE, &self.d, WgmmaA::Registers(&self.a), self.b, self.p);
    }

    #[track_caller]
    fn commit_and_wait(&self, groups: u8) {
        self.k.wgmma_commit();
        self.k.wgmma_wait(groups);
    }

    #[track_caller]
    fn read(&self) {
        self.out.store(self.d[1]);
    }
}

fn products(body: impl FnOnce(&Products<'_>)) -> Kernel {
    sm90(|k| {
        let a = [0u32; 4].map(|zero| k.var(zero));
        let (b, p) = (k.var(0u64), k.var(true));
        let out = k.param_ptr("out").address();
        body(&Products { k, d: k.regs(4), a, b, out, p });
    })
}

#[test]
fn products_in_flight_are_not_touched() {
    passes(&products(|t| {
        t.k.wgmma_fence();
        t.issue();
        t.issue();
        t.commit_and_wait(0);
        t.read();
    }));
    let line = line!() + 3;
    let errors = products(|t| {
        t.k.wgmma_fence();
        t.issue();
        t.k.wgmma_commit();
        t.read();
        t.k.wgmma_wait(0);
    });
    breaks(&errors, Rule::WgmmaInFlight, &["st.global.b32", &format!("wgmma.rs:{line}:"), "wait_group"]);
    let uncommitted = products(|t| {
        t.k.wgmma_fence();
        t.issue();
        t.k.wgmma_wait(0);
        t.read();
    });
    breaks(&uncommitted, Rule::WgmmaInFlight, &["wgmma.commit_group"]);
    // A's registers too, read or written.
    let a = products(|t| {
        t.k.wgmma_fence();
        t.issue_a();
        t.k.wgmma_commit();
        t.out.store(t.a[3]);
    });
    breaks(&a, Rule::WgmmaInFlight, &["u32"]);
    // A predicate of control flow is an access as well.
    passes(&products(|t| {
        t.k.wgmma_fence();
        t.issue_a();
        t.k.wgmma_commit();
        t.k.if_(t.p, || {});
        t.k.wgmma_wait(0);
    }));
}

#[test]
fn a_wait_covers_groups_by_age() {
    let with = |pending: u8, first: bool| {
        products(move |t| {
            let other = Products { d: t.k.regs(4), ..*t };
            t.k.wgmma_fence();
            t.issue();
            t.k.wgmma_commit();
            other.issue();
            t.commit_and_wait(pending);
            if first {
                t.read()
            } else {
                other.read()
            }
            t.k.wgmma_wait(0);
        })
    };
    passes(&with(1, true));
    passes(&with(0, false));
    breaks(&with(1, false), Rule::WgmmaInFlight, &["wait_group"]);
    breaks(&with(2, true), Rule::WgmmaInFlight, &["wait_group"]);
}

#[test]
fn loops_and_branches_carry_what_is_in_flight() {
    // The product of one round is read in the next, before the wait.
    let around = |wait_first: bool| {
        products(move |t| {
            let n = t.k.param_u32("n");
            t.d.iter().for_each(|d| d.set(0.0));
            t.k.for_(0, n, 1, |_| {
                if wait_first {
                    t.k.wgmma_wait(0);
                }
                t.read();
                t.k.wgmma_fence();
                t.issue();
                t.k.wgmma_commit();
            });
            t.k.wgmma_wait(0);
            t.read();
        })
    };
    passes(&around(true));
    breaks(&around(false), Rule::WgmmaInFlight, &["st.global"]);
    // Two rounds later: two accumulators by turns, one group left pending.
    let later = |pending: u8| {
        products(move |t| {
            let (n, mut sets) = (t.k.param_u32("n"), vec![]);
            for _ in 0..3 {
                let set = Products { d: t.k.regs(4), ..*t };
                set.d.iter().for_each(|d| d.set(0.0));
                sets.push(set);
            }
            t.k.for_(0, n, 1, |_| {
                for set in &sets {
                    set.read();
                    t.k.wgmma_fence();
                    set.issue();
                    t.commit_and_wait(pending);
                }
            });
        })
    };
    passes(&later(2));
    breaks(&later(3), Rule::WgmmaInFlight, &["st.global"]);
    // Waited for in one branch only; and after a break.
    let branched = |otherwise: bool| {
        products(move |t| {
            t.k.wgmma_fence();
            t.issue();
            t.k.wgmma_commit();
            let wait = || t.k.wgmma_wait(0);
            t.k.if_else(t.p, wait, || {
                if otherwise {
                    wait()
                }
            });
            t.read();
        })
    };
    passes(&branched(true));
    breaks(&branched(false), Rule::WgmmaInFlight, &["st.global"]);
    let broken = products(|t| {
        t.k.wgmma_fence();
        t.k.loop_(|| {
            t.issue();
            t.k.wgmma_commit();
            t.k.break_if(t.p);
            t.k.wgmma_wait(0);
        });
        t.read();
    });
    breaks(&broken, Rule::WgmmaInFlight, &["st.global"]);
}

#[test]
fn a_fence_stands_between_other_accesses_and_products() {
    breaks(&products(|t| t.issue()), Rule::WgmmaFence, &["wgmma.fence"]);
    let written = |fence: bool| {
        products(move |t| {
            t.k.wgmma_fence();
            t.issue_a();
            t.commit_and_wait(0);
            t.a[0].set(7);
            if fence {
                t.k.wgmma_fence();
            }
            t.issue_a();
        })
    };
    passes(&written(true));
    breaks(&written(false), Rule::WgmmaFence, &["u32", "accessed otherwise"]);
    // Reading counts: the product may overwrite before the read is done.
    let read = products(|t| {
        t.k.wgmma_fence();
        t.issue();
        t.commit_and_wait(0);
        t.read();
        t.issue();
    });
    breaks(&read, Rule::WgmmaFence, &["f32"]);
    // Not fenced on one of two paths.
    let one_path = products(|t| {
        t.k.if_(t.p, || t.k.wgmma_fence());
        t.issue();
    });
    breaks(&one_path, Rule::WgmmaFence, &["wgmma.fence"]);
}

#[test]
fn accumulators_in_flight_keep_their_shape() {
    let second = |d: usize, n: u32| {
        products(move |t| {
            let all = t.k.regs::<f32>(8);
            t.k.wgmma_fence();
            t.k.wgmma(SHAPE, &all[..4], WgmmaA::<u32>::Shared(t.b), t.b, t.p);
            let shape = WgmmaShape { n, ..SHAPE };
            t.k.wgmma(shape, &all[d..d + n as usize / 2], WgmmaA::<u32>::Shared(t.b), t.b, t.p);
        })
    };
    passes(&second(0, 8));
    passes(&second(4, 8));
    breaks(&second(0, 16), Rule::WgmmaInFlight, &["another role or shape"]);
    breaks(&second(2, 8), Rule::WgmmaInFlight, &["another role or shape"]);
}
