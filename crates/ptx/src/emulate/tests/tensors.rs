//! TMA and mbarriers.

use super::*;
use crate::kernel::{Swizzle, TensorElement, TensorMap, TensorMapError};

/// What is done wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wrong {
    Nothing,
    NoWait,
    OtherParity,
    NoInit,
    NoInitFence,
    NoBarrier,
    TooFewBytes,
    TooManyBytes,
    TwoArrivals,
    WriteWithoutFence,
    WriteWithoutBarrier,
    Touch,
    TwoDimensions,
    OffTile,
    TwoCopies,
}

fn map(swizzle: Swizzle) -> TensorMap {
    let tile = vec![if swizzle == Swizzle::None { 8 } else { swizzle.span() / 2 }, 16, 2];
    TensorMap {
        element: TensorElement::BF16,
        shape: vec![100, 21, 3],
        strides: vec![208, 208 * 23],
        tile,
        swizzle,
    }
}

/// Loads a box at (x, y, z) and copies shared memory as it is to `out`.
fn load(map: &TensorMap, wrong: Wrong) -> Kernel {
    let bytes = map.tile_bytes();
    kernel(64, |k| {
        let (tensor, out) = (k.param_tensor_map("map"), k.param_ptr("out"));
        let at = [k.param_s32("x"), k.param_s32("y"), k.param_s32("z")];
        let tile = k.shared("tile", bytes + 128, 1024);
        let full = k.mbarriers("full", 1)[0];
        let tid = k.tid(0);
        if matches!(wrong, Wrong::WriteWithoutFence | Wrong::WriteWithoutBarrier) {
            k.if_(tid.ge(32u32), || (tile + (tid & 31) * 4).store(tid));
            if wrong == Wrong::WriteWithoutBarrier {
                k.if_(tid.ge(32u32), || k.fence_proxy_async());
            }
        }
        let init = || {
            if wrong != Wrong::NoInit {
                full.init(k, 1);
            }
            if wrong != Wrong::NoInitFence {
                k.fence_mbarrier_init();
            }
        };
        let issue = || {
            let expected = match wrong {
                Wrong::TooFewBytes => bytes - 16,
                Wrong::TooManyBytes => bytes + 16,
                Wrong::TwoCopies => 2 * bytes,
                _ => bytes,
            };
            full.arrive_expect_tx(k, expected);
            if wrong == Wrong::TwoArrivals {
                full.arrive(k);
            }
            let at = if wrong == Wrong::TwoDimensions { &at[..2] } else { &at[..] };
            let to = if wrong == Wrong::OffTile { tile.at(64) } else { tile };
            k.tma_load(to, tensor, at, full);
            if wrong == Wrong::TwoCopies {
                k.tma_load(to, tensor, at, full);
            }
        };
        if matches!(wrong, Wrong::NoBarrier | Wrong::WriteWithoutBarrier) {
            k.if_(tid.eq(0u32), || {
                init();
                issue();
            });
            if wrong == Wrong::WriteWithoutBarrier {
                k.sync_threads();
            }
        } else {
            k.if_(tid.eq(0u32), init);
            k.sync_threads();
            k.if_(tid.eq(0u32), issue);
        }
        match wrong {
            Wrong::NoWait => {}
            Wrong::OtherParity => full.wait(k, 1u32),
            _ => full.wait(k, 0u32),
        }
        if wrong == Wrong::Touch {
            full.0.load::<u32>();
        }
        k.for_(tid, bytes / 4, 64u32, |i| {
            (out + i.to_u64() * 4).address().store((tile + i * 4).load::<u32>());
        });
    })
}

fn tensor(memory: &mut Memory) -> Buffer {
    let data: Vec<u16> = (0..104 * 23 * 3).map(|i| i as u16 + 1).collect();
    memory.upload("tensor", &data)
}

fn run_load(map: &TensorMap, wrong: Wrong, seed: u64, at: [i32; 3]) -> Result<(Vec<u16>, Report), Error> {
    let k = load(map, wrong);
    let mut memory = Memory::new();
    let tensor = tensor(&mut memory);
    let out = memory.alloc("out", map.tile_bytes() as usize);
    let mut args = vec![Arg::TensorMap(map.clone(), tensor, 0), Arg::Buffer(out, 0)];
    args.extend(at.map(Arg::S32));
    let report = emulate(&k, &mut memory, &Launch { seed, ..launch(&k, 1, args) })?;
    Ok((memory.read(out)?, report))
}

