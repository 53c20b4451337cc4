//! What the pods are told while nobody disturbs them but a hostile tenant or a single failure.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Event;
use kube::Api;
use kube::api::ListParams;

use crate::cluster::{Result, api};

use super::super::lock;
use super::super::world::World;

/// The reasons of events about something that failed. A Secret of which a tenant has just added a key has
/// no value for it yet, so that failures of Secrets are not among them.
const FAILURES: [&str; 2] = ["FailedMount", "MountRotationFailed"];
/// The precision of the times in events.
const PRECISION: SignedDuration = SignedDuration::from_secs(1);

/// Returns the failures of which well-behaved pods that run were told since a time, and that no single failure
/// explains.
///
/// # Errors
/// When the API server does not answer.
pub(in super::super) async fn warned(
    world: &World,
    client: &kube::Client,
    since: Timestamp,
) -> Result<Vec<String>> {
    let events = Api::<Event>::namespaced(client.clone(), &world.namespace);
    let events = events.list(&ListParams::default()).await;
    let events = events.map_err(api("list events".to_owned()))?.items;
    let pods = lock(&world.pods).clone();
    let mut warned = Vec::new();
    for event in events {
        let last = event.last_timestamp.map(|time| time.0);
        let reason = event.reason.unwrap_or_default();
        let uid = event.involved_object.uid.unwrap_or_default();
        let is_failure = FAILURES.contains(&reason.as_str());
        let is_late = last.is_some_and(|last| last > since + PRECISION);
        if is_failure
            && is_late
            && let Some(pod) = pods.get(&uid)
            && pod.ready
            && !last.is_some_and(|last| world.good.explains(last))
        {
            let message = event.message.unwrap_or_default();
            warned.push(format!("pod {} ({uid}): {reason}: {message}", pod.name));
        }
    }
    world.log.checked("rounds without a warning", 1);
    Ok(warned)
}
