//! What the classes and the pods say.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use super::super::store::{self, Store};
use super::super::tenants::{self, WHO};
use super::outcome::{Listed, lists};
use super::{CLASSES, INTERVAL, LISTS, NUMBERED, PODS, TAKEN, WRITTEN};

/// The file that all but one class have.
const VALUE: &str = "value";
/// The files of the class that lists Secrets: a text, JSON, base64, and one in a directory.
pub(super) const TEXT: &str = "a";
pub(super) const JSON: &str = "json";
pub(super) const ENCODED: &str = "b64";
pub(super) const DEEP: &str = "deep/x";
/// The field of the JSON that Secrets have.
pub(super) const FIELD: &str = "user";
/// More Secrets than a class may list.
const TOO_MANY: usize = 101;
const NUMBER_VERSIONS: &str = "secrets-store.csi.k8s.io/number-versions";

/// Returns the name of a class, which its volume has, too.
pub(in super::super) fn name_of(class: usize) -> &'static str {
    const NAMES: [&str; CLASSES] = [
        "features-numbered",
        "features-interval",
        "features-shared-a",
        "features-lists",
        "features-written",
        "features-shared-b",
    ];
    NAMES.get(class).copied().unwrap_or_default()
}

/// Returns the classes that a pod mounts.
pub(in super::super) fn volumes_of(pod: usize) -> Vec<usize> {
    let half = CLASSES / PODS.len();
    (pod * half..(pod + 1) * half).collect()
}

/// Returns the names of the pod statuses that the driver makes in a namespace.
pub(in super::super) fn status_names(namespace: &str) -> Vec<String> {
    (0..CLASSES)
        .map(|class| status_name(namespace, class))
        .collect()
}

pub(super) fn status_name(namespace: &str, class: usize) -> String {
    let pod = PODS[usize::from(class >= CLASSES / PODS.len())];
    format!("{pod}-{namespace}-{}", name_of(class))
}

/// Returns the content of a file: of another size with each number.
pub(super) fn content(class: usize, file: &str, number: u64) -> String {
    let filler = "x".repeat([0, 4_096, 9_000][number as usize % 3]);
    format!("{}/{file} {number} {filler} end", name_of(class))
}

/// Returns the text that is encoded.
pub(super) fn decoded(number: u64) -> String {
    format!("decoded {number}")
}

/// Returns the text in the field of the JSON.
pub(super) fn field(number: u64) -> String {
    format!("user-{number}")
}

/// Returns the files of a class of which it gives the contents itself. One has the name that a provider which is wrong
/// gives to another file.
pub(super) fn files(class: usize, number: u64) -> Vec<(&'static str, String)> {
    let mut files = match class {
        INTERVAL => Vec::new(),
        LISTS => vec![
            (TEXT, content(class, TEXT, number)),
            (
                JSON,
                json!({FIELD: field(number), "more": number}).to_string(),
            ),
            (ENCODED, BASE64_STANDARD.encode(decoded(number))),
            (DEEP, content(class, DEEP, number)),
        ],
        _ => vec![(VALUE, content(class, VALUE, number))],
    };
    files.push((WHO, content(class, WHO, number)));
    files
}

/// Returns the file whose content the store has, which is the first object of the first class there.
pub(super) fn from_store(store: &Store) -> (&'static str, String) {
    let (class, object) = (store::CLASSES[0], store::OBJECTS[0].0);
    let content = store::content(class, object, store.latest_number(0));
    (VALUE, content)
}

/// Returns a class that says what a number decides. `waits` says whether a pod waits for its Secrets.
pub(in super::super) fn class(class: usize, number: u64, waits: bool) -> Value {
    let name = name_of(class);
    let files = files(class, number).into_iter();
    let mut objects: Vec<Value> = files
        .map(|(file, content)| {
            json!({"objectName": format!("{name}-{file}"), "path": file, "content": content})
        })
        .collect();
    if class == INTERVAL {
        let object = format!("{}-{}", store::CLASSES[0], store::OBJECTS[0].0);
        objects.push(json!({"objectName": object, "path": VALUE}));
    }
    let mut metadata = json!({"name": name});
    let mut parameters = json!({"objects": json!({"array": objects}).to_string()});
    match class {
        NUMBERED => metadata["annotations"] = json!({NUMBER_VERSIONS: "true"}),
        INTERVAL => metadata["annotations"] = json!({tenants::INTERVAL: "1h"}),
        WRITTEN => parameters["faults"] = "[{writeFiles: true}]".into(),
        _ => {}
    }
    let listed = lists(class, number, waits);
    json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1",
        "kind": "SecretProviderClass",
        "metadata": metadata,
        "spec": {
            "provider": "e2e-provider",
            "parameters": parameters,
            "secretObjects": secret_objects(&listed),
        },
    })
}

/// Returns the entries of a class for Secrets.
fn secret_objects(listed: &Listed) -> Vec<Value> {
    let mut entries = Vec::new();
    if listed.taken {
        // The first one, so that those after it show whether its failure stops them.
        let data = json!([{"objectName": TEXT, "key": "value"}]);
        entries.push(json!({"secretName": TAKEN, "type": "Opaque", "data": data}));
    }
    for secret in &listed.secrets {
        let data: Vec<Value> = secret
            .entries
            .iter()
            .map(|entry| entry.declared())
            .collect();
        entries.push(json!({"secretName": secret.name, "type": secret.of_type, "data": data}));
    }
    if listed.too_many {
        let data = json!([{"objectName": TEXT, "key": "value"}]);
        entries.extend((0..TOO_MANY).map(|number| {
            let name = format!("features-many-{number}");
            json!({"secretName": name, "type": "Opaque", "data": data})
        }));
    }
    entries
}

/// Returns the Secret of somebody else.
pub(in super::super) fn of_somebody_else() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": TAKEN}, "type": "Opaque",
        "stringData": {"value": "of somebody else"},
    })
}

/// Returns the pods, on nodes in turn.
pub(in super::super) fn pods(nodes: &[String]) -> Vec<Value> {
    let nodes = nodes.iter().cycle();
    let pods = PODS.iter().zip(nodes).enumerate();
    pods.map(|(number, (name, node))| {
        let volumes: Vec<Value> = volumes_of(number).into_iter().map(volume).collect();
        let mut pod = tenants::pod_of(name, node, &volumes);
        if number == 0 {
            let mounts = pod["spec"]["containers"][0]["volumeMounts"].as_array_mut();
            let mount = json!({
                "name": name_of(NUMBERED), "mountPath": "/mnt/one", "subPath": VALUE, "readOnly": true,
            });
            mounts.into_iter().for_each(|all| all.push(mount.clone()));
        }
        pod
    })
    .collect()
}

fn volume(class: usize) -> Value {
    let mut attributes = json!({"secretProviderClass": name_of(class)});
    if class == INTERVAL {
        attributes[tenants::INTERVAL] = "4s".into();
    }
    tenants::volume(name_of(class), attributes)
}
