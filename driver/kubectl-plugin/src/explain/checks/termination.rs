//! Checks what keeps a pod that somebody has deleted.

use jiff::Timestamp;
use kube::ResourceExt as _;

use super::{Found, events::unregistered};
use crate::{explain::facts::Facts, time::shown};

/// The seconds after its deadline in which a pod may still end.
const ENDS_WITHIN: i64 = 60;

/// Somebody has set finalizers, with which the pod is not removed, whatever becomes of its volumes.
pub(super) fn finalizers(facts: &Facts) -> Option<Found> {
    let deadline = passed(facts)?;
    if !facts.has_finalizers() {
        return None;
    }
    let unknown = match volumes(facts, None).as_slice() {
        [] => String::new(),
        names => format!(
            "; whether volume {} is still mounted is not known",
            names.join(", ")
        ),
    };
    let what = format!(
        "the pod should have ended at {}, and its finalizers keep it ({}): the API server removes it once those who set them have taken them away{unknown}",
        shown(deadline, facts.now),
        facts.pod.finalizers().join(", ")
    );
    let next = format!(
        "{} get pod {} -o jsonpath='{{.metadata.finalizers}}' # then ask those who set them",
        facts.kubectl(),
        facts.pod.name_any()
    );
    Some(Found::new(what, next))
}

/// The pod should have ended by now, and a volume is mounted, or may be.
pub(super) fn termination(facts: &Facts) -> Option<Found> {
    let deadline = shown(passed(facts)?, facts.now);
    let mounted = volumes(facts, Some(true));
    if !mounted.is_empty() {
        let event = unregistered(facts);
        let who = match event {
            Some(_) => "the driver takes it down, and kubelet there does not know it",
            None => "the driver on the node takes it down",
        };
        let what = format!(
            "the pod should have ended at {deadline}, and volume {} is still mounted: {who}",
            mounted.join(", ")
        );
        return Some(Found::new(what, facts.driver_log()).said_by(event));
    }
    let unknown = volumes(facts, None);
    // That has been said of a pod with finalizers.
    if unknown.is_empty() || facts.has_finalizers() {
        return None;
    }
    let what = format!(
        "the pod should have ended at {deadline}, and whether volume {} is still mounted is not known: the driver on the node knows it",
        unknown.join(", ")
    );
    Some(Found::new(what, facts.driver_log()))
}

/// Returns when the pod should have ended, if that was some time ago.
fn passed(facts: &Facts) -> Option<Timestamp> {
    let deadline = facts.pod.metadata.deletion_timestamp.as_ref()?.0;
    let late = facts.now.duration_since(deadline).as_secs();
    (late >= ENDS_WITHIN).then_some(deadline)
}

/// Returns the names of the volumes that are mounted, or not, or of which it is not known.
fn volumes(facts: &Facts, mounted: Option<bool>) -> Vec<&str> {
    let volumes = facts.volumes.iter();
    volumes
        .filter(|volume| facts.is_mounted(volume) == mounted)
        .map(|volume| volume.name.as_str())
        .collect()
}
