//! Opens, lists and removes the entries of a directory, by descriptors and never through a link.

use std::{
    ffi::CString,
    fmt::Display,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    NixPath,
    dir::Dir,
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2, renameat},
    sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat, fstat},
    unistd::{UnlinkatFlags, unlinkat},
};

/// The number of names of a directory that are read at a time while it is cleared.
const BATCH: usize = 1024;
/// The number of attempts to remove a directory into which others keep writing.
const MOST_TRIES: usize = 100;
/// The number of directories that a removed tree may have: more than memory has room for.
const MOST_MOVES: u64 = 1 << 32;

/// Opens a directory such as the root of a volume.
///
/// # Errors
/// The system's error, with the path.
pub fn open_root(volume: &Path) -> io::Result<OwnedFd> {
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

/// Opens a path with openat2(2), which resolves no link and nothing outside of `parent`.
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
    first_names(directory, usize::MAX)
}

/// Returns the first `most` entries of a directory, without "." and "..".
pub(super) fn first_names(directory: BorrowedFd<'_>, most: usize) -> io::Result<Vec<CString>> {
    let mut dir = Dir::openat(directory, ".", directory_flags(), Mode::empty())?;
    let mut names = Vec::new();
    for entry in dir.iter() {
        let entry = entry?;
        if ![c".", c".."].contains(&entry.file_name()) {
            names.push(entry.file_name().to_owned());
        }
        if names.len() == most {
            break;
        }
    }
    Ok(names)
}

/// Removes a file, a link (not what it leads to) or a tree. Succeeds if nothing is there, also when
/// others remove the same.
///
/// A tree may have any depth and any number of entries: there are never more than three
/// descriptors and [`BATCH`] names in use. Mounts below are not entered.
///
/// # Errors
/// The system's error; EBUSY where something is mounted.
pub(super) fn remove_at<N: NixPath + ?Sized>(parent: BorrowedFd<'_>, name: &N) -> io::Result<()> {
    for _ in 0..MOST_TRIES {
        if remove_entry(parent, name)? == Removal::Gone {
            return Ok(());
        }
        if let Some(directory) = open_to_remove(parent, name)? {
            clear(directory.as_fd())?;
        }
    }
    Err(io::Error::other(
        "other processes write into it while it is removed",
    ))
}

/// Removes everything in a directory that is open, never through a link and never beyond its own
/// mount.
///
/// Subdirectories are not descended into: their entries are moved up until they are empty.
///
/// # Errors
/// The system's error; EBUSY where something is mounted.
pub fn clear(directory: BorrowedFd<'_>) -> io::Result<()> {
    let mut moved = 0;
    loop {
        let batch = present(first_names(directory, BATCH))?.unwrap_or_default();
        if batch.is_empty() {
            return Ok(());
        }
        for name in batch {
            if remove_entry(directory, name.as_c_str())? == Removal::NotEmpty
                && let Some(below) = open_to_remove(directory, name.as_c_str())?
            {
                move_up(below.as_fd(), directory, &mut moved)?;
                // If it is not empty again, the next batch has it.
                remove_entry(directory, name.as_c_str())?;
            }
        }
    }
}

/// Removes the directory of a target on which nothing is mounted, and what an interrupted publish
/// left in it. Succeeds if nothing is there.
///
/// # Errors
/// The system's error; EBUSY where something is mounted.
pub fn remove_target(target: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    match open_root(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        parent => remove_at(parent?.as_fd(), name),
    }
}

