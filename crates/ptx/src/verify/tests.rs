//! For each rule a kernel that breaks just it, beside one that is right.

mod flow;
mod wgmma;

use super::*;
use crate::build::{Address, Builder, Reg, build};
use crate::hopper::{Mbarrier, WgmmaA};
use crate::instr::{
    self, Accumulator, AtomOp, Cache, Element, Operand, Order, Space, SpecialRegister, Target, WgmmaShape,
};
use crate::kernel::SharedRegion;
use crate::types::Type;

fn sm90(body: impl FnOnce(&Builder)) -> Kernel {
    build("k", Target::Sm90a, 128, body)
}

#[track_caller]
fn passes(kernel: &Kernel) {
    if let Err(errors) = verify(kernel) {
        panic!("{errors}");
    }
}

/// The kernel breaks this rule and no other; the first message has these words.
#[track_caller]
fn breaks(kernel: &Kernel, rule: Rule, words: &[&str]) -> VerifyErrors {
    let errors = verify(kernel).expect_err("the kernel breaks a rule");
    assert!(errors.errors.iter().all(|error| error.rule == rule), "{errors}");
    let text = errors.errors[0].to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
    errors
}

#[test]
fn examples_pass() {
    use crate::examples::*;
    for kernel in [vector_add(), reduction(), softmax()] {
        passes(&kernel);
    }
    passes(&gemm_mma(&MmaConfig { stages: 3 }));
    passes(&gemm_wgmma(&WgmmaConfig { tile_n: 128, stages: 4 }));
    passes(&gemm_persistent(&PersistentConfig::H100));
}

#[test]
fn errors_name_the_rust_line() {
    let line = line!() + 1;
    let kernel = sm90(|k| k.bar_sync(16, 128));
    let errors = breaks(&kernel, Rule::Barrier, &["barrier 16", "0 to 15"]);
    let site = errors.errors[0].site.unwrap();
    assert!(site.file().ends_with("verify/tests.rs") || site.file().ends_with("verify\\tests.rs"));
    assert_eq!((site.line(), site.column() > 1), (line, true));
    assert!(errors.to_string().contains(&format!("tests.rs:{line}:")), "{errors}");
}

#[test]
fn every_error_is_found() {
    let errors = verify(&sm90(|k| {
        k.bar_sync(16, 128);
        k.bar_sync(0, 100);
    }))
    .unwrap_err();
    assert_eq!(errors.errors.len(), 2);
}

#[test]
fn names() {
    let named = |kernel: &str, params: &[&str]| {
        let mut kernel = build(kernel, Target::Sm80, 32, |_| {});
        let kind = crate::kernel::ParamKind::U32;
        kernel.params = params.iter().map(|&name| crate::kernel::Param { name: name.into(), kind }).collect();
        kernel
    };
    passes(&named("flash_fwd$1", &["x", "_y"]));
    for name in ["", "_", "1a", "a b", "a;", "é", "WARP_SZ"] {
        breaks(&named(name, &[]), Rule::Name, &["letters"]);
        breaks(&named("k", &[name]), Rule::Name, &["letters"]);
    }
    breaks(&named("k", &["x", "x"]), Rule::Name, &["twice"]);
    breaks(&named("k", &["shared_memory"]), Rule::Name, &["twice"]);
    breaks(
        &sm90(|k| {
            k.shared("a\n.evil", 8, 8);
        }),
        Rule::Name,
        &["one line"],
    );
}

