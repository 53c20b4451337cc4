//! Decides what is checked next, and when.

use std::{collections::BTreeMap, time::Duration};

use rand::Rng as _;
use tokio::time::Instant;

use super::cache::{ClassKey, SecretKey};

/// The wait after a first failure. It doubles with each further one, up to the usual interval.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait after a failure, if the usual interval is longer.
const MAX_WAIT: Duration = Duration::from_secs(300);

/// An object that is checked again and again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Check {
    /// Whether a class has changed.
    Class(ClassKey),
    /// Whether a Secret is as desired.
    Secret(SecretKey),
    /// Whether the pod status of a volume exists.
    PodStatus(VolumeKey),
    /// Whether the pod of an unpublished volume has ended, and its Secrets lose its owners. It is
    /// checked once.
    EndedPod(VolumeKey),
}

/// A volume and the namespace of its pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct VolumeKey {
    pub(super) namespace: String,
    pub(super) volume_id: String,
}

impl Check {
    /// Returns the namespace of the object.
    pub(super) fn namespace(&self) -> &str {
        match self {
            Self::Class(class) => &class.namespace,
            Self::Secret(secret) => &secret.class.namespace,
            Self::PodStatus(volume) | Self::EndedPod(volume) => &volume.namespace,
        }
    }
}

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Checked {
    /// The object is in order, or has been put in order.
    InOrder,
    /// It was not in order and has been written, against somebody who may do the same again at once. No
    /// reason for an earlier check counts for a while.
    Repaired,
    /// It is not, or nothing is known of it. The check is repeated soon.
    Failed,
}

impl Checked {
    pub(super) fn of<T, E>(result: &Result<T, E>) -> Self {
        match result {
            Ok(_) => Self::InOrder,
            Err(_) => Self::Failed,
        }
    }
}

#[derive(Clone, Copy)]
struct Timing {
    due: Instant,
    failures: u32,
    /// The time before which nobody makes the check due.
    not_before: Instant,
}

/// The checks, and when each is due.
#[derive(Default)]
pub(super) struct Schedule(BTreeMap<Check, Timing>);

impl Schedule {
    /// Adds a check that is due after a first wait. An earlier timing of the same check is replaced.
    pub(super) fn add(&mut self, check: Check, first: Duration) {
        let now = Instant::now();
        let timing = Timing {
            due: now + first,
            failures: 0,
            not_before: now,
        };
        self.0.insert(check, timing);
    }

    pub(super) fn contains(&self, check: &Check) -> bool {
        self.0.contains_key(check)
    }

    pub(super) fn remove(&mut self, check: &Check) {
        self.0.remove(check);
    }

    /// Keeps only the checks for which `keep` returns `true`.
    pub(super) fn retain(&mut self, keep: impl Fn(&Check) -> bool) {
        self.0.retain(|check, _| keep(check));
    }

    /// Sets when a check is due again, by its result and its usual interval. What has been repaired is not checked
    /// within the time `quiet`.
    pub(super) fn checked(
        &mut self,
        check: &Check,
        result: Checked,
        every: Duration,
        quiet: Duration,
    ) {
        if let Some(timing) = self.0.get_mut(check) {
            let now = Instant::now();
            match result {
                Checked::InOrder => timing.failures = 0,
                Checked::Repaired => (timing.failures, timing.not_before) = (0, now + quiet),
                Checked::Failed => timing.failures += 1,
            }
            timing.due = now + wait(timing.failures, every);
        }
    }

    /// Makes a check due at once, or as soon as what was repaired may be checked again. A check that has
    /// failed waits for its next attempt.
    pub(super) fn expedite(&mut self, check: &Check) {
        if let Some(timing) = self.0.get_mut(check)
            && timing.failures == 0
        {
            timing.due = timing.due.min(timing.not_before.max(Instant::now()));
        }
    }

    /// Returns whether a check is due within a time.
    pub(super) fn is_due_within(&self, check: &Check, time: Duration) -> bool {
        let timing = self.0.get(check);
        timing.is_some_and(|timing| timing.due <= Instant::now() + time)
    }

    /// Returns the next check and when it is due, of the namespaces in which a check may begin.
    pub(super) fn next(&self, may_begin: impl Fn(&str) -> bool) -> Option<(Instant, Check)> {
        let checks = self.0.iter();
        let possible = checks.filter(|(check, _)| may_begin(check.namespace()));
        let (check, timing) = possible.min_by_key(|(_, timing)| timing.due)?;
        Some((timing.due, check.clone()))
    }

