//! Chooses a pod of a workload: one that is in trouble, if there is one.

use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, Deployment, StatefulSet},
        batch::v1::Job,
        core::v1::Pod,
    },
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};
use kube::{Api, Client, ResourceExt as _, api::ListParams};

use crate::{
    cluster::{Read, list, read},
    installation::is_ready,
};

/// The pods of a workload that are looked at.
const MAX_PODS: usize = 1_000;

/// A kind of workload, by the names that kubectl has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// A Deployment.
    Deployment,
    /// A StatefulSet.
    StatefulSet,
    /// A DaemonSet.
    DaemonSet,
    /// A Job.
    Job,
}

impl Workload {
    /// Returns the kind of a name such as `deployment`, `deployments` or `deploy`.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "deployment" | "deployments" | "deploy" => Some(Self::Deployment),
            "statefulset" | "statefulsets" | "sts" => Some(Self::StatefulSet),
            "daemonset" | "daemonsets" | "ds" => Some(Self::DaemonSet),
            "job" | "jobs" => Some(Self::Job),
            _ => None,
        }
    }

    /// Chooses a pod: one that is not ready, else the one whose name comes first.
    ///
    /// # Errors
    /// When there is no such workload, it has no pods, or they may not be read.
    pub async fn pod(self, client: &Client, namespace: &str, name: &str) -> Result<String, String> {
        let what = format!("{self:?} {namespace}/{name}");
        let selector = match self.selector(client, namespace, name).await {
            Read::Is(selector) => selector.unwrap_or_default(),
            Read::Unknown(why) => return Err(format!("{what} cannot be read: {why}")),
            Read::Missing | Read::NoKind => return Err(format!("there is no {what}")),
        };
        let labels = selector.match_labels.unwrap_or_default();
        if labels.is_empty() {
            return Err(format!(
                "{what} selects its pods by other than labels; name one of them"
            ));
        }
        let labels: Vec<_> = labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let params = ListParams::default().labels(&labels.join(","));
        let mut pods = match list(&pods, params, MAX_PODS).await {
            Read::Is(pods) => pods.items,
            other => {
                let why = other.unknown().unwrap_or("there is no such kind");
                return Err(format!("the pods of {what} cannot be read: {why}"));
            }
        };
        pods.sort_by_key(|pod| (is_ready(pod), pod.name_any()));
        let pod = pods.first().map(kube::ResourceExt::name_any);
        pod.ok_or_else(|| format!("{what} has no pods; look at its events"))
    }

    async fn selector(
        self,
        client: &Client,
        namespace: &str,
        name: &str,
    ) -> Read<Option<LabelSelector>> {
        let client = client.clone();
        match self {
            Self::Deployment => {
                let api: Api<Deployment> = Api::namespaced(client, namespace);
                read(api.get(name))
                    .await
                    .map(|found| Some(found.spec.selector))
            }
            Self::StatefulSet => {
                let api: Api<StatefulSet> = Api::namespaced(client, namespace);
                read(api.get(name))
                    .await
                    .map(|found| Some(found.spec.selector))
            }
            Self::DaemonSet => {
                let api: Api<DaemonSet> = Api::namespaced(client, namespace);
                read(api.get(name))
                    .await
                    .map(|found| Some(found.spec.selector))
            }
            Self::Job => {
                let api: Api<Job> = Api::namespaced(client, namespace);
                read(api.get(name)).await.map(|found| found.spec?.selector)
            }
        }
    }
}
