//! `flashattn io`: the IO model ([`flashattn_spec::io`]) as a table, as JSON and as a roofline picture.

use crate::options::{self, length, si};
use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum, ValueHint};
use comfy_table::{CellAlignment, Table};
use flashattn_spec::io::{Algorithm, Bound, Device, IoModel, IoReport, LoopOrder, Pass, Tiling};
use flashattn_spec::mask::Mask;
use flashattn_spec::{AttentionProblem, DType, Dropout};
use plotters::prelude::*;
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  flashattn io
      this CPU, from 512 to 16k tokens
  flashattn io --device h100 --seqlen 1k,8k,64k,1M --head-dim 128 --causal --plot roofline.svg
      an H100, and a picture
  flashattn io --device h100 --pass forward --seqlen-q 1 --seqlen 8k,128k --heads 32 --kv-heads 8
      decoding with grouped heads
  flashattn io --device a100 --seqlen 1k --batch 64 --dtype f16 --dropout 0.1 --loop-order kv-outer
      the paper's Fig. 2, left: the 4.4 GB of flash; with --causal also, the 40.3 GB of standard";

/// Options of `flashattn io`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES)]
pub struct IoArgs {
    /// Sequence lengths, separated by commas; 4k is 4096
    #[arg(long, value_delimiter = ',', value_parser = options::count, value_name = "N,…",
          default_values = ["512", "1k", "2k", "4k", "8k", "16k"])]
    pub seqlen: Vec<usize>,
    /// Queries a sequence, if not as many as keys (1: decoding)
    #[arg(long, value_parser = options::count, value_name = "N")]
    pub seqlen_q: Option<usize>,
    /// Elements of a query, key and value row
    #[arg(long, default_value_t = 64, value_name = "D")]
    pub head_dim: usize,
    /// Query heads
    #[arg(long, default_value_t = 16, value_name = "H")]
    pub heads: usize,
    /// Key/value heads, if fewer (GQA, MQA)
    #[arg(long, value_name = "H")]
    pub kv_heads: Option<usize>,
    /// Sequences
    #[arg(long, default_value_t = 1, value_name = "B")]
    pub batch: usize,
    /// Element type
    #[arg(long, default_value = "bf16", value_parser = options::dtype())]
    pub dtype: DType,
    /// A query sees the keys up to its own position
    #[arg(long)]
    pub causal: bool,
    /// Dropout probability
    #[arg(long, value_name = "P")]
    pub dropout: Option<f32>,
    /// What is counted
    #[arg(long, value_enum, default_value_t = PassArg::Both)]
    pub pass: PassArg,
    /// The machine
    #[arg(long, value_enum, default_value_t = DeviceArg::Cpu)]
    pub device: DeviceArg,
    /// Fast memory of a processor in bytes, instead of the device's; 192K is 196608
    #[arg(long, value_parser = options::count, value_name = "BYTES")]
    pub sram: Option<usize>,
    /// Arithmetic rate for --dtype in GFLOP/s, instead of the device's
    #[arg(long, value_name = "GFLOPS")]
    pub peak: Option<f64>,
    /// Rate of slow memory in GB/s, instead of the device's
    #[arg(long, value_name = "GBPS")]
    pub bandwidth: Option<f64>,
    /// Which operand stays in fast memory: keys and values (the paper's algorithm) or queries (FlashAttention-2)
    #[arg(long, value_enum, default_value_t = OrderArg::QOuter)]
    pub loop_order: OrderArg,
    /// Tile of M queries by N keys, instead of the largest that fits
    #[arg(long, value_delimiter = ',', num_args = 1, value_name = "M,N")]
    pub tile: Option<Vec<usize>>,
    /// Also count block-sparse attention that computes this fraction of the tiles
    #[arg(long, value_name = "S")]
    pub density: Option<f64>,
    /// Also list the bytes of each tensor
    #[arg(long)]
    pub tensors: bool,
    /// Print JSON, with everything that was counted
    #[arg(long)]
    pub json: bool,
    /// Save a roofline picture
    #[arg(long, value_name = "FILE.svg", value_hint = ValueHint::FilePath)]
    pub plot: Option<PathBuf>,
}

