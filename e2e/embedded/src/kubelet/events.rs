//! Events on pods. Posting the same event again raises its count, as with kubelet's recorder.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Resource, ResourceExt};

use crate::lock;

const COMPONENT: &str = "kubelet";

/// The events of a node.
#[derive(Clone)]
pub(crate) struct Events {
    client: kube::Client,
    node: String,
    seen: Arc<Mutex<HashMap<Key, Seen>>>,
}

/// The properties in which two events are the same.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    uid: String,
    reason: &'static str,
    message: String,
}

#[derive(Clone)]
struct Seen {
    name: String,
    count: i32,
}

impl Events {
    pub(crate) fn new(client: kube::Client, node: String) -> Self {
        Self {
            client,
            node,
            seen: Arc::default(),
        }
    }

    /// Posts a warning. When it cannot be posted, that is only logged.
    pub(crate) async fn warn(&self, pod: &Pod, reason: &'static str, message: &str) {
        let key = Key {
            uid: pod.uid().unwrap_or_default(),
            reason,
            message: message.to_owned(),
        };
        let seen = lock(&self.seen).get(&key).cloned();
        let posted = match seen {
            Some(seen) => self.count(pod, seen).await,
            None => self.create(pod, reason, message).await,
        };
        match posted {
            Ok(seen) => {
                lock(&self.seen).insert(key, seen);
            }
            Err(error) => tracing::warn!(reason, message, %error, "event not posted"),
        }
    }

    async fn create(&self, pod: &Pod, reason: &str, message: &str) -> kube::Result<Seen> {
        let now = Timestamp::now();
        let namespace = pod.namespace().unwrap_or_default();
        let name = format!("{}.{:x}", pod.name_any(), now.as_nanosecond());
        let event = Event {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                resource_version: pod.resource_version(),
                ..pod.object_ref(&())
            },
            type_: Some("Warning".to_owned()),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            count: Some(1),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            source: Some(EventSource {
                component: Some(COMPONENT.to_owned()),
                host: Some(self.node.clone()),
            }),
            reporting_component: Some(COMPONENT.to_owned()),
            reporting_instance: Some(self.node.clone()),
            ..Event::default()
        };
        self.api(&namespace)
            .create(&PostParams::default(), &event)
            .await?;
        Ok(Seen { name, count: 1 })
    }

    async fn count(&self, pod: &Pod, seen: Seen) -> kube::Result<Seen> {
        let count = seen.count + 1;
        let patch = serde_json::json!({"count": count, "lastTimestamp": Time(Timestamp::now())});
        let namespace = pod.namespace().unwrap_or_default();
        self.api(&namespace)
            .patch(&seen.name, &PatchParams::default(), &Patch::Merge(patch))
            .await?;
        Ok(Seen { count, ..seen })
    }

    fn api(&self, namespace: &str) -> Api<Event> {
        Api::namespaced(self.client.clone(), namespace)
    }
}
