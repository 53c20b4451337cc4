//! The budgets: limits of the driver's size, memory, requests and time, measured on its release build
//! in an embedded cluster.
//!
//! The calls go to the driver's CSI socket directly, so that the embedded kubelet is not measured.
//! The driver asks the API server, over TLS, and the provider, over its socket; both run on the same
//! machine.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use embedded::Options;
use futures::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::PostParams;
use proto::csi::node_client::NodeClient;
use proto::csi::volume_capability::{AccessType, MountVolume};
use proto::csi::{NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability};
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint};

use crate::binaries::{self, BIN_DIR_VARIABLE, Binaries, cargo_build};
use crate::cluster::{Cluster as _, Component, Error, Result};
use crate::embedded::{Embedded, standard};
use crate::manifest::add_arguments;
use crate::namespace::Namespace;

const MIB: f64 = 1024.0 * 1024.0;
const PUBLISHES: usize = 1000;
const MANY: usize = 50;

/// Returns a class with two objects of 16 KiB, and annotations.
fn class(annotations: &Value) -> Value {
    let objects = "array:\n- {objectName: one, contentSize: 16384}\n- {objectName: two, contentSize: 16384}\n";
    json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1",
        "kind": "SecretProviderClass",
        "metadata": {"name": "budget", "annotations": annotations},
        "spec": {"provider": "e2e-provider", "parameters": {"objects": objects}},
    })
}

/// The kernel's ticks in a second.
const TICKS: f64 = 100.0;
/// The time after which the driver has released the memory that it needed for a burst.
const AT_REST: Duration = Duration::from_secs(10);

/// Measures the driver and prints a table with the budgets.
///
/// # Errors
/// When a value exceeds its budget, or cannot be measured.
pub async fn run() -> Result<()> {
    let binaries = tokio::task::spawn_blocking(binaries).await;
    let binaries = binaries
        .map_err(|error| failed("build", &error))?
        .map_err(|error| failed("build", &error))?;
    let mut table = Table::default();
    let size = fs::metadata(&binaries.driver)
        .map_err(|error| failed("the binary", &error))?
        .len();
    #[expect(clippy::cast_precision_loss, reason = "a few megabytes")]
    table.at_most("binary, MB", size as f64 / 1e6, 10.0);

    let cluster = Embedded::start(rotating(&binaries)?).await?;
    let bench = Bench::prepare(&cluster).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    table.at_most("idle VmRSS, MiB", bench.rss()?, 10.0);

    for concurrency in [1, MANY] {
        let pods = bench.pods(concurrency).await?;
        cluster.api().reset_requests();
        let (started, cpu) = (Instant::now(), bench.cpu()?);
        let latencies = bench.publish_all(&pods, concurrency).await?;
        let (seconds, cpu) = (started.elapsed().as_secs_f64(), bench.cpu()? - cpu);
        let at = format!("at concurrency {concurrency}");
        table.note(&format!("publish p50 {at}, ms"), percentile(&latencies, 50));
        table.note(&format!("publish p99 {at}, ms"), percentile(&latencies, 99));
        let rate = per(&pods) / seconds;
        if concurrency == MANY {
            // About half of what is measured, because values vary by half. The driver could do 300, but
            // the API server and this harness, which are not optimized, share its cores.
            table.at_least(&format!("publishes per second {at}"), rate, 150.0);
            let of_cpu = format!("publishes per second of CPU time {at}");
            table.at_least(&of_cpu, per(&pods) / cpu, 300.0);
        } else {
            table.note(&format!("publishes per second {at}"), rate);
        }
        let (reads, writes) = bench.requests();
        table.at_most(
            &format!("API reads per publish {at}"),
            reads / per(&pods),
            1.0,
        );
        table.at_most(
            &format!("API writes per publish {at}"),
            writes / per(&pods),
            1.0,
        );
        table.at_most(
            &format!("VmRSS at the end of {} publishes {at}, MiB", pods.len()),
            bench.rss()?,
            16.0,
        );
        tokio::time::sleep(AT_REST).await;
        table.at_most(
            &format!("VmRSS {} s later {at}, MiB", AT_REST.as_secs()),
            bench.rss()?,
            14.0,
        );

        if concurrency == MANY {
            bench.rest(&pods, &mut table).await?;
        }

        cluster.api().reset_requests();
        bench.unpublish_all(&pods).await?;
        let (reads, writes) = bench.requests();
        table.at_most(
            &format!("API requests per unpublish {at}"),
            (reads + writes) / per(&pods),
            0.0,
        );
    }
    table.print();
    table.verdict()
}

