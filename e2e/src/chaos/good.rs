//! Good minutes: nothing disturbs but single failures, and so everything happens sooner than otherwise.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::Timestamp;

use super::lock;

/// The times of good minutes.
#[derive(Clone, Copy, Debug)]
pub(super) struct GoodBounds {
    /// From the creation of a pod until it is ready.
    pub(super) publish: Duration,
    /// From a change of the store or a class until a volume has followed.
    pub(super) follow: Duration,
    /// From the last step until everything is as it should be.
    pub(super) converge: Duration,
}

/// How a single request or call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// Another write was first, which is no failure to be told.
    Overtaken,
    /// With an error.
    AtOnce,
    /// There is no answer.
    Silently,
}

/// For how long a single failure keeps somebody waiting, and for how long pods may be told of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct SingleBounds {
    /// An attempt that fails at once, and a pause.
    pub(super) quick: Duration,
    /// An attempt that has no answer.
    pub(super) silent: Duration,
}

/// Whether these are good minutes, and the single failures that there were.
#[derive(Default)]
pub(super) struct Good {
    is_now: AtomicBool,
    failures: Mutex<Vec<Single>>,
}

/// A single failure.
#[derive(Clone, Copy, Debug)]
struct Single {
    /// The time, by [`World::now`](super::world::World::now).
    at: Duration,
    /// The time of the clock.
    clock: Timestamp,
    lasts: Duration,
}

impl Good {
    /// Begins or ends good minutes.
    pub(super) fn set(&self, is_now: bool) {
        self.is_now.store(is_now, Ordering::Relaxed);
    }

    /// Returns whether these are good minutes.
    pub(super) fn is_now(&self) -> bool {
        self.is_now.load(Ordering::Relaxed)
    }

    /// Notes a failure that keeps somebody waiting for so long.
    pub(super) fn fails(&self, now: Duration, lasts: Duration) {
        let clock = Timestamp::now();
        let single = Single {
            at: now,
            clock,
            lasts,
        };
        lock(&self.failures).push(single);
    }

    /// Returns for how long failures can have kept somebody waiting since a time.
    pub(super) fn allowance(&self, since: Duration) -> Duration {
        let failures = lock(&self.failures);
        let matter = failures
            .iter()
            .filter(|single| single.at + single.lasts > since);
        matter.map(|single| single.lasts).sum()
    }

    /// Returns whether a failure explains that somebody is warned at a time.
    pub(super) fn explains(&self, warned: Timestamp) -> bool {
        lock(&self.failures).iter().any(|single| {
            // The times of events are whole seconds.
            let after = warned.as_second() - single.clock.as_second();
            let lasts = i64::try_from(single.lasts.as_secs()).unwrap_or(i64::MAX);
            (-1..=lasts.saturating_add(1)).contains(&after)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_counts_for_as_long_as_it_lasts() {
        const SECOND: Duration = Duration::from_secs(1);
        let good = Good::default();
        assert_eq!(good.allowance(Duration::ZERO), Duration::ZERO);
        assert!(!good.explains(Timestamp::now()));
        good.fails(10 * SECOND, 4 * SECOND);
        good.fails(20 * SECOND, 2 * SECOND);
        assert_eq!(good.allowance(9 * SECOND), 6 * SECOND);
        assert_eq!(good.allowance(13 * SECOND), 6 * SECOND);
        assert_eq!(good.allowance(14 * SECOND), 2 * SECOND);
        assert_eq!(good.allowance(22 * SECOND), Duration::ZERO);
        assert!(good.explains(Timestamp::now()));
        let later = Timestamp::now() + jiff::SignedDuration::from_secs(8);
        assert!(!good.explains(later));
    }
}
