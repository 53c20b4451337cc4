//! The life of a volume: publish, refresh and unpublish.
//!
//! A volume is published when its record says so, its mount is there and its content is there;
//! the function `plan` decides from these three and nothing else. The order of steps of a publish,
//! and what undoes them, stand in `Volumes::carry_out`; those of a refresh in `Volumes::refresh`.
//!
//! A live mount is never replaced or taken away by a publish, because a running container may
//! use it: a mount without a record is filled in place. A failed publish removes what it made
//! itself, whether it ends by an error, a cancelled call or a panic. A refresh that fails leaves
//! content and pod status as they were, and is repeated later.

mod ask;
mod class;
mod content;
mod failing;
mod lasting;
mod looks;
pub mod policy;
mod recording;
mod refresh;
mod request;
mod restless;
mod sub_path;
pub mod target;
mod threads;
mod unchanged;
mod undo;

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::{
    cluster::{Class, Cluster, pod_status::NewOrder},
    config::Config,
    error::{Error, Reason, Result},
    files::{
        Stamp, layout,
        swap::{self, Leftovers},
    },
    memory::Memory,
    metrics::{Metrics, PublishGuard},
    mount::{self, Root, TargetState, Tmpfs, VolumeMount},
    provider::Providers,
    record::{Age, Object, Record, Records, Writer},
    sync::SecretSync,
};
use ask::unless;
use content::{Filled, check_propagation};
use failing::Failing;
use lasting::Lasting;
use looks::Looks;
use policy::{Clock, Every, Policy};
pub use request::{Origin, Outcome, PublishRequest, TOKENS, UnpublishRequest};
use restless::Restless;
use sub_path::Told;
use target::{Busy, TargetPath};
use threads::{ThreadHealth, blocking};
use unchanged::{Digests, Evidence};
use undo::{Undo, take_down};

/// The parts of the driver that volumes use.
pub struct Parts {
    /// The records of this node.
    pub records: Records,
    /// The API server.
    pub cluster: Cluster,
    /// The providers.
    pub providers: Providers,
    /// The file systems of volumes.
    pub tmpfs: Arc<Tmpfs>,
    /// The memory that content takes.
    pub memory: Arc<Memory>,
    /// The Secrets of classes that declare some.
    pub sync: Arc<SecretSync>,
    /// The metrics.
    pub metrics: Metrics,
}

/// All volumes of this node.
pub struct Volumes {
    /// This node's name.
    node: String,
    /// kubelet's root directory, if it is known: targets must lie below it.
    kubelet_root: Option<PathBuf>,
    policy: Policy,
    records: Records,
    cluster: Cluster,
    providers: Providers,
    tmpfs: Arc<Tmpfs>,
    memory: Arc<Memory>,
    sync: Arc<SecretSync>,
    metrics: Metrics,
    /// The targets that calls are working on.
    busy: Busy,
    looks: Looks,
    digests: Digests,
    failing: Failing,
    restless: Restless,
    lasting: Lasting,
    told_of_sub_paths: Told,
    clock: Clock,
    health: ThreadHealth,
}

impl Volumes {
    /// Creates the volumes of the node that `config` names.
    pub fn new(config: &Config, parts: Parts) -> Self {
        Self {
            node: config.node_id.clone(),
            kubelet_root: config.kubelet_root_dir.clone(),
            policy: Policy::from(config),
            records: parts.records,
            cluster: parts.cluster,
            providers: parts.providers,
            tmpfs: parts.tmpfs,
            memory: parts.memory,
            sync: parts.sync,
            metrics: parts.metrics,
            busy: Busy::default(),
            looks: Looks::default(),
            digests: Digests::default(),
            failing: Failing::default(),
            restless: Restless::default(),
            lasting: Lasting::default(),
            told_of_sub_paths: Told::default(),
            clock: Clock::start(),
            health: ThreadHealth::default(),
        }
    }

    /// Returns kubelet's root directory, if it is known.
    pub fn kubelet_root(&self) -> Option<&Path> {
        self.kubelet_root.as_deref()
    }

    /// Checks that the driver can publish and unpublish.
    ///
    /// # Errors
    /// A sentence for the log.
    pub async fn check_health(&self) -> std::result::Result<(), String> {
        self.health.check().await
    }

