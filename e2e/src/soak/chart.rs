//! Draws the samples of a run as an SVG file.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

use super::Sample;

const SIZE: (u32, u32) = (900, 780);

/// A line of a chart.
struct Line {
    name: &'static str,
    color: RGBColor,
    value: fn(&Sample) -> f64,
}

/// Draws three charts below each other: memory, counts and times.
///
/// # Errors
/// When the file cannot be written.
pub(super) fn draw(to: &Path, samples: &[Sample]) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(to, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let charts: [(&str, &[Line]); 3] = [
        (
            "resident memory, MiB",
            &[Line {
                name: "VmRSS",
                color: BLUE,
                value: |sample| sample.memory,
            }],
        ),
        (
            "open descriptors and threads",
            &[
                Line {
                    name: "descriptors",
                    color: BLUE,
                    value: |sample| sample.descriptors,
                },
                Line {
                    name: "threads",
                    color: RED,
                    value: |sample| sample.threads,
                },
            ],
        ),
        (
            "time of a publish, ms",
            &[
                Line {
                    name: "first, p50",
                    color: BLUE,
                    value: |sample| sample.p50,
                },
                Line {
                    name: "first, p99",
                    color: RED,
                    value: |sample| sample.p99,
                },
                Line {
                    name: "mounted volume, p99",
                    color: BLACK,
                    value: |sample| sample.look,
                },
            ],
        ),
    ];
    for (area, (title, lines)) in root.split_evenly((charts.len(), 1)).iter().zip(charts) {
        draw_one(area, title, lines, samples)?;
    }
    root.present()?;
    Ok(())
}

fn draw_one(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    lines: &[Line],
    samples: &[Sample],
) -> Result<(), Box<dyn Error>> {
    let minutes = samples.last().map_or(1.0, |sample| sample.minute);
    let values = lines.iter().flat_map(|line| samples.iter().map(line.value));
    let most = values.fold(1.0, f64::max) * 1.1;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(28)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..minutes, 0.0..most)?;
    chart
        .configure_mesh()
        .x_desc("minutes")
        .light_line_style(WHITE)
        .draw()?;
    for line in lines {
        let points = samples
            .iter()
            .map(|sample| (sample.minute, (line.value)(sample)));
        let color = line.color;
        chart
            .draw_series(LineSeries::new(points, color))?
            .label(line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
    }
    chart
        .configure_series_labels()
        .border_style(BLACK)
        .background_style(WHITE)
        .draw()?;
    Ok(())
}
