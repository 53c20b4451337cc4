//! The cluster under a run: what a [`Cluster`] has not, and a run disturbs or looks at.

mod api_faults;
mod embedded;
mod local;
mod once;

use std::path::PathBuf;

use super::good::How;
use super::schedule::What;
use super::world::Bounds;
use crate::cluster::{Cluster, Error, Result};
use crate::manifest::{add_arguments, change_container};

pub(super) use embedded::OnEmbedded;
pub(super) use local::OnLocal;

/// The clusters on which a run is possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// An API server and kubelets of our own. Every fault can be made there.
    Embedded,
    /// Real Kubernetes on this machine.
    Local,
}

impl Site {
    /// Returns the one that `$E2E_CLUSTER` names, `embedded` if it names none.
    ///
    /// # Errors
    /// When there are no runs on that cluster.
    pub fn from_env() -> Result<Self> {
        match std::env::var("E2E_CLUSTER").as_deref() {
            Err(_) | Ok("embedded") => Ok(Self::Embedded),
            Ok("local") => Ok(Self::Local),
            Ok(other) => Err(Error::Impossible(format!(
                "E2E_CLUSTER={other}: faults strike the clusters embedded and local only"
            ))),
        }
    }

    /// Returns the number of nodes, for a schedule.
    pub fn nodes(self) -> usize {
        match self {
            Self::Embedded => 2,
            Self::Local => 1,
        }
    }
}

/// A cluster whose nodes can be disturbed, and looked into from this process.
pub(super) trait Ground {
    /// The cluster's type.
    type Cluster: Cluster;

    fn cluster(&self) -> &Self::Cluster;

    /// Returns the times within which something has to happen here.
    fn bounds(&self) -> Bounds;

    /// Returns an interval between refreshes that is too long for a change to be followed in time by
    /// chance, where kubelet looks at volumes often enough.
    fn seldom(&self) -> &'static str;

    /// Returns the directory through which this process sees a node's files and mounts, until the
    /// node's next reboot.
    async fn root(&self, node: &str) -> Result<PathBuf>;

    /// Returns a directory of each node in which a run may leave files until its end.
    fn scratch(&self) -> &'static str;

    /// Runs a program on a node, as root, and returns what it prints. `probe` is among the programs.
    async fn run(&self, node: &str, command: &[&str]) -> Result<String>;

    /// Returns the driver's process on a node, if it runs.
    async fn driver_process(&self, node: &str) -> Result<Option<i32>>;

    /// Starts a node's kubelet anew.
    async fn restart_kubelet(&self, node: &str) -> Result<()>;

    /// Returns why something cannot be done here, if it cannot.
    fn cannot(&self, what: What) -> Option<&'static str>;

    /// Returns whether a process stops and starts at once. Real Kubernetes takes its time.
    fn stops_at_once(&self) -> bool;

    /// Returns whether kubelet looks at volumes all the time, and waits for an answer longer than the driver waits
    /// for that of a provider.
    fn leaves_deadlines_to_the_driver(&self) -> bool;

    /// Returns whether kubelet runs liveness probes.
    fn has_liveness_probes(&self) -> bool;

    /// Lets the API server misbehave towards the driver, as long as the fault lasts. Returns how often
    /// it was seen to strike.
    async fn strike_api(&self, fault: What) -> Result<u64>;

    /// Leaves the driver's writes to objects of a namespace without an answer for a while, as an admission
    /// webhook of that namespace does.
    async fn hang_writes(&self, namespace: &str, lasts: u64);

    /// Starts a node's driver anew in a container whose mounts do not reach the node, or do so again.
    async fn isolate_driver(&self, node: &str, isolated: bool) -> Result<()>;

    /// Gives the driver's next processes on a node these arguments besides those of its manifest.
    async fn add_arguments(&self, node: &str, arguments: &[&str]) -> Result<()>;

    /// Returns the number of writes of the driver, of objects other than events, and of its reads, that the API
    /// server has got since the run began; none where nobody counts them.
    fn requests(&self) -> Option<(u64, u64)>;

    /// Lets the next request of a kind fail that the driver sends to the API server, and only that. `kind`
    /// counts modulo the kinds that it has sent so far, `how` modulo the failures that there are. Returns what
    /// has failed; none if no request of the kind has come in time.
    async fn fail_once(&self, kind: usize, how: usize) -> Result<Option<(String, How)>>;

    /// Gives the driver the memory limit that it would have on a machine with so many MiB. Returns the limit.
    async fn shrink_memory(&self, node: &str, machine: u64) -> Result<u64>;

    /// Undoes that.
    async fn restore_memory(&self, node: &str) -> Result<()>;
}

/// The container of the provider.
pub(super) const PROVIDER: &str = "fake-provider";

/// Changes the manifests of driver and provider for a run.
fn prepare(manifests: &mut [String], flags: &[&str]) -> Result<()> {
    add_arguments(manifests, "secrets-store", flags)?;
    // So that the driver has another disk below its directory when one is mounted there.
    change_container(manifests, "secrets-store", |container| {
        let mounts = container["volumeMounts"].as_array_mut();
        for mount in mounts.into_iter().flatten() {
            if mount["name"] == "plugin-dir" {
                mount["mountPropagation"] = "HostToContainer".into();
            }
        }
    })
}
