//! What the templates of the chart refuse, beyond its schema: values that are missing, Windows, images of the
//! existing driver, and monitors without metrics.

use super::schema::Add;
use crate::lint::yaml::{Node, Value};

/// What the chart needs, and which installations need it. `_check.tpl` has the same list.
const NEEDED: [(&str, When); 16] = [
    ("linux", When::Always),
    ("rbac", When::Always),
    ("livenessProbe", When::Driver),
    ("livenessProbe.port", When::Driver),
    ("linux.driver", When::Driver),
    ("linux.kubeletRootDir", When::Driver),
    ("linux.providersDir", When::Driver),
    ("linux.metricsAddr", When::Driver),
    ("linux.registrar", When::Sidecars),
    ("linux.registrarImage", When::Sidecars),
    ("linux.registrarImage.repository", When::Sidecars),
    ("linux.registrarImage.tag", When::Sidecars),
    ("linux.livenessProbe", When::Sidecars),
    ("linux.livenessProbeImage", When::Sidecars),
    ("linux.livenessProbeImage.repository", When::Sidecars),
    ("linux.livenessProbeImage.tag", When::Sidecars),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Always,
    /// With pods of the driver.
    Driver,
    /// With pods of the driver that have sidecars.
    Sidecars,
}

/// The images of the existing driver that the chart replaces by its own.
const REPLACED: [&str; 3] = [
    "registry.k8s.io/csi-secrets-store/driver",
    "k8s.gcr.io/csi-secrets-store/driver",
    "us.gcr.io/k8s-artifacts-prod/csi-secrets-store/driver",
];

/// The values of the chart that need metrics.
const OF_METRICS: [&str; 5] = [
    "metricsService",
    "podMonitor",
    "serviceMonitor",
    "prometheusRule",
    "grafanaDashboard",
];

/// Checks values for what the schema does not say.
pub(super) fn check(values: &Node, add: Add<'_>) {
    check_needed(values, add);
    if let Some((line, _)) = at(values, "windows.enabled").filter(|(_, value)| is(value, "true")) {
        add(line, "windows.enabled is true, and this driver is for Linux only: write false; nodes with Windows keep the existing driver (docs/install.md, Windows nodes)".to_owned());
    }
    if !is_off(values) {
        check_image(values, add);
        check_metrics(values, add);
    }
}

/// Finds values that are null and must not be.
fn check_needed(values: &Node, add: Add<'_>) {
    let sidecars = at(values, "sidecars");
    let is_builtin = sidecars.is_some_and(|(_, value)| is(value, "builtin"));
    let is_pinned = |path: &str| {
        let image = path
            .strip_suffix(".tag")
            .map(|image| format!("{image}.digest"));
        let digest = image.and_then(|path| at(values, &path));
        digest.is_some_and(|(_, digest)| digest.text().is_some_and(|text| !text.is_empty()))
    };
    for (path, when) in NEEDED {
        let is_needed = match when {
            When::Always => true,
            When::Driver => !is_off(values),
            When::Sidecars => !is_off(values) && !is_builtin,
        };
        let Some((line, value)) = at(values, path).filter(|_| is_needed && !is_pinned(path)) else {
            continue;
        };
        // An empty text is another mistake, or none, where it is no image.
        let is_of_image = path.ends_with(".repository") || path.ends_with(".tag");
        let what = match &value.value {
            Value::Null => "null, which takes the chart's own value away",
            Value::Text(text) if text.is_empty() && is_of_image => "empty",
            _ => continue,
        };
        add(
            line,
            format!("{path} is {what}, and the chart needs one; leave {path} out"),
        );
    }
}

/// Finds images that the chart cannot run.
fn check_image(values: &Node, add: Add<'_>) {
    let text = |path| at(values, path).and_then(|(line, value)| Some((line, value.text()?)));
    let repository = text("linux.image.repository");
    let is_replaced = repository.is_some_and(|(_, name)| REPLACED.contains(&name));
    if let Some((line, name)) = repository.filter(|(_, name)| !is_replaced && is_copy(name)) {
        add(
            line,
            format!(
                "linux.image.repository={name} is a copy of the existing driver's image, which this chart cannot run: copy this driver's image to your registry, under a name that ends in secrets-store-csi"
            ),
        );
        return;
    }
    let has_digest = text("linux.image.digest").is_some_and(|(_, digest)| !digest.is_empty());
    if let Some((line, tag)) = text("linux.image.tag").filter(|(_, tag)| is_of_existing(tag))
        && !has_digest
        && !is_replaced
    {
        add(
            line,
            format!(
                "linux.image.tag={tag} is a version of the existing driver, which this chart cannot run; leave linux.image.tag out, or write the one of your copy of this driver's image"
            ),
        );
    }
}

/// Finds monitors of metrics that are off or that nobody reaches.
fn check_metrics(values: &Node, add: Add<'_>) {
    let Some((_, address)) = at(values, "linux.metricsAddr") else {
        return;
    };
    let address = match &address.value {
        Value::Text(text) | Value::Other(text) => text.as_str(),
        Value::Null | Value::List(_) | Value::Map(_) => return,
    };
    for name in OF_METRICS {
        let on = at(values, &format!("{name}.enabled")).filter(|(_, value)| is(value, "true"));
        let Some((line, _)) = on else { continue };
        // A proxy in the pod that serves the metrics has a port of its own.
        let has_port = at(values, &format!("{name}.endpoint.port")).is_some();
        let scrapes = name.ends_with("Monitor") || name == "metricsService";
        if ["", "0"].contains(&address) {
            add(
                line,
                format!(
                    "{name}.enabled is true, and linux.metricsAddr={address:?} turns the metrics off; leave one of them out"
                ),
            );
        } else if scrapes && !has_port && is_inside(address) {
            add(
                line,
                format!(
                    "{name}.enabled is true, and nothing can scrape linux.metricsAddr={address:?}, an address inside the pod; write \":PORT\""
                ),
            );
        }
    }
}

