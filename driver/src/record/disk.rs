//! The records of this node on disk: a directory with a file for each volume.
//!
//! Whatever lies there, no volume depends on it: what cannot be read as a record is no record,
//! is replaced by the next one, and goes at the next start of the driver.

use std::{
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
use crate::hex;

/// The format of a record. One of another format is as good as none: the volume is published
/// again, in place. A field that is new gets a default instead of a new format, so that an
/// upgrade of the driver asks no provider for anything.
const FORMAT: u32 = 1;

/// The largest file that is written, and that is read, in bytes. It has room for the names and
/// versions of the 4096 objects that an answer may name, where they are of a usual length; the API
/// server would take no much larger pod status.
const LARGEST: u64 = 1 << 20;

/// How much longer a record may become between [`Records::stage`] and [`Staged::commit`], in
/// bytes: the name of an object in the API has at most 253, and a content's order is short.
const MAY_GROW: usize = 1024;

/// Numbers staged records, so that one volume may have several.
static STAGED: AtomicU64 = AtomicU64::new(0);

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Records");
        shown.field("directory", &self.directory);
        shown.finish_non_exhaustive()
    }
}

/// A record with the number of its format, as a file holds it.
#[derive(Serialize, Deserialize)]
struct Filed<R> {
    format: u32,
    #[serde(flatten)]
    record: R,
}

/// Says what is wrong with a record, if anything is.
type Check = dyn Fn(&Record) -> Result<(), String> + Send + Sync;

/// The records of this node.
#[derive(Clone)]
pub struct Records {
    directory: PathBuf,
    /// What else must be so for a record to be believed.
    check: Arc<Check>,
    /// Held while a record is replaced or removed.
    changing: Arc<Mutex<()>>,
}

/// A record that has its room on the disk and is not valid yet. Dropping it gives the room back.
#[derive(Debug)]
#[must_use = "a staged record is valid once it is committed"]
pub struct Staged {
    file: fs::File,
    path: PathBuf,
    tmp: PathBuf,
    committed: bool,
    changing: Arc<Mutex<()>>,
}

