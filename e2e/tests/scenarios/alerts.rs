//! The alerts of `deploy/monitoring` fire for what happens to a driver, and not before.
//!
//! A history of the driver's metrics page is taken while things go wrong, and given to promtool. One look at
//! the page stands for a minute of Prometheus; as kubelet of the embedded cluster publishes each volume about
//! once between two looks, the proportions are those of a real node.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use e2e::cluster::Cluster as _;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    harness::{Scenario, scenario, until},
    objects::{SecretObject, class, pod},
    settings::Need,
};

const OBJECT: &str = "- {objectName: password, content: hunter2}";
/// The time between two looks.
const MINUTE: Duration = Duration::from_millis(300);
const LABELS: &str = "job=\"kube-system/csi-secrets-store\",instance=\"node-1\"";

/// A driver that refreshes at every publish and tries again at once.
const NEEDS: &[Need] = &[
    Need::Embedded("a minute of its Prometheus lasts a minute"),
    Need::Republish,
    Need::Flags(&[
        "--enable-secret-rotation=true",
        "--rotation-poll-interval=100ms",
        "--min-rotation-poll-interval=100ms",
        "--rotation-backoff=100ms",
        "--rotation-backoff-max=200ms",
        "--sync-interval=1s",
        "--provider-max-calls=64",
    ]),
];

/// The looks at a driver's metrics page. One that had no answer is `None`.
#[derive(Default)]
struct History {
    looks: Vec<(f64, Option<String>)>,
}

impl History {
    /// Looks at the page so many times.
    async fn minutes(&mut self, s: &Scenario, count: usize) {
        for _ in 0..count {
            let now = Timestamp::now().as_millisecond() as f64 / 1000.0;
            let page = s.cluster.driver(&s.node()).metrics().await.ok();
            self.looks.push((now, page));
            tokio::time::sleep(MINUTE).await;
        }
    }

    fn len(&self) -> usize {
        self.looks.len()
    }

    /// Returns the names of all samples that were seen.
    fn names(&self) -> BTreeSet<String> {
        let pages = self.looks.iter().filter_map(|(_, page)| page.as_deref());
        let samples = pages.flat_map(samples);
        samples
            .map(|(series, _)| name_of(series).to_owned())
            .collect()
    }

    /// Returns the series of promtool: each with a value, or `_`, for each look.
    fn series(&self, names: &BTreeSet<String>) -> BTreeMap<String, Vec<Option<f64>>> {
        let mut all: BTreeMap<String, Vec<Option<f64>>> = BTreeMap::new();
        for (at, (_, page)) in self.looks.iter().enumerate() {
            for (series, value) in page.as_deref().into_iter().flat_map(samples) {
                let name = name_of(series);
                if !names.contains(name) {
                    continue;
                }
                let value = match name.contains("_time") {
                    true => self.minute_of(value) * 60.0,
                    false => value,
                };
                let values = all.entry(with_labels(series)).or_default();
                values.resize(at, None);
                values.push(Some(value));
            }
        }
        let up = self
            .looks
            .iter()
            .map(|(_, page)| Some(f64::from(u8::from(page.is_some()))));
        all.insert(format!("up{{{LABELS}}}"), up.collect());
        all
    }

    /// Returns the minute of the history at which a time was.
    fn minute_of(&self, time: f64) -> f64 {
        let after = self.looks.iter().position(|(look, _)| *look > time);
        match after {
            // A look lasts as long as the first one.
            Some(0) => time - self.looks[0].0,
            Some(after) => {
                let (from, to) = (self.looks[after - 1].0, self.looks[after].0);
                (after - 1) as f64 + (time - from) / (to - from)
            }
            None => (self.looks.len() - 1) as f64,
        }
    }
}

/// Returns the samples of a page: series and value.
fn samples(page: &str) -> impl Iterator<Item = (&str, f64)> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        Some((series, value.parse().ok()?))
    })
}

