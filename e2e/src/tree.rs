//! What stands below a directory, as data: the language in which a test looks into a volume.
//!
//! [`Tree::read`] runs in the `probe` binary, inside the pod or inside the node's namespaces;
//! the test reads the same type back from its JSON.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Contents up to this many bytes are shown; of larger ones their size and digest.
const SHOWN_BYTES: u64 = 4096;

/// How often a tree is read again when an entry vanishes under the reader's hands, which the
/// swap of `..data` does.
const ATTEMPTS: usize = 5;

/// What a look into a directory shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum View {
    /// Every entry as it is on disk: links as links, timestamped directories included.
    Disk,
    /// What a program in the pod reads: links followed, names that start with `..` left out.
    Reader,
}

impl View {
    /// What makes `probe` look this way, before the directory's path.
    pub(crate) fn arguments(self) -> Vec<String> {
        let mut arguments = vec!["tree".to_owned()];
        if self == Self::Reader {
            arguments.push("--reader".to_owned());
        }
        arguments
    }
}

/// A directory and all that stands below it, sorted by path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// The directory itself (path `.`) and everything below.
    pub entries: Vec<Entry>,
}

/// One file, directory or link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Relative to the directory; `.` is the directory itself.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with set-id and sticky bits, four octal digits.
    pub mode: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Where a link points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// What a file holds; for a directory, whether it could not be listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
}

/// What an [`Entry`] is.
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

/// What a file holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// UTF-8.
    Text(String),
    /// Anything else, in base64.
    Base64(String),
    /// Not for the user that looks: permission denied.
    Denied,
    /// More than 4 KiB.
    Digest {
        /// In bytes.
        size: u64,
        /// Hexadecimal.
        sha256: String,
    },
}

impl Tree {
    /// Reads the tree below `root`.
    ///
    /// # Errors
    /// Any error of the file system, with the path at which it happened.
    pub fn read(root: &Path, view: View) -> io::Result<Self> {
        let mut attempt = 1;
        loop {
            let mut entries = Vec::new();
            match visit(root, ".", view, &mut entries) {
                Ok(()) => {
                    entries.sort_by(|a, b| a.path.cmp(&b.path));
                    return Ok(Self { entries });
                }
                // Only the root's own absence is an answer; any other is a swap in progress.
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound
                        && attempt < ATTEMPTS
                        && root.exists() =>
                {
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads the tree below `root`; none when nothing is there, or not any more.
    ///
    /// # Errors
    /// As of [`Tree::read`].
    pub fn read_if_there(root: &Path, view: View) -> io::Result<Option<Self>> {
        match Self::read(root, view) {
            Err(_) if !root.exists() => Ok(None),
            read => read.map(Some),
        }
    }

    /// The entry at a path relative to the root.
    pub fn get(&self, path: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.path == path)
    }

    /// Path and text of every file that is text: the short form for an assertion.
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
    let entry = look(path, name, &metadata).map_err(|error| at(path, error))?;
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

fn look(path: &Path, name: &str, metadata: &Metadata) -> io::Result<Entry> {
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

/// Lower-case hexadecimal.
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

    /// A volume as kubelet's atomic writer lays it out.
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
