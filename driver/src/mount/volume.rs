//! The mount of one volume, and how to tell that it is still what is mounted at its target.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use nix::sys::{stat::fstat, statvfs::fstatvfs};

use super::{
    Here,
    table::{self, MountEntry},
};
use crate::files::open_cached;

/// The identity of a directory of a file system.
///
/// The table of mounts says more, but reading it takes the kernel as long as there are mounts on
/// the node: milliseconds for some hundreds. So it is read only for a file system that is new.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileSystemId {
    device: u64,
    inode: u64,
    /// The random number that the kernel gives a file system (Linux 5.13 and later), since it reuses
    /// the number of a device as soon as it is free. Zero on kernels that give none.
    random: u64,
}

impl FileSystemId {
    /// Returns the identity of what is mounted. One that is not a tmpfs is not asked, as it may never
    /// answer, and has no identity of its own.
    pub(super) fn of(here: &Here) -> io::Result<Self> {
        if !here.is_tmpfs()? {
            let (device, inode) = table::cached_inode(here.file.as_fd()).unwrap_or_default();
            let random = 0;
            return Ok(Self {
                device,
                inode,
                random,
            });
        }
        let is = fstat(&here.file)?;
        Ok(Self {
            device: is.st_dev,
            inode: is.st_ino,
            random: fstatvfs(&here.file)?.filesystem_id(),
        })
    }

    /// Returns whether no other file system, of now or of later, has this identity.
    pub(super) fn is_unique(&self) -> bool {
        self.random != 0
    }

    /// Opens the root of this file system without using it, if it is what lies at a target. Returns
    /// nothing if it is not, or if that cannot be told at once.
    pub fn glimpse(&self, target: &Path) -> Option<OwnedFd> {
        let file = open_cached(target)?;
        // The file system is asked only once it cannot be another one that does not answer.
        let is_here = table::cached_inode(file.as_fd())? == (self.device, self.inode)
            && self.is_unique()
            && fstatvfs(&file).ok()?.filesystem_id() == self.random;
        is_here.then_some(file)
    }
}

/// The volume at a target, held from before a provider is asked until its answer is recorded.
///
/// A provider, or another program, may meanwhile mount something over the target or take the
/// volume off. While this value exists, the kernel gives the number of the volume's file system to
/// no other.
#[derive(Debug)]
pub struct VolumeMount {
    pub(super) target: PathBuf,
    pub(super) id: FileSystemId,
    /// Opened without being used.
    pub(super) file: OwnedFd,
}

/// The mount that is found at a target.
pub(super) enum Occupant {
    Nothing,
    Volume(VolumeMount),
    /// Something that is neither this driver's nor an earlier driver's volume.
    Foreign(MountEntry),
}

impl VolumeMount {
    /// Finds what is mounted at a target. `known` is what was found to be a volume there before, and
    /// is not examined again. If the target has another mount by now, an earlier driver cannot have
    /// made it.
    pub(super) fn find(target: &Path, known: Option<FileSystemId>) -> io::Result<Occupant> {
        table::settled(|| Self::find_once(target, known))
    }

    fn find_once(target: &Path, known: Option<FileSystemId>) -> io::Result<Occupant> {
        let Some(here) = Here::open_mount(target)? else {
            return Ok(Occupant::Nothing);
        };
        let id = FileSystemId::of(&here)?;
        if !id.is_unique() || known != Some(id) {
            let entry = here.entry()?;
            let may_be_earlier = known.is_none() || !id.is_unique();
            let is_volume = entry.is_own(target)
                || may_be_earlier && entry.is_of_an_earlier_driver(target, &table::all()?);
            if !is_volume {
                return Ok(Occupant::Foreign(entry));
            }
        }
        Ok(Occupant::Volume(Self {
            target: target.to_owned(),
            id,
            file: here.file,
        }))
    }

    /// Returns the volume at a target. `known` is as for [`find`](Self::find).
    ///
    /// # Errors
    /// When nothing is mounted there, or something that is neither this driver's nor an earlier
    /// driver's volume.
    pub(super) fn at(target: &Path, known: Option<FileSystemId>) -> io::Result<Self> {
        match Self::find(target, known)? {
            Occupant::Volume(volume) => Ok(volume),
            Occupant::Nothing => Err(io::Error::other("nothing is mounted there any more")),
            Occupant::Foreign(entry) => Err(io::Error::other(format!(
                "a file system that is not a volume of this driver is mounted there ({} {:?}), so nothing was written; unmount it or replace the pod",
                entry.kind, entry.source
            ))),
        }
    }

