//! Compares what there is with what has to be.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Event, Pod, Secret};
use kube::Api;
use kube::api::{DynamicObject, ListParams};
use kube::runtime::watcher::{self, watcher};

use crate::cluster::{Result, api};
use crate::install::pod_statuses;

use super::super::lock;
use super::super::observer::TOLD;
use super::super::tenants::ORDER;
use super::super::world::World;
use super::classes::{name_of, status_name};
use super::outcome::{Expected, NAMES, OF_TWO, outcome};
use super::{CLASSES, NUMBERED, PODS, SHARED, Seen, TAKEN, WRITTEN, files, path_of};

/// The annotation of a pod status with the beginning of trouble with Secrets.
const TROUBLE: &str = "secrets-store.csi.k8s.io/secrets-out-of-step-since";
/// The annotation of a pod status with the beginning of refreshes that fail.
const STALE: &str = "secrets-store.csi.k8s.io/stale-since";
/// The annotation of a Secret with the class that holds it (docs/secrets.md).
const HOLDER: &str = "secrets-store.csi.k8s.io/class";
/// The pause between two looks at events.
const PAUSE: Duration = Duration::from_secs(1);
/// The reason of the event about a mount with `subPath`.
const SUB_PATH: &str = "MountSubPathNotRefreshed";

/// Returns what is not as it should be yet. Notes what was seen.
///
/// # Errors
/// When the API server does not answer.
pub(in super::super) async fn lacking(world: &World, client: &kube::Client) -> Result<Vec<String>> {
    let there = world.features.there();
    if there.is_empty() {
        return Ok(Vec::new());
    }
    let (settled, changed, is_unrecorded, numbers, waits) = {
        let state = lock(&world.features.0);
        (
            state.settled.clone(),
            state.changed.clone(),
            state.is_unrecorded,
            state.numbers,
            state.waits,
        )
    };
    let (secrets, trouble) = outcome(&settled.secrets, &numbers, waits);
    let mut lacking = Vec::new();
    let pods = Api::<Pod>::namespaced(client.clone(), &world.namespace);
    for (name, (uid, node, classes)) in PODS.iter().zip(&there) {
        let pod = pods.get_opt(name).await;
        let pod = pod.map_err(api(format!("get pod {name}")))?;
        let is_same = pod.as_ref().and_then(|pod| pod.metadata.uid.as_ref()) == Some(uid);
        if !is_same || !pod.as_ref().is_some_and(embedded::is_ready) {
            lacking.push(format!("pod {name} is not ready"));
            continue;
        }
        let Some(root) = lock(&world.roots).get(node).cloned() else {
            continue;
        };
        for class in classes {
            let volume = path_of(uid, *class, &root);
            let number = numbers.get(*class).copied().unwrap_or_default();
            let expected = files(*class, number, &world.store);
            lacking.extend(wrong_files(&volume, &expected, *class));
        }
    }
    let statuses = pod_statuses(client, &world.namespace);
    let statuses = statuses.list(&ListParams::default()).await;
    let statuses = statuses.map_err(api("list pod statuses".to_owned()))?.items;
    let mut seen = Seen {
        secrets,
        ..Seen::default()
    };
    for class in 0..CLASSES {
        let name = status_name(&world.namespace, class);
        let is_its = |status: &&DynamicObject| status.metadata.name.as_ref() == Some(&name);
        let Some(status) = statuses.iter().find(is_its) else {
            lacking.push(format!("pod status {name} is missing"));
            continue;
        };
        let of_its_pod = there
            .iter()
            .find(|(_, _, classes)| classes.contains(&class));
        let fails = trouble.contains(&class);
        lacking.extend(wrong_status(status, of_its_pod, fails));
        if let Some(since) = annotation(status, TROUBLE) {
            seen.trouble.push((class, since.clone()));
        }
        if class == NUMBERED {
            let object = &status.data["status"]["objects"][0];
            seen.version = object["version"].as_str().unwrap_or_default().to_owned();
        }
    }
    lacking.extend(wrong_since(&settled, &seen, &changed));
    if !is_unrecorded {
        lacking.extend(wrong_version(&settled, &seen, &changed));
    }
    lacking.extend(wrong_secrets(world, client, &seen, &statuses).await?);
    lock(&world.features.0).seen = seen;
    world
        .log
        .checked("looks at what classes ask for besides", 1);
    Ok(lacking)
}

