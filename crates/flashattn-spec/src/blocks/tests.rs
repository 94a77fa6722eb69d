use super::*;
use crate::element::DType;
use crate::mask::tests::{any_mask, is_visible, named, with_mask};
use crate::mask::{BlockMask, Mask};
use proptest::prelude::*;

/// Whether any and whether all elements of a tile are visible, by looking at each.
fn look(problem: &AttentionProblem, schedule: &BlockSchedule, [b, h, m, n]: [usize; 4]) -> (bool, bool) {
    let s = problem.sequence(b);
    let (mut any, mut all) = (false, true);
    for q in m * schedule.tile_m()..s.seqlen_q.min((m + 1) * schedule.tile_m()) {
        for kv in n * schedule.tile_n()..s.seqlen_k.min((n + 1) * schedule.tile_n()) {
            let visible = is_visible(&problem.mask, problem, [b, h, q, kv]);
            (any, all) = (any || visible, all && visible);
        }
    }
    (any, all)
}

fn check(problem: &AttentionProblem, tile_m: usize, tile_n: usize, exact: bool) -> Result<(), TestCaseError> {
    let schedule = BlockSchedule::new(problem, tile_m, tile_n).unwrap();
    let mut counts = BlockCounts::default();
    for b in 0..problem.batch {
        let s = problem.sequence(b);
        let (m_blocks, n_blocks) = (schedule.m_blocks(b), schedule.n_blocks(b));
        prop_assert_eq!((m_blocks, n_blocks), (s.seqlen_q.div_ceil(tile_m), s.seqlen_k.div_ceil(tile_n)));
        for h in 0..problem.heads_q {
            let columns: Vec<_> = (0..n_blocks).map(|n| schedule.column(b, h, n)).collect();
            for m in 0..m_blocks {
                let row = schedule.row(b, h, m);
                prop_assert!(row.iter().all(|r| r.n_block_min < r.n_block_max && r.n_block_max <= n_blocks));
                let ordered = |r: &[Run]| {
                    r[0].n_block_max < r[1].n_block_min
                        || r[0].n_block_max == r[1].n_block_min && r[0].kind != r[1].kind
                };
                prop_assert!(row.windows(2).all(ordered), "runs ascend and are as long as can be: {:?}", row);
                for (n, column) in columns.iter().enumerate() {
                    let place = [b, h, m, n];
                    let kind = schedule.kind(b, h, m, n);
                    let in_column: Vec<_> = column.iter().filter(|(range, _)| range.contains(&m)).collect();
                    prop_assert!(in_column.len() <= 1);
                    prop_assert_eq!(kind, in_column.first().map(|(_, kind)| *kind));
                    let (any, all) = look(problem, &schedule, place);
                    match kind {
                        None => prop_assert!(!any, "{:?} skipped", place),
                        Some(BlockKind::Full) => prop_assert!(all, "{:?} taken whole", place),
                        Some(BlockKind::Partial) => {
                            prop_assert!(!exact || (any && !all), "{:?} need not be taken in part", place)
                        }
                    }
                    match kind {
                        None => counts.skipped += 1,
                        Some(BlockKind::Full) => counts.full += 1,
                        Some(BlockKind::Partial) => counts.partial += 1,
                    }
                }
            }
        }
    }
    prop_assert_eq!(schedule.counts(), counts);
    Ok(())
}

proptest! {
    #[test]
    fn no_mask_is_lost(problem in with_mask(any_mask), tile_m in 1..24usize, tile_n in 1..24usize) {
        check(&problem, tile_m, tile_n, false)?;
    }

    #[test]
    fn named_masks_are_exact(problem in with_mask(named), tile_m in 1..24usize, tile_n in 1..24usize) {
        check(&problem, tile_m, tile_n, true)?;
    }
}

fn schedule(seqlen_q: usize, seqlen_k: usize, mask: Mask, tile: usize) -> BlockSchedule {
    let mut problem = AttentionProblem::new(2, seqlen_q, 3, 8, DType::F32);
    problem.seqlen_k = seqlen_k;
    problem.mask = mask;
    BlockSchedule::new(&problem, tile, tile).unwrap()
}

/// One sequence and head as a picture: `#` whole, `+` in part, `.` skipped.
fn picture(schedule: &BlockSchedule, batch: usize, head: usize) -> Vec<String> {
    let symbol = |m, n| match schedule.kind(batch, head, m, n) {
        None => '.',
        Some(BlockKind::Full) => '#',
        Some(BlockKind::Partial) => '+',
    };
    let row = |m| (0..schedule.n_blocks(batch)).map(|n| symbol(m, n)).collect();
    (0..schedule.m_blocks(batch)).map(row).collect()
}

