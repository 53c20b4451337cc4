//! One volume's life: publish and unpublish.
//!
//! A volume is published when its record says so, its mount is there and its content is there;
//! the function `plan` decides from these three and nothing else. The order of steps of a publish,
//! and what undoes them, stand in `Volumes::carry_out`.
//!
//! A live mount is never replaced or taken away by a publish, because a running container may
//! hold it: a mount without a record is filled in place. What a failed publish made itself goes
//! away again, whichever way the publish ends: by an error, a cancelled call or a panic.

pub mod record;

use std::{
    collections::HashMap,
    fmt, fs,
    future::Future,
    io,
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use zeroize::Zeroizing;

use crate::{
    cluster::{Class, Cluster, pod_status::Mounted},
    error::{Error, Reason, Result},
    files::{Payload, swap},
    metrics::PublishGuard,
    mount::{self, State, Tmpfs},
    provider::{MountCall, Providers, Reply, Urgency},
    secret::SecretMap,
};
use record::{Content, Object, Pod, Record, Records};

/// Where kubelet passes service account tokens, and where a provider looks for them.
pub const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// How many mounts may lie on top of each other at one target; earlier drivers could stack them.
const MAX_STACKED: usize = 32;

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
    /// When the provider must have answered, so that there is time left to finish or undo.
    pub deadline: Instant,
}

/// What a publish found or did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The volume was published already; nobody was asked anything.
    AlreadyPublished,
    /// The volume is published now.
    Published,
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
    /// The targets that are being worked on.
    pub busy: Busy,
}

impl Volumes {
    /// Publishes a volume.
    ///
    /// `cancelled` says that nobody waits for the result any more. A publish that has not got
    /// the provider's answer by then ends and is undone; one that has it finishes.
    ///
    /// # Errors
    /// Names the step and the pod. A first publish that failed has left nothing behind.
    pub async fn publish(
        &self,
        request: &PublishRequest,
        metrics: &mut PublishGuard,
        cancelled: &CancellationToken,
    ) -> Result<Outcome> {
        let _busy = self.busy.publishing(&request.target, cancelled)?;
        let found = self.look(request).await?;
        let plan = plan(&found);
        if plan == Plan::Nothing {
            return Ok(Outcome::AlreadyPublished);
        }
        match self.carry_out(plan, request, metrics, cancelled).await {
            Ok(()) => Ok(Outcome::Published),
            // A running container may use what lies there: kubelet must not clean it away.
            Err(error) if found.complete => Err(error.not_final()),
            Err(error) => Err(error),
        }
    }

