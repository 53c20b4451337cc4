//! Posts events on pods: what `kubectl describe pod` shows besides kubelet's own.
//!
//! An event is news of a change, so it may be late, and nobody waits for one. One that cannot be
//! posted is tried again a few times, whatever the reason, because roles and webhooks change. Then
//! whoever announced it hears that it has not been told. Each namespace has places of its own for events that wait, and posts
//! one at a time, so that one whose events are refused or slow is in nobody's way. Whoever finds
//! no place is told, and tries again when the same is news still.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Event as PodEvent, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{Api, api::PostParams, core::ObjectMeta};
use tokio::time::sleep;

use super::{Cluster, Failure, limited};
use crate::{error::Result, record::Pod, turns::Turns};

/// Who reports, as `kubectl describe` names it.
const COMPONENT: &str = "secrets-store-csi-driver";

/// Waits before another attempt to post.
const WAITS: [Duration; 3] = [
    Duration::from_secs(2),
    Duration::from_secs(15),
    Duration::from_secs(60),
];

/// How many events may wait to be posted, and how many of them in one namespace.
const MOST_WAITING: usize = 1024;
const MOST_OF_NAMESPACE: usize = 64;

/// Limits of the API for an event's message and name.
const MAX_MESSAGE: usize = 1024;
const MAX_NAME: usize = 253;

/// Whether an event is about trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Things go their way.
    Normal,
    /// Somebody should look.
    Warning,
}

/// The events that wait to be posted.
pub(super) struct Events {
    /// How many wait, by namespace.
    waiting: Arc<Mutex<HashMap<String, usize>>>,
    posting: Turns<String>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            waiting: Arc::default(),
            posting: Turns::new(1),
        }
    }
}

/// The place of an event that waits.
struct Place {
    namespace: String,
    waiting: Arc<Mutex<HashMap<String, usize>>>,
}

impl Events {
    fn place(&self, namespace: &str) -> Option<Place> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = waiting.values().sum();
        let of_namespace = waiting.get(namespace).copied().unwrap_or_default();
        if all >= MOST_WAITING || of_namespace >= MOST_OF_NAMESPACE {
            return None;
        }
        waiting.insert(namespace.to_owned(), of_namespace + 1);
        Some(Place {
            namespace: namespace.to_owned(),
            waiting: Arc::clone(&self.waiting),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = waiting.get_mut(&self.namespace) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(&self.namespace);
            }
        }
    }
}

impl Cluster {
    /// Posts an event on a pod, in the background. `reason` is one word in CamelCase; `message`
    /// a sentence for whoever runs the pod. Returns whether it is going to be posted: when too
    /// many wait, it is not, and is not logged either. `ended` is called with whether it was
    /// posted, once no further attempt is made.
    #[must_use = "an event that is not accepted has not been told"]
    pub fn announce(
        &self,
        pod: &Pod,
        severity: Severity,
        reason: &'static str,
        message: &str,
        ended: impl FnOnce(bool) + Send + 'static,
    ) -> bool {
        let Some(place) = self.events.place(&pod.namespace) else {
            tracing::debug!(pod = %pod, reason, "no event is posted now: too many are waiting");
            return false;
        };
        match severity {
            Severity::Normal => tracing::info!(pod = %pod, reason, "{message}"),
            Severity::Warning => tracing::warn!(pod = %pod, reason, "{message}"),
        }
        let event = event(pod, &self.node, severity, reason, message);
        let (cluster, pod) = (self.clone(), pod.clone());
        tokio::spawn(async move {
            let _place = place;
            let posted = cluster.post(&pod, &event).await;
            if let Err(error) = &posted {
                tracing::warn!(pod = %pod, reason, %error, "the event could not be posted");
            }
            ended(posted.is_ok());
        });
        true
    }

    async fn post(&self, pod: &Pod, event: &PodEvent) -> Result<()> {
        let mut waits = WAITS.iter();
        loop {
            let error = match self.client().await {
                Ok(client) => {
                    let _turn = self.events.posting.take(pod.namespace.clone()).await;
                    let api: Api<PodEvent> = Api::namespaced(client, &pod.namespace);
                    match limited(api.create(&PostParams::default(), event)).await {
                        // The namespace or the pod's event of that name is there already or gone.
                        Ok(_)
                        | Err(Failure::Refused {
                            code: 404 | 409, ..
                        }) => return Ok(()),
                        Err(failure) => failure.into_error(),
                    }
                }
                Err(error) => error,
            };
            match waits.next() {
                Some(wait) => sleep(*wait).await,
                None => return Err(error),
            }
        }
    }
}