impl Records {
    /// Opens the directory, making it when it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(directory: impl Into<PathBuf>) -> io::Result<Self> {
        let directory = directory.into();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)?;
        Ok(Self {
            directory,
            check: Arc::new(|_| Ok(())),
            changing: Arc::default(),
        })
    }

    /// Believes only records with which `check` finds nothing wrong.
    #[must_use]
    pub fn checked_by(
        mut self,
        check: impl Fn(&Record) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.check = Arc::new(check);
        self
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the record of a volume. What cannot be read as a record of this format counts as
    /// none, whyever that is: publishing again is always safe.
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

    /// Hands over the records of all volumes, one after the other and in no order, without files
    /// that cannot be read as records of this format. There may be many, and large ones: whoever
    /// keeps something of them keeps what is needed.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn each(&self, mut take: impl FnMut(Record)) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if has_extension(&path, "json")
                && let Ok(record) = self.read(&path)
            {
                take(record);
            }
        }
        Ok(())
    }

    /// Takes the room on the disk that a record needs, so that a full or read-only disk is found
    /// out about before anything else has changed. The record may still change a little until it
    /// is committed.
    ///
    /// # Errors
    /// What the file system says, or that the record is too large. An earlier record stays.
    pub fn stage(&self, record: &Record) -> io::Result<Staged> {
        let path = self.path(&record.volume_id);
        let number = STAGED.fetch_add(1, Ordering::Relaxed);
        let tmp = path.with_extension(format!("{number}.tmp"));
        let mut bytes = filed(record)?;
        bytes.resize(bytes.len() + MAY_GROW, b' ');
        clear_away(&tmp)?;
        let file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&tmp)?;
        let mut staged = Staged {
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
    /// As [`Records::stage`].
    pub fn put(&self, record: &Record) -> io::Result<()> {
        self.stage(record)?.commit(record)
    }

    /// Forgets a volume. No record is success.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self, volume_id: &str) -> io::Result<()> {
        let _changing = held(&self.changing);
        clear_away(&self.path(volume_id))
    }

    /// Removes the records of volumes whose pod's directory is gone, because kubelet tore them
    /// down while the driver was away, what a crash left, and what cannot be read as a record.
    /// Returns how many went. One that cannot be removed keeps no other from going.
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
                    tracing::warn!(path = %path.display(), %error, "this record belongs to no volume and cannot be removed");
                }
            }
        }
        Ok(removed)
    }

    /// Reads a file of this directory.
    fn read(&self, path: &Path) -> io::Result<Record> {
        let metadata = fs::symlink_metadata(path)?;
        let wrong = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidData, why));
        // Opening something else, a pipe for example, may wait for ever.
        if !metadata.is_file() {
            return wrong("it is not a file");
        }
        if metadata.len() > LARGEST {
            return wrong("it is larger than a record can be");
        }
        let mut bytes = Vec::new();
        fs::File::open(path)?
            .take(LARGEST)
            .read_to_end(&mut bytes)?;
        let Filed { format, record } = serde_json::from_slice::<Filed<Record>>(&bytes)?;
        if format != FORMAT {
            return wrong("it has the format of another driver");
        }
        if self.path(&record.volume_id) != path {
            return wrong("it is the record of another volume");
        }
        if let Err(why) = record.check_names().and_then(|()| (self.check)(&record)) {
            return wrong(&why);
        }
        Ok(record)
    }

    /// kubelet's volume ids are plain names; whatever else might come is hashed into one.
    fn path(&self, volume_id: &str) -> PathBuf {
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

impl Staged {
    /// Makes this the volume's record, in one step.
    ///
    /// # Errors
    /// What the file system says. An earlier record stays.
    pub fn commit(self, record: &Record) -> io::Result<()> {
        let changing = Arc::clone(&self.changing);
        let _changing = held(&changing);
        self.replace(record)
    }

    /// The same for whoever holds `changing`.
    fn replace(mut self, record: &Record) -> io::Result<()> {
        let bytes = filed(record)?;
        self.file.write_all_at(&bytes, 0)?;
        self.file.set_len(bytes.len() as u64)?;
        if fs::rename(&self.tmp, &self.path).is_err() {
            // A directory, which no rename replaces.
            clear_away(&self.path)?;
            fs::rename(&self.tmp, &self.path)?;
        }
        self.committed = true;
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.committed {
            // Whoever drops this has an error to report already; what stays goes at the next start.
            let _ = fs::remove_file(&self.tmp);
        }
    }
}

fn filed(record: &Record) -> io::Result<Vec<u8>> {
    let format = FORMAT;
    let bytes = serde_json::to_vec(&Filed { format, record })?;
    if (bytes.len() + MAY_GROW) as u64 > LARGEST {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!(
                "it would have {} bytes, and {LARGEST} are the most: provider {:?} names too many objects, or too long versions",
                bytes.len(),
                record.provider
            ),
        ));
    }
    Ok(bytes)
}

/// Takes the lock under which records change.
fn held(changing: &Mutex<()>) -> MutexGuard<'_, ()> {
    // Whoever panicked while holding it left whole files.
    changing.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes a file or whatever lies in its place, never through a link. Nothing there is success.
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

/// Whether a file has a name that the volumes of a kubelet give it. Nothing else is taken for
/// trash, because an operator may have chosen a directory that holds other things.
fn is_named_by_us(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with("csi-") || name.starts_with("sha256-"))
}

