//! Keeps Kubernetes Secrets in step with mounted volumes.
//!
//! The `secretObjects` of a class become Secrets before the publish of its volume returns, so that a
//! container can take its environment from them at its first start. From then on they are kept in
//! step: `SecretSync::volume_mounted` is called for every content that changed, and
//! [`SecretSync::run`] checks each Secret about every `--sync-interval`, with one request by name, and
//! writes nothing while everything is in order. It also keeps what the driver remembers of each class
//! fresh enough for kubelet's looks at its volumes (`Intervals::between_reads`).
//!
//! A Secret is made from the newest content of its class's volumes on this node (modules `content`
//! and `desired`). Drivers on other nodes make it, too; what the Secret says about itself decides
//! which content is newer, see [`crate::cluster::secrets`]. If the Secret has been deleted, its last
//! known order decides for a while (module `overtaken`). All content comes from volumes and records,
//! so that a restarted driver knows as much as one that has run for long.

mod cache;
mod content;
mod desired;
mod overtaken;
mod parsing;
#[doc(hidden)]
pub mod pure;
mod reconcile;
mod report;
mod resync;
mod schedule;
mod tls;

use std::{fmt, path::PathBuf, slice, sync::Arc, time::Duration};

use tokio::time::{Instant, timeout};

use crate::{
    cluster::{
        Class, Cluster,
        interval::Intervals,
        pod_status::{Aspect, StatusOf},
        secrets::{ErrorType, SyncError},
    },
    error::{Error, Result},
    metrics::Metrics,
    mount::Tmpfs,
    record::{ClassState, Pod, Record, Records},
    turns::{Turn, Turns},
};
use cache::{Cache, ClassKey, SecretKey};
use desired::Batch;
#[cfg(any(test, fuzzing))]
pub(crate) use desired::fuzz as fuzz_class;
use parsing::{Parsing, RefusedObjects};
use reconcile::Target;
use report::{Told, WHOLE_CLASS};
use schedule::Checked;
#[cfg(any(test, fuzzing))]
pub(crate) use tls::fuzz as fuzz_tls;

/// The time for which a publish waits for its Secrets. The checks write the rest. Where a Secret that
/// is not written fails the publish, it waits longer if its caller does.
const PUBLISH_WAIT: Duration = Duration::from_secs(20);

/// Says why the Secrets of a pod without an owner are not written.
const NO_OWNER: &str = "the pod is gone, or somebody has deleted its SecretProviderClassPodStatus, with which these Secrets live; the driver writes both again for a pod that is there";

/// A mounted volume.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Volume {
    /// The volume handle.
    id: String,
    pod: Pod,
    /// The target path.
    target: PathBuf,
    /// The name of its SecretProviderClassPodStatus.
    pod_status: String,
}

impl Volume {
    fn of(record: &Record) -> Self {
        Self {
            id: record.volume_id.clone(),
            pod: record.pod.clone(),
            target: record.target_path.clone(),
            pod_status: record.pod_status.clone(),
        }
    }

    fn status(&self) -> StatusOf<'_> {
        StatusOf {
            volume_id: &self.id,
            pod: &self.pod,
            name: &self.pod_status,
        }
    }
}

/// The flags that concern Secrets.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Whether a Secret that cannot be made fails the publish.
    pub errors_fail_publish: bool,
    /// The time between two checks of a Secret, and the other flags that decide about intervals.
    pub intervals: Intervals,
    /// Whether volumes are refreshed.
    pub refreshes: bool,
}

/// Keeps the Secrets of the volumes of this node.
pub struct SecretSync {
    cluster: Cluster,
    records: Records,
    tmpfs: Arc<Tmpfs>,
    metrics: Metrics,
    errors_fail_publish: bool,
    refreshes: bool,
    interval: Duration,
    intervals: Intervals,
    cache: Cache,
    told: Arc<Told>,
    /// One reconciliation at a time of a Secret, by its namespace and name.
    turns: Turns<(String, String)>,
    parsing: Parsing,
    refused: Arc<RefusedObjects>,
}

impl SecretSync {
    /// Makes the sync of a node. `tmpfs` tells which mounts are volumes of the driver.
    pub fn new(
        cluster: Cluster,
        records: Records,
        tmpfs: Arc<Tmpfs>,
        metrics: Metrics,
        options: Options,
    ) -> Self {
        Self {
            cluster,
            records,
            tmpfs,
            metrics,
            errors_fail_publish: options.errors_fail_publish,
            refreshes: options.refreshes,
            interval: options.intervals.sync,
            intervals: options.intervals,
            cache: Cache::new(options.intervals),
            told: Arc::default(),
            turns: Turns::new(1),
            parsing: Parsing::default(),
            refused: Arc::default(),
        }
    }

