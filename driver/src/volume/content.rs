//! Stages and commits the content of a volume, and takes volumes down.

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::time::sleep;
use tonic::Code;

use super::{PublishRequest, Volumes, threads::blocking};
use crate::{
    error::{Error, Reason, Result},
    files::{self, File, Payload, layout, own, read, swap},
    memory::Reservation,
    mount::{self, Detached, Tmpfs, VolumeMount},
    record::{Record, Writer},
};

/// The number of mounts that may lie on top of each other at one target. Earlier drivers could stack
/// them.
const MAX_STACKED: usize = 32;

/// The files of a provider's answer, before they are the volume's content.
pub(super) enum Stage {
    /// The files lie beside the present content, in memory that is reserved for them.
    Files(swap::StagedContent, Reservation),
    /// The volume has exactly these files.
    Unchanged,
    /// The provider has written the files itself.
    OfProvider,
    /// The provider has written the files itself, beside those that the driver wrote before.
    TakenOver,
}

impl Stage {
    /// Returns who wrote the content that the volume has once this is committed.
    pub(super) fn writer(&self) -> Writer {
        match self {
            Self::Files(..) | Self::Unchanged => Writer::Driver,
            Self::OfProvider | Self::TakenOver => Writer::Provider,
        }
    }

    /// Adds the order of this content to a record, and keeps the order of the present content.
    pub(super) fn order(&self, record: &mut Record, order: String) {
        match self {
            Self::Files(staged, _) => {
                let now = staged.former_directory();
                record
                    .orders
                    .retain(|directory, _| Some(directory.as_str()) == now);
                record.orders.insert(staged.directory().to_owned(), order);
            }
            Self::OfProvider => record.orders = BTreeMap::from([(String::new(), order)]),
            Self::TakenOver => drop(record.orders.insert(String::new(), order)),
            Self::Unchanged => {}
        }
    }

    /// Returns the name of the directory that holds the content once this is committed, if that
    /// is not the present one.
    pub(super) fn new_directory(&self) -> Option<String> {
        match self {
            Self::Files(staged, _) => Some(staged.directory().to_owned()),
            Self::TakenOver => Some(String::new()),
            Self::Unchanged | Self::OfProvider => None,
        }
    }
}

impl Volumes {
    /// Makes sure that the mount at a target is a volume, and gives it the present bounds before
    /// anything is written into it.
    pub(super) async fn refit(&self, request: &PublishRequest) -> Result<Arc<VolumeMount>> {
        let (target, tmpfs) = (request.target.as_path().to_owned(), Arc::clone(&self.tmpfs));
        blocking(move || tmpfs.refit(&target).map(Arc::new))
            .await
            .map_err(|error| failed_to_write(request, explained(request, &error)))
    }

    /// Checks the provider's files and writes them where no reader looks, if there is memory for
    /// them. Files that the provider wrote itself get their mode and group. `present` says who wrote
    /// the present content. Fails if `mount` is not what is mounted at the target any more.
    pub(super) async fn stage_files(
        &self,
        request: &PublishRequest,
        mount: &Arc<VolumeMount>,
        files: Vec<(String, File)>,
        present: Option<Writer>,
    ) -> Result<Stage> {
        let failed = |error| failed_to_write(request, error);
        let payload = Payload::new(files)
            .map_err(|invalid| failed(Error::precondition(invalid.to_string())))?
            .accessible(request.access);
        let (target, access) = (request.target.as_path().to_owned(), request.access);
        let (mount, tmpfs) = (Arc::clone(mount), Arc::clone(&self.tmpfs));
        let (memory, namespace) = (Arc::clone(&self.memory), request.pod.namespace.clone());
        let staged = blocking(move || {
            let root = mount.open()?;
            if !payload.is_empty() {
                let reservation = match memory.reserve(&target, &namespace, &payload) {
                    Ok(reservation) => reservation,
                    // Content that is there already needs no room.
                    Err(_) if swap::holds(&root, &payload) => return Ok(Some(Stage::Unchanged)),
                    Err(no_room) => {
                        return Err(io::Error::new(io::ErrorKind::OutOfMemory, no_room));
                    }
                };
                let staged = swap::stage(root, payload)
                    .map_err(|error| explain_full(error, &tmpfs, &target))?;
                return Ok(Some(match staged {
                    Some(staged) => Stage::Files(staged, reservation),
                    None => Stage::Unchanged,
                }));
            }
            // Files that the driver wrote are no answer of this provider.
            if present == Some(Writer::Driver) {
                if !layout::has_foreign_entries(&root)? {
                    return Ok(None);
                }
                own::grant(&root, access)?;
                return Ok(Some(Stage::TakenOver));
            }
            if layout::is_empty(&root)? {
                return Ok(None);
            }
            own::grant(&root, access)?;
            Ok(Some(Stage::OfProvider))
        })
        .await
        .map_err(|error| failed(explained(request, &error)))?;
        staged.ok_or_else(|| {
            failed(Error::precondition(
                "the provider named objects but sent no files and wrote none itself; the volume would be empty",
            ))
        })
    }

