//! Remembers the volumes that are mounted on this node, the classes that they were made from, and
//! what is known of the Secrets of those classes.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::{
    Volume,
    content::Origin,
    overtaken::Overtaken,
    schedule::{Check, Checked, Schedule, VolumeKey, random_wait, usual_wait, wait_for_read},
};
use crate::{
    cluster::{
        Class,
        interval::Intervals,
        secrets::{Digest, PodOwners, Reconciled, SyncError},
    },
    record::{self, Age},
};

/// The number of intervals between two checks of a pod status. Hardly anybody deletes one, and each volume
/// of the cluster has one: with thirty on each of ten thousand nodes and the default interval, these are
/// 333 reads a second. Where a Secret needs a pod status that is missing, it is checked at once.
const POD_STATUS_INTERVALS: u32 = 20;
/// The time after the unpublish of a volume within which its pod usually has ended or is gone.
const POD_ENDS_WITHIN: Duration = Duration::from_secs(10);

/// The namespace and name of a class.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ClassKey {
    pub(super) namespace: String,
    pub(super) name: String,
}

impl ClassKey {
    pub(super) fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }

    /// Returns the key of a Secret of this class.
    pub(super) fn secret(&self, name: &str) -> SecretKey {
        SecretKey {
            class: self.clone(),
            name: name.to_owned(),
        }
    }
}

/// A Secret of a class.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SecretKey {
    pub(super) class: ClassKey,
    pub(super) name: String,
}

/// A mounted volume, also one whose class makes no Secrets: it may begin to.
#[derive(Clone)]
pub(super) struct CachedVolume {
    pub(super) volume: Volume,
    pub(super) class: ClassKey,
    /// The owners that its pod gives its Secrets, once they are known.
    pub(super) owners: Option<PodOwners>,
    /// Whether a check has written its pod status, since a refresh has asked last.
    status_written: bool,
}

impl CachedVolume {
    fn key(&self) -> VolumeKey {
        VolumeKey {
            namespace: self.class.namespace.clone(),
            volume_id: self.volume.id.clone(),
        }
    }
}

#[derive(Default)]
struct CachedClass {
    /// The class as it was last read; `None` if it is gone or has not been read yet.
    class: Option<Arc<Class>>,
    /// The time at which its content was found to be another one.
    changed: Option<Instant>,
    /// The newest state that a volume was mounted with before this process ran. An answer that is
    /// older than this one is stale.
    recorded: Option<record::ClassState>,
}

#[derive(Default)]
struct CachedSecret {
    /// Other content of a higher order than that of any volume here.
    overtaken: Option<Overtaken>,
    /// The digest of the data that was computed last, or why none could be, and from which content.
    computed: Option<(Origin, Result<Digest, SyncError>)>,
}

#[derive(Default)]
struct Entries {
    volumes: HashMap<String, Box<CachedVolume>>,
    classes: BTreeMap<ClassKey, CachedClass>,
    secrets: BTreeMap<SecretKey, CachedSecret>,
    /// The volumes that have been unpublished, whose pods are checked once more.
    ended: HashMap<String, (Box<CachedVolume>, Arc<Class>)>,
    schedule: Schedule,
}

/// The cache, and with it the schedule of the checks of everything in it.
pub(super) struct Cache {
    /// The interval between two checks of a Secret.
    interval: Duration,
    intervals: Intervals,
    entries: Mutex<Entries>,
    /// Notified when a check may be due earlier than the next one in the schedule before.
    pub(super) sooner: Notify,
}

