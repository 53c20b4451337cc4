//! Keeps the records of this node on disk: a directory with a file for each volume.
//!
//! A file that cannot be read as a record counts as none. The next record of the volume replaces it,
//! or the next start of the driver removes it.

use std::{
    collections::BTreeSet,
    fmt, fs,
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::Record;
use crate::{hex, quoted::quoted};

/// The number of the format. A record of another format counts as none: the volume is published
/// again, in place. A new field gets a default instead of a new format, so that an upgrade of the
/// driver does not make it ask every provider again.
const FORMAT: u32 = 1;

/// The largest file that is written or read, in bytes. It has room for the names and versions, of a
/// usual length, of the 4096 objects that an answer may name. The API server limits pod statuses to a
/// similar size.
const LARGEST: u64 = 1 << 20;

/// The number of bytes by which a record may grow between [`Records::stage`] and
/// [`StagedRecord::commit`]: the name of an object in the API has at most 253, and a content's order
/// is short.
const MAY_GROW: usize = 1024;

/// The number of characters of the reason why a file is not a record.
const LONGEST_REASON: usize = 300;

/// The number of the next staged record, so that one volume may have several.
static STAGED: AtomicU64 = AtomicU64::new(0);

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Records");
        shown.field("directory", &self.directory);
        shown.finish_non_exhaustive()
    }
}

/// The content of a file: a record with the number of its format.
#[derive(Serialize)]
struct Filed<'a> {
    format: u32,
    #[serde(flatten)]
    record: &'a Record,
}

/// The number of the format of a file. It is read apart from the record: reading both at once would
/// copy each field first, and each look of kubelet at a volume reads its record.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// A function that says what is wrong with a record.
type Condition = dyn Fn(&Record) -> Result<(), String> + Send + Sync;

/// The records of this node.
#[derive(Clone)]
pub struct Records {
    directory: PathBuf,
    /// A further condition for a record to be valid.
    check: Arc<Condition>,
    /// Held while a record is replaced or removed.
    changing: Arc<Mutex<Leftovers>>,
}

/// The files that could not be removed, because the disk was read-only or did not answer: staged records, and
/// those of volumes that are gone. They are removed with the next change.
#[derive(Debug, Default)]
struct Leftovers(BTreeSet<PathBuf>);

/// A record that has its room on the disk, but is not valid yet. Dropping it frees the room.
#[derive(Debug)]
#[must_use = "a staged record is valid once it is committed"]
pub struct StagedRecord {
    file: fs::File,
    path: PathBuf,
    tmp: PathBuf,
    committed: bool,
    changing: Arc<Mutex<Leftovers>>,
}

impl Records {
    /// Opens a directory of records. Creates it if it is missing.
    ///
    /// # Errors
    /// When the directory cannot be created.
    pub fn open(directory: impl Into<PathBuf>) -> io::Result<Self> {
        let records = Self::existing(directory);
        records.create_directory()?;
        Ok(records)
    }

