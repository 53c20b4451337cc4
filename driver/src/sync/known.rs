//! What is mounted on this node, in memory, and what of it is to be looked at when.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rand::Rng as _;
use tokio::{
    sync::{Mutex as Turn, Notify, OwnedMutexGuard},
    time::Instant,
};

use super::{Problem, Volume, content::Origin, newer::Newer};
use crate::{
    cluster::{
        Class,
        secrets::{Digest, Kept, PodOwners},
    },
    record::{self, Age},
};

/// The first wait after a failure; it doubles up to the usual interval.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait after a failure, where the interval is longer.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// In how many intervals a pod status is looked at once.
const STATUS_INTERVALS: u32 = 4;
/// How long a pod whose volume was taken down may take to say that it has ended, or to go.
const LEAVES_WITHIN: Duration = Duration::from_secs(10);

/// A mounted volume. Its class may make Secrets, or begin to.
#[derive(Clone)]
pub(super) struct Mounted {
    pub(super) volume: Volume,
    pub(super) class: String,
    /// Who its Secrets live with, once that is known.
    pub(super) holder: Option<PodOwners>,
    /// What its pod has been told of which Secret.
    told: BTreeMap<String, String>,
    /// When its pod status is looked at.
    status: Look,
}

/// Who works on a Secret, by its namespace and name.
type Turns = HashMap<(String, String), Arc<Turn<()>>>;

/// Namespace and name of a class.
type ClassKey = (String, String);

/// One Secret of one class.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SecretKey {
    pub(super) namespace: String,
    pub(super) class: String,
    pub(super) name: String,
}

/// Something to look at.
#[derive(Clone)]
pub(super) enum Task {
    /// Whether the class is still as it was.
    Class(String, String),
    /// Whether the Secret is still as it should be.
    Secret(SecretKey),
    /// Whether the pod status of a volume is still there.
    PodStatus(Box<Volume>),
    /// Whether the pod of a volume that was taken down has ended and lets go of its Secrets.
    Left(Box<Mounted>, Arc<Class>),
}

struct KnownClass {
    /// As it was last read; none when it is gone or has not been read yet.
    class: Option<Arc<Class>>,
    /// The newest state that a volume was mounted with before this driver ran. An answer that is
    /// older than this one is stale.
    recorded: Option<record::Class>,
    due: Instant,
    failures: u32,
}

#[derive(Clone)]
struct Look {
    due: Instant,
    failures: u32,
}

impl Look {
    /// The first look.
    fn after(first: Duration) -> Self {
        Self {
            due: Instant::now() + first,
            failures: 0,
        }
    }

    /// Sets when it is looked again.
    fn looked(&mut self, failed: bool, every: Duration) {
        self.failures = if failed { self.failures + 1 } else { 0 };
        self.due = Instant::now() + wait(self.failures, every);
    }
}

#[derive(Default)]
struct State {
    volumes: HashMap<String, Box<Mounted>>,
    classes: BTreeMap<ClassKey, KnownClass>,
    secrets: BTreeMap<SecretKey, Look>,
    /// Those of the Secrets that had other content, of a higher order, than any volume here.
    newer: BTreeMap<SecretKey, Newer>,
    /// What came out of which content for a Secret: the digest of its values, or a problem.
    made: BTreeMap<SecretKey, (Origin, Result<Digest, Problem>)>,
    left: Vec<(Instant, Box<Mounted>, Arc<Class>)>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Known {
    state: Mutex<State>,
    turns: Mutex<Turns>,
    /// Something may be due earlier than it seemed.
    pub(super) sooner: Notify,
}

impl Known {
    fn state(&self) -> MutexGuard<'_, State> {
        // Whoever panicked while holding it left every part of it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A volume has been mounted, or mounted anew. Returns the Secrets that its class made before
    /// and does not any more.
    pub(super) fn mounted(&self, volume: &Volume, class: &Class, every: Duration) -> Vec<String> {
        let mut state = self.state();
        let key = (volume.pod.namespace.clone(), class.identity.name.clone());
        let known = state.volumes.entry(volume.id.clone());
        let known = known.or_insert_with(|| {
            Box::new(Mounted {
                volume: volume.clone(),
                class: class.identity.name.clone(),
                holder: None,
                told: BTreeMap::new(),
                status: Look::after(wait(0, every * STATUS_INTERVALS)),
            })
        });
        if known.volume != *volume || known.class != class.identity.name {
            let before = known.class_key();
            known.volume = volume.clone();
            known.class.clone_from(&class.identity.name);
            known.holder = None;
            state.forget_class_without_volumes(&before);
        }
        // Its Secrets are about to be made, by whoever says that it is mounted.
        let released = state.class_is(&key, Some(class), every, every);
        drop(state);
        self.sooner.notify_one();
        released
    }