    /// Writes the Secrets of a volume that has been mounted, or whose content or class has changed.
    /// Sends no request for a class without `secretObjects`. `record` is the record of the volume,
    /// which a publish writes to disk only after this.
    ///
    /// # Errors
    /// Fails only if [`Options::errors_fail_publish`] is set: the error of the first Secret that could not
    /// be written.
    pub async fn volume_mounted(&self, record: &Record, class: &Class) -> Result<()> {
        self.volume_mounted_by(record, class, Instant::now()).await
    }

    /// Does the same for a publish that has to be done by `deadline`.
    ///
    /// # Errors
    /// The same as for [`SecretSync::volume_mounted`].
    pub async fn volume_mounted_by(
        &self,
        record: &Record,
        class: &Class,
        deadline: Instant,
    ) -> Result<()> {
        let volume = &Volume::of(record);
        let key = ClassKey::new(&volume.pod.namespace, &class.identity.name);
        self.add_told(&volume.id);
        let released = self.cache.add_mounted(volume, class);
        // A newer state may be known, if this volume was mounted with an older one.
        let newest = self.cache.class(&key);
        let class = newest.as_deref().unwrap_or(class);
        let written = match self.check_limits(class, slice::from_ref(volume)) {
            Err(error) => Err(error),
            Ok(()) if class.secret_objects.is_empty() && released.is_empty() => Ok(()),
            Ok(()) => {
                let write = self.write_all(record, volume, &key, class, &released);
                let wait =
                    self.wait_for_secrets(deadline.saturating_duration_since(Instant::now()));
                let written = timeout(wait, write).await;
                written.unwrap_or_else(|_| Err(self.not_in_time(volume, &key, class, wait)))
            }
        };
        match written {
            Err(error) if self.errors_fail_publish => Err(Error::from(error).context(
                format_args!("failed to keep the Secrets of pod {}", volume.pod),
            )),
            _ => Ok(()),
        }
    }

    /// Returns how long a publish waits for its Secrets, of which the caller waits for `left`. A publish
    /// that fails begins anew, and would not come further in the same time.
    fn wait_for_secrets(&self, left: Duration) -> Duration {
        if self.errors_fail_publish {
            PUBLISH_WAIT.max(left)
        } else {
            PUBLISH_WAIT
        }
    }

    /// Returns whether the Secrets of a volume are kept.
    pub fn knows(&self, volume_id: &str) -> bool {
        self.cache.volume(volume_id).is_some()
    }

    /// Adds a mounted volume that another driver has published. Its class and its Secrets are checked within one
    /// interval. Sends no request.
    pub fn volume_found(&self, record: &Record) {
        self.add_recorded(Volume::of(record), record.class.clone(), record.is_fresh());
        self.cache.sooner.notify_one();
    }

    /// Adds a volume that was mounted by another process: this driver before it was started anew, or another one.
    /// It may have ended between a refresh that succeeded and the pod status, which then tells of failures until
    /// somebody takes that back.
    fn add_recorded(&self, volume: Volume, class: ClassState, is_fresh: bool) {
        self.add_told(&volume.id);
        if is_fresh {
            self.cluster
                .set_trouble(volume.status(), Aspect::Freshness, None);
        }
        self.cache.add_recorded(volume, class);
    }

    /// Removes a volume that is being unpublished: no Secret is made of it any more. Sends no request.
    pub fn forget(&self, volume_id: &str) {
        self.cache.remove(volume_id);
        self.told.remove(volume_id);
        self.cluster.remove_volume(volume_id);
        self.metrics.volume_has_no_state(volume_id);
    }

    /// Adds a mounted volume, of which the pod and the pod status can be told something.
    fn add_told(&self, volume_id: &str) {
        self.cluster.add_volume(volume_id, self.interval);
        self.told.add(volume_id);
    }

    /// Returns whether a Secret of a class has been found with other content, of a higher order than
    /// that of the newest volume on this node, since the last call. The caller gives content that the
    /// provider has confirmed a new order. Sends no request.
    pub fn was_overtaken(&self, namespace: &str, class: &str) -> bool {
        self.cache.take_overtaken(&ClassKey::new(namespace, class))
    }

    /// Returns whether a check has written the pod status of a volume, perhaps from a record that a refresh
    /// has replaced since, since the last call. Sends no request.
    pub fn take_status_written(&self, volume_id: &str) -> bool {
        self.cache.set_status_written(volume_id, false)
    }

