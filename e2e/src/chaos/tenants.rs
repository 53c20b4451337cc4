//! The objects that tenants apply: classes, pods, and those of a hostile tenant.

mod competing;

use serde_json::{Value, json};

pub(super) use competing::{of_the_greedy, of_the_modest};

use super::editions::Spec;
use super::schedule::PODS;
use super::store::{
    CERTIFICATE, CHANGED_ONLY, CLASSES, CREDENTIAL, EXTRA, LARGE, OBJECTS, SELDOM,
    WITH_CERTIFICATE, WITH_CREDENTIAL, content,
};

/// The name of the only volume of a pod that has one class; further ones are numbered.
const VOLUME: &str = "secrets";
/// The directory of the first volume in the container.
const MOUNT: &str = "/mnt/secrets";
/// The file that says for which pod the provider was called.
pub(super) const WHO: &str = "who";
/// The file whose content the class itself gives.
pub(super) const EDITION: &str = "edition";
/// The key of that file in Secrets.
pub(super) const EDITION_KEY: &str = "key-e";
/// The annotation of a class whose new values ask for refreshes.
pub(super) const ASK: &str = "secrets-store.csi.k8s.io/refresh";
/// The annotation with the interval between refreshes.
pub(super) const INTERVAL: &str = "secrets-store.csi.k8s.io/rotation-poll-interval";
/// The annotation of a class whose provider is told which versions are mounted.
const SEND_VERSIONS: &str = "secrets-store.csi.k8s.io/send-object-versions";
/// The number of tricks that the hostile tenant has.
pub(super) const TRICKS: usize = 10;
/// The object to which each class gives a mode, and the mode.
pub(super) const CLOSED: (&str, u32) = ("c", 0o600);
/// The attribute of a volume with the mode of its other files.
const DEFAULT_MODE: &str = "secrets-store.csi.k8s.io/default-mode";
/// The annotation of a Secret with the order of its content: a higher one replaces a lower one
/// (docs/secrets.md).
pub(super) const ORDER: &str = "secrets-store.csi.k8s.io/content-order";
/// The Secret that somebody makes an owner of synced Secrets, and the label that they get.
pub(super) const OWNER: &str = "by-hand";
pub(super) const LABEL: (&str, &str) = ("added-by", "hand");
/// The object that controls each third pod.
pub(super) const SET: &str = "set";
/// The Secret with the credential for the provider, and its key.
pub(super) const CREDENTIALS: (&str, &str) = ("credentials", "token");
/// The label, and the annotation, of a class's first Secret that say what the class says.
pub(super) const SAYS: &str = "example.com/edition";
/// The keys of the other Secret of a class, with their objects, and its type.
pub(super) const OTHER_KEYS: [(&str, &str); 2] = [("username", "a"), ("password", "c")];
const OTHER_TYPE: &str = "kubernetes.io/basic-auth";
/// The Secret with the certificate of a class, and its type and keys.
pub(super) const TLS_SECRET: &str = "certificate";
const TLS_TYPE: &str = "kubernetes.io/tls";
/// The annotation of a class whose keys are written as they come.
const KEY_FORMAT: &str = "secrets-store.csi.k8s.io/tls-key-format";
pub(super) const TLS_KEYS: [&str; 2] = ["tls.crt", "tls.key"];
/// The keys that each class declares, with their objects.
pub(super) const KEYS: [(&str, &str); 2] = [("key-a", "a"), ("key-c", "c")];
/// The key that a class declares only after an edit.
pub(super) const EXTRA_KEY: &str = "key-d";

/// Returns the classes that a pod of this number mounts.
pub(super) fn classes_of(pod: usize) -> Vec<usize> {
    let first = pod % CLASSES.len();
    match pod % 4 {
        0 => vec![first, (first + 1 + pod / 2) % CLASSES.len()],
        _ => vec![first],
    }
}

pub(super) fn pod_name(pod: usize) -> String {
    format!("pod-{pod}")
}

