//! Global memory: bounds, order between blocks, atomics, the L2 model.

use super::*;
use crate::instr::{AtomOp, Cache, Order};

#[test]
fn accesses_are_in_bounds_aligned_and_written_before() {
    let stored = std::cell::Cell::new(0);
    let make = |offset: i32, store: bool| {
        kernel(32, |k| {
            let at = k.param_ptr("out").address().at(offset);
            stored.set(line!() + 1);
            if store { at.store(k.var(1u32)) } else { drop_value(at.load::<u32>()) }
        })
    };
    match refused(&make(64, true), 1, 16) {
        Error::OutOfBounds { at, bytes: 4, what, .. } => {
            assert_eq!((at.warp, at.lane), (0, Some(0)));
            assert!(what.contains("byte 64") && what.contains("buffer out, which has 64 bytes"), "{what}");
        }
        other => panic!("{other}"),
    }
    assert!(matches!(refused(&make(-4, true), 1, 16), Error::OutOfBounds { .. }));
    let error = refused(&make(2, true), 1, 16);
    assert!(
        matches!(error, Error::Misaligned { alignment: 4, .. }) && line(&error) == stored.get(),
        "{error}"
    );
    assert!(matches!(refused(&make(0, false), 1, 16), Error::Uninitialised { .. }));
}

