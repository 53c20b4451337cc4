//! A node of the cluster: a process in namespaces of its own.
//!
//! It is kubelet and container runtime in one: it enters its namespaces, connects its loopback to
//! the API server, runs the DaemonSets and the kubelet, and carries out the commands of its control
//! socket. It ends when its standard input does, so that it never outlives the test that started it;
//! its containers end with it. A node that is killed and started again on the same root has been
//! rebooted: mounts and `/run` are gone, its disk is not.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::authentication::v1::TokenRequestSpec;
use kube::ResourceExt;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::Notify;

use crate::control::Server;
use crate::namespaces::{self, STATE, World};
use crate::processes::{self, CONTAINER, Container, ENTER, Entry, Processes};
use crate::{api, daemonsets, kubelet};

/// The pause before a DaemonSet is tried again, for example because its service account is missing.
const RETRY: Duration = Duration::from_millis(300);
/// The lifetime of a token. It is longer than any test, because nothing renews it.
const TOKEN_SECONDS: i64 = 24 * 60 * 60;

/// The first argument of a process that is to become a node; the second is its [`Settings`].
pub(crate) const NODE: &str = "embedded-node";
/// The properties of a node, as JSON on its command line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// The cluster's state directory.
    pub(crate) state: PathBuf,
    pub(crate) name: String,
    pub(crate) shared: Option<PathBuf>,
    pub(crate) kubelet_root: PathBuf,
    pub(crate) programs: BTreeMap<String, PathBuf>,
    pub(crate) csi_timeout: Duration,
    pub(crate) sync_period: Option<Duration>,
    pub(crate) longest_pause: Duration,
    pub(crate) path_authority: bool,
}

/// The reason why a node ended.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// It has no namespaces of its own.
    #[error(transparent)]
    World(#[from] namespaces::Error),
    /// A step of its start or its work failed.
    #[error("{step}: {reason}")]
    Step { step: &'static str, reason: String },
}

/// Becomes a node or a container of a [`Cluster`](crate::Cluster) if this process was started as
/// one, and does not return then. Otherwise it does nothing.
///
/// The executable that [`Options::node_program`](crate::Options::node_program) names calls this
/// first in `main`, while it has one thread.
pub fn take_over() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [NODE, settings] => {
            tracing_subscriber::fmt()
                .with_writer(io::stderr)
                .with_ansi(false)
                .init();
            parse(settings).and_then(|settings| run(&settings))
        }
        [CONTAINER, container, node] => become_container(container, node),
        [ENTER, entry] => parse::<Entry>(entry)
            .and_then(|entry| Err(failed("enter the container", &processes::enter(&entry)))),
        _ => return,
    };
    if let Err(error) = outcome {
        eprintln!("{error}");
        std::process::exit(1);
    }
    std::process::exit(0);
}

fn parse<T: serde::de::DeserializeOwned>(argument: &str) -> Result<T, Error> {
    serde_json::from_str(argument).map_err(|error| failed("read the arguments", &error))
}

/// Returns only when it fails.
fn become_container(container: &str, node: &str) -> Result<(), Error> {
    let error = processes::become_container(&parse::<Container>(container)?, parse(node)?);
    Err(failed("become the container", &error))
}

/// Returns the directory of a node below the state directory.
pub(crate) fn node_dir(state: &Path, name: &str) -> PathBuf {
    state.join("nodes").join(name)
}

/// Runs a node until its standard input ends. The process must have one thread.
fn run(settings: &Settings) -> Result<(), Error> {
    namespaces::enter(&World {
        root: &node_dir(&settings.state, &settings.name).join("root"),
        state: &settings.state,
        shared: settings.shared.as_deref(),
        kubelet_root: &settings.kubelet_root,
        programs: &settings.programs,
    })?;
    // Not earlier: only the threads that this one starts from here on are in the namespaces.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| failed("start the runtime", &error))?;
    let outcome = runtime.block_on(work(settings));
    // Its tasks may wait for a driver; the containers are killed by the kernel.
    runtime.shutdown_background();
    outcome
}

async fn work(settings: &Settings) -> Result<(), Error> {
    let state = Path::new(STATE);
    let dir = node_dir(state, &settings.name);
    let client = api::connect(&state.join("api.sock"));
    let processes = Processes::new(dir.join("logs"));
    let restart = Arc::new(Notify::new());
    let server = Server {
        processes: processes.clone(),
        restart_kubelet: Arc::clone(&restart),
    };
    let config = kubelet::Config {
        node: settings.name.clone(),
        root: settings.kubelet_root.clone(),
        csi_timeout: settings.csi_timeout,
        path_authority: settings.path_authority,
        sync_period: settings.sync_period,
        longest_pause: settings.longest_pause,
    };
    let daemon_sets = DaemonSets {
        client: client.clone(),
        node: settings.name.clone(),
        programs: settings.programs.clone(),
        kubelet_root: settings.kubelet_root.clone(),
        processes,
    };
    let pods_socket = state.join("pods.sock");
    let control_socket = dir.join("control.sock");
    tokio::select! {
        () = standard_input_ends() => Ok(()),
        outcome = proxy(&pods_socket) => outcome.map_err(|error| failed("serve the API server's address", &error)),
        outcome = server.serve(&control_socket) => outcome.map_err(|error| failed("serve the control socket", &error)),
        outcome = run_kubelet(&config, &client, &restart) => outcome.map_err(|error| failed("register the node", &error)),
        () = daemon_sets.run() => Ok(()),
    }
}

/// Runs the kubelet, and starts it anew when told to: all that it was doing breaks off.
async fn run_kubelet(
    config: &kubelet::Config,
    client: &kube::Client,
    restart: &Notify,
) -> kube::Result<()> {
    loop {
        tokio::select! {
            outcome = kubelet::run(config.clone(), client.clone()) => return outcome,
            () = restart.notified() => tracing::info!("kubelet starts anew"),
        }
    }
}

/// Waits for the end of standard input, in a thread, as tokio does it.
async fn standard_input_ends() {
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        // An error means the same as the end: nobody holds the other end.
        let _copied = io::copy(&mut io::stdin().lock(), &mut io::sink());
        ended.send(())
    });
    let _ended = end.await;
}

/// Forwards connections to the address that in-cluster clients expect.
async fn proxy(socket: &Path) -> io::Result<()> {
    let listener = TcpListener::bind(daemonsets::API_ADDRESS).await?;
    loop {
        let (mut client, _) = listener.accept().await?;
        let socket = socket.to_owned();
        tokio::spawn(async move {
            // Both ends notice a broken connection themselves.
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
    programs: BTreeMap<String, PathBuf>,
    kubelet_root: PathBuf,
    processes: Processes,
}

impl DaemonSets {
    async fn run(self) {
        // The names of the containers of each set, and the sets that could not be run yet.
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
            .map_or("default", kubelet::tokens::service_account);
        let namespace = set.namespace().unwrap_or_default();
        // On a tmpfs, as kubelet's projected volumes are.
        let credentials = PathBuf::from(format!("/run/serviceaccounts/{namespace}/{account}"));
        let containers = daemonsets::containers(
            set,
            &self.node,
            &self.programs,
            &credentials,
            &self.kubelet_root,
        )?;
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
