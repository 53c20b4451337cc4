//! One volume's life: publish, refresh and unpublish.
//!
//! A volume is published when its record says so, its mount is there and its content is there;
//! the function `plan` decides from these three and nothing else. The order of steps of a publish,
//! and what undoes them, stand in `Volumes::carry_out`; those of a refresh in `Volumes::refresh`.
//!
//! A live mount is never replaced or taken away by a publish, because a running container may
//! hold it: a mount without a record is filled in place. What a failed publish made itself goes
//! away again, whichever way the publish ends: by an error, a cancelled call or a panic. A refresh
//! that fails leaves content and pod status as they were, and is repeated later.

mod content;
pub mod policy;
mod refresh;
pub mod restless;
pub mod target;
pub mod threads;

use std::{collections::BTreeMap, future::Future, io, path::PathBuf, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use zeroize::Zeroizing;

use crate::{
    cluster::{
        Class, Cluster,
        pod_status::{DesiredPodStatus, Written},
    },
    error::{Error, Reason, Result},
    files::{Access, layout, open_root},
    memory::Memory,
    metrics::{Metrics, PublishGuard},
    mount::{self, TargetState, Tmpfs, VolumeMount},
    provider::{MountCall, Providers, Reply, Urgency},
    record::{self, Age, Content, Object, Pod, Record, Records},
    secret::SecretMap,
    sync::SecretSync,
};
use content::{
    Undo, commit_content, directory, reaches_pods, refit, stage_files, still_there, take_down,
};
use policy::{Every, Failing, Policy};
use restless::Restless;
use target::{Busy, TargetPath};
use threads::{Health, blocking};

/// Where kubelet passes service account tokens, and where a provider looks for them.
pub const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// How often it is asked whether a pod is being deleted whose provider does not answer.
const LOOK_AT_POD: Duration = Duration::from_secs(10);

/// A NodePublishVolume, checked for form.
pub struct PublishRequest {
    /// kubelet's volume handle.
    pub volume_id: String,
    /// Where the volume must appear.
    pub target: TargetPath,
    /// Who wants it.
    pub pod: Pod,
    /// The name of the SecretProviderClass, in the pod's namespace.
    pub class: String,
    /// The volume's attributes: the user's, and those that kubelet adds. Without tokens.
    pub attributes: SecretMap,
    /// The data of the pod's nodePublishSecretRef. Without tokens.
    pub secrets: SecretMap,
    /// Service account tokens as kubelet's JSON, when the CSIDriver asks for them.
    pub tokens: Option<Zeroizing<String>>,
    /// Who may read the files.
    pub access: Access,
    /// How often the volume wants to be refreshed, if it says so itself.
    pub every: Option<Every>,
    /// When the provider must have answered, so that there is time left to finish or undo.
    pub deadline: Instant,
}

/// What a publish found or did.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// The volume was published already and not due for a refresh; no provider was asked.
    AlreadyPublished,
    /// The volume is published now.
    Published,
    /// The volume was published already and has been refreshed.
    Refreshed {
        /// Whether its content changed.
        changed: bool,
    },
    /// The volume was published already, its refresh failed, and it keeps what it holds.
    Kept(Error),
}

/// The time of the day that does not jump: as it was when the driver started, and what has
/// passed since.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    at_start: Timestamp,
    started: Instant,
}

impl Clock {
    /// A clock that starts now.
    pub fn start() -> Self {
        Self {
            at_start: Timestamp::now(),
            started: Instant::now(),
        }
    }

    fn now(&self) -> Timestamp {
        self.at_start
            .saturating_add(self.started.elapsed())
            .unwrap_or(self.at_start)
    }
}

/// All volumes of this node.
pub struct Volumes {
    /// This node's name.
    pub node: String,
    /// kubelet's root directory, where it is known: targets must lie below it.
    pub kubelet_root: Option<PathBuf>,
    /// What is known of them.
    pub records: Records,
    /// The API server.
    pub cluster: Cluster,
    /// The providers.
    pub providers: Providers,
    /// Their file systems.
    pub tmpfs: Arc<Tmpfs>,
    /// What their content takes.
    pub memory: Arc<Memory>,
    /// The targets that are being worked on.
    pub busy: Busy,
    /// Which refreshes there are.
    pub policy: Policy,
    /// The volumes whose refreshes fail.
    pub failing: Failing,
    /// The volumes whose content is another at each refresh.
    pub restless: Restless,
    /// What counts refreshes.
    pub metrics: Metrics,
    /// What keeps the Secrets of classes that make some.
    pub sync: Arc<SecretSync>,
    /// What time it is.
    pub clock: Clock,
    /// Whether the threads of file system work get anywhere.
    pub health: Health,
}

