//! Checks why kubelet does not mount a volume: what it says, or how long it says nothing.

use super::{
    Found, Then,
    mended::{changed, mended},
    paths,
    refusal::after_refusal,
    start,
    volume::{mount_gone, runs},
};
use crate::{
    api_access::Cause,
    explain::facts::{Facts, VolumeFacts},
    time::shown,
};

/// The time that a mount may take before it is worth a word.
const MOUNTS_WITHIN: i64 = 30;
/// The time after which kubelet says how a call ended at the latest.
const SAYS_WITHIN: i64 = 120;
/// What the driver says of a call whose caller did not wait for its end.
const CANCELLED: &str = "the publish was cancelled";
/// What kubelet does once the reason is gone.
const AGAIN: &str = "kubelet tries again within about two minutes";

/// kubelet cannot mount it, for a reason that it says.
pub(super) fn mount(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    if facts.is_mounted(volume).is_none() && runs(facts) || mount_gone(facts, volume).is_some() {
        return None;
    }
    if let Some((said, at)) = facts.failed_mount(volume) {
        let now = mended(facts, volume, &said);
        let found = match now.or_else(|| changed(facts, volume, &said, at)) {
            Some(now) => Found::new(
                format!(
                    "volume {} could not be mounted; {now}, and {AGAIN}",
                    volume.name
                ),
                facts.describe(),
            ),
            None if said.contains(CANCELLED) => cancelled(facts, volume),
            None => {
                let access = Cause::of(&said).map(|cause| cause.words().to_owned());
                let why = paths::clash(volume, &said).or(access);
                let why = why.map_or_else(String::new, |why| format!(": {why}"));
                Found::new(
                    format!("volume {} cannot be mounted{why}", volume.name),
                    after_refusal(facts, volume, Some(&said)),
                )
            }
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

/// Says which provider had not answered when the caller of a publish went away.
fn cancelled(facts: &Facts, volume: &VolumeFacts) -> Found {
    let class = volume.class.found();
    let provider = class.map_or_else(
        || "the provider".to_owned(),
        |class| format!("provider {}", class.spec.provider),
    );
    let what = format!(
        "volume {} cannot be mounted: {provider} had most likely not answered when the call ended; the log of its pod on the node says what it waits for",
        volume.name
    );
    Found::new(what, facts.pods_of_node())
}

/// Says that kubelet has said nothing for some time. A call that has begun takes two minutes at most.
fn nothing_said(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let status = facts.pod.status.as_ref();
    // A pod that kubelet has not taken up waits for that.
    let since = status.and_then(|status| status.start_time.as_ref())?.0;
    let passed = facts.now.duration_since(since).as_secs();
    // What else kubelet says is what the pod waits for.
    if passed < MOUNTS_WITHIN || start::other_warning(facts).is_some() {
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
        Then::Do(command) => format!("{command} # then the log of the provider's pod"),
        Then::Tell | Then::Ask(_) => facts.describe(),
    };
    Some(Found::new(
        format!(
            "{what} yet, and no event says why: a call to provider{provider} may be under way, and kubelet says how it ended after two minutes at most; kubelet has the pod since {since}"
        ),
        next,
    ))
}
