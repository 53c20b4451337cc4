//! The traces of what did not work: whoever asks for the reason finds one.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, Pod};
use kube::Api;
use kube::api::ListParams;

use crate::cluster::{Cluster as _, Component, Result, api};

use super::super::ground::Ground;
use super::super::lock;
use super::super::world::{Failure, World};

/// The time in which the driver posts an event that the API server has refused before. Its attempts at that
/// are the longer apart the more there were.
pub(in super::super) const TOLD: Duration = Duration::from_secs(80);

/// Returns the failures of which a person can find no trace: no warning among the pod's events, or, if the
/// driver has started anew since, neither that nor a line of its log that names the pod. Forgets all failures
/// so far.
///
/// # Errors
/// When the API server or a node does not answer.
pub(in super::super) async fn untraced<G: Ground>(
    world: &World,
    ground: &G,
) -> Result<Vec<String>> {
    let failures = std::mem::take(&mut *lock(&world.failures));
    let begun = world.now();
    let mut told = told(world, ground).await?;
    let mut untraced = Vec::new();
    for (uid, failure) in failures {
        world.log.checked("failures with a trace", 1);
        let Failure {
            pod,
            node,
            what,
            began,
        } = failure;
        let has_to_tell = || world.driver_ran_since(&node, began) && !world.log.is_over();
        while !told.contains(&uid) && has_to_tell() && world.now() - begun < TOLD {
            tokio::time::sleep(Duration::from_secs(1)).await;
            told = self::told(world, ground).await?;
        }
        if told.contains(&uid) {
            continue;
        }
        if has_to_tell() && still_there(world, ground, &pod, &uid).await? {
            untraced.push(format!("no event tells of pod {pod} ({uid}): {what}"));
            continue;
        }
        let log = ground.cluster().log(&node, &Component::Driver).await?;
        let is_logged = log
            .lines()
            .any(|line| is_warning(line) && line.contains(&pod));
        if !is_logged && still_there(world, ground, &pod, &uid).await? {
            untraced.push(format!("pod {pod} ({uid}): {what}"));
        }
    }
    Ok(untraced)
}

/// Returns the UIDs of the pods that have a warning among their events.
async fn told<G: Ground>(world: &World, ground: &G) -> Result<BTreeSet<String>> {
    let events = Api::<Event>::namespaced(ground.cluster().client(), &world.namespace);
    let events = events.list(&ListParams::default()).await;
    let events = events.map_err(api("list events".to_owned()))?.items;
    let warnings = events
        .into_iter()
        .filter(|event| event.type_.as_deref() == Some("Warning"));
    Ok(warnings
        .filter_map(|event| event.involved_object.uid)
        .collect())
}

/// Returns whether a line of the driver's log is a warning or an error: it begins with klog's letter for
/// one, and the date.
fn is_warning(line: &str) -> bool {
    let mut chars = line.chars();
    matches!(chars.next(), Some('W' | 'E')) && chars.next().is_some_and(|c| c.is_ascii_digit())
}

/// Returns whether somebody could still ask for the trace: the pod is there.
async fn still_there<G: Ground>(world: &World, ground: &G, pod: &str, uid: &str) -> Result<bool> {
    let pods = Api::<Pod>::namespaced(ground.cluster().client(), &world.namespace);
    let found = pods.get_opt(pod).await;
    let found = found.map_err(api(format!("get pod {pod}")))?;
    Ok(found.is_some_and(|found| found.metadata.uid.as_deref() == Some(uid)))
}
