//! Calls a driver's CSI socket directly, so that the embedded kubelet is not measured, and measures the
//! driver's process. [`Bench`] does so on a node of an embedded cluster; [`Node`] is a driver of its own in
//! front of a [`ControlPlane`].

mod control_plane;
mod document;
mod node;
mod process;
mod resident;
mod retry;
mod site;
mod table;
mod volume;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use embedded::Options;
use futures::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::DeleteParams;
use proto::csi::NodeGetInfoRequest;
use proto::csi::node_client::NodeClient;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use crate::binaries::{self, BIN_DIR_VARIABLE, Binaries, cargo_build};
use crate::cluster::{Cluster as _, Component, Error, Result};
use crate::embedded::{Embedded, standard};
use crate::manifest::add_arguments;
use crate::namespace::Namespace;

pub(crate) use control_plane::{ControlPlane, Requests};
pub(crate) use document::{Page, Run, check_docs, replace_section};
pub(crate) use node::{Node, Provider, Settings, Stopped, publish, unpublish};
pub(crate) use process::Process;
pub(crate) use resident::Resident;
pub(crate) use retry::Backoff;
pub(crate) use site::{Site, built};
pub(crate) use table::Table;
pub(crate) use volume::Volume;

/// kubelet's directory on a node.
const KUBELET_ROOT: &str = "/var/lib/kubelet";
/// The CSI socket on a node's disk.
const SOCKET: &str = "var/lib/kubelet/plugins/csi-secrets-store/csi.sock";
/// The number of pods that are created, and volumes that are unpublished, at the same time.
const MANY: usize = 50;

/// The annotation of a class that makes every volume of it due.
pub(crate) const REFRESH: &str = "secrets-store.csi.k8s.io/refresh";

/// Returns a class of the tests' provider.
pub(crate) fn class(name: &str, parameters: &Value, annotations: &Value) -> Value {
    json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1",
        "kind": "SecretProviderClass",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"provider": "e2e-provider", "parameters": parameters},
    })
}

/// Builds the driver and the provider as they are released; the cluster stays as it was compiled, for
/// its release build would take minutes. Where `$E2E_BIN_DIR` is set, uses these executables.
pub(crate) fn binaries() -> std::result::Result<Binaries, binaries::Error> {
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

/// Returns the options of a cluster whose driver has these flags besides rotation. Its own intervals
/// are longer than a run: periodic work is not part of a call's cost. `driver/tests/sync/costs.rs`
/// counts it.
pub(crate) fn rotating(binaries: &Binaries, more: &[&str]) -> Result<Options> {
    let mut options = standard(binaries)?;
    let flags = [
        "--enable-secret-rotation=true",
        "--rotation-poll-interval=1h",
        "--sync-interval=1h",
    ];
    let driver = Component::Driver;
    let flags = [&flags[..], more].concat();
    add_arguments(&mut options.manifests, driver.container(), &flags)?;
    Ok(options)
}

/// A cluster whose driver is called directly.
pub(crate) struct Bench<'a> {
    pub(crate) cluster: &'a Embedded,
    pub(crate) namespace: Namespace,
    node: NodeClient<Channel>,
    process: Process,
    /// The root of the node's disk.
    disk: PathBuf,
}

impl<'a> Bench<'a> {
    /// Creates a namespace, and connects to the driver of the cluster's only node.
    pub(crate) async fn prepare(cluster: &'a Embedded) -> Result<Self> {
        let name = cluster.nodes().remove(0);
        let namespace = Namespace::create(cluster).await?;
        let containers = cluster.containers(&name).await?;
        let driver = containers
            .into_iter()
            .find(|c| c.name == Component::Driver.container());
        let pid = driver
            .and_then(|c| c.pid)
            .ok_or_else(|| failed("the driver", &"does not run"))?;
        let disk = cluster.disk(&name);
        let socket = disk.join(SOCKET);
        let channel = Endpoint::from_shared(format!("unix://{}", socket.display()))
            .map_err(|error| failed("the CSI socket", &error))?
            .connect()
            .await
            .map_err(|error| failed("the CSI socket", &error))?;
        Ok(Self {
            cluster,
            namespace,
            node: NodeClient::new(channel),
            process: Process(pid),
            disk,
        })
    }

    /// Makes volumes of a class, with pods that no kubelet runs, as owners of pod statuses.
    pub(crate) async fn volumes(
        &self,
        class: &str,
        run: &str,
        count: usize,
    ) -> Result<Vec<Volume>> {
        let disk = self.disk.join(KUBELET_ROOT.trim_start_matches('/'));
        let place = (KUBELET_ROOT, disk.as_path());
        Volume::create(&self.namespace, ("elsewhere", class, run), place, count).await
    }

    /// Publishes all volumes. Returns the time of each call in milliseconds, sorted.
    pub(crate) async fn publish_all(
        &self,
        pods: &[Volume],
        concurrency: usize,
    ) -> Result<Vec<f64>> {
        let calls = stream::iter(pods).map(|volume| async {
            let started = Instant::now();
            let called = self
                .node
                .clone()
                .node_publish_volume(volume.publish())
                .await;
            called.map_err(|status| failed("publish", &status.message()))?;
            Ok(started.elapsed().as_secs_f64() * 1000.0)
        });
        let results: Vec<Result<f64>> = calls.buffer_unordered(concurrency).collect().await;
        let mut latencies = results.into_iter().collect::<Result<Vec<f64>>>()?;
        latencies.sort_by(f64::total_cmp);
        Ok(latencies)
    }