fn name_of(series: &str) -> &str {
    series.split('{').next().unwrap_or(series)
}

/// Returns a series with the labels that Prometheus adds.
fn with_labels(series: &str) -> String {
    match series.strip_suffix('}') {
        Some(labelled) => format!("{labelled},{LABELS}}}"),
        None => format!("{series}{{{LABELS}}}"),
    }
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

/// Returns the expressions of the rules, and those of the board.
fn expressions() -> (Vec<String>, Vec<String>) {
    let rules = fs::read_to_string(file("deploy/monitoring/rules.yaml")).unwrap();
    let rules: Value = serde_saphyr::from_str(&rules).unwrap();
    let board = fs::read_to_string(file("deploy/monitoring/dashboard.json")).unwrap();
    let board: Value = serde_json::from_str(&board).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let rules = rules["groups"][0]["rules"].as_array().unwrap().iter();
    let targets = board["panels"].as_array().unwrap().iter();
    let targets = targets.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    (
        rules.map(|rule| text(&rule["expr"])).collect(),
        targets.map(|target| text(&target["expr"])).collect(),
    )
}

/// Returns the names of metrics in an expression: its words without functions, operators, labels, numbers
/// and durations.
fn metrics_in(expression: &str) -> BTreeSet<String> {
    let mut bare = String::new();
    let mut rest = expression;
    // What is in braces and brackets is no name, nor is a list of labels.
    while let Some(open) = rest.find(['{', '[']) {
        bare += &rest[..open];
        rest = &rest[open..];
        rest = &rest[rest.find(['}', ']']).unwrap() + 1..];
    }
    bare += rest;
    for before in ["by (", "on ("] {
        while let Some(at) = bare.find(before) {
            let end = at + bare[at..].find(')').unwrap();
            bare.replace_range(at..=end, " ");
        }
    }
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut names = BTreeSet::new();
    let mut at = 0;
    while let Some(start) = bare[at..].find(is_part) {
        let start = at + start;
        let end = bare[start..]
            .find(|c| !is_part(c))
            .map_or(bare.len(), |end| start + end);
        let word = &bare[start..end];
        let is_call = bare[end..].trim_start().starts_with('(');
        let is_number = word.starts_with(|c: char| c.is_ascii_digit());
        if !is_call && !is_number && !["and", "or", "unless"].contains(&word) {
            names.insert(word.to_owned());
        }
        at = end;
    }
    names
}

#[test]
fn the_reader_of_expressions_finds_metrics() {
    let found = metrics_in(
        "sum by (job, le) (rate(a_total{x=~\"$y\"}[5m])) / b > 0.9 and on (job) c or vector(0) - time()",
    );
    assert_eq!(
        found,
        BTreeSet::from(["a_total", "b", "c"].map(str::to_owned))
    );
}

/// A part of a history, and the alerts that fired in it.
struct Checked<'a> {
    /// The minute at its end.
    end: usize,
    /// Its length.
    minutes: usize,
    /// Alerts that fired meanwhile, and may have ended. Others are not looked at, unless there are none.
    fired: &'a [&'a str],
}

