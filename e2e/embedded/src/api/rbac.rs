//! Authorisation by the stored roles and bindings.
//!
//! Aggregated ClusterRoles are evaluated for each request; their `rules` field is not rewritten.
//! Escalation is not checked, because only administrators write roles here.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{request::RequestInfo, selectors::Selector, status::Status, store::Store};

/// The user that sent a request.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Identity {
    /// An administrator, who may do everything.
    Admin,
    User {
        name: String,
        groups: Vec<String>,
    },
}

impl Identity {
    pub(super) fn anonymous() -> Identity {
        Identity::User {
            name: "system:anonymous".to_owned(),
            groups: vec!["system:unauthenticated".to_owned()],
        }
    }

    pub(super) fn service_account(namespace: &str, name: &str) -> Identity {
        Identity::User {
            name: format!("system:serviceaccount:{namespace}:{name}"),
            groups: vec![
                "system:serviceaccounts".to_owned(),
                format!("system:serviceaccounts:{namespace}"),
                "system:authenticated".to_owned(),
            ],
        }
    }
}

const ROLES: &str = "roles.rbac.authorization.k8s.io";
const CLUSTER_ROLES: &str = "clusterroles.rbac.authorization.k8s.io";

/// # Errors
/// 403 in the words of a real server when no binding allows the request.
pub(super) fn authorize(
    store: &Store,
    identity: &Identity,
    request: &RequestInfo,
) -> Result<(), Status> {
    let Identity::User { name, groups } = identity else {
        return Ok(());
    };
    let bound = |binding: &Arc<Value>| {
        let subjects = binding["subjects"].as_array();
        subjects
            .into_iter()
            .flatten()
            .any(|subject| names_subject(subject, &binding["metadata"]["namespace"], name, groups))
    };
    let allows = |rules: &[Value]| rules.iter().any(|rule| rule_allows(rule, request));

    let (_, bindings) = store.list("clusterrolebindings.rbac.authorization.k8s.io", None);
    for binding in bindings.iter().filter(|binding| bound(binding)) {
        if allows(&rules_of(store, "", &binding["roleRef"])) {
            return Ok(());
        }
    }
    if !request.namespace.is_empty() {
        let (_, bindings) = store.list(
            "rolebindings.rbac.authorization.k8s.io",
            Some(&request.namespace),
        );
        for binding in bindings.iter().filter(|binding| bound(binding)) {
            if allows(&rules_of(store, &request.namespace, &binding["roleRef"])) {
                return Ok(());
            }
        }
    }
    Err(refusal(store, name, request))
}

fn names_subject(
    subject: &Value,
    binding_namespace: &Value,
    name: &str,
    groups: &[String],
) -> bool {
    let Some(subject_name) = subject["name"].as_str() else {
        return false;
    };
    match subject["kind"].as_str() {
        Some("User") => subject_name == name,
        Some("Group") => groups.iter().any(|group| group == subject_name),
        Some("ServiceAccount") => {
            let namespace = subject["namespace"].as_str().or(binding_namespace.as_str());
            let account = name
                .strip_prefix("system:serviceaccount:")
                .and_then(|rest| rest.split_once(':'));
            namespace.is_some_and(|namespace| account == Some((namespace, subject_name)))
        }
        _ => false,
    }
}

fn rules_of(store: &Store, namespace: &str, reference: &Value) -> Vec<Value> {
    let name = reference["name"].as_str().unwrap_or_default();
    let role = match reference["kind"].as_str() {
        Some("ClusterRole") => store.get(CLUSTER_ROLES, "", name),
        Some("Role") => store.get(ROLES, namespace, name),
        _ => None,
    };
    let Some(role) = role else { return Vec::new() };
    let mut rules = role["rules"].as_array().cloned().unwrap_or_default();
    for selector in role["aggregationRule"]["clusterRoleSelectors"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let (_, roles) = store.list(CLUSTER_ROLES, None);
        for role in roles
            .iter()
            .filter(|role| has_labels(role, &selector["matchLabels"]))
        {
            rules.extend(role["rules"].as_array().into_iter().flatten().cloned());
        }
    }
    rules
}

fn has_labels(object: &Value, wanted: &Value) -> bool {
    wanted.as_object().is_some_and(|wanted| {
        !wanted.is_empty()
            && wanted
                .iter()
                .all(|(key, value)| object["metadata"]["labels"][key] == *value)
    })
}

