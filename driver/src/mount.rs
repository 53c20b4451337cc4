//! Mounts a tmpfs at a target, takes it off, and tells whether one is there.
//!
//! Only the target path that kubelet names is touched, and never through a link. A mount that is
//! not the driver's own is taken off without a change to its files.

#[cfg(test)]
pub(crate) mod alone;
mod table;
mod tmpfs;
mod volume;

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat},
    mount::{MntFlags, umount2},
    sys::{
        stat::{Mode, SFlag, fstat},
        statfs::fstatfs,
    },
};

use table::MountEntry;
#[cfg(any(test, fuzzing))]
pub(crate) use table::fuzz as fuzz_table;
pub(crate) use table::unescaped_path;
pub use tmpfs::Tmpfs;
pub use volume::{FileSystemId, VolumeMount};

/// The kind of thing that is at a target path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetState {
    /// Nothing.
    Absent,
    /// A directory on which nothing is mounted.
    Directory,
    /// A tmpfs.
    Mounted,
    /// A file or a link, which neither kubelet nor the driver makes.
    NotADirectory,
}

/// The root of a tmpfs that is mounted at a target.
#[derive(Debug)]
pub struct Root {
    /// The directory. It stays the same, whatever is mounted at the target later.
    pub directory: OwnedFd,
    /// The identity of the file system, on kernels that tell it from that of all others.
    pub id: Option<FileSystemId>,
}

/// Examines a target path.
///
/// # Errors
/// When the path cannot be examined, or has something other than a tmpfs mounted on it.
pub fn state(target: &Path) -> io::Result<TargetState> {
    examine(target).map(|(state, _)| state)
}

/// Examines a target path, and opens the root of the tmpfs that is mounted there, if one is.
///
/// # Errors
/// The same as for [`state`].
pub fn examine(target: &Path) -> io::Result<(TargetState, Option<Root>)> {
    let Some(here) = Here::open(target)? else {
        return Ok((TargetState::Absent, None));
    };
    // Only a tmpfs is asked anything: another file system may never answer.
    let is_usable = !here.is_mounted || here.is_tmpfs()?;
    match (here.is_mounted, is_usable && here.is_directory()?) {
        (false, true) => Ok((TargetState::Directory, None)),
        (false, false) => Ok((TargetState::NotADirectory, None)),
        (true, true) => {
            let root = Root {
                directory: here.open_root()?,
                id: Some(FileSystemId::of(&here)?).filter(FileSystemId::is_unique),
            };
            Ok((TargetState::Mounted, Some(root)))
        }
        (true, false) => Err(io::Error::other(
            "a file system other than tmpfs is mounted there; unmount it or replace the pod",
        )),
    }
}

/// The file, directory or mount at a target path, opened without being used: a file system that does
/// not answer blocks no call.
struct Here {
    file: OwnedFd,
    mount: u64,
    /// Whether something is mounted at the target, a bind mount of the same file system included.
    is_mounted: bool,
}

impl Here {
    /// Opens what is at a target path, if anything is.
    fn open(target: &Path) -> io::Result<Option<Self>> {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let parent = match open(parent, flags | OFlag::O_DIRECTORY, Mode::empty()) {
            Err(Errno::ENOENT) => return Ok(None),
            parent => parent?,
        };
        let file = match openat(&parent, name, flags | OFlag::O_NOFOLLOW, Mode::empty()) {
            Err(Errno::ENOENT) => return Ok(None),
            file => file?,
        };
        let mount = table::id_of(file.as_fd())?;
        Ok(Some(Self {
            is_mounted: mount != table::id_of(parent.as_fd())?,
            file,
            mount,
        }))
    }

    /// Opens what is mounted at a target path, if anything is.
    fn open_mount(target: &Path) -> io::Result<Option<Self>> {
        Ok(Self::open(target)?.filter(|here| here.is_mounted))
    }

    /// Returns the line of this mount in the table of mounts.
    fn entry(&self) -> io::Result<MountEntry> {
        table::of(self.mount)?.ok_or_else(table::gone)
    }

