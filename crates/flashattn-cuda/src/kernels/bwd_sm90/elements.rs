//! From the scores and dP of a block to P and dS, an element at a time.

use std::f32::consts::LOG2_E;

use ptx::Fragment;
use ptx::build::{Address, Builder, Half, Reg};

use super::consumer::{Block, Consumer};
use super::work::{Sequence, Work};
use super::{BwdConfig, Params, Split, superaccumulator};
use crate::kernels::program::{Element, Place, ProgramEmitter, Spread, spreads};

/// The variables of a query head for programs.
pub(super) fn place<'k>(
    work: &Work<'_, 'k>,
    sequence: &Sequence<'k>,
    batch: Reg<'k, u32>,
    head: Reg<'k, u32>,
) -> Place<'k> {
    // Counted over all sequences: packed ones begin where cu_seqlens says.
    let start = |row: Reg<'k, u32>, length: Reg<'k, u32>| {
        (if work.config.varlen { row } else { batch * length }).bits::<i32>()
    };
    Place {
        batch: batch.bits(),
        head: head.bits(),
        seqlen_q: sequence.seqlen_q.bits(),
        seqlen_k: sequence.seqlen_k.bits(),
        q_start: start(sequence.q_row, sequence.seqlen_q),
        kv_start: start(sequence.kv_row, sequence.seqlen_k),
    }
}

/// Where a thread's elements of a block are.
struct Here<'k> {
    sequence: Sequence<'k>,
    /// Its first query and key in their sequence.
    query: Reg<'k, u32>,
    key: Reg<'k, u32>,
    place: Place<'k>,
}

/// What one element adds to the gradients.
pub(super) struct Terms<'k> {
    /// The probability after dropout, but for its factor 1 / (1 − p).
    pub p: Reg<'k, f32>,
    /// Gradient of the scaled score, but for the same factor.
    pub dx: Reg<'k, f32>,
    /// For each table gradient where it is added to, and what.
    pub tables: Vec<TableTerm<'k>>,
}

/// An element's given values.
#[derive(Clone, Copy)]
pub(super) struct Given<'k> {
    /// The scaled score; −∞ where the row does not see the key.
    pub score: Reg<'k, f32>,
    /// dO·v.
    pub dp: Reg<'k, f32>,
    /// Of the row.
    pub minus_lse: Reg<'k, f32>,
    pub delta: Reg<'k, f32>,
    /// Whether dropout keeps it, if there is any.
    pub kept: Option<Reg<'k, bool>>,
}

/// The formulas, in f32.
pub(super) struct Formula<'a, 'k> {
    params: &'a Params<'k>,
    score_mod: Option<ProgramEmitter<'a, 'k>>,
}

impl<'a, 'k> Formula<'a, 'k> {
    pub fn new(k: &'k Builder, config: &'a BwdConfig, params: &'a Params<'k>, place: Place<'k>) -> Self {
        let emitter = |(program, _)| ProgramEmitter::new(k, program, &params.score_tables, place);
        Formula { params, score_mod: config.score_mod.as_ref().map(|(p, t)| (p, t)).map(emitter) }
    }

    pub fn terms(&mut self, element: &Element<'k>, given: &Given<'k>) -> Terms<'k> {
        let Given { score, dp, minus_lse, delta, kept } = *given;
        // Of a row that saw nothing but −∞, too, nothing may come: not even 0 · NaN.
        let hidden = score.eq(f32::NEG_INFINITY) | minus_lse.eq(f32::NEG_INFINITY);
        let zero = |x: Reg<'k, f32>| hidden.select(0.0, x);
        let params = self.params;
        let modified =
            self.score_mod.as_mut().map(|mods| mods.gradients(element, score, &params.table_grads));
        let value = modified.as_ref().map_or(score, |modified| modified.value);
        let p = zero(value.fma(LOG2_E, minus_lse).exp2());
        let drop_out = |x: Reg<'k, f32>| kept.map_or(x, |kept| kept.select(x, 0.0));
        let ds = zero(p * (drop_out(dp) - delta));
        match modified {
            None => Terms { p: drop_out(p), dx: ds, tables: Vec::new() },
            Some(modified) => {
                let keep_scale = params.dropout.as_ref().map(|dropout| dropout.keep_scale);
                let whole = keep_scale.map_or(ds, |keep_scale| ds * keep_scale);
                let tables = modified.tables.into_iter().map(|(at, slope)| (at, zero(whole * slope)));
                Terms { p: drop_out(p), dx: zero(ds * modified.d_score), tables: tables.collect() }
            }
        }
    }
}