/// The box as it must lie in shared memory, and the bytes of it that are inside the tensor.
fn expected(map: &TensorMap, at: [i32; 3]) -> (Vec<u16>, u64) {
    let mut image = vec![0; map.tile_bytes() as usize / 2];
    let mut inside = 0;
    let [bx, by, bz] = [0, 1, 2].map(|d| map.tile[d] as i32);
    for z in 0..bz {
        for y in 0..by {
            for x in 0..bx {
                let [gx, gy, gz] = [x + at[0], y + at[1], z + at[2]];
                let dense = 2 * ((z * by + y) * bx + x) as u32;
                let within =
                    [gx, gy, gz].iter().zip(&map.shape).all(|(&g, &size)| g >= 0 && (g as u64) < size);
                let element = (gx + 104 * (gy + 23 * gz) + 1) as u16;
                image[map.swizzle.apply(dense) as usize / 2] = if within { element } else { 0 };
                inside += 2 * within as u64;
            }
        }
    }
    (image, inside)
}

#[test]
fn boxes_come_swizzled_and_filled_with_zeros() {
    for swizzle in [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128] {
        let map = map(swizzle);
        for at in [[0, 0, 0], [64, 16, 2], [-5, -3, 1], [97, 20, -1], [200, 0, 0]] {
            for seed in 0..3 {
                let (image, report) = run_load(&map, Wrong::Nothing, seed, at).unwrap();
                let (wanted, inside) = expected(&map, at);
                assert_eq!(image, wanted, "{swizzle:?} {at:?}");
                assert_eq!(report.buffers["tensor"].read, inside);
            }
        }
    }
}

#[test]
fn loads_done_wrong() {
    let map = map(Swizzle::B64);
    let error = |wrong| {
        let errors: Vec<Error> = (0..SEEDS)
            .map(|seed| {
                run_load(&map, wrong, seed, [0, 0, 0]).err().unwrap_or_else(|| panic!("{wrong:?} {seed}"))
            })
            .collect();
        errors[0].clone()
    };
    for wrong in [Wrong::NoWait, Wrong::OtherParity] {
        let error = error(wrong);
        // A warp may even come before the copy is issued.
        let early = matches!(error, Error::Race { access: "read", .. } | Error::Uninitialised { .. });
        assert!(early, "{wrong:?}: {error}");
    }
    for (wrong, needle) in [
        (Wrong::NoInit, "no mbarrier was initialised"),
        (Wrong::NoInitFence, "fence.mbarrier_init"),
        (Wrong::TwoArrivals, "one arrival too many"),
        (Wrong::Touch, "where an mbarrier is"),
    ] {
        let error = error(wrong);
        assert!(
            matches!(error, Error::BarrierMisuse { .. }) && error.to_string().contains(needle),
            "{wrong:?}: {error}"
        );
    }
    let without = error(Wrong::NoBarrier);
    assert!(matches!(without, Error::BarrierMisuse { .. }), "{without}");
    match error(Wrong::TooManyBytes) {
        Error::Deadlock { waits, .. } => {
            assert_eq!(waits.len(), 2);
            assert!(
                waits[0].contains("shared full+0, parity 0") && waits[0].contains("16 bytes pending"),
                "{}",
                waits[0]
            );
        }
        other => panic!("{other}"),
    }
    // The phase never completes: 16 bytes more came than were expected.
    assert!(matches!(error(Wrong::TooFewBytes), Error::Deadlock { .. }));
    assert!(matches!(error(Wrong::WriteWithoutFence), Error::MissingProxyFence { .. }));
    let race = error(Wrong::WriteWithoutBarrier);
    assert!(matches!(race, Error::Race { .. }), "{race}");
    assert!(matches!(error(Wrong::TwoDimensions), Error::Unsupported { .. }));
    assert!(matches!(error(Wrong::OffTile), Error::Misaligned { alignment: 128, .. }));
    assert!(matches!(error(Wrong::TwoCopies), Error::Race { access: "write", other_access: "write", .. }));
}

