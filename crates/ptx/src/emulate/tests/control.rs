//! Lanes, branches, loops, shuffles, votes.

use super::*;
use crate::instr::{self, Operand, SpecialRegister};
use crate::types::Type;

#[test]
fn axpy_with_a_tail() {
    let k = kernel(64, |k| {
        let (x, y, n) = (k.param_ptr("x"), k.param_ptr("y"), k.param_u32("n"));
        let i = k.ctaid(0) * 64 + k.tid(0);
        k.if_(i.lt(n), || {
            let offset = i.to_u64() * 4;
            let at = (y + offset).address();
            at.store((x + offset).address().load::<f32>().fma(2.0, at.load::<f32>()));
        });
    });
    let n = 1000;
    let mut memory = Memory::new();
    let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let (a, b) = (memory.upload("x", &x), memory.upload("y", &vec![1f32; n]));
    let args = vec![Arg::Buffer(a, 0), Arg::Buffer(b, 0), Arg::U32(n as u32)];
    let report = emulate(&k, &mut memory, &launch(&k, 16, args)).unwrap();
    let y: Vec<f32> = memory.read(b).unwrap();
    assert!(y.iter().enumerate().all(|(i, &y)| y == 2.0 * i as f32 + 1.0));
    assert_eq!((report.buffers["x"].read, report.buffers["x"].written), (4 * n as u64, 0));
    assert_eq!((report.buffers["y"].read, report.buffers["y"].written), (4 * n as u64, 4 * n as u64));
    assert_eq!(report.instructions[&instr::Class::Global], 3 * 32);
}

/// Collatz: every lane loops its own number of times, with a branch in the loop and a second way out.
#[test]
fn lanes_diverge_and_come_back() {
    let k = kernel(96, |k| {
        let out = k.param_ptr("out");
        let tid = k.tid(0);
        let n = k.var(tid + 1);
        let steps = k.var(0u32);
        k.loop_(|| {
            k.break_if(n.eq(1u32));
            k.if_else(
                (n & 1).eq(0u32),
                || n.set(n >> 1),
                || {
                    // Out of the loop from within a branch.
                    k.break_if(n.eq(27u32));
                    n.set(n * 3 + 1);
                },
            );
            steps.set(steps + 1);
        });
        let all = k.var(true).ballot();
        (out + tid.to_u64() * 4)
            .address()
            .store(steps * 2 + k.result::<u32>(instr::POPC_B32, &[operand(all)]));
    });
    let expected: Vec<u32> = (1..=96u32)
        .map(|mut n| {
            let mut steps = 0;
            while n != 1 && n != 27 {
                n = if n % 2 == 0 { n / 2 } else { 3 * n + 1 };
                steps += 1;
            }
            steps * 2 + 32
        })
        .collect();
    assert_eq!(run(&k, 1, &[], 96).unwrap().0, expected);
}

fn operand<'k, T: crate::types::Scalar>(reg: crate::Reg<'k, T>) -> Operand {
    crate::build::Value::operand(reg)
}

#[test]
fn nested_branches() {
    let k = kernel(32, |k| {
        let out = k.param_ptr("out");
        let lane = k.lane();
        let value = k.var(0u32);
        k.if_else(
            lane.lt(20u32),
            || {
                k.if_(lane.ge(10u32), || value.set(value + 1));
                value.set(value + 10);
            },
            || k.if_else(lane.eq(31u32), || value.set(7u32), || value.set(8u32)),
        );
        k.when(lane.eq(0u32), || value.set(99u32));
        (out + lane.to_u64() * 4).address().store(value);
    });
    let expected: Vec<u32> = (0..32)
        .map(|lane| match lane {
            0 => 99,
            1..10 => 10,
            10..20 => 11,
            31 => 7,
            _ => 8,
        })
        .collect();
    assert_eq!(run(&k, 1, &[], 32).unwrap().0, expected);
}

#[test]
fn shuffles_votes_and_reductions() {
    let k = kernel(32, |k| {
        let out = k.param_ptr("out");
        let lane = k.lane();
        let squares = lane * lane;
        let odd = (lane & 1).eq(1u32);
        let values = [
            squares.shfl_bfly(5),
            squares.shfl_up(3),
            squares.shfl_down(30),
            squares.shfl_idx(17u32),
            odd.ballot().bits::<u32>(),
            odd.any().select(1u32, 0u32),
            odd.all().select(1u32, 0u32),
            k.result::<u32>(instr::redux(instr::AtomOp::Add), &[operand(lane), ALL]),
            k.elect().select(1u32, 0u32),
        ];
        for (i, value) in values.into_iter().enumerate() {
            (out + (lane * 9 + i as u32).to_u64() * 4).address().store(value);
        }
    });
    let expected: Vec<u32> = (0..32u32)
        .flat_map(|lane| {
            let up = if lane >= 3 { lane - 3 } else { lane };
            let down = if lane < 2 { lane + 30 } else { lane };
            let bfly = lane ^ 5;
            [bfly * bfly, up * up, down * down, 289, 0xaaaa_aaaa, 1, 0, 496, (lane == 0) as u32]
        })
        .collect();
    assert_eq!(run(&k, 1, &[], 288).unwrap().0, expected);
}

