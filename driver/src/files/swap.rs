//! Replaces a volume's content in one step.
//!
//! The layout is the one that kubelet's own atomic writer makes, which readers know:
//!
//! ```text
//! password -> ..data/password
//! ..data   -> ..2026_11_23_16_19_05.123456789
//! ..2026_11_23_16_19_05.123456789/password
//! ```
//!
//! New content is written beside the old and `..data` is renamed over, so that a reader who
//! opens paths sees all of the old content or all of the new. The old stays for a moment
//! ([`GRACE`]): a reader may have followed `..data` and not yet opened the file. Everything happens relative to
//! an open directory and never through a link: even a path that slipped past [`FilePath`] could not leave the volume.

use std::{
    ffi::CString,
    fs::File as StdFile,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    time::Duration,
};

use nix::{
    NixPath,
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat, renameat},
    sys::{
        stat::{Mode, UtimensatFlags, fchmod, fstat, fstatat, mkdirat, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, UnlinkatFlags, fchown, fchownat, symlinkat, unlinkat},
};

use super::{File, FilePath, Payload};

const DATA: &str = "..data";
const DATA_TMP: &str = "..data_tmp";
const LINK_TMP: &str = "..link_tmp";

/// How long the content before stays after a swap, for readers who found their way to it before.
pub const GRACE: Duration = Duration::from_secs(2);

/// New content that lies beside the old, where no reader looks. Dropped, it goes away again.
#[must_use = "staged content is not the volume's content before it is committed"]
pub struct Staged {
    root: OwnedFd,
    payload: Payload,
    old: Option<String>,
    new: String,
    committed: bool,
}

/// The content before a swap.
#[derive(Debug, PartialEq, Eq)]
pub struct Former(String);

/// Writes new content beside the old. None: the volume has exactly this content, and nothing
/// was touched.
///
/// # Errors
/// What the system says, with the path. The volume then holds what it held before.
pub fn stage(volume: &Path, payload: Payload) -> io::Result<Option<Staged>> {
    let root = open_root(volume)?;
    let old = current(&root)?;
    if let Some(old) = &old
        && holds(&root, old, &payload)?
    {
        remove_former(&root, old)?;
        return Ok(None);
    }
    if let Some(group) = payload.group() {
        give(&root, group).at("/")?;
    }
    let staged = Staged {
        new: fresh_name(),
        root,
        payload,
        old,
        committed: false,
    };
    write_tree(&staged.root, &staged.new, &staged.payload)?;
    Ok(Some(staged))
}

impl Staged {
    /// The name of the directory that holds the staged content.
    pub fn directory(&self) -> &str {
        &self.new
    }

    /// The name of the directory that holds the content of now, if there is one.
    pub fn former_directory(&self) -> Option<&str> {
        self.old.as_deref()
    }

    /// Makes the staged content the volume's, in one step. The content before stays for those
    /// who are reading it; [`remove`] takes it away after [`GRACE`].
    ///
    /// # Errors
    /// What the system says, with the path. The volume then holds what it held before.
    pub fn commit(mut self) -> io::Result<Option<Former>> {
        point_data_at(&self.root, &self.new)?;
        link_names(&self.root, &self.payload).inspect_err(|_| {
            // Back to where readers were. If that fails too there is nothing left to try.
            let _ = match &self.old {
                Some(old) => point_data_at(&self.root, old),
                None => remove_at(self.root.as_fd(), DATA),
            };
        })?;
        self.committed = true;
        if let Some(group) = self.payload.group() {
            self.give_links(group)?;
        }
        let old = self.old.take();
        remove_all_but(&self.root, &self.new, old.as_deref(), &self.payload)?;
        let Some(old) = old.filter(|old| *old != self.new) else {
            return Ok(None);
        };
        // From now on its age says how long it has been out of use.
        match utimensat(
            &self.root,
            old.as_str(),
            &TimeSpec::UTIME_NOW,
            &TimeSpec::UTIME_NOW,
            UtimensatFlags::NoFollowSymlink,
        ) {
            Ok(()) => Ok(Some(Former(old))),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno).at(old),
        }
    }

    fn give_links(&self, group: u32) -> io::Result<()> {
        for name in self.payload.roots().into_iter().chain([DATA]) {
            let group = Some(Gid::from_raw(group));
            fchownat(&self.root, name, None, group, AtFlags::AT_SYMLINK_NOFOLLOW).at(name)?;
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.committed {
            // Whoever drops this has an error to report already, or a call that was given up;
            // what cannot be removed goes with the next successful commit.
            let _ = remove_at(self.root.as_fd(), self.new.as_str());
            let _ = remove_dangling_links(&self.root);
        }
    }
}

