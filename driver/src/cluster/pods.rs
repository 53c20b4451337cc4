//! Reads pods, and tells when one is gone.

use kube::{
    api::GetParams,
    core::{ObjectMeta, Request},
};
use serde::Deserialize;

use super::{Cluster, request::Failure};
use crate::{
    error::{Error, Result},
    quoted::quoted,
    record::Pod,
};

/// The most containers that an event names.
const MOST_NAMED: usize = 5;

/// The parts of a pod that the driver reads.
#[derive(Deserialize)]
pub(super) struct PodView {
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    spec: PodSpec,
    #[serde(default)]
    pub(super) status: PodPhase,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    containers: Vec<Container>,
    init_containers: Vec<Container>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Container {
    name: String,
    /// `Always` for an init container that runs beside the others.
    restart_policy: String,
    volume_mounts: Vec<VolumeMount>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct VolumeMount {
    name: String,
    sub_path: String,
    sub_path_expr: String,
}

impl PodSpec {
    /// Names the containers that mount a part of a volume with `subPath` while the pod runs.
    fn with_sub_paths(&self, volume: &str) -> Option<String> {
        let beside = self.init_containers.iter();
        let running = beside.filter(|container| container.restart_policy == "Always");
        let mut names = running
            .chain(&self.containers)
            .filter(|container| {
                container.volume_mounts.iter().any(|mount| {
                    let is_part = !mount.sub_path.is_empty() || !mount.sub_path_expr.is_empty();
                    is_part && mount.name == volume
                })
            })
            .map(|container| quoted(&container.name, 63).to_string());
        let first: Vec<String> = names.by_ref().take(MOST_NAMED).collect();
        let more = match names.count() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let word = if first.len() + more.len() > 1 {
            "containers"
        } else {
            "container"
        };
        (!first.is_empty()).then(|| format!("{word} {}{more}", first.join(", ")))
    }
}

#[derive(Deserialize, Default)]
pub(super) struct PodPhase {
    #[serde(default)]
    pub(super) phase: String,
}

impl Cluster {
    /// Returns whether a pod exists and is not being deleted. A later pod of its name does not
    /// count.
    ///
    /// # Errors
    /// Fails if the API server does not answer, or its answer says nothing about this pod.
    pub async fn is_alive(&self, pod: &Pod) -> Result<bool> {
        let found = self.pod(pod).await?;
        Ok(found.is_some_and(|found| found.metadata.deletion_timestamp.is_none()))
    }

    /// Names the containers of a pod that mount a part of a volume with `subPath`, if there are any. The
    /// volume's name is that in the pod's spec.
    ///
    /// # Errors
    /// Fails if the API server does not answer, or its answer says nothing about this pod.
    pub async fn containers_with_sub_paths(
        &self,
        pod: &Pod,
        volume: &str,
    ) -> Result<Option<String>> {
        let found = self.pod(pod).await?;
        Ok(found.and_then(|found| found.spec.with_sub_paths(volume)))
    }

    /// Reads a pod. Returns `None` if it is gone.
    ///
    /// # Errors
    /// Fails if the API server does not answer, or its answer says nothing about this pod.
    pub(super) async fn pod(&self, pod: &Pod) -> Result<Option<PodView>> {
        let pods = format!("/api/v1/namespaces/{}/pods", pod.namespace);
        let request = Request::new(pods).get(&pod.name, &GetParams::default());
        found(self.ask(request).await, pod)
    }
}

/// Returns the pod that an answer contains, or `None` if the answer says that the pod is gone.
///
/// A pod is gone only if the API server itself says that there is none of its name, or that the one
/// of its name is another. A proxy that answers in its place says neither.
fn found(answer: Result<PodView, Failure>, pod: &Pod) -> Result<Option<PodView>> {
    let found = match answer {
        Ok(found) => found,
        Err(failure) if failure.is_not_found(&pod.name) => return Ok(None),
        Err(failure) => return Err(failure.into_error()),
    };
    let metadata = &found.metadata;
    let uid = metadata.uid.as_deref().unwrap_or_default();
    if metadata.name.as_deref() != Some(&pod.name) || uid.is_empty() {
        return Err(Error::unavailable(format!(
            "the answer of the API server is not pod {pod}"
        )));
    }
    // The API object of a static pod is its mirror, with a UID of its own:
    // https://kubernetes.io/docs/tasks/configure-pod-container/static-pod/
    let annotations = metadata.annotations.as_ref();
    let mirrored = annotations.and_then(|all| all.get("kubernetes.io/config.hash"));
    let is_it = uid == pod.uid || mirrored == Some(&pod.uid);
    Ok(is_it.then_some(found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use serde_json::json;

    fn pod() -> Pod {
        Pod {
            name: "web".into(),
            namespace: "shop".into(),
            uid: "u".into(),
        }
    }

    fn refused(code: u16, object: &str) -> Failure {
        Failure::Refused {
            code,
            reason: "x".into(),
            message: "no".into(),
            object: object.into(),
            namespace_ends: false,
        }
    }

    /// Whether the pod is alive; `None` if the answer does not say.
    fn alive(answer: Result<PodView, Failure>) -> Option<bool> {
        let found = found(answer, &pod()).ok()?;
        Some(found.is_some_and(|found| found.metadata.deletion_timestamp.is_none()))
    }

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
        let found = serde_json::from_value(json!({ "metadata": metadata })).unwrap();
        assert_eq!(alive(Ok(found)), expected);
    }

    #[rstest]
    #[case::whole(json!({"containers": [{"name": "a", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]}), None)]
    #[case::of_another_volume(json!({"containers": [{"name": "a", "volumeMounts": [{"name": "w", "subPath": "x"}]}]}), None)]
    #[case::a_part(json!({"containers": [{"name": "a", "volumeMounts": [{"name": "v"}, {"name": "v", "subPath": "x"}]}]}), Some("container \"a\""))]
    #[case::two(json!({"containers": [
        {"name": "a", "volumeMounts": [{"name": "v", "subPath": "x"}]},
        {"name": "b", "volumeMounts": [{"name": "v", "subPathExpr": "$(X)"}]},
    ]}), Some("containers \"a\", \"b\""))]
    #[case::an_init_container_that_has_ended(json!({"initContainers": [{"name": "i", "volumeMounts": [{"name": "v", "subPath": "x"}]}]}), None)]
    #[case::a_sidecar(json!({"initContainers": [{"name": "i", "restartPolicy": "Always", "volumeMounts": [{"name": "v", "subPath": "x"}]}]}), Some("container \"i\""))]
    #[case::without_containers(json!({}), None)]
    fn containers_with_a_part_of_the_volume(
        #[case] spec: serde_json::Value,
        #[case] expected: Option<&str>,
    ) {
        let pod = json!({"metadata": {"name": "web", "uid": "u"}, "spec": spec});
        let pod: PodView = serde_json::from_value(pod).unwrap();
        assert_eq!(pod.spec.with_sub_paths("v").as_deref(), expected);
    }

    #[rstest]
    #[case::no_such_pod(refused(404, "web"), Some(false))]
    #[case::no_such_page(refused(404, ""), None)]
    #[case::no_such_namespace(refused(404, "shop"), None)]
    #[case::forbidden(refused(403, "web"), None)]
    #[case::gone(refused(410, "web"), None)]
    #[case::silent(Failure::NoAnswer("x".into()), None)]
    #[case::something_else(Failure::WrongObject, None)]
    fn only_the_api_server_itself_says_that_a_pod_is_gone(
        #[case] failure: Failure,
        #[case] expected: Option<bool>,
    ) {
        assert_eq!(alive(Err(failure)), expected);
    }
}