impl Cache {
    pub(super) fn new(intervals: Intervals) -> Self {
        Self {
            interval: intervals.sync,
            intervals,
            entries: Mutex::default(),
            sooner: Notify::new(),
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // No panic leaves an entry half changed.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a volume that has been mounted, or whose content or class has changed. Returns the
    /// Secrets that its class made before and does not any more.
    pub(super) fn add_mounted(&self, volume: &Volume, class: &Class) -> Vec<String> {
        let mut entries = self.entries();
        let key = ClassKey::new(&volume.pod.namespace, &class.identity.name);
        let is_same = |cached: &CachedVolume| cached.volume == *volume && cached.class == key;
        if !entries
            .volumes
            .get(&volume.id)
            .is_some_and(|cached| is_same(cached))
        {
            let cached = Box::new(CachedVolume {
                volume: volume.clone(),
                class: key.clone(),
                owners: None,
                status_written: false,
            });
            let check = Check::PodStatus(cached.key());
            if let Some(before) = entries.volumes.insert(volume.id.clone(), cached) {
                entries.remove_class_without_volumes(&before.class);
            } else {
                let first = usual_wait(self.interval * POD_STATUS_INTERVALS);
                entries.schedule.add(check, first);
            }
        }
        // The caller is about to make its Secrets.
        let first = usual_wait(self.interval);
        if !entries.schedule.contains(&Check::Class(key.clone())) {
            let check = Check::Class(key.clone());
            let wait = self.wait_for_class(Some(class));
            entries.schedule.add(check, wait);
        }
        let released = entries.set_class(&key, Some(class), first);
        drop(entries);
        self.sooner.notify_one();
        released
    }

    /// Adds a volume that was mounted before this process ran. Its class is checked within one
    /// interval, and within five minutes where the interval is longer.
    pub(super) fn add_recorded(&self, volume: Volume, class: record::ClassState) {
        let mut entries = self.entries();
        if entries.volumes.contains_key(&volume.id) {
            return;
        }
        let cached = CachedVolume {
            class: ClassKey::new(&volume.pod.namespace, &class.name),
            volume,
            owners: None,
            status_written: false,
        };
        for (check, within) in [
            (
                Check::Class(cached.class.clone()),
                self.intervals.first_check(),
            ),
            (Check::PodStatus(cached.key()), self.interval),
        ] {
            if !entries.schedule.contains(&check) {
                entries.schedule.add(check, random_wait(within));
            }
        }
        let known = entries.classes.entry(cached.class.clone()).or_default();
        let is_newest = |before: &record::ClassState| class.age(before) == Age::Current;
        if known.recorded.as_ref().is_none_or(is_newest) {
            known.recorded = Some(class);
        }
        let id = cached.volume.id.clone();
        entries.volumes.insert(id, Box::new(cached));
    }

    /// Removes a volume that is being unpublished. If its class makes Secrets, its pod is checked
    /// once more.
    pub(super) fn remove(&self, volume_id: &str) {
        let mut entries = self.entries();
        let Some(cached) = entries.volumes.remove(volume_id) else {
            return;
        };
        entries.schedule.remove(&Check::PodStatus(cached.key()));
        let class = entries.classes.get(&cached.class);
        let class = class.and_then(|known| known.class.clone());
        entries.remove_class_without_volumes(&cached.class);
        if let Some(class) = class.filter(|class| !class.secret_objects.is_empty()) {
            let check = Check::EndedPod(cached.key());
            entries.schedule.add(check, POD_ENDS_WITHIN);
            entries.ended.insert(volume_id.to_owned(), (cached, class));
        }
        drop(entries);
        self.sooner.notify_one();
    }

    /// Takes an unpublished volume, whose pod is checked now, and its class.
    pub(super) fn take_ended(&self, key: VolumeKey) -> Option<(Box<CachedVolume>, Arc<Class>)> {
        let mut entries = self.entries();
        let ended = entries.ended.remove(&key.volume_id);
        entries.schedule.remove(&Check::EndedPod(key));
        ended
    }

    /// Returns a mounted volume.
    pub(super) fn volume(&self, volume_id: &str) -> Option<Volume> {
        let entries = self.entries();
        let cached = entries.volumes.get(volume_id);
        cached.map(|cached| cached.volume.clone())
    }

    /// Returns the mounted volumes of a class.
    pub(super) fn volumes_of(&self, class: &ClassKey) -> Vec<CachedVolume> {
        let entries = self.entries();
        let volumes = entries.volumes.values();
        let of_class = volumes.filter(|cached| cached.class == *class);
        of_class.map(|cached| (**cached).clone()).collect()
    }

    /// Sets the owners that the pod of a volume gives its Secrets. With `None` they are read again
    /// when they are needed.
    pub(super) fn set_owners(&self, volume_id: &str, owners: Option<PodOwners>) {
        if let Some(cached) = self.entries().volumes.get_mut(volume_id) {
            cached.owners = owners;
        }
    }

    /// Sets whether a check has written the pod status of a volume. Returns what was set before.
    pub(super) fn set_status_written(&self, volume_id: &str, is_written: bool) -> bool {
        let mut entries = self.entries();
        let cached = entries.volumes.get_mut(volume_id);
        cached.is_some_and(|cached| std::mem::replace(&mut cached.status_written, is_written))
    }

    /// Schedules the next check of a volume's pod status.
    pub(super) fn pod_status_checked(&self, volume: VolumeKey, result: Checked) {
        let every = self.interval * POD_STATUS_INTERVALS;
        let check = Check::PodStatus(volume);
        let mut entries = self.entries();
        let (schedule, quiet) = (&mut entries.schedule, self.interval);
        schedule.checked(&check, result, every, quiet);
    }

    /// Has a pod status checked soon, because it may be missing.
    pub(super) fn expedite_pod_status(&self, volume: &CachedVolume) {
        let check = Check::PodStatus(volume.key());
        self.entries().schedule.expedite(&check);
    }

    /// Makes the check of a class due at once.
    pub(super) fn expedite_class(&self, class: &ClassKey) {
        let check = Check::Class(class.clone());
        self.entries().schedule.expedite(&check);
        self.sooner.notify_one();
    }

    /// Makes the checks of the Secrets of a volume's class due at once.
    pub(super) fn expedite_secrets(&self, volume_id: &str) {
        let mut entries = self.entries();
        let Some(class) = entries
            .volumes
            .get(volume_id)
            .map(|cached| cached.class.clone())
        else {
            return;
        };
        let of_class = entries.secrets.keys().filter(|key| key.class == class);
        for check in of_class.cloned().map(Check::Secret).collect::<Vec<_>>() {
            entries.schedule.expedite(&check);
        }
        drop(entries);
        self.sooner.notify_one();
    }

    /// Returns a class as it was last read.
    pub(super) fn class(&self, key: &ClassKey) -> Option<Arc<Class>> {
        self.entries().classes.get(key)?.class.clone()
    }

    /// Returns the newest known state of a class: as it was last read, or as a volume was mounted
    /// with before this process ran.
    pub(super) fn newest_state(&self, key: &ClassKey) -> Option<record::ClassState> {
        let entries = self.entries();
        let known = entries.classes.get(key)?;
        let read = known.class.as_ref().map(|class| class.identity.clone());
        read.or_else(|| known.recorded.clone())
    }

    /// Returns how long the content of a class has been known.
    pub(super) fn class_age(&self, key: &ClassKey) -> Option<Duration> {
        let changed = self.entries().classes.get(key)?.changed;
        changed.map(|changed| changed.elapsed())
    }

    /// Sets a class that was read this time ago; `None` if it is gone. Returns the Secrets that it made
    /// before and does not any more.
    pub(super) fn set_class(
        &self,
        key: &ClassKey,
        class: Option<&Class>,
        age: Duration,
    ) -> Vec<String> {
        let mut entries = self.entries();
        if !entries.classes.contains_key(key) {
            return Vec::new();
        }
        let next = self.wait_for_class(class).saturating_sub(age);
        entries.schedule.add(Check::Class(key.clone()), next);
        entries.set_class(key, class, Duration::ZERO)
    }

    /// Returns the time between two reads of a class. If a volume needs it more often than there are
    /// checks, kubelet's looks at the volume read it.
    fn wait_for_class(&self, class: Option<&Class>) -> Duration {
        let class = class.map(|class| &class.identity);
        wait_for_read(self.intervals.between_checks_of(class))
    }

    /// Schedules another attempt to read a class.
    pub(super) fn class_not_read(&self, key: ClassKey) {
        let (check, every) = (Check::Class(key), self.interval);
        let mut entries = self.entries();
        let schedule = &mut entries.schedule;
        schedule.checked(&check, Checked::Failed, every, Duration::ZERO);
    }

    /// Schedules the next check of a Secret.
    pub(super) fn secret_checked(&self, key: &SecretKey, result: Checked) {
        let (check, every) = (Check::Secret(key.clone()), self.interval);
        let mut entries = self.entries();
        let schedule = &mut entries.schedule;
        schedule.checked(&check, result, every, Duration::ZERO);
        drop(entries);
        if result == Checked::Failed {
            self.sooner.notify_one();
        }
    }

    /// Remembers from a reconciliation whether a Secret has other content of a higher order than
    /// that of the volumes here, and since when it is absent.
    pub(super) fn set_reconciled(&self, key: &SecretKey, reconciled: Reconciled) {
        let mut entries = self.entries();
        let Some(secret) = entries.secrets.get_mut(key) else {
            return;
        };
        match (reconciled, &mut secret.overtaken) {
            (Reconciled::Overtaken { order }, overtaken) => {
                *overtaken = Some(Overtaken::by(order));
            }
            (Reconciled::Absent, Some(overtaken)) => overtaken.set_absent(),
            // Its content may still be the newer one, if only something else was written.
            (Reconciled::Updated, Some(overtaken)) => overtaken.set_written(),
            (_, overtaken) => *overtaken = None,
        }
    }

    /// Returns whether a Secret, if it is absent, is left to nodes with newer content. `order` is
    /// that of the content here.
    pub(super) fn is_left_to_others(&self, key: &SecretKey, order: Option<u64>) -> bool {
        let entries = self.entries();
        let overtaken = entries.secrets.get(key).and_then(|s| s.overtaken.as_ref());
        overtaken.is_some_and(|overtaken| overtaken.waits(order, self.interval))
    }

    /// Returns whether any Secret of a class has been found overtaken since the last call.
    pub(super) fn take_overtaken(&self, class: &ClassKey) -> bool {
        let mut entries = self.entries();
        let secrets = entries.secrets.iter_mut();
        let of_class = secrets.filter(|(key, _)| key.class == *class);
        let overtaken = of_class.filter_map(|(_, secret)| secret.overtaken.as_mut());
        // Each of them is taken, and not only the first.
        overtaken.fold(false, |any, one| any | one.take_news())
    }

    /// Remembers the digest of a Secret's data, or why there is none, and from which content it was
    /// computed.
    pub(super) fn set_computed(
        &self,
        key: &SecretKey,
        origin: Origin,
        computed: Result<Digest, SyncError>,
    ) {
        if let Some(secret) = self.entries().secrets.get_mut(key) {
            secret.computed = Some((origin, computed));
        }
    }

    /// Returns what was computed for a Secret, if it was computed from this content.
    pub(super) fn computed(
        &self,
        key: &SecretKey,
        origin: &Origin,
    ) -> Option<Result<Digest, SyncError>> {
        let entries = self.entries();
        let (before, computed) = entries.secrets.get(key)?.computed.as_ref()?;
        (before == origin).then(|| computed.clone())
    }

    /// Returns whether a Secret is to be checked within half an interval.
    pub(super) fn is_due_soon(&self, key: &SecretKey) -> bool {
        let (check, soon) = (Check::Secret(key.clone()), self.interval / 2);
        self.entries().schedule.is_due_within(&check, soon)
    }

    /// Returns the next check and when it is due, of the namespaces in which a check may begin.
    pub(super) fn next_check(&self, may_begin: impl Fn(&str) -> bool) -> Option<(Instant, Check)> {
        self.entries().schedule.next(may_begin)
    }

    /// Returns the number of scheduled checks.
    pub(super) fn checks(&self) -> usize {
        self.entries().schedule.len()
    }
}

impl Entries {
    fn remove_class_without_volumes(&mut self, class: &ClassKey) {
        if self.volumes.values().any(|other| other.class == *class) {
            return;
        }
        self.classes.remove(class);
        self.secrets.retain(|secret, _| secret.class != *class);
        self.schedule.retain(|check| match check {
            Check::Class(other) => other != class,
            Check::Secret(secret) => secret.class != *class,
            Check::PodStatus(_) | Check::EndedPod(_) => true,
        });
    }

    /// Sets a class. If it has changed, its Secrets are checked after a first wait. An answer that is
    /// older than the known state changes nothing.
    fn set_class(&mut self, key: &ClassKey, class: Option<&Class>, first: Duration) -> Vec<String> {
        let known = self.classes.entry(key.clone()).or_default();
        if known.is_current(class) {
            return Vec::new();
        }
        let names = |class: &Class| -> Vec<String> {
            let objects = class.secret_objects.iter();
            objects.map(|object| object.secret_name.clone()).collect()
        };
        let before = known.class.as_deref().map(names).unwrap_or_default();
        let now = class.map(names).unwrap_or_default();
        if known.has_other_content(class) {
            known.changed = Some(Instant::now());
        }
        known.class = class.map(|class| Arc::new(class.without_parameters()));
        let is_gone = |secret: &SecretKey| secret.class == *key && !now.contains(&secret.name);
        self.secrets.retain(|secret, _| !is_gone(secret));
        self.schedule.retain(|check| match check {
            Check::Secret(secret) => !is_gone(secret),
            _ => true,
        });
        for name in &now {
            let secret = key.secret(name);
            self.schedule.add(Check::Secret(secret.clone()), first);
            self.secrets.entry(secret).or_default();
        }
        // A class that is gone, or makes nothing because it exceeds a limit, releases nothing: its
        // pods still use what it made.
        let releases = class.is_some_and(|class| class.too_much.is_none());
        let released = before.into_iter().filter(|name| !now.contains(name));
        released.filter(|_| releases).collect()
    }
}

impl CachedClass {
    /// Returns whether the content of a class that was read differs from the known one.
    fn has_other_content(&self, read: Option<&Class>) -> bool {
        let known = self.class.as_ref().map(|class| &class.identity);
        let read = read.map(|class| &class.identity);
        !matches!((known, read), (Some(known), Some(read))
            if known.uid == read.uid && known.age(read) != Age::OlderContent)
    }

    /// Returns whether the known state is as new as one that has been read.
    fn is_current(&self, read: Option<&Class>) -> bool {
        match (&self.class, read) {
            (Some(known), Some(read)) => {
                let (known, read) = (&known.identity, &read.identity);
                read.age(known) >= Age::OlderMetadata
                    || known.uid == read.uid && known.resource_version == read.resource_version
            }
            (None, Some(read)) => {
                let recorded = self.recorded.as_ref();
                recorded.is_some_and(|known| read.identity.age(known) == Age::OlderContent)
            }
            (None, None) => true,
            (Some(_), None) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;
    use crate::record::Pod;

    /// What the documentation says of a change of a class, and a tenth more.
    const NOTICED: Duration = Duration::from_secs(330);

    fn volume() -> Volume {
        Volume {
            id: "csi-1".to_owned(),
            pod: Pod {
                name: "web".to_owned(),
                namespace: "shop".to_owned(),
                uid: "uid".to_owned(),
            },
            target: PathBuf::from("/target"),
            pod_status: "web-shop-db".to_owned(),
        }
    }

    proptest! {
        /// Whatever the flags say, the driver reads a class soon after its own start, and again after each read.
        #[test]
        fn a_class_is_read_again_before_long(
            [refresh, least, sync] in prop::array::uniform3(1_u64..1_000_000),
            every in prop::option::of("[1-9][0-9]{0,5}[smh]|never"),
        ) {
            let [refresh, least, sync] = [refresh, least, sync].map(Duration::from_secs);
            let intervals = Intervals { refresh, least, sync };
            let cache = Cache::new(intervals);
            let annotations = every.map(|every| (crate::cluster::interval::INTERVAL.to_owned(), every));
            let class = record::ClassState {
                name: "db".to_owned(),
                uid: "uid".to_owned(),
                generation: Some(1),
                resource_version: "1".to_owned(),
                annotations: annotations.into_iter().collect(),
            };
            cache.add_recorded(volume(), class.clone());
            let key = ClassKey::new("shop", "db");
            let is_due = |within| {
                let check = Check::Class(key.clone());
                cache.entries().schedule.is_due_within(&check, within)
            };
            prop_assert!(is_due(NOTICED.min(sync)));
            cache.set_class(&key, None, Duration::ZERO);
            prop_assert!(is_due(NOTICED));
            let wait = cache.intervals.between_checks_of(Some(&class));
            prop_assert!(wait <= NOTICED && wait >= sync.min(Duration::from_secs(300)));
        }
    }
}
