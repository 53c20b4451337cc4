//! The pause of kubelet between attempts at one operation.

use std::time::Duration;

/// 500 ms, doubled with every failure up to two minutes and two seconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(122);

impl Backoff {
    /// Returns how long to wait after one more failure.
    pub(crate) fn next_pause(&mut self) -> Duration {
        let pause = FIRST
            .saturating_mul(2_u32.saturating_pow(self.failures))
            .min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let mut backoff = Backoff::default();
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
