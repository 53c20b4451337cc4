//! Replaces a volume's content in one step.
//!
//! New content is written beside the old and `..data` is renamed over, so that a reader who
//! opens paths sees all of the old content or all of the new. The old content stays for a moment
//! ([`GRACE`]): a reader may have followed `..data` and not yet opened the file. After the rename
//! the new content is read back by name and compared with the payload; if it differs, the volume
//! gets the old content back. Nothing else takes back what a reader may have seen by then: all that
//! needs room is made before the rename, and if a name cannot be made after it, the next look makes it.
//! Everything happens relative to an open directory and never through a link: even a path that slipped
//! past [`FilePath`](super::FilePath) could not leave the volume.

use std::{
    collections::BTreeSet,
    ffi::CStr,
    fs::File as StdFile,
    io,
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, renameat},
    sys::{
        stat::{Mode, fchmod, fstat, fstatat, futimens, mkdirat},
        time::TimeSpec,
    },
    unistd::{Gid, fchownat, linkat, symlinkat},
};

pub use super::write::Full;
use super::{
    Payload,
    compare::{Strangers, compare, is_stranger},
    layout::{DATA, current, fresh_name, is_generation, is_hidden, is_own_link},
    tree::{At as _, about, names, open_directory, remove_at},
    write::{check_room, give_to, write_tree},
};
use crate::quoted::quoted;

/// The directory of the links that become others by being renamed over them.
const LINKS: &str = "..links";
/// The directory that holds what a commit takes away from the root, until the new content has been
/// read back.
const ASIDE: &str = "..aside";

/// The time for which the former content stays after a swap, for readers that have already followed
/// `..data`.
pub const GRACE: Duration = Duration::from_secs(2);

/// The mode of a generation that was replaced. Its sticky bit means nothing to readers.
const REPLACED: Mode = Mode::from_bits_retain(0o1755);

/// New content that lies beside the old, where no reader looks. Dropping it removes it.
#[must_use = "staged content is not the volume's content before it is committed"]
pub struct StagedContent {
    root: OwnedFd,
    payload: Payload,
    old: Option<String>,
    new: String,
    committed: bool,
}

/// The content that a volume had before a swap.
#[derive(Debug, PartialEq, Eq)]
pub struct Former(String);

/// Why a swap did not come to its end.
enum Broken {
    /// The volume holds what it held before.
    Before(io::Error),
    /// It holds the new content, and may lack some of its names.
    Midway(io::Error),
    /// It does not hold what was written.
    Differs(io::Error),
}

/// The links that are about to replace what has their names at the root.
struct Prepared<'a> {
    /// The directory that holds what they replace.
    aside: OwnedFd,
    /// The directory in which they are made.
    made: OwnedFd,
    /// `..data`.
    data: Link<'a>,
    /// The others.
    names: Vec<Link<'a>>,
}

struct Link<'a> {
    name: &'a str,
    /// Whether it replaces a directory, which cannot have a second name.
    replaces_directory: bool,
}

impl Prepared<'_> {
    /// Puts a link at the root, atomically unless a directory is there.
    fn put(&self, root: &OwnedFd, link: &Link<'_>) -> io::Result<()> {
        let name = link.name;
        if link.replaces_directory {
            renameat(root, name, &self.aside, name).at(name)?;
        }
        renameat(&self.made, name, root, name).at(name)
    }
}

/// Writes new content beside the old, in a volume whose root is open. Returns nothing if the volume
/// has exactly this content already; then nothing of it was touched, and what others have put beside it
/// is removed, except for the directories that kubelet makes.
///
/// # Errors
/// The system's error, with the path. The volume then holds what it held before.
pub fn stage(root: OwnedFd, payload: Payload) -> io::Result<Option<StagedContent>> {
    let old = current(&root)?;
    if let Some(old) = &old
        && holds(&root, &payload)
    {
        remove_strangers(&root, &payload)?;
        remove_leftovers(&root, |name| {
            name.to_bytes() == old.as_bytes() || is_in_grace(&root, name)
        });
        return Ok(None);
    }
    give_to(&root, payload.group()).at("/")?;
    let staged = StagedContent {
        new: fresh_name(),
        root,
        payload,
        old,
        committed: false,
    };
    check_room(&staged.root, &staged.payload)?;
    write_tree(&staged.root, &staged.new, &staged.payload)?;
    Ok(Some(staged))
}

