//! One round of one driver: what is measured, in the order in which a volume lives.

use std::time::{Duration, Instant};

use futures::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams};
use proto::csi::node_client::NodeClient;
use serde_json::{Value, json};
use tonic::Status;
use tonic::transport::Channel;

use super::attempts::{Outcome, Round, attempt, insist_on_all};
use super::report::Figure;
use super::{Options, floor};
use crate::bench::{
    ControlPlane, Node, Provider, REFRESH, Requests, Settings, Volume, class, failed, per,
    percentile, publish, unpublish,
};
use crate::cluster::{Result, api, wait_until};
use crate::install::pod_statuses;

const CLASS: &str = "bench";
/// The file whose content changes.
const FILE: &str = "one";
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

/// The first calls for many volumes. Where one fails, the volume's further calls, with kubelet's waits, are
/// not measured.
struct Calls {
    /// The times of the calls that succeeded in milliseconds, sorted.
    times: Vec<f64>,
    seconds: f64,
    /// The driver's CPU time in milliseconds, and the requests, for each call.
    cpu: f64,
    requests: Requests,
    provider: f64,
}

impl Measurement<'_> {
    /// Starts the driver and measures. What was measured before an error stays in the round.
    ///
    /// # Errors
    /// When the driver, the provider or the API server is gone.
    pub(super) async fn run(&self, round: &mut Round) -> Result<()> {
        self.plane.create_node(&self.settings.name).await?;
        self.apply(0, "first").await?;
        let volumes = self.volumes("floor", self.options.volumes).await?;
        let (servers, class) = ((self.plane, self.provider), (CLASS, &parameters("first")));
        floor::measure(servers, class, &volumes, round).await?;
        let node = Node::start(self.settings.clone()).await?;
        tokio::time::sleep(SETTLE).await;
        round.add("resident memory, idle", "MiB", node.process()?.rss()?);
        let volumes = self.publishes(&node, round).await?;
        let rss = node.process()?.rss()?;
        round.add("resident memory, all volumes published", "MiB", rss);
        self.looks(&node, &volumes, round).await?;
        self.refreshes(&node, &volumes, round).await?;
        let unpublishes = ("unpublish", unpublish);
        let calls = self.calls(&node, &volumes, 50, unpublishes, round).await?;
        round.figures.extend(calls.times("unpublish at 50"));
        round.add("CPU for an unpublish", "ms", calls.cpu);
        self.boot(node, round).await
    }

    /// Returns the concurrency of each run of publishes, and the number of volumes.
    fn sizes(&self) -> [(usize, usize); 4] {
        let some = self.options.volumes;
        [(1, some), (10, some), (50, 2 * some), (110, some)]
    }

    async fn publishes(&self, node: &Node, round: &mut Round) -> Result<Vec<Volume>> {
        let mut all = Vec::new();
        for (at_once, count) in self.sizes() {
            let volumes = self.volumes(&format!("{at_once}"), count).await?;
            let publishes = ("publish", publish);
            let calls = self
                .calls(node, &volumes, at_once, publishes, round)
                .await?;
            let what = format!("publish at {at_once}");
            round.figures.extend(calls.times(&what));
            if at_once == 1 {
                round.add_ratio(floor::RATIO, &format!("{what}, p50"), floor::SUM);
            }
            let rate = per(&volumes) / calls.seconds;
            round.add(&format!("{what}, rate"), "/s", rate);
            if at_once == 50 {
                round.add("CPU for a publish", "ms", calls.cpu);
                round.figures.extend(calls.requests("publish"));
            }
            all.extend(volumes);
        }
        Ok(all)
    }

    /// Looks at published volumes that are not due, as kubelet does, once each. The first look after a
    /// publish is not measured: a volume has hundreds.
    async fn looks(&self, node: &Node, volumes: &[Volume], round: &mut Round) -> Result<()> {
        tokio::time::sleep(SETTLE).await;
        let looks = ("first look", publish);
        self.calls(node, volumes, 50, looks, round).await?;
        tokio::time::sleep(self.options.rest).await;
        let (alone, together) = volumes.split_at(self.options.volumes);
        for (at_once, volumes) in [(1, alone), (50, together)] {
            let looks = ("look", publish);
            let calls = self.calls(node, volumes, at_once, looks, round).await?;
            round
                .figures
                .extend(calls.times(&format!("look at {at_once}")));
            if at_once == 50 {
                round.add("CPU for a look", "ms", calls.cpu);
                round.figures.extend(calls.requests("look"));
            }
        }
        Ok(())
    }

    /// Refreshes volumes, first when nothing has changed, and then when the content has.
    async fn refreshes(&self, node: &Node, volumes: &[Volume], round: &mut Round) -> Result<()> {
        let volumes = &volumes[..self.options.volumes];
        for (number, content, what) in [
            (1, "first", "refresh without change"),
            (2, "second", "refresh with change"),
        ] {
            self.apply(number, content).await?;
            for volume in volumes {
                node.age(volume)?;
            }
            tokio::time::sleep(SETTLE).await;
            let calls = self
                .calls(node, volumes, 50, (what, publish), round)
                .await?;
            let failures = (per(volumes) - calls.count()) / per(volumes);
            if calls.provider + failures < 1.0 {
                let asked = format!("the provider was asked {} times per volume", calls.provider);
                return Err(failed(what, &asked));
            }
            let has = |volume: &&Volume| node.read(volume, FILE).is_ok_and(|read| read == content);
            let stale = volumes.len() - volumes.iter().filter(has).count();
            if stale > 0 {
                let note = format!("{what}: {stale} volumes have not the newest content after it");
                round.notes.push(note);
            }
            round.figures.extend(calls.times(&format!("{what} at 50")));
            round.add(&format!("CPU for a {what}"), "ms", calls.cpu);
            round.figures.extend(calls.requests(what));
        }
        Ok(())
    }

    /// Starts the driver on a node that has pods: kubelet publishes all volumes at once.
    async fn boot(&self, node: Node, round: &mut Round) -> Result<()> {
        let count = self.options.volumes.min(110);
        let volumes = self.volumes("boot", count).await?;
        let settings = node.cut_power().await?;
        let started = Instant::now();
        let node = Node::start(settings).await?;
        round.add("boot, until the socket answers", "ms", ms(started));
        let first = volumes.iter().map(|volume| attempt(&node, volume, publish));
        let mut outcomes = futures::future::join_all(first).await;
        insist_on_all(&node, &volumes, publish, &mut outcomes).await;
        let what = format!("boot, until {count} volumes are published");
        round.add(&what, "ms", ms(started));
        round.count("publish at boot", &outcomes);
        let peak = node.process()?.peak()?;
        round.add("resident memory, peak of the boot", "MiB", peak);
        let unpublishes = ("unpublish after the boot", unpublish);
        self.calls(&node, &volumes, 50, unpublishes, round).await?;
        Ok(())
    }

    /// Calls the driver for each volume, and again for those whose call failed.
    async fn calls<'v, C, F>(
        &self,
        node: &Node,
        volumes: &'v [Volume],
        at_once: usize,
        (operation, call): (&'static str, C),
        round: &mut Round,
    ) -> Result<Calls>
    where
        C: Fn(NodeClient<Channel>, &'v Volume) -> F + Copy,
        F: Future<Output = (f64, std::result::Result<(), Status>)>,
    {
        let process = node.process()?;
        let (requests, provider) = (self.plane.requests().await?, self.provider.calls().await?);
        let (started, cpu) = (Instant::now(), process.cpu()?);
        // Not `buffered`: one slow call would hold up those after it.
        let mut outcomes: Vec<(usize, Outcome)> = stream::iter(volumes.iter().enumerate())
            .map(|(number, volume)| async move { (number, attempt(node, volume, call).await) })
            .buffer_unordered(at_once)
            .collect()
            .await;
        let (seconds, cpu) = (started.elapsed().as_secs_f64(), process.cpu()? - cpu);
        let mut requests = self.plane.requests().await?.since(&requests);
        let provider = self.provider.calls().await? - provider;
        outcomes.sort_by_key(|(number, _)| *number);
        let mut outcomes: Vec<Outcome> = outcomes.into_iter().map(|(_, outcome)| outcome).collect();
        let each = requests.0.values_mut();
        each.for_each(|count| *count /= per(volumes));
        let smooth = outcomes.iter().filter(|outcome| outcome.is_smooth());
        let mut times: Vec<f64> = smooth.map(|outcome| outcome.time).collect();
        times.sort_by(f64::total_cmp);
        insist_on_all(node, volumes, call, &mut outcomes).await;
        round.count(operation, &outcomes);
        Ok(Calls {
            times,
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
        let asked = json!({REFRESH: format!("{}-{round}", self.settings.name)});
        let class = class(CLASS, &parameters(content), &asked);
        let applied = self.plane.namespace().apply(&class.to_string()).await;
        applied.map(drop)
    }

    /// Deletes all pods; returns when their pod statuses are gone, so that the next round begins alike.
    ///
    /// # Errors
    /// When they are not gone in time.
    pub(super) async fn delete_pods(&self) -> Result<()> {
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

impl Calls {
    /// Returns the number of calls that succeeded.
    fn count(&self) -> f64 {
        f64::from(u32::try_from(self.times.len()).unwrap_or(u32::MAX))
    }

    /// Returns two percentiles, if a call succeeded.
    fn times(&self, what: &str) -> Vec<Figure> {
        if self.times.is_empty() {
            return Vec::new();
        }
        let figure = |percent| {
            let value = percentile(&self.times, percent);
            Figure::of(&format!("{what}, p{percent}"), "ms", value)
        };
        [50, 99].map(figure).into()
    }

    /// Returns the reads, the writes, and each kind of request that is at least a tenth of a call. Events are
    /// no part of the writes: a real API server's metrics do not tell whose they are.
    fn requests(&self, what: &str) -> Vec<Figure> {
        let writes = self.requests.writes();
        let reads = self.requests.total() - writes;
        let events = self.requests.0.iter();
        let events = events.filter(|((_, resource), _)| resource == "events");
        let events: f64 = events.map(|(_, count)| count).sum();
        let mut figures = vec![
            Figure::of(&format!("API reads for a {what}"), "", reads),
            Figure::of(
                &format!("API writes, events aside, for a {what}"),
                "",
                writes - events,
            ),
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

/// Returns the parameters of the class.
fn parameters(content: &str) -> Value {
    let objects = format!(
        "array:\n- {{objectName: {FILE}, content: {content}}}\n- {{objectName: two, contentSize: 4096}}\n"
    );
    json!({"objects": objects})
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
