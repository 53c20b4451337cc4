//! The embedded cluster under a run. Its API server does whatever it is told, and a node is a process.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use embedded::api::ApiServer;

use super::super::good::{GoodBounds, How, SingleBounds};
use super::super::schedule::What;
use super::super::world::Bounds;
use super::Ground;
use super::api_faults::{ApiFault, ApiFaults, snapshot};
use crate::binaries::{Binaries, logs_dir};
use crate::cluster::{Cluster as _, Component, Error, Result};
use crate::embedded::{Embedded, standard};
use crate::manifest::add_arguments;

/// The bounds of a kubelet that looks at volumes all the time.
///
/// One interval of rotation (4.4 s), the longest pause after a failure (3 s of the driver, 4 s of
/// kubelet) and kubelet's deadline (10 s) are 21 seconds; the rest is for a machine with other work. A
/// refresh that begins an interval after the last one may take until kubelet's deadline before it has
/// failed.
const BOUNDS: Bounds = Bounds {
    converge: Duration::from_secs(44),
    publish: Duration::from_secs(20),
    fetch: Duration::from_secs(24),
    follow: Duration::from_secs(19),
    silence: Duration::from_secs(20),
    gone: Duration::from_secs(60),
    good: Some(GOOD),
    single: SINGLE,
};
/// The bounds of good minutes.
///
/// A volume follows within an interval of rotation (4.4 s) and one look of kubelet. The rest is for a machine
/// with other work.
const GOOD: GoodBounds = GoodBounds {
    publish: Duration::from_secs(6),
    follow: Duration::from_secs(8),
    converge: Duration::from_secs(10),
};
/// What failed at once is tried again after a pause (up to 3 s of the driver, 1 s of kubelet), and what had no
/// answer after kubelet's deadline (10 s) or that of a request (15 s). The rest is for a machine with other work.
const SINGLE: SingleBounds = SingleBounds {
    quick: Duration::from_secs(5),
    silent: Duration::from_secs(18),
};
/// kubelet's deadline in these bounds.
const IMPATIENT: Duration = Duration::from_secs(10);
/// By how much the driver waits longer for the answer to a refresh, if kubelet does.
const REFRESH_WAITS: Duration = Duration::from_secs(20);
/// The time in which a request of a kind comes that is to fail.
const PATIENCE: Duration = Duration::from_millis(4_500);

/// An embedded cluster with two nodes.
pub(in super::super) struct OnEmbedded {
    cluster: Embedded,
    faults: ApiFaults,
    /// The interval at which kubelet looks at each volume.
    looks_every: Duration,
    /// The time for which kubelet waits for an answer.
    kubelet_waits: Duration,
}

impl OnEmbedded {
    /// Starts one whose providers read the objects in a file of a directory.
    ///
    /// # Errors
    /// When it does not start.
    pub(in super::super) async fn start(
        shared: &Path,
        flags: &[&str],
        looks_every: Duration,
        kubelet_waits: Duration,
    ) -> Result<Self> {
        let binaries = tokio::task::spawn_blocking(|| Binaries::find(|_| {})).await;
        let binaries = binaries.map_err(|error| Error::Start(error.to_string()))?;
        let binaries = binaries.map_err(|error| Error::Start(error.to_string()))?;
        let mut options = embedded::Options {
            nodes: super::Site::Embedded.nodes(),
            csi_timeout: kubelet_waits,
            sync_period: Some(looks_every),
            longest_pause: Duration::from_secs(4),
            shared: Some(shared.to_owned()),
            ..standard(&binaries)?
        };
        super::prepare(&mut options.manifests, flags)?;
        let objects = format!("--objects={}/objects.json", embedded::SHARED);
        add_arguments(&mut options.manifests, super::PROVIDER, &[&objects])?;
        let cluster = Embedded::start(options).await?;
        let faults = ApiFaults::default();
        faults.install(cluster.api());
        Ok(Self {
            cluster,
            faults,
            looks_every,
            kubelet_waits,
        })
    }

    /// Keeps the logs and objects of a run that has found something.
    ///
    /// # Errors
    /// When they cannot be kept.
    pub(in super::super) fn keep_logs(&self) -> Result<()> {
        let dir = logs_dir("chaos");
        println!("logs and objects are in {}", dir.display());
        self.cluster.keep_logs(&dir)
    }

    fn api(&self) -> &ApiServer {
        self.cluster.api()
    }
}

impl Ground for OnEmbedded {
    type Cluster = Embedded;

    fn cluster(&self) -> &Embedded {
        &self.cluster
    }