    /// Makes calls that have nothing to do. Returns the time of each in milliseconds, sorted.
    pub(crate) async fn empty_calls(&self, count: usize, concurrency: usize) -> Result<Vec<f64>> {
        let calls = stream::iter(0..count).map(|_| async {
            let started = Instant::now();
            let called = self.node.clone().node_get_info(NodeGetInfoRequest {}).await;
            called.map_err(|status| failed("NodeGetInfo", &status.message()))?;
            Ok(started.elapsed().as_secs_f64() * 1000.0)
        });
        let results: Vec<Result<f64>> = calls.buffer_unordered(concurrency).collect().await;
        let mut latencies = results.into_iter().collect::<Result<Vec<f64>>>()?;
        latencies.sort_by(f64::total_cmp);
        Ok(latencies)
    }

    /// Deletes the pods of volumes, and with them their pod statuses.
    pub(crate) async fn delete_pods(&self, volumes: &[Volume]) -> Result<()> {
        let api = self.namespace.api::<Pod>();
        for volume in volumes {
            let now = DeleteParams::default().grace_period(0);
            let deleted = api.delete(volume.pod(), &now).await;
            deleted.map_err(|error| failed("a pod", &error))?;
        }
        Ok(())
    }

    /// Publishes volumes in tasks that end when they are dropped.
    pub(crate) fn publish_in_background(&self, volumes: &[Volume]) -> JoinSet<()> {
        let calls = volumes.iter().map(|volume| {
            let (mut node, request) = (self.node.clone(), volume.publish());
            async move { drop(node.node_publish_volume(request).await) }
        });
        calls.collect()
    }

    /// Returns the number of Mount calls that the provider has had.
    pub(crate) async fn provider_calls(&self) -> Result<f64> {
        let node = self.cluster.nodes().remove(0);
        let provider = Component::Provider("fake-provider".to_owned());
        let answer = self.cluster.get(&node, &provider, 8080, "/calls").await?;
        let calls: serde_json::Value = serde_json::from_str(&answer.body)
            .map_err(|error| failed("the provider's calls", &error))?;
        calls["mountCalls"]
            .as_f64()
            .ok_or_else(|| failed("the provider's calls", &answer.body))
    }

    pub(crate) async fn unpublish_all(&self, pods: &[Volume]) -> Result<()> {
        let calls = stream::iter(pods).map(|volume| async {
            let called = self
                .node
                .clone()
                .node_unpublish_volume(volume.unpublish())
                .await;
            called
                .map(|_| ())
                .map_err(|status| failed("unpublish", &status.message()))
        });
        let results: Vec<Result<()>> = calls.buffer_unordered(MANY).collect().await;
        results.into_iter().collect()
    }

    /// Returns the numbers of reads and writes at the API server since the last reset.
    pub(crate) fn requests(&self) -> (f64, f64) {
        let requests = self.cluster.api().requests();
        let reads = requests
            .iter()
            .filter(|r| ["get", "list", "watch"].contains(&r.verb.as_str()))
            .count();
        let count = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
        (count(reads), count(requests.len() - reads))
    }

    /// Waits until the driver asks nothing of the API server any more: events, and writes that are tried
    /// again after a conflict, come after the calls that caused them.
    ///
    /// # Errors
    /// When it still asks after a minute.
    pub(crate) async fn settled(&self) -> Result<()> {
        let quiet = Duration::from_secs(2);
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut seen = self.requests();
        while Instant::now() < deadline {
            tokio::time::sleep(quiet).await;
            let now = self.requests();
            if now == seen {
                return Ok(());
            }
            seen = now;
        }
        Err(failed("the driver", &"it sends requests for ever"))
    }

    /// Returns the driver's process.
    pub(crate) fn process(&self) -> Process {
        self.process
    }

    /// Returns the path of the CSI socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.disk.join(SOCKET)
    }

    /// Returns the CPU time that the driver has used, in seconds.
    pub(crate) fn cpu(&self) -> Result<f64> {
        self.process.cpu()
    }

    /// Returns the driver's resident memory in MiB.
    pub(crate) fn rss(&self) -> Result<f64> {
        self.process.rss()
    }

    /// Returns the driver's largest resident memory in MiB since [`Bench::forget_peak`].
    pub(crate) fn peak(&self) -> Result<f64> {
        self.process.peak()
    }

    /// Makes the kernel forget the largest resident memory.
    pub(crate) fn forget_peak(&self) -> Result<()> {
        self.process.forget_peak()
    }

    /// Returns the number of the driver's open descriptors.
    pub(crate) fn descriptors(&self) -> Result<f64> {
        self.process.descriptors()
    }

    /// Returns the number of the driver's threads.
    pub(crate) fn threads(&self) -> Result<f64> {
        self.process.threads()
    }
}

/// Returns the number of volumes.
pub(crate) fn per(pods: &[Volume]) -> f64 {
    f64::from(u32::try_from(pods.len()).unwrap_or(u32::MAX))
}

/// Returns a percentile of sorted values.
pub(crate) fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

/// Returns the error of a measurement.
pub(crate) fn failed(what: &str, why: &dyn std::fmt::Display) -> Error {
    Error::Start(format!("measuring: {what}: {why}"))
}
