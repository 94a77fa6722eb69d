//! What `bench` times: the sizes, dtypes and passes of a grid.

use crate::options::{self, Pass};
use clap::{Args, ValueEnum};
use flashattn_spec::mask::Mask;
use flashattn_spec::{AttentionProblem, DType};

/// Options that span the grid.
#[derive(Args, Clone, Debug)]
pub struct GridArgs {
    /// A named grid of sizes, instead of the lists below
    #[arg(long, value_enum, conflicts_with_all = ["seqlen", "seqlen_q", "head_dim", "heads", "kv_heads", "batch", "causal"])]
    grid: Option<Named>,
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
    /// Element types
    #[arg(long, value_delimiter = ',', value_parser = options::dtype(), value_name = "TYPE,…", default_value = "f32,bf16")]
    dtype: Vec<DType>,
    /// What is timed
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PASS,…", default_value = "fwd,fwd_bwd")]
    pass: Vec<Pass>,
}

/// Values of `--grid`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Named {
    /// 8 heads, head_dim 64 and 128, 512 to 8192 tokens, causal and not, and decoding: benches/peers/cpu.py
    Cpu,
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

/// One thing to time.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Sizes, mask and dtype.
    pub problem: AttentionProblem,
    /// The pass.
    pub pass: Pass,
}

impl Cell {
    /// Whether the mask is causal.
    pub fn causal(&self) -> bool {
        matches!(self.problem.mask, Mask::Causal)
    }

    /// 4·B·H·Nq·Nk·D forward (with half of each D where they differ), halved if causal, ×2.5 backward: how the field
    /// counts, so that rates of causal and full can be compared.
    pub fn flops(&self) -> f64 {
        let p = &self.problem;
        let products = (p.batch * p.heads_q) as f64 * p.seqlen_q as f64 * p.seqlen_k as f64;
        let forward = 2.0 * products * (p.head_dim + p.head_dim_v) as f64;
        let passes = match self.pass {
            Pass::Fwd => 1.0,
            Pass::Bwd => 2.5,
            Pass::FwdBwd => 3.5,
        };
        forward * passes * if self.causal() { 0.5 } else { 1.0 }
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
        let mask = if self.causal() { "causal" } else { "full" };
        format!("{}×{heads}, {}×{}, d {}, {mask}", p.batch, p.seqlen_q, p.seqlen_k, p.head_dim)
    }
}

impl GridArgs {
    /// The cells, those of one dtype and pass together.
    pub fn cells(&self) -> Vec<Cell> {
        let mut cells = Vec::new();
        for &dtype in &self.dtype {
            for &pass in &self.pass {
                let add = |cells: &mut Vec<Cell>, n, d, causals: &[bool]| {
                    cells.extend(causals.iter().map(|&causal| {
                        let mut p = AttentionProblem::new(self.batch, n, self.heads, d, dtype);
                        p.heads_kv = self.kv_heads.unwrap_or(self.heads);
                        p.seqlen_q = self.seqlen_q.unwrap_or(n);
                        p.mask = if causal { Mask::Causal } else { Mask::Full };
                        Cell { problem: p, pass }
                    }));
                };
                if let Some(Named::Cpu) = self.grid {
                    for (n, d) in [(512, 64), (2048, 64), (4096, 64), (8192, 64), (2048, 128), (8192, 128)] {
                        add(&mut cells, n, d, &[false, true]);
                    }
                    if pass == Pass::Fwd {
                        add(&mut cells, 8192, 128, &[false]);
                        cells.last_mut().into_iter().for_each(|cell| cell.problem.seqlen_q = 1);
                    }
                    continue;
                }
                let causals: &[bool] = match self.causal {
                    Causal::Yes => &[true],
                    Causal::No => &[false],
                    Causal::Both => &[false, true],
                };
                for &d in &self.head_dim {
                    for &n in &self.seqlen {
                        add(&mut cells, n, d, causals);
                    }
                }
            }
        }
        cells
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
        Command::try_parse_from(words).map_or(Vec::new(), |c| c.grid.cells())
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
    }
}
