//! Rules of a write beyond types: those of metadata for every kind, and the defaults and rules of the
//! built-in kinds that a CSI driver and its manifests meet.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Map, Value, json};

use super::{
    body::items,
    field_error::{Errors, FieldError},
    resources::Resource,
    status::Status,
    store::Store,
};

const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', \
     and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
     '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start \
     and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
     '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', \
     and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used \
     for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const QUALIFIED_NAME: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end \
     with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
     '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const CONFIG_KEY: &str = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or \
     'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";
/// The size limit of all values of a Secret together, in bytes.
const MAX_SECRET_SIZE: usize = 1024 * 1024;

/// Fills in the defaults of a new or replaced object of a built-in kind.
pub(super) fn set_defaults(resource: &Resource, object: &mut Value) {
    match resource.qualified.as_str() {
        "pods" => pod_defaults(object),
        "secrets" => {
            fold_string_data(object);
            default(object, "type", || json!("Opaque"));
        }
        "namespaces" => {
            let name = object["metadata"]["name"].clone();
            object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
            default(&mut object["spec"], "finalizers", || json!(["kubernetes"]));
            default(&mut object["status"], "phase", || json!("Active"));
        }
        "csidrivers.storage.k8s.io" => {
            let spec = &mut object["spec"];
            default(spec, "attachRequired", || json!(true));
            default(spec, "podInfoOnMount", || json!(false));
            default(spec, "storageCapacity", || json!(false));
            default(spec, "fsGroupPolicy", || json!("ReadWriteOnceWithFSType"));
            default(spec, "volumeLifecycleModes", || json!(["Persistent"]));
            default(spec, "requiresRepublish", || json!(false));
            default(spec, "seLinuxMount", || json!(false));
        }
        "daemonsets.apps" => {
            let rolling = || json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}});
            default(&mut object["spec"], "updateStrategy", rolling);
            default(&mut object["spec"], "revisionHistoryLimit", || json!(10));
        }
        "deployments.apps" | "replicasets.apps" | "statefulsets.apps" => {
            default(&mut object["spec"], "replicas", || json!(1));
        }
        "clusterrolebindings.rbac.authorization.k8s.io"
        | "rolebindings.rbac.authorization.k8s.io" => {
            for subject in object
                .get_mut("subjects")
                .and_then(Value::as_array_mut)
                .into_iter()
                .flatten()
            {
                if subject["kind"] != "ServiceAccount" {
                    default(subject, "apiGroup", || json!("rbac.authorization.k8s.io"));
                }
            }
        }
        _ => {}
    }
}

fn default(object: &mut Value, field: &str, value: impl FnOnce() -> Value) {
    if object.is_null() {
        *object = Value::Object(Map::new());
    }
    if let Some(map) = object.as_object_mut() {
        map.entry(field).or_insert_with(value);
    }
}

fn pod_defaults(pod: &mut Value) {
    let spec = &mut pod["spec"];
    default(spec, "restartPolicy", || json!("Always"));
    default(spec, "dnsPolicy", || json!("ClusterFirst"));
    default(spec, "schedulerName", || json!("default-scheduler"));
    default(spec, "terminationGracePeriodSeconds", || json!(30));
    default(spec, "enableServiceLinks", || json!(true));
    default(spec, "securityContext", || json!({}));
    default(spec, "serviceAccountName", || json!("default"));
    let account = spec["serviceAccountName"].clone();
    default(spec, "serviceAccount", || account);
    for list in ["containers", "initContainers"] {
        for container in spec
            .get_mut(list)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            let latest = container["image"].as_str().is_some_and(|image| {
                image.ends_with(":latest")
                    || !image.rsplit('/').next().unwrap_or(image).contains(':')
            });
            let policy = if latest { "Always" } else { "IfNotPresent" };
            default(container, "imagePullPolicy", || json!(policy));
            default(container, "terminationMessagePath", || {
                json!("/dev/termination-log")
            });
            default(container, "terminationMessagePolicy", || json!("File"));
            default(container, "resources", || json!({}));
        }
    }
    default(&mut pod["status"], "phase", || json!("Pending"));
    default(&mut pod["status"], "qosClass", || json!("BestEffort"));
}