/// Returns the attributes of a pod's volume of a class.
pub(super) fn attributes_of(pod: &str, class: usize) -> Vec<(&'static str, &'static str)> {
    let name = CLASSES.get(class).copied().unwrap_or_default();
    let mut attributes = vec![("secretProviderClass", name)];
    if mode_of(pod) != MODE {
        attributes.push((DEFAULT_MODE, "0440"));
    }
    attributes
}

/// The mode of a file for which nobody sets one.
const MODE: u32 = 0o644;

/// Returns the mode of the files of a pod's volumes to which the class gives none: every second pod sets
/// one.
pub(super) fn mode_of(pod: &str) -> u32 {
    let number = pod
        .rsplit('-')
        .next()
        .and_then(|number| number.parse::<usize>().ok());
    match number {
        Some(number) if !number.is_multiple_of(2) => 0o440,
        _ => MODE,
    }
}

/// Returns the group of a pod's files: some pods have one.
pub(super) fn group_of(pod: &str) -> Option<u32> {
    let number = pod.rsplit('-').next()?.parse::<u32>().ok()?;
    (number % 4 == 3).then_some(3_000 + number)
}

/// Returns whether something controls a pod, which then owns its Secrets.
pub(super) fn is_of_set(pod: &str) -> bool {
    let number = pod.rsplit('-').next().and_then(|n| n.parse::<u32>().ok());
    number.is_some_and(|number| number % 3 == 1)
}

/// Returns the name of the other Secret of a class.
pub(super) fn other_secret(class: usize) -> String {
    let name = CLASSES.get(class).copied().unwrap_or_default();
    format!("{name}-other")
}

/// Returns what a provider is given as a credential while the store of its class has the contents of a number.
pub(super) fn credential(number: u64) -> String {
    content(CLASSES[WITH_CREDENTIAL], CREDENTIAL, number)
}

/// Returns the Secret with the credential.
pub(super) fn credentials(number: u64) -> Value {
    let (name, key) = CREDENTIALS;
    json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name},
        "stringData": {key: credential(number)},
    })
}

/// Returns the object that controls pods.
pub(super) fn set() -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": SET}})
}

/// Returns the name of a pod's volume of a class.
pub(super) fn volume_name(class: usize) -> String {
    format!(
        "{VOLUME}-{}",
        CLASSES.get(class).copied().unwrap_or_default()
    )
}

/// Returns a class that says `spec`. `seldom` is the interval of the one that is refreshed seldom.
pub(super) fn class(class: usize, spec: Spec, seldom: &str) -> Value {
    let name = CLASSES.get(class).copied().unwrap_or_default();
    let extra = spec.has_extra.then_some(EXTRA);
    let objects = OBJECTS.into_iter().chain(extra.map(|extra| (extra, extra)));
    let mut array: Vec<Value> = objects
        .map(|(object, file)| {
            let mut entry = json!({"objectName": format!("{name}-{object}"), "path": file});
            if object == CLOSED.0 {
                entry["mode"] = format!("{:04o}", CLOSED.1).into();
            }
            entry
        })
        .collect();
    array.push(json!({
        "objectName": format!("{name}-{WHO}"), "path": WHO, "contentFrom": "attributes",
    }));
    if class == WITH_CERTIFICATE {
        let object = format!("{name}-{CERTIFICATE}");
        array.push(json!({"objectName": object, "path": CERTIFICATE}));
    }
    if class == WITH_CREDENTIAL {
        array.push(json!({
            "objectName": format!("{name}-{CREDENTIAL}"), "path": CREDENTIAL, "contentFrom": "secrets",
        }));
    }
    // It has the version of an object for which none is given.
    array.push(json!({
        "objectName": format!("{name}-{EDITION}"), "path": EDITION,
        "content": content(name, EDITION, spec.edition),
    }));
    let mut metadata = json!({"name": name});
    if class == SELDOM {
        metadata["annotations"] = json!({INTERVAL: seldom});
    }
    let mut parameters = json!({"objects": json!({"array": array}).to_string()});
    if class == CHANGED_ONLY {
        metadata["annotations"] = json!({SEND_VERSIONS: "true", KEY_FORMAT: "original"});
        // A provider may lack the right to compare versions.
        let denied = spec.edition.is_multiple_of(2);
        parameters["faults"] = format!("[{{changedOnly: true, describeDenied: {denied}}}]").into();
    }
    if class == LARGE.0 {
        parameters["padding"] = "x".repeat(LARGE.1).into();
    }
    let extra = spec.has_extra.then_some((EXTRA_KEY, EXTRA));
    let data: Vec<Value> = KEYS
        .into_iter()
        .chain(extra)
        .chain([(EDITION_KEY, EDITION)])
        .map(|(key, object)| json!({"key": key, "objectName": object}))
        .collect();
    let other_data: Vec<Value> = OTHER_KEYS
        .into_iter()
        .map(|(key, object)| json!({"key": key, "objectName": object}))
        .collect();
    let says = json!({SAYS: spec.edition.to_string()});
    let mut secrets = json!([
        {
            "secretName": name, "type": "Opaque", "data": data,
            "labels": says, "annotations": says,
        },
        {"secretName": other_secret(class), "type": OTHER_TYPE, "data": other_data},
    ]);
    if let Some(secrets) = secrets.as_array_mut()
        && class == WITH_CERTIFICATE
    {
        let data = TLS_KEYS.map(|key| json!({"key": key, "objectName": CERTIFICATE}));
        secrets.push(json!({"secretName": TLS_SECRET, "type": TLS_TYPE, "data": data}));
    }
    json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1",
        "kind": "SecretProviderClass",
        "metadata": metadata,
        "spec": {
            "provider": "e2e-provider",
            "parameters": parameters,
            "secretObjects": secrets,
        },
    })
}

