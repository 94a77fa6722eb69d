//! A built kernel, and what a launch of it takes.

use crate::instr::{Item, Site, Target};
use crate::types::Type;

/// A kernel parameter's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamKind {
    /// A 32-bit integer.
    U32,
    /// A signed 32-bit integer.
    S32,
    /// A float.
    F32,
    /// A 64-bit integer or an address in global memory.
    U64,
    /// A tensor map (128 bytes, by value).
    TensorMap,
}

/// A kernel parameter.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Param {
    /// Its name in the PTX.
    pub name: String,
    /// Its kind.
    pub kind: ParamKind,
}

/// A virtual register.
#[derive(Clone, Copy, Debug)]
pub struct Register {
    /// Its type.
    pub ty: Type,
    /// Where it was made.
    pub site: Site,
}

/// A named region of a block's dynamic shared memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SharedRegion {
    /// Its name in reports.
    pub name: String,
    /// First byte, counted from the begin of the block's dynamic shared memory.
    pub offset: u32,
    /// Bytes.
    pub bytes: u32,
}

/// A kernel: the text's content, as data. Made by [`build`](mod@crate::build), judged by [`verify`](mod@crate::verify), written
/// by [`emit`](mod@crate::emit), run by [`emulate`](crate::emulate).
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Entry name.
    pub name: String,
    /// Target.
    pub target: Target,
    /// Threads of a block, by dimension.
    pub block: [u32; 3],
    /// Blocks of a cluster, by dimension; all 1: no cluster.
    pub cluster: [u32; 3],
    /// Blocks that shall fit on a multiprocessor (`.minnctapersm`): bounds the registers that ptxas may use.
    pub min_blocks: u32,
    /// Parameters in order.
    pub params: Vec<Param>,
    /// Regions of dynamic shared memory.
    pub shared: Vec<SharedRegion>,
    /// Bytes of dynamic shared memory a launch must give.
    pub shared_bytes: u32,
    /// Virtual registers; [`RegId`](crate::instr::RegId) is an index here.
    pub registers: Vec<Register>,
    /// The program.
    pub body: Vec<Item>,
}

impl Kernel {
    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.block.iter().product()
    }

    /// Blocks of a cluster.
    pub fn cluster_blocks(&self) -> u32 {
        self.cluster.iter().product()
    }
}

/// How a tile's 16-byte chunks are permuted in shared memory, so that neither rows nor columns conflict in its banks.
///
/// A tile's row spans at most `span` bytes. With the tile at a multiple of 8·span bytes, the chunk index inside a row is
/// xored with bits of the row index: address bits 4–6 (128 B), 4–5 (64 B) or 4 (32 B) with bits 7–9, 7–8, 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Swizzle {
    /// As it is.
    None,
    /// Rows of 32 bytes.
    B32,
    /// Rows of 64 bytes.
    B64,
    /// Rows of 128 bytes.
    B128,
}

impl Swizzle {
    /// Bytes of a row of the pattern; 16 without a swizzle (the width of a core matrix).
    pub const fn span(self) -> u32 {
        match self {
            Swizzle::None => 16,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        }
    }

    /// The shared address at which the byte of unswizzled address `address` lies. The pattern is a function of address
    /// bits, so tiles must be aligned to its repeat (8 rows: `8 * span` bytes).
    pub const fn apply(self, address: u32) -> u32 {
        match self {
            Swizzle::None => address,
            Swizzle::B32 => address ^ (address >> 7 & 1) << 4,
            Swizzle::B64 => address ^ (address >> 7 & 3) << 4,
            Swizzle::B128 => address ^ (address >> 7 & 7) << 4,
        }
    }
}

/// Element type of a tensor that TMA moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorElement {
    /// Bytes (also fp8).
    U8,
    /// binary16.
    F16,
    /// bfloat16.
    BF16,
    /// binary32.
    F32,
}

impl TensorElement {
    /// Bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            TensorElement::U8 => 1,
            TensorElement::F16 | TensorElement::BF16 => 2,
            TensorElement::F32 => 4,
        }
    }
}

