//! The verb `delete`: preconditions, grace of pods, finalizers and kinds.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{
    body::Target,
    fields::time_text,
    objects::{has_finalizers, text},
    resources::Resource,
    status::Status,
    store::{ObjectKey, Store},
};

/// The options of a delete request.
#[derive(Debug, Clone, Default)]
pub(super) struct DeleteOptions {
    pub(super) grace_period: Option<u64>,
    pub(super) uid: Option<String>,
    pub(super) resource_version: Option<String>,
    pub(super) dry_run: bool,
}

/// The outcome of a delete.
pub(super) struct Deleted {
    /// The last state, or the state in which the object waits for its removal.
    pub(super) object: Arc<Value>,
    pub(super) gone: bool,
}

impl Store {
    /// Deletes an object.
    pub(super) fn delete(
        &self,
        target: &Target,
        options: &DeleteOptions,
    ) -> Result<Deleted, Status> {
        let resource = &target.resource;
        let lasting = ["default", "kube-system", "kube-public"];
        if resource.qualified == "namespaces" && lasting.contains(&target.name.as_str()) {
            let why = "this namespace may not be deleted";
            return Err(Status::forbidden(resource, &target.name, why));
        }
        loop {
            let current = self.current(target)?;
            check_preconditions(target, &current, options)?;
            let key = target.key();
            let waiting = dying(resource, &current, options);
            if options.dry_run {
                return Ok(Deleted {
                    object: current,
                    gone: waiting.is_none(),
                });
            }
            let gone = waiting.is_none();
            let object = match waiting {
                Some(waiting) if waiting == *current => Ok(current),
                Some(waiting) => self.replace(&key, &current, waiting),
                None => self.remove(&key, &current),
            };
            let Ok(object) = object else { continue };
            if gone && resource.is("apiextensions.k8s.io", "customresourcedefinitions") {
                self.delete_kind(&target.name);
            }
            return Ok(Deleted { object, gone });
        }
    }

    /// Keeps only the owner references for which `keep` returns true.
    pub(super) fn retain_owners(&self, key: &ObjectKey, keep: impl Fn(&Value) -> bool) {
        while let Some(current) = self.get(&key.resource, &key.namespace, &key.name) {
            let mut new = Value::clone(&current);
            if let Some(references) = new["metadata"]["ownerReferences"].as_array_mut() {
                references.retain(&keep);
                if references.is_empty()
                    && let Some(metadata) = new["metadata"].as_object_mut()
                {
                    metadata.remove("ownerReferences");
                }
            }
            if new == *current || self.replace(key, &current, new).is_ok() {
                return;
            }
        }
    }

    /// Deletes all objects of a kind whose definition is gone, and the kind.
    fn delete_kind(&self, qualified: &str) {
        let Some(resource) = self.resource(qualified) else {
            return;
        };
        loop {
            let (_, objects) = self.list(qualified, None);
            if objects.is_empty() {
                break;
            }
            for object in objects {
                // Raced means that it was written; the next round tries again.
                let _ = self.remove(&ObjectKey::of(&resource, &object), &object);
            }
        }
        self.unserve(qualified);
    }
}

fn check_preconditions(
    target: &Target,
    current: &Value,
    options: &DeleteOptions,
) -> Result<(), Status> {
    if let Some(uid) = options
        .uid
        .as_deref()
        .filter(|&uid| uid != text(current, "uid"))
    {
        let why = format!(
            "the UID in the precondition ({uid}) does not match the UID in record ({}). \
             The object might have been deleted and then recreated",
            text(current, "uid")
        );
        return Err(Status::conflict(&target.resource, &target.name, &why));
    }
    let version = options.resource_version.as_deref();
    if let Some(version) = version.filter(|&version| version != text(current, "resourceVersion")) {
        let why = format!(
            "the ResourceVersion in the precondition ({version}) does not match the ResourceVersion in record ({}). \
             The object might have been modified",
            text(current, "resourceVersion")
        );
        return Err(Status::conflict(&target.resource, &target.name, &why));
    }
    Ok(())
}

/// Returns the state in which an object waits for its removal; none when it is removed at once.
fn dying(resource: &Resource, current: &Value, options: &DeleteOptions) -> Option<Value> {
    let grace = match resource.qualified.as_str() {
        "pods" => pod_grace(current, options.grace_period),
        _ => 0,
    };
    let waits = grace > 0 || has_finalizers(current) || resource.qualified == "namespaces";
    if !waits {
        return None;
    }
    let mut dying = current.clone();
    let already = current["metadata"]["deletionGracePeriodSeconds"].as_u64();
    // A second delete can only shorten the wait.
    if text(current, "deletionTimestamp").is_empty()
        || already.is_some_and(|already| grace < already)
    {
        let seconds = i64::try_from(grace).unwrap_or(i64::MAX);
        let end = Timestamp::now()
            .checked_add(SignedDuration::from_secs(seconds))
            .unwrap_or(Timestamp::MAX);
        dying["metadata"]["deletionTimestamp"] = json!(time_text(end));
        if resource.qualified == "namespaces" {
            dying["status"]["phase"] = json!("Terminating");
        } else {
            dying["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        }
        if let Some(generation) = current["metadata"]["generation"].as_u64() {
            dying["metadata"]["generation"] = json!(generation + 1);
        }
    }
    Some(dying)
}

fn pod_grace(pod: &Value, asked: Option<u64>) -> u64 {
    let unassigned = pod["spec"]["nodeName"]
        .as_str()
        .unwrap_or_default()
        .is_empty();
    let finished = matches!(
        pod["status"]["phase"].as_str(),
        Some("Failed" | "Succeeded")
    );
    if unassigned || finished {
        return 0;
    }
    asked
        .or_else(|| pod["metadata"]["deletionGracePeriodSeconds"].as_u64())
        .or_else(|| pod["spec"]["terminationGracePeriodSeconds"].as_u64())
        .unwrap_or(30)
}
