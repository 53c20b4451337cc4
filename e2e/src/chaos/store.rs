//! The external store of a run: what each object of a class contains, and since when.
//!
//! All objects of a class change together, and each content names its class, its object and a number: that of
//! the generation of the class, or of an earlier one to which the store went back. So a reader can tell what it
//! reads, and when the store had it.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::json;

use super::lock;

/// The well-behaved classes.
pub(super) const CLASSES: [&str; 4] = ["alpha", "beta", "gamma", "delta"];
/// The class whose volumes are refreshed only when it changes or asks for it.
pub(super) const SELDOM: usize = 3;
/// The class whose provider is told which versions are mounted, and leaves out the files of these.
pub(super) const CHANGED_ONLY: usize = 2;
/// The class whose provider is given a credential of the pod (`nodePublishSecretRef`), which changes with the store,
/// and the object that has it.
pub(super) const WITH_CREDENTIAL: usize = 0;
pub(super) const CREDENTIAL: &str = "credential";
/// The class with more parameters than a driver remembers of one (64 KiB), and how many bytes they have.
pub(super) const LARGE: (usize, usize) = (1, 70 << 10);
/// The objects of each class, with their files.
pub(super) const OBJECTS: [(&str, &str); 3] = [("a", "a"), ("b", "deep/er/b"), ("c", "c")];
/// The words of the largest object for its numbers: the sizes of a page, more and less. Two numbers in a row often
/// have the same one.
const WORDS: [usize; 7] = [2_000, 1, 1_024, 4_500, 30, 1_025, 9_000];
/// The class with a certificate and its key, and their object.
pub(super) const WITH_CERTIFICATE: usize = 2;
pub(super) const CERTIFICATE: &str = "tls.pem";
/// The number of certificates: each number in the contents has one of them.
const CERTIFICATES: u64 = 3;
/// The object that a class has only after an edit.
pub(super) const EXTRA: &str = "d";

/// The content of the store, and its history.
pub(super) struct Store {
    file: PathBuf,
    /// For each class, the times of its generations. Index 0 is generation 1.
    history: Mutex<Vec<Vec<Written>>>,
    certificates: Vec<Certificate>,
}

/// A certificate and its key, in PEM.
pub(super) struct Certificate {
    pub(super) chain: String,
    pub(super) key: String,
}

impl Certificate {
    fn of(number: u64) -> Result<Self, rcgen::Error> {
        let made = rcgen::generate_simple_self_signed(vec![format!("{number}.chaos.test")])?;
        Ok(Self {
            chain: made.cert.pem(),
            key: made.signing_key.serialize_pem(),
        })
    }
}

/// A generation. A provider may have read it from `begun` on, and reads it from `done` on.
#[derive(Clone, Copy, Debug)]
struct Written {
    begun: Instant,
    done: Instant,
    /// The number in its contents.
    number: u64,
}

