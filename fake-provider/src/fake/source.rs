//! Objects that are stored outside of the class: in a YAML file, or as the files of a directory.
//!
//! Both are read at each Mount, so the next Mount serves a change.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::yaml::{decode_base64, parse_mode, parse_yaml};

/// The file or directory that objects are read from.
#[derive(Clone, Debug)]
pub(super) struct Source(PathBuf);

/// The reason why stored objects cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("objects in {}: {reason}", .path.display())]
pub struct Unreadable {
    /// The file or directory at fault.
    pub path: PathBuf,
    /// The mistake, without any of the content.
    pub reason: String,
}

/// One stored object.
#[derive(Clone)]
pub(super) struct Stored {
    /// The permission bits, if any are given.
    pub(super) mode: Option<u32>,
    pub(super) contents: Vec<u8>,
    pub(super) version: String,
}

impl Stored {
    /// Returns an object of text without a mode. The version defaults to a hash of the content.
    pub(super) fn of_text(content: String, version: Option<String>) -> Self {
        let contents = content.into_bytes();
        Self {
            mode: None,
            version: version.unwrap_or_else(|| keyed_version_of(&contents)),
            contents,
        }
    }
}

/// Stored objects by name.
pub(super) type StoredObjects = BTreeMap<String, Stored>;

impl Source {
    pub(super) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Reads all objects.
    ///
    /// # Errors
    ///
    /// [`Unreadable`], naming the file that cannot be read or parsed.
    pub(super) async fn read(&self) -> Result<StoredObjects, Unreadable> {
        let path = self.0.clone();
        let reading = tokio::task::spawn_blocking(move || read(&path));
        reading
            .await
            .unwrap_or_else(|gone| Err(failure(&self.0, gone)))
    }
}

fn read(path: &Path) -> Result<StoredObjects, Unreadable> {
    let mut objects = StoredObjects::new();
    if fs::metadata(path)
        .map_err(|error| failure(path, error))?
        .is_dir()
    {
        read_directory(path, "", &mut objects)?;
    } else {
        read_list(path, &mut objects)?;
    }
    Ok(objects)
}

/// Reads the files of a directory and of those in it. Names that begin with `..` are skipped: in a
/// mounted ConfigMap or Secret they are the targets of the links, so each object would appear twice.
fn read_directory(dir: &Path, prefix: &str, objects: &mut StoredObjects) -> Result<(), Unreadable> {
    for entry in fs::read_dir(dir).map_err(|error| failure(dir, error))? {
        let entry = entry.map_err(|error| failure(dir, error))?;
        let path = entry.path();
        let Ok(name) = entry.file_name().into_string() else {
            return Err(failure(&path, "the name is not UTF-8"));
        };
        if name.starts_with("..") {
            continue;
        }
        let name = format!("{prefix}{name}");
        // A link to a directory is not entered: it could lead back here.
        if entry
            .file_type()
            .map_err(|error| failure(&path, error))?
            .is_dir()
        {
            read_directory(&path, &format!("{name}/"), objects)?;
        } else if let Some(stored) = read_object(&path).map_err(|error| failure(&path, error))? {
            objects.insert(name, stored);
        }
    }
    Ok(())
}

/// Reads a regular file or a link to one. Returns `None` for anything else.
fn read_object(path: &Path) -> io::Result<Option<Stored>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Ok(None);
    }
    let contents = fs::read(path)?;
    let mode = metadata.permissions().mode() & 0o777;
    Ok(Some(Stored {
        mode: Some(mode),
        version: keyed_version_of(&contents),
        contents,
    }))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Listed {
    name: String,
    content: Option<String>,
    content_base64: Option<String>,
    mode: Option<String>,
    version: Option<String>,
}

/// Reads the objects that a YAML file lists.
fn read_list(path: &Path, objects: &mut StoredObjects) -> Result<(), Unreadable> {
    let text = fs::read_to_string(path).map_err(|error| failure(path, error))?;
    let listed: Vec<Listed> = parse_yaml(&text).map_err(|reason| failure(path, reason))?;
    for entry in listed {
        let name = entry.name.clone();
        let stored =
            stored(entry).map_err(|reason| failure(path, format!("object {name:?}: {reason}")))?;
        if objects.insert(name.clone(), stored).is_some() {
            return Err(failure(path, format!("object {name:?} is there twice")));
        }
    }
    Ok(())
}

