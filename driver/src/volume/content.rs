//! The file system's side of a volume: content staged and committed, mounts taken down.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use tokio::time::sleep;
use tonic::Code;

use super::{
    PublishRequest,
    record::{Content, Record},
    threads::blocking,
};
use crate::{
    error::{Error, Reason, Result},
    files::{File, Payload, read, swap},
    mount::{self, State},
};

/// How many mounts may lie on top of each other at one target; earlier drivers could stack them.
const MAX_STACKED: usize = 32;

/// What came of a provider's files.
pub(super) enum Stage {
    /// They lie beside the content that the volume has.
    Files(swap::Staged),
    /// They are the content that the volume has.
    Unchanged,
    /// The provider has written them itself.
    OfProvider,
    /// The provider has written them itself, beside those that the driver wrote before.
    TakenOver,
}

impl Stage {
    /// Who has written what the volume holds when this is committed.
    pub(super) fn content(&self) -> Content {
        match self {
            Self::Files(_) | Self::Unchanged => Content::Driver,
            Self::OfProvider | Self::TakenOver => Content::Provider,
        }
    }
}

impl Stage {
    /// Adds the order of this content to a record, and keeps that of the content of now.
    pub(super) fn order(&self, record: &mut Record, order: String) {
        match self {
            Self::Files(staged) => {
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

    /// Returns the name of the directory that holds the content once this is committed, where
    /// that is another than now.
    pub(super) fn new_directory(&self) -> Option<String> {
        match self {
            Self::Files(staged) => Some(staged.directory().to_owned()),
            Self::TakenOver => Some(String::new()),
            Self::Unchanged | Self::OfProvider => None,
        }
    }
}

/// Checks the provider's files and writes them where no reader looks. `so_far` is who wrote the
/// content that the volume has.
pub(super) async fn stage_files(
    request: &PublishRequest,
    files: Vec<(String, File)>,
    so_far: Option<Content>,
) -> Result<Stage> {
    let failed = |error| failed_to_write(request, error);
    let payload = Payload::new(files)
        .map_err(|invalid| failed(Error::precondition(invalid.to_string())))?
        .accessible(request.access);
    let volume = request.target.as_path().to_owned();
    let staged = blocking(move || {
        if !payload.is_empty() {
            let staged = swap::stage(&volume, payload)?;
            return Ok(Some(staged.map_or(Stage::Unchanged, Stage::Files)));
        }
        // What the driver wrote is no answer of this provider's.
        if so_far == Some(Content::Driver) {
            return Ok(swap::has_strangers(&volume)?.then_some(Stage::TakenOver));
        }
        Ok((!swap::is_empty(&volume)?).then_some(Stage::OfProvider))
    })
    .await
    .map_err(|error| failed(no_room_or_internal(&error)))?;
    staged.ok_or_else(|| {
        failed(Error::precondition(
            "the provider named objects but sent no files and wrote none itself; the volume would be empty",
        ))
    })
}

/// Returns the name of the directory that holds a volume's content; empty for content that the
/// provider wrote itself.
pub(super) async fn directory(request: &PublishRequest, content: Content) -> Result<String> {
    if content == Content::Provider {
        return Ok(String::new());
    }
    let volume = request.target.as_path().to_owned();
    let version = blocking(move || read::version(&volume)).await;
    version
        .map(|version| version.directory)
        .map_err(|error| failed_to_write(request, no_room_or_internal(&error)))
}

/// Makes what is staged the volume's content.
pub(super) async fn commit_content(request: &PublishRequest, staged: Stage) -> Result<()> {
    match staged {
        Stage::Files(staged) => commit_files(request, staged).await,
        Stage::Unchanged | Stage::OfProvider => Ok(()),
        Stage::TakenOver => {
            let volume = request.target.as_path().to_owned();
            blocking(move || swap::remove_own(&volume))
                .await
                .map_err(|error| failed_to_write(request, Error::internal(error.to_string())))
        }
    }
}

/// Makes staged files the volume's content. What was there before goes a little later.
async fn commit_files(request: &PublishRequest, staged: swap::Staged) -> Result<()> {
    let former = blocking(move || staged.commit())
        .await
        .map_err(|error| failed_to_write(request, no_room_or_internal(&error)))?;
    if let Some(former) = former {
        let volume = request.target.as_path().to_owned();
        tokio::spawn(async move {
            sleep(swap::GRACE).await;
            if let Err(error) = blocking(move || swap::remove(&volume, &former)).await {
                tracing::warn!(%error, "content that was replaced stays until the next refresh");
            }
        });
    }
    Ok(())
}

pub(super) fn failed_to_write(request: &PublishRequest, error: Error) -> Error {
    error
        .context(format_args!(
            "failed to write the files of pod {}",
            request.pod
        ))
        .with_reason(Reason::FileWriteError)
}

pub(super) fn no_room_or_internal(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull => Error::new(
            Code::ResourceExhausted,
            format!(
                "{error}: the volume is bounded by what --max-call-recv-msg-size lets a provider send; raise it"
            ),
        ),
        _ => Error::internal(error.to_string()),
    }
}

/// A publish's own mount, taken away again when this is dropped.
pub(super) struct Undo {
    target: PathBuf,
    armed: bool,
}

impl Undo {
    /// From now on a failure takes down what is at this target.
    pub(super) fn of(target: PathBuf) -> Self {
        Self {
            target,
            armed: true,
        }
    }

    /// The publish has succeeded.
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

/// Removes content, mounts and directory at a target path, never through a link.
pub(super) fn take_down(target: &Path) -> io::Result<()> {
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
