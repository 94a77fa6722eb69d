//! Clusters: barriers, other blocks' mbarriers and shared memory, multicast; registers of warpgroups.

use super::*;
use crate::instr::{self, Operand, SpecialRegister};
use crate::kernel::{Swizzle, TensorElement, TensorMap};

#[derive(Clone, Copy)]
enum Before {
    Nothing,
    Barrier,
    Relaxed,
}

/// Each block of a cluster of four sends 128 bytes to the next one's shared memory.
fn ring(before: Before, sync_after: bool) -> Kernel {
    kernel(32, |k| {
        k.cluster([2, 2, 1]);
        let out = k.param_ptr("out");
        let (source, target) = (k.shared("source", 128, 128), k.shared("target", 128, 128));
        let full = k.mbarriers("full", 1)[0];
        let (lane, rank) = (k.lane(), k.cluster_rank());
        (source + lane * 4).store(rank * 100 + lane);
        k.fence_proxy_async();
        k.if_(lane.eq(0u32), || {
            full.init(k, 1);
            k.fence_mbarrier_init();
            full.arrive_expect_tx(k, 128u32);
        });
        match before {
            Before::Nothing => {}
            Before::Barrier => k.sync_cluster(),
            Before::Relaxed => {
                k.push(instr::CLUSTER_ARRIVE_RELAXED, &[], &[]);
                k.push(instr::CLUSTER_WAIT, &[], &[]);
            }
        }
        k.if_(lane.eq(0u32), || {
            let next = (rank + 1) & 3;
            let (to, on) = (k.mapa(target, next), k.mapa(full.0, next));
            let operands =
                [to.address().operand(), source.operand(), Operand::Imm(128, crate::types::Type::U32)];
            k.push(instr::BULK_TO_CLUSTER, &[], &[&operands[..], &[on.address().operand()]].concat());
        });
        full.wait(k, 0u32);
        let block = k.ctaid(0) + k.ctaid(1) * k.nctaid(0);
        let value = (target + lane * 4).load::<u32>();
        (out + (block * 32 + lane).to_u64() * 4).address().store(value);
        if sync_after {
            k.sync_cluster();
        }
    })
}

fn run_ring(k: &Kernel, seed: u64) -> Result<Vec<u32>, Error> {
    let mut memory = Memory::new();
    let out = buffer(&mut memory, 8 * 32);
    emulate(k, &mut memory, &Launch { seed, grid: [4, 2, 1], ..launch(k, 1, vec![Arg::Buffer(out, 0)]) })?;
    memory.read(out)
}

#[test]
fn blocks_of_a_cluster_exchange() {
    for seed in 0..SEEDS {
        let values = run_ring(&ring(Before::Barrier, true), seed).unwrap();
        for (i, value) in values.into_iter().enumerate() {
            let (x, y) = (i / 32 % 4, i / 32 / 4);
            let rank = x % 2 + 2 * y;
            assert_eq!(value as usize, (rank + 3) % 4 * 100 + i % 32);
        }
        // The fence of the mbarriers' initialisation is all that must be released.
        assert!(run_ring(&ring(Before::Relaxed, true), seed).is_ok());
        // A block's shared memory must be there, its mbarrier initialised, until the others are done with it.
        let error = run_ring(&ring(Before::Nothing, true), seed).unwrap_err();
        assert!(matches!(error, Error::BarrierMisuse { .. }), "{error}");
        let outcome = run_ring(&ring(Before::Barrier, false), seed);
        assert!(matches!(outcome, Err(Error::PendingAtExit { .. })), "{outcome:?}");
    }
}