    /// Notes that the pod status of a volume may have versions of before its last refresh, so that the next
    /// one writes it. Sends no request.
    pub fn status_may_be_old(&self, volume_id: &str) {
        self.cache.set_status_written(volume_id, true);
    }

    /// Notes that the pod status of a volume was written again. It is a new object, which owns the
    /// Secrets of a pod without a controller from now on. Sends no request.
    pub fn pod_status_is_new(&self, pod: &Pod, volume_id: &str) {
        tracing::info!(pod = %pod, "the pod status of this volume was missing or emptied, and is written again");
        self.cache.set_owners(volume_id, None);
        // With the former one, Kubernetes may have deleted them.
        self.cache.expedite_secrets(volume_id);
    }

    /// Waits until no other task reconciles a Secret.
    async fn turn(&self, secret: &SecretKey) -> Turn {
        let key = (secret.class.namespace.clone(), secret.name.clone());
        self.turns.take(key).await
    }

    /// Checks that a class does not exceed the limits for Secrets, and tells these pods if it does.
    fn check_limits(&self, class: &Class, volumes: &[Volume]) -> Result<(), SyncError> {
        let Some(why) = &class.too_much else {
            self.forget_class_error(class, volumes);
            return Ok(());
        };
        let error = class_error(class, SyncError::new(ErrorType::InvalidClass, why));
        self.report_error(class, WHOLE_CLASS, volumes, &error);
        Err(error)
    }

    /// Writes all Secrets of a volume's class, after the release of those that the class does not
    /// make any more. Returns the first error.
    async fn write_all(
        &self,
        record: &Record,
        volume: &Volume,
        key: &ClassKey,
        class: &Class,
        released: &[String],
    ) -> Result<(), SyncError> {
        self.release(&key.namespace, class, released).await;
        let owners = self.cluster.pod_owners(&volume.pod, &volume.pod_status);
        match owners.await {
            Ok(Some(owners)) if owners.pod_ended => return Ok(()),
            Ok(Some(owners)) => self.cache.set_owners(&volume.id, Some(owners)),
            Ok(None) => return Err(self.not_written(volume, key, class, NO_OWNER)),
            Err(error) => return Err(self.not_written(volume, key, class, error)),
        }
        let class = &Arc::new(class.without_parameters());
        let mut batch = Batch::default();
        let mut first = Ok(());
        for object in class.secret_objects.iter() {
            let key = &key.secret(&object.secret_name);
            let _turn = self.turn(key).await;
            let target = Target { key, class, object };
            let result = self.write(target, record, &mut batch).await;
            self.cache.secret_checked(key, Checked::of(&result));
            self.report(class, &key.name, slice::from_ref(volume), &result);
            first = first.and(result.map(|_| ()));
        }
        first
    }

    /// Releases Secrets that a class no longer makes.
    async fn release(&self, namespace: &str, class: &Class, secrets: &[String]) {
        for secret in secrets {
            let released = self
                .cluster
                .release_secret(namespace, secret, &class.identity);
            if let Err(error) = released.await {
                // The next class that makes it finds that this one does not.
                tracing::debug!(namespace, secret, %error, "could not be released");
            }
        }
    }

    /// Has the Secrets of a class checked soon, not all of which were written in time. Returns the
    /// error that the pod is told.
    fn not_in_time(
        &self,
        volume: &Volume,
        key: &ClassKey,
        class: &Class,
        wait: Duration,
    ) -> SyncError {
        let next = match self.errors_fail_publish {
            true => "trying again",
            false => "the driver writes the rest in the background",
        };
        let why = format!(
            "its {} Secrets were not all written within {} seconds; {next}. Does the class make too many Secrets of large objects, or is the API server slow?",
            class.secret_objects.len(),
            wait.as_secs()
        );
        self.not_written(volume, key, class, why)
    }

    /// Has the Secrets of a class checked soon. Returns the error that the pod is told, once for all
    /// of them.
    fn not_written(
        &self,
        volume: &Volume,
        key: &ClassKey,
        class: &Class,
        why: impl fmt::Display,
    ) -> SyncError {
        for object in class.secret_objects.iter() {
            let secret = key.secret(&object.secret_name);
            self.cache.secret_checked(&secret, Checked::Failed);
        }
        let error = class_error(class, SyncError::unavailable(why));
        self.report_error(class, WHOLE_CLASS, slice::from_ref(volume), &error);
        error
    }
}

/// Adds the name of the class to an error about all of its Secrets.
fn class_error(class: &Class, error: SyncError) -> SyncError {
    error.context(format_args!("SecretProviderClass {}", class.identity.name))
}

/// Runs short work on the file system on a thread that may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}
