//! Replaces a volume's content in one step.
//!
//! New content is written beside the old and `..data` is renamed over, so that a reader who
//! opens paths sees all of the old content or all of the new. The old stays for a moment
//! ([`GRACE`]): a reader may have followed `..data` and not yet opened the file. What has become
//! the volume's content is read back by name and compared with what was wanted; if it differs, the
//! volume gets back what readers had. Everything happens relative to an open directory and never
//! through a link: even a path that slipped past [`FilePath`](super::FilePath) could not leave the volume.

use std::{
    ffi::CStr,
    fmt,
    fs::File as StdFile,
    io::{self, Write as _},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, renameat},
    sys::{
        stat::{Mode, UtimensatFlags, fchmod, fstatat, mkdirat, utimensat},
        statvfs::fstatvfs,
        time::TimeSpec,
    },
    unistd::{Gid, fchown, fchownat, linkat, symlinkat},
};

use super::{
    File, Payload,
    compare::compare,
    layout::{DATA, current, fresh_name, is_generation, is_hidden, is_link_of_ours},
    tree::{At as _, about, empty, names, open_beneath, open_directory, open_root, remove_at},
};

/// The link that becomes another link by being renamed over it.
const LINK_TMP: &str = "..link_tmp";
/// The directory for what a commit takes away from the root until the new content is known to be
/// whole.
const ASIDE: &str = "..aside";

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

