//! Draws the figures as bars.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::report::{Report, Values, short};

/// The figures of each panel.
const PANELS: [(&str, &[&str]); 6] = [
    (
        "Publish, ms (median of the rounds' p50)",
        &[
            "publish at 1, p50",
            "publish at 10, p50",
            "publish at 50, p50",
            "publish at 110, p50",
        ],
    ),
    (
        "A look at a published volume that is not due, ms",
        &[
            "look at 1, p50",
            "look at 1, p99",
            "look at 50, p50",
            "look at 50, p99",
        ],
    ),
    (
        "Refresh and unpublish at 50, ms",
        &[
            "refresh without change at 50, p50",
            "refresh with change at 50, p50",
            "unpublish at 50, p50",
        ],
    ),
    (
        "CPU, ms",
        &[
            "CPU for a publish",
            "CPU for a look",
            "CPU for a refresh without change",
            "CPU for a refresh with change",
        ],
    ),
    (
        "Requests to the API server",
        &[
            "API reads for a publish",
            "API writes, events aside, for a publish",
            "API reads for a look",
            "API reads for a refresh without change",
            "API writes, events aside, for a refresh without change",
        ],
    ),
    (
        "Resident memory, MiB",
        &[
            "resident memory, idle",
            "resident memory, all volumes published",
            "resident memory, peak of the boot",
        ],
    ),
];
const COLORS: [RGBColor; 2] = [RGBColor(31, 119, 180), RGBColor(160, 160, 160)];
const WIDTH: u32 = 900;
/// Where bars begin, and the longest one.
const LEFT: i32 = 300;
const LONGEST: f64 = 480.0;
/// The heights of a title, of a bar and of the space between groups.
const TITLE: i32 = 34;
const BAR: i32 = 13;
const GAP: i32 = 7;

/// Draws a panel for each kind of figure.
///
/// # Errors
/// When the file cannot be written.
pub(super) fn draw(to: &Path, report: &Report) -> Result<(), Box<dyn Error>> {
    let group = BAR * i32::try_from(report.subjects.len())? + GAP;
    let rows: usize = PANELS.iter().map(|(_, names)| names.len()).sum();
    let height = TITLE * (i32::try_from(PANELS.len())? + 1) + group * i32::try_from(rows)?;
    let root = SVGBackend::new(to, (WIDTH, u32::try_from(height)?)).into_drawing_area();
    root.fill(&WHITE)?;
    legend(&root, report)?;
    let mut y = TITLE;
    for (title, names) in PANELS {
        root.draw(&Text::new(title, (10, y + 14), ("sans-serif", 15)))?;
        y += TITLE;
        let medians = report.subjects.iter().flat_map(|(_, figures)| {
            let values = names.iter().filter_map(|name| figures.get(name));
            values.map(Values::median)
        });
        let most = medians.fold(f64::MIN_POSITIVE, f64::max);
        for name in names {
            root.draw(&Text::new(*name, (10, y + 2), ("sans-serif", 12)))?;
            bars(&root, report, name, most, y)?;
            y += group;
        }
    }
    root.present()?;
    Ok(())
}

fn legend(
    root: &DrawingArea<SVGBackend<'_>, Shift>,
    report: &Report,
) -> Result<(), Box<dyn Error>> {
    for (number, ((name, version), _)) in report.subjects.iter().enumerate() {
        let x = LEFT + 220 * i32::try_from(number)?;
        let color = COLORS[number % COLORS.len()];
        root.draw(&Rectangle::new([(x, 10), (x + 14, 22)], color.filled()))?;
        let text = format!("{name} {version}");
        root.draw(&Text::new(text, (x + 20, 10), ("sans-serif", 13)))?;
    }
    Ok(())
}

/// Draws a bar of the median for each driver, with a line from the smallest to the largest value.
fn bars(
    root: &DrawingArea<SVGBackend<'_>, Shift>,
    report: &Report,
    name: &str,
    most: f64,
    top: i32,
) -> Result<(), Box<dyn Error>> {
    for (number, (_, figures)) in report.subjects.iter().enumerate() {
        let y = top + BAR * i32::try_from(number)?;
        let color = COLORS[number % COLORS.len()];
        let (median, (least, largest)) = match figures.get(name) {
            Some(values) => (values.median(), values.spread()),
            None => (0.0, (0.0, 0.0)),
        };
        #[expect(clippy::cast_possible_truncation, reason = "a picture's width")]
        let at = |value: f64| LEFT + (value / most * LONGEST).clamp(0.0, LONGEST * 1.1) as i32;
        root.draw(&Rectangle::new(
            [(LEFT, y), (at(median), y + BAR - 2)],
            color.filled(),
        ))?;
        let middle = y + BAR / 2 - 1;
        root.draw(&PathElement::new(
            [(at(least), middle), (at(largest), middle)],
            BLACK,
        ))?;
        let end = at(median).max(at(largest)) + 6;
        root.draw(&Text::new(short(median), (end, y), ("sans-serif", 11)))?;
    }
    Ok(())
}
