//! What the parts of a run share: the store, the log, the pods that are there, and what somebody
//! changed by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Secret;
use serde_json::Value;

use super::editions::{Editions, Spec};
use super::features::Features;
use super::good::{Good, GoodBounds, SingleBounds};
use super::lock;
use super::report::Log;
use super::store::{CLASSES, Store};

/// The interval at which the pods are listed.
pub(super) const LIST: Duration = Duration::from_millis(100);

/// The times within which something has to happen on a cluster.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// From the end of the last fault until everything is as it should be: one interval of rotation,
    /// the longest pauses of kubelet and driver after failures, and a deadline of kubelet's calls,
    /// because a call may begin just before the fault ends.
    pub(super) converge: Duration,
    /// From the creation of a pod until it is ready, while there is no fault but a hostile tenant.
    pub(super) publish: Duration,
    /// The longest time from a provider's reading of the store until the content is in a Secret.
    pub(super) fetch: Duration,
    /// From a change of the store or a class until a volume has followed, while there is no fault but a
    /// hostile tenant.
    pub(super) follow: Duration,
    /// The time after which a pod that is not ready, or a volume that is not refreshed, is a failure
    /// of which there has to be a trace.
    pub(super) silence: Duration,
    /// From the deletion of all pods until nothing is left.
    pub(super) gone: Duration,
    /// The times of good minutes; none where they are not judged.
    pub(super) good: Option<GoodBounds>,
    /// What a single failure explains, in good minutes and in others.
    pub(super) single: SingleBounds,
}

/// A well-behaved pod, as the API has it.
#[derive(Clone, Debug)]
pub(super) struct Watched {
    pub(super) uid: String,
    pub(super) name: String,
    pub(super) node: String,
    pub(super) classes: Vec<usize>,
    /// Whether its containers run, and it is not being deleted.
    pub(super) ready: bool,
    /// Whether its containers have ended and do not start again.
    pub(super) ended: bool,
    /// The time at which it was created, or a moment before.
    pub(super) created: Instant,
    /// The time, by [`World::now`], since when it is not ready.
    pub(super) waiting: Option<Duration>,
}

/// A pod and the class of one of its volumes.
pub(super) type VolumeId = (String, usize);

/// The state that the parts of a run share.
pub(super) struct World {
    pub(super) log: Log,
    pub(super) store: Store,
    pub(super) namespace: String,
    pub(super) bounds: Bounds,
    /// The interval of the class that is refreshed seldom.
    pub(super) seldom: &'static str,
    /// The UID of what controls some of the pods.
    pub(super) set: String,
    /// The number of the credential that providers are given.
    pub(super) credential: AtomicU64,
    /// The pods by UID.
    pub(super) pods: Mutex<BTreeMap<String, Watched>>,
    /// The roots of the nodes that are up.
    pub(super) roots: Mutex<BTreeMap<String, PathBuf>>,
    /// The last generation that was read in each volume, and what its class said.
    pub(super) read: Mutex<BTreeMap<VolumeId, (u64, Spec)>>,
    /// The pods whose volumes lie below other mounts, so that only their containers see them.
    pub(super) buried: Mutex<BTreeSet<String>>,
    /// The number of times that the pods were listed.
    lists: AtomicU64,
    /// Since when, by [`World::now`], there is no fault but the hostile tenant; none while there is one.
    pub(super) calm: Mutex<Option<Duration>>,
    /// Data of Secrets that somebody wrote by hand.
    pub(super) by_hand: Mutex<BTreeSet<String>>,
    /// The Secrets that somebody has adorned, by UID, with the versions that they had then.
    adorned: Mutex<BTreeMap<String, u64>>,
    /// The number of writes by hand whose result is not known yet.
    writing: AtomicU64,
    /// Failures of which there has to be a trace: the pod's UID and name, its node, and what fails.
    pub(super) failures: Mutex<BTreeMap<String, Failure>>,
    /// When, by [`World::now`], a fault of the API server has begun or was over last.
    api_away: Mutex<Option<Duration>>,
    /// Whether these are good minutes.
    pub(super) good: Good,
    /// What the classes say, and said.
    pub(super) editions: Editions,
    /// What the classes of two pods ask for besides.
    pub(super) features: Features,
    /// Whether a publish fails as long as its Secrets cannot be written.
    pub(super) has_secrets_first: bool,
    /// The most calls that a driver makes to a provider at once.
    pub(super) most_calls: u64,
    /// The time until which there was a Secret of a class; none for one that is there.
    secrets: Mutex<BTreeMap<usize, Option<Instant>>>,
    /// The faults in which the API server answers from the past.
    lies: Mutex<Spell>,
    /// The times in which somebody has altered the files of a pod.
    altered: Mutex<Spell>,
    /// The time, by [`World::now`], of the last start of a node's driver.
    restarts: Mutex<BTreeMap<String, Duration>>,
}