/// Moves `stringData` into `data`.
fn fold_string_data(secret: &mut Value) {
    let Some(Value::Object(texts)) = secret
        .as_object_mut()
        .and_then(|map| map.remove("stringData"))
    else {
        return;
    };
    for (key, text) in texts {
        let encoded = BASE64_STANDARD.encode(text.as_str().unwrap_or_default());
        default(secret, "data", || json!({}));
        secret["data"][&key] = json!(encoded);
    }
}

/// Returns everything that a real server refuses in this object, which replaces `old`.
pub(super) fn errors(resource: &Resource, old: Option<&Value>, object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    metadata_errors(resource, object, &mut errors);
    match resource.qualified.as_str() {
        "secrets" => secret_errors(old, object, &mut errors),
        "pods"
            if object["spec"]["containers"]
                .as_array()
                .is_none_or(Vec::is_empty) =>
        {
            errors.push(FieldError::required("spec.containers", ""));
        }
        "events" => {
            let involved = object["involvedObject"]["namespace"]
                .as_str()
                .unwrap_or_default();
            let own = object["metadata"]["namespace"].as_str().unwrap_or_default();
            if involved != own && !(involved.is_empty() && own == "default") {
                let why = "does not match event.namespace";
                errors.invalid("involvedObject.namespace", &json!(involved), why);
            }
        }
        "csidrivers.storage.k8s.io" => csi_driver_errors(old, &object["spec"], &mut errors),
        "clusterrolebindings.rbac.authorization.k8s.io"
        | "rolebindings.rbac.authorization.k8s.io"
            if old.is_some_and(|old| old["roleRef"] != object["roleRef"]) =>
        {
            errors.invalid("roleRef", &object["roleRef"], "cannot change roleRef");
        }
        _ => {}
    }
    errors.0
}

fn metadata_errors(resource: &Resource, object: &Value, errors: &mut Errors) {
    let metadata = &object["metadata"];
    let name = metadata["name"].as_str().unwrap_or_default();
    if resource.group == "rbac.authorization.k8s.io" {
        if name.contains(['/', '%']) || matches!(name, "." | "..") {
            errors.invalid("metadata.name", &metadata["name"], "may not contain '/'");
        }
    } else {
        let (longest, rule, dots) = match resource.qualified.as_str() {
            "namespaces" => (63, LABEL, false),
            _ => (253, SUBDOMAIN, true),
        };
        if name.len() > longest {
            let why = format!("must be no more than {longest} bytes");
            errors.invalid("metadata.name", &metadata["name"], &why);
        }
        let parts_fit = name.split('.').all(is_dns_label);
        if !parts_fit || (!dots && name.contains('.')) {
            errors.invalid("metadata.name", &metadata["name"], rule);
        }
    }
    for (key, value) in metadata["labels"].as_object().into_iter().flatten() {
        check_key("metadata.labels", key, errors);
        let text = value.as_str().unwrap_or_default();
        if text.len() > 63 {
            errors.invalid("metadata.labels", value, "must be no more than 63 bytes");
        }
        if !text.is_empty() && !is_qualified_part(text) {
            errors.invalid("metadata.labels", value, LABEL_VALUE);
        }
    }
    for (key, _) in metadata["annotations"].as_object().into_iter().flatten() {
        check_key("metadata.annotations", &key.to_lowercase(), errors);
    }
    let mut controllers = 0;
    for (index, owner) in items(&metadata["ownerReferences"]).enumerate() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if owner[field].as_str().is_none_or(str::is_empty) {
                let path = format!("metadata.ownerReferences[{index}].{field}");
                errors.invalid(path, &json!(""), "must not be empty");
            }
        }
        controllers += u32::from(owner["controller"] == true);
    }
    if controllers > 1 {
        let why = "Only one reference can have Controller set to true";
        let owners = &metadata["ownerReferences"];
        errors.invalid("metadata.ownerReferences", owners, why);
    }
}

fn is_dns_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let plain = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    bytes.first().is_some_and(plain)
        && bytes.last().is_some_and(plain)
        && bytes.iter().all(|b| plain(b) || *b == b'-')
}

fn is_qualified_part(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = |b: &u8| b.is_ascii_alphanumeric();
    bytes.first().is_some_and(ends)
        && bytes.last().is_some_and(ends)
        && bytes.iter().all(|b| ends(b) || b"-_.".contains(b))
}

