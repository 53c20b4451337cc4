//! Directory trees as data: the form in which a test reads a volume.
//!
//! [`Tree::read`] runs in the executable `probe`, in a pod or on a node, which prints the tree as
//! JSON; the test parses it into the same type.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The maximum size of contents that are shown. Larger ones are shown as size and digest.
const SHOWN_BYTES: u64 = 4096;

/// The time in which a tree is read again from which entries vanish meanwhile, as the swap of `..data`
/// makes them. A writer that has swapped may wait for a processor before it removes the links to
/// former files.
const SWAPPED_WITHIN: Duration = Duration::from_secs(5);
/// The pause before a tree is read again.
const PAUSE: Duration = Duration::from_millis(2);

/// The way in which a directory is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum View {
    /// All entries as they are on disk: links as links, with timestamped directories.
    Disk,
    /// The entries that a program in the pod uses: follows links, leaves out names that start with
    /// `..`.
    Reader,
}

impl View {
    /// Returns the arguments with which `probe` reads this way, before the directory's path.
    pub(crate) fn arguments(self) -> Vec<String> {
        let mut arguments = vec!["tree".to_owned()];
        if self == Self::Reader {
            arguments.push("--reader".to_owned());
        }
        arguments
    }
}

/// A directory and all entries below it, sorted by path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// The directory itself, with the path `.`, and all entries below it.
    pub entries: Vec<Entry>,
}

/// One file, directory or link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Relative to the directory; `.` is the directory itself.
    pub path: String,
    /// The kind of the entry.
    pub kind: Kind,
    /// The permission, set-id and sticky bits, as four octal digits.
    pub mode: String,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The target of a link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The content of a file; for a directory, [`Content::Denied`] if it could not be listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
}

/// The kind of an [`Entry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Link,
    /// A socket, a pipe or a device.
    Other,
}

/// The content of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// UTF-8 text.
    Text(String),
    /// Other bytes, in base64.
    Base64(String),
    /// The reader has no permission.
    Denied,
    /// A content of more than 4 KiB.
    Digest {
        /// The size in bytes.
        size: u64,
        /// The digest in hexadecimal.
        sha256: String,
    },
}

impl Tree {
    /// Reads the tree below `root`.
    ///
    /// # Errors
    /// An error of the file system, with the path.
    pub fn read(root: &Path, view: View) -> io::Result<Self> {
        let started = Instant::now();
        loop {
            let mut entries = Vec::new();
            match visit(root, ".", view, &mut entries) {
                Ok(()) => {
                    entries.sort_by(|a, b| a.path.cmp(&b.path));
                    return Ok(Self { entries });
                }
                // Only the root may be absent; if another entry is, a swap is in progress.
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound
                        && started.elapsed() < SWAPPED_WITHIN
                        && root.exists() =>
                {
                    thread::sleep(PAUSE);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads the tree below `root`; returns `None` when that does not exist, or no longer.
    ///
    /// # Errors
    /// As of [`Tree::read`].
    pub fn read_if_there(root: &Path, view: View) -> io::Result<Option<Self>> {
        match Self::read(root, view) {
            Err(_) if !root.exists() => Ok(None),
            read => read.map(Some),
        }
    }

    /// Returns the entry at a path relative to the root.
    pub fn get(&self, path: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.path == path)
    }

    /// Returns path and text of every file that is text: the short form for an assertion.
    pub fn texts(&self) -> BTreeMap<&str, &str> {
        self.entries
            .iter()
            .filter_map(|entry| match &entry.content {
                Some(Content::Text(text)) => Some((entry.path.as_str(), text.as_str())),
                _ => None,
            })
            .collect()
    }
}

fn visit(path: &Path, name: &str, view: View, entries: &mut Vec<Entry>) -> io::Result<()> {
    let metadata = match view {
        View::Disk => fs::symlink_metadata(path),
        View::Reader => fs::metadata(path),
    }
    .map_err(|error| at(path, error))?;
    let entry = entry_at(path, name, &metadata).map_err(|error| at(path, error))?;
    let descend = entry.kind == Kind::Dir;
    entries.push(entry);
    if !descend {
        return Ok(());
    }
    let children = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && name != "." => {
            if let Some(entry) = entries.last_mut() {
                entry.content = Some(Content::Denied);
            }
            return Ok(());
        }
        children => children.map_err(|error| at(path, error))?,
    };
    for child in children {
        let child = child.map_err(|error| at(path, error))?;
        let child_name = child.file_name().to_string_lossy().into_owned();
        if view == View::Reader && child_name.starts_with("..") {
            continue;
        }
        let below = if name == "." {
            child_name
        } else {
            format!("{name}/{child_name}")
        };
        visit(&child.path(), &below, view, entries)?;
    }
    Ok(())
}

fn entry_at(path: &Path, name: &str, metadata: &Metadata) -> io::Result<Entry> {
    let file_type = metadata.file_type();
    let kind = if file_type.is_file() {
        Kind::File
    } else if file_type.is_dir() {
        Kind::Dir
    } else if file_type.is_symlink() {
        Kind::Link
    } else {
        Kind::Other
    };
    Ok(Entry {
        path: name.to_owned(),
        kind,
        mode: format!("{:04o}", metadata.permissions().mode() & 0o7777),
        uid: metadata.uid(),
        gid: metadata.gid(),
        target: match kind {
            Kind::Link => Some(fs::read_link(path)?.to_string_lossy().into_owned()),
            _ => None,
        },
        content: match kind {
            Kind::File => Some(content(path, metadata.len())?),
            _ => None,
        },
    })
}

fn content(path: &Path, size: u64) -> io::Result<Content> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Ok(Content::Denied);
        }
        opened => opened?,
    };
    if size > SHOWN_BYTES {
        let mut digest = Sha256::new();
        let mut buffer = [0; 16 * 1024];
        let mut size = 0;
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            digest.update(&buffer[..read]);
            size += read as u64;
        }
        return Ok(Content::Digest {
            size,
            sha256: hex(&digest.finalize()),
        });
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(match String::from_utf8(bytes) {
        Ok(text) => Content::Text(text),
        Err(error) => Content::Base64(BASE64.encode(error.as_bytes())),
    })
}