    /// Returns whether the mount is of a tmpfs, without asking its file system.
    fn is_tmpfs(&self) -> io::Result<bool> {
        table::is_tmpfs(self.file.as_fd())
    }

    fn is_directory(&self) -> io::Result<bool> {
        let mode = fstat(&self.file)?.st_mode & SFlag::S_IFMT.bits();
        Ok(SFlag::from_bits_truncate(mode) == SFlag::S_IFDIR)
    }

    /// Opens the root of the mount for use. It stays the same mount, whatever is mounted at the path
    /// later.
    fn open_root(&self) -> io::Result<OwnedFd> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(openat(&self.file, ".", flags, Mode::empty())?)
    }
}

/// The mount that was taken off a target.
#[derive(Debug)]
pub enum Detached {
    /// Nothing was mounted.
    Nothing,
    /// The driver's own tmpfs, which is still open and mounted nowhere any more.
    Own(OwnedFd),
    /// Something else, whose files are not the driver's.
    Foreign,
}

/// Takes the topmost mount off a target, whatever it is, with all that is mounted below.
///
/// The mount is detached, so that a process that still uses it cannot keep the pod from going away.
/// Its memory is freed when that process ends.
///
/// # Errors
/// The system's error.
pub fn detach(target: &Path) -> io::Result<Detached> {
    let Some(here) = Here::open_mount(target)? else {
        return Ok(Detached::Nothing);
    };
    let detached = if here.entry()?.is_own(target) {
        Detached::Own(here.open_root()?)
    } else {
        Detached::Foreign
    };
    table::forget_tmpfs(here.file.as_fd());
    umount2(target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)?;
    Ok(detached)
}

/// Takes off all that is mounted below a target on which nothing is mounted.
///
/// # Errors
/// The system's error.
pub fn detach_below(target: &Path) -> io::Result<()> {
    // A directory without entries has no mount points.
    let is_empty = match fs::read_dir(target) {
        Ok(mut names) => names.next().is_none(),
        Err(error) => matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
        ),
    };
    if is_empty {
        return Ok(());
    }
    for entry in table::all()?.into_iter().rev() {
        if entry.point == target || !entry.point.starts_with(target) {
            continue;
        }
        let flags = MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH;
        match umount2(&entry.point, flags) {
            // It has gone with the mount that it was mounted upon.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// The use of a tmpfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InUse {
    /// The pages of its files, in bytes.
    pub bytes: u64,
    /// The number of its files, directories and links.
    pub inodes: u64,
}

/// Returns the use of the tmpfs at a target, if one is mounted.
///
/// # Errors
/// When the target cannot be examined.
pub fn in_use(target: &Path) -> io::Result<Option<InUse>> {
    let Some(here) = Here::open_mount(target)? else {
        return Ok(None);
    };
    if !here.is_tmpfs()? {
        return Ok(None);
    }
    let totals = fstatfs(&here.file)?;
    let block = u64::try_from(totals.block_size()).unwrap_or_default();
    let blocks = totals.blocks().saturating_sub(totals.blocks_free());
    Ok(Some(InUse {
        bytes: blocks * block,
        inodes: totals.files().saturating_sub(totals.files_free()),
    }))
}

/// Creates the target directory. kubelet creates its parent and leaves this one to the driver, as the
/// CSI specification says of `NodePublishVolumeRequest.target_path`.
///
/// # Errors
/// When the parent is missing or the directory cannot be created.
pub fn make_target(target: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o750).create(target)
}

#[cfg(test)]
mod tests {
    use super::{
        alone::{Own, alone},
        *,
    };
    use nix::mount::{MsFlags, mount};
    use std::path::PathBuf;

