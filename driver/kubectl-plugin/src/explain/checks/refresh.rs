//! Checks whether a mounted volume is kept fresh: refreshes that fail, that kubelet does not ask for, or that are off.

use driver::{
    cluster::{
        interval::{Every, INTERVAL},
        pod_status::{Aspect, CONTENT_CHANGES},
    },
    record::ASKED,
};
use jiff::Timestamp;
use kube::ResourceExt as _;

use super::{
    Found,
    ground::driver_started,
    mended::{changed, mended},
    refusal::after_refusal,
    start,
};
pub(in crate::explain) use crate::due::Next;
use crate::{
    due,
    explain::facts::{Facts, VolumeFacts, time_of},
    installation::{DRIVER, NodeSays},
    time::shown,
};

/// Refreshes fail.
pub(super) fn fails(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let (since, reason) = Aspect::Freshness.annotations();
    let annotations = volume
        .pod_status
        .found()
        .and_then(|status| status.metadata.annotations.as_ref());
    let annotation = |key: &str| annotations.and_then(|all| all.get(key)).cloned();
    let record = facts.record(volume);
    // The record is newer than the annotation, where it can be read.
    let since = match record {
        Some(record) => record.stale_since?,
        None => annotation(since)?.parse::<Timestamp>().ok()?,
    };
    let content = record.map(|record| format!(" of {}", shown(record.last_success, facts.now)));
    let (said, at) = match annotation(reason) {
        Some(noted) => (Some(noted), None),
        None => told(facts, volume, since),
    };
    let now = said.as_deref().and_then(|said| {
        let mended = mended(facts, volume, said);
        mended.or_else(|| changed(facts, volume, said, at))
    });
    let now = now.map_or_else(String::new, |now| {
        format!("; {now}, and the driver tries again with one of kubelet's next looks")
    });
    let what = format!(
        "refreshes of volume {} fail since {}; its containers go on with the content{}{now}",
        volume.name,
        shown(since, facts.now),
        content.unwrap_or_default()
    );
    let next = match now.is_empty() {
        true => after_refusal(facts, volume, said.as_deref()),
        false => facts.describe().into(),
    };
    Some(Found {
        at,
        ..Found::new(what, next).said(said)
    })
}

/// Returns what the last event says of refreshes of a class, and when. An earlier trouble is over.
fn told(
    facts: &Facts,
    volume: &VolumeFacts,
    since: Timestamp,
) -> (Option<String>, Option<Timestamp>) {
    let name = format!("SecretProviderClass {} ", volume.class_name);
    let event = facts.event(&["MountRotationFailed"], |text| text.contains(&name));
    let event = event
        .filter(|event| time_of(event).is_none_or(|time| time.as_second() >= since.as_second()));
    let said = event.and_then(|event| event.message.clone());
    (said, event.and_then(time_of))
}

/// Rotation is on, and kubelet does not ask for it.
pub(super) fn republish(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    facts.record(volume)?;
    let is_asked = facts.csi_driver.found()?.spec.requires_republish == Some(true);
    if is_asked || !facts.status()?.refreshes {
        return None;
    }
    Some(Found::new(
        format!(
            "volume {} is never refreshed, although --enable-secret-rotation is set: the CSIDriver lacks requiresRepublish: true",
            volume.name
        ),
        format!(
            "kubectl patch csidriver {DRIVER} --type merge -p '{{\"spec\":{{\"requiresRepublish\":true}}}}'"
        ),
    ))
}

