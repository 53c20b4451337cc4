//! Tracks volumes whose refreshes fail: how long each is left alone, and which events were posted.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::Instant;
use tonic::Code;

use super::policy::{ASKED, Policy, is_another, spread};
use crate::{
    error::Error,
    record::{Age, ClassState},
};

/// The factor of the first wait after a provider has said that it has too much to do.
const EXHAUSTED_FACTOR: u32 = 4;

/// The longest wait that a provider can ask for.
const LONGEST_REQUESTED_WAIT: Duration = Duration::from_secs(60 * 60);

/// The volumes whose last refresh failed.
#[derive(Default)]
pub(super) struct Failing {
    failures: Mutex<HashMap<String, Failures>>,
    notices: Notices,
}

/// The failed refreshes of one volume, since the last one that succeeded.
struct Failures {
    count: u32,
    /// The time until which the volume is left alone.
    until: Instant,
    /// The class that the last refresh read: a change of it is a reason to try at once.
    class: Option<ClassState>,
    /// The newest state of the class that was read while refreshes failed.
    newest: Option<ClassState>,
    error: Error,
}

/// The events that this driver has posted about the refreshes of volumes, by volume, each with the time
/// since when these fail. A volume is removed when its pod has been told that refreshes work again.
#[derive(Clone, Default)]
pub(super) struct Notices(Arc<Mutex<HashMap<String, (Timestamp, Notice)>>>);

/// An event about the refreshes of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    /// Refreshes fail.
    Failing,
    /// Refreshes work again. The event has not been posted yet.
    Recovered,
}

impl Notices {
    fn volumes(&self) -> MutexGuard<'_, HashMap<String, (Timestamp, Notice)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns since when the refreshes of a volume fail, if this driver has told its pod so.
    pub(super) fn failing_since(&self, volume_id: &str) -> Option<Timestamp> {
        let volumes = self.volumes();
        let (since, notice) = volumes.get(volume_id)?;
        (*notice == Notice::Failing).then_some(*since)
    }

    /// Remembers the event that is being posted about failures that began at `since`.
    pub(super) fn posting(&self, volume_id: &str, since: Timestamp, notice: Notice) {
        self.volumes().insert(volume_id.to_owned(), (since, notice));
    }

    /// Remembers whether the event of [`posting`](Self::posting) has been posted. Does nothing if
    /// another event has been posted since, or the volume is gone.
    pub(super) fn ended(&self, volume_id: &str, since: Timestamp, notice: Notice, is_posted: bool) {
        let mut volumes = self.volumes();
        if volumes.get(volume_id) != Some(&(since, notice)) {
            return;
        }
        match (notice, is_posted) {
            (Notice::Failing, true) => {}
            (Notice::Failing, false) | (Notice::Recovered, true) => drop(volumes.remove(volume_id)),
            (Notice::Recovered, false) => {
                volumes.insert(volume_id.to_owned(), (since, Notice::Failing));
            }
        }
    }
}

impl Failing {
    fn failures(&self) -> MutexGuard<'_, HashMap<String, Failures>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what pods have been told.
    pub(super) fn notices(&self) -> &Notices {
        &self.notices
    }

    /// Returns the error of the last refresh, while the volume is left alone with this class.
    /// `class` is missing if it could not be read.
    pub(super) fn waits(&self, volume_id: &str, class: Option<&ClassState>) -> Option<Error> {
        let volumes = self.failures();
        let failures = volumes.get(volume_id)?;
        let is_same = match (&failures.class, class) {
            (Some(before), Some(now)) => {
                now.age(before) >= Age::OlderMetadata
                    || !is_another(before, now)
                        && before.annotations.get(ASKED) == now.annotations.get(ASKED)
            }
            (before, now) => before.is_none() == now.is_none(),
        };
        (is_same && Instant::now() < failures.until).then(|| failures.error.clone())
    }

    /// Returns whether the last refresh of a volume here has failed.
    pub(super) fn has_failed(&self, volume_id: &str) -> bool {
        self.failures().contains_key(volume_id)
    }

    /// Remembers that a refresh has failed. Returns how long the volume is left alone.
    pub(super) fn failed(
        &self,
        volume_id: &str,
        class: Option<ClassState>,
        error: &Error,
        policy: &Policy,
    ) -> Duration {
        let mut volumes = self.failures();
        let before = volumes.get(volume_id);
        let count = before.map_or(0, |failures| failures.count) + 1;
        let newest = newer(
            before.and_then(|failures| failures.newest.clone()),
            class.clone(),
        );
        let jitter = 0.8 + 0.4 * spread(&format!("{volume_id}{count}"));
        let wait = wait(count, error, policy).mul_f64(jitter);
        volumes.insert(
            volume_id.to_owned(),
            Failures {
                count,
                until: Instant::now() + wait,
                class,
                newest,
                error: error.clone(),
            },
        );
        wait
    }

    /// Returns the newest state of a volume's class that this driver knows: the one that is
    /// mounted, or one with which refreshes have failed since.
    pub(super) fn newest_class(&self, volume_id: &str, mounted: &ClassState) -> ClassState {
        let volumes = self.failures();
        let failed = volumes
            .get(volume_id)
            .and_then(|failures| failures.newest.clone());
        newer(Some(mounted.clone()), failed).unwrap_or_else(|| mounted.clone())
    }

