//! Tiles: matrices in shared memory and accumulators in registers, each with one description of its layout from which
//! descriptors, boxes and addresses are derived.

use crate::build::{Address, Builder, Half, Reg, Value};
use crate::instr::{self, Element, Operand};
use crate::kernel::{Swizzle, TensorElement, TensorMap};

/// Layout of a matrix in shared memory, as TMA writes it and `wgmma` reads it.
///
/// The columns are cut into *panels* as wide as the swizzle's span (64 columns of 16-bit elements under
/// [`Swizzle::B128`]); panels lie one after the other, each `rows × span` bytes, its 16-byte chunks swizzled. So a TMA
/// box of (panel, rows) fills a panel, and both majors of `wgmma` operands can be read from it. Tiles are aligned to
/// [`TileLayout::ALIGN`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TileLayout {
    /// Rows: a multiple of 8.
    pub rows: u32,
    /// Columns: a multiple of the panel's.
    pub columns: u32,
    /// Element type.
    pub element: Element,
    /// Swizzle.
    pub swizzle: Swizzle,
}

impl TileLayout {
    /// Alignment of tiles in shared memory: the repeat of the widest swizzle.
    pub const ALIGN: u32 = 1024;

    /// A tile under the 128-byte swizzle, the one without bank conflicts in either direction.
    pub const fn new(rows: u32, columns: u32, element: Element) -> Self {
        TileLayout { rows, columns, element, swizzle: Swizzle::B128 }
    }

    /// Bytes.
    pub const fn bytes(&self) -> u32 {
        self.rows * self.columns * self.element.bytes()
    }

    /// Columns of a panel.
    pub const fn panel_columns(&self) -> u32 {
        self.swizzle.span() / self.element.bytes()
    }

    /// Panels.
    pub const fn panels(&self) -> u32 {
        self.columns / self.panel_columns()
    }

    /// Bytes of a panel.
    pub const fn panel_bytes(&self) -> u32 {
        self.rows * self.swizzle.span()
    }

    /// The byte at which an element lies, from the tile's begin.
    pub const fn offset(&self, row: u32, column: u32) -> u32 {
        let panel = self.panel_columns();
        let inside = row * self.swizzle.span() + column % panel * self.element.bytes();
        self.swizzle.apply(column / panel * self.panel_bytes() + inside)
    }

    /// The tensor map whose box is `rows` rows of one panel: `shape` and `strides` of the tensor innermost first, rows in
    /// dimension 1, further dimensions with a box size of 1.
    pub fn tensor_map(&self, rows: u32, shape: &[u64], strides: &[u64]) -> TensorMap {
        let mut tile = vec![1; shape.len()];
        for (size, value) in tile.iter_mut().zip([self.panel_columns(), rows]) {
            *size = value;
        }
        let element = match self.element {
            Element::F16 => TensorElement::F16,
            Element::BF16 => TensorElement::BF16,
            Element::TF32 => TensorElement::F32,
            Element::E4M3 | Element::E5M2 => TensorElement::U8,
        };
        TensorMap { element, shape: shape.to_vec(), strides: strides.to_vec(), tile, swizzle: self.swizzle }
    }

