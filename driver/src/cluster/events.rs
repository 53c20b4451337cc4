//! Posts events on pods, which `kubectl describe pod` shows beside kubelet's own.
//!
//! An event reports a change, so it may be late, and no caller waits for it. Posting is repeated a
//! few times, whatever the reason of a failure, because roles and webhooks change; the caller learns
//! in the end whether the event was posted. The events of each namespace wait in a queue of limited
//! length and are posted one at a time, so that a namespace whose events are refused or slow holds
//! up no other. If the queue is full, the caller announces the event again later.
//!
//! The API server forgets an event after an hour. What lasts is therefore posted again as a series:
//! the same event, with a new time and a higher count, as kubelet does it.

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
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
    core::ObjectMeta,
};
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{
    Cluster,
    request::{Failure, limited},
};
use crate::{
    error::Result,
    record::Pod,
    turns::{Turn, Turns},
};

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

/// The shortest time between two posts of one series. It is well below the hour after which the API
/// server forgets an event.
pub const REPEAT_EVERY: Duration = Duration::from_secs(10 * 60);

/// The number of series of one volume and reason that are certainly repeated before the API server forgets
/// them.
const MOST_SERIES: u32 = 5;

/// The type of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Something is in order, or is in order again.
    Normal,
    /// Something needs attention.
    Warning,
}

