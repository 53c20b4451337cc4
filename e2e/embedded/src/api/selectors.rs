//! Label and field selectors of list and watch requests.

use std::collections::BTreeMap;

use kube::core::{Expression, SelectorExt};
use serde::Deserialize;
use serde_json::Value;

use super::{resources::Resource, status::Status};

/// A condition for objects.
pub(super) struct Selector {
    labels: Vec<Expression>,
    fields: Vec<FieldTerm>,
}

struct FieldTerm {
    path: String,
    value: String,
    equal: bool,
}

impl Selector {
    /// Reads the two query parameters.
    ///
    /// # Errors
    /// Returns 400 for a selector that cannot be parsed, or a field that this kind does not support.
    pub(super) fn parse(
        resource: &Resource,
        labels: &str,
        fields: &str,
    ) -> Result<Selector, Status> {
        let unreadable =
            |text: &str| Status::bad_request(format!("unable to parse requirement: {text}"));
        let labels = split_outside_parentheses(labels)
            .map(|term| label_term(term).ok_or_else(|| unreadable(term)))
            .collect::<Result<_, _>>()?;
        let mut terms = Vec::new();
        for term in fields
            .split(',')
            .map(str::trim)
            .filter(|term| !term.is_empty())
        {
            let (path, value, equal) = comparison(term).ok_or_else(|| unreadable(term))?;
            if !selectable(resource, path) {
                return Err(Status::bad_request(format!(
                    "Unable to find {:?} that match label selector \"\", field selector {fields:?}: field label not supported: {path}",
                    format!("{}, Resource={}", resource.storage, resource.plural),
                )));
            }
            terms.push(FieldTerm {
                path: path.to_owned(),
                value: value.to_owned(),
                equal,
            });
        }
        Ok(Selector {
            labels,
            fields: terms,
        })
    }

    /// Returns the name that a field selector requires, for `resourceNames`.
    pub(super) fn name_in(fields: &str) -> Option<&str> {
        fields
            .split(',')
            .find_map(|term| match comparison(term.trim())? {
                ("metadata.name", name, true) => Some(name),
                _ => None,
            })
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        let labels = BTreeMap::<String, String>::deserialize(labels).unwrap_or_default();
        self.labels.iter().all(|term| term.matches(&labels))
            && self.fields.iter().all(|term| term.matches(object))
    }
}

impl FieldTerm {
    fn matches(&self, object: &Value) -> bool {
        let mut found = object;
        for part in self.path.split('.') {
            found = &found[part];
        }
        let equal = match found {
            Value::String(text) => *text == self.value,
            Value::Null => self.value.is_empty(),
            Value::Bool(flag) => (if *flag { "true" } else { "false" }) == self.value,
            _ => false,
        };
        equal == self.equal
    }
}

fn split_outside_parentheses(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_u32;
    text.split(move |c| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    })
    .map(str::trim)
    .filter(|term| !term.is_empty())
}

fn label_term(term: &str) -> Option<Expression> {
    if let Some(key) = term.strip_prefix('!') {
        return is_key(key.trim()).then(|| Expression::DoesNotExist(key.trim().to_owned()));
    }
    if let Some((head, values)) = term.strip_suffix(')').and_then(|term| term.split_once('(')) {
        let values = values
            .split(',')
            .map(|value| value.trim().to_owned())
            .collect();
        let (key, operator) = head.trim().rsplit_once(char::is_whitespace)?;
        let key = key.trim().to_owned();
        return match operator {
            _ if !is_key(&key) => None,
            "in" => Some(Expression::In(key, values)),
            "notin" => Some(Expression::NotIn(key, values)),
            _ => None,
        };
    }
    match comparison(term) {
        Some((key, value, true)) => Some(Expression::Equal(key.to_owned(), value.to_owned())),
        Some((key, value, false)) => Some(Expression::NotEqual(key.to_owned(), value.to_owned())),
        None => is_key(term).then(|| Expression::Exists(term.to_owned())),
    }
}

/// Parses `a=b`, `a==b` or `a!=b` into a, b, and whether they should be equal.
fn comparison(term: &str) -> Option<(&str, &str, bool)> {
    let (key, value, equal) = match term.split_once("!=") {
        Some((key, value)) => (key, value, false),
        None => {
            let (key, value) = term.split_once("==").or_else(|| term.split_once('='))?;
            (key, value, true)
        }
    };
    let (key, value) = (key.trim(), value.trim());
    is_key(key).then_some((key, value, equal))
}

fn is_key(text: &str) -> bool {
    !text.is_empty()
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
}

fn selectable(resource: &Resource, path: &str) -> bool {
    let own: &[&str] = match resource.qualified.as_str() {
        "pods" => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        "events" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "type",
        ],
        "secrets" => &["type"],
        "namespaces" => &["status.phase"],
        "nodes" => &["spec.unschedulable"],
        _ => &[],
    };
    path == "metadata.name"
        || (path == "metadata.namespace" && resource.namespaced)
        || own.contains(&path)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn pods() -> Resource {
        Resource::built_in()
            .find(|resource| resource.plural == "pods")
            .unwrap()
    }

    #[rstest]
    #[case("a=1", "", true)]
    #[case("a==2", "", false)]
    #[case("a!=2,b!=1", "", true)]
    #[case("a in (1, 2),c", "", true)]
    #[case("a notin (1,2)", "", false)]
    #[case("!a", "", false)]
    #[case("!b,c", "", true)]
    #[case("", "spec.nodeName=n1,metadata.name!=q", true)]
    #[case("", "spec.nodeName=n2", false)]
    #[case("", "status.phase=", true)]
    fn selects(#[case] labels: &str, #[case] fields: &str, #[case] expected: bool) {
        let pod = json!({"metadata": {"name": "p", "labels": {"a": "1", "c": ""}}, "spec": {"nodeName": "n1"}});
        let selector = Selector::parse(&pods(), labels, fields).unwrap();
        assert_eq!(selector.matches(&pod), expected);
    }

    #[test]
    fn refuses_what_it_cannot_select_by() {
        let status = Selector::parse(&pods(), "", "spec.color=red")
            .err()
            .unwrap();
        assert_eq!(
            status.message,
            "Unable to find \"v1, Resource=pods\" that match label selector \"\", \
             field selector \"spec.color=red\": field label not supported: spec.color"
        );
        let status = Selector::parse(&pods(), "a like b", "").err().unwrap();
        assert_eq!(status.code, 400);
    }
}
