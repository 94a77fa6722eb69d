//! Control flow: its structure, what is written, where lanes part.

use super::*;

#[test]
fn control_flow_is_structured() {
    let mut right = sm90(|k| {
        let p = k.var(true);
        k.if_else(p, || k.loop_(|| k.break_if(p)), || {});
    });
    passes(&right);
    let last = right.body.pop();
    breaks(&right, Rule::Structure, &["If without an end", "EndIf"]);
    right.body.extend([last.unwrap(), Item::EndIf]);
    breaks(&right, Rule::Structure, &["EndIf"]);
    *right.body.last_mut().unwrap() = Item::EndLoop;
    breaks(&right, Rule::Structure, &["EndLoop"]);
    *right.body.last_mut().unwrap() = Item::Else;
    breaks(&right, Rule::Structure, &["Else"]);
    breaks(&sm90(|k| k.break_if(k.var(true))), Rule::Structure, &["BreakIf outside"]);

    // Deep nesting is refused, and does not overflow this checker's stack.
    let nested = |depth: usize, open: fn(&Kernel) -> Item, close: Item| {
        let mut kernel = sm90(|k| {
            k.var(true);
        });
        let opened = open(&kernel);
        kernel.body.extend(std::iter::repeat_n(opened, depth));
        kernel.body.push(Item::BreakIf { predicate: RegId(0), value: true, site: kernel.registers[0].site });
        kernel.body.extend(std::iter::repeat_n(close, depth));
        kernel
    };
    let looped: fn(&Kernel) -> Item = |kernel| Item::Loop { site: kernel.registers[0].site };
    let branched: fn(&Kernel) -> Item =
        |kernel| Item::If { predicate: RegId(0), value: true, site: kernel.registers[0].site };
    passes(&nested(LOOPS, looped, Item::EndLoop));
    breaks(&nested(LOOPS + 1, looped, Item::EndLoop), Rule::Structure, &["9 loops", "at most 8"]);
    breaks(&nested(1_000_000, looped, Item::EndLoop), Rule::Structure, &["at most"]);
    breaks(&nested(1_000_000, branched, Item::EndIf), Rule::Structure, &["at most 64"]);
}

#[test]
fn registers_are_written_before_they_are_read() {
    let use_ =
        |k: &Builder, x: Reg<'_, f32>| k.push(instr::NEG_F32, &[k.reg::<f32>().id], &[Operand::Reg(x.id)]);
    breaks(&sm90(|k| use_(k, k.reg())), Rule::Undefined, &["nothing has written"]);
    // Below its read, outside of a loop.
    breaks(
        &sm90(|k| {
            let x = k.reg::<f32>();
            use_(k, x);
            x.set(1.0);
        }),
        Rule::Undefined,
        &["f32"],
    );
    // In the other branch.
    breaks(
        &sm90(|k| {
            let (p, x) = (k.var(true), k.reg::<f32>());
            k.if_else(p, || x.set(1.0), || use_(k, x));
        }),
        Rule::Undefined,
        &["f32"],
    );
    // A predicate, a guard.
    breaks(&sm90(|k| k.if_(k.reg(), || {})), Rule::Undefined, &["pred"]);
    breaks(
        &sm90(|k| {
            k.when(k.reg(), || {
                k.var(1f32);
            })
        }),
        Rule::Undefined,
        &["pred"],
    );
    passes(&sm90(|k| {
        let (p, x, y) = (k.var(true), k.reg::<f32>(), k.reg::<f32>());
        k.if_(p, || x.set(1.0));
        use_(k, x);
        k.loop_(|| {
            k.break_if(p);
            k.if_(p, || use_(k, y)); // carried around the loop
            y.set(1.0);
        });
        use_(k, y);
    }));
}