    /// Descriptor of a `wgmma` operand whose K runs along the rows' bytes: A of M rows, or B of N rows.
    #[track_caller]
    pub fn k_major<'k>(&self, tile: Address<'k, u32>) -> Descriptor<'k> {
        // Along K a swizzled operand stays inside its panel, and the leading offset is not used; otherwise it goes from
        // panel to panel. The stride is that between groups of 8 rows.
        let walk = Walk::Along { panel: self.panel_bytes(), span: self.swizzle.span() };
        let leading = if self.swizzle == Swizzle::None { self.panel_bytes() } else { 16 };
        self.descriptor(tile, [leading, 8 * self.swizzle.span()], walk)
    }

    /// Descriptor of a `wgmma` operand whose K runs down the rows (`transpose`): B of N columns, or A of M columns.
    #[track_caller]
    pub fn mn_major<'k>(&self, tile: Address<'k, u32>) -> Descriptor<'k> {
        // From panel to panel, and between groups of 8 rows; without a swizzle the two change places.
        let offsets = [self.panel_bytes(), 8 * self.swizzle.span()];
        let [panel, group] = offsets;
        let offsets = if self.swizzle == Swizzle::None { [group, panel] } else { offsets };
        self.descriptor(tile, offsets, Walk::Down { row: self.swizzle.span() })
    }

    #[track_caller]
    fn descriptor<'k>(
        &self,
        tile: Address<'k, u32>,
        [leading, stride]: [u32; 2],
        walk: Walk,
    ) -> Descriptor<'k> {
        let swizzle: u32 = match self.swizzle {
            Swizzle::None => 0,
            Swizzle::B128 => 1,
            Swizzle::B64 => 2,
            Swizzle::B32 => 3,
        };
        // 18 bits of address: in a cluster's other blocks the higher ones are set and would run into the offset's.
        let address = (tile.reg() & 0x3_ffff) >> 4;
        let low = address | (leading >> 4) << 16;
        let high = stride >> 4 | swizzle << 30;
        Descriptor { low, high, walk, element_bytes: self.element.bytes() }
    }
}

/// How a descriptor moves along K.
#[derive(Clone, Copy, Debug)]
enum Walk {
    /// Through the bytes of a panel's rows, then to the next panel.
    Along { panel: u32, span: u32 },
    /// Down the rows.
    Down { row: u32 },
}

/// A shared-memory operand of `wgmma`.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor<'k> {
    low: Reg<'k, u32>,
    high: u32,
    walk: Walk,
    element_bytes: u32,
}

impl<'k> Descriptor<'k> {
    /// The descriptor of the tile so many bytes further (a multiple of [`TileLayout::ALIGN`]): a stage of a pipeline.
    #[track_caller]
    pub fn advance(self, bytes: impl Value<'k, u32>) -> Self {
        let low = match bytes.operand() {
            Operand::Imm(bytes, _) => self.low + (bytes as u32 >> 4),
            Operand::Reg(_) | Operand::Address(..) => {
                let bytes: Reg<'k, u32> = self.low.builder().var(bytes);
                self.low + (bytes >> 4)
            }
        };
        Descriptor { low, ..self }
    }

    /// The 64 bits for the `wgmma` of depth 32 bytes that begins at column (row, if transposed) `step · 32 bytes` of K.
    #[track_caller]
    pub fn step(self, step: u32) -> Reg<'k, u64> {
        let bytes = match self.walk {
            Walk::Along { panel, span } => step * 32 / span * panel + step * 32 % span,
            Walk::Down { row } => step * (32 / self.element_bytes) * row,
        };
        let k = self.low.builder();
        let low = if bytes == 0 { self.low } else { self.low + (bytes >> 4) };
        k.result(instr::MOV_PAIR64, &[low.operand(), self.high.operand()])
    }
}

/// The accumulator of a warpgroup's products: 64 rows by `columns`, spread over 128 threads.
///
/// A thread holds, of two rows 8 apart, two neighbouring columns of every 8: register `i` is of row
/// [`Fragment::row`]` + 8·(i/2 mod 2)` and column [`Fragment::column`]` + 8·(i/4) + i mod 2`.
#[derive(Clone, Debug)]
pub struct Fragment<'k> {
    /// The registers.
    pub registers: Vec<Reg<'k, f32>>,
}

impl<'k> Fragment<'k> {
    /// A new one, not yet written.
    #[track_caller]
    pub fn new(k: &'k Builder, columns: u32) -> Self {
        Fragment { registers: k.regs(columns as usize / 2) }
    }

    /// Columns.
    pub fn columns(&self) -> u32 {
        self.registers.len() as u32 * 2
    }

