//! The local cluster: real Kubernetes on this machine, without Docker, systemd or a registry.
//!
//! ```text
//! tools       which programs, and where one gets what is missing
//! machine     what is changed on this machine, and undone: kubelet's root, kernel settings
//! network     the bridge and the rules that keep what is sent on this machine
//! processes   daemons with logs, found again by a later run
//! pki         certificates and kubeconfigs
//! daemons     control plane, container runtime and kubelet, with their settings
//! node        the Cluster interface: looking into pods, breaking their processes
//! ```
//!
//! One node, `node-1`. At most one such cluster runs on a machine at a time: whoever runs it
//! holds a lock. Whatever happens, nothing stays: a guard process tears down when the process
//! that started the cluster is gone, and should that be killed as well, the next start does.
//! Nothing that runs in the cluster reaches anything outside of this machine.

mod daemons;
mod layout;
mod machine;
mod network;
mod node;
mod pki;
mod processes;
mod tools;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::binaries::kept;
use crate::cluster::{Error, Result};
use crate::images;
use crate::install::{Form, Installation, assets, install};
use crate::real::KEPT_KINDS;
use daemons::Daemons;
use layout::{LOCK, STATE};
pub use node::Local;
use pki::Pki;
use processes::Processes;
use tools::Tools;

/// For everything that is installed to run.
const INSTALL_LIMIT: Duration = Duration::from_secs(120);

/// How the cluster is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder with the Kubernetes binaries.
    pub assets: PathBuf,
    /// What is installed.
    pub installation: Installation,
    /// An executable that, run as `<guard> guard`, calls [`guard`]; without one, nobody tears
    /// down when this process is killed.
    pub guard: Option<PathBuf>,
}

impl Options {
    /// Binaries from where [`assets`] says, the form that the environment asks for, guarded.
    ///
    /// # Errors
    /// When an image does not build, or a manifest cannot be read.
    pub fn standard(progress: impl FnMut(&str), guard: PathBuf) -> Result<Self> {
        let images = images::build(progress).map_err(|error| Error::Start(error.to_string()))?;
        Ok(Self {
            assets: assets(),
            installation: Installation::standard(&images, &Form::from_env())?,
            guard: Some(guard),
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
    /// Starts a cluster; returns when all that is installed runs and the driver is registered.
    /// What an earlier run left is torn down first. Blocks, and not from within a runtime.
    ///
    /// `progress` hears each step as it begins.
    ///
    /// # Errors
    /// [`Error::Start`] with the programs that are missing, or with the last lines of the daemon
    /// that did not come up. Nothing stays then.
    pub fn start(options: &Options, mut progress: impl FnMut(&str)) -> Result<Self> {
        let tools = Tools::find(&options.assets)?;
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::Start("the local cluster needs root".to_owned()));
        }
        let lock = Lock::take(&mut progress)?;
        undo()?;
        let guard = options.guard.as_deref().map(spawn_guard).transpose()?;
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
        // From here on, dropping it undoes it.
        if let Err(error) = running.bring_up(options, &mut progress) {
            let dir = kept("start");
            let failed = match running.keep_logs(&dir) {
                Ok(()) => format!("{error}; logs and objects are in {}", dir.display()),
                Err(not_kept) => format!("{error}; {not_kept}"),
            };
            return Err(Error::Start(failed));
        }
        Ok(running)
    }

    fn bring_up(&self, options: &Options, progress: &mut impl FnMut(&str)) -> Result<()> {
        let installation = &options.installation;
        progress("control plane and node");
        let processes = Processes::new(Path::new(STATE));
        self.daemons(&processes).start(&installation.images)?;
        progress("the driver and the provider");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Error::Start(format!("runtime: {error}")))?;
        runtime.block_on(async {
            let client = self.connect().await?.kube_client();
            install(&client, &installation.manifests, INSTALL_LIMIT).await
        })
    }

    /// Installs, over what is installed; returns when all of it runs and the driver is registered.
    ///
    /// # Errors
    /// What the API server refuses or does not come up.
    pub async fn install(&self, installation: &Installation) -> Result<()> {
        let processes = Processes::new(Path::new(STATE));
        self.daemons(&processes).import(&installation.images)?;
        let client = self.connect().await?.kube_client();
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

    /// A way to the cluster, for one runtime.
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

    /// An administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.pki.kubeconfig("admin")
    }

    /// Copies the logs of every daemon and container, and writes the objects without the Secrets,
    /// into a folder. Blocks.
    ///
    /// # Errors
    /// When they cannot be had or written.
    pub fn keep_logs(&self, dir: &Path) -> Result<()> {
        let failed = |reason: String| Error::Start(format!("keep logs: {reason}"));
        for logs in ["logs", "pod-logs"] {
            copy_files(&Path::new(STATE).join(logs), &dir.join(logs))
                .map_err(|error| failed(error.to_string()))?;
        }
        let processes = Processes::new(Path::new(STATE));
        let objects = ["get", KEPT_KINDS, "--all-namespaces", "--output=yaml"];
        let objects = self.daemons(&processes).kubectl(&objects).map_err(failed)?;
        fs::write(dir.join("objects.yaml"), objects).map_err(|error| failed(error.to_string()))
    }

    /// Where the cluster keeps the logs of its daemons.
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
            // It waits for the end of its input, then for the lock, which goes with this.
            drop(guard.stdin.take());
        }
    }
}

/// Waits until the process that started the cluster is gone, which closes standard input, and
/// then tears down what it left.
///
/// # Errors
/// What could not be undone.
pub fn guard() -> Result<()> {
    let _gone = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    tear_down()
}

/// Tears down what an earlier run left, if anything. Waits for a run that still goes on.
///
/// # Errors
/// What could not be undone.
pub fn tear_down() -> Result<()> {
    let _lock = Lock::take(&mut |_| {})?;
    undo()
}

/// Stops every daemon and undoes every change. The caller holds the lock.
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

/// Tears down after a failed start; the error names both failures, if there are two.
fn undone(error: Error) -> Error {
    match undo() {
        Ok(()) => error,
        Err(left) => Error::Start(format!("{error}; {left}")),
    }
}

fn spawn_guard(program: &Path) -> Result<Child> {
    Command::new(program)
        .arg("guard")
        // An interrupt at the terminal is for the test, and its end for the guard.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| Error::Start(format!("guard {}: {error}", program.display())))
}

/// Copies what stands below a directory, which may be absent. What goes meanwhile is left out.
fn copy_files(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    let Ok(entries) = fs::read_dir(from) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_files(&entry.path(), &target)?;
        } else if entry.path().exists() {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Held as long as this machine's one local cluster is ours.
struct Lock(File);

impl Lock {
    fn take(progress: &mut dyn FnMut(&str)) -> Result<Self> {
        let path = Path::new(LOCK);
        let failed = |error: std::io::Error| Error::Start(format!("{LOCK}: {error}"));
        loop {
            let file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(path)
                .map_err(failed)?;
            if file.try_lock().is_err() {
                progress("waiting for another local cluster to end");
                file.lock().map_err(failed)?;
            }
            // Whoever held it before has removed it.
            let inode = file.metadata().map_err(failed)?.ino();
            if fs::metadata(path).is_ok_and(|current| current.ino() == inode) {
                return Ok(Self(file));
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _not_there = fs::remove_file(LOCK);
        let _closes_anyway = self.0.unlock();
    }
}
