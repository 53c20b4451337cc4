//! What has to be so when the faults are over: the state to which everything converges, and the
//! traces of what did not work.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, Pod, Secret};
use kube::Api;
use kube::api::{DynamicObject, ListParams};
use serde_json::Value;

use super::content::DATA;
use super::volumes::{is_mount, path_of};
use crate::cluster::{Cluster as _, Component, Result, api};
use crate::install::pod_statuses;

use super::super::ground::Ground;
use super::super::lock;
use super::super::store::{CLASSES, EXTRA, OBJECTS, content};
use super::super::tenants::{EDITION, EDITION_KEY, EXTRA_KEY, KEYS, WHO};
use super::super::world::{Failure, Watched, World};

/// Returns what is not as it should be yet.
///
/// # Errors
/// When the API server does not answer.
pub(in super::super) async fn lacking(world: &World, client: &kube::Client) -> Result<Vec<String>> {
    let mut lacking = Vec::new();
    let pods: Vec<Watched> = lock(&world.pods).values().cloned().collect();
    for pod in &pods {
        if pod.ended {
            lacking.extend(mounted(world, pod));
        } else if !pod.ready {
            lacking.push(format!("pod {} is not ready", pod.name));
        }
    }
    let mut used = BTreeSet::new();
    for pod in pods.iter().filter(|pod| pod.ready) {
        lacking.extend(remains(world, pod));
        for class in &pod.classes {
            used.insert(*class);
            let name = CLASSES.get(*class).copied().unwrap_or_default();
            let read = lock(&world.read).get(&(pod.uid.clone(), *class)).copied();
            let read =
                read.map(|(generation, spec)| (world.store.number(*class, generation), spec));
            let latest = world.store.latest_number(*class);
            let expected = world.editions.now(*class).map(|spec| (latest, spec));
            if read != expected {
                lacking.push(format!(
                    "pod {} reads {read:?} of {name} instead of {expected:?}",
                    pod.name
                ));
            }
        }
    }
    let statuses = pod_statuses(client, &world.namespace);
    let statuses = statuses.list(&ListParams::default()).await;
    let statuses = statuses.map_err(api("list pod statuses".to_owned()))?.items;
    let secrets = Api::<Secret>::namespaced(client.clone(), &world.namespace);
    for class in used {
        let name = CLASSES.get(class).copied().unwrap_or_default();
        let secret = secrets.get_opt(name).await;
        let secret = secret.map_err(api(format!("get Secret {name}")))?;
        let owners = owners(world, &pods, class, &statuses);
        if let Some(wrong) = wrong_secret(world, class, secret, &owners) {
            lacking.push(format!("Secret {name} {wrong}"));
        }
    }
    lacking.extend(wrong_statuses(world, &pods, &statuses));
    world.log.checked("looks at the state after faults", 1);
    Ok(lacking)
}

/// The annotations of a pod status that tell of trouble while it lasts (docs/operating.md).
const TROUBLE: [&str; 2] = [
    "secrets-store.csi.k8s.io/stale-since",
    "secrets-store.csi.k8s.io/secrets-out-of-step-since",
];

/// Returns what lies in the volumes of a pod besides the present content: each content takes memory.
fn remains(world: &World, pod: &Watched) -> Vec<String> {
    if world.is_buried(&pod.uid) {
        return Vec::new();
    }
    let root = lock(&world.roots).get(&pod.node).cloned();
    let mut remains = Vec::new();
    for (class, root) in pod.classes.iter().zip(root.iter().cycle()) {
        let volume = path_of(pod, root, *class);
        let present = fs::read_link(volume.join(DATA)).unwrap_or_default();
        for entry in fs::read_dir(&volume).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let is_own = name.to_string_lossy().starts_with("..");
            if is_own && name != DATA && Path::new(&name) != present {
                let name = name.display();
                remains.push(format!("a volume of pod {} has {name}", pod.name));
            }
        }
    }
    remains
}

