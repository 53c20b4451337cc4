//! The verbs `create`, `update` and `patch`, with the metadata that a real API server keeps for every
//! kind (uid, generation, managed fields).
//!
//! An object keeps its resource version when a write changes nothing.

use std::{collections::BTreeMap, sync::Arc};

use rand::Rng;
use serde_json::{Value, json};

use super::{
    admission,
    body::{self, Target, WriteOptions, items},
    field_error::FieldError,
    fields::{now, track_update},
    resources::Resource,
    status::Status,
    store::{ObjectKey, Raced, Store},
};

/// Metadata that only the server writes.
const SERVER_METADATA: &[&str] = &[
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
    "resourceVersion",
    "managedFields",
    "selfLink",
];

impl Store {
    /// Creates an object.
    pub(super) fn create(
        &self,
        target: &Target,
        body: Value,
        options: &WriteOptions,
    ) -> Result<Arc<Value>, Status> {
        let mut object = body::read(target, body)?;
        if text(&object, "name").is_empty() && !text(&object, "generateName").is_empty() {
            let generated = format!("{}{}", text(&object, "generateName"), random_suffix());
            object["metadata"]["name"] = json!(generated);
        }
        let resource = &target.resource;
        let name = text(&object, "name").to_owned();
        if name.is_empty() {
            let missing = FieldError::required("metadata.name", "name or generateName is required");
            return Err(Status::invalid(resource, "", &[missing]));
        }
        if !text(&object, "resourceVersion").is_empty() {
            return Err(Status::version_on_create());
        }
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.retain(|field, _| !SERVER_METADATA.contains(&field.as_str()));
            metadata.insert("uid".to_owned(), json!(random_uid()));
            metadata.insert("creationTimestamp".to_owned(), json!(now()));
            if resource.built_in_row().is_none_or(|row| row.generation) {
                metadata.insert("generation".to_owned(), json!(1));
            }
        }
        // A node registers itself with its status; any other status starts empty.
        if target.has_status()
            && resource.qualified != "nodes"
            && let Some(map) = object.as_object_mut()
        {
            map.remove("status");
        }
        body::to_storage(target, &mut object)?;
        admission::set_defaults(resource, &mut object);
        self.admit(resource, &mut object);
        let definition = self.check(resource, None, &mut object)?;
        admission::check_surroundings(self, resource, &object)?;
        track_update(None, &mut object, &options.manager);
        if options.dry_run {
            // Real servers check this last, too: such an answer means that all other rules hold.
            let there = self.get(&resource.qualified, &target.namespace, &name);
            return match there {
                Some(_) => Err(Status::already_exists(resource, &name)),
                None => Ok(Arc::new(object)),
            };
        }
        let object = self.insert(resource, object)?;
        if let Some(definition) = definition {
            self.serve(definition);
        }
        if resource.qualified == "namespaces" {
            self.create_default_account(&name)?;
        }
        Ok(object)
    }

    /// Validates an object; for a CustomResourceDefinition, also returns the kind it describes.
    fn check(
        &self,
        resource: &Resource,
        old: Option<&Value>,
        object: &mut Value,
    ) -> Result<Option<Resource>, Status> {
        let name = text(object, "name").to_owned();
        let errors = admission::errors(resource, old, object);
        if !errors.is_empty() {
            return Err(Status::invalid(resource, &name, &errors));
        }
        if !resource.is("apiextensions.k8s.io", "customresourcedefinitions") {
            return Ok(None);
        }
        let kind = Resource::from_definition(object)
            .map_err(|error| Status::invalid(resource, &name, &[error]))?;
        establish(old, object);
        Ok(Some(kind))
    }

    fn create_default_account(&self, namespace: &str) -> Result<(), Status> {
        let Some(accounts) = self.resource("serviceaccounts") else {
            return Err(Status::no_such_resource());
        };
        let account = json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {
                "name": "default",
                "namespace": namespace,
                "uid": random_uid(),
                "creationTimestamp": now(),
            },
        });
        self.insert(&accounts, account).map(drop)
    }

    /// Updates an object or its status.
    pub(super) fn update(
        &self,
        target: &Target,
        body: Value,
        options: &WriteOptions,
    ) -> Result<Arc<Value>, Status> {
        let resource = &target.resource;
        let object = body::read(target, body)?;
        let asked = text(&object, "resourceVersion").to_owned();
        if asked.is_empty() && !unconditional_update(resource) {
            let missing = FieldError::invalid(
                "metadata.resourceVersion",
                &json!(0),
                "must be specified for an update",
            );
            return Err(Status::invalid(resource, &target.name, &[missing]));
        }
        loop {
            let current = self.current(target)?;
            if let Ok(object) = self.put(target, &current, object.clone(), options)? {
                return Ok(object);
            }
        }
    }

    /// Changes an object or its status by a merge patch.
    pub(super) fn patch(
        &self,
        target: &Target,
        patch: &Value,
        options: &WriteOptions,
    ) -> Result<Arc<Value>, Status> {
        loop {
            let current = self.current(target)?;
            let mut patched =
                body::at_version(&target.resource, &target.version, &current).into_owned();
            json_patch::merge(&mut patched, patch);
            let patched = body::read(target, patched)?;
            if let Ok(object) = self.put(target, &current, patched, options)? {
                return Ok(object);
            }
        }
    }

    pub(super) fn current(&self, target: &Target) -> Result<Arc<Value>, Status> {
        self.get(&target.resource.qualified, &target.namespace, &target.name)
            .ok_or_else(|| Status::not_found(&target.resource, &target.name))
    }

    /// Refuses a write that names another uid or an older version than the current one.
    fn check_identity(
        &self,
        target: &Target,
        current: &Value,
        object: &Value,
    ) -> Result<(), Status> {
        let resource = &target.resource;
        let (asked, found) = (text(object, "uid"), text(current, "uid"));
        if !asked.is_empty() && asked != found {
            let why = format!(
                "StorageError: invalid object, Code: 4, Key: {}, ResourceVersion: 0, AdditionalErrorMsg: \
                 Precondition failed: UID in precondition: {asked}, UID in object meta: {found}",
                storage_key(target)
            );
            return Err(Status::conflict(resource, &target.name, &why));
        }
        let asked = text(object, "resourceVersion");
        if !asked.is_empty() && asked != text(current, "resourceVersion") {
            return Err(Status::modified(resource, &target.name));
        }
        Ok(())
    }

    /// Replaces `current` by `object`, which [`body::read`] has read.
    fn put(
        &self,
        target: &Target,
        current: &Arc<Value>,
        object: Value,
        options: &WriteOptions,
    ) -> Result<Result<Arc<Value>, Raced>, Status> {
        self.check_identity(target, current, &object)?;
        let resource = &target.resource;
        let mut new = combine(target, current, object);
        body::to_storage(target, &mut new)?;
        admission::set_defaults(resource, &mut new);
        self.admit(resource, &mut new);
        count_generation(target, current, &mut new);
        let definition = self.check(resource, Some(current), &mut new)?;
        track_update(Some(current), &mut new, &options.manager);
        if new == **current {
            return Ok(Ok(current.clone()));
        }
        if options.dry_run {
            return Ok(Ok(Arc::new(new)));
        }
        let key = target.key();
        let released = !text(current, "deletionTimestamp").is_empty()
            && !has_finalizers(&new)
            && current["metadata"]["deletionGracePeriodSeconds"]
                .as_u64()
                .unwrap_or(0)
                == 0
            && resource.qualified != "namespaces";
        if released {
            return Ok(self.remove(&key, current));
        }
        let written = self.replace(&key, current, new);
        if written.is_ok()
            && let Some(definition) = definition
        {
            self.serve(definition);
        }
        Ok(written)
    }

    /// Assigns a pod to a node (`pods/binding`).
    pub(super) fn bind(&self, target: &Target, binding: &Value) -> Result<(), Status> {
        loop {
            let current = self.current(target)?;
            if let Some(node) = current["spec"]["nodeName"]
                .as_str()
                .filter(|node| !node.is_empty())
            {
                let why = format!("pod {} is already assigned to node {node:?}", target.name);
                return Err(Status::conflict(&target.resource, &target.name, &why));
            }
            let mut bound = Value::clone(&current);
            bound["spec"]["nodeName"] = binding["target"]["name"].clone();
            if self
                .replace(&ObjectKey::of(&target.resource, &current), &current, bound)
                .is_ok()
            {
                return Ok(());
            }
        }
    }
}

