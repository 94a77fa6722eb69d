//! `cp.async` and bulk copies without a tensor map.

use super::*;
use crate::instr;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Wrong {
    Nothing,
    NoWait,
    WaitTooFew,
    NoBarrier,
    TooEarly,
}

/// Two groups of copies of 16 bytes a lane, of which lane 3 asks for 4 only.
fn staged(wrong: Wrong) -> Kernel {
    kernel(64, |k| {
        let (x, out) = (k.param_ptr("x"), k.param_ptr("out"));
        let tile = k.shared("tile", 2048, 128);
        let tid = k.tid(0);
        for stage in 0..2 {
            let valid = (k.lane().eq(3u32)).select(4u32, 16u32);
            let from = x + (tid * 16).to_u64();
            k.cp_async(tile.at(1024 * stage) + tid * 16, from.address().at(1024 * stage), 16, valid);
            k.cp_async_commit();
        }
        for stage in 0..2u32 {
            match wrong {
                Wrong::NoWait => {}
                Wrong::WaitTooFew => k.cp_async_wait(1),
                _ => k.cp_async_wait(1 - stage as u8),
            }
            if wrong == Wrong::TooEarly && stage == 0 {
                // The second group's place.
                (tile.at(1024) + tid * 16).store(tid);
            }
            if wrong != Wrong::NoBarrier {
                k.sync_threads();
            }
            let other = (tile.at(1024 * stage as i32) + (tid ^ 63) * 16).load_vec::<u32, 4>();
            (out + (tid * 16).to_u64()).address().at(1024 * stage as i32).store_vec(other);
        }
    })
}

#[test]
fn copies_in_groups() {
    let x: Vec<u32> = (1..=512).collect();
    let (values, report) = run(&staged(Wrong::Nothing), 1, &[x], 512).unwrap();
    for (i, value) in values.into_iter().enumerate() {
        let (stage, thread, j) = (i / 256, (i / 4 % 64) ^ 63, i % 4);
        let expected = if thread % 32 == 3 && j > 0 { 0 } else { 256 * stage + 4 * thread + j + 1 };
        assert_eq!(value as usize, expected, "{stage} {thread} {j}");
    }
    assert_eq!(report.buffers["in0"].read, 2 * (62 * 16 + 2 * 4));
    assert_eq!(report.warnings, Vec::<String>::new());
    for wrong in [Wrong::NoWait, Wrong::WaitTooFew, Wrong::NoBarrier, Wrong::TooEarly] {
        let error =
            run(&staged(wrong), 1, &[(1..=512).collect()], 512).err().unwrap_or_else(|| panic!("{wrong:?}"));
        assert!(matches!(error, Error::Race { .. } | Error::Uninitialised { .. }), "{wrong:?}: {error}");
    }
}

#[test]
fn an_mbarrier_can_wait_for_copies() {
    let make = |wait: bool| {
        kernel(64, |k| {
            let (x, out) = (k.param_ptr("x"), k.param_ptr("out"));
            let tile = k.shared("tile", 256, 128);
            let full = k.mbarriers("full", 1)[0];
            let tid = k.tid(0);
            k.if_(tid.eq(0u32), || full.init(k, 64));
            k.sync_threads();
            k.cp_async(tile + tid * 4, (x + (tid * 4).to_u64()).address(), 4, 4u32);
            k.push(instr::CP_ASYNC_MBARRIER, &[], &[full.0.operand()]);
            if wait {
                full.wait(k, 0u32);
            }
            (out + (tid * 4).to_u64()).address().store((tile + (tid ^ 32) * 4).load::<u32>());
        })
    };
    let x: Vec<u32> = (5..69).collect();
    let (values, _) = run(&make(true), 1, std::slice::from_ref(&x), 64).unwrap();
    assert_eq!(values, (0..64).map(|t| x[t ^ 32]).collect::<Vec<_>>());
    let error = run(&make(false), 1, &[x], 64).unwrap_err();
    assert!(matches!(error, Error::Race { .. } | Error::Uninitialised { .. }), "{error}");
}

#[test]
fn copies_left_alone_are_warned_of() {
    let k = kernel(32, |k| {
        let (x, _) = (k.param_ptr("x"), k.param_ptr("out").address().store(k.var(1u32)));
        let tile = k.shared("tile", 128, 128);
        k.cp_async(tile + k.lane() * 4, (x + (k.lane() * 4).to_u64()).address(), 4, 4u32);
    });
    let (_, report) = run(&k, 1, &[vec![0; 32]], 1).unwrap();
    assert!(report.warnings.len() == 1 && report.warnings[0].contains("copies.rs"), "{:?}", report.warnings);
}

