//! Checks that the tests which the documents about security name exist.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// Returns the names of all test functions below a directory.
fn tests_below(directory: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests_below(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(tests_in(&fs::read_to_string(path).unwrap()));
        }
    }
}

/// Returns the names of the test functions in a source: those with an attribute such as `#[test]`,
/// `#[tokio::test]` or `#[rstest]`, and those of `proptest!`, which look the same.
fn tests_in(source: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut is_test = false;
    for line in source.lines().map(str::trim) {
        if ["#[test]", "#[tokio::test", "#[rstest]"]
            .iter()
            .any(|start| line.starts_with(start))
        {
            is_test = true;
        } else if let Some((_, rest)) = line.split_once("fn ").filter(|_| is_test) {
            let end = rest.find(['(', '<']).unwrap_or(rest.len());
            names.push(rest[..end].to_owned());
            is_test = false;
        } else if line == "}" {
            is_test = false;
        }
    }
    names
}

/// Returns the texts between backticks that can be the name of a test.
fn named(cell: &str) -> Vec<&str> {
    let quoted = cell.split('`').skip(1).step_by(2);
    let is_name = |text: &&str| {
        text.contains('_')
            && text
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    quoted.filter(is_name).collect()
}

/// Returns the last cell of each row of the tables whose last column is headed `test`.
fn cells(document: &str) -> Vec<&str> {
    let mut cells = Vec::new();
    let mut in_table = false;
    for line in document.lines() {
        let Some(row) = line.strip_prefix('|') else {
            in_table = false;
            continue;
        };
        let last = row.trim_end_matches('|').rsplit('|').next().unwrap().trim();
        match last {
            "test" => in_table = true,
            last if in_table && !last.starts_with("---") => cells.push(last),
            _ => {}
        }
    }
    cells
}

#[test]
fn every_threat_names_tests_that_exist() {
    let mut tests = BTreeSet::new();
    for directory in ["driver", "e2e", "fake-provider"] {
        for part in ["src", "tests"] {
            tests_below(&workspace().join(directory).join(part), &mut tests);
        }
    }
    assert!(tests.len() > 300, "{} tests", tests.len());
    let text = fs::read_to_string(workspace().join("docs/threat-model.md")).unwrap();
    let cells = cells(&text);
    assert!(cells.len() > 30, "{} rows", cells.len());
    for cell in cells {
        let named = named(cell);
        assert!(
            !named.is_empty() || cell.starts_with("none: "),
            "no test: {cell}"
        );
        for name in named {
            assert!(tests.contains(name), "there is no test {name}");
        }
    }
}

/// Each file that SECURITY.md names exists, and each test.
#[test]
fn every_promise_names_what_exists() {
    let mut tests = BTreeSet::new();
    for directory in ["driver", "e2e"] {
        for part in ["src", "tests"] {
            tests_below(&workspace().join(directory).join(part), &mut tests);
        }
    }
    let text = fs::read_to_string(workspace().join("SECURITY.md")).unwrap();
    let cells = cells(&text);
    assert!(cells.len() > 5, "{} rows", cells.len());
    for cell in cells {
        for name in named(cell) {
            assert!(tests.contains(name), "there is no test {name}");
        }
        for file in cell.split('`').filter(|text| text.ends_with(".rs")) {
            assert!(workspace().join(file).exists(), "there is no file {file}");
        }
    }
}

#[test]
fn the_reader_of_sources_and_tables_reads_what_is_written_here() {
    let source = "#[tokio::test(start_paused = true)]\nasync fn one() {\n}\n#[rstest]\n#[case(1)]\nfn two(#[case] x: u8) {}\nfn helper() {}\nproptest! {\n    #[test]\n    fn three(x in 0..1) {}\n}";
    assert_eq!(tests_in(source), ["one", "two", "three"]);
    let table =
        "| a | test |\n|---|---|\n| x | `one_two`, `X`, `a/b_c.rs` |\n\n| b |\n|---|\n| y |";
    assert_eq!(cells(table), ["`one_two`, `X`, `a/b_c.rs`"]);
    assert_eq!(named("`one_two`, `X`, `a/b_c.rs`"), ["one_two"]);
}
