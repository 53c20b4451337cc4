//! The target path of a Mount: the directory in which a provider may write files.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use proto::provider::File;
use tonic::Status;

use super::answer::{MOST_FILES, MOST_LEVELS};
use super::subject::PERMISSION;

/// The number of bytes that are read of the files that a provider writes itself.
const MOST_BYTES: u64 = 64 << 20;

/// A target path. Dropping it removes the directory with everything in it.
pub(super) struct Target(PathBuf);

impl Target {
    /// Makes the directory, which only its owner can enter. Fails if anything is at the path already.
    pub(super) fn create(path: PathBuf) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        // Links and mounts are compared with it.
        fs::canonicalize(path).map(Self)
    }

    pub(super) fn path(&self) -> String {
        self.0.display().to_string()
    }

    /// Writes files as the driver does. Those that cannot be written break a rule, for which there
    /// is another check.
    pub(super) fn fill(&self, files: &[File]) {
        for file in files {
            let _ = self.write(file);
        }
    }

    fn write(&self, file: &File) -> io::Result<()> {
        let below = Path::new(&file.path);
        if !below
            .components()
            .all(|c| matches!(c, Component::Normal(_)))
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let path = self.0.join(below);
        fs::create_dir_all(path.parent().unwrap_or(&self.0))?;
        let mode = match file.mode.cast_unsigned() & 0o777 {
            0 => PERMISSION,
            mode => mode | 0o400,
        };
        let mut options = fs::OpenOptions::new();
        let mut new = options.write(true).create_new(true).mode(mode).open(path)?;
        new.write_all(&file.contents)
    }

    /// Returns the files below the target path, through links, as a pod would read them.
    pub(super) fn files(&self) -> Result<Vec<File>, Status> {
        let (mut files, mut room) = (Vec::new(), MOST_BYTES);
        let read = self.mounts().and_then(|mounts| match mounts.first() {
            None => collect(&self.0, &self.0, "", &mut files, &mut room),
            Some(mount) => {
                let reason = format!("something is mounted at {}", mount.display());
                Err(io::Error::other(reason))
            }
        });
        match read {
            Ok(()) => Ok(files),
            Err(error) => Err(Status::internal(format!(
                "cannot read what is below the target path: {error}"
            ))),
        }
    }

    /// Returns what is mounted at the target path or below it, the deepest first.
    fn mounts(&self) -> io::Result<Vec<PathBuf>> {
        let table = fs::read_to_string("/proc/thread-self/mountinfo")?;
        let points = table.lines().filter_map(|line| line.split(' ').nth(4));
        let mut mounts: Vec<_> = points.map(decoded).collect();
        mounts.retain(|mount| mount.starts_with(&self.0));
        mounts.sort_by_key(|mount| std::cmp::Reverse(mount.components().count()));
        Ok(mounts)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let detach = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        for mount in self.mounts().unwrap_or_default() {
            let _ = umount2(&mount, detach);
        }
        // The content of what is still mounted belongs to others.
        if self.mounts().is_ok_and(|left| left.is_empty()) {
            // It fails if the provider made files that only another user can remove.
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// Returns a path of the table of mounts, in which spaces and others are octal numbers.
fn decoded(path: &str) -> PathBuf {
    let mut parts = path.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let number = part
            .get(..3)
            .and_then(|number| u8::from_str_radix(number, 8).ok());
        match number {
            Some(byte) => {
                bytes.push(byte);
                bytes.extend_from_slice(&part.as_bytes()[3..]);
            }
            None => bytes.extend([b"\\", part.as_bytes()].concat()),
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

/// Adds the files below a directory of a target path. `room` is the number of bytes that may be read.
fn collect(
    root: &Path,
    dir: &Path,
    prefix: &str,
    files: &mut Vec<File>,
    room: &mut u64,
) -> io::Result<()> {
    // One level and one file too many are read, for the checks that count them.
    if prefix.matches('/').count() > MOST_LEVELS {
        let reason = format!("there are more than {MOST_LEVELS} levels");
        return Err(io::Error::other(reason));
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = format!("{prefix}{}", entry.file_name().to_string_lossy());
        // Directories behind `..data` hold what the links show.
        if path.starts_with("..") {
            continue;
        }
        if files.len() > MOST_FILES {
            return Ok(());
        }
        let found = fs::canonicalize(entry.path())?;
        if !found.starts_with(root) {
            let reason = format!("{path:?} leads out of the target path");
            return Err(io::Error::other(reason));
        }
        let metadata = fs::metadata(&found)?;
        if metadata.is_dir() {
            collect(root, &entry.path(), &format!("{path}/"), files, room)?;
            continue;
        }
        // Reading from anything else may never end.
        if !metadata.is_file() {
            let reason = format!("{path:?} is neither a file nor a directory");
            return Err(io::Error::other(reason));
        }
        let mut contents = Vec::new();
        let read = fs::File::open(&found)?
            .take(*room + 1)
            .read_to_end(&mut contents)?;
        *room = room.checked_sub(read as u64).ok_or_else(|| {
            io::Error::other(format!("the files have more than {MOST_BYTES} bytes"))
        })?;
        files.push(File {
            path,
            mode: (metadata.permissions().mode() & 0o7777).cast_signed(),
            contents,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    const NONE: Option<&str> = None;

    #[test]
    fn what_a_provider_mounts_keeps_its_files() {
        // This thread gets mounts of its own.
        let work = || {
            if let Err(error) = unshare(CloneFlags::CLONE_NEWNS) {
                println!("skipped: only root may mount ({error})");
                return;
            }
            mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let victim = dir.path().join("victim");
            fs::create_dir(&victim).unwrap();
            fs::write(victim.join("file"), "x").unwrap();
            let target = Target::create(dir.path().join("a target")).unwrap();
            for below in ["d", "d/e", "f"] {
                let at = target.0.join(below);
                fs::create_dir_all(&at).unwrap();
                mount(Some(&victim), &at, NONE, MsFlags::MS_BIND, NONE).unwrap();
                fs::create_dir_all(victim.join("e")).unwrap();
            }
            let error = target.files().unwrap_err();
            assert!(error.message().contains("mounted at"), "{error}");
            let path = target.0.clone();
            drop(target);
            assert!(victim.join("file").exists());
            assert!(!path.exists());
        };
        std::thread::spawn(work).join().unwrap();
    }

    #[test]
    fn links_lead_nowhere_else_and_reading_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let target = Target::create(dir.path().join("target")).unwrap();
        let fails = |says: &str| {
            let error = target.files().unwrap_err();
            assert!(error.message().contains(says), "{error}");
        };
        let link = target.0.join("link");
        for outside in ["/proc/kmsg", "/etc", ".."] {
            std::os::unix::fs::symlink(outside, &link).unwrap();
            fails("leads out");
            fs::remove_file(&link).unwrap();
        }
        let large = fs::File::create(target.0.join("large")).unwrap();
        large.set_len(MOST_BYTES).unwrap();
        assert_eq!(target.files().unwrap().len(), 1);
        fs::write(target.0.join("more"), "x").unwrap();
        fails("more than");
    }

    #[test]
    fn paths_in_the_table_of_mounts_are_decoded() {
        assert_eq!(decoded("/a\\040b\\134é\\9"), Path::new("/a b\\é\\9"));
    }
}