/// An event that was announced, and is repeated for as long as what it reports lasts.
#[derive(Debug, Clone)]
pub struct Series {
    name: String,
    first: Timestamp,
    /// How often it was posted.
    count: i32,
    last: Instant,
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
    /// Waits for the turn of a namespace, of which one thing at a time is told.
    pub(super) async fn turn(&self, namespace: &str) -> Turn {
        self.posting.take(namespace.to_owned()).await
    }

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
        let series = self.begin_series(pod, severity, reason, message, ended);
        series.is_some()
    }

    /// Announces an event as [`announce`](Self::announce) does. Returns the series with which it can
    /// be repeated, if the event was accepted.
    pub fn begin_series(
        &self,
        pod: &Pod,
        severity: Severity,
        reason: &'static str,
        message: &str,
        ended: impl FnOnce(bool) + Send + 'static,
    ) -> Option<Series> {
        let place = self.enqueue(pod, reason)?;
        match severity {
            Severity::Normal => tracing::info!(pod = %pod, reason, "{message}"),
            Severity::Warning => tracing::warn!(pod = %pod, reason, "{message}"),
        }
        let series = Series::begin(pod);
        let event = event(pod, &self.node, severity, reason, message, &series);
        self.post_later(place, pod, event, ended);
        Some(series)
    }

    /// Posts the event of a series once more, if it is time. `alike` is the number of series of the
    /// same volume and reason: they take turns, so that one post in [`REPEAT_EVERY`] is all that they cost.
    /// `times` is how often what it reports has happened since the last post.
    ///
    /// An event that the API server has forgotten is created again. If the event cannot be posted, the
    /// next repetition tries again.
    pub fn repeat(
        &self,
        pod: &Pod,
        severity: Severity,
        reason: &'static str,
        message: &str,
        (series, alike, times): (&mut Series, usize, u32),
    ) -> bool {
        if !series.is_due(alike) {
            return false;
        }
        let Some(place) = self.enqueue(pod, reason) else {
            return false;
        };
        let times = i32::try_from(times).unwrap_or(i32::MAX);
        series.count = series.count.saturating_add(times);
        series.last = Instant::now();
        tracing::debug!(pod = %pod, reason, count = series.count, "repeated: {message}");
        let event = event(pod, &self.node, severity, reason, message, series);
        self.post_later(place, pod, event, |_| {});
        true
    }

    fn enqueue(&self, pod: &Pod, reason: &str) -> Option<QueuePlace> {
        let place = self.events.enqueue(&pod.namespace);
        if place.is_none() {
            tracing::debug!(pod = %pod, reason, "no event is posted now: too many are waiting");
        }
        place
    }

    fn post_later(
        &self,
        place: QueuePlace,
        pod: &Pod,
        event: PodEvent,
        ended: impl FnOnce(bool) + Send + 'static,
    ) {
        let (cluster, pod) = (self.clone(), pod.clone());
        tokio::spawn(async move {
            let _waiting = place;
            let posted = cluster.post(&pod, &event).await;
            if let Err(error) = &posted {
                let reason = event.reason.as_deref();
                tracing::warn!(pod = %pod, reason, %error, "the event could not be posted");
            }
            ended(posted.is_ok());
        });
    }

    async fn post(&self, pod: &Pod, event: &PodEvent) -> Result<()> {
        let mut waits = WAITS.iter();
        loop {
            let error = match self.client().await {
                Ok(client) => {
                    let _turn = self.events.turn(&pod.namespace).await;
                    let api: Api<PodEvent> = Api::namespaced(client, &pod.namespace);
                    match post_once(&api, event).await {
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

impl Series {
    /// Begins a series with an event that is being posted.
    fn begin(pod: &Pod) -> Self {
        let first = Timestamp::now();
        let unique = format!(".{:x}", first.as_nanosecond());
        Self {
            name: format!("{}{unique}", clipped(&pod.name, MAX_NAME - unique.len())),
            first,
            count: 1,
            last: Instant::now(),
        }
    }

    /// Returns whether it may be posted again, as one of so many series of its volume and reason.
    fn is_due(&self, alike: usize) -> bool {
        let turns = u32::try_from(alike).unwrap_or(MOST_SERIES);
        self.last.elapsed() >= REPEAT_EVERY * turns.clamp(1, MOST_SERIES)
    }
}

/// Creates the event, or updates it if it is a repetition of one that is still there.
async fn post_once(api: &Api<PodEvent>, event: &PodEvent) -> Result<(), Failure> {
    let name = event.metadata.name.as_deref().unwrap_or_default();
    if event.count > Some(1) {
        let again = json!({
            "count": event.count, "lastTimestamp": event.last_timestamp, "message": event.message,
        });
        let (how, patch) = (PatchParams::default(), Patch::Merge(again));
        match limited(api.patch(name, &how, &patch)).await {
            Err(Failure::Refused { code: 404, .. }) => {}
            patched => return patched.map(drop),
        }
    }
    limited(api.create(&PostParams::default(), event))
        .await
        .map(drop)
}

fn event(
    pod: &Pod,
    node: &str,
    severity: Severity,
    reason: &str,
    message: &str,
    series: &Series,
) -> PodEvent {
    PodEvent {
        metadata: ObjectMeta {
            name: Some(series.name.clone()),
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
        count: Some(series.count),
        first_timestamp: Some(Time(series.first)),
        last_timestamp: Some(Time(Timestamp::now())),
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
pub(super) fn clipped(text: &str, max: usize) -> &str {
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

    /// Many series of a volume cost no more than one, and none of the first five is forgotten.
    #[tokio::test(start_paused = true)]
    async fn series_take_turns() {
        let pod = Pod {
            name: "web".into(),
            namespace: "shop".into(),
            uid: "u-1".into(),
        };
        let cluster = Cluster::new(None, "test", "node-1");
        for (alike, each) in [(1, 18), (3, 6), (5, 3), (50, 3)] {
            let mut series = Series::begin(&pod);
            let mut posts = 0;
            // Three hours, in which it is repeated every minute.
            for _ in 0..180 {
                tokio::time::advance(Duration::from_secs(60)).await;
                let said = ("news", (&mut series, alike, 1));
                let posted = cluster.repeat(&pod, Severity::Warning, "Told", said.0, said.1);
                posts += i32::from(posted);
            }
            assert_eq!((posts, series.count), (each, each + 1), "{alike} alike");
        }
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
            &Series::begin(&pod),
        );
        let name = made.metadata.name.unwrap();
        assert!(name.len() <= MAX_NAME && name.starts_with("ppp"), "{name}");
        let message = made.message.unwrap();
        assert!(message.len() <= MAX_MESSAGE && message.chars().all(|c| c == 'ü'));
        assert_eq!(made.involved_object.uid.as_deref(), Some("u-1"));
        assert_eq!(made.type_.as_deref(), Some("Warning"));
    }
}