    /// A volume that was mounted before this driver ran: its class is looked at within one
    /// interval.
    pub(super) fn remembered(&self, volume: Volume, class: record::Class, every: Duration) {
        let mut state = self.state();
        let key = (volume.pod.namespace.clone(), class.name.clone());
        if state.volumes.contains_key(&volume.id) {
            return;
        }
        let known = state.classes.entry(key).or_insert_with(|| KnownClass {
            class: None,
            recorded: None,
            due: Instant::now() + every.mul_f64(rand::rng().random_range(0.0..1.0)),
            failures: 0,
        });
        let name = class.name.clone();
        if known
            .recorded
            .as_ref()
            .is_none_or(|before| class.age(before) == Age::Current)
        {
            known.recorded = Some(class);
        }
        state.volumes.insert(
            volume.id.clone(),
            Box::new(Mounted {
                volume,
                class: name,
                holder: None,
                told: BTreeMap::new(),
                status: Look::after(every.mul_f64(rand::rng().random_range(0.0..1.0))),
            }),
        );
    }

    /// A volume is gone.
    pub(super) fn forget(&self, volume_id: &str) {
        let mut state = self.state();
        let Some(mounted) = state.forget(volume_id) else {
            return;
        };
        let key = (mounted.volume.pod.namespace.clone(), mounted.class.clone());
        let class = state
            .classes
            .get(&key)
            .and_then(|known| known.class.clone());
        state.forget_class_without_volumes(&key);
        if let Some(class) = class.filter(|class| !class.secret_objects.is_empty()) {
            let due = Instant::now() + LEAVES_WITHIN;
            state.left.push((due, mounted, class));
        }
        drop(state);
        self.turns
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|_, turn| Arc::strong_count(turn) > 1);
        self.sooner.notify_one();
    }

    /// A class has been read; none: it is gone. Returns the Secrets that it made before and does
    /// not any more.
    pub(super) fn class_read(
        &self,
        namespace: &str,
        name: &str,
        class: Option<&Class>,
        every: Duration,
    ) -> Vec<String> {
        let key = (namespace.to_owned(), name.to_owned());
        let mut state = self.state();
        if !state.classes.contains_key(&key) {
            return Vec::new();
        }
        state.class_is(&key, class, every, Duration::ZERO)
    }

    /// The class could not be read.
    pub(super) fn class_not_read(&self, namespace: &str, name: &str, every: Duration) {
        let key = (namespace.to_owned(), name.to_owned());
        if let Some(known) = self.state().classes.get_mut(&key) {
            known.failures += 1;
            known.due = Instant::now() + wait(known.failures, every);
        }
    }

    /// A Secret has been looked at.
    pub(super) fn looked_at(
        &self,
        namespace: &str,
        class: &str,
        name: &str,
        failed: bool,
        every: Duration,
    ) {
        let key = SecretKey {
            namespace: namespace.to_owned(),
            class: class.to_owned(),
            name: name.to_owned(),
        };
        let mut state = self.state();
        if let Some(look) = state.secrets.get_mut(&key) {
            look.looked(failed, every);
        }
        drop(state);
        if failed {
            self.sooner.notify_one();
        }
    }