/// Writes new content beside the old, in a volume whose root is open. None: the volume has exactly
/// this content, and nothing that a reader sees was touched.
///
/// # Errors
/// What the system says, with the path. The volume then holds what it held before.
pub fn stage(root: OwnedFd, payload: Payload) -> io::Result<Option<Staged>> {
    let old = current(&root)?;
    if let Some(old) = &old
        && compare(&root, &payload).is_ok()
    {
        remove_leftovers(&root, |name| {
            name.to_bytes() == old.as_bytes() || is_in_grace(&root, name)
        });
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
    has_room(&staged.root, &staged.payload)?;
    write_tree(&staged.root, &staged.new, &staged.payload)?;
    Ok(Some(staged))
}

/// Whether a volume has exactly this content.
pub fn has(root: &OwnedFd, payload: &Payload) -> bool {
    compare(root, payload).is_ok()
}

impl Staged {
    /// Returns the name of the directory that holds the staged content.
    pub fn directory(&self) -> &str {
        &self.new
    }

    /// Returns the name of the directory that holds the content of now, if there is one.
    pub fn former_directory(&self) -> Option<&str> {
        self.old.as_deref()
    }

    /// Makes the staged content the volume's, in one step, and reads it back by name. The content
    /// before stays for those who are reading it; [`remove`] takes it away after [`GRACE`].
    ///
    /// # Errors
    /// What the system says, or in what the volume differs from the payload, with the path. The
    /// volume then holds what it held before.
    pub fn commit(mut self) -> io::Result<Option<Former>> {
        if let Err(error) = self.put_in_place() {
            if let Err(error) = self.put_back() {
                tracing::error!(%error, "a swap failed, and the content from before could not be restored");
            }
            return Err(error);
        }
        self.committed = true;
        remove_leftovers(&self.root, |name| {
            let name = name.to_bytes();
            name == self.new.as_bytes() || self.old.as_ref().is_some_and(|o| name == o.as_bytes())
        });
        let Some(old) = self.old.take() else {
            return Ok(None);
        };
        // From now on its age says how long it has been out of use.
        let now = TimeSpec::UTIME_NOW;
        let no_links = UtimensatFlags::NoFollowSymlink;
        match utimensat(&self.root, old.as_str(), &now, &now, no_links) {
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => {
                tracing::warn!(%error, name = old, "replaced content may be removed while a reader still opens it");
                Ok(Some(Former(old)))
            }
            Ok(()) => Ok(Some(Former(old))),
        }
    }

    fn put_in_place(&self) -> io::Result<()> {
        remove_at(self.root.as_fd(), ASIDE).map_err(|e| about(e, ASIDE))?;
        mkdirat(&self.root, ASIDE, Mode::S_IRWXU).at(ASIDE)?;
        let aside = open_directory(self.root.as_fd(), ASIDE)?;
        replace_link(&self.root, &aside, &self.new, DATA)?;
        let wanted = self.payload.roots();
        for name in &wanted {
            if !is_link_of_ours(&self.root, name) {
                let target = format!("{DATA}/{name}");
                replace_link(&self.root, &aside, &target, name)?;
            }
        }
        for name in names(self.root.as_fd())? {
            let stays = is_hidden(&name) || name.to_str().is_ok_and(|name| wanted.contains(name));
            if !stays {
                renameat(&self.root, name.as_c_str(), &aside, name.as_c_str())
                    .at(name.to_string_lossy())?;
            }
        }
        if let Some(group) = self.payload.group() {
            let group = Some(Gid::from_raw(group));
            for name in wanted.into_iter().chain([DATA]) {
                fchownat(&self.root, name, None, group, AtFlags::AT_SYMLINK_NOFOLLOW).at(name)?;
            }
        }
        compare(&self.root, &self.payload).map_err(|difference| {
            io::Error::other(format!(
                "the volume does not hold what was written: {difference}"
            ))
        })
    }

    /// Takes readers back to where they were. Needs no room, because there may be none.
    fn put_back(&self) -> io::Result<()> {
        let aside = match open_directory(self.root.as_fd(), ASIDE) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            aside => aside?,
        };
        if current(&self.root)?.as_ref() == Some(&self.new) && !holds_name(&aside, DATA) {
            remove_at(self.root.as_fd(), DATA)?;
        }
        for name in names(aside.as_fd())? {
            let back = || renameat(&aside, name.as_c_str(), &self.root, name.as_c_str());
            match back() {
                // One of the two is a directory.
                Err(Errno::EISDIR | Errno::ENOTDIR | Errno::EEXIST | Errno::ENOTEMPTY) => {
                    remove_at(self.root.as_fd(), name.as_c_str())?;
                    back().at(name.to_string_lossy())?;
                }
                result => result.at(name.to_string_lossy())?,
            }
        }
        remove_at(self.root.as_fd(), ASIDE)
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

/// Takes the content before a swap away. Gone already is success, and so is to do it beside others.
///
/// # Errors
/// What the system says, with the path.
pub fn remove(root: &OwnedFd, former: &Former) -> io::Result<()> {
    if current(root)?.as_deref() == Some(&former.0) {
        return Ok(());
    }
    remove_at(root.as_fd(), former.0.as_str())
}

/// Whether content has been committed here: `..data` leads to a directory.
///
/// # Errors
/// When the volume cannot be examined.
pub fn is_complete(volume: &Path) -> io::Result<bool> {
    holds_committed(&open_root(volume)?)
}

/// As [`is_complete`], of a volume whose root is open.
///
/// # Errors
/// As [`is_complete`].
pub fn holds_committed(root: &OwnedFd) -> io::Result<bool> {
    match current(root)? {
        None => Ok(false),
        Some(name) => Ok(open_directory(root.as_fd(), name.as_str()).is_ok()),
    }
}

/// Whether there is nothing in the volume that a pod takes for content: content that a provider
/// wrote itself. Hidden names are none, unless `..data` leads to some.
///
/// # Errors
/// When the volume cannot be listed.
pub fn is_empty(volume: &Path) -> io::Result<bool> {
    shows_nothing(&open_root(volume)?)
}

/// As [`is_empty`], of a volume whose root is open.
///
/// # Errors
/// As [`is_empty`].
pub fn shows_nothing(root: &OwnedFd) -> io::Result<bool> {
    if !all_hidden(root)? {
        return Ok(false);
    }
    match current(root)? {
        None => Ok(true),
        Some(name) => match open_directory(root.as_fd(), name.as_str()) {
            Ok(content) => all_hidden(&content),
            // It leads nowhere, or to something that is no directory.
            Err(error) if is_no_directory(&error) => Ok(true),
            Err(error) => Err(about(error, DATA)),
        },
    }
}

fn is_no_directory(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP))
}

fn all_hidden(directory: &OwnedFd) -> io::Result<bool> {
    Ok(names(directory.as_fd())?.iter().all(|name| is_hidden(name)))
}

/// Whether there is anything at the volume's root that the driver did not write: files of a
/// provider that writes them itself.
///
/// # Errors
/// When the volume cannot be listed.
pub fn has_strangers(root: &OwnedFd) -> io::Result<bool> {
    let names = names(root.as_fd())?;
    Ok(names.iter().any(|name| !is_own(root, name)))
}