fn rule_allows(rule: &Value, request: &RequestInfo) -> bool {
    let lists = |field: &str, wanted: &str| {
        let entries = rule[field]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str);
        entries
            .into_iter()
            .any(|entry| entry == "*" || entry == wanted)
    };
    if !lists("verbs", request.verb) {
        return false;
    }
    if !request.is_resource() {
        let paths = rule["nonResourceURLs"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str);
        return paths.into_iter().any(|path| match path.strip_suffix('*') {
            Some(prefix) => request.path.starts_with(prefix),
            None => path == request.path,
        });
    }
    let resource = match request.subresource.as_str() {
        "" => request.resource.clone(),
        subresource => format!("{}/{subresource}", request.resource),
    };
    let named = match rule["resourceNames"].as_array() {
        Some(names) if !names.is_empty() => names
            .iter()
            .any(|name| name.as_str() == Some(request.authorized_name())),
        _ => true,
    };
    let any_resource = !request.subresource.is_empty()
        && lists("resources", &format!("*/{}", request.subresource));
    lists("apiGroups", &request.group) && (lists("resources", &resource) || any_resource) && named
}

fn refusal(store: &Store, user: &str, request: &RequestInfo) -> Status {
    if !request.is_resource() {
        return Status::forbidden_text(format!(
            "forbidden: User \"{user}\" cannot {} path \"{}\"",
            request.verb, request.path
        ));
    }
    let resource = match request.subresource.as_str() {
        "" => request.resource.clone(),
        subresource => format!("{}/{subresource}", request.resource),
    };
    let place = match request.namespace.as_str() {
        "" => "at the cluster scope".to_owned(),
        namespace => format!("in the namespace \"{namespace}\""),
    };
    let why = format!(
        "User \"{user}\" cannot {} resource \"{resource}\" in API group \"{}\" {place}",
        request.verb, request.group
    );
    let name = request.authorized_name();
    match store.resource(&request.qualified()) {
        Some(kind) => Status::forbidden(&kind, name, &why),
        None => {
            let quoted = if name.is_empty() {
                String::new()
            } else {
                format!(" \"{name}\"")
            };
            Status::forbidden_text(format!(
                "{}{quoted} is forbidden: {why}",
                request.qualified()
            ))
        }
    }
}

impl RequestInfo {
    /// Returns the name for `resourceNames`: the object's, or that of a field selector.
    fn authorized_name(&self) -> &str {
        match self.name.as_str() {
            "" => self
                .query("fieldSelector")
                .and_then(Selector::name_in)
                .unwrap_or_default(),
            name => name,
        }
    }
}

/// Returns the roles and bindings with which a cluster starts: discovery for everybody, and the roles
/// to which others aggregate. `admin`, `edit` and `view` have no rules but the aggregated ones.
pub(super) fn bootstrap_objects() -> Vec<(&'static str, Value)> {
    let role = |name: &str, rules: Value| json!({"metadata": {"name": name}, "rules": rules});
    let binding = |role: &str, groups: &[&str]| {
        let subjects: Vec<Value> = groups
            .iter()
            .map(|group| json!({"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": group}))
            .collect();
        json!({
            "metadata": {"name": role},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": subjects,
        })
    };
    let public = ["/healthz", "/livez", "/readyz", "/version", "/version/"];
    let discovery = [
        "/api",
        "/api/*",
        "/apis",
        "/apis/*",
        "/healthz",
        "/livez",
        "/readyz",
        "/version",
        "/version/",
    ];
    let everything = json!([
        {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]},
        {"nonResourceURLs": ["*"], "verbs": ["*"]},
    ]);
    let mut objects = vec![
        (CLUSTER_ROLES, role("cluster-admin", everything)),
        (
            CLUSTER_ROLES,
            role(
                "system:discovery",
                json!([{"nonResourceURLs": discovery, "verbs": ["get"]}]),
            ),
        ),
        (
            CLUSTER_ROLES,
            role(
                "system:public-info-viewer",
                json!([{"nonResourceURLs": public, "verbs": ["get"]}]),
            ),
        ),
    ];
    for name in ["admin", "edit", "view"] {
        let label = format!("rbac.authorization.k8s.io/aggregate-to-{name}");
        let mut aggregated = role(name, json!([]));
        aggregated["aggregationRule"] =
            json!({"clusterRoleSelectors": [{"matchLabels": {label: "true"}}]});
        objects.push((CLUSTER_ROLES, aggregated));
    }
    let bindings = "clusterrolebindings.rbac.authorization.k8s.io";
    objects.extend([
        (bindings, binding("cluster-admin", &["system:masters"])),
        (
            bindings,
            binding("system:discovery", &["system:authenticated"]),
        ),
        (
            bindings,
            binding(
                "system:public-info-viewer",
                &["system:authenticated", "system:unauthenticated"],
            ),
        ),
    ]);
    objects
}
