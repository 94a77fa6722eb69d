//! What can be wrong with an expression or a table.

use super::Type;

/// Why an expression, a table, or the pairing of the two was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExprError {
    /// An operation was applied to types that it does not take.
    #[error("`{op}` takes {expected}, got {got}")]
    Type {
        /// The operation, in lower case.
        op: String,
        /// The operand types.
        got: String,
        /// What it takes.
        expected: &'static str,
    },
    /// The expression has more nodes than fit.
    #[error("the expression has more than {limit} nodes")]
    TooManyNodes {
        /// The limit.
        limit: usize,
    },
    /// More tables than slots can number.
    #[error("the expression uses more than 65535 tables")]
    TooManyTables,
    /// An operand that the builder does not have.
    #[error("operand {got} is not one of the builder's {len} nodes")]
    UnknownNode {
        /// The operand.
        got: usize,
        /// How many nodes there are.
        len: usize,
    },
    /// A load from a slot that was not declared.
    #[error("slot {got} is not one of the builder's {len} slots")]
    UnknownSlot {
        /// The slot.
        got: usize,
        /// How many slots there are.
        len: usize,
    },
    /// `trace` was called inside the closure of another `trace`.
    #[error("`trace` was called inside the closure of another `trace`")]
    NestedTrace,
    /// A table was indexed with too few or too many indices.
    #[error("a table of {expected} dimensions was indexed with {got} indices")]
    IndexCount {
        /// How many indices were given.
        got: usize,
        /// How many dimensions the table has.
        expected: usize,
    },
    /// A table must have one to four dimensions.
    #[error("a table has 1 to 4 dimensions, got {got}")]
    Rank {
        /// How many were given.
        got: usize,
    },
    /// A dimension of a table is zero or does not fit an i32.
    #[error("dimension {dim} of a table is {got}; it must be from 1 to {}", i32::MAX)]
    Dimension {
        /// Which dimension.
        dim: usize,
        /// Its size.
        got: usize,
    },
    /// The data of a table is not as long as its dimensions say.
    #[error("a table of dimensions {dims:?} has {expected} elements, got {got}")]
    DataLength {
        /// The dimensions.
        dims: Vec<usize>,
        /// How many elements were given.
        got: usize,
        /// How many the dimensions ask for (`usize::MAX` if that overflows).
        expected: usize,
    },
    /// A gradient was asked for a table of integers.
    #[error("only a table of f32 can have a gradient, this one holds i32")]
    IntegerGradient,
    /// The number of tables given is not the number of slots.
    #[error("the expression takes {expected} tables, got {got}")]
    TableCount {
        /// How many were given.
        got: usize,
        /// How many there are.
        expected: usize,
    },
    /// A table given for a slot has the wrong element type.
    #[error("table {slot} must hold {expected} elements, got {got}")]
    TableType {
        /// Which slot.
        slot: usize,
        /// What the table holds.
        got: Type,
        /// What the expression was built for.
        expected: Type,
    },
}