    /// The thread's first row within the warpgroup's 64.
    #[track_caller]
    pub fn row(k: &'k Builder) -> Reg<'k, u32> {
        let tid = k.tid(0);
        ((tid >> 5) & 3) * 16 + ((tid & 31) >> 2)
    }

    /// The thread's first column.
    #[track_caller]
    pub fn column(k: &'k Builder) -> Reg<'k, u32> {
        (k.tid(0) & 3) * 2
    }

    /// Which of the thread's two rows register `i` belongs to.
    pub const fn half(i: usize) -> usize {
        i / 2 % 2
    }

    /// Column of register `i` from the thread's first.
    pub const fn column_offset(i: usize) -> u32 {
        (i / 4 * 8 + i % 2) as u32
    }

    /// Combines each row over all columns and threads: both rows' results, in every thread that holds a part of them.
    #[track_caller]
    pub fn reduce_rows(
        &self,
        combine: impl Fn(Reg<'k, f32>, Reg<'k, f32>) -> Reg<'k, f32>,
    ) -> [Reg<'k, f32>; 2] {
        [0, 1].map(|half| {
            let mut row =
                self.registers.iter().enumerate().filter(|&(i, _)| Self::half(i) == half).map(|(_, &r)| r);
            let first = row.next().unwrap_or(self.registers[0]);
            let own = row.fold(first, &combine);
            let pair = combine(own, own.shfl_bfly(1));
            combine(pair, pair.shfl_bfly(2))
        })
    }

    /// Columns `16·step … 16·step + 15`, rounded to 16 bits, as the A operand of the next product: no data moves
    /// between threads.
    #[track_caller]
    pub fn a_operand<H: Half>(&self, k: &'k Builder, step: usize) -> [Reg<'k, H>; 4] {
        let r = &self.registers[8 * step..8 * step + 8];
        [k.pack(r[0], r[1]), k.pack(r[2], r[3]), k.pack(r[4], r[5]), k.pack(r[6], r[7])]
    }

    /// Rounds to 16 bits and writes to the warpgroup's 64 rows of `tile` that begin at row `first_row` (a multiple of 8).
    /// `tile` has [`Swizzle::B128`].
    #[track_caller]
    pub fn store<H: Half>(
        &self,
        k: &'k Builder,
        layout: &TileLayout,
        tile: Address<'k, u32>,
        first_row: u32,
    ) {
        // stmatrix takes 16 rows × 16 columns of a warp: lane l gives the address of row l % 16, columns 8·(l / 16).
        // A chunk's place is its index xor the row's last three bits, so the step to another pair of chunks is an xor.
        let lane = k.lane();
        let row = ((k.tid(0) >> 5) & 3) * 16 + (lane & 15) + first_row;
        let chunk = ((lane >> 4) ^ (lane & 7)) << 4;
        let row = tile.reg() + row * 128;
        for step in 0..self.columns() / 16 {
            let (panel, inside) = (step / 4, step % 4);
            let chunk = if inside == 0 { chunk } else { chunk ^ (inside * 32) };
            let at = (row + chunk).address().at((panel * layout.panel_bytes()) as i32);
            k.stmatrix_x4(at, self.a_operand::<H>(k, step as usize), false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_offsets_are_a_permutation_in_16_byte_chunks() {
        for swizzle in [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128] {
            let layout = TileLayout { rows: 24, columns: 128, element: Element::BF16, swizzle };
            let mut seen = vec![false; layout.bytes() as usize];
            for row in 0..layout.rows {
                for column in 0..layout.columns {
                    let offset = layout.offset(row, column) as usize;
                    assert!(!seen[offset], "{swizzle:?} ({row}, {column})");
                    seen[offset] = true;
                    assert_eq!(offset % 16, (column as usize * 2) % 16);
                }
            }
        }
    }

    #[test]
    fn a_column_of_chunks_touches_every_bank_group() {
        let layout = TileLayout::new(8, 64, Element::F16);
        let mut groups: Vec<u32> = (0..8).map(|row| layout.offset(row, 0) / 16 % 8).collect();
        groups.sort();
        assert_eq!(groups, (0..8).collect::<Vec<_>>());
    }
}
