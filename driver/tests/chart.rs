//! Checks the Helm chart: it has the values of the existing driver's chart and some more, and renders
//! the same objects as the plain manifests.
//!
//! Rendering needs Helm, from `$HELM`, the search path or `/var/cache/e2e-tools`. Without it those
//! tests say so and pass. `just manifests` writes the table of values in the chart's README.

// A test crate outside of its #[test] functions.
#![allow(clippy::panic, clippy::unwrap_used)]

#[path = "chart/alerts.rs"]
mod alerts;
#[path = "chart/helm.rs"]
mod helm;
#[path = "chart/images.rs"]
mod images;
#[path = "chart/installations.rs"]
mod installations;
#[path = "chart/monitoring.rs"]
mod monitoring;
#[path = "manifests/objects.rs"]
mod objects;
#[path = "chart/values.rs"]
mod values;

use std::fs;

use helm::{Chart, Helm};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Container, PodSpec, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use k8s_openapi::api::storage::v1::CSIDriver;
use objects::{config, deploy, keep, objects};
use rstest::rstest;
use serde_json::Value;
use similar::{DiffTag, TextDiff};

fn values() -> Value {
    let text = fs::read_to_string(deploy("chart/values.yaml")).unwrap();
    serde_saphyr::from_str(&text).unwrap()
}

