//! Checks with promtool which jobs and DaemonSets the alerts on a missing driver take for a driver's. promtool is
//! found in `$PROMTOOL`, on the search path or in `/var/cache/e2e-tools`.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Once;

use serde_json::json;

use super::{helm::tool, *};

/// Jobs of drivers: of the chart's monitors, of monitors for the plain manifests, and of one's own configuration.
const JOBS: [&str; 11] = [
    "kube-system/csi-secrets-store-secrets-store-csi-driver",
    "csi-secrets-store-secrets-store-csi-driver-metrics",
    "kube-system/secrets-store-csi-driver",
    "secrets-store-csi-driver-metrics",
    "secrets-provider-aws-secrets-store-csi-driver-metrics",
    "kube-system/csi-secrets-store",
    "csi-secrets-store",
    "csi-secrets-store-driver",
    "secrets-store-csi-driver",
    "secrets-store-csi",
    "secrets-store",
];

/// Jobs of providers and others, whose names begin alike.
const OTHER_JOBS: [&str; 9] = [
    "secrets-store-csi-driver-provider-aws",
    "kube-system/secrets-provider-aws-secrets-store-csi-driver-provider-aws",
    "csi-secrets-store-provider-azure",
    "kube-system/csi-secrets-store-provider-azure",
    "csi-secrets-store-provider-gcp",
    "secrets-store-csi-driver-provider-gcp-metrics",
    "secrets-store/vault-csi-provider",
    "secrets-store-sync-controller",
    "external-secrets",
];

/// DaemonSets of drivers: of the chart, of the plain manifests, and of the existing driver for Windows.
const SETS: [&str; 5] = [
    "csi-secrets-store-secrets-store-csi-driver",
    "secrets-store-csi-driver",
    "csi-secrets-store",
    "csi-secrets-store-secrets-store-csi-driver-windows",
    "csi-secrets-store-windows",
];

const OTHER_SETS: [&str; 4] = [
    "secrets-store-csi-driver-provider-aws",
    "csi-secrets-store-provider-azure",
    "csi-secrets-store-provider-azure-windows",
    "node-exporter",
];

/// Finds promtool. Prints a line if there is none.
fn promtool() -> Option<PathBuf> {
    static ONCE: Once = Once::new();
    tool("PROMTOOL", "promtool", "the alerts need", &ONCE)
}

/// Gives series to promtool, and fails unless exactly these alerts fire at a minute: each by the value of one label.
fn check(rules: &str, series: &[Value], minute: u32, alert: &str, label: &str, expected: &[&str]) {
    let Some(promtool) = promtool() else { return };
    let samples: Vec<Value> = expected
        .iter()
        .map(|value| json!({"labels": format!("{{{label}={value:?}}}"), "value": 1}))
        .collect();
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("rules.yaml"), rules).unwrap();
    let test = json!({
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": [{
            "expr": format!("count by ({label}) (ALERTS{{alertstate=\"firing\",alertname=\"{alert}\"}})"),
            "eval_time": format!("{minute}m"),
            "exp_samples": samples,
        }]}],
    });
    // JSON is YAML.
    let path = directory.path().join("test.yaml");
    fs::write(&path, test.to_string()).unwrap();
    let mut command = Command::new(promtool);
    let output = command.args(["test", "rules"]).arg(&path).output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{}", text.concat());
}

/// Returns series of one value for half an hour.
fn steady(metric: &str, label: &str, names: &[&str], value: u32) -> Vec<Value> {
    let series = names.iter().map(|name| {
        json!({"series": format!("{metric}{{{label}={name:?},instance=\"a\"}}"), "values": format!("{value}x30")})
    });
    series.collect()
}

const DESIRED: &str = "kube_daemonset_status_desired_number_scheduled";
const READY: &str = "kube_daemonset_status_number_ready";

/// Returns the series of DaemonSets for three nodes each, of which some have a ready pod.
fn sets(names: &[&str], ready: u32) -> Vec<Value> {
    let desired = steady(DESIRED, "daemonset", names, 3);
    let ready = steady(READY, "daemonset", names, ready);
    [desired, ready].concat()
}

fn plain() -> String {
    fs::read_to_string(deploy("monitoring/rules.yaml")).unwrap()
}

/// Returns the rules of the chart with a name that says nothing.
fn of_the_chart(helm: &Helm) -> String {
    let values = "fullnameOverride: sscsi\nprometheusRule: {enabled: true}";
    let rendered = helm.render(&Chart::ours(), "1.36.0", values).unwrap();
    let documents: Vec<Value> = serde_saphyr::from_multiple(&rendered).unwrap();
    let mut rules = documents
        .iter()
        .filter(|document| document["kind"] == "PrometheusRule");
    rules.next().unwrap()["spec"].to_string()
}

#[test]
fn a_driver_that_is_down_has_its_alert_and_a_provider_has_none() {
    let alert = "SecretsStoreDriverDown";
    let down = |jobs: &[&str]| steady("up", "job", jobs, 0);
    let all = down(&[&JOBS[..], &OTHER_JOBS[..]].concat());
    check(&plain(), &all, 10, alert, "job", &JOBS);
    check(
        &plain(),
        &steady("up", "job", &JOBS, 1),
        10,
        alert,
        "job",
        &[],
    );

    let Some(helm) = Helm::find() else { return };
    let own = ["kube-system/sscsi", "sscsi-metrics"];
    let others = ["default/sscsi", "sscsi"];
    let more = [all, down(&own), down(&others)].concat();
    let expected = [&JOBS[..], &own[..]].concat();
    check(&of_the_chart(&helm), &more, 10, alert, "job", &expected);
}

#[test]
fn a_driver_that_is_missing_has_its_alert_and_a_provider_has_none() {
    let alert = "SecretsStoreDriverMissing";
    let missing = sets(&[&SETS[..], &OTHER_SETS[..]].concat(), 2);
    check(&plain(), &missing, 14, alert, "daemonset", &[]);
    check(&plain(), &missing, 16, alert, "daemonset", &SETS);
    check(&plain(), &sets(&SETS, 3), 16, alert, "daemonset", &[]);
    // Without kube-state-metrics there are no such series.
    check(&plain(), &[], 16, alert, "daemonset", &[]);

    let Some(helm) = Helm::find() else { return };
    let own = ["sscsi", "sscsi-windows"];
    let more = [missing, sets(&own, 0)].concat();
    let expected = [&SETS[..], &own[..]].concat();
    check(
        &of_the_chart(&helm),
        &more,
        16,
        alert,
        "daemonset",
        &expected,
    );
}
