//! Options that change what attention computes: masks beside the causal one, score mods, dropout.

use anyhow::{Result, bail, ensure};
use clap::Args;
use flashattn_spec::mask::Mask;
use flashattn_spec::score_mod::ScoreMod;
use flashattn_spec::{AttentionProblem, Dropout};

/// Masks, score mods, scale and dropout.
#[derive(Args, Clone, Debug, Default)]
pub struct ModArgs {
    /// A query sees so many keys to the left and to the right of its own position; -1: all
    #[arg(long, value_delimiter = ',', num_args = 1, value_name = "LEFT,RIGHT", allow_hyphen_values = true)]
    window: Option<Vec<i64>>,
    /// A query sees only the keys of its own document: N tokens each
    #[arg(long, value_name = "N", value_parser = crate::options::count)]
    document: Option<usize>,
    /// Scores become CAP · tanh(score / CAP)
    #[arg(long, value_name = "CAP", allow_negative_numbers = true)]
    softcap: Option<f32>,
    /// Scores lose slope · distance: slopes from tensor alibi_slopes, or 2^(−8 (h + 1) / heads)
    #[arg(long)]
    pub alibi: bool,
    /// Factor of q·k, instead of 1/√head_dim
    #[arg(long, value_name = "SCALE", allow_hyphen_values = true)]
    pub scale: Option<f32>,
    /// Probability that an attention weight is dropped
    #[arg(long, value_name = "P")]
    dropout: Option<f32>,
    /// Seed of the dropout
    #[arg(long, value_name = "SEED", default_value_t = 0, requires = "dropout")]
    seed: u64,
}

impl ModArgs {
    /// Gives a problem these options. `slopes` are ALiBi's, if they are not the usual ones.
    ///
    /// # Errors
    /// Options that do not fit the problem.
    pub fn apply(&self, p: &mut AttentionProblem, causal: bool, slopes: Option<Vec<f32>>) -> Result<()> {
        p.mask = self.window(causal)?;
        if let Some(tokens) = self.document {
            let (q, k) = (p.total_q(), p.total_k());
            ensure!(tokens > 0, "--document is 0, expected at least 1");
            ensure!(q == k, "--document with {q} queries and {k} keys: expected as many");
            // Sequences of equal length each begin with a document; packed ones are one text.
            let length = if p.varlen.is_some() { q } else { p.seqlen_q };
            let ids: Vec<i32> = (0..q).map(|token| (token % length.max(1) / tokens) as i32).collect();
            let document = Mask::document(&ids);
            p.mask = match std::mem::replace(&mut p.mask, Mask::Full) {
                Mask::Full => document,
                mask => mask.and(document),
            };
        }
        let softcap = self.softcap.map(ScoreMod::softcap);
        p.score_mod = if self.alibi {
            let heads = p.heads_q;
            let usual = || (0..heads).map(|h| (-8.0 * (h + 1) as f32 / heads as f32).exp2()).collect();
            let alibi = ScoreMod::alibi(&slopes.unwrap_or_else(usual))?;
            softcap.map_or(alibi.clone(), |softcap| softcap.then(alibi))
        } else {
            softcap.unwrap_or_default()
        };
        p.softmax_scale = self.scale;
        p.dropout = self.dropout.map(|p| Dropout { p, seed: self.seed });
        Ok(())
    }

    fn window(&self, causal: bool) -> Result<Mask> {
        let Some(window) = &self.window else { return Ok(if causal { Mask::Causal } else { Mask::Full }) };
        let &[left, right] = window.as_slice() else {
            bail!("--window has {} numbers, expected two: LEFT,RIGHT", window.len());
        };
        let side = |x: i64| match x {
            -1 => Ok(None),
            0.. => Ok(Some(x as usize)),
            _ => bail!("--window has {x}, expected 0 or more, or -1 for all"),
        };
        let (left, right) = (side(left)?, side(right)?);
        // Causal is a window that ends at the query.
        Ok(Mask::Local { left, right: if causal { Some(0) } else { right } })
    }

    /// What is not plain, for people: empty, or begins with a comma.
    pub fn name(&self) -> String {
        let mut name = String::new();
        let mut add = |text: String| name.extend([", ", &text]);
        self.window.iter().for_each(|w| {
            add(format!("window {}", w.iter().map(i64::to_string).collect::<Vec<_>>().join(",")))
        });
        self.document.iter().for_each(|n| add(format!("documents of {n}")));
        self.softcap.iter().for_each(|cap| add(format!("softcap {cap}")));
        if self.alibi {
            add("alibi".to_owned());
        }
        self.scale.iter().for_each(|scale| add(format!("scale {scale}")));
        self.dropout.iter().for_each(|p| add(format!("dropout {p}")));
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use flashattn_spec::DType;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        mods: ModArgs,
    }

    fn problem(line: &str, causal: bool) -> Result<AttentionProblem> {
        let words = ["x"].into_iter().chain(line.split_whitespace());
        let mods = Command::try_parse_from(words)?.mods;
        let mut p = AttentionProblem::new(2, 10, 4, 8, DType::F32);
        mods.apply(&mut p, causal, None)?;
        p.validate()?;
        Ok(p)
    }

    #[test]
    fn options_become_parts_of_the_problem() {
        let p = problem("--window 3,-1 --softcap 30 --alibi --dropout 0.5 --seed 9 --scale 2", true).unwrap();
        assert!(matches!(p.mask, Mask::Local { left: Some(3), right: Some(0) }));
        assert!(matches!(p.score_mod, ScoreMod::Chain(_)));
        assert_eq!((p.dropout.map(|d| d.seed), p.softmax_scale), (Some(9), Some(2.0)));
        let Mask::And(parts) = problem("--document 4", true).unwrap().mask else { panic!("two masks") };
        let [Mask::Causal, Mask::Document { q_ids, .. }] = parts.as_slice() else { panic!("{parts:?}") };
        assert_eq!(q_ids[..], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]);
        assert!(matches!(problem("", false).unwrap().mask, Mask::Full));
        for bad in ["--window 1", "--window -2,0", "--document 0", "--softcap 0", "--dropout 1"] {
            assert!(problem(bad, false).is_err(), "{bad}");
        }
        let mods = ModArgs { alibi: true, document: Some(64), ..ModArgs::default() };
        assert_eq!(
            (mods.name().as_str(), ModArgs::default().name().as_str()),
            (", documents of 64, alibi", "")
        );
    }
}