#[test]
fn pictures() {
    assert_eq!(picture(&schedule(32, 32, Mask::causal(), 8), 0, 0), ["+...", "#+..", "##+.", "###+"]);
    // The last query is level with the last key: here the first two queries of the first tile see no key.
    assert_eq!(picture(&schedule(18, 16, Mask::causal(), 8), 0, 0), ["+.", "++", "#+"]);
    assert_eq!(picture(&schedule(32, 32, Mask::window(8, 0), 8), 0, 0), ["+...", "++..", ".++.", "..++"]);
    assert_eq!(picture(&schedule(32, 32, Mask::chunked(16), 8), 0, 0), ["##..", "##..", "..##", "..##"]);
    let prefix = Mask::prefix_lm(&[10, 24]);
    let two = schedule(32, 32, prefix, 8);
    assert_eq!(picture(&two, 0, 1), ["#+..", "#+..", "##+.", "###+"]);
    assert_eq!(picture(&two, 1, 1), ["###.", "###.", "###.", "###+"]);
    let ids: Vec<i32> = [[7; 12].as_slice(), &[3; 20], &[5; 32]].concat();
    let documents = schedule(32, 32, Mask::document(&ids), 8);
    assert_eq!(picture(&documents, 0, 0), ["#+..", "++++", ".+##", ".+##"]);
    assert_eq!(picture(&documents, 1, 0), ["####"; 4]);
    let ragged = schedule(17, 9, Mask::full(), 8);
    assert_eq!(picture(&ragged, 0, 0), ["##"; 3], "tails are whole if what exists is visible");
}

#[test]
fn what_the_mask_cannot_tell_apart_is_planned_once() {
    assert_eq!(schedule(32, 32, Mask::full(), 8).distinct(), 1);
    assert_eq!(schedule(32, 32, Mask::causal(), 8).distinct(), 1);
    assert_eq!(schedule(32, 32, Mask::prefix_lm(&[4, 5]), 8).distinct(), 2);
    assert_eq!(schedule(32, 32, Mask::document(&[0; 64]), 8).distinct(), 2);
    let blocks = |b, h| {
        Mask::Block(BlockMask::from_fn([b, h, 4, 4], 8, 8, |b, h, m, n| (b + h + m + n) % 2 == 0).unwrap())
    };
    assert_eq!(schedule(32, 32, blocks(1, 1), 8).distinct(), 1);
    assert_eq!(schedule(32, 32, blocks(1, 3), 8).distinct(), 3);
    assert_eq!(schedule(32, 32, blocks(2, 1), 8).distinct(), 2);
    let six = schedule(32, 32, blocks(2, 3), 8);
    assert_eq!(six.distinct(), 6);
    assert_eq!(picture(&six, 0, 0), ["#.#.", ".#.#", "#.#.", ".#.#"]);
    assert_eq!(picture(&six, 1, 2), [".#.#", "#.#.", ".#.#", "#.#."]);
    let packed = AttentionProblem::new(1, 1, 2, 8, DType::F32).with_varlen(&[0, 9, 18, 20], &[0, 9, 18, 18]);
    let packed = AttentionProblem { mask: Mask::causal(), ..packed };
    let packed = BlockSchedule::new(&packed, 4, 4).unwrap();
    assert_eq!(packed.distinct(), 2, "the first two have the same lengths");
    assert_eq!((packed.m_blocks(2), packed.n_blocks(2)), (1, 0));
    assert!(packed.row(2, 0, 0).is_empty());
}

#[test]
fn counts() {
    let counts = schedule(32, 32, Mask::causal(), 8).counts();
    assert_eq!(counts, BlockCounts { skipped: 36, full: 36, partial: 24 });
    assert_eq!((counts.total(), counts.visible(), counts.density()), (96, 60, 0.625));
    assert_eq!(schedule(0, 32, Mask::causal(), 8).counts().density(), 0.0);
}

