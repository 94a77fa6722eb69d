//! Line charts: panels side by side, a logarithmic axis of sequence lengths.

use crate::options::length;
use anyhow::Result;
use plotters::coord::combinators::IntoLogRange;
use plotters::prelude::*;

/// A line.
#[derive(Clone, Debug)]
pub struct Series {
    /// For the legend.
    pub label: String,
    /// Index of its colour: lines that belong together share one.
    pub colour: usize,
    /// Whether it is drawn faintly, with hollow points.
    pub faint: bool,
    /// (sequence length, value above 0), in order.
    pub points: Vec<(usize, f64)>,
}

/// A chart.
#[derive(Debug)]
pub struct Panel {
    /// Above it.
    pub title: String,
    /// What the values are.
    pub y_name: String,
    /// How a value is written at the axis.
    pub y_label: fn(f64) -> String,
    /// Whether lines fill it, so that the legend needs room above them; else it goes below where they have risen.
    pub full: bool,
    /// The lines.
    pub series: Vec<Series>,
}

const COLOURS: [RGBColor; 6] = [
    RGBColor(30, 110, 190),
    RGBColor(200, 60, 50),
    RGBColor(40, 150, 80),
    RGBColor(150, 80, 170),
    RGBColor(220, 140, 30),
    RGBColor(90, 90, 90),
];

/// An SVG picture of panels; lines without points are left out.
///
/// # Errors
/// If plotters refuses.
pub fn svg(panels: &[Panel]) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (560 * panels.len() as u32, 440)).into_drawing_area();
        root.fill(&WHITE)?;
        for (area, panel) in root.split_evenly((1, panels.len())).iter().zip(panels) {
            draw(area, panel)?;
        }
        root.present()?;
    }
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw(area: &Area, panel: &Panel) -> Result<()> {
    let series: Vec<&Series> = panel.series.iter().filter(|s| !s.points.is_empty()).collect();
    let range = |values: &dyn Fn(&(usize, f64)) -> f64, margin: f64| {
        let all = series.iter().flat_map(|s| &s.points).map(values);
        let (low, high) = all.fold((f64::INFINITY, 0.0f64), |(low, high), x| (low.min(x), high.max(x)));
        if high > 0.0 { low / margin..high * margin } else { 1.0..10.0 }
    };
    let (xs, mut ys) = (range(&|p| p.0 as f64, 1.15), range(&|p| p.1, 1.6));
    if panel.full {
        let legend = (22.0 * series.len() as f64 / 400.0).min(0.6);
        ys.end *= (ys.end / ys.start).powf(legend / (1.0 - legend));
    }
    // Marks at 1, 2 and 5 where there are few decades.
    let steps: &[f64] = if ys.end / ys.start < 200.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let decades = ys.start.log10().floor() as i32..=ys.end.log10().ceil() as i32;
    let marks = decades
        .flat_map(|d| steps.iter().map(move |s| s * 10f64.powi(d)))
        .filter(|mark| ys.contains(mark))
        .collect();
    let mut ticks: Vec<f64> = series.iter().flat_map(|s| &s.points).map(|p| p.0 as f64).collect();
    ticks.sort_by(f64::total_cmp);
    ticks.dedup();
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(78)
        .build_cartesian_2d(
            xs.log_scale().base(2.0).with_key_points(ticks),
            ys.log_scale().with_key_points(marks),
        )?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc("sequence length")
        .y_desc(&panel.y_name)
        .x_label_formatter(&|x| length(x.round() as usize))
        .y_label_formatter(&|y| (panel.y_label)(*y))
        .label_style(("sans-serif", 13))
        .draw()?;
    for s in series {
        let colour = COLOURS[s.colour % COLOURS.len()].mix(if s.faint { 0.55 } else { 1.0 });
        let point = ShapeStyle { filled: !s.faint, ..colour.stroke_width(2) };
        let points = || s.points.iter().map(|&(x, y)| (x as f64, y));
        chart.draw_series(LineSeries::new(points(), colour.stroke_width(2)))?;
        chart
            .draw_series(points().map(|at| Circle::new(at, 4, point)))?
            .label(&s.label)
            .legend(move |(x, y)| Circle::new((x + 10, y), 4, point));
    }
    chart
        .configure_series_labels()
        .position(if panel.full { SeriesLabelPosition::UpperLeft } else { SeriesLabelPosition::LowerRight })
        .label_font(("sans-serif", 13))
        .border_style(BLACK.mix(0.3))
        .background_style(WHITE.mix(0.85))
        .draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_is_drawn() {
        let series = |label: &str, points: &[(usize, f64)]| Series {
            label: label.into(),
            colour: 0,
            faint: false,
            points: points.to_vec(),
        };
        let panel = |title: &str, series| Panel {
            title: title.into(),
            y_name: "ms".into(),
            y_label: |y| format!("{y}"),
            full: true,
            series,
        };
        let full = vec![series("ours", &[(512, 1.0), (4096, 50.0)]), series("empty", &[])];
        let picture = svg(&[panel("time", full), panel("nothing", vec![])]).unwrap();
        for text in ["time", "nothing", "ours", "512", "4k"] {
            assert!(picture.contains(text), "{text}");
        }
        assert!(!picture.contains("empty"));
        // Two points and one in the legend.
        assert_eq!(picture.matches("<circle").count(), 3);
    }
}
