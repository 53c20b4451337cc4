//! Mounts the tmpfs of a volume, and keeps its bounds in step with the driver's flags.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    mount::{MsFlags, mount},
    sys::{
        stat::Mode,
        statfs::{TMPFS_MAGIC, fstatfs},
        statvfs::{FsFlags, Statvfs, fstatvfs},
    },
};

use super::{
    Here, VolumeMount, table,
    volume::{FileSystemId, Occupant},
};

/// The time for which a mount in which targets lie counts as shared, until the kernel is asked again.
const SHARED_FOR: Duration = Duration::from_secs(30);

/// Mounts tmpfs volumes of a bounded size.
#[derive(Debug)]
pub struct Tmpfs {
    max_bytes: u64,
    max_inodes: u64,
    /// Whether this kernel, in this user namespace, knows `noswap` (Linux 6.4 and later, not
    /// in an unprivileged user namespace). The first mount tells.
    noswap: AtomicBool,
    /// Whether the driver runs in a container, so that kubelet sees these mounts only if they
    /// propagate out of it.
    in_a_pod: bool,
    /// The ID of the mount in which targets were last found to be shared, and when.
    shared: Mutex<Option<(u64, Instant)>>,
    /// The file systems that were found to be a volume at their targets.
    known: Mutex<HashMap<PathBuf, FileSystemId>>,
}

impl Tmpfs {
    /// Derives the bounds of a volume from the number of bytes that a provider may send in one answer.
    ///
    /// A volume has room for two answers, because old and new content exist side by side during a
    /// swap. Each file and directory may take a page, and an answer may have a file for every 256
    /// bytes, which is more than any real set of secrets has.
    pub fn bounded_by(max_message_bytes: u64) -> Self {
        const PAGE: u64 = 4096;
        const BYTES_PER_FILE: u64 = 256;
        let max_files = (max_message_bytes / BYTES_PER_FILE).max(64);
        Self {
            max_bytes: 2 * (max_message_bytes + max_files * PAGE),
            // Each file takes a link at the root, the file and a directory, twice.
            max_inodes: 6 * max_files,
            noswap: AtomicBool::new(true),
            in_a_pod: false,
            shared: Mutex::default(),
            known: Mutex::default(),
        }
    }

    /// Sets whether the driver runs in a container of a pod, so that kubelet and other pods see
    /// its mounts only if they propagate.
    #[must_use]
    pub fn in_a_pod(mut self, in_a_pod: bool) -> Self {
        self.in_a_pod = in_a_pod;
        self
    }