fn schema() -> Value {
    let text = fs::read_to_string(deploy("chart/values.schema.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Returns the value of a key such as `linux.image.tag`.
fn value<'a>(values: &'a Value, key: &str) -> Option<&'a Value> {
    key.split('.')
        .try_fold(values, |values, part| values.get(part))
}

/// Values reused from the existing chart get the image that the chart has by default.
#[test]
fn the_chart_has_one_image() {
    let chart = fs::read_to_string(deploy("chart/Chart.yaml")).unwrap();
    let chart: Value = serde_saphyr::from_str(&chart).unwrap();
    let image = &chart["annotations"]["driverImage"];
    assert_eq!(value(&values(), "linux.image.repository"), Some(image));
}

#[test]
fn values_have_the_names_and_defaults_of_the_existing_chart() {
    let values = values();
    for line in include_str!("chart/contract.txt").lines() {
        let (key, default) = line.split_once(' ').unwrap();
        let default: Value = serde_json::from_str(default).unwrap();
        assert_eq!(value(&values, key), Some(&default), "{key}");
    }
}

/// A value that the schema describes.
struct Described {
    key: String,
    effect: String,
}

/// Returns every value that has a description. A value without one is an object of such values.
fn described(schema: &Value) -> Vec<Described> {
    let mut found = Vec::new();
    let mut open = vec![(String::new(), schema)];
    while let Some((key, schema)) = open.pop() {
        if let Some(effect) = schema["description"].as_str() {
            found.push(Described {
                key,
                effect: effect.to_owned(),
            });
            continue;
        }
        let properties = schema["properties"].as_object().unwrap();
        for (name, schema) in properties.iter().rev() {
            let key = format!("{key}{}{name}", if key.is_empty() { "" } else { "." });
            open.push((key, schema));
        }
    }
    found
}

#[test]
fn the_schema_and_the_values_file_know_the_same_values() {
    let (schema, values) = (schema(), values());
    let described = described(&schema);
    for Described { key, .. } in &described {
        let optional = key.ends_with(".digest");
        assert_ne!(value(&values, key).is_some(), optional, "{key}");
    }
    let mut open = vec![(String::new(), &values)];
    while let Some((key, value)) = open.pop() {
        if described.iter().any(|known| known.key == key) {
            continue;
        }
        let Some(object) = value.as_object() else {
            panic!("{key} has no description in values.schema.json")
        };
        for (name, value) in object {
            let key = format!("{key}{}{name}", if key.is_empty() { "" } else { "." });
            open.push((key, value));
        }
    }
}

#[test]
fn the_readme_has_every_value() {
    let values = values();
    let mut table = String::from("| value | default | effect |\n|---|---|---|\n");
    for Described { key, effect } in described(&schema()) {
        let default = match value(&values, &key) {
            Some(default) => format!("`{default}`"),
            None => "unset".to_owned(),
        };
        table.push_str(&format!("| `{key}` | {default} | {effect} |\n"));
    }
    let readme = fs::read_to_string(deploy("chart/README.md")).unwrap();
    let (start, end) = ("<!-- values -->\n", "<!-- end of values -->");
    let (before, rest) = readme.split_once(start).unwrap();
    let (_, after) = rest.split_once(end).unwrap();
    keep(
        "chart/README.md",
        &format!("{before}{start}\n{table}\n{end}{after}"),
    );
}

/// Helm compares versions of distributions, such as v1.35.6-eks-1, as pre-releases, which match only
/// a constraint that names a pre-release itself. `helm template` removes such suffixes, so that
/// rendering does not show a wrong constraint.
#[test]
fn version_gates_let_distributions_in() {
    let mut gates = 0;
    for file in [
        "Chart.yaml",
        "templates/_helpers.tpl",
        "templates/NOTES.txt",
    ] {
        let text = fs::read_to_string(deploy("chart").join(file)).unwrap();
        for (_, version) in text
            .match_indices("\">=")
            .map(|(at, _)| text.split_at(at + 3))
        {
            let version = version.split('"').next().unwrap();
            assert!(version.ends_with("-0"), "{file}: {version}");
            gates += 1;
        }
    }
    assert_eq!(gates, 3);
}

const EVERYTHING: &str = include_str!("chart/everything.yaml");
const REUSED: &str = include_str!("chart/values-of-1.6.yaml");
const TOKENS: &str = "tokenRequests: [{audience: vault}]";
const BUILTIN: &str = "sidecars: builtin";
const PULL_SECRETS: &str = "imagePullSecrets: [{name: one}, {name: two}]";

/// Renders the chart with its default values.
fn default_values(helm: &Helm) -> String {
    helm.render(&Chart::ours(), "1.34.2", "").unwrap()
}

/// Returns the lines in which a rendering differs from the one with the default values, each group
/// with the template that it comes from.
fn difference(helm: &Helm, rendered: &str) -> String {
    let default_values = default_values(helm);
    let diff = TextDiff::from_lines(default_values.as_str(), rendered);
    let lines: Vec<&str> = rendered.lines().collect();
    let mut shown = String::new();
    for hunk in diff.unified_diff().context_radius(3).iter_hunks() {
        let mut changes = hunk.ops().iter().filter(|op| op.tag() != DiffTag::Equal);
        let before = lines
            .iter()
            .take(changes.next().unwrap().new_range().start + 1);
        let source = before
            .rev()
            .find_map(|line| line.strip_prefix("# Source: secrets-store-csi-driver/templates/"));
        shown.push_str(&format!("@@ {}\n", source.unwrap_or_default()));
        for change in hunk.iter_changes() {
            shown.push_str(&format!("{}{change}", change.tag()));
        }
    }
    shown
}

#[rstest]
#[case("default_values", "1.34.2", "")]
#[case("everything", "1.36.0", EVERYTHING)]
#[case("builtin_sidecars", "1.36.0", BUILTIN)]
#[case("several_pull_secrets", "1.36.0", PULL_SECRETS)]
#[case("tokens_before_1_35", "1.34.2", TOKENS)]
#[case("tokens_in_a_distribution", "v1.35.6-eks-abc", TOKENS)]
fn renders(#[case] name: &str, #[case] kubernetes: &str, #[case] values: &str) {
    let Some(helm) = Helm::find() else { return };
    let rendered = helm.render(&Chart::ours(), kubernetes, values).unwrap();
    if values.is_empty() {
        insta::assert_snapshot!(name, rendered);
    } else {
        insta::assert_snapshot!(name, difference(&helm, &rendered));
    }

    // This fails for a field that Kubernetes does not know, and for an argument that the driver does
    // not know.
    for daemon_set in objects::<DaemonSet>(&rendered) {
        let pod = daemon_set.spec.template.spec.unwrap();
        config(container(&pod, "secrets-store"));
    }
    objects::<CSIDriver>(&rendered);
}

#[test]
fn an_upgrade_can_reuse_the_values_of_the_existing_chart() {
    let Some(helm) = Helm::find() else { return };
    let reused = Chart::with_values(REUSED);
    let upgraded = helm.render(&reused, "1.34.2", "").unwrap();
    assert_eq!(
        upgraded,
        default_values(&helm),
        "with values left: of the existing chart, right: of ours"
    );

    // Charts before 1.5.6 do not have this value.
    let older = REUSED.replace("automountServiceAccountToken: true\n", "");
    assert_ne!(older, REUSED);
    let older = helm.render(&Chart::with_values(&older), "1.34.2", "");
    assert_eq!(older.unwrap(), upgraded);

    // Values that an installation has set, and one value that only this chart has.
    let set = format!("{TOKENS}\n{PULL_SECRETS}\nsyncSecret: {{enabled: true}}\n{BUILTIN}\n");
    let rendered = helm.render(&reused, "1.34.2", &set).unwrap();
    insta::assert_snapshot!("reused_values", difference(&helm, &rendered));
}

#[rstest]
#[case("windows: {enabled: true}", "this driver is for Linux only")]
#[case(
    "tokenRequests: [{audience: a}]\ntokenRequestsInSecrets: true",
    "tokenRequestsInSecrets=true needs Kubernetes 1.35, and this is v1.34.2"
)]
#[case(
    "podMonitor: {enabled: true}\nlinux: {metricsAddr: '0'}",
    "there is nothing to monitor"
)]
#[case(
    "metricsService: {enabled: true}\nlinux: {metricsAddr: '0'}",
    "there is nothing to monitor"
)]
#[case(
    "tokenRequests: [{audience: a, expirationSecond: 600}]",
    "additional properties 'expirationSecond' not allowed"
)]
#[case("sidecars: none", "'/sidecars': value must be one of")]
#[case(
    "syncSecret: {enabled: 'yes'}",
    "'/syncSecret/enabled': value must be one of true, false, 'true', 'false'"
)]
#[case(
    "syncSecret: {interval: 45 seconds}",
    "'/syncSecret/interval': '45 seconds' does not match pattern"
)]
#[case(
    "linux: {image: {digest: 'sha256:0123'}}",
    "'/linux/image/digest': 'sha256:0123' does not match pattern"
)]
#[case(
    "linux: {image: {repository: 'localhost:5000/driver:1'}}",
    "linux.image.repository=localhost:5000/driver:1 has a tag or a digest in it"
)]
#[case(
    "linux: {image: {repository: driver@sha256}}",
    "and a digest in linux.image.digest"
)]
#[case(
    "linux: {registrarImage: {repository: 'registrar:1'}}",
    "linux.registrarImage.repository=registrar:1 has a tag"
)]
#[case(
    "linux: {livenessProbeImage: {repository: 'probe:1'}}",
    "linux.livenessProbeImage.repository=probe:1 has a tag"
)]
#[case(
    "linux: {driver: {extraArgs: [sync-interval=1m]}}",
    "linux.driver.extraArgs has \"sync-interval=1m\", which is neither a flag nor the value of the flag before it"
)]
#[case(
    "linux: {driver: {extraArgs: [-v=5, '6']}}",
    "linux.driver.extraArgs has \"6\""
)]
#[case(
    "linux: {driver: {extraArgs: [-v, '5', '6']}}",
    "linux.driver.extraArgs has \"6\""
)]
#[case(
    "podMonitor: {enable: true}",
    "podMonitor.enable: did you mean podMonitor.enabled?"
)]
#[case(
    "livenessProbe: {port: 8095}",
    "livenessProbe.port and linux.metricsAddr have the same port, 8095"
)]
#[case(
    "livenessProbe: {port: '9000'}\nlinux: {metricsAddr: 'localhost:9000'}",
    "have the same port, 9000"
)]
#[case(
    "commonLabels: {app: shop}",
    "commonLabels.app=shop is not what the DaemonSet finds its pods by, app=secrets-store-csi-driver"
)]
#[case(
    "linux: {podLabels: {app: shop}}\nnameOverride: csi",
    "linux.podLabels.app=shop is not what the DaemonSet finds its pods by, app=csi"
)]
#[case(
    "linux: {kubeletRootDir: /var/lib/kubelet/pods/}",
    "write the directory above it, /var/lib/kubelet\n"
)]
#[case(
    "linux: {driver: {resources: {limits: {memory: 32Mi}}}}",
    "the memory limit of the driver is 32Mi, and it needs 64Mi or more"
)]
#[case(
    "linux: {driver: {resources: {limits: {memory: 67108863}}}}",
    "the memory limit of the driver is 67108863,"
)]
#[case(
    "sidecars: builtin\nlinux: {driver: {builtinResources: {limits: {memory: 64M}}}}",
    "the memory limit of the driver is 64M,"
)]
fn refuses_what_cannot_work(#[case] values: &str, #[case] sentence: &str) {
    let Some(helm) = Helm::find() else { return };
    let refusal = helm.render(&Chart::ours(), "1.34.2", values).unwrap_err();
    assert!(refusal.contains(sentence), "{refusal}");
}