/// Returns how the files of a volume differ.
fn wrong_files(volume: &Path, expected: &[(&str, String)], class: usize) -> Vec<String> {
    let (name, mut wrong) = (name_of(class), Vec::new());
    for (file, content) in expected {
        let found = fs::read_to_string(volume.join(file)).unwrap_or_default();
        if found != *content {
            let found: String = found.chars().take(40).collect();
            let content: String = content.chars().take(40).collect();
            wrong.push(format!(
                "{name} has {found:?} in {file} instead of {content:?}"
            ));
        }
    }
    // What a provider writes itself, it removes itself, or not.
    if class == WRITTEN {
        return wrong;
    }
    let names: BTreeSet<&str> = expected
        .iter()
        .filter_map(|(file, _)| file.split('/').next())
        .collect();
    for entry in fs::read_dir(volume).into_iter().flatten().flatten() {
        let found = entry.file_name();
        let found = found.to_string_lossy();
        if !found.starts_with("..") && !names.contains(&*found) {
            wrong.push(format!("{name} has {found}, which its class does not say"));
        }
    }
    wrong
}

fn annotation<'a>(status: &'a DynamicObject, name: &str) -> Option<&'a String> {
    status.metadata.annotations.as_ref()?.get(name)
}

/// Returns what is wrong with a pod status. `fails` says whether a Secret of its class has to fail.
fn wrong_status(
    status: &DynamicObject,
    pod: Option<&(String, String, Vec<usize>)>,
    fails: bool,
) -> Option<String> {
    let name = status.metadata.name.as_deref().unwrap_or_default();
    let mut owners = status.metadata.owner_references.iter().flatten();
    let is_owned = pod.is_some_and(|(uid, ..)| owners.any(|owner| owner.uid == *uid));
    let is_mounted = status.data["status"]["mounted"] == true;
    let tells = annotation(status, TROUBLE);
    let what = if !is_owned {
        "is not owned by its pod".to_owned()
    } else if !is_mounted {
        "does not say that its volume is mounted".to_owned()
    } else if let Some(since) = annotation(status, STALE) {
        format!("still tells of failed refreshes since {since}")
    } else if tells.is_some() != fails {
        format!("has {TROUBLE} {tells:?}, and a Secret has to fail: {fails}")
    } else {
        return None;
    };
    Some(format!("pod status {name} {what}"))
}

/// Returns trouble that has lasted since everything had converged before, and has another beginning.
fn wrong_since(settled: &Seen, seen: &Seen, changed: &BTreeSet<usize>) -> Vec<String> {
    let is_same = |class: &usize| match SHARED.contains(class) {
        true => SHARED.iter().all(|one| !changed.contains(one)),
        false => !changed.contains(class),
    };
    let lasting = settled.trouble.iter().filter(|(class, _)| is_same(class));
    lasting
        .filter_map(|(class, since)| {
            let now = seen.trouble.iter().find(|(now, _)| now == class);
            let (_, now) = now.filter(|(_, now)| now != since)?;
            let name = name_of(*class);
            Some(format!(
                "the trouble of {name} began {since}, and now {now}"
            ))
        })
        .collect()
}

/// Returns what is wrong with the version that has a number.
fn wrong_version(settled: &Seen, seen: &Seen, changed: &BTreeSet<usize>) -> Option<String> {
    let is_changed = changed.contains(&NUMBERED);
    let (before, now) = (&settled.version, &seen.version);
    let is_first = before.is_empty();
    let is_wrong = !now.starts_with("v1") || !is_first && (before != now) != is_changed;
    is_wrong.then(|| {
        format!(
            "the version is {now:?} after {before:?}, and the content has changed: {is_changed}"
        )
    })
}

/// Returns what is wrong with the Secrets.
async fn wrong_secrets(
    world: &World,
    client: &kube::Client,
    seen: &Seen,
    statuses: &[DynamicObject],
) -> Result<Vec<String>> {
    let secrets = Api::<Secret>::namespaced(client.clone(), &world.namespace);
    let mut wrong = Vec::new();
    for name in NAMES.into_iter().chain([TAKEN]) {
        let secret = secrets.get_opt(name).await;
        let secret = secret.map_err(api(format!("get Secret {name}")))?;
        let what = match (secret, seen.secrets.get(name)) {
            (None, None) if name == TAKEN => Some("of somebody else is gone".to_owned()),
            (None, None) => None,
            (Some(secret), None) if name == TAKEN => is_touched(&secret),
            (Some(_), None) => Some("is there, and no class has listed it".to_owned()),
            (None, Some(_)) => Some("is missing".to_owned()),
            (Some(secret), Some(expected)) => {
                let owner = expected
                    .holder
                    .map(|class| status_name(&world.namespace, class));
                let is_its = |status: &&DynamicObject| status.metadata.name == owner;
                let owner = statuses.iter().find(is_its);
                let owner = owner.and_then(|status| status.metadata.uid.as_deref());
                wrong_secret(&secret, expected, owner)
            }
        };
        wrong.extend(what.map(|what| format!("Secret {name} {what}")));
    }
    Ok(wrong)
}

