//! Checks a SecretProviderClass.

use std::collections::{BTreeMap, BTreeSet};

use driver::record::is_object_name;

use super::{
    Findings, annotations, check_fields,
    keys::{self, Keys},
    meant,
    names::slip,
    paths::{clash, why_no_path},
    provider, secret_objects,
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
pub(super) struct Mounted {
    pub(super) files: BTreeSet<String>,
    pub(super) aliased: BTreeMap<String, String>,
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
    Class {
        secrets: secret_objects::check(spec, mounted.as_ref(), file),
        files: mounted.map(|mounted| mounted.files),
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
        // A provider takes an empty one for none.
        let alias_of = |names: &[&str]| {
            let mut fields = names.iter().filter_map(|name| get(name)?.text());
            fields.find(|text| !text.is_empty())
        };
        let (alias, name) = match provider {
            "azure" | "aws" => (alias_of(&["objectAlias"]), field(&["objectName"])),
            "gcp" => (alias_of(&["path", "fileName"]), field(&["resourceName"])),
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
        if let Some(why) = why_no_path(shown, provider) {
            let mut values = object.fields().iter().map(|(_, value)| value);
            let value = values.find(|value| value.text() == Some(shown));
            let line = value.map_or(line, |value| before + value.line);
            file.add(line, why);
        }
        // AWS writes its own sign for a slash, and Azure several files for the versions of an object.
        let is_one_file = provider != "aws" && get(&"objectVersionHistory").is_none();
        let mut others = mounted.files.iter();
        let other = others.find(|other| clash(other, shown)).cloned();
        match other {
            Some(other) if other == shown => file.add(
                line,
                format!("two objects would both be the file {shown}; give one another name"),
            ),
            Some(other) if is_one_file => file.add(
                line,
                format!("one object would be the file {shown}, and another one {other}, so that one of them is a file and a directory; give one another name"),
            ),
            _ => {}
        }
        mounted.files.insert(shown.to_owned());
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
