//! Checks values of the chart: of its own, or below its name in the values of a parent chart.

use super::{
    Findings, meant,
    yaml::{self, Node, Value},
};

/// The values of the chart.
const VALUES: &str = include_str!("../../../../deploy/chart/values.yaml");

const CHART: &str = "secrets-store-csi-driver";

/// Values at a wrong place, and the right one.
const MOVED: [(&str, &str); 8] = [
    ("linux.enableSecretRotation", "enableSecretRotation"),
    ("linux.rotationPollInterval", "rotationPollInterval"),
    ("linux.syncSecret", "syncSecret"),
    ("syncSecret.enable", "syncSecret.enabled"),
    ("linux.resources", "linux.driver.resources"),
    ("linux.extraArgs", "linux.driver.extraArgs"),
    ("linux.logVerbosity", "logVerbosity"),
    ("enableRotation", "enableSecretRotation"),
];

/// Keys of which a document certainly has values of the chart.
const SIGNS: [&str; 4] = [
    "syncSecret",
    "enableSecretRotation",
    "rotationPollInterval",
    "providerHealthCheck",
];

/// Checks a document without a kind. It is left alone if it does not look like values of the chart.
pub(super) fn check(document: &Node, file: &mut Findings<'_>) {
    let Ok(known) = yaml::documents(VALUES) else {
        return;
    };
    let Some(known) = known.first() else { return };
    for (key, value) in document.fields() {
        if key.text == CHART {
            check_level(value, known, "", file);
        }
    }
    if has_sign(document) {
        check_level(document, known, "", file);
    }
}

/// Returns whether a document has values of the chart.
pub(super) fn are_values(document: &Node) -> bool {
    let below_name = document.fields().iter().any(|(key, _)| key.text == CHART);
    document.get("kind").is_none() && (below_name || has_sign(document))
}

fn has_sign(document: &Node) -> bool {
    let sign = |key: &str| {
        SIGNS
            .iter()
            .any(|sign| key == *sign || key.starts_with(&format!("{sign}.")))
    };
    document.fields().iter().any(|(key, _)| sign(&key.text))
}

/// Checks the keys of a map of values, and those below it.
fn check_level(values: &Node, known: &Node, path: &str, file: &mut Findings<'_>) {
    let names: Vec<_> = known
        .fields()
        .iter()
        .map(|(key, _)| key.text.as_str())
        .collect();
    for (key, value) in values.fields() {
        let here = if path.is_empty() {
            key.text.clone()
        } else {
            format!("{path}.{}", key.text)
        };
        if let Some((_, right)) = MOVED.iter().find(|(wrong, _)| *wrong == here) {
            file.add(
                key.line,
                format!("the chart has no value {here}; it is {right}"),
            );
            continue;
        }
        if key.text.contains('.') && names.contains(&key.text.split('.').next().unwrap_or_default())
        {
            let parts: Vec<_> = key.text.split('.').collect();
            file.add(
                key.line,
                format!(
                    "{} is one key with dots in it, which Helm does not take apart; write {}",
                    key.text,
                    parts.join(": {") + ": ..." + &"}".repeat(parts.len() - 1)
                ),
            );
            continue;
        }
        let field = known
            .fields()
            .iter()
            .find(|(name, _)| name.text == key.text);
        match field {
            None => {
                if let Some(name) = meant(&key.text, &names) {
                    file.add(
                        key.line,
                        format!("the chart has no value {here}; write {name}"),
                    );
                }
            }
            Some((_, default)) => match (&default.value, &value.value) {
                (Value::Map(fields), Value::Map(_)) if !fields.is_empty() => {
                    // Windows has the values of Linux.
                    check_level(value, default, &here, file);
                }
                (Value::Map(fields), Value::Text(_) | Value::Other(_)) if !fields.is_empty() => {
                    let inside: Vec<_> = fields.iter().map(|(key, _)| key.text.as_str()).collect();
                    file.add(
                        value.line,
                        format!("{here} has values below it: {}", inside.join(", ")),
                    );
                }
                (Value::Other(text), Value::Text(said))
                    if (text == "true" || text == "false") && said != "true" =>
                {
                    file.add(value.line, format!("{here} is true or false, without quotes: Helm takes the text {said:?} for true"));
                }
                _ => {}
            },
        }
    }
}