    /// Returns the name of the directory that holds a volume's content; empty for content that the
    /// provider wrote itself.
    pub(super) async fn directory(
        &self,
        request: &PublishRequest,
        mount: &Arc<VolumeMount>,
        writer: Writer,
    ) -> Result<String> {
        if writer == Writer::Provider {
            return Ok(String::new());
        }
        let mount = Arc::clone(mount);
        let id = blocking(move || read::content_id(&mount.open()?)).await;
        id.map(|id| id.directory)
            .map_err(|error| failed_to_write(request, explained(request, &error)))
    }

    /// Makes sure, before a volume is recorded, that it is still what a pod sees at the target.
    pub(super) async fn check_mount(
        &self,
        request: &PublishRequest,
        mount: &Arc<VolumeMount>,
    ) -> Result<()> {
        let mount = Arc::clone(mount);
        blocking(move || mount.check())
            .await
            .map_err(|error| failed_to_write(request, explained(request, &error)))
    }

    /// Makes the staged files the volume's content, and measures it. The former content is removed
    /// a little later.
    pub(super) async fn commit_content(
        &self,
        request: &PublishRequest,
        mount: &Arc<VolumeMount>,
        staged: Stage,
    ) -> Result<()> {
        let target = request.target.as_path().to_owned();
        let (tmpfs, memory) = (Arc::clone(&self.tmpfs), Arc::clone(&self.memory));
        let namespace = request.pod.namespace.clone();
        let is_charged = staged.writer() == Writer::Driver;
        let volume = Arc::clone(mount);
        let former = blocking(move || {
            let root = volume.open()?;
            let mut reserved = None;
            let former = match staged {
                Stage::Files(staged, reservation) => {
                    reserved = Some(reservation);
                    staged
                        .commit()
                        .map_err(|error| explain_full(error, &tmpfs, &target))
                }
                Stage::Unchanged | Stage::OfProvider => Ok(None),
                Stage::TakenOver => layout::remove_own(&root).map(|()| None),
            };
            // Before the reservation ends, so that at no moment less is counted than is there.
            memory.found(&target, &namespace, is_charged);
            drop(reserved);
            former
        })
        .await
        .map_err(|error| failed_to_write(request, explained(request, &error)))?;
        if let Some(former) = former {
            tokio::spawn(self.remove_later(request, Arc::clone(mount), former));
        }
        Ok(())
    }

    /// Removes the former content of a volume after [`swap::GRACE`].
    fn remove_later(
        &self,
        request: &PublishRequest,
        mount: Arc<VolumeMount>,
        former: swap::Former,
    ) -> impl Future<Output = ()> + Send + 'static {
        let target = request.target.as_path().to_owned();
        let memory = Arc::clone(&self.memory);
        async move {
            sleep(swap::GRACE).await;
            let removed = blocking(move || {
                // If the volume has been unmounted, the former content has gone with it.
                let removed = match mount.open_if_there()? {
                    Some(root) => swap::remove(&root, &former),
                    None => Ok(()),
                };
                memory.changed(&target);
                removed
            });
            if let Err(error) = removed.await {
                tracing::warn!(%error, "replaced content could not be removed and stays until the next refresh");
            }
        }
    }

    /// Refuses a target whose mount would not be seen outside of the driver's container: its pod
    /// would see an empty directory.
    pub(super) async fn check_propagation(&self, request: &PublishRequest) -> Result<()> {
        let (parent, tmpfs) = (request.target.parent(), Arc::clone(&self.tmpfs));
        let unseen = blocking(move || match tmpfs.unseen(&parent) {
            // The mount itself reports a missing directory.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            unseen => unseen,
        })
        .await
        .map_err(|error| {
            Error::internal(format!(
                "failed to read the mount propagation at {}: {error}",
                request.target
            ))
        })?;
        match unseen {
            None => Ok(()),
            Some(point) => Err(Error::precondition(format!(
                "failed to mount for pod {}: what the driver mounts below {point} is not seen outside its container, and the pod would get an empty directory. Set mountPropagation: Bidirectional for the volume mount {point} of the driver's container; the mount that holds it on the node must be shared (findmnt -o TARGET,PROPAGATION -T {point}; mount --make-rshared)",
                request.pod,
                point = point.display()
            ))),
        }
    }
}