/// Returns what the driver has done to a Secret that is not its own.
fn is_touched(secret: &Secret) -> Option<String> {
    let data = secret.data.iter().flatten().count();
    let metadata = &secret.metadata;
    let is_touched = data != 1
        || metadata.owner_references.iter().flatten().count() > 0
        || metadata
            .annotations
            .iter()
            .flatten()
            .any(|(name, _)| name == HOLDER);
    is_touched.then(|| "of somebody else was changed".to_owned())
}

fn wrong_secret(secret: &Secret, expected: &Expected, owner: Option<&str>) -> Option<String> {
    let annotations = secret.metadata.annotations.as_ref();
    let annotation = |name: &str| annotations.and_then(|all| all.get(name));
    let holder = annotation(HOLDER).map(String::as_str);
    let is_held = match expected.holder {
        Some(class) => holder == Some(name_of(class)) && annotation(ORDER).is_some(),
        None => holder.is_none_or(|holder| holder == name_of(expected.last)),
    };
    if !is_held {
        let (order, expected) = (annotation(ORDER), expected.holder.map(name_of));
        return Some(format!(
            "is held by {holder:?}, with order {order:?}, instead of {expected:?}"
        ));
    }
    if secret.type_.as_deref() != Some(expected.of_type) {
        let found = &secret.type_;
        return Some(format!(
            "is of type {found:?} instead of {}",
            expected.of_type
        ));
    }
    let data: BTreeMap<String, String> = secret
        .data
        .iter()
        .flatten()
        .map(|(key, value)| (key.clone(), String::from_utf8_lossy(&value.0).into_owned()))
        .collect();
    let keys = |data: &BTreeMap<String, String>| data.keys().cloned().collect::<Vec<_>>();
    if keys(&data) != keys(&expected.data) {
        let (found, expected) = (keys(&data), keys(&expected.data));
        return Some(format!("has the keys {found:?} instead of {expected:?}"));
    }
    if let Some((key, _)) = data
        .iter()
        .find(|(key, value)| expected.data.get(*key) != Some(value))
    {
        return Some(format!("has another value in {key} than its class says"));
    }
    let mut owners = secret.metadata.owner_references.iter().flatten();
    let is_owned = owner.is_none_or(|uid| owners.any(|owner| owner.uid == uid));
    (!is_owned).then(|| "is not owned by the pod status of its class".to_owned())
}

/// Watches the Secret that two classes list until it is dropped: whatever the other class says, it names the class
/// that makes it.
pub(in super::super) async fn watch(world: Arc<World>, client: kube::Client) {
    let secrets = Api::<Secret>::namespaced(client, &world.namespace);
    let mut events = watcher(secrets, watcher::Config::default()).boxed();
    let mut before: Option<String> = None;
    while let Some(event) = events.next().await {
        let Ok(watcher::Event::Apply(secret) | watcher::Event::InitApply(secret)) = event else {
            continue;
        };
        if secret.metadata.name.as_deref() != Some(OF_TWO) {
            continue;
        }
        world.log.checked("versions of a Secret of two classes", 1);
        let annotations = secret.metadata.annotations.unwrap_or_default();
        let now = annotations.get(HOLDER).cloned();
        let held = before.as_deref().filter(|_| before != now);
        if let Some(class) = SHARED
            .into_iter()
            .find(|class| held == Some(name_of(*class)))
            && world.features.lists_since_settled(class)
        {
            let text = format!("Secret {OF_TWO} names {now:?} instead of {before:?}");
            let promise = "a Secret names the class that makes it";
            world.log.find(promise, text);
        }
        before = now;
    }
}

/// Waits until the pod has been told of its mount with `subPath`, as its content has changed. Returns that it has not,
/// if the driver ran all the time in which it had to.
pub(in super::super) async fn untold(
    world: &World,
    client: &kube::Client,
) -> Result<Option<String>> {
    let begun = world.now();
    let there = world.features.there();
    let Some((uid, node, classes)) = there.first() else {
        return Ok(None);
    };
    if !lock(&world.features.0).is_followed || !classes.contains(&NUMBERED) {
        return Ok(None);
    }
    loop {
        if is_told(world, client, uid).await? || !world.driver_ran_since(node, begun) {
            return Ok(None);
        }
        if world.now() - begun > TOLD {
            let text = format!("pod {} is not told of its mount with subPath", PODS[0]);
            return Ok(Some(text));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn is_told(world: &World, client: &kube::Client, uid: &str) -> Result<bool> {
    let events = Api::<Event>::namespaced(client.clone(), &world.namespace);
    let events = events.list(&ListParams::default()).await;
    let events = events.map_err(api("list events".to_owned()))?.items;
    Ok(events.iter().any(|event| {
        event.reason.as_deref() == Some(SUB_PATH)
            && event.involved_object.uid.as_deref() == Some(uid)
    }))
}
