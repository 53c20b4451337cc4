//! Faults of a node's provider.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;
use kube::Api;
use kube::api::ListParams;

use crate::cluster::{Cluster as _, Component, Error, Result};

use super::super::ground::{Ground, PROVIDER};
use super::super::schedule::{HUNG_FOR_LONG, What};
use super::{Actor, CONTROL, escaped, sleep};

/// The time from the beginning of a hang, which lasts longer, until an event tells of a refresh: an interval of
/// rotation, the driver's deadline for a refresh (30 s), and the rest for a machine with other work.
const TOLD: Duration = Duration::from_secs(42);
/// The time in which a provider that was killed is there again.
const STARTS: Duration = Duration::from_secs(10);
/// The reason of the event about a refresh that failed.
const ROTATION_FAILED: &str = "MountRotationFailed";
/// The time from the beginning of a hang after which the API server has to be there, so that it gets the event.
const CLEAR: Duration = Duration::from_secs(24);

impl<G: Ground> Actor<'_, G> {
    /// Lets a node's provider fail for a while.
    pub(super) async fn provider_faults(
        &self,
        what: What,
        node: &str,
        lasts: u64,
        faults: &str,
    ) -> Result<()> {
        let before = self.provider_calls(node).await;
        self.control(node, &format!("/faults?set={}", escaped(faults)))
            .await?;
        sleep(lasts).await;
        let calls = self.provider_calls(node).await.saturating_sub(before);
        self.world.log.struck(&what.kind(), calls);
        if matches!(what, What::ProviderHung { .. }) {
            return Ok(());
        }
        self.control(node, "/faults?set=").await.map(drop)
    }

    /// Lets a node's provider hang for a while. If it is a long one, somebody has to be told of the refreshes that
    /// have no answer before kubelet or the provider ends them.
    pub(super) async fn provider_hung(&self, what: What, node: &str, lasts: u64) -> Result<()> {
        let begun = (self.world.now(), Timestamp::now());
        let hang = self.provider_faults(what, node, lasts, "[{hang: true}]");
        let is_long = lasts >= HUNG_FOR_LONG && self.ground.leaves_deadlines_to_the_driver();
        let told = async {
            match is_long {
                true => self.refreshes_are_told(node, begun).await,
                false => Ok(()),
            }
        };
        let (hung, told) = tokio::join!(hang, told);
        // As its liveness probe does; the calls that hang break off.
        let killed = self.ground.cluster().provider(node, PROVIDER).kill().await;
        // What waits for the end of this fault may need the provider.
        let begun = Instant::now();
        while killed.is_ok()
            && begun.elapsed() < STARTS
            && self.control(node, "/calls").await.is_err()
        {
            sleep(100).await;
        }
        hung.and(told).and(killed)
    }

    /// Checks that somebody is told of a refresh without an answer in time, if volumes were to be refreshed all the
    /// time and the API server could be asked.
    async fn refreshes_are_told(
        &self,
        node: &str,
        (begun, clock): (Duration, Timestamp),
    ) -> Result<()> {
        let running = || {
            let pods = self.pods_of(node).into_iter();
            let pods = pods.filter(|pod| pod.ready && !self.world.is_buried(&pod.uid));
            pods.map(|pod| pod.uid).collect::<BTreeSet<_>>()
        };
        let mut stay = running();
        while self.world.now() - begun < TOLD {
            sleep(500).await;
            stay = &stay & &running();
        }
        let was_away = self.world.api_was_away_since(begun + CLEAR);
        if stay.is_empty() || was_away || !self.world.driver_ran_since(node, begun) {
            return Ok(());
        }
        let events =
            Api::<Event>::namespaced(self.ground.cluster().client(), self.namespace.name());
        let events = events.list(&ListParams::default()).await;
        // A fault that begins just now is no reason to end a run.
        let Ok(events) = events else {
            return Ok(());
        };
        self.world.log.checked("long hangs of a provider", 1);
        let first = events.items.into_iter().filter_map(|event| {
            // The times of events are whole seconds.
            let after = event.last_timestamp?.0.as_second() - clock.as_second();
            let is_failure = event.reason.as_deref() == Some(ROTATION_FAILED);
            let stays = stay.contains(&event.involved_object.uid?);
            let after = u64::try_from(after).ok()?;
            (is_failure && stays).then_some(Duration::from_secs(after))
        });
        match first.min() {
            Some(after) => self
                .world
                .log
                .took("a refresh without an answer until it is told", after),
            None => {
                let text = format!("no event tells of one of {} pods on {node}", stay.len());
                let invariant = "a refresh without an answer is told before somebody ends it";
                self.world.log.find(invariant, text);
            }
        }
        Ok(())
    }

    /// Sends a request to the control of a node's provider; returns the answer.
    pub(super) async fn control(&self, node: &str, path: &str) -> Result<String> {
        let provider = Component::Provider(PROVIDER.to_owned());
        let answer = self
            .ground
            .cluster()
            .get(node, &provider, CONTROL, path)
            .await?;
        match answer.status {
            200 => Ok(answer.body),
            _ => Err(Error::Impossible(answer.body)),
        }
    }

    /// Returns the number of calls that the provider of a node had; zero if it does not answer.
    pub(super) async fn provider_calls(&self, node: &str) -> u64 {
        let body = self.control(node, "/calls").await.unwrap_or_default();
        let counts: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
        let by_pod = counts["mountCallsByPod"].as_object();
        by_pod
            .into_iter()
            .flatten()
            .filter_map(|(_, calls)| calls.as_u64())
            .sum()
    }
}
