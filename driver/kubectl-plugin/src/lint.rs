//! Finds mistakes in files, each with its line and what to do about it.
//!
//! What a rule does not know for certain, it says nothing about: a false alarm costs more than a mistake that
//! the driver reports later.

pub(crate) mod annotations;
mod class;
mod keys;
mod metadata;
pub(crate) mod names;
pub(crate) mod paths;
mod pod;
mod provider;
mod references;
mod secret_objects;
mod secrets;
mod values;
mod yaml;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::Serialize;

use class::Class;
use names::{check_fields, meant};
use yaml::{Node, Value};

use crate::text::visible;

pub use values::CHART;

/// A file with YAML documents.
#[derive(Debug, Clone)]
pub struct File {
    /// The name, for messages.
    pub name: String,
    /// The content.
    pub text: String,
}

/// A mistake.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// The name of the file.
    pub file: String,
    /// The line, counted from 1.
    pub line: usize,
    /// What is wrong and what to write instead.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = visible(&self.file);
        write!(f, "{file}:{}: {}", self.line, visible(&self.message))
    }
}

/// The findings of one file.
struct Findings<'a> {
    file: &'a str,
    all: &'a mut Vec<Finding>,
}

impl Findings<'_> {
    fn add(&mut self, line: usize, message: impl Into<String>) {
        self.all.push(Finding {
            file: self.file.to_owned(),
            line,
            message: message.into(),
        });
    }
}

/// The classes of all files, by namespace and name. A class without a namespace has the empty one.
type Classes = BTreeMap<(String, String), Class>;

/// What the files have that a pod can use.
#[derive(Default)]
struct Surroundings<'a> {
    classes: Classes,
    /// The names of Secrets that something other than a class makes.
    others: BTreeSet<&'a str>,
    /// The namespace that kubectl is told, or kustomize.
    namespace: Option<&'a str>,
    /// Whether Helm has rendered them, which gives objects without a namespace that of the release.
    is_rendered: bool,
}

/// Finds the mistakes in some files, which belong together. They are in the order of files and lines.
pub fn lint(files: &[File]) -> Vec<Finding> {
    lint_in(files, None)
}

/// Finds the mistakes in some files, whose objects without a namespace go to one that is given.
pub fn lint_in(files: &[File], namespace: Option<&str>) -> Vec<Finding> {
    let mut all = Vec::new();
    let mut documents: Vec<(&str, Node)> = Vec::new();
    for file in files {
        match yaml::documents(&file.text) {
            Ok(read) => documents.extend(read.into_iter().map(|node| (file.name.as_str(), node))),
            Err((line, message)) => all.push(Finding {
                file: file.name.clone(),
                line,
                message,
            }),
        }
    }
    let together = values::Together::of(&documents);
    let others = documents.iter().flat_map(|(_, d)| secrets::others(d));
    let mut kustomized = documents.iter().filter_map(|(_, d)| kustomized(d));
    let mut around = Surroundings {
        classes: Classes::new(),
        others: others.collect(),
        namespace: namespace.or_else(|| kustomized.next()),
        is_rendered: files.iter().any(is_rendered),
    };
    check_classes(&documents, &mut around.classes, &mut all);
    for (file, document) in &documents {
        let file = &mut Findings {
            file,
            all: &mut all,
        };
        match document.text_of("kind") {
            Some(_) if class::is_class(document) => {}
            Some(_) => pod::check(document, &around, file),
            None => values::check(document, &together, file),
        }
    }
    in_order(all, files)
}

