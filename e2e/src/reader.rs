//! A program in a pod that reads its secrets all the time while they rotate, and notes what no
//! reader may see.
//!
//! All files of a version contain the same number in many copies; a later version has a higher
//! number. A file that is absent is a gap. Contents that differ, are not whole, or are older than
//! what was read before are a mixture. The reader opens the files by their names, and also relative
//! to one `..data`. A file that vanishes there is no gap if `..data` leads elsewhere by then. Where a
//! provider writes files itself, there is no `..data`, and each file changes by itself.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

const DATA: &str = "..data";
/// The number of gaps, and of mixtures, that are reported.
const MOST_TOLD: usize = 5;

/// The files to read, and when to end.
#[derive(Clone, Debug)]
pub struct Reader {
    /// Paths below the volume.
    pub files: Vec<String>,
    /// The last number: the reader ends when it has read it.
    pub last: u64,
    /// The time after which the reader gives up.
    pub limit: Duration,
    /// The time between two rounds. The existing driver removes old content at once, so that a program
    /// without a pause may open a file that is just being replaced.
    pub pause: Duration,
}

/// The findings of a reader.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readings {
    /// The number of times that all files were read.
    pub rounds: u64,
    /// The number of different numbers that were read.
    pub numbers: u64,
    /// The last number read.
    pub last: u64,
    /// Files that were absent.
    pub gaps: Vec<String>,
    /// Contents that do not belong together.
    pub mixtures: Vec<String>,
}

impl Reader {
    /// Returns the arguments with which `probe` reads this, before the volume's path.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let pause = u64::try_from(self.pause.as_millis()).unwrap_or(u64::MAX);
        let numbers = [self.last, self.limit.as_secs(), pause].map(|number| number.to_string());
        let head = std::iter::once("read".to_owned()).chain(numbers);
        head.chain(self.files.iter().cloned()).collect()
    }

    /// Parses the arguments of `Reader::arguments` after the first; returns `None` for others.
    pub fn parse(arguments: &[&str]) -> Option<Self> {
        let [last, seconds, pause, files @ ..] = arguments else {
            return None;
        };
        Some(Self {
            files: files.iter().map(|file| (*file).to_owned()).collect(),
            last: last.parse().ok()?,
            limit: Duration::from_secs(seconds.parse().ok()?),
            pause: Duration::from_millis(pause.parse().ok()?),
        })
    }

    /// Reads until the last number was read, or the limit is over.
    pub fn read(&self, volume: &Path) -> Readings {
        let mut readings = Readings::default();
        let started = Instant::now();
        let has_data = volume.join(DATA).is_symlink();
        while readings.last < self.last && started.elapsed() < self.limit {
            readings.rounds += 1;
            // As a program reads that does not know of `..data`, and as one that does.
            self.each_by_its_name(volume, &mut readings);
            if has_data && let Err(error) = self.all_at_once(volume, &mut readings) {
                readings.gap(format!("{DATA}: {error}"));
            }
            std::thread::sleep(self.pause);
        }
        readings
    }

    fn each_by_its_name(&self, volume: &Path, readings: &mut Readings) {
        for file in &self.files {
            match fs::read_to_string(volume.join(file)) {
                Ok(text) => readings.take(file, &text),
                Err(error) => readings.gap(format!("{file}: {error}")),
            }
        }
    }

    fn all_at_once(&self, volume: &Path, readings: &mut Readings) -> io::Result<()> {
        let data = File::open(volume.join(DATA))?;
        let version = fs::read_link(format!("/proc/self/fd/{}", data.as_raw_fd()))?;
        let mut first: Option<String> = None;
        for file in &self.files {
            match read_below(&data, file) {
                Ok(text) => {
                    let expected = first.get_or_insert_with(|| text.clone());
                    if *expected != text {
                        readings.mixture(format!(
                            "in one version {} has {:?} and {file} has {:?}",
                            self.files[0],
                            beginning(expected),
                            beginning(&text)
                        ));
                    }
                }
                Err(error) if is_current(volume, &version) => {
                    readings.gap(format!("{DATA}/{file}: {error}"));
                }
                // This version was removed after a newer one was there.
                Err(_) => return Ok(()),
            }
        }
        Ok(())
    }
}