/// Removes what the driver wrote, and leaves what a provider wrote beside it.
///
/// # Errors
/// What the system says, with the path.
pub fn remove_own(root: &OwnedFd) -> io::Result<()> {
    for name in names(root.as_fd())? {
        if is_own(root, &name) {
            remove_at(root.as_fd(), name.as_c_str())?;
        }
    }
    Ok(())
}

/// Whether a name at the root is one that the driver makes.
fn is_own(root: &OwnedFd, name: &CStr) -> bool {
    let is_link = || name.to_str().is_ok_and(|name| is_link_of_ours(root, name));
    is_hidden(name) || is_link()
}

/// Removes everything in a directory that is open, never through a link and never beyond its own
/// mount.
///
/// # Errors
/// What the system says; EBUSY if something is mounted below.
pub fn clear(directory: &OwnedFd) -> io::Result<()> {
    empty(directory.as_fd())
}

/// Removes a target's directory on which nothing is mounted, and what an interrupted publish left
/// in it. Nothing there is success.
///
/// # Errors
/// As of [`clear`].
pub fn remove_target(target: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    match open_root(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        parent => remove_at(parent?.as_fd(), name),
    }
}

/// That a volume has no room for a payload.
#[derive(Debug)]
pub struct Full {
    what: String,
    /// Whether the payload takes at most half of what the volume has, which leaves as much for the
    /// content before: then something else fills the volume.
    pub is_filled_otherwise: bool,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Full {}

/// Refuses a payload for which there is no room beside what the volume holds, before anything is
/// written. A file system without a number of blocks or files has no bound.
fn has_room(root: &OwnedFd, payload: &Payload) -> io::Result<()> {
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
    let full = |what: String| {
        let full = Full {
            what,
            is_filled_otherwise,
        };
        Err(io::Error::new(io::ErrorKind::StorageFull, full))
    };
    if is.files() != 0 && entries > is.files_available() {
        return full(format!(
            "{} files in {} directories, and the volume has room for {} more of both",
            payload.len(),
            payload.directories(),
            is.files_available()
        ));
    }
    if is.blocks() != 0 && blocks > is.blocks_available() {
        return full(format!(
            "{} files that take {} bytes in blocks of {block}, and the volume has room for {} more",
            payload.len(),
            blocks * block,
            is.blocks_available() * block
        ));
    }
    Ok(())
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

fn holds_name(directory: &OwnedFd, name: &str) -> bool {
    fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok()
}

/// Makes `link` at the root lead to `target`, atomically unless a directory was there. What was
/// there is put into the directory `aside`.
fn replace_link(root: &OwnedFd, aside: &OwnedFd, target: &str, link: &str) -> io::Result<()> {
    remove_at(root.as_fd(), LINK_TMP)?;
    symlinkat(target, root, LINK_TMP).at(LINK_TMP)?;
    match linkat(root, link, aside, link, AtFlags::empty()) {
        Ok(()) | Err(Errno::ENOENT) => {}
        // A directory has one name only.
        Err(Errno::EPERM) => renameat(root, link, aside, link).at(link)?,
        Err(errno) => return Err(errno).at(link),
    }
    renameat(root, LINK_TMP, root, link).at(link)
}

/// Whether a generation that is not in use any more was in use a moment ago.
fn is_in_grace(root: &OwnedFd, name: &CStr) -> bool {
    let age = || {
        let directory = open_directory(root.as_fd(), name)?;
        let modified = StdFile::from(directory).metadata()?.modified()?;
        modified.elapsed().map_err(io::Error::other)
    };
    // A modification in the future is younger than any age.
    is_generation(name) && age().map_or(true, |age| age <= GRACE)
}

/// Removes hidden names at the root: former generations and what a crash left. The content is
/// whole with them, so that what cannot be removed waits for the next occasion.
fn remove_leftovers(root: &OwnedFd, stays: impl Fn(&CStr) -> bool) {
    let found = match names(root.as_fd()) {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(%error, "former content could not be removed and stays until the next refresh");
            return;
        }
    };
    for name in found {
        if !is_hidden(&name) || name.to_bytes() == DATA.as_bytes() || stays(&name) {
            continue;
        }
        if let Err(error) = remove_at(root.as_fd(), name.as_c_str()) {
            let name = name.to_string_lossy();
            tracing::warn!(%error, %name, "former content could not be removed and stays until the next refresh");
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigHandler, Signal, signal},
    };
    use proptest::prelude::*;
    use rstest::rstest;
    use std::{
        collections::BTreeMap,
        fs,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
        path::PathBuf,
        sync::atomic::{AtomicBool, Ordering},
    };

    use crate::{
        files::generated::{self, Files},
        mount::alone::{Own, alone},
    };

    fn stage(volume: &Path, payload: Payload) -> io::Result<Option<Staged>> {
        super::stage(open_root(volume)?, payload)
    }

    fn remove(volume: &Path, former: &Former) -> io::Result<()> {
        super::remove(&open_root(volume)?, former)
    }

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
    fn seen(volume: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
        fn walk(base: &Path, at: &Path, found: &mut BTreeMap<String, (u32, Vec<u8>)>) {
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
                            fs::read(&path).unwrap(),
                        ),
                    );
                }
            }
        }
        let mut found = BTreeMap::new();
        walk(volume, volume, &mut found);
        found
    }

    fn expected(payload: &Payload) -> BTreeMap<String, (u32, Vec<u8>)> {
        payload
            .files()
            .map(|(path, file)| {
                let content = file.contents.expose().to_vec();
                (path.as_str().to_owned(), (file.mode(), content))
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
        symlink("nowhere", at(LINK_TMP)).unwrap();
        let tree = payload(&[("a", "1", 0), ("plain", "2", 0)]);
        replace(volume.path(), &tree).unwrap();
        assert_eq!(seen(volume.path()), expected(&tree));
        assert_eq!(hidden(volume.path()), 2);
    }

    #[test]
    fn a_damaged_volume_is_made_whole() {
        let volume = tempfile::tempdir().unwrap();
        let tree = payload(&[("a", "1", 0), ("b/c", "2", 0)]);
        let put = |path: PathBuf, make: fn(&Path)| {
            fs::remove_file(&path).unwrap();
            make(&path);
        };
        let damages: [&dyn Fn(PathBuf); 11] = [
            &|v| {
                put(v.join("..data/a"), |path| {
                    nix::unistd::mkfifo(path, Mode::S_IRWXU).unwrap()
                })
            },
            &|v| {
                put(v.join("..data/b/c"), |path| {
                    nix::unistd::mkfifo(path, Mode::S_IRWXU).unwrap()
                })
            },
            &|v| {
                put(v.join("a"), |path| {
                    nix::unistd::mkfifo(path, Mode::S_IRWXU).unwrap()
                })
            },
            &|v| {
                put(v.join(DATA), |path| {
                    nix::unistd::mkfifo(path, Mode::S_IRWXU).unwrap()
                })
            },
            &|v| {
                put(v.join("..data/a"), |path| {
                    drop(std::os::unix::net::UnixListener::bind(path).unwrap())
                })
            },
            &|v| put(v.join("..data/a"), |path| symlink("b/c", path).unwrap()),
            &|v| fs::remove_file(v.join("a")).unwrap(),
            &|v| fs::write(v.join("stranger"), "x").unwrap(),
            &|v| fs::write(v.join("..data/b/stranger"), "x").unwrap(),
            &|v| fs::write(v.join("..data/a"), "9").unwrap(),
            &|v| fs::remove_dir_all(v.join(fs::read_link(v.join(DATA)).unwrap())).unwrap(),
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
                name.starts_with("..2")
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
        symlink(outside.path(), volume.path().join("out")).unwrap();
        fs::create_dir(volume.path().join("dir")).unwrap();
        symlink(outside.path(), volume.path().join("dir/out")).unwrap();
        clear(&open_root(volume.path()).unwrap()).unwrap();
        assert_eq!(fs::read_dir(volume.path()).unwrap().count(), 0);
        assert!(outside.path().join("kept").exists());
    }

    #[test]
    fn a_link_in_the_way_is_replaced_and_not_followed() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("kept"), "x").unwrap();
        let volume = tempfile::tempdir().unwrap();
        symlink(outside.path(), volume.path().join("a")).unwrap();
        symlink(outside.path(), volume.path().join(DATA)).unwrap();
        let tree = payload(&[("a/kept", "1", 0)]);
        replace(volume.path(), &tree).unwrap();
        assert_eq!(seen(volume.path()), expected(&tree));
        assert_eq!(
            fs::read_to_string(outside.path().join("kept")).unwrap(),
            "x"
        );
    }

    /// Something is mounted below the content that is replaced.
    #[test]
    fn a_commit_does_not_hang_on_the_removal_of_former_content() {
        const NAME: &str =
            "files::swap::tests::a_commit_does_not_hang_on_the_removal_of_former_content";
        if !alone(NAME, Own::Mounts) {
            return;
        }
        let volume = tempfile::tempdir().unwrap();
        let trees = ["1", "2", "3"].map(|text| payload(&[("a/b", text, 0)]));
        replace(volume.path(), &trees[0]).unwrap();
        let busy = fs::canonicalize(volume.path().join("a")).unwrap();
        let none = None::<&str>;
        nix::mount::mount(
            Some("x"),
            &busy,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            none,
        )
        .unwrap();
        for tree in &trees[1..] {
            let former = stage(volume.path(), tree.clone())
                .unwrap()
                .unwrap()
                .commit()
                .unwrap();
            assert!(former.is_some());
            assert_eq!(seen(volume.path()), expected(tree));
            assert!(stage(volume.path(), tree.clone()).unwrap().is_none());
        }
        assert!(busy.exists());
        nix::mount::umount(&busy).unwrap();
        replace(volume.path(), &trees[0]).unwrap();
        assert!(!busy.exists(), "it goes at the next occasion");
        assert_eq!(hidden(volume.path()), 2);
    }

    /// Many directories take room too.
    #[test]
    fn what_there_is_no_room_for_is_refused_before_anything_is_written() {
        const NAME: &str =
            "files::swap::tests::what_there_is_no_room_for_is_refused_before_anything_is_written";
        if !alone(NAME, Own::Mounts) {
            return;
        }
        let volume = tempfile::tempdir().unwrap();
        nix::mount::mount(
            Some("x"),
            volume.path(),
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some("size=64k,nr_inodes=200"),
        )
        .unwrap();
        let old = payload(&[("a", "1", 0)]);
        replace(volume.path(), &old).unwrap();
        let deep = |files: usize| {
            let path = |n| {
                (
                    format!("{n}/{}", ["d"; 30].join("/")),
                    File::new(0, b"1".to_vec()),
                )
            };
            Payload::new((0..files).map(path)).unwrap()
        };
        let wide = |files: usize| {
            let path = |n: usize| (n.to_string(), File::new(0, b"1".to_vec()));
            Payload::new((0..files).map(path)).unwrap()
        };
        for (too_much, says) in [
            (
                deep(7),
                "7 files in 210 directories, and the volume has room for",
            ),
            (
                wide(300),
                "300 files in 0 directories, and the volume has room for",
            ),
            (
                wide(40),
                "40 files that take 163840 bytes in blocks of 4096",
            ),
        ] {
            let before = names(open_root(volume.path()).unwrap().as_fd()).unwrap();
            let error = stage(volume.path(), too_much).err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
            assert!(error.to_string().contains(says), "{error}");
            assert_eq!(
                names(open_root(volume.path()).unwrap().as_fd()).unwrap(),
                before
            );
            assert_eq!(seen(volume.path()), expected(&old));
        }
        replace(volume.path(), &deep(3)).unwrap();
        assert_eq!(seen(volume.path()), expected(&deep(3)));
    }

    /// In a process of its own, because the limit that makes writing fail is the process's.
    #[test]
    fn a_failed_replace_leaves_the_volume_as_it_was() {
        const NAME: &str = "files::swap::tests::a_failed_replace_leaves_the_volume_as_it_was";
        if !alone(NAME, Own::Process) {
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

    /// Reads each path in a loop until `stop`, as a pod does. Returns what is neither of the
    /// contents that are right, or is not there.
    fn read_until(
        stop: &AtomicBool,
        volume: &Path,
        right: &[(&str, [&[u8]; 2])],
    ) -> Option<String> {
        loop {
            let last = stop.load(Ordering::SeqCst);
            for (path, contents) in right {
                match fs::read(volume.join(path)) {
                    Ok(found) if contents.contains(&found.as_slice()) => {}
                    found => return Some(format!("{path:?}: {:?}", found.map(|f| f.len()))),
                }
            }
            if last {
                return None;
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { max_shrink_iters: 300, ..ProptestConfig::with_cases(16) })]
        #[test]
        fn a_volume_is_what_the_last_payload_says_and_readers_miss_nothing(
            rows in prop::collection::vec(generated::files(), 1..5)
        ) {
            let volume = tempfile::tempdir().unwrap();
            let mut before = Files::new();
            for files in rows {
                let payload = generated::payload(&files);
                let both: Vec<_> = before
                    .iter()
                    .filter_map(|(path, (old, _))| {
                        Some((path.as_str(), [old.as_slice(), files.get(path)?.0.as_slice()]))
                    })
                    .collect();
                let stop = AtomicBool::new(false);
                let (former, missed) = std::thread::scope(|scope| {
                    let reader = scope.spawn(|| read_until(&stop, volume.path(), &both));
                    let staged = stage(volume.path(), payload.clone());
                    let former = staged.and_then(|staged| staged.map_or(Ok(None), Staged::commit));
                    stop.store(true, Ordering::SeqCst);
                    (former, reader.join().unwrap())
                });
                let former = former.unwrap();
                prop_assert_eq!(missed, None);
                prop_assert_eq!(seen(volume.path()), expected(&payload));
                if let Some(former) = former {
                    remove(volume.path(), &former).unwrap();
                }
                prop_assert_eq!(seen(volume.path()), expected(&payload));
                prop_assert_eq!(hidden(volume.path()), 2);
                prop_assert_eq!(replace(volume.path(), &payload).unwrap(), Change::Unchanged);
                before = files;
            }
        }
    }

    /// What a volume holds before a commit.
    #[derive(Clone, Copy)]
    enum Before {
        Nothing,
        OfDriver,
        OfProvider,
    }

    #[rstest]
    fn a_commit_whose_content_is_not_found_gives_back_what_was_there(
        #[values(Before::Nothing, Before::OfDriver, Before::OfProvider)] before: Before,
        #[values(
            "gone",
            "content",
            "length",
            "mode",
            "pipe",
            "link",
            "directory",
            "more"
        )]
        damage: &str,
    ) {
        let volume = tempfile::tempdir().unwrap();
        let at = |path: &str| volume.path().join(path);
        match before {
            Before::Nothing => {}
            Before::OfDriver => {
                let old = payload(&[
                    ("app/x", "0", 0o640),
                    ("app.old", "1", 0),
                    ("only/old", "2", 0),
                ]);
                replace(volume.path(), &old).unwrap();
            }
            Before::OfProvider => {
                fs::create_dir_all(at("app.json/deep")).unwrap();
                fs::write(at("app.json/deep/file"), "0").unwrap();
                fs::write(at("app"), "1").unwrap();
                fs::write(at("only"), "2").unwrap();
            }
        }
        let seen_before = seen(volume.path());
        let all = || {
            let names = fs::read_dir(volume.path()).unwrap();
            names
                .map(|e| e.unwrap().file_name())
                .collect::<std::collections::BTreeSet<_>>()
        };
        let all_before = all();
        let new = payload(&[
            ("app/x", "new", 0o600),
            ("app.json", "new", 0),
            ("app-tls/y", "new", 0),
        ]);
        let staged = stage(volume.path(), new).unwrap().unwrap();
        let file = volume.path().join(&staged.new).join("app/x");
        match damage {
            "gone" => fs::remove_file(&file).unwrap(),
            "content" => fs::write(&file, "nEw").unwrap(),
            "length" => fs::write(&file, "newer").unwrap(),
            "mode" => fs::set_permissions(&file, fs::Permissions::from_mode(0o604)).unwrap(),
            "more" => fs::write(file.with_file_name("x-1"), "").unwrap(),
            other => {
                fs::remove_file(&file).unwrap();
                match other {
                    "pipe" => nix::unistd::mkfifo(&file, Mode::S_IRWXU).unwrap(),
                    "link" => symlink("../app.json", &file).unwrap(),
                    _ => fs::create_dir(&file).unwrap(),
                }
            }
        }
        let error = staged.commit().unwrap_err().to_string();
        assert!(error.contains("app/x"), "{error}");
        assert_eq!(seen(volume.path()), seen_before);
        assert_eq!(all(), all_before);
    }
}
