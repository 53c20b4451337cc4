//! Reads the kernel's table of mounts, `/proc/self/mountinfo` (proc_pid_mountinfo(5)).

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    io::{self, BufRead as _, BufReader},
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd as _, BorrowedFd},
        unix::ffi::OsStringExt as _,
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::sys::stat::makedev;
use sha2::{Digest as _, Sha256};

use crate::hex;

/// One mount, as this process sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MountEntry {
    pub(super) id: u64,
    /// The number of the device, which all mounts of one file system share.
    device: u64,
    /// The directory of the file system that is mounted: `/`, except for bind mounts of another.
    root: String,
    /// The mount point.
    pub(super) point: PathBuf,
    /// Whether mounts below it propagate to the other mounts of its peer group.
    pub(super) shared: bool,
    /// The type of the file system.
    pub(super) kind: String,
    /// The name of the file system.
    pub(super) source: String,
    /// Whether the file system can be written to, whatever this mount of it allows.
    pub(super) is_writable: bool,
}

impl MountEntry {
    /// Returns whether [`Tmpfs::mount`](super::Tmpfs::mount) made this mount at a target, and it is
    /// not a bind mount.
    pub(super) fn is_own(&self, target: &Path) -> bool {
        self.kind == "tmpfs" && self.root == "/" && self.source == source_of(target)
    }

    /// Returns whether this is the whole file system of a device.
    pub(super) fn is_whole(&self, device: u64) -> bool {
        self.device == device && self.root == "/"
    }

    /// Returns whether this may be the tmpfs of a driver that did not name its mounts. It belongs to
    /// another program if the same tmpfs is mounted outside of the pod's directory, or if it covers a
    /// volume of this driver.
    pub(super) fn is_of_an_earlier_driver(&self, target: &Path, all: &[Self]) -> bool {
        let pod = target.ancestors().nth(4).and_then(Path::file_name);
        let in_pod = |entry: &Self| pod.is_some_and(|pod| entry.point.iter().any(|n| n == pod));
        self.kind == "tmpfs"
            && self.root == "/"
            && self.source == "tmpfs"
            && !all.iter().any(|e| e.device == self.device && !in_pod(e))
            && !all.iter().any(|e| e.point == target && e.is_own(target))
    }
}

/// Returns the name that the driver gives the file system at a target, to recognize it.
pub(super) fn source_of(target: &Path) -> String {
    let digest = Sha256::digest(target.as_os_str().as_encoded_bytes());
    format!("secrets-store-csi:{}", hex::digits(&digest[..8]))
}

#[cfg(test)]
thread_local! {
    /// How often this thread has read the table.
    pub(super) static READS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Returns all mounts, each after those that it is mounted upon.
pub(super) fn all() -> io::Result<Vec<MountEntry>> {
    let mut entries = Vec::new();
    each(|line| {
        // A line of another form is left out; a caller that needs its mount reports that.
        entries.extend(parse(line));
        true
    })?;
    Ok(entries)
}

/// Returns the mount with an ID.
pub(super) fn of(id: u64) -> io::Result<Option<MountEntry>> {
    let prefix = format!("{id} ");
    let mut found = None;
    each(|line| {
        if line.starts_with(prefix.as_bytes()) {
            found = parse(line);
        }
        found.is_none()
    })?;
    Ok(found)
}

/// Passes the lines to `go_on` until it returns false.
fn each(mut go_on: impl FnMut(&[u8]) -> bool) -> io::Result<()> {
    #[cfg(test)]
    READS.set(READS.get() + 1);
    let mut table = BufReader::new(fs::File::open("/proc/self/mountinfo")?);
    let mut line = Vec::new();
    while table.read_until(b'\n', &mut line)? > 0 {
        if !go_on(line.strip_suffix(b"\n").unwrap_or(&line)) {
            break;
        }
        line.clear();
    }
    Ok(())
}

/// Returns the ID of the mount that an open file is on.
pub(super) fn id_of(file: BorrowedFd<'_>) -> io::Result<u64> {
    match id_of_statx(file) {
        Some(id) => Ok(id),
        None => id_of_proc(file),
    }
}

/// Asks statx(2), which tells it since Linux 5.8, for a fraction of the time that `/proc` takes.
fn id_of_statx(file: BorrowedFd<'_>) -> Option<u64> {
    let is = statx(file, libc::AT_STATX_DONT_SYNC, libc::STATX_MNT_ID)?;
    (is.stx_mask & libc::STATX_MNT_ID != 0).then_some(is.stx_mnt_id)
}

/// Returns the device and the inode of an open file as the kernel has them in memory, without asking a
/// file system that may not answer.
pub(super) fn cached_inode(file: BorrowedFd<'_>) -> Option<(u64, u64)> {
    let is = statx(file, libc::AT_STATX_DONT_SYNC, libc::STATX_INO)?;
    let device = makedev(is.stx_dev_major.into(), is.stx_dev_minor.into());
    Some((device, is.stx_ino))
}

/// The most mounts that are remembered to be of a tmpfs.
const REMEMBERED: usize = 4096;

/// The mounts that are known to be of a tmpfs, so that the table is read once for each.
static TMPFS: Mutex<BTreeSet<Identity>> = Mutex::new(BTreeSet::new());

/// What the kernel has in memory of the mount and the directory of an open file.
///
/// Its number of the mount is never used again on Linux 6.8 and later. Before, another mount may get
/// it, but only after this one was taken off, and [`forget_tmpfs`] knows of those that the driver takes
/// off itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Identity {
    mount: u64,
    device: u64,
    inode: u64,
}

