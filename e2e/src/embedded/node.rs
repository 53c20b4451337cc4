//! `e2e node`: a node of the embedded cluster, a process in namespaces of its own.
//!
//! It is kubelet and container runtime in one: enters its world, connects its loopback to the
//! API server, runs the DaemonSets and the kubelet, and obeys its control socket. It ends when
//! its standard input does, so that it does not outlive the test that started it, however that
//! ends; its containers end with it. Killed and started again on the same root it has been
//! rebooted: mounts and `/run` are gone, its disk is not.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::authentication::v1::TokenRequestSpec;
use kube::ResourceExt;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::net::{TcpListener, UnixStream};

use super::control::Server;
use super::namespaces::{self, KUBELET_ROOT, STATE, World};
use super::processes::{self, Container, Processes};
use super::{api, daemonsets, kubelet};

/// How often a DaemonSet is tried again whose service account is not there yet.
const RETRY: Duration = Duration::from_millis(300);
/// A token outlives every test; nothing renews it.
const TOKEN_SECONDS: i64 = 24 * 60 * 60;

/// `e2e node`, started by the embedded cluster.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The cluster's state directory.
    #[arg(long)]
    pub state: PathBuf,
    /// The node's name.
    #[arg(long)]
    pub name: String,
    /// The executable secrets-store-csi.
    #[arg(long)]
    pub driver: PathBuf,
    /// The executable fake-provider.
    #[arg(long)]
    pub fake_provider: PathBuf,
    /// The executable probe.
    #[arg(long)]
    pub probe: PathBuf,
    /// Deadline of a call to a driver, in milliseconds.
    #[arg(long, default_value_t = 120_000)]
    pub csi_timeout_ms: u64,
    /// How often volumes are republished, in milliseconds; 0: never.
    #[arg(long, default_value_t = 0)]
    pub sync_period_ms: u64,
}

/// `e2e container`, started by a node: becomes a container's program.
#[derive(Clone, Debug, clap::Args)]
pub struct ContainerArgs {
    /// The node's process.
    node: i32,
    /// What to become, as JSON.
    container: String,
}

/// Why a node ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It has no world of its own.
    #[error(transparent)]
    World(#[from] namespaces::Error),
    /// A step of its start or its work.
    #[error("{step}: {reason}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// What happened.
        reason: String,
    },
}

/// Where a node keeps what is its own, below the state directory.
pub(crate) fn node_dir(state: &Path, name: &str) -> PathBuf {
    state.join("nodes").join(name)
}

/// Runs a node until its standard input ends. The process must have one thread.
///
/// # Errors
/// A sentence for whoever started it.
pub fn run(args: &Args) -> Result<(), Error> {
    let own = std::env::current_exe().map_err(|error| failed("find the own executable", &error))?;
    let binaries = [
        ("secrets-store-csi", args.driver.clone()),
        ("fake-provider", args.fake_provider.clone()),
        ("probe", args.probe.clone()),
        ("e2e", own),
    ];
    namespaces::enter(&World {
        root: &node_dir(&args.state, &args.name).join("root"),
        state: &args.state,
        binaries: &binaries,
    })?;
    // Only now: the namespaces are those of one thread, and of the threads it starts.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| failed("start the runtime", &error))?;
    let outcome = runtime.block_on(work(args));
    // Its tasks may wait for a driver; the containers are killed by the kernel.
    runtime.shutdown_background();
    outcome
}

/// Becomes a container's program; returns only when that fails.
pub fn run_container(args: &ContainerArgs) -> Error {
    match serde_json::from_str::<Container>(&args.container) {
        Ok(container) => {
            let error = processes::become_container(&container, args.node);
            failed("become the container", &error)
        }
        Err(error) => failed("read what to become", &error),
    }
}

async fn work(args: &Args) -> Result<(), Error> {
    let state = Path::new(STATE);
    let dir = node_dir(state, &args.name);
    let client = api::connect(&state.join("api.sock"));
    let processes = Processes::new(dir.join("logs"));
    let server = Server {
        processes: processes.clone(),
    };
    let config = kubelet::Config {
        node: args.name.clone(),
        root: PathBuf::from(KUBELET_ROOT),
        csi_timeout: Duration::from_millis(args.csi_timeout_ms),
        path_authority: true,
        sync_period: (args.sync_period_ms > 0).then(|| Duration::from_millis(args.sync_period_ms)),
    };
    let daemon_sets = DaemonSets {
        client: client.clone(),
        node: args.name.clone(),
        processes,
    };
    let pods_socket = state.join("pods.sock");
    let control_socket = dir.join("control.sock");
    tokio::select! {
        () = standard_input_ends() => Ok(()),
        outcome = proxy(&pods_socket) => outcome.map_err(|error| failed("serve the API server's address", &error)),
        outcome = server.serve(&control_socket) => outcome.map_err(|error| failed("serve the control socket", &error)),
        outcome = kubelet::run(config, client) => outcome.map_err(|error| failed("register the node", &error)),
        () = daemon_sets.run() => Ok(()),
    }
}