fn check_key(field: &str, key: &str, errors: &mut Errors) {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if prefix.is_some_and(|prefix| prefix.len() > 253 || !prefix.split('.').all(is_dns_label)) {
        let why = format!("prefix part {SUBDOMAIN}");
        errors.invalid(field, &json!(key), &why);
    }
    if name.len() > 63 {
        let why = "name part must be no more than 63 bytes";
        errors.invalid(field, &json!(key), why);
    }
    if !is_qualified_part(name) {
        errors.invalid(field, &json!(key), QUALIFIED_NAME);
    }
}

fn secret_errors(old: Option<&Value>, secret: &Value, errors: &mut Errors) {
    let data = secret["data"].as_object();
    let mut size = 0;
    for (key, value) in data.into_iter().flatten() {
        let valid = !key.is_empty()
            && key
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !valid || matches!(key.as_str(), "." | "..") {
            errors.invalid(format!("data[{key}]"), &json!(key), CONFIG_KEY);
        }
        if key.len() > 253 {
            let why = "must be no more than 253 bytes";
            errors.invalid(format!("data[{key}]"), &json!(key), why);
        }
        let encoded = value.as_str().unwrap_or_default();
        size += encoded.len() / 4 * 3 - encoded.bytes().rev().take_while(|&b| b == b'=').count();
    }
    if size > MAX_SECRET_SIZE {
        errors.push(FieldError::too_long("data", MAX_SECRET_SIZE));
    }
    if let Some(old) = old {
        if old["type"] != secret["type"] {
            errors.invalid("type", &secret["type"], "field is immutable");
        }
        if old["immutable"] == true {
            let why = "field is immutable when `immutable` is set";
            if secret["immutable"] != true {
                errors.push(FieldError::forbidden("immutable", why));
            }
            if old["data"] != secret["data"] {
                errors.push(FieldError::forbidden("data", why));
            }
        }
    }
    let has = |key: &str| data.is_some_and(|data| data.contains_key(key));
    let needed: &[&str] = match secret["type"].as_str().unwrap_or_default() {
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        "kubernetes.io/basic-auth" if !has("username") && !has("password") => {
            &["username", "password"]
        }
        "kubernetes.io/service-account-token" => {
            let annotation = "kubernetes.io/service-account.name";
            let account = secret["metadata"]["annotations"][annotation].as_str();
            if account.is_none_or(str::is_empty) {
                let path = format!("metadata.annotations[{annotation}]");
                errors.push(FieldError::required(path, ""));
            }
            &[]
        }
        _ => &[],
    };
    for key in needed.iter().filter(|key| !has(key)) {
        errors.push(FieldError::required(format!("data[{key}]"), ""));
    }
}

/// Checks a CSIDriver as a real API server does: `ValidateCSIDriver` and `ValidateCSIDriverUpdate` in
/// `pkg/apis/storage/validation/validation.go` of kubernetes/kubernetes.
fn csi_driver_errors(old: Option<&Value>, spec: &Value, errors: &mut Errors) {
    if let Some(old) = old {
        for field in ["attachRequired", "volumeLifecycleModes"] {
            if old["spec"][field] != spec[field] {
                let path = format!("spec.{field}");
                errors.invalid(path, &spec[field], "field is immutable");
            }
        }
    }
    let mut audiences = Vec::new();
    for (index, request) in items(&spec["tokenRequests"]).enumerate() {
        let path = format!("spec.tokenRequests[{index}]");
        let audience = &request["audience"];
        if audiences.contains(&audience) {
            errors.push(FieldError::duplicate(&format!("{path}.audience"), audience));
        }
        audiences.push(audience);
        let seconds = &request["expirationSeconds"];
        let why = match seconds.as_i64() {
            Some(..600) => "may not specify a duration less than 10 minutes",
            Some(0x1_0000_0001..) => "may not specify a duration larger than 2^32 seconds",
            _ => continue,
        };
        errors.invalid(format!("{path}.expirationSeconds"), seconds, why);
    }
    let in_secrets = &spec["serviceAccountTokenInSecrets"];
    if !in_secrets.is_null() && audiences.is_empty() {
        let why = "serviceAccountTokenInSecrets may only be set when tokenRequests is specified";
        errors.invalid("spec.serviceAccountTokenInSecrets", in_secrets, why);
    }
}

