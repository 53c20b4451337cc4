//! Checks the Secrets that a class makes.

use std::collections::{BTreeMap, BTreeSet};

use driver::record::is_object_name;

use super::{
    Findings, check_fields,
    class::{Made, Mounted},
    meant, metadata,
    yaml::Node,
};

/// Checks the Secrets of a class. Returns them by name. `mounted` are the files of the class, if they are known.
pub(super) fn check(
    spec: &Node,
    mounted: Option<&Mounted>,
    file: &mut Findings<'_>,
) -> BTreeMap<String, Made> {
    let mut secrets = BTreeMap::new();
    let Some(list) = spec.get("secretObjects") else {
        return secrets;
    };
    if list.items().is_empty() && !list.fields().is_empty() {
        file.add(
            list.line,
            "secretObjects is a list; begin each Secret with a dash",
        );
    }
    for secret in list.items() {
        check_fields(
            secret,
            "an entry of secretObjects",
            &["secretName", "type", "labels", "annotations", "data"],
            file,
        );
        let keys = check_data(secret, mounted, file);
        metadata::check(secret, file);
        let Some(name) = secret.get("secretName") else {
            file.add(secret.line, "an entry of secretObjects has no secretName");
            continue;
        };
        let text = name.text().unwrap_or_default().trim();
        if !is_object_name(text) {
            file.add(name.line, format!("{text:?} cannot be the name of a Secret; use lower-case letters, digits, \"-\" and \".\""));
        }
        check_type(secret, keys.as_ref(), file);
        let line = name.line;
        if secrets
            .insert(text.to_owned(), Made { line, keys })
            .is_some()
        {
            file.add(
                name.line,
                format!(
                    "secretObjects has two entries for the Secret {text}; write all keys into one"
                ),
            );
        }
    }
    secrets
}

/// Checks the keys of a Secret. Returns them, if all are known.
fn check_data(
    secret: &Node,
    mounted: Option<&Mounted>,
    file: &mut Findings<'_>,
) -> Option<BTreeSet<String>> {
    let data = secret.items_of("data");
    if data.is_empty() {
        let line = secret.get("data").map_or(secret.line, |data| data.line);
        let how = match secret.get("data").is_some_and(Node::is_map) {
            true => "data is a list: write - objectName: and key: for each",
            false => "an entry of secretObjects needs data, with objectName and key for each key",
        };
        file.add(line, how);
    }
    let mut keys = BTreeSet::new();
    // What follows from a missing key is not worth a finding of its own.
    let mut all_known = !data.is_empty();
    for entry in data {
        check_fields(
            entry,
            "an entry of data",
            &["objectName", "key", "jsonKey", "encoding"],
            file,
        );
        let object = entry.text_of("objectName").unwrap_or_default().trim();
        let key = entry.text_of("key").unwrap_or_default().trim();
        if object == "*" {
            all_known = false;
            if !key.is_empty() {
                file.add(entry.line, "key is given with objectName \"*\": leave it out, each object gets its own name as key");
            }
            continue;
        }
        if object.is_empty() {
            file.add(
                entry.line,
                "objectName is missing: the name of the mounted file",
            );
        } else if let Some(mounted) = mounted.filter(|m| !m.files.contains(object)) {
            let there: Vec<_> = mounted.files.iter().take(10).map(String::as_str).collect();
            let what = match mounted.aliased.get(object) {
                Some(alias) => format!(
                    "the object {object} is mounted under its alias; write objectName: {alias}"
                ),
                None if there.is_empty() => "no object is mounted at all".to_owned(),
                None => format!(
                    "no object is mounted as {object}; there are: {}",
                    there.join(", ")
                ),
            };
            let line = entry.get("objectName").map_or(entry.line, |name| name.line);
            file.add(line, what);
        }
        if key.is_empty() {
            all_known = false;
            file.add(
                entry.line,
                format!("key is missing: the key of the Secret for object {object}"),
            );
        } else if let Some(why) = why_no_key(key) {
            file.add(
                entry.line,
                format!("{key:?} cannot be a key of a Secret: {why}"),
            );
        } else if !keys.insert(key.to_owned()) {
            file.add(
                entry.line,
                format!("key {key} is there twice; the last one wins"),
            );
        }
        if let Some(encoding) = entry
            .text_of("encoding")
            .filter(|e| !["", "base64"].contains(e))
        {
            file.add(
                entry.line,
                format!(
                    "encoding {encoding} is not supported: write base64, or leave encoding out"
                ),
            );
        }
    }
    all_known.then_some(keys)
}