/// What a TMA tensor map says, without the address: the box of a tensor that one copy moves. Dimensions are innermost
/// first. Elements outside the tensor are read as zero and not written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorMap {
    /// Element type.
    pub element: TensorElement,
    /// Sizes in elements, 1 to 5 dimensions, innermost first.
    pub shape: Vec<u64>,
    /// Bytes from one index to the next, for all dimensions but the innermost (which is dense).
    pub strides: Vec<u64>,
    /// Sizes of the box in elements, each at most 256.
    pub tile: Vec<u32>,
    /// Layout of the box in shared memory.
    pub swizzle: Swizzle,
}

/// Why a tensor map is refused. The rules are those of `cuTensorMapEncodeTiled`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorMapError {
    /// Number of dimensions.
    #[error(
        "a tensor map has 1 to 5 dimensions with a stride for each but the first and a box size for each; got {shape} sizes, {strides} strides, {tile} box sizes"
    )]
    Rank {
        /// Sizes given.
        shape: usize,
        /// Strides given.
        strides: usize,
        /// Box sizes given.
        tile: usize,
    },
    /// A size.
    #[error("size {size} of dimension {dimension}: expected 1 to 2^32")]
    Size {
        /// Which, innermost 0.
        dimension: usize,
        /// Its size.
        size: u64,
    },
    /// A stride.
    #[error("stride {stride} of dimension {dimension}: expected a multiple of 16 below 2^40 bytes")]
    Stride {
        /// Which, innermost 0.
        dimension: usize,
        /// Its stride in bytes.
        stride: u64,
    },
    /// A box size.
    #[error("box size {size} of dimension {dimension}: expected 1 to 256")]
    Box {
        /// Which, innermost 0.
        dimension: usize,
        /// Its size.
        size: u32,
    },
    /// The box's row.
    #[error("the box's row has {bytes} bytes: expected a multiple of 16, at most {most} under this swizzle")]
    Row {
        /// Bytes of the row.
        bytes: u32,
        /// Most that the swizzle allows.
        most: u32,
    },
    /// The tensor's address.
    #[error("address {address:#x} of the tensor: expected a multiple of 16")]
    Address {
        /// The address.
        address: u64,
    },
}

impl TensorMap {
    /// Checks the rules that hold wherever the tensor lies; `address` is checked to be a multiple of 16.
    pub fn check(&self, address: u64) -> Result<(), TensorMapError> {
        let dims = self.shape.len();
        if !(1..=5).contains(&dims) || self.strides.len() + 1 != dims || self.tile.len() != dims {
            let (strides, tile) = (self.strides.len(), self.tile.len());
            return Err(TensorMapError::Rank { shape: dims, strides, tile });
        }
        for (dimension, &size) in self.shape.iter().enumerate() {
            if size == 0 || size > 1 << 32 {
                return Err(TensorMapError::Size { dimension, size });
            }
        }
        for (i, &stride) in self.strides.iter().enumerate() {
            if !stride.is_multiple_of(16) || stride >= 1 << 40 {
                return Err(TensorMapError::Stride { dimension: i + 1, stride });
            }
        }
        for (dimension, &size) in self.tile.iter().enumerate() {
            if size == 0 || size > 256 {
                return Err(TensorMapError::Box { dimension, size });
            }
        }
        let bytes = self.tile[0] * self.element.bytes();
        let most = if self.swizzle == Swizzle::None { 256 * 4 } else { self.swizzle.span() };
        if !bytes.is_multiple_of(16) || bytes > most {
            return Err(TensorMapError::Row { bytes, most });
        }
        if !address.is_multiple_of(16) {
            return Err(TensorMapError::Address { address });
        }
        Ok(())
    }

    /// Bytes of the box in shared memory: what one copy counts on its mbarrier, whether inside the tensor or not.
    pub fn tile_bytes(&self) -> u32 {
        self.tile.iter().product::<u32>() * self.element.bytes()
    }
}
