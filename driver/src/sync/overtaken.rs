//! Leaves the creation of a deleted Secret to the node with the newest content.
//!
//! A node that has seen a Secret with newer content than that of its own volumes does not create it
//! again with the older content at once. The node with the newer content, if it still exists, checks
//! the Secret within one interval and creates it. After that, any node does.

use std::time::Duration;

use tokio::time::Instant;

/// The number of intervals for which an absent Secret is left to other nodes, which check it after
/// 1.1 intervals at the latest.
const INTERVALS: f64 = 1.5;

/// A Secret that was seen with other content, of a higher order than that of this node's volumes.
pub(super) struct Overtaken {
    order: u64,
    /// Whether it was seen since [`Overtaken::take_news`] was called last.
    is_news: bool,
    /// The time at which the Secret was first found to be absent.
    absent_since: Option<Instant>,
}

impl Overtaken {
    /// Remembers the order of a content that has been seen just now.
    pub(super) fn by(order: u64) -> Self {
        Self {
            order,
            is_news: true,
            absent_since: None,
        }
    }

    /// Returns whether the content was seen since the last call.
    pub(super) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.is_news)
    }

    /// Notes that this node has written the Secret, with whichever content.
    pub(super) fn set_written(&mut self) {
        self.is_news = false;
        self.absent_since = None;
    }

    /// Notes that the Secret does not exist.
    pub(super) fn set_absent(&mut self) {
        self.absent_since.get_or_insert_with(Instant::now);
    }

    /// Returns whether this node, whose content has this order, leaves an absent Secret to others.
    pub(super) fn waits(&self, ours: Option<u64>, every: Duration) -> bool {
        let is_older = ours.is_none_or(|ours| ours < self.order);
        let longest = every.mul_f64(INTERVALS);
        is_older
            && self
                .absent_since
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
                let mut overtaken = Overtaken::by(seen);
                let first = overtaken.waits(ours, every);
                let mut made = Duration::ZERO;
                for wait in looks {
                    if !overtaken.waits(ours, every) {
                        break;
                    }
                    overtaken.set_absent();
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
