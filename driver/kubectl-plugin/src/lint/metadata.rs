//! Checks labels and annotations that a Secret gets: the API server refuses the Secret if it refuses one of them.

use driver::record::is_object_name;

use super::{Findings, yaml::Node};

/// The longest name of a label or an annotation, without its prefix, and the longest value of a label.
const LONGEST: usize = 63;

/// Checks the labels and annotations of an entry of `secretObjects`.
pub(super) fn check(secret: &Node, file: &mut Findings<'_>) {
    for (map, what) in [("labels", "label"), ("annotations", "annotation")] {
        for (key, value) in secret.get(map).map_or(&[][..], Node::fields) {
            // The names of annotations may be in upper case.
            let is_label = map == "labels";
            let name = match is_label {
                true => key.text.clone(),
                false => key.text.to_lowercase(),
            };
            if is_placeholder(&name) {
                continue;
            }
            if !is_name(&name) {
                file.add(
                    key.line,
                    format!(
                        "{:?} cannot be the name of a {what}: up to {LONGEST} letters, digits, \"-\", \"_\" and \".\", a letter or a digit first and last, and perhaps a domain with a slash before",
                        key.text
                    )
                    .replace("a annotation", "an annotation"),
                );
                continue;
            }
            let Some(text) = value.text() else {
                if !matches!(value.value, super::yaml::Value::Null) {
                    file.add(
                        value.line,
                        format!("the {what} {} must be a text; put it in quotes", key.text),
                    );
                }
                continue;
            };
            if is_label && !text.is_empty() && !is_placeholder(text) && !is_part(text) {
                file.add(
                    value.line,
                    format!(
                        "{text:?} cannot be the value of a label: up to {LONGEST} letters, digits, \"-\", \"_\" and \".\", a letter or a digit first and last; an annotation may have it"
                    ),
                );
            }
        }
    }
}

/// Returns whether a text has something that is replaced before it is applied.
fn is_placeholder(text: &str) -> bool {
    text.contains(['$', '{'])
}

/// Returns whether a text is a qualified name (`IsQualifiedName` of Kubernetes).
fn is_name(name: &str) -> bool {
    match name.split_once('/') {
        Some((domain, name)) => is_object_name(domain) && is_part(name),
        None => is_part(name),
    }
}

fn is_part(text: &str) -> bool {
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    text.len() <= LONGEST
        && text.chars().all(is_allowed)
        && ends(text.chars().next())
        && ends(text.chars().next_back())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_kubernetes() {
        let long = "a".repeat(63);
        for name in [
            "team",
            "app.kubernetes.io/name",
            "A_b.c-1",
            "x/Y",
            "1",
            &long,
        ] {
            assert!(is_name(name), "{name}");
        }
        let longer = "a".repeat(64);
        for name in [
            "", "/a", "a/", "a/b/c", "-a", "a-", "a b", "A/b", "a_b/c", "é", &longer,
        ] {
            assert!(!is_name(name), "{name}");
        }
    }
}
