//! The local cluster: real Kubernetes on this machine, without Docker, systemd or a registry.
//!
//! ```text
//! tools       the programs, and where to get those that are missing
//! layout      names, addresses and paths
//! machine     changes of this machine, and how they are undone
//! network     the bridge, and the rules that keep packets on this machine
//! processes   daemons with logs, which a later run finds again
//! pki         certificates and kubeconfigs
//! daemons     control plane, container runtime and kubelet, with their settings
//! node        the Cluster interface: volumes of pods, processes of driver and provider
//! ```
//!
//! It has one node, `node-1`. One such cluster runs on a machine at a time: the process that runs it
//! holds a lock. A guard process tears it down when that process is gone; if the guard is killed, too,
//! the next start does. Nothing that runs in the cluster reaches anything outside of this machine.

mod daemons;
mod layout;
mod machine;
mod network;
mod node;
mod pki;
mod processes;
mod tools;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::binaries::logs_dir;
use crate::cluster::{Cluster as _, Error, Result};
use crate::guard::{self, Lock};
use crate::host::copy_files;
use crate::images;
use crate::install::{Form, Installation, assets, install};
use crate::real::{LOGGED_KINDS, not_started};
use daemons::Daemons;
use layout::{LOCK, STATE};
pub use network::Cut;
pub use node::Local;
use pki::Pki;
use processes::Processes;
use tools::Tools;

/// The time in which everything installed has to run.
const INSTALL_LIMIT: Duration = Duration::from_secs(120);
/// The time for which a cluster that still runs is waited for without a word.
const PATIENCE: Duration = Duration::from_secs(5);

/// The settings of a local cluster.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder with the Kubernetes binaries.
    pub assets: PathBuf,
    /// Manifests and images.
    pub installation: Installation,
    /// An executable that, run as `<guard> guard`, calls [`guard()`]. Without one, the cluster outlives
    /// a process that is killed.
    pub guard: Option<PathBuf>,
    /// Whether there is a node: kubelet and the container runtime. Without it there is only a control
    /// plane.
    pub node: bool,
}

impl Options {
    /// Builds the images and reads the manifests, in the form that the environment asks for. The
    /// binaries come from [`assets`].
    ///
    /// # Errors
    /// When an image does not build, or a manifest cannot be read.
    pub fn standard(progress: impl FnMut(&str), guard: PathBuf) -> Result<Self> {
        let images = images::build(progress).map_err(|error| Error::Start(error.to_string()))?;
        Ok(Self {
            assets: assets(),
            installation: Installation::standard(&images, &Form::from_env())?,
            guard: Some(guard),
            node: true,
        })
    }
}

/// A running local cluster. Dropping it tears it down.
pub struct Running {
    tools: Tools,
    pki: Pki,
    _lock: Lock,
    guard: Option<Child>,
}