#[test]
fn remote_arrivals_release() {
    let make = |arrive: bool| {
        kernel(64, |k| {
            k.cluster([2, 1, 1]);
            let out = k.param_ptr("out");
            let done = k.mbarriers("done", 1)[0];
            let cell = k.shared("cell", 4, 4);
            let (tid, rank) = (k.tid(0), k.cluster_rank());
            k.if_(tid.eq(0u32), || {
                done.init(k, 2);
                k.fence_mbarrier_init();
            });
            k.sync_cluster();
            k.if_(tid.eq(0u32) & rank.eq(0u32), || cell.store(k.var(3u32)));
            if arrive {
                k.if_(tid.eq(0u32), || done.arrive_remote(k, 0u32));
            }
            k.if_(rank.eq(0u32), || {
                done.wait(k, 0u32);
                (out + tid.to_u64() * 4).address().store(cell.load::<u32>());
            });
            k.sync_cluster();
        })
    };
    assert_eq!(run(&make(true), 2, &[], 64).unwrap().0, [3; 64]);
    match refused(&make(false), 2, 64) {
        Error::Deadlock { waits, .. } => {
            assert_eq!(waits.len(), 4);
            assert!(
                waits
                    .iter()
                    .any(|w| w.contains("shared done+0, parity 0: 0 phases complete, 2 of 2 arrivals")),
                "{waits:?}"
            );
            assert!(waits.iter().any(|w| w.contains("the cluster's barrier: 2 of 4")), "{waits:?}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_multicast_comes_to_every_block() {
    let map = TensorMap {
        element: TensorElement::F32,
        shape: vec![32, 8],
        strides: vec![128],
        tile: vec![32, 4],
        swizzle: Swizzle::None,
    };
    // Each of two blocks loads half of the box for both.
    let k = kernel(32, |k| {
        k.cluster([2, 1, 1]);
        let (tensor, out) = (k.param_tensor_map("map"), k.param_ptr("out"));
        let tile = k.shared("tile", 1024, 1024);
        let full = k.mbarriers("full", 1)[0];
        let (lane, rank) = (k.lane(), k.cluster_rank());
        let issue = k.elect();
        k.if_(issue, || {
            full.init(k, 1);
            k.fence_mbarrier_init();
            full.arrive_expect_tx(k, 1024u32);
        });
        k.sync_cluster();
        k.if_(issue, || {
            let at = [k.var(0i32), (rank * 4).bits::<i32>()];
            k.tma_load_multicast(tile + rank * 512, tensor, &at, full, 3u16);
        });
        full.wait(k, 0u32);
        k.for_(lane, 256u32, 32u32, |i| {
            let to = out + (rank * 256 + i).to_u64() * 4;
            to.address().store((tile + i * 4).load::<u32>());
        });
        k.sync_cluster();
    });
    for seed in 0..SEEDS {
        let mut memory = Memory::new();
        let data: Vec<u32> = (0..256).collect();
        let tensor = memory.upload("tensor", &data);
        let out = buffer(&mut memory, 512);
        let args = vec![Arg::TensorMap(map.clone(), tensor, 0), Arg::Buffer(out, 0)];
        let report = emulate(&k, &mut memory, &Launch { seed, ..launch(&k, 2, args) }).unwrap();
        assert_eq!(memory.read::<u32>(out).unwrap(), [&data[..], &data[..]].concat());
        assert_eq!(report.buffers["tensor"].read, 1024);
    }
}

#[test]
fn own_shared_memory_only() {
    let k = kernel(32, |k| {
        k.cluster([2, 1, 1]);
        let tile = k.shared("tile", 128, 128);
        let there = k.mapa(tile, k.cluster_rank() ^ 1);
        (there.address() + k.lane() * 4).store(k.lane());
    });
    assert!(matches!(refused(&k, 2, 1), Error::OutOfBounds { .. }));
    let k = kernel(32, |k| {
        k.cluster([2, 1, 1]);
        let tile = k.shared("tile", 128, 128);
        k.mapa(tile, 2u32);
    });
    assert!(matches!(refused(&k, 2, 1), Error::Unsupported { .. }));
}

#[test]
fn cluster_barriers_are_arrived_at_once_and_then_waited_for() {
    let two = kernel(32, |k| {
        k.cluster([2, 1, 1]);
        k.push(instr::CLUSTER_ARRIVE, &[], &[]);
        k.push(instr::CLUSTER_ARRIVE, &[], &[]);
    });
    let none = kernel(32, |k| {
        k.cluster([2, 1, 1]);
        k.push(instr::CLUSTER_WAIT, &[], &[]);
    });
    for k in [two, none] {
        assert!(matches!(refused(&k, 2, 1), Error::BarrierMisuse { .. }));
    }
}

#[test]
fn ids_of_clusters() {
    let k = kernel(32, |k| {
        k.cluster([2, 1, 1]);
        let out = k.param_ptr("out");
        let id = k.special(SpecialRegister::Clusterid(0)) * 10 + k.special(SpecialRegister::Nclusterid(0));
        (out + k.ctaid(0).to_u64() * 4).address().store(id);
    });
    assert_eq!(run(&k, 6, &[], 6).unwrap().0, [3, 3, 13, 13, 23, 23]);
}

#[test]
fn registers_move_between_warpgroups() {
    let make = |consumers: u8| {
        kernel(384, |k| {
            let out = k.param_ptr("out");
            k.if_else(k.warp().lt(4u32), || k.lower_registers(24), || k.raise_registers(consumers));
            (out + k.tid(0).to_u64() * 4).address().store(k.var(1u32));
        })
    };
    assert!(run(&make(240), 1, &[], 384).is_ok());
    match refused(&make(248), 1, 384) {
        Error::Deadlock { waits, .. } => assert!(waits[0].contains("setmaxnreg.inc to 248"), "{waits:?}"),
        other => panic!("{other}"),
    }
    assert!(matches!(refused(&make(100), 1, 384), Error::Unsupported { .. }));
}