/// Builds the driver and the provider as they are released; the cluster stays as it was compiled, for
/// its release build would take minutes. Where `$E2E_BIN_DIR` is set, uses these executables.
fn binaries() -> std::result::Result<Binaries, binaries::Error> {
    let cluster = Binaries::find(|_| {})?;
    if std::env::var_os(BIN_DIR_VARIABLE).is_some() {
        return Ok(cluster);
    }
    // With all members selected, dependencies have the same features as in every other build.
    let args = ["--workspace", "--release", "--locked"];
    let bins = ["--bin", "secrets-store-csi", "--bin", "fake-provider"];
    let (mut built, command) = cargo_build(&[&args[..], &bins].concat(), &[], |_| {})?;
    let mut take = |name| {
        built.remove(name).ok_or_else(|| binaries::Error::Missing {
            name,
            place: format!("the output of {command}"),
        })
    };
    Ok(Binaries {
        driver: take("secrets-store-csi")?,
        fake_provider: take("fake-provider")?,
        ..cluster
    })
}

/// Returns the options of a cluster with rotation, and with intervals longer than a run: periodic work
/// is not part of a call's cost. `driver/tests/sync/costs.rs` counts it.
fn rotating(binaries: &Binaries) -> Result<Options> {
    let mut options = standard(binaries)?;
    let flags = [
        "--enable-secret-rotation=true",
        "--rotation-poll-interval=1h",
        "--sync-interval=1h",
    ];
    let driver = Component::Driver;
    add_arguments(&mut options.manifests, driver.container(), &flags)?;
    Ok(options)
}

/// A cluster whose driver is called directly.
struct Bench<'a> {
    cluster: &'a Embedded,
    namespace: Namespace,
    node: NodeClient<Channel>,
    pid: i32,
    /// The root of the node's disk.
    disk: PathBuf,
}

struct Volume {
    pod: String,
    uid: String,
}

impl<'a> Bench<'a> {
    async fn prepare(cluster: &'a Embedded) -> Result<Self> {
        let name = cluster.nodes().remove(0);
        let namespace = Namespace::create(cluster).await?;
        let class = class(&json!({})).to_string();
        namespace.apply(&class).await?;
        let containers = cluster.containers(&name).await?;
        let driver = containers
            .into_iter()
            .find(|c| c.name == Component::Driver.container());
        let pid = driver
            .and_then(|c| c.pid)
            .ok_or_else(|| failed("the driver", &"does not run"))?;
        let disk = cluster.disk(&name);
        let socket = disk.join("var/lib/kubelet/plugins/csi-secrets-store/csi.sock");
        let channel = Endpoint::from_shared(format!("unix://{}", socket.display()))
            .map_err(|error| failed("the CSI socket", &error))?
            .connect()
            .await
            .map_err(|error| failed("the CSI socket", &error))?;
        Ok(Self {
            cluster,
            namespace,
            node: NodeClient::new(channel),
            pid,
            disk,
        })
    }