/// A producer warp and a consumer warp over two stages.
fn pipeline(empty_wait: bool, release_late: bool, consumer_parity: u32) -> Kernel {
    kernel(64, |k| {
        let (tensor, out) = (k.param_tensor_map("map"), k.param_ptr("out"));
        let tile = k.shared("tile", 2 * 256, 1024);
        let full = k.mbarriers("full", 2);
        let empty = k.mbarriers("empty", 2);
        let (lane, warp) = (k.lane(), k.warp());
        k.if_(k.tid(0).eq(0u32), || {
            (0..2).for_each(|stage| {
                full[stage].init(k, 1);
                empty[stage].init(k, 32);
            });
            k.fence_mbarrier_init();
        });
        k.sync_threads();
        let (x, z) = (k.var(0i32), k.var(0i32));
        let sum = k.var(0u32);
        for step in 0..6u32 {
            let (stage, phase) = (step as usize % 2, step / 2 % 2);
            k.if_else(
                warp.eq(0u32),
                || {
                    if empty_wait {
                        empty[stage].wait(k, phase ^ 1);
                    }
                    k.if_(k.elect(), || {
                        full[stage].arrive_expect_tx(k, 256u32);
                        let y = k.var(2 * step as i32);
                        k.tma_load(tile.at(256 * stage as i32), tensor, &[x, y, z], full[stage]);
                    });
                },
                || {
                    full[stage].wait(k, phase ^ consumer_parity);
                    if !release_late {
                        empty[stage].arrive(k);
                    }
                    sum.set(sum + (tile.at(256 * stage as i32) + lane * 8).load::<u32>());
                    if release_late {
                        empty[stage].arrive(k);
                    }
                },
            );
        }
        k.if_(warp.eq(1u32), || (out + lane.to_u64() * 4).address().store(sum));
    })
}