/// Returns whether an address is one that only the pod itself reaches.
fn is_inside(address: &str) -> bool {
    let local = ["127.", "localhost:", "[::1]"];
    local.iter().any(|begin| address.starts_with(begin))
}

/// Returns whether the values turn the driver's pods off.
fn is_off(values: &Node) -> bool {
    at(values, "linux.enabled").is_some_and(|(_, value)| is(value, "false"))
}

/// Returns whether a value is a word, in quotes or not: so the chart reads its switches (`sscd.on`).
fn is(value: &Node, word: &str) -> bool {
    matches!(&value.value, Value::Text(text) | Value::Other(text) if text == word)
}

/// Returns the value of a full key, with the key's line.
fn at<'a>(values: &'a Node, path: &str) -> Option<(usize, &'a Node)> {
    let mut found = (values.line, values);
    for part in path.split('.') {
        let mut fields = found.1.fields().iter();
        let (key, value) = fields.find(|(key, _)| key.text == part)?;
        found = (key.line, value);
    }
    Some(found)
}

/// Returns whether an image is a copy of the existing driver's, by what clouds and mirrors call it; the chart has
/// the same as regular expressions (`sscd.driverImage`).
fn is_copy(repository: &str) -> bool {
    let lower = repository.to_lowercase();
    // A tag or a digest may follow the name; a port is followed by more of it.
    let ends = lower.match_indices([':', '@']).map(|(at, _)| at);
    let mut names = ends.chain([lower.len()]).map(|end| &lower[..end]);
    names.any(|name| has_name(name) || is_below(name, "deislabs/secrets-store-csi", "/"))
}

fn has_name(name: &str) -> bool {
    let mut name = name;
    while let Some((before, last)) = name.rsplit_once(['-', '_']) {
        let version = last.strip_prefix("rhel");
        let is_version = version.is_some_and(|v| v.bytes().all(|b| b.is_ascii_digit()));
        if !is_version && !["fips", "linux", "amd64", "arm64"].contains(&last) {
            break;
        }
        name = before;
    }
    let Some(name) = name.strip_suffix("driver") else {
        return false;
    };
    let plain = name
        .strip_suffix("csi-")
        .or_else(|| name.strip_suffix("csi_"));
    [Some(name), plain].into_iter().flatten().any(|name| {
        let name = name.strip_suffix(['-', '_', '.', '/']);
        let stores = ["secret-store", "secrets-store"];
        name.is_some_and(|name| stores.iter().any(|store| is_below(name, store, "-_./")))
    })
}

/// Returns whether a name ends in another one, alone or behind a separator.
fn is_below(name: &str, end: &str, separators: &str) -> bool {
    let before = name.strip_suffix(end);
    before.is_some_and(|before| before.is_empty() || before.ends_with(|c| separators.contains(c)))
}

/// Returns whether a tag is a version of the existing driver.
fn is_of_existing(tag: &str) -> bool {
    let Some(version) = tag.strip_prefix('v') else {
        return false;
    };
    let mut parts = version.splitn(3, '.');
    let (major, minor, patch) = (parts.next(), parts.next(), parts.next());
    let is_patch = patch.is_some_and(|patch| patch.starts_with(|c: char| c.is_ascii_digit()));
    let minor = minor.unwrap_or_default();
    match major {
        Some("0") => is_patch && minor == "0",
        Some("1") => is_patch && ["0", "1", "2", "3", "4", "5", "6"].contains(&minor),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The chart's tests have more of them (`driver/tests/chart/values.rs`).
    #[test]
    fn copies_of_the_existing_driver_are_known() {
        for name in [
            "mcr.microsoft.com/oss/v2/kubernetes-csi/secrets-store/driver",
            "registry.cn-hangzhou.aliyuncs.com/acs/csi-secrets-store-driver",
            "quay.io/openshift/origin-secrets-store-csi-driver",
            "registry.redhat.io/openshift4/ose-secrets-store-csi-driver-rhel9",
            "cgr.dev/example.org/secrets-store-csi-driver-fips",
            "docker.io/deislabs/secrets-store-csi:v0.0.1",
            "localhost:5000/registry.k8s.io/csi-secrets-store/driver:v1.6.0",
            "mirror.example.org/oss-kubernetes-csi-secrets-store-driver",
        ] {
            assert!(is_copy(name), "{name}");
        }
        for name in [
            "secrets-store-csi",
            "registry.example.com/secrets-store-csi:0.1.0",
            "localhost:5000/secrets-store-csi",
            "reg.example.org/csi/driver",
            "mirror.example.org/deislabs-secrets-store-csi",
            "public.ecr.aws/aws-secrets-manager/secrets-store-csi-driver-provider-aws",
        ] {
            assert!(!is_copy(name), "{name}");
        }
    }

    #[test]
    fn versions_of_the_existing_driver_are_known() {
        for (tag, is_it) in [
            ("v1.6.0", true),
            ("v1.6.0-1", true),
            ("v1.0.1", true),
            ("v0.0.23", true),
            ("v0.1.0", false),
            ("v1.7.0", false),
            ("1.6.0", false),
            ("latest", false),
        ] {
            assert_eq!(is_of_existing(tag), is_it, "{tag}");
        }
    }
}