fn drop_value<T>(_: crate::Reg<'_, T>) {}

#[test]
fn blocks_that_write_one_place_race() {
    let make = |apart: bool| {
        kernel(32, |k| {
            let (out, block) = (k.param_ptr("out"), k.ctaid(0));
            let index = if apart { block * 32 + k.lane() } else { k.lane() };
            (out + index.to_u64() * 4).address().store(block);
        })
    };
    assert!(run(&make(true), 8, &[], 256).is_ok());
    match refused(&make(false), 8, 32) {
        Error::Race { access: "write", other_access: "write", what, .. } => {
            assert!(what.contains("buffer out"), "{what}")
        }
        other => panic!("{other}"),
    }
}

#[test]
fn halves_of_a_word_belong_to_blocks_apart() {
    let k = kernel(32, |k| {
        let (out, block) = (k.param_ptr("out"), k.ctaid(0));
        k.if_(k.lane().eq(0u32), || (out + block.to_u64() * 2).address().store(block.to_u16()));
    });
    assert_eq!(run(&k, 6, &[], 3).unwrap().0, [1 << 16, 3 << 16 | 2, 5 << 16 | 4]);
}

/// The last block to arrive adds up what all have written.
fn last_block(arrive: Option<Order>, fences: bool, own_only: bool) -> Kernel {
    kernel(32, |k| {
        let (counter, parts, out) = (k.param_ptr("counter"), k.param_ptr("parts"), k.param_ptr("out"));
        let (block, blocks, lane) = (k.ctaid(0), k.nctaid(0), k.lane());
        k.if_(lane.eq(0u32), || {
            (parts + block.to_u64() * 4).address().store(block + 1);
            if fences {
                k.push(crate::instr::FENCE_ACQ_REL, &[], &[]);
            }
            let before = counter.address().atom(AtomOp::Add, 1u32, arrive.unwrap_or(Order::Relaxed));
            if fences {
                k.push(crate::instr::FENCE_ACQ_REL, &[], &[]);
            }
            k.if_(before.eq(blocks - 1), || {
                let sum = k.var(0u32);
                let end = if own_only { k.var(0u32) } else { blocks };
                k.for_(0u32, end, 1u32, |i| sum.set(sum + (parts + i.to_u64() * 4).address().load::<u32>()));
                out.address().store(sum);
            });
        });
    })
}

fn run_last(k: &Kernel, seed: u64, resident: u32) -> Result<u32, Error> {
    let mut memory = Memory::new();
    let counter = memory.upload("counter", &[0u32]);
    let (parts, out) = (memory.alloc("parts", 4 * 9), memory.alloc("out", 4));
    let args = vec![Arg::Buffer(counter, 0), Arg::Buffer(parts, 0), Arg::Buffer(out, 0)];
    emulate(k, &mut memory, &Launch { seed, resident, ..launch(k, 9, args) })?;
    Ok(memory.read::<u32>(out)?[0])
}

#[test]
fn release_and_acquire_order_blocks() {
    for seed in 0..SEEDS {
        for resident in [1, 4] {
            assert_eq!(run_last(&last_block(Some(Order::AcqRel), false, false), seed, resident), Ok(45));
            assert_eq!(run_last(&last_block(None, true, false), seed, resident), Ok(45));
            assert_eq!(run_last(&last_block(None, false, true), seed, resident), Ok(0));
            let error = run_last(&last_block(None, false, false), seed, resident).unwrap_err();
            assert!(matches!(error, Error::Race { access: "read", other_access: "write", .. }), "{error}");
        }
    }
}

#[test]
fn blocks_can_wait_for_each_other_when_resident() {
    // Block b waits for block b + 1's flag.
    let k = kernel(32, |k| {
        let (flags, data) = (k.param_ptr("flags"), k.param_ptr("data"));
        let (block, blocks) = (k.ctaid(0), k.nctaid(0));
        k.if_(k.lane().eq(0u32), || {
            let value = k.var(block);
            k.if_((block + 1).lt(blocks), || {
                let flag = (flags + (block + 1).to_u64() * 4).address();
                k.loop_(|| {
                    let [seen] = flag.load_as::<u32, 1>(Order::Acquire, Cache::Default);
                    k.break_if(seen.ne(0u32));
                });
                value.set(value + (data + (block + 1).to_u64() * 4).address().load::<u32>());
            });
            (data + block.to_u64() * 4).address().store(value);
            (flags + block.to_u64() * 4).address().store_as([k.var(1u32)], Order::Release);
        });
    });
    let mut memory = Memory::new();
    let (flags, data) = (memory.upload("flags", &[0u32; 6]), memory.alloc("data", 24));
    let args = vec![Arg::Buffer(flags, 0), Arg::Buffer(data, 0)];
    emulate(&k, &mut memory, &Launch { resident: 6, ..launch(&k, 6, args) }).unwrap();
    assert_eq!(memory.read::<u32>(data).unwrap(), [15, 15, 14, 12, 9, 5]);
}

#[test]
fn atomics_of_many_blocks() {
    let k = kernel(64, |k| {
        let out = k.param_ptr("out");
        let thread = k.ctaid(0) * 64 + k.tid(0);
        out.address().red_add(k.var(0.5f32));
        out.address().at(4).atom(AtomOp::Max, thread * 3, Order::Relaxed);
        let ticket = out.address().at(8).atom(AtomOp::Inc, 99u32, Order::Relaxed);
        out.address().at(12).atom(AtomOp::Min, thread + 7, Order::Relaxed);
        out.address().at(16).red_add(ticket);
    });
    let mut memory = Memory::new();
    let out = memory.upload("out", &[0u32, 0, 0, 1000, 0]);
    let report = emulate(&k, &mut memory, &launch(&k, 50, vec![Arg::Buffer(out, 0)])).unwrap();
    let values: Vec<u32> = memory.read(out).unwrap();
    assert_eq!(values, [1600f32.to_bits(), 3199 * 3, 0, 7, 32 * 4950]);
    let traffic = report.buffers["out"];
    assert_eq!((traffic.read, traffic.written), (5 * 4 * 3200, 5 * 4 * 3200));
}

#[test]
fn sums_of_64_bits_carry_and_have_signs() {
    let k = kernel(64, |k| {
        let out = k.param_ptr("out");
        let thread = k.ctaid(0) * 64 + k.tid(0);
        let minus = k.var(0u64) - thread.mul_wide(0xffff_fff1u32);
        out.address().red_add(minus);
        out.address().at(8).red_add(thread.to_u64() << 31);
    });
    let mut memory = Memory::new();
    let out = memory.upload("out", &[5i64, -7]);
    emulate(&k, &mut memory, &launch(&k, 50, vec![Arg::Buffer(out, 0)])).unwrap();
    let threads = 3199 * 3200 / 2;
    assert_eq!(memory.read::<i64>(out).unwrap(), [5 - threads * 0xffff_fff1, (threads << 31) - 7]);
}

#[test]
fn the_l2_model_counts_what_it_does_not_have() {
    // Every block reads all of x, and writes 128 bytes of its own.
    let k = kernel(32, |k| {
        let (x, out) = (k.param_ptr("x"), k.param_ptr("out"));
        let sum = k.var(0u32);
        k.for_(k.lane(), 1024u32, 32u32, |i| sum.set(sum + (x + i.to_u64() * 4).address().load::<u32>()));
        (out + (k.ctaid(0) * 32 + k.lane()).to_u64() * 4).address().store(sum);
    });
    let go = |l2: u64, resident: u32| {
        let mut memory = Memory::new();
        let (x, out) = (memory.upload("x", &[1u32; 1024]), memory.alloc("out", 128 * 10));
        let args = vec![Arg::Buffer(x, 0), Arg::Buffer(out, 0)];
        let l = Launch { l2: Some(l2), resident, ..launch(&k, 10, args) };
        let report = emulate(&k, &mut memory, &l).unwrap();
        assert_eq!(memory.read::<u32>(out).unwrap(), [32; 320]);
        assert_eq!((report.buffers["x"].read, report.buffers["out"].written), (40_960, 1280));
        assert_eq!(report.buffers["out"].written_back, 1280);
        (report.buffers["x"].read_missed, report)
    };
    assert_eq!(go(1 << 20, 1).0, 4096);
    assert_eq!(go(1 << 20, 4).0, 4096);
    // A cache of half of x, read from begin to end again and again, never has what is next.
    assert_eq!(go(2048, 1).0, 40_960);
    assert_eq!(go(2048, 1).1, go(2048, 1).1);
}