    /// Makes pods that no kubelet runs, as owners of pod statuses.
    async fn pods(&self, run: usize) -> Result<Vec<Volume>> {
        let api = self.namespace.api::<Pod>();
        let made = stream::iter(0..PUBLISHES).map(|number| {
            let api = api.clone();
            async move {
                let pod = json!({
                    "metadata": {"name": format!("pod-{run}-{number}")},
                    "spec": {"nodeName": "elsewhere", "containers": [{"name": "main", "image": "none"}]},
                });
                let pod: Pod = serde_json::from_value(pod).map_err(|error| failed("a pod", &error))?;
                let made = api.create(&PostParams::default(), &pod).await;
                let made = made.map_err(|error| failed("a pod", &error))?;
                let volume = Volume { pod: made.name_any(), uid: made.uid().unwrap_or_default() };
                // kubelet makes the parent of the target.
                let parent = self.disk.join(self.target(&volume).trim_start_matches('/'));
                let parent = parent.parent().unwrap_or(Path::new("/")).to_owned();
                fs::create_dir_all(parent).map_err(|error| failed("a pod's directory", &error))?;
                Ok(volume)
            }
        });
        made.buffer_unordered(MANY)
            .collect::<Vec<_>>()
            .await
            .into_iter()
            .collect()
    }

    fn target(&self, volume: &Volume) -> String {
        format!(
            "/var/lib/kubelet/pods/{}/volumes/kubernetes.io~csi/secrets/mount",
            volume.uid
        )
    }

    /// Publishes all volumes. Returns the time of each call in milliseconds, sorted.
    async fn publish_all(&self, pods: &[Volume], concurrency: usize) -> Result<Vec<f64>> {
        let calls = stream::iter(pods).map(|volume| async {
            let started = Instant::now();
            let called = self
                .node
                .clone()
                .node_publish_volume(self.request(volume))
                .await;
            called.map_err(|status| failed("publish", &status.message()))?;
            Ok(started.elapsed().as_secs_f64() * 1000.0)
        });
        let results: Vec<Result<f64>> = calls.buffer_unordered(concurrency).collect().await;
        let mut latencies = results.into_iter().collect::<Result<Vec<f64>>>()?;
        latencies.sort_by(f64::total_cmp);
        Ok(latencies)
    }

    /// Measures publishes of mounted volumes: when none is due, and when all are due and nothing has
    /// changed.
    async fn rest(&self, pods: &[Volume], table: &mut Table) -> Result<()> {
        for (what, reads, calls) in [
            ("republish", 1.0, 0.0),
            ("refresh without change", 2.0, 1.0),
        ] {
            if calls > 0.0 {
                let asked = class(&json!({"secrets-store.csi.k8s.io/refresh": "1"}));
                let asked = asked.to_string();
                self.namespace.apply(&asked).await?;
            }
            self.cluster.api().reset_requests();
            let called_before = self.provider_calls().await?;
            let latencies = self.publish_all(pods, MANY).await?;
            let called = self.provider_calls().await? - called_before;
            let (read, written) = self.requests();
            table.note(
                &format!("{what}, p50 at concurrency {MANY}, ms"),
                percentile(&latencies, 50),
            );
            table.at_most(&format!("API reads per {what}"), read / per(pods), reads);
            table.at_most(&format!("API writes per {what}"), written / per(pods), 0.0);
            table.at_most(
                &format!("provider calls per {what}"),
                called / per(pods),
                calls,
            );
        }
        Ok(())
    }

    /// Returns the number of Mount calls that the provider has had.
    async fn provider_calls(&self) -> Result<f64> {
        let node = self.cluster.nodes().remove(0);
        let provider = Component::Provider("fake-provider".to_owned());
        let answer = self.cluster.get(&node, &provider, 8080, "/calls").await?;
        let calls: serde_json::Value = serde_json::from_str(&answer.body)
            .map_err(|error| failed("the provider's calls", &error))?;
        calls["mountCalls"]
            .as_f64()
            .ok_or_else(|| failed("the provider's calls", &answer.body))
    }

    fn request(&self, volume: &Volume) -> NodePublishVolumeRequest {
        let context = [
            ("secretProviderClass", "budget"),
            ("csi.storage.k8s.io/pod.name", &volume.pod),
            ("csi.storage.k8s.io/pod.namespace", self.namespace.name()),
            ("csi.storage.k8s.io/pod.uid", &volume.uid),
            ("csi.storage.k8s.io/serviceAccount.name", "default"),
            ("csi.storage.k8s.io/ephemeral", "true"),
        ];
        NodePublishVolumeRequest {
            volume_id: format!("csi-{}", volume.uid),
            target_path: self.target(volume),
            volume_capability: Some(VolumeCapability {
                access_type: Some(AccessType::Mount(MountVolume::default())),
                ..Default::default()
            }),
            readonly: true,
            volume_context: context
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ..Default::default()
        }
    }

