//! Opens, lists and removes what lies below a directory, by descriptors and never through a link.

use std::{
    ffi::CString,
    fmt::Display,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    NixPath,
    dir::Dir,
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2},
    sys::stat::Mode,
    unistd::{UnlinkatFlags, unlinkat},
};

pub(super) fn open_root(volume: &Path) -> io::Result<OwnedFd> {
    nix::fcntl::open(volume, directory_flags(), Mode::empty()).at(volume.display())
}

fn directory_flags() -> OFlag {
    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
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

/// Returns the entries of a directory, without "." and "..".
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

/// Removes a file, a link (not what it leads to) or a tree. Nothing there is success.
pub(super) fn remove_at<N: NixPath + ?Sized>(parent: BorrowedFd<'_>, name: &N) -> io::Result<()> {
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

pub(super) fn about(error: io::Error, what: impl Display) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

pub(super) trait At<T> {
    /// Says which path an error is about.
    fn at(self, what: impl Display) -> io::Result<T>;
}

impl<T> At<T> for nix::Result<T> {
    fn at(self, what: impl Display) -> io::Result<T> {
        self.map_err(|errno| about(errno.into(), what))
    }
}