    /// Returns the mount point that holds a directory, if what is mounted in the directory would
    /// not be seen outside the driver's container.
    ///
    /// # Errors
    /// The system's error; `NotFound` if the directory is not there.
    pub fn unseen(&self, directory: &Path) -> io::Result<Option<PathBuf>> {
        if !self.in_a_pod {
            return Ok(None);
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let id = table::id_of(open(directory, flags, Mode::empty())?.as_fd())?;
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.is_some_and(|(of, seen)| of == id && seen.elapsed() < SHARED_FOR) {
            return Ok(None);
        }
        let holder = table::of(id)?.filter(|entry| !entry.shared);
        let unseen = holder.map(|entry| entry.point);
        *shared = unseen.is_none().then(|| (id, Instant::now()));
        Ok(unseen)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<PathBuf, FileSystemId>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the volume of a target, which is gone.
    pub fn forget(&self, target: &Path) {
        self.known().remove(target);
    }

    /// Mounts an empty tmpfs on an existing directory, and returns it. Its root has mode 0755. It has
    /// no set-user-ID, no devices and no execution, and no swap where the kernel supports that.
    ///
    /// # Errors
    /// The error of mount(2), or that something else is mounted there by then.
    pub fn mount(&self, target: &Path) -> io::Result<VolumeMount> {
        self.attach(target)?;
        // An empty tmpfs with these bounds is the one that was just mounted.
        let id = match Here::open_mount(target)? {
            Some(here) if self.is_new(&here.file)? => {
                table::remember_tmpfs(here.file.as_fd());
                Some(FileSystemId::of(&here)?)
            }
            _ => None,
        };
        Ok(self.remembered(VolumeMount::at(target, id)?, target))
    }

    fn remembered(&self, volume: VolumeMount, target: &Path) -> VolumeMount {
        self.known().insert(target.to_owned(), volume.id);
        volume
    }

    fn is_new(&self, root: &OwnedFd) -> io::Result<bool> {
        let is = fstatvfs(root)?;
        Ok(fstatfs(root)?.filesystem_type() == TMPFS_MAGIC
            && (is.blocks(), is.files()) == (self.blocks(&is), self.max_inodes)
            && (is.blocks_free(), is.files_free()) == (is.blocks(), is.files() - 1))
    }

    fn attach(&self, target: &Path) -> io::Result<()> {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let source = table::source_of(target);
        let attempt = |options: &str| {
            let source = Some(source.as_str());
            mount(source, target, Some("tmpfs"), flags, Some(options))
        };
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

    /// Makes sure that the tmpfs at a target is a volume, gives it the present bounds, which differ
    /// from those that it was mounted with if the flags have changed since, and returns it. No bound
    /// becomes smaller than what the volume holds. A volume that another program has made read-only keeps its
    /// bounds until it is writable.
    ///
    /// # Errors
    /// When nothing is mounted there, or something that is neither this driver's nor an earlier
    /// driver's volume.
    pub fn refit(&self, target: &Path) -> io::Result<VolumeMount> {
        let known = self.known().get(target).copied();
        let volume = self.remembered(VolumeMount::at(target, known)?, target);
        let is = fstatvfs(&volume.file)?;
        // To mount it again as it is would make the driver's own mount read-only, beside the file system. Whoever
        // makes the file system writable on the node would not change that.
        if is.flags().contains(FsFlags::ST_RDONLY) && !made_writable(&volume, &is)? {
            return Ok(volume);
        }
        let options = self.other_bounds(&is).join(",");
        if options.is_empty() {
            return Ok(volume);
        }
        let (flags, none) = (MsFlags::MS_REMOUNT | kept(is.flags()), None::<&str>);
        match mount(none, target, none, flags, Some(options.as_str())) {
            Ok(()) => {
                tracing::info!(target_path = %target.display(), options, "the volume was resized to what the driver's flags allow");
            }
            // It may still be large enough.
            Err(error) => {
                tracing::warn!(target_path = %target.display(), options, %error, "the volume could not be resized and keeps its size");
            }
        }
        Ok(volume)
    }

    /// Returns the volume at a target, unchanged, if one is mounted there. A volume that something
    /// covers is none, because it has no readers.
    ///
    /// # Errors
    /// The system's error.
    pub fn volume(&self, target: &Path) -> io::Result<Option<VolumeMount>> {
        let known = self.known().get(target).copied();
        match VolumeMount::find(target, known)? {
            Occupant::Volume(volume) => Ok(Some(self.remembered(volume, target))),
            Occupant::Nothing => Ok(None),
            Occupant::Foreign(entry) => {
                tracing::debug!(target_path = %target.display(), kind = entry.kind, source = entry.source, "what is mounted there is no volume of this driver, and is not read");
                Ok(None)
            }
        }
    }

    /// Returns whether a volume has at least the present bounds.
    ///
    /// # Errors
    /// When nothing is mounted there, or something other than a tmpfs.
    pub fn fits(&self, target: &Path) -> io::Result<bool> {
        let here = Here::open_mount(target)?.ok_or_else(table::gone)?;
        if !here.is_tmpfs()? {
            return Err(io::Error::other(
                "a file system other than tmpfs is mounted there",
            ));
        }
        let is = fstatvfs(&here.file)?;
        let large = |has: u64, needed: u64| has == 0 || has >= needed;
        Ok(large(is.blocks(), self.blocks(&is)) && large(is.files(), self.max_inodes))
    }

    /// Returns the mount options that give a file system the present bounds, as far as they differ
    /// and what it holds is within them. Zero is no bound, and the kernel lets none be set later.
    fn other_bounds(&self, is: &Statvfs) -> Vec<String> {
        let other = |has: u64, free: u64, bound: u64| {
            has != 0 && has != bound && has.saturating_sub(free) <= bound
        };
        let mut options = Vec::new();
        if other(is.blocks(), is.blocks_free(), self.blocks(is)) {
            options.push(format!("size={}", self.max_bytes));
        }
        if other(is.files(), is.files_free(), self.max_inodes) {
            options.push(format!("nr_inodes={}", self.max_inodes));
        }
        options
    }

    fn blocks(&self, is: &Statvfs) -> u64 {
        self.max_bytes.div_ceil(is.fragment_size().max(1))
    }
}

/// Makes the driver's own mount of a volume writable if its file system is, and returns whether it is writable now.
///
/// A driver whose container starts while the volume is read-only on the node gets a mount that is read-only by
/// itself. Whoever makes the volume writable on the node changes the file system and the node's mount, not this one.
fn made_writable(volume: &VolumeMount, is: &Statvfs) -> io::Result<bool> {
    let entry = table::of(table::id_of(volume.file.as_fd())?)?;
    if !entry.is_some_and(|entry| entry.is_writable) {
        return Ok(false);
    }
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | kept(is.flags());
    let (at, none) = (volume.target.as_path(), None::<&str>);
    match mount(none, at, none, flags, none) {
        Ok(()) => {
            tracing::info!(target_path = %at.display(), "the volume is writable again for the driver, as it is on the node");
            Ok(true)
        }
        // What is written next fails and says what to do.
        Err(error) => {
            tracing::warn!(target_path = %at.display(), %error, "the driver's own mount of the volume could not be made writable");
            Ok(false)
        }
    }
}

/// Returns the flags that a writable mount keeps when it is mounted again.
fn kept(flags: FsFlags) -> MsFlags {
    let pairs = [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
    ];
    let present = pairs.into_iter().filter(|(flag, _)| flags.contains(*flag));
    present.fold(MsFlags::empty(), |kept, (_, flag)| kept | flag)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::{
        Detached, TargetState,
        alone::{Own, alone},
        detach, state,
        tests::{bind, target},
    };
    use nix::{mount::umount, sys::statvfs::statvfs};
    use std::fs;

    #[test]
    fn bounds_follow_the_flags() {
        alone(Own::Mounts, || {
            let (_root, target) = target();
            let (small, large) = (Tmpfs::bounded_by(1 << 16), Tmpfs::bounded_by(1 << 24));
            let bounds = || {
                let is = statvfs(&target).unwrap();
                (is.blocks() * is.fragment_size(), is.files())
            };
            let of = |tmpfs: &Tmpfs| (tmpfs.max_bytes, tmpfs.max_inodes);
            small.mount(&target).unwrap();
            assert_eq!(bounds(), of(&small));
            assert!(!large.fits(&target).unwrap());
            fs::write(target.join("kept"), "x").unwrap();
            for tmpfs in [&large, &small, &small, &large] {
                tmpfs.refit(&target).unwrap();
                assert_eq!(bounds(), of(tmpfs));
                assert!(tmpfs.fits(&target).unwrap());
                let flags = statvfs(&target).unwrap().flags();
                let kept = FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_NOEXEC;
                assert!(flags.contains(kept), "{flags:?}");
            }
            // No bound becomes smaller than what the volume holds.
            let too_much = usize::try_from(small.max_bytes).unwrap() + 1;
            fs::write(target.join("large"), vec![0; too_much]).unwrap();
            small.refit(&target).unwrap();
            assert_eq!(bounds(), (large.max_bytes, small.max_inodes));
            assert_eq!(fs::read(target.join("large")).unwrap().len(), too_much);
            assert_eq!(fs::read(target.join("kept")).unwrap(), b"x");
        });
    }

    /// The driver's mount and that on the node are two of one file system, in its container.
    #[test]
    fn what_somebody_makes_read_only_is_writable_when_he_makes_it_so() {
        const STEPS: u32 = 5;
        const KINDS: u32 = 5;
        alone(Own::Mounts, || {
            let (root, target) = target();
            let on_node = root.path().join("on-node");
            fs::create_dir(&on_node).unwrap();
            let (small, large) = (Tmpfs::bounded_by(1 << 16), Tmpfs::bounded_by(1 << 24));
            small.mount(&target).unwrap();
            bind(&target, &on_node);
            let kept = FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_NOEXEC;
            let becomes = |flags: MsFlags| {
                let none = None::<&str>;
                let flags = flags
                    | MsFlags::MS_REMOUNT
                    | MsFlags::MS_NOSUID
                    | MsFlags::MS_NODEV
                    | MsFlags::MS_NOEXEC;
                mount(none, &on_node, none, flags, none).unwrap();
            };
            for history in 0..KINDS.pow(STEPS) {
                for step in 0..STEPS {
                    match history / KINDS.pow(step) % KINDS {
                        0 => becomes(MsFlags::MS_RDONLY),
                        1 => becomes(MsFlags::empty()),
                        2 => drop(small.refit(&target).unwrap()),
                        3 => drop(large.refit(&target).unwrap()),
                        // The driver's container starts: it gets the mounts as they are on the node.
                        _ => {
                            umount(&target).unwrap();
                            bind(&on_node, &target);
                        }
                    }
                }
                becomes(MsFlags::empty());
                for tmpfs in [&small, &large] {
                    tmpfs.refit(&target).unwrap();
                    let is = statvfs(&target).unwrap();
                    assert_eq!(is.blocks() * is.fragment_size(), tmpfs.max_bytes);
                    assert!(is.flags().contains(kept), "{history}: {is:?}");
                }
                let written = fs::write(target.join("file"), history.to_string());
                assert!(written.is_ok(), "{history}: {written:?}");
            }
        });
    }

    #[test]
    fn only_volumes_are_given_bounds() {
        alone(Own::Mounts, || {
            let (root, target) = target();
            let tmpfs = Tmpfs::bounded_by(1 << 16);
            assert!(tmpfs.refit(&target).is_err(), "nothing is mounted");
            // A driver that mounts without options, as the one written in Go, made it.
            mount(
                Some("tmpfs"),
                &target,
                Some("tmpfs"),
                MsFlags::empty(),
                None::<&str>,
            )
            .unwrap();
            tmpfs.refit(&target).unwrap();
            assert_eq!(statvfs(&target).unwrap().files(), tmpfs.max_inodes);
            assert!(matches!(detach(&target).unwrap(), Detached::Foreign));
            // Another program made it.
            let other = root.path().join("run");
            fs::create_dir(&other).unwrap();
            mount(
                Some("tmpfs"),
                &other,
                Some("tmpfs"),
                MsFlags::empty(),
                Some("size=1M"),
            )
            .unwrap();
            bind(&other, &target);
            assert_eq!(state(&target).unwrap(), TargetState::Mounted);
            let error = tmpfs.refit(&target).unwrap_err().to_string();
            assert!(error.contains("not a volume of this driver"), "{error}");
            let is = statvfs(&other).unwrap();
            assert_eq!(is.blocks() * is.fragment_size(), 1 << 20);
        });
    }

    #[test]
    fn a_mount_that_nobody_else_sees_is_told() {
        alone(Own::Mounts, || {
            let (root, target) = target();
            let parent = target.parent().unwrap();
            let pods = root.path().join("pods");
            bind(&pods, &pods);
            for (flags, unseen) in [
                (MsFlags::MS_PRIVATE, Some(pods.clone())),
                (MsFlags::MS_SHARED, None),
                (MsFlags::MS_SLAVE, Some(pods.clone())),
                (MsFlags::MS_UNBINDABLE, Some(pods.clone())),
                (MsFlags::MS_SHARED, None),
            ] {
                mount(None::<&str>, &pods, None::<&str>, flags, None::<&str>).unwrap();
                let tmpfs = Tmpfs::bounded_by(1).in_a_pod(true);
                assert_eq!(tmpfs.unseen(parent).unwrap(), unseen, "{flags:?}");
                assert_eq!(Tmpfs::bounded_by(1).unseen(parent).unwrap(), None);
            }
            let tmpfs = Tmpfs::bounded_by(1).in_a_pod(true);
            let gone = tmpfs.unseen(&parent.join("gone")).unwrap_err();
            assert_eq!(gone.kind(), io::ErrorKind::NotFound);
        });
    }
}
