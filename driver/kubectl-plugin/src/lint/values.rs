//! Checks values of the chart: of its own, or below its name in the values of a parent chart.

mod arguments;
mod image;
mod parent;
mod pattern;
mod pods;
mod refused;
mod schema;
mod unknown;

use super::{
    Findings,
    yaml::{Node, Value},
};

pub use parent::CHART;
pub(super) use parent::is_chart;
use parent::{Parent, Parents};
use unknown::{Finder, Kind, Unknown};

/// Keys, at the top level or below `linux`, of which a document certainly has values of the chart. Other charts
/// have the rest of its keys, too.
const SIGNS: [&str; 20] = [
    "syncSecret",
    "enableSecretRotation",
    "rotationPollInterval",
    "minRotationPollInterval",
    "providerHealthCheck",
    "providerHealthCheckInterval",
    "providerMaxCalls",
    "providerMaxBytes",
    "providerUIDs",
    "republishErrors",
    "maxCallRecvMsgSize",
    "tokenRequestsInSecrets",
    "linux.additionalProvidersDirs",
    "linux.crds",
    "linux.daemonsetAnnotations",
    "linux.driver",
    "linux.livenessProbeImage",
    "linux.metricsAddr",
    "linux.registrar",
    "linux.registrarImage",
];

/// Known keys below `linux` that few other charts have: with one of them, and without a key that is nothing like the
/// chart's, a document has values of the chart.
const HALF_SIGNS: [&str; 5] = [
    "env",
    "image",
    "livenessProbe",
    "minReadySeconds",
    "podSpec",
];

/// What the documents that are given together say of values in one of them.
pub(super) struct Together {
    parents: Parents,
    /// How many of them name an image of the driver.
    with_image: usize,
}

impl Together {
    /// Reads some documents, each with the name of its file.
    pub(super) fn of(documents: &[(&str, Node)]) -> Self {
        let parents = Parents::of(documents);
        let name_image = documents.iter().filter(|(file, document)| {
            let parent = parents.of_file(file);
            let sections = sections(document, parent);
            let mut values = sections.iter().map(|section| section.values);
            has_image(document) || values.any(has_image)
        });
        Self {
            with_image: name_image.count(),
            parents,
        }
    }
}

/// What the top level of a document is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Top {
    /// Values of the chart, and nothing else.
    Ours,
    /// Values of the chart, with others among them.
    Mixed,
    /// Something else, which may have values of the chart below its name.
    Other,
}

/// Values below the chart's name or alias, or at the top of a document.
struct Section<'a> {
    name: &'a str,
    line: usize,
    values: &'a Node,
    /// The chart of which it is a part, if that is known.
    parent: Option<&'a Parent>,
}

/// Checks a document without a kind. It is left alone if it does not look like values of the chart.
pub(super) fn check(document: &Node, together: &Together, file: &mut Findings<'_>) {
    let schema = match schema::of_chart() {
        Ok(schema) => schema,
        Err(why) => {
            let how = format!("the schema of the chart's values: {why}");
            return file.add(document.line, how);
        }
    };
    let finder = Finder::new(schema);
    let parent = together.parents.of_file(file.file);
    for section in sections(document, parent) {
        if check_section(&section, &finder, file) {
            check_values(section.values, schema, together, file);
        }
    }
    let top = top(document, parent, &finder);
    if top == Top::Other {
        return;
    }
    for unknown in finder.find(document) {
        let is_ours = top == Top::Ours || unknown.kind == Kind::Misspelt;
        if is_ours && !is_section(&unknown.path, parent) {
            file.add(unknown.line, unknown.message);
        }
    }
    check_values(document, schema, together, file);
}

/// Returns whether a document has values of the chart.
pub(super) fn are_values(document: &Node, file: &str, together: &Together) -> bool {
    let parent = together.parents.of_file(file);
    let has_section = !sections(document, parent).is_empty();
    let is_top = || {
        let schema = schema::of_chart();
        schema.is_ok_and(|schema| top(document, parent, &Finder::new(schema)) != Top::Other)
    };
    document.get("kind").is_none() && (has_section || is_top())
}

/// Returns the values below the names that the chart has in a parent chart, also below the names of other charts
/// that the parent chart is a parent of.
fn sections<'a>(document: &'a Node, parent: Option<&'a Parent>) -> Vec<Section<'a>> {
    let mut found = Vec::new();
    for (key, values) in document.fields() {
        match is_section(&key.text, parent) {
            true if values.is_map() => found.push(Section {
                name: &key.text,
                line: key.line,
                values,
                parent: parent.filter(|parent| parent.has_part()),
            }),
            true => {}
            false => found.extend(sections(values, None)),
        }
    }
    found
}

fn is_section(name: &str, parent: Option<&Parent>) -> bool {
    name == CHART || parent.is_some_and(|parent| parent.has_name(name))
}