    /// What became of a Secret: whether it has other content of a higher order than that of the
    /// volumes here, or is missing.
    pub(super) fn secret_was(&self, key: &SecretKey, kept: Kept) {
        let mut state = self.state();
        let is_known = state.secrets.contains_key(key);
        match (kept, state.newer.get_mut(key)) {
            (Kept::Overtaken { order }, _) if is_known => {
                state.newer.insert(key.clone(), Newer::seen(order));
            }
            (Kept::Absent, Some(newer)) => newer.missing(),
            // Its content may still be the newer one, and only something else was written.
            (Kept::Updated, Some(newer)) => newer.written(),
            _ => drop(state.newer.remove(key)),
        }
    }

    /// Whether a Secret, if it is missing, is left to nodes with newer content. `order` is that of
    /// the content here.
    pub(super) fn is_left_to_others(
        &self,
        key: &SecretKey,
        order: Option<u64>,
        every: Duration,
    ) -> bool {
        let state = self.state();
        let newer = state.newer.get(key);
        newer.is_some_and(|newer| newer.leaves(order, every))
    }

    /// What came out for a Secret, of which content and class.
    pub(super) fn set_made(&self, key: SecretKey, of: Origin, made: Result<Digest, Problem>) {
        let mut state = self.state();
        if state.secrets.contains_key(&key) {
            state.made.insert(key, (of, made));
        }
    }

    /// What came out for a Secret before, if it was of this content and class.
    pub(super) fn made_before(
        &self,
        key: &SecretKey,
        of: &Origin,
    ) -> Option<Result<Digest, Problem>> {
        let state = self.state();
        let (before, made) = state.made.get(key)?;
        (before == of).then(|| made.clone())
    }

    /// Whether a Secret is to be looked at within some time.
    pub(super) fn is_due_within(&self, key: &SecretKey, time: Duration) -> bool {
        let state = self.state();
        let look = state.secrets.get(key);
        look.is_some_and(|look| look.due <= Instant::now() + time)
    }

    /// Whether any Secret of a class is overtaken; none counts as overtaken from then on, until it
    /// is looked at again.
    pub(super) fn take_overtaken(&self, namespace: &str, class: &str) -> bool {
        let mut state = self.state();
        let of_class = state
            .newer
            .iter_mut()
            .filter(|(key, _)| key.namespace == namespace && key.class == class);
        let taken = of_class.map(|(_, newer)| newer.take_news());
        taken.fold(false, |any, one| any | one)
    }

    /// The pod status of a volume has been looked at.
    pub(super) fn status_looked_at(&self, volume_id: &str, failed: bool, every: Duration) {
        if let Some(mounted) = self.state().volumes.get_mut(volume_id) {
            mounted.status.looked(failed, every * STATUS_INTERVALS);
        }
    }

    /// The pod status of a volume may be missing.
    pub(super) fn status_is_due(&self, volume_id: &str) {
        if let Some(mounted) = self.state().volumes.get_mut(volume_id)
            && mounted.status.failures == 0
        {
            mounted.status.due = Instant::now();
        }
    }

    /// The pod status of a volume is another object than before: whatever lived with it lives with
    /// the new one.
    pub(super) fn status_is_new(&self, volume_id: &str) {
        if let Some(mounted) = self.state().volumes.get_mut(volume_id) {
            mounted.holder = None;
        }
    }

    /// A class as it was last read.
    pub(super) fn class(&self, namespace: &str, name: &str) -> Option<Arc<Class>> {
        let key = (namespace.to_owned(), name.to_owned());
        self.state().classes.get(&key)?.class.clone()
    }

    /// The newest state of a class that is known: as it was last read, or as a volume was mounted
    /// with before this driver ran.
    pub(super) fn newest_state(&self, namespace: &str, name: &str) -> Option<record::Class> {
        let key = (namespace.to_owned(), name.to_owned());
        let state = self.state();
        let known = state.classes.get(&key)?;
        let read = known.class.as_ref().map(|class| class.identity.clone());
        read.or_else(|| known.recorded.clone())
    }

    /// The volumes of a class on this node.
    pub(super) fn volumes_of(&self, namespace: &str, class: &str) -> Vec<Mounted> {
        let state = self.state();
        let of_class = state
            .volumes
            .values()
            .filter(|mounted| mounted.class == class && mounted.volume.pod.namespace == namespace);
        of_class.map(|mounted| (**mounted).clone()).collect()
    }