    fn create_directory(&self) -> io::Result<()> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&self.directory)
    }

    /// Uses a directory of records as it is, which may be missing.
    pub fn existing(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            check: Arc::new(|_| Ok(())),
            changing: Arc::default(),
        }
    }

    /// Adds a condition: only records with which `check` finds nothing wrong are valid.
    #[must_use]
    pub fn checked_by(
        mut self,
        check: impl Fn(&Record) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.check = Arc::new(check);
        self
    }

    /// Returns the directory of the records.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the record of a volume. A file that cannot be read as a record of this format counts
    /// as none, whatever the reason: publishing again is always safe.
    pub fn get(&self, volume_id: &str) -> Option<Record> {
        let path = self.path(volume_id);
        match self.read(&path) {
            Ok(record) => Some(record),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "this record cannot be read; the volume counts as unpublished");
                None
            }
        }
    }

    /// Passes the valid records of all volumes to `take`, one after the other and in no order. There
    /// may be many large ones: a caller should keep only what it needs.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn each(&self, take: impl FnMut(Record)) -> io::Result<()> {
        self.each_other(|_| false, take)
    }

    /// Does the same without the volumes that `is_known` knows, of most of which it reads no record.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn each_other(
        &self,
        is_known: impl Fn(&str) -> bool,
        mut take: impl FnMut(Record),
    ) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            // Most files have the name of their volume.
            let name = path.file_stem().and_then(|name| name.to_str());
            if has_extension(&path, "json")
                && !name.is_some_and(&is_known)
                && let Ok(record) = self.read(&path)
                && !is_known(&record.volume_id)
            {
                take(record);
            }
        }
        Ok(())
    }

    /// Takes the room on the disk that a record needs, so that a full or read-only disk is noticed
    /// before anything else has changed. The record may still grow a little until it is committed.
    ///
    /// # Errors
    /// The system's error, or that the record is too large. An earlier record stays.
    pub fn stage(&self, record: &Record) -> io::Result<StagedRecord> {
        held(&self.changing).clear();
        let path = self.path(&record.volume_id);
        let number = STAGED.fetch_add(1, Ordering::Relaxed);
        let tmp = path.with_extension(format!("{number}.tmp"));
        let mut bytes = filed(record)?;
        bytes.resize(bytes.len() + MAY_GROW, b' ');
        clear_away(&tmp)?;
        let create = || {
            let mut options = fs::OpenOptions::new();
            options.write(true).create_new(true).mode(0o600).open(&tmp)
        };
        let file = match create() {
            // Somebody has removed the directory. Until the driver starts again nobody else makes it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.create_directory()?;
                tracing::warn!(directory = %self.directory.display(), "the directory of the records was missing and is made again; the volumes of which there was a record are published again");
                create()?
            }
            file => file?,
        };
        let mut staged = StagedRecord {
            file,
            path,
            tmp,
            committed: false,
            changing: Arc::clone(&self.changing),
        };
        staged.file.write_all(&bytes)?;
        Ok(staged)
    }

    /// Writes a record, replacing an earlier one in one step.
    ///
    /// # Errors
    /// The same as for [`Records::stage`].
    pub fn put(&self, record: &Record) -> io::Result<()> {
        self.stage(record)?.commit(record)
    }

    /// Removes the record of a volume. Succeeds if there is none.
    ///
    /// # Errors
    /// The system's error. It is removed with the next change of any record then.
    pub fn remove(&self, volume_id: &str) -> io::Result<()> {
        let mut changing = held(&self.changing);
        changing.clear();
        let path = self.path(volume_id);
        let removed = clear_away(&path);
        if removed.is_err() {
            changing.0.insert(path);
        }
        removed
    }

    /// Removes the records of volumes whose pod's directory is gone, because kubelet tore them
    /// down while the driver was away, and files that a crash left or that are no valid records.
    /// Returns the number of removed files. A file that cannot be removed now goes with the next change.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn remove_orphans(&self) -> io::Result<usize> {
        let mut removed = 0;
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            let orphan = match self.read(&path) {
                _ if has_extension(&path, "tmp") => is_named_by_us(&path),
                _ if !has_extension(&path, "json") => false,
                Ok(record) => record.target_path.parent().is_some_and(is_gone),
                Err(error) => {
                    let is_ours = is_named_by_us(&path);
                    if is_ours {
                        tracing::warn!(path = %path.display(), %error, "this file is not a valid record, so the driver removes it; its volume, if there is one, is published again");
                    }
                    is_ours
                }
            };
            if !orphan {
                continue;
            }
            match clear_away(&path) {
                Ok(()) => removed += 1,
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "this record belongs to no volume and cannot be removed now; the next change of a record removes it");
                    held(&self.changing).0.insert(path);
                }
            }
        }
        Ok(removed)
    }

    /// Reads a file of this directory.
    fn read(&self, path: &Path) -> io::Result<Record> {
        let metadata = fs::symlink_metadata(path)?;
        let wrong = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidData, why));
        // Opening a pipe, for example, may block for ever.
        if !metadata.is_file() {
            return wrong("it is not a file");
        }
        if metadata.len() > LARGEST {
            return wrong("it is larger than a record can be");
        }
        // With a byte more than needed, the end is found without growing.
        let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0) + 1);
        fs::File::open(path)?
            .take(LARGEST)
            .read_to_end(&mut bytes)?;
        let record = parsed(&bytes)?;
        if self.path(&record.volume_id) != path {
            return wrong("it is the record of another volume");
        }
        if let Err(why) = record.check_names().and_then(|()| (self.check)(&record)) {
            return wrong(&why);
        }
        Ok(record)
    }

    /// Returns the path of a volume's record. kubelet's volume handles are plain names; any other
    /// handle is hashed into one.
    pub fn path(&self, volume_id: &str) -> PathBuf {
        let plain = volume_id.len() <= 128
            && !volume_id.is_empty()
            && volume_id
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if plain {
            return self.directory.join(format!("{volume_id}.json"));
        }
        let hash = hex::digits(&Sha256::digest(volume_id));
        self.directory.join(format!("sha256-{hash}.json"))
    }
}

