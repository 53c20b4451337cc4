//! What is worth knowing of a pod and not wrong.

use std::collections::BTreeSet;

use driver::{cluster::interval::INTERVAL, record::ASKED};
use kube::ResourceExt as _;

use crate::{
    explain::{
        checks::{self, Next, Trouble, next_refresh, outdated},
        facts::{Facts, VolumeFacts, time_of},
        state,
    },
    installation::{DRIVER, NodeSays, TELL},
    lint::annotations,
    time::{shown, span},
};

/// The difference between two clocks that is worth a word, in seconds.
const SKEW: i64 = 30;

/// The checks that find that calls to a provider fail.
const OF_CALLS: [&str; 4] = ["mount", "refresh", "provider", "provider-socket"];

/// Returns them. Where calls of the pod fail, those of others belong to it.
pub(super) fn of(facts: &Facts, troubles: &[Trouble]) -> Vec<String> {
    let mut notes = Vec::new();
    if facts.volumes.is_empty() {
        notes.push(match checks::has_persistent(facts) {
            true => {
                format!("the pod has no inline volume of {DRIVER}, and the driver mounts no others")
            }
            false => format!("the pod has no volume of {DRIVER}"),
        });
    }
    notes.extend(ended(facts));
    if let Some(status) = facts.status() {
        let skew = status.time.duration_since(facts.now);
        if skew.as_secs().abs() > SKEW {
            let which = if skew.is_negative() {
                "behind"
            } else {
                "before"
            };
            notes.push(format!(
                "the clock of node {} is {} {which} this machine's; times of the node are by its own clock",
                status.node,
                span(skew.abs())
            ));
        }
    }
    let mut checks = troubles.iter().map(|trouble| trouble.check);
    if checks.any(|check| OF_CALLS.contains(&check)) {
        notes.extend(failed_calls(facts));
    }
    // Who may not ask the driver does not see that somebody has mended it.
    let is_theirs = |trouble: &Trouble| trouble.check == "mount" && trouble.next.starts_with(TELL);
    if troubles.iter().any(is_theirs) {
        notes.push("kubelet tries to mount again within about two minutes: if somebody has just mended it, look again then".to_owned());
    }
    notes.extend(misspelt_annotations(facts));
    notes.extend(annotations_of_pod(facts));
    notes.extend(ending_classes(facts));
    notes.extend(idle_intervals(facts));
    notes.extend(edited_classes(facts));
    notes.extend(outdated(facts).into_iter().map(|(container, secret)| {
        format!(
            "container {container} started before Secret {secret} got its present content; it has the old values until it is restarted"
        )
    }));
    let node = facts.node.as_ref();
    if let Some(NodeSays::ExistingDriver) = node.and_then(|node| node.says.as_ref()) {
        notes.push("the node has the existing driver, which keeps no record: when a refresh is due, and when one failed, is not known".to_owned());
    }
    notes.extend(state::crashes(facts));
    notes.extend(checks::unset(facts));
    notes.extend(checks::of_hooks(facts));
    if let Some(event) = facts.events.found().and_then(|events| {
        events
            .iter()
            .find(|event| event.reason.as_deref() == Some("MountContentChanged"))
    }) && let Some(time) = time_of(event)
    {
        notes.push(format!(
            "the pod was told of new content at {}",
            shown(time, facts.now)
        ));
    }
    notes
}

/// Returns what becomes of the volumes of a pod that has ended. kubelet calls the driver to take them down.
fn ended(facts: &Facts) -> Option<String> {
    if !facts.has_ended() {
        return None;
    }
    let mut volumes = facts.volumes.iter();
    let is_mounted = volumes.any(|volume| facts.is_mounted(volume) != Some(false));
    let mut volumes = facts.volumes.iter();
    let is_unknown = volumes.any(|volume| facts.is_mounted(volume).is_none());
    let text = match facts.lacks_driver() {
        true if is_mounted => {
            "the pod has ended, and its volumes are taken down once a driver runs on its node again; until then, a deleted pod stays in Terminating"
        }
        _ if facts.is_deleted() && is_unknown => {
            "the pod has ended; whether its volumes are taken down is not known"
        }
        _ => "the pod has ended: its volumes are taken down",
    };
    Some(text.to_owned())
}

/// Returns which annotations of classes are most likely meant for the driver, and not read by it.
fn misspelt_annotations(facts: &Facts) -> BTreeSet<String> {
    let classes = facts.volumes.iter().filter_map(|volume| {
        let class = volume.class.found()?;
        Some((volume.class_name.as_str(), class.annotations()))
    });
    let wrong = classes.flat_map(|(class, all)| {
        all.keys().filter_map(move |name| {
            let right = annotations::misspelt(name)?;
            Some(format!("class {class} has the annotation {name}, which the driver does not know: {right} is probably meant"))
        })
    });
    // Two volumes may have one class.
    wrong.collect()
}

