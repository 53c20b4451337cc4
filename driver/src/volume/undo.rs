//! Takes volumes down: those that are unpublished, and those that a publish has not finished.

use std::{
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use crate::{
    files,
    mount::{self, Detached},
};

/// The number of mounts that may lie on top of each other at one target. Earlier drivers could stack
/// them.
const MAX_STACKED: usize = 32;

/// Takes down the mount that a publish makes, when this is dropped.
pub(super) struct Undo {
    target: PathBuf,
    armed: bool,
}

impl Undo {
    /// Takes down what is at this target, unless [`forget`](Self::forget) is called.
    pub(super) fn of(target: PathBuf) -> Self {
        Self {
            target,
            armed: true,
        }
    }

    /// Keeps the mount: the publish has succeeded.
    pub(super) fn forget(mut self) {
        self.armed = false;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = take_down(&self.target)
        {
            tracing::warn!(target_path = %self.target.display(), %error, "a failed publish could not be undone; the next publish or unpublish tries again");
        }
    }
}

/// Removes mounts, content and directory at a target path, never through a link and never beyond
/// the driver's own mount.
///
/// Everything that is mounted there is taken off first. A mount that is not the driver's keeps its
/// files, also if its file system does not answer. The driver's own tmpfs is emptied after that, for
/// processes that still use it.
pub(super) fn take_down(target: &Path) -> io::Result<()> {
    for _ in 0..MAX_STACKED {
        match mount::detach(target)? {
            Detached::Own(volume) => {
                // It is mounted nowhere any more, and its memory is freed with its last user.
                if let Err(error) = files::clear(volume.as_fd()) {
                    tracing::warn!(target_path = %target.display(), %error, "a volume was unmounted, but its files could not be removed; processes that still use it can read them");
                }
            }
            Detached::Foreign => {
                tracing::info!(target_path = %target.display(), "unmounted a mount that this driver did not make, and left its files alone");
            }
            Detached::Nothing => {
                mount::detach_below(target)?;
                return files::remove_target(target);
            }
        }
    }
    Err(io::Error::other(
        "too many mounts are stacked to unmount all of them in one call; the next call continues",
    ))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::mount::Tmpfs;
    use crate::mount::alone::{Own, alone};

    const VOLUME: &str = "pods/u-1/volumes/kubernetes.io~csi/v/mount";

    /// The mounts that another program may have made at a target, or below it.
    const LAYERS: [&str; 8] = [
        "own",
        "own with content",
        "tmpfs",
        "bind",
        "bind of a tmpfs",
        "bind of a volume",
        "another kind",
        "below",
    ];

    fn mounted(program: &str, args: &[&std::ffi::OsStr]) {
        let output = std::process::Command::new(program)
            .args(args)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn put(layer: &str, root: &Path, target: &Path) {
        let mount = |args: &[&std::ffi::OsStr]| mounted("mount", args);
        let (t, s) = (target.as_os_str(), |text: &'static str| {
            std::ffi::OsStr::new(text)
        });
        let kept = root.join("kept");
        match layer {
            "own" => drop(Tmpfs::bounded_by(1).mount(target).unwrap()),
            "own with content" => {
                Tmpfs::bounded_by(1).mount(target).unwrap();
                fs::create_dir(target.join("..2026")).unwrap();
                fs::write(target.join("..2026/file"), "x").unwrap();
            }
            "tmpfs" => mount(&[s("-t"), s("tmpfs"), s("tmpfs"), t]),
            "bind" => mount(&[s("--bind"), kept.join("host").as_os_str(), t]),
            "bind of a tmpfs" => mount(&[s("--bind"), kept.join("tmpfs").as_os_str(), t]),
            "bind of a volume" => mount(&[s("--bind"), kept.join(VOLUME).as_os_str(), t]),
            "another kind" => mount(&[s("-t"), s("ramfs"), s("x"), t]),
            "below" => {
                let below = target.join("below");
                fs::create_dir_all(&below).unwrap();
                mount(&[
                    s("--bind"),
                    kept.join("host").as_os_str(),
                    below.as_os_str(),
                ]);
            }
            other => unreachable!("{other}"),
        }
    }

    /// Tries every sequence of up to two layers, and sequences of all of them.
    #[test]
    fn what_is_mounted_at_a_target_is_taken_off_and_keeps_its_files() {
        alone(Own::Mounts, || {
            let root = tempfile::tempdir().unwrap();
            let kept = root.path().join("kept");
            let other_volume = kept.join(VOLUME);
            for directory in [
                kept.join("host/deep"),
                kept.join("tmpfs"),
                other_volume.clone(),
            ] {
                fs::create_dir_all(directory).unwrap();
            }
            mounted(
                "mount",
                &[
                    "-t".as_ref(),
                    "tmpfs".as_ref(),
                    "tmpfs".as_ref(),
                    kept.join("tmpfs").as_os_str(),
                ],
            );
            Tmpfs::bounded_by(1).mount(&other_volume).unwrap();
            let files = ["host/file", "host/deep/file", "tmpfs/file"].map(|file| kept.join(file));
            let files = files
                .into_iter()
                .chain([other_volume.join("file")])
                .collect::<Vec<_>>();
            for file in &files {
                fs::write(file, "kept").unwrap();
            }
            let target = root.path().join(VOLUME);
            let mut rows: Vec<Vec<&str>> = vec![vec![]];
            for first in LAYERS {
                rows.push(vec![first]);
                rows.extend(LAYERS.map(|second| vec![first, second]));
            }
            rows.push(LAYERS.to_vec());
            rows.push(LAYERS.into_iter().rev().collect());
            for row in rows {
                fs::create_dir_all(&target).unwrap();
                fs::write(target.join("left over"), "x").unwrap();
                for layer in &row {
                    put(layer, root.path(), &target);
                }
                take_down(&target).unwrap_or_else(|error| panic!("{row:?}: {error}"));
                assert!(!target.exists(), "{row:?}");
                for file in &files {
                    assert_eq!(fs::read(file).unwrap(), b"kept", "{row:?} {file:?}");
                }
                take_down(&target).unwrap();
            }
        });
    }

    #[test]
    fn a_volume_that_is_still_held_is_emptied() {
        alone(Own::Mounts, || {
            let root = tempfile::tempdir().unwrap();
            let target = root.path().join(VOLUME);
            fs::create_dir_all(&target).unwrap();
            put("own with content", root.path(), &target);
            let elsewhere = root.path().join("elsewhere");
            fs::create_dir(&elsewhere).unwrap();
            mounted(
                "mount",
                &["--bind".as_ref(), target.as_os_str(), elsewhere.as_os_str()],
            );
            take_down(&target).unwrap();
            assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
        });
    }
}
