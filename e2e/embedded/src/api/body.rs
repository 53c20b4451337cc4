//! Conversion of a request's body to the stored form, and back to the version that a client asks for.

use std::{borrow::Cow, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    fields::Manager,
    resources::{Resource, Version},
    status::Status,
    store::ObjectKey,
};

/// The object or collection that a request is about.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) resource: Arc<Resource>,
    /// One of the served versions.
    pub(super) version: String,
    /// Empty for cluster-scoped kinds, and for lists over all namespaces.
    pub(super) namespace: String,
    /// Empty for collections.
    pub(super) name: String,
    /// Empty for the object itself.
    pub(super) subresource: String,
}

/// The options of a write.
#[derive(Debug, Clone)]
pub(super) struct WriteOptions {
    pub(super) manager: Manager,
    pub(super) dry_run: bool,
}

impl Target {
    /// Returns an object by name, for requests of the server itself.
    pub(super) fn of(resource: Arc<Resource>, namespace: &str, name: &str) -> Target {
        let version = resource
            .versions
            .first()
            .map(|version| version.name.clone());
        Target {
            version: version.unwrap_or_default(),
            resource,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            subresource: String::new(),
        }
    }

    /// Returns the place of the object.
    pub(super) fn key(&self) -> ObjectKey {
        ObjectKey {
            resource: self.resource.qualified.clone(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }

    pub(super) fn served(&self) -> Option<&Version> {
        self.resource.version(&self.version)
    }

    pub(super) fn has_status(&self) -> bool {
        self.served().is_some_and(|version| version.status)
    }

    fn api_version(&self) -> String {
        self.resource.api_version(&self.version)
    }
}

/// Returns the items of a list; none for any other value.
pub(super) fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

/// Reads a body as an object of the target's kind: completes its identity from the path, checks types
/// and drops unknown fields. Defaults are not filled in.
///
/// # Errors
/// Returns 400 for a body that is not an object of this kind, namespace and name.
pub(super) fn read(target: &Target, mut object: Value) -> Result<Value, Status> {
    complete_identity(target, &mut object)?;
    if let Some(row) = target.resource.built_in_row() {
        return (row.decode)(&object).map_err(|error| {
            Status::undecodable(&target.resource, &target.version, &error.to_string())
        });
    }

    let undecodable = |why: &str| Status::undecodable(&target.resource, &target.version, why);
    let metadata = ObjectMeta::deserialize(&object["metadata"]).and_then(serde_json::to_value);
    object["metadata"] = metadata.map_err(|error| undecodable(&error.to_string()))?;
    if let Some(schema) = target.served().and_then(|version| version.schema.as_ref()) {
        schema.prune(&mut object);
    }
    Ok(object)
}

fn complete_identity(target: &Target, object: &mut Value) -> Result<(), Status> {
    let resource = &target.resource;
    let Some(map) = object.as_object_mut() else {
        return Err(Status::undecodable(
            resource,
            &target.version,
            "json: the body is not an object",
        ));
    };
    for (field, expected) in [
        ("apiVersion", target.api_version()),
        ("kind", resource.kind.clone()),
    ] {
        match map.get(field).and_then(Value::as_str) {
            Some(found) if found == expected => {}
            None | Some("") if resource.built_in_row().is_some() => {
                map.insert(field.to_owned(), json!(expected));
            }
            None | Some("") => {
                return Err(Status::bad_request(format!(
                    "the object provided is unrecognized (must be of type {}): Object '{field}' is missing",
                    resource.kind
                )));
            }
            Some(found) => {
                let what = if field == "kind" {
                    "kind"
                } else {
                    "API version"
                };
                return Err(Status::bad_request(format!(
                    "the {what} in the data ({found}) does not match the expected {what} ({expected})"
                )));
            }
        }
    }
    let metadata = map
        .entry("metadata")
        .or_insert_with(|| Value::Object(Map::new()));
    let Some(metadata) = metadata.as_object_mut() else {
        return Err(Status::undecodable(
            resource,
            &target.version,
            "json: metadata is not an object",
        ));
    };
    let found = metadata
        .get("name")
        .and_then(Value::as_str)
        .unwrap_or_default();
    if !target.name.is_empty() && found != target.name {
        if !found.is_empty() {
            return Err(Status::bad_request(format!(
                "the name of the object ({found}) does not match the name on the URL ({})",
                target.name
            )));
        }
        metadata.insert("name".to_owned(), json!(target.name));
    }
    if !resource.namespaced {
        metadata.remove("namespace");
        return Ok(());
    }
    match metadata.get("namespace").and_then(Value::as_str) {
        Some(found) if found == target.namespace => {}
        None | Some("") => {
            metadata.insert("namespace".to_owned(), json!(target.namespace));
        }
        Some(_) => {
            return Err(Status::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
    }
    Ok(())
}

/// Fills in the defaults of a custom object, validates it at the version of the request and converts
/// it to the storage version.
///
/// # Errors
/// Returns 422 with every field that the schema forbids.
pub(super) fn to_storage(target: &Target, object: &mut Value) -> Result<(), Status> {
    let resource = &target.resource;
    let Some(schema) = target.served().and_then(|version| version.schema.as_ref()) else {
        return Ok(());
    };
    schema.fill_defaults(object);
    let errors = schema.validate(object);
    if !errors.is_empty() {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        return Err(Status::invalid(resource, name, &errors));
    }
    if target.api_version() != resource.storage {
        object["apiVersion"] = json!(resource.storage);
        if let Some(schema) = &resource.storage_schema {
            schema.prune(object);
            schema.fill_defaults(object);
        }
    }
    Ok(())
}

/// Converts a stored object to one version of its kind.
pub(super) fn at_version<'a>(
    resource: &Resource,
    version: &str,
    object: &'a Value,
) -> Cow<'a, Value> {
    let api_version = resource.api_version(version);
    if object["apiVersion"] == api_version {
        return Cow::Borrowed(object);
    }
    let mut object = object.clone();
    object["apiVersion"] = json!(api_version);
    if let Some(schema) = resource
        .version(version)
        .and_then(|version| version.schema.as_ref())
    {
        schema.prune(&mut object);
    }
    Cow::Owned(object)
}
