//! The phases as a table, as JSON and as a chart.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use super::record::{Phase, Record, Sample};
use super::{Options, chart};
use crate::bench::{Page, Requests, Run, check_docs, percentile};
use crate::cluster::Result;

const COMMAND: &str = "e2e scale";
/// The number of nodes for which the table extrapolates.
const MANY_NODES: f64 = 10_000.0;
/// The phase without disturbance, and what the names of all such phases begin with.
const AT_REST: &str = "at rest";
/// The number of classes of each node for which the text below the table extrapolates, and the driver's
/// default of --sync-interval.
const CLASSES: f64 = 30.0;
const SYNC_INTERVAL: Duration = Duration::from_secs(45);
/// The phases in which all nodes act, whose requests are told by volume.
const BURSTS: [&str; 5] = [
    "first start of all nodes",
    "class of all pods edited",
    "rolling update",
    "all nodes boot",
    "API server back",
];
/// The number of kinds of failures that are reported of a phase.
const KINDS: usize = 5;

/// The measured values of a phase.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) seconds: f64,
    /// Requests to the API server in a second: the mean, and the most in a sample.
    pub(super) api: f64,
    pub(super) api_most: f64,
    /// The means by verb and resource.
    pub(super) by_kind: BTreeMap<String, f64>,
    /// Calls to the provider in a second.
    pub(super) provider: f64,
    pub(super) provider_most: f64,
    /// Answers to kubelet in a second, and their times in milliseconds.
    pub(super) answers: f64,
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) failures: usize,
    /// The kinds of failures that were most frequent.
    pub(super) failure_kinds: Vec<(String, usize)>,
    /// The CPU time of a driver in a second, in milliseconds.
    pub(super) cpu: f64,
    /// The resident memory of a driver in MiB: the mean at the end, and the largest of all.
    pub(super) memory: f64,
    pub(super) peak: f64,
}

impl Row {
    /// Returns whether nodes acted at the same time: the busiest second has several times the mean, and more
    /// than chance makes of independent requests.
    fn is_herd(&self) -> bool {
        self.api_most > 3.0 * self.api && self.api_most > self.api + 6.0 * self.api.sqrt()
    }
}

impl Row {
    /// Returns what a node's further classes and Secrets would add to a phase at rest; `many` multiplies
    /// a rate for 10,000 nodes.
    fn more_classes(&self, classes: usize, many: impl Fn(f64) -> f64) -> Option<String> {
        let reads = many(*self.by_kind.get("get secretproviderclasses")?) / count(classes);
        let mounted = match classes {
            1 => "the pods of all nodes mount one class".to_owned(),
            _ => format!("the pods of each node mount {classes} classes"),
        };
        let seconds = SYNC_INTERVAL.as_secs_f64();
        Some(format!(
            "{}: {mounted}, without `secretObjects`. Each node reads a class by itself, whatever the number of its \
             pods, so that N classes on each node cost N times the {reads:.0} reads of one per second of 10,000 nodes: {CLASSES} classes about {:.0} per second, spread as these are. A Secret \
             that a class makes is read once in each `--sync-interval` ({seconds:.0} s by default) by each node that \
             has the class mounted: {CLASSES} Secrets on each of 10,000 nodes add about {:.0} reads per second. A \
             longer `--sync-interval` divides that.",
            self.name,
            reads * CLASSES,
            MANY_NODES * CLASSES / seconds,
        ))
    }
}

/// What a run measured.
pub(super) struct Report {
    run: Run,
    nodes: usize,
    volumes: usize,
    classes: usize,
    settings: String,
    notes: Vec<String>,
    pub(super) rows: Vec<Row>,
    pub(super) samples: Vec<Sample>,
    pub(super) phases: Vec<Phase>,
}

