//! Writes the generated pages and tables of the book, and checks that the others are complete.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;

use driver::config::Config;
use serde_json::Value;

use crate::pages::{Page, repository};
use crate::sources;

/// One flag of the driver, as `--help` shows it.
pub(crate) struct Flag {
    pub(crate) name: String,
    value: String,
    default: String,
    help: String,
}

/// Reads the flags from the text of `--help`.
pub(crate) fn flags() -> Vec<Flag> {
    let help = Config::parse([OsString::from("--help")].into_iter()).unwrap_err();
    let lines: Vec<&str> = help.text.lines().collect();
    let mut flags = Vec::new();
    for pair in lines.windows(2) {
        let Some(head) = pair[0].strip_prefix("  --") else {
            continue;
        };
        let (head, default) = head.split_once(" [").unwrap_or((head, ""));
        let (name, value) = head.split_once('=').unwrap_or((head, ""));
        flags.push(Flag {
            name: name.to_owned(),
            value: value.to_owned(),
            default: default.trim_end_matches(']').to_owned(),
            help: pair[1].trim().to_owned(),
        });
    }
    assert!(flags.len() > 30, "{} flags", flags.len());
    flags
}

/// Fails if a page differs from what is generated now. With `UPDATE_DEPLOY` set, writes it.
fn keep(path: &str, generated: &str) {
    if std::env::var_os("UPDATE_DEPLOY").is_some() {
        // Other tests read the pages meanwhile.
        let written = repository(&format!("{path}.new"));
        fs::write(&written, generated).unwrap();
        fs::rename(&written, repository(path)).unwrap();
    }
    let committed = fs::read_to_string(repository(path)).unwrap_or_default();
    assert!(
        committed == generated,
        "{path} is stale: run `just manifests`"
    );
}

/// Replaces what is between `<!-- NAME -->` and `<!-- end of NAME -->`.
fn between(page: &str, name: &str, generated: &str) -> String {
    let (start, end) = (
        format!("<!-- {name} -->\n"),
        format!("<!-- end of {name} -->"),
    );
    let (before, rest) = page.split_once(&start).unwrap_or_else(|| panic!("{start}"));
    let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("{end}"));
    format!("{before}{start}\n{generated}\n{end}{after}")
}

fn flag_table() -> String {
    let mut table = "| flag | default | effect |\n|---|---|---|\n".to_owned();
    for flag in flags() {
        let value = if flag.value.is_empty() {
            String::new()
        } else {
            format!("={}", flag.value)
        };
        let default = match flag.default.as_str() {
            "" if flag.value.is_empty() => "`false`".to_owned(),
            "" => "empty".to_owned(),
            default => format!("`{default}`"),
        };
        writeln!(
            table,
            "| `--{}{value}` | {default} | {} |",
            flag.name, flag.help
        )
        .unwrap();
    }
    table
}

/// Adds a row for each field of a schema that has a description.
fn field_rows(path: &str, schema: &Value, rows: &mut String) {
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        if path.is_empty() && ["apiVersion", "kind", "metadata"].contains(&name.as_str()) {
            continue;
        }
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        let kind = match property["type"].as_str().unwrap() {
            "object" if property["additionalProperties"].is_object() => "map of strings",
            "array" => "list",
            other => other,
        };
        let effect = property["description"]
            .as_str()
            .unwrap_or_default()
            .replace('\n', " ");
        writeln!(rows, "| `{path}` | {kind} | {effect} |").unwrap();
        let (inner, path) = match property["items"].is_object() {
            true => (&property["items"], format!("{path}[]")),
            false => (property, path),
        };
        field_rows(&path, inner, rows);
    }
}

fn field_table(file: &str) -> String {
    let text = fs::read_to_string(repository("deploy").join(file)).unwrap();
    let definition: Value = serde_saphyr::from_str(&text).unwrap();
    let versions = definition["spec"]["versions"].as_array().unwrap();
    let version = versions
        .iter()
        .find(|version| version["name"] == "v1")
        .unwrap();
    let mut table = "| field | type | meaning |\n|---|---|---|\n".to_owned();
    field_rows("", &version["schema"]["openAPIV3Schema"], &mut table);
    table
}

#[test]
fn the_reference_has_every_flag_and_field() {
    let path = "docs/reference.md";
    let page = fs::read_to_string(repository(path)).unwrap();
    let class = field_table("secrets-store.csi.x-k8s.io_secretproviderclasses.yaml");
    let status = field_table("secrets-store.csi.x-k8s.io_secretproviderclasspodstatuses.yaml");
    let page = between(&page, "fields of a class", &class);
    let page = between(&page, "fields of a pod status", &status);
    keep(path, &between(&page, "flags", &flag_table()));
}

/// The page about the chart is the chart's README. Its links out of the chart are left out, because they
/// would lead nowhere in the book.
#[test]
fn the_page_about_the_chart_is_its_readme() {
    let readme = fs::read_to_string(repository("deploy/chart/README.md")).unwrap();
    let mut page = String::new();
    let mut rest = readme.as_str();
    while let Some((before, link)) = rest.split_once("](../") {
        let (text_before, text) = before.rsplit_once('[').unwrap();
        let (_, after) = link.split_once(')').unwrap();
        page += text_before;
        page += text;
        rest = after;
    }
    page += rest;
    let (title, body) = page.split_once('\n').unwrap();
    keep(
        "docs/chart.md",
        &format!(
            "{title}\n\n<!-- Written by `just manifests` from deploy/chart/README.md. -->\n{body}"
        ),
    );
}

/// Every annotation, attribute and label that the code knows is in the book.
#[test]
fn the_book_has_every_annotation() {
    let names = sources::names_with("secrets-store.csi.k8s.io/");
    assert!(names.len() > 10, "{names:?}");
    let book: String = Page::of_the_book()
        .into_iter()
        .map(|page| page.text)
        .collect();
    let is_there = |name: &str| {
        ["secrets-store.csi.k8s.io/", "`"].iter().any(|before| {
            ["`", ":", "="]
                .iter()
                .any(|after| book.contains(&format!("{before}{name}{after}")))
        })
    };
    let missing: Vec<&String> = names.iter().filter(|name| !is_there(name)).collect();
    assert!(missing.is_empty(), "docs/reference.md lacks {missing:?}");
}

/// The names of metrics are the literals of `driver/src/metrics` with one of these beginnings.
#[test]
fn the_book_has_every_metric() {
    const BEGINNINGS: [&str; 5] = ["secrets_store_", "node_", "rotation_", "sync_", "total_"];
    let texts = sources::texts_below("driver/src/metrics");
    let is_name = |text: &&str| {
        let is_of_a_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        BEGINNINGS.iter().any(|begin| text.starts_with(begin)) && text.chars().all(is_of_a_name)
    };
    let metrics: BTreeSet<&str> = texts.split('"').filter(is_name).collect();
    assert!(metrics.len() >= 18, "{metrics:?}");
    let book = fs::read_to_string(repository("docs/operating.md")).unwrap();
    // The page adds the unit, and `_total` to counters. The name of one metric may begin that of another.
    let is_end = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    let has = |name: &str| {
        let ends = book
            .match_indices(name)
            .map(|(at, _)| &book[at + name.len()..]);
        let ends = ends.map(|rest| rest.strip_prefix("_seconds").unwrap_or(rest));
        let mut ends = ends.map(|rest| rest.strip_prefix("_total").unwrap_or(rest));
        ends.any(is_end)
    };
    let missing: Vec<_> = metrics.iter().filter(|name| !has(name)).collect();
    assert!(missing.is_empty(), "docs/operating.md lacks {missing:?}");
}
