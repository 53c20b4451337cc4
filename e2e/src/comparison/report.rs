//! The figures of all rounds as a table, as JSON and as a chart.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;
use serde_json::json;

use super::chart;
use crate::bench::{Page, Run, check_docs, replace_section};
use crate::cluster::Result;

const COMMAND: &str = "e2e bench";
/// The README, from the directory of the documentation.
const README: &str = "../README.md";
/// The rows of the README's table, and the figures whose medians they have.
const SUMMARY: [(&str, &str); 13] = [
    ("a publish, one at a time (p50)", "publish at 1, p50"),
    ("110 publishes at once (p50)", "publish at 110, p50"),
    ("publishes in a second, 50 at a time", "publish at 50, rate"),
    ("a look at a volume that is not due (p50)", "look at 1, p50"),
    ("a look at a volume that is not due (p99)", "look at 1, p99"),
    ("looks, 50 at a time (p99)", "look at 50, p99"),
    (
        "refreshes with changed content, 50 at a time (p50)",
        "refresh with change at 50, p50",
    ),
    ("unpublishes, 50 at a time (p50)", "unpublish at 50, p50"),
    (
        "boot of a node with 110 pods",
        "boot, until 110 volumes are published",
    ),
    ("CPU time of a publish", "CPU for a publish"),
    ("memory, idle", "resident memory, idle"),
    (
        "memory, all volumes published",
        "resident memory, all volumes published",
    ),
    ("failed unpublishes", "failed calls, unpublish"),
];

/// One measured value.
pub(super) struct Figure {
    name: String,
    unit: &'static str,
    value: f64,
}

impl Figure {
    pub(super) fn of(name: &str, unit: &'static str, value: f64) -> Self {
        let name = name.to_owned();
        Self { name, unit, value }
    }

    /// Returns the value if the figure has this name.
    pub(super) fn value_of(&self, name: &str) -> Option<f64> {
        (self.name == name).then_some(self.value)
    }
}

/// The values of all rounds of one driver, in the order in which they were measured first.
#[derive(Debug, Default)]
pub(super) struct Figures(Vec<Values>);

/// The values of one figure, one of each round.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Values {
    name: String,
    unit: &'static str,
    values: Vec<f64>,
}

impl Values {
    pub(super) fn median(&self) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match (sorted.len(), sorted.get(middle)) {
            (0, _) | (_, None) => f64::NAN,
            (count, Some(upper)) if count % 2 == 1 => *upper,
            (_, Some(upper)) => f64::midpoint(sorted[middle - 1], *upper),
        }
    }

    /// Returns the smallest and the largest value.
    pub(super) fn spread(&self) -> (f64, f64) {
        let fold =
            |start, choose: fn(f64, f64) -> f64| self.values.iter().copied().fold(start, choose);
        (
            fold(f64::INFINITY, f64::min),
            fold(f64::NEG_INFINITY, f64::max),
        )
    }

    fn shown(&self) -> String {
        let (least, most) = self.spread();
        let [least, most] = [least, most].map(|value| self.digits(value));
        let median = self.shown_median();
        if least == most {
            return median;
        }
        format!("{median} ({least} to {most})")
    }

    fn shown_median(&self) -> String {
        let median = self.digits(self.median());
        match self.unit {
            "" | "/s" => format!("{median}{}", self.unit),
            unit => format!("{median} {unit}"),
        }
    }

    fn digits(&self, value: f64) -> String {
        match self.unit {
            // A number of calls or requests.
            "" if value.fract() == 0.0 => format!("{value:.0}"),
            _ => short(value),
        }
    }
}

