//! A tmpfs on, a tmpfs off, and whether one is there.
//!
//! Only the target path that kubelet names is touched, and never through a link. What is mounted
//! there and is not the driver's own is taken off and not changed.

#[cfg(test)]
pub(crate) mod alone;
mod table;

use std::{
    collections::HashMap,
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        stat::{Mode, SFlag, fstat},
        statfs::{TMPFS_MAGIC, fstatfs},
        statvfs::{FsFlags, Statvfs, fstatvfs},
    },
};
use table::Entry;

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
    let Some(here) = Here::look(target)? else {
        return Ok(State::Absent);
    };
    let is_directory = SFlag::from_bits_truncate(fstat(&here.file)?.st_mode & SFlag::S_IFMT.bits())
        == SFlag::S_IFDIR;
    match (here.is_mounted, is_directory) {
        (false, true) => Ok(State::Directory),
        (false, false) => Ok(State::NotADirectory),
        (true, true) if fstatfs(&here.file)?.filesystem_type() == TMPFS_MAGIC => Ok(State::Mounted),
        (true, _) => Err(io::Error::other(
            "a file system other than tmpfs is mounted there",
        )),
    }
}

/// What a target path leads to, opened without being used: a file system that does not answer
/// holds nobody up.
struct Here {
    file: OwnedFd,
    mount: u64,
    /// Whether something is mounted at the target, a bind mount of the same file system included.
    is_mounted: bool,
}

impl Here {
    /// None: there is nothing.
    fn look(target: &Path) -> io::Result<Option<Self>> {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let (parent, name) = match (target.parent(), target.file_name()) {
            (Some(parent), Some(name)) => (parent, name),
            _ => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
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
}

/// A directory of a file system.
///
/// The table of mounts says more, but to read it takes the kernel as long as there are mounts on
/// the node: milliseconds for some hundreds. So it is read where one is seen for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    /// What the kernel drew at random when it made the file system (Linux 5.13 and later), since
    /// it gives the number of a device to another as soon as it is free. Nought: it draws none.
    drawn: u64,
}

impl Here {
    /// The line of this mount in the table of mounts.
    fn entry(&self) -> io::Result<Entry> {
        table::of(self.mount)?.ok_or_else(|| io::Error::other("the mount has gone meanwhile"))
    }

    fn identity(&self) -> io::Result<Identity> {
        let is = fstat(&self.file)?;
        Ok(Identity {
            device: is.st_dev,
            inode: is.st_ino,
            drawn: fstatvfs(&self.file)?.filesystem_id(),
        })
    }
}

/// The volume at a target, held from before a provider is asked until what came of it is recorded.
///
/// A provider, or another program, may meanwhile mount something over the target or take the
/// volume off. While this exists the kernel gives the number of the volume's file system to no
/// other.
#[derive(Debug)]
pub struct Held {
    target: PathBuf,
    identity: Identity,
    /// Opened without being used.
    file: OwnedFd,
}

impl Held {
    /// Holds what is mounted at a target. `known` is what was found to be a volume there before,
    /// and is not examined again. Where something else is there since, an earlier driver is not
    /// who mounted it.
    ///
    /// # Errors
    /// When nothing is mounted there, or something that is neither this driver's nor an earlier
    /// driver's volume.
    fn at(target: &Path, known: Option<Identity>) -> io::Result<Self> {
        Self::look(target, known)?.map_err(|instead| match instead {
            None => io::Error::other("nothing is mounted there any more"),
            Some(entry) => io::Error::other(format!(
                "what is mounted there is not a volume of this driver but {} {:?}; nothing is written into it: unmount it",
                entry.kind, entry.source
            )),
        })
    }