/// A refresh is due for longer than kubelet's rhythm explains.
pub(super) fn overdue(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let record = facts.record(volume)?;
    let status = facts.status()?;
    if !record.mounted || record.stale_since.is_some() || republish(facts, volume).is_some() {
        return None;
    }
    // kubelet looks at the volumes of a pod again once its hook has ended.
    if start::hook(facts).is_some() {
        return None;
    }
    let due = next_refresh(facts, volume).due()?;
    // kubelet does not look at the volumes of a pod that ends.
    let is_late = due::is_late(status, record, due, driver_started(facts));
    if !is_late || facts.is_deleted() || facts.has_ended() {
        return None;
    }
    Some(Found::new(
        format!(
            "volume {} was due for a refresh at {}: kubelet has not asked the driver since; is it busy with other pods, or does a call hang?",
            volume.name,
            shown(due, status.time)
        ),
        facts.driver_log(),
    ))
}

/// Somebody asked for a refresh, and rotation is off.
pub(super) fn asked(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let class = volume.class.found()?;
    let is_asked = class.annotations().contains_key(ASKED);
    let is_off = next_refresh(facts, volume) == Next::Off;
    if !is_asked || !is_off || facts.is_mounted(volume) != Some(true) {
        return None;
    }
    Some(Found::new(
        format!(
            "class {} asks for a refresh ({ASKED}), and rotation is off; install the chart with enableSecretRotation=true",
            volume.class_name
        ),
        facts.driver_start(),
    ))
}

/// Returns when a volume is refreshed next. The driver adds up to a tenth of the interval.
pub(in crate::explain) fn next_refresh(facts: &Facts, volume: &VolumeFacts) -> Next {
    let (Some(status), Some(record)) = (facts.status(), facts.record(volume)) else {
        return without_record(facts, volume);
    };
    let interval = interval(volume).map(|(text, _)| text);
    due::next(status, record, interval.as_deref())
}

/// Returns what is known of the next refresh where the node's driver could not be asked.
fn without_record(facts: &Facts, volume: &VolumeFacts) -> Next {
    let driver = facts.csi_driver.found();
    let is_never_asked = driver.is_some_and(|driver| driver.spec.requires_republish != Some(true));
    let is_off = is_never_asked || rotates(facts) == Some(false);
    if is_off && is_of_this_driver(facts, volume) {
        return Next::Off;
    }
    match interval(volume).map(|(text, _)| Every::parse(&text)) {
        Some(Ok(Every::Never)) if facts.is_mounted(volume) == Some(true) => Next::Never,
        _ => Next::Unknown,
    }
}

/// Returns whether rotation is on, as the arguments of the node's driver say it.
pub(in crate::explain) fn rotates(facts: &Facts) -> Option<bool> {
    let (installed, pod) = facts.driver()?;
    let mut containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let container = containers.find(|container| container.name == installed.container)?;
    let args = container.args.as_ref().filter(|args| !args.is_empty())?;
    let mut switches = args
        .iter()
        .filter_map(|arg| arg.strip_prefix("--enable-secret-rotation"));
    let last = switches.next_back();
    Some(last.is_some_and(|value| matches!(value, "" | "=true")))
}

/// Returns whether this driver has mounted a volume, and not the existing one, which can refresh without kubelet. Only
/// this one counts the contents of a volume on its pod status.
fn is_of_this_driver(facts: &Facts, volume: &VolumeFacts) -> bool {
    let says = facts.node.as_ref().and_then(|node| node.says.as_ref());
    let status = volume.pod_status.found();
    let counts = status.is_some_and(|status| status.annotations().contains_key(CONTENT_CHANGES));
    counts && !matches!(says, Some(NodeSays::ExistingDriver))
}

/// Returns the interval of a volume and who says it: the volume itself, or its class. That of a class which cannot be
/// read is not known.
pub(in crate::explain) fn interval(volume: &VolumeFacts) -> Option<(String, String)> {
    let attributes = volume.source.volume_attributes.as_ref();
    if let Some(text) = attributes.and_then(|all| all.get(INTERVAL)) {
        return Some((text.clone(), format!("volume {}", volume.name)));
    }
    let class = volume.class.found()?;
    let text = class.annotations().get(INTERVAL)?;
    Some((text.clone(), format!("class {}", volume.class_name)))
}
