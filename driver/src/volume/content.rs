//! Stages and commits the content of a volume.

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::time::sleep;
use tonic::Code;

use super::{
    PublishRequest, Volumes, recording::not_recorded, target::TargetPath, threads::blocking,
};
use crate::{
    error::{Error, Reason, Result},
    files::{Access, File, Payload, layout, own, read, swap},
    memory::{Memory, Reservation},
    mount::{Tmpfs, VolumeMount},
    record::{ClassState, Coming, Pod, Record, StagedRecord, Writer},
};

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

    /// Returns what a record says of this content before it is committed. `class` is the state of the
    /// class from which it was made.
    pub(super) fn coming(&self, class: &ClassState) -> Option<Coming> {
        self.new_directory().map(|directory| Coming {
            directory,
            class: ClassState {
                annotations: BTreeMap::new(),
                ..class.clone()
            },
        })
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

    /// Does the same for a volume that has no content yet, or none any more, which counts as unfinished from
    /// now on: a provider that writes files itself writes one after the other.
    pub(super) async fn begin_in_place(
        &self,
        request: &PublishRequest,
    ) -> Result<Arc<VolumeMount>> {
        let mount = self.refit(request).await?;
        let there = Arc::clone(&mount);
        let begun = blocking(move || {
            let root = there.open()?;
            if layout::is_empty(&root)? && !layout::is_unfinished(&root)? {
                layout::begin(&root)?;
            }
            Ok(())
        });
        begun
            .await
            .map_err(|error| failed_to_write(request, explained(request, &error)))?;
        Ok(mount)
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
        let volume = self.writable(request, mount);
        let staged = blocking(move || volume.stage(payload, present)).await;
        let staged = staged.map_err(|error| failed(explained(request, &error)))?;
        staged.ok_or_else(|| no_files(request))
    }

    /// Writes the first answer of a provider into a volume and measures it, once `record` has got its
    /// room on the disk. All of this runs on one thread: the way to another one and back takes longer
    /// than most of the steps.
    pub(super) async fn fill(
        &self,
        request: &PublishRequest,
        mount: &Arc<VolumeMount>,
        files: Vec<(String, File)>,
        present: Option<Writer>,
        mut record: Record,
    ) -> Result<Filled> {
        let failed = |error| failed_to_write(request, error);
        let payload = Payload::new(files)
            .map_err(|invalid| failed(Error::precondition(invalid.to_string())))?
            .accessible(request.access);
        let (volume, records) = (self.writable(request, mount), self.records.clone());
        let none = no_files(request);
        let filled = blocking(move || {
            let Some(staged) = volume.stage(payload, present)? else {
                return Ok(Err(none));
            };
            record.writer = staged.writer();
            let staged_record = match records.stage(&record) {
                Ok(staged_record) => staged_record,
                Err(error) => return Ok(Err(not_recorded(&records, &record, &error))),
            };
            let former = volume.commit(staged)?;
            layout::finish(&volume.mount.open()?)?;
            let filled = Filled {
                directory: volume.directory(record.writer)?,
                record,
                staged_record,
            };
            Ok(Ok((filled, former)))
        });
        let filled = filled.await;
        let (filled, former) = filled.map_err(|error| failed(explained(request, &error)))??;
        if let Some(former) = former {
            tokio::spawn(self.remove_later(request, Arc::clone(mount), former));
        }
        Ok(filled)
    }

    fn writable(&self, request: &PublishRequest, mount: &Arc<VolumeMount>) -> Writable {
        Writable {
            target: request.target.as_path().to_owned(),
            namespace: request.pod.namespace.clone(),
            access: request.access,
            mount: Arc::clone(mount),
            tmpfs: Arc::clone(&self.tmpfs),
            memory: Arc::clone(&self.memory),
        }
    }

    /// Returns the name of the directory that holds a volume's content; empty for content that the
    /// provider wrote itself.
    pub(super) async fn directory(
        &self,
        request: &PublishRequest,
        mount: &Arc<VolumeMount>,
        writer: Writer,
    ) -> Result<String> {
        let volume = self.writable(request, mount);
        blocking(move || volume.directory(writer))
            .await
            .map_err(|error| failed_to_write(request, explained(request, &error)))
    }

    /// Records a volume, and with that publishes it, if it is still what a pod sees at the target.
    pub(super) async fn record_volume(
        &self,
        request: &PublishRequest,
        mount: &Arc<VolumeMount>,
        staged: StagedRecord,
        record: Record,
    ) -> Result<()> {
        let (mount, records) = (Arc::clone(mount), self.records.clone());
        let recorded = blocking(move || {
            mount.check()?;
            let recorded = staged.commit(&record);
            Ok(recorded.map_err(|error| not_recorded(&records, &record, &error)))
        });
        recorded
            .await
            .map_err(|error| failed_to_write(request, explained(request, &error)))?
    }

    /// Makes the staged files the volume's content, and measures it. The former content is removed
    /// a little later.
    pub(super) async fn commit_content(
        &self,
        request: &PublishRequest,
        mount: &Arc<VolumeMount>,
        staged: Stage,
    ) -> Result<()> {
        let volume = self.writable(request, mount);
        let former = blocking(move || volume.commit(staged))
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
                tracing::warn!(%error, "replaced content could not be removed and stays until kubelet's next look");
            }
        }
    }
}

