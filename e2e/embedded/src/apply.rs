//! Manifests: text with any number of YAML documents, put into an API server.

use kube::ResourceExt;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::discovery::{self, Scope};
use serde_json::Value;

use crate::error::{Error, Result, api_error};

/// The owner of applied fields, the same as that of `kubectl apply --server-side`.
const MANAGER: &str = "kubectl";

/// Applies every document of a manifest in its order, as `kubectl apply --server-side
/// --force-conflicts` does. Objects that name no namespace go to the given one.
///
/// # Errors
/// [`Error::Manifest`] for a document that is no object, [`Error::Api`] for what the server refuses.
pub async fn apply(
    client: &kube::Client,
    namespace: &str,
    manifest: &str,
) -> Result<Vec<DynamicObject>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(manifest)
        .map_err(|error| Error::Manifest(error.to_string()))?;
    let mut applied = Vec::new();
    for document in documents.into_iter().filter(|document| !document.is_null()) {
        let object: DynamicObject =
            serde_json::from_value(document).map_err(|error| Error::Manifest(error.to_string()))?;
        applied.push(apply_object(client, namespace, object).await?);
    }
    Ok(applied)
}

async fn apply_object(
    client: &kube::Client,
    namespace: &str,
    object: DynamicObject,
) -> Result<DynamicObject> {
    let name = object.name_any();
    let types = object
        .types
        .as_ref()
        .ok_or_else(|| Error::Manifest(format!("{name} has no apiVersion and kind")))?;
    let what = format!("apply {} {name}", types.kind);
    let kind = types
        .try_into()
        .map_err(|error| Error::Manifest(format!("{what}: {error}")))?;
    let (resource, capabilities) = discovery::pinned_kind(client, &kind)
        .await
        .map_err(api_error(what.clone()))?;
    let api_of_kind: Api<DynamicObject> = match capabilities.scope {
        Scope::Cluster => Api::all_with(client.clone(), &resource),
        Scope::Namespaced => {
            let namespace = object.namespace().unwrap_or_else(|| namespace.to_owned());
            Api::namespaced_with(client.clone(), &namespace, &resource)
        }
    };
    let params = PatchParams::apply(MANAGER).force();
    api_of_kind
        .patch(&name, &params, &Patch::Apply(&object))
        .await
        .map_err(api_error(what))
}