/// Takes the content before a swap away. Gone already, or unmounted with its volume, is success.
///
/// # Errors
/// What the system says, with the path.
pub fn remove(volume: &Path, former: &Former) -> io::Result<()> {
    let root = match open_root(volume) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        root => root?,
    };
    if current(&root)?.as_deref() == Some(&former.0) {
        return Ok(());
    }
    remove_at(root.as_fd(), former.0.as_str())
}

/// Whether content has been committed here: `..data` leads to a directory.
///
/// # Errors
/// When the volume cannot be examined.
pub fn is_complete(volume: &Path) -> io::Result<bool> {
    let root = open_root(volume)?;
    match current(&root)? {
        None => Ok(false),
        Some(name) => Ok(open_directory(root.as_fd(), name.as_str()).is_ok()),
    }
}

/// Whether there is anything at all in the volume: content that a provider wrote itself.
///
/// # Errors
/// When the volume cannot be listed.
pub fn is_empty(volume: &Path) -> io::Result<bool> {
    Ok(names(open_root(volume)?.as_fd())?.is_empty())
}

/// Whether there is anything at the volume's root that the driver did not write: files of a
/// provider that writes them itself.
///
/// # Errors
/// When the volume cannot be listed.
pub fn has_strangers(volume: &Path) -> io::Result<bool> {
    let root = open_root(volume)?;
    let names = names(root.as_fd())?;
    Ok(names.iter().any(|name| !is_own(&root, name)))
}

/// Removes what the driver wrote, and leaves what a provider wrote beside it.
///
/// # Errors
/// What the system says, with the path.
pub fn remove_own(volume: &Path) -> io::Result<()> {
    let root = open_root(volume)?;
    let own = |name: &CString| is_own(&root, name);
    for name in names(root.as_fd())?.into_iter().filter(own) {
        remove_at(root.as_fd(), name.as_c_str())?;
    }
    Ok(())
}

/// Whether a name at the root is one that the driver makes.
fn is_own(root: &OwnedFd, name: &CString) -> bool {
    name.to_str().is_ok_and(|name| {
        [DATA, DATA_TMP, LINK_TMP].contains(&name)
            || is_generation(name)
            || is_link_of_ours(root, name)
    })
}

/// Removes everything below a directory, never through a link.
///
/// # Errors
/// What the system says, with the path.
pub fn clear(volume: &Path) -> io::Result<()> {
    let root = open_root(volume)?;
    for name in names(root.as_fd())? {
        remove_at(root.as_fd(), name.as_c_str())?;
    }
    Ok(())
}

pub(super) fn open_root(volume: &Path) -> io::Result<OwnedFd> {
    nix::fcntl::open(volume, directory_flags(), Mode::empty()).at(volume.display())
}

fn directory_flags() -> OFlag {
    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}

/// A name like kubelet's, which sorts by time.
fn fresh_name() -> String {
    jiff::Timestamp::now()
        .strftime("..%Y_%m_%d_%H_%M_%S.%9f")
        .to_string()
}

/// Where `..data` points, if it points at a directory of ours.
pub(super) fn current(root: &OwnedFd) -> io::Result<Option<String>> {
    match readlinkat(root, DATA) {
        Ok(target) => Ok(target
            .into_string()
            .ok()
            .filter(|name| name.starts_with("..") && name.len() > 2 && !name.contains('/'))),
        Err(Errno::ENOENT | Errno::EINVAL) => Ok(None),
        Err(errno) => Err(errno).at(DATA),
    }
}

