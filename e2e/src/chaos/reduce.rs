//! Makes a schedule smaller that breaks a promise, by running parts of it.

use crate::cluster::Result;

use super::report::Outcome;
use super::schedule::{Schedule, Step};

/// Returns the smallest schedule that broke the same promise, after at most `runs` runs. Leaves out
/// whole rounds, then halves of the steps, then smaller parts.
///
/// # Errors
/// When a run could not be made.
pub(super) async fn reduce(
    schedule: &Schedule,
    invariant: &str,
    runs: usize,
    run: impl AsyncFn(Schedule) -> Result<Outcome>,
) -> Result<Schedule> {
    let mut left = runs;
    let mut fails = async |rounds: Vec<Vec<Step>>| {
        left = left.saturating_sub(1);
        let seed = schedule.seed;
        let candidate = Schedule { seed, rounds };
        eprintln!(
            "a run with {} steps, to make the schedule smaller",
            candidate.len()
        );
        let outcome = run(candidate.clone()).await?;
        // What a run saw that failed itself does not count.
        let is_same = outcome.broken_off.is_none()
            && outcome
                .findings
                .iter()
                .any(|found| found.invariant == invariant);
        Result::Ok((is_same.then_some(candidate), left))
    };
    if runs == 0 {
        return Ok(schedule.clone());
    }
    let mut smallest = schedule.clone();
    let mut left = runs;
    for round in schedule
        .rounds
        .iter()
        .rev()
        .take(if schedule.rounds.len() > 1 { 2 } else { 0 })
    {
        if left == 0 {
            return Ok(smallest);
        }
        let (smaller, now_left) = fails(vec![with_pods(round, schedule)]).await?;
        left = now_left;
        if let Some(smaller) = smaller {
            smallest = smaller;
            break;
        }
    }
    let mut parts = 2;
    while left > 0 && parts <= smallest.len() {
        let mut found = None;
        for part in 0..parts {
            if left == 0 {
                break;
            }
            let (smaller, now_left) = fails(without(&smallest, part, parts)).await?;
            left = now_left;
            if smaller.is_some() {
                found = smaller;
                break;
            }
        }
        match found {
            Some(smaller) => {
                smallest = smaller;
                parts = 2.max(parts - 1);
            }
            None => parts *= 2,
        }
    }
    Ok(smallest)
}

/// Returns a round with the pods that the first one begins with.
fn with_pods(round: &[Step], schedule: &Schedule) -> Vec<Step> {
    let first = schedule
        .rounds
        .first()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let pods = first.iter().take_while(|step| step.at < 1_000);
    let mut steps: Vec<Step> = pods.chain(round).cloned().collect();
    steps.dedup();
    steps.sort_by_key(|step| step.at);
    steps
}

/// Returns the rounds without one of so many equal parts of the steps.
fn without(schedule: &Schedule, part: usize, parts: usize) -> Vec<Vec<Step>> {
    let length = schedule.len();
    let gone = part * length / parts..(part + 1) * length / parts;
    let mut number = 0;
    let mut rounds = Vec::new();
    for round in &schedule.rounds {
        let kept = round.iter().filter(|_| {
            number += 1;
            !gone.contains(&(number - 1))
        });
        rounds.push(kept.cloned().collect());
    }
    rounds
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;
    use crate::chaos::report::Finding;
    use crate::chaos::schedule::What;

    fn outcome(fails: bool) -> Outcome {
        let finding = Finding {
            at: Duration::ZERO,
            invariant: "i",
            seen: String::new(),
        };
        Outcome {
            findings: if fails { vec![finding] } else { Vec::new() },
            timeline: Vec::new(),
            steps: BTreeMap::new(),
            struck: BTreeMap::new(),
            left_out: BTreeMap::new(),
            checks: BTreeMap::new(),
            longest: BTreeMap::new(),
            broken_off: None,
        }
    }

    #[tokio::test]
    async fn a_schedule_is_reduced_to_what_is_needed_and_no_more_runs_are_made_than_allowed() {
        let schedule = Schedule::of_seed(3, 3, 2);
        let needed = |step: &&Step| matches!(step.what, What::KillDriver { .. });
        let kills = |schedule: &Schedule| schedule.rounds.iter().flatten().filter(needed).count();
        assert!(kills(&schedule) > 0);
        for allowed in [0, 5, 60] {
            let runs = Cell::new(0);
            let run = async |candidate: Schedule| {
                runs.set(runs.get() + 1);
                Ok(outcome(kills(&candidate) > 0))
            };
            let smallest = reduce(&schedule, "i", allowed, run).await.unwrap();
            assert!(runs.get() <= allowed);
            assert!(kills(&smallest) > 0);
            match allowed {
                0 => assert_eq!(smallest, schedule),
                60 => assert_eq!(smallest.len(), 1),
                _ => assert!(smallest.len() < schedule.len() / 2),
            }
        }
    }
}