/// Combines the current object and the one of a request: the status or everything else is the
/// request's, and some metadata is the server's.
fn combine(target: &Target, current: &Value, sent: Value) -> Value {
    let status_only = target.subresource == "status";
    let mut new = if status_only {
        let mut new = body::at_version(&target.resource, &target.version, current).into_owned();
        new["status"] = sent["status"].clone();
        new
    } else {
        let mut new = sent;
        if target.has_status() {
            new["status"] = current["status"].clone();
        }
        for &field in SERVER_METADATA {
            new["metadata"][field] = current["metadata"][field].clone();
        }
        new
    };
    drop_null(&mut new, "status");
    if let Some(metadata) = new["metadata"].as_object_mut() {
        metadata.retain(|_, value| !value.is_null());
    }
    new
}

fn drop_null(object: &mut Value, field: &str) {
    if object[field].is_null()
        && let Some(map) = object.as_object_mut()
    {
        map.remove(field);
    }
}

/// Counts a change of the desired state: for custom kinds without `/status`, any change outside
/// `metadata`; else any change outside `metadata` and `status`.
fn count_generation(target: &Target, current: &Value, new: &mut Value) {
    if target
        .resource
        .built_in_row()
        .is_some_and(|row| !row.generation)
    {
        return;
    }
    let content = |object: &Value| -> BTreeMap<String, Value> {
        let ignored = |name: &str| name == "metadata" || (name == "status" && target.has_status());
        let fields = object.as_object().into_iter().flatten();
        fields
            .filter(|(name, _)| !ignored(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    };
    if content(current) != content(new) {
        let generation = current["metadata"]["generation"].as_u64().unwrap_or(0);
        new["metadata"]["generation"] = json!(generation + 1);
    }
}

/// Writes the status of a CustomResourceDefinition: this server serves it at once.
fn establish(old: Option<&Value>, definition: &mut Value) {
    let since = old.map_or_else(
        || json!(now()),
        |old| old["status"]["conditions"][0]["lastTransitionTime"].clone(),
    );
    let condition = |kind: &str, reason: &str, message: &str| json!({"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": since});
    let mut stored: Vec<Value> = old
        .and_then(|old| old["status"]["storedVersions"].as_array().cloned())
        .unwrap_or_default();
    for version in items(&definition["spec"]["versions"]) {
        if version["storage"] == true && !stored.contains(&version["name"]) {
            stored.push(version["name"].clone());
        }
    }
    definition["status"] = json!({
        "conditions": [
            condition("NamesAccepted", "NoConflicts", "no conflicts found"),
            condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        ],
        "acceptedNames": definition["spec"]["names"],
        "storedVersions": stored,
    });
}

/// Returns whether a real server accepts updates of a kind without a resource version.
fn unconditional_update(resource: &Resource) -> bool {
    resource.built_in_row().is_some()
        && !matches!(
            resource.plural.as_str(),
            "leases" | "csidrivers" | "csinodes" | "customresourcedefinitions"
        )
}

fn storage_key(target: &Target) -> String {
    let mut key = String::from("/registry/");
    for part in [
        &target.resource.group,
        &target.resource.plural,
        &target.namespace,
    ] {
        if !part.is_empty() {
            key.push_str(part);
            key.push('/');
        }
    }
    key + &target.name
}

pub(super) fn has_finalizers(object: &Value) -> bool {
    object["metadata"]["finalizers"]
        .as_array()
        .is_some_and(|list| !list.is_empty())
}

/// Returns a string of an object's metadata, or "".
pub(super) fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object["metadata"][field].as_str().unwrap_or_default()
}

fn random_suffix() -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut random = rand::rng();
    (0..5)
        .map(|_| char::from(LETTERS[random.random_range(0..LETTERS.len())]))
        .collect()
}

/// Returns a random UUID (version 4).
pub(super) fn random_uid() -> String {
    let bits: u128 = rand::random();
    let bits = (bits & !(0xf << 76) & !(0x3 << 62)) | (0x4 << 76) | (0x2 << 62);
    let hex = format!("{bits:032x}");
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}
