//! Chooses a pod of a workload: one that is in trouble, if there is one. Where there is none at all, an event of
//! the workload says why.

mod events;
mod object;

use std::fmt;

use driver::record::is_object_name;
use k8s_openapi::api::{
    batch::v1::{CronJob, Job},
    core::v1::Pod,
};
use kube::{Api, Client, ResourceExt as _, api::ListParams};
use serde::Serialize;

use self::{events::Maker, object::Object};
use super::checks::Trouble;
use crate::{
    cluster::{Read, list, read},
    installation::is_ready,
};

/// The pods of a workload that are looked at.
const MAX_PODS: usize = 1_000;
/// The Jobs that are looked at.
const MAX_JOBS: usize = 2_000;

/// A kind of workload, by the names that kubectl has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// A Deployment.
    Deployment,
    /// A ReplicaSet.
    ReplicaSet,
    /// A StatefulSet.
    StatefulSet,
    /// A DaemonSet.
    DaemonSet,
    /// A Job.
    Job,
    /// A CronJob: the newest of its Jobs.
    CronJob,
}

/// What there is to explain of a workload.
#[derive(Debug)]
pub enum Chosen {
    /// A pod of this name, and what is wrong with those that are missing.
    Pod(String, Missing),
    /// Nothing: it has no pods, and an event says why.
    NoPods(NoPods),
}

/// What there is to say of the pods of a workload that are missing.
#[derive(Debug, Default)]
pub struct Missing {
    /// Why they cannot be made.
    pub(super) trouble: Vec<Trouble>,
    /// That they are missing, where nothing says why, and what else the workload says of itself.
    pub(super) notes: Vec<String>,
    /// What could not be read.
    pub(super) unknown: Vec<String>,
}

/// A workload whose pods cannot be made.
#[derive(Debug, Clone, Serialize)]
pub struct NoPods {
    /// The namespace.
    pub namespace: String,
    /// The kind and the name.
    pub workload: String,
    /// What is wrong.
    pub trouble: Vec<Trouble>,
}

impl fmt::Display for NoPods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} in namespace {}: no pods\n\nWrong:",
            self.workload, self.namespace
        )?;
        self.trouble.iter().try_for_each(|trouble| trouble.write(f))
    }
}

impl Workload {
    /// Returns the kind of a name such as `deployment`, `deployments` or `deploy`.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "deployment" | "deployments" | "deploy" => Some(Self::Deployment),
            "replicaset" | "replicasets" | "rs" => Some(Self::ReplicaSet),
            "statefulset" | "statefulsets" | "sts" => Some(Self::StatefulSet),
            "daemonset" | "daemonsets" | "ds" => Some(Self::DaemonSet),
            "job" | "jobs" => Some(Self::Job),
            "cronjob" | "cronjobs" | "cj" => Some(Self::CronJob),
            _ => None,
        }
    }

    /// Chooses a pod: one that is not ready, else the one whose name comes first.
    ///
    /// # Errors
    /// When there is no such workload, it has no pods, or they may not be read.
    pub async fn pod(self, client: &Client, namespace: &str, name: &str) -> Result<Chosen, String> {
        if !is_object_name(name) {
            return Err(format!("{name:?} cannot be the name of a {self:?}"));
        }
        if self == Self::CronJob {
            let job = newest_job(client, namespace, name).await?;
            return Self::Job.pod_of(client, namespace, &job).await;
        }
        self.pod_of(client, namespace, name).await
    }

    async fn pod_of(self, client: &Client, namespace: &str, name: &str) -> Result<Chosen, String> {
        let what = format!("{self:?} {namespace}/{name}");
        let object = match Object::read(self, client, namespace, name).await {
            Read::Is(object) => object,
            Read::Unknown(why) => return Err(format!("{what} cannot be read: {why}")),
            Read::Missing | Read::NoKind => return Err(format!("there is no {what}")),
        };
        let labels = object.selector.as_ref();
        let labels = labels.and_then(|selector| selector.match_labels.as_ref());
        let labels: Vec<_> = labels
            .into_iter()
            .flatten()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        if labels.is_empty() {
            return Err(format!(
                "{what} selects its pods by other than labels; name one of them"
            ));
        }
        let labels = labels.join(",");
        let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let params = ListParams::default().labels(&labels);
        let mut pods = match list(&pods, params, MAX_PODS).await {
            Read::Is(pods) => pods.items,
            other => {
                let why = other.unknown().unwrap_or("there is no such kind");
                return Err(format!("the pods of {what} cannot be read: {why}"));
            }
        };
        let maker = Maker {
            kind: self,
            namespace,
            name,
            object: &object,
            labels: &labels,
        };
        let is_complete = object
            .condition(&["Complete", "SuccessCriteriaMet"])
            .is_some();
        pods.sort_by_key(|pod| (rank(pod, is_complete), pod.name_any()));
        match pods.first() {
            Some(pod) => Ok(Chosen::Pod(pod.name_any(), maker.missing(client).await)),
            None => {
                let trouble = maker.no_pods(client).await?;
                Ok(Chosen::NoPods(NoPods {
                    namespace: namespace.to_owned(),
                    workload: format!("{self:?} {name}"),
                    trouble,
                }))
            }
        }
    }

    /// Returns the name of the kind in commands.
    fn word(self) -> String {
        format!("{self:?}").to_lowercase()
    }
}

/// Returns how late a pod of a workload is looked at. Pods that have ended are left over from before, unless they
/// are all that there is; those that failed on the way to a Job that is complete do not matter any more.
fn rank(pod: &Pod, is_complete: bool) -> u8 {
    let status = pod.status.as_ref();
    match status.and_then(|status| status.phase.as_deref()) {
        Some("Succeeded") if is_complete => 0,
        Some("Failed") => 3,
        Some("Succeeded") => 4,
        _ if is_ready(pod) => 2,
        _ => 1,
    }
}

/// Finds the newest Job of a CronJob.
async fn newest_job(client: &Client, namespace: &str, name: &str) -> Result<String, String> {
    let what = format!("CronJob {namespace}/{name}");
    let cron_jobs: Api<CronJob> = Api::namespaced(client.clone(), namespace);
    let cron_job = match read(cron_jobs.get(name)).await {
        Read::Is(found) => found,
        Read::Unknown(why) => return Err(format!("{what} cannot be read: {why}")),
        Read::Missing | Read::NoKind => return Err(format!("there is no {what}")),
    };
    let jobs: Api<Job> = Api::namespaced(client.clone(), namespace);
    let jobs = match list(&jobs, ListParams::default(), MAX_JOBS).await {
        Read::Is(jobs) => jobs.items,
        other => {
            let why = other.unknown().unwrap_or("there is no such kind");
            return Err(format!("the Jobs of {what} cannot be read: {why}"));
        }
    };
    let uid = cron_job.uid();
    let is_of_it = |job: &&Job| {
        let owners = job.owner_references();
        owners.iter().any(|owner| Some(&owner.uid) == uid.as_ref())
    };
    let of_it = jobs.iter().filter(is_of_it);
    let newest = of_it.max_by_key(|job| job.creation_timestamp().map(|time| time.0));
    newest.map(kube::ResourceExt::name_any).ok_or_else(|| {
        format!(
            "{what} has run no Job yet, or none of its Jobs is kept: there is no pod to explain"
        )
    })
}
