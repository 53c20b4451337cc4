//! Gives files that a provider wrote itself the group of their volume, and its default mode.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat},
    unistd::{Gid, fchown, fchownat},
};

use super::{
    Access, DEFAULT_MODE,
    tree::{about, first_names},
};

/// The most levels of directories that are entered: those of a path, and the hidden directory of an
/// atomic writer. Nothing else bounds what a provider writes itself.
const DEEPEST: usize = 33;
/// The most files and directories that are changed.
const MOST_ENTRIES: usize = 20_000;

/// Gives everything in a volume, whose root is open, the volume's group. Files that have the mode
/// that providers are asked for get the volume's default mode; another mode is one that the provider
/// chose. Links are not followed, and mounts below are left alone.
///
/// # Errors
/// The system's error, with the name, or that there are too many or too deep directories.
pub fn grant(root: &OwnedFd, access: Access) -> io::Result<()> {
    let mut left = MOST_ENTRIES;
    below(root, access, &mut left, 0)
}

fn below(directory: &OwnedFd, access: Access, left: &mut usize, depth: usize) -> io::Result<()> {
    give_group(directory, &fstat(directory)?, access)?;
    for name in first_names(directory.as_fd(), *left + 1)? {
        *left = left.checked_sub(1).ok_or_else(|| {
            io::Error::other(format!(
                "the provider wrote more than {MOST_ENTRIES} files and directories"
            ))
        })?;
        entry(directory, &name, access, left, depth)
            .map_err(|error| about(error, format!("{name:?}")))?;
    }
    Ok(())
}

fn entry(
    directory: &OwnedFd,
    name: &CStr,
    access: Access,
    left: &mut usize,
    depth: usize,
) -> io::Result<()> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_XDEV,
        );
    let file = match openat2(directory, name, how) {
        Ok(file) => file,
        Err(Errno::ELOOP) => return give_link(directory, name, access),
        // It has gone meanwhile, or is a mount, a socket, or a device without a driver.
        Err(Errno::ENOENT | Errno::EXDEV | Errno::ENXIO | Errno::ENODEV) => return Ok(()),
        Err(errno) => return Err(not_opened(directory, name, errno)),
    };
    let stat = fstat(&file)?;
    match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFDIR if depth == DEEPEST => Err(io::Error::other(
            "the provider wrote directories that are deeper than 32 levels",
        )),
        SFlag::S_IFDIR => below(&file, access, left, depth + 1),
        SFlag::S_IFREG => {
            give_group(&file, &stat, access)?;
            if stat.st_mode & 0o7777 == DEFAULT_MODE && access.default_mode != DEFAULT_MODE {
                fchmod(&file, Mode::from_bits_truncate(access.default_mode))?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Returns the error of an entry that cannot be opened. A volume is mounted without devices.
fn not_opened(directory: &OwnedFd, name: &CStr, errno: Errno) -> io::Error {
    let kind = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)
        .map(|stat| SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()));
    match kind {
        Ok(SFlag::S_IFCHR | SFlag::S_IFBLK) => io::Error::new(
            io::ErrorKind::InvalidData,
            "the provider made a device there; a provider may write only regular files, directories and links",
        ),
        _ => errno.into(),
    }
}

fn give_group(file: &OwnedFd, stat: &FileStat, access: Access) -> io::Result<()> {
    match access.group {
        Some(group) if stat.st_gid != group => Ok(fchown(file, None, Some(Gid::from_raw(group)))?),
        _ => Ok(()),
    }
}