#[test]
fn pipelines() {
    let map = TensorMap { tile: vec![64, 2, 1], ..map(Swizzle::None) };
    let go = |k: &Kernel, seed: u64| {
        let mut memory = Memory::new();
        let tensor = tensor(&mut memory);
        let out = memory.alloc("out", 128);
        let args = vec![Arg::TensorMap(map.clone(), tensor, 0), Arg::Buffer(out, 0)];
        emulate(k, &mut memory, &Launch { seed, ..launch(k, 1, args) })?;
        memory.read::<u32>(out)
    };
    let right = pipeline(true, true, 0);
    for seed in 0..SEEDS {
        let sums = go(&right, seed).unwrap();
        // Lane l reads elements (4l, 4l + 1) of a box of two rows of 64.
        let expected: u32 = (0..6).map(|step| (104 * 2 * step + 1) | (104 * 2 * step + 2) << 16).sum();
        assert_eq!(sums[0], expected);
    }
    for seed in 0..SEEDS {
        // Without the wait the producer comes to a phase of two loads, or overwrites what is being read.
        let error = go(&pipeline(false, true, 0), seed).unwrap_err();
        assert!(matches!(error, Error::Race { .. } | Error::BarrierMisuse { .. }), "{error}");
        let error = go(&pipeline(true, false, 0), seed).unwrap_err();
        assert!(matches!(error, Error::Race { .. }), "{error}");
        // The wrong parity passes at once, or waits for a phase that does not come.
        let error = go(&pipeline(true, true, 1), seed).unwrap_err();
        let caught =
            matches!(error, Error::Race { .. } | Error::Uninitialised { .. } | Error::Deadlock { .. });
        assert!(caught, "{error}");
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum StoreWrong {
    Nothing,
    NoFence,
    NoBarrier,
    NoWait,
    NoCommit,
    OverwriteEarly,
}

fn store(map: &TensorMap, add: bool, wrong: StoreWrong) -> Kernel {
    let bytes = map.tile_bytes();
    kernel(64, |k| {
        let tensor = k.param_tensor_map("map");
        let at = [k.param_s32("x"), k.param_s32("y"), k.param_s32("z")];
        let tile = k.shared("tile", bytes, 1024);
        let tid = k.tid(0);
        k.for_(tid, bytes / 4, 64u32, |i| {
            // bf16 1.0 and 2.0
            (tile + i * 4).store(k.var(0x4000_3f80u32));
        });
        if wrong != StoreWrong::NoFence {
            k.fence_proxy_async();
        }
        if wrong != StoreWrong::NoBarrier {
            k.sync_threads();
        }
        k.if_(tid.eq(0u32), || {
            if add {
                k.tma_reduce_add(tensor, &at, tile)
            } else {
                k.tma_store(tensor, &at, tile)
            }
            if wrong != StoreWrong::NoCommit {
                k.bulk_commit();
            }
            if wrong == StoreWrong::OverwriteEarly {
                tile.store(k.var(0u32));
            }
            if wrong != StoreWrong::NoWait {
                k.bulk_wait(0, true);
            }
            if wrong == StoreWrong::Nothing {
                tile.store(k.var(0u32));
            }
        });
    })
}

fn run_store(
    map: &TensorMap,
    add: bool,
    wrong: StoreWrong,
    seed: u64,
    at: [i32; 3],
) -> Result<(Vec<u16>, Report), Error> {
    let k = store(map, add, wrong);
    let mut memory = Memory::new();
    let tensor = memory.upload("tensor", &vec![half::bf16::ONE.to_bits(); 104 * 23 * 3]);
    let mut args = vec![Arg::TensorMap(map.clone(), tensor, 0)];
    args.extend(at.map(Arg::S32));
    let report = emulate(&k, &mut memory, &Launch { seed, ..launch(&k, 1, args) })?;
    Ok((memory.read(tensor)?, report))
}

#[test]
fn boxes_are_stored_and_added_inside_the_tensor_only() {
    for swizzle in [Swizzle::None, Swizzle::B128] {
        let map = map(swizzle);
        for (at, add) in [([0, 0, 0], false), ([90, 10, 2], false), ([90, 10, 2], true), ([-4, -1, 0], true)]
        {
            let (data, report) = run_store(&map, add, StoreWrong::Nothing, 5, at).unwrap();
            let mut inside = 0;
            for (i, &bits) in data.iter().enumerate() {
                let [x, y, z] = [i % 104, i / 104 % 23, i / 104 / 23].map(|c| c as i32);
                let within =
                    [x, y, z].iter().zip(at).zip(&map.tile).zip(&map.shape).all(
                        |(((&c, at), &tile), &size)| c >= at && c < at + tile as i32 && (c as u64) < size,
                    );
                let written = if (x - at[0]) % 2 == 0 { 1.0 } else { 2.0 };
                let expected = if !within {
                    1.0
                } else if add {
                    1.0 + written
                } else {
                    written
                };
                assert_eq!(half::bf16::from_bits(bits).to_f32(), expected, "({x}, {y}, {z})");
                inside += 2 * within as u64;
            }
            assert_eq!(report.buffers["tensor"].written, inside);
        }
    }
}

#[test]
fn stores_done_wrong() {
    let map = map(Swizzle::B128);
    for seed in 0..SEEDS {
        let error =
            |wrong| run_store(&map, false, wrong, seed, [0; 3]).err().unwrap_or_else(|| panic!("{wrong:?}"));
        assert!(matches!(error(StoreWrong::NoFence), Error::MissingProxyFence { .. }));
        let race = error(StoreWrong::NoBarrier);
        assert!(matches!(race, Error::Race { .. } | Error::Uninitialised { .. }), "{race}");
        assert!(matches!(error(StoreWrong::NoWait), Error::PendingAtExit { .. }));
        assert!(matches!(error(StoreWrong::NoCommit), Error::PendingAtExit { .. } | Error::Race { .. }));
        assert!(matches!(
            error(StoreWrong::OverwriteEarly),
            Error::Race { access: "write", other_access: "read", .. }
        ));
    }
}

#[test]
fn copies_that_no_one_waits_for_are_noticed() {
    let map = map(Swizzle::B64);
    let k = kernel(32, |k| {
        let tensor = k.param_tensor_map("map");
        let tile = k.shared("tile", map.tile_bytes(), 1024);
        let full = k.mbarriers("full", 1)[0];
        let zero = k.var(0i32);
        k.if_(k.elect(), || {
            full.init(k, 1);
            k.fence_mbarrier_init();
            full.arrive_expect_tx(k, map.tile_bytes());
            k.tma_load(tile, tensor, &[zero; 3], full);
        });
    });
    for seed in 0..SEEDS {
        let mut memory = Memory::new();
        let tensor = tensor(&mut memory);
        let args = vec![Arg::TensorMap(map.clone(), tensor, 0)];
        let error = emulate(&k, &mut memory, &Launch { seed, ..launch(&k, 1, args) }).unwrap_err();
        assert!(
            matches!(&error, Error::PendingAtExit { problem, .. } if problem.contains("shared full+0")),
            "{error}"
        );
    }
}

#[test]
fn maps_are_checked_at_launch() {
    let good = map(Swizzle::B64);
    let k = load(&good, Wrong::Nothing);
    let mut memory = Memory::new();
    let (tensor, out) = (tensor(&mut memory), memory.alloc("out", 4096));
    let mut go = |map: TensorMap, offset: u64| {
        let mut args = vec![Arg::TensorMap(map, tensor, offset), Arg::Buffer(out, 0)];
        args.extend([0; 3].map(Arg::S32));
        emulate(&k, &mut memory, &launch(&k, 1, args)).unwrap_err()
    };
    let odd = TensorMap { strides: vec![200, 4784], ..good.clone() };
    assert!(matches!(go(odd, 0), Error::TensorMap { index: 0, source: TensorMapError::Stride { .. }, .. }));
    assert!(matches!(go(good.clone(), 8), Error::TensorMap { source: TensorMapError::Address { .. }, .. }));
    let long = TensorMap { shape: vec![100, 21, 4], ..good };
    assert!(matches!(go(long, 0), Error::Argument { index: 0, .. }));
}
