//! Answers: what of an object is shown, and lists.

use std::{borrow::Cow, sync::Arc};

use http::HeaderMap;
use serde_json::{Map, Value, json};

use super::body::{Target, at_version};

/// What the client accepts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Form {
    Whole,
    /// `PartialObjectMetadata`: what metadata watchers ask for.
    Metadata,
}

impl Form {
    /// The first accepted form this server has. Tables and protobuf it does not have: clients that
    /// ask for them also accept plain JSON.
    pub(super) fn accepted(headers: &HeaderMap) -> Form {
        let accept = headers
            .get(http::header::ACCEPT)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        for range in accept.split(',') {
            let parameters: Vec<&str> = range.split(';').map(str::trim).collect();
            match parameters
                .iter()
                .find_map(|parameter| parameter.strip_prefix("as="))
            {
                Some("PartialObjectMetadata" | "PartialObjectMetadataList") => {
                    return Form::Metadata;
                }
                None if parameters.first() == Some(&"application/json") => return Form::Whole,
                _ => {}
            }
        }
        Form::Whole
    }
}

/// One object in that form.
pub(super) fn render(object: &Value, form: Form) -> Cow<'_, Value> {
    match form {
        Form::Whole => Cow::Borrowed(object),
        Form::Metadata => Cow::Owned(json!({
            "kind": "PartialObjectMetadata",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": object["metadata"],
        })),
    }
}

/// A list of a kind's objects, serialized. As on a real server, items of built-in kinds do not
/// repeat their kind.
pub(super) fn list(target: &Target, revision: u64, objects: &[Arc<Value>], form: Form) -> Vec<u8> {
    let resource = &target.resource;
    let bare = resource.built_in_row().is_some() && form == Form::Whole;
    let (kind, api_version) = match form {
        Form::Whole => (
            resource.list_kind.clone(),
            resource.api_version(&target.version),
        ),
        Form::Metadata => (
            "PartialObjectMetadataList".to_owned(),
            "meta.k8s.io/v1".to_owned(),
        ),
    };
    let head = json!({
        "kind": kind,
        "apiVersion": api_version,
        "metadata": {"resourceVersion": revision.to_string()},
    });
    let mut bytes = head.to_string().into_bytes();
    bytes.pop();
    bytes.extend_from_slice(b",\"items\":[");
    for (index, object) in objects.iter().enumerate() {
        if index > 0 {
            bytes.push(b',');
        }
        let object = at_version(resource, &target.version, object);
        let object = render(&object, form);
        if bare && let Some(fields) = object.as_object() {
            write_without_kind(fields, &mut bytes);
        } else {
            bytes.extend_from_slice(object.to_string().as_bytes());
        }
    }
    bytes.extend_from_slice(b"]}");
    bytes
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
