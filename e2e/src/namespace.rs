//! The part of the clusters that is alike: objects, pods and events of a namespace, over the
//! Kubernetes API.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use embedded::is_ready;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{self, Event, Pod};
use kube::Resource;
use kube::api::{
    Api, DeleteParams, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams,
};
use serde_json::json;

use crate::cluster::{Cluster, Error, Result, api, poll};

/// A namespace of a cluster.
#[derive(Clone)]
pub struct Namespace {
    client: kube::Client,
    name: String,
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Namespace {
    /// Returns a namespace that exists.
    pub fn of(client: kube::Client, name: &str) -> Self {
        let name = name.to_owned();
        Self { client, name }
    }

    /// Makes a namespace with a name that no other has; returns when it can have pods.
    ///
    /// # Errors
    /// When the API server refuses it, or no controller fills it.
    pub async fn create(cluster: &impl Cluster) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        // Unique among the runs against a cluster that is kept, too.
        let moment = jiff::Timestamp::now().as_millisecond() & 0xff_ffff_ffff;
        let name = format!("e2e-{moment:x}-{count}");
        let namespace = v1::Namespace {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                ..ObjectMeta::default()
            },
            ..v1::Namespace::default()
        };
        Api::<v1::Namespace>::all(cluster.client())
            .create(&PostParams::default(), &namespace)
            .await
            .map_err(api(format!("create namespace {name}")))?;
        cluster.wait_namespace(&name).await?;
        Ok(Self::of(cluster.client(), &name))
    }

    /// Returns its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the interface to its objects of one kind.
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &self.name)
    }

    /// Applies every document of a manifest, in its order. Objects that name no namespace go to
    /// this one.
    ///
    /// # Errors
    /// [`Error::Manifest`] for a document that is no object, [`Error::Api`] for one that the server
    /// refuses.
    pub async fn apply(&self, manifest: &str) -> Result<Vec<DynamicObject>> {
        Ok(embedded::apply(&self.client, &self.name, manifest).await?)
    }

    /// Deletes a pod with its own grace period; does not wait.
    ///
    /// # Errors
    /// When the pod does not exist, or the server does not answer.
    pub async fn delete_pod(&self, pod: &str) -> Result<()> {
        let params = DeleteParams::default();
        let deleted = self.api::<Pod>().delete(pod, &params).await;
        deleted
            .map(drop)
            .map_err(api(format!("delete pod {self}/{pod}")))
    }

    /// Returns a pod, if it exists.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn pod(&self, pod: &str) -> Result<Option<Pod>> {
        let pods = self.api::<Pod>();
        let found = pods.get_opt(pod).await;
        found.map_err(api(format!("get pod {self}/{pod}")))
    }

    /// Makes the pod's kubelet reconcile it at once, by an annotation.
    ///
    /// # Errors
    /// When the pod does not exist, or the server does not answer.
    pub async fn reconcile(&self, pod: &str) -> Result<()> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed).to_string();
        let patch = json!({"metadata": {"annotations": {"e2e/reconcile": count}}});
        self.api::<Pod>()
            .patch(pod, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .map(drop)
            .map_err(api(format!("annotate pod {self}/{pod}")))
    }

    /// Waits until a pod is ready.
    ///
    /// # Errors
    /// [`Error::Timeout`] with the pod's state and events.
    pub async fn wait_ready(&self, pod: &str, limit: Duration) -> Result<Pod> {
        let what = format!("pod {self}/{pod} to be ready");
        let ready = |pod: Option<Pod>| pod.filter(is_ready);
        self.wait_pod(pod, &what, limit, ready).await
    }

    /// Waits until the status of a pod tells of its containers.
    ///
    /// # Errors
    /// [`Error::Timeout`] with the pod's state and events.
    pub async fn wait_reported(&self, pod: &str, limit: Duration) -> Result<()> {
        let what = format!("the containers of pod {self}/{pod} to be in its status");
        let reported = |pod: Option<Pod>| pod?.status?.container_statuses.map(drop);
        self.wait_pod(pod, &what, limit, reported).await
    }

    /// Waits until there is no pod of that name.
    ///
    /// # Errors
    /// [`Error::Timeout`] with the pod's state and events.
    pub async fn wait_gone(&self, pod: &str, limit: Duration) -> Result<()> {
        let what = format!("pod {self}/{pod} to be gone");
        let gone = |pod: Option<Pod>| pod.is_none().then_some(());
        self.wait_pod(pod, &what, limit, gone).await
    }

    async fn wait_pod<T>(
        &self,
        name: &str,
        what: &str,
        limit: Duration,
        reached: impl Fn(Option<Pod>) -> Option<T>,
    ) -> Result<T> {
        let waited = poll(what, limit, async || {
            let pod = self.pod(name).await?;
            let state = pod
                .as_ref()
                .map_or_else(|| "it does not exist".to_owned(), describe);
            Ok(match reached(pod) {
                Some(result) => ControlFlow::Break(result),
                None => ControlFlow::Continue(state),
            })
        });
        match waited.await {
            Err(Error::Timeout { what, after, last }) => {
                let events = describe_events(&self.events(name).await?);
                let last = format!("{last}; {events}");
                Err(Error::Timeout { what, after, last })
            }
            waited => waited,
        }
    }

    /// Returns all events on pods of that name.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn events(&self, pod: &str) -> Result<Vec<Event>> {
        let about = ListParams::default().fields(&format!("involvedObject.name={pod}"));
        let list = self.api::<Event>().list(&about).await;
        let list = list.map_err(api(format!("list events in {self}")))?;
        Ok(list.items)
    }

    /// Waits for an event on a pod that has this reason and a message that fits.
    ///
    /// # Errors
    /// [`Error::Timeout`] with the events that there are.
    pub async fn wait_event(
        &self,
        pod: &str,
        reason: &str,
        fits: impl Fn(&str) -> bool,
        limit: Duration,
    ) -> Result<Event> {
        let what = format!("an event {reason} on pod {self}/{pod}");
        poll(&what, limit, async || {
            let events = self.events(pod).await?;
            let found = events.iter().find(|event| {
                event.reason.as_deref() == Some(reason)
                    && fits(event.message.as_deref().unwrap_or_default())
            });
            Ok(match found {
                Some(event) => ControlFlow::Break(event.clone()),
                None => ControlFlow::Continue(describe_events(&events)),
            })
        })
        .await
    }
}

fn describe(pod: &Pod) -> String {
    let status = pod.status.clone().unwrap_or_default();
    let waiting: Vec<_> = status
        .container_statuses
        .iter()
        .flatten()
        .filter_map(|container| container.state.as_ref()?.waiting.as_ref()?.reason.clone())
        .collect();
    let spec = pod.spec.as_ref();
    format!(
        "it is {} on node {}, {}waiting: {waiting:?}",
        status.phase.unwrap_or_default(),
        spec.and_then(|spec| spec.node_name.as_deref())
            .unwrap_or("none"),
        if pod.metadata.deletion_timestamp.is_some() {
            "being deleted, "
        } else {
            ""
        },
    )
}

fn describe_events(events: &[Event]) -> String {
    let lines: Vec<_> = events
        .iter()
        .map(|event| {
            format!(
                "{} ({}): {}",
                event.reason.as_deref().unwrap_or_default(),
                event.count.unwrap_or(1),
                event.message.as_deref().unwrap_or_default()
            )
        })
        .collect();
    format!("events: {lines:?}")
}
