//! Checks a schedule that somebody wrote: what it names exists, and its numbers make sense.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::ops::RangeInclusive;
use std::path::Path;

use serde::de::IgnoredAny;

use super::super::actor::{ALTERATIONS, WRONG};
use super::super::features;
use super::super::store::CLASSES;
use super::super::tenants::TRICKS;
use super::make::WAYS;
use super::{PODS, Schedule, Step, What};

/// The largest schedule that is read, in bytes.
const LARGEST: u64 = 1 << 20;
/// The fields of steps, with the numbers that they may have. Nodes count modulo those that there are.
const RANGES: [(&str, RangeInclusive<u64>); 8] = [
    ("pod", 0..=PODS as u64 - 1),
    ("class", 0..=CLASSES.len() as u64 - 1),
    ("feature", 0..=features::CLASSES as u64 - 1),
    ("number", 0..=u32::MAX as u64),
    ("status", 400..=599),
    ("mounts", 1..=1_000),
    // All steps of a round have to end some minutes after the last has begun.
    ("lasts", 1..=60_000),
    ("at", 0..=3_600_000),
];
/// The milliseconds of an answer that is late; `by` of the clock are seconds, also backwards.
const LATE: RangeInclusive<u64> = 1..=60_000;

impl Schedule {
    /// Reads and parses a file.
    ///
    /// # Errors
    /// When it cannot be read, is too large, or is no [`Schedule`].
    pub fn read(path: &Path) -> Result<Self, String> {
        let mut text = String::new();
        let file = File::open(path).map_err(|error| error.to_string())?;
        let read = file.take(LARGEST + 1).read_to_string(&mut text);
        if text.len() as u64 > LARGEST {
            return Err(format!("it has more than {LARGEST} bytes"));
        }
        read.map_err(|error| error.to_string())?;
        Self::parse(&text)
    }
}

/// Checks that a line has no fields but those of its step.
///
/// # Errors
/// Names one that it has besides.
pub(super) fn fields(line: &str, step: &Step) -> Result<(), String> {
    let own = serde_json::to_value(step).map_err(|error| error.to_string())?;
    let written: BTreeMap<String, IgnoredAny> =
        serde_json::from_str(line).map_err(|error| error.to_string())?;
    match written.keys().find(|name| own.get(name).is_none()) {
        Some(name) => Err(format!("{name:?} is no field of {}", step.what.kind())),
        None => Ok(()),
    }
}

/// Checks the numbers of a step.
///
/// # Errors
/// Names the one that is not possible, and those that are.
pub(super) fn check(step: &Step) -> Result<(), String> {
    let value = serde_json::to_value(step).map_err(|error| error.to_string())?;
    let late = (value["what"] != "step-clock").then_some(("by", LATE));
    let ways = match &step.what {
        What::ProviderWrong { .. } => WRONG.len(),
        What::AlterFiles { .. } => ALTERATIONS.len(),
        What::Hostile { .. } => TRICKS,
        _ => WAYS,
    };
    let how = [("how", 0..=ways as u64 - 1)];
    for (name, range) in RANGES.into_iter().chain(how).chain(late) {
        let number = value[name].as_u64();
        if number.is_some_and(|number| !range.contains(&number)) {
            let (first, last) = range.into_inner();
            let number = number.unwrap_or_default();
            return Err(format!(
                "{name} is {number}, but has to be {first} to {last}"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("", "it has no step, so nothing would be tried")]
    #[case("\n\n", "it has no step, so nothing would be tried")]
    #[case(
        r#"{"at":0,"what":"delete","pod":8}"#,
        "line 2: pod is 8, but has to be 0 to 7"
    )]
    #[case(
        r#"{"at":0,"what":"rotate","class":4}"#,
        "line 2: class is 4, but has to be 0 to 3"
    )]
    #[case(
        r#"{"at":0,"what":"hostile","node":0,"lasts":9,"how":10}"#,
        "line 2: how is 10, but has to be 0 to 9"
    )]
    #[case(
        r#"{"at":0,"what":"bury-volumes","pod":0,"mounts":0}"#,
        "line 2: mounts is 0, but has to be 1 to 1000"
    )]
    #[case(
        r#"{"at":0,"what":"repeat-calls","node":0,"lasts":9,"by":0}"#,
        "line 2: by is 0, but has to be 1 to 60000"
    )]
    #[case(
        r#"{"at":0,"what":"kill-driver","node":0,"lasts":9}"#,
        "line 2: \"lasts\" is no field of kill-driver"
    )]
    #[case(
        r#"{"at":18446744073709551615,"what":"kill-driver","node":0}"#,
        "line 2: at is 18446744073709551615, but has to be 0 to 3600000"
    )]
    fn what_cannot_be_tried_is_refused(#[case] steps: &str, #[case] expected: &str) {
        let error = Schedule::parse(&format!("seed 1\n{steps}")).unwrap_err();
        assert_eq!(error, expected);
    }

    #[test]
    fn what_a_seed_decides_and_a_clock_that_goes_back_are_possible() {
        for seed in 0..60 {
            let schedule = Schedule::of_seed(seed, 3, 2);
            assert_eq!(Schedule::parse(&schedule.to_string()), Ok(schedule));
        }
        let back = r#"{"at":0,"what":"step-clock","node":5,"by":-86400}"#;
        assert!(Schedule::parse(&format!("seed 1\n{back}")).is_ok());
    }

    #[test]
    fn a_file_that_is_too_large_is_not_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let step = r#"{"at":0,"what":"kill-driver","node":0}"#;
        let text = format!("seed 1\n{step}\n");
        std::fs::write(file.path(), &text).unwrap();
        assert_eq!(Schedule::read(file.path()), Schedule::parse(&text));
        let empty = "\n".repeat(usize::try_from(LARGEST).unwrap());
        std::fs::write(file.path(), text + &empty).unwrap();
        let error = Schedule::read(file.path()).unwrap_err();
        assert_eq!(error, "it has more than 1048576 bytes");
    }
}