/// Something that did not work for a while.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) pod: String,
    pub(super) node: String,
    pub(super) what: String,
    /// The time, by [`World::now`], at which it began.
    pub(super) began: Duration,
}

/// Something that lasts for a while, also several times at once.
#[derive(Debug, Default)]
struct Spell {
    /// The number of times that it lasts now, and when it has ended last.
    now: usize,
    ended: Option<Instant>,
}

impl Spell {
    fn becomes(&mut self, begins: bool) {
        if begins {
            self.now += 1;
        } else {
            self.now = self.now.saturating_sub(1);
            self.ended = Some(Instant::now());
        }
    }

    fn was_since(&self, since: Instant) -> bool {
        self.now > 0 || self.ended.is_some_and(|ended| ended >= since)
    }
}

/// Returns the UID of a Secret, and its version: later ones are greater.
fn identity(secret: &Secret) -> Option<(String, u64)> {
    let version = secret.metadata.resource_version.as_ref()?.parse().ok()?;
    Some((secret.metadata.uid.clone()?, version))
}

impl World {
    pub(super) fn new(
        store: Store,
        namespace: String,
        bounds: Bounds,
        seldom: &'static str,
    ) -> Self {
        Self {
            log: Log::start(),
            store,
            namespace,
            bounds,
            seldom,
            set: String::new(),
            credential: AtomicU64::new(1),
            pods: Mutex::default(),
            roots: Mutex::default(),
            read: Mutex::default(),
            buried: Mutex::default(),
            lists: AtomicU64::new(0),
            calm: Mutex::new(Some(Duration::ZERO)),
            by_hand: Mutex::default(),
            adorned: Mutex::default(),
            writing: AtomicU64::new(0),
            failures: Mutex::default(),
            api_away: Mutex::default(),
            good: Good::default(),
            editions: Editions::start(),
            features: Features::start(false),
            has_secrets_first: false,
            most_calls: u64::MAX,
            secrets: Mutex::default(),
            lies: Mutex::default(),
            altered: Mutex::default(),
            restarts: Mutex::default(),
        }
    }

    /// Notes whether the Secret of a class is there.
    pub(super) fn secret_is_there(&self, class: usize, is_there: bool) {
        let until = (!is_there).then(Instant::now);
        lock(&self.secrets).insert(class, until);
    }

    /// Returns whether the Secret of a class was there at any time since `since`.
    pub(super) fn secret_was_there_since(&self, class: usize, since: Instant) -> bool {
        let until = lock(&self.secrets).get(&class).copied();
        until.is_some_and(|until| until.is_none_or(|until| until >= since))
    }

    /// Notes that the API server begins or ends to answer from the past.
    pub(super) fn lies(&self, begins: bool) {
        lock(&self.lies).becomes(begins);
    }

    /// Returns whether it did so at any time since `since`.
    pub(super) fn lied_since(&self, since: Instant) -> bool {
        lock(&self.lies).was_since(since)
    }

    /// Notes that somebody alters files, or that they are in order again.
    pub(super) fn files_are_altered(&self, begins: bool) {
        lock(&self.altered).becomes(begins);
    }

    /// Returns whether files were not in order at any time since `since`.
    pub(super) fn files_were_altered_since(&self, since: Instant) -> bool {
        lock(&self.altered).was_since(since)
    }

    /// Returns the time by which bounds count. It goes on by [`LIST`] with each listing of the pods, and
    /// so more slowly while the machine has too much other work: the driver is late then, too.
    pub(super) fn now(&self) -> Duration {
        let lists = self.lists.load(Ordering::Relaxed);
        LIST.saturating_mul(u32::try_from(lists).unwrap_or(u32::MAX))
    }

