//! Element types of Q, K, V and O.

use half::{bf16, f16};
use std::fmt;

/// Storage type of Q, K, V, O and their gradients. Accumulation is always in f32 (f64 in the oracle).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE binary16: 11 bits of significand, largest value 65504.
    F16,
    /// bfloat16: f32's exponent range, 8 bits of significand.
    Bf16,
    /// IEEE binary32.
    F32,
    /// IEEE binary64: the oracle's type; executors refuse it.
    F64,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F16 | DType::Bf16 => 2,
            DType::F32 => 4,
            DType::F64 => 8,
        }
    }

    /// Unit roundoff: half the distance from 1 to the next larger number.
    pub const fn epsilon(self) -> f64 {
        match self {
            DType::F16 => 1.0 / 2048.0,
            DType::Bf16 => 1.0 / 256.0,
            DType::F32 => 1.0 / 16_777_216.0,
            DType::F64 => f64::EPSILON / 2.0,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
            DType::F32 => "f32",
            DType::F64 => "f64",
        })
    }
}

/// A Rust type that Q, K, V and O can be made of. Sealed: the executors' kernels know these four.
pub trait Element: sealed::Sealed + bytemuck::Pod + Default + PartialEq + Send + Sync + fmt::Debug {
    /// The run-time name of this type.
    const DTYPE: DType;
    /// Exact widening.
    fn to_f64(self) -> f64;
    /// Rounds to nearest even.
    fn from_f64(x: f64) -> Self;
    /// Exact widening, except for f64, which rounds.
    fn to_f32(self) -> f32;
    /// Rounds to nearest even.
    fn from_f32(x: f32) -> Self;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f64 {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

macro_rules! element {
    ($t:ty, $dtype:expr, $x:ident: $to64:expr, $to32:expr, $from64:expr, $from32:expr) => {
        impl Element for $t {
            const DTYPE: DType = $dtype;
            #[inline]
            fn to_f64(self) -> f64 {
                let $x = self;
                $to64
            }
            #[inline]
            fn to_f32(self) -> f32 {
                let $x = self;
                $to32
            }
            #[inline]
            fn from_f64($x: f64) -> Self {
                $from64
            }
            #[inline]
            fn from_f32($x: f32) -> Self {
                $from32
            }
        }
    };
}

element!(f64, DType::F64, x: x, x as f32, x, f64::from(x));
element!(f32, DType::F32, x: f64::from(x), x, x as f32, x);
element!(f16, DType::F16, x: f64::from(x), f32::from(x), f16::from_f64(x), f16::from_f32(x));
element!(bf16, DType::Bf16, x: f64::from(x), f32::from(x), bf16::from_f64(x), bf16::from_f32(x));