fn is_gone(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::super::{Class, Content, Object, Pod};
    use super::*;
    use jiff::Timestamp;
    use proptest::prelude::*;
    use rstest::rstest;
    use std::collections::BTreeMap;

    fn all(records: &Records) -> Vec<Record> {
        let mut all = Vec::new();
        records.each(|record| all.push(record)).unwrap();
        all
    }

    fn record(volume_id: &str, target: &Path) -> Record {
        Record {
            volume_id: volume_id.to_owned(),
            target_path: target.to_owned(),
            pod: Pod {
                name: "web".into(),
                namespace: "default".into(),
                uid: "u".into(),
            },
            class: Class {
                name: "c".into(),
                uid: "cu".into(),
                generation: Some(1),
                resource_version: "7".into(),
                annotations: BTreeMap::new(),
            },
            provider: "vault".into(),
            pod_status: "web-default-c".into(),
            objects: vec![Object {
                id: "secret/a".into(),
                version: "v1".into(),
            }],
            content: Content::Driver,
            orders: BTreeMap::from([("..2026".into(), "7".into())]),
            files: None,
            last_success: Timestamp::now(),
            last_change: Timestamp::UNIX_EPOCH,
            failing_since: None,
        }
    }

    #[rstest]
    #[case::kubelets("csi-0123abc")]
    #[case::hostile("../../etc/passwd")]
    #[case::long(&"x".repeat(5000))]
    #[case::empty("")]
    fn what_was_put_is_got_until_removed(#[case] volume_id: &str) {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().join("a/b")).unwrap();
        let record = record(volume_id, Path::new("/t/mount"));
        assert_eq!(records.get(volume_id), None);
        records.put(&record).unwrap();
        assert_eq!(records.get(volume_id), Some(record.clone()));
        assert_eq!(all(&records), [record]);
        assert_eq!(
            fs::read_dir(dir.path().join("a/b")).unwrap().count(),
            1,
            "nothing beside it"
        );
        records.remove(volume_id).unwrap();
        records.remove(volume_id).unwrap();
        assert_eq!(records.get(volume_id), None);
    }

    #[test]
    fn a_staged_record_is_none_and_keeps_the_earlier_one() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let mut record = record("csi-1", Path::new("/t/mount"));
        drop(records.stage(&record).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        records.put(&record).unwrap();
        let before = record.clone();
        record.provider = "azure".into();
        let staged = records.stage(&record).unwrap();
        assert_eq!(records.get("csi-1"), Some(before.clone()));
        assert_eq!(all(&records), [before]);
        record.pod_status = "p".repeat(253);
        staged.commit(&record).unwrap();
        assert_eq!(records.get("csi-1"), Some(record));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_record_that_is_too_large_is_refused_and_the_earlier_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let small = record("csi-1", Path::new("/t/mount"));
        records.put(&small).unwrap();
        let mut large = small.clone();
        large.objects[0].version = "v".repeat(5 << 20);
        let error = records.put(&large).unwrap_err().to_string();
        assert!(
            error.contains("vault") && error.contains("too many objects"),
            "{error}"
        );
        assert_eq!(records.get("csi-1"), Some(small));
    }

    #[test]
    fn a_record_of_an_earlier_driver_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let mut filed = serde_json::to_value(Filed {
            format: FORMAT,
            record: record("csi-1", Path::new("/t/mount")),
        })
        .unwrap();
        for new in ["lastChange", "failingSince", "orders"] {
            filed.as_object_mut().unwrap().remove(new).unwrap();
        }
        filed["class"]
            .as_object_mut()
            .unwrap()
            .remove("annotations");
        fs::write(dir.path().join("csi-1.json"), filed.to_string()).unwrap();
        assert_eq!(records.get("csi-1").unwrap().failing_since, None);
    }

    #[test]
    fn orphans_are_records_whose_volume_directory_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let pods = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        records
            .put(&record("csi-here", &pods.path().join("mount")))
            .unwrap();
        records
            .put(&record("csi-gone", &pods.path().join("gone/mount")))
            .unwrap();
        fs::write(dir.path().join("csi-x.tmp"), "half").unwrap();
        assert_eq!(records.remove_orphans().unwrap(), 2);
        assert!(records.get("csi-here").is_some());
        assert!(records.get("csi-gone").is_none());
    }

    /// Something that lies where a record should.
    #[derive(Debug, Clone)]
    enum Trash {
        Bytes(Vec<u8>),
        /// The beginning of a record.
        Torn(prop::sample::Index),
        Format(u32),
        OfAnother,
        /// A whole record in which one of these is no name, or leads out of where volumes are.
        Hostile(&'static str, &'static str),
        /// Longer than any record.
        Sparse,
        Directory,
        LinkInto,
        DanglingLink,
        Pipe,
    }

    /// Where a record has names of objects, and what is none.
    const PLACES: [&str; 4] = ["/pod/name", "/pod/namespace", "/class/name", "/podStatus"];
    const NO_NAMES: [&str; 8] = ["", "..", "../../x", "a/b", "a?b", "A", "a%2fb", "-a"];
    const NO_TARGETS: [&str; 3] = ["/etc", "relative/mount", "/pods/../mount"];

    fn trash() -> impl Strategy<Value = Trash> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40).prop_map(Trash::Bytes),
            any::<prop::sample::Index>().prop_map(Trash::Torn),
            (2_u32..).prop_map(Trash::Format),
            Just(Trash::OfAnother),
            (
                prop::sample::select(&PLACES[..]),
                prop::sample::select(&NO_NAMES[..])
            )
                .prop_map(|(place, name)| Trash::Hostile(place, name)),
            (prop::sample::select(&NO_TARGETS[..]))
                .prop_map(|target| Trash::Hostile("/targetPath", target)),
            Just(Trash::Sparse),
            Just(Trash::Directory),
            Just(Trash::LinkInto),
            Just(Trash::DanglingLink),
            Just(Trash::Pipe),
        ]
    }

    impl Trash {
        fn put(&self, at: &Path, whole: &Record) {
            let filed = |format| {
                serde_json::to_vec(&Filed {
                    format,
                    record: whole,
                })
                .unwrap()
            };
            match self {
                Self::Bytes(bytes) => fs::write(at, bytes).unwrap(),
                Self::Torn(end) => {
                    let bytes = filed(FORMAT);
                    fs::write(at, &bytes[..end.index(bytes.len())]).unwrap();
                }
                Self::Format(format) => fs::write(at, filed(*format)).unwrap(),
                Self::OfAnother => {
                    let other = Record {
                        volume_id: "csi-other".into(),
                        ..whole.clone()
                    };
                    let format = FORMAT;
                    let record = other;
                    fs::write(at, serde_json::to_vec(&Filed { format, record }).unwrap()).unwrap();
                }
                Self::Hostile(place, name) => {
                    let mut filed: serde_json::Value =
                        serde_json::from_slice(&filed(FORMAT)).unwrap();
                    *filed.pointer_mut(place).unwrap() = (*name).into();
                    fs::write(at, filed.to_string()).unwrap();
                }
                Self::Sparse => fs::File::create(at).unwrap().set_len(1 << 40).unwrap(),
                Self::Directory => {
                    fs::create_dir(at).unwrap();
                    fs::write(at.join("in it"), "x").unwrap();
                }
                Self::LinkInto => {
                    std::os::unix::fs::symlink(at.parent().unwrap().join("kept.txt"), at).unwrap();
                }
                Self::DanglingLink => std::os::unix::fs::symlink("nowhere", at).unwrap(),
                Self::Pipe => {
                    nix::unistd::mkfifo(at, nix::sys::stat::Mode::S_IRWXU).unwrap();
                }
            }
        }
    }

    proptest! {
        /// Trash at the place of a record, and beside it, keeps nothing from working, and is gone
        /// after the next record or the next start.
        #[test]
        fn what_is_no_record_is_in_nobodys_way(
            at_record in proptest::option::of(trash()),
            at_tmp in proptest::option::of(trash()),
            then in 0..3,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let pods = tempfile::tempdir().unwrap();
            let below = pods.path().to_owned();
            let is_target = move |record: &Record| match record.target_path.starts_with(&below) {
                true => Ok(()),
                false => Err("its target is elsewhere".to_owned()),
            };
            let records = Records::open(dir.path()).unwrap().checked_by(is_target);
            fs::write(dir.path().join("kept.txt"), "x").unwrap();
            fs::write(dir.path().join("package.json"), "somebody else's").unwrap();
            let neighbour = record("csi-2", &pods.path().join("mount"));
            records.put(&neighbour).unwrap();
            let whole = record("csi-1", &pods.path().join("mount"));
            for (trash, name) in [(&at_record, "csi-1.json"), (&at_tmp, "csi-1.tmp")] {
                if let Some(trash) = trash {
                    trash.put(&dir.path().join(name), &whole);
                }
            }
            prop_assert_eq!(records.get("csi-1"), None);
            prop_assert_eq!(all(&records), [neighbour.clone()]);
            let mut expected = vec!["csi-2.json", "kept.txt", "package.json"];
            match then {
                0 => {
                    let trash = usize::from(at_record.is_some()) + usize::from(at_tmp.is_some());
                    prop_assert_eq!(records.remove_orphans().unwrap(), trash);
                }
                1 => {
                    records.put(&whole).unwrap();
                    records.remove_orphans().unwrap();
                    prop_assert_eq!(records.get("csi-1"), Some(whole));
                    expected.insert(0, "csi-1.json");
                }
                _ => {
                    records.remove("csi-1").unwrap();
                    records.remove_orphans().unwrap();
                }
            }
            let mut left: Vec<String> = fs::read_dir(dir.path()).unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            left.sort();
            prop_assert_eq!(left, expected);
            prop_assert_eq!(records.get("csi-2"), Some(neighbour));
        }
    }
}