    async fn unpublish_all(&self, pods: &[Volume]) -> Result<()> {
        let calls = stream::iter(pods).map(|volume| async {
            let request = NodeUnpublishVolumeRequest {
                volume_id: format!("csi-{}", volume.uid),
                target_path: self.target(volume),
            };
            let called = self.node.clone().node_unpublish_volume(request).await;
            called
                .map(|_| ())
                .map_err(|status| failed("unpublish", &status.message()))
        });
        let results: Vec<Result<()>> = calls.buffer_unordered(MANY).collect().await;
        results.into_iter().collect()
    }

    /// Returns the numbers of reads and writes at the API server since the last reset.
    fn requests(&self) -> (f64, f64) {
        let requests = self.cluster.api().requests();
        let reads = requests
            .iter()
            .filter(|r| ["get", "list", "watch"].contains(&r.verb.as_str()))
            .count();
        let count = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
        (count(reads), count(requests.len() - reads))
    }

    /// Returns the CPU time that the driver has used, in seconds.
    fn cpu(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid));
        let stat = stat.map_err(|error| failed("the driver's CPU time", &error))?;
        // The name in parentheses may contain spaces; after it, user and system time are the
        // twelfth and thirteenth field.
        let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
        let times: Vec<f64> = fields
            .split(' ')
            .skip(11)
            .take(2)
            .filter_map(|ticks| ticks.parse().ok())
            .collect();
        match times[..] {
            [user, system] => Ok((user + system) / TICKS),
            _ => Err(failed("the driver's CPU time", &stat)),
        }
    }

    fn rss(&self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid));
        let status = status.map_err(|error| failed("the driver's memory", &error))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
        kib.map(|kib| kib * 1024.0 / MIB)
            .ok_or_else(|| failed("the driver's memory", &io::Error::other("no VmRSS")))
    }
}

fn per(pods: &[Volume]) -> f64 {
    f64::from(u32::try_from(pods.len()).unwrap_or(u32::MAX))
}

/// Returns a percentile of sorted values.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

fn failed(what: &str, why: &dyn std::fmt::Display) -> Error {
    Error::Start(format!("budget: {what}: {why}"))
}

/// The measured values and their bounds.
#[derive(Default)]
struct Table(Vec<(String, f64, Option<Bound>)>);

#[derive(Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtMost(bound) => value <= bound,
            Self::AtLeast(bound) => value >= bound,
        }
    }
}

impl Table {
    fn at_most(&mut self, name: &str, value: f64, bound: f64) {
        self.0
            .push((name.to_owned(), value, Some(Bound::AtMost(bound))));
    }

    fn at_least(&mut self, name: &str, value: f64, bound: f64) {
        self.0
            .push((name.to_owned(), value, Some(Bound::AtLeast(bound))));
    }

    fn note(&mut self, name: &str, value: f64) {
        self.0.push((name.to_owned(), value, None));
    }

    fn print(&self) {
        for (name, value, bound) in &self.0 {
            let budget = match bound {
                None => String::new(),
                Some(Bound::AtMost(bound)) => format!("at most {bound}"),
                Some(Bound::AtLeast(bound)) => format!("at least {bound}"),
            };
            let verdict = match bound {
                Some(bound) if !bound.holds(*value) => "OVER BUDGET",
                Some(_) => "ok",
                None => "",
            };
            println!("{name:<58} {value:>9.2}   {budget:<14} {verdict}");
        }
    }

    fn verdict(&self) -> Result<()> {
        let over: Vec<&str> = self
            .0
            .iter()
            .filter(|(_, value, bound)| bound.is_some_and(|bound| !bound.holds(*value)))
            .map(|(name, ..)| name.as_str())
            .collect();
        if over.is_empty() {
            return Ok(());
        }
        Err(Error::Impossible(format!(
            "over budget: {}",
            over.join("; ")
        )))
    }
}
