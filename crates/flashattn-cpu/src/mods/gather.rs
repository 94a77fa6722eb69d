//! Loads of table elements into registers.

use super::execute::{BLOCK, CHUNK, Chunk, Values};
use super::program::{Arg, Axis, Load, Spread};
use bytemuck::{cast_slice, cast_slice_mut};
use flashattn_spec::expr::{Table, TableData};

/// The one operation that loops do not express well. (A trait, for a closure could not be always inlined.)
pub(super) trait Transpose {
    /// Transposes a block as wide as the vectors: element (r, c) at `from[r * stride + c]` goes to
    /// `to[c * to_stride + r]`.
    fn transpose(from: &[u32], stride: usize, to: &mut [u32], to_stride: usize);
}

/// The elements of a table as bits: the `data` of the functions below, which take it as an argument so that the
/// compiler knows it apart from what they write.
pub(super) fn words(table: &Table) -> &[u32] {
    match table.data() {
        TableData::F32(data) => cast_slice(data),
        TableData::I32(data) => cast_slice(data),
    }
}

/// The place along one dimension that an index means: clamped to the edge.
#[inline(always)]
pub(super) fn place(index: u32, last: i32, stride: usize) -> usize {
    (index as i32).clamp(0, last) as usize * stride
}

/// A table's elements at one index for each element.
#[inline(always)]
pub(super) fn gather(to: &mut [Chunk], load: &Load, data: &[u32], values: Values<'_>) {
    for (c, to) in to.iter_mut().enumerate() {
        let mut offsets = [0usize; CHUNK];
        for axis in &load.axes {
            let &Axis { last, stride, .. } = axis;
            for (offset, &index) in offsets.iter_mut().zip(values.view(axis.index).chunk(c)) {
                *offset += place(index, last, stride);
            }
        }
        for (to, &offset) in to.0.iter_mut().zip(&offsets) {
            // SAFETY: each index was clamped to its dimension, and the table has the product of its dimensions.
            *to = unsafe { *data.get_unchecked(offset) };
        }
    }
}

/// The offsets of an outer load or gradient: for each lane and for each row of the block.
pub(super) struct Offsets<const L: usize> {
    pub lanes: [usize; L],
    pub rows: [usize; BLOCK * CHUNK / 4],
    /// The lanes are this far apart, each from the next.
    pub stride: Option<usize>,
}

impl<const L: usize> Offsets<L> {
    /// For `rows` rows.
    #[inline(always)]
    pub fn new(axes: &[Axis<Arg>], rows: usize, values: Values<'_>) -> Self {
        let mut to = Offsets { lanes: [0; L], rows: [0; BLOCK * CHUNK / 4], stride: None };
        for axis in axes {
            let offsets: &mut [usize] = match axis.index.spread {
                Spread::Row => &mut to.rows[..rows],
                Spread::Uniform | Spread::Lane => &mut to.lanes,
                Spread::Full => &mut [],
            };
            let index = values.view(axis.index).chunks.as_flattened();
            let &Axis { last, stride, .. } = axis;
            for (offset, &index) in offsets.iter_mut().zip(index) {
                *offset += place(index, last, stride);
            }
        }
        let stride = to.lanes[1].wrapping_sub(to.lanes[0]);
        to.stride = to.lanes.windows(2).all(|w| w[1].wrapping_sub(w[0]) == stride).then_some(stride);
        // A stride of the wrong sign is left to the general path.
        to.stride = to.stride.filter(|&s| s <= isize::MAX as usize);
        to
    }

    /// Whether rows `r .. r + L` are neighbours in the table: then the lanes' elements are the rows of a matrix.
    #[inline(always)]
    pub fn contiguous(&self, r: usize) -> bool {
        self.rows[r..r + L].windows(2).all(|w| w[1] == w[0] + 1)
    }
}

/// A table's elements where no index varies with both the query and the key: the offset is the sum of one part for
/// each lane and one for each row.
#[inline(always)]
pub(super) fn gather_outer<const L: usize, T: Transpose>(
    to: &mut [Chunk],
    load: &Load,
    data: &[u32],
    values: Values<'_>,
) {
    let to = cast_slice_mut::<Chunk, u32>(to);
    let rows = to.len() / L;
    let offsets = Offsets::<L>::new(&load.axes, rows, values);
    let mut r = 0;
    while r < rows {
        // A bias lies with its keys side by side, the strip with its queries: transposed.
        if let Some(stride) = offsets.stride
            && r + L <= rows
            && offsets.contiguous(r)
        {
            T::transpose(&data[offsets.lanes[0] + offsets.rows[r]..], stride, &mut to[r * L..], L);
            r += L;
            continue;
        }
        for (to, lane) in to[r * L..(r + 1) * L].iter_mut().zip(&offsets.lanes) {
            // SAFETY: as in `gather`; the parts of a lane and of a row are of different dimensions.
            *to = unsafe { *data.get_unchecked(lane + offsets.rows[r]) };
        }
        r += 1;
    }
}
