//! Values with which the driver's pods cannot start, or nobody finds them. The chart refuses the same (`_check.tpl`,
//! `sscd.checkPods`).

use super::{
    parent::{CHART, Parent},
    refused::{at, is_builtin},
    schema::Add,
};
use crate::lint::yaml::{Node, Value};

/// The memory limit below which the driver has no room for content.
const LEAST_MEMORY: f64 = 64.0 * 1024.0 * 1024.0;

/// The ports that the chart has by default: of kubelet's probe, and of the metrics.
const PORTS: (&str, &str) = ("9808", "8095");

/// What the chart may have in front of `limits.memory`, the one that goes before others first.
const RESOURCES: [&str; 3] = [
    "linux.driver.container.resources",
    "linux.driver.builtinResources",
    "linux.driver.resources",
];

/// Checks values for what keeps pods from starting or from being found.
pub(super) fn check(values: &Node, parent: Option<&Parent>, add: Add<'_>) {
    check_ports(values, add);
    check_labels(values, parent, add);
    check_root(values, add);
    check_memory(values, add);
}

/// Finds one port for the metrics and the probe.
fn check_ports(values: &Node, add: Add<'_>) {
    let probe = at(values, "livenessProbe.port");
    let metrics = at(values, "linux.metricsAddr");
    let port = probe.map_or(Some(PORTS.0), |(_, port)| word(port));
    let address = metrics.map_or(Some(PORTS.1), |(_, address)| word(address));
    let other = address.and_then(|address| address.rsplit(':').next());
    let line = probe.or(metrics).map(|(line, _)| line);
    if let (Some(port), Some(line)) = (port.filter(|_| port == other), line) {
        let how = format!(
            "livenessProbe.port and linux.metricsAddr have the same port, {port}, which only one of them can have; write another one"
        );
        add(line, how);
    }
}

/// Finds a label `app` other than the one in the DaemonSet's selector.
fn check_labels(values: &Node, parent: Option<&Parent>, add: Add<'_>) {
    let name = at(values, "nameOverride").and_then(|(_, name)| word(name));
    let name = name.filter(|name| !name.is_empty());
    let is_right = |app: &str| match name {
        Some(name) => app == name,
        // An alias is a name, too.
        None => app == CHART || parent.is_some_and(|parent| parent.has_name(app)),
    };
    for path in ["commonLabels.app", "linux.podLabels.app"] {
        let label = at(values, path).and_then(|(line, app)| Some((line, word(app)?)));
        if let Some((line, app)) = label.filter(|(_, app)| !app.is_empty() && !is_right(app)) {
            let right = name.unwrap_or(CHART);
            let how = format!(
                "{path}={app} is not what the DaemonSet finds its pods by, app={right}; leave it out, or write another label"
            );
            add(line, how);
        }
    }
}

/// Finds the directory of pods in the place of the one above it.
fn check_root(values: &Node, add: Add<'_>) {
    let Some((line, root)) = at(values, "linux.kubeletRootDir") else {
        return;
    };
    let root = root.text().unwrap_or_default();
    if let Some(above) = root.trim_end_matches('/').strip_suffix("/pods") {
        let how = format!(
            "linux.kubeletRootDir={root} is kubelet's directory of pods; write the directory above it, {above}"
        );
        add(line, how);
    }
}

/// Finds a memory limit that is too small.
fn check_memory(values: &Node, add: Add<'_>) {
    let is_builtin = is_builtin(values);
    let of = |resources: &str| at(values, &format!("{resources}.limits.memory"));
    let mut used = RESOURCES
        .iter()
        .filter(|resources| is_builtin || !resources.ends_with("builtinResources"));
    let Some((resources, (line, limit))) =
        used.find_map(|resources| Some((resources, of(resources)?)))
    else {
        return;
    };
    let Some(limit) = word(limit) else { return };
    if bytes(limit).is_some_and(|bytes| bytes < LEAST_MEMORY) {
        let how = format!(
            "{resources}.limits.memory is {limit}, and the driver needs 64Mi or more (docs/chart.md, Memory)"
        );
        add(line, how);
    }
}

/// Returns a quantity of Kubernetes in bytes, if it is written in a way that is known here.
fn bytes(quantity: &str) -> Option<f64> {
    let end = quantity.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = quantity.split_at(end.unwrap_or(quantity.len()));
    let factor = match unit {
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "Ki" => 1024.0,
        "Mi" => 1024.0 * 1024.0,
        "Gi" => 1024.0 * 1024.0 * 1024.0,
        "Ti" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

/// Returns a value that is one word, in quotes or not.
fn word(value: &Node) -> Option<&str> {
    match &value.value {
        Value::Text(text) | Value::Other(text) => Some(text),
        Value::Null | Value::List(_) | Value::Map(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_bytes() {
        for (quantity, expected) in [
            ("64Mi", Some(LEAST_MEMORY)),
            ("0.5Gi", Some(8.0 * LEAST_MEMORY)),
            ("67108864", Some(LEAST_MEMORY)),
            ("64M", Some(64e6)),
            ("128e6", None),
            ("lots", None),
            ("", None),
        ] {
            assert_eq!(bytes(quantity), expected, "{quantity}");
        }
    }
}
