//! The example products with one synchronisation taken out: each is noticed.

use super::*;
use crate::examples::{MmaConfig, PersistentConfig, WgmmaConfig, gemm_mma, gemm_persistent, gemm_wgmma};
use crate::instr::{Class, Item};
use crate::kernel::TensorMap;

/// A kernel, its grid, and tensor maps in place of addresses.
type Case = (Kernel, [u32; 3], Vec<Option<TensorMap>>);

const SIZE: [u64; 3] = [130, 200, 264];

fn cases() -> Vec<Case> {
    let [m, n, k] = SIZE;
    let wgmma = WgmmaConfig { tile_n: 96, stages: 2 };
    let [a, b] = wgmma.tensor_maps(m, n, k);
    let mut cases = vec![
        (gemm_mma(&MmaConfig { stages: 3 }), [2, 2, 1], vec![None, None, None]),
        (gemm_wgmma(&wgmma), [2, 3, 1], vec![Some(a), Some(b), None]),
    ];
    for cluster in [1, 2] {
        let config = PersistentConfig { consumers: 2, tile_n: 64, stages: 2, cluster, group: 2 };
        let maps = config.tensor_maps(m, n, k).map(Some).to_vec();
        cases.push((gemm_persistent(&config), [2, 1, 1], maps));
    }
    cases
}

fn go((kernel, grid, maps): &Case, seed: u64) -> Result<(), Error> {
    let [m, n, k] = SIZE.map(|x| x as usize);
    let mut memory = Memory::new();
    let one = half::bf16::ONE.to_bits();
    let buffers = [
        memory.upload("a", &vec![one; m * k]),
        memory.upload("b", &vec![one; n * k]),
        memory.alloc("c", 2 * m * n),
    ];
    let mut args: Vec<Arg> = buffers
        .iter()
        .zip(maps)
        .map(|(&buffer, map)| match map {
            Some(map) => Arg::TensorMap(map.clone(), buffer, 0),
            None => Arg::Buffer(buffer, 0),
        })
        .collect();
    args.extend(SIZE.map(|x| Arg::U32(x as u32)));
    let launch = Launch { grid: *grid, args, shared_bytes: kernel.shared_bytes, seed, ..Launch::default() };
    emulate(kernel, &mut memory, &launch)?;
    let sum = half::bf16::from_f32(k as f32).to_bits();
    assert!(memory.read::<u16>(buffers[2])?.iter().all(|&c| c == sum));
    Ok(())
}

/// What may be missing unnoticed, because the rest of the kernel makes up for it.
const SPARE: [&str; 3] = [
    "mbarrier.try_wait", // for a stage that no one has used yet; for arrivals that a later wait implies
    "bar.warp.sync",     // brings lanes together, which the emulator's branches do by themselves
    "setmaxnreg.inc",    // speed only
];

#[test]
fn every_synchronisation_is_needed() {
    for case in cases() {
        for seed in 0..4 {
            go(&case, seed).unwrap_or_else(|error| panic!("{}: {error}", case.0.name));
        }
        let (mut caught, mut spare) = (0, 0);
        for (i, item) in case.0.body.iter().enumerate() {
            let Item::Instr(instr) = item else { continue };
            if instr.row.class != Class::Sync {
                continue;
            }
            let mut wrong = case.clone();
            wrong.0.body.remove(i);
            // Not in some interleavings: in every one.
            let seeds = (0..4).filter(|&seed| go(&wrong, seed).is_err()).count();
            if seeds == 4 {
                caught += 1;
                continue;
            }
            let text = &instr.row.text;
            assert!(SPARE.iter().any(|spare| text.contains(spare)), "{} {text}: {seeds} of 4", instr.site);
            spare += 1;
        }
        println!("{}: {caught} caught, {spare} to spare", case.0.name);
        assert!(caught >= 5 && spare <= 3, "{}: {caught} caught, {spare} to spare", case.0.name);
    }
}
