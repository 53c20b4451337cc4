//! Chooses a pod of a workload: one that is in trouble, if there is one. Where there is none at all, an event of
//! the workload says why.

use std::fmt;

use driver::record::is_object_name;
use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, Deployment, StatefulSet},
        batch::v1::{CronJob, Job},
        core::v1::{Event, Pod},
    },
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};
use kube::{Api, Client, ResourceExt as _, api::ListParams};
use serde::Serialize;

use super::{checks::Trouble, facts::time_of};
use crate::{
    cluster::{Read, list, read},
    installation::is_ready,
    text::one_line,
};

/// The pods of a workload that are looked at.
const MAX_PODS: usize = 1_000;
/// The events and the Jobs that are looked at.
const MAX_EVENTS: usize = 2_000;
const MAX_JOBS: usize = 2_000;
/// The longest text of an event that is shown.
const MAX_SAID: usize = 600;

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
    /// A CronJob: the newest of its Jobs.
    CronJob,
}

/// What there is to explain of a workload.
#[derive(Debug)]
pub enum Chosen {
    /// A pod of this name.
    Pod(String),
    /// Nothing: it has no pods, and an event says why.
    NoPods(NoPods),
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
        if let Some(pod) = pods.first() {
            return Ok(Chosen::Pod(pod.name_any()));
        }
        match self.why_no_pods(client, namespace, name).await {
            Read::Is(Some(trouble)) => Ok(Chosen::NoPods(NoPods {
                namespace: namespace.to_owned(),
                workload: format!("{self:?} {name}"),
                trouble: vec![trouble],
            })),
            Read::Unknown(why) => Err(format!(
                "{what} has no pods, and its events cannot be read: {why}"
            )),
            _ => Err(format!(
                "{what} has no pods, and no event says that one could not be made; does it want any (kubectl -n {namespace} get {} {name})?",
                format!("{self:?}").to_lowercase()
            )),
        }
    }

    /// Finds the last event that says why a pod could not be made. Pods of a Deployment are made by its
    /// ReplicaSets, whose names are its own and a hash.
    async fn why_no_pods(
        self,
        client: &Client,
        namespace: &str,
        name: &str,
    ) -> Read<Option<Trouble>> {
        let events: Api<Event> = Api::namespaced(client.clone(), namespace);
        let params = ListParams::default().fields("reason=FailedCreate");
        let maker = match self {
            Self::Deployment => "ReplicaSet".to_owned(),
            other => format!("{other:?}"),
        };
        let is_of_it = |event: &&Event| {
            let object = &event.involved_object;
            let of = object.name.as_deref().unwrap_or_default();
            let is_named = match self {
                Self::Deployment => of
                    .strip_prefix(name)
                    .and_then(|rest| rest.strip_prefix('-'))
                    .is_some_and(|hash| !hash.is_empty() && !hash.contains('-')),
                _ => of == name,
            };
            event.reason.as_deref() == Some("FailedCreate")
                && object.kind.as_deref() == Some(maker.as_str())
                && is_named
        };
        list(&events, params, MAX_EVENTS).await.map(|events| {
            let last = events
                .items
                .iter()
                .filter(is_of_it)
                .max_by_key(|event| time_of(event))?;
            let of = last.involved_object.name.as_deref().unwrap_or_default();
            let message = last.message.as_deref();
            Some(Trouble {
                check: "no-pods",
                volume: None,
                what: format!("{maker} {of} cannot make its pods"),
                said: message.map(|said| one_line(said, MAX_SAID)),
                next: format!(
                    "kubectl -n {namespace} describe {} {of}",
                    maker.to_lowercase()
                ),
            })
        })
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
            // Its pods are those of its Jobs.
            Self::CronJob => Read::Is(None),
        }
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