impl Store {
    /// Writes the first generation of all classes to a file from which the providers read.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn create(file: PathBuf) -> io::Result<Self> {
        let certificates = (0..CERTIFICATES).map(Certificate::of);
        let store = Self {
            file,
            certificates: certificates
                .collect::<Result<_, _>>()
                .map_err(io::Error::other)?,
            history: Mutex::new(vec![Vec::new(); CLASSES.len()]),
        };
        for class in 0..CLASSES.len() {
            store.rotate(class)?;
        }
        Ok(store)
    }

    /// Writes the next generation of a class, with contents that the store never had; returns the generation.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn rotate(&self, class: usize) -> io::Result<u64> {
        self.write(class, |generations| generations.len() as u64 + 1)
    }

    /// Writes the contents of the generation before the last one again, as the next generation; returns it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn roll_back(&self, class: usize) -> io::Result<u64> {
        self.write(class, |generations| {
            let before = generations.iter().rev().nth(1);
            before.map_or(generations.len() as u64 + 1, |before| before.number)
        })
    }

    /// Writes the next generation of a class, whose contents have the number that `of` returns.
    fn write(&self, class: usize, of: impl Fn(&[Written]) -> u64) -> io::Result<u64> {
        let mut history = lock(&self.history);
        let begun = Instant::now();
        if let Some(generations) = history.get_mut(class) {
            let number = of(generations);
            let done = begun + Duration::from_secs(3600);
            generations.push(Written {
                begun,
                done,
                number,
            });
        }
        let numbers = history
            .iter()
            .map(|of| of.last().map_or(0, |last| last.number));
        let text = self.objects(&numbers.collect::<Vec<_>>());
        let new = self.file.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(&new, &self.file)?;
        let written = history.get_mut(class);
        let generation = written.as_ref().map_or(0, |of| of.len() as u64);
        if let Some(written) = written.and_then(|of| of.last_mut()) {
            written.done = Instant::now();
        }
        Ok(generation)
    }

    /// Returns the objects of all classes, as the provider reads them.
    fn objects(&self, numbers: &[u64]) -> String {
        let mut all = Vec::new();
        for (class, number) in CLASSES.iter().zip(numbers) {
            let extra = (EXTRA, EXTRA);
            for (object, _) in OBJECTS.iter().chain([&extra]) {
                all.push(json!({
                    "name": format!("{class}-{object}"),
                    "content": content(class, object, *number),
                    "version": format!("g{number}"),
                }));
            }
            if *class == CLASSES[WITH_CERTIFICATE]
                && let Some(Certificate { chain, key }) = self.certificate(*number)
            {
                all.push(json!({
                    "name": format!("{class}-{CERTIFICATE}"),
                    "content": format!("{key}{chain}"),
                    "version": format!("g{number}"),
                }));
            }
        }
        serde_json::Value::from(all).to_string()
    }

    /// Returns the certificate that belongs to contents of a number.
    pub(super) fn certificate(&self, number: u64) -> Option<&Certificate> {
        self.certificates.get((number % CERTIFICATES) as usize)
    }

    /// Returns the last generation of a class.
    pub(super) fn latest(&self, class: usize) -> u64 {
        let history = lock(&self.history);
        history.get(class).map_or(0, |of| of.len() as u64)
    }

    /// Returns the number in the contents of a generation; 0 if there is none.
    pub(super) fn number(&self, class: usize, generation: u64) -> u64 {
        let history = lock(&self.history);
        let of = history.get(class).map(Vec::as_slice).unwrap_or_default();
        let index = generation.checked_sub(1).map(|index| index as usize);
        let found = index.and_then(|index| of.get(index));
        found.map_or(0, |written| written.number)
    }

    /// Returns the number in the last contents of a class.
    pub(super) fn latest_number(&self, class: usize) -> u64 {
        self.number(class, self.latest(class))
    }

    /// Returns the generation that contents of a number are of, for somebody who has seen `floor`: the first one
    /// from that on. Where there is none, it is the last one before, or one that the store does not have yet.
    pub(super) fn generation(&self, class: usize, number: u64, floor: u64) -> u64 {
        let history = lock(&self.history);
        let of = history.get(class).map(Vec::as_slice).unwrap_or_default();
        let numbered = of
            .iter()
            .zip(1..)
            .filter(|(written, _)| written.number == number);
        let mut before = None;
        for (_, generation) in numbered {
            if generation >= floor {
                return generation;
            }
            before = Some(generation);
        }
        before.unwrap_or(of.len() as u64 + 1)
    }

    /// Returns the oldest generation that a provider may have read at a time.
    pub(super) fn at(&self, class: usize, time: Instant) -> u64 {
        let history = lock(&self.history);
        let of = history.get(class).map(Vec::as_slice).unwrap_or_default();
        of.iter().filter(|written| written.done <= time).count() as u64
    }

    /// Returns how long a generation has been replaced by a newer one; zero if it is the last.
    pub(super) fn replaced_for(&self, class: usize, generation: u64) -> Duration {
        let history = lock(&self.history);
        let next = history
            .get(class)
            .and_then(|of| of.get(generation as usize));
        next.map_or(Duration::ZERO, |next| next.begun.elapsed())
    }
}