    /// Returns the number of checks.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Returns the usual wait between two checks, which varies a little, so that checks spread.
pub(super) fn usual_wait(every: Duration) -> Duration {
    wait(0, every)
}

/// Returns the wait until a class is read again, which is never shorter than planned.
pub(super) fn wait_for_read(every: Duration) -> Duration {
    every.mul_f64(rand::rng().random_range(1.0..1.1))
}

/// Returns a random wait within an interval, for the first checks after the start of the process.
pub(super) fn random_wait(within: Duration) -> Duration {
    within.mul_f64(rand::rng().random_range(0.0..1.0))
}

fn wait(failures: u32, every: Duration) -> Duration {
    let wait = match failures {
        0 => every,
        _ => {
            let wait = FIRST_WAIT * 2_u32.saturating_pow(failures.min(16) - 1);
            wait.min(every).min(MAX_WAIT)
        }
    };
    wait.mul_f64(rand::rng().random_range(0.8..1.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(1000);
    const QUIET: Duration = Duration::from_secs(100);

    fn class(namespace: &str) -> Check {
        Check::Class(ClassKey {
            namespace: namespace.to_owned(),
            name: "db".to_owned(),
        })
    }

    /// Returns how long it is until a check is due.
    fn due_in(schedule: &Schedule) -> f64 {
        let (due, _) = schedule.next(|_| true).unwrap();
        due.duration_since(Instant::now()).as_secs_f64()
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_check_is_repeated_soon_and_then_more_and_more_seldom() {
        let mut schedule = Schedule::default();
        let check = class("shop");
        schedule.add(check.clone(), Duration::ZERO);
        assert_eq!(due_in(&schedule), 0.0);
        for seconds in [
            1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 300.0, 300.0,
        ] {
            schedule.checked(&check, Checked::Failed, EVERY, QUIET);
            let due = due_in(&schedule);
            assert!((0.8 * seconds..1.1 * seconds).contains(&due), "{due}");
        }
        // Others may find a reason for a check, which does not shorten this wait.
        schedule.expedite(&check);
        assert!(due_in(&schedule) > 200.0);
        schedule.checked(&check, Checked::InOrder, EVERY, QUIET);
        assert!((800.0..1100.0).contains(&due_in(&schedule)));
        schedule.expedite(&check);
        assert_eq!(due_in(&schedule), 0.0);
        // With a short interval no failure makes checks rarer than usual.
        let every = Duration::from_millis(200);
        schedule.checked(&check, Checked::Failed, every, QUIET);
        assert!(due_in(&schedule) < 0.22);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_repaired_is_left_for_a_while() {
        let mut schedule = Schedule::default();
        let check = class("shop");
        schedule.add(check.clone(), Duration::ZERO);
        for _ in 0..3 {
            schedule.checked(&check, Checked::Repaired, EVERY, QUIET);
            assert!((800.0..1100.0).contains(&due_in(&schedule)));
            schedule.expedite(&check);
            assert_eq!(due_in(&schedule), 100.0);
            tokio::time::advance(QUIET).await;
            schedule.expedite(&check);
            assert_eq!(due_in(&schedule), 0.0);
        }
        // A reason for a check never delays one.
        schedule.checked(&check, Checked::Repaired, QUIET / 10, QUIET);
        schedule.expedite(&check);
        assert!(due_in(&schedule) < 12.0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_check_that_may_begin_is_next() {
        let mut schedule = Schedule::default();
        for (seconds, namespace) in ["a", "b", "c"].into_iter().enumerate() {
            schedule.add(class(namespace), Duration::from_secs(seconds as u64));
        }
        let next = |may_begin: &[&str]| {
            let next = schedule.next(|namespace| may_begin.contains(&namespace));
            next.map(|(_, check)| check.namespace().to_owned())
        };
        assert_eq!(next(&["a", "b", "c"]).as_deref(), Some("a"));
        assert_eq!(next(&["c", "b"]).as_deref(), Some("b"));
        assert_eq!(next(&[]), None);
        // A check that is not in the schedule gets no timing.
        schedule.remove(&class("a"));
        schedule.checked(&class("a"), Checked::Failed, EVERY, QUIET);
        assert_eq!(schedule.len(), 2);
    }
}
