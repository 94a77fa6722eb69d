//! A tensor's rows from one layout to another: for tensors that TMA, or the forward kernel's stores, cannot take.
//!
//! ```text
//! each thread: for its sequences, for its rows (position, head), for its pieces of a row: load; store
//! ```
//!
//! Rows are dense and of 16-bit elements; the other strides are any, 0 too. Pieces are as wide as both layouts are aligned.

use ptx::build::{Address, Reg};
use ptx::types::Scalar;
use ptx::{Kernel, Target, build};

/// Threads of a block.
const THREADS: u32 = 256;

/// Everything that the emitted kernel depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyConfig {
    /// Bytes of a piece: 2, 4, 8 or 16. Rows, strides and addresses are multiples of it.
    pub bytes: u32,
}

/// How the threads of a copy are laid over a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyLaunch {
    /// Logarithm of the threads that share a row.
    pub shift: u32,
    /// Blocks, by dimension.
    pub grid: [u32; 3],
}

impl CopyConfig {
    /// The launch for so many rows of so many pieces in each of `batch` sequences: a thread a piece, up to a limit from
    /// which on threads take several.
    pub fn launch(&self, rows: u32, pieces: u32, batch: u32) -> CopyLaunch {
        // Blocks that keep every multiprocessor of a large GPU busy, and sums of rows within 32 bits.
        const MOST: u32 = 1 << 14;
        let shift = pieces.clamp(1, THREADS).next_power_of_two().ilog2();
        let blocks = rows.div_ceil(THREADS >> shift).clamp(1, MOST);
        CopyLaunch { shift, grid: [blocks, batch.clamp(1, 1 << 15), 1] }
    }
}

/// Copies `[batch, seqlen, heads, head_dim]` rows. Parameters: `from`, an address and the strides of batch, row and head in
/// bytes (four `u64`); `to` likewise; `rows` (seqlen · heads, below 2³¹), `heads`, `batch`, `pieces` of a row, and `shift`
/// (of [`CopyLaunch`]).
pub fn copy_rows(config: &CopyConfig) -> Kernel {
    build(&format!("copy_rows_{}", config.bytes), Target::Sm80, THREADS, |k| {
        let [from, to] = ["from", "to"].map(|name| Rows {
            data: k.param_ptr(name),
            strides: ["batch", "row", "head"].map(|dim| k.param_ptr(&format!("{name}_{dim}"))),
        });
        let [rows, heads, batch, pieces, shift] =
            ["rows", "heads", "batch", "pieces", "shift"].map(|name| k.param_u32(name));
        let share = k.var(1u32) << shift;
        let block = k.var(THREADS) >> shift;
        let first = k.ctaid(0) * block + (k.tid(0) >> shift);
        let column = k.tid(0) & (share - 1);
        k.for_(k.ctaid(1), batch, k.nctaid(1), |sequence| {
            k.for_(first, rows, k.nctaid(0) * block, |row| {
                let place = [sequence, row / heads, row % heads];
                let (from, to) = (from.at(place), to.at(place));
                k.for_(column, pieces, share, |i| {
                    let [from, to] = [from, to].map(|row| i.mad_wide(config.bytes, row).address());
                    copy(config.bytes, from, to);
                });
            });
        });
    })
}

/// A tensor in global memory.
#[derive(Clone, Copy)]
struct Rows<'k> {
    data: Reg<'k, u64>,
    /// Of batch, row and head, in bytes.
    strides: [Reg<'k, u64>; 3],
}

impl<'k> Rows<'k> {
    fn at(&self, place: [Reg<'k, u32>; 3]) -> Reg<'k, u64> {
        place.into_iter().zip(self.strides).fold(self.data, |at, (i, stride)| i.to_u64() * stride + at)
    }
}

fn copy(bytes: u32, from: Address<'_, u64>, to: Address<'_, u64>) {
    fn pieces<T: Scalar, const N: usize>(from: Address<'_, u64>, to: Address<'_, u64>) {
        to.store_vec(from.load_vec::<T, N>());
    }
    match bytes {
        2 => to.store(from.load::<u16>()),
        4 => to.store(from.load::<u32>()),
        8 => pieces::<u32, 2>(from, to),
        _ => pieces::<u32, 4>(from, to),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_cover_every_piece() {
        let config = CopyConfig { bytes: 4 };
        assert_eq!(config.launch(1000, 18, 3), CopyLaunch { shift: 5, grid: [125, 3, 1] });
        assert_eq!(config.launch(1, 1, 1), CopyLaunch { shift: 0, grid: [1, 1, 1] });
        assert_eq!(config.launch(u32::MAX / 2, 300, 1 << 20).grid, [1 << 14, 1 << 15, 1]);
    }
}