    /// Asks the providers for their health every `interval`, until `stop`.
    pub async fn watch_providers(&self, interval: Duration, stop: CancellationToken) {
        self.providers.watch_health(interval, stop).await;
    }

    /// Cancels all publishes that are running, which undoes what they have not finished.
    pub fn cancel_publishes(&self) {
        self.busy.cancel_all();
    }

    /// Publishes a volume, or refreshes one that is published and due.
    ///
    /// `cancelled` says that the result is not needed any more. A publish that has not got the
    /// provider's answer by then ends and is undone; one that has it finishes.
    ///
    /// # Errors
    /// Names the step and the pod. A first publish that failed has left nothing behind; a
    /// refresh that failed has changed nothing.
    pub async fn publish(
        &self,
        request: &PublishRequest,
        metrics: &mut PublishGuard,
        cancelled: &CancellationToken,
    ) -> Result<Outcome> {
        let _busy = self.busy.publishing(&request.target, cancelled)?;
        let (volume_id, target) = (&request.volume_id, &request.target);
        let (since_last, verdict) = self.looks.note(volume_id);
        if let Some(verdict) = verdict
            && self.is_unchanged(&verdict, since_last, request)
        {
            self.looks.remember(volume_id, verdict);
            return Ok(Outcome::AlreadyPublished);
        }
        let found = match self.find(request).await {
            Ok(found) => found,
            Err(error) => return Err(self.answer(volume_id, target, error).await),
        };
        let start = match plan(&found) {
            Plan::KeepFresh(record) => {
                metrics.provider(&record.provider);
                let (record, evidence) = (record.clone(), found.evidence);
                let look = (since_last, evidence);
                return self.keep_fresh(record, look, request, cancelled).await;
            }
            Plan::Fill(start) => start,
        };
        let earlier = found.record.as_ref();
        let published = self.carry_out(start, earlier, request, metrics, cancelled);
        match published.await {
            Ok(()) => Ok(Outcome::Published),
            Err(error) => {
                self.measure(target).await;
                Err(self.answer(volume_id, target, error).await)
            }
        }
    }

    /// Measures a volume in which something was undone.
    async fn measure(&self, target: &TargetPath) {
        let (memory, path) = (Arc::clone(&self.memory), target.as_path().to_owned());
        let measured = blocking(move || {
            memory.changed(&path);
            Ok(())
        });
        if let Err(error) = measured.await {
            tracing::debug!(%error, "not measured");
        }
    }

    /// Returns the error with which kubelet is answered.
    ///
    /// kubelet forgets a volume after a final code, and would never unpublish it. So the code of
    /// `error` stays final only if nothing is left: no directory, no mount, no record.
    async fn answer(&self, volume_id: &str, target: &TargetPath, error: Error) -> Error {
        if !error.is_final() {
            return error;
        }
        let records = self.records.clone();
        let (id, path) = (volume_id.to_owned(), target.as_path().to_owned());
        let nothing_left = blocking(move || match mount::state(&path)? {
            TargetState::Absent => records.remove(&id).map(|()| true),
            TargetState::Directory | TargetState::Mounted | TargetState::NotADirectory => Ok(false),
        });
        match nothing_left.await {
            Ok(true) => error,
            Ok(false) => error.not_final(),
            Err(why) => {
                tracing::warn!(target_path = %target, error = %why, "cannot determine whether a failed publish left something behind");
                error.not_final()
            }
        }
    }

    /// Returns the error with which kubelet is answered if the form of a publish is wrong. `target`
    /// is the path as it was sent: a volume may be mounted there since an earlier request.
    pub async fn refuse(&self, volume_id: &str, target: &str, error: Error) -> Error {
        // Nothing was ever published at a path that kubelet does not make.
        let Ok(target) = TargetPath::parse(target, self.kubelet_root(), None) else {
            return error;
        };
        match self.busy.publishing(&target, &CancellationToken::new()) {
            Ok(_busy) => self.answer(volume_id, &target, error).await,
            Err(_) => error.not_final(),
        }
    }