    /// The steps of a publish, in their order. Dropping `undo` takes a new mount away again.
    async fn carry_out(
        &self,
        plan: Plan,
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

        let undo = match plan {
            Plan::MountAndFill => Some(self.mount(request).await?),
            Plan::FillInPlace | Plan::Nothing => None,
        };
        let reply = unless(cancelled, self.ask_provider(request, &class)).await?;
        let content = write_files(request, reply.files).await?;
        let pod_status = self
            .cluster
            .write_pod_status(&Mounted {
                pod,
                class: &request.class,
                target_path: request.target.as_str(),
                node: &self.node,
                objects: &reply.objects,
            })
            .await?;

        let committed = self
            .commit(request, class, reply.objects, content, &pod_status)
            .await;
        if let Err(error) = committed {
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
        Ok(())
    }

    /// Unpublishes a volume: content, mount, directory and record. Asks nobody, and finds
    /// nothing to do where nothing is.
    ///
    /// # Errors
    /// ABORTED while a publish of this target runs, which is told to stop; otherwise what the
    /// system says.
    pub async fn unpublish(&self, volume_id: &str, target: &TargetPath) -> Result<()> {
        let _busy = self.busy.unpublishing(target)?;
        let records = self.records.clone();
        let (volume_id, path) = (volume_id.to_owned(), target.0.clone());
        blocking(move || {
            // The record first: without it nothing counts as published, however far this gets.
            records.remove(&volume_id)?;
            take_down(&path)
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
            request.target.0.clone(),
            request.pod.uid.clone(),
        );
        blocking(move || {
            let record = records
                .get(&volume_id)?
                .filter(|record| record.target_path == target && record.pod.uid == uid);
            let state = mount::state(&target)?;
            let complete = state == State::Mounted
                && match record.as_ref().map(|record| record.content) {
                    Some(Content::Provider) => !swap::is_empty(&target)?,
                    Some(Content::Driver) => swap::is_complete(&target)?,
                    // Of an earlier driver, or of a publish that did not finish.
                    None => swap::is_complete(&target)? || !swap::is_empty(&target)?,
                };
            Ok(Found {
                recorded: record.is_some(),
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
    async fn mount(&self, request: &PublishRequest) -> Result<Undo> {
        let tmpfs = Arc::clone(&self.tmpfs);
        let target = request.target.0.clone();
        let parent = request.target.parent();
        blocking(move || {
            let undo = Undo { target: target.clone(), armed: true };
            // What an interrupted attempt left is taken away first, contents included.
            take_down(&target)?;
            mount::make_target(&target)?;
            tmpfs.mount(&target)?;
            Ok(undo)
        })
        .await
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::precondition(format!(
                "failed to mount for pod {}: {} is not there for the driver, although kubelet made it: mount kubelet's pods directory into the driver's container at the same path, with mountPropagation Bidirectional (chart value linux.kubeletRootDir)",
                request.pod, parent.display()
            )),
            _ => Error::internal(format!("failed to mount tmpfs at {} for pod {}: {error}", request.target, request.pod)),
        })
    }

    async fn ask_provider(&self, request: &PublishRequest, class: &Class) -> Result<Reply> {
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
        self.providers
            .mount(MountCall {
                provider: &class.provider,
                attributes: attributes(class, request).expose_json().map_err(no_json)?,
                secrets,
                target: &request.target.0,
                current: &[],
                urgency: Urgency::FirstMount,
                deadline: request.deadline,
            })
            .await
            .map_err(failed)
    }

    /// Writes the record that makes the volume a published one.
    async fn commit(
        &self,
        request: &PublishRequest,
        class: Class,
        objects: Vec<Object>,
        content: Content,
        pod_status: &str,
    ) -> Result<()> {
        let record = Record {
            volume_id: request.volume_id.clone(),
            target_path: request.target.0.clone(),
            pod: request.pod.clone(),
            class: class.identity,
            provider: class.provider,
            pod_status: pod_status.to_owned(),
            objects,
            content,
            last_success: Timestamp::now(),
        };
        let records = self.records.clone();
        blocking(move || records.put(&record))
            .await
            .map_err(|error| {
                Error::internal(format!(
                    "failed to record the volume of pod {} on the node's disk: {error}",
                    request.pod
                ))
            })
    }
}

/// What [`Volumes::look`] found.
struct Found {
    recorded: bool,
    state: State,
    /// Whether the mount holds content.
    complete: bool,
}

/// What a publish has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    /// Nothing: the volume is published.
    Nothing,
    /// Write the content into the mount that is there.
    FillInPlace,
    /// All of it.
    MountAndFill,
}

/// The decision. A directory proves nothing, and neither does a mount without a record.
fn plan(found: &Found) -> Plan {
    match found.state {
        State::Mounted if found.recorded && found.complete => Plan::Nothing,
        State::Mounted => Plan::FillInPlace,
        State::Absent | State::Directory | State::NotADirectory => Plan::MountAndFill,
    }
}

/// What a provider is told: the class's parameters, the volume's attributes over them, and the
/// tokens (contract A.1; the existing driver merges in this order).
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

/// Checks the provider's files and makes the volume hold them. None: the provider has written
/// its files itself, and something must be there.
async fn write_files(
    request: &PublishRequest,
    files: Vec<(String, crate::files::File)>,
) -> Result<Content> {
    let failed = |error: Error| {
        error
            .context(format_args!(
                "failed to write the files of pod {}",
                request.pod
            ))
            .with_reason(Reason::FileWriteError)
    };
    let payload =
        Payload::new(files).map_err(|invalid| failed(Error::precondition(invalid.to_string())))?;
    let volume = request.target.0.clone();
    let written = blocking(move || {
        if !payload.is_empty() {
            swap::replace(&volume, &payload)?;
            return Ok(Some(Content::Driver));
        }
        Ok((!swap::is_empty(&volume)?).then_some(Content::Provider))
    })
    .await;
    match written {
        Ok(Some(content)) => Ok(content),
        Ok(None) => Err(failed(Error::precondition(
            "the provider named objects but sent no files and wrote none itself; the volume would be empty",
        ))),
        Err(error) if error.kind() == io::ErrorKind::StorageFull => Err(failed(Error::new(
            Code::ResourceExhausted,
            format!(
                "{error}: the volume is bounded by what --max-call-recv-msg-size lets a provider send; raise it"
            ),
        ))),
        Err(error) => Err(failed(Error::internal(error.to_string()))),
    }
}

/// A publish's own mount, taken away again when this is dropped.
struct Undo {
    target: PathBuf,
    armed: bool,
}

impl Undo {
    /// The publish has succeeded.
    fn forget(mut self) {
        self.armed = false;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = take_down(&self.target)
        {
            tracing::warn!(target_path = %self.target.display(), %error, "a failed publish could not be undone; the next publish or unpublish tries again");
        }
    }
}

/// Removes content, mounts and directory at a target path, never through a link.
fn take_down(target: &Path) -> io::Result<()> {
    for _ in 0..MAX_STACKED {
        match mount::state(target)? {
            State::Absent => return Ok(()),
            State::NotADirectory => return fs::remove_file(target),
            State::Directory => {
                swap::clear(target)?;
                return fs::remove_dir(target);
            }
            State::Mounted => {
                swap::clear(target)?;
                mount::unmount(target)?;
            }
        }
    }
    Err(io::Error::other(
        "more mounts lie on top of each other than can be taken off",
    ))
}

/// Runs file system work where it may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// Awaits a step, unless nobody waits for the publish any more.
async fn unless<T>(
    cancelled: &CancellationToken,
    step: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        biased;
        () = cancelled.cancelled() => Err(Error::new(Code::Cancelled, "the publish was given up: its caller went away, or the volume is being unpublished")),
        result = step => result,
    }
}

/// The targets that are being worked on: one call at a time for each.
#[derive(Default)]
pub struct Busy(Mutex<HashMap<PathBuf, CancellationToken>>);

impl Busy {
    fn publishing(&self, target: &TargetPath, stop: &CancellationToken) -> Result<BusyGuard<'_>> {
        self.enter(target, stop.clone(), |_| {})
    }

    /// Also tells a publish that is running to stop, so that a hung provider does not hold up
    /// a pod that is going away.
    fn unpublishing(&self, target: &TargetPath) -> Result<BusyGuard<'_>> {
        self.enter(target, CancellationToken::new(), CancellationToken::cancel)
    }

    /// Tells every publish that runs to stop, and to undo what it has not finished.
    pub fn give_up(&self) {
        let targets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        targets.values().for_each(CancellationToken::cancel);
    }

    fn enter(
        &self,
        target: &TargetPath,
        token: CancellationToken,
        if_taken: impl FnOnce(&CancellationToken),
    ) -> Result<BusyGuard<'_>> {
        let mut targets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = targets.get(&target.0) {
            if_taken(running);
            return Err(Error::aborted(format!(
                "another call for {target} is still running"
            )));
        }
        targets.insert(target.0.clone(), token);
        Ok(BusyGuard {
            busy: self,
            target: target.0.clone(),
        })
    }
}