impl Identity {
    fn of(file: BorrowedFd<'_>) -> Option<Self> {
        let numbers = libc::STATX_MNT_ID | libc::STATX_MNT_ID_UNIQUE;
        let wanted = numbers | libc::STATX_INO;
        let is = statx(file, libc::AT_STATX_DONT_SYNC, wanted)?;
        (is.stx_mask & numbers != 0).then(|| Self {
            mount: is.stx_mnt_id,
            device: makedev(is.stx_dev_major.into(), is.stx_dev_minor.into()),
            inode: is.stx_ino,
        })
    }
}

fn remembered() -> MutexGuard<'static, BTreeSet<Identity>> {
    TMPFS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns whether an open file is on a tmpfs, without asking its file system, which may not answer.
pub(super) fn is_tmpfs(file: BorrowedFd<'_>) -> io::Result<bool> {
    if Identity::of(file).is_some_and(|mount| remembered().contains(&mount)) {
        return Ok(true);
    }
    let mount = of(id_of(file)?)?.ok_or_else(gone)?;
    let is_tmpfs = mount.kind == "tmpfs";
    if is_tmpfs {
        remember_tmpfs(file);
    }
    Ok(is_tmpfs)
}

/// Remembers that an open file is on a tmpfs.
pub(super) fn remember_tmpfs(file: BorrowedFd<'_>) {
    let Some(mount) = Identity::of(file) else {
        return;
    };
    let mut remembered = remembered();
    if remembered.len() >= REMEMBERED {
        remembered.clear();
    }
    remembered.insert(mount);
}

/// Forgets a mount that is about to be taken off.
pub(super) fn forget_tmpfs(file: BorrowedFd<'_>) {
    if let Some(mount) = Identity::of(file) {
        remembered().remove(&mount);
    }
}

/// The number of times that a mount may go while it is examined.
const ATTEMPTS: usize = 10;

/// A mount that was found at a path is not in the table.
#[derive(Debug)]
struct Gone;

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the mount has gone meanwhile")
    }
}

impl std::error::Error for Gone {}

/// Returns the error for a mount that is not in the table.
pub(super) fn gone() -> io::Error {
    io::Error::other(Gone)
}

/// Examines what is mounted somewhere. If that is unmounted meanwhile, examines what is there then.
///
/// # Errors
/// Those of the examination.
pub(super) fn settled<T>(examine: impl Fn() -> io::Result<T>) -> io::Result<T> {
    for _ in 1..ATTEMPTS {
        match examine() {
            Err(error) if error.get_ref().is_some_and(|inner| inner.is::<Gone>()) => {}
            examined => return examined,
        }
    }
    examine()
}

#[allow(unsafe_code)]
fn statx(file: BorrowedFd<'_>, flags: libc::c_int, wanted: libc::c_uint) -> Option<libc::statx> {
    let mut is = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, and statx(2) writes one `statx`, which any bytes are.
    unsafe {
        let done = libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            wanted,
            is.as_mut_ptr(),
        );
        (done == 0).then(|| is.assume_init())
    }
}

fn id_of_proc(file: BorrowedFd<'_>) -> io::Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", file.as_raw_fd());
    let info = fs::read_to_string(&path)?;
    info.lines()
        .find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
        .ok_or_else(|| io::Error::other(format!("{path} names no mount")))
}

/// Parses a line: `36 35 98:0 /root /point rw,noatime shared:1 master:2 - ext4 /dev/sda1 rw`.
fn parse(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|b| *b == b' ');
    let mut text = || Some(String::from_utf8_lossy(fields.next()?).into_owned());
    let id = text()?.parse().ok()?;
    let _parent = text()?;
    let (device, root) = (text()?, text()?);
    let (major, minor) = device.split_once(':')?;
    let device = makedev(major.parse().ok()?, minor.parse().ok()?);
    let point = unescaped_path(fields.next()?);
    let _options = fields.next()?;
    let mut shared = false;
    loop {
        match fields.next()? {
            b"-" => break,
            field => shared |= field.starts_with(b"shared:"),
        }
    }
    let mut text = || Some(String::from_utf8_lossy(&unescaped(fields.next()?)).into_owned());
    Some(MountEntry {
        id,
        device,
        root,
        point,
        shared,
        kind: text()?,
        source: text().unwrap_or_default(),
        is_writable: text().is_some_and(|options| options.split(',').any(|option| option == "rw")),
    })
}

