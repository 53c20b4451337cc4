//! The pause of kubelet between attempts at one operation.

use std::time::Duration;

/// 500 ms, doubled with every failure up to the longest: two minutes and two seconds in kubelet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    failures: u32,
    longest: Duration,
}

const FIRST: Duration = Duration::from_millis(500);
/// The longest pause of kubelet.
pub(crate) const LONGEST: Duration = Duration::from_secs(122);

impl Backoff {
    /// Returns the pauses of an operation that has not failed yet.
    pub(crate) fn up_to(longest: Duration) -> Self {
        Self {
            failures: 0,
            longest,
        }
    }

    /// Returns how long to wait after one more failure.
    pub(crate) fn next_pause(&mut self) -> Duration {
        let pause = FIRST
            .saturating_mul(2_u32.saturating_pow(self.failures))
            .min(self.longest);
        self.failures = self.failures.saturating_add(1);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let mut backoff = Backoff::up_to(LONGEST);
        let pauses: Vec<f64> = (0..10)
            .map(|_| backoff.next_pause().as_secs_f64())
            .collect();
        assert_eq!(
            pauses,
            [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 122.0, 122.0]
        );
        for _ in 0..100 {
            assert_eq!(backoff.next_pause(), LONGEST);
        }
    }
}