struct BusyGuard<'a> {
    busy: &'a Busy,
    target: PathBuf,
}

impl Drop for BusyGuard<'_> {
    fn drop(&mut self) {
        self.busy
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.target);
    }
}

/// A target path as kubelet makes them:
/// `<root>/pods/<pod uid>/volumes/kubernetes.io~csi/<volume name>/mount`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetPath(PathBuf);

impl TargetPath {
    /// Checks a path from a request. `root` is kubelet's root directory, where it is known;
    /// `pod_uid` the pod that the path must belong to, where the request names one.
    ///
    /// # Errors
    /// Says what is wrong with the path.
    pub fn parse(path: &str, root: Option<&Path>, pod_uid: Option<&str>) -> Result<Self> {
        let refuse = |why: String| Err(Error::invalid(format!("target path {path:.300?} {why}")));
        let parsed = Path::new(path);
        // Comparing with what the components make again refuses "//", "/./" and a trailing "/".
        let clean = parsed
            .components()
            .all(|c| matches!(c, Component::RootDir | Component::Normal(_)))
            && parsed.components().collect::<PathBuf>().as_os_str() == path
            && !path.contains('\0');
        if !parsed.is_absolute() || !clean {
            return refuse(
                "is not an absolute path without \".\", \"..\" and doubled slashes".into(),
            );
        }
        let names: Vec<&str> = path.split('/').collect();
        let [.., pods, uid, volumes, plugin, volume, mount] = names.as_slice() else {
            return refuse("is not a path that kubelet makes".into());
        };
        let kubelets = *pods == "pods"
            && *volumes == "volumes"
            && *plugin == "kubernetes.io~csi"
            && *mount == "mount"
            && !uid.is_empty()
            && !volume.is_empty();
        if !kubelets {
            return refuse("is not of the form <kubelet root>/pods/<pod uid>/volumes/kubernetes.io~csi/<volume>/mount".into());
        }
        if let Some(root) = root
            && parsed.ancestors().nth(6) != Some(root)
        {
            return refuse(format!(
                "is not below {}, the --kubelet-root-dir of the driver",
                root.display()
            ));
        }
        if let Some(pod_uid) = pod_uid
            && pod_uid != *uid
        {
            return refuse(format!("does not belong to the pod with UID {pod_uid:.64}"));
        }
        Ok(Self(parsed.to_owned()))
    }

    fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    fn parent(&self) -> PathBuf {
        self.0.parent().unwrap_or(&self.0).to_owned()
    }
}

impl fmt::Display for TargetPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::published(true, State::Mounted, true, Plan::Nothing)]
    #[case::killed_between_mount_and_write(false, State::Mounted, false, Plan::FillInPlace)]
    #[case::killed_between_write_and_record(false, State::Mounted, true, Plan::FillInPlace)]
    #[case::of_an_earlier_driver(false, State::Mounted, true, Plan::FillInPlace)]
    #[case::content_lost(true, State::Mounted, false, Plan::FillInPlace)]
    #[case::first(false, State::Absent, false, Plan::MountAndFill)]
    #[case::a_directory_proves_nothing(false, State::Directory, false, Plan::MountAndFill)]
    #[case::after_a_reboot(true, State::Directory, false, Plan::MountAndFill)]
    #[case::directory_lost(true, State::Absent, false, Plan::MountAndFill)]
    #[case::something_else_lies_there(false, State::NotADirectory, false, Plan::MountAndFill)]
    fn decisions(
        #[case] recorded: bool,
        #[case] state: State,
        #[case] complete: bool,
        #[case] expected: Plan,
    ) {
        assert_eq!(
            plan(&Found {
                recorded,
                state,
                complete
            }),
            expected
        );
    }

    const TARGET: &str = "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/secrets/mount";

    #[rstest]
    #[case::any_root(TARGET, None, None)]
    #[case::the_root(TARGET, Some("/var/lib/kubelet"), Some("u-1"))]
    #[case::another_root(
        "/k/pods/u-1/volumes/kubernetes.io~csi/secrets/mount",
        Some("/k"),
        None
    )]
    fn kubelets_targets_are_accepted(
        #[case] path: &str,
        #[case] root: Option<&str>,
        #[case] uid: Option<&str>,
    ) {
        assert_eq!(
            TargetPath::parse(path, root.map(Path::new), uid)
                .unwrap()
                .as_str(),
            path
        );
    }

    #[rstest]
    #[case::relative(
        "var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/secrets/mount",
        "absolute"
    )]
    #[case::climbs(
        "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/../mount",
        "\"..\""
    )]
    #[case::doubled(
        "/var/lib/kubelet//pods/u-1/volumes/kubernetes.io~csi/secrets/mount",
        "doubled"
    )]
    #[case::dot(
        "/var/lib/kubelet/./pods/u-1/volumes/kubernetes.io~csi/secrets/mount",
        "\".\""
    )]
    #[case::trailing(
        "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/secrets/mount/",
        "absolute"
    )]
    #[case::short("/mount", "kubelet makes")]
    #[case::another_plugin(
        "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~secret/secrets/mount",
        "form"
    )]
    #[case::another_place(
        "/etc/pods/u-1/volumes/kubernetes.io~csi/secrets/mount",
        "--kubelet-root-dir"
    )]
    #[case::deeper(
        "/var/lib/kubelet/x/pods/u-1/volumes/kubernetes.io~csi/secrets/mount",
        "--kubelet-root-dir"
    )]
    #[case::another_pod(
        "/var/lib/kubelet/pods/u-2/volumes/kubernetes.io~csi/secrets/mount",
        "does not belong"
    )]
    fn other_targets_are_refused(#[case] path: &str, #[case] why: &str) {
        let root = Some(Path::new("/var/lib/kubelet"));
        let error = TargetPath::parse(path, root, Some("u-1")).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
        assert_eq!(error.code(), Code::InvalidArgument);
    }

    #[test]
    fn one_call_at_a_time_for_a_target_and_unpublish_stops_a_publish() {
        let busy = Busy::default();
        let target = TargetPath::parse(TARGET, None, None).unwrap();
        let stop = CancellationToken::new();
        let publish = busy.publishing(&target, &stop).unwrap();
        let second = busy
            .publishing(&target, &CancellationToken::new())
            .err()
            .unwrap();
        assert_eq!(second.code(), Code::Aborted);
        assert!(!stop.is_cancelled());
        let unpublish = busy.unpublishing(&target).err().unwrap();
        assert_eq!(unpublish.code(), Code::Aborted);
        assert!(stop.is_cancelled());
        drop(publish);
        assert!(busy.unpublishing(&target).is_ok());
    }
}
