//! What has to be so when the faults are over: the state to which everything converges.

mod secrets;
mod statuses;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{DynamicObject, ListParams};

use crate::cluster::{Result, api};
use crate::install::pod_statuses;

use super::super::lock;
use super::super::store::{
    CERTIFICATE, CLASSES, CREDENTIAL, EXTRA, OBJECTS, WITH_CERTIFICATE, WITH_CREDENTIAL,
};
use super::super::tenants::{EDITION, SET, TLS_SECRET, WHO, credential, is_of_set, other_secret};
use super::super::world::{Watched, World};
use super::content::DATA;
use super::volumes::{is_mount, path_of};
use secrets::{wrong_certificate, wrong_secret};
use statuses::wrong_statuses;

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
            lacking.extend(lacks_credential(world, pod, *class));
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
        let owners = owners(world, &pods, class, &statuses);
        let other = other_secret(class);
        for (name, is_first) in [(name, true), (&other, false)] {
            let secret = secrets.get_opt(name).await;
            let secret = secret.map_err(api(format!("get Secret {name}")))?;
            if let Some(wrong) = wrong_secret(world, class, secret, &owners, is_first) {
                lacking.push(format!("Secret {name} {wrong}"));
            }
        }
        if class == WITH_CERTIFICATE {
            let secret = secrets.get_opt(TLS_SECRET).await;
            let secret = secret.map_err(api(format!("get Secret {TLS_SECRET}")))?;
            lacking.extend(wrong_certificate(world, secret));
        }
    }
    lacking.extend(wrong_statuses(world, &pods, &statuses));
    world.log.checked("looks at the state after faults", 1);
    Ok(lacking)
}

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
        let expected = names(world, *class);
        for entry in fs::read_dir(&volume).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let is_own = name.to_string_lossy().starts_with("..");
            let is_expected = match is_own {
                true => name == DATA || Path::new(&name) == present,
                false => expected.iter().any(|expected| name == **expected),
            };
            if !is_expected {
                let name = name.display();
                remains.push(format!("a volume of pod {} has {name}", pod.name));
            }
        }
    }
    remains
}

/// Returns the names that a program finds in a volume of a class.
fn names(world: &World, class: usize) -> Vec<&'static str> {
    let has_extra = world.editions.now(class).is_some_and(|spec| spec.has_extra);
    let files = OBJECTS.iter().map(|(_, file)| *file);
    let files = files
        .chain([WHO, EDITION])
        .chain(has_extra.then_some(EXTRA));
    let files = files.chain((class == WITH_CREDENTIAL).then_some(CREDENTIAL));
    let files = files.chain((class == WITH_CERTIFICATE).then_some(CERTIFICATE));
    files.filter_map(|file| file.split('/').next()).collect()
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

/// Returns what a volume lacks whose provider is given a credential.
fn lacks_credential(world: &World, pod: &Watched, class: usize) -> Option<String> {
    if class != WITH_CREDENTIAL || world.is_buried(&pod.uid) {
        return None;
    }
    let root = lock(&world.roots).get(&pod.node).cloned()?;
    let text = fs::read_to_string(path_of(pod, &root, class).join(CREDENTIAL)).unwrap_or_default();
    let number = world.credential.load(Ordering::SeqCst);
    let lacks = !text.contains(&credential(number));
    lacks.then(|| format!("pod {} has not been given credential {number}", pod.name))
}

/// Returns the names and UIDs of the owners of a class's Secrets: the statuses of the pods that run with it, or what
/// controls them. With the last of them, and not before, the Secrets go.
fn owners(
    world: &World,
    pods: &[Watched],
    class: usize,
    statuses: &[DynamicObject],
) -> BTreeSet<(String, String)> {
    let running = pods
        .iter()
        .filter(|pod| pod.ready && pod.classes.contains(&class));
    let owner = |pod: &Watched| {
        if is_of_set(&pod.name) {
            return Some((SET.to_owned(), world.set.clone()));
        }
        let name = status_name(world, pod, class);
        let is_its = |status: &&DynamicObject| status.metadata.name.as_ref() == Some(&name);
        let status = statuses.iter().find(is_its)?;
        Some((name.clone(), status.metadata.uid.clone()?))
    };
    running.filter_map(owner).collect()
}

/// Returns the name of the status of a pod's volume.
pub(super) fn status_name(world: &World, pod: &Watched, class: usize) -> String {
    let class = CLASSES.get(class).copied().unwrap_or_default();
    format!("{}-{}-{class}", pod.name, world.namespace)
}
