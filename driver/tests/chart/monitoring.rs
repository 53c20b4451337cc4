//! Checks the alerts and the board of `deploy/monitoring`, and what the chart makes of them. That the alerts
//! fire is checked by `alerts.rs` beside this, and by `e2e/tests/scenarios/alerts.rs`.

use k8s_openapi::api::core::v1::ConfigMap;

use super::*;

fn rules() -> String {
    fs::read_to_string(deploy("monitoring/rules.yaml")).unwrap()
}

fn board() -> String {
    fs::read_to_string(deploy("monitoring/dashboard.json")).unwrap()
}

/// Helm reads only files of the chart, and kubectl only objects.
#[test]
fn rules_and_board_are_the_same_everywhere() {
    keep("chart/monitoring/rules.yaml", &rules());
    keep("chart/monitoring/dashboard.json", &board());
    let mut object = String::from(
        "# Written by `just manifests` from rules.yaml.\n\
         apiVersion: monitoring.coreos.com/v1\n\
         kind: PrometheusRule\n\
         metadata:\n  name: csi-secrets-store\n  namespace: kube-system\n\
         spec:\n",
    );
    for line in rules().lines().filter(|line| !line.starts_with('#')) {
        object.push_str(&format!("  {line}\n"));
    }
    keep("monitoring/prometheusrule.yaml", &object);
    let read: Value = serde_saphyr::from_str(&object).unwrap();
    let plain: Value = serde_saphyr::from_str(&rules()).unwrap();
    assert_eq!(read["spec"], plain);
}

#[test]
fn the_chart_installs_rules_and_board_where_they_are_wanted() {
    let Some(helm) = Helm::find() else { return };
    let of_kind = |rendered: &str, kind: &str| -> Vec<Value> {
        let documents: Vec<Value> = serde_saphyr::from_multiple(rendered).unwrap();
        let ours = documents
            .into_iter()
            .filter(|document| document["kind"] == kind);
        ours.collect()
    };
    let without = default_values(&helm);
    assert!(of_kind(&without, "PrometheusRule").is_empty());
    assert!(of_kind(&without, "ConfigMap").is_empty());

    let values = "prometheusRule: {enabled: true, labels: {release: prometheus}}\n\
                  grafanaDashboard: {enabled: true, annotations: {folder: Storage}}";
    let rendered = helm.render(&Chart::ours(), "1.36.0", values).unwrap();
    let rule = of_kind(&rendered, "PrometheusRule").remove(0);
    let name = "csi-secrets-store-secrets-store-csi-driver";
    let jobs = format!("(-metrics)?|kube-system/{name}|{name}-metrics\"");
    let sets = format!("(-windows)?|{name}(-windows)?\"");
    let expected = rules()
        .replace("(-metrics)?\"", &jobs)
        .replace("(-windows)?\"", &sets);
    let expected: Value = serde_saphyr::from_str(&expected).unwrap();
    assert_eq!(rule["spec"], expected);
    assert_eq!(rule["metadata"]["labels"]["release"], "prometheus");
    let config = objects::<ConfigMap>(&rendered).remove(0);
    let labels = config.metadata.labels.unwrap();
    assert_eq!(labels["grafana_dashboard"], "1");
    assert_eq!(config.metadata.annotations.unwrap()["folder"], "Storage");
    assert_eq!(config.data.unwrap()["secrets-store-csi.json"], board());
}

#[rstest]
#[case("prometheusRule")]
#[case("grafanaDashboard")]
fn without_metrics_there_is_nothing_to_watch(#[case] value: &str) {
    let Some(helm) = Helm::find() else { return };
    let values = format!("{value}: {{enabled: true}}\nlinux: {{metricsAddr: '0'}}");
    let refusal = helm.render(&Chart::ours(), "1.34.2", &values).unwrap_err();
    assert!(
        refusal.contains("there is nothing to alert on or to show"),
        "{refusal}"
    );
}

/// A release may have any name, so that the usual one is not in the label `job`.
#[test]
fn the_alert_of_a_driver_that_is_down_knows_its_monitors() {
    let Some(helm) = Helm::find() else { return };
    let values = "fullnameOverride: sscsi\n\
                  podMonitor: {enabled: true}\n\
                  serviceMonitor: {enabled: true, endpoint: {port: web, interval: 30s}}\n\
                  prometheusRule: {enabled: true, runbookUrl: 'https://git.example.org/docs/'}";
    let rendered = helm.render(&Chart::ours(), "1.36.0", values).unwrap();
    let documents: Vec<Value> = serde_saphyr::from_multiple(&rendered).unwrap();
    let of_kind = |kind: &str| {
        let mut documents = documents.iter();
        documents.find(|document| document["kind"] == kind).unwrap()
    };
    let rule = &of_kind("PrometheusRule")["spec"]["groups"][0]["rules"][0];
    let monitor = of_kind("PodMonitor");
    // The operator names the jobs so.
    let namespace = monitor["metadata"]["namespace"].as_str().unwrap();
    let name = monitor["metadata"]["name"].as_str().unwrap();
    let service = of_kind("Service")["metadata"]["name"].as_str().unwrap();
    let expr = rule["expr"].as_str().unwrap();
    assert!(
        expr.contains(&format!("|{namespace}/{name}|{service}\"")),
        "{expr}"
    );
    assert_eq!(
        rule["annotations"]["runbook_url"],
        "https://git.example.org/docs/monitoring.md#secretsstoredriverdown"
    );
    assert_eq!(rule["annotations"]["runbook"], Value::Null);

    let endpoint = &monitor["spec"]["podMetricsEndpoints"][0];
    assert_eq!(endpoint["port"], "metrics");
    assert_eq!(endpoint["relabelings"][0]["targetLabel"], "node");
    let endpoint = &of_kind("ServiceMonitor")["spec"]["endpoints"][0];
    assert_eq!(endpoint["port"], "web");
    assert_eq!(endpoint["interval"], "30s");
}
