//! Reads what lies at the root of a volume.
//!
//! The layout is the one that kubelet's own atomic writer makes
//! (`pkg/volume/util/atomic_writer.go` in Kubernetes), which readers know:
//!
//! ```text
//! password -> ..data/password
//! ..data   -> ..2026_11_23_16_19_05.123456789
//! ..2026_11_23_16_19_05.123456789/password
//! ```
//!
//! A directory that is named after a moment is a generation: the content of the volume from that
//! moment on. Every name that starts with `..` is hidden: no path of a payload has one.
//!
//! Kubelet itself makes directories in a volume: where a container mounts a `subPath` that is not there.
//! They are no content, and stay, because they are bound into the container.
//!
//! A new volume has the hidden file `..unfinished` until its first content is whole. The record of an
//! earlier mount, from before the node lost its power, says nothing about such a volume.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::stat::{Mode, SFlag, fstat, fstatat},
};

use super::{
    MAX_DEPTH,
    tree::{At as _, about, first_names, names, open_directory, remove_at},
};

/// The link that leads to the current generation.
pub(super) const DATA: &str = "..data";

/// The file that says that the first content of a volume is not whole.
const UNFINISHED: &str = "..unfinished";

/// The most entries of a directory that nobody fills: one for each `subPath` of a pod below it.
const MOST_BARE: usize = 1000;

/// Marks a new volume, before anything is written into it.
///
/// # Errors
/// The system's error.
pub fn begin(root: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW;
    let created = openat(root, UNFINISHED, flags | OFlag::O_CLOEXEC, Mode::empty());
    created.map(drop).at(UNFINISHED)
}

/// Takes the mark off a volume whose content is whole. A volume without it stays as it is.
///
/// # Errors
/// The system's error.
pub fn finish(root: &OwnedFd) -> io::Result<()> {
    remove_at(root.as_fd(), UNFINISHED).map_err(|error| about(error, UNFINISHED))
}

/// Returns whether the first content of a volume is not whole.
///
/// # Errors
/// When the volume cannot be examined.
pub fn is_unfinished(root: &OwnedFd) -> io::Result<bool> {
    match fstatat(root, UNFINISHED, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno).at(UNFINISHED),
    }
}

/// Returns whether committed content has all its names at the root. A driver that is stopped in the
/// middle of a swap leaves new ones out.
///
/// # Errors
/// When the volume cannot be examined.
pub fn is_linked(root: &OwnedFd) -> io::Result<bool> {
    let Some(current) = current(root)? else {
        return Ok(false);
    };
    let content = match open_directory(root.as_fd(), current.as_str()) {
        Err(error) if is_no_directory(&error) => return Ok(false),
        content => content.map_err(|error| about(error, DATA))?,
    };
    let names = names(content.as_fd())?;
    let is_linked = |name: &CString| name.to_str().is_ok_and(|name| is_own_link(root, name));
    let is_in_order =
        |name: &CString| is_hidden(name) || is_linked(name) || is_bare(content.as_fd(), name);
    Ok(names.iter().all(is_in_order))
}

/// Returns whether content has been committed: `..data` leads to a directory.
///
/// # Errors
/// When the volume cannot be examined.
pub fn is_complete(root: &OwnedFd) -> io::Result<bool> {
    let current = current(root)?;
    Ok(current.is_some_and(|name| open_directory(root.as_fd(), name.as_str()).is_ok()))
}

/// Returns whether a volume has nothing that a pod takes for content. Hidden names do not count,
/// except for what `..data` leads to.
///
/// # Errors
/// When the volume cannot be listed.
pub fn is_empty(root: &OwnedFd) -> io::Result<bool> {
    if !all_hidden(root)? {
        return Ok(false);
    }
    let Some(name) = current(root)? else {
        return Ok(true);
    };
    match open_directory(root.as_fd(), name.as_str()) {
        Ok(content) => all_hidden(&content),
        Err(error) if is_no_directory(&error) => Ok(true),
        Err(error) => Err(about(error, DATA)),
    }
}

fn is_no_directory(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP))
}

