//! Changes that providers and other programs make at a target.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::harness::read_only;

/// A change at a target.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// Mounts this directory over it.
    Binds(PathBuf),
    /// Mounts a tmpfs over it.
    MountsTmpfs,
    /// Mounts a tmpfs over it that looks like a volume with one file.
    MountsVolume(&'static str, &'static str),
    /// Unmounts the volume.
    Unmounts,
    /// Unmounts the volume and writes a file into the directory below.
    UnmountsAndWrites,
    /// Makes a pipe of this name.
    MakesPipe(&'static str),
    /// Makes a device of this name.
    MakesDevice(&'static str),
    /// Makes a directory of this name and mounts a tmpfs there.
    MountsBelow(&'static str),
    /// Makes the volume read-only.
    MakesReadOnly,
    /// Fills the volume with a file of this name.
    Fills(&'static str),
    /// Makes a directory of this name.
    MakesDirectory(&'static str),
    /// Makes a symbolic link of this name to the second path.
    MakesLink(&'static str, &'static str),
}

impl Act {
    pub(crate) fn carry_out(&self, target: &Path) {
        let no: Option<&str> = None;
        let unmount = || umount2(target, MntFlags::MNT_DETACH).unwrap();
        match self {
            Self::Binds(directory) => {
                mount(Some(directory), target, no, MsFlags::MS_BIND, no).unwrap();
            }
            Self::MountsTmpfs => {
                let kind = Some("tmpfs");
                mount(kind, target, kind, MsFlags::empty(), no).unwrap();
                fs::write(target.join("foreign"), "foreign").unwrap();
            }
            Self::MountsVolume(name, text) => {
                let kind = Some("tmpfs");
                mount(kind, target, kind, MsFlags::empty(), no).unwrap();
                let link = std::os::unix::fs::symlink::<&str, PathBuf>;
                fs::create_dir(target.join("..2026_01_01_00_00_00.1")).unwrap();
                fs::write(target.join("..2026_01_01_00_00_00.1").join(name), text).unwrap();
                link("..2026_01_01_00_00_00.1", target.join("..data")).unwrap();
                link(&format!("..data/{name}"), target.join(name)).unwrap();
            }
            Self::Unmounts => unmount(),
            Self::UnmountsAndWrites => {
                unmount();
                fs::write(target.join("foreign"), "foreign").unwrap();
            }
            Self::MakesPipe(name) => {
                nix::unistd::mkfifo(&target.join(name), nix::sys::stat::Mode::S_IRWXU).unwrap();
            }
            Self::MakesDevice(name) => make_device(&target.join(name)).unwrap(),
            Self::MountsBelow(name) => {
                let (below, kind) = (target.join(name), Some("tmpfs"));
                fs::create_dir(&below).unwrap();
                mount(kind, &below, kind, MsFlags::empty(), no).unwrap();
            }
            Self::MakesReadOnly => read_only(target, true),
            Self::Fills(name) => {
                let mut file = fs::File::create(target.join(name)).unwrap();
                while file.write_all(&[7; 4096]).is_ok() {}
            }
            Self::MakesDirectory(name) => fs::create_dir(target.join(name)).unwrap(),
            Self::MakesLink(name, to) => {
                std::os::unix::fs::symlink(to, target.join(name)).unwrap();
            }
        }
    }
}

/// Makes a device. Fails if this user may not.
pub(crate) fn make_device(at: &Path) -> nix::Result<()> {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    mknod(at, SFlag::S_IFCHR, Mode::S_IRWXU, makedev(1, 3))
}
