//! Authorisation by the stored roles and bindings.
//!
//! ClusterRoles are not aggregated: `aggregationRule` gives no rules, and `admin`, `edit` and `view`
//! do not exist. Escalation is not checked, because only administrators write roles here.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{body::items, request::RequestInfo, selectors::Selector, status::Status, store::Store};

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
            groups: service_account_groups(namespace).into(),
        }
    }
}

/// Returns the groups of the service accounts of a namespace.
pub(super) fn service_account_groups(namespace: &str) -> [String; 3] {
    [
        "system:serviceaccounts".to_owned(),
        format!("system:serviceaccounts:{namespace}"),
        "system:authenticated".to_owned(),
    ]
}

const ROLES: &str = "roles.rbac.authorization.k8s.io";
const CLUSTER_ROLES: &str = "clusterroles.rbac.authorization.k8s.io";
const CLUSTER_ROLE_BINDINGS: &str = "clusterrolebindings.rbac.authorization.k8s.io";

/// Checks that a binding of the user allows a request.
///
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
        items(&binding["subjects"])
            .any(|subject| names_subject(subject, &binding["metadata"]["namespace"], name, groups))
    };
    let allows = |role: Option<Arc<Value>>| {
        role.is_some_and(|role| items(&role["rules"]).any(|rule| rule_allows(rule, request)))
    };

    let (_, bindings) = store.list(CLUSTER_ROLE_BINDINGS, None);
    for binding in bindings.iter().filter(|binding| bound(binding)) {
        if allows(role(store, "", &binding["roleRef"])) {
            return Ok(());
        }
    }
    if !request.namespace.is_empty() {
        let (_, bindings) = store.list(
            "rolebindings.rbac.authorization.k8s.io",
            Some(&request.namespace),
        );
        for binding in bindings.iter().filter(|binding| bound(binding)) {
            if allows(role(store, &request.namespace, &binding["roleRef"])) {
                return Ok(());
            }
        }
    }
    Err(refusal(store, name, request))
}

/// Returns whether a request creates a review, which is answered and not stored.
pub(super) fn is_review(request: &RequestInfo) -> bool {
    request.group == "authorization.k8s.io"
        && request.version == "v1"
        && matches!(
            request.resource.as_str(),
            "selfsubjectaccessreviews" | "subjectaccessreviews"
        )
}

/// Answers whether a user may do something: the one whom the review names, or the one who asks.
pub(super) fn review(store: &Store, asks: &Identity, mut review: Value) -> Value {
    let spec = &review["spec"];
    let groups = items(&spec["groups"]).filter_map(Value::as_str);
    let groups: Vec<String> = groups.map(str::to_owned).collect();
    let about = match spec["user"].as_str() {
        Some(name) => Identity::User {
            name: name.to_owned(),
            groups,
        },
        None => asks.clone(),
    };
    let request = RequestInfo::asked(&spec["resourceAttributes"]);
    let allowed = authorize(store, &about, &request).is_ok();
    review["status"] = json!({"allowed": allowed});
    review
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

/// Returns the role that a binding in a namespace refers to.
fn role(store: &Store, namespace: &str, reference: &Value) -> Option<Arc<Value>> {
    let name = reference["name"].as_str()?;
    match reference["kind"].as_str()? {
        "ClusterRole" => store.get(CLUSTER_ROLES, "", name),
        "Role" => store.get(ROLES, namespace, name),
        _ => None,
    }
}

fn rule_allows(rule: &Value, request: &RequestInfo) -> bool {
    let strings = |field: &str| items(&rule[field]).filter_map(Value::as_str);
    let lists =
        |field: &str, expected: &str| strings(field).any(|entry| entry == "*" || entry == expected);
    if !lists("verbs", request.verb) {
        return false;
    }
    if !request.is_resource() {
        return strings("nonResourceURLs").any(|path| match path.strip_suffix('*') {
            Some(prefix) => request.path.starts_with(prefix),
            None => path == request.path,
        });
    }
    let resource = request.resource_path();
    let mut names = strings("resourceNames").peekable();
    let named = names.peek().is_none() || names.any(|name| name == request.authorized_name());
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
    let resource = request.resource_path();
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
    /// Returns the resource with its subresource, as in a rule.
    fn resource_path(&self) -> String {
        match self.subresource.as_str() {
            "" => self.resource.clone(),
            subresource => format!("{}/{subresource}", self.resource),
        }
    }

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

/// Returns the roles with which a cluster starts, and their bindings: discovery for everybody, and
/// `cluster-admin`.
pub(super) fn bootstrap_objects() -> Vec<(&'static str, Value)> {
    let get = |paths: &[&str]| json!([{"nonResourceURLs": paths, "verbs": ["get"]}]);
    let public = ["/healthz", "/livez", "/readyz", "/version", "/version/"];
    let served = ["/api", "/api/*", "/apis", "/apis/*"];
    let everything = json!([
        {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]},
        {"nonResourceURLs": ["*"], "verbs": ["*"]},
    ]);
    let everybody = ["system:authenticated", "system:unauthenticated"];
    let roles = [
        ("cluster-admin", everything, &["system:masters"][..]),
        (
            "system:discovery",
            get(&[&served[..], &public].concat()),
            &everybody[..1],
        ),
        ("system:public-info-viewer", get(&public), &everybody),
    ];
    let objects = roles.into_iter().flat_map(|(name, rules, groups)| {
        let group = "rbac.authorization.k8s.io";
        let subject = |name| json!({"kind": "Group", "apiGroup": group, "name": name});
        let subjects: Vec<Value> = groups.iter().map(subject).collect();
        let binding = json!({
            "metadata": {"name": name},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": name},
            "subjects": subjects,
        });
        let role = json!({"metadata": {"name": name}, "rules": rules});
        [(CLUSTER_ROLES, role), (CLUSTER_ROLE_BINDINGS, binding)]
    });
    objects.collect()
}