/// Removes the files of the directory `from` and moves its subdirectories into `to`.
fn move_up(from: BorrowedFd<'_>, to: BorrowedFd<'_>, moved: &mut u64) -> io::Result<()> {
    loop {
        let batch = present(first_names(from, BATCH))?.unwrap_or_default();
        if batch.is_empty() {
            return Ok(());
        }
        for name in batch {
            if remove_entry(from, name.as_c_str())? == Removal::Gone {
                continue;
            }
            loop {
                *moved += 1;
                let free = format!("..removed_{moved}");
                match renameat(from, name.as_c_str(), to, free.as_str()) {
                    Ok(()) => break,
                    // Another caller has removed `to`, and moved all of this up before.
                    Err(Errno::ENOENT) if fstat(to)?.st_nlink == 0 => return Ok(()),
                    Err(Errno::ENOENT) => break,
                    Err(Errno::EEXIST | Errno::ENOTEMPTY | Errno::ENOTDIR) => {}
                    // Renaming a directory needs the permission to write into it.
                    Err(Errno::EACCES) => drop(open_to_remove(from, name.as_c_str())?),
                    Err(errno) => return Err(errno).at(name.to_string_lossy()),
                }
                if *moved > MOST_MOVES {
                    return Err(io::Error::other(
                        "it has too many directories to be removed",
                    ));
                }
            }
        }
    }
}

/// The result of an attempt to remove an entry.
#[derive(PartialEq, Eq)]
enum Removal {
    /// It is not there any more.
    Gone,
    /// It is a directory with something in it.
    NotEmpty,
}

fn remove_entry<N: NixPath + ?Sized>(parent: BorrowedFd<'_>, name: &N) -> io::Result<Removal> {
    let unlinked = unlinkat(parent, name, UnlinkatFlags::NoRemoveDir);
    match unlinked {
        Ok(()) | Err(Errno::ENOENT) => return Ok(Removal::Gone),
        Err(Errno::EISDIR | Errno::EPERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    match unlinkat(parent, name, UnlinkatFlags::RemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(Removal::Gone),
        Err(Errno::ENOTEMPTY | Errno::EEXIST) => Ok(Removal::NotEmpty),
        // It is a file that may not be removed.
        Err(Errno::ENOTDIR) => unlinked.map(|()| Removal::Gone).map_err(Into::into),
        Err(errno) => Err(errno.into()),
    }
}

/// Opens a directory whose entries are to be removed, whatever its mode is. Returns nothing if it
/// has gone, or is no directory any more.
fn open_to_remove<N: NixPath + ?Sized>(
    parent: BorrowedFd<'_>,
    name: &N,
) -> io::Result<Option<OwnedFd>> {
    let here = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_XDEV;
    let open = |flags| {
        let how = OpenHow::new().flags(flags).resolve(here);
        present(openat2(parent, name, how).map_err(Into::into))
    };
    let opened = match open(directory_flags()) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let Some(closed) = open(directory_flags() | OFlag::O_PATH)? else {
                return Ok(None);
            };
            let path = format!("/proc/self/fd/{}", closed.as_raw_fd());
            fchmodat(
                AT_FDCWD,
                path.as_str(),
                Mode::S_IRWXU,
                FchmodatFlags::FollowSymlink,
            )?;
            open(directory_flags())?
        }
        opened => opened?,
    };
    if let Some(directory) = &opened
        && fstat(directory)?.st_mode & 0o700 != 0o700
    {
        fchmod(directory, Mode::S_IRWXU)?;
    }
    Ok(opened)
}

