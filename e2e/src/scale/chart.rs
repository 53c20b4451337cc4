//! Draws the load on the API server and the provider over the time of the run.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::record::Sample;
use super::report::Report;

const SIZE: (u32, u32) = (1000, 620);
const GRAY: RGBColor = RGBColor(190, 190, 190);

/// A line of a chart: its name, color and value in a second.
type Line = (&'static str, RGBColor, fn(&Sample) -> f64);

/// Draws two charts below each other: requests to the API server, and calls to the provider.
///
/// # Errors
/// When the file cannot be written.
pub(super) fn draw(to: &Path, report: &Report) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(to, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (upper, lower) = root.split_vertically(SIZE.1 * 3 / 5);
    let api: [Line; 2] = [
        ("reads", BLUE, |sample| {
            sample.requests.total() - sample.requests.writes()
        }),
        ("writes", RED, |sample| sample.requests.writes()),
    ];
    draw_one(
        &upper,
        "requests to the API server in a second",
        &api,
        report,
        true,
    )?;
    let provider: [Line; 1] = [("calls", BLACK, |sample| sample.provider)];
    draw_one(
        &lower,
        "calls to the provider in a second",
        &provider,
        report,
        false,
    )?;
    root.present()?;
    Ok(())
}

fn draw_one(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    lines: &[Line],
    report: &Report,
    has_names: bool,
) -> Result<(), Box<dyn Error>> {
    let Some(start) = report.phases.first().map(|phase| phase.begin) else {
        return Err("no phase was recorded".into());
    };
    let at = |sample: &Sample| sample.at.duration_since(start).as_secs_f64();
    let end = report.samples.last().map_or(1.0, at);
    let rates = lines.iter().flat_map(|(_, _, value)| {
        let samples = report.samples.iter();
        samples.map(|sample| value(sample) / sample.seconds)
    });
    let most = rates.fold(1.0, f64::max) * 1.1;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(28)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..end, 0.0..most)?;
    chart
        .configure_mesh()
        .x_desc("seconds")
        .light_line_style(WHITE)
        .draw()?;
    for (number, phase) in report.phases.iter().enumerate() {
        let x = phase.begin.duration_since(start).as_secs_f64();
        chart.draw_series([PathElement::new([(x, 0.0), (x, most)], GRAY)])?;
        if has_names {
            // Names of short phases would lie upon each other.
            let y = most * [0.99, 0.93, 0.87, 0.81][number % 4];
            chart.draw_series([Text::new(phase.name, (x, y), ("sans-serif", 10))])?;
        }
    }
    for (name, color, value) in lines {
        let points = report
            .samples
            .iter()
            .map(|sample| (at(sample), value(sample) / sample.seconds));
        let color = *color;
        chart
            .draw_series(LineSeries::new(points, color))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::MiddleRight)
        .border_style(BLACK)
        .background_style(WHITE)
        .draw()?;
    Ok(())
}
