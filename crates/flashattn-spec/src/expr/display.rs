//! Printing expressions as readable maths.

use super::{BinOp, Expr, Node, NodeId, Program, Type, UnOp, Var};
use std::fmt::{self, Write};

/// How tightly an operator binds; as in Rust.
const LOOSE: u8 = 0;
const UNARY: u8 = 10;

fn infix(op: BinOp) -> Option<(&'static str, u8)> {
    use BinOp::*;
    Some(match op {
        Or => ("||", 1),
        And => ("&&", 2),
        Lt => ("<", 3),
        Le => ("<=", 3),
        Eq => ("==", 3),
        Ne => ("!=", 3),
        BitOr => ("|", 4),
        BitXor => ("^", 5),
        BitAnd => ("&", 6),
        Shl => ("<<", 7),
        Shr => (">>", 7),
        Add => ("+", 8),
        Sub => ("-", 8),
        Mul => ("*", 9),
        Div => ("/", 9),
        Rem => ("%", 9),
        Min | Max => return None,
    })
}

enum Item {
    Text(&'static str),
    /// A node in a place that binds this tightly; whether an int there need not be marked as converted.
    Node(NodeId, u8, bool),
}

/// Prints with an explicit stack: an expression may be deep.
struct Printer<'a> {
    program: &'a Program,
    /// The number of the name given to a node that is used more than once.
    names: Vec<Option<usize>>,
}

impl<'a> Printer<'a> {
    fn new(program: &'a Program) -> Self {
        let mut uses = vec![0u32; program.nodes().len()];
        let operands = program.nodes().iter().flat_map(Node::operands);
        operands.chain(program.roots().iter().copied()).for_each(|i| uses[i.index()] += 1);
        let mut count = 0..;
        let mut printer = Self { program, names: Vec::new() };
        let names = program.nodes().iter().zip(uses);
        printer.names = names
            .map(|(node, uses)| if uses > 1 && !printer.is_short(node) { count.next() } else { None })
            .collect();
        printer
    }

    fn is_leaf(&self, id: NodeId) -> bool {
        self.program.nodes()[id.index()].operands().next().is_none()
    }

    /// Whether repeating it reads better than a name.
    fn is_short(&self, node: &Node) -> bool {
        matches!(node, Node::Unary(..) | Node::Load { .. }) && node.operands().all(|i| self.is_leaf(i))
            || node.operands().next().is_none()
    }

    fn is_converted_int(&self, id: NodeId) -> bool {
        match self.program.nodes()[id.index()] {
            Node::Unary(UnOp::ToFloat, x) => self.program.types()[x.index()] == Type::Int,
            _ => false,
        }
    }

    fn definition(&self, f: &mut fmt::Formatter<'_>, id: NodeId) -> fmt::Result {
        let mut stack = Vec::new();
        self.node(f, &mut stack, id, LOOSE, false)?;
        while let Some(item) = stack.pop() {
            match item {
                Item::Text(text) => f.write_str(text)?,
                Item::Node(id, tight, plain) => match self.names[id.index()] {
                    Some(name) => write!(f, "v{name}")?,
                    None => self.node(f, &mut stack, id, tight, plain)?,
                },
            }
        }
        Ok(())
    }