/// Returns whether `..data` still leads there. The kernel marks the path of a removed directory.
fn is_current(volume: &Path, version: &Path) -> bool {
    let now = fs::read_link(volume.join(DATA));
    now.is_ok_and(|now| now.file_name() == version.file_name())
}

/// Returns as much of a file's text as is reported.
fn beginning(text: &str) -> String {
    text.chars().take(20).collect()
}

fn read_below(directory: &File, file: &str) -> io::Result<String> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(file);
    let mut text = String::new();
    File::open(path)?.read_to_string(&mut text)?;
    Ok(text)
}

impl Readings {
    fn take(&mut self, file: &str, text: &str) {
        let mut words = text.split_whitespace();
        let number = words.next().and_then(|word| word.parse::<u64>().ok());
        let Some(number) = number else {
            let text = beginning(text);
            self.mixture(format!("{file} has {text:?}, which is no number"));
            return;
        };
        if words.any(|word| word != number.to_string()) {
            self.mixture(format!("{file} has more than one number"));
        }
        if number < self.last {
            self.mixture(format!("{file} has {number} after {}", self.last));
        }
        if number > self.last {
            self.numbers += 1;
            self.last = number;
        }
    }

    fn gap(&mut self, told: String) {
        if self.gaps.len() < MOST_TOLD {
            self.gaps.push(told);
        }
    }

    fn mixture(&mut self, told: String) {
        if self.mixtures.len() < MOST_TOLD {
            self.mixtures.push(told);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn write(volume: &Path, version: &str, files: &[(&str, &str)]) {
        let dir = volume.join(version);
        fs::create_dir(&dir).unwrap();
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
        symlink(version, volume.join("..tmp")).unwrap();
        fs::rename(volume.join("..tmp"), volume.join(DATA)).unwrap();
    }

    fn reader(last: u64) -> Reader {
        Reader {
            files: vec!["a".to_owned(), "b".to_owned()],
            last,
            limit: Duration::from_millis(300),
            pause: Duration::ZERO,
        }
    }

    #[test]
    fn a_reader_reports_gaps_and_mixtures() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path();
        for name in ["a", "b"] {
            symlink(format!("..data/{name}"), volume.join(name)).unwrap();
        }
        write(volume, "..1", &[("a", "1 1"), ("b", "1 1")]);
        let readings = reader(1).read(volume);
        let expected = Readings {
            rounds: 1,
            numbers: 1,
            last: 1,
            ..Readings::default()
        };
        assert_eq!(readings, expected);

        write(volume, "..2", &[("a", "2 2"), ("b", "1 2")]);
        let readings = reader(2).read(volume);
        let told = readings.mixtures.join("; ");
        assert!(told.contains("b has more than one number"), "{told}");
        assert!(told.contains("b has 1 after 2"), "{told}");
        assert!(told.contains("in one version a has \"2 2\""), "{told}");

        let long = "x".repeat(100);
        write(volume, "..3", &[("a", &long), ("b", "2 2")]);
        let told = reader(3).read(volume).mixtures.join("; ");
        let quoted = format!("a has {:?}", "x".repeat(20));
        assert!(told.contains(&format!("{quoted}, which")), "{told}");
        assert!(told.contains(&format!("{quoted} and b")), "{told}");

        write(volume, "..4", &[("a", "2 2")]);
        let readings = reader(3).read(volume);
        let told = readings.gaps.join("; ");
        assert!(
            told.contains("b: ") && told.contains("..data/b: "),
            "{told}"
        );
        assert_eq!((readings.numbers, readings.last), (1, 2));
    }

    /// Files that a provider writes itself are read by their names.
    #[test]
    fn a_volume_without_data_has_gaps_by_name_only() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "1 1").unwrap();
        let files = vec!["a".to_owned()];
        let alone = Reader { files, ..reader(1) };
        let readings = alone.read(dir.path());
        assert_eq!((readings.last, readings.gaps), (1, Vec::new()));
        let readings = reader(2).read(dir.path());
        assert!(readings.gaps[0].starts_with("b: "), "{readings:?}");
    }

    #[test]
    fn arguments_are_parsed_again() {
        let arguments = reader(200).arguments();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        assert_eq!(arguments, ["read", "200", "0", "0", "a", "b"]);
        assert_eq!(Reader::parse(&arguments[1..]).unwrap().files, ["a", "b"]);
    }
}