    /// Returns a fresh kubelet root, and a target below it.
    pub(super) fn target() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let below = "pods/u-1/volumes/kubernetes.io~csi/v/mount";
        let target = root.path().join(below);
        fs::create_dir_all(&target).unwrap();
        (root, target)
    }

    pub(super) fn bind(from: &Path, to: &Path) {
        mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    }

    /// Mounts a file system whose server never answers. `None` where that is not possible.
    fn mount_silent(target: &Path) -> Option<fs::File> {
        let server = fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .ok()?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            std::os::fd::AsRawFd::as_raw_fd(&server)
        );
        let (flags, options) = (MsFlags::empty(), Some(options.as_str()));
        let mounted = mount(Some("silent"), target, Some("fuse"), flags, options);
        mounted.is_ok().then_some(server)
    }

    #[test]
    fn a_file_system_that_never_answers_is_not_asked() {
        alone(Own::Mounts, || {
            let (_root, target) = target();
            let tmpfs = Tmpfs::bounded_by(1);
            let volume = tmpfs.mount(&target).unwrap();
            // What is known of the volume says nothing about what covers it.
            assert_eq!(state(&target).unwrap(), TargetState::Mounted);
            let Some(server) = mount_silent(&target) else {
                println!("skipped: no FUSE can be mounted here");
                return;
            };
            let (out, done) = std::sync::mpsc::channel();
            let asked = target.clone();
            // It would wait in the kernel until the server goes.
            std::thread::spawn(move || {
                let opened = volume.open_if_there().map(|root| root.is_some());
                let refitted = tmpfs.refit(&asked).map(drop);
                let found_there = tmpfs.volume(&asked).map(|volume| volume.is_some());
                assert!(!opened.unwrap() && !found_there.unwrap());
                assert!(tmpfs.fits(&asked).is_err());
                let found = (state(&asked), in_use(&asked), refitted);
                let _waited_too_long = out.send((found, detach(&asked)));
            });
            let found = done.recv_timeout(std::time::Duration::from_secs(10));
            drop(server);
            let ((state, in_use, refitted), detached) = found.expect("it was asked");
            let error = refitted.unwrap_err().to_string();
            assert!(error.contains("not a volume of this driver"), "{error}");
            let error = state.unwrap_err().to_string();
            assert!(error.contains("other than tmpfs"), "{error}");
            assert_eq!(in_use.unwrap(), None);
            assert!(matches!(detached.unwrap(), Detached::Foreign));
        });
    }

    /// The kernel takes a moment for each mount of the node whenever somebody reads the table.
    #[test]
    fn the_table_is_read_for_no_volume_that_is_known() {
        alone(Own::Mounts, || {
            let (_root, target) = target();
            let tmpfs = Tmpfs::bounded_by(1);
            assert_eq!(state(&target).unwrap(), TargetState::Directory);
            let volume = tmpfs.mount(&target).unwrap();
            volume.check().unwrap();
            for _ in 0..3 {
                assert_eq!(state(&target).unwrap(), TargetState::Mounted);
                assert!(in_use(&target).unwrap().is_some());
                tmpfs.refit(&target).unwrap().check().unwrap();
                assert!(tmpfs.volume(&target).unwrap().is_some());
                assert!(tmpfs.fits(&target).unwrap());
            }
            assert_eq!(table::READS.get(), 0);
        });
    }

    #[test]
    fn states_of_a_target() {
        alone(Own::Mounts, || {
            let (root, target) = target();
            assert_eq!(state(&target).unwrap(), TargetState::Directory);
            // A bind mount of the same file system has the same device.
            bind(root.path(), &target);
            assert!(
                state(&target)
                    .unwrap_err()
                    .to_string()
                    .contains("other than tmpfs")
            );
            assert!(matches!(detach(&target).unwrap(), Detached::Foreign));
            assert_eq!(state(&target).unwrap(), TargetState::Directory);
            assert!(matches!(detach(&target).unwrap(), Detached::Nothing));
            Tmpfs::bounded_by(1).mount(&target).unwrap();
            assert_eq!(state(&target).unwrap(), TargetState::Mounted);
            assert!(matches!(detach(&target).unwrap(), Detached::Own(_)));
            fs::remove_dir(&target).unwrap();
            assert_eq!(state(&target).unwrap(), TargetState::Absent);
            std::os::unix::fs::symlink("..", &target).unwrap();
            assert_eq!(state(&target).unwrap(), TargetState::NotADirectory);
            assert_eq!(
                state(&root.path().join("no/such/path")).unwrap(),
                TargetState::Absent
            );
        });
    }
}