const ALL: Operand = Operand::Imm(u32::MAX as u64, Type::B32);

#[test]
fn special_registers_of_three_dimensions() {
    let mut k = kernel(64, |k| {
        let out = k.param_ptr("out");
        let [x, y, z] = [0, 1, 2].map(|d| k.tid(d));
        let [bx, by, bz] = [0, 1, 2].map(|d| k.ctaid(d));
        let thread = x + y * 4 + z * 8;
        let block = bx + by * k.nctaid(0) + bz * k.nctaid(0) * k.nctaid(1);
        let size = k.special(SpecialRegister::Ntid(1));
        (out + (block * 64 + thread).to_u64() * 4).address().store(block * 1000 + thread * 10 + size);
    });
    k.block = [4, 2, 8];
    let mut memory = Memory::new();
    let out = buffer(&mut memory, 6 * 64);
    let l = Launch { grid: [3, 1, 2], ..launch(&k, 1, vec![Arg::Buffer(out, 0)]) };
    emulate(&k, &mut memory, &l).unwrap();
    let expected: Vec<u32> = (0..6).flat_map(|b| (0..64).map(move |t| b * 1000 + t * 10 + 2)).collect();
    assert_eq!(memory.read::<u32>(out).unwrap(), expected);
}

#[test]
fn a_partial_warp_is_whole() {
    let k = kernel(40, |k| {
        let out = k.param_ptr("out");
        let mask = k.var(true).ballot();
        let count = k.result::<u32>(instr::POPC_B32, &[operand(mask)]);
        (out + k.tid(0).to_u64() * 4).address().store(count);
    });
    let expected: Vec<u32> = (0..40).map(|t| if t < 32 { 32 } else { 8 }).collect();
    assert_eq!(run(&k, 1, &[], 40).unwrap().0, expected);
}

#[test]
fn shuffles_need_their_lanes() {
    let k = kernel(32, |k| {
        let lane = k.lane();
        k.if_(lane.lt(16u32), || {
            lane.shfl_bfly(1);
        });
    });
    assert!(matches!(refused(&k, 1, 1), Error::DivergentAligned { active: 0xffff, needed: u32::MAX, .. }));
}

#[test]
fn registers_are_written_before_they_are_read() {
    let k = kernel(32, |k| {
        let value = k.reg::<u32>();
        let lane = k.lane();
        k.if_(lane.lt(5u32), || value.set(1u32));
        k.if_(lane.lt(5u32), || value.set(value + 1)); // right
        let _ = value + 1;
    });
    match refused(&k, 1, 1) {
        Error::Uninitialised { at, what } => {
            assert_eq!(at.lane, Some(5));
            assert!(what.contains("u32") && what.contains("control.rs"), "{what}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_trap_ends_the_launch() {
    let k = kernel(32, |k| k.if_(k.lane().eq(9u32), || k.push(instr::TRAP, &[], &[])));
    let error = refused(&k, 1, 1);
    assert!(matches!(error, Error::Trap { .. }) && line(&error) == line!() - 2, "{error}");
}

#[test]
fn spinning_ends() {
    let k = kernel(1, |k| k.loop_(|| k.break_if(k.var(false))));
    let error = emulate(&k, &mut Memory::new(), &launch(&k, 1, vec![])).unwrap_err();
    assert!(
        matches!(error, Error::Budget { instructions: crate::emulate::INSTRUCTION_BUDGET, .. }),
        "{error}"
    );
}

/// By powers of two they are shifts and masks: ptxas makes no difference between these and other divisors.
#[test]
fn divisions_by_constants() {
    const DIVISORS: [u32; 6] = [1, 2, 7, 128, 1000, 1 << 31];
    let k = kernel(32, |k| {
        let out = k.param_ptr("out");
        let lane = k.tid(0);
        let n = (lane * 0x1234_5677) ^ (lane << 27);
        let at = (out + (lane * (8 * DIVISORS.len() as u32)).to_u64()).address();
        for (i, d) in DIVISORS.into_iter().enumerate() {
            at.at(8 * i as i32).store_vec([n / d, n % d]);
        }
    });
    let (words, _) = run(&k, 1, &[], 32 * 2 * DIVISORS.len()).unwrap();
    let expected = (0..32u32).flat_map(|lane| {
        let n = lane.wrapping_mul(0x1234_5677) ^ (lane << 27);
        DIVISORS.into_iter().flat_map(move |d| [n / d, n % d])
    });
    assert_eq!(words, expected.collect::<Vec<_>>());
    let text = crate::emit(&k);
    assert_eq!([text.matches("div.u32").count(), text.matches("rem.u32").count()], [2, 2], "{text}");
}