    /// Opens the volume's root, if the volume is still what is mounted at the target. The result
    /// stays the volume's root, whatever is mounted later.
    ///
    /// # Errors
    /// Says that something was mounted over the volume or that it was unmounted, and what to do.
    pub fn open(&self) -> io::Result<OwnedFd> {
        self.open_or_instead()?.map_err(|instead| {
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
                    "the volume was unmounted from",
                    "the next attempt mounts it again",
                ),
            };
            io::Error::other(format!(
                "{happened} {target} while the provider was called, so nothing was written; {help}. Is another program, or the provider itself, mounting or unmounting below kubelet's pods directory?"
            ))
        })
    }

    /// Opens the volume's root, if the volume is still what is mounted at the target.
    ///
    /// # Errors
    /// The system's error.
    pub fn open_if_there(&self) -> io::Result<Option<OwnedFd>> {
        Ok(self.open_or_instead()?.ok())
    }

    /// Makes sure that the volume is still what is mounted at the target.
    ///
    /// # Errors
    /// The same as for [`open`](Self::open).
    pub fn check(&self) -> io::Result<()> {
        self.open().map(drop)
    }

    fn open_or_instead(&self) -> io::Result<Result<OwnedFd, Instead>> {
        table::settled(|| self.open_or_instead_once())
    }

    fn open_or_instead_once(&self) -> io::Result<Result<OwnedFd, Instead>> {
        let Some(here) = Here::open_mount(&self.target)? else {
            return Ok(Err(Instead::Nothing));
        };
        if FileSystemId::of(&here)? == self.id {
            return here.open_root().map(Ok);
        }
        let is_below = table::all()?
            .iter()
            .any(|entry| entry.point == self.target && entry.is_whole(self.id.device));
        Ok(Err(if is_below {
            Instead::Over
        } else {
            Instead::Other
        }))
    }
}

/// The mount that is at a target in the place of its volume.
enum Instead {
    Nothing,
    /// Something that covers the volume.
    Over,
    /// Something else, and the volume is not there any more.
    Other,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::{
        Tmpfs,
        alone::{Own, alone},
        tests::{bind, target},
    };
    use nix::{
        fcntl::{OFlag, openat},
        mount::{MntFlags, MsFlags, mount, umount2},
        sys::stat::Mode,
    };
    use std::fs;

    /// Tries every sequence of up to three changes.
    #[test]
    fn a_held_volume_is_opened_only_while_it_is_what_lies_at_the_target() {
        alone(Own::Mounts, || {
            let kinds = ["bind", "tmpfs", "own again", "off"];
            for number in 0..kinds.len().pow(3) {
                let row = [number % 4, number / 4 % 4, number / 16].map(|kind| kinds[kind]);
                let (root, target) = target();
                let volumes = Tmpfs::bounded_by(1);
                volumes.mount(&target).unwrap();
                fs::write(target.join("mark"), "x").unwrap();
                let held = VolumeMount::at(&target, None).unwrap();
                // The mounts at the target, the topmost last.
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
                // A volume that was there before says nothing about what is there now.
                let is_own = matches!(stack.last(), Some(&("volume" | "own again")));
                assert_eq!(volumes.refit(&target).is_ok(), is_own, "{row:?}");
                let is_there = stack.last() == Some(&"volume");
                assert_eq!(held.check().is_ok(), is_there, "{row:?}");
                let seen = held.id.glimpse(&target).is_some();
                assert_eq!(seen, is_there && held.id.is_unique(), "{row:?}");
                let open = held.open_if_there().unwrap();
                assert_eq!(open.is_some(), is_there, "{row:?}");
                if let Some(open) = open {
                    let mark = openat(&open, "mark", OFlag::O_PATH, Mode::empty());
                    assert!(mark.is_ok(), "{row:?}");
                }
                while umount2(&target, MntFlags::MNT_DETACH).is_ok() {}
            }
        });
    }
}
