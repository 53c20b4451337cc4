//! Runs the plugin on a corpus: each mistake is found at its line with its fix, and good manifests have no
//! findings.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use kubectl_secrets_store::lint::{File, Finding, lint_in, nothing_to_check};
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

/// Returns the files of the corpus: those of a directory, and the values below it that have a `Chart.yaml`.
fn corpus(name: &str) -> Vec<PathBuf> {
    let directory = format!("driver/kubectl-plugin/tests/{name}");
    let mut all = files(&directory);
    for chart in ["parent-alias", "parent-other-name"] {
        let beside = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests")
            .join(name);
        all.extend(
            [beside.join(chart).join("values.yaml")]
                .into_iter()
                .filter(|f| f.is_file()),
        );
    }
    all
}

#[test]
fn each_mistake_is_found_at_its_line_with_its_fix() {
    let all = corpus("mistakes");
    assert!(all.len() >= 177, "{}", all.len());
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
    let mut all = corpus("good");
    assert!(all.len() >= 112, "{}", all.len());
    all.extend(own.into_iter().flat_map(files));
    // The chart has its own image in the place of the existing driver's, and refuses it as long as it has no registry.
    all.retain(|path| !path.ends_with("driver/tests/chart/values-of-1.6.yaml"));
    let mut wrong = Vec::new();
    for path in &all {
        let (code, found) = lint(path);
        if code != Some(0) || !found.is_empty() {
            wrong.push(format!("{}: {found:#?}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Every piece of values in the book, as `yaml values` marks them.
#[test]
fn the_values_of_the_book_have_no_findings() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let mut directories = vec![docs];
    let (mut count, mut wrong) = (0, Vec::new());
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let Ok(text) = fs::read_to_string(&path) else {
                continue;
            };
            for block in text.split("```yaml values\n").skip(1) {
                let text = block.split("```").next().unwrap().to_owned();
                let name = path.display().to_string();
                let file = [File { name, text }];
                wrong.extend(lint_in(&file, None).iter().map(ToString::to_string));
                wrong.extend(nothing_to_check(&file));
                count += 1;
            }
        }
    }
    assert!(count >= 10, "{count}");
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

fn named(name: &str) -> File {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join(name);
    File {
        name: name.to_owned(),
        text: fs::read_to_string(path).unwrap(),
    }
}

#[test]
fn a_given_namespace_is_that_of_objects_without_one() {
    for name in [
        "mistakes/namespace-of-pod.yaml",
        "mistakes/namespace-of-class.yaml",
    ] {
        let files = [named(name)];
        assert!(lint_in(&files, Some("t25")).is_empty(), "{name}");
        let found = lint_in(&files, Some("shop"));
        let says = |f: &Finding| f.message.contains("goes to shop") && f.message.contains("t25");
        assert!(found.len() == 1 && found.iter().all(says), "{found:?}");
    }
    // Of two classes of the name it is the one in that namespace.
    let mut both = named("mistakes/namespace-of-class.yaml");
    let other = both.text.replace("namespace: t25", "namespace: bank");
    both.text.push_str(&format!("---\n{other}"));
    assert_eq!(lint_in(&[both], Some("t25")), []);
}

/// Helm merges the values that are given with it, so that an image may be in two files.
#[test]
fn an_image_that_another_file_may_name_is_left_to_helm() {
    let file = |name: &str, image: &str| File {
        name: name.to_owned(),
        text: format!("linux: {{image: {image}}}"),
    };
    let unpullable = file("a", "{repository: team/secrets-store-csi}");
    let found = lint_in(std::slice::from_ref(&unpullable), None);
    assert!(
        found.len() == 1 && found[0].message.contains("names no registry"),
        "{found:?}"
    );
    let others = [
        "{pullPolicy: Never}",
        "{repository: r.io/secrets-store-csi}",
    ];
    for other in others.map(|image| file("b", image)) {
        assert_eq!(lint_in(&[unpullable.clone(), other], None), []);
    }
    let below = File {
        name: "b".to_owned(),
        text: "secrets-store-csi-driver: {linux: {image: {pullPolicy: Never}}}".to_owned(),
    };
    assert_eq!(lint_in(&[unpullable.clone(), below], None), []);
    // What is wrong in itself is found all the same.
    let copy = file(
        "a",
        "{repository: mcr.example.com/csi-secrets-store/driver}",
    );
    assert_eq!(lint_in(&[copy, unpullable], None).len(), 1);
}

#[test]
fn files_without_anything_to_check_are_named() {
    for (files, expected) in [
        (
            &["good/config-map.yaml", "good/empty.yaml"][..],
            Some("good/config-map.yaml, good/empty.yaml:"),
        ),
        (&[], Some("no YAML file:")),
        (&["good/config-map.yaml", "good/class-vault.yaml"], None),
        (
            &["good/class-vault.yaml", "good/values-of-another-chart.yaml"],
            Some("nothing to check in good/values-of-another-chart.yaml: neither a manifest"),
        ),
        (
            &["good/real-values-prometheus.yaml", "good/config-map.yaml"],
            Some("nothing to check in good/real-values-prometheus.yaml: neither a manifest"),
        ),
        (
            &[
                "good/parent-alias/Chart.yaml",
                "good/parent-alias/values.yaml",
            ],
            None,
        ),
        (&["good/namespace-kustomized.yaml"], None),
        (&["good/pod-plain.yaml"], None),
        (&["good/values-parent.yaml"], None),
        (&["mistakes/class-kind.yaml"], None),
        (&["mistakes/template.yaml"], None),
    ] {
        let files: Vec<_> = files.iter().map(|name| named(name)).collect();
        let said = nothing_to_check(&files);
        match expected {
            Some(piece) => assert!(said.unwrap().contains(piece), "{piece}"),
            None => assert_eq!(said, None, "{files:?}"),
        }
    }
}

#[test]
fn control_characters_are_shown_escaped() {
    let finding = Finding {
        file: "a\u{1b}[2J.yaml".to_owned(),
        line: 1,
        message: "there is no class a\r\u{7}".to_owned(),
    };
    assert_eq!(
        finding.to_string(),
        "a\\u{1b}[2J.yaml:1: there is no class a\\r\\u{7}"
    );
    let file = named("mistakes/class-carriage-return.yaml");
    let found = lint_in(&[file], None);
    assert!(!found[0].message.contains(char::is_control), "{found:?}");
}