/// Returns the content of an object. The largest one says its number only at its end, and the others
/// everywhere.
pub(super) fn content(class: &str, object: &str, number: u64) -> String {
    let mut text = format!("{class}/{object}");
    let words = match object {
        "b" => {
            text.push_str(&" ....".repeat(WORDS[number as usize / 2 % WORDS.len()]));
            1
        }
        "c" => 20 + 300 * (number as usize % 3),
        _ => 8,
    };
    for _ in 0..words {
        // Writing to a string does not fail.
        let _written = write!(text, " {number}");
    }
    text + " end"
}

/// Returns the number in a content that is whole.
///
/// # Errors
/// The end of a sentence: what it is instead. It quotes no more than its beginning.
pub(super) fn number_of(class: &str, object: &str, text: &str) -> Result<u64, String> {
    let beginning = || text.chars().take(40).collect::<String>();
    let own = format!("{class}/{object} ");
    let Some(rest) = text.strip_prefix(&own) else {
        return Err(match text {
            "" => "is empty".to_owned(),
            _ => format!("is not its content: {:?}", beginning()),
        });
    };
    let mut words = rest.rsplit(' ').skip(1);
    let number = words.next().and_then(|word| word.parse().ok());
    match number {
        Some(number) if content(class, object, number) == text => Ok(number),
        _ => Err(format!(
            "is not whole, or mixed: {} bytes from {:?}",
            text.len(),
            beginning()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_tells_its_number_and_nothing_else_passes() {
        let whole = content("alpha", "a", 12);
        assert_eq!(number_of("alpha", "a", &whole), Ok(12));
        let large = content("alpha", "b", 12);
        assert_eq!(number_of("alpha", "b", &large), Ok(12));
        let spoilt = [
            String::new(),
            "alpha/a ".to_owned(),
            "alpha/a end".to_owned(),
            whole[..whole.len() - 1].to_owned(),
            whole.replacen(" 12", " 13", 1),
            whole.replacen("12 12 12", "12 12 11", 1),
            content("alpha", "b", 12),
            content("beta", "a", 12),
        ];
        for text in spoilt {
            assert!(number_of("alpha", "a", &text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_history_knows_what_a_provider_can_have_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path().join("objects")).unwrap();
        let before = Instant::now();
        assert_eq!(store.rotate(1).unwrap(), 2);
        assert_eq!((store.latest(0), store.latest(1)), (1, 2));
        assert_eq!(store.at(1, before), 1);
        assert_eq!(store.at(1, Instant::now()), 2);
        assert!(store.replaced_for(1, 1) > Duration::ZERO);
        assert_eq!(store.replaced_for(1, 2), Duration::ZERO);
        let text = fs::read_to_string(dir.path().join("objects")).unwrap();
        assert!(text.contains(&content("beta", "a", 2)) && text.contains("gamma-d"));
    }

    #[test]
    fn contents_that_the_store_has_again_are_of_the_first_generation_that_a_reader_can_have() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path().join("objects")).unwrap();
        assert_eq!(store.rotate(1).unwrap(), 2);
        assert_eq!(store.roll_back(1).unwrap(), 3);
        assert_eq!(store.roll_back(1).unwrap(), 4);
        assert_eq!(store.rotate(1).unwrap(), 5);
        let numbers: Vec<_> = (0..=6)
            .map(|generation| store.number(1, generation))
            .collect();
        assert_eq!(numbers, [0, 1, 2, 1, 2, 5, 0]);
        assert_eq!(store.latest_number(1), 5);
        for (number, floor, expected) in [
            (1, 0, 1),
            (1, 2, 3),
            (1, 4, 3),
            (2, 3, 4),
            (5, 1, 5),
            (7, 1, 6),
        ] {
            assert_eq!(
                store.generation(1, number, floor),
                expected,
                "{number} {floor}"
            );
        }
        let text = fs::read_to_string(dir.path().join("objects")).unwrap();
        assert!(text.contains(&content("beta", "a", 5)));
    }
}
