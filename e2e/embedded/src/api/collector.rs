//! The garbage collector and the namespace controller: objects whose owners are all gone are deleted,
//! and a namespace that is being deleted is emptied and then removed.
//!
//! `propagationPolicy` is treated as `Background`, whatever it says.

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;

use super::{
    body::Target,
    deletion::DeleteOptions,
    objects::text,
    store::{Chore, ObjectKey, Store},
};

/// The delay between a cause and its effect: real controllers are never immediate, either.
const DELAY: Duration = Duration::from_millis(10);

/// Does the chores until the store is gone.
pub(super) async fn run(store: Arc<Store>, mut chores: mpsc::UnboundedReceiver<Chore>) {
    let mut batch = Vec::new();
    while chores.recv_many(&mut batch, 256).await > 0 {
        tokio::time::sleep(DELAY).await;
        for chore in batch.drain(..) {
            match chore {
                Chore::CheckOwners(key) => check_owners(&store, &key),
                Chore::OwnerGone(uid) => {
                    for key in store.dependents(&uid) {
                        check_owners(&store, &key);
                    }
                }
                Chore::DrainNamespace(name) => drain_namespace(&store, &name),
            }
            tokio::task::yield_now().await;
        }
    }
}

/// Deletes the object if no owner exists; otherwise drops the references to owners that do not.
fn check_owners(store: &Store, key: &ObjectKey) {
    let Some(object) = store.get(&key.resource, &key.namespace, &key.name) else {
        return;
    };
    let owners = object["metadata"]["ownerReferences"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    let lives = |uid: &serde_json::Value| {
        uid.as_str()
            .is_some_and(|uid| store.lives(uid, &key.namespace))
    };
    let living = owners.iter().filter(|owner| lives(&owner["uid"])).count();
    if living == owners.len() {
        return;
    }
    if living > 0 {
        store.retain_owners(key, |owner| lives(&owner["uid"]));
        return;
    }
    let options = DeleteOptions {
        uid: Some(text(&object, "uid").to_owned()),
        resource_version: Some(text(&object, "resourceVersion").to_owned()),
        ..DeleteOptions::default()
    };
    if let Some(resource) = store.resource(&key.resource)
        && let Err(status) =
            store.delete(&Target::of(resource, &key.namespace, &key.name), &options)
        && status.code == 409
    {
        // It was written meanwhile, perhaps with an owner that exists: check again.
        check_owners(store, key);
    }
}

fn drain_namespace(store: &Store, name: &str) {
    let Some(namespace) = store.get("namespaces", "", name) else {
        return;
    };
    let mut empty = true;
    for resource in store
        .resources()
        .into_iter()
        .filter(|resource| resource.namespaced)
    {
        let (_, objects) = store.list(&resource.qualified, Some(name));
        for object in objects {
            let target = Target::of(resource.clone(), name, text(&object, "name"));
            let waits = match text(&object, "deletionTimestamp") {
                "" => store
                    .delete(&target, &DeleteOptions::default())
                    .is_ok_and(|deleted| !deleted.gone),
                _ => true,
            };
            empty &= !waits;
        }
    }
    if empty && let Some(resource) = store.resource("namespaces") {
        // Raced means that the namespace was written, which causes this chore again.
        let _ = store.remove(&ObjectKey::of(&resource, &namespace), &namespace);
    }
}