#[rstest]
#[case("1.29.9", "", false)]
#[case("v1.30.0-gke.1", "", true)]
#[case("1.34.2", "tokenRequestsInSecrets: auto", false)]
#[case("1.35.0", "tokenRequestsInSecrets: auto", true)]
#[case("v1.35.0-eks-1", "tokenRequestsInSecrets: 'true'", true)]
#[case("1.36.0", "tokenRequestsInSecrets: false", false)]
fn versions_of_kubernetes_decide(
    #[case] kubernetes: &str,
    #[case] values: &str,
    #[case] expected: bool,
) {
    let Some(helm) = Helm::find() else { return };
    let values_and_tokens = format!("{TOKENS}\n{values}");
    let rendered = helm.render(&Chart::ours(), kubernetes, &values_and_tokens);
    if values.is_empty() {
        assert_eq!(rendered.is_ok(), expected);
        return;
    }
    let csi_driver = objects::<CSIDriver>(&rendered.unwrap()).remove(0);
    let in_secrets = csi_driver.spec.service_account_token_in_secrets;
    assert_eq!(in_secrets, expected.then_some(true));
}

fn container<'a>(pod: &'a PodSpec, name: &str) -> &'a Container {
    let mut containers = pod.containers.iter();
    containers.find(|container| container.name == name).unwrap()
}