/// Whether the directory `old` and the links at the root are exactly what `payload` asks for.
fn holds(root: &OwnedFd, old: &str, payload: &Payload) -> io::Result<bool> {
    let Ok(data) = open_directory(root.as_fd(), old) else {
        return Ok(false);
    };
    if let Some(group) = payload.group()
        && !(belongs_to(root, group)? && belongs_to(&data, group)?)
    {
        return Ok(false);
    }
    for (path, file) in payload.files() {
        if !is_file(&data, path, file, payload.group())? {
            return Ok(false);
        }
    }
    if count_files(data.as_fd())? != payload.len() {
        return Ok(false);
    }
    let wanted = payload.roots();
    let mut found = 0;
    for name in names(root.as_fd())? {
        match name.to_str() {
            Ok(name) if name == DATA || is_generation(name) => {}
            Ok(name) if wanted.binary_search(&name).is_ok() && is_link_of_ours(root, name) => {
                found += 1;
            }
            _ => return Ok(false),
        }
    }
    Ok(found == wanted.len())
}

fn is_file(data: &OwnedFd, path: &FilePath, wanted: &File, group: Option<u32>) -> io::Result<bool> {
    let Ok(fd) = open_beneath(data, path.as_str(), OFlag::O_RDONLY, Mode::empty()) else {
        return Ok(false);
    };
    let mut file = StdFile::from(fd);
    let metadata = file.metadata()?;
    let contents = wanted.contents.expose();
    if !metadata.is_file()
        || metadata.mode() & 0o7777 != wanted.mode()
        || group.is_some_and(|group| metadata.gid() != group)
        || metadata.len() != contents.len() as u64
    {
        return Ok(false);
    }
    // A page at a time, so that no second copy of the secret lies in memory.
    let mut page = zeroize::Zeroizing::new([0_u8; 4096]);
    let mut rest = contents;
    while !rest.is_empty() {
        let read = file.read(&mut page[..])?;
        match (rest.get(..read), page.get(..read)) {
            (Some(expected), Some(found)) if read > 0 && expected == found => {
                rest = &rest[read..];
            }
            _ => return Ok(false),
        }
    }
    Ok(true)
}

fn count_files(directory: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count = 0;
    for name in names(directory)? {
        match open_directory(directory, name.as_c_str()) {
            Ok(below) => count += count_files(below.as_fd())?,
            Err(_) => count += 1,
        }
    }
    Ok(count)
}

fn write_tree(root: &OwnedFd, name: &str, payload: &Payload) -> io::Result<()> {
    mkdirat(root, name, Mode::from_bits_truncate(0o755)).at(name)?;
    let tree = open_directory(root.as_fd(), name)?;
    // mkdir(2) obeys the process's umask; readers need these bits whatever it is.
    fchmod(&tree, Mode::from_bits_truncate(0o755)).at(name)?;
    let group = payload.group();
    give_to(&tree, group).at(name)?;
    for (path, file) in payload.files() {
        let mut parent = tree.try_clone()?;
        let mut components = path.components().peekable();
        while let Some(component) = components.next() {
            if components.peek().is_some() {
                parent = make_directory(&parent, component, group)
                    .map_err(|e| about(e, path.as_str()))?;
            } else {
                write_file(&parent, component, file, group).map_err(|e| about(e, path.as_str()))?;
            }
        }
    }
    Ok(())
}

fn make_directory(parent: &OwnedFd, name: &str, group: Option<u32>) -> io::Result<OwnedFd> {
    let mode = Mode::from_bits_truncate(0o755);
    match mkdirat(parent, name, mode) {
        Ok(()) => {
            let made = open_directory(parent.as_fd(), name)?;
            fchmod(&made, mode)?;
            give_to(&made, group)?;
            Ok(made)
        }
        Err(Errno::EEXIST) => open_directory(parent.as_fd(), name),
        Err(errno) => Err(errno.into()),
    }
}

