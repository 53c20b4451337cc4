//! Finds Secrets that the driver made once, that the pod takes, and that no class makes any more: they stay with their old
//! content, so that nothing fails.

use std::collections::BTreeSet;

use kube::ResourceExt as _;

use super::{Found, secrets::maker_elsewhere};
use crate::{
    cluster::Read,
    explain::facts::{Facts, VolumeFacts},
};

/// Finds them, in the order in which the pod takes them.
pub(super) fn wrong(facts: &Facts) -> Vec<Found> {
    let is_over = facts.has_ended() || facts.may_outlive_its_volumes();
    let classes = facts.volumes.iter().map(|volume| &volume.class);
    let is_unknown = classes.into_iter().any(|class| class.unknown().is_some());
    if is_over || is_unknown {
        return Vec::new();
    }
    let left = facts.left_over().into_iter();
    left.filter_map(|secret| released(facts, secret)).collect()
}

fn released(facts: &Facts, secret: &str) -> Option<Found> {
    let all = facts.classes.as_ref()?.found()?;
    let written = facts.secrets.get(secret)?.found()?;
    // That its class is gone is told of the volume.
    let is_of_gone = |volume: &VolumeFacts| {
        volume.class.is_missing() && written.class.as_ref() == Some(&volume.class_name)
    };
    if facts.volumes.iter().any(is_of_gone) {
        return None;
    }
    let begin = format!("{}, which", takers(facts, secret)?);
    if let Some(maker) = maker_elsewhere(facts, secret) {
        let mounted = facts.mounted.as_ref().and_then(Read::found)?;
        let makers = all.iter().filter(|class| {
            let mut made = class.spec.secret_objects.iter();
            made.any(|made| made.secret_name == secret)
        });
        if makers
            .into_iter()
            .any(|maker| mounted.contains(&maker.name_any()))
        {
            return None;
        }
        let what = format!(
            "{begin} class {} makes, but only while a pod mounts that class, and none does: it keeps its old content; add a volume of the class to this pod",
            maker.name_any()
        );
        return Some(Found::new(what, facts.edit_workload()));
    }
    let begin = format!("{begin} no class makes any more: it keeps its old content");
    let (now, makes) = made_now(facts);
    let what = match makes {
        true => {
            format!("{begin}{now}: take that in the workload, or let the class make {secret} again")
        }
        false => {
            format!("{begin}{now}; let a class make it again, or take another in the workload")
        }
    };
    let volume = facts.volumes.first().filter(|_| !makes);
    let next = match volume {
        Some(volume) => facts.edit_class(volume),
        None => facts.edit_workload(),
    };
    Some(Found::new(what, next))
}

/// Says what the classes of the pod make now, and whether that is anything.
fn made_now(facts: &Facts) -> (String, bool) {
    let mut classes = BTreeSet::new();
    let mut words = Vec::new();
    let mut makes = false;
    for volume in &facts.volumes {
        let Some(class) = volume.class.found() else {
            continue;
        };
        if !classes.insert(&volume.class_name) {
            continue;
        }
        let made = class.spec.secret_objects.iter();
        let made: Vec<_> = made.map(|made| made.secret_name.as_str()).collect();
        makes |= !made.is_empty();
        let made = match made.as_slice() {
            [] => "no Secret".to_owned(),
            names => names.join(", "),
        };
        words.push(format!("class {} makes {made}", volume.class_name));
    }
    match words.is_empty() {
        true => (String::new(), false),
        false => (format!("; {}", words.join(", ")), makes),
    }
}

/// Says what of the pod takes a Secret.
fn takers(facts: &Facts, secret: &str) -> Option<String> {
    let takes = facts.takes().into_iter();
    let of_it = takes.filter(|take| take.secret == secret);
    let mut containers: Vec<_> = of_it.map(|take| take.container.name.as_str()).collect();
    containers.dedup();
    let volumes = facts.secret_volumes().into_iter();
    let volume = volumes
        .filter(|volume| volume.secret == secret)
        .map(|volume| volume.name);
    let volumes: Vec<_> = volume.collect();
    match (containers.as_slice(), volumes.as_slice()) {
        ([], []) => facts.pull_secrets().any(|name| name == secret).then(|| {
            format!("the images of the pod are pulled with Secret {secret} (imagePullSecrets)")
        }),
        ([], [volume, ..]) => Some(format!("volume {volume} takes Secret {secret}")),
        ([container], _) => Some(format!(
            "container {container} takes its environment from Secret {secret}"
        )),
        (containers, _) => Some(format!(
            "containers {} take their environment from Secret {secret}",
            containers.join(", ")
        )),
    }
}