    /// Writes the start of a node and leaves the rest on the stack.
    fn node(
        &self,
        f: &mut fmt::Formatter<'_>,
        stack: &mut Vec<Item>,
        id: NodeId,
        tight: u8,
        plain: bool,
    ) -> fmt::Result {
        let start = stack.len();
        let call = |f: &mut fmt::Formatter<'_>, stack: &mut Vec<Item>, name: &str, args: &[Item]| {
            write!(f, "{name}(")?;
            for (i, arg) in args.iter().enumerate() {
                if i > 0 {
                    stack.push(Item::Text(", "));
                }
                if let &Item::Node(id, tight, plain) = arg {
                    stack.push(Item::Node(id, tight, plain));
                }
            }
            stack.push(Item::Text(")"));
            Ok(())
        };
        let arg = |id| Item::Node(id, LOOSE, false);
        match self.program.nodes()[id.index()] {
            Node::Score => f.write_str("score")?,
            Node::Var(var) => f.write_str(match var {
                Var::Batch => "batch",
                Var::Head => "head",
                Var::Q => "q",
                Var::Kv => "kv",
                Var::SeqlenQ => "seqlen_q",
                Var::SeqlenK => "seqlen_k",
                Var::QStart => "q_start",
                Var::KvStart => "kv_start",
            })?,
            Node::Float(bits) => write!(f, "{:?}", f32::from_bits(bits))?,
            Node::Int(x) => write!(f, "{x}")?,
            Node::Bool(x) => write!(f, "{x}")?,
            Node::Load { table, index } => {
                write!(f, "t{}[", table.0)?;
                let zero = |i: &NodeId| self.program.nodes()[i.index()] == Node::Int(0);
                let used = index.iter().rposition(|i| !zero(i)).map_or(1, |last| last + 1);
                for (i, &id) in index[..used].iter().enumerate() {
                    if i > 0 {
                        stack.push(Item::Text(", "));
                    }
                    stack.push(arg(id));
                }
                stack.push(Item::Text("]"));
            }
            Node::Unary(UnOp::ToFloat, x) if plain && self.is_converted_int(id) => {
                stack.push(Item::Node(x, tight, false));
            }
            Node::Unary(op, x) => match op {
                UnOp::Neg | UnOp::Not => {
                    f.write_char(if op == UnOp::Neg { '-' } else { '!' })?;
                    stack.push(Item::Node(x, UNARY, false));
                }
                UnOp::Abs => call(f, stack, "abs", &[arg(x)])?,
                UnOp::Exp2 => call(f, stack, "exp2", &[arg(x)])?,
                UnOp::Log2 => call(f, stack, "log2", &[arg(x)])?,
                UnOp::Tanh => call(f, stack, "tanh", &[arg(x)])?,
                UnOp::ToFloat => call(f, stack, "float", &[arg(x)])?,
                UnOp::Floor => call(f, stack, "floor", &[arg(x)])?,
            },
            Node::Binary(op, a, b) => {
                // Beside a float, that an int is converted goes without saying.
                let plain = self.is_converted_int(a) != self.is_converted_int(b);
                match infix(op) {
                    None => {
                        let args = [Item::Node(a, LOOSE, plain), Item::Node(b, LOOSE, plain)];
                        call(f, stack, if op == BinOp::Min { "min" } else { "max" }, &args)?;
                    }
                    Some((symbol, own)) => {
                        let close = own < tight;
                        if close {
                            f.write_char('(')?;
                        }
                        // Operators group to the left; comparisons do not group; logic needs no grouping.
                        let (left, right) = match op {
                            BinOp::And | BinOp::Or => (own, own),
                            BinOp::Lt | BinOp::Le | BinOp::Eq | BinOp::Ne => (own + 1, own + 1),
                            _ => (own, own + 1),
                        };
                        stack.push(Item::Node(a, left, plain));
                        stack.extend([Item::Text(" "), Item::Text(symbol), Item::Text(" ")]);
                        stack.push(Item::Node(b, right, plain));
                        if close {
                            stack.push(Item::Text(")"));
                        }
                    }
                }
            }
            Node::Select(c, a, b) => call(f, stack, "select", &[arg(c), arg(a), arg(b)])?,
        }
        stack[start..].reverse();
        Ok(())
    }
}

/// Readable maths, such as `score - abs(q - kv) * t0[head]`, with `v0 = …; ` in front for each part that is used
/// more than once. Tables are `t` and their slot; zeros at the end of an index are left out.
impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let printer = Printer::new(self);
        for (i, name) in printer.names.iter().enumerate() {
            if let Some(name) = name {
                write!(f, "v{name} = ")?;
                printer.definition(f, NodeId(i as u16))?;
                f.write_str("; ")?;
            }
        }
        for (i, &root) in self.roots().iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            match printer.names[root.index()] {
                Some(name) => write!(f, "v{name}")?,
                None => printer.definition(f, root)?,
            }
        }
        Ok(())
    }
}

/// As for [`Program`].
impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
