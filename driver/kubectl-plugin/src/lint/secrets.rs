//! Checks which Secrets the files make, and that no two classes make one.

use super::{
    Findings,
    class::Class,
    yaml::{Node, Value},
};

/// A class that has been checked.
pub(super) struct Checked<'a> {
    pub(super) file: &'a str,
    pub(super) line: usize,
    /// The Secrets that it makes, with the lines of their names.
    pub(super) secrets: Vec<(String, usize)>,
    /// The namespace and the name.
    pub(super) key: (String, String),
    pub(super) document: &'a Node,
}

/// Returns the names of the Secrets that an object is or makes, if it is not a class.
pub(super) fn others(object: &Node) -> Vec<&str> {
    let mut names = Vec::new();
    let kind = object.text_of("kind").unwrap_or_default();
    if kind.ends_with("Secret") {
        names.extend(object.get("metadata").and_then(|m| m.text_of("name")));
    }
    if let Some(spec) = object.get("spec") {
        // What cert-manager and the External Secrets Operator make.
        names.extend(spec.text_of("secretName"));
        names.extend(spec.get("target").and_then(|target| target.text_of("name")));
    }
    let generated = object.items_of("secretGenerator").iter();
    names.extend(generated.filter_map(|secret| secret.text_of("name")));
    names
}

/// Checks that no earlier class of the namespace makes a Secret of this one with other content.
pub(super) fn check_owners(
    document: &Node,
    key: &(String, String),
    class: &Class,
    earlier: &[Checked<'_>],
    file: &mut Findings<'_>,
) {
    for (secret, made) in &class.secrets {
        let owners = earlier.iter().filter(|other| other.key.0 == key.0);
        let mut owners = owners.filter_map(|other| {
            let (_, line) = other.secrets.iter().find(|(name, _)| name == secret)?;
            Some((other, line))
        });
        let owner = owners.find(|(other, _)| !makes_the_same(document, other.document, secret));
        if let Some((other, line)) = owner {
            file.add(made.line, format!("the classes {} and {} both make the Secret {secret}, {} in {}:{line}; the one that writes it first keeps it: give each its own secretName, or write all keys into one class", other.key.1, key.1, other.key.1, other.file));
        }
    }
}

/// Returns whether two classes make the same content of a Secret, so that it does not matter which one does.
fn makes_the_same(a: &Node, b: &Node, secret: &str) -> bool {
    let (Some(a), Some(b)) = (a.get("spec"), b.get("spec")) else {
        return false;
    };
    ["provider", "parameters"]
        .iter()
        .all(|field| is_same(a.get(field), b.get(field)))
        && is_same(entry(a, secret), entry(b, secret))
}

/// Returns the entry of a Secret in the specification of a class.
fn entry<'a>(spec: &'a Node, secret: &str) -> Option<&'a Node> {
    let mut entries = spec.items_of("secretObjects").iter();
    entries.find(|entry| entry.text_of("secretName").map(str::trim) == Some(secret))
}

/// Returns whether two values are the same, at whatever line.
fn is_same(a: Option<&Node>, b: Option<&Node>) -> bool {
    let (Some(a), Some(b)) = (a, b) else {
        return a.is_none() && b.is_none();
    };
    match (&a.value, &b.value) {
        (Value::Null, Value::Null) => true,
        (Value::Text(a), Value::Text(b)) | (Value::Other(a), Value::Other(b)) => a == b,
        (Value::List(a), Value::List(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_same(Some(a), Some(b)))
        }
        (Value::Map(x), Value::Map(y)) => {
            let same = |(key, value): &(super::yaml::Key, Node)| {
                is_same(
                    Some(value).filter(|v| !matches!(v.value, Value::Null)),
                    b.get(&key.text),
                )
            };
            x.len() == y.len() && x.iter().all(same)
        }
        _ => false,
    }
}
