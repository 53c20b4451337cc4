//! Checks again and again whether classes, Secrets and pod statuses are in order.
//!
//! There is one request by name for each Secret of this node in an interval, never in a burst. Classes
//! are read more seldom, and looks of kubelet share what was read. A class without `secretObjects` is
//! read, too, because it may get some while its pods run. A few checks run at once, one of a namespace,
//! and namespaces whose last check failed or was slow share a part of them: a webhook, a finalizer or a
//! quota of one namespace does not delay the Secrets of others. Everything waits, longer and longer,
//! only if the API server is away.

use std::{collections::HashMap, sync::Arc, time::Duration};

use rand::Rng as _;
use tokio::{
    task::{Id, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    SecretSync, Volume, blocking,
    cache::{CachedVolume, ClassKey, SecretKey},
    desired::Batch,
    reconcile::Target,
    schedule::{Check, Checked, VolumeKey},
};
use crate::{
    cluster::{Class, Freshness, Wanted, pod_status::DesiredPodStatus, secrets::Owner},
    error::Result,
    record::{Record, is_object_name},
};

/// The number of checks that run at once, and how many of them in namespaces with failures.
const MAX_CHECKS: usize = 8;
const MAX_FAILING_CHECKS: usize = 4;
/// The time for which a namespace counts as failing after a check that failed or was slow. It is
/// longer than the time to the next failure.
const FAILING_FOR: Duration = Duration::from_secs(300);
/// The time after which a check counts as slow.
const SLOW: Duration = Duration::from_secs(1);
/// The time for which a check goes on with other Secrets that have been computed already.
const MAX_RUN: Duration = Duration::from_secs(5);
/// The longest pause between the beginnings of two checks.
const MAX_PAUSE: Duration = Duration::from_millis(100);
/// The longest wait for an API server that is away.
const MAX_AWAY: Duration = Duration::from_secs(20);

/// What makes a pod status one that is kept.
#[derive(Clone, Copy)]
enum Kept {
    /// It is there.
    Found,
    /// It was missing, and is written.
    Written,
}

/// The checks that run, and the namespaces in which checks fail.
#[derive(Default)]
struct Checks {
    running: JoinSet<Checked>,
    namespaces: HashMap<Id, String>,
    /// The time of the last check that failed or was slow, by namespace. A check that succeeds does
    /// not change it, because another one of the namespace may still fail.
    failing: HashMap<String, Instant>,
}

impl Checks {
    /// Returns whether a check may begin in this namespace.
    fn may_begin(&self, namespace: &str) -> bool {
        let is_failing = |namespace: &str| self.failing.contains_key(namespace);
        let failing = self.namespaces.values().filter(|ns| is_failing(ns));
        self.namespaces.len() < MAX_CHECKS
            && self.namespaces.values().all(|running| running != namespace)
            && (!is_failing(namespace) || failing.count() < MAX_FAILING_CHECKS)
    }

    fn begin(&mut self, sync: &Arc<SecretSync>, check: Check) {
        let namespace = check.namespace().to_owned();
        let sync = Arc::clone(sync);
        let task = self.running.spawn(async move {
            let started = Instant::now();
            let checked = sync.run_check(check).await;
            if started.elapsed() < SLOW {
                checked
            } else {
                Checked::Failed
            }
        });
        self.namespaces.insert(task.id(), namespace);
    }

    /// Waits until a check ends. Never returns if none runs.
    async fn ended(&mut self) {
        let Some(ended) = self.running.join_next_with_id().await else {
            return std::future::pending().await;
        };
        let (id, checked) = match ended {
            Ok(ended) => ended,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // No check is cancelled.
                Err(_) => return,
            },
        };
        let now = Instant::now();
        self.failing
            .retain(|_, since| now.duration_since(*since) < FAILING_FOR);
        if let Some(namespace) = self.namespaces.remove(&id)
            && checked == Checked::Failed
        {
            self.failing.insert(namespace, now);
        }
    }
}

