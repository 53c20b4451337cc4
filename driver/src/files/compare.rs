//! Compares a volume with the payload that it should hold, as its pod sees it: by name, through
//! the links at the root.

use std::{
    fmt,
    fs::File as StdFile,
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{FileStat, SFlag, fstat, fstatat},
};
use zeroize::Zeroizing;

use crate::quoted::quoted;

use super::{
    File, MAX_DEPTH, Payload,
    layout::{DATA, current, is_hidden, is_own_link},
    tree::{names, open_directory},
};

/// The first thing in which a volume differs from a payload. It holds a path and no content.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Difference {
    path: String,
    what: &'static str,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.path, self.what)
    }
}

type Compared = Result<(), Difference>;

fn differs<T>(path: &str, what: &'static str) -> Result<T, Difference> {
    Err(Difference {
        path: quoted(path, 80).to_string(),
        what,
    })
}

/// Compares everything that a pod sees of a volume: names, contents, modes and the group. An entry
/// that cannot be examined differs. Hidden names at the root, except for `..data`, are not compared.
pub(super) fn compare(root: &OwnedFd, payload: &Payload) -> Compared {
    let current = current(root).ok().flatten();
    let Some(data) = current.and_then(|name| open_directory(root.as_fd(), name.as_str()).ok())
    else {
        return differs(DATA, "does not lead to a directory of content");
    };
    same_names(root, payload)?;
    if let Some(group) = payload.group()
        && !fstat(root).is_ok_and(|root| root.st_gid == group)
    {
        return differs("/", "does not belong to the volume's group");
    }
    for (path, file) in payload.files() {
        same_file(root, path.as_str(), file, payload.group())?;
    }
    let mut left = Left {
        files: payload.len(),
        directories: payload.directories(),
        group: payload.group(),
    };
    left.count(&data, "", 0)
}

fn same_names(root: &OwnedFd, payload: &Payload) -> Compared {
    let roots = payload.roots();
    let Ok(found) = names(root.as_fd()) else {
        return differs("/", "cannot be listed");
    };
    for name in &found {
        if is_hidden(name) {
            continue;
        }
        match name.to_str() {
            Ok(name) if !roots.contains(name) => {
                return differs(name, "is there and is not part of the content");
            }
            Ok(name) if !is_own_link(root, name) => {
                return differs(name, "is not the link that leads to the content");
            }
            Ok(_) => {}
            Err(_) => return differs("/", "has a name that is not UTF-8"),
        }
    }
    Ok(())
}

fn same_file(root: &OwnedFd, path: &str, expected: &File, group: Option<u32>) -> Compared {
    let file = match open_as_a_pod_does(root, path) {
        Ok(file) => StdFile::from(file),
        Err(Errno::ENOENT) => return differs(path, "is missing"),
        Err(_) => return differs(path, "cannot be opened"),
    };
    let Ok(metadata) = file.metadata() else {
        return differs(path, "cannot be examined");
    };
    if !metadata.is_file() {
        return differs(path, "is not a regular file");
    }
    if metadata.mode() & 0o7777 != expected.mode() {
        return differs(path, "has another mode");
    }
    if group.is_some_and(|group| metadata.gid() != group) {
        return differs(path, "does not belong to the volume's group");
    }
    match same_content(file, metadata.len(), expected.contents.expose()) {
        Ok(true) => Ok(()),
        Ok(false) => differs(path, "has another content"),
        Err(_) => differs(path, "cannot be read"),
    }
}

/// Opens a file through the links at the root, as a pod does, but only within the volume and its file
/// system, and without waiting for a writer where the file is a pipe.
fn open_as_a_pod_does(root: &OwnedFd, path: &str) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_MAGICLINKS
                | ResolveFlag::RESOLVE_NO_XDEV,
        );
    openat2(root, path, how)
}

/// Reads a page at a time, so that no second copy of the secret lies in memory.
fn same_content(mut file: StdFile, length: u64, expected: &[u8]) -> io::Result<bool> {
    if length != expected.len() as u64 {
        return Ok(false);
    }
    let mut page = Zeroizing::new([0_u8; 4096]);
    let mut rest = expected;
    while !rest.is_empty() {
        let read = file.read(&mut page[..])?;
        match (rest.get(..read), page.get(..read)) {
            (Some(next), Some(found)) if read > 0 && next == found => rest = &rest[read..],
            _ => return Ok(false),
        }
    }
    Ok(true)
}

/// The number of entries that may still be found below the directory of content.
struct Left {
    files: usize,
    directories: usize,
    group: Option<u32>,
}

impl Left {
    /// Counts what lies in a directory, no deeper than a payload may be.
    fn count(&mut self, directory: &OwnedFd, prefix: &str, depth: usize) -> Compared {
        if depth > MAX_DEPTH {
            return differs(prefix, "is deeper than any path of the content");
        }
        let Ok(stat) = fstat(directory) else {
            return differs(prefix, "cannot be examined");
        };
        if stat.st_mode & 0o7777 != 0o755 || self.group.is_some_and(|group| stat.st_gid != group) {
            return differs(prefix, "is a directory of another mode or group");
        }
        let Ok(found) = names(directory.as_fd()) else {
            return differs(prefix, "cannot be listed");
        };
        for name in found {
            let path = format!("{prefix}/{}", name.to_string_lossy());
            let path = path.trim_start_matches('/');
            let kind = fstatat(directory, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
                .map(|stat| kind_of(&stat));
            let one_less = match kind {
                Ok(SFlag::S_IFREG) => self.files.checked_sub(1).map(|left| self.files = left),
                Ok(SFlag::S_IFDIR) => self
                    .directories
                    .checked_sub(1)
                    .map(|left| self.directories = left),
                _ => return differs(path, "is neither a file nor a directory"),
            };
            if one_less.is_none() {
                return differs(path, "is there and is not part of the content");
            }
            if kind == Ok(SFlag::S_IFDIR) {
                match open_directory(directory.as_fd(), name.as_c_str()) {
                    Ok(below) => self.count(&below, path, depth + 1)?,
                    Err(_) => return differs(path, "cannot be opened"),
                }
            }
        }
        Ok(())
    }
}

fn kind_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}
