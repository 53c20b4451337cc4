//! Reads a volume's content back, for the Secrets that are made of it.
//!
//! Content that a provider wrote itself is not trusted: the only link that is followed is the one at
//! the root by which an atomic writer names the current content, and only to a directory beside it.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs::{File as StdFile, Metadata},
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    time::SystemTime,
};

use jiff::{Timestamp, civil::DateTime, tz::TimeZone};
use nix::{errno::Errno, fcntl::OFlag, sys::stat::Mode};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::{
    layout::current,
    tree::{about, names, open_beneath, open_directory, open_root},
};
use crate::{hex, secret::Secret};

/// The most levels of directories that are read. Nothing else bounds what a provider writes itself.
const DEEPEST: usize = 32;
/// The most files that are read.
const MOST_FILES: usize = 10_000;
/// The number of attempts to read content that is replaced meanwhile.
const ATTEMPTS: usize = 5;

/// The identity of one content of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentId {
    /// The name of the directory that `..data` leads to; empty where there is none, because a
    /// provider wrote the files itself.
    pub directory: String,
    /// The time at which the content was written. It does not change when the content is read, or
    /// when the same is written again.
    pub since: Timestamp,
}

/// The content of a volume at one moment.
pub struct Snapshot {
    /// The contents of files by path.
    pub files: BTreeMap<String, Secret>,
    /// Whether all requested files are in it. Otherwise there are more than may be read.
    pub is_all: bool,
    /// The content's identity.
    pub id: ContentId,
}

/// Reads the files of a volume, whose root is open, for whose path `wanted` returns true, as long as
/// they have no more than `most_bytes` together.
///
/// The files are of one moment: if the content is replaced or a file goes meanwhile, the volume is
/// read again. Only entries that are no regular files are left out.
///
/// # Errors
/// The system's error. `NotFound` also means that the content was replaced during each attempt;
/// trying again helps.
pub fn snapshot(
    root: &OwnedFd,
    most_bytes: u64,
    wanted: impl Fn(&str) -> bool,
) -> io::Result<Snapshot> {
    unchanged(|| read(root, most_bytes, &wanted))
}

/// Returns how many files a volume has, and a digest of their names and of the names at its root.
///
/// # Errors
/// The same as for [`snapshot`]; `NotFound` also means that a link leads nowhere.
pub fn all_names(volume: &Path) -> io::Result<(usize, String)> {
    let root = open_root(volume)?;
    unchanged(|| {
        let mut shown = names(root.as_fd())?;
        shown.retain(|name| !name.to_bytes().starts_with(b".."));
        shown.sort();
        let found = paths(&root)?;
        let mut digest = Sha256::new();
        let paths = found.iter().map(|path| path.as_bytes());
        for name in shown
            .iter()
            .map(|name| name.to_bytes())
            .chain([&b""[..]])
            .chain(paths)
        {
            digest.update(name);
            digest.update([0]);
        }
        Ok((found.len(), hex::digits(&digest.finalize())))
    })
}

/// Returns the paths of the first files of a volume in the order of their names, and how many files it
/// has in all.
///
/// # Errors
/// The same as for [`all_names`].
pub fn first_paths(volume: &Path, most: usize) -> io::Result<(Vec<String>, usize)> {
    let root = open_root(volume)?;
    let all = unchanged(|| paths(&root))?;
    let count = all.len();
    Ok((all.into_iter().take(most).collect(), count))
}

fn paths(root: &OwnedFd) -> Result<BTreeSet<String>, Unread> {
    let found = RefCell::new(BTreeSet::new());
    read(root, u64::MAX, &|path: &str| {
        found.borrow_mut().insert(path.to_owned());
        false
    })?;
    Ok(found.into_inner())
}

/// Repeats `read` until nothing changes meanwhile.
fn unchanged<T>(read: impl Fn() -> Result<T, Unread>) -> io::Result<T> {
    for _ in 0..ATTEMPTS {
        match read() {
            Ok(found) => return Ok(found),
            Err(Unread::Changed) => {}
            Err(Unread::Failed(error)) => return Err(error),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "the content was replaced each time that it was read",
    ))
}

/// The reason why there is no snapshot.
enum Unread {
    /// Something changed while it was read.
    Changed,
    Failed(io::Error),
}

impl From<io::Error> for Unread {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Changed,
            _ => Self::Failed(error),
        }
    }
}

fn read(
    root: &OwnedFd,
    most_bytes: u64,
    wanted: &impl Fn(&str) -> bool,
) -> Result<Snapshot, Unread> {
    let (tree, id) = open(root)?;
    let directory = id.directory.clone();
    let mut reader = Reader {
        wanted,
        room: most_bytes,
        snapshot: Snapshot {
            files: BTreeMap::new(),
            is_all: true,
            id,
        },
    };
    reader.read_below(&tree, "", 0)?;
    if current(root)?.unwrap_or_default() != directory {
        return Err(Unread::Changed);
    }
    Ok(reader.snapshot)
}

