//! Runs the plugin on a corpus: each mistake is found at its line with its fix, and good manifests have no
//! findings.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kubectl-secrets_store"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn lint(file: &Path) -> (Option<i32>, Vec<Value>) {
    let output = run(&["lint", "-o", "json", file.to_str().unwrap()]);
    let found = serde_json::from_slice(&output.stdout);
    (
        output.status.code(),
        found.unwrap_or_else(|error| panic!("{error}: {output:?}")),
    )
}

/// Returns the YAML files of a directory of this repository.
fn files(directory: &str) -> Vec<PathBuf> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let entries = fs::read_dir(repository.join(directory)).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    files
}

#[test]
fn each_mistake_is_found_at_its_line_with_its_fix() {
    let all = files("driver/kubectl-plugin/tests/mistakes");
    assert!(all.len() >= 40, "{}", all.len());
    let mut wrong = Vec::new();
    let mut slowest = Duration::ZERO;
    for path in &all {
        let text = fs::read_to_string(path).unwrap();
        let expected = text
            .lines()
            .next()
            .unwrap()
            .strip_prefix("# line ")
            .unwrap();
        let (line, piece) = expected.split_once(": ").unwrap();
        let started = Instant::now();
        let (code, found) = lint(path);
        slowest = slowest.max(started.elapsed());
        let is_it = |f: &Value| {
            f["line"] == line.parse::<u64>().unwrap()
                && f["message"].as_str().unwrap().contains(piece)
        };
        if code != Some(1) || found.len() != 1 || !found.iter().all(is_it) {
            wrong.push(format!(
                "{}: line {line}, {piece:?}: {found:#?}",
                path.display()
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Two seconds on a quiet machine; a busy one gets more.
    assert!(slowest < Duration::from_secs(30), "{slowest:?}");
}

#[test]
fn good_manifests_have_no_findings() {
    let own = [
        "deploy",
        "deploy/lean",
        "deploy/chart",
        "deploy/chart/crds",
        "driver/tests/chart",
        "e2e/demo",
        "e2e/manifests",
        "e2e/manifests/providers",
        "e2e/embedded/examples/greeting",
        "kind",
    ];
    let mut all = files("driver/kubectl-plugin/tests/good");
    assert!(all.len() >= 60, "{}", all.len());
    all.extend(own.into_iter().flat_map(files));
    let mut wrong = Vec::new();
    for path in &all {
        let (code, found) = lint(path);
        if code != Some(0) || !found.is_empty() {
            wrong.push(format!("{}: {found:#?}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn findings_are_lines_for_people_and_codes_for_machines() {
    let mistakes = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/mistakes");
    let path = mistakes.join("class-group.yaml");
    let output = run(&["lint", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.starts_with(&format!("{}:2: apiVersion", path.display())),
        "{text}"
    );
    // A directory is all of its files.
    let output = run(&["lint", mistakes.to_str().unwrap()]);
    assert!(String::from_utf8(output.stdout).unwrap().lines().count() >= 40);
    for (args, code) in [
        (&["lint"][..], 2),
        (&["lint", "-x"], 2),
        (&["lint", "-o", "yaml", "x"], 2),
        (&["lint", "/no/such/file"], 2),
        (&["explain"], 2),
        (&["explain", "service", "web"], 2),
        (&["doctor", "web"], 2),
        (&["--help"], 0),
    ] {
        assert_eq!(run(args).status.code(), Some(code), "{args:?}");
    }
}