/// A thread waits for it, because tokio's standard input is a thread as well.
async fn standard_input_ends() {
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        // Whether it ends or breaks is the same: nobody holds the other end.
        let _copied = io::copy(&mut io::stdin().lock(), &mut io::sink());
        ended.send(())
    });
    let _ended = end.await;
}

/// Gives in-cluster clients the address they expect, byte for byte.
async fn proxy(socket: &Path) -> io::Result<()> {
    let listener = TcpListener::bind(daemonsets::API_ADDRESS).await?;
    loop {
        let (mut client, _) = listener.accept().await?;
        let socket = socket.to_owned();
        tokio::spawn(async move {
            // A broken connection is its two ends' affair, and they notice.
            if let Ok(mut server) = UnixStream::connect(socket).await {
                let _copied = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            }
        });
    }
}

/// Keeps the containers of the API's DaemonSets running.
struct DaemonSets {
    client: kube::Client,
    node: String,
    processes: Processes,
}

impl DaemonSets {
    async fn run(self) {
        // Names of the containers of each set, and the sets that could not be run yet.
        let mut running: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut waiting: BTreeMap<String, DaemonSet> = BTreeMap::new();
        let sets = Api::<DaemonSet>::all(self.client.clone());
        let mut events = watcher(sets, watcher::Config::default())
            .default_backoff()
            .boxed();
        loop {
            tokio::select! {
                event = events.next() => match event {
                    None => return,
                    Some(Err(error)) => tracing::warn!(%error, "watch of DaemonSets interrupted"),
                    Some(Ok(Event::Apply(set) | Event::InitApply(set))) => {
                        waiting.insert(key(&set), set);
                    }
                    Some(Ok(Event::Delete(set))) => {
                        waiting.remove(&key(&set));
                        for name in running.remove(&key(&set)).unwrap_or_default() {
                            self.processes.remove(&name).await;
                        }
                    }
                    Some(Ok(Event::Init | Event::InitDone)) => {}
                },
                () = tokio::time::sleep(RETRY), if !waiting.is_empty() => {}
            }
            let mut later = BTreeMap::new();
            for (key, set) in std::mem::take(&mut waiting) {
                match self.apply(&set).await {
                    Ok(names) => {
                        let before = running.insert(key, names.clone()).unwrap_or_default();
                        for name in before.iter().filter(|name| !names.contains(name)) {
                            self.processes.remove(name).await;
                        }
                    }
                    Err(reason) => {
                        tracing::warn!(daemonset = key, reason, "not run yet");
                        later.insert(key, set);
                    }
                }
            }
            waiting = later;
        }
    }

    async fn apply(&self, set: &DaemonSet) -> Result<Vec<String>, String> {
        let account = set
            .spec
            .template
            .spec
            .as_ref()
            .map_or("default", daemonsets::service_account);
        let namespace = set.namespace().unwrap_or_default();
        // In memory, as kubelet's projected volumes are.
        let credentials = PathBuf::from(format!("/run/serviceaccounts/{namespace}/{account}"));
        let labels = kubelet::node_labels(&self.node);
        let containers = daemonsets::containers(set, &self.node, &labels, &credentials)?;
        if !containers.is_empty() {
            self.write_credentials(&credentials, &namespace, account)
                .await?;
        }
        let names = containers
            .iter()
            .map(|container| container.name.clone())
            .collect();
        for container in containers {
            self.processes.apply(container).await;
        }
        Ok(names)
    }

    async fn write_credentials(
        &self,
        dir: &Path,
        namespace: &str,
        account: &str,
    ) -> Result<(), String> {
        if dir.join("token").exists() {
            return Ok(());
        }
        let spec = TokenRequestSpec {
            expiration_seconds: Some(TOKEN_SECONDS),
            ..TokenRequestSpec::default()
        };
        let token = kubelet::tokens::request(&self.client, namespace, account, spec).await?;
        let write = || -> io::Result<()> {
            std::fs::create_dir_all(dir)?;
            std::fs::copy(Path::new(STATE).join("ca.crt"), dir.join("ca.crt"))?;
            std::fs::write(dir.join("namespace"), namespace)?;
            std::fs::write(dir.join("token"), &token.token)
        };
        write().map_err(|error| format!("{}: {error}", dir.display()))
    }
}

fn key(set: &DaemonSet) -> String {
    format!("{}/{}", set.namespace().unwrap_or_default(), set.name_any())
}

fn failed(step: &'static str, reason: &dyn std::fmt::Display) -> Error {
    Error::Step {
        step,
        reason: reason.to_string(),
    }
}