/// Asks promtool which alerts fire. Skips the test where there is no promtool.
fn check(series: &BTreeMap<String, Vec<Option<f64>>>, parts: &[Checked]) {
    let Some(promtool) = promtool() else {
        return e2e::skipped::skip(
            "the alerts need promtool in $PROMTOOL, on the path or in /var/cache/e2e-tools",
        );
    };
    let rules = file("deploy/monitoring/rules.yaml").canonicalize().unwrap();
    run(Command::new(&promtool).args(["check", "rules"]).arg(&rules));
    let shown = |value: &Option<f64>| value.map_or("_".to_owned(), |value| value.to_string());
    let input: Vec<Value> = series
        .iter()
        .map(|(series, values)| {
            let values: Vec<String> = values.iter().map(shown).collect();
            json!({"series": series, "values": values.join(" ")})
        })
        .collect();
    let expected: Vec<Value> = parts
        .iter()
        .map(|part| {
            let names = match part.fired {
                [] => ".*".to_owned(),
                fired => fired.join("|"),
            };
            let samples = part.fired.iter();
            let samples: Vec<Value> = samples
                .map(|alert| json!({"labels": format!("{{alertname=\"{alert}\"}}"), "value": 1}))
                .collect();
            json!({
                "expr": format!(
                    "max by (alertname) (max_over_time(ALERTS{{alertstate=\"firing\",alertname=~\"{names}\"}}[{}m]))",
                    part.minutes
                ),
                "eval_time": format!("{}m", part.end),
                "exp_samples": samples,
            })
        })
        .collect();
    let test = json!({
        "rule_files": [rules],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": input, "promql_expr_test": expected}],
    });
    let directory = tempfile::tempdir().unwrap();
    // JSON is YAML.
    let path = directory.path().join("alerts.yaml");
    fs::write(&path, test.to_string()).unwrap();
    run(Command::new(&promtool).args(["test", "rules"]).arg(&path));
}

fn promtool() -> Option<PathBuf> {
    let named = std::env::var_os("PROMTOOL").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = named
        .into_iter()
        .chain(std::env::split_paths(&path).map(|directory| directory.join("promtool")))
        .chain(["/var/cache/e2e-tools/promtool".into()]);
    candidates.find(|candidate| candidate.is_file())
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{command:?}\n{}", text.concat());
}