impl Figures {
    /// Adds the values of a round.
    pub(super) fn add(&mut self, round: Vec<Figure>) {
        for Figure { name, unit, value } in round {
            match self.0.iter_mut().find(|values| values.name == name) {
                Some(values) => values.values.push(value),
                None => {
                    let values = vec![value];
                    self.0.push(Values { name, unit, values });
                }
            }
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&Values> {
        self.0.iter().find(|values| values.name == name)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What all rounds measured.
pub(super) struct Report {
    pub(super) run: Run,
    pub(super) rounds: usize,
    /// The drivers by name and version.
    pub(super) subjects: Vec<((&'static str, String), Figures)>,
    /// Sentences about what went wrong.
    pub(super) notes: Vec<String>,
}

impl Report {
    /// Returns the table: the median of all rounds and, in parentheses, the smallest and the largest
    /// value, and what went wrong. A request that only one driver sends is none of the other.
    pub(super) fn markdown(&self) -> String {
        let mut text = format!("{} {} rounds.\n\n", self.run.sentence(), self.rounds);
        let mut rule = "|---|".to_owned();
        text.push_str("| |");
        for ((name, version), _) in &self.subjects {
            let _infallible = write!(text, " {name} {version} |");
            rule.push_str("---|");
        }
        let _infallible = writeln!(text, "\n{rule}");
        for Values { name, unit, .. } in self.rows() {
            let _infallible = write!(text, "| {name} |");
            let none = if unit.is_empty() { "0" } else { "not measured" };
            for (_, figures) in &self.subjects {
                let shown = figures.get(name).map_or(none.to_owned(), Values::shown);
                let _infallible = write!(text, " {shown} |");
            }
            text.push('\n');
        }
        for note in &self.notes {
            let _infallible = write!(text, "\n- {note}");
        }
        text
    }

    /// Returns the README's table: medians only, of what was measured of all drivers.
    fn summary(&self) -> String {
        let names = self.subjects.iter();
        let names: Vec<String> = names
            .map(|((name, version), _)| format!("{name} {version}"))
            .collect();
        let mut text = format!(
            "| | {} |\n|---|{}",
            names.join(" | "),
            "---|".repeat(names.len())
        );
        for (row, figure) in SUMMARY {
            let values = self.subjects.iter();
            let values: Option<Vec<String>> = values
                .map(|(_, figures)| figures.get(figure).map(Values::shown_median))
                .collect();
            if let Some(values) = values {
                let _infallible = write!(text, "\n| {row} | {} |", values.join(" | "));
            }
        }
        text
    }

    /// Returns one of each figure in order: those of the first driver, and those that only others have
    /// where these have them.
    fn rows(&self) -> Vec<&Values> {
        let mut rows: Vec<&Values> = Vec::new();
        for (_, figures) in &self.subjects {
            let mut at = 0;
            for values in &figures.0 {
                match rows.iter().position(|row| row.name == values.name) {
                    Some(position) => at = position + 1,
                    None => {
                        rows.insert(at, values);
                        at += 1;
                    }
                }
            }
        }
        rows
    }

    /// Checks before a run that its report can be written.
    ///
    /// # Errors
    /// When it cannot.
    pub(super) fn check(docs: &Path) -> Result<()> {
        check_docs(docs, COMMAND, &["benchmarks.md", README])
    }

    /// Writes `benchmarks.md`, `benchmarks.json` and `benchmarks.svg`, and the table of the README beside
    /// the directory.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(super) fn write(&self, docs: &Path) -> Result<()> {
        let subjects: Vec<_> = self
            .subjects
            .iter()
            .map(|((name, version), figures)| {
                json!({"name": name, "version": version, "figures": figures.0})
            })
            .collect();
        let page = Page {
            name: "benchmarks",
            command: COMMAND,
            picture: "Publish, look, refresh, CPU, requests and memory of both drivers",
            values: "The values of each round",
        };
        let values = json!({
            "run": self.run, "rounds": self.rounds, "subjects": subjects, "notes": self.notes,
        });
        page.write(docs, &self.markdown(), &values, |path| {
            chart::draw(path, self)
        })?;
        replace_section(&docs.join(README), COMMAND, &self.summary())
    }
}

/// Writes a number with three digits, or all before the point.
pub(super) fn short(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 || size == 0.0 => 0,
        size if size >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}