    pub(super) fn set_holder(&self, volume_id: &str, holder: PodOwners) {
        if let Some(mounted) = self.state().volumes.get_mut(volume_id) {
            mounted.holder = Some(holder);
        }
    }

    /// Tells a pod something of a Secret that it does not know yet: trouble, or none: that the
    /// trouble is over. It counts as told only when `announce`, which
    /// gets what the pod was told before, says that it is.
    pub(super) fn tell(
        &self,
        volume_id: &str,
        secret: &str,
        trouble: Option<&str>,
        announce: impl FnOnce(Option<String>) -> bool,
    ) {
        let mut state = self.state();
        let Some(mounted) = state.volumes.get_mut(volume_id) else {
            return;
        };
        let before = mounted.told.get(secret);
        if before.map(String::as_str) == trouble || !announce(before.cloned()) {
            return;
        }
        match trouble {
            None => mounted.told.remove(secret),
            Some(trouble) => mounted.told.insert(secret.to_owned(), trouble.to_owned()),
        };
    }

    /// Forgets that a pod has been told something of a Secret, because the event could not be
    /// posted, so that it is told again when the same is found again. `trouble` is what was to be
    /// told, and `before` what the pod had been told before.
    pub(super) fn untold(
        &self,
        volume_id: &str,
        secret: &str,
        trouble: Option<&str>,
        before: Option<String>,
    ) {
        let mut state = self.state();
        let Some(mounted) = state.volumes.get_mut(volume_id) else {
            return;
        };
        // Where something else has been told since, that stands.
        if mounted.told.get(secret).map(String::as_str) == trouble {
            match before {
                None => mounted.told.remove(secret),
                Some(before) => mounted.told.insert(secret.to_owned(), before),
            };
        }
    }

    /// Waits until nobody else works on a Secret.
    pub(super) async fn turn(&self, namespace: &str, name: &str) -> OwnedMutexGuard<()> {
        let key = (namespace.to_owned(), name.to_owned());
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(turns.entry(key).or_default())
        };
        turn.lock_owned().await
    }

    /// What is to be looked at first, and when, in namespaces in which something may be.
    pub(super) fn next(&self, may_be: impl Fn(&str) -> bool) -> Option<(Instant, Task)> {
        let state = self.state();
        let classes = state.classes.iter().filter(|((ns, _), _)| may_be(ns));
        let class = classes.min_by_key(|(_, known)| known.due);
        let secrets = state
            .secrets
            .iter()
            .filter(|(key, _)| may_be(&key.namespace));
        let secret = secrets.min_by_key(|(_, look)| look.due);
        let left = state.left.iter();
        let left = left.filter(|(_, mounted, _)| may_be(&mounted.volume.pod.namespace));
        let left = left.min_by_key(|(due, ..)| *due);
        let statuses = state.volumes.values();
        let statuses = statuses.filter(|mounted| may_be(&mounted.volume.pod.namespace));
        let status = statuses.min_by_key(|mounted| mounted.status.due);
        let tasks = [
            class.map(|((namespace, name), known)| {
                (known.due, Task::Class(namespace.clone(), name.clone()))
            }),
            secret.map(|(key, look)| (look.due, Task::Secret(key.clone()))),
            status.map(|mounted| {
                let volume = Box::new(mounted.volume.clone());
                (mounted.status.due, Task::PodStatus(volume))
            }),
            left.map(|(due, mounted, class)| {
                (*due, Task::Left(mounted.clone(), Arc::clone(class)))
            }),
        ];
        tasks.into_iter().flatten().min_by_key(|(due, _)| *due)
    }

    /// How many things there are to look at in one interval.
    pub(super) fn count(&self) -> usize {
        let state = self.state();
        state.classes.len() + state.secrets.len() + state.volumes.len()
    }

    /// A volume that was taken down needs no look any more.
    pub(super) fn has_left(&self, volume_id: &str) {
        self.state()
            .left
            .retain(|(_, mounted, _)| mounted.volume.id != volume_id);
    }
}

