//! Tells kubelet's periodic looks at published volumes from those that somebody has caused.
//!
//! kubelet publishes a mounted volume again 60 to 90 seconds after the last time, and at once when its
//! pod changes (`workerResyncIntervalJitterFactor` in `pkg/kubelet/pod_workers.go`). So a look that comes
//! sooner is about something new.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::unchanged::Verdict;
use crate::cluster::Freshness;

/// The time between two looks of kubelet that nobody has caused, less two seconds in which the earlier
/// one may have been delayed.
const RHYTHM: Duration = Duration::from_secs(58);

/// The age up to which a class serves the first looks after a start of the driver, which come one after
/// the other.
const FIRST: Duration = Duration::from_secs(5);

/// The time by which a class may be older than planned, so that its periodic read comes before a look
/// needs it: a share of the time between two reads.
const GRACE: f64 = 0.25;

/// The time after which a volume that kubelet does not look at any more is forgotten.
const UNSEEN: Duration = Duration::from_secs(600);

/// The last look at each volume.
#[derive(Default)]
pub(super) struct Looks(Mutex<HashMap<String, Look>>);

/// The last look at a volume.
struct Look {
    at: Instant,
    /// What it found, if there was nothing to do and the next look may have the same answer.
    verdict: Option<Verdict>,
}

impl Looks {
    fn volumes(&self) -> MutexGuard<'_, HashMap<String, Look>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a look at a volume. Returns how long ago the last one was, if it is known, and takes what
    /// that found.
    pub(super) fn note(&self, volume_id: &str) -> (Option<Duration>, Option<Verdict>) {
        let now = Instant::now();
        let mut volumes = self.volumes();
        if let Some(last) = volumes.get_mut(volume_id) {
            let since = now.duration_since(last.at);
            last.at = now;
            return (Some(since), last.verdict.take());
        }
        volumes.retain(|_, last| now.duration_since(last.at) < UNSEEN);
        let look = Look {
            at: now,
            verdict: None,
        };
        volumes.insert(volume_id.to_owned(), look);
        (None, None)
    }

    /// Remembers what the look at a volume found that was noted last.
    pub(super) fn remember(&self, volume_id: &str, verdict: Verdict) {
        if let Some(last) = self.volumes().get_mut(volume_id) {
            last.verdict = Some(verdict);
        }
    }

    /// Forgets a volume that is gone.
    pub(super) fn gone(&self, volume_id: &str) {
        self.volumes().remove(volume_id);
    }
}