impl Report {
    pub(super) fn of(run: Run, options: &Options, record: &Record) -> Self {
        let phases = record.phases();
        let nodes = count(options.nodes);
        let rows = phases.iter().map(|phase| row(phase, record, nodes));
        let classes = match options.classes {
            1 => String::new(),
            classes => format!(" of {classes} classes"),
        };
        let settings = format!(
            "{} nodes with {} volumes each{classes}, a look at each volume after {} to {} s, interval of refreshes {} s; \
             a rolling update takes {} nodes at a time; API server and provider are away for {} s",
            options.nodes,
            options.volumes,
            options.look.as_secs_f64(),
            options.look.as_secs_f64() * 1.5,
            options.interval.as_secs_f64(),
            options.at_once,
            options.away.as_secs_f64(),
        );
        Self {
            run,
            nodes: options.nodes,
            volumes: options.volumes,
            classes: options.classes,
            settings,
            notes: record.notes(),
            rows: rows.collect(),
            samples: record.samples(),
            phases,
        }
    }

    /// Returns the table of the phases, and the kinds of failures below it.
    pub(super) fn markdown(&self) -> String {
        let mut text = format!("{} {}.\n\n", self.run.sentence(), self.settings);
        text.push_str(
            "| phase | s | API requests/s: mean, worst | per 10,000 nodes | by kind | provider calls/s: mean, worst \
             | answers/s | p50, p99 ms | failed | CPU of a driver, ms/s | MiB: mean, peak |\n\
             |---|---|---|---|---|---|---|---|---|---|---|\n",
        );
        for row in &self.rows {
            let kinds: Vec<String> = row
                .by_kind
                .iter()
                .filter(|(_, rate)| **rate >= 0.05)
                .map(|(kind, rate)| format!("{kind} {rate:.1}"))
                .collect();
            let _infallible = writeln!(
                text,
                "| {} | {:.0} | {:.1}, {:.0} | {:.0} | {} | {:.1}, {:.0} | {:.1} | {:.1}, {:.1} | {} | {:.2} | {:.1}, {:.1} |",
                row.name,
                row.seconds,
                row.api,
                row.api_most,
                row.api * MANY_NODES / count(self.nodes),
                kinds.join(", "),
                row.provider,
                row.provider_most,
                row.answers,
                row.p50,
                row.p99,
                row.failures,
                row.cpu,
                row.memory,
                row.peak,
            );
        }
        for note in self.notes.iter().chain(&self.arithmetic()) {
            let _infallible = write!(text, "\n- {note}");
        }
        for row in &self.rows {
            for (kind, number) in &row.failure_kinds {
                let _infallible = write!(text, "\n- {}: {number} times `{kind}`", row.name);
            }
        }
        text
    }

    /// Returns what the measured rates make for 10,000 nodes, with the calculation, and whether nodes acted
    /// at the same time.
    fn arithmetic(&self) -> Vec<String> {
        let (nodes, volumes) = (count(self.nodes), count(self.volumes));
        let all_volumes = MANY_NODES * volumes;
        let mut lines = Vec::new();
        for row in &self.rows {
            let many = |rate: f64| rate / nodes * MANY_NODES;
            if row.name.starts_with(AT_REST) {
                lines.push(format!(
                    "{}: {:.1} requests per second from {nodes} nodes are {:.3} from each. 10,000 such nodes send \
                     {:.0} per second, and make {:.0} calls of the provider. The busiest second had {:.1} times the mean{}.",
                    row.name,
                    row.api,
                    row.api / nodes,
                    many(row.api),
                    many(row.provider),
                    row.api_most / row.api,
                    if row.is_herd() { ": a herd" } else { ", so no herd" },
                ));
                if row.name == AT_REST {
                    lines.extend(row.more_classes(self.classes, many));
                }
            }
            if BURSTS.contains(&row.name) {
                let requests = row.api * row.seconds;
                lines.push(format!(
                    "{}: {requests:.0} requests in {:.0} s are {:.2} for each of the {:.0} volumes. 10,000 nodes have \
                     {all_volumes:.0} volumes, which make {:.0} requests: {:.0} per second if they take the same {:.0} s, \
                     and {:.0} s of work for an API server that answers 1,000 per second. The busiest second had {:.1} \
                     times the mean.",
                    row.name,
                    row.seconds,
                    requests / (nodes * volumes),
                    nodes * volumes,
                    many(requests),
                    many(row.api),
                    row.seconds,
                    many(requests) / 1000.0,
                    row.api_most / row.api,
                ));
            }
        }
        lines
    }

