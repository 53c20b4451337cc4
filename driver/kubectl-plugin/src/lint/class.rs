//! Checks a SecretProviderClass.

use std::collections::{BTreeMap, BTreeSet};

use driver::record::is_object_name;

use super::{
    Findings, annotations, check_fields,
    keys::{self, Keys},
    meant,
    names::slip,
    provider,
    yaml::{self, Node},
};

/// What pods need to know of a class.
#[derive(Debug, Default)]
pub(super) struct Class {
    /// The Secrets that it makes, by name.
    pub(super) secrets: BTreeMap<String, Made>,
    /// The files that it mounts. `None` if they are not all known.
    pub(super) files: Option<BTreeSet<String>>,
}

/// A Secret that a class makes.
#[derive(Debug)]
pub(super) struct Made {
    /// The line of its name.
    pub(super) line: usize,
    /// Its keys. `None` if they are not all known.
    pub(super) keys: Option<BTreeSet<String>>,
}

/// The names of the files that a class mounts, and the names in the store of those with another one.
#[derive(Default)]
struct Mounted {
    files: BTreeSet<String>,
    aliased: BTreeMap<String, String>,
}

const KIND: &str = "SecretProviderClass";

/// Returns whether an object is a class, or meant to be one.
pub(super) fn is_class(object: &Node) -> bool {
    let kind = object.text_of("kind").unwrap_or_default();
    let version = object.text_of("apiVersion").unwrap_or_default();
    kind == KIND || version.starts_with("secrets-store.csi.") && meant(kind, &[KIND]).is_some()
}

/// Checks a class.
pub(super) fn check(object: &Node, file: &mut Findings<'_>) -> Class {
    check_head(object, file);
    annotations::check(object, file);
    let Some(spec) = object.get("spec") else {
        file.add(
            object.line,
            "the class has no spec; it needs spec.provider and spec.parameters",
        );
        return Class::default();
    };
    check_fields(
        spec,
        "spec",
        &["provider", "parameters", "secretObjects"],
        file,
    );
    let provider = provider::check(spec, file);
    let mounted = check_parameters(spec, provider, file);
    let class = check_secrets(spec, mounted.as_ref(), file);
    Class {
        files: mounted.map(|mounted| mounted.files),
        ..class
    }
}

fn check_head(object: &Node, file: &mut Findings<'_>) {
    if let Some((kind, text)) = object.get("kind").and_then(|k| Some((k, k.text()?)))
        && text != KIND
    {
        let how = format!("there is no kind {text} of a class; write kind: {KIND}");
        file.add(kind.line, how);
    }
    let at = object.get("apiVersion");
    let line = at.map_or(object.line, |at| at.line);
    match at.and_then(Node::text) {
        Some("secrets-store.csi.x-k8s.io/v1") => {}
        Some("secrets-store.csi.x-k8s.io/v1alpha1") => file.add(
            line,
            "v1alpha1 is deprecated; write secrets-store.csi.x-k8s.io/v1, which has the same fields",
        ),
        _ => file.add(line, "apiVersion of a class is secrets-store.csi.x-k8s.io/v1"),
    }
    let name = object
        .get("metadata")
        .and_then(|metadata| metadata.get("name"));
    match name.map(|name| (name.line, name.text().unwrap_or_default())) {
        Some((_, name)) if is_object_name(name) => {}
        Some((line, name)) => file.add(
            line,
            format!("{name:?} cannot be a name; use lower-case letters, digits, \"-\" and \".\""),
        ),
        None => file.add(object.line, "the class has no metadata.name"),
    }
}

/// Checks the parameters. Returns the files that they mount, if these are known.
fn check_parameters(spec: &Node, provider: &str, file: &mut Findings<'_>) -> Option<Mounted> {
    let Some(parameters) = spec.get("parameters").filter(|p| !p.fields().is_empty()) else {
        file.add(spec.line, format!("spec.parameters is missing: they tell the provider {provider} which objects to fetch"));
        return None;
    };
    for (key, value) in parameters.fields() {
        if key.text == "secretObjects" {
            file.add(
                key.line,
                "secretObjects belongs under spec, beside parameters and not in it; indent it less",
            );
        } else if value.text().is_none() {
            let how = match value.fields().is_empty() && value.items().is_empty() {
                true => "put it in quotes",
                false => "write | behind the colon, which makes a text of what is below",
            };
            file.add(
                value.line,
                format!("parameter {} must be a text; {how}", key.text),
            );
        }
    }
    let name = if provider == "gcp" {
        "secrets"
    } else {
        "objects"
    };
    let keys = keys::of(provider)?;
    let is_misspelt = keys::check_parameters(parameters, provider, keys, file);
    let Some(objects) = parameters.get(name) else {
        let mut values = parameters.fields().iter().map(|(_, value)| value);
        if !is_misspelt && values.all(|value| value.text().is_some()) {
            file.add(
                parameters.line,
                format!(
                    "the provider {provider} needs the parameter {name}, with the objects to mount"
                ),
            );
        }
        return None;
    };
    let text = objects.text()?;
    // A text of several lines has the line of its first one.
    let before = objects.line.saturating_sub(1);
    match yaml::document(text) {
        Ok(Some(tree)) => check_objects(&tree, before, provider, keys, file),
        Ok(None) => {
            file.add(objects.line, format!("parameter {name} is empty"));
            None
        }
        Err((line, why)) => {
            file.add(before + line, format!("parameter {name}: {why}"));
            None
        }
    }
}