/// Two rows' of each eight rows of a block.
pub(super) type Statistics<'k> = Vec<[Reg<'k, f32>; 2]>;

/// The statistics that are there, or else as they are asked for.
fn given_or<'a, 'k, F: Fn(usize) -> [Reg<'k, f32>; 2] + 'a>(
    early: Option<Statistics<'k>>,
    late: impl FnOnce() -> F,
) -> Box<dyn Fn(usize) -> [Reg<'k, f32>; 2] + 'a>
where
    'k: 'a,
{
    match early {
        Some(all) => Box::new(move |eight| all[eight]),
        None => Box::new(late()),
    }
}

impl<'k, H: Half> Consumer<'_, 'k, H> {
    /// Where the thread's elements of a block are.
    fn here(&self, block: &Block<'k>) -> Here<'k> {
        let (about, item) = (self.about(block), self.item());
        Here {
            sequence: item.sequence,
            query: about.m_block * self.config.tile_m + self.query,
            key: item.n_block * self.config.tile_n() + self.key,
            place: place(self.work, &item.sequence, item.batch, about.head),
        }
    }

    /// −lse of the thread's rows of a block, in base 2: two of each eight.
    pub(super) fn minus_lse(&self, block: &Block<'k>) -> impl Fn(usize) -> [Reg<'k, f32>; 2] {
        let stats = self.stats(block);
        move |eight| stats.at(32 * eight as i32).load_vec()
    }

    /// D of these rows.
    pub(super) fn delta(&self, block: &Block<'k>) -> impl Fn(usize) -> [Reg<'k, f32>; 2] {
        let stats = self.stats(block).at(4 * self.config.tile_m as i32);
        move |eight| stats.at(32 * eight as i32).load_vec()
    }

    /// Those of all eights.
    pub(super) fn all(&self, stats: impl Fn(usize) -> [Reg<'k, f32>; 2]) -> Statistics<'k> {
        (0..self.s.registers.len() / 4).map(stats).collect()
    }

    /// S to P, as if every row saw every key. `early`: what was asked for already of [`Self::minus_lse`].
    pub(super) fn probabilities(&self, block: &Block<'k>, early: Option<Statistics<'k>>) {
        let minus_lse = given_or(early, || self.minus_lse(block));
        let scale = self.params.scale * LOG2_E;
        for (j, s) in self.s.registers.chunks(4).enumerate() {
            let minus_lse = minus_lse(j);
            for (i, &s) in s.iter().enumerate() {
                s.set(s.fma(scale, minus_lse[i % 2]).exp2());
            }
        }
    }

    /// What dropout keeps of a block, which needs nothing of its scores.
    pub(super) fn keep(&self, block: &Block<'k>) {
        if let Some(dropout) = &self.params.dropout {
            let here = self.here(block);
            dropout.keep_transposed(&self.kept, &here.place, here.query, here.key);
        }
    }

    /// dP to dS, and P to what dropout keeps of it. `early`: what was asked for already of [`Self::delta`].
    pub(super) fn d_scores(&self, block: &Block<'k>, early: Option<Statistics<'k>>) {
        let delta = given_or(early, || self.delta(block));
        for (j, (p, dp)) in self.s.registers.chunks(4).zip(self.dp.registers.chunks(4)).enumerate() {
            let delta = delta(j);
            for (i, (&p, &dp)) in p.iter().zip(dp).enumerate() {
                if self.config.dropout {
                    // kept ∘ P ∘ dP − P ∘ D, each in its place: there are no registers for more.
                    let rest = p * -delta[i % 2];
                    p.set(self.kept.at(4 * j + i).select(p, 0.0));
                    dp.set(p.fma(dp, rest));
                } else {
                    dp.set((dp - delta[i % 2]) * p);
                }
            }
        }
    }

    /// Zero where a row does not see the key. After all that is computed of a block, so that ptxas finds no branch among
    /// exponentials and the rest, which take turns then.
    pub(super) fn hide_all(&self, block: &Block<'k>, partial: Reg<'k, bool>, fragments: &[&Fragment<'k>]) {
        self.k.if_(partial, || {
            let here = self.here(block);
            fragments.iter().for_each(|fragment| self.hide(&here, fragment, 0.0));
        });
    }

    /// Rounds a fragment to an operand.
    pub(super) fn pack(&self, from: &Fragment<'k>, to: &[[Reg<'k, H>; 4]]) {
        for (step, registers) in to.iter().enumerate() {
            for (&register, value) in registers.iter().zip(from.a_operand::<H>(self.k, step)) {
                register.set(value);
            }
        }
    }

    /// `value` where a row does not see the key. Of the fragment's transposed scores rows are keys.
    fn hide(&self, here: &Here<'k>, fragment: &Fragment<'k>, value: f32) {
        let (params, Sequence { seqlen_q, seqlen_k, .. }) = (self.params, here.sequence);
        let (query, key) = (here.query, here.key);
        if let Some((program, _)) = &self.config.mask_program {
            let mut emitter = ProgramEmitter::new(self.k, program, &params.mask_tables, here.place);
            self.each(here, |i, element| {
                let visible = emitter.bool(element);
                fragment.registers[i].set(visible.select(fragment.registers[i], value));
            });
        }
        // A key is seen by the queries from `from` to `to`, counted from the thread's first.
        let shift = (seqlen_k - seqlen_q).bits::<i32>() + query.bits::<i32>();
        let keys = [key, key + 8];
        let end = (seqlen_q - query).bits::<i32>();
        let diagonals = keys.map(|key| key.bits::<i32>() - shift);
        let from = params.band[1].map(|right| diagonals.map(|diagonal| diagonal - right.min(1 << 30)));
        let to = [0, 1].map(|half| {
            let to = params.band[0].map(|left| end.min(diagonals[half] + 1 + left));
            keys[half].lt(seqlen_k).select(to.unwrap_or(end), 0)
        });
        for (i, &register) in fragment.registers.iter().enumerate() {
            let (half, offset) = (Fragment::half(i), Fragment::column_offset(i) as i32);
            let mut visible = to[half].gt(offset);
            if let Some(from) = from {
                visible = visible & from[half].le(offset);
            }
            register.set(visible.select(register, value));
        }
    }

    /// Runs `body` for each register with its place.
    fn each(&self, here: &Here<'k>, mut body: impl FnMut(usize, &Element<'k>)) {
        let [query, key] = [here.query, here.key].map(|r| r.bits::<i32>());
        let keys = [key, key + 8];
        let mut queries: Vec<Reg<'k, i32>> = Vec::new();
        for i in 0..self.s.registers.len() {
            let row = i / 4 * 2 + i % 2;
            if row == queries.len() {
                queries.push(query + Fragment::column_offset(i) as i32);
            }
            let column = Fragment::half(i);
            body(i, &Element { row, column, q: queries[row], kv: keys[column], kv_offset: None });
        }
    }

    /// P and dS from S and dP with a score mod or a mask's program; and the gradients of tables.
    pub(super) fn elements(&self, block: &Block<'k>) {
        let (k, config, params) = (self.k, self.config, self.params);
        for &s in &self.s.registers {
            s.set(s * params.scale);
        }
        let here = &self.here(block);
        k.if_(self.about(block).partial, || self.hide(here, &self.s, f32::NEG_INFINITY));
        let mut formula = Formula::new(k, config, params, here.place);
        let mut sums = TableSums::new(k, config, self.lane);
        let stats = self.stats(block);
        let mut row_stats = [[k.var(0.0f32); 2]; 2];
        self.each(here, |i, element| {
            if i % 4 == 0 {
                let at = stats.at(8 * i as i32);
                row_stats = [at.load_vec(), at.at(4 * config.tile_m as i32).load_vec()];
            }
            let [minus_lse, delta] = row_stats.map(|stats| stats[i % 2]);
            let (s, dp) = (self.s.registers[i], self.dp.registers[i]);
            let kept = config.dropout.then(|| self.kept.at(i));
            let terms = formula.terms(element, &Given { score: s, dp, minus_lse, delta, kept });
            sums.add(i, &terms);
            s.set(terms.p);
            dp.set(terms.dx);
        });
        sums.finish();
    }

    /// Stores an operand to shared memory: the warpgroup's part of Pᵀ or dSᵀ, or of dS with [`Split::Keys`].
    pub(super) fn store(&self, operand: &[[Reg<'k, H>; 4]], tile: Address<'k, u32>) {
        let (k, layout, lane) = (self.k, self.config.scores(), self.lane);
        let warp = (k.tid(0) >> 5) & 3;
        if self.config.split == Split::Keys {
            // Each 8 × 8 matrix transposed: lane l gives the address of query l % 8 of matrix l / 8, of which odd ones have the second
            // eight of the warp's keys and the last two the second eight of sixteen queries.
            let row = tile + (self.group * layout.panel_bytes() + ((lane >> 4) * 8 + (lane & 7)) * 128);
            let at = row + (((warp * 2 + ((lane >> 3) & 1)) ^ (lane & 7)) << 4);
            for (step, &matrices) in operand.iter().enumerate() {
                k.stmatrix_x4(at.at(16 * 128 * step as i32), matrices, true);
            }
            return;
        }
        // stmatrix takes 16 rows × 16 columns of a warp: lane l gives the address of row l % 16, columns 8·(l / 16). Half of a panel's
        // columns begin at its fifth chunk.
        let row = tile + (warp * 16 + (lane & 15)) * 128;
        let chunk = (((lane >> 4) + self.group * 4) ^ (lane & 7)) << 4;
        for (step, &matrices) in operand.iter().enumerate() {
            k.stmatrix_x4(row + (chunk ^ (step as u32 * 32)), matrices, false);
        }
    }
}

/// Where an element of a table's gradient lies, and what is added to it.
type TableTerm<'k> = (Reg<'k, u64>, Reg<'k, f32>);

/// Gradients of tables on their way to memory: what falls on one element of a table is added up in the warp first.
struct TableSums<'k> {
    k: &'k Builder,
    lane: Reg<'k, u32>,
    grads: Vec<TableSum<'k>>,
}

/// A table gradient.
struct TableSum<'k> {
    /// In which directions it differs.
    spread: Spread,
    /// [`TableGrad::exact`](super::TableGrad::exact).
    exact: bool,
    /// Sums and where they go: of registers that fall on one element, of a query or of a key.
    sums: Vec<TableTerm<'k>>,
}

impl<'k> TableSums<'k> {
    fn new(k: &'k Builder, config: &BwdConfig, lane: Reg<'k, u32>) -> Self {
        let shapes: Vec<_> = config.table_grads.iter().map(|grad| grad.shape).collect();
        let spreads = config.score_mod.iter().flat_map(|(program, _)| spreads(program, &shapes));
        let grads = spreads.zip(&config.table_grads);
        let grads = grads.map(|(spread, grad)| TableSum { spread, exact: grad.exact, sums: Vec::new() });
        TableSums { k, lane, grads: grads.collect() }
    }

    /// Adds the terms of register `i`.
    fn add(&mut self, i: usize, terms: &Terms<'k>) {
        for (TableSum { spread, exact, sums }, &(at, term)) in self.grads.iter_mut().zip(&terms.tables) {
            let slot = match (spread.q, spread.kv) {
                (true, true) if *exact => {
                    self.k.if_(term.ne(0.0), || superaccumulator::add(at, term));
                    continue;
                }
                (true, true) => {
                    self.k.when(term.ne(0.0), || at.address().red_add(term));
                    continue;
                }
                (true, false) => i / 4 * 2 + i % 2,
                (false, true) => Fragment::half(i),
                (false, false) => 0,
            };
            match sums.get(slot) {
                Some(&(_, sum)) => sum.set(sum + term),
                None => sums.push((at, self.k.var(term))),
            }
        }
    }

    /// Adds the sums of the warp to memory.
    fn finish(&self) {
        for TableSum { spread, exact, sums } in &self.grads {
            // Every fourth lane has the same queries, and each four the same keys.
            let (bits, lanes): (&[u32], u32) = match (spread.q, spread.kv) {
                (true, _) => (&[4, 8, 16], 0x1c),
                (false, true) => (&[1, 2], 3),
                (false, false) => (&[1, 2, 4, 8, 16], 31),
            };
            for &(at, sum) in sums {
                let total = bits.iter().fold(sum, |sum, &bit| sum + sum.shfl_bfly(bit));
                let one = (self.lane & lanes).eq(0);
                if *exact {
                    self.k.if_(one, || superaccumulator::add(at, total));
                } else {
                    self.k.when(one, || at.address().red_add(total));
                }
            }
        }
        if self.grads.iter().any(|grad| grad.exact) {
            // Lanes have parted; products want them together.
            self.k.sync_warp();
        }
    }
}
