//! Reads a volume's content back, for whoever mirrors it.
//!
//! What a provider wrote itself is read as well as what the driver wrote, so nothing that lies
//! there is trusted: no link is followed, but for the one at the root by which an atomic writer
//! names the current content, and that only to a directory beside it.

use std::{
    collections::BTreeMap,
    fs::File as StdFile,
    io::{self, Read as _},
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    time::SystemTime,
};

use jiff::{Timestamp, civil::DateTime, tz::TimeZone};
use nix::{fcntl::OFlag, sys::stat::Mode};

use super::{
    layout::current,
    tree::{names, open_beneath, open_directory, open_root},
};
use crate::secret::Secret;

/// No directories deeper than this, and no more files: a provider's own writing has no bounds.
const DEEPEST: usize = 32;
const MOST_FILES: usize = 10_000;

/// Which of a volume's contents one is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// The name of the directory that `..data` leads to; empty where there is none, because a
    /// provider wrote the files itself.
    pub directory: String,
    /// When the content came to be as it is: looking at it or writing the same again does not
    /// change that.
    pub since: Timestamp,
}

/// A volume's content at one moment.
pub struct Snapshot {
    /// Contents by path.
    pub files: BTreeMap<String, Secret>,
    /// Whether everything that was wanted is there. Otherwise it is more than was to be read.
    pub is_all: bool,
    /// Which content it is.
    pub version: Version,
}

/// Reads the files of a volume whose path `wanted` says yes to, as long as they have no more than
/// `most_bytes` together.
///
/// # Errors
/// What the system says. NotFound also when the content was replaced meanwhile; trying again
/// helps.
pub fn snapshot(
    volume: &Path,
    most_bytes: u64,
    wanted: impl Fn(&str) -> bool,
) -> io::Result<Snapshot> {
    let (tree, version) = open(volume)?;
    let mut snapshot = Snapshot {
        files: BTreeMap::new(),
        is_all: true,
        version,
    };
    let mut room = most_bytes;
    read_below(&tree, "", &wanted, &mut snapshot, &mut room, 0)?;
    Ok(snapshot)
}

/// Returns which content a volume has.
///
/// # Errors
/// What the system says.
pub fn version(volume: &Path) -> io::Result<Version> {
    open(volume).map(|(_, version)| version)
}

/// Opens the directory with the content.
fn open(volume: &Path) -> io::Result<(OwnedFd, Version)> {
    let root = open_root(volume)?;
    let name = current(&root)?;
    let (tree, since) = match &name {
        Some(name) => (open_directory(root.as_fd(), name.as_str())?, time_in(name)),
        None => (root, None),
    };
    let since = match since {
        Some(since) => since,
        None => changed(&tree)?,
    };
    let directory = name.unwrap_or_default();
    Ok((tree, Version { directory, since }))
}

/// The moment that the name of a directory tells: `..2026_11_23_16_19_05.123456789`.
fn time_in(name: &str) -> Option<Timestamp> {
    let time = DateTime::strptime("..%Y_%m_%d_%H_%M_%S.%f", name).ok()?;
    Some(time.to_zoned(TimeZone::UTC).ok()?.timestamp())
}

fn changed(directory: &OwnedFd) -> io::Result<Timestamp> {
    let modified = StdFile::from(directory.try_clone()?)
        .metadata()?
        .modified()?;
    let since = modified
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_err(io::Error::other)?;
    let nanoseconds = i128::try_from(since.as_nanos()).map_err(io::Error::other)?;
    Timestamp::from_nanosecond(nanoseconds).map_err(io::Error::other)
}

