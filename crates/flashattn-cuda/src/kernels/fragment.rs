//! What kernels do with the scores of one block, an element of the fragment at a time: score mod, mask, dropout.

use flashattn_spec::expr::Program;
use ptx::Fragment;
use ptx::build::{Builder, Reg};

use super::philox::{Dropout, Kept};
use super::program::{Element, Place, ProgramEmitter, Slope, TableArgs};

/// The scores of a block in the registers of one thread, and where they lie in the score matrix.
pub struct Scores<'a, 'k> {
    /// The builder.
    pub k: &'k Builder,
    /// 64 queries by the block's keys.
    pub fragment: &'a Fragment<'k>,
    /// Index of the thread's first query in its sequence; the other is 8 further.
    pub q: Reg<'k, i32>,
    /// Index of the thread's first key in its sequence.
    pub kv: Reg<'k, i32>,
    /// The sequence and head.
    pub place: Place<'k>,
}

impl<'k> Scores<'_, 'k> {
    /// Runs `change` for each register with its place.
    fn each(&self, mut change: impl FnMut(Reg<'k, f32>, Element<'k>)) {
        let rows = [self.q, self.q + 8];
        let mut columns: Vec<Reg<'k, i32>> = Vec::new();
        for (i, &register) in self.fragment.registers.iter().enumerate() {
            let offset = Fragment::column_offset(i) as i32;
            // Registers 4j, 4j + 1 are of the first row, 4j + 2, 4j + 3 the same columns of the second.
            let column = i / 4 * 2 + i % 2;
            if column == columns.len() {
                columns.push(self.kv + offset);
            }
            let row = Fragment::half(i);
            change(
                register,
                Element { row, column, q: rows[row], kv: columns[column], kv_offset: Some(offset as u32) },
            );
        }
    }

    /// Each scaled score `s` to `program(s)`; `small`: all lengths are below 2²². With a slope the score is multiplied later.
    pub fn modify(
        &self,
        program: &Program,
        tables: &[TableArgs<'k>],
        small: bool,
        slope: Option<(Slope, Reg<'k, f32>)>,
    ) {
        let emitter = ProgramEmitter::new(self.k, program, tables, self.place);
        let mut emitter = emitter.with_small_indices(small);
        self.each(|s, element| {
            s.set(match slope {
                Some((slope, inverse)) => emitter.add_slope(slope, &element, s, inverse),
                None => emitter.float(&element, s),
            });
        });
    }

    /// −∞ where the mask's program does not hold, in a block that is seen `in_part`.
    ///
    /// A branch for each 64 keys: ptxas would have the loads of all in flight, for which there are no registers.
    pub fn mask(&self, program: &Program, tables: &[TableArgs<'k>], in_part: Reg<'k, bool>) {
        for (i, registers) in self.fragment.registers.chunks(32).enumerate() {
            self.k.if_(in_part, || {
                let fragment = Fragment { registers: registers.to_vec() };
                let scores = Scores { fragment: &fragment, kv: self.kv + 64 * i as i32, ..*self };
                let mut emitter = ProgramEmitter::new(self.k, program, tables, self.place);
                scores.each(|s, element| s.set(emitter.bool(&element).select(s, f32::NEG_INFINITY)));
            });
        }
    }

    /// −∞ at keys outside of `from[row] .. to[row]`, counted from the thread's first key; both by row.
    pub fn limit(&self, from: Option<[Reg<'k, i32>; 2]>, to: [Reg<'k, i32>; 2]) {
        for (i, &s) in self.fragment.registers.iter().enumerate() {
            let (row, offset) = (Fragment::half(i), Fragment::column_offset(i) as i32);
            let mut visible = to[row].gt(offset);
            if let Some(from) = from {
                visible = visible & from[row].le(offset);
            }
            s.set(visible.select(s, f32::NEG_INFINITY));
        }
    }

    /// What dropout keeps of them.
    pub fn keep(&self, kept: &Kept<'k>, dropout: &Dropout<'k>) {
        dropout.keep(kept, &self.place, self.q.bits(), self.kv.bits());
    }
}
