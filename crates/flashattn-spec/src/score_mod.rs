//! [`ScoreMod`]: what happens to a scaled score `s = softmax_scale · (q·k)` before the mask and the softmax.
//!
//! Like masks, all of them are expressions: executors evaluate them in the forward pass and multiply by their
//! derivative with respect to `s` in the backward pass. Tables made with [`Table::with_grad`] get gradients too.

use crate::expr::{Expr, ExprError, Index, Table, Term, Traced, Type};
use crate::problem::AttentionProblem;

/// Why a score mod was refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ScoreModError {
    /// The cap of a soft cap must be positive and finite.
    #[error("softcap is {got}, expected a finite number above 0")]
    SoftCap {
        /// What was given.
        got: f32,
    },
    /// A table's dimensions do not fit the problem.
    #[error("{name} has shape {got:?}, expected {expected}")]
    TableShape {
        /// The table.
        name: &'static str,
        /// Its dimensions.
        got: Vec<usize>,
        /// The dimensions that the problem asks for, in words and numbers.
        expected: String,
    },
    /// A table must hold f32.
    #[error("{name} holds {got} elements, expected {}", Type::Float)]
    TableType {
        /// The table.
        name: &'static str,
        /// What it holds.
        got: Type,
    },
    /// A custom score mod does not give a number.
    #[error("a custom score mod must give a {}, got {got}", Type::Float)]
    NotFloat {
        /// The type of its result.
        got: Type,
    },
    /// The expression was refused.
    #[error(transparent)]
    Expr(#[from] ExprError),
}

/// What happens to a score before the mask.
#[derive(Clone, Debug, Default)]
pub enum ScoreMod {
    /// Nothing.
    #[default]
    None,
    /// `cap · tanh(s / cap)`: keeps scores in (−cap, cap); cap is finite and above 0.
    SoftCap(f32),
    /// ALiBi: `s − slope · |diagonal − kv|`, where the diagonal is `q + seqlen_k − seqlen_q`. Slopes are f32
    /// `[heads_q]` or `[batch or 1, heads_q]`.
    Alibi(Table),
    /// An added bias, f32 `[batch or 1, heads_q or 1, seqlen_q or 1, seqlen_k or 1]`, in units of scores; positions
    /// count from the start of each sequence.
    Bias(Table),
    /// Any other function of the score and its place.
    Custom(Traced),
    /// One after the other, the first first.
    Chain(Vec<ScoreMod>),
}

impl ScoreMod {
    /// [`ScoreMod::SoftCap`].
    pub fn softcap(cap: f32) -> Self {
        ScoreMod::SoftCap(cap)
    }

    /// [`ScoreMod::Alibi`] with one slope for each query head.
    ///
    /// # Errors
    /// [`ScoreModError::Expr`] if there are none.
    pub fn alibi(slopes: &[f32]) -> Result<Self, ScoreModError> {
        Ok(ScoreMod::Alibi(Table::per_head(slopes.to_vec())?))
    }

    /// [`ScoreMod::Bias`]. Give a table made [`Table::with_grad`] to learn it.
    pub fn bias(bias: Table) -> Self {
        ScoreMod::Bias(bias)
    }

    /// [`ScoreMod::Custom`] from a closure that gives a Float, such as `|s, ix| s + bias[ix.kv - ix.q + 127]`.
    ///
    /// # Errors
    /// [`ScoreModError::Expr`] if the closure mixes types or grows too large.
    pub fn custom(
        function: impl for<'t> FnOnce(Term<'t>, Index<'t>) -> Term<'t>,
    ) -> Result<Self, ScoreModError> {
        Ok(ScoreMod::Custom(Expr::trace(function)?))
    }

    /// This one, then `next`.
    pub fn then(self, next: ScoreMod) -> Self {
        ScoreMod::Chain(vec![self, next])
    }