    /// Carries out the steps of a publish, in their order. Dropping `undo` takes a new mount away
    /// again. `earlier` is the record of this volume, which is not published although it has one.
    async fn carry_out(
        &self,
        start: Start,
        earlier: Option<&Record>,
        request: &PublishRequest,
        metrics: &mut PublishGuard,
        cancelled: &CancellationToken,
    ) -> Result<()> {
        let pod = &request.pod;
        let class = self.cluster.class(&pod.namespace, &request.class);
        let class = unless(cancelled, class).await?;
        metrics.provider(&class.provider);
        refuse_older_class(request, &class, earlier)?;
        // Wrong annotations would fail each refresh, long after somebody looks.
        Every::of_class(&class.identity)?;
        let sends_versions = policy::sends_versions(&class.identity)?;
        policy::check_switches(&class.identity)?;

        let (undo, mount) = match start {
            Start::NewMount => {
                let (undo, mount) = self.mount(request).await?;
                (Some(undo), mount)
            }
            Start::InPlace => (None, self.begin_in_place(request).await?),
        };
        let reply = self.ask_first(&class, request, cancelled).await?;
        let present = match start {
            Start::NewMount => None,
            Start::InPlace => earlier.map(|earlier| earlier.writer),
        };
        let now = self.clock.now();
        let record = new_record(request, &class, reply.objects, now);
        let Filled {
            mut record,
            staged_record,
            directory,
        } = self
            .fill(request, &mount, reply.files, present, record)
            .await?;
        record.files = self.names(request, sends_versions).await;
        let before = earlier.map(|earlier| earlier.pod_status.as_str());
        let new_order = NewOrder::Changed(now);
        let written = self
            .write_pod_status(request, &record.objects, Some(new_order), before)
            .await?;
        let pod_status = written.name;
        record.pod_status = pod_status.clone();
        record.orders.insert(directory, written.resource_version);
        let deadline = request.deadline;
        let synced = self.sync.volume_mounted_by(&record, &class, deadline).await;
        let committing = async {
            synced?;
            self.record_volume(request, &mount, staged_record, record)
                .await
        };
        if let Err(error) = committing.await {
            if undo.is_some() {
                self.sync.forget(&request.volume_id);
                if let Err(error) = self.cluster.delete_pod_status(pod, &pod_status).await {
                    tracing::warn!(pod = %pod, %error, "the pod status of a failed publish stays until the pod goes");
                }
            }
            return Err(error);
        }
        if let Some(undo) = undo {
            undo.forget();
        }
        self.metrics
            .success(&class.provider, &request.volume_id, now);
        self.publish_succeeded(request, earlier, &pod_status).await;
        Ok(())
    }

    /// Unpublishes a volume: removes record, mount, content and directory. Needs neither the API
    /// server nor a provider, and succeeds if nothing is there.
    ///
    /// A record that cannot be removed, because the node's disk is read-only for example, does
    /// not keep a pod from going: without its mount it says nothing, and it is removed with the next change
    /// of a record, or when the driver starts.
    ///
    /// # Errors
    /// ABORTED if a publish of this target, which is cancelled, goes on for seconds; otherwise the
    /// system's error.
    pub async fn unpublish(&self, request: &UnpublishRequest) -> Result<()> {
        let UnpublishRequest { volume_id, target } = request;
        let _busy = self.busy.unpublishing(target).await?;
        self.looks.gone(volume_id);
        self.failing.gone(volume_id);
        self.restless.gone(volume_id);
        self.lasting.gone(volume_id);
        self.told_of_sub_paths.forget(volume_id);
        self.sync.forget(volume_id);
        self.metrics.volume_gone(volume_id);
        let (memory, tmpfs) = (Arc::clone(&self.memory), Arc::clone(&self.tmpfs));
        let records = self.records.clone();
        let (volume_id, path) = (volume_id.clone(), target.as_path().to_owned());
        blocking(move || {
            // The record first: without it nothing counts as published, however far this gets.
            let removed = records.remove(&volume_id);
            let taken_down = take_down(&path);
            memory.changed(&path);
            taken_down?;
            tmpfs.forget(&path);
            if let Err(error) = removed {
                tracing::warn!(%error, "the volume is gone; its record could not be removed and stays until another record changes, or the driver starts again");
            }
            Ok(())
        })
        .await
        .map_err(|error| {
            Error::internal(format!(
                "failed to clean and unmount target path {target}: {error}"
            ))
        })
    }

