//! kubelet's waits.

use std::time::Duration;

/// kubelet's deadline of a call.
pub(super) const DEADLINE: Duration = Duration::from_secs(120);
/// kubelet's wait after the first failure, and the longest.
const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(122);

/// The waits after failures of one volume, each twice as long as the one before
/// (`pkg/util/goroutinemap/exponentialbackoff` of kubelet).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(FIRST)
    }
}

impl Backoff {
    /// Returns the wait after one more failure.
    pub(crate) fn next(&mut self) -> Duration {
        let wait = self.0;
        self.0 = (2 * wait).min(LONGEST);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_two_minutes() {
        let mut backoff = Backoff::default();
        let waits: Vec<u128> = (0..10).map(|_| backoff.next().as_millis()).collect();
        assert_eq!(
            waits,
            [
                500, 1000, 2000, 4000, 8000, 16000, 32000, 64000, 122_000, 122_000
            ]
        );
    }
}
