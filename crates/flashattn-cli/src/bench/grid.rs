//! What `bench` times: the sizes, dtypes and passes of a grid.

use crate::mods::ModArgs;
use crate::options::{self, Pass};
use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use flashattn_spec::mask::Mask;
use flashattn_spec::score_mod::ScoreMod;
use flashattn_spec::{AttentionProblem, DType};

/// Options that span the grid.
#[derive(Args, Clone, Debug)]
pub struct GridArgs {
    /// A named grid of sizes, instead of the lists below
    #[arg(long, value_enum, conflicts_with_all = ["seqlen", "seqlen_q", "head_dim", "heads", "kv_heads", "batch", "causal", "shapes"])]
    grid: Option<Named>,
    /// Single shapes of the h100 grid's kind: batch · N = 16384, heads · D = 2048, as near as whole numbers come
    #[arg(long, value_delimiter = ';', value_parser = shape, value_name = "D,CAUSAL,N;…",
          conflicts_with_all = ["seqlen", "head_dim", "heads", "batch", "causal"])]
    shapes: Vec<(usize, bool, usize)>,
    /// Sequence lengths, separated by commas; 4k is 4096
    #[arg(long, value_delimiter = ',', value_parser = options::count, value_name = "N,…", default_values = ["512", "2k"])]
    seqlen: Vec<usize>,
    /// Queries a sequence, if not as many as keys (1: decoding)
    #[arg(long, value_parser = options::count, value_name = "N")]
    seqlen_q: Option<usize>,
    /// Elements of a query, key and value row
    #[arg(long, value_delimiter = ',', value_name = "D,…", default_value = "64")]
    head_dim: Vec<usize>,
    /// Query heads
    #[arg(long, default_value_t = 8, value_name = "H")]
    heads: usize,
    /// Key/value heads, if fewer (GQA, MQA)
    #[arg(long, value_name = "H")]
    kv_heads: Option<usize>,
    /// Sequences
    #[arg(long, default_value_t = 1, value_name = "B")]
    batch: usize,
    /// Whether a query sees only the keys up to its own position
    #[arg(long, value_enum, default_value_t = Causal::Both, num_args = 0..=1, default_missing_value = "yes")]
    causal: Causal,
    /// Element types [default: f32,bf16; on a GPU bf16]
    #[arg(long, value_delimiter = ',', value_parser = options::dtype(), value_name = "TYPE,…")]
    dtype: Vec<DType>,
    /// What is timed [default: fwd,fwd_bwd; on a GPU fwd]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PASS,…", hide_possible_values = false)]
    pass: Vec<Pass>,
    #[command(flatten)]
    mods: ModArgs,
}

/// Values of `--grid`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Named {
    /// 8 heads, head_dim 64 and 128, 512 to 8192 tokens, causal and not, and decoding: benches/peers/cpu.py
    Cpu,
    /// 36 shapes: head_dim 64, 128 and 256, 512 to 16384 tokens, causal and not, batch · N = 16384, heads · D = 2048
    H100,
}

/// Values of `--causal`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Causal {
    /// Only causal
    Yes,
    /// Only full
    No,
    /// One after the other
    Both,
}

/// Parser of one of `--shapes`.
fn shape(text: &str) -> Result<(usize, bool, usize), String> {
    let parts: Vec<&str> = text.split(',').collect();
    let &[d, causal, n] = parts.as_slice() else {
        return Err("expected D,CAUSAL,N such as 128,1,4096".into());
    };
    let causal = match causal {
        "0" => false,
        "1" => true,
        _ => return Err(format!("CAUSAL is {causal:?}, expected 0 or 1")),
    };
    let (d, n) = (options::count(d)?, options::count(n)?);
    if d == 0 || n == 0 { Err("a size is 0".into()) } else { Ok((d, causal, n)) }
}

/// One thing to time.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Sizes, mask and dtype.
    pub problem: AttentionProblem,
    /// The pass.
    pub pass: Pass,
    /// Whether the mask is causal, whatever else it is.
    pub causal: bool,
    /// What else changes the scores, for people: empty, or begins with a comma.
    pub mods: String,
}