fn all_hidden(directory: &OwnedFd) -> io::Result<bool> {
    Ok(names(directory.as_fd())?.iter().all(|name| is_hidden(name)))
}

/// Returns whether something at the root was written neither by the driver nor by kubelet: files of a
/// provider that writes them itself.
///
/// # Errors
/// When the volume cannot be listed.
pub fn has_foreign_entries(root: &OwnedFd) -> io::Result<bool> {
    let names = names(root.as_fd())?;
    let is_foreign = |name: &CString| !is_own(root, name) && !is_bare(root.as_fd(), name);
    Ok(names.iter().any(is_foreign))
}

/// Returns whether an entry is a directory with nothing but directories below it, and none of them a
/// mount. Kubelet makes one where a container mounts a `subPath` that is not there. No payload has one,
/// and a container cannot write into it.
pub(super) fn is_bare(parent: BorrowedFd<'_>, name: &CStr) -> bool {
    let bare = || {
        let device = fstat(parent)?.st_dev;
        let mut left = MOST_BARE;
        is_bare_below(parent, name, device, &mut left, 0)
    };
    // What cannot be examined is taken for something else.
    bare().unwrap_or(false)
}

fn is_bare_below(
    parent: BorrowedFd<'_>,
    name: &CStr,
    device: u64,
    left: &mut usize,
    depth: usize,
) -> io::Result<bool> {
    let stat = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    if kind != SFlag::S_IFDIR || stat.st_dev != device || *left == 0 || depth > MAX_DEPTH {
        return Ok(false);
    }
    *left -= 1;
    let directory = open_directory(parent, name)?;
    for below in first_names(directory.as_fd(), *left + 1)? {
        if !is_bare_below(directory.as_fd(), &below, device, left, depth + 1)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes what the driver wrote, and leaves what a provider wrote beside it.
///
/// # Errors
/// The system's error, with the path.
pub fn remove_own(root: &OwnedFd) -> io::Result<()> {
    for name in names(root.as_fd())? {
        if is_own(root, &name) {
            remove_at(root.as_fd(), name.as_c_str())?;
        }
    }
    Ok(())
}

/// Returns whether the driver makes entries of this name and kind at the root.
fn is_own(root: &OwnedFd, name: &CStr) -> bool {
    let is_link = || name.to_str().is_ok_and(|name| is_own_link(root, name));
    is_hidden(name) || is_link()
}

/// Returns a name for a generation like kubelet's, which sorts by time.
pub(super) fn fresh_name() -> String {
    jiff::Timestamp::now()
        .strftime("..%Y_%m_%d_%H_%M_%S.%9f")
        .to_string()
}

/// Returns whether a name at the root is one that [`fresh_name`] makes.
pub(super) fn is_generation(name: &CStr) -> bool {
    name.to_bytes()
        .strip_prefix(b"..")
        .and_then(<[u8]>::first)
        .is_some_and(u8::is_ascii_digit)
}

/// Returns whether a name at the root is reserved for the driver.
pub(super) fn is_hidden(name: &CStr) -> bool {
    name.to_bytes().starts_with(b"..")
}

/// Returns the name that `..data` leads to, if it is that of a generation beside it. Anything else is not of a
/// driver, and is no content.
pub(super) fn current(root: &OwnedFd) -> io::Result<Option<String>> {
    match readlinkat(root, DATA) {
        Ok(target) => Ok(target
            .into_string()
            .ok()
            .filter(|name| !name.contains('/'))
            .filter(|name| CString::new(name.as_str()).is_ok_and(|name| is_generation(&name)))),
        Err(Errno::ENOENT | Errno::EINVAL) => Ok(None),
        Err(errno) => Err(errno).at(DATA),
    }
}

/// Returns whether `name` at the root is a link to `..data/name`.
pub(super) fn is_own_link(root: &OwnedFd, name: &str) -> bool {
    readlinkat(root, name).is_ok_and(|target| {
        target
            .to_str()
            .and_then(|target| target.strip_prefix(DATA)?.strip_prefix('/'))
            == Some(name)
    })
}
