//! The rendering of lists.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::body::{Target, at_version};

/// Serializes a list of a kind's objects. As on a real server, items of built-in kinds do not repeat
/// their kind.
pub(super) fn list(
    target: &Target,
    revision: u64,
    next: Option<usize>,
    objects: &[Arc<Value>],
) -> Vec<u8> {
    let resource = &target.resource;
    let built_in = resource.built_in_row().is_some();
    let head = json!({
        "kind": resource.list_kind,
        "apiVersion": resource.api_version(&target.version),
        "metadata": list_meta(revision, next),
    });
    let mut bytes = head.to_string().into_bytes();
    bytes.pop();
    bytes.extend_from_slice(b",\"items\":[");
    for (index, object) in objects.iter().enumerate() {
        if index > 0 {
            bytes.push(b',');
        }
        let object = at_version(resource, &target.version, object);
        if built_in && let Some(fields) = object.as_object() {
            write_without_kind(fields, &mut bytes);
        } else {
            bytes.extend_from_slice(object.to_string().as_bytes());
        }
    }
    bytes.extend_from_slice(b"]}");
    bytes
}

/// Returns the metadata of an object.
pub(super) fn metadata(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": object["metadata"],
    })
}

/// Serializes a list of the metadata of objects. As on a real server, the items of an empty one are null.
pub(super) fn metadata_list(revision: u64, next: Option<usize>, objects: &[Arc<Value>]) -> Vec<u8> {
    let items: Vec<Value> = objects.iter().map(|object| metadata(object)).collect();
    let list = json!({
        "kind": "PartialObjectMetadataList",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": list_meta(revision, next),
        "items": if items.is_empty() { Value::Null } else { items.into() },
    });
    list.to_string().into_bytes()
}

/// Returns the metadata of a list, with the token of its next page.
fn list_meta(revision: u64, next: Option<usize>) -> Value {
    let mut meta = json!({"resourceVersion": revision.to_string()});
    if let Some(next) = next {
        meta["continue"] = json!(next.to_string());
    }
    meta
}

fn write_without_kind(fields: &Map<String, Value>, bytes: &mut Vec<u8>) {
    bytes.push(b'{');
    let mut first = true;
    for (name, value) in fields
        .iter()
        .filter(|(name, _)| !matches!(name.as_str(), "kind" | "apiVersion"))
    {
        if !first {
            bytes.push(b',');
        }
        first = false;
        bytes.extend_from_slice(Value::from(name.as_str()).to_string().as_bytes());
        bytes.push(b':');
        bytes.extend_from_slice(value.to_string().as_bytes());
    }
    bytes.push(b'}');
}
