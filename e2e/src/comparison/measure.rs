//! One round of one driver: what is measured, in the order in which a volume lives.

use std::time::{Duration, Instant};

use futures::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams};
use serde_json::json;
use tonic::Status;

use super::Options;
use super::report::Figure;
use crate::bench::{
    ControlPlane, Node, Provider, REFRESH, Requests, Settings, Volume, class, failed, per,
    percentile, publish, unpublish,
};
use crate::cluster::{Result, api, wait_until};
use crate::install::pod_statuses;

const CLASS: &str = "bench";
/// The file whose content changes.
const FILE: &str = "one";
/// kubelet's first wait before it tries again, and its longest.
const BACKOFF: Duration = Duration::from_millis(500);
const LONGEST_BACKOFF: Duration = Duration::from_secs(122);
/// The time after which a volume that is still not published ends the run.
const PATIENCE: Duration = Duration::from_secs(300);
/// The time that a driver gets to become idle, and to hear of a change of the class.
const SETTLE: Duration = Duration::from_secs(3);
/// The time in which the pod statuses of deleted pods have to be gone.
const COLLECTION: Duration = Duration::from_secs(180);

/// What one round needs.
pub(super) struct Measurement<'a> {
    pub(super) options: &'a Options,
    pub(super) plane: &'a ControlPlane,
    pub(super) provider: &'a Provider,
    pub(super) settings: Settings,
}

/// The outcome of many calls of one kind.
struct Calls<'v> {
    /// The times of the calls that succeeded in milliseconds, sorted.
    times: Vec<f64>,
    failed: Vec<&'v Volume>,
    seconds: f64,
    /// The driver's CPU time in milliseconds, and the requests, for each call.
    cpu: f64,
    requests: Requests,
    provider: f64,
}