fn failed_to_write(request: &PublishRequest, error: Error) -> Error {
    error
        .context(format_args!(
            "failed to write the files of pod {}",
            request.pod
        ))
        .with_reason(Reason::FileWriteError)
}

/// Adds to the error of a full volume what to do about it.
fn explain_full(error: io::Error, tmpfs: &Tmpfs, volume: &Path) -> io::Error {
    if error.kind() != io::ErrorKind::StorageFull {
        return error;
    }
    let full = error.get_ref().and_then(|e| e.downcast_ref::<swap::Full>());
    let filled_otherwise = full.is_some_and(|full| full.is_filled_otherwise);
    let help = match tmpfs.fits(volume) {
        Ok(true) if filled_otherwise => format!(
            "they would fit beside the present content, but something else fills the volume. Did the provider write files into it itself? Remove them from {} or replace the pod",
            volume.display()
        ),
        Ok(true) => {
            "the volume's size follows from --max-call-recv-msg-size (chart value maxCallRecvMsgSize); raise that"
                .to_owned()
        }
        _ => "the volume could not be resized to what the driver's flags allow; replace the pod"
            .to_owned(),
    };
    io::Error::new(error.kind(), format!("{error}; {help}"))
}

/// Adds to an error of the file system the target, and what to do if another program has changed the
/// volume.
fn explained(request: &PublishRequest, error: &io::Error) -> Error {
    use io::ErrorKind::{
        CrossesDevices, OutOfMemory, PermissionDenied, ReadOnlyFilesystem, ResourceBusy,
        StorageFull,
    };
    let kind = error.kind();
    let help = match kind {
        ReadOnlyFilesystem => {
            "; the provider or another program has made the volume read-only. Replace the pod, or make the volume writable again (mount -o remount,rw)"
        }
        ResourceBusy | CrossesDevices => {
            "; the provider or another program has mounted something there, within the volume. Unmount it or replace the pod"
        }
        PermissionDenied => {
            "; it cannot be changed. Has the provider or another program made it immutable (see lsattr)? Replace the pod"
        }
        _ => "",
    };
    let code = match kind {
        StorageFull | OutOfMemory => Code::ResourceExhausted,
        _ => Code::Internal,
    };
    let (said, target) = (error.to_string(), request.target.as_str());
    let at = if said.contains(target) {
        String::new()
    } else {
        format!("at {target}: ")
    };
    Error::new(code, format!("{at}{said}{help}"))
}

/// Takes down the mount that a publish makes, when this is dropped.
pub(super) struct Undo {
    target: PathBuf,
    armed: bool,
}

impl Undo {
    /// Takes down what is at this target, unless [`forget`](Self::forget) is called.
    pub(super) fn of(target: PathBuf) -> Self {
        Self {
            target,
            armed: true,
        }
    }