#[test]
fn outside_of_the_problem_there_is_nothing() {
    let causal = schedule(32, 32, Mask::causal(), 8);
    for [b, h, m] in [[2, 0, 0], [0, 3, 0], [0, 0, 4], [usize::MAX / 8, 0, 0]] {
        assert!(causal.row(b, h, m).is_empty());
    }
    assert!(causal.column(0, 0, 4).is_empty() && causal.column(5, 0, 0).is_empty());
    assert_eq!(causal.kind(0, 0, 3, 4), None);
    assert_eq!((causal.m_blocks(2), causal.n_blocks(2)), (0, 0));
    // A batch of nothing takes no time and no memory, but has its KV tiles.
    let nothing = AttentionProblem::new(1 << 29, 0, 1 << 20, 8, DType::F32);
    let ids = Mask::document(&[]).and(Mask::custom(|ix| ix.kv.gt(ix.head)).unwrap());
    let nothing = AttentionProblem { mask: ids, ..nothing };
    assert_eq!(BlockSchedule::new(&nothing, 4, 4).unwrap().distinct(), 1);
    let no_queries = schedule(0, 9, Mask::causal(), 4);
    assert_eq!((no_queries.m_blocks(1), no_queries.n_blocks(1)), (0, 3));
    let bad = AttentionProblem::new(2, 4, 2, 0, DType::F32);
    assert_eq!(BlockSchedule::new(&bad, 4, 4).unwrap_err(), ProblemError::Zero { name: "head_dim" });
    let good = AttentionProblem::new(2, 4, 2, 8, DType::F32);
    assert_eq!(BlockSchedule::new(&good, 4, 0).unwrap_err(), ProblemError::Zero { name: "tile_n" });
}

/// Sizes alone, before any tensor is seen, must take neither the memory nor the time that tensors of such sizes would.
#[test]
fn huge_problems_cost_nothing_or_are_refused() {
    let plan = |batch, seqlen, heads, mask| {
        let problem = AttentionProblem { mask, ..AttentionProblem::new(batch, seqlen, heads, 8, DType::F32) };
        BlockSchedule::new(&problem, 16, 64)
    };
    let refused = |result: Result<BlockSchedule, ProblemError>| match result {
        Err(ProblemError::TooLarge { name, got, max }) => {
            assert!(name.contains("block schedule") && got > max, "{name}: {got} of {max}")
        }
        other => panic!("expected to be refused: {other:?}"),
    };
    let full = plan(1, 1_000_000_000, 1, Mask::full()).unwrap();
    assert_eq!((full.m_blocks(0), full.n_blocks(0)), (62_500_000, 15_625_000));
    assert_eq!(full.row(0, 0, 62_499_999), full.row(0, 0, 0));
    assert!(full.row(0, 0, 62_500_000).is_empty());
    assert_eq!(full.counts(), BlockCounts { skipped: 0, full: 62_500_000 * 15_625_000, partial: 0 });
    assert_eq!(plan(1 << 29, 1, 1 << 20, Mask::full()).unwrap().counts().full, 1 << 49);
    refused(plan(1, 1_000_000_000, 1, Mask::causal()));
    refused(plan(1 << 20, 1 << 9, 1 << 20, Mask::custom(|ix| ix.kv.gt(ix.head)).unwrap()));
    let by_batch = Mask::custom(|ix| ix.kv.gt(ix.head + ix.batch)).unwrap();
    refused(plan(1 << 20, 1 << 9, 1 << 20, by_batch));
    let error = plan(1, 1 << 40, 1, Mask::causal()).unwrap_err();
    assert_eq!(error.to_string(), "seqlen_q is 1099511627776, expected at most 1073741823");
    // Few rows, but with a run for every other tile of keys: planning stops.
    let stripes = Mask::custom(|ix| (ix.kv / 64 % 2).eq(0)).unwrap();
    let problem = AttentionProblem { mask: stripes, ..AttentionProblem::new(1, 4096, 1, 8, DType::F32) };
    let mask = problem.mask.lower().unwrap();
    let needed = Planner::plan(&mask, 0, 0, &problem.sequence(0), 64, 64, 1000).unwrap_err();
    assert!((1001..=1000 + 33).contains(&needed), "{needed}");
}

/// Planning must not look at every tile: a mask with one edge costs about as many bounds as the edge crosses tiles,
/// whatever the area.
#[test]
fn work_grows_with_the_edges_of_the_mask() {
    let steps = |seqlen: usize, mask: Mask| {
        let mask = mask.lower().unwrap();
        let mut problem = AttentionProblem::new(1, seqlen, 1, 8, DType::F32);
        problem.seqlen_k = seqlen;
        Planner::plan(&mask, 0, 0, &problem.sequence(0), 64, 64, MAX_ENTRIES).unwrap().1
    };
    for mask in [Mask::causal(), Mask::window(1000, 0), Mask::chunked(2048).and(Mask::causal())] {
        let (short, long) = (steps(8192, mask.clone()), steps(65536, mask.clone()));
        assert!(short < 128 * 128 / 4, "{short} bounds for 128 x 128 tiles, {mask:?}");
        assert!(long < 9 * short, "{long} bounds for 1024 x 1024 tiles, {short} for 128 x 128, {mask:?}");
    }
}
