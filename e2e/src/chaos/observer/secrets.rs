//! Watches the synced Secrets: each version that the API server has is judged by the history of the
//! store.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::runtime::watcher::{self, Event, watcher};
use serde_json::json;

use super::super::actor::ALTERED;
use super::super::lock;
use super::super::store::{CLASSES, number_of};
use super::super::tenants::{
    EDITION, EDITION_KEY, EXTRA_KEY, KEYS, LABEL, ORDER, OWNER, SET, is_of_set,
};
use super::super::world::{Watched, World};
use super::calm::status_name;
use crate::install::pod_statuses;

/// The time after which a version is judged, and not while somebody writes by hand, who tells so after
/// it. A pod that became ready is judged after the same time: this process may hear of its Secret later.
pub(super) const LATER: Duration = Duration::from_millis(1_500);

/// The time for which content that another call has read before may come after newer one, without a fault.
const OVERTAKEN: Duration = Duration::from_secs(1);

/// The time from the reading of files until their content is in a Secret.
const FROM_FILES: Duration = Duration::from_secs(10);

/// A version of the Secret of a class.
struct Version {
    class: usize,
    secret: Secret,
    seen: Instant,
    /// The pods that ran when it was seen.
    running: BTreeMap<String, String>,
}

/// What the version before had.
#[derive(Default)]
struct Last {
    generation: u64,
    /// The order of the content; none after a change by hand.
    order: Option<u64>,
    /// The names and UIDs of the owners.
    owners: BTreeSet<(String, String)>,
}

/// Watches until it is dropped.
pub(super) async fn watch(world: Arc<World>, client: kube::Client) {
    let secrets = Api::<Secret>::namespaced(client.clone(), &world.namespace);
    let mut events = watcher(secrets, watcher::Config::default()).boxed();
    let mut waiting: VecDeque<Version> = VecDeque::new();
    // The last version of each Secret, by UID.
    let mut last = BTreeMap::new();
    loop {
        let first = waiting.front().map(|version| version.seen + LATER);
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(Event::Apply(secret) | Event::InitApply(secret))) => {
                    if let Some(class) = class_of(&secret) {
                        world.secret_is_there(class, true);
                        let (seen, running) = (Instant::now(), running(&world, class));
                        waiting.push_back(Version { class, secret, seen, running });
                    }
                }
                Some(Ok(Event::Delete(secret))) => {
                    if let Some(class) = class_of(&secret) {
                        world.secret_is_there(class, false);
                    }
                }
                Some(_) => {}
                None => return,
            },
            () = tokio::time::sleep_until(first.unwrap_or_else(Instant::now).into()), if first.is_some() => {
                if world.is_writing_by_hand() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                } else if let Some(version) = waiting.pop_front() {
                    let uid = version.secret.metadata.uid.clone().unwrap_or_default();
                    let last = last.entry(uid).or_default();
                    judge_owners(&world, &client, &version, last).await;
                    judge(&world, &version, last);
                }
            }
        }
    }
}

/// Returns the UIDs of the pods that run with a class, by the names of the owners that they give its Secrets: their
/// statuses, or what controls them.
fn running(world: &World, class: usize) -> BTreeMap<String, String> {
    let pods = lock(&world.pods);
    let running = pods
        .values()
        .filter(|pod| pod.ready && pod.classes.contains(&class));
    running
        .map(|pod| match is_of_set(&pod.name) {
            true => (SET.to_owned(), world.set.clone()),
            false => (status_name(world, pod, class), pod.uid.clone()),
        })
        .collect()
}

/// Checks that no owner has gone whose pod runs: with the others the Secret would go.
async fn judge_owners(world: &World, client: &kube::Client, version: &Version, last: &mut Last) {
    let owners = version.secret.metadata.owner_references.iter().flatten();
    let owners: BTreeSet<_> = owners
        .map(|owner| (owner.name.clone(), owner.uid.clone()))
        .collect();
    let before = std::mem::replace(&mut last.owners, owners.clone());
    let still = running(world, version.class);
    for (name, uid) in before.difference(&owners) {
        let runs = version.running.get(name);
        if runs.is_none() || runs != still.get(name) {
            continue;
        }
        // A status that somebody deleted is another one now.
        let statuses = pod_statuses(client, &world.namespace);
        let status = statuses.get_opt(name).await.ok().flatten();
        let is_there = status.is_some_and(|status| status.metadata.uid.as_ref() == Some(uid));
        if is_there || *uid == world.set {
            let class = CLASSES.get(version.class).copied().unwrap_or_default();
            let text = format!("Secret {class} has lost its owner {name} ({uid})");
            world
                .log
                .find("a Secret keeps the owners whose pods run", text);
        }
    }
}

/// Returns the class whose Secret it is.
fn class_of(secret: &Secret) -> Option<usize> {
    let name = secret.metadata.name.as_deref()?;
    CLASSES.iter().position(|class| *class == name)
}

/// Checks that the Secrets of a pod that became ready have been there since it was created, where its
/// publish had to fail without them.
pub(super) fn judge_ready(world: &World, pod: &Watched) {
    // Whoever is told of a Secret that is not there any more writes none.
    if !world.has_secrets_first || world.lied_since(pod.created) {
        return;
    }
    world
        .log
        .checked("pods that became ready, for their Secrets", 1);
    for class in &pod.classes {
        if !world.secret_was_there_since(*class, pod.created) {
            let name = CLASSES.get(*class).copied().unwrap_or_default();
            let text = format!("pod {} ({}) has had no Secret {name}", pod.name, pod.uid);
            world
                .log
                .find("with --sync-errors=fail, a ready pod has its Secrets", text);
        }
    }
}