    /// Returns the volume at a target, or what is mounted there in its place.
    fn look(target: &Path, known: Option<Identity>) -> io::Result<Result<Self, Option<Entry>>> {
        let here = match Here::look(target)? {
            Some(here) if here.is_mounted => here,
            _ => return Ok(Err(None)),
        };
        let identity = here.identity()?;
        if identity.drawn == 0 || known != Some(identity) {
            let entry = here.entry()?;
            let may_be_earlier = known.is_none() || identity.drawn == 0;
            let is_volume = entry.is_own(target)
                || may_be_earlier && entry.is_of_an_earlier_driver(target, &table::all()?);
            if !is_volume {
                return Ok(Err(Some(entry)));
            }
        }
        Ok(Ok(Self {
            target: target.to_owned(),
            identity,
            file: here.file,
        }))
    }

    /// Opens the volume's root, if it is still what is mounted at the target. What is opened stays
    /// the volume, whatever is mounted later.
    ///
    /// # Errors
    /// As [`check`](Self::check), and what the system says.
    pub fn open(&self) -> io::Result<OwnedFd> {
        self.found()?.map_err(|instead| {
            let target = self.target.display();
            let (happened, help) = match instead {
                Instead::Over => (
                    "something was mounted over the volume at",
                    "unmount it or replace the pod",
                ),
                Instead::Other => (
                    "something else was mounted in the place of the volume at",
                    "unmount it or replace the pod",
                ),
                Instead::Nothing => (
                    "the volume was taken off",
                    "the next attempt mounts it again",
                ),
            };
            io::Error::other(format!(
                "{happened} {target} while the provider was asked, and nothing is written there; {help}. Is another program, or the provider itself, mounting or unmounting below kubelet's pods directory?"
            ))
        })
    }

    /// Opens the volume's root. None if the volume is not at the target any more.
    ///
    /// # Errors
    /// What the system says.
    pub fn open_if_there(&self) -> io::Result<Option<OwnedFd>> {
        Ok(self.found()?.ok())
    }

    /// Makes sure that the volume is still what is mounted at the target.
    ///
    /// # Errors
    /// Says that something was mounted over it or that it was taken off, and what to do.
    pub fn check(&self) -> io::Result<()> {
        self.open().map(drop)
    }

    /// Returns the volume's root, or what is at the target in its place.
    fn found(&self) -> io::Result<Result<OwnedFd, Instead>> {
        let here = match Here::look(&self.target)? {
            Some(here) if here.is_mounted => here,
            _ => return Ok(Err(Instead::Nothing)),
        };
        if here.identity()? != self.identity {
            let is_below = table::all()?
                .iter()
                .any(|entry| entry.point == self.target && entry.is_whole(self.identity.device));
            return Ok(Err(match is_below {
                true => Instead::Over,
                false => Instead::Other,
            }));
        }
        // Not by the path, at which something else may be by now.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Ok(openat(&here.file, ".", flags, Mode::empty())?))
    }
}

/// What is at a target in the place of its volume.
enum Instead {
    Nothing,
    /// Something that covers the volume.
    Over,
    /// Something else, and the volume is not there any more.
    Other,
}

/// What was mounted at a target.
#[derive(Debug)]
pub enum Detached {
    /// Nothing is.
    Nothing,
    /// The driver's own tmpfs, which is still open and lies nowhere any more.
    Own(OwnedFd),
    /// Something else. What it holds is not the driver's.
    Foreign,
}

/// Takes the topmost mount off a target, whatever it is, with all that is mounted below.
///
/// It is detached: a process that still sits in it cannot keep the pod from going away. Its memory
/// goes when that process does.
///
/// # Errors
/// What the system says.
pub fn detach(target: &Path) -> io::Result<Detached> {
    let here = match Here::look(target)? {
        Some(here) if here.is_mounted => here,
        _ => return Ok(Detached::Nothing),
    };
    let own = match here.entry()?.is_own(target) {
        true => Detached::Own(openat(
            &here.file,
            ".",
            OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?),
        false => Detached::Foreign,
    };
    umount2(target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)?;
    Ok(own)
}

/// Takes off all that is mounted below a target on which nothing is mounted.
///
/// # Errors
/// What the system says.
pub fn detach_below(target: &Path) -> io::Result<()> {
    // What is mounted below has a name in it.
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
        match umount2(
            &entry.point,
            MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH,
        ) {
            // It went with the one that it lay upon.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// What a tmpfs holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InUse {
    /// The pages of its files, in bytes.
    pub bytes: u64,
    /// Its files, directories and links.
    pub objects: u64,
}

/// Returns what the tmpfs at a target holds; none where none is mounted.
///
/// # Errors
/// When the target cannot be examined.
pub fn in_use(target: &Path) -> io::Result<Option<InUse>> {
    let totals = match Here::look(target)? {
        Some(here) if here.is_mounted => fstatfs(&here.file)?,
        _ => return Ok(None),
    };
    if totals.filesystem_type() != TMPFS_MAGIC {
        return Ok(None);
    }
    let block = u64::try_from(totals.block_size()).unwrap_or_default();
    let blocks = totals.blocks().saturating_sub(totals.blocks_free());
    Ok(Some(InUse {
        bytes: blocks * block,
        objects: totals.files().saturating_sub(totals.files_free()),
    }))
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
    /// Whether kubelet sees these mounts only if they spread out of the driver's container.
    in_a_pod: bool,
    /// The mount in which targets were last seen to be shared, and when.
    shared: Mutex<Option<(u64, Instant)>>,
    /// What was found to be a volume at its target.
    known: Mutex<HashMap<PathBuf, Identity>>,
}

/// How long a mount in which targets lie counts as shared before the kernel is asked again.
const SHARED_FOR: Duration = Duration::from_secs(30);

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
            in_a_pod: false,
            shared: Mutex::default(),
            known: Mutex::default(),
        }
    }

