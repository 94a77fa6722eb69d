//! The demo's inputs: Q, K and V of a layer of two trained models on a real text (see data/README.md), inside the
//! binary.

use crate::attention::{Given, Layout, normal};
use crate::options::Pass;
use crate::problem::{self, ProblemArgs};
use crate::tensor_file::TensorFile;
use anyhow::{Context, Result};
use flashattn_spec::{AttentionProblem, Element};

/// A file of tensors and what it is.
#[derive(Clone, Copy, Debug)]
pub struct Input {
    /// For the report.
    pub name: &'static str,
    bytes: &'static [u8],
}

/// The real inputs.
pub const INPUTS: [Input; 2] = [
    Input { name: "smollm2-135m", bytes: include_bytes!("../../../../data/smollm2-135m.safetensors") },
    Input { name: "minilm-l6", bytes: include_bytes!("../../../../data/minilm-l6.safetensors") },
];

/// Seed of the gradient of the output, which is random: the models were not trained here.
const SEED: u64 = 2205_14135;

impl Input {
    /// The tensors.
    ///
    /// # Errors
    /// If the file is damaged.
    pub fn file(&self) -> Result<TensorFile<'static>> {
        TensorFile::from_safetensors(self.bytes).context(self.name)
    }
}

/// The problem and tensors of a file, cut or repeated to `seqlen` tokens if that is given; with a random gradient of
/// the output, rounded to the file's dtype even where `T` is wider, so that the oracle's answers are the same.
///
/// # Errors
/// If the file is damaged.
pub fn load<S: Element, T: Element>(
    file: &TensorFile,
    seqlen: Option<usize>,
) -> Result<(AttentionProblem, Given<T>)> {
    let mut p = ProblemArgs::default().problem(file)?;
    let stored = problem::given::<S>(&p, file, Pass::Fwd)?;
    let tokens = p.seqlen_q;
    let wanted = seqlen.unwrap_or(tokens);
    let fit = |x: Vec<S>| -> Vec<T> {
        let token = x.len() / tokens.max(1);
        (0..wanted)
            .flat_map(|i| &x[i % tokens * token..(i % tokens + 1) * token])
            .map(|x| T::from_f64(x.to_f64()))
            .collect()
    };
    (p.seqlen_q, p.seqlen_k, p.dtype) = (wanted, wanted, T::DTYPE);
    let d_o = normal::<S>(p.o_shape().iter().product(), SEED)
        .into_iter()
        .map(|x| T::from_f64(x.to_f64()))
        .collect();
    let (q, k, v) = (fit(stored.q), fit(stored.k), fit(stored.v));
    Ok((p, Given { layout: Layout::Bnhd, q, k, v, d_o, ..Given::default() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flashattn_spec::mask::Mask;
    use half::bf16;

    #[test]
    fn inputs_are_what_the_readme_says() {
        let file = INPUTS[0].file().unwrap();
        let (p, given) = load::<bf16, bf16>(&file, None).unwrap();
        assert_eq!((p.q_shape(), p.heads_kv, p.scale()), ([1, 4096, 9, 64], 3, 0.125));
        assert!(matches!(p.mask, Mask::Causal));
        let (longer, wide) = load::<bf16, f32>(&file, Some(5000)).unwrap();
        assert_eq!(longer.k_shape(), [1, 5000, 3, 64]);
        let token = 3 * 64;
        assert_eq!(wide.k[4096 * token..4097 * token], wide.k[..token], "the text starts again");
        assert_eq!(wide.q[12345], given.q[12345].to_f32());
        let (p, _) = load::<half::f16, half::f16>(&INPUTS[1].file().unwrap(), Some(100)).unwrap();
        assert_eq!(p.q_shape(), [1, 100, 12, 32]);
        assert!((p.scale() - 32f32.sqrt().recip()).abs() < 1e-6);
        assert!(matches!(p.mask, Mask::Full));
    }
}
