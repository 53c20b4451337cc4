//! Reads a workload: how it finds its pods, how many it wants, and how many there are.

use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet},
        batch::v1::Job,
    },
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};
use kube::{Api, Client, ResourceExt as _};

use super::Workload;
use crate::cluster::{Read, read};

/// What is known of a workload.
#[derive(Debug, Default)]
pub(super) struct Object {
    /// Its UID.
    pub uid: String,
    /// How it finds its pods.
    pub selector: Option<LabelSelector>,
    /// The pods that it wants now.
    pub wanted: i32,
    /// The pods that there are.
    pub current: i32,
    /// Those of its present template, where it replaces pods of an earlier one.
    pub updated: Option<i32>,
    /// What it says of itself.
    pub conditions: Vec<Condition>,
}

/// A condition that is true.
#[derive(Debug)]
pub(super) struct Condition {
    pub kind: String,
    pub reason: Option<String>,
    pub message: Option<String>,
}

impl Object {
    /// Reads it. The pods of a CronJob are those of its Jobs.
    pub(super) async fn read(
        kind: Workload,
        client: &Client,
        namespace: &str,
        name: &str,
    ) -> Read<Self> {
        let client = client.clone();
        match kind {
            Workload::Deployment => {
                let api: Api<Deployment> = Api::namespaced(client, namespace);
                read(api.get(name)).await.map(Self::of_deployment)
            }
            Workload::ReplicaSet => {
                let api: Api<ReplicaSet> = Api::namespaced(client, namespace);
                read(api.get(name)).await.map(Self::of_replica_set)
            }
            Workload::StatefulSet => {
                let api: Api<StatefulSet> = Api::namespaced(client, namespace);
                read(api.get(name)).await.map(Self::of_stateful_set)
            }
            Workload::DaemonSet => {
                let api: Api<DaemonSet> = Api::namespaced(client, namespace);
                read(api.get(name)).await.map(Self::of_daemon_set)
            }
            Workload::Job => {
                let api: Api<Job> = Api::namespaced(client, namespace);
                read(api.get(name)).await.map(Self::of_job)
            }
            Workload::CronJob => Read::Is(Self::default()),
        }
    }

    fn of_deployment(found: Deployment) -> Self {
        let uid = found.uid().unwrap_or_default();
        let (spec, status) = (found.spec, found.status.unwrap_or_default());
        let conditions = status.conditions.unwrap_or_default().into_iter();
        // One that is paused replaces no pods.
        let is_paused = spec.paused == Some(true);
        Self {
            uid,
            selector: Some(spec.selector),
            wanted: spec.replicas.unwrap_or(1),
            current: status.replicas.unwrap_or(0),
            updated: (!is_paused).then_some(status.updated_replicas.unwrap_or(0)),
            conditions: conditions
                .filter(|condition| condition.status.as_deref() == Some("True"))
                .map(|condition| Condition {
                    kind: condition.type_.unwrap_or_default(),
                    reason: condition.reason,
                    message: condition.message,
                })
                .collect(),
        }
    }

    fn of_replica_set(found: ReplicaSet) -> Self {
        let uid = found.uid().unwrap_or_default();
        let spec = found.spec;
        let status = found.status.unwrap_or_default();
        let conditions = status.conditions.unwrap_or_default().into_iter();
        Self {
            uid,
            selector: Some(spec.selector),
            wanted: spec.replicas.unwrap_or(1),
            current: status.replicas,
            updated: None,
            conditions: conditions
                .filter(|condition| condition.status.as_deref() == Some("True"))
                .map(|condition| Condition {
                    kind: condition.type_.unwrap_or_default(),
                    reason: condition.reason,
                    message: condition.message,
                })
                .collect(),
        }
    }

    fn of_stateful_set(found: StatefulSet) -> Self {
        let uid = found.uid().unwrap_or_default();
        let spec = found.spec;
        let status = found.status.unwrap_or_default();
        Self {
            uid,
            selector: Some(spec.selector),
            wanted: spec.replicas.unwrap_or(1),
            current: status.replicas,
            updated: None,
            conditions: Vec::new(),
        }
    }

    fn of_daemon_set(found: DaemonSet) -> Self {
        let uid = found.uid().unwrap_or_default();
        let status = found.status.unwrap_or_default();
        Self {
            uid,
            selector: Some(found.spec.selector),
            wanted: status.desired_number_scheduled,
            current: status.current_number_scheduled,
            updated: None,
            conditions: Vec::new(),
        }
    }

    fn of_job(found: Job) -> Self {
        let uid = found.uid().unwrap_or_default();
        let spec = found.spec.unwrap_or_default();
        let status = found.status.unwrap_or_default();
        let conditions = status.conditions.unwrap_or_default().into_iter();
        let conditions: Vec<_> = conditions
            .filter(|condition| condition.status == "True")
            .map(|condition| Condition {
                kind: condition.type_,
                reason: condition.reason,
                message: condition.message,
            })
            .collect();
        let has_ended = conditions
            .iter()
            .any(|condition| ENDED.contains(&condition.kind.as_str()));
        let succeeded = status.succeeded.unwrap_or(0);
        let at_once = spec.parallelism.unwrap_or(1);
        let wanted = match spec.completions {
            _ if has_ended || spec.suspend == Some(true) => 0,
            Some(completions) => at_once.min(completions - succeeded),
            // Once one has succeeded, no other is made.
            None if succeeded > 0 => 0,
            None => at_once,
        };
        Self {
            uid,
            selector: spec.selector,
            wanted,
            current: status.active.unwrap_or(0),
            updated: None,
            conditions,
        }
    }

    /// Returns the condition of one of these kinds.
    pub(super) fn condition(&self, kinds: &[&str]) -> Option<&Condition> {
        let mut conditions = self.conditions.iter();
        conditions.find(|condition| kinds.contains(&condition.kind.as_str()))
    }

    /// Returns which pods are missing, in words.
    pub(super) fn lacks(&self) -> Option<String> {
        if self.current < self.wanted {
            return Some(format!("has {} of {} pods", self.current, self.wanted));
        }
        let updated = self.updated.filter(|updated| *updated < self.wanted)?;
        Some(format!(
            "has {updated} of {} pods of its present template",
            self.wanted
        ))
    }
}

/// The conditions of a Job that makes no pods any more.
const ENDED: [&str; 5] = [
    "Failed",
    "FailureTarget",
    "Complete",
    "SuccessCriteriaMet",
    "Suspended",
];