/// Returns a well-behaved pod on a node. `set` is the UID of what controls some of them.
pub(super) fn pod(pod: usize, node: &str, set: &str) -> Value {
    let classes = classes_of(pod);
    let volumes: Vec<Value> = classes
        .iter()
        .map(|class| {
            let attributes: serde_json::Map<String, Value> = attributes_of(&pod_name(pod), *class)
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value.into()))
                .collect();
            let mut volume = volume(&volume_name(*class), attributes.into());
            if *class == WITH_CREDENTIAL {
                volume["csi"]["nodePublishSecretRef"] = json!({"name": CREDENTIALS.0});
            }
            volume
        })
        .collect();
    let mut object = pod_of(&pod_name(pod), node, &volumes);
    if is_of_set(&pod_name(pod)) {
        object["metadata"]["ownerReferences"] = json!([{
            "apiVersion": "v1", "kind": "ConfigMap", "name": SET, "uid": set, "controller": true,
        }]);
    }
    if let Some(group) = group_of(&pod_name(pod)) {
        object["spec"]["securityContext"] = json!({"fsGroup": group});
    }
    object
}

/// Returns a volume of a pod.
pub(super) fn volume(name: &str, attributes: Value) -> Value {
    json!({"name": name, "csi": {
        "driver": "secrets-store.csi.k8s.io", "readOnly": true, "volumeAttributes": attributes,
    }})
}

/// Returns a pod with volumes.
pub(super) fn pod_of(name: &str, node: &str, volumes: &[Value]) -> Value {
    let mounts: Vec<Value> = volumes
        .iter()
        .enumerate()
        .map(|(number, volume)| {
            json!({"name": volume["name"], "mountPath": format!("{MOUNT}-{number}"), "readOnly": true})
        })
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main", "image": "probe:e2e", "imagePullPolicy": "IfNotPresent",
                "args": ["sleep"], "volumeMounts": mounts,
            }],
            "tolerations": [{"operator": "Exists"}],
            "volumes": volumes,
        },
    })
}

/// The trick of the hostile tenant that has no other name for anything than the well-behaved.
const NAMESAKES: usize = 8;

/// The trick of the hostile tenant whose admission webhook does not answer.
pub(super) const WEBHOOK: usize = 9;

