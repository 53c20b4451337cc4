//! Single failures in good minutes.

use crate::cluster::Result;

use super::super::good::{How, SingleBounds};
use super::super::ground::Ground;
use super::super::schedule::What;
use super::super::store::CLASSES;
use super::{Actor, escaped, sleep};

/// The time in which a call to the provider comes: volumes are refreshed every few seconds.
const PATIENCE: u32 = 52;
const AGAIN: u64 = 100;

impl<G: Ground> Actor<'_, G> {
    /// Lets one request of the driver to the API server fail.
    pub(super) async fn api_fails_once(&self, what: What, kind: usize, how: usize) -> Result<()> {
        self.rotate_all().await?;
        let struck = self.ground.fail_once(kind, how).await?;
        self.world
            .log
            .struck(&what.kind(), u64::from(struck.is_some()));
        if let Some((request, how)) = struck {
            self.fails_once(how);
            self.world.log.tell(format!("it has struck: {request}"));
        }
        Ok(())
    }

    /// Lets a call to a node's provider fail, or leaves it without an answer.
    pub(super) async fn provider_fails_once(
        &self,
        what: What,
        node: &str,
        hangs: bool,
    ) -> Result<()> {
        self.rotate_all().await?;
        let before = self.provider_calls(node).await;
        // No pod has more than one of them; the first call ends the fault. The driver tries others again at once.
        let faults = match hangs {
            true => "[{times: 1, hang: true}]",
            false => "[{times: 1, status: {code: INTERNAL, message: a fault of the run}}]",
        };
        self.control(node, &format!("/faults?set={}", escaped(faults)))
            .await?;
        let mut calls = 0;
        for _ in 0..PATIENCE {
            calls = self.provider_calls(node).await.saturating_sub(before);
            if calls > 0 {
                break;
            }
            sleep(AGAIN).await;
        }
        let ended = self.control(node, "/faults?set=").await;
        self.undone(what, ended.map(drop));
        // A call may have come at the last moment.
        calls = calls.max(self.provider_calls(node).await.saturating_sub(before));
        if calls > 0 {
            self.fails_once(match hangs {
                true => How::Silently,
                false => How::AtOnce,
            });
        }
        self.world.log.struck(&what.kind(), u64::from(calls > 0));
        Ok(())
    }

    /// Gives all classes new values, so that the failure meets something that has to follow in time.
    async fn rotate_all(&self) -> Result<()> {
        for class in 0..CLASSES.len() {
            self.rotate(class).await?;
        }
        Ok(())
    }

    /// Notes that a request or a call has failed, or has no answer.
    fn fails_once(&self, how: How) {
        let SingleBounds { quick, silent } = self.world.bounds.single;
        let lasts = match how {
            How::Overtaken => return,
            How::AtOnce => quick,
            How::Silently => silent,
        };
        let now = self.world.now();
        self.world.good.fails(now, lasts);
        self.world
            .log
            .tell(format!("a single failure counts for {lasts:?}"));
    }
}