    /// Examines the three things that decide whether a volume is published. Removes what an earlier driver
    /// has left beside the content: a volume that is refreshed seldom would keep former content for long.
    async fn find(&self, request: &PublishRequest) -> Result<Found> {
        let (records, memory) = (self.records.clone(), Arc::clone(&self.memory));
        let (volume_id, target, uid) = (
            request.volume_id.clone(),
            request.target.as_path().to_owned(),
            request.pod.uid.clone(),
        );
        blocking(move || {
            let stamp = Stamp::of(&records.path(&volume_id));
            let record = records
                .get(&volume_id)
                .filter(|record| record.target_path == target && record.pod.uid == uid);
            let (state, root) = mount::examine(&target)?;
            let has_content = match (&root, record.as_ref().map(|record| record.writer)) {
                (None, _) => false,
                (Some(Root { directory, .. }), Some(writer)) => {
                    !layout::is_unfinished(directory)?
                        && match writer {
                            Writer::Provider => !layout::is_empty(directory)?,
                            Writer::Driver => layout::is_linked(directory)?,
                        }
                }
                // An earlier driver wrote it, or a publish that did not finish.
                (Some(Root { directory, .. }), None) => {
                    layout::is_complete(directory)? || !layout::is_empty(directory)?
                }
            };
            let leftovers = match (&root, &record) {
                (Some(root), Some(record)) if has_content && record.writer == Writer::Driver => {
                    tidy(&root.directory)
                }
                _ => Leftovers::default(),
            };
            if leftovers.removed {
                memory.changed(&target);
            }
            // The next look comes back to what is left.
            let mount = root.and_then(|root| root.id).filter(|_| !leftovers.left);
            Ok(Found {
                record,
                state,
                has_content,
                evidence: mount
                    .zip(stamp)
                    .map(|(mount, record)| Evidence { mount, record }),
            })
        })
        .await
        .map_err(|error| {
            Error::internal(format!(
                "failed to check if target path {} is mount point: {error}",
                request.target
            ))
            .with_reason(Reason::FailedToEnsureMountPoint)
        })
    }

    /// Makes the directory and mounts an empty tmpfs on it.
    async fn mount(&self, request: &PublishRequest) -> Result<(Undo, Arc<VolumeMount>)> {
        let tmpfs = Arc::clone(&self.tmpfs);
        let (memory, pod) = (Arc::clone(&self.memory), request.pod.clone());
        let (path, parent) = (request.target.clone(), request.target.parent());
        let mounted = blocking(move || {
            if let Err(refused) = check_propagation(&tmpfs, &path, &pod) {
                return Ok(Err(refused));
            }
            let target = path.as_path().to_owned();
            let undo = Undo::of(target.clone());
            // An interrupted attempt may have left a mount or files.
            take_down(&target)?;
            memory.changed(&target);
            if let Err(no_room) = memory.check(&target, &pod.namespace) {
                return Err(io::Error::new(io::ErrorKind::OutOfMemory, no_room));
            }
            mount::make_target(&target)?;
            let mount = tmpfs.mount(&target)?;
            layout::begin(&mount.open()?)?;
            Ok(Ok((undo, Arc::new(mount))))
        });
        mounted.await.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::precondition(format!(
                "failed to mount for pod {}: {} is not there for the driver, although kubelet made it: mount kubelet's pods directory into the driver's container at the same path, with mountPropagation Bidirectional (chart value linux.kubeletRootDir)",
                request.pod, parent.display()
            )),
            io::ErrorKind::OutOfMemory => Error::new(
                Code::ResourceExhausted,
                format!("failed to mount for pod {}: {error}", request.pod),
            ),
            _ => Error::internal(format!("failed to mount tmpfs at {} for pod {}: {error}", request.target, request.pod)),
        })?
    }
}

/// Removes what lies beside the content of a volume. The content is whole all the same if that fails.
fn tidy(root: &OwnedFd) -> Leftovers {
    swap::tidy(root).unwrap_or_else(|error| {
        tracing::warn!(%error, "former content could not be removed and stays until the next look");
        Leftovers {
            left: true,
            ..Leftovers::default()
        }
    })
}

