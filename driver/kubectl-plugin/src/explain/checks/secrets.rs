//! Checks the Secrets that classes make and that containers take.

use std::collections::BTreeSet;

use jiff::Timestamp;
use kube::ResourceExt as _;

use super::{
    Found,
    failures::{FAILED, Failure, Failures},
    remedy::Remedy,
    volume::started,
};
use crate::{
    cluster::Read,
    explain::facts::{Facts, VolumeFacts},
    lint::names::closest,
    time::shown,
};
use driver::{
    cluster::{pod_status::CONTENT_CHANGED, resources::SecretProviderClass},
    record::is_object_name,
};

/// The seconds after a mount in which a Secret may still be on its way.
const ON_ITS_WAY: i64 = 15;

/// Finds Secrets of a volume's class that are not as it says: first those that the pod waits for, in the order in which
/// it takes them, and each with its own cause.
pub(super) fn wrong(facts: &Facts, volume: &VolumeFacts) -> Vec<(&'static str, Found)> {
    let failures = Failures::of(facts, volume);
    let mut all: Vec<_> = failures
        .all
        .iter()
        .map(|failure| {
            let found = failed(facts, volume, &failures, failure);
            (turn(facts, failure.secret.as_deref()), found)
        })
        .collect();
    let silent = missing(facts, volume, &failures);
    all.extend(
        silent.map(|(secret, found)| (turn(facts, Some(secret)), ("secret-missing", found))),
    );
    all.sort_by_key(|(turn, _)| *turn);
    let mut all: Vec<_> = all.into_iter().map(|(_, found)| found).collect();
    if failures.untold > 0 {
        let what = format!(
            "{} more Secrets of class {} are not as it says",
            failures.untold, volume.class_name
        );
        all.push(("secrets", Found::new(what, events_of(facts))));
    }
    all
}

/// Returns the turn at which the pod takes a Secret: first its volumes, then its containers in the order of their start,
/// and what it does not take last.
fn turn(facts: &Facts, secret: Option<&str>) -> usize {
    let Some(secret) = secret else {
        return 0;
    };
    let of_volumes = facts.secret_volumes().into_iter();
    let of_volumes = of_volumes.map(|volume| volume.secret);
    let of_images = facts.pull_secrets().map(str::to_owned);
    let takes = facts.takes().into_iter();
    let takes = takes.map(|take| take.secret.to_owned());
    let mut all = of_volumes.chain(of_images).chain(takes);
    all.position(|taken| taken == secret)
        .map_or(usize::MAX, |at| at + 1)
}

/// Says what the driver says of a Secret.
fn failed(
    facts: &Facts,
    volume: &VolumeFacts,
    failures: &Failures,
    failure: &Failure,
) -> (&'static str, Found) {
    let class = &volume.class_name;
    let since = failures.since.as_ref();
    let since = since.filter(|_| failure.at.is_none());
    let since = since.map_or_else(String::new, |since| match since.parse() {
        Ok(time) => format!(" since {}", shown(time, facts.now)),
        Err(_) => format!(" since {since}"),
    });
    let (check, what) = match &failure.secret {
        Some(secret) if !is_object_name(secret) => {
            let what = format!(
                "class {class} is to make {}; correct its secretName",
                impossible(secret)
            );
            return (
                "secrets",
                said_by(Found::new(what, facts.edit_class(volume)), failure),
            );
        }
        Some(secret) if failure.is_missing(facts) => (
            "secret-missing",
            format!("Secret {secret} of class {class} is missing"),
        ),
        // The time is that of the first one that failed.
        Some(secret) if failures.all.len() > 1 => (
            "secrets",
            format!("Secret {secret} is not as class {class} says"),
        ),
        Some(secret) => (
            "secrets",
            format!("Secret {secret} is not as class {class} says{since}"),
        ),
        None => (
            "secrets",
            format!("Secrets of class {class} are not as it says{since}"),
        ),
    };
    let remedy = Remedy::of(facts, volume, failure);
    let what = match &remedy.hint {
        Some(hint) => format!("{what}: {hint}"),
        None => what,
    };
    (check, said_by(Found::new(what, remedy.next), failure))
}

