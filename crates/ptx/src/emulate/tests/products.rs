//! `mma` and `wgmma`: numbers against a plain product in f64, and the rules about what is in flight.

use half::{bf16, f16};

use super::*;
use crate::build::Value;
use crate::fp8;
use crate::hopper::WgmmaA;
use crate::instr::{self, Accumulator, Element, Operand, WgmmaShape};
use crate::kernel::Swizzle;
use crate::tile::TileLayout;
use crate::types::B32;

const ELEMENTS: [Element; 5] = [Element::F16, Element::BF16, Element::TF32, Element::E4M3, Element::E5M2];

/// Small values that every element type has, and whose sums are exact.
fn value(seed: u32, row: usize, column: usize) -> f64 {
    let hash = (seed + 7919 * row as u32 + 104_729 * column as u32).wrapping_mul(0x9e37_79b1) >> 16;
    (hash % 17) as f64 / 4.0 - 2.0
}

fn encode(element: Element, x: f64) -> u32 {
    let x = x as f32;
    match element {
        Element::F16 => f16::from_f32(x).to_bits() as u32,
        Element::BF16 => bf16::from_f32(x).to_bits() as u32,
        // The low bits do not count.
        Element::TF32 => x.to_bits() | 0x1abc,
        Element::E4M3 => fp8::e4m3(x) as u32,
        Element::E5M2 => fp8::e5m2(x) as u32,
    }
}

/// Fragment registers of one warp: `count` registers of 32 lanes; see PTX's figures of the mma fragments.
fn fragment(element: Element, count: usize, groups: usize, at: impl Fn(usize, usize) -> f64) -> Vec<u32> {
    let per_word = 4 / element.bytes() as usize;
    let mut words = vec![0; 32 * count];
    for lane in 0..32 {
        for j in 0..count {
            let (row, column) = (lane / 4 + 8 * (j % groups), per_word * (lane % 4 + 4 * (j / groups)));
            for i in 0..per_word {
                words[lane * count + j] |=
                    encode(element, at(row, column + i)) << (8 * element.bytes() as usize * i);
            }
        }
    }
    words
}

/// Row and column of element `i` of a thread's accumulator.
fn place(thread: usize, i: usize) -> (usize, usize) {
    let lane = thread % 32;
    (thread / 32 * 16 + lane / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2)
}

/// An accumulator's values from its registers, in the order of elements.
fn unpack(d: Accumulator, words: &[u32]) -> Vec<f64> {
    match d {
        Accumulator::F32 => words.iter().map(|&word| f32::from_bits(word) as f64).collect(),
        Accumulator::F16 => words
            .iter()
            .flat_map(|&word| [word as u16, (word >> 16) as u16].map(|bits| f16::from_bits(bits).to_f64()))
            .collect(),
    }
}

#[test]
fn mma_of_every_type() {
    let mut cases: Vec<(Element, Element, u8, Accumulator)> = Vec::new();
    for (element, depths) in [(Element::F16, [8, 16]), (Element::BF16, [8, 16]), (Element::TF32, [4, 8])] {
        cases.extend(depths.map(|depth| (element, element, depth, Accumulator::F32)));
    }
    cases.push((Element::F16, Element::F16, 16, Accumulator::F16));
    for a in [Element::E4M3, Element::E5M2] {
        cases.extend([Element::E4M3, Element::E5M2].map(|b| (a, b, 32, Accumulator::F32)));
    }
    for (a, b, depth, d) in cases {
        let a_count = 16 * depth as usize * a.bytes() as usize / 128;
        let (b_count, d_count) = (a_count / 2, if d == Accumulator::F32 { 4 } else { 2 });
        let k = kernel(32, |k| {
            let pointers = [k.param_ptr("a"), k.param_ptr("b"), k.param_ptr("out")];
            let lane = k.lane();
            let load = |i: usize, count: usize| -> Vec<Operand> {
                let word = |j: usize| (pointers[i] + (lane * count as u32 + j as u32).to_u64() * 4).address();
                (0..count).map(|j| word(j).load::<B32>().operand()).collect()
            };
            let mut operands = load(0, a_count);
            operands.extend(load(1, b_count));
            // C is one everywhere.
            let one = if d == Accumulator::F32 {
                k.var(1f32).operand()
            } else {
                k.var(0x3c00_3c00u32).bits::<B32>().operand()
            };
            operands.extend(vec![one; d_count]);
            let results: Vec<_> = (0..d_count)
                .map(|_| if d == Accumulator::F32 { k.reg::<f32>().id } else { k.reg::<B32>().id })
                .collect();
            k.push(instr::mma(a, b, depth, d), &results, &operands);
            for (j, id) in results.into_iter().enumerate() {
                let to = pointers[2] + (lane * d_count as u32 + j as u32).to_u64() * 4;
                let value = k.result::<u32>(instr::MOV_B32, &[Operand::Reg(id)]);
                to.address().store(value);
            }
        });
        let inputs = [
            fragment(a, a_count, 2, |row, at| value(1, row, at)),
            fragment(b, b_count, 1, |column, at| value(2, column, at)),
        ];
        let (words, report) = run(&k, 1, &inputs, 32 * d_count).unwrap();
        for lane in 0..32 {
            for (i, got) in unpack(d, &words[lane * d_count..(lane + 1) * d_count]).into_iter().enumerate() {
                let (row, column) = place(lane, i);
                let sum: f64 = (0..depth as usize).map(|at| value(1, row, at) * value(2, column, at)).sum();
                assert_eq!(got, sum + 1.0, "{a:?} {b:?} k{depth} ({row}, {column})");
            }
        }
        assert_eq!(report.matrix_flops, 2 * 16 * 8 * depth as u64);
    }
}

