//! How long a tile step of attention takes: two warpgroups, 64 rows each, 128 keys, head dimension 64.

use super::*;
use crate::hopper::WgmmaA;
use crate::instr::{Accumulator, Element, WgmmaShape};
use crate::tile::{Fragment, TileLayout};
use crate::types::{B32, BF16x2};

const STEPS: u32 = 32;

fn attention() -> Kernel {
    let (q_tile, k_tile) = (TileLayout::new(128, 64, Element::BF16), TileLayout::new(128, 64, Element::BF16));
    kernel(256, |k| {
        let out = k.param_ptr("out");
        let tid = k.tid(0);
        let (q, keys, v) = (
            k.shared("q", q_tile.bytes(), 1024),
            k.shared("k", k_tile.bytes(), 1024),
            k.shared("v", k_tile.bytes(), 1024),
        );
        for tile in [q, keys, v] {
            k.for_(tid, q_tile.bytes() / 4, 256u32, |i| (tile + i * 4).store(k.var(0x3c00_3c80u32)));
        }
        k.fence_proxy_async();
        k.sync_threads();
        let shape = |n, transpose_b| WgmmaShape {
            n,
            a: Element::BF16,
            b: Element::BF16,
            d: Accumulator::F32,
            a_in_registers: false,
            transpose_a: false,
            transpose_b,
        };
        let group = (tid >> 7).shfl_idx(0u32);
        let left = q_tile.k_major(q).advance(group * (64 * 128));
        let (right, values) = (k_tile.k_major(keys), k_tile.mn_major(v));
        let o = Fragment::new(k, 64);
        o.registers.iter().for_each(|r| r.set(0f32));
        let sums = [k.var(0f32), k.var(0f32)];
        k.for_(0u32, STEPS, 1u32, |_| {
            let s = Fragment::new(k, 128);
            k.wgmma_fence();
            for step in 0..4 {
                let a = WgmmaA::<B32>::Shared(left.step(step));
                k.wgmma(shape(128, false), &s.registers, a, right.step(step), step > 0);
            }
            k.wgmma_commit();
            k.wgmma_wait(0);
            let max = s.reduce_rows(|a, b| a.max(b));
            for (i, r) in s.registers.iter().enumerate() {
                r.set((*r - max[Fragment::half(i)]).exp2());
            }
            let new = s.reduce_rows(|a, b| a + b);
            (0..2).for_each(|half| sums[half].set(sums[half] + new[half]));
            let p: Vec<_> = (0..8).map(|step| s.a_operand::<BF16x2>(k, step)).collect();
            k.wgmma_fence();
            for (step, p) in p.iter().enumerate() {
                k.wgmma(shape(64, true), &o.registers, WgmmaA::Registers(p), values.step(step as u32), true);
            }
            k.wgmma_commit();
            k.wgmma_wait(0);
        });
        (out + tid.to_u64() * 4).address().store(o.registers[0] / sums[0]);
    })
}

#[test]
fn a_tile_step_takes_milliseconds() {
    let k = attention();
    let mut memory = Memory::new();
    let out = buffer(&mut memory, 256);
    let start = std::time::Instant::now();
    let report = emulate(&k, &mut memory, &launch(&k, 1, vec![Arg::Buffer(out, 0)])).unwrap();
    let step = start.elapsed() / STEPS;
    println!("{step:?} a tile step, {} warp instructions", report.warp_instructions() / STEPS as u64);
    // All scores are equal, so the output is the first value of each pair of V.
    assert!(memory.read::<f32>(out).unwrap().iter().all(|&o| (o - 0.015625).abs() < 1e-4));
    assert_eq!(report.matrix_flops, STEPS as u64 * 4 * 128 * 128 * 64);
    // Far above what it takes on one core (see the line printed), so that a busy machine does not fail it.
    assert!(step.as_millis() < 100, "{step:?}");
}