#[test]
fn what_is_the_same_in_a_warp() {
    // A shuffle (all lanes must come) under a condition.
    let under = |threads: u32, condition: &dyn for<'k> Fn(&'k Builder) -> Reg<'k, bool>| {
        build("k", Target::Sm90a, threads, |k| {
            let p = condition(k);
            k.if_(p, || {
                k.var(1u32).shfl_bfly(1);
            });
        })
    };
    type Condition = for<'k> fn(&'k Builder) -> Reg<'k, bool>;
    let uniform: [Condition; 15] = [
        |k| k.ctaid(0).lt(3),
        |k| k.param_u32("n").eq(0),
        |k| (k.tid(0) >> 5).eq(0),
        |k| (k.tid(0) / 64).eq(0),
        |k| (k.tid(0) & 0xffff_ffe0).eq(0),
        |k| k.tid(0).lt(64),
        |k| k.tid(0).ge(64),
        |k| k.tid(0).le(31),
        |k| k.tid(0).gt(31),
        |k| k.tid(1).eq(0),
        |k| k.warp().eq(1),
        |k| k.lane().shfl_idx(0).eq(3),
        |k| k.lane().eq(0).any(),
        |k| k.shared("a", 4, 4).load::<u32>().eq(0),
        |k| k.lane().eq(0).ballot().bits::<u32>().eq(1) & k.ctaid(1).eq(0),
    ];
    for condition in uniform {
        passes(&under(128, &condition));
    }
    let varying: [Condition; 11] = [
        |k| k.tid(0).eq(0),
        |k| k.tid(0).lt(65),
        |k| (k.tid(0) >> 4).eq(0),
        |k| (k.tid(0) & 31).eq(0),
        |k| k.lane().lt(16),
        |k| k.elect(),
        |k| k.lane().shfl_bfly(16).eq(0),
        |k| (k.shared("a", 128, 4) + k.lane() * 4).load::<u32>().eq(0),
        |k| k.param_ptr("p").address().atom(AtomOp::Add, 1u32, Order::Relaxed).eq(0),
        |k| (k.ctaid(0) + k.lane()).eq(0),
        |k| {
            let x = k.var(0u32);
            k.when(k.lane().eq(0), || x.set(1));
            x.eq(1)
        },
    ];
    for condition in varying {
        breaks(&under(128, &condition), Rule::Uniform, &["shfl.sync.bfly.b32", "in the branch at"]);
    }
    // A block that is no line of whole warps: tid.x >> 5 says nothing.
    let mut kernel = under(128, &|k| (k.tid(0) >> 5).eq(0));
    kernel.block = [48, 2, 1];
    breaks(&kernel, Rule::Uniform, &["shfl"]);
    kernel.block = [64, 2, 1];
    passes(&kernel);
}

#[test]
fn lanes_part_in_loops_and_under_guards() {
    let every: [fn(&Builder); 7] = [
        |k| k.sync_threads(),
        |k| k.bar_arrive(1, 64),
        |k| k.sync_warp(),
        |k| k.wgmma_fence(),
        |k| k.raise_registers(240),
        |k| {
            k.var(true).any();
        },
        |k| {
            k.elect();
        },
    ];
    for together in every {
        passes(&sm90(together));
        passes(&sm90(|k| k.when(k.ctaid(0).eq(0), || together(k))));
        breaks(&sm90(|k| k.if_(k.lane().eq(0), || together(k))), Rule::Uniform, &["in the branch"]);
    }
    breaks(&sm90(|k| k.when(k.lane().eq(0), || k.sync_threads())), Rule::Uniform, &["under the guard"]);
    // A loop whose lanes leave at different rounds, by its own condition or by the branch around its exit.
    let uneven = |k: &Builder| {
        k.loop_(|| {
            k.sync_warp();
            k.break_if(k.lane().eq(0));
        });
    };
    breaks(&sm90(uneven), Rule::Uniform, &["bar.warp.sync", "different rounds"]);
    let nested = |k: &Builder| {
        let p = k.var(true);
        k.loop_(|| {
            k.sync_warp();
            k.if_(k.lane().eq(0), || k.break_if(p));
        });
    };
    breaks(&sm90(nested), Rule::Uniform, &["different rounds"]);
    // A value counted in such a loop is not the same after it; all lanes are there again after it.
    let counted = |together: bool| {
        sm90(move |k| {
            let i = k.var(0u32);
            k.loop_(|| {
                k.break_if(i.ge(k.lane()));
                i.set(i + 1);
            });
            match together {
                true => k.sync_warp(),
                false => k.if_(i.eq(3), || k.sync_warp()),
            }
        })
    };
    passes(&counted(true));
    breaks(&counted(false), Rule::Uniform, &["in the branch"]);
    // A loop of the same number of rounds for all.
    passes(&sm90(|k| k.for_(0, k.param_u32("n"), 1, |_| k.sync_threads())));
}

#[test]
fn special_registers_do_not_part_warps_by_accident() {
    // Every special register has a kind: the cluster's rank is the same for a block, the clock is not for a warp.
    let under = |register| {
        sm90(|k| {
            let p = k.special(register).eq(0);
            k.if_(p, || k.sync_threads());
        })
    };
    for register in [SpecialRegister::ClusterCtarank, SpecialRegister::Smid, SpecialRegister::Nctaid(0)] {
        passes(&under(register));
    }
    breaks(&under(SpecialRegister::Laneid), Rule::Uniform, &["bar.sync"]);
}