fn said_by(found: Found, failure: &Failure) -> Found {
    Found {
        at: failure.at,
        ..found.said(Some(failure.said.clone()))
    }
}

/// Finds Secrets of the class that are not there, although the volume is mounted, and of which nothing is said.
fn missing<'a>(
    facts: &'a Facts,
    volume: &'a VolumeFacts,
    failures: &'a Failures,
) -> impl Iterator<Item = (&'a str, Found)> {
    let status = volume.pod_status.found();
    let status = status.filter(|_| facts.is_mounted(volume) == Some(true));
    let mounted = status.and_then(|status| status.metadata.creation_timestamp.as_ref());
    let is_due =
        mounted.is_some_and(|mounted| facts.now.duration_since(mounted.0).as_secs() >= ON_ITS_WAY);
    let class = volume.class.found().filter(|_| is_due);
    let made = class
        .into_iter()
        .flat_map(|class| &class.spec.secret_objects);
    let names = made.map(|made| made.secret_name.as_str());
    // Those of which more fail than are named may be among them.
    let names = names.filter(|name| {
        let read = facts.secrets.get(*name);
        let is_told = failures.tell_of(name) || failures.untold > 0;
        read.is_some_and(Read::is_missing) && !is_told
    });
    names.map(move |name| {
        let class = &volume.class_name;
        if !is_object_name(name) {
            let what = format!(
                "class {class} is to make {}; correct its secretName",
                impossible(name)
            );
            return (name, Found::new(what, facts.edit_class(volume)));
        }
        let what = format!(
            "Secret {name} of class {class} is missing, and no event says why: the driver makes it at its next check, within a minute, if it may write Secrets (syncSecret.enabled)"
        );
        (name, Found::new(what, events_of(facts)))
    })
}

/// Returns the command that shows the events about Secrets.
fn events_of(facts: &Facts) -> String {
    format!(
        "{} get events --field-selector reason={FAILED}",
        facts.kubectl()
    )
}

/// Returns whether what is wrong with a Secret of a volume is told.
pub(super) fn could_not(facts: &Facts, volume: &VolumeFacts, secret: &str) -> bool {
    Failures::of(facts, volume).tell_of(secret)
}

/// Returns the class of the namespace that makes a Secret, for a pod that does not mount it.
pub(super) fn maker_elsewhere<'a>(
    facts: &'a Facts,
    secret: &str,
) -> Option<&'a SecretProviderClass> {
    let mut classes = facts.classes.as_ref()?.found()?.iter();
    classes.find(|class| {
        let mut made = class.spec.secret_objects.iter();
        made.any(|made| made.secret_name == secret)
    })
}

/// Returns whether a Secret is not there, as far as is known, and is for the driver to make: a class of the pod makes
/// it, or may do so.
pub(super) fn awaits_driver(facts: &Facts, secret: &str) -> bool {
    let read = facts.secrets.get(secret);
    let mut volumes = facts.volumes.iter();
    read.is_none_or(|read| read.found().is_none())
        && volumes.any(|volume| volume.makes(secret) || volume.class.unknown().is_some())
}