impl Running {
    /// Tears down what an earlier run left and starts a cluster; returns when everything installed
    /// runs and the driver is registered. Blocks; must not be called from within a runtime.
    ///
    /// Calls `progress` with each step as it begins.
    ///
    /// # Errors
    /// [`Error::Start`] with the programs that are missing, or with the last lines of the daemon that
    /// did not start. All changes are undone then.
    pub fn start(options: &Options, mut progress: impl FnMut(&str)) -> Result<Self> {
        let tools = Tools::find(&options.assets)?;
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::Start("the local cluster needs root".to_owned()));
        }
        let waiting = || progress("waiting for another local cluster to end");
        let lock = Lock::take(Path::new(LOCK), waiting)?;
        undo()?;
        let spawn = |program| guard::spawn(program, Stdio::null());
        let guard = options.guard.as_deref().map(spawn).transpose()?;
        let state = Path::new(STATE);
        progress("network, mounts and certificates");
        let made = machine::prepare(state).and_then(|()| Pki::make(state));
        let pki = match made {
            Ok(pki) => pki,
            Err(error) => return Err(undone(error)),
        };
        let running = Self {
            tools,
            pki,
            _lock: lock,
            guard,
        };
        // From here on, dropping it undoes all changes.
        if let Err(error) = running.bring_up(options, &mut progress) {
            let dir = logs_dir("start");
            return Err(not_started(&error, &dir, running.keep_logs(&dir)));
        }
        Ok(running)
    }

    fn bring_up(&self, options: &Options, progress: &mut impl FnMut(&str)) -> Result<()> {
        let installation = &options.installation;
        progress("control plane and node");
        let processes = Processes::new(Path::new(STATE));
        let images = installation.images.as_slice();
        self.daemons(&processes)
            .start(options.node.then_some(images))?;
        progress("the driver and the provider");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Error::Start(format!("runtime: {error}")))?;
        runtime.block_on(async {
            let client = self.connect().await?.client();
            install(&client, &installation.manifests, INSTALL_LIMIT).await
        })
    }

    /// Installs over what is installed; returns when all of it runs and the driver is registered.
    ///
    /// # Errors
    /// When the API server refuses an object, or something does not run in time.
    pub async fn install(&self, installation: &Installation) -> Result<()> {
        let processes = Processes::new(Path::new(STATE));
        self.daemons(&processes).import(&installation.images)?;
        let client = self.connect().await?.client();
        install(&client, &installation.manifests, INSTALL_LIMIT).await
    }

    fn daemons<'a>(&'a self, processes: &'a Processes) -> Daemons<'a> {
        Daemons {
            state: Path::new(STATE),
            tools: &self.tools,
            pki: &self.pki,
            processes,
        }
    }

    /// Connects to the cluster, for one runtime.
    ///
    /// # Errors
    /// When the kubeconfig cannot be used.
    pub async fn connect(&self) -> Result<Local> {
        Local::connect(
            &self.kubeconfig(),
            self.tools.kubectl.clone(),
            self.tools.ctr.clone(),
            PathBuf::from(STATE),
        )
        .await
    }

    /// Stops the API server until [`Running::start_api_server`]. Blocks.
    ///
    /// # Errors
    /// When it does not stop.
    pub(crate) fn stop_api_server(&self) -> Result<()> {
        Processes::new(Path::new(STATE)).stop(daemons::API_SERVER)
    }

    /// Starts the API server again; returns when it is ready. Blocks.
    ///
    /// # Errors
    /// When it does not come back in time.
    pub(crate) fn start_api_server(&self) -> Result<()> {
        let processes = Processes::new(Path::new(STATE));
        processes.restart(daemons::API_SERVER)?;
        self.daemons(&processes).wait_for_api_server()
    }

    /// Returns the path of an administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.pki.kubeconfig("admin")
    }

    /// Writes the logs of every daemon and container, and all objects but Secrets, into a folder.
    /// Blocks.
    ///
    /// # Errors
    /// When they cannot be read or written.
    pub fn keep_logs(&self, dir: &Path) -> Result<()> {
        let failed = |reason: String| Error::Start(format!("keep logs: {reason}"));
        for logs in ["logs", "pod-logs"] {
            copy_files(&Path::new(STATE).join(logs), &dir.join(logs))
                .map_err(|error| failed(error.to_string()))?;
        }
        let processes = Processes::new(Path::new(STATE));
        let objects = ["get", LOGGED_KINDS, "--all-namespaces", "--output=yaml"];
        let objects = self.daemons(&processes).kubectl(&objects).map_err(failed)?;
        fs::write(dir.join("objects.yaml"), objects).map_err(|error| failed(error.to_string()))
    }

    /// Returns the folder with the logs of the daemons.
    pub fn logs(&self) -> PathBuf {
        Path::new(STATE).join("logs")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = undo() {
            eprintln!("local cluster: {error}");
        }
        if let Some(guard) = &mut self.guard {
            // It waits for the end of its input, and then for the lock, which is released after this.
            drop(guard.stdin.take());
        }
    }
}

/// Runs the guard: waits until the process that started it is gone, and tears down what it left.
///
/// # Errors
/// Names what could not be undone.
pub fn guard() -> Result<()> {
    guard::wait_for_parent();
    tear_down(|_| ())
}

/// Tears down what an earlier run left. Waits for the end of a cluster that still runs; when that takes
/// longer than five seconds, calls `on_wait` with the process that runs it, as far as it is known.
///
/// # Errors
/// Names what could not be undone.
pub fn tear_down(on_wait: impl FnMut(Option<u32>)) -> Result<()> {
    let _lock = Lock::take_after(Path::new(LOCK), PATIENCE, on_wait)?;
    undo()
}

/// Stops every daemon and undoes every change. The caller has to hold the lock.
fn undo() -> Result<()> {
    let state = Path::new(STATE);
    if !state.exists() {
        return Ok(());
    }
    let processes = Processes::new(state);
    for name in daemons::NAMES {
        processes.stop(name)?;
    }
    machine::restore(state)
}

/// Tears down after a failed start. The error names both failures, if there are two.
fn undone(error: Error) -> Error {
    match undo() {
        Ok(()) => error,
        Err(left) => Error::Start(format!("{error}; {left}")),
    }
}
