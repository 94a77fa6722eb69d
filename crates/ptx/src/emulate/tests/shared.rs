//! Shared memory: barriers, races, order between lanes, matrices of `ldmatrix`.

use super::*;

/// Neighbouring warps exchange values through shared memory.
fn exchange(synchronise: impl Fn(&Builder)) -> Kernel {
    kernel(128, |k| {
        let out = k.param_ptr("out");
        let tile = k.shared("tile", 512, 16);
        let tid = k.tid(0);
        (tile + tid * 4).store(tid * 3);
        synchronise(k);
        let other = (tile + (tid ^ 32) * 4).load::<u32>();
        (out + tid.to_u64() * 4).address().store(other);
    })
}

#[test]
fn a_barrier_orders_warps() {
    let (values, report) = run(&exchange(|k| k.sync_threads()), 1, &[], 128).unwrap();
    assert_eq!(values, (0..128u32).map(|t| (t ^ 32) * 3).collect::<Vec<_>>());
    assert_eq!((report.shared.wavefronts, report.shared.conflicts), (8, 0));
}

#[test]
fn without_a_barrier_warps_race() {
    for wrong in
        [exchange(|_| {}), exchange(|k| k.sync_warp()), exchange(|k| k.bar_sync((k.tid(0) >> 6) + 1, 32))]
    {
        let error = refused(&wrong, 1, 128);
        // Either the read comes too early, or the write after the read of what was there before.
        assert!(matches!(error, Error::Race { .. } | Error::Uninitialised { .. }), "{error}");
    }
}

#[test]
fn named_barriers_order_those_who_use_them() {
    let k = exchange(|k| {
        // Pairs of warps, each at a barrier of its own.
        let id = ((k.tid(0) >> 6) + 1).shfl_idx(0u32);
        k.bar_sync(id, 64);
    });
    assert!(run(&k, 1, &[], 128).is_ok());
}

#[test]
fn overwriting_before_others_have_read_is_a_race() {
    let make = |right: bool| {
        kernel(64, |k| {
            let out = k.param_ptr("out");
            let tile = k.shared("tile", 256, 16);
            let tid = k.tid(0);
            let at = tile + tid * 4;
            at.store(tid);
            k.sync_threads();
            let other = (tile + (tid ^ 32) * 4).load::<u32>();
            if right {
                k.sync_threads();
            }
            at.store(tid + 1);
            (out + tid.to_u64() * 4).address().store(other);
        })
    };
    assert!(run(&make(true), 1, &[], 64).is_ok());
    assert!(matches!(refused(&make(false), 1, 64), Error::Race { .. }));
}

#[test]
fn arrivals_release_to_those_who_wait() {
    // Warp 0 writes and arrives; warp 1 waits and reads; the next round needs the other barrier.
    let make = |wait_for_reader: bool| {
        kernel(64, |k| {
            let out = k.param_ptr("out");
            let cell = k.shared("cell", 128, 16);
            let (lane, warp) = (k.lane(), k.warp());
            let sum = k.var(0u32);
            k.for_(0u32, 4u32, 1u32, |i| {
                k.if_else(
                    warp.eq(0u32),
                    || {
                        (cell + lane * 4).store(i + lane);
                        k.bar_arrive(1u32, 64);
                        if wait_for_reader {
                            k.bar_sync(2u32, 64);
                        }
                    },
                    || {
                        k.bar_sync(1u32, 64);
                        sum.set(sum + (cell + lane * 4).load::<u32>());
                        if wait_for_reader {
                            k.bar_arrive(2u32, 64);
                        }
                    },
                );
            });
            k.if_(warp.eq(1u32), || (out + lane.to_u64() * 4).address().store(sum));
        })
    };
    let expected: Vec<u32> = (0..32).map(|lane| 6 + 4 * lane).collect();
    assert_eq!(run(&make(true), 1, &[], 32).unwrap().0, expected);
    let error = refused(&make(false), 1, 32);
    // The writer may also come to the barrier twice before the reader has come once.
    assert!(matches!(error, Error::Race { .. } | Error::BarrierMisuse { .. }), "{error}");
}

#[test]
fn lanes_of_a_warp_need_a_synchronisation_too() {
    let make = |sync: bool| {
        kernel(32, |k| {
            let out = k.param_ptr("out");
            let tile = k.shared("tile", 128, 16);
            let lane = k.lane();
            (tile + lane * 4).store(lane);
            if sync {
                k.sync_warp();
            }
            let other = (tile + (lane ^ 1) * 4).load::<u32>();
            (out + lane.to_u64() * 4).address().store(other);
        })
    };
    assert!(run(&make(true), 1, &[], 32).is_ok());
    assert!(matches!(refused(&make(false), 1, 32), Error::Race { .. }));
}

#[test]
fn lanes_must_agree_on_what_they_store_to_one_place() {
    let make = |same: bool, global: bool| {
        kernel(32, |k| {
            let out = k.param_ptr("out");
            let cell = k.shared("cell", 16, 16);
            let value = if same { k.var(5u32) } else { k.lane() };
            if global {
                out.address().store(value)
            } else {
                cell.store(value)
            }
            k.sync_warp();
            out.address().store(if global { value } else { cell.load::<u32>() });
        })
    };
    for global in [false, true] {
        assert_eq!(run(&make(true, global), 1, &[], 1).unwrap().0, [5]);
        assert!(matches!(refused(&make(false, global), 1, 1), Error::Race { .. }));
    }
}