/// Checks the classes, alone and with each other.
fn check_classes(documents: &[(&str, Node)], classes: &mut Classes, all: &mut Vec<Finding>) {
    let mut checked: Vec<secrets::Checked<'_>> = Vec::new();
    for (name, document) in documents {
        if !class::is_class(document) {
            continue;
        }
        let file = &mut Findings { file: name, all };
        let key = identity(document);
        let class = class::check(document, file);
        let line = document.get("metadata").map_or(document.line, |m| m.line);
        let first = checked.iter().find(|other| other.key == key);
        if let Some(first) = first.filter(|_| !key.1.is_empty()) {
            file.add(line, format!("the class {} is there twice, also in {}:{}; the last one that is applied counts", key.1, first.file, first.line));
        } else {
            secrets::check_owners(document, &key, &class, &checked, file);
        }
        checked.push(secrets::Checked {
            file: name,
            line,
            secrets: class
                .secrets
                .iter()
                .map(|(n, s)| (n.clone(), s.line))
                .collect(),
            key: key.clone(),
            document,
        });
        classes.insert(key, class);
    }
}

fn in_order(mut all: Vec<Finding>, files: &[File]) -> Vec<Finding> {
    all.sort();
    all.dedup();
    let order: BTreeMap<_, _> = files
        .iter()
        .enumerate()
        .map(|(n, f)| (&f.name, n))
        .collect();
    all.sort_by_key(|finding| (order.get(&finding.file).copied(), finding.line));
    all
}

/// The most files that a note lists.
const LISTED: usize = 5;

/// Says which files have nothing to check: those that are neither manifests nor values of the chart, and all of them
/// if none has a class, a pod, a workload or values.
pub fn nothing_to_check(files: &[File]) -> Option<String> {
    let mut documents: Vec<(&str, Node)> = Vec::new();
    // A file that cannot be read as YAML has a finding.
    let mut has_something = false;
    for file in files {
        match yaml::documents(&file.text) {
            Ok(read) => documents.extend(read.into_iter().map(|node| (file.name.as_str(), node))),
            Err(_) => has_something = true,
        }
    }
    let together = values::Together::of(&documents);
    let is_values = |file: &str, node: &Node| values::are_values(node, file, &together);
    has_something |= documents
        .iter()
        .any(|(file, node)| class::is_class(node) || pod::is_pod(node) || is_values(file, node));
    let is_strange = |file: &str, node: &Node| {
        let is_known = node.get("kind").is_some() || is_kustomization(node);
        !is_known && !values::is_chart(node) && !is_values(file, node)
    };
    let strange = documents
        .iter()
        .filter(|(file, node)| is_strange(file, node));
    let mut strange: Vec<_> = strange.map(|(file, _)| visible(file)).collect();
    strange.dedup();
    if has_something && strange.is_empty() {
        return None;
    }
    let all = files.iter().map(|file| visible(&file.name)).collect();
    let (names, what) = match strange.is_empty() {
        true => (all, "no class, pod, workload or values of the chart"),
        false => (
            strange,
            "neither a manifest, for it has no kind, nor values of the chart, for it has no key of this chart alone",
        ),
    };
    Some(format!("nothing to check in {}: {what}", some_of(names)))
}

/// Joins names, if they are not too many.
fn some_of(mut names: Vec<String>) -> String {
    let others = names.len() > LISTED;
    names.truncate(LISTED);
    match (names.is_empty(), others) {
        (true, _) => "no YAML file".to_owned(),
        (false, true) => format!("{} and others", names.join(", ")),
        (false, false) => names.join(", "),
    }
}

fn is_rendered(file: &File) -> bool {
    let mut lines = file.text.lines();
    lines.any(|line| line.starts_with("# Source: "))
}

/// Returns the namespace that a kustomization gives to all objects.
fn kustomized(document: &Node) -> Option<&str> {
    let is_it = document.text_of("kind") == Some("Kustomization") || is_kustomization(document);
    document.text_of("namespace").filter(|_| is_it)
}

/// Returns whether a document is a kustomization that does not say so.
fn is_kustomization(document: &Node) -> bool {
    let resources = document.get("resources").map(|resources| &resources.value);
    document.get("kind").is_none() && matches!(resources, Some(Value::List(_)))
}

/// Returns the namespace and the name of an object.
fn identity(object: &Node) -> (String, String) {
    let metadata = object.get("metadata");
    let field = |name| {
        let value = metadata.and_then(|metadata| metadata.text_of(name));
        value.unwrap_or_default().to_owned()
    };
    (field("namespace"), field("name"))
}
