//! Finds what tells whether the drivers can ask the API server: whether their pods have tokens, and what kubelet says of
//! pods that they cannot serve. A driver that cannot ask has nothing to say of it while no refresh is due.

use std::collections::BTreeMap;

use driver::record;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, Pod, ServiceAccount};
use kube::{Api, Client, ResourceExt as _, api::ListParams};

use crate::{
    api_access::Cause,
    cluster::{Read, list, read},
    explain::time_of,
    installation::{DRIVER, Installed, is_ready},
};

/// The events that are read at most, and the pods.
const MAX_EVENTS: usize = 1_000;
const MAX_PODS: usize = 30;
/// The seconds after which an event says nothing of now: kubelet tries again within little more than two minutes.
const STILL: i64 = 180;

/// A driver that cannot ask the API server, as kubelet tells it of a pod.
pub(super) struct Silent {
    pub(super) node: String,
    pub(super) cause: Cause,
    /// The pod that waits.
    pub(super) pod: record::Pod,
    /// When kubelet told it.
    pub(super) at: Timestamp,
}

/// What is known of it.
pub(super) struct Access {
    /// The drivers that cannot ask.
    pub(super) silent: Read<Vec<Silent>>,
    /// The service accounts, as namespace and name, whose pods get no token unless they ask for one.
    pub(super) without_token: Vec<(String, String)>,
}

impl Access {
    /// Reads it.
    pub(super) async fn read(client: &Client, installed: &Read<Vec<Installed>>) -> Self {
        let mut without_token = Vec::new();
        for set in installed.found().into_iter().flatten() {
            let (namespace, name) = (set.namespace(), set.service_account());
            let api: Api<ServiceAccount> = Api::namespaced(client.clone(), &namespace);
            let account = read(api.get(&name)).await;
            let account = account.found();
            if account.is_some_and(|found| found.automount_service_account_token == Some(false)) {
                without_token.push((namespace, name));
            }
        }
        Self {
            silent: silent(client).await,
            without_token,
        }
    }
}

async fn silent(client: &Client) -> Read<Vec<Silent>> {
    let api: Api<Event> = Api::all(client.clone());
    let params = ListParams::default().fields("reason=FailedMount");
    let events = match list(&api, params, MAX_EVENTS).await {
        Read::Is(events) => events.items,
        other => return other.map(|_| Vec::new()),
    };
    let now = Timestamp::now();
    // The last event of each pod counts.
    let mut last: BTreeMap<(String, String), Event> = BTreeMap::new();
    for event in events {
        let object = &event.involved_object;
        let key = (object.namespace.clone(), object.name.clone());
        let (Some(namespace), Some(name)) = key else {
            continue;
        };
        let key = (namespace, name);
        // What kubelet says of other volumes, or of all of them, is not what a driver says.
        let message = event.message.as_deref().unwrap_or_default();
        let is_of_driver = message.contains("rpc error") && message.contains(" desc = ");
        let is_later = last
            .get(&key)
            .is_none_or(|other| time_of(other) < time_of(&event));
        if is_later && is_of_driver && event.reason.as_deref() == Some("FailedMount") {
            last.insert(key, event);
        }
    }
    let recent = last.into_iter().filter_map(|(pod, event)| {
        let time = time_of(&event)?;
        let cause = Cause::of(event.message.as_deref()?)?;
        (now.duration_since(time).as_secs() <= STILL).then_some((pod, event, cause, time))
    });
    let mut all = Vec::new();
    for ((namespace, name), event, cause, at) in recent.take(MAX_PODS) {
        let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
        let Read::Is(pod) = read(pods.get(&name)).await else {
            continue;
        };
        let uid = pod.uid().unwrap_or_default();
        let is_it = event.involved_object.uid.as_ref() == Some(&uid);
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        if let Some(node) = node.filter(|_| is_it && waits(&pod)) {
            all.push(Silent {
                node,
                cause,
                pod: record::Pod {
                    name,
                    namespace,
                    uid,
                },
                at,
            });
        }
    }
    Read::Is(all)
}

/// Returns whether a pod has a volume of the driver, and may wait for it.
fn waits(pod: &Pod) -> bool {
    let spec = pod.spec.iter();
    let mut volumes = spec.flat_map(|spec| spec.volumes.iter().flatten());
    let has_volume = volumes.any(|volume| {
        let source = volume.csi.as_ref();
        source.is_some_and(|source| source.driver == DRIVER)
    });
    has_volume && !is_ready(pod) && pod.metadata.deletion_timestamp.is_none()
}