impl Measurement<'_> {
    /// Starts the driver, measures, and takes everything down.
    pub(super) async fn run(&self) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        self.plane.create_node(&self.settings.name).await?;
        self.apply(0, "first").await?;
        let node = Node::start(self.settings.clone()).await?;
        tokio::time::sleep(SETTLE).await;
        figures.push(Figure::of(
            "resident memory, idle",
            "MiB",
            node.process()?.rss()?,
        ));
        let volumes = self.publishes(&node, &mut figures).await?;
        let rss = node.process()?.rss()?;
        figures.push(Figure::of(
            "resident memory, all volumes published",
            "MiB",
            rss,
        ));
        self.looks(&node, &volumes, &mut figures).await?;
        self.refreshes(&node, &volumes, &mut figures).await?;
        let calls = self.calls(&node, &volumes, 50, unpublish).await?;
        figures.extend(calls.times("unpublish at 50"));
        figures.push(Figure::of("unpublish at 50, failed", "", calls.failures()));
        self.boot(node, &mut figures).await?;
        self.delete_pods().await?;
        Ok(figures)
    }

    /// Returns the concurrency of each run of publishes, and the number of volumes.
    fn sizes(&self) -> [(usize, usize); 4] {
        let some = self.options.volumes;
        [(1, some), (10, some), (50, 2 * some), (110, some)]
    }

    async fn publishes(&self, node: &Node, figures: &mut Vec<Figure>) -> Result<Vec<Volume>> {
        let (mut all, mut failures) = (Vec::new(), 0.0);
        for (at_once, count) in self.sizes() {
            let volumes = self.volumes(&format!("{at_once}"), count).await?;
            let calls = self.calls(node, &volumes, at_once, publish).await?;
            let what = format!("publish at {at_once}");
            figures.extend(calls.times(&what));
            let rate = per(&volumes) / calls.seconds;
            figures.push(Figure::of(&format!("{what}, rate"), "/s", rate));
            if at_once == 50 {
                figures.push(Figure::of("CPU for a publish", "ms", calls.cpu));
                figures.extend(calls.requests("publish"));
            }
            failures += calls.failures();
            for volume in &calls.failed {
                insist(node, volume).await?;
            }
            all.extend(volumes);
        }
        figures.push(Figure::of("publish, failed", "", failures));
        Ok(all)
    }

    /// Looks at published volumes that are not due, as kubelet does, once each.
    async fn looks(
        &self,
        node: &Node,
        volumes: &[Volume],
        figures: &mut Vec<Figure>,
    ) -> Result<()> {
        tokio::time::sleep(self.options.rest).await;
        let (alone, together) = volumes.split_at(self.options.volumes);
        for (at_once, volumes) in [(1, alone), (50, together)] {
            let calls = self.calls(node, volumes, at_once, publish).await?;
            let what = format!("look at {at_once}");
            figures.extend(calls.times(&what));
            if at_once == 50 {
                figures.push(Figure::of("CPU for a look", "ms", calls.cpu));
                figures.extend(calls.requests("look"));
            }
            figures.push(Figure::of(&format!("{what}, failed"), "", calls.failures()));
        }
        Ok(())
    }

    /// Refreshes volumes, first when nothing has changed, and then when the content has.
    async fn refreshes(
        &self,
        node: &Node,
        volumes: &[Volume],
        figures: &mut Vec<Figure>,
    ) -> Result<()> {
        let volumes = &volumes[..self.options.volumes];
        for (round, content, what) in [
            (1, "first", "refresh without change"),
            (2, "second", "refresh with change"),
        ] {
            self.apply(round, content).await?;
            for volume in volumes {
                node.age(volume)?;
            }
            tokio::time::sleep(SETTLE).await;
            let calls = self.calls(node, volumes, 50, publish).await?;
            if calls.provider < 1.0 {
                let asked = format!("the provider was asked {} times per volume", calls.provider);
                return Err(failed(what, &asked));
            }
            for volume in volumes {
                let read = node.read(volume, FILE)?;
                if read != content {
                    return Err(failed(
                        what,
                        &format!("a volume has {read:?}, not {content:?}"),
                    ));
                }
            }
            figures.extend(calls.times(&format!("{what} at 50")));
            figures.push(Figure::of(&format!("CPU for a {what}"), "ms", calls.cpu));
            figures.extend(calls.requests(what));
            figures.push(Figure::of(
                &format!("{what} at 50, failed"),
                "",
                calls.failures(),
            ));
        }
        Ok(())
    }

    /// Starts the driver on a node that has pods: kubelet publishes all volumes at once.
    async fn boot(&self, node: Node, figures: &mut Vec<Figure>) -> Result<()> {
        let count = self.options.volumes.min(110);
        let volumes = self.volumes("boot", count).await?;
        let settings = node.cut_power().await?;
        let started = Instant::now();
        let node = Node::start(settings).await?;
        figures.push(Figure::of(
            "boot, until the socket answers",
            "ms",
            ms(started),
        ));
        let published = volumes.iter().map(|volume| insist(&node, volume));
        let attempts = futures::future::try_join_all(published).await?;
        let what = format!("boot, until {count} volumes are published");
        figures.push(Figure::of(&what, "ms", ms(started)));
        let retries = attempts.iter().sum();
        figures.push(Figure::of("boot, attempts that failed", "", retries));
        figures.push(Figure::of(
            "resident memory, peak of the boot",
            "MiB",
            node.process()?.peak()?,
        ));
        let calls = self.calls(&node, &volumes, 50, unpublish).await?;
        if !calls.failed.is_empty() {
            return Err(failed("unpublish after the boot", &"it failed"));
        }
        Ok(())
    }

    /// Calls the driver for each volume once.
    async fn calls<'v, C, F>(
        &self,
        node: &Node,
        volumes: &'v [Volume],
        at_once: usize,
        call: C,
    ) -> Result<Calls<'v>>
    where
        C: Fn(proto::csi::node_client::NodeClient<tonic::transport::Channel>, &'v Volume) -> F,
        F: Future<Output = (f64, std::result::Result<(), Status>)>,
    {
        let process = node.process()?;
        let (requests, provider) = (self.plane.requests().await?, self.provider.calls().await?);
        let (started, cpu) = (Instant::now(), process.cpu()?);
        let outcomes: Vec<_> = stream::iter(volumes)
            .map(|volume| {
                let called = call(node.client(), volume);
                async move { (volume, called.await) }
            })
            .buffer_unordered(at_once)
            .collect()
            .await;
        let (seconds, cpu) = (started.elapsed().as_secs_f64(), process.cpu()? - cpu);
        let mut requests = self.plane.requests().await?.since(&requests);
        requests
            .0
            .values_mut()
            .for_each(|count| *count /= per(volumes));
        let provider = self.provider.calls().await? - provider;
        let mut times = Vec::new();
        let mut failures = Vec::new();
        for (volume, (time, answer)) in outcomes {
            match answer {
                Ok(()) => times.push(time),
                Err(status) => {
                    if failures.is_empty() {
                        eprintln!("  a call failed: {}: {}", status.code(), status.message());
                    }
                    failures.push(volume);
                }
            }
        }
        times.sort_by(f64::total_cmp);
        Ok(Calls {
            times,
            failed: failures,
            seconds,
            cpu: cpu * 1000.0 / per(volumes),
            requests,
            provider: provider / per(volumes),
        })
    }

    async fn volumes(&self, run: &str, count: usize) -> Result<Vec<Volume>> {
        let run = format!("{}-{run}", self.settings.name);
        let namespace = self.plane.namespace();
        Node::volumes(&self.settings, namespace, (CLASS, &run), count).await
    }

    /// Gives the class content, and an annotation that makes the volumes of this driver due.
    async fn apply(&self, round: usize, content: &str) -> Result<()> {
        let objects = format!(
            "array:\n- {{objectName: {FILE}, content: {content}}}\n- {{objectName: two, contentSize: 4096}}\n"
        );
        let asked = json!({REFRESH: format!("{}-{round}", self.settings.name)});
        let class = class(CLASS, &json!({"objects": objects}), &asked);
        let applied = self.plane.namespace().apply(&class.to_string()).await;
        applied.map(drop)
    }

    /// Deletes all pods; returns when their pod statuses are gone, so that the next round begins alike.
    async fn delete_pods(&self) -> Result<()> {
        let namespace = self.plane.namespace();
        let pods = namespace.api::<Pod>();
        let listed = pods.list(&ListParams::default()).await;
        let listed = listed.map_err(api("list pods".to_owned()))?;
        let names = listed.iter().filter_map(|pod| pod.metadata.name.clone());
        let now = DeleteParams::default().grace_period(0);
        let deleted = names.map(|name| {
            let (pods, now) = (&pods, &now);
            async move { pods.delete(&name, now).await.map(drop) }
        });
        let mut deleted = stream::iter(deleted).buffer_unordered(10);
        while let Some(outcome) = deleted.next().await {
            outcome.map_err(api("delete a pod".to_owned()))?;
        }
        let statuses = pod_statuses(&self.plane.client(), namespace.name());
        wait_until("the pod statuses to be collected", COLLECTION, async || {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let left = statuses.list(&ListParams::default().limit(1)).await;
            left.is_ok_and(|left| left.items.is_empty())
        })
        .await
    }
}

