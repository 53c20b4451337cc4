//! Checks that the Secrets follow the store in time, as the volumes do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::Api;

use super::super::lock;
use super::super::store::{CLASSES, number_of};
use super::super::tenants::KEYS;
use super::super::world::World;

/// The pause between two looks at all Secrets.
const PAUSE: Duration = Duration::from_millis(500);
/// The time from the content of a volume to that of its Secret, beyond what a volume may take.
const SYNCED: Duration = Duration::from_secs(2);

/// Looks until it is dropped.
pub(super) async fn watch(world: Arc<World>, client: kube::Client) {
    let secrets = Api::<Secret>::namespaced(client, &world.namespace);
    // Since when, by `World::now`, a Secret lacks the last generation.
    let mut stale = BTreeMap::new();
    loop {
        for (class, name) in CLASSES.iter().enumerate() {
            let latest = world.store.latest(class);
            let Ok(secret) = secrets.get_opt(name).await else {
                continue;
            };
            world.log.checked("looks at a Secret", 1);
            let is_fresh = secret.is_some_and(|secret| has(&world, &secret, class, latest));
            if is_fresh || !is_used(&world, class) {
                stale.remove(&class);
                continue;
            }
            let now = world.now();
            let since = *stale.entry(class).or_insert(now);
            let bound = world.bounds_since(since).follow + SYNCED;
            if world.is_calm_since(since) && now - since > bound {
                let text = format!("Secret {name} has not generation {latest}");
                world
                    .log
                    .find("a Secret follows its store within its bound", text);
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Returns whether a pod runs with a class, whose volume is refreshed.
fn is_used(world: &World, class: usize) -> bool {
    let pods = lock(&world.pods);
    let mut pods = pods.values();
    pods.any(|pod| pod.ready && pod.classes.contains(&class))
}

/// Returns whether a Secret has a generation of its class, or a later one.
fn has(world: &World, secret: &Secret, class: usize, latest: u64) -> bool {
    let name = CLASSES.get(class).copied().unwrap_or_default();
    KEYS.iter().all(|(key, object)| {
        let value = secret.data.as_ref().and_then(|data| data.get(*key));
        value.is_some_and(|value| {
            let text = String::from_utf8_lossy(&value.0);
            let number = number_of(name, object, &text);
            number.is_ok_and(|number| {
                let generation = world.store.generation(class, number, latest);
                (latest..=world.store.latest(class)).contains(&generation)
            })
        })
    })
}
