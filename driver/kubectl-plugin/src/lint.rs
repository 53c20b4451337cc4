//! Finds mistakes in files, each with its line and what to do about it.
//!
//! What a rule does not know for certain, it says nothing about: a false alarm costs more than a mistake that
//! the driver reports later.

mod class;
mod pod;
mod values;
mod yaml;

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

use class::Class;
use yaml::Node;

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
        write!(f, "{}:{}: {}", self.file, self.line, self.message)
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

/// Finds the mistakes in some files, which belong together. They are in the order of files and lines.
pub fn lint(files: &[File]) -> Vec<Finding> {
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
    let mut classes = Classes::new();
    for (file, document) in &documents {
        if document.text_of("kind") == Some("SecretProviderClass") {
            let file = &mut Findings {
                file,
                all: &mut all,
            };
            let key = identity(document);
            let class = class::check(document, file);
            if classes.insert(key.clone(), class).is_some() && !key.1.is_empty() {
                let line = document.get("metadata").map_or(document.line, |m| m.line);
                file.add(line, format!("there is another class {} in these files; the last one that is applied counts", key.1));
            }
        }
    }
    for (file, document) in &documents {
        let file = &mut Findings {
            file,
            all: &mut all,
        };
        match document.text_of("kind") {
            Some("SecretProviderClass") => {}
            Some(_) => pod::check(document, &classes, file),
            None => values::check(document, file),
        }
    }
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

/// Returns the namespace and the name of an object.
fn identity(object: &Node) -> (String, String) {
    let metadata = object.get("metadata");
    let field = |name| {
        let value = metadata.and_then(|metadata| metadata.text_of(name));
        value.unwrap_or_default().to_owned()
    };
    (field("namespace"), field("name"))
}

/// Returns the name that is meant by one that is not known, if it is only a little different.
fn meant<'a>(wrong: &str, known: &[&'a str]) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace(['-', '_', '.'], "");
    let wrong = plain(wrong);
    let close = known
        .iter()
        .map(|name| (distance(&wrong, &plain(name)), *name));
    let (distance, name) = close.min()?;
    (distance <= 2 && distance * 3 <= name.len()).then_some(name)
}

/// Returns the number of letters that have to be changed (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().take(64).enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.chars().enumerate() {
            let changed = corner + usize::from(x != y);
            corner = row[j + 1];
            row[j + 1] = changed.min(corner + 1).min(row[j] + 1);
        }
    }
    row.last().copied().unwrap_or_default()
}

/// Adds a finding for each field of a map that is not known. `what` is the map, in words.
fn check_fields(map: &Node, what: &str, known: &[&str], file: &mut Findings<'_>) {
    for (key, _) in map.fields() {
        if known.contains(&key.text.as_str()) {
            continue;
        }
        let instead = match meant(&key.text, known) {
            Some(name) => format!("write {name}"),
            None => format!("it has {}", known.join(", ")),
        };
        file.add(
            key.line,
            format!("{what} has no field {}; {instead}", key.text),
        );
    }
}