/// Returns how new the class must be for a look. `since_last` is the time since the last look at the
/// volume, and `between_reads` the planned time between two reads of its class.
pub(super) fn freshness(since_last: Option<Duration>, between_reads: Duration) -> Freshness {
    match since_last {
        // The driver has just started.
        None => Freshness::Within(FIRST.min(between_reads)),
        Some(since_last) if since_last < RHYTHM.min(between_reads / 2) => Freshness::Afresh,
        Some(_) => Freshness::Within(between_reads.mul_f64(1.0 + GRACE)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Class, Classes, Wanted, interval::Intervals};
    use rand::{Rng as _, SeedableRng as _};
    use rstest::rstest;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[rstest]
    #[case::after_a_start(None, 120, Freshness::Within(FIRST))]
    #[case::the_pod_was_touched(Some(30), 120, Freshness::Afresh)]
    #[case::kubelets_own(Some(60), 120, Freshness::Within(seconds(150)))]
    #[case::kubelets_own_and_late(Some(400), 300, Freshness::Within(seconds(375)))]
    #[case::with_short_intervals(Some(3), 4, Freshness::Within(seconds(5)))]
    #[case::touched_with_short_intervals(Some(1), 4, Freshness::Afresh)]
    fn freshness_of_looks(
        #[case] since_last: Option<u64>,
        #[case] between_reads: u64,
        #[case] expected: Freshness,
    ) {
        let freshness = freshness(since_last.map(seconds), seconds(between_reads));
        assert_eq!(freshness, expected);
    }

    /// The time after which kubelet has looked at each volume since the driver started.
    const AT_REST: Duration = seconds(100);

    /// Runs the rhythms of kubelet and of the checks for one class. Returns the number of requests in an
    /// hour, and how long after an edit all volumes have seen it.
    async fn an_hour(every: Duration, volumes: usize, edited: Duration) -> (usize, Duration) {
        let intervals = Intervals {
            refresh: every,
            least: seconds(30),
            sync: seconds(45),
        };
        let between_reads = intervals.between_reads(None);
        let (start, classes) = (Instant::now(), Classes::default());
        let reads = AtomicUsize::new(0);
        let read = async |_| {
            if start.elapsed() >= AT_REST {
                reads.fetch_add(1, Ordering::Relaxed);
            }
            let generation = i64::from(start.elapsed() >= edited);
            tokio::time::sleep(Duration::from_millis(5)).await;
            let mut class = Class::with_secrets(Vec::new());
            class.identity.generation = Some(generation);
            Ok(class)
        };
        let looks = Looks::default();
        let mut random = rand::rngs::SmallRng::from_os_rng();
        // The first look of a volume is when its driver has started.
        let first = |_| start + seconds(90).mul_f64(random.random_range(0.0..1.0));
        let mut next: Vec<Instant> = (0..volumes).map(first).collect();
        let mut seen = vec![None; volumes];
        let mut next_check = start + seconds(1);
        while start.elapsed() < AT_REST + seconds(3600) {
            let (volume, at) = next.iter().enumerate().min_by_key(|(_, at)| **at).unwrap();
            let (at, volume) = (*at.min(&next_check), (*at <= next_check).then_some(volume));
            tokio::time::sleep_until(at).await;
            let freshness = match volume {
                Some(volume) => {
                    next[volume] = at + seconds(60).mul_f64(random.random_range(1.0..1.5));
                    freshness(looks.note(&volume.to_string()).0, between_reads)
                }
                None => Freshness::Within(between_reads),
            };
            let wanted = Wanted {
                freshness,
                known: None,
                with_parameters: false,
            };
            let class = classes.get("shop", "db", &wanted, read).await.unwrap();
            match volume {
                Some(volume) if class.identity.generation == Some(1) => {
                    seen[volume].get_or_insert(start.elapsed());
                }
                Some(_) => {}
                None => {
                    let wait = between_reads.mul_f64(random.random_range(1.0..1.1));
                    let age = classes.age("shop", "db").unwrap();
                    next_check = Instant::now() + wait.saturating_sub(age);
                }
            }
        }
        let last = seen.into_iter().map(Option::unwrap).max().unwrap();
        (reads.into_inner(), last - edited)
    }

    #[rstest]
    #[case::of_two_minutes(120, 30)]
    #[case::of_an_hour(3600, 12)]
    #[tokio::test(start_paused = true)]
    async fn at_rest_there_are_few_reads_and_an_edit_is_seen(
        #[case] every: u64,
        #[case] most: usize,
        #[values(1, 7, 200)] volumes: usize,
    ) {
        for edited in (200..3000).step_by(173) {
            let (reads, seen) = an_hour(seconds(every), volumes, seconds(edited)).await;
            assert!(reads <= most, "{reads} reads");
            let interval = seconds(every.min(300)).mul_f64(1.1);
            assert!(seen < interval + seconds(91), "seen after {seen:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn looks_are_noted_until_the_volume_is_gone() {
        let looks = Looks::default();
        let note = |volume_id| looks.note(volume_id).0;
        assert_eq!(note("a"), None);
        tokio::time::advance(seconds(70)).await;
        assert_eq!(note("a"), Some(seconds(70)));
        assert_eq!(note("a"), Some(Duration::ZERO));
        looks.gone("a");
        assert_eq!(note("a"), None);
        // Nobody says that a volume is gone which was never mounted.
        tokio::time::advance(UNSEEN).await;
        note("b");
        assert_eq!(looks.0.lock().unwrap().len(), 1);
    }
}