    /// The score mod as an expression of type Float with the tables it reads; `None` if it changes nothing.
    ///
    /// # Errors
    /// What is wrong with the score mod itself; [`ScoreMod::validate`] also checks it against a problem.
    pub fn lower(&self) -> Result<Option<Traced>, ScoreModError> {
        let traced = match self {
            ScoreMod::None => None,
            &ScoreMod::SoftCap(got) if !(got.is_finite() && got > 0.0) => {
                return Err(ScoreModError::SoftCap { got });
            }
            &ScoreMod::SoftCap(cap) => Some(Expr::trace(|s, _| (s / cap).tanh() * cap)?),
            ScoreMod::Alibi(slopes) => {
                float("ALiBi slopes", slopes)?;
                Some(Expr::trace(|s, ix| {
                    let slope = match slopes.shape().len() {
                        1 => slopes[ix.head],
                        _ => slopes[(ix.batch, ix.head)],
                    };
                    s - slope * (ix.diagonal() - ix.kv).abs().to_float()
                })?)
            }
            ScoreMod::Bias(bias) => {
                float("bias", bias)?;
                Some(Expr::trace(|s, ix| s + bias[(ix.batch, ix.head, ix.q, ix.kv)])?)
            }
            ScoreMod::Custom(traced) => {
                if traced.expr.ty() != Type::Float {
                    return Err(ScoreModError::NotFloat { got: traced.expr.ty() });
                }
                traced.expr.check_tables(&traced.tables)?;
                Some(traced.clone())
            }
            ScoreMod::Chain(mods) => {
                let mut all: Option<Traced> = None;
                for m in mods {
                    if let Some(next) = m.lower()? {
                        all = Some(match all {
                            Some(all) => next.compose(&all)?,
                            None => next,
                        });
                    }
                }
                all
            }
        };
        Ok(traced.filter(|t| !t.expr.is_identity()))
    }

    /// Checks the score mod, and that its tables have the problem's shapes.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub fn validate(&self, problem: &AttentionProblem) -> Result<(), ScoreModError> {
        let p = problem;
        match self {
            ScoreMod::None => Ok(()),
            ScoreMod::Alibi(slopes) => {
                float("ALiBi slopes", slopes)?;
                let fits = match *slopes.shape() {
                    [h] => h == p.heads_q,
                    [b, h] => (b == 1 || b == p.batch) && h == p.heads_q,
                    _ => false,
                };
                let expected =
                    || format!("[heads_q = {h}] or [batch = {} or 1, {h}]", p.batch, h = p.heads_q);
                check(fits, "ALiBi slopes", slopes, expected)
            }
            ScoreMod::Bias(bias) => {
                float("bias", bias)?;
                let want = [p.batch, p.heads_q, p.seqlen_q, p.seqlen_k];
                let got = bias.shape();
                let fits = got.len() == 4 && got.iter().zip(want).all(|(&d, n)| d == 1 || d == n);
                check(fits, "bias", bias, || format!("{want:?}, where each may be 1"))
            }
            ScoreMod::SoftCap(_) | ScoreMod::Custom(_) => self.lower().map(drop),
            ScoreMod::Chain(mods) => mods.iter().try_for_each(|m| m.validate(p)),
        }
    }
}

fn float(name: &'static str, table: &Table) -> Result<(), ScoreModError> {
    match table.ty() {
        Type::Float => Ok(()),
        got => Err(ScoreModError::TableType { name, got }),
    }
}