/// The bytes of a tile in shared memory.
fn image(layout: &TileLayout, at: impl Fn(usize, usize) -> f64) -> Vec<u32> {
    let mut bytes = vec![0u8; layout.bytes() as usize];
    for row in 0..layout.rows {
        for column in 0..layout.columns {
            let (offset, size) = (layout.offset(row, column) as usize, layout.element.bytes() as usize);
            let bits = encode(layout.element, at(row as usize, column as usize)).to_le_bytes();
            bytes[offset..offset + size].copy_from_slice(&bits[..size]);
        }
    }
    bytemuck::cast_slice(&bytes).to_vec()
}

fn copy_in<'k>(k: &'k Builder, tile: crate::Address<'k, u32>, from: crate::Reg<'k, u64>, bytes: u32) {
    k.for_(k.tid(0), bytes / 4, 128u32, |i| {
        (tile + i * 4).store((from + i.to_u64() * 4).address().load::<u32>());
    });
}

/// One test of a shape: two steps along K, the first without what the accumulators held.
fn check_wgmma(shape: WgmmaShape, swizzle: Swizzle) {
    let (n, depth, steps) = (shape.n as usize, shape.k() as usize, 2);
    let layout = |mn: u32, element: Element, transposed: bool| {
        let (rows, columns) =
            if transposed { ((steps * depth) as u32, mn) } else { (mn, (steps * depth) as u32) };
        TileLayout { rows, columns, element, swizzle }
    };
    // Tiles have whole panels: more columns than K or N has are there and not used.
    let whole = |layout: TileLayout| {
        let columns = layout.columns.next_multiple_of(layout.panel_columns());
        TileLayout { columns, ..layout }
    };
    let a_tile = whole(layout(64, shape.a, shape.transpose_a));
    let b_tile = whole(layout(shape.n, shape.b, shape.transpose_b));
    let registers = shape.accumulators() as usize;
    let kernel = kernel(128, |k| {
        let [a, b, out] = [k.param_ptr("a"), k.param_ptr("b"), k.param_ptr("out")];
        let tid = k.tid(0);
        let shared_a = k.shared("a", a_tile.bytes(), 1024);
        let shared_b = k.shared("b", b_tile.bytes(), 1024);
        if !shape.a_in_registers {
            copy_in(k, shared_a, a, a_tile.bytes());
        }
        copy_in(k, shared_b, b, b_tile.bytes());
        k.fence_proxy_async();
        k.sync_threads();
        let descriptor = |tile, layout: &TileLayout, transposed: bool, step: u32| {
            if transposed { layout.mn_major(tile).step(step) } else { layout.k_major(tile).step(step) }
        };
        let fragments: Vec<[crate::Reg<'_, B32>; 4]> = (0..steps as u32)
            .map(|step| {
                let word = |j: u32| (a + ((tid * steps as u32 + step) * 4 + j).to_u64() * 4).address();
                if shape.a_in_registers { [0, 1, 2, 3].map(|j| word(j).load()) } else { [k.reg(); 4] }
            })
            .collect();
        let d: Vec<crate::Reg<'_, f32>> = k.regs(registers);
        k.wgmma_fence();
        for step in 0..steps as u32 {
            let left = if shape.a_in_registers {
                WgmmaA::Registers(&fragments[step as usize])
            } else {
                WgmmaA::Shared(descriptor(shared_a, &a_tile, shape.transpose_a, step))
            };
            k.wgmma(shape, &d, left, descriptor(shared_b, &b_tile, shape.transpose_b, step), step > 0);
        }
        k.wgmma_commit();
        k.wgmma_wait(0);
        for (j, register) in d.into_iter().enumerate() {
            (out + (tid * registers as u32 + j as u32).to_u64() * 4).address().store(register);
        }
    });
    let a = |row: usize, at: usize| value(3, row, at);
    let b = |column: usize, at: usize| value(4, column, at);
    let left = if shape.a_in_registers {
        let warps: Vec<Vec<Vec<u32>>> = (0..4)
            .map(|warp| {
                let part =
                    |step: usize| fragment(shape.a, 4, 2, |row, at| a(16 * warp + row, step * depth + at));
                (0..steps).map(part).collect()
            })
            .collect();
        (0..128 * steps * 4)
            .map(|i| {
                let (thread, step, j) = (i / (4 * steps), i / 4 % steps, i % 4);
                warps[thread / 32][step][thread % 32 * 4 + j]
            })
            .collect()
    } else {
        image(&a_tile, |row, column| if shape.transpose_a { a(column, row) } else { a(row, column) })
    };
    let right = image(&b_tile, |row, column| if shape.transpose_b { b(column, row) } else { b(row, column) });
    let mut memory = Memory::new();
    let args = [("a", &left), ("b", &right)].map(|(name, words)| Arg::Buffer(memory.upload(name, words), 0));
    let out = buffer(&mut memory, 128 * registers);
    let mut args = args.to_vec();
    args.push(Arg::Buffer(out, 0));
    let report = emulate(&kernel, &mut memory, &launch(&kernel, 1, args))
        .unwrap_or_else(|e| panic!("{shape:?} {swizzle:?} {e}"));
    let words: Vec<u32> = memory.read(out).unwrap();
    for thread in 0..128 {
        for (i, got) in
            unpack(shape.d, &words[thread * registers..(thread + 1) * registers]).into_iter().enumerate()
        {
            let (row, column) = place(thread, i);
            let sum: f64 = (0..steps * depth).map(|at| a(row, at) * b(column, at)).sum();
            assert_eq!(got, sum, "{shape:?} {swizzle:?} ({row}, {column})");
        }
    }
    assert_eq!(report.matrix_flops, (2 * 64 * n * depth * steps) as u64);
}

const PLAIN: WgmmaShape = WgmmaShape {
    n: 16,
    a: Element::BF16,
    b: Element::BF16,
    d: Accumulator::F32,
    a_in_registers: false,
    transpose_a: false,
    transpose_b: false,
};

#[test]
fn wgmma_of_every_type_and_width() {
    for element in ELEMENTS {
        for a_in_registers in [false, true] {
            check_wgmma(WgmmaShape { a: element, b: element, a_in_registers, n: 24, ..PLAIN }, Swizzle::B128);
        }
    }
    check_wgmma(WgmmaShape { a: Element::E4M3, b: Element::E5M2, ..PLAIN }, Swizzle::B128);
    for n in [8, 40, 128, 256] {
        check_wgmma(WgmmaShape { n, ..PLAIN }, Swizzle::B128);
    }
    for (element, n) in [(Element::F16, 32), (Element::E4M3, 8)] {
        check_wgmma(WgmmaShape { a: element, b: element, d: Accumulator::F16, n, ..PLAIN }, Swizzle::B128);
    }
}

#[test]
fn wgmma_of_every_swizzle_and_transposition() {
    for swizzle in [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128] {
        for (transpose_a, transpose_b) in [(false, false), (true, false), (false, true), (true, true)] {
            for n in [64, 136] {
                check_wgmma(WgmmaShape { n, transpose_a, transpose_b, ..PLAIN }, swizzle);
            }
        }
        check_wgmma(WgmmaShape { transpose_b: true, a_in_registers: true, ..PLAIN }, swizzle);
        check_wgmma(WgmmaShape { a: Element::E5M2, b: Element::E5M2, ..PLAIN }, swizzle);
    }
}

/// What is done wrong in a product.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wrong {
    Nothing,
    NoProxyFence,
    NoBarrier,
    NoFence,
    WriteAfterFence,
    ReadAfterFence,
    NoCommit,
    NoWait,
    WaitTooFew,
    OverwriteOperand,
    TouchA,
    OtherAccumulators,
    ThreeWarps,
}