/// Values of `--pass`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PassArg {
    /// The output from Q, K and V
    Forward,
    /// The gradients of Q, K and V
    Backward,
    /// One after the other
    Both,
}

/// Values of `--device`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DeviceArg {
    /// NVIDIA A100 40 GB
    A100,
    /// NVIDIA A100 80 GB
    #[value(name = "a100-80")]
    A100_80,
    /// NVIDIA H100 SXM
    H100,
    /// This machine's processor; peak and bandwidth are estimates
    Cpu,
}

/// Values of `--loop-order`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum OrderArg {
    /// Keys and values stay, queries and outputs stream (Algorithm 1)
    KvOuter,
    /// Queries and outputs stay, keys and values stream
    QOuter,
}

/// One counted algorithm at one size.
#[derive(Debug, Serialize)]
struct Row {
    seqlen_q: usize,
    seqlen_k: usize,
    #[serde(flatten)]
    report: IoReport,
}

#[derive(Serialize)]
struct Json<'a> {
    device: &'a Device,
    batch: usize,
    heads_q: usize,
    heads_kv: usize,
    head_dim: usize,
    causal: bool,
    rows: &'a [Row],
}

/// Counts, prints and, if asked to, draws.
///
/// # Errors
/// Options that do not fit together, and whatever prevents writing.
pub fn run(args: &IoArgs) -> Result<()> {
    let device = device(args);
    let rows = count(args, &device)?;
    if let Some(path) = &args.plot {
        // Drawn in memory: a failure leaves no half-written file.
        let svg = roofline(&device, args.dtype, &rows)?;
        std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        let json = Json {
            device: &device,
            batch: args.batch,
            heads_q: args.heads,
            heads_kv: args.kv_heads.unwrap_or(args.heads),
            head_dim: args.head_dim,
            causal: args.causal,
            rows: &rows,
        };
        serde_json::to_writer_pretty(&mut out, &json)?;
        writeln!(out)?;
        return Ok(());
    }
    write!(out, "{}", describe(args, &device))?;
    writeln!(out, "{}", table(&rows))?;
    if args.tensors {
        writeln!(out, "\n{}", tensor_table(&rows))?;
    }
    if let Some(path) = &args.plot {
        writeln!(out, "\nroofline: {}", path.display())?;
    }
    Ok(())
}

fn device(args: &IoArgs) -> Device {
    let mut device = match args.device {
        DeviceArg::A100 => Device::a100(),
        DeviceArg::A100_80 => Device::a100_80(),
        DeviceArg::H100 => Device::h100(),
        DeviceArg::Cpu => Device::this_cpu(),
    };
    if let Some(bytes) = args.sram {
        device = device.with_sram(bytes as u64);
    }
    if let Some(peak) = args.peak {
        device = device.with_peak(args.dtype, peak * 1e9);
    }
    if let Some(bandwidth) = args.bandwidth {
        device = device.with_bandwidth(bandwidth * 1e9);
    }
    device
}