/// Returns the path in a field.
pub(crate) fn unescaped_path(field: &[u8]) -> PathBuf {
    OsString::from_vec(unescaped(field)).into()
}

/// Decodes space, tab, newline and backslash, which the kernel writes as three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, behind @ ..] = rest {
        let code = behind
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                out.push(byte);
                rest = &behind[3..];
            }
            None => {
                out.push(*first);
                rest = behind;
            }
        }
    }
    out
}

/// Reads bytes as a line of the table.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Some(entry) = parse(bytes) {
        let target = Path::new("/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/s/mount");
        entry.is_own(target);
        entry.is_of_an_earlier_driver(target, std::slice::from_ref(&entry));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn this_process_has_a_table() {
        let all = all().unwrap();
        let root = fs::File::open("/proc/self/mountinfo").unwrap();
        let id = id_of(std::os::fd::AsFd::as_fd(&root)).unwrap();
        let proc = all.iter().find(|entry| entry.id == id).unwrap();
        assert_eq!(proc.kind, "proc");
    }

    #[test]
    fn only_the_tmpfs_of_a_target_is_its_own() {
        let target = Path::new("/k/pods/u-1/volumes/kubernetes.io~csi/v/mount");
        let line = |point: &str, root: &str, kind: &str, source: &str| {
            let line = format!("1 2 0:7 {root} {point} rw - {kind} {source} rw");
            parse(line.as_bytes()).unwrap()
        };
        let (at, own) = (target.to_str().unwrap(), source_of(target));
        assert!(line(at, "/", "tmpfs", &own).is_own(target));
        assert!(line(at, "/", "tmpfs", &own).is_writable);
        assert!(!line(at, "/", "tmpfs", "tmpfs").is_own(target));
        assert!(!line(at, "/..data", "tmpfs", &own).is_own(target));
        assert!(!line(at, "/", "ext4", &own).is_own(target));
        let other = Path::new("/k/pods/u-2/volumes/kubernetes.io~csi/v/mount");
        assert!(!line(at, "/", "tmpfs", &own).is_own(other));

        let earlier = line(at, "/", "tmpfs", "tmpfs");
        let subpath = line("/k/pods/u-1/volume-subpaths/v/c/0", "/a", "tmpfs", "tmpfs");
        let run = line("/run", "/", "tmpfs", "tmpfs");
        assert!(earlier.is_of_an_earlier_driver(target, &[earlier.clone(), subpath]));
        assert!(!earlier.is_of_an_earlier_driver(target, &[earlier.clone(), run]));
        let covered = line(at, "/", "tmpfs", &own);
        assert!(!earlier.is_of_an_earlier_driver(target, &[covered, earlier.clone()]));
    }

    proptest! {
        #[test]
        fn any_mount_point_is_read(
            point in prop::collection::vec(1_u8.., 1..40),
            tags in prop::collection::vec(prop::sample::select(&["shared:7", "master:3", "propagate_from:2", "unbindable"][..]), 0..4)
        ) {
            let escaped: Vec<u8> = point
                .iter()
                .flat_map(|byte| match byte {
                    b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
                    byte => vec![*byte],
                })
                .collect();
            let tags = tags.iter().map(|tag| format!("{tag} ")).collect::<String>();
            let line = [
                b"36 35 98:0 / ".as_slice(),
                escaped.as_slice(),
                b" rw,noatime ",
                tags.as_bytes(),
                b"- tmpfs some\\040name rw",
            ]
            .concat();
            let entry = parse(&line).unwrap();
            prop_assert_eq!(entry.point, PathBuf::from(OsString::from_vec(point)));
            prop_assert_eq!(entry.shared, tags.contains("shared:7"));
            prop_assert_eq!((entry.id, entry.kind.as_str(), entry.source.as_str()), (36, "tmpfs", "some name"));
        }
    }

    #[test]
    fn a_mount_that_goes_is_examined_again_and_no_other_error_is() {
        let examined = std::cell::Cell::new(0);
        let goes = |times: usize| {
            examined.set(0);
            settled(|| {
                examined.set(examined.get() + 1);
                match examined.get() {
                    now if now <= times => Err(gone()),
                    now => Ok(now),
                }
            })
        };
        assert_eq!(goes(3).unwrap(), 4);
        assert_eq!(
            goes(usize::MAX).unwrap_err().to_string(),
            "the mount has gone meanwhile"
        );
        assert_eq!(examined.get(), ATTEMPTS);
        examined.set(0);
        let other = settled(|| {
            examined.set(examined.get() + 1);
            Err::<(), _>(io::Error::from(io::ErrorKind::NotFound))
        });
        assert_eq!(
            (other.unwrap_err().kind(), examined.get()),
            (io::ErrorKind::NotFound, 1)
        );
    }
}