fn give_link(directory: &OwnedFd, name: &CStr, access: Access) -> io::Result<()> {
    let Some(group) = access.group.map(Gid::from_raw) else {
        return Ok(());
    };
    match fchownat(
        directory,
        name,
        None,
        Some(group),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    ) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tree::open_root;
    use nix::{
        mount::{MsFlags, mount},
        unistd::{getegid, geteuid, mkfifo},
    };
    use proptest::prelude::*;
    use std::{
        fs,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
        path::Path,
    };

    use crate::{
        files::generated,
        mount::alone::{Own, alone},
    };

    fn grant(volume: &Path, access: Access) -> io::Result<()> {
        super::grant(&open_root(volume)?, access)
    }

    /// Returns a group that this user may give files to, another than their own if possible.
    fn group() -> u32 {
        if geteuid().is_root() {
            1004
        } else {
            getegid().as_raw()
        }
    }

    fn of(path: &Path) -> (u32, u32) {
        let metadata = fs::symlink_metadata(path).unwrap();
        (metadata.mode() & 0o7777, metadata.gid())
    }

    proptest! {
        #![proptest_config(ProptestConfig { max_shrink_iters: 300, ..ProptestConfig::with_cases(24) })]
        #[test]
        fn files_get_the_group_and_the_mode_that_nobody_chose(
            files in generated::files(),
            default_mode in prop::sample::select(&[0o400, 0o440, 0o644, 0o640][..]),
            hidden in any::<bool>(),
        ) {
            let volume = tempfile::tempdir().unwrap();
            // In the directory of an atomic writer, or directly at the root.
            let base = if hidden { "..2026_11_25" } else { "." };
            for (path, (content, mode)) in &files {
                let path = volume.path().join(base).join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(&path, content).unwrap();
                let mode = if *mode == 0 { 0o644 } else { mode.cast_unsigned() };
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            }
            let access = Access { default_mode, group: Some(group()) };
            for _ in 0..2 {
                grant(volume.path(), access).unwrap();
                for (path, (content, mode)) in &files {
                    let path = volume.path().join(base).join(path);
                    let mode = if *mode == 0 { default_mode } else { mode.cast_unsigned() };
                    prop_assert_eq!(of(&path), (mode, group()), "{:?}", path);
                    prop_assert_eq!(of(path.parent().unwrap()).1, group());
                    prop_assert_eq!(&fs::read(&path).unwrap(), content);
                }
            }
            prop_assert_eq!(of(volume.path()).1, group());
        }
    }

    #[test]
    fn neither_links_nor_mounts_lead_out_and_pipes_hold_nobody_up() {
        alone(Own::Mounts, || {
            let dir = tempfile::tempdir().unwrap();
            let (volume, outside) = (dir.path().join("volume"), dir.path().join("outside"));
            fs::create_dir_all(volume.join("mounted")).unwrap();
            fs::create_dir_all(&outside).unwrap();
            let kept = outside.join("kept");
            fs::write(&kept, "x").unwrap();
            fs::set_permissions(&kept, fs::Permissions::from_mode(0o644)).unwrap();
            symlink(&kept, volume.join("link")).unwrap();
            symlink(&outside, volume.join("..data")).unwrap();
            mkfifo(&volume.join("pipe"), Mode::S_IRWXU).unwrap();
            drop(std::os::unix::net::UnixListener::bind(volume.join("socket")).unwrap());
            let below = volume.join("mounted");
            mount(
                Some(&outside),
                &below,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .unwrap();
            fs::write(volume.join("own"), "x").unwrap();
            fs::set_permissions(volume.join("own"), fs::Permissions::from_mode(0o644)).unwrap();
            let before = (of(&outside), of(&kept));
            // The namespace of an ordinary user has one group.
            let group = fs::metadata(&volume).unwrap().gid();
            let group = if fs::read_to_string("/proc/self/uid_map")
                .unwrap()
                .contains("4294967295")
            {
                1004
            } else {
                group
            };
            grant(
                &volume,
                Access {
                    default_mode: 0o400,
                    group: Some(group),
                },
            )
            .unwrap();
            assert_eq!((of(&outside), of(&kept)), before);
            assert_eq!(of(&volume.join("own")), (0o400, group));
            assert_eq!(of(&volume.join("link")).1, group);
        });
    }

    #[test]
    fn more_than_a_volume_of_secrets_is_refused() {
        let volume = tempfile::tempdir().unwrap();
        let mut deep = volume.path().to_owned();
        deep.extend(std::iter::repeat_n("d", DEEPEST + 1));
        fs::create_dir_all(deep).unwrap();
        let error = grant(volume.path(), Access::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("deeper than 32"), "{error}");
    }
}