fn count(args: &IoArgs, device: &Device) -> Result<Vec<Row>> {
    let pass = match args.pass {
        PassArg::Forward => Pass::Forward,
        PassArg::Backward => Pass::Backward,
        PassArg::Both => Pass::ForwardBackward,
    };
    let order = match args.loop_order {
        OrderArg::KvOuter => LoopOrder::KvOuter,
        OrderArg::QOuter => LoopOrder::QOuter,
    };
    let mut rows = Vec::new();
    for &seqlen in &args.seqlen {
        let mut problem = AttentionProblem::new(args.batch, seqlen, args.heads, args.head_dim, args.dtype);
        problem.heads_kv = args.kv_heads.unwrap_or(args.heads);
        problem.seqlen_q = args.seqlen_q.unwrap_or(seqlen);
        problem.mask = if args.causal { Mask::Causal } else { Mask::Full };
        problem.dropout = args.dropout.map(|p| Dropout { p, seed: 0 });
        let tiling = match args.tile.as_deref() {
            None => Tiling::for_device(&problem, order, device),
            Some(&[m, n]) => Tiling::new(&problem, order, m, n),
            Some(other) => {
                ensure!(other.len() == 2, "--tile has {} numbers, expected two: M,N", other.len());
                continue;
            }
        };
        let mut reports = vec![
            IoModel::standard(&problem, device, pass)?,
            IoModel::flash(&problem, device, pass, &tiling)?,
        ];
        if let Some(density) = args.density {
            reports.push(IoModel::block_sparse(&problem, device, pass, &tiling, density)?);
        }
        rows.extend(reports.into_iter().map(|report| Row {
            seqlen_q: problem.seqlen_q,
            seqlen_k: seqlen,
            report,
        }));
    }
    Ok(rows)
}

fn name(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::Standard => "standard",
        Algorithm::Flash => "flash",
        Algorithm::BlockSparse => "block-sparse",
    }
}

fn describe(args: &IoArgs, device: &Device) -> String {
    let cache = match device.shared_cache_bytes {
        0 => String::new(),
        bytes => format!(", shared cache {} MiB", bytes >> 20),
    };
    let mut text = format!(
        "{}: {} × {} KiB fast memory{cache}; {}FLOP/s {}, {}B/s: compute-bound from {:.0} FLOP/B\n",
        device.name,
        device.units,
        device.sram_bytes >> 10,
        si(device.peak(args.dtype)),
        args.dtype,
        si(device.bandwidth),
        device.ridge(args.dtype),
    );
    for note in &device.notes {
        text += &format!("  {note}\n");
    }
    text += &format!(
        "batch {}, heads {} on {}, head_dim {}, {}{}\n\n",
        args.batch,
        args.heads,
        args.kv_heads.unwrap_or(args.heads),
        args.head_dim,
        args.dtype,
        if args.causal { ", causal" } else { "" },
    );
    text
}