impl State {
    fn forget(&mut self, volume_id: &str) -> Option<Box<Mounted>> {
        self.volumes.remove(volume_id)
    }

    fn forget_class_without_volumes(&mut self, key: &ClassKey) {
        let mut others = self.volumes.values();
        if others.all(|other| other.class_key() != *key) {
            self.classes.remove(key);
            self.secrets.retain(|secret, _| secret.class_key() != *key);
            self.newer.retain(|secret, _| secret.class_key() != *key);
            self.made.retain(|secret, _| secret.class_key() != *key);
        }
    }

    /// A class is this now. What it makes is looked at after a first wait where it changed. An
    /// answer that is older than what is known says nothing.
    fn class_is(
        &mut self,
        key: &ClassKey,
        class: Option<&Class>,
        every: Duration,
        first: Duration,
    ) -> Vec<String> {
        let now = Instant::now();
        let entry = self.classes.entry(key.clone());
        let known = entry.or_insert_with(|| KnownClass {
            class: None,
            recorded: None,
            due: now,
            failures: 0,
        });
        known.failures = 0;
        known.due = now + wait(0, every);
        if let (None, Some(recorded), Some(read)) = (&known.class, &known.recorded, class)
            && read.identity.age(recorded) == Age::OlderContent
        {
            return Vec::new();
        }
        let same = match (&known.class, &class) {
            (Some(before), Some(now)) => {
                now.identity.age(&before.identity) >= Age::OlderMetadata
                    || before.identity.uid == now.identity.uid
                        && before.identity.resource_version == now.identity.resource_version
            }
            (None, None) => true,
            _ => false,
        };
        if same {
            return Vec::new();
        }
        let names = |class: &Class| -> Vec<String> {
            let names = class.secret_objects.iter();
            names.map(|o| o.secret_name.clone()).collect()
        };
        let before = known.class.as_deref().map(names).unwrap_or_default();
        let now_made = class.map(names).unwrap_or_default();
        let gone = class.is_none_or(|class| class.too_much.is_some());
        known.class = class.map(|class| Arc::new(class.without_parameters()));
        let (namespace, class) = key;
        for name in &now_made {
            let key = SecretKey {
                namespace: namespace.clone(),
                class: class.clone(),
                name: name.clone(),
            };
            let look = Look {
                due: now + first,
                failures: 0,
            };
            self.secrets.insert(key, look);
        }
        self.secrets
            .retain(|secret, _| secret.class_key() != *key || now_made.contains(&secret.name));
        let secrets = &self.secrets;
        self.newer.retain(|secret, _| secrets.contains_key(secret));
        self.made.retain(|secret, _| secrets.contains_key(secret));
        // A class that is gone, or makes nothing because it asks for too much, lets go of nothing:
        // its pods still use what it made.
        let released = before
            .into_iter()
            .filter(|name| !gone && !now_made.contains(name));
        released.collect()
    }
}

impl Mounted {
    fn class_key(&self) -> ClassKey {
        (self.volume.pod.namespace.clone(), self.class.clone())
    }
}

impl Task {
    /// The namespace of what is looked at.
    pub(super) fn namespace(&self) -> &str {
        match self {
            Self::Class(namespace, _) => namespace,
            Self::Secret(key) => &key.namespace,
            Self::PodStatus(volume) => &volume.pod.namespace,
            Self::Left(mounted, _) => &mounted.volume.pod.namespace,
        }
    }
}

impl SecretKey {
    fn class_key(&self) -> ClassKey {
        (self.namespace.clone(), self.class.clone())
    }
}

/// When to look again: after an interval without failures, sooner after the first ones. Never
/// at the same moment as others.
fn wait(failures: u32, every: Duration) -> Duration {
    let jitter = rand::rng().random_range(0.8..1.1);
    let wait = match failures {
        0 => every,
        _ => {
            let wait = FIRST_WAIT * 2_u32.saturating_pow(failures.min(16) - 1);
            wait.min(every).min(LONGEST_WAIT)
        }
    };
    wait.mul_f64(jitter)
}