fn event(pod: &Pod, node: &str, severity: Severity, reason: &str, message: &str) -> PodEvent {
    let now = Timestamp::now();
    let unique = format!(".{:x}", now.as_nanosecond());
    let room = MAX_NAME - unique.len();
    PodEvent {
        metadata: ObjectMeta {
            name: Some(format!("{}{unique}", clipped(&pod.name, room))),
            namespace: Some(pod.namespace.clone()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(pod.name.clone()),
            namespace: Some(pod.namespace.clone()),
            uid: Some(pod.uid.clone()),
            ..ObjectReference::default()
        },
        type_: Some(
            match severity {
                Severity::Normal => "Normal",
                Severity::Warning => "Warning",
            }
            .to_owned(),
        ),
        reason: Some(reason.to_owned()),
        message: Some(clipped(message, MAX_MESSAGE).to_owned()),
        count: Some(1),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        source: Some(EventSource {
            component: Some(COMPONENT.to_owned()),
            host: Some(node.to_owned()),
        }),
        reporting_component: Some(COMPONENT.to_owned()),
        reporting_instance: Some(node.to_owned()),
        ..PodEvent::default()
    }
}

/// As much of a text as fits, in whole characters.
fn clipped(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_uses_its_own_places() {
        let events = Events::default();
        let places = |namespace: &str, count: usize| {
            (0..count)
                .map_while(|_| events.place(namespace))
                .collect::<Vec<_>>()
        };
        let noisy = places("noisy", 2 * MOST_OF_NAMESPACE);
        assert_eq!(noisy.len(), MOST_OF_NAMESPACE);
        assert!(events.place("quiet").is_some());
        let others: Vec<_> = (0..2 * MOST_WAITING)
            .flat_map(|number| events.place(&number.to_string()))
            .collect();
        assert_eq!(noisy.len() + others.len(), MOST_WAITING);
        assert!(events.place("quiet").is_none());
        drop((noisy, others));
        assert_eq!(
            places("noisy", 2 * MOST_OF_NAMESPACE).len(),
            MOST_OF_NAMESPACE
        );
        assert!(events.waiting.lock().unwrap().is_empty());
    }

    /// There is no API server at all, and the attempts come to an end.
    #[tokio::test(start_paused = true)]
    async fn whoever_announces_hears_that_posting_has_ended_without_success() {
        let nowhere = std::path::PathBuf::from("/nonexistent/kubeconfig");
        let cluster = Cluster::new(Some(nowhere), "test", "node-1");
        let pod = Pod {
            name: "web".into(),
            namespace: "shop".into(),
            uid: "u-1".into(),
        };
        let (told, hears) = tokio::sync::oneshot::channel();
        let ended = move |posted: bool| told.send(posted).unwrap();
        let started = tokio::time::Instant::now();
        assert!(cluster.announce(&pod, Severity::Normal, "Told", "news", ended));
        assert!(!hears.await.unwrap());
        assert!(started.elapsed() >= WAITS.iter().sum());
    }

    #[test]
    fn an_event_fits_the_api_and_names_its_pod() {
        let pod = Pod {
            name: "p".repeat(253),
            namespace: "shop".into(),
            uid: "u-1".into(),
        };
        let made = event(
            &pod,
            "node-1",
            Severity::Warning,
            "RefreshFailed",
            &"ü".repeat(600),
        );
        let name = made.metadata.name.unwrap();
        assert!(name.len() <= MAX_NAME && name.starts_with("ppp"), "{name}");
        let message = made.message.unwrap();
        assert!(message.len() <= MAX_MESSAGE && message.chars().all(|c| c == 'ü'));
        assert_eq!(made.involved_object.uid.as_deref(), Some("u-1"));
        assert_eq!(made.type_.as_deref(), Some("Warning"));
    }
}
