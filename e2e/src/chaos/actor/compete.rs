//! Answers that compete for little memory.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams};
use serde_json::Value;

use crate::cluster::{Cluster as _, Error, Result, api};
use crate::install::classes;
use crate::namespace::Namespace;

use super::super::ground::Ground;
use super::super::schedule::What;
use super::super::tenants::{of_the_greedy, of_the_modest};
use super::{Actor, sleep};

/// The memory of the machine, in MiB. A sixth of half of it is for the answers of a provider.
const MACHINE: u64 = 128;
/// The time before the others come, and before more of them come, and the pause between two looks at them.
const AHEAD: u64 = 2_000;
const AGAIN: u64 = 250;
/// The time in which pods that are deleted are gone.
const GONE: Duration = Duration::from_secs(30);

impl<G: Ground> Actor<'_, G> {
    /// Lets one tenant fetch large and small answers without end, and starts pods of another one beside
    /// them. Each of these has to be ready within its bound.
    pub(super) async fn answers_compete(&self, what: What, node: &str) -> Result<()> {
        let number = self.next();
        self.running_driver(node).await?;
        self.ground.shrink_memory(node, MACHINE).await?;
        let (greedy, waves) = (of_the_greedy(number, node), of_the_modest(number, node));
        // The memory has to be restored whatever fails in this.
        let competed = async {
            self.control(node, "/calls/reset").await?;
            self.running_driver(node).await?;
            self.apply_all(&self.hostile, &greedy).await?;
            for modest in &waves {
                sleep(AHEAD).await;
                self.apply_all(&self.namespace, modest).await?;
                self.await_ready(node, modest).await?;
            }
            Ok(())
        };
        let competed = competed.await;
        let at_once = self.calls_at_once(node).await;
        self.world
            .log
            .struck(&what.kind(), self.provider_calls(node).await);
        let modest = waves.concat();
        for (namespace, objects) in [(&self.namespace, &modest), (&self.hostile, &greedy)] {
            let removed = self.remove_all(namespace, objects).await;
            self.undone(what, removed);
        }
        let restored = self.ground.restore_memory(node).await;
        self.undone(what, restored);
        let at_once = at_once?;
        if at_once > self.world.most_calls {
            let text = format!("{at_once} calls at once to the provider of {node}");
            self.world
                .log
                .find("no more calls are in flight than the driver may make", text);
        }
        competed
    }

    /// Returns the largest number of calls that the provider of a node had at once.
    async fn calls_at_once(&self, node: &str) -> Result<u64> {
        let body = self.control(node, "/calls").await?;
        let counts: Value = serde_json::from_str(&body).unwrap_or_default();
        let most = counts["maxInFlight"].as_u64();
        most.ok_or_else(|| Error::Impossible(format!("the provider counts no calls: {body}")))
    }

    async fn apply_all(&self, namespace: &Namespace, objects: &[Value]) -> Result<()> {
        for object in objects {
            namespace.apply(&object.to_string()).await?;
        }
        Ok(())
    }

    /// Waits until the pods among these objects are ready. Finds those that are not within their bound.
    async fn await_ready(&self, node: &str, objects: &[Value]) -> Result<()> {
        let begun = self.world.now();
        let pods = self.namespace.api::<Pod>();
        loop {
            let there = pods.list(&ListParams::default()).await;
            let there = there.map_err(api("list pods".to_owned()))?.items;
            let waiting: Vec<&str> = names(objects, "Pod")
                .filter(|name| {
                    let is_it = |pod: &&Pod| pod.metadata.name.as_deref() == Some(name);
                    !there.iter().find(is_it).is_some_and(embedded::is_ready)
                })
                .collect();
            let waits = self.world.now() - begun;
            if waiting.is_empty() {
                self.world.log.checked("pods among competing answers", 1);
                self.world
                    .log
                    .took("publish among competing answers", waits);
                return Ok(());
            }
            if waits > self.world.bounds.publish {
                let text = format!("{} on {node}, where answers compete", waiting.join(", "));
                self.world.log.find("a pod is ready within its bound", text);
                return Ok(());
            }
            if self.world.log.is_over() {
                return Ok(());
            }
            sleep(AGAIN).await;
        }
    }

    /// Deletes objects, and waits until the pods are gone.
    async fn remove_all(&self, namespace: &Namespace, objects: &[Value]) -> Result<()> {
        let pods = namespace.api::<Pod>();
        for name in names(objects, "Pod") {
            let deleted = pods.delete(name, &DeleteParams::default()).await;
            super::tenants::unless_absent(deleted, "delete a pod")?;
        }
        let begun = Instant::now();
        while begun.elapsed() < GONE {
            let there = pods.list(&ListParams::default()).await;
            let there = there.map_err(api("list pods".to_owned()))?.items;
            let is_of_these = |pod: &Pod| {
                names(objects, "Pod").any(|name| pod.metadata.name.as_deref() == Some(name))
            };
            if !there.iter().any(is_of_these) {
                break;
            }
            sleep(AGAIN).await;
        }
        let all = classes(&self.ground.cluster().client(), namespace.name());
        for name in names(objects, "SecretProviderClass") {
            let deleted = all.delete(name, &DeleteParams::default()).await;
            super::tenants::unless_absent(deleted, "delete a class")?;
        }
        Ok(())
    }
}

/// Returns the names of the objects of a kind.
fn names<'a>(objects: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a str> {
    let objects = objects.iter().filter(move |object| object["kind"] == kind);
    objects.filter_map(|object| object["metadata"]["name"].as_str())
}