    fn bounds(&self) -> Bounds {
        let longer = self.kubelet_waits.saturating_sub(IMPATIENT);
        Bounds {
            converge: BOUNDS.converge + self.looks_every + longer.min(REFRESH_WAITS),
            silence: BOUNDS.silence + longer,
            fetch: BOUNDS.fetch + self.looks_every,
            follow: BOUNDS.follow + self.looks_every,
            good: Some(GoodBounds {
                follow: GOOD.follow + self.looks_every,
                converge: GOOD.converge + self.looks_every,
                ..GOOD
            }),
            single: SingleBounds {
                quick: SINGLE.quick + self.looks_every,
                silent: SINGLE.silent + self.looks_every + longer,
            },
            ..BOUNDS
        }
    }

    fn seldom(&self) -> &'static str {
        "1h"
    }

    async fn root(&self, node: &str) -> Result<PathBuf> {
        let process = self.cluster.process(node).await?;
        Ok(PathBuf::from(format!("/proc/{process}/root")))
    }

    fn scratch(&self) -> &'static str {
        "/run"
    }

    async fn run(&self, node: &str, command: &[&str]) -> Result<String> {
        self.cluster.exec(node, command).await
    }

    async fn driver_process(&self, node: &str) -> Result<Option<i32>> {
        let containers = self.cluster.containers(node).await?;
        let name = Component::Driver.container();
        let driver = containers.into_iter().find(|found| found.name == name);
        let driver =
            driver.ok_or_else(|| Error::Impossible(format!("node {node} has no driver")))?;
        Ok(driver.pid)
    }

    async fn restart_kubelet(&self, node: &str) -> Result<()> {
        self.cluster.restart_kubelet(node).await
    }

    fn cannot(&self, _: What) -> Option<&'static str> {
        None
    }

    fn stops_at_once(&self) -> bool {
        true
    }

    fn leaves_deadlines_to_the_driver(&self) -> bool {
        self.kubelet_waits > IMPATIENT
    }

    fn has_liveness_probes(&self) -> bool {
        false
    }

    async fn strike_api(&self, what: What) -> Result<u64> {
        let lasts = Duration::from_millis(what.lasts());
        let fault = match what {
            What::ApiSlow { by, .. } => ApiFault::Slow(Duration::from_millis(by)),
            What::ApiRefuses { status, .. } => ApiFault::Refuses(status),
            What::ApiConflicts { .. } => ApiFault::Conflicts,
            What::SecretsRefused { .. } => ApiFault::NoSecrets,
            What::ApiPast { .. } => ApiFault::Past(snapshot(self.api())),
            What::ApiGone { .. } => ApiFault::Gone,
            What::ApiHung { .. } => ApiFault::Hung {
                until: Instant::now() + lasts,
            },
            other => return Err(Error::Impossible(format!("{other} is no fault of the API"))),
        };
        let number = self.faults.begin(fault);
        tokio::time::sleep(lasts).await;
        Ok(self.faults.end(number))
    }

    async fn hang_writes(&self, namespace: &str, lasts: u64) {
        let lasts = Duration::from_millis(lasts);
        let number = self.faults.begin(ApiFault::Webhook {
            namespace: namespace.to_owned(),
            until: Instant::now() + lasts,
        });
        tokio::time::sleep(lasts).await;
        self.faults.end(number);
    }

    async fn isolate_driver(&self, node: &str, isolated: bool) -> Result<()> {
        let driver = Component::Driver;
        self.cluster.isolate(node, &driver, isolated).await?;
        match self.cluster.driver(node).kill().await {
            // Its next process is about to start, with these mounts.
            Err(_) if self.driver_process(node).await?.is_none() => Ok(()),
            killed => killed,
        }
    }

    async fn add_arguments(&self, node: &str, arguments: &[&str]) -> Result<()> {
        let driver = Component::Driver;
        self.cluster.add_arguments(node, &driver, arguments).await
    }

    fn requests(&self) -> Option<(u64, u64)> {
        Some((self.faults.writes(), self.faults.reads()))
    }

    async fn fail_once(&self, kind: usize, how: usize) -> Result<Option<(String, How)>> {
        let Some(failure) = self.faults.arm(kind, how) else {
            return Ok(None);
        };
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE && self.faults.is_armed() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let struck = self.faults.disarm();
        Ok(struck.then_some(failure))
    }

    /// The driver takes half of a machine's memory where no control group limits it.
    async fn shrink_memory(&self, node: &str, machine: u64) -> Result<u64> {
        let machine = machine << 10;
        let set = format!(
            "sed 's/^MemTotal: .*/MemTotal: {machine} kB/' /proc/meminfo > /run/chaos-meminfo && \
             mount --bind /run/chaos-meminfo /proc/meminfo"
        );
        self.run(node, &["sh", "-c", &set]).await?;
        let killed = self.cluster.driver(node).kill().await;
        if killed.is_err() {
            self.run(node, &["umount", "/proc/meminfo"]).await?;
        }
        killed.map(|()| machine << 9)
    }

    async fn restore_memory(&self, node: &str) -> Result<()> {
        self.run(node, &["umount", "/proc/meminfo"]).await?;
        self.cluster.driver(node).kill().await
    }
}
