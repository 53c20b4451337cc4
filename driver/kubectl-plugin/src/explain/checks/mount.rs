//! Checks why kubelet does not mount a volume: what it says, or how long it says nothing.

use super::{
    Found, Then,
    refusal::after_refusal,
    volume::{mount_gone, runs},
};
use crate::{
    explain::facts::{Facts, VolumeFacts},
    installation::DRIVER,
    time::shown,
};

/// The time that a mount may take before it is worth a word.
const MOUNTS_WITHIN: i64 = 30;
/// The time after which kubelet says how a call ended at the latest.
const SAYS_WITHIN: i64 = 120;
/// What kubelet does once the reason is gone.
const AGAIN: &str = "kubelet tries again within about two minutes";

/// kubelet cannot mount it, for a reason that it says.
pub(super) fn mount(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    if facts.is_mounted(volume).is_none() && runs(facts) || mount_gone(facts, volume).is_some() {
        return None;
    }
    if let Some((said, at)) = facts.failed_mount(volume) {
        let found = match mended(facts, volume, &said) {
            Some(now) => Found::new(
                format!(
                    "volume {} could not be mounted; {now}, and {AGAIN}",
                    volume.name
                ),
                facts.describe(),
            ),
            None => Found::new(
                format!("volume {} cannot be mounted", volume.name),
                after_refusal(facts, volume, Some(&said)),
            ),
        };
        return Some(Found {
            at,
            ..found.said(Some(said))
        });
    }
    // A container may wait for something else.
    facts.is_mounted(volume)?;
    facts.node.as_ref()?;
    nothing_said(facts, volume)
}

/// Returns what is there now, although kubelet says that it was not found.
fn mended(facts: &Facts, volume: &VolumeFacts, said: &str) -> Option<String> {
    let node = facts.node.as_ref();
    if said.contains("not found in the list of registered CSI drivers") {
        let drivers = &node?.csi_node.found()?.spec.drivers;
        let is_registered = drivers.iter().any(|driver| driver.name == DRIVER);
        return is_registered.then(|| "the driver is registered there now".to_owned());
    }
    let is_about_class = said.contains("correct secretProviderClass");
    if is_about_class && said.contains("not found") {
        volume.class.found()?;
        return Some(format!("class {} exists now", volume.class_name));
    }
    let secret = &volume.source.node_publish_secret_ref.as_ref()?.name;
    let is_about_secret = said.contains(secret.as_str()) && said.contains("not found");
    (is_about_secret && facts.secrets.get(secret)?.found().is_some())
        .then(|| format!("Secret {secret} exists now"))
}

/// Says that kubelet has said nothing for some time. A call that has begun takes two minutes at most.
fn nothing_said(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let status = facts.pod.status.as_ref();
    let started = status.and_then(|status| status.start_time.as_ref());
    let since = started
        .or(facts.pod.metadata.creation_timestamp.as_ref())?
        .0;
    let passed = facts.now.duration_since(since).as_secs();
    if passed < MOUNTS_WITHIN {
        return None;
    }
    let what = format!("volume {} is not mounted", volume.name);
    let since = shown(since, facts.now);
    if facts.events.unknown().is_some() {
        return Some(Found::new(
            format!(
                "{what}, and the events, which may say why, cannot be read; kubelet has the pod since {since}"
            ),
            facts.driver_log(),
        ));
    }
    if passed >= SAYS_WITHIN {
        return Some(Found::new(
            format!("{what}, and no event says why; kubelet has the pod since {since}"),
            facts.driver_log(),
        ));
    }
    let provider = volume.class.found();
    let provider = provider.map_or_else(String::new, |class| format!(" {}", class.spec.provider));
    let next = match facts.pods_of_node() {
        Then::Do(command) => format!("{command}; then look at the log of the provider's pod"),
        Then::Tell => facts.describe(),
    };
    Some(Found::new(
        format!(
            "{what} yet, and no event says why: a call to provider{provider} may be under way, and kubelet says how it ended after two minutes at most; kubelet has the pod since {since}"
        ),
        next,
    ))
}
