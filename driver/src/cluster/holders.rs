//! Who a pod's Secrets live with: its controllers, or for a bare pod its pod status.

use kube::{
    api::GetParams,
    core::{ObjectMeta, Request, Resource as _},
};
use serde::Deserialize;

use super::{
    Cluster, Failure,
    resources::{API_VERSION, SecretProviderClassPodStatus},
    secrets::Owner,
};
use crate::{
    error::{Error, Result},
    record::Pod,
};

/// A pod as far as its Secrets are concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Who its Secrets live with.
    pub owners: Vec<Owner>,
    /// Whether it has ended, or is about to: it needs no Secrets any more.
    pub ended: bool,
    /// Whether its owners end with it: a bare pod's status, or the Job of a pod that has ended.
    pub owners_end: bool,
}

#[derive(Deserialize)]
struct PodView {
    metadata: ObjectMeta,
    #[serde(default)]
    status: PodPhase,
}

#[derive(Deserialize, Default)]
struct PodPhase {
    #[serde(default)]
    phase: String,
}

#[derive(Deserialize)]
struct Meta {
    metadata: ObjectMeta,
}

/// Whether what was read of a pod's name is the pod, and it is not being deleted.
fn is_alive(found: &ObjectMeta, pod: &Pod) -> Result<bool> {
    let uid = found.uid.as_deref().unwrap_or_default();
    if found.name.as_deref() != Some(&pod.name) || uid.is_empty() {
        return Err(Error::unavailable(format!(
            "the API server answers with something else than pod {pod}"
        )));
    }
    // A static pod's object is its mirror, with a UID of its own:
    // https://kubernetes.io/docs/tasks/configure-pod-container/static-pod/
    let mirrors = found
        .annotations
        .as_ref()
        .and_then(|annotations| annotations.get("kubernetes.io/config.hash"));
    let is_it = uid == pod.uid || mirrors.is_some_and(|hash| *hash == pod.uid);
    Ok(is_it && found.deletion_timestamp.is_none())
}

impl Cluster {
    /// Returns whether a pod is there and is not being deleted: the pod itself, and not a later
    /// one of its name.
    ///
    /// # Errors
    /// When the API server does not say.
    pub async fn is_alive(&self, pod: &Pod) -> Result<bool> {
        match self.ask::<Meta>(read_pod(pod)).await {
            Ok(found) => is_alive(&found.metadata, pod),
            // What stands before the API server may say that as well, of something else.
            Err(Failure::Refused {
                code: 404, object, ..
            }) if object == pod.name => Ok(false),
            Err(failure) => Err(failure.into_error()),
        }
    }

    /// Finds out who a pod's Secrets live with. None when the pod is gone.
    ///
    /// # Errors
    /// When the API server does not say.
    pub async fn holder(&self, pod: &Pod, pod_status: &str) -> Result<Option<Holder>> {
        let failed = |failure: Failure| {
            let error: Error = failure.into_error();
            error.context(format_args!("failed to find the owners of pod {pod}"))
        };
        let view: PodView = match self.ask(read_pod(pod)).await {
            Err(Failure::Refused { code: 404, .. }) => return Ok(None),
            answer => answer.map_err(failed)?,
        };
        if view.metadata.uid.as_deref() != Some(&pod.uid) {
            return Ok(None);
        }
        let phase = view.status.phase.as_str();
        let finished = matches!(phase, "Succeeded" | "Failed");
        let ended = finished || view.metadata.deletion_timestamp.is_some();
        let controllers = view.metadata.owner_references.unwrap_or_default();
        let owners_end = controllers.iter().all(|owner| owner.kind == "Job") && finished;
        let mut owners: Vec<Owner> = controllers
            .into_iter()
            .map(|owner| Owner {
                api_version: owner.api_version,
                kind: owner.kind,
                name: owner.name,
                uid: owner.uid,
            })
            .collect();
        if owners.is_empty() {
            let statuses = SecretProviderClassPodStatus::url_path(&(), Some(&pod.namespace));
            let request = Request::new(statuses).get(pod_status, &GetParams::default());
            let status: Meta = match self.ask(request).await {
                Err(Failure::Refused { code: 404, .. }) => return Ok(None),
                answer => answer.map_err(failed)?,
            };
            let of_pod = status.metadata.owner_references.iter().flatten();
            if of_pod.clone().all(|owner| owner.uid != pod.uid) {
                // An earlier pod's, which goes soon, or a later one's.
                return Ok(None);
            }
            owners.push(Owner {
                api_version: API_VERSION.to_owned(),
                kind: SecretProviderClassPodStatus::kind(&()).into_owned(),
                name: pod_status.to_owned(),
                uid: status.metadata.uid.unwrap_or_default(),
            });
        }
        Ok(Some(Holder {
            owners,
            ended,
            owners_end,
        }))
    }
}

fn read_pod(pod: &Pod) -> Result<http::Request<Vec<u8>>, kube::core::request::Error> {
    let pods = format!("/api/v1/namespaces/{}/pods", pod.namespace);
    Request::new(pods).get(&pod.name, &GetParams::default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use serde_json::json;

    /// None: what was read says nothing of the pod.
    #[rstest]
    #[case::the_pod(json!({"name": "web", "uid": "u"}), Some(true))]
    #[case::it_is_deleted(json!({"name": "web", "uid": "u", "deletionTimestamp": "2026-01-01T00:00:00Z"}), Some(false))]
    #[case::a_later_one(json!({"name": "web", "uid": "v"}), Some(false))]
    #[case::the_mirror_of_a_static_pod(json!({"name": "web", "uid": "v", "annotations": {"kubernetes.io/config.hash": "u"}}), Some(true))]
    #[case::of_another_static_pod(json!({"name": "web", "uid": "v", "annotations": {"kubernetes.io/config.hash": "w"}}), Some(false))]
    #[case::another_pod(json!({"name": "other", "uid": "v"}), None)]
    #[case::no_pod(json!({}), None)]
    #[case::without_a_uid(json!({"name": "web"}), None)]
    #[case::with_an_empty_uid(json!({"name": "web", "uid": ""}), None)]
    fn only_the_pod_itself_says_that_it_goes(
        #[case] metadata: serde_json::Value,
        #[case] expected: Option<bool>,
    ) {
        let pod = Pod {
            name: "web".into(),
            namespace: "shop".into(),
            uid: "u".into(),
        };
        let found = serde_json::from_value(metadata).unwrap();
        assert_eq!(is_alive(&found, &pod).ok(), expected);
    }
}