/// Returns whether a volume has exactly this content. What others have put beside it does not count.
pub fn holds(root: &OwnedFd, payload: &Payload) -> bool {
    compare(root, payload, Strangers::MayBe).is_ok()
}

impl StagedContent {
    /// Returns the name of the directory that holds the staged content.
    pub fn directory(&self) -> &str {
        &self.new
    }

    /// Returns the name of the directory that holds the present content, if there is one.
    pub fn former_directory(&self) -> Option<&str> {
        self.old.as_deref()
    }

    /// Makes the staged content the volume's, in one step, and reads it back by name. The former
    /// content stays for its readers; the caller removes it with [`remove`] after [`GRACE`].
    ///
    /// # Errors
    /// The system's error, or how the volume differs from the payload, with the path. The volume
    /// then holds what it held before, or the new content without some of its names.
    pub fn commit(mut self) -> io::Result<Option<Former>> {
        match self.put_in_place() {
            Ok(()) => {}
            Err(Broken::Midway(error)) if self.old.is_some() => {
                self.committed = true;
                self.remove_former();
                return Err(error);
            }
            Err(Broken::Before(error) | Broken::Midway(error) | Broken::Differs(error)) => {
                if let Err(error) = self.put_back() {
                    tracing::error!(%error, "a swap failed, and the content from before could not be restored");
                }
                return Err(error);
            }
        }
        self.committed = true;
        Ok(self.remove_former())
    }

