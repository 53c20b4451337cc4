//! Checks the snippets of the book and of the README.
//!
//! | fence | what it must be |
//! |---|---|
//! | `yaml` | whole objects of Kubernetes: of a kind that is known here, without unknown fields |
//! | `yaml values` | values of the chart, which its schema knows, with the right types |
//! | `yaml other: WHAT` | YAML of something else, which is only parsed |
//! | `sh` | commands. A comment in the line before says which test runs them (`run: NAME`), or why none does (`not run: WHY`) |

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};

use driver::cluster::resources::{SecretProviderClass, SecretProviderClassPodStatus};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Secret};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::pages::{Fence, Page, exists, quoted, repository};
use crate::sources;

fn pages() -> Vec<Page> {
    let mut pages = Page::of_the_book();
    pages.push(Page::read("README.md"));
    pages
}

/// Returns the fences of a language, each with its place.
fn fences(language: &str) -> Vec<(String, Fence)> {
    let mut found = Vec::new();
    for page in pages() {
        for fence in page.fences() {
            if fence.info.split(' ').next() == Some(language) {
                found.push((format!("{}:{}", page.path, fence.line), fence));
            }
        }
    }
    found
}

#[test]
fn every_yaml_snippet_is_what_it_claims() {
    let schema = fs::read_to_string(repository("deploy/chart/values.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    let fences = fences("yaml");
    assert!(fences.len() > 15, "{} snippets", fences.len());
    let mut wrong = Vec::new();
    for (place, fence) in fences {
        let documents: Vec<Value> = match serde_saphyr::from_multiple(&fence.text) {
            Ok(documents) => documents,
            Err(error) => {
                wrong.push(format!("{place}: {error}"));
                continue;
            }
        };
        let claim = fence.info.strip_prefix("yaml").unwrap().trim();
        for document in documents {
            let checked = match claim {
                "" => object(&document),
                "values" => values(&schema, &document, ""),
                other if other.starts_with("other: ") => Ok(()),
                other => Err(format!("unknown claim {other:?}")),
            };
            wrong.extend(checked.err().map(|why| format!("{place}: {why}")));
        }
    }
    assert_eq!(wrong, [""; 0]);
}

/// Checks an object of Kubernetes by its type.
fn object(document: &Value) -> Result<(), String> {
    match document["kind"].as_str() {
        Some("SecretProviderClass") => {
            whole::<SecretProviderClass>(document)?;
            let class: SecretProviderClass = serde_json::from_value(document.clone()).unwrap();
            let empty = class.spec.provider.is_empty() || class.spec.parameters.is_empty();
            if empty {
                Err("a class without provider or parameters".to_owned())
            } else {
                Ok(())
            }
        }
        Some("SecretProviderClassPodStatus") => whole::<SecretProviderClassPodStatus>(document),
        Some("Pod") => whole::<Pod>(document),
        Some("Deployment") => whole::<Deployment>(document),
        Some("Secret") => whole::<Secret>(document),
        other => Err(format!("a kind that is not checked here: {other:?}")),
    }
}

/// Checks that a type reads an object and knows all its fields: what it writes is the same.
fn whole<K: DeserializeOwned + Serialize>(document: &Value) -> Result<(), String> {
    let object: K = serde_json::from_value(document.clone()).map_err(|error| error.to_string())?;
    let written = serde_json::to_value(&object).unwrap();
    if written == *document {
        Ok(())
    } else {
        Err(format!(
            "has fields that are not known: {document}, read as {written}"
        ))
    }
}

/// Checks values of the chart against its schema: every key is there, with one of its types.
fn values(schema: &Value, value: &Value, key: &str) -> Result<(), String> {
    let types = match &schema["type"] {
        Value::Array(types) => types.clone(),
        Value::Null => Vec::new(),
        one => vec![one.clone()],
    };
    let is = |name: &str| match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        _ => value.is_null(),
    };
    if !types.is_empty() && !types.iter().any(|name| is(name.as_str().unwrap())) {
        return Err(format!(
            "{key} is {value}, and not of type {}",
            schema["type"]
        ));
    }
    let one_of = schema["enum"].as_array();
    if one_of.is_some_and(|one_of| !one_of.contains(value)) {
        return Err(format!("{key} is {value}, and none of {}", schema["enum"]));
    }
    let Some(properties) = schema["properties"].as_object() else {
        return Ok(());
    };
    for (name, value) in value.as_object().into_iter().flatten() {
        let key = format!("{key}.{name}");
        let schema = properties
            .get(name)
            .ok_or(format!("the chart has no value {key}"))?;
        values(schema, value, &key)?;
    }
    Ok(())
}

#[test]
fn every_shell_snippet_is_valid_and_says_who_runs_it() {
    let tests = sources::tests();
    assert!(tests.len() > 300, "{} tests", tests.len());
    let fences = fences("sh");
    assert!(fences.len() > 15, "{} snippets", fences.len());
    let mut wrong = Vec::new();
    for (place, fence) in fences {
        let checked = marked(&fence.mark, &tests)
            .and_then(|()| parses(&fence.text))
            .and_then(|()| names_what_exists(&fence.text));
        wrong.extend(checked.err().map(|why| format!("{place}: {why}")));
    }
    assert_eq!(wrong, [""; 0]);
}

/// Checks the comment before a snippet: it names a test or a file that runs the commands, or says why
/// nothing does. A test that it names beside the reason must exist, too.
fn marked(mark: &str, tests: &BTreeSet<String>) -> Result<(), String> {
    if let Some(why) = mark.strip_prefix("not run: ") {
        let is_name = |word: &&str| word.contains('_') && !word.contains(['.', '/', '-']);
        let mut named = why.split_whitespace().filter(is_name);
        return match named.find(|name| !tests.contains(*name)) {
            Some(name) => Err(format!("there is no test {name}")),
            None if why.len() > 5 => Ok(()),
            None => Err("a reason is missing".to_owned()),
        };
    }
    let named = mark
        .strip_prefix("run: ")
        .ok_or("neither `<!-- run: TEST -->` nor `<!-- not run: WHY -->` is before it")?;
    if tests.contains(named) || exists(named) {
        Ok(())
    } else {
        Err(format!("there is no test or file {named}"))
    }
}

/// Checks the syntax with a shell, which runs nothing of it.
fn parses(commands: &str) -> Result<(), String> {
    let shell = Command::new("sh")
        .arg("-n")
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut shell = shell.unwrap();
    shell
        .stdin
        .take()
        .unwrap()
        .write_all(commands.as_bytes())
        .unwrap();
    let output = shell.wait_with_output().unwrap();
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Checks that paths of the repository exist, and that the chart has the values that are set.
fn names_what_exists(commands: &str) -> Result<(), String> {
    let values = fs::read_to_string(repository("deploy/chart/values.yaml")).unwrap();
    let values: Value = serde_saphyr::from_str(&values).unwrap();
    let joined = commands.replace("\\\n", " ");
    for line in joined.lines() {
        let of_our_chart = line.contains("deploy/chart");
        let words: Vec<&str> = line.split_whitespace().collect();
        for (at, word) in words.iter().enumerate() {
            let path = word.trim_matches(['\'', '"']);
            let ours = ["deploy/", "docs/", "e2e/", ".ci/"];
            if ours.iter().any(|start| path.starts_with(start)) && !exists(path) {
                return Err(format!("there is no {path}"));
            }
            let set = match word.strip_prefix("--set") {
                Some("") => words.get(at + 1).copied(),
                Some(rest) => rest.strip_prefix('='),
                None => None,
            };
            for assignment in set.iter().flat_map(|set| set.split(',')) {
                let key = assignment.split('=').next().unwrap();
                let known = key
                    .split('.')
                    .try_fold(&values, |values, part| values.get(part));
                if of_our_chart && known.is_none() {
                    return Err(format!("the chart has no value {key}"));
                }
            }
        }
    }
    Ok(())
}

/// Each flag in backticks, on a page about the driver, is one of the driver. One flag is kubelet's.
#[test]
fn every_flag_of_the_driver_in_the_book_exists() {
    let known = crate::reference::flags();
    let names: Vec<&str> = known.iter().map(|flag| flag.name.as_str()).collect();
    let about_the_driver = [
        "operating",
        "rotation",
        "troubleshooting",
        "limits",
        "sizing",
        "security",
        "monitoring",
        "secrets",
    ];
    let mut wrong = Vec::new();
    for name in about_the_driver {
        let page = Page::read(&format!("docs/{name}.md"));
        let prose: String = page.text.split("```").step_by(2).collect();
        for text in quoted(&prose) {
            let Some(flag) = text.strip_prefix("--") else {
                continue;
            };
            let end = flag.find(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_');
            let flag = &flag[..end.unwrap_or(flag.len())];
            if !flag.is_empty() && !["help", "root-dir"].contains(&flag) && !names.contains(&flag) {
                wrong.push(format!("docs/{name}.md: --{flag}"));
            }
        }
    }
    assert_eq!(wrong, [""; 0]);
}