/// Returns the volumes that a pod still has which has ended.
fn mounted(world: &World, pod: &Watched) -> Vec<String> {
    let root = lock(&world.roots).get(&pod.node).cloned();
    let volumes = root.iter().flat_map(|root| {
        let volumes = pod.classes.iter().map(|class| path_of(pod, root, *class));
        volumes.filter(|volume| is_mount(volume))
    });
    let text = |volume: PathBuf| {
        let volume = volume.display();
        format!("pod {} has ended, and {volume} is mounted", pod.name)
    };
    volumes.map(text).collect()
}

/// Returns the statuses of the pods that run with a class: the owners of its Secret, because these
/// pods have no controllers. With the last of them, and not before, the Secret goes.
fn owners<'a>(
    world: &World,
    pods: &[Watched],
    class: usize,
    statuses: &'a [DynamicObject],
) -> Vec<&'a DynamicObject> {
    let running = pods
        .iter()
        .filter(|pod| pod.ready && pod.classes.contains(&class));
    let names: BTreeSet<String> = running.map(|pod| status_name(world, pod, class)).collect();
    let is_of_these = |status: &&DynamicObject| {
        let name = status.metadata.name.as_ref();
        name.is_some_and(|name| names.contains(name))
    };
    statuses.iter().filter(is_of_these).collect()
}

/// Returns the name of the status of a pod's volume.
pub(super) fn status_name(world: &World, pod: &Watched, class: usize) -> String {
    let class = CLASSES.get(class).copied().unwrap_or_default();
    format!("{}-{}-{class}", pod.name, world.namespace)
}

/// Returns how a Secret differs from what its class declares and the store has.
fn wrong_secret(
    world: &World,
    class: usize,
    secret: Option<Secret>,
    owners: &[&DynamicObject],
) -> Option<String> {
    let Some(secret) = secret else {
        return Some("is missing".to_owned());
    };
    let there = secret.metadata.owner_references.iter().flatten();
    let there: BTreeSet<&String> = there.map(|owner| &owner.uid).collect();
    for owner in owners {
        if !owner
            .metadata
            .uid
            .as_ref()
            .is_some_and(|uid| there.contains(uid))
        {
            return Some(format!(
                "is not owned by pod status {:?}",
                owner.metadata.name
            ));
        }
    }
    let name = CLASSES.get(class).copied().unwrap_or_default();
    let latest = world.store.latest_number(class);
    let spec = world.editions.now(class)?;
    let extra = spec.has_extra.then_some((EXTRA_KEY, EXTRA));
    let values = KEYS.into_iter().chain(extra);
    let values = values.map(|(key, object)| (key, content(name, object, latest)));
    let edition = (EDITION_KEY, content(name, EDITION, spec.edition));
    let mut data = secret.data.unwrap_or_default();
    for (key, expected) in values.chain([edition]) {
        let value = data.remove(key);
        if value.is_none_or(|value| value.0 != expected.into_bytes()) {
            return Some(format!(
                "has not contents number {latest} and {spec:?} in {key}"
            ));
        }
    }
    let more: Vec<&String> = data.keys().collect();
    (!more.is_empty()).then(|| format!("has keys that its class does not declare: {more:?}"))
}

/// Returns what is wrong with the statuses of the pods that run, and those of pods that are gone.
fn wrong_statuses(world: &World, pods: &[Watched], statuses: &[DynamicObject]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut expected = BTreeSet::new();
    for pod in pods {
        for class in &pod.classes {
            let name = status_name(world, pod, *class);
            if pod.ready {
                let found = statuses
                    .iter()
                    .find(|status| status.metadata.name.as_deref() == Some(&name));
                if let Some(how) = wrong_status(world, pod, *class, found) {
                    wrong.push(format!("pod status {name} {how}"));
                }
            }
            expected.insert(name);
        }
    }
    for status in statuses {
        let name = status.metadata.name.clone().unwrap_or_default();
        if !expected.contains(&name) {
            wrong.push(format!("pod status {name} is of a pod that is gone"));
        }
    }
    wrong
}

