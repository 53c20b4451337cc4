//! Resolves the references to variables in a `subPathExpr`, as kubelet does, as far as the pod says their values.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, EnvVar};
use kube::ResourceExt as _;

use super::Facts;

/// The longest path of Linux in bytes. What is longer is not resolved: a value that names others many times grows with
/// each of them.
const LONGEST: usize = 4096;

impl Facts {
    /// Returns the path that an expression of a container names, if the values of all its variables are known.
    pub(in crate::explain) fn expanded(
        &self,
        container: &Container,
        expression: &str,
    ) -> Option<String> {
        let all = container.env.as_deref().unwrap_or_default();
        expand(expression, &values(all, |path| self.field(path)))
    }

    /// Returns a field of the pod by the path of the downward API.
    fn field(&self, path: &str) -> Option<String> {
        let (pod, spec) = (&self.pod, self.pod.spec.as_ref());
        match path {
            "metadata.name" => return Some(pod.name_any()),
            "metadata.namespace" => return pod.namespace(),
            "metadata.uid" => return pod.uid(),
            "spec.nodeName" => return spec?.node_name.clone(),
            "spec.serviceAccountName" => return spec?.service_account_name.clone(),
            _ => {}
        }
        let (map, key) = path.strip_suffix("']")?.split_once("['")?;
        let all = match map {
            "metadata.labels" => pod.labels(),
            "metadata.annotations" => pod.annotations(),
            _ => return None,
        };
        // One that is not there is empty.
        Some(all.get(key).cloned().unwrap_or_default())
    }
}

/// The values of variables; none for one whose value is not known.
type Values<'a> = BTreeMap<&'a str, Option<String>>;

/// Returns the values of a container's variables. `field` returns a field of the pod.
fn values(all: &[EnvVar], field: impl Fn(&str) -> Option<String>) -> Values<'_> {
    let mut values = Values::new();
    // A value may name the variables that are defined before it. The last one of a name counts.
    for variable in all {
        let value = match &variable.value_from {
            Some(source) => {
                let of_pod = source.field_ref.as_ref();
                of_pod.and_then(|of_pod| field(&of_pod.field_path))
            }
            None => expand(variable.value.as_deref().unwrap_or_default(), &values),
        };
        values.insert(variable.name.as_str(), value);
    }
    values
}

/// Replaces `$(NAME)` by values. `$$` stands for a dollar sign.
fn expand(text: &str, values: &Values<'_>) -> Option<String> {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        if let Some(after) = after.strip_prefix('$') {
            expanded.push('$');
            rest = after;
            continue;
        }
        match after
            .strip_prefix('(')
            .and_then(|name| name.split_once(')'))
        {
            Some((name, after)) => {
                expanded.push_str(values.get(name)?.as_ref()?);
                if expanded.len() > LONGEST {
                    return None;
                }
                rest = after;
            }
            None => {
                expanded.push('$');
                rest = after;
            }
        }
    }
    expanded.push_str(rest);
    Some(expanded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_replaced_as_kubelet_does_it() {
        let values = Values::from([("POD", Some("web".to_owned())), ("UNKNOWN", None)]);
        for (text, expected) in [
            ("$(POD).key", Some("web.key")),
            ("a/$(POD)/$(POD)", Some("a/web/web")),
            ("$$(POD)", Some("$(POD)")),
            ("$POD", Some("$POD")),
            ("$(POD", Some("$(POD")),
            ("a$", Some("a$")),
            ("$(OTHER)/$(POD)", None),
            ("$(UNKNOWN)", None),
        ] {
            assert_eq!(expand(text, &values).as_deref(), expected, "{text}");
        }
    }

    /// Each variable names the one before it a thousand times: what is resolved once each is a little work, and a
    /// text that grows with each is not resolved at all.
    #[test]
    fn variables_that_name_each_other_cost_no_more_than_their_text() {
        for (first, last) in [("", Some("")), ("x", None)] {
            let variable = |number: usize| EnvVar {
                name: format!("V{number}"),
                value: Some(match number {
                    0 => first.to_owned(),
                    _ => format!("$(V{})", number - 1).repeat(1000),
                }),
                ..EnvVar::default()
            };
            let all: Vec<_> = (0..10).map(variable).collect();
            let values = values(&all, |_| None);
            assert_eq!(expand("$(V9)", &values).as_deref(), last, "{first:?}");
        }
    }
}
