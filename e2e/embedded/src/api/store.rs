//! The stored objects: collections under one lock and one revision counter, each with a history from
//! which watches read.
//!
//! Stored objects are immutable. A write names the stored object that it replaces, and fails when
//! that is no longer the current one; no lock is held while a request is processed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
};

use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use super::{body::items, resources::Resource, status::Status};

/// The number of changes in a history. A watch that starts before them gets `410 Expired`.
const HISTORY: usize = 8192;

/// The objects of all kinds.
pub(super) struct Store {
    state: Mutex<State>,
    chores: mpsc::UnboundedSender<Chore>,
    /// Changes each object that a client writes.
    webhook: Mutex<Option<Arc<Webhook>>>,
}

pub(super) type Webhook = dyn Fn(&str, &mut Value) + Send + Sync;

struct State {
    revision: u64,
    collections: BTreeMap<String, Collection>,
    /// Every object by uid.
    uids: HashMap<String, ObjectKey>,
    /// Objects by the uid of each of their owners.
    dependents: HashMap<String, BTreeSet<ObjectKey>>,
}

/// One kind's objects.
struct Collection {
    resource: Arc<Resource>,
    /// By namespace (empty for cluster-scoped kinds), then name.
    objects: BTreeMap<String, BTreeMap<String, Arc<Value>>>,
    history: VecDeque<Change>,
    /// The revision of the latest change that was dropped from the history.
    forgotten: u64,
    latest: watch::Sender<u64>,
}

/// The place of an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ObjectKey {
    /// [`Resource::qualified`].
    pub(super) resource: String,
    /// Empty for cluster-scoped kinds.
    pub(super) namespace: String,
    pub(super) name: String,
}

/// One step in a collection's history.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) revision: u64,
    /// The state before.
    pub(super) old: Option<Arc<Value>>,
    /// The state after; for a deletion, the last state with the revision of the deletion.
    pub(super) new: Arc<Value>,
    pub(super) deleted: bool,
}

/// Follow-up work for the collector.
#[derive(Debug, PartialEq)]
pub(super) enum Chore {
    /// An object with owners was written.
    CheckOwners(ObjectKey),
    /// An object with this uid, which others name as owner, is gone.
    OwnerGone(String),
    /// Something happened in a namespace that is being deleted.
    DrainNamespace(String),
}

/// The failure of a write because the object changed after it was read.
#[derive(Debug, PartialEq)]
pub(super) struct Raced;

impl ObjectKey {
    /// Returns the place of an object by its metadata.
    pub(super) fn of(resource: &Resource, object: &Value) -> ObjectKey {
        let text = |name: &str| {
            object["metadata"][name]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        ObjectKey {
            resource: resource.qualified.clone(),
            namespace: if resource.namespaced {
                text("namespace")
            } else {
                String::new()
            },
            name: text("name"),
        }
    }
}

impl Store {
    /// Returns an empty store of the built-in kinds, and the chores that its writes cause.
    pub(super) fn new() -> (Store, mpsc::UnboundedReceiver<Chore>) {
        let (chores, receiver) = mpsc::unbounded_channel();
        let collections = Resource::built_in()
            .map(|resource| {
                (
                    resource.qualified.clone(),
                    Collection::new(Arc::new(resource)),
                )
            })
            .collect();
        let state = Mutex::new(State {
            // Revision 0 means "any" to clients, and etcd starts at 1, too.
            revision: 1,
            collections,
            uids: HashMap::new(),
            dependents: HashMap::new(),
        });
        let webhook = Mutex::default();
        let store = Store {
            state,
            chores,
            webhook,
        };
        (store, receiver)
    }

    pub(super) fn set_webhook(&self, webhook: Arc<Webhook>) {
        *crate::lock(&self.webhook) = Some(webhook);
    }

