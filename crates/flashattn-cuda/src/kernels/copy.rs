//! A tensor's rows from one layout to another: for tensors that TMA, or the kernels' stores, cannot take; and for results that
//! are added to what is there.
//!
//! ```text
//! each thread: for its sequences, for its rows (position, head), for its pieces of a row: load; (add;) store
//! ```
//!
//! Rows are dense; the other strides are any, 0 too. Pieces are as wide as both layouts are aligned.

use flashattn_spec::DType;
use ptx::build::{Address, Half, Reg};
use ptx::types::Scalar;
use ptx::{BF16x2, F16x2, Kernel, Target, build};

use super::global::{float, floats, half_bits};

/// Threads of a block.
const THREADS: u32 = 256;

/// Everything that the emitted kernel depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyConfig {
    /// Bytes of a piece: 2, 4, 8 or 16. Rows, strides and addresses are multiples of it.
    pub bytes: u32,
    /// Whether to add, in f32, to what `to` holds, and of which type the elements then are: f32, or a 16-bit one.
    pub add: Option<DType>,
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
    let name = match config.add {
        None => format!("copy_rows_{}", config.bytes),
        Some(dtype) => format!("add_rows_{}_{dtype}", config.bytes),
    };
    build(&name, Target::Sm80, THREADS, |k| {
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
                    match config.add {
                        None => copy(config.bytes, from, to),
                        Some(DType::F32) => add_floats(config.bytes, from, to),
                        Some(DType::F16) => add_halves::<F16x2>(config.bytes, from, to),
                        Some(_) => add_halves::<BF16x2>(config.bytes, from, to),
                    }
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

fn add_floats(bytes: u32, from: Address<'_, u64>, to: Address<'_, u64>) {
    for at in (0..bytes as i32).step_by(4) {
        let (from, to) = (from.at(at), to.at(at));
        to.store(to.load::<f32>() + from.load::<f32>());
    }
}

/// A pair at a time, or one element where pairs are not aligned.
fn add_halves<H: Half>(bytes: u32, from: Address<'_, u64>, to: Address<'_, u64>) {
    fn words<H: Half, const N: usize>(from: Address<'_, u64>, to: Address<'_, u64>) {
        let (from, old) = (from.load_vec::<u32, N>(), to.load_vec::<u32, N>());
        to.store_vec::<H, N>(std::array::from_fn(|i| sum::<H>(from[i], old[i])));
    }
    match bytes {
        2 => {
            let [from, old] = [from, to].map(|at| float::<H>(at.load()));
            to.store(half_bits::<H>(from + old));
        }
        4 => to.store(sum::<H>(from.load(), to.load())),
        8 => words::<H, 2>(from, to),
        _ => words::<H, 4>(from, to),
    }
}

fn sum<'k, H: Half>(a: Reg<'k, u32>, b: Reg<'k, u32>) -> Reg<'k, H> {
    let ([a_low, a_high], [b_low, b_high]) = (floats::<H>(a), floats::<H>(b));
    a.builder().pack(a_low + b_low, a_high + b_high)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_cover_every_piece() {
        let config = CopyConfig { bytes: 4, add: None };
        assert_eq!(config.launch(1000, 18, 3), CopyLaunch { shift: 5, grid: [125, 3, 1] });
        assert_eq!(config.launch(1, 1, 1), CopyLaunch { shift: 0, grid: [1, 1, 1] });
        assert_eq!(config.launch(u32::MAX / 2, 300, 1 << 20).grid, [1 << 14, 1 << 15, 1]);
    }
}
