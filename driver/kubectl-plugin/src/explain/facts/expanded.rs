//! Resolves the references to variables in a `subPathExpr`, as kubelet does, as far as the pod says their values.

use k8s_openapi::api::core::v1::{Container, EnvVar};
use kube::ResourceExt as _;

use super::Facts;

/// The references to references that are followed.
const MAX_DEPTH: usize = 8;

impl Facts {
    /// Returns the path that an expression of a container names, if the values of all its variables are known.
    pub(in crate::explain) fn expanded(
        &self,
        container: &Container,
        expression: &str,
    ) -> Option<String> {
        let all = container.env.as_deref().unwrap_or_default();
        expand(expression, &|name| self.value(all, name, MAX_DEPTH))
    }

    /// Returns the value of a variable. It may name those that are defined before it. The last one of a name counts.
    fn value(&self, all: &[EnvVar], name: &str, depth: usize) -> Option<String> {
        let at = all.iter().rposition(|variable| variable.name == name)?;
        let (variable, before) = (&all[at], &all[..at]);
        let Some(source) = &variable.value_from else {
            let value = variable.value.as_deref().unwrap_or_default();
            let depth = depth.checked_sub(1)?;
            return expand(value, &|name| self.value(before, name, depth));
        };
        self.field(&source.field_ref.as_ref()?.field_path)
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

/// Replaces `$(NAME)` by values. `$$` stands for a dollar sign.
fn expand(text: &str, value: &dyn Fn(&str) -> Option<String>) -> Option<String> {
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
                expanded.push_str(&value(name)?);
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
        let value = |name: &str| (name == "POD").then(|| "web".to_owned());
        for (text, expected) in [
            ("$(POD).key", Some("web.key")),
            ("a/$(POD)/$(POD)", Some("a/web/web")),
            ("$$(POD)", Some("$(POD)")),
            ("$POD", Some("$POD")),
            ("$(POD", Some("$(POD")),
            ("a$", Some("a$")),
            ("$(OTHER)/$(POD)", None),
        ] {
            assert_eq!(expand(text, &value).as_deref(), expected, "{text}");
        }
    }
}