    /// Lets the webhook, if there is one, change an object that a client writes.
    pub(super) fn admit(&self, resource: &Resource, object: &mut Value) {
        let webhook = crate::lock(&self.webhook).clone();
        if let Some(webhook) = webhook {
            webhook(&resource.qualified, object);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        crate::lock(&self.state)
    }

    /// Returns a kind by its qualified name.
    pub(super) fn resource(&self, qualified: &str) -> Option<Arc<Resource>> {
        let state = self.lock();
        state
            .collections
            .get(qualified)
            .map(|collection| collection.resource.clone())
    }

    /// Returns all kinds, in the order of their qualified names.
    pub(super) fn resources(&self) -> Vec<Arc<Resource>> {
        let state = self.lock();
        state
            .collections
            .values()
            .map(|collection| collection.resource.clone())
            .collect()
    }

    /// Serves a custom kind, or its new definition.
    pub(super) fn serve(&self, resource: Resource) {
        let mut state = self.lock();
        let resource = Arc::new(resource);
        match state.collections.get_mut(&resource.qualified) {
            Some(collection) => collection.resource = resource,
            None => {
                state
                    .collections
                    .insert(resource.qualified.clone(), Collection::new(resource));
            }
        }
    }

    /// Stops serving a kind whose objects are gone. Its watches end.
    pub(super) fn unserve(&self, qualified: &str) {
        self.lock().collections.remove(qualified);
    }

    pub(super) fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Arc<Value>> {
        let state = self.lock();
        state
            .collections
            .get(resource)?
            .get(namespace, name)
            .cloned()
    }

    /// Returns the objects of one namespace or of all, sorted, and the current revision.
    pub(super) fn list(&self, resource: &str, namespace: Option<&str>) -> (u64, Vec<Arc<Value>>) {
        let state = self.lock();
        let objects = match state.collections.get(resource) {
            None => Vec::new(),
            Some(collection) => collection.list(namespace),
        };
        (state.revision, objects)
    }

    /// Returns whether an owner with this uid exists for objects in `namespace`.
    pub(super) fn lives(&self, uid: &str, namespace: &str) -> bool {
        let state = self.lock();
        state
            .uids
            .get(uid)
            .is_some_and(|key| key.namespace.is_empty() || key.namespace == namespace)
    }

    pub(super) fn dependents(&self, uid: &str) -> Vec<ObjectKey> {
        let state = self.lock();
        state
            .dependents
            .get(uid)
            .into_iter()
            .flatten()
            .cloned()
            .collect()
    }

    /// Stores a new object under a new revision.
    ///
    /// # Errors
    /// Returns an error when the namespace is missing or being deleted, or the name is taken.
    pub(super) fn insert(&self, resource: &Resource, object: Value) -> Result<Arc<Value>, Status> {
        let key = ObjectKey::of(resource, &object);
        let mut state = self.lock();
        if resource.namespaced {
            let namespaces = state.collections.get("namespaces");
            let Some(namespace) =
                namespaces.and_then(|namespaces| namespaces.get("", &key.namespace))
            else {
                let kind = namespaces.map(|collection| collection.resource.clone());
                return Err(kind.map_or_else(Status::no_such_resource, |kind| {
                    Status::not_found(&kind, &key.namespace)
                }));
            };
            if !namespace["metadata"]["deletionTimestamp"].is_null() {
                return Err(Status::namespace_terminating(
                    resource,
                    &key.name,
                    &key.namespace,
                ));
            }
        }
        let Some(collection) = state.collections.get(&key.resource) else {
            return Err(Status::no_such_resource());
        };
        if collection.get(&key.namespace, &key.name).is_some() {
            return Err(Status::already_exists(resource, &key.name));
        }
        Ok(self.commit(&mut state, key, None, object, false))
    }

    /// Replaces the current object, which must still be `current`, under a new revision.
    pub(super) fn replace(
        &self,
        key: &ObjectKey,
        current: &Arc<Value>,
        object: Value,
    ) -> Result<Arc<Value>, Raced> {
        let mut state = self.lock();
        state.expect(key, current)?;
        Ok(self.commit(
            &mut state,
            key.clone(),
            Some(current.clone()),
            object,
            false,
        ))
    }

    /// Removes the current object, which must still be `current`, and returns its last state.
    pub(super) fn remove(
        &self,
        key: &ObjectKey,
        current: &Arc<Value>,
    ) -> Result<Arc<Value>, Raced> {
        let mut state = self.lock();
        state.expect(key, current)?;
        let last = Value::clone(current);
        Ok(self.commit(&mut state, key.clone(), Some(current.clone()), last, true))
    }

    fn commit(
        &self,
        state: &mut State,
        key: ObjectKey,
        old: Option<Arc<Value>>,
        mut object: Value,
        deleted: bool,
    ) -> Arc<Value> {
        let version = (state.revision + 1).to_string();
        object["metadata"]["resourceVersion"] = json!(version);
        self.save(state, key, old, object, deleted)
    }

    /// Stores an object exactly as it is. It replaces any other.
    pub(super) fn place(&self, key: ObjectKey, object: Value) {
        let mut state = self.lock();
        let collection = state.collections.get(&key.resource);
        let old = collection.and_then(|collection| collection.get(&key.namespace, &key.name));
        let old = old.cloned();
        self.save(&mut state, key, old, object, false);
    }

    fn save(
        &self,
        state: &mut State,
        key: ObjectKey,
        old: Option<Arc<Value>>,
        object: Value,
        deleted: bool,
    ) -> Arc<Value> {
        state.revision += 1;
        let revision = state.revision;
        let object = Arc::new(object);
        self.index(state, &key, old.as_deref(), &object, deleted);
        if let Some(collection) = state.collections.get_mut(&key.resource) {
            let names = collection.objects.entry(key.namespace).or_default();
            if deleted {
                names.remove(&key.name);
            } else {
                names.insert(key.name, object.clone());
            }
            collection.record(Change {
                revision,
                old,
                new: object.clone(),
                deleted,
            });
        }
        object
    }

    /// Updates the indexes of uids and owners, and hands out the chores that a write causes.
    fn index(
        &self,
        state: &mut State,
        key: &ObjectKey,
        old: Option<&Value>,
        new: &Value,
        deleted: bool,
    ) {
        let references = |object: &Value| object["metadata"]["ownerReferences"].clone();
        let (before, after) = (
            old.map(references).unwrap_or_default(),
            if deleted {
                Value::Null
            } else {
                references(new)
            },
        );
        let uid = new["metadata"]["uid"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        if before != after {
            for owner in owner_uids(&before) {
                if let Some(keys) = state.dependents.get_mut(owner) {
                    keys.remove(key);
                    if keys.is_empty() {
                        state.dependents.remove(owner);
                    }
                }
            }
            for owner in owner_uids(&after) {
                state
                    .dependents
                    .entry(owner.to_owned())
                    .or_default()
                    .insert(key.clone());
            }
            if owner_uids(&after).next().is_some() {
                self.hand_out(Chore::CheckOwners(key.clone()));
            }
        }
        if deleted {
            state.uids.remove(&uid);
            if state.dependents.contains_key(&uid) {
                self.hand_out(Chore::OwnerGone(uid));
            }
            let namespace = state
                .collections
                .get("namespaces")
                .and_then(|all| all.get("", &key.namespace));
            if namespace
                .is_some_and(|namespace| !namespace["metadata"]["deletionTimestamp"].is_null())
            {
                self.hand_out(Chore::DrainNamespace(key.namespace.clone()));
            }
        } else if old.is_none() {
            state.uids.insert(uid, key.clone());
        } else if key.resource == "namespaces" && !new["metadata"]["deletionTimestamp"].is_null() {
            self.hand_out(Chore::DrainNamespace(key.name.clone()));
        }
    }

    fn hand_out(&self, chore: Chore) {
        // Sending fails only when the collector was stopped.
        let _ = self.chores.send(chore);
    }

    /// Returns a channel with every later change of a kind. It closes when the kind is not served.
    pub(super) fn announcements(&self, resource: &str) -> Option<watch::Receiver<u64>> {
        let state = self.lock();
        state
            .collections
            .get(resource)
            .map(|collection| collection.latest.subscribe())
    }

    /// Returns the current revision and the changes after `revision`, oldest first.
    ///
    /// # Errors
    /// Returns 410 when some of them were dropped.
    pub(super) fn changes_since(
        &self,
        resource: &str,
        revision: u64,
    ) -> Result<(u64, Vec<Change>), Status> {
        let state = self.lock();
        let Some(collection) = state.collections.get(resource) else {
            return Ok((state.revision, Vec::new()));
        };
        if revision < collection.forgotten {
            return Err(Status::expired(revision, collection.forgotten));
        }
        let start = collection
            .history
            .partition_point(|change| change.revision <= revision);
        Ok((
            state.revision,
            collection.history.range(start..).cloned().collect(),
        ))
    }
}

impl State {
    fn expect(&self, key: &ObjectKey, current: &Arc<Value>) -> Result<(), Raced> {
        let found = self
            .collections
            .get(&key.resource)
            .and_then(|collection| collection.get(&key.namespace, &key.name));
        match found {
            Some(found) if Arc::ptr_eq(found, current) => Ok(()),
            _ => Err(Raced),
        }
    }
}

impl Collection {
    fn new(resource: Arc<Resource>) -> Collection {
        Collection {
            resource,
            objects: BTreeMap::new(),
            history: VecDeque::new(),
            forgotten: 0,
            latest: watch::Sender::new(0),
        }
    }

    fn get(&self, namespace: &str, name: &str) -> Option<&Arc<Value>> {
        self.objects.get(namespace)?.get(name)
    }

    fn list(&self, namespace: Option<&str>) -> Vec<Arc<Value>> {
        match namespace {
            Some(namespace) => self
                .objects
                .get(namespace)
                .map(|names| names.values().cloned().collect()),
            None => Some(
                self.objects
                    .values()
                    .flat_map(BTreeMap::values)
                    .cloned()
                    .collect(),
            ),
        }
        .unwrap_or_default()
    }

    fn record(&mut self, change: Change) {
        let revision = change.revision;
        if self.history.len() == HISTORY
            && let Some(oldest) = self.history.pop_front()
        {
            self.forgotten = oldest.revision;
        }
        self.history.push_back(change);
        self.latest.send_replace(revision);
    }
}

fn owner_uids(references: &Value) -> impl Iterator<Item = &str> {
    items(references).filter_map(|reference| reference["uid"].as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(name: &str) -> Value {
        json!({"metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")}})
    }

    #[test]
    fn the_history_forgets_and_says_so() {
        let (store, _chores) = Store::new();
        let namespaces = store.resource("namespaces").unwrap();
        store
            .insert(&namespaces, json!({"metadata": {"name": "default"}}))
            .unwrap();
        let secrets = store.resource("secrets").unwrap();
        let key = ObjectKey::of(&secrets, &secret("a"));
        let mut current = store.insert(&secrets, secret("a")).unwrap();
        let (first, _) = store.list("secrets", None);
        for _ in 0..HISTORY {
            current = store.replace(&key, &current, secret("a")).unwrap();
        }
        let (revision, changes) = store.changes_since("secrets", first).unwrap();
        assert_eq!((revision, changes.len()), (first + HISTORY as u64, HISTORY));
        assert_eq!(
            store.changes_since("secrets", first - 1).unwrap_err().code,
            410
        );
    }

    #[test]
    fn a_writer_who_read_an_older_object_is_told() {
        let (store, _chores) = Store::new();
        let namespaces = store.resource("namespaces").unwrap();
        let object = json!({"metadata": {"name": "default"}});
        let key = ObjectKey::of(&namespaces, &object);
        let first = store.insert(&namespaces, object.clone()).unwrap();
        store.replace(&key, &first, object.clone()).unwrap();
        assert_eq!(store.replace(&key, &first, object), Err(Raced));
        assert_eq!(store.remove(&key, &first), Err(Raced));
    }
}