/// A refused refresh, refused mounts, calls that hang, a Secret of somebody else, a driver that is away,
/// and one that restarts.
#[tokio::test]
async fn each_trouble_has_its_alert() {
    let s = scenario!(NEEDS);
    let mut history = History::default();
    s.apply(json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "theirs"},
        "data": {"theirs": "cHJlY2lvdXM="},
    }))
    .await;
    let ours = SecretObject::new("creds", &[("pw", "password")]);
    let theirs = SecretObject::new("theirs", &[("pw", "password")]);
    s.apply(class("db", OBJECT).secret_objects([ours.clone()]))
        .await;
    for name in ["web", "goes"] {
        s.apply(pod(name, &["db"])).await;
        s.ready(name).await;
    }
    s.delete("goes").await;
    history.minutes(&s, 15).await;
    let calm = history.len();

    let refused = "- {status: {code: PERMISSION_DENIED, message: no}}";
    let troubled = class("db", OBJECT).secret_objects([ours.clone(), theirs]);
    s.apply(troubled.faults(refused)).await;
    s.apply(class("refused", OBJECT).faults(refused)).await;
    s.apply(class("hangs", OBJECT).faults("- {hang: true}"))
        .await;
    let mut others = Vec::new();
    for number in 0..12 {
        others.push((format!("hangs-{number}"), "hangs"));
    }
    for (name, class) in &others {
        s.apply(pod(name, &[class])).await;
    }
    for number in 0..10 {
        let name = format!("refused-{number}");
        s.apply(pod(&name, &["refused"])).await;
        others.push((name, "refused"));
        history.minutes(&s, 4).await;
    }
    let trouble = history.len();

    s.apply(class("db", OBJECT).secret_objects([ours])).await;
    for (name, _) in &others {
        s.delete(name).await;
    }
    history.minutes(&s, 45).await;
    let recovered = history.len();

    let node = s.node();
    let driver = s.cluster.driver(&node);
    driver.stop().await.unwrap();
    history.minutes(&s, 8).await;
    driver.start().await.unwrap();
    for _ in 0..3 {
        until("the driver answers", async || {
            driver.metrics().await.is_ok()
        })
        .await;
        history.minutes(&s, 1).await;
        driver.kill().await.unwrap();
    }
    until("the driver answers", async || {
        driver.metrics().await.is_ok()
    })
    .await;
    history.minutes(&s, 2).await;
    let restarted = history.len();

    let (rules, board) = expressions();
    let used = |expressions: &[String]| -> BTreeSet<String> {
        expressions
            .iter()
            .flat_map(|expr| metrics_in(expr))
            .collect()
    };
    let mut known = history.names();
    known.insert("up".to_owned());
    // These are of kube-state-metrics. A test of the chart (`driver/tests/chart/alerts.rs`) has their alert.
    let of_sets = ["desired_number_scheduled", "number_ready"];
    known.extend(of_sets.map(|name| format!("kube_daemonset_status_{name}")));
    // No trouble that can be made here keeps a driver from taking a volume down. A unit test of the driver
    // counts such a failure.
    let page =
        "driver__metrics__publish__tests__the_page_has_the_series_of_the_existing_driver.snap";
    let page = fs::read_to_string(file("driver/src/metrics/snapshots").join(page)).unwrap();
    known.extend(samples(&page).map(|(series, _)| name_of(series).to_owned()));
    let unknown: Vec<String> = used(&[rules.clone(), board].concat())
        .into_iter()
        .filter(|name| !known.contains(name))
        .collect();
    assert_eq!(unknown, [""; 0], "metrics that the driver does not have");

    let series = history.series(&used(&rules));
    let fired = [
        "SecretsStoreContentStale",
        "SecretsStoreMountsFail",
        "SecretsStoreProviderCallsWait",
        "SecretsStoreRefreshesFail",
        "SecretsStoreSecretsFail",
        "SecretsStoreSecretsOutOfStep",
        "SecretsStoreVolumesStale",
    ];
    check(
        &series,
        &[
            Checked {
                end: calm - 1,
                minutes: calm,
                fired: &[],
            },
            Checked {
                end: trouble - 1,
                minutes: trouble - calm,
                fired: &fired,
            },
            Checked {
                end: recovered - 1,
                minutes: 2,
                fired: &[],
            },
            Checked {
                end: restarted - 1,
                minutes: restarted - recovered,
                fired: &["SecretsStoreDriverDown", "SecretsStoreDriverRestarts"],
            },
        ],
    );

    // Two troubles that were not made: a room that is nearly full needs a node with little memory. The series
    // of the calm time stand for them, with a smaller room, and with the failures of publishes as those of
    // unpublishes.
    let mut derived = BTreeMap::new();
    for (name, values) in &series {
        if name.starts_with("secrets_store_mounted_bytes{") {
            let room = name.replace("mounted_bytes{", "mounted_bytes_room{");
            let smaller = values.iter().map(|value| value.map(|value| value / 0.95));
            derived.insert(room, smaller.collect());
            derived.insert(name.clone(), values.clone());
        }
        if let Some(labels) = name.strip_prefix("node_publish_error_total") {
            derived.insert(
                format!("node_unpublish_error_total{labels}"),
                values.clone(),
            );
        }
    }
    let fired = ["SecretsStoreRoomLow", "SecretsStoreUnpublishesFail"];
    check(
        &derived,
        &[Checked {
            end: trouble - 1,
            minutes: trouble,
            fired: &fired,
        }],
    );
}

/// Calls that take eleven seconds.
#[tokio::test]
async fn a_slow_provider_has_its_alert() {
    let s = scenario!(NEEDS);
    let mut history = History::default();
    let slow = |number: usize| format!("slow-{number}");
    for number in 0..20 {
        let name = slow(number);
        s.apply(class(&name, OBJECT).faults("- {delay: 11s}")).await;
    }
    for number in 0..20 {
        let name = slow(number);
        s.apply(pod(&name, &[&name])).await;
        history.minutes(&s, 3).await;
    }
    let (rules, _) = expressions();
    let names = rules.iter().flat_map(|expr| metrics_in(expr)).collect();
    // The time after which calls end and ten minutes have passed.
    history.minutes(&s, 40).await;
    let end = history.len();
    let fired = ["SecretsStoreProviderSlow"];
    let all = Checked {
        end: end - 1,
        minutes: end,
        fired: &fired,
    };
    check(&history.series(&names), &[all]);
}
