//! How time and memory grow with the sequence length.

use super::compare::{Timed, passes, time_flash, time_standard};
use super::inputs;
use crate::attention::Results;
use crate::options::{self, length, si};
use crate::plot::{self, Panel, Series};
use crate::tensor_file::TensorFile;
use anyhow::Result;
use comfy_table::{CellAlignment, Table};
use flashattn_spec::io::Pass;
use flashattn_spec::reference::standard::standard_extra_bytes;
use half::bf16;
use indicatif::ProgressBar;
use serde::Serialize;

/// One implementation at one length.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Side {
    pub fwd_ms: f64,
    /// None where only the forward pass ran.
    pub bwd_ms: Option<f64>,
    pub fwd_extra_bytes: usize,
    pub bwd_extra_bytes: Option<usize>,
}

impl Side {
    /// Of all passes that ran.
    fn ms(self) -> f64 {
        self.fwd_ms + self.bwd_ms.unwrap_or_default()
    }

    fn extra_bytes(self) -> f64 {
        self.fwd_extra_bytes.max(self.bwd_extra_bytes.unwrap_or_default()) as f64
    }
}

impl From<Timed> for Side {
    fn from(t: Timed) -> Self {
        Side {
            fwd_ms: t.forward.wall_ms,
            bwd_ms: t.backward.map(|cost| cost.wall_ms),
            fwd_extra_bytes: t.forward.extra_bytes,
            bwd_extra_bytes: t.backward.map(|cost| cost.extra_bytes),
        }
    }
}

/// Both at one length.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Point {
    pub seqlen: usize,
    pub flash: Side,
    /// Absent where it would need too much memory.
    pub standard: Option<Side>,
}

/// Times both on a file's tensors, cut or repeated.
pub fn study(
    device: flashattn::Device,
    file: &TensorFile,
    sizes: &[usize],
    max_memory: usize,
    bar: &ProgressBar,
) -> Result<Vec<Point>> {
    let pass = passes(device);
    let counted = if pass.has_backward() { Pass::Backward } else { Pass::Forward };
    let mut points = Vec::new();
    for &seqlen in sizes {
        bar.set_message(format!("growth: {} tokens", length(seqlen)));
        let (p, given) = inputs::load::<bf16, bf16>(file, Some(seqlen))?;
        let mut results = Results::new(&p, pass.has_backward());
        let flash = time_flash(device, &p, &given, &mut results)?.into();
        let fits = standard_extra_bytes(&p, counted)? <= max_memory;
        let standard = if fits { Some(time_standard(&p, &given, &mut results, pass)?.into()) } else { None };
        points.push(Point { seqlen, flash, standard });
        bar.inc(1);
    }
    Ok(points)
}

/// The points as a table.
pub fn table(points: &[Point]) -> Table {
    let mut table =
        options::table(&["N", "flash", "standard", "faster", "flash memory", "standard memory", "smaller"]);
    for p in points {
        let (ms, bytes) = (Side::ms, Side::extra_bytes);
        let standard = |f: &dyn Fn(Side) -> String| p.standard.map_or("–".to_owned(), f);
        table.add_row([
            length(p.seqlen),
            format!("{:.1} ms", ms(p.flash)),
            standard(&|s| format!("{:.1} ms", ms(s))),
            standard(&|s| format!("{:.1}×", ms(s) / ms(p.flash))),
            format!("{}B", si(bytes(p.flash))),
            standard(&|s| format!("{}B", si(bytes(s)))),
            standard(&|s| format!("{:.0}×", bytes(s) / bytes(p.flash).max(1.0))),
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Time and memory against length.
pub fn picture(points: &[Point], device: &str) -> Result<String> {
    let line = |label: &str, colour, faint, value: &dyn Fn(&Point) -> Option<f64>| Series {
        label: label.to_owned(),
        colour,
        faint,
        points: points.iter().filter_map(|p| Some((p.seqlen, value(p).filter(|y| *y > 0.0)?))).collect(),
    };
    let (both, memory) = (Side::ms, Side::extra_bytes);
    let backward = |p: &Point| p.flash.bwd_ms.is_some();
    svg(
        device,
        vec![
            line("standard, forward + backward", 1, false, &|p| p.standard.filter(|_| backward(p)).map(both)),
            line("standard, forward", 1, true, &|p| p.standard.map(|s| s.fwd_ms)),
            line("flash, forward + backward", 0, false, &|p| backward(p).then(|| both(p.flash))),
            line("flash, forward", 0, true, &|p| Some(p.flash.fwd_ms)),
        ],
        vec![
            line("standard, forward + backward", 1, false, &|p| {
                p.standard.filter(|_| backward(p)).map(memory)
            }),
            line("standard, forward", 1, true, &|p| p.standard.map(|s| s.fwd_extra_bytes as f64)),
            line("flash, forward + backward", 0, false, &|p| backward(p).then(|| memory(p.flash))),
            line("flash, forward", 0, true, &|p| Some(p.flash.fwd_extra_bytes as f64)),
        ],
    )
}

fn svg(device: &str, time: Vec<Series>, memory: Vec<Series>) -> Result<String> {
    plot::svg(&[
        Panel {
            title: format!("Time, {device}"),
            y_name: "milliseconds".to_owned(),
            y_label: |y| format!("{y}"),
            full: false,
            series: time,
        },
        Panel {
            title: "Extra memory (9 heads on 3, head_dim 64, bf16, causal)".to_owned(),
            y_name: "bytes".to_owned(),
            y_label: |y| format!("{}B", si(y)),
            full: false,
            series: memory,
        },
    ])
}