/// Returns the pod spec without the parts in which the two kinds of manifest may differ: the names of
/// volumes, and the driver's arguments, which are compared as parsed settings.
fn comparable(mut pod: PodSpec) -> PodSpec {
    let volumes = pod.volumes.take().unwrap();
    for container in &mut pod.containers {
        if container.name == "secrets-store" {
            container.args = None;
        }
        let mounts = container.volume_mounts.as_mut().unwrap();
        for mount in &mut *mounts {
            let volume = volumes.iter().find(|volume| volume.name == mount.name);
            let host = volume.unwrap().host_path.clone().unwrap();
            mount.name = format!("{} {}", host.path, host.type_.unwrap());
        }
        mounts.sort_by(|a, b| a.mount_path.cmp(&b.mount_path));
    }
    pod
}

#[rstest]
#[case("secrets-store-csi-driver.yaml", "")]
#[case("lean/secrets-store-csi-driver.yaml", BUILTIN)]
fn the_pods_are_those_of_the_plain_manifests(#[case] file: &str, #[case] values: &str) {
    let Some(helm) = Helm::find() else { return };
    let rendered = helm.render(&Chart::ours(), "1.36.0", values).unwrap();
    let pod = |manifest: &str| {
        let daemon_set = objects::<DaemonSet>(manifest).remove(0);
        daemon_set.spec.template.spec.unwrap()
    };
    let plain = pod(&fs::read_to_string(deploy(file)).unwrap());
    let mut chart = pod(&rendered);

    let mut plain_config = config(container(&plain, "secrets-store"));
    let chart_config = config(container(&chart, "secrets-store"));
    if plain.containers.len() == 3 {
        // This plain manifest has exactly the arguments of the existing driver's manifest.
        assert_eq!(plain_config.kubelet_root_dir, None);
        plain_config.kubelet_root_dir = Some("/var/lib/kubelet".into());
    }
    assert_eq!(chart_config, plain_config);

    let mut policies = chart
        .containers
        .iter_mut()
        .map(|c| &mut c.image_pull_policy);
    let by_hand = policies.find(|policy| policy.as_deref() == Some("Never"));
    *by_hand.unwrap() = Some("IfNotPresent".into());

    // Only the chart has these fields, like the existing driver's chart.
    assert!(chart.affinity.take().is_some());
    assert_eq!(chart.automount_service_account_token.take(), Some(true));
    assert_eq!(comparable(chart), comparable(plain));
}

