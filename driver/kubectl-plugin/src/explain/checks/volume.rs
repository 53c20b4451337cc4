//! Checks one volume: why it is not mounted, and whether what is mounted is kept fresh.

use std::time::Duration;

use driver::{
    cluster::{
        interval::{Every, INTERVAL},
        pod_status::Aspect,
    },
    record::{ASKED, is_object_name},
};
use jiff::Timestamp;
use kube::ResourceExt as _;

use super::{Found, refusal::after_refusal};
use crate::{
    cluster::Read,
    explain::facts::{Facts, VolumeFacts, time_of},
    installation::DRIVER,
    lint::names::closest,
    time::shown,
};

/// The time by which kubelet's next look may be later than a due refresh.
const LOOKS_WITHIN: Duration = Duration::from_secs(5 * 60);

pub(super) fn class_attribute(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let (name, class) = (&volume.name, &volume.class_name);
    let what = match class.as_str() {
        "" => format!("volume {name} names no class; set volumeAttributes.secretProviderClass"),
        _ if is_object_name(class) => return None,
        _ => format!(
            "volume {name} names the class {class:?}, which cannot be the name of an object; correct volumeAttributes.secretProviderClass"
        ),
    };
    let next = format!("{} get secretproviderclasses", facts.kubectl());
    Some(Found::new(what, next))
}

pub(super) fn read_only(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    (volume.source.read_only != Some(true)).then(|| {
        Found::new(
            format!("volume {} is not read-only; set readOnly: true in csi, not only at the volume mount", volume.name),
            facts.describe(),
        )
    })
}

/// kubelet does not mount what no container mounts.
pub(super) fn unused(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    (!facts.is_used(volume)).then(|| {
        Found::new(
            format!("no container mounts volume {}, so kubelet does not mount it either, and its Secrets are not made; add it to volumeMounts", volume.name),
            facts.describe(),
        )
    })
}

pub(super) fn class(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    const SHOWN: usize = 10;
    if !volume.class.is_missing() {
        return None;
    }
    let namespace = facts.pod.namespace().unwrap_or_default();
    let begin = format!(
        "there is no class {} in namespace {namespace}",
        volume.class_name
    );
    let all = facts.classes.as_ref().and_then(Read::found);
    let names = all.map(|all| {
        let mut names: Vec<_> = all.iter().map(kube::ResourceExt::name_any).collect();
        names.sort();
        names
    });
    let there = match names {
        Some(names) if names.is_empty() => "; the namespace has no class at all".to_owned(),
        Some(names) => {
            let more = if names.len() > SHOWN {
                " and others"
            } else {
                ""
            };
            let shown: Vec<_> = names.into_iter().take(SHOWN).collect();
            format!("; there are {}{more}", shown.join(", "))
        }
        None => String::new(),
    };
    let what = match volume.elsewhere.as_slice() {
        [] => format!(
            "{begin}{there}; create it, or correct secretProviderClass in volume {}",
            volume.name
        ),
        others => format!(
            "{begin}, but in {}: a class must be in the namespace of its pods; create it here",
            others
                .iter()
                .take(SHOWN)
                .cloned()
                .collect::<Vec<_>>()
                .join(", ")
        ),
    };
    let next = format!("{} get secretproviderclasses", facts.kubectl());
    Some(Found::new(what, next))
}

/// The class of a mounted volume has been deleted.
pub(super) fn class_gone(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    if facts.is_mounted(volume) != Some(true) {
        return None;
    }
    let gone = class(facts, volume)?;
    Some(Found {
        what: format!(
            "{}. Volume {} keeps its content, and is not refreshed; no other pod can mount the class",
            gone.what, volume.name
        ),
        ..gone
    })
}

pub(super) fn class_fields(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let spec = &volume.class.found()?.spec;
    let lacks = if spec.provider.is_empty() {
        "spec.provider"
    } else if spec.parameters.is_empty() {
        "spec.parameters"
    } else {
        return None;
    };
    Some(Found::new(
        format!("class {} has no {lacks}", volume.class_name),
        facts.edit_class(volume),
    ))
}

/// The provider has no socket on the node, or nobody answers there.
pub(super) fn provider(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let provider = &volume.class.found()?.spec.provider;
    let status = facts.status()?;
    let Some(found) = status
        .providers
        .iter()
        .find(|found| found.name == *provider)
    else {
        let names: Vec<_> = status
            .providers
            .iter()
            .map(|found| found.name.as_str())
            .collect();
        let there = match names.is_empty() {
            true => "no provider has one".to_owned(),
            false => format!("there are {}", names.join(", ")),
        };
        let directories: Vec<_> = status
            .provider_directories
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        let next = match closest(provider, &names) {
            Some(_) => facts.edit_class(volume).into(),
            None => facts.pods_of_node(),
        };
        return Some(Found::new(
            format!(
                "provider {provider} of class {} has no socket on node {} ({there}, in {}); install it there, or correct spec.provider",
                volume.class_name,
                status.node,
                directories.join(" and ")
            ),
            next,
        ));
    };
    silent(facts, volume, found)
}