    /// Lets the time go on.
    pub(super) fn listed(&self) {
        self.lists.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the pods that run on nodes that are up, with the roots of these nodes.
    pub(super) fn running(&self) -> Vec<(Watched, PathBuf)> {
        let roots = lock(&self.roots).clone();
        let pods = lock(&self.pods);
        let running = pods
            .values()
            .filter(|pod| pod.ready && !self.is_buried(&pod.uid));
        running
            .filter_map(|pod| Some((pod.clone(), roots.get(&pod.node)?.clone())))
            .collect()
    }

    /// Returns the number of volumes of the pods that run.
    pub(super) fn refreshed(&self) -> u64 {
        let pods = lock(&self.pods);
        let running = pods.values().filter(|pod| pod.ready);
        let running: u64 = running.map(|pod| pod.classes.len() as u64).sum();
        let features = self.features.there();
        running
            + features
                .iter()
                .map(|(_, _, of)| of.len() as u64)
                .sum::<u64>()
    }

    /// Returns whether the volumes of a pod lie below other mounts.
    pub(super) fn is_buried(&self, uid: &str) -> bool {
        lock(&self.buried).contains(uid)
    }

    /// Returns whether a node is up, with the same root.
    pub(super) fn is_up(&self, node: &str, root: &PathBuf) -> bool {
        lock(&self.roots).get(node) == Some(root)
    }

    /// Returns the bounds of now for what began at a time by [`World::now`], with what single failures add to
    /// them: those of good minutes, or those of any time where good minutes are not judged. There a call without
    /// an answer takes longer than it takes until a failure needs a trace, and has not failed until its end.
    pub(super) fn bounds_since(&self, since: Duration) -> Bounds {
        let (bounds, more) = (self.bounds, self.good.allowance(since));
        match bounds.good {
            Some(_) if !self.good.is_now() => bounds,
            Some(good) => Bounds {
                publish: good.publish + more,
                follow: good.follow + more,
                converge: good.converge + more,
                ..bounds
            },
            None => Bounds {
                publish: bounds.publish + more,
                follow: bounds.follow + more,
                converge: bounds.converge + more,
                silence: bounds.silence.max(more),
                ..bounds
            },
        }
    }

    /// Notes that somebody is about to write a Secret by hand.
    pub(super) fn writes_by_hand(&self) {
        self.writing.fetch_add(1, Ordering::SeqCst);
    }

    /// Notes that it is over, and what the Secret has now if it was written.
    pub(super) fn wrote_by_hand(&self, data: Option<&Value>) {
        if let Some(data) = data {
            lock(&self.by_hand).insert(data.to_string());
        }
        self.writing.fetch_sub(1, Ordering::SeqCst);
    }

    /// Notes a Secret to which somebody has added a label and an owner.
    pub(super) fn adorned(&self, secret: &Secret) {
        if let Some((uid, version)) = identity(secret) {
            lock(&self.adorned).entry(uid).or_insert(version);
        }
    }

    /// Notes that the owner of the Secrets goes, and Kubernetes takes it off them.
    pub(super) fn forget_adorned(&self) {
        lock(&self.adorned).clear();
    }

    /// Returns whether a Secret was adorned before it was as it is.
    pub(super) fn is_adorned(&self, secret: &Secret) -> bool {
        identity(secret).is_some_and(|(uid, version)| {
            let since = lock(&self.adorned).get(&uid).copied();
            since.is_some_and(|since| since <= version)
        })
    }

    /// Returns whether somebody may have written a Secret by hand without having told what.
    pub(super) fn is_writing_by_hand(&self) -> bool {
        self.writing.load(Ordering::SeqCst) > 0
    }

    pub(super) fn is_by_hand(&self, data: &Value) -> bool {
        lock(&self.by_hand).contains(&data.to_string())
    }

    /// Notes that a change of a class begins.
    pub(super) fn edit_begins(&self, class: usize) {
        self.editions.begins(class, self.now(), self.bounds.fetch);
    }

    /// Notes that it is over.
    pub(super) fn edit_ends(&self, class: usize) {
        self.editions.ends(class, self.now());
    }

    /// Notes that a driver does not know any more which state of a class a volume has.
    pub(super) fn records_are_lost(&self) {
        self.features.records_are_lost();
        for class in 0..CLASSES.len() {
            self.edit_begins(class);
            self.edit_ends(class);
        }
    }

    /// Returns whether there was no fault but the hostile tenant since a time by [`World::now`].
    pub(super) fn is_calm_since(&self, time: Duration) -> bool {
        lock(&self.calm).is_some_and(|calm| calm < time)
    }

    /// Notes that the driver of a node starts anew: what it had not told yet is forgotten.
    pub(super) fn driver_restarts(&self, node: &str) {
        lock(&self.restarts).insert(node.to_owned(), self.now());
    }

    /// Returns whether the driver of a node ran all the time since a time by [`World::now`].
    pub(super) fn driver_ran_since(&self, node: &str, time: Duration) -> bool {
        let last = lock(&self.restarts).get(node).copied();
        last.is_none_or(|last| last < time)
    }

    /// Notes that a fault of the API server begins, or is over.
    pub(super) fn api_is_struck(&self) {
        *lock(&self.api_away) = Some(self.now());
    }

    /// Returns whether a fault of the API server has begun, or was over, only after a time by [`World::now`].
    pub(super) fn api_was_away_since(&self, time: Duration) -> bool {
        lock(&self.api_away).is_some_and(|last| last > time)
    }

    /// Notes a failure of a pod that began at a time by [`World::now`].
    pub(super) fn fails(&self, pod: &Watched, what: &str, began: Duration) {
        let failure = || Failure {
            pod: pod.name.clone(),
            node: pod.node.clone(),
            what: what.to_owned(),
            began,
        };
        let mut failures = lock(&self.failures);
        failures.entry(pod.uid.clone()).or_insert_with(failure);
    }
}