    /// Checks before a run that its report can be written.
    ///
    /// # Errors
    /// When it cannot.
    pub(super) fn check(docs: &Path) -> Result<()> {
        check_docs(docs, COMMAND, &["scale.md"])
    }

    /// Writes `scale.md`, `scale.json` and `scale.svg`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(super) fn write(&self, docs: &Path) -> Result<()> {
        let page = Page {
            name: "scale",
            command: COMMAND,
            picture: "Requests to the API server and calls to the provider over the run",
            values: "All numbers",
        };
        let values = json!({
            "run": self.run, "nodes": self.nodes, "volumes": self.volumes, "classes": self.classes, "phases": self.rows, "notes": self.notes,
        });
        page.write(docs, &self.markdown(), &values, |path| {
            chart::draw(path, self)
        })
    }
}

fn row(phase: &Phase, record: &Record, nodes: f64) -> Row {
    let samples = record.samples_of(phase);
    let seconds = phase.end.duration_since(phase.begin).as_secs_f64();
    let sampled = samples.iter().map(|sample| sample.seconds).sum::<f64>();
    let sampled = if sampled > 0.0 { sampled } else { f64::NAN };
    let sum = |value: fn(&Sample) -> f64| samples.iter().map(value).sum::<f64>() / sampled;
    let most = |value: fn(&Sample) -> f64| {
        let rates = samples.iter().map(|sample| value(sample) / sample.seconds);
        rates.fold(0.0, f64::max)
    };
    let mut requests = Requests::default();
    samples
        .iter()
        .for_each(|sample| requests.add(&sample.requests));
    let by_kind = requests
        .0
        .iter()
        .map(|((verb, resource), count)| (format!("{verb} {resource}"), count / sampled))
        .collect();
    let answers = record.answers_of(phase);
    let mut times: Vec<f64> = answers.iter().map(|answer| answer.time).collect();
    times.sort_by(f64::total_cmp);
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    let failures = answers
        .iter()
        .filter_map(|answer| answer.failure.as_deref());
    failures.for_each(|failure| *kinds.entry(kind_of(failure)).or_default() += 1);
    let mut failure_kinds: Vec<(String, usize)> = kinds
        .into_iter()
        .map(|(kind, number)| (kind.to_owned(), number))
        .collect();
    failure_kinds.sort_by_key(|(_, number)| std::cmp::Reverse(*number));
    let failures = failure_kinds.iter().map(|(_, number)| number).sum();
    failure_kinds.truncate(KINDS);
    Row {
        name: phase.name,
        seconds,
        api: sum(|sample| sample.requests.total()),
        api_most: most(|sample| sample.requests.total()),
        by_kind,
        provider: sum(|sample| sample.provider),
        provider_most: most(|sample| sample.provider),
        answers: count(answers.len()) / seconds,
        p50: percentile(&times, 50),
        p99: percentile(&times, 99),
        failures,
        failure_kinds,
        cpu: sum(|sample| sample.cpu) * 1000.0 / nodes,
        memory: phase.memory,
        peak: phase.peak,
    }
}

/// Returns the beginning of a failure, before the names that differ between volumes.
fn kind_of(failure: &str) -> &str {
    let end = failure
        .char_indices()
        .nth(60)
        .map_or(failure.len(), |(at, _)| at);
    &failure[..end]
}

fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}