#[test]
fn shared_atomics_count() {
    let k = kernel(256, |k| {
        let out = k.param_ptr("out");
        let bins = k.shared("bins", 64, 16);
        let tid = k.tid(0);
        k.if_(tid.lt(16u32), || (bins + tid * 4).store(k.var(0u32)));
        k.sync_threads();
        (bins + (tid % 16) * 4).red_add(tid);
        k.sync_threads();
        k.if_(tid.lt(16u32), || (out + tid.to_u64() * 4).address().store((bins + tid * 4).load::<u32>()));
    });
    let expected: Vec<u32> = (0..16).map(|bin| (0..16).map(|i| 16 * i + bin).sum()).collect();
    assert_eq!(run(&k, 1, &[], 16).unwrap().0, expected);
}

#[test]
fn barriers_are_used_by_their_rules() {
    let wrong = kernel(64, |k| k.if_(k.tid(0).lt(48u32), || k.sync_threads()));
    assert!(matches!(
        refused(&wrong, 1, 1),
        Error::DivergentAligned { active: 0xffff, .. } | Error::Deadlock { .. }
    ));
    let wrong = kernel(64, |k| k.if_(k.tid(0).lt(32u32), || k.sync_threads()));
    match refused(&wrong, 1, 1) {
        Error::Deadlock { waits, .. } => {
            assert_eq!(waits.len(), 1);
            assert!(
                waits[0].contains("barrier 0: 32 of 64 threads") && waits[0].contains("shared.rs"),
                "{}",
                waits[0]
            );
        }
        other => panic!("{other}"),
    }
    for (id, threads) in [(16, 64), (1, 48), (1, 128), (1, 0)] {
        assert!(matches!(
            refused(&kernel(64, |k| k.bar_sync(id, threads)), 1, 1),
            Error::BarrierMisuse { .. }
        ));
    }
    let wrong = kernel(64, |k| {
        k.if_else(k.warp().eq(0u32), || k.bar_sync(1u32, 64), || k.bar_sync(1u32, 32));
    });
    // The smaller one may complete alone before the other comes, which then waits for ever.
    assert!(matches!(refused(&wrong, 1, 1), Error::BarrierMisuse { .. } | Error::Deadlock { .. }));
}

#[test]
fn accesses_are_in_bounds_and_aligned() {
    let make = |offset: u32| {
        kernel(32, |k| {
            let out = k.param_ptr("out");
            let tile = k.shared("tile", 128, 16);
            (tile + k.lane() * 4).store(k.lane());
            k.sync_warp();
            out.address().store((tile + offset).load::<u32>());
        })
    };
    assert_eq!(run(&make(124), 1, &[], 1).unwrap().0, [31]);
    assert!(matches!(refused(&make(128), 1, 1), Error::OutOfBounds { bytes: 4, .. }));
    assert!(matches!(refused(&make(6), 1, 1), Error::Misaligned { alignment: 4, .. }));
    assert!(matches!(refused(&make(1u32.wrapping_sub(5)), 1, 1), Error::OutOfBounds { .. }));
    let never = kernel(32, |k| {
        let tile = k.shared("tile", 128, 16);
        (tile + 64).load::<u32>();
    });
    match refused(&never, 1, 1) {
        Error::Uninitialised { what, .. } => assert_eq!(what, "shared tile+64"),
        other => panic!("{other}"),
    }
}

#[test]
fn bank_conflicts_are_counted() {
    let k = kernel(32, |k| {
        let tile = k.shared("tile", 32 * 33 * 4, 16);
        let lane = k.lane();
        (tile + lane * 128).store(lane); // one bank: 32 wavefronts
        (tile + lane * 132).store(lane); // padded rows: 1
    });
    let mut memory = Memory::new();
    let report = emulate(&k, &mut memory, &launch(&k, 1, vec![])).unwrap();
    assert_eq!((report.shared.wavefronts, report.shared.conflicts), (33, 31));
}

/// 16×16 elements through `stmatrix` and `ldmatrix`, plain and transposed both ways.
#[test]
fn matrices_go_through_shared_memory() {
    for (store, load) in [(false, false), (false, true), (true, false), (true, true)] {
        let k = kernel(32, |k| {
            let out = k.param_ptr("out");
            let tile = k.shared("tile", 512, 128);
            let lane = k.lane();
            let row = tile + lane * 16;
            // Register m of lane l: elements (l / 4, 2·(l % 4)) and the next of matrix m, numbered by place.
            let first = (lane >> 2) * 8 + (lane & 3) * 2;
            let matrices = [0u32, 1, 2, 3].map(|m| first + 64 * m + ((first + (64 * m + 1)) << 16));
            k.stmatrix_x4(row, matrices, store);
            k.sync_warp();
            let loaded = k.ldmatrix_x4::<u32>(row, load);
            for (m, value) in loaded.into_iter().enumerate() {
                (out + (lane * 4 + m as u32).to_u64() * 4).address().store(value);
            }
        });
        let element =
            |m: u32, r: u32, c: u32| if store != load { 64 * m + 8 * c + r } else { 64 * m + 8 * r + c };
        let expected: Vec<u32> = (0..128)
            .map(|i| {
                let (lane, m) = (i / 4, i % 4);
                let (r, c) = (lane / 4, 2 * (lane % 4));
                element(m, r, c) | element(m, r, c + 1) << 16
            })
            .collect();
        assert_eq!(run(&k, 1, &[], 128).unwrap().0, expected, "{store} {load}");
    }
}