/// Returns the identity of the content of a volume, whose root is open.
///
/// # Errors
/// The system's error.
pub fn content_id(root: &OwnedFd) -> io::Result<ContentId> {
    open(root).map(|(_, id)| id)
}

/// Opens the directory with the content.
fn open(root: &OwnedFd) -> io::Result<(OwnedFd, ContentId)> {
    let name = current(root)?;
    let (tree, since) = match &name {
        Some(name) => (open_directory(root.as_fd(), name.as_str())?, time_in(name)),
        None => (root.try_clone()?, None),
    };
    let since = match since {
        Some(since) => since,
        None => modified(&tree)?,
    };
    let directory = name.unwrap_or_default();
    Ok((tree, ContentId { directory, since }))
}

/// Returns the moment in the name of a directory: `..2026_11_23_16_19_05.123456789`.
fn time_in(name: &str) -> Option<Timestamp> {
    let time = DateTime::strptime("..%Y_%m_%d_%H_%M_%S.%f", name).ok()?;
    Some(time.to_zoned(TimeZone::UTC).ok()?.timestamp())
}

fn modified(directory: &OwnedFd) -> io::Result<Timestamp> {
    let modified = StdFile::from(directory.try_clone()?)
        .metadata()?
        .modified()?;
    let since = modified
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_err(io::Error::other)?;
    let nanoseconds = i128::try_from(since.as_nanos()).map_err(io::Error::other)?;
    Timestamp::from_nanosecond(nanoseconds).map_err(io::Error::other)
}

/// Reads what lies below a directory into a snapshot.
struct Reader<'a, W> {
    wanted: &'a W,
    /// The number of bytes that may still be read.
    room: u64,
    snapshot: Snapshot,
}

