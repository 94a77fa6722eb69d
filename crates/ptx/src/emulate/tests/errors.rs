//! What is refused before anything runs, and that results do not depend on threads.

use super::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::build::Value;
use crate::instr::{self, Access, Item, Operand, RegId, Token};
use crate::types::Type;

#[test]
fn arguments_are_checked() {
    let k = kernel(32, |k| {
        k.param_ptr("x");
        k.param_f32("scale");
    });
    let mut memory = Memory::new();
    let x = memory.alloc("x", 4);
    let mut go = |args: Vec<Arg>| emulate(&k, &mut memory, &launch(&k, 1, args)).map(|_| ());
    assert_eq!(go(vec![Arg::Buffer(x, 0), Arg::F32(1.0)]), Ok(()));
    assert!(matches!(go(vec![]), Err(Error::ArgumentCount { got: 0, expected: 2, .. })));
    let error = go(vec![Arg::Buffer(x, 0), Arg::U32(1)]).unwrap_err();
    assert_eq!(error.to_string(), "argument 1 (scale) of kernel test: expected an f32, got a u32");
    let foreign = {
        let mut other = Memory::new();
        other.alloc("a", 4);
        other.alloc("b", 4)
    };
    assert!(matches!(
        go(vec![Arg::Buffer(foreign, 0), Arg::F32(1.0)]),
        Err(Error::Argument { index: 0, .. })
    ));
}

#[test]
fn shapes_are_checked() {
    let with = |change: &dyn Fn(&mut Kernel, &mut Launch)| {
        let mut k = kernel(32, |k| {
            k.cluster([2, 1, 1]);
            k.shared("tile", 1000, 16);
        });
        let mut l = launch(&k, 2, vec![]);
        change(&mut k, &mut l);
        emulate(&k, &mut Memory::new(), &l).map(|report| report.warnings.len())
    };
    assert_eq!(with(&|_, _| {}), Ok(0));
    assert_eq!(with(&|_, l| l.shared_bytes = 2000), Ok(1));
    type Change<'a> = &'a dyn Fn(&mut Kernel, &mut Launch);
    let wrong: [Change<'_>; 7] = [
        &|_, l| l.grid = [3, 1, 1],
        &|_, l| l.grid = [2, 0, 1],
        &|_, l| l.shared_bytes = 999,
        &|_, l| l.shared_bytes = 228 * 1024,
        &|k, _| k.block = [2048, 1, 1],
        &|k, _| k.cluster = [0, 1, 1],
        &|k, _| k.block = [u32::MAX, 3, 1],
    ];
    for change in wrong {
        assert!(matches!(with(change), Err(Error::LaunchShape { .. })));
    }
}

#[test]
fn malformed_kernels_are_refused() {
    let good = kernel(32, |k| {
        let x = k.var(1u32);
        k.if_(x.eq(1u32), || drop_value(x + 1));
        k.loop_(|| k.break_if(x.eq(1u32)));
    });
    let go = |k: &Kernel| emulate(k, &mut Memory::new(), &launch(k, 1, vec![])).map(|_| ());
    assert_eq!(go(&good), Ok(()));
    // The loop without its break would spin.
    let removed = |item: &Item| !matches!(item, Item::BreakIf { .. });
    for remove in (0..good.body.len()).filter(|&i| removed(&good.body[i])) {
        let mut k = good.clone();
        let item = k.body.remove(remove);
        let refused = matches!(go(&k), Err(Error::Malformed { .. }));
        assert_eq!(refused, !matches!(item, Item::Instr(_)), "{item:?}");
    }
    let mut k = good.clone();
    for item in &mut k.body {
        if let Item::Instr(instr) = item {
            instr.src.pop();
        }
    }
    assert!(matches!(go(&k), Err(Error::Malformed { .. })));
    let mut k = good;
    if let Item::Instr(instr) = &mut k.body[0] {
        instr.dst[0] = RegId(9999);
    }
    assert!(matches!(go(&k), Err(Error::Malformed { .. })));
}