impl Cell {
    /// Whether a head's result depends on more than the numbers in its tensors.
    pub fn depends_on_place(&self) -> bool {
        let p = &self.problem;
        let plain = matches!(p.mask, Mask::Full | Mask::Causal | Mask::Local { .. });
        !plain || !matches!(p.score_mod, ScoreMod::None | ScoreMod::SoftCap(_)) || p.dropout.is_some()
    }

    /// 4·B·H·Nq·Nk·D forward (with half of each D where they differ), halved if causal, ×2.5 backward: how the field
    /// counts, so that rates of causal and full can be compared. What other masks hide counts as computed.
    pub fn flops(&self) -> f64 {
        let p = &self.problem;
        let products = (p.batch * p.heads_q) as f64 * p.seqlen_q as f64 * p.seqlen_k as f64;
        let forward = 2.0 * products * (p.head_dim + p.head_dim_v) as f64;
        let passes = match self.pass {
            Pass::Fwd => 1.0,
            Pass::Bwd => 2.5,
            Pass::FwdBwd => 3.5,
        };
        forward * passes * if self.causal { 0.5 } else { 1.0 }
    }

    /// Bytes of K and V, where decoding is bound by reading them.
    pub fn decode_bytes(&self) -> Option<usize> {
        let p = &self.problem;
        let elements = p.batch * p.heads_kv * p.seqlen_k * (p.head_dim + p.head_dim_v);
        (p.seqlen_q == 1 && self.pass == Pass::Fwd).then_some(elements * p.dtype.size())
    }

    /// For people.
    pub fn name(&self) -> String {
        let p = &self.problem;
        let heads = if p.heads_kv == p.heads_q {
            p.heads_q.to_string()
        } else {
            format!("{}:{}", p.heads_q, p.heads_kv)
        };
        let mask = if self.causal { "causal" } else { "full" };
        format!("{}×{heads}, {}×{}, d {}, {mask}{}", p.batch, p.seqlen_q, p.seqlen_k, p.head_dim, self.mods)
    }
}

impl GridArgs {
    /// The cells, those of one dtype and pass together.
    ///
    /// # Errors
    /// Options that do not fit the sizes.
    pub fn cells(&self, on_gpu: bool) -> Result<Vec<Cell>> {
        let or =
            |given: &[DType], other: &[DType]| if given.is_empty() { other.to_vec() } else { given.to_vec() };
        let dtypes = or(&self.dtype, if on_gpu { &[DType::Bf16] } else { &[DType::F32, DType::Bf16] });
        let passes = match (self.pass.is_empty(), on_gpu) {
            (false, _) => self.pass.clone(),
            (true, true) => vec![Pass::Fwd],
            (true, false) => vec![Pass::Fwd, Pass::FwdBwd],
        };
        let mut cells = Vec::new();
        for (&dtype, &pass) in dtypes.iter().flat_map(|dtype| passes.iter().map(move |pass| (dtype, pass))) {
            for (mut problem, causal) in self.problems(dtype, pass) {
                self.mods.apply(&mut problem, causal, None)?;
                problem.validate()?;
                cells.push(Cell { problem, pass, causal, mods: self.mods.name() });
            }
        }
        ensure!(!cells.is_empty(), "there is nothing to time");
        Ok(cells)
    }