/// The three things that decide whether a volume is published.
struct Found {
    record: Option<Record>,
    state: TargetState,
    /// Whether the mount has content.
    has_content: bool,
    /// By what the mount and the record are recognized, if the kernel can tell.
    evidence: Option<Evidence>,
}

/// The work of a publish.
#[derive(Debug, PartialEq, Eq)]
enum Plan<'a> {
    /// Refresh the volume if it is due: it is published.
    KeepFresh(&'a Record),
    /// Write the content and record it.
    Fill(Start),
}

/// The mount into which a publish writes the content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// A new mount, which a failure takes away again.
    NewMount,
    /// The mount that is there.
    InPlace,
}

/// Decides what a publish has to do. A directory proves nothing, and neither does a mount without a
/// record.
fn plan(found: &Found) -> Plan<'_> {
    match (found.state, &found.record) {
        (TargetState::Mounted, Some(record)) if found.has_content => Plan::KeepFresh(record),
        (TargetState::Mounted, _) => Plan::Fill(Start::InPlace),
        (TargetState::Absent | TargetState::Directory | TargetState::NotADirectory, _) => {
            Plan::Fill(Start::NewMount)
        }
    }
}

/// Returns the record of a first publish, before content and pod status have been written.
fn new_record(
    request: &PublishRequest,
    class: &Class,
    objects: Vec<Object>,
    now: Timestamp,
) -> Record {
    Record {
        volume_id: request.volume_id.clone(),
        target_path: request.target.as_path().to_owned(),
        pod: request.pod.clone(),
        class: class.identity.clone(),
        provider: class.provider.clone(),
        pod_status: String::new(),
        objects,
        changes_of_versions: 0,
        writer: Writer::Driver,
        orders: BTreeMap::new(),
        coming: None,
        files: None,
        last_success: now,
        last_change: now,
        failing_since: None,
    }
}

/// Refuses a class that is older than the one that the volume had.
fn refuse_older_class(
    request: &PublishRequest,
    class: &Class,
    earlier: Option<&Record>,
) -> Result<()> {
    let Some(earlier) = earlier else {
        return Ok(());
    };
    if class.identity.age(&earlier.class) != Age::OlderContent {
        return Ok(());
    }
    Err(Error::unavailable(format!(
        "SecretProviderClass {}/{}: the API server answers with an older state of it (resource version {}) than the one that this volume had ({}); trying again. If the API server was restored from a backup, change the class or replace the pod",
        request.pod.namespace,
        request.class,
        class.identity.resource_version,
        earlier.class.resource_version,
    ))
    .with_reason(Reason::SecretProviderClassNotFound))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const KEEP: Option<Start> = None;
    const FILL: Option<Start> = Some(Start::InPlace);
    const MOUNT: Option<Start> = Some(Start::NewMount);

    #[rstest]
    #[case::published(true, TargetState::Mounted, true, KEEP)]
    #[case::killed_between_mount_and_write(false, TargetState::Mounted, false, FILL)]
    #[case::killed_between_write_and_record(false, TargetState::Mounted, true, FILL)]
    #[case::of_an_earlier_driver(false, TargetState::Mounted, true, FILL)]
    #[case::content_lost(true, TargetState::Mounted, false, FILL)]
    #[case::first(false, TargetState::Absent, false, MOUNT)]
    #[case::a_directory_proves_nothing(false, TargetState::Directory, false, MOUNT)]
    #[case::after_a_reboot(true, TargetState::Directory, false, MOUNT)]
    #[case::directory_lost(true, TargetState::Absent, false, MOUNT)]
    #[case::something_else_lies_there(false, TargetState::NotADirectory, false, MOUNT)]
    fn decisions(
        #[case] recorded: bool,
        #[case] state: TargetState,
        #[case] has_content: bool,
        #[case] expected: Option<Start>,
    ) {
        let found = Found {
            record: recorded.then(|| Record::example("csi-1", "/t")),
            state,
            has_content,
            evidence: None,
        };
        let start = match plan(&found) {
            Plan::KeepFresh(_) => None,
            Plan::Fill(start) => Some(start),
        };
        assert_eq!(start, expected);
    }
}
