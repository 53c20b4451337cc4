//! The figures of all rounds as a table, as JSON and as a chart.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;
use serde_json::json;

use super::chart;
use crate::bench::{Page, Run};
use crate::cluster::Result;

const COMMAND: &str = "e2e bench";

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
        let [median, least, most] = [self.median(), least, most].map(|value| match self.unit {
            // A number of calls or requests.
            "" if value.fract() == 0.0 => format!("{value:.0}"),
            _ => short(value),
        });
        let unit = match self.unit {
            "" => String::new(),
            "/s" => "/s".to_owned(),
            unit => format!(" {unit}"),
        };
        if least == most {
            return format!("{median}{unit}");
        }
        format!("{median}{unit} ({least} to {most})")
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

    /// Writes `benchmarks.md`, `benchmarks.json` and `benchmarks.svg`.
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
        })
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