fn table(rows: &[Row]) -> Table {
    let mut table = options::table(&[
        "N",
        "attention",
        "FLOP",
        "moved",
        "from memory",
        "FLOP/B",
        "extra memory",
        "time ≥",
        "bound by",
    ]);
    for row in rows {
        let r = &row.report;
        table.add_row([
            length(row.seqlen_k),
            name(r.algorithm).into(),
            si(r.flops.total() as f64),
            format!("{}B", si(r.bytes as f64)),
            format!("{}B", si(r.slow_bytes as f64)),
            format!("{:.1}", r.intensity),
            format!("{}B", si(r.extra_bytes as f64)),
            format!("{}s", si(r.time())),
            match r.bound {
                Bound::Compute => "compute".into(),
                Bound::Memory => "memory".into(),
            },
        ]);
    }
    for column in table.column_iter_mut().skip(2).take(6) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn tensor_table(rows: &[Row]) -> Table {
    let mut table = options::table(&["N", "attention", "tensor", "read", "written", "from cache"]);
    for row in rows {
        for t in &row.report.tensors {
            let bytes = |x: u128| format!("{}B", si(x as f64));
            table.add_row([
                length(row.seqlen_k),
                name(row.report.algorithm).into(),
                t.name.into(),
                bytes(t.read),
                bytes(t.written),
                bytes(t.cached),
            ]);
        }
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Draws the roofline: what rate the device allows at each arithmetic intensity, and where the rows lie.
fn roofline(device: &Device, dtype: DType, rows: &[Row]) -> Result<String> {
    const SIZE: (u32, u32) = (900, 560);
    // Colour, and where labels go from the point, in pixels: points of two series may coincide.
    const SERIES: [(Algorithm, RGBColor, (i32, i32)); 3] = [
        (Algorithm::Standard, RGBColor(200, 60, 50), (6, 9)),
        (Algorithm::Flash, RGBColor(30, 110, 190), (-7, -22)),
        (Algorithm::BlockSparse, RGBColor(40, 150, 80), (-7, -38)),
    ];
    let (peak, ridge) = (device.peak(dtype), device.ridge(dtype));
    let roof = |intensity: f64| peak.min(intensity * device.bandwidth);
    let shown: Vec<&Row> = rows.iter().filter(|row| row.report.intensity > 0.0).collect();
    ensure!(!shown.is_empty(), "--plot: no FLOP and no byte was counted, so there is nothing to draw");
    let intensities = || shown.iter().map(|row| row.report.intensity).chain([ridge]);
    let low = intensities().fold(f64::INFINITY, f64::min) / 3.0;
    let high = intensities().fold(0.0, f64::max) * 3.0;

    let decade = |y: f64| y.log10().floor();
    let (bottom, top) = (10f64.powf(decade(roof(low))), 10f64.powf(decade(2.5 * peak) + 1.0));
    // On a short axis there are marks between the decades; they go without a number.
    let if_decade = |x: f64, text: String| {
        if (x.log10() - x.log10().round()).abs() < 1e-6 { text } else { String::new() }
    };

    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let title = format!("Attention on {} ({dtype})", device.name);
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 20))
            .margin(14)
            .x_label_area_size(46)
            .y_label_area_size(76)
            .build_cartesian_2d((low..high).log_scale(), (bottom..top).log_scale())?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc("arithmetic intensity, FLOP per byte of slow memory")
            .y_desc("attainable rate, FLOP/s")
            .x_label_formatter(&|x| if_decade(*x, format!("{x}")))
            .y_label_formatter(&|y| if_decade(*y, format!("{y:.0e}")))
            .label_style(("sans-serif", 14))
            .draw()?;
        chart
            .draw_series(LineSeries::new([low, ridge, high].map(|x| (x, roof(x))), BLACK.stroke_width(2)))?;
        chart
            .draw_series(LineSeries::new([(ridge, bottom), (ridge, peak)], BLACK.mix(0.3).stroke_width(1)))?;
        let note = format!("{}FLOP/s from {ridge:.0} FLOP/B", si(peak));
        let style = ("sans-serif", 13).into_font().color(&BLACK);
        chart.draw_series([EmptyElement::at((ridge, bottom)) + Text::new(note, (6, -18), style)])?;

        for (algorithm, colour, offset) in SERIES {
            let points: Vec<(f64, f64, String)> = shown
                .iter()
                .filter(|row| row.report.algorithm == algorithm)
                .map(|row| (row.report.intensity, roof(row.report.intensity), length(row.seqlen_k)))
                .collect();
            if points.is_empty() {
                continue;
            }
            chart
                .draw_series(points.iter().map(|(x, y, _)| Circle::new((*x, *y), 5, colour.filled())))?
                .label(name(algorithm))
                .legend(move |(x, y)| Circle::new((x + 10, y), 5, colour.filled()));
            for (x, y, text) in labels(&points, (high / low).ln()) {
                let style = ("sans-serif", 13).into_font().color(&colour);
                chart.draw_series([EmptyElement::at((x, y)) + Text::new(text, offset, style)])?;
            }
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .label_font(("sans-serif", 15))
            .border_style(BLACK.mix(0.3))
            .background_style(WHITE)
            .draw()?;
        root.present()?;
    }
    Ok(svg)
}

/// One label for points that lie too close together for their own: "2k…16k". `width` is that of the axis, in ln.
fn labels(points: &[(f64, f64, String)], width: f64) -> Vec<(f64, f64, String)> {
    let mut sorted: Vec<&(f64, f64, String)> = points.iter().collect();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut labels: Vec<(f64, f64, Vec<&str>)> = Vec::new();
    for (x, y, text) in sorted {
        match labels.last_mut() {
            Some((start, _, texts)) if (x / *start).ln() < 0.05 * width => texts.push(text),
            _ => labels.push((*x, *y, vec![text])),
        }
    }
    labels
        .into_iter()
        .map(|(x, y, texts)| match texts.as_slice() {
            [first, .., last] => (x, y, format!("{first}…{last}")),
            other => (x, y, other.concat()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: IoArgs,
    }

    fn parse(line: &str) -> IoArgs {
        Command::try_parse_from(["io"].into_iter().chain(line.split_whitespace())).unwrap().args
    }

    fn rows(line: &str) -> Result<(Device, Vec<Row>)> {
        let args = parse(line);
        let device = device(&args);
        let rows = count(&args, &device)?;
        Ok((device, rows))
    }

    #[test]
    fn the_papers_figure_from_the_command_line() {
        let line = "--device a100 --seqlen 1k --batch 64 --dtype f16 --dropout 0.1 --loop-order kv-outer";
        let text = table(&rows(line).unwrap().1).to_string();
        let flash = text.lines().find(|l| l.contains("flash")).unwrap();
        assert!(flash.contains("4.38 GB") && flash.contains("compute"), "{text}");
        let text = table(&rows(&format!("{line} --causal")).unwrap().1).to_string();
        let standard = text.lines().find(|l| l.contains("standard")).unwrap();
        assert!(standard.contains("40.3 GB") && standard.contains("memory"), "{text}");
    }

    #[test]
    fn options_reach_the_model() {
        let line = "--device h100 --seqlen 4k,1M --seqlen-q 1 --heads 8 --kv-heads 2 --density 0.5 --pass forward \
                    --sram 64K --peak 1000 --bandwidth 10 --tile 64,32";
        let (device, rows) = rows(line).unwrap();
        assert_eq!((device.sram_bytes, device.ridge(DType::Bf16)), (65536, 100.0));
        let sizes: Vec<_> = rows.iter().map(|r| (r.seqlen_q, r.seqlen_k, name(r.report.algorithm))).collect();
        let at = |n| ["standard", "flash", "block-sparse"].map(|name| (1, n, name));
        assert_eq!(sizes, [at(4096), at(1 << 20)].concat());
        assert_eq!(rows[1].report.tiling.unwrap().forward.tile_n, 32);
        let json = serde_json::to_value(&rows).unwrap();
        assert_eq!(json[2]["algorithm"], "block-sparse");
        assert_eq!(json[5]["seqlen_k"], 1 << 20);
        assert!(json[0]["tensors"][0]["read"].as_u64().unwrap() > 0);
    }

    #[test]
    fn errors_say_what_is_wrong() {
        for (line, text) in [
            ("--tile 3", "--tile has 1 numbers, expected two: M,N"),
            ("--heads 6 --kv-heads 4", "heads_q = 6 is not a multiple of heads_kv = 4"),
            ("--density 2", "density is 2, expected 0 <= density <= 1"),
            ("--peak 0", "peak of the device is 0, expected a finite number above 0"),
        ] {
            assert_eq!(rows(line).unwrap_err().to_string(), text);
        }
        let (device, empty) = rows("--seqlen 0").unwrap();
        assert!(roofline(&device, DType::Bf16, &empty).unwrap_err().to_string().starts_with("--plot"));
    }

    #[test]
    fn the_picture_shows_every_series_and_size() {
        let (device, rows) = rows("--device a100 --seqlen 512,64k --density 0.1").unwrap();
        let svg = roofline(&device, DType::Bf16, &rows).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for text in ["A100", "standard", "flash", "block-sparse", "512", "64k", "FLOP/s from 208 FLOP/B"] {
            assert!(svg.contains(text), "{text}");
        }
        // A point for each row, and one for each series in the legend.
        assert_eq!(svg.matches("<circle").count(), 6 + 3);
    }

    #[test]
    fn points_close_together_share_a_label() {
        let point = |x: f64, text: &str| (x, 1.0, text.to_string());
        let got = labels(&[point(100.0, "8k"), point(10.0, "1k"), point(10.1, "2k"), point(10.2, "4k")], 5.0);
        assert_eq!(got, [point(10.0, "1k…4k"), point(100.0, "8k")]);
    }
}