/// Returns which annotations of the pod are meant for the driver, which reads none of a pod.
fn annotations_of_pod(facts: &Facts) -> Vec<String> {
    if facts.volumes.is_empty() {
        return Vec::new();
    }
    let names = facts.pod.annotations().keys();
    let meant = names.filter_map(|name| {
        let right = annotations::meant_for_driver(name)?;
        let place = match right {
            INTERVAL => "the class, or in volumeAttributes of the volume",
            _ => "the class",
        };
        Some(format!(
            "the pod has the annotation {name}, and the driver reads none of a pod: {right} belongs to {place}"
        ))
    });
    meant.collect()
}

/// Returns which classes somebody has deleted, and what keeps them.
fn ending_classes(facts: &Facts) -> BTreeSet<String> {
    let classes = facts
        .volumes
        .iter()
        .filter_map(|volume| volume.class.found());
    let ending = classes.filter_map(|class| {
        let deleted = class.metadata.deletion_timestamp.as_ref()?;
        Some(format!(
            "class {} was deleted at {}, and finalizer {} keeps it: once it is gone, no new pod can mount it, and its volumes are not refreshed any more",
            class.name_any(),
            shown(deleted.0, facts.now),
            class.finalizers().join(", ")
        ))
    });
    ending.collect()
}

/// Returns which volumes ask for refreshes while rotation is off.
fn idle_intervals(facts: &Facts) -> Vec<String> {
    let is_off = |volume: &&VolumeFacts| next_refresh(facts, volume) == Next::Off;
    let asking = facts.volumes.iter().filter(is_off).filter_map(|volume| {
        let mut attributes = volume.source.volume_attributes.iter();
        let class = volume.class.found();
        if attributes.any(|all| all.contains_key(INTERVAL)) {
            return Some(format!("volume {}", volume.name));
        }
        let is_asked = class.is_some_and(|class| class.annotations().contains_key(INTERVAL));
        is_asked.then(|| format!("class {}", volume.class_name))
    });
    let note = |who| {
        format!(
            "{who} has {INTERVAL}, which has no effect while rotation is off: new content waits for a new pod"
        )
    };
    asking.map(note).collect()
}

/// Returns which classes were changed after the mount while rotation is off.
fn edited_classes(facts: &Facts) -> Vec<String> {
    let note = |volume: &VolumeFacts| {
        if next_refresh(facts, volume) != Next::Off || facts.is_mounted(volume) != Some(true) {
            return None;
        }
        let mounted = volume.pod_status.found()?.creation_timestamp()?.0;
        let class = volume.class.found()?;
        // That is told as what is wrong.
        if class.annotations().contains_key(ASKED) {
            return None;
        }
        let managed = class.metadata.managed_fields.iter().flatten();
        let of_spec = managed.filter(|entry| {
            let fields = entry.fields_v1.as_ref();
            fields.is_none_or(|fields| fields.0.get("f:spec").is_some())
        });
        let written = of_spec.filter_map(|entry| entry.time.as_ref());
        let changed = written.chain(class.metadata.creation_timestamp.as_ref());
        let changed = changed.map(|time| time.0).max()?;
        (changed > mounted).then(|| {
            format!(
                "class {} was changed at {}, after volume {} was mounted, and rotation is off: the volume keeps what the class asked for then until there is a new pod",
                volume.class_name,
                shown(changed, facts.now),
                volume.name
            )
        })
    };
    facts.volumes.iter().filter_map(note).collect()
}

/// Returns how many calls of the node's driver to the providers of the pod failed: others may be in the same
/// trouble.
fn failed_calls(facts: &Facts) -> Vec<String> {
    let providers: Vec<_> = facts
        .volumes
        .iter()
        .filter_map(|volume| volume.class.found())
        .map(|class| class.spec.provider.as_str())
        .collect();
    let calls = facts.status().into_iter().flat_map(|status| &status.calls);
    let of_pod = calls.filter(|calls| providers.contains(&calls.provider.as_str()));
    of_pod
        .filter_map(|calls| {
            let failed: u64 = calls.failed.values().sum();
            let codes = calls.failed.iter().map(|(code, count)| format!("{count} with {code}"));
            let codes: Vec<_> = codes.collect();
            (failed > 0).then(|| {
                format!(
                    "of {} calls of this node's driver to provider {}, for all pods and since it started, {failed} failed: {}",
                    calls.succeeded + failed,
                    calls.provider,
                    codes.join(", ")
                )
            })
        })
        .collect()
}