fn stored(entry: Listed) -> Result<Stored, String> {
    let contents = match (entry.content, entry.content_base64) {
        (Some(text), None) => text.into_bytes(),
        (None, Some(base64)) => decode_base64(&base64)?,
        _ => return Err("give either content or contentBase64".to_owned()),
    };
    let mode = entry.mode.as_deref().map(parse_mode).transpose()?;
    let version = entry.version.unwrap_or_else(|| keyed_version_of(&contents));
    Ok(Stored {
        mode,
        contents,
        version,
    })
}

/// Returns the version of an object for which none is given. A plain hash of the content would be a bad
/// example, because versions are shown to everybody; a real provider has a key that nobody knows.
fn keyed_version_of(contents: &[u8]) -> String {
    version_of(&[b"fake-provider", contents].concat())
}

/// Returns twelve hexadecimal digits of a hash: the same for the same content, in each run.
pub(super) fn version_of(contents: &[u8]) -> String {
    Sha256::digest(contents)
        .iter()
        .take(6)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn failure(path: &Path, reason: impl ToString) -> Unreadable {
    Unreadable {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use std::os::unix::fs::symlink;

    fn summary(objects: &StoredObjects) -> Vec<(String, String, u32)> {
        let line = |(name, o): (&String, &Stored)| {
            (
                name.clone(),
                String::from_utf8_lossy(&o.contents).into_owned(),
                o.mode.unwrap_or_default(),
            )
        };
        objects.iter().map(line).collect()
    }

    #[tokio::test]
    async fn a_mounted_configmap_is_read_once_through_its_links() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("..2026");
        fs::create_dir_all(dir.path().join("tls")).unwrap();
        fs::create_dir(&data).unwrap();
        fs::write(data.join("user"), "alice").unwrap();
        fs::set_permissions(data.join("user"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("..2026", dir.path().join("..data")).unwrap();
        symlink("..data/user", dir.path().join("user")).unwrap();
        symlink(".", dir.path().join("loop")).unwrap();
        fs::write(dir.path().join("tls/key"), "k").unwrap();
        fs::set_permissions(
            dir.path().join("tls/key"),
            fs::Permissions::from_mode(0o600),
        )
        .unwrap();

        let objects = Source::new(dir.path().to_owned()).read().await.unwrap();
        let expected = [("tls/key", "k", 0o600), ("user", "alice", 0o640)];
        assert_eq!(
            summary(&objects),
            expected.map(|(n, c, m)| (n.to_owned(), c.to_owned(), m))
        );
        assert_eq!(objects["user"].version, "22af53344f83");
    }

    #[tokio::test]
    async fn a_list_is_read_with_modes_and_versions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("objects.yaml");
        let text = "- {name: a, content: 'alice', mode: 0640}\n\
                    - {name: b, contentBase64: AAE=, version: '7'}\n";
        fs::write(&path, text).unwrap();
        let objects = Source::new(path).read().await.unwrap();
        assert_eq!(objects["a"].mode, Some(0o640));
        assert_eq!(objects["b"].mode, None);
        assert_eq!(objects["a"].version, "22af53344f83");
        assert_eq!(
            (&objects["b"].contents[..], &objects["b"].version[..]),
            (&[0, 1][..], "7")
        );
    }

    #[rstest]
    #[case("- {name: a}", "object \"a\": give either content or contentBase64")]
    #[case(
        "- {name: a, content: x}\n- {name: a, content: y}",
        "object \"a\" is there twice"
    )]
    #[case(
        "- {name: a, content: hunter2, mode: rw}",
        "object \"a\": mode must be octal digits"
    )]
    #[case("- {name: a, content: [hunter2]}", "not understood at line 1")]
    #[tokio::test]
    async fn a_bad_list_is_refused_without_its_content(#[case] text: &str, #[case] expected: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("objects.yaml");
        fs::write(&path, text).unwrap();
        let error = Source::new(path).read().await.err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}