impl Volumes {
    /// Publishes a volume, or refreshes one that is published and due.
    ///
    /// `cancelled` says that nobody waits for the result any more. A publish that has not got
    /// the provider's answer by then ends and is undone; one that has it finishes.
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
        let found = match self.look(request).await {
            Ok(found) => found,
            Err(error) => {
                return Err(self
                    .answer(&request.volume_id, &request.target, error)
                    .await);
            }
        };
        let published = match plan(&found) {
            Plan::Keep(record) => {
                metrics.provider(&record.provider);
                return self.keep_fresh(record.clone(), request, cancelled).await;
            }
            needed => {
                let needs_mount = needed == Plan::MountAndFill;
                let earlier = found.record.as_ref();
                self.carry_out(needs_mount, earlier, request, metrics, cancelled)
                    .await
            }
        };
        match published {
            Ok(()) => Ok(Outcome::Published),
            Err(error) => {
                self.measure(&request.target).await;
                Err(self
                    .answer(&request.volume_id, &request.target, error)
                    .await)
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

    /// Returns the answer to a publish that kubelet may hear.
    ///
    /// kubelet forgets a volume after a final code, and would never unpublish it. So the code of
    /// `error` stays final only where nothing is left: no directory, no mount, no record.
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

    /// Returns the answer to a publish whose request is wrong in its form. `target` is the path
    /// as it was sent: a volume may be mounted there since an earlier request.
    pub async fn refuse(&self, volume_id: &str, target: &str, error: Error) -> Error {
        // What is no path of kubelet's has never been published at.
        let Ok(target) = TargetPath::parse(target, self.kubelet_root.as_deref(), None) else {
            return error;
        };
        match self.busy.publishing(&target, &CancellationToken::new()) {
            Ok(_busy) => self.answer(volume_id, &target, error).await,
            Err(_) => error.not_final(),
        }
    }

    /// The steps of a publish, in their order. Dropping `undo` takes a new mount away again.
    /// `earlier` is what is recorded of this volume, which is not published all the same.
    async fn carry_out(
        &self,
        needs_mount: bool,
        earlier: Option<&Record>,
        request: &PublishRequest,
        metrics: &mut PublishGuard,
        cancelled: &CancellationToken,
    ) -> Result<()> {
        let pod = &request.pod;
        let class = unless(
            cancelled,
            self.cluster.class(&pod.namespace, &request.class),
        )
        .await?;
        metrics.provider(&class.provider);
        if let Some(earlier) = earlier
            && class.identity.age(&earlier.class) == Age::OlderContent
        {
            return Err(Error::unavailable(format!(
                "secretproviderclass {}/{}: the API server answers with an older state of it (resource version {}) than the one that this volume had ({}); trying again. If the API server was restored from a backup, change the class or replace the pod",
                pod.namespace,
                request.class,
                class.identity.resource_version,
                earlier.class.resource_version,
            ))
            .with_reason(Reason::SecretProviderClassNotFound));
        }

        let (undo, held) = match needs_mount {
            true => {
                let (undo, held) = self.mount(request).await?;
                (Some(undo), held)
            }
            false => (None, refit(request, &self.tmpfs).await?),
        };
        let ask = self.ask_provider(request, &class, &[], Urgency::FirstMount);
        let reply = self.while_wanted(pod, cancelled, ask).await?;
        let so_far = earlier
            .filter(|_| !needs_mount)
            .map(|earlier| earlier.content);
        let staged = stage_files(
            request,
            &held,
            &self.tmpfs,
            &self.memory,
            reply.files,
            so_far,
        )
        .await?;
        let now = self.clock.now();
        let mut record = Record {
            volume_id: request.volume_id.clone(),
            target_path: request.target.as_path().to_owned(),
            pod: pod.clone(),
            class: class.identity.clone(),
            provider: class.provider.clone(),
            pod_status: String::new(),
            objects: reply.objects,
            content: staged.content(),
            orders: BTreeMap::new(),
            files: None,
            last_success: now,
            last_change: now,
            failing_since: None,
        };
        let place = self.stage_record(&record).await?;
        commit_content(request, &held, &self.tmpfs, &self.memory, staged).await?;
        let directory = directory(request, &held, record.content).await?;
        // An annotation that says neither is a refresh's trouble.
        let sends = policy::sends_versions(&class.identity).unwrap_or_default();
        record.files = self.names(request, sends).await;
        let before = earlier.map(|earlier| earlier.pod_status.as_str());
        let written = self
            .write_pod_status(request, &record.objects, Some(now), before)
            .await?;
        let pod_status = written.name;
        record.pod_status = pod_status.clone();
        record.orders.insert(directory, written.resource_version);
        let synced = self.sync.volume_mounted(&record, &class).await;
        let committing = async {
            synced?;
            still_there(request, &held).await?;
            self.commit_record(place, record).await
        };
        if let Err(error) = committing.await {
            if undo.is_some() {
                self.sync.forget(&request.volume_id);
            }
            if undo.is_some()
                && let Err(left) = self.cluster.delete_pod_status(pod, &pod_status).await
            {
                tracing::warn!(pod = %pod, error = %left, "the pod status of a failed publish stays until the pod goes");
            }
            return Err(error);
        }
        if let Some(undo) = undo {
            undo.forget();
        }
        self.metrics
            .success(&class.provider, &request.volume_id, now);
        Ok(())
    }

    async fn write_pod_status(
        &self,
        request: &PublishRequest,
        objects: &[Object],
        changed: Option<Timestamp>,
        before: Option<&str>,
    ) -> Result<Written> {
        let mounted = self.mounted(request, objects, changed);
        self.cluster.write_pod_status(&mounted, before).await
    }

    /// What the pod status of a volume says.
    fn mounted<'a>(
        &'a self,
        request: &'a PublishRequest,
        objects: &'a [Object],
        changed: Option<Timestamp>,
    ) -> DesiredPodStatus<'a> {
        DesiredPodStatus {
            pod: &request.pod,
            class: &request.class,
            target_path: request.target.as_str(),
            node: &self.node,
            objects,
            changed,
        }
    }