#[test]
fn launch_shapes() {
    let shaped = |block, cluster, min_blocks, target| {
        let mut kernel = build("k", target, 32, |_| {});
        (kernel.block, kernel.cluster, kernel.min_blocks) = (block, cluster, min_blocks);
        kernel
    };
    passes(&shaped([1024, 1, 1], [8, 1, 1], 2, Target::Sm90));
    passes(&shaped([16, 1, 64], [1; 3], 1, Target::Sm80));
    for (block, min_blocks) in [
        ([1025, 1, 1], 1),
        ([32, 0, 1], 1),
        ([1, 1, 65], 1),
        ([u32::MAX; 3], 1),
        ([32, 1, 1], 0),
        ([1024, 1, 1], 3),
    ] {
        breaks(&shaped(block, [1; 3], min_blocks, Target::Sm80), Rule::Launch, &["got"]);
    }
    breaks(&shaped([32, 1, 1], [16, 1, 1], 1, Target::Sm90), Rule::Launch, &["16 blocks", "1 to 8"]);
    breaks(&shaped([32, 1, 1], [2, 0, 1], 1, Target::Sm90), Rule::Launch, &["0 blocks"]);
    breaks(&shaped([32, 1, 1], [2, 1, 1], 1, Target::Sm80), Rule::Target, &["sm_90"]);
}

#[test]
fn parameters_fit() {
    let with = |maps: usize| {
        sm90(|k| {
            k.param_u32("n");
            (0..maps).for_each(|i| {
                k.param_tensor_map(&format!("map{i}"));
            });
        })
    };
    passes(&with(31));
    breaks(&with(32), Rule::Parameters, &["4160 bytes", "4096"]);
}

#[test]
fn shared_memory_fits() {
    let with = |bytes| {
        build("k", Target::Sm80, 32, |k| {
            k.shared("a", bytes, 16);
        })
    };
    passes(&with(163 * 1024));
    breaks(&with(163 * 1024 + 1), Rule::Shared, &["166913 bytes", "166912"]);
    let mut kernel = with(64);
    let region = |offset, bytes| SharedRegion { name: "b".into(), offset, bytes };
    kernel.shared.push(region(32, 32));
    breaks(&kernel, Rule::Shared, &["overlap", "\"b\" from byte 32"]);
    kernel.shared[1] = region(u32::MAX, u32::MAX);
    breaks(&kernel, Rule::Shared, &["within the kernel's 64 bytes"]);
    kernel.shared[1] = region(64, 0);
    passes(&kernel);
}

#[test]
fn instructions_of_the_target() {
    let kernel = |target| build("k", target, 32, |k| k.push(instr::GRID_DEP_WAIT, &[], &[]));
    passes(&kernel(Target::Sm90));
    breaks(&kernel(Target::Sm80), Rule::Target, &["griddepcontrol.wait for sm_80", "expected sm_90"]);
}

#[test]
fn operands_are_as_the_row_says() {
    let float = Operand::Imm(0, Type::F32);
    type Body<'a> = &'a dyn Fn(&Builder, Reg<'_, f32>, Reg<'_, u32>);
    let with = |f: Body| sm90(|k| f(k, k.var(1f32), k.var(1u32)));
    passes(&with(&|k, x, n| {
        k.push(instr::ADD_F32, &[x.id], &[Operand::Reg(x.id), float]);
        k.push(instr::MOV_B32, &[n.id], &[Operand::Reg(x.id)]);
    }));
    let refused = |words: &[&str], f: Body| {
        breaks(&with(f), Rule::Operand, words);
    };
    refused(&["1 results and 1 operands", "1 and 2"], &|k, x, _| k.push(instr::ADD_F32, &[x.id], &[float]));
    refused(&["u32", "operand 2", "f32 or a constant"], &|k, x, n| {
        k.push(instr::ADD_F32, &[x.id], &[float, Operand::Reg(n.id)])
    });
    refused(&["result 1"], &|k, _, n| k.push(instr::ADD_F32, &[n.id], &[float, float]));
    refused(&["constant u64"], &|k, x, _| {
        k.push(instr::ADD_F32, &[x.id], &[float, Operand::Imm(0, Type::U64)])
    });
    refused(&["register 99"], &|k, x, _| k.push(instr::NEG_F32, &[x.id], &[Operand::Reg(RegId(99))]));
    refused(&["the address"], &|k, x, _| k.push(instr::NEG_F32, &[x.id], &[Operand::Address(x.id, 4)]));
    refused(&["address u32"], &|k, _, n| k.push(instr::MBARRIER_ARRIVE, &[], &[Operand::Reg(n.id)]));
    refused(&["constant f16x2", "a register f16x2"], &|k, _, _| {
        let pair = k.reg::<crate::types::F16x2>();
        k.push(instr::EX2_F16X2, &[pair.id], &[Operand::Imm(0, Type::F16x2)]);
    });
    refused(&["parameter Some(3), None"], &|k, _, n| {
        k.push(instr::param(Type::U32), &[n.id], &[Operand::Imm(3, Type::U32)])
    });
    refused(&["Some(U64)", "Some(U32)"], &|k, _, n| {
        k.param_ptr("p");
        k.push(instr::param(Type::U32), &[n.id], &[Operand::Imm(0, Type::U32)]);
    });
    refused(&["as predicate", "a pred"], &|k, x, n| {
        k.state_guard(n.id, || k.push(instr::NEG_F32, &[x.id], &[float]));
    });
}