fn write_file(parent: &OwnedFd, name: &str, file: &File, group: Option<u32>) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
    let mut out = StdFile::from(open_beneath(
        parent,
        name,
        flags,
        Mode::from_bits_truncate(0o600),
    )?);
    out.write_all(file.contents.expose())?;
    // The group first: before the mode is set, nobody but the owner may read.
    give_to(&out, group)?;
    Ok(fchmod(&out, Mode::from_bits_truncate(file.mode()))?)
}

fn give_to(file: impl AsFd, group: Option<u32>) -> nix::Result<()> {
    group.map_or(Ok(()), |group| give(file, group))
}

fn give(file: impl AsFd, group: u32) -> nix::Result<()> {
    fchown(file, None, Some(Gid::from_raw(group)))
}

fn belongs_to(file: &OwnedFd, group: u32) -> io::Result<bool> {
    Ok(fstat(file)?.st_gid == group)
}

fn point_data_at(root: &OwnedFd, name: &str) -> io::Result<()> {
    replace_link(root, name, DATA_TMP, DATA)
}

/// Makes `link` at the root lead to `target`, atomically, whatever was there.
fn replace_link(root: &OwnedFd, target: &str, tmp: &str, link: &str) -> io::Result<()> {
    remove_at(root.as_fd(), tmp)?;
    symlinkat(target, root, tmp).at(tmp)?;
    match renameat(root, tmp, root, link) {
        // A provider that wrote its files itself may have left a directory of that name.
        Err(Errno::EISDIR | Errno::ENOTEMPTY | Errno::EEXIST) => {
            remove_at(root.as_fd(), link)?;
            renameat(root, tmp, root, link).at(link)
        }
        result => result.at(link),
    }
}

fn link_names(root: &OwnedFd, payload: &Payload) -> io::Result<()> {
    for name in payload.roots() {
        if !is_link_of_ours(root, name) {
            replace_link(root, &format!("{DATA}/{name}"), LINK_TMP, name)?;
        }
    }
    Ok(())
}

fn is_link_of_ours(root: &OwnedFd, name: &str) -> bool {
    readlinkat(root, name).is_ok_and(|target| {
        target
            .to_str()
            .and_then(|t| t.strip_prefix(DATA)?.strip_prefix('/'))
            == Some(name)
    })
}

/// Whether a name at the root is one that [`fresh_name`] makes.
fn is_generation(name: &str) -> bool {
    name.strip_prefix("..")
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// Removes former content that has been out of use for long enough.
fn remove_former(root: &OwnedFd, current: &str) -> io::Result<()> {
    for name in names(root.as_fd())? {
        let former = name
            .to_str()
            .is_ok_and(|name| is_generation(name) && name != current);
        if former
            && let Ok(directory) = open_directory(root.as_fd(), name.as_c_str())
            && StdFile::from(directory)
                .metadata()?
                .modified()?
                .elapsed()
                .is_ok_and(|age| age > GRACE)
        {
            remove_at(root.as_fd(), name.as_c_str())?;
        }
    }
    Ok(())
}

/// Removes names that are gone from the payload, leftovers of a crash, and former content but
/// the last.
fn remove_all_but(
    root: &OwnedFd,
    new: &str,
    old: Option<&str>,
    payload: &Payload,
) -> io::Result<()> {
    let keep = payload.roots();
    for name in names(root.as_fd())? {
        let stays = name.to_str().is_ok_and(|name| {
            name == DATA || name == new || Some(name) == old || keep.binary_search(&name).is_ok()
        });
        if !stays {
            remove_at(root.as_fd(), name.as_c_str())?;
        }
    }
    Ok(())
}

fn remove_dangling_links(root: &OwnedFd) -> io::Result<()> {
    for name in names(root.as_fd())? {
        let dangles = name.to_str().is_ok_and(|name| is_link_of_ours(root, name))
            && fstatat(root, name.as_c_str(), AtFlags::empty()).is_err_and(|e| e == Errno::ENOENT);
        if dangles {
            remove_at(root.as_fd(), name.as_c_str())?;
        }
    }
    Ok(())
}

/// Removes a file, a link (not what it leads to) or a tree. Nothing there is success.
fn remove_at<N: NixPath + ?Sized>(parent: BorrowedFd<'_>, name: &N) -> io::Result<()> {
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EISDIR | Errno::EPERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    let directory = open_directory(parent, name)?;
    for below in names(directory.as_fd())? {
        remove_at(directory.as_fd(), below.as_c_str())?;
    }
    Ok(unlinkat(parent, name, UnlinkatFlags::RemoveDir)?)
}

pub(super) fn open_directory<N: NixPath + ?Sized>(
    parent: BorrowedFd<'_>,
    name: &N,
) -> io::Result<OwnedFd> {
    Ok(openat(parent, name, directory_flags(), Mode::empty())?)
}

/// openat2(2) with the resolution confined below `parent`: no "..", no links, no way out.
pub(super) fn open_beneath(
    parent: &OwnedFd,
    path: &str,
    flags: OFlag,
    mode: Mode,
) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .mode(mode)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(parent, path, how)
}