    /// Unpublishes a volume: content, mount, directory and record. Asks nobody, and finds
    /// nothing to do where nothing is.
    ///
    /// A record that cannot be removed, because the node's disk is read-only for example, does
    /// not keep a pod from going: without its mount it says nothing, and it is removed when the
    /// driver starts.
    ///
    /// # Errors
    /// ABORTED if a publish of this target, which is told to stop, goes on for seconds; otherwise
    /// what the system says.
    pub async fn unpublish(&self, volume_id: &str, target: &TargetPath) -> Result<()> {
        let _busy = self.busy.unpublishing(target).await?;
        self.failing.gone(volume_id);
        self.restless.gone(volume_id);
        self.sync.forget(volume_id);
        self.metrics.volume_gone(volume_id);
        let (memory, tmpfs) = (Arc::clone(&self.memory), Arc::clone(&self.tmpfs));
        let records = self.records.clone();
        let (volume_id, path) = (volume_id.to_owned(), target.as_path().to_owned());
        blocking(move || {
            // The record first: without it nothing counts as published, however far this gets.
            let removed = records.remove(&volume_id);
            let taken_down = take_down(&path);
            memory.changed(&path);
            taken_down?;
            tmpfs.forget(&path);
            if let Err(error) = removed {
                tracing::warn!(%error, "the volume is gone; its record could not be removed and stays until the driver starts again");
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

    /// Looks at the three things that decide.
    async fn look(&self, request: &PublishRequest) -> Result<Found> {
        let records = self.records.clone();
        let (volume_id, target, uid) = (
            request.volume_id.clone(),
            request.target.as_path().to_owned(),
            request.pod.uid.clone(),
        );
        blocking(move || {
            let record = records
                .get(&volume_id)
                .filter(|record| record.target_path == target && record.pod.uid == uid);
            let state = mount::state(&target)?;
            let complete = state == TargetState::Mounted && {
                let root = open_root(&target)?;
                match record.as_ref().map(|record| record.content) {
                    Some(Content::Provider) => !layout::is_empty(&root)?,
                    Some(Content::Driver) => layout::is_complete(&root)?,
                    // Of an earlier driver, or of a publish that did not finish.
                    None => layout::is_complete(&root)? || !layout::is_empty(&root)?,
                }
            };
            Ok(Found {
                record,
                state,
                complete,
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
        let (memory, namespace) = (Arc::clone(&self.memory), request.pod.namespace.clone());
        let target = request.target.as_path().to_owned();
        let parent = request.target.parent();
        reaches_pods(request, &self.tmpfs).await?;
        blocking(move || {
            let undo = Undo::of(target.clone());
            // What an interrupted attempt left is taken away first, contents included.
            take_down(&target)?;
            memory.changed(&target);
            if let Err(no_room) = memory.check(&target, &namespace) {
                return Err(io::Error::new(io::ErrorKind::OutOfMemory, no_room));
            }
            mount::make_target(&target)?;
            Ok((undo, Arc::new(tmpfs.mount(&target)?)))
        })
        .await
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::precondition(format!(
                "failed to mount for pod {}: {} is not there for the driver, although kubelet made it: mount kubelet's pods directory into the driver's container at the same path, with mountPropagation Bidirectional (chart value linux.kubeletRootDir)",
                request.pod, parent.display()
            )),
            io::ErrorKind::OutOfMemory => Error::new(
                Code::ResourceExhausted,
                format!("failed to mount for pod {}: {error}", request.pod),
            ),
            _ => Error::internal(format!("failed to mount tmpfs at {} for pod {}: {error}", request.target, request.pod)),
        })
    }

    async fn ask_provider(
        &self,
        request: &PublishRequest,
        class: &Class,
        current: &[Object],
        urgency: Urgency,
    ) -> Result<Reply> {
        let failed = |error: Error| {
            error.context(format_args!(
                "failed to mount secrets store objects for pod {}",
                request.pod
            ))
        };
        let no_json = |error| failed(Error::internal(format!("attributes: {error}")));
        let secrets = if request.secrets.is_empty() {
            "null".to_owned().into()
        } else {
            request.secrets.expose_json().map_err(no_json)?
        };
        let attributes = attributes(class, request);
        self.providers
            .mount(MountCall {
                provider: &class.provider,
                namespace: &request.pod.namespace,
                class: &request.class,
                attributes: attributes.expose_json().map_err(no_json)?,
                with_tokens: attributes.expose(TOKENS).is_some(),
                secrets,
                target: request.target.as_path(),
                current,
                urgency,
                deadline: request.deadline,
            })
            .await
            .map_err(failed)
    }

    /// Awaits a provider's answer, unless nobody needs it any more. kubelet does not unpublish a
    /// volume before its publish has ended, so that the API server is asked what it does not say.
    async fn while_wanted(
        &self,
        pod: &Pod,
        cancelled: &CancellationToken,
        ask: impl Future<Output = Result<Reply>>,
    ) -> Result<Reply> {
        let leaves = async {
            loop {
                sleep(LOOK_AT_POD).await;
                if matches!(self.cluster.is_alive(pod).await, Ok(false)) {
                    break;
                }
            }
            tracing::info!(pod = %pod, "the pod is being deleted; its provider is not waited for");
            cancelled.cancel();
        };
        let (ask, leaves) = (unless(cancelled, Box::pin(ask)), Box::pin(leaves));
        tokio::pin!(ask);
        tokio::select! {
            reply = &mut ask => return reply,
            () = leaves => {}
        }
        ask.await
    }

    /// Takes the room for a record, before anything is done that could not be recorded.
    async fn stage_record(&self, record: &Record) -> Result<record::Staged> {
        let (records, staged) = (self.records.clone(), record.clone());
        blocking(move || records.stage(&staged))
            .await
            .map_err(|error| self.not_recorded(record, &error))
    }

    /// Makes a record valid, and with it the volume a published one.
    async fn commit_record(&self, place: record::Staged, record: Record) -> Result<()> {
        let committed = record.clone();
        blocking(move || place.commit(&committed))
            .await
            .map_err(|error| self.not_recorded(&record, &error))
    }

    /// Writes a record of which nothing else depends.
    async fn write_record(&self, record: Record) -> Result<()> {
        let place = self.stage_record(&record).await?;
        self.commit_record(place, record).await
    }

    fn not_recorded(&self, record: &Record, error: &io::Error) -> Error {
        let code = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::ResourceExhausted,
            _ => Code::Internal,
        };
        Error::new(
            code,
            format!(
                "failed to record the volume of pod {} on the node's disk, in {}: {error}",
                record.pod,
                self.records.directory().display()
            ),
        )
    }
}

/// What [`Volumes::look`] found.
struct Found {
    record: Option<Record>,
    state: TargetState,
    /// Whether the mount holds content.
    complete: bool,
}

/// What a publish has to do.
#[derive(Debug, PartialEq, Eq)]
enum Plan<'a> {
    /// Nothing but to keep it fresh: the volume is published.
    Keep(&'a Record),
    /// Write the content into the mount that is there.
    FillInPlace,
    /// All of it.
    MountAndFill,
}

/// The decision. A directory proves nothing, and neither does a mount without a record.
fn plan(found: &Found) -> Plan<'_> {
    match (found.state, &found.record) {
        (TargetState::Mounted, Some(record)) if found.complete => Plan::Keep(record),
        (TargetState::Mounted, _) => Plan::FillInPlace,
        (TargetState::Absent | TargetState::Directory | TargetState::NotADirectory, _) => {
            Plan::MountAndFill
        }
    }
}

/// Returns what a provider is told: the class's parameters, the volume's attributes over them, and
/// the tokens, in the order in which upstream merges them (`NodePublishVolume` in
/// `pkg/secrets-store/nodeserver.go`).
fn attributes(class: &Class, request: &PublishRequest) -> SecretMap {
    let mut attributes: SecretMap = class
        .parameters
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    attributes.extend(&request.attributes);
    if let Some(tokens) = &request.tokens {
        attributes.insert(TOKENS, tokens.as_str());
    }
    attributes
}

/// Awaits a step, unless nobody waits for the publish any more.
async fn unless<T>(
    cancelled: &CancellationToken,
    step: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        biased;
        () = cancelled.cancelled() => Err(Error::new(Code::Cancelled, "the publish was cancelled: its caller went away, its pod is being deleted, or the volume is being unpublished")),
        result = step => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[derive(Debug, PartialEq)]
    enum Does {
        Keep,
        Fill,
        Mount,
    }

    fn some_record() -> Record {
        Record {
            volume_id: "csi-1".into(),
            target_path: "/t".into(),
            pod: Pod {
                name: "p".into(),
                namespace: "n".into(),
                uid: "u".into(),
            },
            class: record::Class {
                name: "c".into(),
                uid: "u".into(),
                generation: None,
                resource_version: "1".into(),
                annotations: Default::default(),
            },
            provider: "vault".into(),
            pod_status: "s".into(),
            objects: Vec::new(),
            content: Content::Driver,
            orders: Default::default(),
            files: None,
            last_success: Timestamp::UNIX_EPOCH,
            last_change: Timestamp::UNIX_EPOCH,
            failing_since: None,
        }
    }

    #[rstest]
    #[case::published(true, TargetState::Mounted, true, Does::Keep)]
    #[case::killed_between_mount_and_write(false, TargetState::Mounted, false, Does::Fill)]
    #[case::killed_between_write_and_record(false, TargetState::Mounted, true, Does::Fill)]
    #[case::of_an_earlier_driver(false, TargetState::Mounted, true, Does::Fill)]
    #[case::content_lost(true, TargetState::Mounted, false, Does::Fill)]
    #[case::first(false, TargetState::Absent, false, Does::Mount)]
    #[case::a_directory_proves_nothing(false, TargetState::Directory, false, Does::Mount)]
    #[case::after_a_reboot(true, TargetState::Directory, false, Does::Mount)]
    #[case::directory_lost(true, TargetState::Absent, false, Does::Mount)]
    #[case::something_else_lies_there(false, TargetState::NotADirectory, false, Does::Mount)]
    fn decisions(
        #[case] recorded: bool,
        #[case] state: TargetState,
        #[case] complete: bool,
        #[case] expected: Does,
    ) {
        let record = recorded.then(some_record);
        let found = Found {
            record,
            state,
            complete,
        };
        let does = match plan(&found) {
            Plan::Keep(_) => Does::Keep,
            Plan::FillInPlace => Does::Fill,
            Plan::MountAndFill => Does::Mount,
        };
        assert_eq!(does, expected);
    }
}