fn check(
    fits: bool,
    name: &'static str,
    table: &Table,
    expected: impl FnOnce() -> String,
) -> Result<(), ScoreModError> {
    if fits {
        return Ok(());
    }
    Err(ScoreModError::TableShape { name, got: table.shape().to_vec(), expected: expected() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::DType;
    use crate::expr::Env;
    use crate::mask::Mask;

    const PLACE: Env =
        Env { batch: 1, head: 2, q: 3, kv: 9, seqlen_q: 5, seqlen_k: 11, q_start: 5, kv_start: 11 };

    fn apply(score_mod: &ScoreMod, score: f64) -> f64 {
        match score_mod.lower().unwrap() {
            Some(traced) => traced.expr.eval(&PLACE, &traced.tables, score).unwrap().as_f64(),
            None => score,
        }
    }

    #[test]
    fn values() {
        assert_eq!(apply(&ScoreMod::None, 3.5), 3.5);
        assert_eq!(apply(&ScoreMod::softcap(2.0), 3.0), 1.5f64.tanh() * 2.0);
        // The diagonal is 3 + 11 − 5 = 9, and one further left for the query before.
        let alibi = ScoreMod::alibi(&[1.0, 2.0, 4.0]).unwrap();
        assert_eq!(apply(&alibi, 0.5), 0.5);
        let traced = alibi.lower().unwrap().unwrap();
        let other = Env { q: 1, ..PLACE };
        assert_eq!(traced.expr.eval(&other, &traced.tables, 0.5).unwrap().as_f64(), 0.5 - 4.0 * 2.0);
        let slopes = Table::f32(&[2, 3], vec![0.0, 0.0, 0.0, 1.0, 1.0, 0.25]).unwrap();
        let traced = ScoreMod::Alibi(slopes).lower().unwrap().unwrap();
        assert_eq!(traced.expr.eval(&other, &traced.tables, 0.5).unwrap().as_f64(), 0.5 - 0.25 * 2.0);
        let bias = Table::f32(&[1, 3, 1, 11], (0..33).map(|x| x as f32).collect()).unwrap();
        assert_eq!(apply(&ScoreMod::bias(bias), 0.5), 0.5 + (2 * 11 + 9) as f64);
    }

    #[test]
    fn chains_apply_the_first_first() {
        let twice = ScoreMod::custom(|s, _| s * 2.0).unwrap();
        let more = ScoreMod::custom(|s, ix| s + ix.kv.to_float()).unwrap();
        assert_eq!(apply(&twice.clone().then(more.clone()), 5.0), 19.0);
        assert_eq!(apply(&more.then(ScoreMod::None).then(twice), 5.0), 28.0);
        assert!(ScoreMod::Chain(vec![]).lower().unwrap().is_none());
        assert!(ScoreMod::custom(|s, _| s + 0).unwrap().then(ScoreMod::None).lower().unwrap().is_none());
    }

    #[test]
    fn wrong_score_mods_name_what_is_wrong() {
        let refuse = |score_mod: ScoreMod, text: &str| {
            let mut problem = AttentionProblem::new(2, 16, 4, 8, DType::F32);
            problem.score_mod = score_mod;
            assert_eq!(problem.validate().unwrap_err().to_string(), format!("score mod: {text}"));
        };
        let table = |dims: &[usize]| Table::f32(dims, vec![0.0; dims.iter().product()]).unwrap();
        for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            refuse(
                ScoreMod::None.then(ScoreMod::softcap(cap)),
                &format!("softcap is {cap}, expected a finite number above 0"),
            );
        }
        for dims in [&[3][..], &[3, 4], &[2, 1], &[1, 2, 4]] {
            let expected = "[heads_q = 4] or [batch = 2 or 1, 4]";
            refuse(
                ScoreMod::Alibi(table(dims)),
                &format!("ALiBi slopes has shape {dims:?}, expected {expected}"),
            );
        }
        for dims in [&[16, 16][..], &[2, 4, 16, 15], &[3, 4, 16, 16]] {
            refuse(
                ScoreMod::bias(table(dims)),
                &format!("bias has shape {dims:?}, expected [2, 4, 16, 16], where each may be 1"),
            );
        }
        let ids = Table::i32(&[4], vec![0; 4]).unwrap();
        refuse(ScoreMod::Alibi(ids), "ALiBi slopes holds int elements, expected float");
        let mask = Mask::causal().lower().unwrap().unwrap();
        refuse(ScoreMod::Custom(mask), "a custom score mod must give a float, got bool");
        assert!(matches!(ScoreMod::alibi(&[]), Err(ScoreModError::Expr(ExprError::Dimension { .. }))));
    }

    #[test]
    fn gradients_are_asked_for_by_slot() {
        let bias = Table::f32(&[1, 4, 1, 16], vec![0.0; 64]).unwrap().with_grad().unwrap();
        let slopes = Table::per_head(vec![1.0; 4]).unwrap();
        let learned = Table::per_head(vec![2.0; 4]).unwrap().with_grad().unwrap();
        let mut problem = AttentionProblem::new(2, 16, 4, 8, DType::F32);
        assert!(problem.grad_tables().is_empty());
        problem.score_mod = ScoreMod::Chain(vec![ScoreMod::Alibi(slopes), ScoreMod::bias(bias.clone()), {
            let learned = learned.clone();
            ScoreMod::custom(move |s, ix| s * learned[ix.head]).unwrap()
        }]);
        problem.validate().unwrap();
        let lowered = problem.lower().unwrap();
        let tables = problem.grad_tables();
        let in_slots: Vec<&Table> = lowered.grad_tables().collect();
        assert_eq!(tables.len(), 2);
        assert!(tables.iter().zip(in_slots).all(|(a, b)| a.is_same(b)));
        assert!([&bias, &learned].iter().all(|t| tables.iter().any(|x| x.is_same(t))));
    }
}
