//! Leaves it to the node with the newest content to make a Secret that has gone.
//!
//! A node that has seen a Secret with newer content than that of its own volumes does not make it
//! with its older content at once. The node with the newer content, if it is still there, looks
//! within one interval and makes it. After that anybody does.

use std::time::Duration;

use tokio::time::Instant;

/// How many intervals a missing Secret is left to others. Another node looks at it after 1.1 of
/// them at the latest.
const INTERVALS: f64 = 1.5;

/// Other content of a Secret, of a higher order than that of this node's volumes.
pub(super) struct Newer {
    order: u64,
    /// Whether nobody has asked for it since it was seen.
    is_news: bool,
    /// When the Secret was first found to be missing.
    missing_since: Option<Instant>,
}

impl Newer {
    /// Remembers the order of a content that has been seen just now.
    pub(super) fn seen(order: u64) -> Self {
        Self {
            order,
            is_news: true,
            missing_since: None,
        }
    }

    /// Returns once for each time that it was seen whether it was.
    pub(super) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.is_news)
    }

    /// The Secret was written since by this node, with whichever content.
    pub(super) fn written(&mut self) {
        self.is_news = false;
        self.missing_since = None;
    }

    /// The Secret is not there.
    pub(super) fn missing(&mut self) {
        self.missing_since.get_or_insert_with(Instant::now);
    }

    /// Returns whether a missing Secret is left to others, by the order of this node's content.
    pub(super) fn leaves(&self, ours: Option<u64>, every: Duration) -> bool {
        let is_older = ours.is_none_or(|ours| ours < self.order);
        let longest = every.mul_f64(INTERVALS);
        is_older
            && self
                .missing_since
                .is_none_or(|since| since.elapsed() < longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Older content waits, and never longer than for two intervals; newer content never does.
        #[test]
        fn older_content_waits_and_not_for_ever(
            seen in 1..9_u64,
            ours in proptest::option::of(0..9_u64),
            every in 1..500_u64,
            looks in proptest::collection::vec(0.8..1.1_f64, 4),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .start_paused(true)
                .build()
                .unwrap();
            let every = Duration::from_secs(every);
            let (first, made) = runtime.block_on(async {
                let mut newer = Newer::seen(seen);
                let first = newer.leaves(ours, every);
                let mut made = Duration::ZERO;
                for wait in looks {
                    if !newer.leaves(ours, every) {
                        break;
                    }
                    newer.missing();
                    let wait = every.mul_f64(wait);
                    made += wait;
                    tokio::time::advance(wait).await;
                }
                (first, made)
            });
            let is_older = ours.is_none_or(|ours| ours < seen);
            prop_assert_eq!(first, is_older);
            prop_assert_eq!(made > every.mul_f64(1.1), is_older);
            prop_assert!(made <= every.mul_f64(2.2));
        }
    }
}
