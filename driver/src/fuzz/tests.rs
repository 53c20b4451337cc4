//! Feeds the corpus, and random changes of it, to each target.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::time::{ClockId, clock_gettime};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng, seq::IndexedRandom as _};
use rstest::rstest;

use super::*;

/// The CPU time for the inputs of one target besides its corpus.
const BUDGET: Duration = Duration::from_secs(4);
/// The size of the largest input.
const LARGEST: usize = 64 * 1024;
/// Sets the seed, to repeat a failure.
const SEED: &str = "FUZZ_SEED";

/// Bytes that mean something to one target or another.
const WORDS: [&[u8]; 24] = [
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x80\x80\x80\x80\x10",
    b"/../",
    b"..data",
    b"\r\n\r\n",
    b"\n",
    b" ",
    b"\"",
    b"\\",
    b"\\u0000",
    b"{}",
    b"[[[[",
    b"null",
    b"-1",
    b"1e999",
    b"18446744073709551616",
    b"-----BEGIN ",
    b"-----END CERTIFICATE-----\n",
    b"\x30\x80",
    b"\x30\x84\xff\xff\xff\xff",
    "\u{202e}é".as_bytes(),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
];

/// Returns the inputs of a target's corpus, in the order of their names.
fn corpus(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target.name);
    let entries =
        fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let read = |path: PathBuf| {
        let bytes = fs::read(&path).unwrap();
        (path, bytes)
    };
    paths.into_iter().map(read).collect()
}

/// Returns the CPU time that this thread has used.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .unwrap()
        .into()
}

/// Runs a target with an input. Fails if it panics, takes too long or takes too much memory; `origin`
/// says where the input comes from.
fn feed(target: &Target, input: &[u8], origin: &str) {
    let before = cpu_time();
    let mut outcome = Ok(());
    let used = allocation_counter::measure(|| {
        outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    });
    let took = cpu_time() - before;
    let most = target.memory + 32 * input.len();
    let fits = usize::try_from(used.bytes_max).is_ok_and(|bytes| bytes <= most);
    if outcome.is_ok() && took <= target.time && fits {
        return;
    }
    let file = std::env::temp_dir().join(format!("{}-{}", target.name, std::process::id()));
    fs::write(&file, input).unwrap();
    eprintln!(
        "{}: {origin}: {took:?}, {} of {most} bytes of memory; the input is in {}",
        target.name,
        used.bytes_max,
        file.display()
    );
    match outcome {
        Err(panic) => resume_unwind(panic),
        Ok(()) => panic!("{} takes too long, or too much memory", target.name),
    }
}

/// Changes an input in one to eight places.
fn changed(input: &[u8], other: &[u8], random: &mut SmallRng) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..random.random_range(1..=8) {
        let at = random.random_range(0..=bytes.len());
        let end = random.random_range(at..=bytes.len().min(at + 200));
        match random.random_range(0..8) {
            0 => bytes.insert(at, random.random()),
            1 => drop(bytes.drain(at..end)),
            2 => bytes.truncate(at),
            3 => {
                let word: &[u8] = WORDS.choose(random).unwrap();
                drop(bytes.splice(at..at, word.iter().copied()));
            }
            4 => {
                let from = random.random_range(0..=other.len());
                let piece = &other[from..other.len().min(from + 200)];
                drop(bytes.splice(at..end, piece.iter().copied()));
            }
            // A repeated piece finds work that grows faster than its input.
            5 => {
                let piece = bytes[at..end].to_vec();
                for _ in 0..1 << random.random_range(0..10) {
                    if piece.is_empty() || bytes.len() + piece.len() > LARGEST {
                        break;
                    }
                    drop(bytes.splice(at..at, piece.iter().copied()));
                }
            }
            _ if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
            _ => {}
        }
    }
    bytes.truncate(LARGEST);
    bytes
}

#[rstest]
fn whatever_comes_from_outside_is_read_or_refused(
    #[values(
        "csi_request",
        "provider_answer",
        "record",
        "tls",
        "class",
        "secret",
        "interval",
        "mount_table",
        "authority",
        "registration",
        "http"
    )]
    name: &str,
) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let corpus = corpus(target);
    assert!(!corpus.is_empty());
    for (path, input) in &corpus {
        feed(target, input, &path.display().to_string());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let fresh = u64::try_from(now.as_nanos() & u128::from(u64::MAX)).unwrap();
    let seed = std::env::var(SEED).map_or(fresh, |seed| seed.parse().unwrap());
    let mut random = SmallRng::seed_from_u64(seed);
    let (begin, mut inputs) = (cpu_time(), 0);
    while cpu_time() - begin < BUDGET {
        let (_, input) = corpus.choose(&mut random).unwrap();
        let (_, other) = corpus.choose(&mut random).unwrap();
        let input = changed(input, other, &mut random);
        inputs += 1;
        feed(target, &input, &format!("input {inputs} of {SEED}={seed}"));
    }
    println!("{name}: {} of the corpus, {inputs} changed", corpus.len());
}

#[test]
fn each_target_is_tested_and_each_corpus_has_a_target() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let mut targets = TARGETS.map(|target| target.name);
    targets.sort();
    assert_eq!(names, targets);
}