fn wrong_status(
    world: &World,
    pod: &Watched,
    class: usize,
    status: Option<&DynamicObject>,
) -> Option<String> {
    let Some(status) = status else {
        return Some("is missing".to_owned());
    };
    let owners = status.metadata.owner_references.iter().flatten();
    if !owners.into_iter().any(|owner| owner.uid == pod.uid) {
        return Some("is not owned by its pod".to_owned());
    }
    let state = &status.data["status"];
    if state["mounted"] != true {
        return Some("does not say that it is mounted".to_owned());
    }
    let annotations = status.metadata.annotations.iter().flatten();
    if let Some((trouble, since)) = annotations
        .into_iter()
        .find(|(name, _)| TROUBLE.contains(&name.as_str()))
    {
        return Some(format!("still has {trouble}: {since}"));
    }
    let class_name = CLASSES.get(class).copied().unwrap_or_default();
    let latest = format!("g{}", world.store.latest_number(class));
    for (object, _) in OBJECTS {
        let id = format!("secret/{class_name}-{object}");
        let objects = state["objects"].as_array();
        let version = objects
            .into_iter()
            .flatten()
            .find(|object| object["id"] == id.as_str())
            .map(|object| &object["version"]);
        if version != Some(&Value::from(latest.as_str())) {
            let version = version.cloned().unwrap_or_default();
            return Some(format!("has version {version} of {id} instead of {latest}"));
        }
    }
    let who = format!("secret/{class_name}-{WHO}");
    let mut ids = state["objects"].as_array().into_iter().flatten();
    (!ids.any(|object| object["id"] == who.as_str())).then(|| format!("does not have {who}"))
}

/// The time in which the driver posts an event that the API server has refused before. Its attempts at that
/// are the longer apart the more there were.
const TOLD: Duration = Duration::from_secs(80);

/// Returns the failures of which a person can find no trace: no warning among the pod's events, or, if the
/// driver has started anew since, neither that nor a line of its log that names the pod. Forgets all failures
/// so far.
///
/// # Errors
/// When the API server or a node does not answer.
pub(in super::super) async fn untraced<G: Ground>(
    world: &World,
    ground: &G,
) -> Result<Vec<String>> {
    let failures = std::mem::take(&mut *lock(&world.failures));
    let begun = world.now();
    let mut told = told(world, ground).await?;
    let mut untraced = Vec::new();
    for (uid, failure) in failures {
        world.log.checked("failures with a trace", 1);
        let Failure {
            pod,
            node,
            what,
            began,
        } = failure;
        let has_to_tell = || world.driver_ran_since(&node, began) && !world.log.is_over();
        while !told.contains(&uid) && has_to_tell() && world.now() - begun < TOLD {
            tokio::time::sleep(Duration::from_secs(1)).await;
            told = self::told(world, ground).await?;
        }
        if told.contains(&uid) {
            continue;
        }
        if has_to_tell() && still_there(world, ground, &pod, &uid).await? {
            untraced.push(format!("no event tells of pod {pod} ({uid}): {what}"));
            continue;
        }
        let log = ground.cluster().log(&node, &Component::Driver).await?;
        let is_logged = log
            .lines()
            .any(|line| (line.contains("WARN") || line.contains("ERROR")) && line.contains(&pod));
        if !is_logged && still_there(world, ground, &pod, &uid).await? {
            untraced.push(format!("pod {pod} ({uid}): {what}"));
        }
    }
    Ok(untraced)
}

/// Returns the UIDs of the pods that have a warning among their events.
async fn told<G: Ground>(world: &World, ground: &G) -> Result<BTreeSet<String>> {
    let events = Api::<Event>::namespaced(ground.cluster().client(), &world.namespace);
    let events = events.list(&ListParams::default()).await;
    let events = events.map_err(api("list events".to_owned()))?.items;
    let warnings = events
        .into_iter()
        .filter(|event| event.type_.as_deref() == Some("Warning"));
    Ok(warnings
        .filter_map(|event| event.involved_object.uid)
        .collect())
}

/// Returns whether somebody could still ask for the trace: the pod is there.
async fn still_there<G: Ground>(world: &World, ground: &G, pod: &str, uid: &str) -> Result<bool> {
    let pods = Api::<Pod>::namespaced(ground.cluster().client(), &world.namespace);
    let found = pods.get_opt(pod).await;
    let found = found.map_err(api(format!("get pod {pod}")))?;
    Ok(found.is_some_and(|found| found.metadata.uid.as_deref() == Some(uid)))
}
