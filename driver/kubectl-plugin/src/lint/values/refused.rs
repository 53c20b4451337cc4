//! What the templates of the chart refuse, beyond its schema: values that are missing, Windows, images, arguments,
//! monitors without metrics, and what keeps pods from starting.

use super::{arguments, image, parent::Parent, pods, schema::Add};
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

/// The values of the chart that need metrics.
const OF_METRICS: [&str; 5] = [
    "metricsService",
    "podMonitor",
    "serviceMonitor",
    "prometheusRule",
    "grafanaDashboard",
];

/// Checks values for what the schema does not say. Other values that are given with them may name an image, too.
pub(super) fn check(values: &Node, others_name_image: bool, parent: Option<&Parent>, add: Add<'_>) {
    check_needed(values, add);
    if let Some((line, _)) = at(values, "windows.enabled").filter(|(_, value)| is(value, "true")) {
        add(line, "windows.enabled is true, and this driver is for Linux only: write false; nodes with Windows keep the existing driver (docs/install.md, Windows nodes)".to_owned());
    }
    if !is_off(values) {
        image::check(values, others_name_image, add);
        if !is_builtin(values) {
            image::check_sidecars(values, add);
        }
        arguments::check(values, add);
        check_metrics(values, add);
        pods::check(values, parent, add);
    }
}

/// Finds values that are null and must not be.
fn check_needed(values: &Node, add: Add<'_>) {
    let is_builtin = is_builtin(values);
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

pub(super) fn is_builtin(values: &Node) -> bool {
    at(values, "sidecars").is_some_and(|(_, value)| is(value, "builtin"))
}

/// Returns whether a value is a word, in quotes or not: so the chart reads its switches (`sscd.on`).
pub(super) fn is(value: &Node, word: &str) -> bool {
    matches!(&value.value, Value::Text(text) | Value::Other(text) if text == word)
}

/// Returns the value of a full key, with the key's line.
pub(super) fn at<'a>(values: &'a Node, path: &str) -> Option<(usize, &'a Node)> {
    let mut found = (values.line, values);
    for part in path.split('.') {
        let mut fields = found.1.fields().iter();
        let (key, value) = fields.find(|(key, _)| key.text == part)?;
        found = (key.line, value);
    }
    Some(found)
}