#[test]
fn the_other_objects_are_those_of_the_plain_manifests() {
    let Some(helm) = Helm::find() else { return };
    let values = "enableSecretRotation: true\nsyncSecret: {enabled: true}";
    let rendered = helm.render(&Chart::ours(), "1.36.0", values).unwrap();
    let mut plain = String::new();
    for file in [
        "csidriver.yaml",
        "rbac-secretproviderclass.yaml",
        "optional/rbac-secretprovidersyncing.yaml",
        "role-secretproviderclasses-admin.yaml",
        "role-secretproviderclasses-viewer.yaml",
        "role-secretproviderclasspodstatuses-viewer.yaml",
    ] {
        plain.push_str("---\n");
        plain.push_str(&fs::read_to_string(deploy(file)).unwrap());
    }

    let csi_driver = |manifest| objects::<CSIDriver>(manifest).remove(0);
    assert_eq!(csi_driver(&rendered).spec, csi_driver(&plain).spec);
    let account = |manifest| {
        let metadata = objects::<ServiceAccount>(manifest).remove(0).metadata;
        (metadata.name, metadata.namespace)
    };
    assert_eq!(account(&rendered), account(&plain));
    let roles = |manifest| {
        let mut roles: Vec<_> = objects::<ClusterRole>(manifest)
            .into_iter()
            .map(|role| {
                let mut labels = role.metadata.labels.unwrap_or_default();
                labels.retain(|label, _| label.starts_with("rbac."));
                (role.metadata.name, labels, role.rules)
            })
            .collect();
        roles.sort_by(|a, b| a.0.cmp(&b.0));
        roles
    };
    let mut of_the_chart = roles(&rendered);
    // Who installs manifests applies this role after the switch, and the existing driver's stays until then.
    let syncing = of_the_chart.last_mut().unwrap().2.as_mut().unwrap();
    let existing = syncing.pop().unwrap().verbs;
    assert_eq!(existing, ["list", "update", "watch"]);
    assert_eq!(of_the_chart, roles(&plain));
    let bindings = |manifest| {
        let mut bindings: Vec<_> = objects::<ClusterRoleBinding>(manifest)
            .into_iter()
            .map(|binding| (binding.metadata.name, binding.role_ref, binding.subjects))
            .collect();
        bindings.sort_by(|a, b| a.0.cmp(&b.0));
        bindings
    };
    assert_eq!(bindings(&rendered), bindings(&plain));
}