/// Checks the objects of a known provider, which are YAML within a text. `before` is the number of lines
/// before that.
fn check_objects(
    tree: &Node,
    before: usize,
    provider: &str,
    keys: &Keys,
    file: &mut Findings<'_>,
) -> Option<Mounted> {
    let mut mounted = Mounted::default();
    let objects = objects_of(tree, before, provider, file)?;
    for (before, object) in &objects {
        keys::check_object(object, *before, provider, keys, file);
    }
    for (before, object) in objects {
        let line = before + object.line;
        let get = |name: &&str| {
            let mut fields = object.fields().iter();
            let field = fields.find(|(key, _)| key.text.eq_ignore_ascii_case(name));
            match keys.any_case {
                true => field.map(|(_, value)| value),
                false => object.get(name),
            }
        };
        let field = |names: &[&str]| names.iter().find_map(|name| get(name)?.text());
        let (alias, name) = match provider {
            "azure" | "aws" => (field(&["objectAlias"]), field(&["objectName"])),
            "gcp" => (field(&["path", "fileName"]), field(&["resourceName"])),
            _ => (None, field(&["objectName"])),
        };
        let Some(name) = name else {
            let field = match provider {
                "gcp" => "resourceName",
                _ => "objectName",
            };
            let mut names = object.fields().iter().map(|(key, _)| key.text.as_str());
            // A slip has a finding of its own.
            if !names.clone().any(|name| slip(name, &[field]).is_some()) {
                let wrong = names.find(|name| meant(name, &[field]).is_some());
                file.add(
                    line,
                    match wrong {
                        Some(wrong) => format!(
                            "`{wrong}` is not a key of an object of {provider}; `{field}` is meant"
                        ),
                        None => format!("an object of {provider} has no {field}"),
                    },
                );
            }
            return None;
        };
        // How AWS and Google make a file's name of these is theirs.
        let is_theirs = match provider {
            "aws" => alias.is_none() && name.contains([':', '/']) || get(&"jmesPath").is_some(),
            "gcp" => alias.is_none(),
            _ => false,
        };
        if is_theirs {
            return None;
        }
        if let Some(alias) = alias {
            mounted.aliased.insert(name.to_owned(), alias.to_owned());
        }
        let shown = alias.unwrap_or(name);
        if !mounted.files.insert(shown.to_owned()) {
            file.add(
                line,
                format!("two objects would both be the file {shown}; give one another name"),
            );
        }
    }
    Some(mounted)
}

/// Returns the objects of a known provider, each with the number of lines before those that it has.
fn objects_of(
    tree: &Node,
    before: usize,
    provider: &str,
    file: &mut Findings<'_>,
) -> Option<Vec<(usize, Node)>> {
    if provider != "azure" {
        if tree.items().is_empty() {
            let how = format!("the objects of {provider} are a list; begin each with a dash");
            file.add(before + tree.line, how);
            return None;
        }
        let items = tree.items().iter();
        return Some(items.map(|item| (before, item.clone())).collect());
    }
    if tree.get("array").is_none() {
        file.add(
            before + tree.line,
            "azure's objects begin with array: and a list of texts, each with - |",
        );
        return None;
    }
    let mut objects = Vec::new();
    for item in tree.items_of("array") {
        let line = before + item.line;
        if item.is_map() {
            file.add(
                line,
                "an object of azure is a text within the array; write - | and its fields below",
            );
            return None;
        }
        objects.push((line.saturating_sub(1), yaml::document(item.text()?).ok()??));
    }
    Some(objects)
}

fn check_secrets(spec: &Node, mounted: Option<&Mounted>, file: &mut Findings<'_>) -> Class {
    let mut class = Class::default();
    let Some(list) = spec.get("secretObjects") else {
        return class;
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
        if class
            .secrets
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
    class
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
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if key.is_empty() {
            all_known = false;
            file.add(
                entry.line,
                format!("key is missing: the key of the Secret for object {object}"),
            );
        } else if !key.chars().all(is_allowed) {
            file.add(entry.line, format!("{key:?} cannot be a key of a Secret: use letters, digits, \"-\", \"_\" and \".\""));
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

fn check_type(secret: &Node, keys: Option<&BTreeSet<String>>, file: &mut Findings<'_>) {
    let Some(type_) = secret.get("type") else {
        return;
    };
    let text = type_.text().unwrap_or_default().trim();
    let known = [
        "Opaque",
        "kubernetes.io/tls",
        "kubernetes.io/dockerconfigjson",
        "kubernetes.io/basic-auth",
        "kubernetes.io/ssh-auth",
    ];
    if !known.contains(&text)
        && let Some(name) = meant(text, &known)
    {
        file.add(
            type_.line,
            format!("the type {text} is usually written {name}"),
        );
    }
    let needed: &[&str] = match text {
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        _ => &[],
    };
    let Some(keys) = keys else { return };
    for key in needed.iter().filter(|key| !keys.contains(**key)) {
        file.add(
            type_.line,
            format!("a Secret of type {text} needs the key {key}"),
        );
    }
}