/// A guard of any type, which the builder's types do not let one write.
trait AnyGuard {
    fn state_guard(&self, id: RegId, body: impl FnOnce());
}
impl AnyGuard for Builder {
    fn state_guard(&self, id: RegId, body: impl FnOnce()) {
        let mut wrong = self.reg::<bool>();
        wrong.id = id;
        self.when(wrong, body);
    }
}

#[test]
fn tensor_maps_have_no_offset() {
    let with = |offset| {
        sm90(|k| {
            let (map, x) = (k.param_tensor_map("map"), k.var(0i32));
            k.push(instr::tma_prefetch(1), &[], &[map.at(offset).operand(), Operand::Reg(x.id)]);
        })
    };
    passes(&with(0));
    breaks(&with(64), Rule::Operand, &["offset of 64"]);
}

#[test]
fn forms_that_exist() {
    // Each family at one row that PTX has, and at rows that it does not have.
    let registers = |k: &Builder, row: &Row| {
        let (mut dst, mut src) = (Vec::new(), Vec::new());
        for token in row.tokens() {
            let instr::Token::Operands { access, ty, count, .. } = token else { continue };
            for _ in 0..count {
                let id = match ty {
                    Type::F32 => k.var(0f32).id,
                    Type::F16x2 => k.reg::<crate::types::F16x2>().id,
                    Type::B16 => k.var(0u16).id,
                    Type::U64 => k.var(0u64).id,
                    Type::S64 => k.var(0i64).id,
                    Type::S32 => k.var(0i32).id,
                    Type::Pred => k.var(false).id,
                    _ => k.var(0u32).id,
                };
                match access {
                    instr::Access::Read => src.push(Operand::Reg(id)),
                    instr::Access::Address => src.push(Operand::Address(id, 0)),
                    _ => dst.push(id),
                }
            }
        }
        (dst, src)
    };
    let alone = |row: Row| {
        sm90(|k| {
            let (dst, src) = registers(k, &row);
            k.wgmma_fence();
            k.push(row, &dst, &src);
        })
    };
    use Element::*;
    let shape = WgmmaShape {
        n: 64,
        a: BF16,
        b: BF16,
        d: Accumulator::F32,
        a_in_registers: false,
        transpose_a: true,
        transpose_b: true,
    };
    let load = |ty, count| instr::load(Space::Shared, ty, count, Order::Weak, Cache::Default);
    let store = |ty, count| instr::store(Space::Global, ty, count, Order::Weak);
    let atom = |op, ty| instr::atom(Space::Global, op, ty, Order::Relaxed);
    let red = |space, op, ty, count| instr::red(space, op, ty, count, Order::Relaxed);
    for row in [
        load(Type::F32, 4),
        store(Type::U64, 2),
        atom(AtomOp::Add, Type::U64),
        atom(AtomOp::Min, Type::S64),
        atom(AtomOp::Cas, Type::U64),
        red(Space::Global, AtomOp::Add, Type::F32, 4),
        instr::mma(F16, F16, 8, Accumulator::F16),
        instr::redux(AtomOp::Max),
        instr::ldmatrix(4, true),
        instr::set_max_registers(true, 240),
        instr::tma_store(5),
        instr::wgmma(shape),
        instr::wgmma(WgmmaShape {
            n: 256,
            a: E4M3,
            b: E5M2,
            d: Accumulator::F16,
            transpose_a: false,
            transpose_b: false,
            ..shape
        }),
    ] {
        passes(&alone(row));
    }
    for row in [
        load(Type::U64, 4),
        load(Type::B16, 3),
        store(Type::F32, 8),
        atom(AtomOp::Add, Type::S64),
        atom(AtomOp::Min, Type::F32),
        atom(AtomOp::Add, Type::F16x2),
        atom(AtomOp::Inc, Type::U64),
        red(Space::Global, AtomOp::Exch, Type::U32, 1),
        red(Space::Shared, AtomOp::Add, Type::F32, 2),
        instr::mma(BF16, BF16, 16, Accumulator::F16),
        instr::mma(F16, BF16, 16, Accumulator::F32),
        instr::mma(TF32, TF32, 16, Accumulator::F32),
        instr::redux(AtomOp::Exch),
        instr::ldmatrix(3, false),
        instr::set_max_registers(true, 241),
        instr::set_max_registers(false, 16),
        instr::tma_store(6),
        instr::wgmma(WgmmaShape { n: 12, ..shape }),
        instr::wgmma(WgmmaShape { n: 264, ..shape }),
        instr::wgmma(WgmmaShape { n: 0, ..shape }),
        instr::wgmma(WgmmaShape { a: F16, ..shape }),
        instr::wgmma(WgmmaShape { d: Accumulator::F16, ..shape }),
        instr::wgmma(WgmmaShape { a: TF32, b: TF32, ..shape }),
        instr::wgmma(WgmmaShape { a_in_registers: true, ..shape }),
    ] {
        breaks(&alone(row), Rule::Form, &["expected"]);
    }
}