/// Applies the rules that concern other objects: the service account of a new pod must exist.
///
/// # Errors
/// Returns 403 with the text of the ServiceAccount admission plugin.
pub(super) fn check_surroundings(
    store: &Store,
    resource: &Resource,
    object: &Value,
) -> Result<(), Status> {
    if resource.qualified != "pods" {
        return Ok(());
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let namespace = text(&object["metadata"]["namespace"]);
    let account = text(&object["spec"]["serviceAccountName"]);
    // The store refuses a namespace that does not exist.
    if store.get("namespaces", "", &namespace).is_some()
        && store.get("serviceaccounts", &namespace, &account).is_none()
    {
        let why = format!(
            "error looking up service account {namespace}/{account}: serviceaccount \"{account}\" not found"
        );
        return Err(Status::forbidden(
            resource,
            &text(&object["metadata"]["name"]),
            &why,
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn refusals(plural: &str, old: Option<Value>, mut object: Value) -> Vec<String> {
        let resource = Resource::built_in()
            .find(|resource| resource.plural == plural)
            .unwrap();
        set_defaults(&resource, &mut object);
        errors(&resource, old.as_ref(), &object)
            .into_iter()
            .map(|error| format!("{}: {}", error.field, error.message))
            .collect()
    }

    #[rstest]
    #[case("secrets", json!({"metadata": {"name": "Big"}}), "metadata.name: Invalid value: \"Big\": a lowercase RFC 1123")]
    #[case("secrets", json!({"metadata": {"name": "a", "labels": {"k": "x".repeat(64)}}}), "must be no more than 63 bytes")]
    #[case("secrets", json!({"metadata": {"name": "x".repeat(254)}}), "must be no more than 253 bytes")]
    #[case("secrets", json!({"metadata": {"name": "a"}, "data": {"a/b": ""}}), "data[a/b]: Invalid value: \"a/b\": a valid config key")]
    #[case("secrets", json!({"metadata": {"name": "a"}, "type": "kubernetes.io/tls", "data": {"tls.crt": ""}}), "data[tls.key]: Required value")]
    #[case("secrets", json!({"metadata": {"name": "a"}, "data": {"k": BASE64_STANDARD.encode(vec![0; MAX_SECRET_SIZE + 1])}}), "data: Too long: may not be more than 1048576 bytes")]
    #[case("secrets", json!({"metadata": {"name": "a", "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": ""}]}}), "metadata.ownerReferences[0].uid: Invalid value: \"\": must not be empty")]
    #[case("pods", json!({"metadata": {"name": "a"}, "spec": {}}), "spec.containers: Required value")]
    #[case("csidrivers", json!({"metadata": {"name": "a"}, "spec": {"tokenRequests": [{"audience": "x"}, {"audience": "x"}]}}), "spec.tokenRequests[1].audience: Duplicate value: \"x\"")]
    #[case("csidrivers", json!({"metadata": {"name": "a"}, "spec": {"serviceAccountTokenInSecrets": true}}), "spec.serviceAccountTokenInSecrets: Invalid value: true")]
    fn refuses(#[case] plural: &str, #[case] object: Value, #[case] expected: &str) {
        let found = refusals(plural, None, object);
        assert!(found.len() == 1 && found[0].contains(expected), "{found:?}");
    }

    #[test]
    fn a_secret_of_exactly_the_limit_is_fine() {
        let data = BASE64_STANDARD.encode(vec![0; MAX_SECRET_SIZE]);
        let found = refusals(
            "secrets",
            None,
            json!({"metadata": {"name": "a"}, "data": {"k": data}}),
        );
        assert_eq!(found, [""; 0]);
    }

    #[test]
    fn the_lifecycle_of_a_driver_is_immutable() {
        let mut old = json!({"metadata": {"name": "a"}, "spec": {"attachRequired": false, "volumeLifecycleModes": ["Ephemeral"]}});
        let mut new = old.clone();
        new["spec"]["requiresRepublish"] = json!(true);
        assert_eq!(
            refusals("csidrivers", Some(old.clone()), new.clone()),
            [""; 0]
        );
        old["spec"]["attachRequired"] = json!(true);
        assert_eq!(
            refusals("csidrivers", Some(old), new),
            ["spec.attachRequired: Invalid value: false: field is immutable"]
        );
    }
}