/// Checks that a pod that has just become ready, without a fault since it was created, has an environment
/// that is as new as the store then was: a publish writes the Secrets before it is answered.
pub(super) async fn judge_environment(world: &World, secrets: &Api<Secret>, pod: &Watched) {
    for class in &pod.classes {
        let name = CLASSES.get(*class).copied().unwrap_or_default();
        let Ok(Some(secret)) = secrets.get_opt(name).await else {
            continue;
        };
        let data = secret.data.unwrap_or_default();
        if world.is_writing_by_hand() || world.is_by_hand(&json!(data)) {
            continue;
        }
        world.log.checked("environments of pods that began", 1);
        let (key, object) = KEYS[0];
        let Some(value) = data.get(key) else {
            continue;
        };
        let number = number_of(name, object, &String::from_utf8_lossy(&value.0));
        // A call for another pod may have read the store before, and its content may come after.
        let before = pod.created.checked_sub(OVERTAKEN).unwrap_or(pod.created);
        let expected = world.store.at(*class, before);
        if let Ok(number) = number
            && let generation = world.store.generation(*class, number, expected)
            && generation < expected
        {
            let text = format!(
                "pod {} ({}) began with generation {generation} in Secret {name}, and the store had \
                 {expected} before the pod was created",
                pod.name, pod.uid
            );
            world
                .log
                .find("a pod begins with Secrets of its content", text);
        }
    }
}

/// Returns what a Secret has no more that somebody has added.
fn lost_addition(secret: &Secret) -> Option<&'static str> {
    let (label, value) = LABEL;
    let labels = secret.metadata.labels.as_ref();
    let has_label = labels.is_some_and(|all| all.get(label).is_some_and(|found| found == value));
    let mut owners = secret.metadata.owner_references.iter().flatten();
    let has_owner = owners.any(|owner| owner.name == OWNER);
    let lost = [(has_label, "its label"), (has_owner, "its owner")];
    lost.into_iter()
        .find_map(|(has, what)| (!has).then_some(what))
}

fn judge(world: &World, version: &Version, last: &mut Last) {
    let (class, secret, seen) = (version.class, &version.secret, version.seen);
    let name = CLASSES.get(class).copied().unwrap_or_default();
    let data = secret.data.clone().unwrap_or_default();
    if world.is_adorned(secret) {
        world
            .log
            .checked("versions of a Secret with additions of others", 1);
        if let Some(lost) = lost_addition(secret) {
            let text = format!("Secret {name} has lost {lost}");
            world.log.find("a Secret keeps what others add to it", text);
        }
    }
    // It stays until the driver restores it; who adds an owner meanwhile writes it again.
    if world.is_by_hand(&json!(data)) {
        last.order = None;
        return;
    }
    world.log.checked("versions of a Secret", 1);
    let annotations = secret.metadata.annotations.as_ref();
    let order = annotations.and_then(|all| all.get(ORDER)?.parse().ok());
    if order < last.order {
        let text = format!("Secret {name} has order {order:?} after {:?}", last.order);
        world
            .log
            .find("no Secret goes back in the order of its contents", text);
    }
    last.order = order;
    let mut numbers = BTreeMap::new();
    for (key, object) in KEYS
        .iter()
        .chain(&[(EXTRA_KEY, super::super::store::EXTRA)])
        .chain(&[(EDITION_KEY, EDITION)])
    {
        let Some(value) = data.get(*key) else {
            // The extra key is declared only by an edited class.
            if *key != EXTRA_KEY {
                let text = format!("Secret {name} has no {key}");
                world.log.find("a Secret has every declared key", text);
            }
            continue;
        };
        let text = String::from_utf8_lossy(&value.0);
        // A Secret has what the files have, and the refresh that puts these in order changes it, too.
        let lately = seen.checked_sub(FROM_FILES).unwrap_or(seen);
        if text == ALTERED && world.files_were_altered_since(lately) {
            continue;
        }
        match number_of(name, object, &text) {
            // It is of the class, not of the store.
            Ok(_) if *key == EDITION_KEY => {}
            Ok(number) => {
                numbers.insert(number, *key);
            }
            Err(what) => {
                let text = format!("Secret {name}: {key} {what}");
                world.log.find("each value of a Secret is whole", text);
            }
        }
    }
    if numbers.len() > 1 {
        let text = format!("Secret {name} has contents of numbers {numbers:?}");
        world.log.find("no Secret is mixed", text);
    }
    let Some((number, _)) = numbers.last_key_value() else {
        return;
    };
    let before = &mut last.generation;
    let generation = world.store.generation(class, *number, *before);
    // Of two contents, the one whose pod status was written later counts as newer, even if it was
    // fetched earlier (docs/secrets.md). So a Secret may return to a content that a provider read
    // shortly before; a content that the store replaced long before may not come back.
    let replaced = world.store.replaced_for(class, generation);
    let replaced = replaced.saturating_sub(seen.elapsed());
    if generation < *before && replaced > world.bounds.fetch {
        let text = format!(
            "Secret {name} has generation {generation} after {before}, which the store replaced \
             {replaced:.1?} before"
        );
        world.log.find("no Secret goes back in time", text);
    }
    *before = generation;
}
