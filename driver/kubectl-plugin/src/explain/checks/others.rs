//! Checks the volumes of the pod that are not the driver's: those that were meant to be, and those without which the
//! pod does not start either.

use k8s_openapi::api::core::v1::{CSIVolumeSource, Event};

use super::{
    Found,
    events::{is_failure, recent_failures, text, unmounted, volume_of, waits},
    looks,
    secrets::not_config_map,
};
use crate::{
    explain::facts::{Facts, time_of},
    installation::{DRIVER, is_ready},
};

/// Finds volumes whose driver has a name that looks like this driver's.
pub(super) fn misnamed(facts: &Facts) -> Vec<(String, Found)> {
    if is_ready(&facts.pod) || facts.has_ended() {
        return Vec::new();
    }
    let wrong = wrong_names(facts);
    let found = wrong.map(|(name, source)| {
        let what = format!(
            "volume {name} names the driver {}; it is called {DRIVER}",
            source.driver
        );
        let of_it = |event: &&Event| is_failure(event) && text(event).contains(&source.driver);
        let event = facts.events.found().and_then(|all| all.iter().find(of_it));
        (
            name.to_owned(),
            Found::new(what, facts.describe()).said_by(event),
        )
    });
    found.collect()
}

fn wrong_names(facts: &Facts) -> impl Iterator<Item = (&str, &CSIVolumeSource)> {
    let spec = facts.pod.spec.iter();
    let volumes = spec.flat_map(|spec| spec.volumes.iter().flatten());
    let of_csi = volumes.filter_map(|volume| Some((volume.name.as_str(), volume.csi.as_ref()?)));
    of_csi.filter(|(_, source)| looks_like_ours(facts, &source.driver))
}

/// Returns whether a driver's name was meant to be this driver's. Somebody may have one of a similar name, which
/// the node knows then.
fn looks_like_ours(facts: &Facts, driver: &str) -> bool {
    let lower = driver.to_lowercase();
    let csi_node = facts.node.as_ref().and_then(|node| node.csi_node.found());
    let is_registered =
        csi_node.map(|node| node.spec.drivers.iter().any(|found| found.name == driver));
    let is_similar = lower.contains("secrets-store")
        || lower.contains("secret") && lower.contains("store") && is_registered.is_some();
    driver != DRIVER && is_similar && is_registered != Some(true)
}

/// Finds volumes of other kinds that kubelet cannot mount while the pod waits for its volumes, or that it cannot look at
/// again while the pod runs.
pub(super) fn failed(facts: &Facts) -> Vec<(Option<String>, Found)> {
    if !waits(facts) {
        return looked_at(facts);
    }
    let mut found: Vec<(Option<String>, Found)> = Vec::new();
    let mut timeout = None;
    for event in recent_failures(facts) {
        if let Some(names) = unmounted(event) {
            timeout = timeout.or(Some((event, names)));
            continue;
        }
        let text = text(event);
        let name = volume_of(event).map(str::to_owned);
        let is_known = found.iter().any(|(known, _)| *known == name);
        let is_ours = match &name {
            Some(name) => !is_other(facts, name),
            None => text.contains(DRIVER),
        };
        if is_known || is_ours {
            continue;
        }
        let which = name
            .as_ref()
            .map_or("a volume".to_owned(), |name| format!("volume {name}"));
        let said = text.split_once("\" : ").map_or(text, |(_, said)| said);
        found.push((name, cannot(facts, &which, said, event)));
    }
    if found.is_empty()
        && let Some((event, mut names)) = timeout
    {
        names.retain(|name| is_other(facts, name));
        if !names.is_empty() {
            let which = format!("volume {}", names.join(", "));
            found.push((None, cannot(facts, &which, text(event), event)));
        }
    }
    found
}

/// Finds volumes of other kinds that kubelet cannot look at again.
fn looked_at(facts: &Facts) -> Vec<(Option<String>, Found)> {
    let mut found: Vec<(Option<String>, Found)> = Vec::new();
    for event in looks::failures(facts) {
        let text = text(event);
        let Some(name) = volume_of(event).filter(|name| is_other(facts, name)) else {
            continue;
        };
        if found
            .iter()
            .any(|(known, _)| known.as_deref() == Some(name))
        {
            continue;
        }
        let said = text.split_once("\" : ").map_or(text, |(_, said)| said);
        let what = format!(
            "kubelet cannot look at volume {name} any more: the containers go on with the content that it has, and a new pod does not start; it is not a volume of {DRIVER}"
        );
        let words = Found {
            at: time_of(event),
            ..Found::new(what, facts.describe()).said(Some(said.to_owned()))
        };
        found.push((Some(name.to_owned()), words));
    }
    found
}

fn cannot(facts: &Facts, which: &str, said: &str, event: &Event) -> Found {
    let (what, next) = if is_persistent(said) {
        let what = format!(
            "{which} is a PersistentVolume of {DRIVER}, and the driver mounts only inline volumes: in spec.volumes of the pod, write csi with driver: {DRIVER}, readOnly: true and volumeAttributes.secretProviderClass in place of the claim"
        );
        (what, facts.edit_workload())
    } else if let Some(is_secret) = not_config_map(facts, said) {
        let what = format!(
            "{which} cannot be mounted, and the pod does not start without it: {is_secret}"
        );
        (what, facts.edit_workload())
    } else {
        let what = format!(
            "{which} cannot be mounted, and the pod does not start without it; it is not a volume of {DRIVER}"
        );
        (what, facts.describe())
    };
    Found {
        at: time_of(event),
        ..Found::new(what, next).said(Some(said.to_owned()))
    }
}

/// Returns whether kubelet says that the driver has no PersistentVolumes.
fn is_persistent(said: &str) -> bool {
    said.contains(DRIVER) && said.contains("Persistent") && said.contains("not supported")
}

/// Returns whether a claim of the pod is bound to a PersistentVolume of the driver, as kubelet says it.
pub(in crate::explain) fn has_persistent(facts: &Facts) -> bool {
    let mut events = facts.events.found().into_iter().flatten();
    events.any(|event| is_failure(event) && is_persistent(text(event)))
}

/// Returns whether a volume is neither the driver's nor meant to be.
fn is_other(facts: &Facts, name: &str) -> bool {
    facts.volumes.iter().all(|volume| volume.name != name)
        && wrong_names(facts).all(|(wrong, _)| wrong != name)
}