/// Checks the keys below the chart's name. Returns whether the chart gets the values there.
fn check_section(section: &Section<'_>, finder: &Finder, file: &mut Findings<'_>) -> bool {
    let (name, values) = (section.name, section.values);
    if let Some(parent) = section.parent.filter(|parent| !parent.has_name(name)) {
        let names = parent.names.join(" or ");
        let how = format!(
            "Chart.yaml gives the chart {CHART} the alias {names}, so that Helm does not hand it the values below {name}; write them below {names}"
        );
        file.add(section.line, how);
        return false;
    }
    let unknown = finder.find(values);
    let is_switch = |unknown: &Unknown| is_switch(values, unknown);
    let is_foreign = |unknown: &&Unknown| unknown.kind == Kind::Foreign && !is_switch(unknown);
    let at_top = unknown.iter().filter(|unknown| unknown.is_at_top());
    // Something else than Helm may have keys of its own below the chart's name.
    let foreign = at_top.clone().filter(is_foreign).count();
    let known = values.fields().len() - at_top.count();
    let is_mixed = section.parent.is_none() && foreign > known;
    for unknown in unknown {
        let parent = section.parent;
        let is_condition = parent.is_some_and(|parent| parent.is_condition(name, &unknown.path));
        if is_condition || is_mixed && unknown.kind != Kind::Misspelt {
            continue;
        }
        let may_be_one = parent.is_none() && unknown.kind == Kind::Foreign && is_switch(&unknown);
        let hint = match may_be_one {
            true => format!(
                "; if it is the condition of a parent chart, keep that chart's Chart.yaml beside the file, with condition: {name}.{}",
                unknown.path
            ),
            false => String::new(),
        };
        file.add(unknown.line, unknown.message + &hint);
    }
    true
}

/// Returns whether a key at the top level is true or false.
fn is_switch(values: &Node, unknown: &Unknown) -> bool {
    let value = values.get(&unknown.path).map(|value| &value.value);
    matches!(value, Some(Value::Text(text) | Value::Other(text)) if text == "true" || text == "false")
}

/// Checks the values of known keys.
fn check_values(
    values: &Node,
    schema: &schema::Schema,
    together: &Together,
    file: &mut Findings<'_>,
) {
    let parent = together.parents.of_file(file.file);
    let are_defaults = parent.is_some_and(Parent::is_this);
    let others_name_image = are_defaults || together.with_image > usize::from(has_image(values));
    let mut add = |line, message: String| file.add(line, message);
    schema.check("", values.line, values, &mut add);
    refused::check(values, others_name_image, parent, &mut add);
}

fn has_image(values: &Node) -> bool {
    values
        .get("linux")
        .is_some_and(|linux| linux.get("image").is_some())
}

/// Tells what the top level of a document is.
fn top(document: &Node, parent: Option<&Parent>, finder: &Finder) -> Top {
    if parent.is_some_and(Parent::has_part) || document.fields().is_empty() {
        return Top::Other;
    }
    let unknown = finder.find(document);
    let count = |is_it: &dyn Fn(&Unknown) -> bool| unknown.iter().filter(|u| is_it(u)).count();
    let has_section = !sections(document, parent).is_empty();
    if has_sign(document) || image::is_drivers(document) {
        let foreign = count(&|u| u.is_at_top() && u.kind == Kind::Foreign);
        let elsewhere = count(&|u| u.is_at_top() && u.kind == Kind::Elsewhere);
        let others = foreign + elsewhere;
        let is_mixed = foreign > 0 && others * 2 > document.fields().len();
        return match has_section || is_mixed {
            true => Top::Mixed,
            false => Top::Ours,
        };
    }
    if image::is_providers(document) {
        return Top::Other;
    }
    let is_misspelt = |unknown: &Unknown| unknown.kind == Kind::Misspelt;
    let knows_all = unknown.iter().all(is_misspelt) && finder.has_key(document);
    let is_likely = has_half_sign(document) && count(&|u| u.kind == Kind::Foreign) == 0;
    match (knows_all || is_likely) && !has_section {
        true => Top::Ours,
        false => Top::Other,
    }
}

fn has_half_sign(document: &Node) -> bool {
    let linux = document.get("linux").map_or(&[][..], Node::fields);
    let mut keys = linux.iter().map(|(key, _)| key.text.as_str());
    keys.any(|key| HALF_SIGNS.contains(&key))
}

fn has_sign(document: &Node) -> bool {
    let is_sign = |key: &str| {
        let mut signs = SIGNS.iter();
        signs.any(|sign| key == *sign || key.starts_with(&format!("{sign}.")))
    };
    let linux = document.get("linux").map_or(&[][..], Node::fields);
    let below = linux.iter().map(|(key, _)| format!("linux.{}", key.text));
    let mut keys = document.fields().iter().map(|(key, _)| key.text.clone());
    keys.any(|key| is_sign(&key)) || below.into_iter().any(|key| is_sign(&key))
}