/// Returns the objects of the hostile tenant for one of its tricks: a class and pods that mount it.
/// `victim` is the namespace of the well-behaved.
pub(super) fn hostile(how: usize, number: usize, node: &str, victim: &str) -> Vec<Value> {
    // A class, pods and a Secret that have the names of somebody else's.
    let is_namesake = how == NAMESAKES;
    let name = match is_namesake {
        true => CLASSES[number % CLASSES.len()].to_owned(),
        false => format!("hostile-{number}"),
    };
    let many = |count: usize, size: usize| -> Vec<Value> {
        (0..count)
            .map(|object| json!({"objectName": format!("o{object}"), "contentSize": size}))
            .collect()
    };
    let one = |entry: Value| vec![entry];
    let mut attributes = json!({"secretProviderClass": name});
    let mut secret_objects = json!([]);
    let mut faults = json!([]);
    let objects = match how {
        0 => {
            faults = json!([{"hang": true}]);
            many(1, 10)
        }
        1 => {
            faults = json!([{"delay": "15s"}]);
            many(2, 10)
        }
        2 => many(2_000, 10),
        3 => many(3, 1 << 20),
        4 => one(json!({"objectName": "x", "path": "../../../../../../etc/chaos", "content": "x"})),
        5 => {
            let data: Vec<Value> = (0..200)
                .map(|key| json!({"key": format!("k{key}"), "objectName": "o0"}))
                .collect();
            secret_objects = json!([
                {"secretName": name, "type": "Opaque", "data": data},
                {"secretName": "x".repeat(300), "type": "\u{1f480}", "data": [{"objectName": "*"}]},
            ]);
            many(20, 64 << 10)
        }
        6 => {
            // The keys of kubelet, with the values of somebody else.
            for (key, value) in [
                ("csi.storage.k8s.io/pod.name", "pod-0"),
                ("csi.storage.k8s.io/pod.namespace", victim),
                (
                    "csi.storage.k8s.io/pod.uid",
                    "00000000-0000-0000-0000-000000000000",
                ),
                ("csi.storage.k8s.io/serviceAccount.name", "admin"),
                (
                    "csi.storage.k8s.io/serviceAccount.tokens",
                    "{\"a\":{\"token\":\"forged\"}}",
                ),
                ("csi.storage.k8s.io/ephemeral", "false"),
                ("secrets-store.csi.k8s.io/rotation-poll-interval", "1ns"),
                ("secrets-store.csi.k8s.io/default-mode", "7777"),
            ] {
                attributes[key] = value.into();
            }
            one(json!({"objectName": "w", "path": WHO, "contentFrom": "attributes"}))
        }
        WEBHOOK => {
            let data = json!([{"key": "k", "objectName": "o0"}]);
            secret_objects = json!([{"secretName": name, "type": "Opaque", "data": data}]);
            many(2, 10)
        }
        NAMESAKES => {
            let data = json!([{"key": KEYS[0].0, "objectName": KEYS[0].1}]);
            secret_objects = json!([{"secretName": name, "type": "Opaque", "data": data}]);
            let entry = |(object, file): &(&str, &str)| json!({"objectName": format!("{name}-{object}"), "path": file, "content": "of a namesake"});
            OBJECTS.iter().map(entry).collect()
        }
        _ => {
            // A class of another namespace.
            attributes["secretProviderClass"] = format!("../{victim}/alpha").into();
            many(1, 10)
        }
    };
    let class = json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1",
        "kind": "SecretProviderClass",
        "metadata": {"name": name},
        "spec": {
            "provider": "e2e-provider",
            "parameters": {
                "objects": json!({"array": objects}).to_string(),
                "faults": faults.to_string(),
            },
            "secretObjects": secret_objects,
        },
    });
    let volume_of = match is_namesake {
        true => format!("{VOLUME}-{name}"),
        false => VOLUME.to_owned(),
    };
    // More pods than a class may have calls in flight, or than the driver has requests.
    let count = if how == WEBHOOK { 12 } else { 4 };
    let pods = (0..count).map(|pod| {
        let volume = volume(&volume_of, attributes.clone());
        let name = match is_namesake {
            true => pod_name((number + pod) % PODS),
            false => format!("{name}-{pod}"),
        };
        pod_of(&name, node, &[volume])
    });
    std::iter::once(class).chain(pods).collect()
}