impl<W: Fn(&str) -> bool> Reader<'_, W> {
    fn read_below(
        &mut self,
        directory: &OwnedFd,
        prefix: &str,
        depth: usize,
    ) -> Result<(), Unread> {
        for name in names(directory.as_fd())? {
            let Ok(name) = name.to_str() else { continue };
            if name.starts_with("..") {
                continue;
            }
            let path = format!("{prefix}{name}");
            // Does not wait for a writer where the file is a pipe.
            let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
            let file = match open_beneath(directory, name, flags, Mode::empty()) {
                Ok(file) => StdFile::from(file),
                // It is a link, a socket, or a device without a driver.
                Err(Errno::ELOOP | Errno::ENXIO | Errno::ENODEV) => continue,
                Err(errno) => return Err(about(errno.into(), format!("{path:?}")).into()),
            };
            let metadata = file.metadata()?;
            if metadata.is_dir() {
                if depth == DEEPEST {
                    self.snapshot.is_all = false;
                    continue;
                }
                self.read_below(&OwnedFd::from(file), &format!("{path}/"), depth + 1)?;
            } else if metadata.is_file() && (self.wanted)(&path) {
                self.read_file(path, file, &metadata)?;
            }
            if !self.snapshot.is_all {
                return Ok(());
            }
        }
        Ok(())
    }

    fn read_file(
        &mut self,
        path: String,
        mut file: StdFile,
        metadata: &Metadata,
    ) -> Result<(), Unread> {
        let left = self.room.checked_sub(metadata.len());
        let Some(left) = left.filter(|_| self.snapshot.files.len() < MOST_FILES) else {
            self.snapshot.is_all = false;
            return Ok(());
        };
        self.room = left;
        // One byte more than needed, so that the buffer does not grow: a buffer that moves leaves a
        // copy of the secret behind.
        let length = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
        let mut content = Zeroizing::new(Vec::with_capacity(length.saturating_add(1)));
        let read = (&mut file).take(metadata.len()).read_to_end(&mut content)?;
        let after = file.metadata()?;
        // A provider that writes its files itself may write into an existing one.
        let written = |m: &Metadata| (m.len(), m.mtime(), m.mtime_nsec());
        if read as u64 != metadata.len() || written(metadata) != written(&after) {
            return Err(Unread::Changed);
        }
        let content = std::mem::take(&mut *content);
        self.snapshot.files.insert(path, content.into());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::{File, Payload, swap};
    use std::{
        collections::BTreeSet,
        fs,
        os::unix::fs::symlink,
        sync::atomic::{AtomicBool, Ordering},
    };

    fn snapshot(
        volume: &Path,
        most_bytes: u64,
        wanted: impl Fn(&str) -> bool,
    ) -> io::Result<Snapshot> {
        super::snapshot(&open_root(volume)?, most_bytes, wanted)
    }

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
            if let Some(staged) = swap::stage(open_root(dir.path()).unwrap(), payload).unwrap() {
                staged.commit().unwrap();
            }
        };
        let before = Timestamp::now();
        replace(payload("1"));
        let first = snapshot(dir.path(), u64::MAX, |_| true).unwrap();
        let expected = BTreeMap::from([("a", "1".to_owned()), ("deep/er/b", "2".to_owned())]);
        assert_eq!(texts(&first), expected);
        assert!(before <= first.id.since && first.id.since <= Timestamp::now());
        replace(payload("1"));
        assert_eq!(
            snapshot(dir.path(), u64::MAX, |_| true).unwrap().id.since,
            first.id.since
        );
        replace(payload("3"));
        let second = snapshot(dir.path(), u64::MAX, |path| path == "a").unwrap();
        assert!(second.id.since > first.id.since);
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
        // The same holds for a ..data that leads out of the volume.
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

    #[test]
    fn a_snapshot_is_of_one_generation_and_lacks_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let payload = |round: usize| {
            // Names differ from round to round too, as with a class for "*".
            let names = (0..30).map(|n| format!("d{}/f{n}-{}", n % 3, round % 2));
            let file = |path| (path, File::new(0, round.to_string().into_bytes()));
            Payload::new(names.map(file)).unwrap()
        };
        let replace = |round| {
            if let Some(staged) =
                swap::stage(open_root(dir.path()).unwrap(), payload(round)).unwrap()
                && let Some(former) = staged.commit().unwrap()
            {
                swap::remove(&open_root(dir.path()).unwrap(), &former).unwrap();
            }
        };
        replace(0);
        let done = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut seen = Vec::new();
                while !done.load(Ordering::SeqCst) {
                    match snapshot(dir.path(), u64::MAX, |_| true) {
                        Ok(snapshot) => seen.push((
                            snapshot.files.len(),
                            texts(&snapshot).into_values().collect::<BTreeSet<_>>(),
                        )),
                        // Content that is replaced all the time cannot be read.
                        Err(error) => assert_eq!(error.kind(), io::ErrorKind::NotFound),
                    }
                }
                seen
            });
            (1..150).for_each(replace);
            done.store(true, Ordering::SeqCst);
            reader.join().unwrap()
        });
        for (files, contents) in seen {
            assert_eq!((files, contents.len()), (30, 1), "{contents:?}");
        }
        assert_eq!(
            snapshot(dir.path(), u64::MAX, |_| true)
                .unwrap()
                .files
                .len(),
            30
        );
    }

    #[test]
    fn more_than_is_read_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let mut deep = dir.path().to_owned();
        for _ in 0..=DEEPEST {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        fs::write(dir.path().join("a"), "1").unwrap();
        assert!(!snapshot(dir.path(), u64::MAX, |_| true).unwrap().is_all);
        fs::remove_dir_all(dir.path().join("d")).unwrap();
        assert!(snapshot(dir.path(), u64::MAX, |_| true).unwrap().is_all);
        for number in 0..MOST_FILES {
            fs::write(dir.path().join(number.to_string()), "").unwrap();
        }
        assert!(!snapshot(dir.path(), u64::MAX, |_| true).unwrap().is_all);
        assert!(
            snapshot(dir.path(), u64::MAX, |path| path == "a")
                .unwrap()
                .is_all
        );
    }

    /// The provider puts a pipe where a file was, between the examination of a file and its opening.
    #[test]
    fn no_pipe_holds_a_reader_or_a_writer_up() {
        let dir = tempfile::tempdir().unwrap();
        let payload = || {
            let files = ["a", "b/c"].map(|path| (path.to_owned(), File::new(0, b"1".to_vec())));
            Payload::new(files).unwrap()
        };
        drop(
            swap::stage(open_root(dir.path()).unwrap(), payload())
                .unwrap()
                .unwrap()
                .commit(),
        );
        let (finished, wait) = std::sync::mpsc::channel();
        let volume = dir.path().to_owned();
        std::thread::spawn(move || {
            for _ in 0..300 {
                drop(snapshot(&volume, u64::MAX, |_| true));
                drop(swap::stage(open_root(&volume).unwrap(), payload()));
            }
            finished.send(()).unwrap();
        });
        let (pipe, file) = (dir.path().join("..pipe"), dir.path().join("..file"));
        let until = std::time::Instant::now() + std::time::Duration::from_secs(300);
        while wait.try_recv().is_err() {
            assert!(
                std::time::Instant::now() < until,
                "somebody waits for a pipe"
            );
            drop(fs::remove_file(&pipe));
            let _there = nix::unistd::mkfifo(&pipe, Mode::S_IRWXU);
            drop(fs::rename(&pipe, dir.path().join("..data/a")));
            drop(fs::write(&file, "1"));
            drop(fs::rename(&file, dir.path().join("..data/a")));
        }
    }
}
