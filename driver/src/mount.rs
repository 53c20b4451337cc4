//! A tmpfs on, a tmpfs off, and whether one is there.
//!
//! Only the target path that kubelet names is touched, and never through a link.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statfs::{TMPFS_MAGIC, statfs},
};

/// What is at a target path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nothing.
    Absent,
    /// A directory on which nothing is mounted.
    Directory,
    /// A tmpfs.
    Mounted,
    /// A file or a link. Nobody who should be there makes one.
    NotADirectory,
}

/// Looks at a target path.
///
/// # Errors
/// When the path cannot be examined, or has something other than a tmpfs mounted on it.
pub fn state(target: &Path) -> io::Result<State> {
    let here = match fs::symlink_metadata(target) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::Absent),
        Err(error) => return Err(error),
    };
    if !here.is_dir() {
        return Ok(State::NotADirectory);
    }
    let parent = target.parent().unwrap_or(target);
    if fs::metadata(parent)?.dev() == here.dev() {
        return Ok(State::Directory);
    }
    if statfs(target)?.filesystem_type() == TMPFS_MAGIC {
        Ok(State::Mounted)
    } else {
        Err(io::Error::other(
            "a file system other than tmpfs is mounted there",
        ))
    }
}

/// Makes the target directory: kubelet makes its parent and leaves this one to the driver, as
/// the CSI specification says.
///
/// # Errors
/// When the parent is missing or the directory cannot be made.
pub fn make_target(target: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o750).create(target)
}

/// Mounts tmpfs volumes of a bounded size.
#[derive(Debug)]
pub struct Tmpfs {
    max_bytes: u64,
    max_inodes: u64,
    /// Whether this kernel, in this user namespace, knows `noswap` (Linux 6.4 and later, not
    /// in an unprivileged user namespace). Learned at the first mount.
    noswap: AtomicBool,
}

impl Tmpfs {
    /// Derives the bounds of a volume from what a provider may send in one answer.
    ///
    /// Twice, because old and new content exist side by side for the moment of a swap; a page
    /// for every file and directory, because a file of one byte takes one; one file for every
    /// 256 bytes of an answer, which is more than any real set of secrets has.
    pub fn bounded_by(max_message_bytes: u64) -> Self {
        const PAGE: u64 = 4096;
        const BYTES_PER_FILE: u64 = 256;
        let max_files = (max_message_bytes / BYTES_PER_FILE).max(64);
        Self {
            max_bytes: 2 * (max_message_bytes + max_files * PAGE),
            // A link at the root, a file, and about as many directories, twice.
            max_inodes: 6 * max_files,
            noswap: AtomicBool::new(true),
        }
    }

    /// Mounts an empty tmpfs on an existing directory. Root mode 0755; no set-user-ID, no
    /// devices, no execution, and no swap where the kernel can promise that.
    ///
    /// # Errors
    /// What mount(2) says.
    pub fn mount(&self, target: &Path) -> io::Result<()> {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let attempt =
            |options: &str| mount(Some("tmpfs"), target, Some("tmpfs"), flags, Some(options));
        let options = format!(
            "mode=0755,size={},nr_inodes={}",
            self.max_bytes, self.max_inodes
        );
        if self.noswap.load(Ordering::Relaxed) {
            match attempt(&format!("{options},noswap")) {
                Err(Errno::EINVAL) => self.noswap.store(false, Ordering::Relaxed),
                result => return Ok(result?),
            }
        }
        Ok(attempt(&options)?)
    }
}

/// Takes the topmost mount off a target.
///
/// A mount that is in use is detached, so that a process that still sits in it cannot keep the
/// pod from going away; the memory goes when that process does.
///
/// # Errors
/// What umount2(2) says.
pub fn unmount(target: &Path) -> io::Result<()> {
    match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::EBUSY) => Ok(umount2(
            target,
            MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH,
        )?),
        result => Ok(result?),
    }
}
