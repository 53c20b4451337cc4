//! Reads the driver's sources: their texts, and the names of all tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::pages::repository;

/// Adds the Rust files below a directory.
fn rust_files(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Returns the driver's code without its unit tests, as one text. Literals that are continued in the
/// next line are joined, and quotes in them are as they are printed.
pub(crate) fn texts() -> String {
    texts_below("driver/src")
}

/// Returns the same of the files below one directory.
pub(crate) fn texts_below(directory: &str) -> String {
    let mut files = Vec::new();
    rust_files(&repository(directory), &mut files);
    let mut texts = String::new();
    for file in files {
        let source = fs::read_to_string(&file).unwrap();
        let code = source.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let mut continued = false;
        for line in code.lines() {
            let line = if continued { line.trim_start() } else { line };
            continued = line.ends_with('\\');
            texts += line.trim_end_matches('\\');
            if !continued {
                texts.push('\n');
            }
        }
    }
    texts.replace("\\\"", "\"")
}

/// Returns the literals of the driver's code that begin with a prefix, without it. A prefix ends a name of
/// an annotation or attribute only with letters and `-` behind it.
pub(crate) fn names_with(prefix: &str) -> BTreeSet<String> {
    let texts = texts();
    let opening = format!("\"{prefix}");
    let found = texts.match_indices(&opening).map(|(at, _)| {
        let rest = &texts[at + opening.len()..];
        rest[..rest.find('"').unwrap()].to_owned()
    });
    found
        .filter(|name| !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '-'))
        .collect()
}

/// Returns the names of the checks in some code of the kubectl plugin: in the first column of its tables of checks,
/// in its list of others, and where a check that is in none makes its trouble.
pub(crate) fn checks(code: &str) -> BTreeSet<&str> {
    fn names<'a>(code: &'a str, before: &str) -> Vec<&'a str> {
        let rest = code.split(before).skip(1);
        rest.filter_map(|rest| rest.split('"').next()).collect()
    }
    let mut checks = BTreeSet::new();
    for list in code.split("const OTHERS: [&str; ").skip(1) {
        let (list, _) = list.split_once("];").unwrap();
        checks.extend(list.split('"').skip(1).step_by(2));
    }
    for kind in ["OfPod", "OfVolume", "OfCluster", "OfNode"] {
        for table in code.split(&format!("{kind})] = &[\n")).skip(1) {
            let (rows, _) = table.split_once("\n];\n").unwrap();
            checks.extend(names(rows, "(\""));
        }
    }
    for before in ["trouble(\"", "cannot(\"", "check: \""] {
        checks.extend(names(code, before));
    }
    checks
}

/// Returns the names of all test functions of the workspace. A scenario of the known providers, which a
/// macro makes, is a function with its name.
pub(crate) fn tests() -> BTreeSet<String> {
    let mut files = Vec::new();
    for directory in ["driver", "e2e", "fake-provider"] {
        for part in ["src", "tests"] {
            rust_files(&repository(directory).join(part), &mut files);
        }
    }
    let mut names = BTreeSet::new();
    for file in files {
        let source = fs::read_to_string(&file).unwrap();
        let tests = ["#[test]", "#[tokio::test", "#[rstest]"];
        let mut is_test = file.ends_with("e2e/tests/scenarios/known.rs");
        for line in source.lines().map(str::trim) {
            if tests.iter().any(|start| line.starts_with(start)) {
                is_test = true;
            } else if let Some((_, rest)) = line.split_once("fn ").filter(|_| is_test) {
                let end = rest.find(['(', '<']).unwrap_or(rest.len());
                names.insert(rest[..end].to_owned());
                is_test = file.ends_with("e2e/tests/scenarios/known.rs");
            }
        }
    }
    names
}
