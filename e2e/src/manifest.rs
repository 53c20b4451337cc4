//! Manifests as values: read, changed where a cluster differs from what is installed, written back.
//!
//! A change that finds nothing to change is an error, so that a test never runs with less than it
//! asked for.

use serde_json::Value;

use crate::cluster::{Error, Result};

/// Reads the documents of a manifest.
///
/// # Errors
/// [`Error::Manifest`] when it is no YAML.
pub fn parse(manifest: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(manifest)
        .map_err(|error| Error::Manifest(error.to_string()))?;
    Ok(documents
        .into_iter()
        .filter(|document| !document.is_null())
        .collect())
}

/// Changes an object that one of the manifests contains.
///
/// # Errors
/// [`Error::Manifest`] when none contains it.
pub fn change_object(
    manifests: &mut [String],
    kind: &str,
    name: &str,
    mut change: impl FnMut(&mut Value),
) -> Result<()> {
    change_all(manifests, &format!("{kind} {name}"), |document| {
        let found = document["kind"] == kind && document["metadata"]["name"] == name;
        if found {
            change(document);
        }
        found
    })
}

/// Changes a container of a DaemonSet that one of the manifests contains.
///
/// # Errors
/// [`Error::Manifest`] when no DaemonSet has a container of that name.
pub fn change_container(
    manifests: &mut [String],
    name: &str,
    mut change: impl FnMut(&mut Value),
) -> Result<()> {
    change_all(manifests, &format!("container {name}"), |document| {
        let mut containers = containers_mut(document).iter_mut();
        let container = containers.find(|container| container["name"] == name);
        let found = container.is_some();
        container.into_iter().for_each(&mut change);
        found
    })
}

/// Adds arguments to a container of a DaemonSet. The driver takes the last of a repeated flag.
///
/// # Errors
/// As of [`change_container`].
pub fn add_arguments(manifests: &mut [String], container: &str, arguments: &[&str]) -> Result<()> {
    change_container(manifests, container, |container| {
        let mut all = container["args"].as_array().cloned().unwrap_or_default();
        all.extend(arguments.iter().map(|argument| Value::from(*argument)));
        container["args"] = all.into();
    })
}

/// The containers of a workload's pods; none of any other object's.
pub(crate) fn containers_mut(document: &mut Value) -> &mut [Value] {
    document
        .pointer_mut("/spec/template/spec/containers")
        .and_then(Value::as_array_mut)
        .map_or(&mut [], Vec::as_mut_slice)
}

/// Lets `change` see every document, and writes those manifests anew in which it changed one.
fn change_all(
    manifests: &mut [String],
    what: &str,
    mut change: impl FnMut(&mut Value) -> bool,
) -> Result<()> {
    let mut found = false;
    for manifest in manifests {
        let mut documents = parse(manifest)?;
        let changed = documents
            .iter_mut()
            .filter_map(|document| change(document).then_some(()));
        if changed.count() > 0 {
            found = true;
            // JSON is YAML.
            let texts: Vec<String> = documents.iter().map(Value::to_string).collect();
            *manifest = texts.join("\n---\n");
        }
    }
    if found {
        return Ok(());
    }
    Err(Error::Manifest(format!("no manifest has {what}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "
kind: ServiceAccount
metadata: {name: agent}
---
kind: DaemonSet
metadata: {name: agent}
spec: {template: {spec: {containers: [{name: main, args: [--a=1]}]}}}
";

    #[test]
    fn a_change_reaches_the_one_container_and_leaves_all_else() {
        let mut manifests = vec!["kind: Other".to_owned(), MANIFEST.to_owned()];
        add_arguments(&mut manifests, "main", &["--a=2"]).unwrap();
        assert_eq!(manifests[0], "kind: Other");
        let mut documents = parse(&manifests[1]).unwrap();
        assert_eq!(documents[0], parse(MANIFEST).unwrap()[0]);
        let args = &containers_mut(&mut documents[1])[0]["args"];
        assert_eq!(*args, serde_json::json!(["--a=1", "--a=2"]));
    }

    #[test]
    fn what_is_not_there_is_not_changed_silently() {
        let mut manifests = vec![MANIFEST.to_owned()];
        let error = add_arguments(&mut manifests, "other", &["--a"]).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("no manifest has container other")
        );
        let error = change_object(&mut manifests, "DaemonSet", "other", |_| ()).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("no manifest has DaemonSet other")
        );
        assert_eq!(manifests, [MANIFEST]);
    }
}
