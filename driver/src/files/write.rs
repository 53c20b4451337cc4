//! Writes a payload into a new directory of a volume that has room for it.

use std::{
    fmt,
    fs::File as StdFile,
    io::{self, Write as _},
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    fcntl::OFlag,
    sys::{
        stat::{Mode, fchmod, mkdirat},
        statvfs::fstatvfs,
    },
    unistd::{Gid, fchown},
};

use super::{
    File, Payload,
    tree::{about, open_beneath, open_directory},
};

/// The error of a volume that has no room for a payload.
#[derive(Debug)]
pub struct Full {
    message: String,
    /// Whether something else than content fills the volume: the payload takes at most half of
    /// what the volume has, which leaves as much for the content before.
    pub is_filled_otherwise: bool,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Full {}

/// Makes sure, before anything is written, that a payload has room beside what the volume holds. A
/// file system without a number of blocks or files has no bound.
///
/// # Errors
/// `StorageFull` with a [`Full`], or the system's error.
pub(super) fn check_room(root: &OwnedFd, payload: &Payload) -> io::Result<()> {
    let is = fstatvfs(root)?;
    let block = is.fragment_size().max(1);
    let lengths = payload
        .files()
        .map(|(_, file)| file.contents.expose().len() as u64);
    let blocks: u64 = lengths.map(|length| length.div_ceil(block)).sum();
    // One more for the directory that holds them.
    let entries = (payload.len() + payload.directories() + 1) as u64;
    let is_half = |needed: u64, of: u64| of == 0 || needed.saturating_mul(2) <= of;
    let is_filled_otherwise = is_half(entries, is.files()) && is_half(blocks, is.blocks());
    let full = |message: String| {
        let full = Full {
            message,
            is_filled_otherwise,
        };
        Err(io::Error::new(io::ErrorKind::StorageFull, full))
    };
    if is.files() != 0 && entries > is.files_available() {
        return full(format!(
            "{} files in {} directories do not fit: the volume has room for {} more files and directories",
            payload.len(),
            payload.directories(),
            is.files_available()
        ));
    }
    if is.blocks() != 0 && blocks > is.blocks_available() {
        return full(format!(
            "{} files that take {} bytes in blocks of {block} do not fit: the volume has room for {} more bytes",
            payload.len(),
            blocks * block,
            is.blocks_available() * block
        ));
    }
    Ok(())
}

/// Writes all files of a payload below a new directory `name`.
///
/// # Errors
/// The system's error, with the path.
pub(super) fn write_tree(root: &OwnedFd, name: &str, payload: &Payload) -> io::Result<()> {
    let group = payload.group();
    let tree = make_directory(root, name, group).map_err(|e| about(e, name))?;
    for (path, file) in payload.files() {
        let mut parent = tree.try_clone()?;
        let mut components = path.components().peekable();
        while let Some(component) = components.next() {
            if components.peek().is_none() {
                write_file(&parent, component, file, group).map_err(|e| about(e, path.as_str()))?;
                break;
            }
            let directory = match make_directory(&parent, component, group) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    open_directory(parent.as_fd(), component)
                }
                made => made,
            };
            parent = directory.map_err(|e| about(e, path.as_str()))?;
        }
    }
    Ok(())
}

fn make_directory(parent: &OwnedFd, name: &str, group: Option<u32>) -> io::Result<OwnedFd> {
    let mode = Mode::from_bits_truncate(0o755);
    mkdirat(parent, name, mode)?;
    let directory = open_directory(parent.as_fd(), name)?;
    // mkdir(2) obeys the process's umask; readers need these bits whatever it is.
    fchmod(&directory, mode)?;
    give_to(&directory, group)?;
    Ok(directory)
}

fn write_file(parent: &OwnedFd, name: &str, file: &File, group: Option<u32>) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
    let mode = Mode::from_bits_truncate(0o600);
    let mut out = StdFile::from(open_beneath(parent, name, flags, mode)?);
    out.write_all(file.contents.expose())?;
    // The group before the mode: until the mode is set, only the owner may read.
    give_to(&out, group)?;
    Ok(fchmod(&out, Mode::from_bits_truncate(file.mode()))?)
}

/// Changes the group of a file, if it is to have a certain one.
pub(super) fn give_to(file: impl AsFd, group: Option<u32>) -> nix::Result<()> {
    match group {
        Some(group) => fchown(file, None, Some(Gid::from_raw(group))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        files::{
            swap,
            tree::{names, open_root},
        },
        mount::alone::{Own, alone},
    };
    use nix::mount::{MsFlags, mount};

    fn payload(paths: impl IntoIterator<Item = String>) -> Payload {
        let file = |path| (path, File::new(0, b"1".to_vec()));
        Payload::new(paths.into_iter().map(file)).unwrap()
    }

    /// Many directories take room too.
    #[test]
    fn what_there_is_no_room_for_is_refused_before_anything_is_written() {
        alone(Own::Mounts, || {
            let volume = tempfile::tempdir().unwrap();
            let options = Some("size=64k,nr_inodes=200");
            let tmpfs = Some("tmpfs");
            mount(Some("x"), volume.path(), tmpfs, MsFlags::empty(), options).unwrap();
            let root = || open_root(volume.path()).unwrap();
            let stage = |payload| swap::stage(root(), payload);
            let replace = |payload| drop(stage(payload).unwrap().unwrap().commit().unwrap());
            let deep =
                |files: usize| payload((0..files).map(|n| format!("{n}/{}", ["d"; 30].join("/"))));
            let wide = |files: usize| payload((0..files).map(|n| n.to_string()));
            let old = payload(["a".to_owned()]);
            replace(old.clone());
            for (too_much, says) in [
                (
                    deep(7),
                    "7 files in 210 directories do not fit: the volume has room for",
                ),
                (
                    wide(300),
                    "300 files in 0 directories do not fit: the volume has room for",
                ),
                (
                    wide(40),
                    "40 files that take 163840 bytes in blocks of 4096",
                ),
            ] {
                let before = names(root().as_fd()).unwrap();
                let error = stage(too_much).err().unwrap();
                assert_eq!(error.kind(), io::ErrorKind::StorageFull);
                assert!(error.to_string().contains(says), "{error}");
                assert_eq!(names(root().as_fd()).unwrap(), before);
                assert!(swap::holds(&root(), &old));
            }
            replace(deep(3));
            assert!(swap::holds(&root(), &deep(3)));
        });
    }
}
