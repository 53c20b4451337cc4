//! What can be said of the refreshes of a volume where the node's driver could not be asked.

use driver::cluster::pod_status::Aspect;
use kube::ResourceExt as _;

use crate::{
    explain::{
        checks::{Next, interval, looks_fail, next_refresh, rotates},
        facts::{Facts, VolumeFacts},
    },
    installation::NodeSays,
};

/// Returns it in one line, for a volume that is mounted.
pub(super) fn known(facts: &Facts, volume: &VolumeFacts) -> Option<String> {
    let says = facts.node.as_ref().and_then(|node| node.says.as_ref());
    let is_asked = facts.status().is_some() || matches!(says, Some(NodeSays::ExistingDriver));
    let is_over = facts.has_ended() || facts.lacks_driver();
    if is_asked || is_over || facts.is_mounted(volume) != Some(true) {
        return None;
    }
    match next_refresh(facts, volume) {
        Next::Off => {
            let why = match rotates(facts) {
                Some(false) => "rotation is off, as the arguments of the driver say",
                _ => "the CSIDriver has no requiresRepublish, so kubelet asks for none",
            };
            return Some(format!("no refresh: {why}"));
        }
        Next::Never => {
            let who =
                interval(volume).map_or_else(String::new, |(_, who)| format!(", as {who} says"));
            return Some(format!("no refresh by time{who} (`never`)"));
        }
        Next::At(_) | Next::Unknown => {}
    }
    let driver = facts.csi_driver.found();
    let asks = match driver.map(|driver| driver.spec.requires_republish == Some(true)) {
        Some(true) => "kubelet asks for them (CSIDriver)",
        Some(false) => "kubelet does not ask for them (CSIDriver)",
        None => "not known whether kubelet asks for them",
    };
    let every = match interval(volume) {
        Some((text, who)) => format!("every {text}, as {who} says"),
        None if volume.class.found().is_some() => "at the driver's own interval".to_owned(),
        None => "at an interval that is not known".to_owned(),
    };
    let on = match rotates(facts) {
        Some(true) => "; rotation is on",
        _ => ", if rotation is on",
    };
    Some(format!(
        "refreshes: {asks}; {every}{on}{}",
        failing(facts, volume)
    ))
}

/// Returns whether refreshes fail, as kubelet or the pod status says it.
fn failing(facts: &Facts, volume: &VolumeFacts) -> &'static str {
    if looks_fail(facts, volume) {
        return "; they have stopped, as kubelet's looks fail";
    }
    let (since, _) = Aspect::Freshness.annotations();
    let status = volume.pod_status.found();
    match status.map(|status| status.annotations().contains_key(since)) {
        Some(true) => "; they fail (pod status)",
        Some(false) => "; none fails now (pod status)",
        None => "",
    }
}