    /// Keeps the mount: the publish has succeeded.
    pub(super) fn forget(mut self) {
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

/// Removes mounts, content and directory at a target path, never through a link and never beyond
/// the driver's own mount.
///
/// Everything that is mounted there is taken off first. A mount that is not the driver's keeps its
/// files, also if its file system does not answer. The driver's own tmpfs is emptied after that, for
/// processes that still use it.
pub(super) fn take_down(target: &Path) -> io::Result<()> {
    for _ in 0..MAX_STACKED {
        match mount::detach(target)? {
            Detached::Own(volume) => {
                // It is mounted nowhere any more, and its memory is freed with its last user.
                if let Err(error) = files::clear(volume.as_fd()) {
                    tracing::warn!(target_path = %target.display(), %error, "a volume was unmounted, but its files could not be removed; processes that still use it can read them");
                }
            }
            Detached::Foreign => {
                tracing::info!(target_path = %target.display(), "unmounted a mount that this driver did not make, and left its files alone");
            }
            Detached::Nothing => {
                mount::detach_below(target)?;
                return files::remove_target(target);
            }
        }
    }
    Err(io::Error::other(
        "too many mounts are stacked to unmount all of them in one call; the next call continues",
    ))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::mount::alone::{Own, alone};

    const VOLUME: &str = "pods/u-1/volumes/kubernetes.io~csi/v/mount";

    /// The mounts that another program may have made at a target, or below it.
    const LAYERS: [&str; 8] = [
        "own",
        "own with content",
        "tmpfs",
        "bind",
        "bind of a tmpfs",
        "bind of a volume",
        "another kind",
        "below",
    ];

    fn mounted(program: &str, args: &[&std::ffi::OsStr]) {
        let output = std::process::Command::new(program)
            .args(args)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn put(layer: &str, root: &Path, target: &Path) {
        let mount = |args: &[&std::ffi::OsStr]| mounted("mount", args);
        let (t, s) = (target.as_os_str(), |text: &'static str| {
            std::ffi::OsStr::new(text)
        });
        let kept = root.join("kept");
        match layer {
            "own" => drop(Tmpfs::bounded_by(1).mount(target).unwrap()),
            "own with content" => {
                Tmpfs::bounded_by(1).mount(target).unwrap();
                fs::create_dir(target.join("..2026")).unwrap();
                fs::write(target.join("..2026/file"), "x").unwrap();
            }
            "tmpfs" => mount(&[s("-t"), s("tmpfs"), s("tmpfs"), t]),
            "bind" => mount(&[s("--bind"), kept.join("host").as_os_str(), t]),
            "bind of a tmpfs" => mount(&[s("--bind"), kept.join("tmpfs").as_os_str(), t]),
            "bind of a volume" => mount(&[s("--bind"), kept.join(VOLUME).as_os_str(), t]),
            "another kind" => mount(&[s("-t"), s("ramfs"), s("x"), t]),
            "below" => {
                let below = target.join("below");
                fs::create_dir_all(&below).unwrap();
                mount(&[
                    s("--bind"),
                    kept.join("host").as_os_str(),
                    below.as_os_str(),
                ]);
            }
            other => unreachable!("{other}"),
        }
    }

    /// Tries every sequence of up to two layers, and sequences of all of them.
    #[test]
    fn what_is_mounted_at_a_target_is_taken_off_and_keeps_its_files() {
        alone(Own::Mounts, || {
            let root = tempfile::tempdir().unwrap();
            let kept = root.path().join("kept");
            let other_volume = kept.join(VOLUME);
            for directory in [
                kept.join("host/deep"),
                kept.join("tmpfs"),
                other_volume.clone(),
            ] {
                fs::create_dir_all(directory).unwrap();
            }
            mounted(
                "mount",
                &[
                    "-t".as_ref(),
                    "tmpfs".as_ref(),
                    "tmpfs".as_ref(),
                    kept.join("tmpfs").as_os_str(),
                ],
            );
            Tmpfs::bounded_by(1).mount(&other_volume).unwrap();
            let files = ["host/file", "host/deep/file", "tmpfs/file"].map(|file| kept.join(file));
            let files = files
                .into_iter()
                .chain([other_volume.join("file")])
                .collect::<Vec<_>>();
            for file in &files {
                fs::write(file, "kept").unwrap();
            }
            let target = root.path().join(VOLUME);
            let mut rows: Vec<Vec<&str>> = vec![vec![]];
            for first in LAYERS {
                rows.push(vec![first]);
                rows.extend(LAYERS.map(|second| vec![first, second]));
            }
            rows.push(LAYERS.to_vec());
            rows.push(LAYERS.into_iter().rev().collect());
            for row in rows {
                fs::create_dir_all(&target).unwrap();
                fs::write(target.join("left over"), "x").unwrap();
                for layer in &row {
                    put(layer, root.path(), &target);
                }
                take_down(&target).unwrap_or_else(|error| panic!("{row:?}: {error}"));
                assert!(!target.exists(), "{row:?}");
                for file in &files {
                    assert_eq!(fs::read(file).unwrap(), b"kept", "{row:?} {file:?}");
                }
                take_down(&target).unwrap();
            }
        });
    }

    #[test]
    fn a_volume_that_is_still_held_is_emptied() {
        alone(Own::Mounts, || {
            let root = tempfile::tempdir().unwrap();
            let target = root.path().join(VOLUME);
            fs::create_dir_all(&target).unwrap();
            put("own with content", root.path(), &target);
            let elsewhere = root.path().join("elsewhere");
            fs::create_dir(&elsewhere).unwrap();
            mounted(
                "mount",
                &["--bind".as_ref(), target.as_os_str(), elsewhere.as_os_str()],
            );
            take_down(&target).unwrap();
            assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
        });
    }
}
