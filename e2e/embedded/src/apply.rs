//! Manifests: text with any number of YAML documents, put into an API server.

use kube::ResourceExt;
use kube::api::{Api, DynamicObject, PostParams};
use kube::discovery::{self, Scope};
use serde_json::Value;

use crate::error::{Error, Result, api_error};

/// The field manager of the objects.
const MANAGER: &str = "kubectl";

/// Creates every object of a manifest in its order, or replaces the one that exists. Objects that
/// name no namespace go to the given one.
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
    create_or_replace(&api_of_kind, object)
        .await
        .map_err(api_error(what))
}

async fn create_or_replace(
    api: &Api<DynamicObject>,
    mut object: DynamicObject,
) -> kube::Result<DynamicObject> {
    let name = object.name_any();
    let params = PostParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PostParams::default()
    };
    loop {
        object.metadata.resource_version = None;
        match api.create(&params, &object).await {
            Err(kube::Error::Api(status)) if status.is_already_exists() => {}
            created => return created,
        }
        let Some(existing) = api.get_opt(&name).await? else {
            continue;
        };
        object.metadata.resource_version = existing.metadata.resource_version;
        match api.replace(&name, &params, &object).await {
            // It was written or deleted meanwhile.
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {}
            replaced => return replaced,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_object_is_created_and_then_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let server = crate::api::ApiServer::start(dir.path()).await.unwrap();
        let class = |spec: &str| {
            format!(
                "{{apiVersion: storage.k8s.io/v1, kind: CSIDriver, metadata: {{name: d}}, spec: {spec}}}"
            )
        };
        let both = format!("{}\n---\n{}", class("{podInfoOnMount: true}"), class("{}"));
        let applied = apply(&server.client(), "default", &both).await.unwrap();
        assert_eq!(applied[0].metadata.uid, applied[1].metadata.uid);
        assert_eq!(applied[0].data["spec"]["podInfoOnMount"], true);
        assert_eq!(applied[1].data["spec"]["podInfoOnMount"], false);
    }
}
