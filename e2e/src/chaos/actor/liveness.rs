//! The liveness probe of drivers, as kubelet makes it where no real one does.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures::future::join_all;

use crate::cluster::Cluster as _;

use super::super::ground::Ground;
use super::{Actor, sleep};

/// The port of the driver's health check, and the number of failures in as many seconds after which it is
/// restarted: a driver that has lost its socket makes it again within fifteen seconds.
const HEALTHZ: u16 = 9808;
const MOST_FAILURES: u32 = 25;
/// The number of failures after which a driver is restarted whose disk does not answer. After that it has the
/// time to start.
const MOST_WHILE_HUNG: u32 = 4;

/// What the health checks have said while a disk hung, by node.
#[derive(Default)]
pub(super) struct Liveness(RefCell<BTreeMap<String, Hang>>);

/// A disk that does not answer.
struct Hang {
    since: Instant,
    /// The time until the health check failed for the first time.
    told: Option<Duration>,
    /// Whether the driver was restarted because of it.
    restarted: bool,
}

impl Liveness {
    pub(super) fn hang_begins(&self, node: &str) {
        let hang = Hang {
            since: Instant::now(),
            told: None,
            restarted: false,
        };
        self.0.borrow_mut().insert(node.to_owned(), hang);
    }

    /// Returns the time until the health check told of it.
    pub(super) fn hang_ends(&self, node: &str) -> Option<Duration> {
        self.0.borrow_mut().remove(node)?.told
    }

    /// Notes a failure of the health check, after so many in a row. Returns how many there are now that count,
    /// and whether these are too many.
    fn failed(&self, node: &str, failures: u32) -> (u32, bool) {
        let mut hangs = self.0.borrow_mut();
        let (failures, most) = match hangs.get_mut(node) {
            None => (failures + 1, MOST_FAILURES),
            Some(hang) => {
                hang.told.get_or_insert(hang.since.elapsed());
                // A second restart would not help. The driver has its time from the end of the hang on.
                let counted = if hang.restarted { 0 } else { failures + 1 };
                (counted, MOST_WHILE_HUNG)
            }
        };
        (failures, failures >= most)
    }

    /// Returns whether a disk hangs, and notes that the driver is restarted if so.
    fn restarts(&self, node: &str) -> bool {
        let mut hangs = self.0.borrow_mut();
        let hang = hangs.get_mut(node);
        hang.map(|hang| hang.restarted = true).is_some()
    }
}

impl<G: Ground> Actor<'_, G> {
    /// Kills drivers whose health check has failed for a while, as kubelet does. No fault of a run needs
    /// that but a disk that hangs for long. Does not return.
    pub(in super::super) async fn probe_liveness(&self) {
        if self.ground.has_liveness_probes() {
            return std::future::pending().await;
        }
        join_all(self.nodes.iter().map(|node| self.probe_node(node))).await;
    }

    async fn probe_node(&self, node: &str) {
        let mut failures = 0;
        loop {
            let driver = self.ground.cluster().driver(node);
            let answer = driver.get(HEALTHZ, "/healthz").await;
            let is_alive = answer.is_ok_and(|answer| answer.status == 200);
            let (counted, is_dead) = match is_alive {
                true => (0, false),
                false => self.liveness.failed(node, failures),
            };
            failures = counted;
            if is_dead {
                failures = 0;
                self.restart_dead(node).await;
            }
            sleep(1_000).await;
        }
    }

    /// Kills a driver that is not alive. That is a finding unless its disk hangs.
    async fn restart_dead(&self, node: &str) {
        let is_hung = self.liveness.restarts(node);
        let killed = self.ground.cluster().driver(node).kill().await;
        self.world.driver_restarts(node);
        let text = format!("the liveness probe of the driver on {node} fails");
        match killed {
            Ok(()) if is_hung => self.world.log.tell(format!("{text}, as its disk hangs")),
            Ok(()) => {
                let promise = "a driver recovers without its liveness probe";
                self.world.log.find(promise, text);
            }
            // It is about to start.
            Err(error) => self.world.log.tell(format!("{text}: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_disk_that_hangs_explains_a_restart_and_it_explains_one() {
        let liveness = Liveness::default();
        let last = MOST_FAILURES - 1;
        assert_eq!(liveness.failed("one", 0), (1, false));
        assert_eq!(liveness.failed("one", last), (MOST_FAILURES, true));
        assert!(!liveness.restarts("one"));
        liveness.hang_begins("one");
        assert_eq!(liveness.failed("two", last), (MOST_FAILURES, true));
        let last = MOST_WHILE_HUNG - 1;
        assert_eq!(liveness.failed("one", last), (MOST_WHILE_HUNG, true));
        assert!(liveness.restarts("one"));
        // However long it hangs, nothing of that counts when it has ended.
        assert_eq!(liveness.failed("one", 0), (0, false));
        assert!(liveness.hang_ends("one").is_some());
        liveness.hang_begins("one");
        assert_eq!(liveness.hang_ends("one"), None);
    }
}
