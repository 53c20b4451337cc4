//! Posts events on pods, which `kubectl describe pod` shows beside kubelet's own.
//!
//! An event reports a change, so it may be late, and no caller waits for it. Posting is repeated a
//! few times, whatever the reason of a failure, because roles and webhooks change; the caller learns
//! in the end whether the event was posted. The events of each namespace wait in a queue of limited
//! length and are posted one at a time, so that a namespace whose events are refused or slow holds
//! up no other. If the queue is full, the caller announces the event again later.

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

use super::{
    Cluster,
    request::{Failure, limited},
};
use crate::{error::Result, record::Pod, turns::Turns};

/// The name of the reporter, which `kubectl describe` shows.
const COMPONENT: &str = "secrets-store-csi-driver";

/// The waits before further attempts to post.
const WAITS: [Duration; 3] = [
    Duration::from_secs(2),
    Duration::from_secs(15),
    Duration::from_secs(60),
];

/// The number of events that may wait to be posted, in all and of one namespace. Beyond the former, a
/// namespace without a waiting event still has a place.
const MAX_WAITING: usize = 1024;
const MAX_OF_NAMESPACE: usize = 64;

/// The limits of the API for an event's message and name, in bytes.
const MAX_MESSAGE: usize = 1024;
const MAX_NAME: usize = 253;

/// The type of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Something is in order, or is in order again.
    Normal,
    /// Something needs attention.
    Warning,
}

/// The queues of events that wait to be posted.
pub(super) struct Events {
    /// The number of waiting events, by namespace.
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

/// The place of one event in its queue, which is free again when this is dropped.
struct QueuePlace {
    namespace: String,
    waiting: Arc<Mutex<HashMap<String, usize>>>,
}

impl Events {
    /// Takes a place in the queue of a namespace, unless it is full.
    fn enqueue(&self, namespace: &str) -> Option<QueuePlace> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = waiting.values().sum();
        let of_namespace = waiting.get(namespace).copied().unwrap_or_default();
        let is_full = all >= MAX_WAITING && of_namespace > 0;
        if is_full || of_namespace >= MAX_OF_NAMESPACE {
            return None;
        }
        waiting.insert(namespace.to_owned(), of_namespace + 1);
        Some(QueuePlace {
            namespace: namespace.to_owned(),
            waiting: Arc::clone(&self.waiting),
        })
    }
}

impl Drop for QueuePlace {
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
    /// Posts an event on a pod, in the background. `reason` is one word in CamelCase, `message` a
    /// sentence for the pod's owner. Returns whether the event was accepted: if too many are waiting,
    /// it is neither posted nor logged. After the last attempt, `ended` is called with whether the
    /// event was posted.
    #[must_use = "an event that is not accepted has not been told"]
    pub fn announce(
        &self,
        pod: &Pod,
        severity: Severity,
        reason: &'static str,
        message: &str,
        ended: impl FnOnce(bool) + Send + 'static,
    ) -> bool {
        let Some(waiting) = self.events.enqueue(&pod.namespace) else {
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
            let _waiting = waiting;
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
                        // An earlier attempt was taken after all, or the namespace is gone.
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

/// Returns as many whole characters of a text as fit into a number of bytes.
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
    fn a_namespace_has_a_queue_of_its_own() {
        let events = Events::default();
        let enqueued = |namespace: &str, count: usize| {
            (0..count)
                .map_while(|_| events.enqueue(namespace))
                .collect::<Vec<_>>()
        };
        let noisy = enqueued("noisy", 2 * MAX_OF_NAMESPACE);
        assert_eq!(noisy.len(), MAX_OF_NAMESPACE);
        assert!(events.enqueue("quiet").is_some());
        let full = MAX_WAITING / MAX_OF_NAMESPACE;
        let others: Vec<_> = (1..full + 5)
            .flat_map(|number| enqueued(&number.to_string(), MAX_OF_NAMESPACE))
            .collect();
        // Those that came when all places were taken have one each.
        assert_eq!(noisy.len() + others.len(), MAX_WAITING + 5);
        assert_eq!(enqueued("quiet", 2).len(), 1);
        drop((noisy, others));
        assert_eq!(
            enqueued("noisy", 2 * MAX_OF_NAMESPACE).len(),
            MAX_OF_NAMESPACE
        );
        assert!(events.waiting.lock().unwrap().is_empty());
    }

    /// There is no API server at all, and the attempts end.
    #[tokio::test(start_paused = true)]
    async fn the_caller_learns_that_an_event_was_not_posted() {
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
        assert!(started.elapsed() >= WAITS.iter().sum::<Duration>());
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