impl SecretSync {
    /// Runs checks until `stop`. Begins with the volumes that were mounted before this process ran,
    /// which the records name.
    pub async fn run(self: &Arc<Self>, stop: CancellationToken) {
        self.add_all_recorded().await;
        let mut checks = Checks::default();
        let mut away = 0_u32;
        let mut not_before = Instant::now();
        loop {
            let next = self
                .cache
                .next_check(|namespace| checks.may_begin(namespace));
            let begins = async {
                match next {
                    Some((due, check)) => {
                        sleep_until(due.max(not_before)).await;
                        check
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.cache.sooner.notified() => {}
                () = checks.ended() => {
                    if !self.cluster.is_away() {
                        away = 0;
                    } else if not_before <= Instant::now() + MAX_PAUSE {
                        // Other checks that ran when the API server went away do not count again.
                        away += 1;
                        not_before = Instant::now() + wait_for_api_server(away);
                    }
                }
                check = begins => {
                    checks.begin(self, check);
                    let count = u32::try_from(self.cache.checks().max(1)).unwrap_or(u32::MAX);
                    let pause = MAX_PAUSE.min(self.interval / 2 / count);
                    not_before = Instant::now() + pause;
                }
            }
        }
    }

    async fn add_all_recorded(&self) {
        let records = self.records.clone();
        // Without the objects, of which there may be many.
        let recorded = blocking(move || {
            let mut recorded = Vec::new();
            records.each(|record| {
                let (volume, is_fresh) = (Volume::of(&record), record.is_fresh());
                recorded.push((volume, record.class, is_fresh));
            })?;
            Ok::<_, std::io::Error>(recorded)
        });
        match recorded.await {
            Ok(recorded) => {
                for (volume, class, is_fresh) in recorded {
                    self.add_recorded(volume, class, is_fresh);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the records of mounted volumes cannot be read; the driver checks their Secrets only after the next change of each volume");
            }
        }
    }

    async fn run_check(&self, check: Check) -> Checked {
        match check {
            Check::Class(class) => self.check_class(class).await,
            Check::Secret(secret) => self.check_secrets(&secret).await,
            Check::PodStatus(volume) => self.check_pod_status(volume).await,
            Check::EndedPod(volume) => match self.cache.take_ended(volume) {
                Some((ended, class)) => self.remove_owners(&ended, &class).await,
                None => Checked::InOrder,
            },
        }
    }

    async fn check_class(&self, key: ClassKey) -> Checked {
        let (namespace, name) = (key.namespace.as_str(), key.name.as_str());
        let known = self.cache.newest_state(&key);
        let known = known.as_ref();
        let wanted = Wanted {
            freshness: Freshness::Within(self.intervals.between_reads_of(known)),
            known,
            with_parameters: false,
        };
        let class = match self.cluster.known_class(namespace, name, &wanted).await {
            Ok(class) => Some(class),
            // Its Secrets stay as they are while there is none.
            Err(error) if error.code() == Code::NotFound => None,
            Err(error) => {
                tracing::debug!(namespace, class = name, %error, "the class could not be read");
                self.cache.class_not_read(key);
                return Checked::Failed;
            }
        };
        if let Some(class) = &class {
            self.tell_of_ignored_refresh(&key, known, class);
        }
        let age = self.cluster.age_of_class(namespace, name);
        let released = self.cache.set_class(&key, class.as_deref(), age);
        let Some(class) = class else {
            return Checked::InOrder;
        };
        let within_limits = self.check_limits(&class, &self.volumes_of(&key));
        self.release(namespace, &class, &released).await;
        Checked::of(&within_limits)
    }

    /// Checks the pod status of a volume. Its record has what it should say.
    async fn check_pod_status(&self, key: VolumeKey) -> Checked {
        let Some(volume) = self.cache.volume(&key.volume_id) else {
            self.cache.pod_status_checked(key, Checked::InOrder);
            return Checked::InOrder;
        };
        let (records, id) = (self.records.clone(), volume.id.clone());
        let kept = match blocking(move || records.get(&id)).await {
            Some(record) => self.keep_pod_status(&record).await,
            // Another driver, which served here for a while, has unpublished it.
            None if volume.target.parent().is_some_and(|pod| !pod.exists()) => {
                self.forget(&volume.id);
                self.metrics.volume_gone(&volume.id);
                return Checked::InOrder;
            }
            // It is being published or unpublished.
            None => Ok(false),
        };
        let checked = match &kept {
            Ok(true) => Checked::Repaired,
            kept => Checked::of(kept),
        };
        self.cache.pod_status_checked(key, checked);
        match kept {
            Ok(false) => {}
            Ok(true) => self.pod_status_is_new(&volume.pod, &volume.id),
            Err(error) => tracing::debug!(%error, "trying again"),
        }
        checked
    }

    /// Writes the pod status of a recorded volume if it is missing. Returns whether it was.
    ///
    /// A refresh writes the pod status before the record. So that a pod status that was missing meanwhile
    /// does not keep the versions of the record from before, the refresh learns that it was written here.
    async fn keep_pod_status(&self, record: &Record) -> Result<bool> {
        if self.with_pod_status(record, Kept::Found).await? {
            return Ok(false);
        }
        self.cache.set_status_written(&record.volume_id, true);
        let (records, id) = (self.records.clone(), record.volume_id.clone());
        match blocking(move || records.get(&id)).await {
            Some(record) => self.with_pod_status(&record, Kept::Written).await,
            None => Ok(false),
        }
    }

    /// Returns whether the pod status of a recorded volume was found, or was written because it was missing.
    async fn with_pod_status(&self, record: &Record, kept: Kept) -> Result<bool> {
        let desired = DesiredPodStatus {
            volume_id: &record.volume_id,
            pod: &record.pod,
            class: &record.class.name,
            target_path: &record.target_path.to_string_lossy(),
            node: self.cluster.node(),
            objects: &record.told_objects(),
            new_order: None,
        };
        let name = &record.pod_status;
        match kept {
            Kept::Found => self.cluster.has_pod_status(&desired, name).await,
            Kept::Written => self.cluster.keep_pod_status(&desired, name).await,
        }
    }

    /// Checks a Secret, and others of its class that had to be computed with it.
    async fn check_secrets(&self, key: &SecretKey) -> Checked {
        let Some(class) = self.cache.class(&key.class) else {
            self.cache.secret_checked(key, Checked::InOrder);
            return Checked::InOrder;
        };
        let mut batch = Batch::default();
        let started = Instant::now();
        let mut all = self.check_secret(key, &class, &mut batch).await;
        for name in batch.names() {
            let now = self.cache.class(&key.class);
            let is_same = now.is_some_and(|now| Arc::ptr_eq(&now, &class));
            if !is_same || started.elapsed() > MAX_RUN {
                break;
            }
            let other = key.class.secret(&name);
            if self.cache.is_due_soon(&other)
                && self.check_secret(&other, &class, &mut batch).await == Checked::Failed
            {
                all = Checked::Failed;
            }
        }
        all
    }

    async fn check_secret(
        &self,
        key: &SecretKey,
        class: &Arc<Class>,
        batch: &mut Batch,
    ) -> Checked {
        let mut objects = class.secret_objects.iter();
        let Some(object) = objects.find(|object| object.secret_name == key.name) else {
            return Checked::InOrder;
        };
        let target = Target { key, class, object };
        // It is reported before a publish reconciles the Secret with other content, and not to the
        // pods that came during the check: what is wrong with the content of others is not theirs.
        let _turn = self.turn(key).await;
        let volumes = self.volumes_of(&key.class);
        let result = self.check(target, batch).await;
        let checked = Checked::of(&result);
        self.cache.secret_checked(key, checked);
        self.report(class, &key.name, &volumes, &result);
        checked
    }

    /// Removes the owners of a pod that has ended from its Secrets, as far as no other pod here gives
    /// them. A pod that has ended may exist for long, and with it a Secret that no pod needs.
    async fn remove_owners(&self, ended: &CachedVolume, class: &Class) -> Checked {
        let volume = &ended.volume;
        let owners = self.cluster.pod_owners(&volume.pod, &volume.pod_status);
        let owners = match owners.await {
            Ok(Some(pod)) if pod.owners_ended => pod.owners,
            Ok(_) => return Checked::InOrder,
            Err(error) => {
                tracing::debug!(pod = %volume.pod, %error, "the owners of the pod could not be read; if the pod has ended, its Secrets keep their owner until it is deleted");
                return Checked::Failed;
            }
        };
        let others = self.cache.volumes_of(&ended.class);
        let is_needed = |owner: &Owner| {
            let others = others.iter().filter_map(|other| other.owners.as_ref());
            let mut owners = others.flat_map(|pod| &pod.owners);
            owners.any(|other| other.uid == owner.uid)
        };
        let namespace = ended.class.namespace.as_str();
        let secrets = class
            .secret_objects
            .iter()
            .map(|object| &object.secret_name);
        for secret in secrets.filter(|name| is_object_name(name)) {
            for owner in owners.iter().filter(|owner| !is_needed(owner)) {
                let _turn = self.turn(&ended.class.secret(secret)).await;
                let removed = self.cluster.remove_owner(namespace, secret, &owner.uid);
                if let Err(error) = removed.await {
                    tracing::debug!(namespace, secret, %error, "keeps an owner that has ended");
                }
            }
        }
        Checked::InOrder
    }

    fn volumes_of(&self, class: &ClassKey) -> Vec<Volume> {
        let volumes = self.cache.volumes_of(class);
        volumes.into_iter().map(|cached| cached.volume).collect()
    }
}

/// Returns the wait for an API server that has been away for so many checks.
fn wait_for_api_server(checks: u32) -> Duration {
    let wait = Duration::from_millis(500) * 2_u32.saturating_pow(checks.min(8));
    wait.min(MAX_AWAY)
        .mul_f64(rand::rng().random_range(0.5..1.0))
}