    /// Says whether the driver runs in a container of a pod, so that kubelet and other pods see
    /// its mounts only if they spread.
    #[must_use]
    pub fn in_a_pod(mut self, in_a_pod: bool) -> Self {
        self.in_a_pod = in_a_pod;
        self
    }

    /// Returns the mount point that holds a directory, if what is mounted in the directory would
    /// not be seen outside the driver's container.
    ///
    /// # Errors
    /// What the system says; NotFound if the directory is not there.
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

    fn known(&self) -> MutexGuard<'_, HashMap<PathBuf, Identity>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the volume at a target, which is gone.
    pub fn forget(&self, target: &Path) {
        self.known().remove(target);
    }

    /// Mounts an empty tmpfs on an existing directory, and returns it. Root mode 0755; no
    /// set-user-ID, no devices, no execution, and no swap where the kernel can promise that.
    ///
    /// # Errors
    /// What mount(2) says, and when something else lies there by then.
    pub fn mount(&self, target: &Path) -> io::Result<Held> {
        self.attach(target)?;
        let here = Here::look(target)?.filter(|here| here.is_mounted);
        // A tmpfs of these bounds that holds nothing is what was just mounted.
        let identity = match &here {
            Some(here) if self.is_new(&here.file)? => Some(here.identity()?),
            _ => None,
        };
        let held = Held::at(target, identity)?;
        self.known().insert(target.to_owned(), held.identity);
        Ok(held)
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

    /// Makes sure that a tmpfs at a target is a volume's, and gives it the bounds of today, which
    /// are others than those that it was mounted with if the flags have changed since. A bound is
    /// not made smaller than what is there. Returns the volume.
    ///
    /// # Errors
    /// When nothing is mounted there, or something that is neither this driver's nor an earlier
    /// driver's volume.
    pub fn refit(&self, target: &Path) -> io::Result<Held> {
        let known = self.known().get(target).copied();
        let held = Held::at(target, known)?;
        self.known().insert(target.to_owned(), held.identity);
        let is = fstatvfs(&held.file)?;
        let options = self.other_bounds(&is).join(",");
        if options.is_empty() {
            return Ok(held);
        }
        let flags = MsFlags::MS_REMOUNT | kept(is.flags());
        match mount(
            None::<&str>,
            target,
            None::<&str>,
            flags,
            Some(options.as_str()),
        ) {
            Ok(()) => {
                tracing::info!(target_path = %target.display(), options, "the volume was resized to what the driver's flags allow");
            }
            // It may still be large enough.
            Err(error) => {
                tracing::warn!(target_path = %target.display(), options, %error, "the volume could not be resized and keeps its size");
            }
        }
        Ok(held)
    }

    /// Returns the volume at a target, unchanged. None where nothing is mounted, or what is no
    /// volume of this driver or an earlier one: a volume that something covers has no readers.
    ///
    /// # Errors
    /// What the system says.
    pub fn volume(&self, target: &Path) -> io::Result<Option<Held>> {
        let known = self.known().get(target).copied();
        match Held::look(target, known)? {
            Ok(held) => {
                self.known().insert(target.to_owned(), held.identity);
                Ok(Some(held))
            }
            Err(None) => Ok(None),
            Err(Some(instead)) => {
                tracing::debug!(target_path = %target.display(), kind = instead.kind, source = instead.source, "what is mounted there is no volume of this driver, and is not read");
                Ok(None)
            }
        }
    }

    /// Whether a volume has at least the bounds of today.
    ///
    /// # Errors
    /// What the system says.
    pub fn fits(&self, target: &Path) -> io::Result<bool> {
        let is = nix::sys::statvfs::statvfs(target)?;
        let large = |has: u64, wanted: u64| has == 0 || has >= wanted;
        Ok(large(is.blocks(), self.blocks(&is)) && large(is.files(), self.max_inodes))
    }

    /// The mount options that give a file system today's bounds, as far as they are others and
    /// what it holds is within them. Nought is no bound, and the kernel lets none be set later.
    fn other_bounds(&self, is: &Statvfs) -> Vec<String> {
        let other = |has: u64, free: u64, wanted: u64| {
            has != 0 && has != wanted && has.saturating_sub(free) <= wanted
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

/// The flags that a mount keeps when it is mounted again.
fn kept(flags: FsFlags) -> MsFlags {
    let pairs = [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
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
    use alone::{Own, alone};
    use nix::sys::statvfs::statvfs;

    /// A target below a fresh kubelet root, and that root.
    fn target() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let target = root
            .path()
            .join("pods/u-1/volumes/kubernetes.io~csi/v/mount");
        fs::create_dir_all(&target).unwrap();
        (root, target)
    }

    fn bind(from: &Path, to: &Path) {
        mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    }

    #[test]
    fn bounds_follow_the_flags() {
        if !alone("mount::tests::bounds_follow_the_flags", Own::Mounts) {
            return;
        }
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
        // What is there is never too much.
        let too_much = usize::try_from(small.max_bytes).unwrap() + 1;
        fs::write(target.join("large"), vec![0; too_much]).unwrap();
        small.refit(&target).unwrap();
        assert_eq!(bounds(), (large.max_bytes, small.max_inodes));
        assert_eq!(fs::read(target.join("large")).unwrap().len(), too_much);
        assert_eq!(fs::read(target.join("kept")).unwrap(), b"x");
    }

    #[test]
    fn only_volumes_are_given_bounds() {
        if !alone("mount::tests::only_volumes_are_given_bounds", Own::Mounts) {
            return;
        }
        let (root, target) = target();
        let tmpfs = Tmpfs::bounded_by(1 << 16);
        assert!(tmpfs.refit(&target).is_err(), "nothing is mounted");
        // Of a driver that mounts without options, as the one written in Go.
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
        // Of somebody else.
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
        assert_eq!(state(&target).unwrap(), State::Mounted);
        let error = tmpfs.refit(&target).unwrap_err().to_string();
        assert!(error.contains("not a volume of this driver"), "{error}");
        let is = statvfs(&other).unwrap();
        assert_eq!(is.blocks() * is.fragment_size(), 1 << 20);
    }

    /// Every row of up to three changes.
    #[test]
    fn a_held_volume_is_opened_only_while_it_is_what_lies_at_the_target() {
        const NAME: &str =
            "mount::tests::a_held_volume_is_opened_only_while_it_is_what_lies_at_the_target";
        if !alone(NAME, Own::Mounts) {
            return;
        }
        let kinds = ["bind", "tmpfs", "own again", "off"];
        for number in 0..kinds.len().pow(3) {
            let row = [number % 4, number / 4 % 4, number / 16].map(|kind| kinds[kind]);
            let (root, target) = target();
            let volumes = Tmpfs::bounded_by(1);
            volumes.mount(&target).unwrap();
            fs::write(target.join("mark"), "x").unwrap();
            let held = Held::at(&target, None).unwrap();
            // What lies at the target, the topmost last.
            let mut stack = vec!["volume"];
            for kind in row {
                match kind {
                    "bind" => bind(root.path(), &target),
                    "tmpfs" => {
                        let tmpfs = Some("tmpfs");
                        mount(tmpfs, &target, tmpfs, MsFlags::empty(), None::<&str>).unwrap();
                    }
                    "own again" => drop(Tmpfs::bounded_by(1).mount(&target).unwrap()),
                    _ => {
                        let off = umount2(&target, MntFlags::MNT_DETACH);
                        assert_eq!(off.is_ok(), stack.pop().is_some(), "{row:?}");
                        continue;
                    }
                }
                stack.push(kind);
            }
            // What is remembered of a volume says nothing of what lies there now.
            let is_own = matches!(stack.last(), Some(&("volume" | "own again")));
            assert_eq!(volumes.refit(&target).is_ok(), is_own, "{row:?}");
            let is_there = stack.last() == Some(&"volume");
            assert_eq!(held.check().is_ok(), is_there, "{row:?}");
            let open = held.open_if_there().unwrap();
            assert_eq!(open.is_some(), is_there, "{row:?}");
            if let Some(open) = open {
                let mark = openat(&open, "mark", OFlag::O_PATH, Mode::empty());
                assert!(mark.is_ok(), "{row:?}");
            }
            while umount2(&target, MntFlags::MNT_DETACH).is_ok() {}
        }
    }

    #[test]
    fn a_mount_that_nobody_else_sees_is_told() {
        if !alone(
            "mount::tests::a_mount_that_nobody_else_sees_is_told",
            Own::Mounts,
        ) {
            return;
        }
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
    }

    #[test]
    fn states_of_a_target() {
        if !alone("mount::tests::states_of_a_target", Own::Mounts) {
            return;
        }
        let (root, target) = target();
        assert_eq!(state(&target).unwrap(), State::Directory);
        // A bind mount of the same file system has the same device.
        bind(root.path(), &target);
        assert!(
            state(&target)
                .unwrap_err()
                .to_string()
                .contains("other than tmpfs")
        );
        assert!(matches!(detach(&target).unwrap(), Detached::Foreign));
        assert_eq!(state(&target).unwrap(), State::Directory);
        assert!(matches!(detach(&target).unwrap(), Detached::Nothing));
        Tmpfs::bounded_by(1).mount(&target).unwrap();
        assert_eq!(state(&target).unwrap(), State::Mounted);
        assert!(matches!(detach(&target).unwrap(), Detached::Own(_)));
        fs::remove_dir(&target).unwrap();
        assert_eq!(state(&target).unwrap(), State::Absent);
        std::os::unix::fs::symlink("..", &target).unwrap();
        assert_eq!(state(&target).unwrap(), State::NotADirectory);
        assert_eq!(
            state(&root.path().join("no/such/path")).unwrap(),
            State::Absent
        );
    }
}
