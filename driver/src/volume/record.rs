//! What this node knows of a volume, on disk, without secrets.
//!
//! A record is the commit marker of a publish: it is written when everything else is done, and
//! a volume without one is unfinished work. It needs no fsync: what it vouches for, a tmpfs,
//! goes away with the kernel that holds the page cache.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// The format below. A record of another one is as good as none: the volume is published
/// again, in place. A field that is new gets a default instead of a new format, so that an
/// upgrade of the driver asks no provider for anything.
const FORMAT: u32 = 1;

/// A published volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// The volume handle that kubelet uses.
    pub volume_id: String,
    /// Where it is mounted.
    pub target_path: PathBuf,
    /// Whose it is.
    pub pod: Pod,
    /// The class as it was at the last success.
    pub class: Class,
    /// The provider's name.
    pub provider: String,
    /// The name of the SecretProviderClassPodStatus.
    pub pod_status: String,
    /// The objects and versions that are mounted, in order of id.
    pub objects: Vec<Object>,
    /// Who wrote the files.
    pub content: Content,
    /// The resource version of the pod status that was written with a content, by the name of the
    /// directory that holds it; under an empty name for files that a provider wrote itself. It
    /// orders the contents of all volumes of the cluster. A content whose pod status an earlier
    /// driver wrote is missing here.
    #[serde(default)]
    pub orders: BTreeMap<String, String>,
    /// The last time that the provider answered and the content was made to match.
    pub last_success: Timestamp,
    /// The last time that the provider's answer changed the content.
    #[serde(default)]
    pub last_change: Timestamp,
    /// Since when refreshes fail, if the last one did.
    pub failing_since: Option<Timestamp>,
}

/// The pod of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its UID: a pod of the same name that comes later is another pod.
    pub uid: String,
}

impl std::fmt::Display for Pod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Which state of which SecretProviderClass was mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Class {
    /// Its name, in the pod's namespace.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Its generation, where the API server keeps one.
    pub generation: Option<i64>,
    /// Its resource version.
    pub resource_version: String,
    /// Those of its annotations that are addressed to this driver.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// An object of the external store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Object {
    /// Its id within the volume.
    pub id: String,
    /// The version that is mounted.
    pub version: String,
}

/// Who wrote the files of a volume, which decides what "the content is there" means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Content {
    /// The driver: `..data` leads to a directory.
    Driver,
    /// The provider itself, as old ones do: the volume is not empty.
    Provider,
}

/// A record with the number of its format, as a file holds it.
#[derive(Serialize, Deserialize)]
struct Filed<R> {
    format: u32,
    #[serde(flatten)]
    record: R,
}

/// The records of this node: a directory with a file for each volume.
#[derive(Debug, Clone)]
pub struct Records {
    directory: PathBuf,
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
        Ok(Self { directory })
    }

    /// The record of a volume. One that cannot be read as a record of this format counts as
    /// none: publishing again is always safe.
    ///
    /// # Errors
    /// When the disk does not answer.
    pub fn get(&self, volume_id: &str) -> io::Result<Option<Record>> {
        let path = self.path(volume_id);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match serde_json::from_slice::<Filed<Record>>(&bytes) {
            Ok(Filed { format, record }) if format == FORMAT && record.volume_id == volume_id => {
                Ok(Some(record))
            }
            Ok(_) => Ok(None),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "this record cannot be read; the volume counts as unpublished");
                Ok(None)
            }
        }
    }

    /// The records of all volumes, in no order. Files that cannot be read as records of this
    /// format are left out.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn all(&self) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
                && let Some(Filed { format, record }) = read(&path)
                && format == FORMAT
            {
                records.push(record);
            }
        }
        Ok(records)
    }

    /// Writes a record, replacing an earlier one in one step.
    ///
    /// # Errors
    /// What the file system says.
    pub fn put(&self, record: &Record) -> io::Result<()> {
        let path = self.path(&record.volume_id);
        let tmp = path.with_extension("tmp");
        let format = FORMAT;
        let bytes = serde_json::to_vec(&Filed { format, record })?;
        let written = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&tmp)
            .and_then(|mut file| file.write_all(&bytes))
            .and_then(|()| fs::rename(&tmp, &path));
        if written.is_err() {
            let _ = fs::remove_file(&tmp);
        }
        written
    }

    /// Forgets a volume. No record is success.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self, volume_id: &str) -> io::Result<()> {
        match fs::remove_file(self.path(volume_id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes the records of volumes whose pod's directory is gone, and what a crash left:
    /// kubelet tore them down while the driver was away. Returns how many went.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn remove_orphans(&self) -> io::Result<usize> {
        let mut removed = 0;
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            let orphan = match path.extension().and_then(|e| e.to_str()) {
                Some("tmp") => true,
                Some("json") => read(&path)
                    .is_some_and(|filed| filed.record.target_path.parent().is_some_and(is_gone)),
                _ => false,
            };
            if orphan {
                fs::remove_file(&path)?;
                removed += 1;
            }
        }
        Ok(removed)
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
        let hash: String = Sha256::digest(volume_id)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        self.directory.join(format!("sha256-{hash}.json"))
    }
}

fn read(path: &Path) -> Option<Filed<Record>> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn is_gone(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

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
        assert_eq!(records.get(volume_id).unwrap(), None);
        records.put(&record).unwrap();
        assert_eq!(records.get(volume_id).unwrap(), Some(record.clone()));
        assert_eq!(records.all().unwrap(), [record]);
        assert_eq!(
            fs::read_dir(dir.path().join("a/b")).unwrap().count(),
            1,
            "nothing beside it"
        );
        records.remove(volume_id).unwrap();
        records.remove(volume_id).unwrap();
        assert_eq!(records.get(volume_id).unwrap(), None);
    }

    #[rstest]
    #[case::torn("{\"format\":1,\"vol")]
    #[case::empty("")]
    #[case::newer("{\"format\":2}")]
    fn a_record_that_is_not_one_counts_as_none(#[case] text: &str) {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        fs::write(dir.path().join("csi-1.json"), text).unwrap();
        assert_eq!(records.get("csi-1").unwrap(), None);
        assert_eq!(records.all().unwrap(), []);
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
        let read = records.get("csi-1").unwrap().unwrap();
        assert_eq!(read.failing_since, None);
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
        assert!(records.get("csi-here").unwrap().is_some());
        assert!(records.get("csi-gone").unwrap().is_none());
    }
}
