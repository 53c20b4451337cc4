//! Compares a volume with the payload that it should hold, as its pod sees it: by name, through
//! the links at the root.

use std::{
    collections::BTreeSet,
    ffi::CStr,
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
    layout::{DATA, current, is_bare, is_hidden, is_own_link},
    tree::{names, open_directory},
};

/// The first thing in which a volume differs from a payload. It holds a path and no content.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Difference {
    path: String,
    what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.path, self.what)
    }
}

type Compared = Result<(), Difference>;

fn differs<T>(path: &str, what: impl Into<String>) -> Result<T, Difference> {
    Err(Difference {
        path: quoted(path, 80).to_string(),
        what: what.into(),
    })
}

/// Says of an entry that cannot be examined, why: there may be nothing wrong with it, as where the process
/// has too many open files.
fn fails<T>(path: &str, what: &str, error: impl Into<io::Error>) -> Result<T, Difference> {
    differs(path, format!("{what}: {}", error.into()))
}

/// The entries at the root that are no part of the content, besides the directories that kubelet makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Strangers {
    /// They differ.
    Differ,
    /// They are not compared.
    MayBe,
}

/// Compares everything that a pod sees of a volume: names, contents, modes and the group. An entry
/// that cannot be examined differs. Hidden names at the root, except for `..data`, are not compared, and
/// neither are directories without a file ([`is_bare`]).
pub(super) fn compare(root: &OwnedFd, payload: &Payload, strangers: Strangers) -> Compared {
    const NOWHERE: &str = "does not lead to a directory of content";
    let open = |name: String| open_directory(root.as_fd(), name.as_str());
    let data = match current(root).and_then(|name| name.map(open).transpose()) {
        Ok(Some(data)) => data,
        Ok(None) => return differs(DATA, NOWHERE),
        Err(error) => return fails(DATA, NOWHERE, error),
    };
    same_names(root, payload, strangers)?;
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

/// Returns whether an entry at the root is neither the driver's, of whose names `roots` are those of the
/// content, nor a directory that kubelet has made.
pub(super) fn is_stranger(root: &OwnedFd, roots: &BTreeSet<&str>, name: &CStr) -> bool {
    let is_of_content = name.to_str().is_ok_and(|name| roots.contains(name));
    !is_hidden(name) && !is_of_content && !is_bare(root.as_fd(), name)
}

fn same_names(root: &OwnedFd, payload: &Payload, strangers: Strangers) -> Compared {
    let roots = payload.roots();
    let found = match names(root.as_fd()) {
        Ok(found) => found,
        Err(error) => return fails("/", "cannot be listed", error),
    };
    for name in &found {
        let of_payload = name.to_str().ok().filter(|name| roots.contains(name));
        match of_payload {
            Some(name) if !is_own_link(root, name) => {
                return differs(name, "is not the link that leads to the content");
            }
            None if strangers == Strangers::Differ && is_stranger(root, &roots, name) => {
                let name = name.to_string_lossy();
                return differs(&name, "is there and is not part of the content");
            }
            _ => {}
        }
    }
    Ok(())
}

fn same_file(root: &OwnedFd, path: &str, expected: &File, group: Option<u32>) -> Compared {
    let file = match open_as_a_pod_does(root, path) {
        Ok(file) => StdFile::from(file),
        Err(Errno::ENOENT) => return differs(path, "is missing"),
        Err(errno) => return fails(path, "cannot be opened", errno),
    };
    let metadata = match file.metadata() {
        Ok(metadata) => metadata,
        Err(error) => return fails(path, "cannot be examined", error),
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
        Err(error) => fails(path, "cannot be read", error),
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
        let stat = match fstat(directory) {
            Ok(stat) => stat,
            Err(errno) => return fails(prefix, "cannot be examined", errno),
        };
        if stat.st_mode & 0o7777 != 0o755 || self.group.is_some_and(|group| stat.st_gid != group) {
            return differs(prefix, "is a directory of another mode or group");
        }
        let found = match names(directory.as_fd()) {
            Ok(found) => found,
            Err(error) => return fails(prefix, "cannot be listed", error),
        };
        for name in found {
            let path = format!("{prefix}/{}", name.to_string_lossy());
            let path = path.trim_start_matches('/');
            let kind = fstatat(directory, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
                .map(|stat| kind_of(&stat));
            if kind == Ok(SFlag::S_IFDIR) && is_bare(directory.as_fd(), &name) {
                continue;
            }
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
                    Err(error) => return fails(path, "cannot be opened", error),
                }
            }
        }
        Ok(())
    }
}

fn kind_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        files::{swap::stage, tree::open_root},
        mount::alone::{Own, alone},
    };
    use nix::sys::resource::{Resource, setrlimit};
    use std::os::fd::AsRawFd as _;

    /// A process with too many open files says so at each step, and not that the volume is wrong.
    #[test]
    fn a_lack_of_descriptors_is_named() {
        alone(Own::Process, || {
            let dir = tempfile::tempdir().unwrap();
            let files = [("a", "x"), ("b/c", "y")];
            let file = |(path, text): (&str, &str)| {
                (path.to_owned(), File::new(0, text.as_bytes().to_vec()))
            };
            let payload = Payload::new(files.map(file)).unwrap();
            let root = open_root(dir.path()).unwrap();
            let staged = stage(open_root(dir.path()).unwrap(), payload.clone()).unwrap();
            staged.unwrap().commit().unwrap();
            let next = StdFile::open("/dev/null").unwrap().as_raw_fd();
            let next = u64::try_from(next).unwrap();
            let mut said = Vec::new();
            for more in 0..4 {
                setrlimit(Resource::RLIMIT_NOFILE, next + more, 4096).unwrap();
                match compare(&root, &payload, Strangers::Differ) {
                    Ok(()) => break,
                    Err(difference) => said.push(difference.to_string()),
                }
            }
            let why = "Too many open files (os error 24)";
            let expected = [
                format!("\"..data\" does not lead to a directory of content: {why}"),
                format!("\"/\" cannot be listed: {why}"),
                format!("\"b\" cannot be listed: {why}"),
            ];
            assert_eq!(said, expected);
        });
    }
}
