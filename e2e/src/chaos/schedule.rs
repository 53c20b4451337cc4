//! What a run does, and when: a pure list that a seed decides, and that can be printed, stored, cut
//! and run again.

mod check;
mod kinds;
mod make;

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::random::Random;
pub(super) use kinds::{HUNG_FOR_LONG, What};
pub(super) use make::is_patient;
use make::round;

/// The number of well-behaved pods that can be there at the same time. Pods of the same number have
/// the same name.
pub(super) const PODS: usize = 8;
/// The time in which the steps of a round begin.
const STORM: Duration = Duration::from_secs(25);

/// The steps of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// The seed that it was made from.
    pub seed: u64,
    /// Rounds, one after another: the steps of a round, and then a calm in which all has to converge.
    pub(super) rounds: Vec<Vec<Step>>,
}

/// A step of a round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Step {
    /// The milliseconds after the beginning of the round.
    pub(super) at: u64,
    /// The action or fault.
    #[serde(flatten)]
    pub(super) what: What,
}

impl Schedule {
    /// Returns the schedule of a seed.
    pub fn of_seed(seed: u64, rounds: usize, nodes: usize) -> Self {
        let mut random = Random(seed);
        let rounds = (0..rounds)
            .map(|number| round(&mut random, seed, number, nodes))
            .collect();
        Self { seed, rounds }
    }

    /// Returns the schedule of a seed for so many minutes, on so many nodes. It begins with the rounds of
    /// the same seed for fewer minutes.
    pub fn of_minutes(seed: u64, minutes: f64, nodes: usize) -> Self {
        let rounds = (minutes.clamp(0.0, 10_000.0) * 60.0 / STORM.as_secs_f64()).ceil();
        Self::of_seed(seed, (rounds as usize).max(1), nodes)
    }

    /// Parses what [`Display`](fmt::Display) writes: a first line with the seed, then one JSON
    /// object per line, and an empty line between rounds.
    ///
    /// # Errors
    /// Names the line that is none, or whose step is not possible; when there is no step.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut lines = text.lines().enumerate();
        let first = lines.next().map(|(_, line)| line).unwrap_or_default();
        let seed = first.strip_prefix("seed ").and_then(|n| n.parse().ok());
        let seed = seed.ok_or("line 1 is not seed NUMBER")?;
        let mut rounds = vec![Vec::new()];
        for (number, line) in lines {
            if line.trim().is_empty() {
                rounds.push(Vec::new());
                continue;
            }
            let step = serde_json::from_str(line);
            let step: Step = step.map_err(|error| format!("line {}: {error}", number + 1))?;
            let checked = check::fields(line, &step).and_then(|()| check::check(&step));
            checked.map_err(|error| format!("line {}: {error}", number + 1))?;
            if let Some(round) = rounds.last_mut() {
                round.push(step);
            }
        }
        rounds.retain(|round| !round.is_empty());
        if rounds.is_empty() {
            return Err("it has no step, so nothing would be tried".to_owned());
        }
        Ok(Self { seed, rounds })
    }

    /// Returns the number of steps.
    pub fn len(&self) -> usize {
        self.rounds.iter().map(Vec::len).sum()
    }

    /// Returns whether it has no step.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}", self.seed)?;
        for (number, round) in self.rounds.iter().enumerate() {
            if number > 0 {
                writeln!(f)?;
            }
            for step in round {
                let line = serde_json::to_string(step).map_err(|_| fmt::Error)?;
                writeln!(f, "{line}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_decides_the_schedule_and_it_is_read_as_it_is_printed() {
        let schedule = Schedule::of_seed(7, 3, 2);
        assert_eq!(schedule, Schedule::of_seed(7, 3, 2));
        assert_ne!(schedule, Schedule::of_seed(8, 3, 2));
        assert_eq!(Schedule::parse(&schedule.to_string()).unwrap(), schedule);
        let error = Schedule::parse("seed 1\n{\"at\": 1, \"what\": \"dance\"}").unwrap_err();
        assert!(error.starts_with("line 2: "), "{error}");
    }

    #[test]
    fn every_kind_occurs_and_no_two_faults_of_a_node_that_exclude_each_other_meet() {
        let mut kinds = BTreeSet::new();
        for seed in 0..60 {
            for round in Schedule::of_seed(seed, 4, 2).rounds {
                for (number, step) in round.iter().enumerate() {
                    kinds.insert(step.what.kind());
                    let Some(node) = step.what.alone_on() else {
                        continue;
                    };
                    let mut later = round[number + 1..].iter();
                    let meets = later.find(|later| {
                        later.what.alone_on() == Some(node)
                            && later.at < step.at + step.what.lasts()
                    });
                    assert_eq!(meets, None, "{step:?}");
                }
            }
        }
        assert_eq!(kinds.len(), 53, "{kinds:?}");
    }

    #[test]
    fn a_short_run_has_the_faults_that_would_come_seldom_by_chance() {
        // A single node has not the time for more.
        const EVERYWHERE: [&str; 6] = [
            "reboot",
            "wipe-plugin",
            "repeat-calls",
            "memory-near",
            "step-clock",
            "bury-volumes",
        ];
        const ON_TWO: [&str; 6] = [
            "disk-hung",
            "driver-paused",
            "propagation-lost",
            "answers-compete",
            "api-fails-once",
            "provider-fails-once",
        ];
        for nodes in [1, 2] {
            for seed in 0..60 {
                let rounds = Schedule::of_seed(seed, 8, nodes).rounds;
                let kinds: BTreeSet<String> = rounds
                    .iter()
                    .flatten()
                    .map(|step| step.what.kind())
                    .collect();
                let on_two = ON_TWO.iter().filter(|_| nodes > 1);
                for kind in EVERYWHERE.iter().chain(on_two) {
                    assert!(
                        kinds.contains(*kind),
                        "{nodes} nodes, seed {seed}: {kinds:?}"
                    );
                }
            }
        }
    }
}