/// Formats bytes as lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Returns a volume with the layout of kubelet's atomic writer.
    fn volume() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("..2026_01_01_00_00_00.1");
        fs::create_dir_all(data.join("db")).unwrap();
        fs::write(data.join("db/password"), "secret").unwrap();
        fs::write(data.join("key"), [0xff, 0x00]).unwrap();
        fs::write(data.join("large"), vec![b'x'; 4097]).unwrap();
        fs::set_permissions(data.join("key"), fs::Permissions::from_mode(0o400)).unwrap();
        symlink("..2026_01_01_00_00_00.1", dir.path().join("..data")).unwrap();
        for name in ["db", "key", "large"] {
            symlink(format!("..data/{name}"), dir.path().join(name)).unwrap();
        }
        dir
    }

    #[test]
    fn a_reader_sees_the_files_and_not_how_they_are_swapped() {
        let tree = Tree::read(volume().path(), View::Reader).unwrap();
        let seen: Vec<_> = tree
            .entries
            .iter()
            .map(|e| (e.path.as_str(), e.kind))
            .collect();
        assert_eq!(
            seen,
            [
                (".", Kind::Dir),
                ("db", Kind::Dir),
                ("db/password", Kind::File),
                ("key", Kind::File),
                ("large", Kind::File)
            ]
        );
        assert_eq!(tree.texts(), BTreeMap::from([("db/password", "secret")]));
        let key = tree.get("key").unwrap();
        assert_eq!(
            (key.mode.as_str(), &key.content),
            ("0400", &Some(Content::Base64("/wA=".into())))
        );
        let Some(Content::Digest { size, sha256 }) = &tree.get("large").unwrap().content else {
            panic!("{tree:?}")
        };
        assert_eq!(*size, 4097);
        assert_eq!(*sha256, hex(&Sha256::digest(vec![b'x'; 4097])));
    }

    /// A writer removes the links to former files when it has swapped.
    #[test]
    fn a_link_that_is_about_to_go_is_waited_for() {
        let volume = volume();
        let former = volume.path().join("former");
        symlink("..data/former", &former).unwrap();
        let writer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(200));
            fs::remove_file(former).unwrap();
        });
        let tree = Tree::read(volume.path(), View::Reader).unwrap();
        writer.join().unwrap();
        assert_eq!(tree.get("former"), None);
        assert!(tree.get("key").is_some());
    }

    #[test]
    fn the_disk_view_keeps_links_and_survives_json() {
        let tree = Tree::read(volume().path(), View::Disk).unwrap();
        assert_eq!(tree.get("db").unwrap().target.as_deref(), Some("..data/db"));
        assert_eq!(
            tree.get("..2026_01_01_00_00_00.1/db/password")
                .unwrap()
                .kind,
            Kind::File
        );
        let json = serde_json::to_string(&tree).unwrap();
        assert_eq!(serde_json::from_str::<Tree>(&json).unwrap(), tree);
    }

    #[test]
    fn a_directory_that_is_not_there_is_an_error_that_names_it() {
        let error = Tree::read(Path::new("/no/such"), View::Disk).unwrap_err();
        assert!(error.to_string().contains("/no/such"), "{error}");
    }
}
