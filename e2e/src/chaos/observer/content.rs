//! One content of a volume, as a program reads it that opens the directory once: all files are of the
//! same generation, and none vanishes under the reader.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::super::store::{EXTRA, OBJECTS, Store};
use super::super::tenants::{EDITION, WHO};
use super::volumes::{Wrong, number, take};

pub(super) const DATA: &str = "..data";
/// The time for which a content that was replaced has to stay for those who have opened it. The driver
/// keeps it for two seconds; this process may be late itself.
const STAYS: Duration = Duration::from_secs(1);

/// A content that was opened.
pub(super) struct Content {
    data: File,
    names: Vec<String>,
    at: Instant,
}

impl Content {
    /// Opens the present content of a volume.
    pub(super) fn open(volume: &Path) -> Result<Self, Wrong> {
        let gap = |error: std::io::Error| Wrong::Gap(format!("{DATA}: {error}"));
        let at = Instant::now();
        let data = File::open(volume.join(DATA)).map_err(gap)?;
        let mut names = Vec::new();
        for entry in fs::read_dir(path_of(&data)).map_err(gap)? {
            names.push(
                entry
                    .map_err(gap)?
                    .file_name()
                    .to_string_lossy()
                    .into_owned(),
            );
        }
        Ok(Self { data, names, at })
    }

    /// Returns whether it has the object that a class has only after an edit.
    pub(super) fn has_extra(&self) -> bool {
        self.names.iter().any(|name| name == EXTRA)
    }

    /// Returns whether it lies on a file system that nobody can write to.
    pub(super) fn is_read_only(&self) -> bool {
        let flags = fstatvfs(&self.data).map(|found| found.flags());
        flags.is_ok_and(|flags| flags.contains(FsFlags::ST_RDONLY))
    }

    /// Returns a file that can still be read.
    pub(super) fn readable(&self) -> Option<&str> {
        let directory = path_of(&self.data);
        let mut names = self.names.iter();
        let name = names.find(|name| fs::read(directory.join(name)).is_ok())?;
        Some(name)
    }

    /// Reads all files; returns their generation, and the edition of their class. Returns `None` if this
    /// process was too slow to tell.
    pub(super) fn read(
        &self,
        store: &Store,
        class: usize,
        floor: u64,
    ) -> Result<Option<(u64, u64)>, Wrong> {
        match self.read_all(store, class, floor) {
            Err(Wrong::Gap(_)) if self.at.elapsed() > STAYS => Ok(None),
            read => read.map(Some),
        }
    }

    fn read_all(&self, store: &Store, class: usize, floor: u64) -> Result<(u64, u64), Wrong> {
        let mut edition = 0;
        let mut first: Option<(&str, u64)> = None;
        let own = |object| (object, object);
        let expected = OBJECTS.into_iter().chain([WHO, EDITION].map(own));
        for (object, file) in expected.chain(self.has_extra().then_some(own(EXTRA))) {
            let is_listed = |name: &String| file.split('/').next() == Some(name);
            if !self.names.iter().any(is_listed) {
                return Err(Wrong::Gap(format!("one {DATA} has no {object}")));
            }
            let mut text = String::new();
            let read = File::open(path_of(&self.data).join(file))
                .and_then(|mut file| file.read_to_string(&mut text));
            read.map_err(|error| {
                let age = self.at.elapsed();
                Wrong::Gap(format!(
                    "{object} of a {DATA} that was opened {age:.1?} before: {error}"
                ))
            })?;
            if object == WHO {
                continue;
            }
            if object == EDITION {
                edition = number(class, object, &text)?;
                continue;
            }
            let generation = take(store, class, object, &text, floor)?;
            let (name, expected) = *first.get_or_insert((object, generation));
            if generation != expected {
                return Err(Wrong::Content(
                    "no pod reads a mixed volume",
                    format!(
                        "in one {DATA}, {name} is of generation {expected} and {object} of {generation}"
                    ),
                ));
            }
        }
        Ok((first.map_or(floor, |(_, generation)| generation), edition))
    }
}

fn path_of(directory: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()))
}