/// Loads 512 bytes, doubles them, stores or adds them.
fn bulk(add: bool, fence: bool) -> Kernel {
    kernel(32, |k| {
        let (x, out) = (k.param_ptr("x"), k.param_ptr("out"));
        let tile = k.shared("tile", 512, 128);
        let full = k.mbarriers("full", 1)[0];
        let lane = k.lane();
        k.if_(lane.eq(0u32), || {
            full.init(k, 1);
            k.fence_mbarrier_init();
            full.arrive_expect_tx(k, 512u32);
            k.bulk_load(tile, x, 512u32, full);
        });
        k.sync_warp();
        full.wait(k, 0u32);
        for i in 0..4 {
            let at = (tile + lane * 4).at(128 * i);
            at.store(at.load::<f32>() * 2.0);
        }
        if fence {
            k.fence_proxy_async();
        }
        k.sync_warp();
        k.if_(lane.eq(0u32), || {
            if add {
                k.bulk_reduce_add_f32(out, tile, 512u32);
                k.bulk_reduce_add_f32(out, tile, 256u32);
            } else {
                k.bulk_store(out, tile, 512u32);
            }
            k.bulk_commit();
            k.bulk_wait(0, false);
        });
    })
}

#[test]
fn bulk_copies() {
    let x: Vec<f32> = (0..128).map(|i| i as f32).collect();
    let (values, report) = run(&bulk(false, true), 1, &[floats(&x)], 128).unwrap();
    assert_eq!(values, floats(&x.iter().map(|x| 2.0 * x).collect::<Vec<_>>()));
    assert_eq!((report.buffers["in0"].read, report.buffers["out"].written), (512, 512));
    let k = bulk(true, true);
    let mut memory = Memory::new();
    let (from, to) = (memory.upload("x", &x), memory.upload("out", &[1f32; 128]));
    emulate(&k, &mut memory, &launch(&k, 1, vec![Arg::Buffer(from, 0), Arg::Buffer(to, 0)])).unwrap();
    let expected: Vec<f32> = x.iter().map(|x| 1.0 + if *x < 64.0 { 4.0 } else { 2.0 } * x).collect();
    assert_eq!(memory.read::<f32>(to).unwrap(), expected);
    let error = run(&bulk(false, false), 1, &[floats(&x)], 128).unwrap_err();
    assert!(matches!(error, Error::MissingProxyFence { .. }), "{error}");
}

/// Blocks add to one place, and the last to have done so reads the sum.
#[test]
fn blocks_may_add_to_one_place() {
    let make = |wait_for_writes: bool| {
        kernel(32, |k| {
            let (out, counter, result) = (k.param_ptr("out"), k.param_ptr("counter"), k.param_ptr("result"));
            let tile = k.shared("tile", 128, 128);
            (tile + k.lane() * 4).store(k.var(1f32));
            k.fence_proxy_async();
            k.sync_warp();
            k.if_(k.lane().eq(0u32), || {
                k.bulk_reduce_add_f32(out, tile, 128u32);
                k.bulk_commit();
                k.bulk_wait(0, !wait_for_writes);
                let before = counter.address().atom(instr::AtomOp::Add, 1u32, instr::Order::AcqRel);
                k.if_(before.eq(k.nctaid(0) - 1), || result.address().store(out.address().load::<f32>()));
            });
        })
    };
    for seed in 0..SEEDS {
        let go = |wait: bool| {
            let k = make(wait);
            let mut memory = Memory::new();
            let args = [("out", 32), ("counter", 1), ("result", 1)]
                .map(|(name, words)| Arg::Buffer(memory.upload(name, &vec![0u32; words]), 0));
            let Arg::Buffer(result, _) = args[2] else { unreachable!() };
            emulate(&k, &mut memory, &Launch { seed, ..launch(&k, 5, args.to_vec()) })?;
            memory.read::<f32>(result)
        };
        assert_eq!(go(true), Ok(vec![5.0]));
        let error = go(false).unwrap_err();
        assert!(matches!(error, Error::Race { access: "read", .. }), "{error}");
    }
}