fn silent(facts: &Facts, volume: &VolumeFacts, found: &driver::status::Provider) -> Option<Found> {
    if found.socket.answers {
        return None;
    }
    let why = found
        .socket
        .error
        .as_deref()
        .unwrap_or("it does not answer");
    Some(Found::new(
        format!(
            "provider {} of class {} does not answer on this node: {why}; look at its pod there",
            found.name, volume.class_name
        ),
        facts.pods_of_node(),
    ))
}

/// The provider of a mounted volume does not answer any more: the next refresh will fail.
pub(super) fn provider_socket(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let record = facts.record(volume).filter(|record| record.mounted)?;
    let status = facts.status()?;
    if !status.refreshes {
        return None;
    }
    let mut providers = status.providers.iter();
    match providers.find(|found| found.name == record.provider) {
        Some(found) => silent(facts, volume, found),
        None => provider(facts, volume),
    }
}

pub(super) fn publish_secret(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let name = &volume.source.node_publish_secret_ref.as_ref()?.name;
    facts.secrets.get(name).filter(|read| read.is_missing())?;
    Some(Found::new(
        format!(
            "volume {} needs Secret {name} (nodePublishSecretRef), which does not exist in the pod's namespace",
            volume.name
        ),
        format!("{} get secret {name}", facts.kubectl()),
    ))
}

/// Returns whether all containers of the pod have been started.
pub(super) fn runs(facts: &Facts) -> bool {
    let status = facts.pod.status.as_ref();
    status.is_some_and(|status| status.phase.as_deref() == Some("Running"))
}

/// The pod runs, and its volume is gone.
pub(super) fn mount_gone(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let record = facts.record(volume)?;
    if record.mounted || !runs(facts) {
        return None;
    }
    let why = record
        .error
        .as_ref()
        .map_or_else(String::new, |why| format!(" ({why})"));
    Some(Found::new(
        format!(
            "volume {} was mounted, and at {} there is no tmpfs any more{why}: somebody has unmounted it; delete the pod, so that a new one mounts it again",
            volume.name,
            record.target_path.display()
        ),
        facts.new_pod("make the pod anew from its manifest"),
    ))
}

/// Refreshes fail.
pub(super) fn refresh(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
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
    let event = || {
        facts.event(&["MountRotationFailed"], |text| {
            text.contains(&volume.class_name)
        })
    };
    let noted = annotation(reason);
    let event = event().filter(|_| noted.is_none());
    let said = noted.or_else(|| event?.message.clone());
    let what = format!(
        "refreshes of volume {} fail since {}; its containers go on with the content{}",
        volume.name,
        shown(since, facts.now),
        content.unwrap_or_default()
    );
    let next = after_refusal(facts, volume, said.as_deref());
    Some(Found {
        at: event.and_then(time_of),
        ..Found::new(what, next).said(said)
    })
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
    let due = next_refresh(facts, volume).due()?;
    let late = status.time.duration_since(due);
    let most = i64::try_from(LOOKS_WITHIN.as_secs()).unwrap_or(i64::MAX);
    if late.as_secs() <= most || facts.has_ended() {
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
    facts.record(volume)?;
    let class = volume.class.found()?;
    let is_asked = class.annotations().contains_key(ASKED);
    if !is_asked || facts.status()?.refreshes {
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

/// Returns when a container was started.
pub(super) fn started(facts: &Facts, container: &str) -> Option<Timestamp> {
    let statuses = facts.pod.status.as_ref()?.container_statuses.as_ref()?;
    let status = statuses.iter().find(|status| status.name == container)?;
    let running = status.state.as_ref()?.running.as_ref()?;
    running.started_at.as_ref().map(|time| time.0)
}

/// When a volume is refreshed next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::explain) enum Next {
    /// From this time on, with kubelet's next look.
    At(Timestamp),
    /// Not at all, because it says so.
    Never,
    /// Not at all, because rotation is off.
    Off,
    /// It is not known.
    Unknown,
}

impl Next {
    fn due(&self) -> Option<Timestamp> {
        match self {
            Self::At(time) => Some(*time),
            _ => None,
        }
    }
}

/// Returns when a volume is refreshed next. The driver adds up to a tenth of the interval.
pub(in crate::explain) fn next_refresh(facts: &Facts, volume: &VolumeFacts) -> Next {
    let (Some(status), Some(record)) = (facts.status(), facts.record(volume)) else {
        return Next::Unknown;
    };
    if !status.refreshes {
        return Next::Off;
    }
    let attributes = volume.source.volume_attributes.as_ref();
    let of_volume = attributes.and_then(|all| all.get(INTERVAL));
    let of_class = volume
        .class
        .found()
        .and_then(|class| class.annotations().get(INTERVAL).cloned());
    let seconds = match of_volume
        .cloned()
        .or(of_class)
        .map(|text| Every::parse(&text))
    {
        Some(Ok(Every::Never)) => return Next::Never,
        Some(Ok(Every::Interval(interval))) => interval
            .as_secs()
            .max(status.shortest_refresh_interval_seconds),
        Some(Err(_)) => return Next::Unknown,
        None => status.refresh_interval_seconds,
    };
    let interval = Duration::from_secs(seconds);
    record
        .last_success
        .checked_add(interval)
        .map_or(Next::Unknown, Next::At)
}