fn product(wrong: Wrong) -> Kernel {
    let layout = TileLayout::new(64, 64, Element::BF16);
    kernel(128, |k| {
        let out = k.param_ptr("out");
        let tid = k.tid(0);
        let tile = k.shared("tile", layout.bytes(), 1024);
        k.for_(tid, layout.bytes() / 4, 128u32, |i| (tile + i * 4).store(k.var(0x3f80_3f80u32)));
        if wrong != Wrong::NoProxyFence {
            k.fence_proxy_async();
        }
        if wrong != Wrong::NoBarrier {
            k.sync_threads();
        }
        let d: Vec<crate::Reg<'_, f32>> = (0..32).map(|_| k.var(0f32)).collect();
        let a: [crate::Reg<'_, B32>; 4] = [0; 4].map(|_| k.var(0x3f80_3f80u32).bits());
        let descriptor = layout.k_major(tile);
        if wrong != Wrong::NoFence {
            k.wgmma_fence();
        }
        if wrong == Wrong::WriteAfterFence {
            d[5].set(0f32);
        }
        if wrong == Wrong::ReadAfterFence {
            let _ = d[5] + 1.0;
        }
        let issue = || {
            let shape = WgmmaShape { n: 64, ..PLAIN };
            k.wgmma(shape, &d, WgmmaA::Registers(&a), descriptor.step(0), true);
            if wrong == Wrong::OtherAccumulators {
                let turned: Vec<_> = d.iter().rev().copied().collect();
                k.wgmma(shape, &turned, WgmmaA::Registers(&a), descriptor.step(1), true);
            } else {
                k.wgmma(shape, &d, WgmmaA::Registers(&a), descriptor.step(1), true);
            }
        };
        if wrong == Wrong::ThreeWarps {
            k.if_(k.warp().lt(3u32), issue);
        } else {
            issue();
        }
        if wrong == Wrong::TouchA {
            let _ = a[2].bits::<u32>() + 1;
        }
        if wrong != Wrong::NoCommit {
            k.wgmma_commit();
        }
        match wrong {
            Wrong::NoWait => {}
            Wrong::WaitTooFew => k.wgmma_wait(1),
            Wrong::OverwriteOperand => {
                // Not the rows' own, so that only the order with the product is wrong.
                (tile + tid * 4).store(k.var(0u32));
                k.wgmma_wait(0);
            }
            _ => k.wgmma_wait(0),
        }
        (out + tid.to_u64() * 4).address().store(d[31]);
    })
}

#[test]
fn a_product_done_right() {
    let (words, report) = run(&product(Wrong::Nothing), 1, &[], 128).unwrap();
    assert!(words.iter().all(|&word| f32::from_bits(word) == 32.0));
    assert_eq!(report.instructions[&instr::Class::Matrix], 8);
}

#[test]
fn products_done_wrong() {
    let refused = |wrong| refused(&product(wrong), 1, 128);
    assert!(matches!(refused(Wrong::NoProxyFence), Error::MissingProxyFence { .. }));
    let error = refused(Wrong::NoBarrier);
    assert!(matches!(error, Error::Race { .. } | Error::Uninitialised { .. }), "{error}");
    for (wrong, needle) in [
        (Wrong::NoFence, "no wgmma.fence"),
        (Wrong::WriteAfterFence, "after the last wgmma.fence"),
        (Wrong::ReadAfterFence, "after the last wgmma.fence"),
        (Wrong::NoCommit, "wait_group"),
        (Wrong::NoWait, "wait_group"),
        (Wrong::WaitTooFew, "wait_group"),
        (Wrong::TouchA, "wait_group"),
        (Wrong::OtherAccumulators, "another place"),
    ] {
        let error = refused(wrong);
        assert!(
            matches!(error, Error::InFlight { .. }) && error.to_string().contains(needle),
            "{wrong:?}: {error}"
        );
    }
    match refused(Wrong::OverwriteOperand) {
        Error::Race { access: "write", other_access: "read", what, .. } => {
            assert!(what.contains("tile"), "{what}")
        }
        other => panic!("{other}"),
    }
    let error = refused(Wrong::ThreeWarps);
    assert!(
        matches!(&error, Error::PendingAtExit { problem, .. } if problem.contains("warpgroup")),
        "{error}"
    );
}

#[test]
fn products_need_whole_warpgroups_and_good_descriptors() {
    let make = |threads: u32, descriptor: u64| {
        kernel(threads, |k| {
            k.shared("tile", 4096, 1024);
            let d: Vec<crate::Reg<'_, f32>> = k.regs(4);
            k.wgmma_fence();
            let at = k.var(descriptor);
            k.wgmma(WgmmaShape { n: 8, ..PLAIN }, &d, WgmmaA::<B32>::Shared(at), at, false);
            k.wgmma_commit();
            k.wgmma_wait(0);
        })
    };
    assert!(matches!(refused(&make(96, 64), 1, 1), Error::BarrierMisuse { .. }));
    assert!(matches!(refused(&make(128, 1 << 49), 1, 1), Error::Unsupported { .. }));
    assert!(matches!(refused(&make(128, 64), 1, 1), Error::Uninitialised { .. }));
    assert!(matches!(refused(&make(128, 0x3fff), 1, 1), Error::OutOfBounds { .. }));
    assert!(matches!(refused(&make(128, 0), 1, 1), Error::OutOfBounds { .. }));
    let divergent = kernel(128, |k| k.if_(k.lane().lt(4u32), || k.wgmma_fence()));
    assert!(matches!(refused(&divergent, 1, 1), Error::DivergentAligned { active: 0xf, .. }));
}