/// The entries of a directory, without "." and "..".
pub(super) fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let mut dir = Dir::openat(directory, ".", directory_flags(), Mode::empty())?;
    let mut names = Vec::new();
    for entry in dir.iter() {
        let entry = entry?;
        if ![c".", c".."].contains(&entry.file_name()) {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

fn about(error: io::Error, what: impl std::fmt::Display) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

trait At<T> {
    /// Says which path an error is about.
    fn at(self, what: impl std::fmt::Display) -> io::Result<T>;
}

impl<T> At<T> for nix::Result<T> {
    fn at(self, what: impl std::fmt::Display) -> io::Result<T> {
        self.map_err(|errno| about(errno.into(), what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigHandler, Signal, signal},
    };
    use proptest::prelude::*;
    use rstest::rstest;
    use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

    #[derive(Debug, PartialEq, Eq)]
    enum Change {
        Unchanged,
        Replaced,
    }

    /// Stages, commits, and takes the former content away.
    fn replace(volume: &Path, payload: &Payload) -> io::Result<Change> {
        let Some(staged) = stage(volume, payload.clone())? else {
            return Ok(Change::Unchanged);
        };
        if let Some(former) = staged.commit()? {
            remove(volume, &former)?;
        }
        Ok(Change::Replaced)
    }

    type Tree<'a> = &'a [(&'a str, &'a str, i32)];

    fn payload(tree: Tree<'_>) -> Payload {
        let file = |(path, text, mode): &(&str, &str, i32)| {
            (
                (*path).to_owned(),
                File::new(*mode, text.as_bytes().to_vec()),
            )
        };
        Payload::new(tree.iter().map(file)).unwrap()
    }

    /// Everything that a reader finds by following links, with mode and content.
    fn seen(volume: &Path) -> BTreeMap<String, (u32, String)> {
        fn walk(base: &Path, at: &Path, found: &mut BTreeMap<String, (u32, String)>) {
            for entry in fs::read_dir(at).unwrap() {
                let path = entry.unwrap().path();
                if path
                    .file_name()
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .starts_with("..")
                {
                    continue;
                }
                let metadata = fs::metadata(&path).unwrap();
                if metadata.is_dir() {
                    assert_eq!(
                        metadata.permissions().mode() & 0o7777,
                        0o755,
                        "{}",
                        path.display()
                    );
                    walk(base, &path, found);
                } else {
                    let name = path
                        .strip_prefix(base)
                        .unwrap()
                        .to_str()
                        .unwrap()
                        .to_owned();
                    found.insert(
                        name,
                        (
                            metadata.permissions().mode() & 0o7777,
                            fs::read_to_string(&path).unwrap(),
                        ),
                    );
                }
            }
        }
        let mut found = BTreeMap::new();
        walk(volume, volume, &mut found);
        found
    }

    fn expected(payload: &Payload) -> BTreeMap<String, (u32, String)> {
        payload
            .files()
            .map(|(path, file)| {
                let text = String::from_utf8(file.contents.expose().to_vec()).unwrap();
                (path.as_str().to_owned(), (file.mode(), text))
            })
            .collect()
    }

    /// The hidden entries: `..data` and one directory, whatever happened before.
    fn hidden(volume: &Path) -> usize {
        fs::read_dir(volume)
            .unwrap()
            .filter(|e| {
                e.as_ref()
                    .unwrap()
                    .file_name()
                    .to_str()
                    .unwrap()
                    .starts_with("..")
            })
            .count()
    }

    #[rstest]
    #[case::changed_content(&[("a", "1", 0)], &[("a", "2", 0)])]
    #[case::changed_mode(&[("a", "1", 0o600)], &[("a", "1", 0o640)])]
    #[case::added(&[("a", "1", 0)], &[("a", "1", 0), ("b/c/d", "2", 0o400)])]
    #[case::gone(&[("a", "1", 0), ("b/c", "2", 0)], &[("a", "1", 0)])]
    #[case::gone_inside(&[("b/c", "1", 0), ("b/d", "2", 0)], &[("b/c", "1", 0)])]
    #[case::file_becomes_directory(&[("a", "1", 0)], &[("a/b", "2", 0)])]
    #[case::directory_becomes_file(&[("a/b", "1", 0)], &[("a", "2", 0)])]
    #[case::everything_else(&[("a", "1", 0)], &[("z", "", 0)])]
    fn a_volume_holds_the_new_content_and_no_other(#[case] old: Tree<'_>, #[case] new: Tree<'_>) {
        let volume = tempfile::tempdir().unwrap();
        for tree in [old, new] {
            let payload = payload(tree);
            assert_eq!(replace(volume.path(), &payload).unwrap(), Change::Replaced);
            assert_eq!(seen(volume.path()), expected(&payload));
            assert_eq!(hidden(volume.path()), 2);
            assert!(is_complete(volume.path()).unwrap());
        }
    }

    #[test]
    fn the_same_content_touches_nothing() {
        let volume = tempfile::tempdir().unwrap();
        let tree = payload(&[("a", "1", 0), ("b/c", "2", 0o400), ("empty", "", 0)]);
        replace(volume.path(), &tree).unwrap();
        let before = fs::metadata(volume.path()).unwrap();
        let data = fs::read_link(volume.path().join(DATA)).unwrap();
        assert_eq!(replace(volume.path(), &tree).unwrap(), Change::Unchanged);
        let after = fs::metadata(volume.path()).unwrap();
        assert_eq!(
            (before.mtime_nsec(), before.ctime_nsec()),
            (after.mtime_nsec(), after.ctime_nsec())
        );
        assert_eq!(fs::read_link(volume.path().join(DATA)).unwrap(), data);
    }

    #[test]
    fn what_a_provider_or_a_crash_left_makes_way() {
        let volume = tempfile::tempdir().unwrap();
        let at = |name: &str| volume.path().join(name);
        fs::create_dir_all(at("..2020_01_01_00_00_00.1/x")).unwrap();
        fs::create_dir_all(at("a/deep")).unwrap();
        fs::write(at("a/deep/file"), "old").unwrap();
        fs::write(at("plain"), "old").unwrap();
        std::os::unix::fs::symlink("nowhere", at(DATA_TMP)).unwrap();
        let tree = payload(&[("a", "1", 0), ("plain", "2", 0)]);
        replace(volume.path(), &tree).unwrap();
        assert_eq!(seen(volume.path()), expected(&tree));
        assert_eq!(hidden(volume.path()), 2);
    }

    #[test]
    fn a_damaged_volume_is_made_whole() {
        let volume = tempfile::tempdir().unwrap();
        let tree = payload(&[("a", "1", 0), ("b/c", "2", 0)]);
        let damages: [fn(PathBuf); 5] = [
            |v| fs::remove_file(v.join("a")).unwrap(),
            |v| fs::write(v.join("stranger"), "x").unwrap(),
            |v| fs::write(v.join("..data/b/stranger"), "x").unwrap(),
            |v| fs::write(v.join("..data/a"), "9").unwrap(),
            |v| fs::remove_dir_all(v.join(fs::read_link(v.join(DATA)).unwrap())).unwrap(),
        ];
        for damage in damages {
            replace(volume.path(), &tree).unwrap();
            damage(volume.path().to_owned());
            assert_eq!(replace(volume.path(), &tree).unwrap(), Change::Replaced);
            assert_eq!(seen(volume.path()), expected(&tree));
        }
    }

    #[test]
    fn former_content_stays_for_those_who_read_it_and_goes_later() {
        let volume = tempfile::tempdir().unwrap();
        let [one, two, three] = ["1", "2", "3"].map(|text| payload(&[("a", text, 0)]));
        replace(volume.path(), &one).unwrap();
        let reader = fs::canonicalize(volume.path().join("a")).unwrap();

        let staged = stage(volume.path(), two.clone()).unwrap().unwrap();
        assert_eq!(
            seen(volume.path()),
            expected(&one),
            "staged is not committed"
        );
        let former = staged.commit().unwrap().unwrap();
        assert_eq!(seen(volume.path()), expected(&two));
        assert_eq!(fs::read_to_string(&reader).unwrap(), "1");

        // An unchanged volume is seen as such while its former content is still there.
        assert!(stage(volume.path(), two.clone()).unwrap().is_none());
        assert!(reader.exists());

        // A driver that went away before it took the former content away.
        stage(volume.path(), three.clone())
            .unwrap()
            .unwrap()
            .commit()
            .unwrap();
        assert!(!reader.exists(), "only the last former content stays");
        assert_eq!(hidden(volume.path()), 3);
        remove(volume.path(), &former).unwrap();
        let leftover = fs::read_dir(volume.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| {
                let name = path.file_name().unwrap().to_str().unwrap();
                is_generation(name)
                    && current(&open_root(volume.path()).unwrap())
                        .unwrap()
                        .as_deref()
                        != Some(name)
            })
            .unwrap();
        let long_ago = std::time::SystemTime::now() - 2 * GRACE;
        fs::File::open(&leftover)
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
        assert!(stage(volume.path(), three.clone()).unwrap().is_none());
        assert_eq!(hidden(volume.path()), 2);
        assert_eq!(seen(volume.path()), expected(&three));
    }

    #[test]
    fn staged_content_that_is_dropped_leaves_nothing() {
        let volume = tempfile::tempdir().unwrap();
        replace(volume.path(), &payload(&[("a", "1", 0)])).unwrap();
        drop(
            stage(volume.path(), payload(&[("b", "2", 0)]))
                .unwrap()
                .unwrap(),
        );
        assert_eq!(seen(volume.path()), expected(&payload(&[("a", "1", 0)])));
        assert_eq!(hidden(volume.path()), 2);
    }

    /// Needs a group that this user may give files to.
    #[test]
    fn everything_belongs_to_the_group() {
        let own = nix::unistd::getgid().as_raw();
        let other = if nix::unistd::geteuid().is_root() {
            1004
        } else {
            own
        };
        let volume = tempfile::tempdir().unwrap();
        let tree = payload(&[("a", "1", 0o640), ("b/c", "2", 0o600)]);
        replace(volume.path(), &tree).unwrap();
        let of = |group| {
            tree.clone().accessible(super::super::Access {
                default_mode: 0o644,
                group: Some(group),
            })
        };
        for (group, change) in [
            (own, Change::Unchanged),
            (
                other,
                if other == own {
                    Change::Unchanged
                } else {
                    Change::Replaced
                },
            ),
            (other, Change::Unchanged),
        ] {
            assert_eq!(replace(volume.path(), &of(group)).unwrap(), change);
        }
        let mut left = vec![volume.path().to_owned()];
        let mut seen = 0;
        while let Some(path) = left.pop() {
            let metadata = fs::symlink_metadata(&path).unwrap();
            assert_eq!(metadata.gid(), other, "{}", path.display());
            seen += 1;
            if metadata.is_dir() {
                left.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            }
        }
        assert_eq!(
            seen, 8,
            "the root, two links, ..data, its directory, b, and two files"
        );
        let mode = fs::metadata(volume.path().join("b/c")).unwrap().mode() & 0o7777;
        assert_eq!(mode, 0o600, "modes stay as the provider gave them");
    }

    #[test]
    fn clearing_never_goes_through_a_link() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("kept"), "x").unwrap();
        let volume = tempfile::tempdir().unwrap();
        replace(volume.path(), &payload(&[("a/b", "1", 0)])).unwrap();
        std::os::unix::fs::symlink(outside.path(), volume.path().join("out")).unwrap();
        fs::create_dir(volume.path().join("dir")).unwrap();
        std::os::unix::fs::symlink(outside.path(), volume.path().join("dir/out")).unwrap();
        clear(volume.path()).unwrap();
        assert!(is_empty(volume.path()).unwrap());
        assert!(outside.path().join("kept").exists());
    }

    #[test]
    fn a_link_in_the_way_is_replaced_and_not_followed() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("kept"), "x").unwrap();
        let volume = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), volume.path().join("a")).unwrap();
        std::os::unix::fs::symlink(outside.path(), volume.path().join(DATA)).unwrap();
        let tree = payload(&[("a/kept", "1", 0)]);
        replace(volume.path(), &tree).unwrap();
        assert_eq!(seen(volume.path()), expected(&tree));
        assert_eq!(
            fs::read_to_string(outside.path().join("kept")).unwrap(),
            "x"
        );
    }

    /// In a process of its own, because the limit that makes writing fail is the process's.
    #[test]
    fn a_failed_replace_leaves_the_volume_as_it_was() {
        const ALONE: &str = "REPLACE_WITHOUT_ROOM";
        if std::env::var_os(ALONE).is_none() {
            let run = std::process::Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "files::swap::tests::a_failed_replace_leaves_the_volume_as_it_was",
                ])
                .env(ALONE, "1")
                .output()
                .unwrap();
            assert!(
                run.status.success(),
                "{}",
                String::from_utf8_lossy(&run.stdout)
            );
            return;
        }
        let volume = tempfile::tempdir().unwrap();
        let old = payload(&[("a", "1", 0), ("b/c", "2", 0)]);
        replace(volume.path(), &old).unwrap();
        let new = payload(&[
            ("a", "", 0),
            ("b", "", 0),
            ("new", "more than there is room for", 0),
        ]);
        let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: ignoring a signal installs no handler.
        unsafe {
            signal(Signal::SIGXFSZ, SigHandler::SigIgn).unwrap();
        }
        setrlimit(Resource::RLIMIT_FSIZE, 0, hard).unwrap();
        let result = replace(volume.path(), &new);
        setrlimit(Resource::RLIMIT_FSIZE, hard, hard).unwrap();
        assert!(result.unwrap_err().to_string().contains("new"));
        assert_eq!(seen(volume.path()), expected(&old));
        assert_eq!(hidden(volume.path()), 2, "nothing half-written stays");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn any_row_of_contents_ends_in_the_last(rows in prop::collection::vec(
            prop::collection::btree_map("[ab](/[ab]){0,2}", ("[xy]{0,3}", prop::sample::select(vec![0, 0o400, 0o640])), 0..5), 1..5)
        ) {
            let volume = tempfile::tempdir().unwrap();
            for row in rows {
                let files = row.into_iter().map(|(path, (text, mode))| (path, File::new(mode, text.into_bytes())));
                let Ok(payload) = Payload::new(files) else { continue };
                replace(volume.path(), &payload).unwrap();
                prop_assert_eq!(seen(volume.path()), expected(&payload));
                prop_assert_eq!(hidden(volume.path()), 2);
                prop_assert_eq!(replace(volume.path(), &payload).unwrap(), Change::Unchanged);
            }
        }
    }
}
