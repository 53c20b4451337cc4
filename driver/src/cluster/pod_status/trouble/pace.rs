//! Bounds how often something is done: a few times at once, and once in an interval from then on.

use std::time::Duration;

use tokio::time::Instant;

/// What was done so far of something that is done at most so often.
#[derive(Debug, Clone)]
pub(super) struct Pace {
    every: Duration,
    /// How often it may be done at once after a rest.
    at_once: u32,
    /// The time at which it may be done at once as often as that again.
    rested: Option<Instant>,
}

impl Pace {
    pub(super) fn new(at_once: u32, every: Duration) -> Self {
        Self {
            every,
            at_once,
            rested: None,
        }
    }

    /// Returns how long it is until it may be done once more.
    pub(super) fn wait(&self) -> Duration {
        let unrested = self.rested.map_or(Duration::ZERO, |rested| {
            rested.saturating_duration_since(Instant::now())
        });
        unrested.saturating_sub(self.every * self.at_once.saturating_sub(1))
    }

    /// Notes that it is done.
    pub(super) fn done(&mut self) {
        let now = Instant::now();
        let rested = self.rested.map_or(now, |rested| rested.max(now));
        self.rested = Some(rested + self.every);
    }

    /// Returns whether it may be done now, and notes that it is.
    pub(super) fn take(&mut self) -> bool {
        let is_free = self.wait().is_zero();
        if is_free {
            self.done();
        }
        is_free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_few_at_once_and_then_one_in_an_interval() {
        let every = Duration::from_secs(10);
        for (at_once, in_a_minute) in [(1, 6), (3, 8), (4, 9)] {
            let mut pace = Pace::new(at_once, every);
            let mut taken = 0;
            for _ in 0..60 {
                taken += (0..10).filter(|_| pace.take()).count();
                tokio::time::advance(Duration::from_secs(1)).await;
            }
            assert_eq!(taken, in_a_minute, "{at_once}");
            // After a rest, as often at once as in the beginning.
            tokio::time::advance(every * 10).await;
            let at_once = usize::try_from(at_once).unwrap();
            assert_eq!((0..10).filter(|_| pace.take()).count(), at_once);
            assert!(!pace.wait().is_zero() && pace.wait() <= every);
        }
    }
}