/// Returns what is wrong with a key of a Secret, as the API server sees it.
fn why_no_key(key: &str) -> Option<&'static str> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if !key.chars().all(is_allowed) {
        return Some("use letters, digits, \"-\", \"_\" and \".\"");
    }
    if key == "." || key.starts_with("..") {
        return Some("it may neither be a dot nor begin with two");
    }
    (key.len() > 253).then_some("it has more than 253 characters")
}

/// The types of which the driver and the API server want some keys.
const TYPES: [(&str, &[&str]); 8] = [
    ("Opaque", &[]),
    ("kubernetes.io/tls", &["tls.crt", "tls.key"]),
    ("kubernetes.io/dockerconfigjson", &[".dockerconfigjson"]),
    ("kubernetes.io/dockercfg", &[".dockercfg"]),
    ("kubernetes.io/basic-auth", &["username", "password"]),
    ("kubernetes.io/ssh-auth", &["ssh-privatekey"]),
    (SERVICE_ACCOUNT_TOKEN, &[]),
    (
        "bootstrap.kubernetes.io/token",
        &["token-id", "token-secret"],
    ),
];

/// The type of which the driver and the API server want an annotation.
const SERVICE_ACCOUNT_TOKEN: &str = "kubernetes.io/service-account-token";
const ACCOUNT: &str = "kubernetes.io/service-account.name";

fn has_account(secret: &Node) -> bool {
    let annotations = secret.get("annotations");
    let account = annotations.and_then(|annotations| annotations.text_of(ACCOUNT));
    account.is_some_and(|account| !account.is_empty())
}

fn check_type(secret: &Node, keys: Option<&BTreeSet<String>>, file: &mut Findings<'_>) {
    let type_ = secret.get("type");
    let text = type_.map_or("", |type_| type_.text().unwrap_or_default().trim());
    let Some(type_) = type_.filter(|_| !text.is_empty()) else {
        // A slip has a finding of its own.
        let mut fields = secret.fields().iter();
        if !fields.any(|(key, _)| meant(&key.text, &["type"]).is_some() && key.text != "type") {
            let line = type_.map_or(secret.line, |type_| type_.line);
            file.add(
                line,
                "an entry of secretObjects has no type; write type: Opaque, or the type that is needed",
            );
        }
        return;
    };
    let known = TYPES.map(|(name, _)| name);
    if !known.contains(&text)
        && let Some(name) = meant(text, &known)
    {
        file.add(
            type_.line,
            format!("the type {text} is usually written {name}"),
        );
    }
    if text == SERVICE_ACCOUNT_TOKEN && !has_account(secret) {
        file.add(
            type_.line,
            format!("a Secret of type {text} needs the annotation {ACCOUNT}, under annotations of the entry"),
        );
    }
    let needed = TYPES.iter().find(|(name, _)| *name == text);
    let (Some((_, needed)), Some(keys)) = (needed, keys) else {
        return;
    };
    let mut missing = needed.iter().filter(|key| !keys.contains(**key));
    if text == "kubernetes.io/basic-auth" {
        if missing.count() == needed.len() {
            file.add(
                type_.line,
                format!("a Secret of type {text} needs the key username or password"),
            );
        }
        return;
    }
    missing.by_ref().for_each(|key| {
        file.add(
            type_.line,
            format!("a Secret of type {text} needs the key {key}"),
        );
    });
}
