//! Images: the chart refuses those that it cannot run, those that no node can pull, and names with a tag in them.

use super::{
    refused::{at, is},
    schema::Add,
};
use crate::lint::yaml::{Node, Value};

/// The images of the existing driver that the chart replaces by its own.
const REPLACED: [&str; 3] = [
    "registry.k8s.io/csi-secrets-store/driver",
    "k8s.gcr.io/csi-secrets-store/driver",
    "us.gcr.io/k8s-artifacts-prod/csi-secrets-store/driver",
];

const CHART_YAML: &str = include_str!("../../../../../deploy/chart/Chart.yaml");

/// Finds an image of the driver that the chart refuses. Where other values that are given with these name an image,
/// too, Helm may merge the two, and only what is wrong in itself is found.
pub(super) fn check(values: &Node, others_name_image: bool, add: Add<'_>) {
    let found = match wrong(values) {
        None if !others_name_image => unpullable(values),
        found => found,
    };
    if let Some((line, message)) = found {
        add(line, message);
    }
}

/// Finds repositories of sidecars with a tag in them.
pub(super) fn check_sidecars(values: &Node, add: Add<'_>) {
    for name in ["linux.registrarImage", "linux.livenessProbeImage"] {
        let repository = text_at(values, &format!("{name}.repository"));
        if let Some((line, repository)) = repository.filter(|(_, text)| has_version(text)) {
            add(line, with_version(name, repository));
        }
    }
}

/// Returns whether values name this driver's image, or the existing driver's.
pub(super) fn is_drivers(values: &Node) -> bool {
    text_at(values, "linux.image.repository").is_some_and(|(_, name)| {
        let plain = match name.rsplit_once(['@', ':']) {
            Some((plain, _)) if has_version(name) => plain,
            _ => name,
        };
        REPLACED.contains(&name) || is_copy(name) || is_below(plain, "secrets-store-csi", "/")
    })
}

/// Returns whether values are rather those of a provider's chart, which has some values of the same names.
pub(super) fn is_providers(values: &Node) -> bool {
    let repository = text_at(values, "linux.image.repository");
    repository.is_some_and(|(_, name)| name.contains("provider"))
        || values.get("metricsAddr").is_some()
}

/// Returns what is wrong with an image, whatever other values there are.
fn wrong(values: &Node) -> Option<(usize, String)> {
    let repository = text_at(values, "linux.image.repository");
    let is_replaced = repository.is_some_and(|(_, name)| REPLACED.contains(&name));
    if let Some((line, name)) = repository.filter(|(_, name)| !is_replaced && is_copy(name)) {
        let message = format!(
            "linux.image.repository={name} is a copy of the existing driver's image, which this chart cannot run: copy this driver's image to your registry, under a name that ends in secrets-store-csi"
        );
        return Some((line, message));
    }
    if let Some((line, name)) = repository.filter(|(_, name)| has_version(name)) {
        return Some((line, with_version("linux.image", name)));
    }
    let has_digest =
        text_at(values, "linux.image.digest").is_some_and(|(_, digest)| !digest.is_empty());
    let (line, tag) = text_at(values, "linux.image.tag").filter(|(_, tag)| is_of_existing(tag))?;
    if has_digest || is_replaced {
        return None;
    }
    let message = format!(
        "linux.image.tag={tag} is a version of the existing driver, which this chart cannot run; leave linux.image.tag out, or write the one of your copy of this driver's image"
    );
    Some((line, message))
}

/// Returns what is wrong with an image that no node can pull, and that need not be on each node already.
fn unpullable(values: &Node) -> Option<(usize, String)> {
    let (line, image) = at(values, "linux.image")?;
    let never = at(values, "linux.image.pullPolicy").is_some_and(|(_, policy)| is(policy, "Never"));
    if never {
        return None;
    }
    let own = own_image()?;
    let instead = "push this driver's image to your registry, and write linux.image.repository: REGISTRY/secrets-store-csi (Docker Hub is docker.io/NAME), or linux.image.pullPolicy: Never if you have loaded it on every node";
    let (line, what, name) = match (&image.value, at(values, "linux.image.repository")) {
        (Value::Null, _) => (line, "linux.image is null".to_owned(), own),
        (_, Some((line, repository))) => match &repository.value {
            Value::Null => (line, "linux.image.repository is null".to_owned(), own),
            Value::Text(text) if text.is_empty() => {
                (line, "linux.image.repository is empty".to_owned(), own)
            }
            Value::Text(text) if REPLACED.contains(&text.as_str()) => (
                line,
                format!("linux.image.repository={text} is the existing driver's image"),
                own,
            ),
            Value::Text(text) => (line, String::new(), text.as_str()),
            Value::Other(_) | Value::List(_) | Value::Map(_) => return None,
        },
        (_, None) => return None,
    };
    let begin = match what.is_empty() {
        true => format!("linux.image.repository={name}"),
        false => format!("{what}, in the place of which the chart has its own, {name}: it"),
    };
    let message = format!("{begin} names no registry to pull it from; {instead}");
    Some((line, message)).filter(|_| !has_registry(name))
}

fn with_version(image: &str, repository: &str) -> String {
    format!(
        "{image}.repository={repository} has a tag or a digest in it, and the chart adds one; write a tag in {image}.tag, and a digest in {image}.digest"
    )
}

/// Returns whether a repository has a tag or a digest behind its name. A port has a slash behind it.
fn has_version(repository: &str) -> bool {
    let last = repository.rsplit('/').next().unwrap_or(repository);
    repository.contains('@') || last.contains(':')
}

fn has_registry(repository: &str) -> bool {
    let first = repository.split_once('/').map(|(first, _)| first);
    first.is_some_and(|first| first.contains(['.', ':']) || first == "localhost")
}

/// Returns the image that the chart has in the place of none and of the existing driver's.
fn own_image() -> Option<&'static str> {
    let mut lines = CHART_YAML.lines();
    lines.find_map(|line| line.trim().strip_prefix("driverImage: "))
}

fn text_at<'a>(values: &'a Node, path: &str) -> Option<(usize, &'a str)> {
    let (line, value) = at(values, path)?;
    Some((line, value.text()?))
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

    /// The chart's tests have more of them (`driver/tests/chart/images.rs`).
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

    #[test]
    fn a_port_is_no_tag() {
        for (repository, is_it) in [
            ("localhost:5000/secrets-store-csi", false),
            ("localhost:5000/secrets-store-csi:1", true),
            ("secrets-store-csi:1", true),
            ("r.io/x@sha256:0", true),
            ("r.io/x@", true),
            ("x", false),
        ] {
            assert_eq!(has_version(repository), is_it, "{repository}");
        }
    }

    #[test]
    fn the_chart_names_its_image() {
        assert!(own_image().is_some());
    }
}