impl Leftovers {
    /// Removes them. What cannot be removed stays for the next time.
    fn clear(&mut self) {
        self.0.retain(|path| clear_away(path).is_err());
    }
}

impl StagedRecord {
    /// Makes `record` the volume's record, in one step.
    ///
    /// # Errors
    /// The system's error. An earlier record stays.
    pub fn commit(mut self, record: &Record) -> io::Result<()> {
        let bytes = filed(record)?;
        self.file.write_all_at(&bytes, 0)?;
        self.file.set_len(bytes.len() as u64)?;
        let changing = Arc::clone(&self.changing);
        let mut changing = held(&changing);
        if let Err(error) = fs::rename(&self.tmp, &self.path) {
            let is_directory = |found: fs::Metadata| found.is_dir();
            if !fs::symlink_metadata(&self.path).is_ok_and(is_directory) {
                return Err(error);
            }
            // No rename replaces it.
            clear_away(&self.path)?;
            fs::rename(&self.tmp, &self.path)?;
        }
        self.committed = true;
        // The volume is there again.
        changing.0.remove(&self.path);
        Ok(())
    }
}

impl Drop for StagedRecord {
    fn drop(&mut self) {
        // The caller has an error to report already. What stays is removed later.
        if !self.committed && clear_away(&self.tmp).is_err() {
            let tmp = std::mem::take(&mut self.tmp);
            held(&self.changing).0.insert(tmp);
        }
    }
}

/// Reads the content of a file.
fn parsed(bytes: &[u8]) -> io::Result<Record> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    // The parser repeats what it cannot read, which may be the whole file.
    let unreadable =
        |error: serde_json::Error| invalid(quoted(&error.to_string(), LONGEST_REASON).to_string());
    let Format { format } = serde_json::from_slice(bytes).map_err(unreadable)?;
    if format != FORMAT {
        let why = "it has the format of another version of the driver";
        return Err(invalid(why.to_owned()));
    }
    serde_json::from_slice(bytes).map_err(unreadable)
}

/// Reads bytes as a record.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    use crate::fuzz::assert_readable;

    let record = match parsed(bytes) {
        Ok(record) => record,
        Err(error) => return assert_readable(&error),
    };
    if let Err(why) = record.check_names() {
        assert_readable(&why);
    }
    // What is written is what is read.
    if let Ok(written) = filed(&record) {
        let Ok(again) = parsed(&written) else {
            unreachable!("a record that was written cannot be read");
        };
        assert!(filed(&again).is_ok_and(|again| again == written));
    }
}

fn filed(record: &Record) -> io::Result<Vec<u8>> {
    let format = FORMAT;
    let bytes = serde_json::to_vec(&Filed { format, record })?;
    let most = LARGEST - MAY_GROW as u64;
    if bytes.len() as u64 > most {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!(
                "the record would have {} bytes; at most {most} are possible: provider {:?} names too many objects, or its versions are too long",
                bytes.len(),
                record.provider
            ),
        ));
    }
    Ok(bytes)
}

/// Takes the lock under which records change.
fn held(changing: &Mutex<Leftovers>) -> MutexGuard<'_, Leftovers> {
    // A panic while it was held has left whole files.
    changing.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes a file, or a directory in its place, never through a link. Succeeds if nothing is there.
fn clear_away(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

/// Returns whether a file has a name that the driver gives to records. Other files stay, because an
/// operator may have chosen a directory that is used for other things.
fn is_named_by_us(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with("csi-") || name.starts_with("sha256-"))
}

fn is_gone(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests;
