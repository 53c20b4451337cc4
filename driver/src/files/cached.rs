//! Examines files as far as the kernel has what it needs in memory. Nothing here waits for a disk or for
//! a file system that does not answer, so that it may run where nothing may block.

use std::{
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, SystemTime},
};

use nix::{
    fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::fstat,
};

/// `RESOLVE_CACHED` of openat2(2), since Linux 5.12: the call fails where it would have to wait.
const RESOLVE_CACHED: ResolveFlag = ResolveFlag::from_bits_retain(0x20);

/// The age from which on a change of a file gives it another time of change. File systems count time in
/// steps, of a second at most.
const SETTLED_AFTER: Duration = Duration::from_secs(2);

/// Opens what is at a path without using it, and a link itself. Returns nothing if nothing is there, if
/// the kernel cannot tell at once, or if it is too old to say so.
pub fn open_cached(path: &Path) -> Option<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(RESOLVE_CACHED);
    openat2(AT_FDCWD, path, how).ok()
}

/// A state of a file. A file that is changed, replaced or removed has not the same one again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Returns the stamp of the file at a path, if it can be had at once.
    pub fn of(path: &Path) -> Option<Self> {
        let is = fstat(open_cached(path)?).ok()?;
        Some(Self {
            device: is.st_dev,
            inode: is.st_ino,
            size: is.st_size,
            modified: (is.st_mtime, is.st_mtime_nsec),
            changed: (is.st_ctime, is.st_ctime_nsec),
        })
    }

    /// Returns whether any later change of the file shows in its stamp. Two changes at nearly the same
    /// time may leave the same one.
    pub fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let last = self.changed.0.max(self.modified.0);
        let settled = u64::try_from(last).map(|last| Duration::from_secs(last) + SETTLED_AFTER);
        matches!((now, settled), (Ok(now), Ok(settled)) if now >= settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs::{self, File, FileTimes},
        io::Write as _,
        os::unix::fs::symlink,
    };

    type Change = (&'static str, fn(&Path));

    /// A change by every way that there is, after which even the time of modification is put back.
    #[test]
    fn every_change_of_a_file_shows_in_its_stamp() {
        let changes: [Change; 6] = [
            ("written in place", |path| {
                let mut file = File::options().write(true).open(path).unwrap();
                file.write_all(b"two").unwrap();
            }),
            ("written again with the same", |path| {
                let mut file = File::options().write(true).open(path).unwrap();
                file.write_all(b"one").unwrap();
            }),
            ("made longer", |path| {
                let mut file = File::options().append(true).open(path).unwrap();
                file.write_all(b"!").unwrap();
            }),
            ("replaced by another file", |path| {
                let new = path.with_extension("new");
                fs::write(&new, "one").unwrap();
                fs::rename(new, path).unwrap();
            }),
            ("removed and written again", |path| {
                fs::remove_file(path).unwrap();
                fs::write(path, "one").unwrap();
            }),
            ("replaced by a link to a file", |path| {
                let new = path.with_extension("new");
                fs::rename(path, &new).unwrap();
                symlink(new, path).unwrap();
            }),
        ];
        for (what, change) in changes {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("record");
            fs::write(&path, "one").unwrap();
            let modified = fs::metadata(&path).unwrap().modified().unwrap();
            let before = Stamp::of(&path).unwrap();
            assert_eq!(Stamp::of(&path), Some(before));
            assert!(!before.is_settled(), "a second change may come now");
            // The clock of the file system has to go on by a step.
            std::thread::sleep(Duration::from_millis(20));
            change(&path);
            let back = FileTimes::new().set_modified(modified);
            let file = File::options().write(true).open(&path).unwrap();
            file.set_times(back).unwrap();
            assert_ne!(Stamp::of(&path), Some(before), "{what}");
        }
    }

    #[test]
    fn a_stamp_is_settled_when_the_clock_has_gone_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        fs::write(&path, "one").unwrap();
        let mut stamp = Stamp::of(&path).unwrap();
        stamp.changed.0 -= 3;
        assert!(!stamp.is_settled(), "it was modified just now");
        stamp.modified.0 -= 3;
        assert!(stamp.is_settled());
        // The clock was set back since.
        stamp.changed.0 += 1000;
        assert!(!stamp.is_settled());
        assert_eq!(Stamp::of(&directory.path().join("none")), None);
    }
}
