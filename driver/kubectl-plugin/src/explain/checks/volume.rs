//! Checks one volume: why it is not mounted, and whether what it needs is still there.

use driver::record::is_object_name;
use jiff::Timestamp;
use kube::ResourceExt as _;

use super::{Found, events::has_name};
use crate::{
    cluster::Read,
    explain::facts::{Facts, VolumeFacts},
    lint::names::closest,
};

/// The attribute of a volume that names its class.
const ATTRIBUTE: &str = "secretProviderClass";

pub(super) fn class_attribute(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let (name, class) = (&volume.name, &volume.class_name);
    let attributes = volume.source.volume_attributes.iter().flatten();
    let mut keys = attributes.map(|(key, _)| key.as_str());
    let misspelt = keys.find(|key| closest(key, &[ATTRIBUTE]).is_some());
    let what = match class.as_str() {
        "" => match misspelt {
            Some(key) => format!(
                "volume {name} names no class: the driver does not read its attribute {key}; write {ATTRIBUTE}"
            ),
            None => format!("volume {name} names no class; set volumeAttributes.{ATTRIBUTE}"),
        },
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
    if facts.is_used(volume) {
        return None;
    }
    let name = &volume.name;
    let what = match volume.class.is_missing() {
        true => format!(
            "no container mounts volume {name}, so kubelet does not mount it either, and there is no class {}: take the volume away, or create the class and add the volume to volumeMounts",
            volume.class_name
        ),
        false => format!(
            "no container mounts volume {name}, so kubelet does not mount it either, and its Secrets are not made; add it to volumeMounts"
        ),
    };
    Some(Found::new(what, facts.describe()))
}

pub(super) fn class(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    const SHOWN: usize = 10;
    // What cannot be a name, and a volume that nothing mounts, are told with their class.
    let is_told = !is_object_name(&volume.class_name) || !facts.is_used(volume);
    if !volume.class.is_missing() || is_told {
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

/// The provider has no socket on the node, or nobody answers there. What kubelet said last may be something else.
pub(super) fn provider(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let found = without_provider(facts, volume)?;
    // kubelet may have come no farther than to something else.
    let said = facts.failed_mount(volume);
    let said = said.filter(|(said, _)| said.contains("provider"));
    Some(match said {
        Some((said, at)) => Found {
            at,
            ..found.said(Some(said))
        },
        None => found,
    })
}

/// Returns a name, in quotes if it has spaces, which would not be seen.
pub(in crate::explain) fn shown_name(name: &str) -> String {
    match name.contains(' ') {
        true => format!("\"{name}\""),
        false => name.to_owned(),
    }
}

/// Returns a provider that has a socket on the node.
pub(super) fn found_provider<'a>(
    facts: &'a Facts,
    name: &str,
) -> Option<&'a driver::status::Provider> {
    let mut providers = facts.status()?.providers.iter();
    providers.find(|found| found.name == name)
}

fn without_provider(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    // A class that names none is told as such.
    let provider = &volume.class.found()?.spec.provider;
    let status = facts.status().filter(|_| !provider.is_empty())?;
    let Some(found) = found_provider(facts, provider) else {
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
        // One that runs has its socket elsewhere, if the driver looks at another directory of the node.
        let driver = facts.driver().filter(|_| names.is_empty());
        let on_node = driver.map(|(set, _)| (set, set.host_paths(&status.provider_directories)));
        let on_node = on_node.filter(|(_, paths)| !paths.is_empty());
        let compare = on_node.map_or_else(String::new, |(set, paths)| {
            format!(
                "; if it runs there, compare its hostPath with {}, which DaemonSet {}/{} takes for that",
                paths.join(" and "),
                set.namespace(),
                set.set.name_any()
            )
        });
        let next = match closest(provider, &names) {
            Some(_) => facts.edit_class(volume).into(),
            None => facts.pods_of_node(),
        };
        return Some(Found::new(
            format!(
                "provider {} of class {} has no socket on node {} ({there}, in {}); install it there, or correct spec.provider{compare}",
                shown_name(provider),
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
    match found_provider(facts, &record.provider) {
        Some(found) => silent(facts, volume, found),
        None => without_provider(facts, volume),
    }
}

pub(super) fn publish_secret(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let name = &volume.source.node_publish_secret_ref.as_ref()?.name;
    facts.secrets.get(name).filter(|read| read.is_missing())?;
    let begin = format!(
        "volume {} needs Secret {name} (nodePublishSecretRef), which does not exist in the pod's namespace",
        volume.name
    );
    let own = facts.volumes.iter().find(|other| other.makes(name));
    let own = own.filter(|other| other.class_name == volume.class_name || waits_for(other, volume));
    let found = match own {
        Some(other) => Found::new(
            format!(
                "{begin}: class {} makes it only once this volume is mounted, so that the volume waits for itself. Create a Secret with the provider's credentials under a name that no class makes, and name that in nodePublishSecretRef",
                other.class_name
            ),
            facts.edit_workload(),
        ),
        None => match facts.volumes.iter().find(|other| other.makes(name)) {
            Some(other) => Found::new(
                format!(
                    "{begin}: class {} makes it once volume {} is mounted",
                    other.class_name, other.name
                ),
                facts.describe(),
            ),
            None => Found::new(begin, format!("{} get secrets", facts.kubectl())),
        },
    };
    let said = facts.failed_mount(volume);
    Some(match said.filter(|(said, _)| has_name(said, name)) {
        Some((said, at)) => Found {
            at,
            ..found.said(Some(said))
        },
        None => found,
    })
}

/// Returns whether a volume needs a Secret that the class of another one makes.
fn waits_for(volume: &VolumeFacts, other: &VolumeFacts) -> bool {
    let secret = volume.source.node_publish_secret_ref.as_ref();
    secret.is_some_and(|secret| other.makes(&secret.name))
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
            "volume {} was mounted, and at {} there is no tmpfs any more{why}: somebody has unmounted it; replace the pod, so that a new one mounts it again",
            volume.name,
            record.target_path.display()
        ),
        facts.new_pod(),
    ))
}

/// Returns when a container was started.
pub(super) fn started(facts: &Facts, container: &str) -> Option<Timestamp> {
    let statuses = facts.pod.status.as_ref()?.container_statuses.as_ref()?;
    let status = statuses.iter().find(|status| status.name == container)?;
    let running = status.state.as_ref()?.running.as_ref()?;
    running.started_at.as_ref().map(|time| time.0)
}
