//! Finds out whether kubelet's looks at the volumes of a pod that runs fail. It looks every 60 to 90 seconds, and what
//! it cannot get then never reaches the driver: the driver's own record says nothing of it.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;

use super::{
    Found,
    events::{is_failure, is_passing, text, volume_of},
    mended::{changed, mended},
    refusal::after_refusal,
};
use crate::{
    explain::{
        facts::{Facts, VolumeFacts, time_of},
        state,
    },
    installation::DRIVER,
    text::one_line,
};

/// The seconds for which a failed look is of the present. After some failures kubelet waits two minutes.
const STILL: i64 = 180;
/// The seconds for which a failed look is of the present that the driver's absence explains: kubelet tries again within
/// little more than two minutes.
const STILL_AWAY: i64 = 130;
/// The number of failures from which on one is not by chance.
const OFTEN: i32 = 2;
/// Pieces of errors that kubelet has while the driver's pod is being replaced.
const OF_ROLLOUT: [&str; 3] = [
    "list of registered CSI drivers",
    "dial unix",
    "transport is closing",
];

/// Returns whether kubelet looks again at the volumes of the pod, and starts nothing for it.
pub(super) fn runs(facts: &Facts) -> bool {
    state::has_begun(&facts.pod) && !facts.is_deleted() && !facts.has_ended()
}

/// Returns when the volumes of the pod were mounted for the first time, at the latest. What comes later of containers
/// says nothing of them: kubelet starts one again although its looks fail.
pub(super) fn mounted_by(facts: &Facts) -> Option<Timestamp> {
    let sandbox = state::sandbox(&facts.pod);
    let of_sandbox = sandbox.and_then(|condition| condition.last_transition_time.as_ref());
    let starts = state::statuses(&facts.pod).filter_map(|(_, status)| state::started(status));
    // A container that never came to run has the beginning of 1970.
    let starts = starts.filter(|time| time.as_second() > 0);
    let of_sandbox = of_sandbox.map(|time| time.0);
    of_sandbox.or_else(|| starts.min())
}

/// Returns the events that looks fail, as far as they are of the present.
pub(super) fn failures(facts: &Facts) -> impl Iterator<Item = &Event> {
    let since = mounted_by(facts).filter(|_| runs(facts));
    let events = facts.events.found().into_iter().flatten();
    events.filter(move |event| {
        let (Some(since), Some(time)) = (since, time_of(event)) else {
            return false;
        };
        let still = match is_of_rollout(text(event)) {
            true => STILL_AWAY,
            false => STILL,
        };
        let is_of_now = facts.now.duration_since(time).as_secs() <= still;
        let is_look = is_of_now && time.as_second() > since.as_second();
        is_look && is_failure(event) && count(event) >= OFTEN && !is_passing(event)
    })
}

/// Returns whether an error is one that kubelet has while the driver's pod is being replaced.
fn is_of_rollout(said: &str) -> bool {
    OF_ROLLOUT.iter().any(|piece| said.contains(piece))
}

fn count(event: &Event) -> i32 {
    let series = event.series.as_ref().and_then(|series| series.count);
    event.count.or(series).unwrap_or(1)
}

/// Returns kubelet's last words about its looks at a volume of the driver, if they fail. A look that reached the driver
/// later is the end of it.
pub(super) fn failure<'a>(facts: &'a Facts, volume: &VolumeFacts) -> Option<&'a Event> {
    let event = failures(facts).find(|event| match volume_of(event) {
        Some(name) => name == volume.name,
        None => text(event).contains(DRIVER),
    })?;
    let record = facts.record(volume);
    let is_over = record.is_some_and(|record| {
        time_of(event).is_some_and(|time| record.last_success.as_second() >= time.as_second())
    });
    (!is_over).then_some(event)
}

/// kubelet's looks at a volume fail, for a reason that no other check has found.
pub(super) fn fail(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let event = failure(facts, volume)?;
    let message = text(event);
    let said = message
        .split_once("\" : ")
        .map_or(message, |(_, said)| said);
    let is_of_rollout = is_of_rollout(said);
    let is_up = facts.status().is_some_and(|status| status.driver.answers);
    let now = mended(facts, volume, said);
    let now = now.or_else(|| changed(facts, volume, said, time_of(event)));
    if is_of_rollout && (is_up || now.is_some()) {
        return None;
    }
    let name = &volume.name;
    let found = match now {
        Some(now) => Found::new(
            format!(
                "kubelet could not look at volume {name}, so it was not refreshed; {now}, and kubelet looks again within about two minutes"
            ),
            facts.describe(),
        ),
        None => {
            let hint = match is_of_rollout {
                true => "; if the driver's pod there has just been replaced, that passes by itself",
                false => "",
            };
            // What kubelet itself does not find is not the driver's matter.
            let next = match said.contains("NodePublishSecretRef") {
                true => format!("{} get secrets", facts.kubectl()).into(),
                false => after_refusal(facts, volume, Some(said)),
            };
            Found::new(
                format!(
                    "kubelet cannot look at volume {name}: it is no longer refreshed, and its containers go on with the content that it has{hint}"
                ),
                next,
            )
        }
    };
    Some(Found {
        at: time_of(event),
        ..found.said(Some(one_line(said, super::MAX_SAID)))
    })
}

/// The Secret for the provider is gone, which kubelet reads at each look before it asks the driver.
pub(super) fn publish_secret(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let name = &volume.source.node_publish_secret_ref.as_ref()?.name;
    let driver = facts.csi_driver.found();
    let asks = driver.is_none_or(|driver| driver.spec.requires_republish == Some(true));
    let is_of_now = asks && runs(facts) && facts.is_mounted(volume) == Some(true);
    let read = facts.secrets.get(name).filter(|_| is_of_now)?;
    let event = failure(facts, volume).filter(|event| text(event).contains("NodePublishSecretRef"));
    if !read.is_missing() {
        return None;
    }
    let what = format!(
        "volume {} needs Secret {name} (nodePublishSecretRef), which does not exist any more: kubelet needs it at each look, so that the content is no longer refreshed, and a new pod does not start; create it again",
        volume.name
    );
    let next = format!(
        "{} create secret generic {name} --from-env-file=FILE # FILE has the lines KEY=VALUE that the provider needs",
        facts.kubectl()
    );
    Some(Found::new(what, next).said_by(event))
}

/// Returns whether it is known that kubelet's looks at a volume fail, so that the driver is not asked.
pub(in crate::explain) fn are_failing(facts: &Facts, volume: &VolumeFacts) -> bool {
    failure(facts, volume).is_some() || publish_secret(facts, volume).is_some()
}