#[test]
fn constants_in_range() {
    let copy = |row: Row, size: u32, valid: u32| {
        sm90(|k| {
            let (to, from) = (k.shared("a", 64, 16), k.param_ptr("p").address());
            let constants = [size, valid].map(|n| Operand::Imm(n.into(), Type::U32));
            k.push(row, &[], &[to.operand(), from.operand(), constants[0], constants[1]]);
        })
    };
    passes(&copy(instr::CP_ASYNC, 16, 0));
    passes(&copy(instr::CP_ASYNC_SMALL, 4, 4));
    breaks(&copy(instr::CP_ASYNC, 8, 8), Rule::Form, &["size of Some(8)"]);
    breaks(&copy(instr::CP_ASYNC_SMALL, 4, 8), Rule::Form, &["Some(8) source bytes"]);
    let bulk = |bytes: u32| sm90(|k| k.bulk_store(k.param_ptr("p").address(), k.shared("a", 64, 16), bytes));
    passes(&bulk(32));
    breaks(&bulk(24), Rule::Form, &["24 bytes", "multiple of 16"]);
    let wait = |parity: u32| sm90(|k| Mbarrier(k.shared("a", 8, 8)).wait(k, parity));
    passes(&wait(1));
    breaks(&wait(2), Rule::Form, &["parity 2"]);
}

#[test]
fn barriers_have_whole_warps() {
    let bar = |threads| sm90(move |k| k.bar_sync(15, threads));
    passes(&bar(64));
    for threads in [0, 100, 160] {
        breaks(&bar(threads), Rule::Barrier, &[&format!("{threads} threads"), "128"]);
    }
}

#[test]
fn several_lines_have_no_guard() {
    breaks(
        &sm90(|k| {
            let bar = Mbarrier(k.shared("a", 8, 8));
            k.when(k.var(true), || bar.wait(k, 0));
        }),
        Rule::Guard,
        &["mbarrier.try_wait", "a branch around it"],
    );
    breaks(
        &sm90(|k| {
            k.when(k.var(true), || {
                k.param_tensor_map("m");
            })
        }),
        Rule::Guard,
        &["mov.b64"],
    );
}
