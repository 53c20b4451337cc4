//! Finds what says why pods of a workload could not be made, or are gone: events, and the workload itself.

use jiff::Timestamp;
use k8s_openapi::api::{apps::v1::ReplicaSet, core::v1::Event};
use kube::{Api, Client, ResourceExt as _, api::ListParams};

use super::{Missing, Workload, object::Object};
use crate::{
    cluster::{Read, list, list_metadata},
    explain::{
        checks::{Trouble, told},
        facts::time_of,
    },
    text::one_line,
};

/// The events and the ReplicaSets that are looked at.
const MAX_EVENTS: usize = 2_000;
const MAX_SETS: usize = 1_000;
/// The seconds after which a failure to make a pod says nothing of the present: a controller tries again within
/// 17 minutes.
const RECENT: i64 = 20 * 60;
/// The annotation by which a Deployment numbers its ReplicaSets. One that it goes back to gets a new number.
const REVISION: &str = "deployment.kubernetes.io/revision";

/// A workload, whose pods it or its ReplicaSet makes.
pub(super) struct Maker<'a> {
    pub kind: Workload,
    pub namespace: &'a str,
    pub name: &'a str,
    pub object: &'a Object,
    /// The labels of its pods, as a selector.
    pub labels: &'a str,
}

impl Maker<'_> {
    /// Returns why it has no pods.
    ///
    /// # Errors
    /// When nothing says why.
    pub(super) async fn no_pods(&self, client: &Client) -> Result<Vec<Trouble>, String> {
        let (kind, namespace, name) = (self.kind, self.namespace, self.name);
        let what = format!("{kind:?} {namespace}/{name}");
        if let Some(trouble) = self.failed() {
            let of_pods = self.failed_mount(client).await;
            return Ok(of_pods.into_iter().chain([trouble]).collect());
        }
        if let Some(state) = self.object.condition(&["Complete", "Suspended"]) {
            let message = state.message.as_ref();
            let message = message.map_or_else(String::new, |text| format!(" ({text})"));
            return Err(format!(
                "{what} has no pods: its condition is {}{message}",
                state.kind
            ));
        }
        match self.failed_create(client).await {
            Read::Is(Some(event)) => {
                let (maker, of) = maker_of(&event);
                let what = format!("{maker} {of} cannot make its pods");
                Ok(vec![self.cannot("no-pods", what, &event)])
            }
            Read::Unknown(why) => Err(format!(
                "{what} has no pods, and its events cannot be read: {why}"
            )),
            _ => Err(format!(
                "{what} has no pods, and no event says that one could not be made; does it want any (kubectl -n {namespace} get {} {name})?",
                kind.word()
            )),
        }
    }

    /// Returns what there is to say of the pods that are missing, where others are there.
    pub(super) async fn missing(&self, client: &Client) -> Missing {
        let mut missing = Missing::default();
        let (kind, name) = (self.kind, self.name);
        if let Some(failed) = self.failed() {
            let said = failed
                .said
                .map_or_else(String::new, |said| format!(": {said}"));
            missing.notes.push(format!("{}{said}", failed.what));
        }
        let Some(lacks) = self.object.lacks() else {
            return missing;
        };
        let begin = format!("{kind:?} {name} {lacks}");
        let now = Timestamp::now();
        let is_recent = |event: &Event| {
            time_of(event).is_none_or(|time| now.duration_since(time).as_secs() <= RECENT)
        };
        match self.failed_create(client).await {
            Read::Is(Some(event)) if is_recent(&event) => {
                let (maker, of) = maker_of(&event);
                let what = format!("{begin}: {maker} {of} cannot make the others");
                missing
                    .trouble
                    .push(self.cannot("missing-pods", what, &event));
            }
            // The event may be gone, or may not be read.
            read => match self.object.condition(&["ReplicaFailure"]) {
                Some(failure) => missing.trouble.push(Trouble {
                    check: "missing-pods",
                    volume: None,
                    what: format!("{begin}, and the others cannot be made"),
                    said: failure.message.as_deref().map(|text| told(text, None, now)),
                    next: self.describe(),
                }),
                None => match read.unknown() {
                    Some(why) => missing
                        .unknown
                        .push(format!("why {begin}: its events: {why}")),
                    None => missing.notes.push(format!(
                        "{begin}, and no event says that one could not be made"
                    )),
                },
            },
        }
        missing
    }

    fn describe(&self) -> String {
        let (kind, namespace, name) = (self.kind, self.namespace, self.name);
        format!("kubectl -n {namespace} describe {} {name}", kind.word())
    }

    fn cannot(&self, check: &'static str, what: String, event: &Event) -> Trouble {
        let (maker, of) = maker_of(event);
        let message = event.message.as_deref();
        Trouble {
            check,
            volume: None,
            what,
            said: message.map(|said| told(said, time_of(event), Timestamp::now())),
            next: format!(
                "kubectl -n {} describe {} {of}",
                self.namespace,
                maker.to_lowercase()
            ),
        }
    }

    /// Returns that a Job has failed. It deletes the pods that still run then.
    fn failed(&self) -> Option<Trouble> {
        let failed = self.object.condition(&["Failed", "FailureTarget"])?;
        let reason = failed.reason.as_ref();
        let reason = reason.map_or_else(String::new, |reason| format!(" ({reason})"));
        Some(Trouble {
            check: "job-failed",
            volume: None,
            what: format!("{:?} {} has failed{reason}", self.kind, self.name),
            said: failed
                .message
                .as_deref()
                .map(|text| told(text, None, Timestamp::now())),
            next: self.describe(),
        })
    }

    /// Finds the last words about volumes of a pod of a Job, which may be gone.
    async fn failed_mount(&self, client: &Client) -> Option<Trouble> {
        let events: Api<Event> = Api::namespaced(client.clone(), self.namespace);
        let params = ListParams::default().fields("reason=FailedMount");
        let events = list(&events, params, MAX_EVENTS).await;
        let is_of_it = |event: &&Event| {
            let object = &event.involved_object;
            let of = object.name.as_deref().unwrap_or_default();
            event.reason.as_deref() == Some("FailedMount")
                && object.kind.as_deref() == Some("Pod")
                && is_pod_of_job(of, self.name)
        };
        let events = events.found()?.items.iter();
        let last = events.filter(is_of_it).max_by_key(|event| time_of(event))?;
        let (_, pod) = maker_of(last);
        let message = last.message.as_deref();
        Some(Trouble {
            check: "pod-gone",
            volume: None,
            what: format!("pod {pod} of it, which is gone, could not mount its volumes"),
            said: message.map(|said| told(said, time_of(last), Timestamp::now())),
            next: format!(
                "kubectl -n {} get events --field-selector involvedObject.name={pod}",
                self.namespace
            ),
        })
    }

    /// Finds the last event that says why a pod could not be made. Pods of a Deployment are made by its newest
    /// ReplicaSet; where that may not be read, its name is known to be that of the Deployment and a hash.
    async fn failed_create(&self, client: &Client) -> Read<Option<Event>> {
        let events: Api<Event> = Api::namespaced(client.clone(), self.namespace);
        let params = ListParams::default().fields("reason=FailedCreate");
        let (maker, newest) = match self.kind {
            Workload::Deployment => ("ReplicaSet".to_owned(), self.newest_set(client).await),
            other => (format!("{other:?}"), Some(self.name.to_owned())),
        };
        let is_of_it = |event: &Event| {
            let object = &event.involved_object;
            let of = object.name.as_deref().unwrap_or_default();
            let is_named = match &newest {
                Some(name) => of == name,
                None => of
                    .strip_prefix(self.name)
                    .and_then(|rest| rest.strip_prefix('-'))
                    .is_some_and(|hash| !hash.is_empty() && !hash.contains('-')),
            };
            event.reason.as_deref() == Some("FailedCreate")
                && object.kind.as_deref() == Some(maker.as_str())
                && is_named
        };
        list(&events, params, MAX_EVENTS).await.map(|events| {
            let of_it = events.items.into_iter().filter(is_of_it);
            of_it.max_by_key(time_of)
        })
    }

    /// Finds the newest ReplicaSet of a Deployment.
    async fn newest_set(&self, client: &Client) -> Option<String> {
        let sets: Api<ReplicaSet> = Api::namespaced(client.clone(), self.namespace);
        let params = ListParams::default().labels(self.labels);
        let sets = list_metadata(&sets, params, MAX_SETS).await;
        let of_it = sets.found()?.items.iter().filter(|set| {
            let mut owners = set.owner_references().iter();
            owners.any(|owner| owner.uid == self.object.uid)
        });
        let newest = of_it.max_by_key(|set| {
            let revision = set.annotations().get(REVISION);
            let revision = revision.and_then(|number| number.parse::<u64>().ok());
            (revision, set.creation_timestamp().map(|time| time.0))
        })?;
        Some(newest.name_any())
    }
}

/// Returns the kind and the name of the object of an event.
fn maker_of(event: &Event) -> (&str, String) {
    let object = &event.involved_object;
    let name = object.name.as_deref().unwrap_or_default();
    (
        object.kind.as_deref().unwrap_or_default(),
        one_line(name, 253),
    )
}

/// Returns whether a name is that of a pod of a Job: the Job's, perhaps an index, and five random characters.
fn is_pod_of_job(pod: &str, job: &str) -> bool {
    let rest = pod
        .strip_prefix(job)
        .and_then(|rest| rest.strip_prefix('-'));
    let Some(rest) = rest else {
        return false;
    };
    let (index, random) = rest.rsplit_once('-').unwrap_or(("0", rest));
    random.len() == 5 && !index.is_empty() && index.bytes().all(|c| c.is_ascii_digit())
}