    /// Forgets a volume that is gone.
    pub(super) fn gone(&self, volume_id: &str) {
        self.succeeded(volume_id);
        self.notices.volumes().remove(volume_id);
    }

    /// Forgets the failures of a volume whose refresh has succeeded.
    pub(super) fn succeeded(&self, volume_id: &str) {
        self.failures().remove(volume_id);
    }
}

/// Returns the newer of two states of a class: the second, unless it is known to be older.
fn newer(known: Option<ClassState>, read: Option<ClassState>) -> Option<ClassState> {
    match (known, read) {
        (Some(known), Some(read)) if read.age(&known) >= Age::OlderMetadata => Some(known),
        (known, read) => read.or(known),
    }
}

/// Returns how long to leave a volume alone after a number of failures in a row.
fn wait(failures: u32, error: &Error, policy: &Policy) -> Duration {
    let doublings = (failures - 1).min(20);
    let first = match error.code() {
        Code::ResourceExhausted => policy.first_wait * EXHAUSTED_FACTOR,
        _ => policy.first_wait,
    };
    let own = first
        .saturating_mul(1 << doublings)
        .min(policy.longest_wait);
    let requested = error.retry_after().unwrap_or_default();
    own.max(requested.min(LONGEST_REQUESTED_WAIT))
}

#[cfg(test)]
mod tests {
    use super::{
        super::policy::tests::{MINUTE, class, policy},
        *,
    };
    use rstest::rstest;

    #[rstest]
    #[case::first(1, Error::unavailable("x"), 10)]
    #[case::fourth(4, Error::unavailable("x"), 80)]
    #[case::bounded(40, Error::unavailable("x"), 300)]
    #[case::exhausted(1, Error::new(Code::ResourceExhausted, "x"), 40)]
    #[case::asked(1, Error::unavailable("x").with_retry_after(15 * MINUTE), 900)]
    #[case::asked_for_ever(1, Error::unavailable("x").with_retry_after(9000 * MINUTE), 3600)]
    fn waits_grow(#[case] failures: u32, #[case] error: Error, #[case] seconds: u64) {
        assert_eq!(
            wait(failures, &error, &policy()),
            Duration::from_secs(seconds)
        );
    }

    /// kubelet publishes every second for an hour, and the provider is away all the time.
    #[tokio::test(start_paused = true)]
    async fn an_hour_of_failures_is_a_handful_of_calls_and_ends_within_one_wait() {
        let (failing, policy) = (Failing::default(), policy());
        let class = class(Some(1), "5", &[]);
        let mut calls = 0;
        for _ in 0..3600 {
            if failing.waits("csi-1", Some(&class)).is_none() {
                calls += 1;
                failing.failed(
                    "csi-1",
                    Some(class.clone()),
                    &Error::unavailable("away"),
                    &policy,
                );
            }
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert!((12..=24).contains(&calls), "{calls}");
        tokio::time::advance(policy.longest_wait.mul_f64(1.2)).await;
        assert!(failing.waits("csi-1", Some(&class)).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_class_ends_the_waiting() {
        let failing = Failing::default();
        let before = class(Some(1), "5", &[]);
        failing.failed(
            "csi-1",
            Some(before.clone()),
            &Error::unavailable("away"),
            &policy(),
        );
        assert!(failing.waits("csi-1", Some(&before)).is_some());
        assert!(
            failing
                .waits("csi-1", Some(&class(Some(2), "6", &[])))
                .is_none()
        );
        assert!(
            failing
                .waits("csi-1", Some(&class(Some(1), "6", &[(ASKED, "1")])))
                .is_none()
        );
        assert!(failing.waits("csi-1", None).is_none());
        assert!(failing.waits("csi-2", Some(&before)).is_none());
    }

    #[test]
    fn what_could_not_be_posted_has_not_been_told() {
        let (failing, now) = (Failing::default(), Timestamp::now());
        let notices = failing.notices();
        for (notice, is_posted, expected) in [
            (Notice::Failing, true, Some(now)),
            (Notice::Failing, false, None),
            (Notice::Recovered, true, None),
            (Notice::Recovered, false, Some(now)),
        ] {
            notices.posting("csi-1", now, notice);
            let at_once = (notice == Notice::Failing).then_some(now);
            assert_eq!(notices.failing_since("csi-1"), at_once, "{notice:?}");
            notices.ended("csi-1", now, notice, is_posted);
            assert_eq!(
                notices.failing_since("csi-1"),
                expected,
                "{notice:?}, {is_posted}"
            );
        }
        // Earlier failures end while the pod is told of new ones.
        let later = now + Duration::from_secs(1);
        for is_posted in [true, false] {
            notices.posting("csi-1", now, Notice::Recovered);
            notices.posting("csi-1", later, Notice::Failing);
            notices.ended("csi-1", now, Notice::Recovered, is_posted);
            assert_eq!(notices.failing_since("csi-1"), Some(later));
        }
        // A volume that is gone is not remembered, even if an event is still being posted.
        notices.posting("csi-1", now, Notice::Recovered);
        failing.gone("csi-1");
        notices.ended("csi-1", now, Notice::Recovered, false);
        assert!(notices.volumes().is_empty());
    }
}