/// Refuses a target whose mount would not be seen outside of the driver's container: its pod would see
/// an empty directory.
pub(super) fn check_propagation(tmpfs: &Tmpfs, target: &TargetPath, pod: &Pod) -> Result<()> {
    match tmpfs.unseen(&target.parent()) {
        Ok(None) => Ok(()),
        // The mount itself reports a missing directory.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::internal(format!(
            "failed to read the mount propagation at {target}: {error}"
        ))),
        Ok(Some(point)) => Err(Error::precondition(format!(
            "failed to mount for pod {pod}: what the driver mounts below {point} is not seen outside its container, and the pod would get an empty directory. Set mountPropagation: Bidirectional for the volume mount {point} of the driver's container; the mount that holds it on the node must be shared (findmnt -o TARGET,PROPAGATION -T {point}; mount --make-rshared)",
            point = point.display()
        ))),
    }
}

/// A volume that has been filled and is to be recorded.
pub(super) struct Filled {
    pub(super) record: Record,
    pub(super) staged_record: StagedRecord,
    /// The name of the directory that holds the content; empty for content that the provider wrote
    /// itself.
    pub(super) directory: String,
}

/// A volume as a thread needs it that writes into it.
struct Writable {
    target: PathBuf,
    namespace: String,
    access: Access,
    mount: Arc<VolumeMount>,
    tmpfs: Arc<Tmpfs>,
    memory: Arc<Memory>,
}

impl Writable {
    /// Writes the files where no reader looks, if there is memory for them. Without files, takes what the
    /// provider has written itself, if there is any.
    fn stage(&self, payload: Payload, present: Option<Writer>) -> io::Result<Option<Stage>> {
        let root = self.mount.open()?;
        if !payload.is_empty() {
            let reserved = self.memory.reserve(&self.target, &self.namespace, &payload);
            let reservation = match reserved {
                Ok(reservation) => reservation,
                // Content that is there already needs no room.
                Err(_) if swap::holds(&root, &payload) => return Ok(Some(Stage::Unchanged)),
                Err(no_room) => {
                    return Err(io::Error::new(io::ErrorKind::OutOfMemory, no_room));
                }
            };
            let staged = swap::stage(root, payload)
                .map_err(|error| explain_full(error, &self.tmpfs, &self.target))?;
            return Ok(Some(match staged {
                Some(staged) => Stage::Files(staged, reservation),
                None => Stage::Unchanged,
            }));
        }
        // Files that the driver wrote are no answer of this provider.
        let stage = match present {
            Some(Writer::Driver) if layout::has_foreign_entries(&root)? => Stage::TakenOver,
            Some(Writer::Provider) | None if !layout::is_empty(&root)? => Stage::OfProvider,
            _ => return Ok(None),
        };
        own::grant(&root, self.access)?;
        Ok(Some(stage))
    }

    /// Makes the staged files the content, and measures it. Returns the former content.
    fn commit(&self, staged: Stage) -> io::Result<Option<swap::Former>> {
        let is_charged = staged.writer() == Writer::Driver;
        let root = self.mount.open()?;
        let mut reserved = None;
        let former = match staged {
            Stage::Files(staged, reservation) => {
                reserved = Some(reservation);
                staged
                    .commit()
                    .map_err(|error| explain_full(error, &self.tmpfs, &self.target))
            }
            Stage::Unchanged | Stage::OfProvider => Ok(None),
            Stage::TakenOver => layout::remove_own(&root).map(|()| None),
        };
        // Before the reservation ends, so that at no moment less is counted than is there.
        self.memory.found(&self.target, &self.namespace, is_charged);
        drop(reserved);
        former
    }

    /// Returns the name of the directory that holds the content; empty for content that the provider
    /// wrote itself.
    fn directory(&self, writer: Writer) -> io::Result<String> {
        match writer {
            Writer::Provider => Ok(String::new()),
            Writer::Driver => Ok(read::content_id(&self.mount.open()?)?.directory),
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

fn no_files(request: &PublishRequest) -> Error {
    failed_to_write(
        request,
        Error::precondition(
            "the provider named objects but sent no files and wrote none itself; the volume would be empty",
        ),
    )
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