fn drop_value<T>(_: crate::Reg<'_, T>) {}

/// Of blocks that fail, the first is reported whatever the number of threads.
#[test]
fn the_first_failing_block_is_reported() {
    let k = kernel(32, |k| {
        let out = k.param_ptr("out");
        (out + (k.ctaid(0) * 32 + k.lane()).to_u64() * 4).address().store(k.lane());
    });
    for threads in [1, 2, 7] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let error = pool.install(|| {
            let mut memory = Memory::new();
            let out = buffer(&mut memory, 32 * 13 + 5);
            emulate(&k, &mut memory, &launch(&k, 40, vec![Arg::Buffer(out, 0)])).unwrap_err()
        });
        match error {
            Error::OutOfBounds { at, .. } => assert_eq!((at.block, at.lane), ([13, 0, 0], Some(5))),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn errors_say_who_and_where() {
    let k = kernel(64, |k| {
        let out = k.param_ptr("out");
        k.if_(k.tid(0).eq(37u32), || out.address().at(400).store(k.var(0u32)));
    });
    let text = refused(&k, 1, 1).to_string();
    for needle in
        ["tests/errors.rs:", "kernel test, block (0, 0, 0), warp 1, lane 5", "buffer out, which has 4 bytes"]
    {
        assert!(text.contains(needle), "{text}");
    }
}

/// A kernel of one instruction whose operands are constants.
fn single(row: &instr::Row, constant: &mut dyn FnMut(Access, Type) -> u64) -> Kernel {
    kernel(128, |k| {
        let (pointer, tile) = (k.param_ptr("out"), k.shared("tile", 4096, 1024));
        let map = k.param_tensor_map("map");
        let (mut dst, mut src) = (Vec::new(), Vec::new());
        for token in row.tokens() {
            let Token::Operands { access, ty, count, .. } = token else { continue };
            for _ in 0..count {
                let value = Operand::Imm(constant(access, ty), ty);
                let made = |id: Operand| id.register().unwrap();
                let register = match (access, ty) {
                    (Access::Address, Type::U32) => made(tile.operand()),
                    (Access::Address, _) if row.text.contains("tensor") => made(map.operand()),
                    (Access::Address, _) => made(pointer.operand()),
                    (_, Type::Pred) => made(k.result::<bool>(instr::MOV_PRED, &[value]).operand()),
                    (_, Type::B16) => made(k.result::<u16>(instr::MOV_B16, &[value]).operand()),
                    (_, Type::F32) => made(k.result::<f32>(instr::MOV_B32, &[value]).operand()),
                    (_, ty) if ty.bits() == 64 => made(k.result::<u64>(instr::MOV_B64, &[value]).operand()),
                    _ => made(k.result::<u32>(instr::MOV_B32, &[value]).operand()),
                };
                match access {
                    Access::Write | Access::ReadWrite => dst.push(register),
                    Access::Read => src.push(Operand::Reg(register)),
                    Access::Address => src.push(Operand::Address(register, value_bits(value) as i32 & 0xff0)),
                }
            }
        }
        k.wgmma_fence();
        k.push(row.clone(), &dst, &src);
    })
}

fn value_bits(operand: Operand) -> u64 {
    if let Operand::Imm(bits, _) = operand { bits } else { 0 }
}

/// Every row of the table runs or is refused, whatever its operands hold: nothing panics.
#[test]
fn no_operand_breaks_the_emulator() {
    let map = crate::TensorMap {
        element: crate::TensorElement::F32,
        shape: vec![64],
        strides: vec![],
        tile: vec![16],
        swizzle: crate::Swizzle::None,
    };
    let mut rng = SmallRng::seed_from_u64(1);
    let (mut ran, mut refused) = (0, 0);
    for row in instr::all_rows() {
        for round in 0..4 {
            let mut constant = |_, ty: Type| match round {
                0 if ty == Type::B32 => u32::MAX as u64, // member masks
                0 => 32,
                1 => rng.random_range(0..64),
                _ => rng.random::<u64>() >> (64 - ty.bits()),
            };
            let k = single(&row, &mut constant);
            let mut memory = Memory::new();
            let out = memory.upload("out", &[0u32; 4096]);
            let args = vec![Arg::Buffer(out, 0), Arg::TensorMap(map.clone(), out, 0)];
            match emulate(&k, &mut memory, &launch(&k, 1, args)) {
                Ok(_) => ran += 1,
                Err(Error::Malformed { problem, .. }) => panic!("{}: {problem}", row.text),
                Err(_) => refused += 1,
            }
        }
    }
    assert!(ran > 400 && refused > 400, "{ran} ran, {refused} were refused");
}