    /// Removes all content but the new one and those that may still have readers. Returns the one that was
    /// replaced now.
    fn remove_former(&mut self) -> Option<Former> {
        remove_leftovers(&self.root, |name| {
            let is = |other: &String| name.to_bytes() == other.as_bytes();
            // Several swaps may follow each other within the grace of the first.
            is(&self.new)
                || self.old.as_ref().is_some_and(is)
                || was_replaced(&self.root, name) && is_in_grace(&self.root, name)
        });
        let old = self.old.take()?;
        match mark_replaced(&self.root, &old) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(%error, name = old, "replaced content may be removed while a reader still opens it");
            }
            Ok(()) => {}
        }
        Some(Former(old))
    }

    fn put_in_place(&self) -> Result<(), Broken> {
        let roots = self.payload.roots();
        let prepared = self.prepare(&roots).map_err(Broken::Before)?;
        // From here on nothing needs room.
        let put = |link| prepared.put(&self.root, link);
        put(&prepared.data).map_err(Broken::Before)?;
        let named = prepared.names.iter().try_for_each(put);
        let strangers = named
            .and_then(|()| self.put_aside_strangers(&roots, &prepared.aside))
            .and_then(|strangers| self.give_links(&roots).map(|()| strangers))
            .map_err(Broken::Midway)?;
        compare(&self.root, &self.payload, strangers).map_err(|difference| {
            Broken::Differs(io::Error::other(format!(
                "the volume does not hold what was written: {difference}"
            )))
        })
    }

    /// Makes `..data` and the links that the root lacks where no reader looks, and gives what they replace a second
    /// name.
    fn prepare<'a>(&self, roots: &BTreeSet<&'a str>) -> io::Result<Prepared<'a>> {
        let [aside, made] = [ASIDE, LINKS].map(|name| empty_directory(&self.root, name));
        let (aside, made) = (aside?, made?);
        let lacking = roots.iter().filter(|name| !is_own_link(&self.root, name));
        let link = |name, target: &str| {
            symlinkat(target, &made, name).at(name)?;
            let replaces_directory = !is_kept(&self.root, &aside, name)?;
            Ok(Link {
                name,
                replaces_directory,
            })
        };
        let data = link(DATA, &self.new)?;
        let names = lacking.map(|name| link(name, &format!("{DATA}/{name}")));
        let names = names.collect::<io::Result<_>>()?;
        Ok(Prepared {
            aside,
            made,
            data,
            names,
        })
    }

    /// Puts aside what others have put beside the content. Returns whether some of it may be left.
    fn put_aside_strangers(
        &self,
        roots: &BTreeSet<&str>,
        aside: &OwnedFd,
    ) -> io::Result<Strangers> {
        let mut strangers = Strangers::Differ;
        for name in names(self.root.as_fd())? {
            if !is_stranger(&self.root, roots, &name) {
                continue;
            }
            let moved = renameat(&self.root, name.as_c_str(), aside, name.as_c_str());
            match moved.at(name.to_string_lossy()) {
                Ok(()) => {}
                Err(error) if self.old.is_none() => return Err(error),
                // The content is whole, and the pod has it.
                Err(error) => {
                    tracing::warn!(%error, "what is no part of a volume's content could not be removed from it and stays until the next refresh");
                    strangers = Strangers::MayBe;
                }
            }
        }
        Ok(strangers)
    }

    /// Gives the links at the root to the group of the files.
    fn give_links(&self, roots: &BTreeSet<&str>) -> io::Result<()> {
        if let Some(group) = self.payload.group() {
            let group = Some(Gid::from_raw(group));
            for name in roots.iter().copied().chain([DATA]) {
                fchownat(&self.root, name, None, group, AtFlags::AT_SYMLINK_NOFOLLOW).at(name)?;
            }
        }
        Ok(())
    }

    /// Restores the former content. Needs no room in the volume, because there may be none.
    fn put_back(&self) -> io::Result<()> {
        remove_at(self.root.as_fd(), LINKS)?;
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

impl Drop for StagedContent {
    fn drop(&mut self) {
        if !self.committed {
            // The caller has an error to report already, or has given up; the next successful
            // commit removes what stays.
            let _ = remove_at(self.root.as_fd(), self.new.as_str());
            let _ = remove_dangling_links(&self.root);
        }
    }
}

/// Removes the content from before a swap. Succeeds if it is gone already, also while others remove
/// it too.
///
/// # Errors
/// The system's error, with the path.
pub fn remove(root: &OwnedFd, former: &Former) -> io::Result<()> {
    if current(root)?.as_deref() == Some(&former.0) {
        return Ok(());
    }
    remove_at(root.as_fd(), former.0.as_str())
}

/// What [`tidy`] has found beside the content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leftovers {
    /// Whether something was removed.
    pub removed: bool,
    /// Whether something is left, because it was in use a moment ago or could not be removed.
    pub left: bool,
}

/// Removes what a driver has left in a volume that ended between a swap and the removal of the former
/// content, or before a swap. The caller sees to it that nothing is being staged there.
///
/// # Errors
/// The system's error.
pub fn tidy(root: &OwnedFd) -> io::Result<Leftovers> {
    let mut found = Leftovers::default();
    let Some(present) = current(root)? else {
        return Ok(found);
    };
    let is_leftover = |name: &CStr| {
        let name = name.to_bytes();
        name != DATA.as_bytes() && name != present.as_bytes()
    };
    let leftovers = || -> io::Result<usize> {
        let names = names(root.as_fd())?.into_iter();
        Ok(names
            .filter(|name| is_hidden(name) && is_leftover(name))
            .count())
    };
    let before = leftovers()?;
    if before > 0 {
        remove_leftovers(root, |name| {
            name.to_bytes() == present.as_bytes() || is_in_grace(root, name)
        });
        let after = leftovers()?;
        found.removed = after < before;
        found.left = after > 0;
    }
    Ok(found)
}