impl Calls<'_> {
    fn failures(&self) -> f64 {
        f64::from(u32::try_from(self.failed.len()).unwrap_or(u32::MAX))
    }

    fn times(&self, what: &str) -> [Figure; 2] {
        [50, 99].map(|percent| {
            let value = percentile(&self.times, percent);
            Figure::of(&format!("{what}, p{percent}"), "ms", value)
        })
    }

    /// Returns the reads, the writes, and each kind of request that is at least a tenth of a call.
    fn requests(&self, what: &str) -> Vec<Figure> {
        let writes = self.requests.writes();
        let reads = self.requests.total() - writes;
        let mut figures = vec![
            Figure::of(&format!("API reads for a {what}"), "", reads),
            Figure::of(&format!("API writes for a {what}"), "", writes),
            Figure::of(&format!("provider calls for a {what}"), "", self.provider),
        ];
        for ((verb, resource), count) in &self.requests.0 {
            if *count >= 0.1 {
                let name = format!("{verb} {resource} for a {what}");
                figures.push(Figure::of(&name, "", *count));
            }
        }
        figures
    }
}

/// Publishes a volume as kubelet does, until it is published; returns the number of attempts that
/// failed.
async fn insist(node: &Node, volume: &Volume) -> Result<f64> {
    let (started, mut failures, mut wait) = (Instant::now(), 0.0, BACKOFF);
    loop {
        match publish(node.client(), volume).await.1 {
            Ok(()) => return Ok(failures),
            Err(status) if started.elapsed() > PATIENCE => {
                return Err(failed("a volume that is not published", &status.message()));
            }
            Err(_) => failures += 1.0,
        }
        tokio::time::sleep(wait).await;
        wait = (2 * wait).min(LONGEST_BACKOFF);
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