/// Returns words for the Secret of a similar name that a class of the pod makes. One whose name cannot be that of a Secret
/// is never made, and nothing can take it.
pub(super) fn similar(facts: &Facts, secret: &str) -> Option<String> {
    let of_volume = |volume: &VolumeFacts| {
        let made = &volume.class.found()?.spec.secret_objects;
        let names = made.iter().map(|made| made.secret_name.as_str());
        let (possible, others): (Vec<_>, Vec<_>) = names.partition(|name| is_object_name(name));
        let class = &volume.class_name;
        if secret == class && !possible.is_empty() {
            let names = possible.join(", ");
            return Some(format!(
                "{secret} is the name of the class, which makes {names}: is that meant?"
            ));
        }
        if let Some(right) = closest(secret, &possible) {
            return Some(format!("class {class} makes {right}: is that meant?"));
        }
        let wrong = closest(secret, &others)?;
        let what = format!("{}; correct secretName in the class", impossible(wrong));
        Some(format!("class {class} is to make {what}"))
    };
    facts.volumes.iter().find_map(of_volume)
}

/// Says that a class makes a Secret of the name of a ConfigMap that kubelet does not find.
pub(super) fn not_config_map(facts: &Facts, said: &str) -> Option<String> {
    let (_, rest) = said.split_once("configmap \"")?;
    let name = rest.split_once("\" not found")?.0;
    let mut volumes = facts.volumes.iter();
    let own = volumes.find(|volume| volume.makes(name));
    let own = own.map(|volume| volume.class_name.clone());
    let class = own.or_else(|| Some(maker_elsewhere(facts, name)?.name_any()))?;
    Some(format!(
        "there is no ConfigMap {name}, but class {class} makes a Secret of this name: if that is meant, write secretRef for configMapRef, secretKeyRef for configMapKeyRef, and secret for configMap in a volume"
    ))
}

/// Says that a name cannot be that of a Secret.
pub(super) fn impossible(name: &str) -> String {
    format!(
        "{name}, which cannot be the name of a Secret: it takes lower-case letters, digits, \"-\" and \".\""
    )
}

/// Returns the class of the pod that makes a Secret, and the keys that it writes, if they are known: not of all
/// objects, or of the type of which the driver chooses the keys.
pub(super) fn keys_of<'a>(facts: &'a Facts, secret: &str) -> Option<(&'a str, Vec<&'a str>)> {
    facts.volumes.iter().find_map(|volume| {
        let made = &volume.class.found()?.spec.secret_objects;
        let made = made.iter().find(|made| made.secret_name == secret)?;
        let is_open = made.data.iter().any(|data| data.object_name == "*")
            || made.type_ == "kubernetes.io/tls";
        let keys = made.data.iter().map(|data| data.key.as_str());
        (!is_open).then(|| (volume.class_name.as_str(), keys.collect()))
    })
}

/// Returns the containers that started before a Secret of their environment got its present content, with the
/// Secret. The driver changes a Secret for a new owner, too: that counts only if the content of the volume has
/// changed since, as well.
pub(in crate::explain) fn outdated(facts: &Facts) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = Vec::new();
    let takes = facts.takes_if_there();
    let pairs: BTreeSet<_> = takes
        .iter()
        .map(|take| (take.secret, take.container.name.as_str()))
        .collect();
    for (secret, container) in pairs {
        let written = facts.secrets.get(secret).and_then(Read::found);
        let maker = facts.volumes.iter().find(|volume| volume.makes(secret));
        let (Some(written), Some(volume)) = (written, maker) else {
            continue;
        };
        let Some(started) = started(facts, container) else {
            continue;
        };
        let is_newer = |time: Option<Timestamp>| time.is_some_and(|time| time > started);
        let changed = changed(facts, volume);
        let is_outdated = match written.content_since {
            Some(since) => since > started,
            None => is_newer(written.created) || is_newer(written.by_driver) && is_newer(changed),
        };
        if is_outdated {
            all.push((container.to_owned(), secret.to_owned()));
        }
    }
    all
}

/// Returns when the content of a volume changed last.
fn changed(facts: &Facts, volume: &VolumeFacts) -> Option<Timestamp> {
    if let Some(record) = facts.record(volume) {
        return Some(record.last_change);
    }
    let annotations = volume.pod_status.found()?.annotations();
    annotations.get(CONTENT_CHANGED)?.parse().ok()
}