    /// Sizes, and whether they are causal.
    fn problems(&self, dtype: DType, pass: Pass) -> Vec<(AttentionProblem, bool)> {
        let both = [false, true];
        let new = |batch, n, heads, d| AttentionProblem::new(batch, n, heads, d, dtype);
        let sized = |(d, causal, n): (usize, bool, usize)| {
            let mut p = new((16384 / n).max(1), n, (2048 / d).max(1), d);
            p.heads_kv = self.kv_heads.unwrap_or(p.heads_q);
            p.seqlen_q = self.seqlen_q.unwrap_or(n);
            (p, causal)
        };
        match self.grid {
            Some(Named::H100) => {
                let sizes = [64, 128, 256].into_iter().flat_map(|d| both.map(|causal| (d, causal)));
                sizes.flat_map(|(d, causal)| (9..15).map(move |log| sized((d, causal, 1 << log)))).collect()
            }
            Some(Named::Cpu) => {
                let sizes = [(512, 64), (2048, 64), (4096, 64), (8192, 64), (2048, 128), (8192, 128)];
                let sizes = sizes.into_iter().flat_map(|size| both.map(|causal| (size, causal)));
                let mut all: Vec<_> = sizes.map(|((n, d), causal)| (new(1, n, 8, d), causal)).collect();
                if pass == Pass::Fwd {
                    let decode = new(1, 8192, 8, 128);
                    all.push((AttentionProblem { seqlen_q: 1, ..decode }, false));
                }
                all
            }
            None if !self.shapes.is_empty() => self.shapes.iter().copied().map(sized).collect(),
            None => {
                let causals: &[bool] = match self.causal {
                    Causal::Yes => &[true],
                    Causal::No => &[false],
                    Causal::Both => &both,
                };
                let sizes = self.head_dim.iter().flat_map(|&d| self.seqlen.iter().map(move |&n| (n, d)));
                let all = sizes.flat_map(|(n, d)| {
                    let mut p = new(self.batch, n, self.heads, d);
                    p.heads_kv = self.kv_heads.unwrap_or(self.heads);
                    p.seqlen_q = self.seqlen_q.unwrap_or(n);
                    causals.iter().map(move |&causal| (p.clone(), causal))
                });
                all.collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        grid: GridArgs,
    }

    fn cells(line: &str) -> Vec<Cell> {
        let words = ["bench"].into_iter().chain(line.split_whitespace());
        Command::try_parse_from(words).map_or(Vec::new(), |c| c.grid.cells(false).unwrap_or_default())
    }

    #[test]
    fn the_lists_are_crossed() {
        let all =
            cells("--seqlen 1k,77 --head-dim 64,128 --dtype f16 --pass bwd --heads 6 --kv-heads 2 --batch 3");
        assert_eq!(all.len(), 8);
        assert_eq!(all[0].name(), "3×6:2, 1024×1024, d 64, full");
        assert_eq!(all[7].name(), "3×6:2, 77×77, d 128, causal");
        assert_eq!(all[0].flops(), 2.5 * 4.0 * (3 * 6 * 1024 * 1024 * 64) as f64);
        assert_eq!(all[0].flops(), 2.0 * all[1].flops());
        assert_eq!(cells("--causal --seqlen 8 --dtype f32 --pass fwd").len(), 1);
    }

    #[test]
    fn the_named_grid() {
        let all = cells("--grid cpu");
        assert_eq!(all.len(), 2 * (13 + 12));
        let decode: Vec<&Cell> = all.iter().filter(|c| c.decode_bytes().is_some()).collect();
        assert_eq!(decode.len(), 2);
        assert_eq!(decode[0].decode_bytes(), Some(2 * 8 * 8192 * 128 * 4));
        assert!(cells("--grid cpu --heads 4").is_empty(), "they contradict each other");
        let all = cells("--grid h100 --dtype bf16 --pass fwd");
        assert_eq!(all.len(), 36);
        assert!(all.iter().all(|c| {
            let p = &c.problem;
            (p.batch * p.seqlen_k, p.heads_q * p.head_dim) == (16384, 2048)
        }));
        assert_eq!((all[35].problem.seqlen_q, all[35].causal), (16384, true));
    }

    #[test]
    fn single_shapes_and_what_changes_scores() {
        let all = cells(
            "--shapes 72,0,3000;256,1,4k --dtype f16 --pass fwd --kv-heads 4 --softcap 20 --document 100",
        );
        let names: Vec<String> = all.iter().map(Cell::name).collect();
        assert_eq!(names[0], "5×28:4, 3000×3000, d 72, full, documents of 100, softcap 20");
        assert_eq!(names[1], "4×8:4, 4096×4096, d 256, causal, documents of 100, softcap 20");
        assert!(all[1].depends_on_place() && !cells("--causal no --softcap 2")[0].depends_on_place());
        for bad in ["--shapes 72,2,9", "--shapes 64,1", "--shapes 64,1,0", "--shapes 64,0,512 --kv-heads 5"] {
            assert!(cells(bad).is_empty(), "{bad}");
        }
    }
}