fn read_below(
    directory: &OwnedFd,
    prefix: &str,
    wanted: &impl Fn(&str) -> bool,
    snapshot: &mut Snapshot,
    room: &mut u64,
    depth: usize,
) -> io::Result<()> {
    for name in names(directory.as_fd())? {
        let Ok(name) = name.to_str() else { continue };
        if name.starts_with("..") || snapshot.files.len() >= MOST_FILES {
            continue;
        }
        let path = format!("{prefix}{name}");
        // Without waiting for whoever might write to a pipe.
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
        let Ok(fd) = open_beneath(directory, name, flags, Mode::empty()) else {
            // A link, or gone meanwhile.
            continue;
        };
        let file = StdFile::from(fd);
        let metadata = file.metadata()?;
        if metadata.is_dir() && depth < DEEPEST {
            read_below(
                &OwnedFd::from(file),
                &format!("{path}/"),
                wanted,
                snapshot,
                room,
                depth + 1,
            )?;
        } else if metadata.is_file() && wanted(&path) {
            let Some(left) = room.checked_sub(metadata.len()) else {
                snapshot.is_all = false;
                return Ok(());
            };
            *room = left;
            // One byte more than it should need, so that the buffer is not moved while it grows:
            // a moved buffer leaves a copy of the secret behind.
            let length = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
            let mut content = Vec::with_capacity(length.saturating_add(1));
            file.take(metadata.len()).read_to_end(&mut content)?;
            snapshot.files.insert(path, content.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::{File, Payload, swap};
    use std::{fs, os::unix::fs::symlink};

    fn texts(snapshot: &Snapshot) -> BTreeMap<&str, String> {
        let text = |s: &Secret| String::from_utf8(s.expose().to_vec()).unwrap();
        snapshot
            .files
            .iter()
            .map(|(path, content)| (path.as_str(), text(content)))
            .collect()
    }

    #[test]
    fn what_was_written_is_read_and_writing_it_again_does_not_make_it_newer() {
        let dir = tempfile::tempdir().unwrap();
        let payload = |text: &str| {
            let files = [("a", text), ("deep/er/b", "2")];
            let file = |(path, text): (&str, &str)| {
                (path.to_owned(), File::new(0, text.as_bytes().to_vec()))
            };
            Payload::new(files.map(file)).unwrap()
        };
        let replace = |payload: Payload| {
            if let Some(staged) = swap::stage(dir.path(), payload).unwrap() {
                staged.commit().unwrap();
            }
        };
        let before = Timestamp::now();
        replace(payload("1"));
        let first = snapshot(dir.path(), u64::MAX, |_| true).unwrap();
        let expected = BTreeMap::from([("a", "1".to_owned()), ("deep/er/b", "2".to_owned())]);
        assert_eq!(texts(&first), expected);
        assert!(before <= first.version.since && first.version.since <= Timestamp::now());
        replace(payload("1"));
        assert_eq!(
            snapshot(dir.path(), u64::MAX, |_| true)
                .unwrap()
                .version
                .since,
            first.version.since
        );
        replace(payload("3"));
        let second = snapshot(dir.path(), u64::MAX, |path| path == "a").unwrap();
        assert!(second.version.since > first.version.since);
        assert_eq!(texts(&second), BTreeMap::from([("a", "3".to_owned())]));
    }

    #[test]
    fn links_of_a_provider_lead_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("volume");
        fs::create_dir_all(volume.join("sub")).unwrap();
        fs::write(dir.path().join("outside"), "host").unwrap();
        fs::write(volume.join("mine"), "1").unwrap();
        fs::write(volume.join("sub/mine"), "2").unwrap();
        symlink("../outside", volume.join("link")).unwrap();
        symlink("../..", volume.join("sub/up")).unwrap();
        symlink(dir.path(), volume.join("absolute")).unwrap();
        nix::unistd::mkfifo(&volume.join("pipe"), Mode::S_IRWXU).unwrap();
        let expected = BTreeMap::from([("mine", "1".to_owned()), ("sub/mine", "2".to_owned())]);
        assert_eq!(
            texts(&snapshot(&volume, u64::MAX, |_| true).unwrap()),
            expected
        );
        // Nor does its own ..data, out of the volume.
        symlink("..", volume.join("..data")).unwrap();
        assert_eq!(
            texts(&snapshot(&volume, u64::MAX, |_| true).unwrap()),
            expected
        );
        fs::remove_file(volume.join("..data")).unwrap();
        symlink("../outside", volume.join("..data")).unwrap();
        assert_eq!(
            texts(&snapshot(&volume, u64::MAX, |_| true).unwrap()),
            expected
        );
    }
}