/// Turns the errors of an entry that has gone meanwhile into `None`.
fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error)
            if matches!(
                error.raw_os_error().map(Errno::from_raw),
                Some(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP)
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Adds to an error what it is about.
pub(super) fn about(error: io::Error, what: impl Display) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

pub(super) trait At<T> {
    /// Adds to an error the path that it is about.
    fn at(self, what: impl Display) -> io::Result<T>;
}

impl<T> At<T> for nix::Result<T> {
    fn at(self, what: impl Display) -> io::Result<T> {
        self.map_err(|errno| about(errno.into(), what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::{
        resource::{Resource, getrlimit, setrlimit},
        stat::mkdirat,
    };
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
        sync::Barrier,
    };

    use crate::mount::alone::{Own, alone};

    /// Makes a tree in which each directory holds a file and one other directory, `depth` times.
    fn deep(parent: &Path, depth: usize) {
        let mut here = open_root(parent).unwrap();
        for level in 0..depth {
            let name = if level % 3 == 0 { "d" } else { "..removed_1" };
            let flags = OFlag::O_CREAT | OFlag::O_WRONLY;
            drop(open_beneath(&here, "file", flags, Mode::S_IRWXU).unwrap());
            mkdirat(&here, name, Mode::S_IRWXU).unwrap();
            here = open_directory(here.as_fd(), name).unwrap();
        }
    }

    fn is_empty(directory: &Path) -> bool {
        fs::read_dir(directory).unwrap().next().is_none()
    }

    /// Runs in a process of its own, because the limit of descriptors is the process's.
    #[test]
    fn any_depth_and_any_number_are_removed_with_few_descriptors() {
        alone(Own::Process, || {
            let dir = tempfile::tempdir().unwrap();
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            setrlimit(Resource::RLIMIT_NOFILE, 32, hard).unwrap();
            deep(dir.path(), 2500);
            let wide = dir.path().join("wide");
            fs::create_dir(&wide).unwrap();
            for number in 0..5000 {
                fs::write(wide.join(number.to_string()), "").unwrap();
                fs::create_dir_all(dir.path().join(format!("bush/{}/{number}", number % 7)))
                    .unwrap();
            }
            remove_at(open_root(dir.path()).unwrap().as_fd(), "bush").unwrap();
            assert!(!dir.path().join("bush").exists());
            clear(open_root(dir.path()).unwrap().as_fd()).unwrap();
            assert!(is_empty(dir.path()));
        });
    }

    #[test]
    fn clearing_never_goes_through_a_link() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("kept"), "x").unwrap();
        let dir = tempfile::tempdir().unwrap();
        symlink(outside.path(), dir.path().join("out")).unwrap();
        fs::create_dir(dir.path().join("dir")).unwrap();
        symlink(outside.path(), dir.path().join("dir/out")).unwrap();
        clear(open_root(dir.path()).unwrap().as_fd()).unwrap();
        assert!(is_empty(dir.path()));
        assert!(outside.path().join("kept").exists());
    }

    #[test]
    fn directories_that_nobody_may_use_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        for (number, mode) in [0o000, 0o100, 0o400, 0o500, 0o600].into_iter().enumerate() {
            let closed = dir.path().join(number.to_string());
            fs::create_dir_all(closed.join("inner/most")).unwrap();
            fs::write(closed.join("inner/file"), "").unwrap();
            for path in [closed.join("inner"), closed] {
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            }
        }
        clear(open_root(dir.path()).unwrap().as_fd()).unwrap();
        assert!(is_empty(dir.path()));
    }

    #[test]
    fn many_may_remove_the_same_at_once() {
        for round in 0..20 {
            let dir = tempfile::tempdir().unwrap();
            let outside = tempfile::tempdir().unwrap();
            fs::write(outside.path().join("kept"), "x").unwrap();
            let tree = dir.path().join("tree");
            fs::create_dir(&tree).unwrap();
            deep(&tree, 40);
            for number in 0..200 {
                fs::create_dir_all(tree.join(format!("a/{number}/b"))).unwrap();
                fs::write(tree.join(format!("a/{number}/file")), "").unwrap();
            }
            symlink(outside.path(), tree.join("a/7/out")).unwrap();
            let barrier = Barrier::new(4);
            std::thread::scope(|scope| {
                let runs = [0, 1, 2, 3].map(|number| {
                    let (barrier, dir) = (&barrier, dir.path());
                    scope.spawn(move || {
                        let root = open_root(dir).unwrap();
                        barrier.wait();
                        match number {
                            0 => clear(root.as_fd()),
                            _ => remove_at(root.as_fd(), "tree"),
                        }
                    })
                });
                for run in runs {
                    run.join()
                        .unwrap()
                        .unwrap_or_else(|error| panic!("round {round}: {error}"));
                }
            });
            assert!(is_empty(dir.path()));
            assert!(outside.path().join("kept").exists());
        }
    }
}