/// Removes what others have put beside the content.
fn remove_strangers(root: &OwnedFd, payload: &Payload) -> io::Result<()> {
    let roots = payload.roots();
    for name in names(root.as_fd())? {
        if is_stranger(root, &roots, &name) {
            let shown = name.to_string_lossy();
            remove_at(root.as_fd(), name.as_c_str()).map_err(|error| about(error, &shown))?;
            let name = quoted(&shown, 80);
            tracing::info!(%name, "removed from a volume, of whose content it is no part");
        }
    }
    Ok(())
}

fn holds_name(directory: &OwnedFd, name: &str) -> bool {
    fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok()
}

/// Makes an empty directory at the root, in place of what is there.
fn empty_directory(root: &OwnedFd, name: &str) -> io::Result<OwnedFd> {
    remove_at(root.as_fd(), name).map_err(|error| about(error, name))?;
    mkdirat(root, name, Mode::S_IRWXU).at(name)?;
    open_directory(root.as_fd(), name)
}

/// Gives what has a name at the root a second one in the directory `aside`. Returns whether that is possible, or
/// nothing is there: a directory cannot have two.
fn is_kept(root: &OwnedFd, aside: &OwnedFd, name: &str) -> io::Result<bool> {
    match linkat(root, name, aside, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::ENOENT) => Ok(true),
        Err(Errno::EPERM) => Ok(false),
        Err(errno) => Err(errno).at(name),
    }
}

/// Marks a generation that was in use until now, unlike one that never was because its driver ended. From
/// now on its age is the time since it was replaced.
fn mark_replaced(root: &OwnedFd, old: &str) -> io::Result<()> {
    let old = open_directory(root.as_fd(), old)?;
    let now = TimeSpec::UTIME_NOW;
    futimens(&old, &now, &now)?;
    Ok(fchmod(&old, REPLACED)?)
}

/// Returns whether a generation has been in use.
fn was_replaced(root: &OwnedFd, name: &CStr) -> bool {
    let state = || fstat(open_directory(root.as_fd(), name)?).map_err(io::Error::from);
    is_generation(name)
        && state().is_ok_and(|is| Mode::from_bits_truncate(is.st_mode).contains(Mode::S_ISVTX))
}

/// Returns whether a generation that is not in use any more was in use a moment ago.
fn is_in_grace(root: &OwnedFd, name: &CStr) -> bool {
    let age = || {
        let directory = open_directory(root.as_fd(), name)?;
        let modified = StdFile::from(directory).metadata()?.modified()?;
        modified.elapsed().map_err(io::Error::other)
    };
    // A modification in the future is younger than any age.
    is_generation(name) && age().map_or(true, |age| age <= GRACE)
}

/// Removes hidden names at the root: former generations and what a crash left. A failure is only
/// logged, because the content is whole all the same and the next look tries again.
fn remove_leftovers(root: &OwnedFd, stays: impl Fn(&CStr) -> bool) {
    let found = match names(root.as_fd()) {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(%error, "former content could not be removed and stays until kubelet's next look");
            return;
        }
    };
    for name in found {
        if !is_hidden(&name) || name.to_bytes() == DATA.as_bytes() || stays(&name) {
            continue;
        }
        if let Err(error) = remove_at(root.as_fd(), name.as_c_str()) {
            let name = name.to_string_lossy();
            tracing::warn!(%error, %name, "former content could not be removed and stays until kubelet's next look");
        }
    }
}

fn remove_dangling_links(root: &OwnedFd) -> io::Result<()> {
    for name in names(root.as_fd())? {
        let dangles = name.to_str().is_ok_and(|name| is_own_link(root, name))
            && fstatat(root, name.as_c_str(), AtFlags::empty()).is_err_and(|e| e == Errno::ENOENT);
        if dangles {
            remove_at(root.as_fd(), name.as_c_str())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
