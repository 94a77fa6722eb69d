//! Types of virtual registers, and the Rust types that stand for them.
//!
//! A register's Rust type is a marker: `f32`, `u32`, `bool` (a predicate), … where Rust has the type, and an empty
//! struct where it does not ([`F16x2`], [`BF16x2`]). Every value is carried as 64 bits by the emulator.

use std::fmt;

/// The type of a virtual register, or of an operand of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    /// One bit: a predicate.
    Pred,
    /// 16 bits without a meaning: an f16 or bf16 element, two fp8 elements, a cluster mask.
    B16,
    /// 32 bits without a meaning; as an operand type it takes any 32-bit register.
    B32,
    /// Unsigned, 32 bits; also an address in shared memory.
    U32,
    /// Signed, 32 bits.
    S32,
    /// IEEE binary32.
    F32,
    /// Two binary16 values, the first in the low half.
    F16x2,
    /// Two bfloat16 values, the first in the low half.
    BF16x2,
    /// 64 bits without a meaning; as an operand type it takes any 64-bit register.
    B64,
    /// Unsigned, 64 bits; also an address in global memory, and a matrix descriptor.
    U64,
    /// Signed, 64 bits.
    S64,
}

impl Type {
    /// Every type.
    pub const ALL: [Type; 11] = [
        Type::Pred,
        Type::B16,
        Type::B32,
        Type::U32,
        Type::S32,
        Type::F32,
        Type::F16x2,
        Type::BF16x2,
        Type::B64,
        Type::U64,
        Type::S64,
    ];

    /// Bits of a register of this type; 1 for a predicate.
    pub const fn bits(self) -> u32 {
        match self {
            Type::Pred => 1,
            Type::B16 => 16,
            Type::B32 | Type::U32 | Type::S32 | Type::F32 | Type::F16x2 | Type::BF16x2 => 32,
            Type::B64 | Type::U64 | Type::S64 => 64,
        }
    }

    /// The name used in the instruction table.
    pub const fn name(self) -> &'static str {
        match self {
            Type::Pred => "pred",
            Type::B16 => "b16",
            Type::B32 => "b32",
            Type::U32 => "u32",
            Type::S32 => "s32",
            Type::F32 => "f32",
            Type::F16x2 => "f16x2",
            Type::BF16x2 => "bf16x2",
            Type::B64 => "b64",
            Type::U64 => "u64",
            Type::S64 => "s64",
        }
    }

    /// The type with that name in the instruction table.
    pub fn parse(name: &str) -> Option<Type> {
        Type::ALL.into_iter().find(|ty| ty.name() == name)
    }

    /// The PTX declaration type: packed pairs are plain 32-bit registers there.
    pub(crate) const fn declared(self) -> &'static str {
        match self {
            Type::F16x2 | Type::BF16x2 => "b32",
            other => other.name(),
        }
    }

    /// The prefix of this type's registers in PTX text.
    pub(crate) const fn prefix(self) -> &'static str {
        match self {
            Type::Pred => "%p",
            Type::B16 => "%h",
            Type::B32 => "%b",
            Type::U32 => "%r",
            Type::S32 => "%s",
            Type::F32 => "%f",
            Type::F16x2 | Type::BF16x2 => "%hh",
            Type::B64 => "%bd",
            Type::U64 => "%rd",
            Type::S64 => "%sd",
        }
    }

    /// Whether an operand of this type takes a register of type `register`. PTX lets the untyped sizes take any type
    /// of their width and the integers each other; floats and packed pairs are taken by name only.
    pub fn takes(self, register: Type) -> bool {
        use Type::*;
        self == register
            || self.bits() == register.bits()
                && matches!(
                    (self, register),
                    (B16 | B32 | B64, _)
                        | (U32 | S32, U32 | S32 | B32)
                        | (U64 | S64, U64 | S64 | B64)
                        | (F16x2 | BF16x2, B32)
                )
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Marker of [`Type::F16x2`].
#[derive(Clone, Copy, Debug)]
pub struct F16x2;

/// Marker of [`Type::BF16x2`].
#[derive(Clone, Copy, Debug)]
pub struct BF16x2;

/// Marker of [`Type::B32`].
#[derive(Clone, Copy, Debug)]
pub struct B32;

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that names a register type.
pub trait Scalar: Copy + sealed::Sealed + 'static {
    /// The register type.
    const TYPE: Type;
}

macro_rules! scalars {
    ($($rust:ty => $ty:ident),* $(,)?) => { $(
        impl sealed::Sealed for $rust {}
        impl Scalar for $rust { const TYPE: Type = Type::$ty; }
    )* };
}
scalars!(bool => Pred, u16 => B16, B32 => B32, u32 => U32, i32 => S32, f32 => F32, F16x2 => F16x2, BF16x2 => BF16x2,
         u64 => U64, i64 => S64);

/// A value as the 64 bits in which a register carries it (zero-extended).
pub trait Bits: Copy {
    /// From a register's bits; higher bits are ignored.
    fn from_bits64(bits: u64) -> Self;
    /// To a register's bits.
    fn to_bits64(self) -> u64;
}

macro_rules! integer_bits {
    ($($ty:ty as $unsigned:ty),*) => { $(
        impl Bits for $ty {
            fn from_bits64(bits: u64) -> Self { bits as $ty }
            fn to_bits64(self) -> u64 { self as $unsigned as u64 }
        }
    )* };
}
integer_bits!(u16 as u16, u32 as u32, i32 as u32, u64 as u64, i64 as u64);

impl Bits for bool {
    fn from_bits64(bits: u64) -> Self {
        bits & 1 == 1
    }
    fn to_bits64(self) -> u64 {
        self as u64
    }
}

impl Bits for f32 {
    fn from_bits64(bits: u64) -> Self {
        f32::from_bits(bits as u32)
    }
    fn to_bits64(self) -> u64 {
        self.to_bits() as u64
    }
}

/// Two 16-bit values in one register, the first in the low half.
impl Bits for [u16; 2] {
    fn from_bits64(bits: u64) -> Self {
        [bits as u16, (bits >> 16) as u16]
    }
    fn to_bits64(self) -> u64 {
        self[0] as u64 | (self[1] as u64) << 16
    }
}

impl Bits for [half::f16; 2] {
    fn from_bits64(bits: u64) -> Self {
        <[u16; 2]>::from_bits64(bits).map(half::f16::from_bits)
    }
    fn to_bits64(self) -> u64 {
        self.map(half::f16::to_bits).to_bits64()
    }
}

impl Bits for [half::bf16; 2] {
    fn from_bits64(bits: u64) -> Self {
        <[u16; 2]>::from_bits64(bits).map(half::bf16::from_bits)
    }
    fn to_bits64(self) -> u64 {
        self.map(half::bf16::to_bits).to_bits64()
    }
}
