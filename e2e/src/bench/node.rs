//! Drivers and a provider as processes of this machine, without a cluster's node around them.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::Pid;
use proto::csi::node_client::NodeClient;
use tokio::process::{Child, Command};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::retry::DEADLINE;
use super::{Process, Volume, failed};
use crate::cluster::Result;
use crate::isolated::{self, Namespaces};

/// The time in which a process has to answer.
const LIMIT: Duration = Duration::from_secs(60);
/// The time between two attempts to connect.
const AGAIN: Duration = Duration::from_millis(5);
/// The time after SIGTERM in which a process has to end.
const GRACE: Duration = Duration::from_secs(30);
/// The name of the provider in classes of the tests.
const PROVIDER: &str = "e2e-provider";

/// The settings of a driver on a node.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// The executable `e2e`.
    pub(crate) e2e: PathBuf,
    /// The driver's executable, ours or the existing one.
    pub(crate) driver: PathBuf,
    /// The node's name.
    pub(crate) name: String,
    /// The node's directory: socket, records, log and kubelet's pods.
    pub(crate) directory: PathBuf,
    pub(crate) kubeconfig: PathBuf,
    /// The directory with the provider's socket.
    pub(crate) providers: PathBuf,
    /// More flags.
    pub(crate) flags: Vec<String>,
}

/// A running driver. Dropping it kills the process; its mounts vanish unless others keep the
/// namespaces.
pub(crate) struct Node {
    settings: Settings,
    process: Child,
    namespaces: Namespaces,
    client: NodeClient<Channel>,
}

impl Node {
    /// Starts a driver in a mount namespace of its own; returns when its socket takes connections.
    ///
    /// # Errors
    /// When it ends or does not answer, with the end of its log.
    pub(crate) async fn start(settings: Settings) -> Result<Self> {
        Self::start_in(settings, None).await
    }

    async fn start_in(settings: Settings, namespaces: Option<Namespaces>) -> Result<Self> {
        let mut process = spawn(&settings, namespaces.as_ref())?;
        let channel = connect(&settings, &mut process).await?;
        let pid = pid_of(&process)?;
        let namespaces = match namespaces {
            Some(namespaces) => namespaces,
            None => Namespaces::of(pid.0).map_err(|error| failed("a namespace", &error))?,
        };
        Ok(Self {
            settings,
            process,
            namespaces,
            client: NodeClient::new(channel),
        })
    }

    /// Returns the node's name.
    pub(crate) fn name(&self) -> &str {
        &self.settings.name
    }

    /// Returns a client of the driver's CSI socket.
    pub(crate) fn client(&self) -> NodeClient<Channel> {
        self.client.clone()
    }

    /// Returns the driver's process.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn process(&self) -> Result<Process> {
        pid_of(&self.process)
    }

    /// Stops the driver; returns what [`Stopped::start`] needs. Its mounts stay, as on a node whose
    /// DaemonSet is updated.
    ///
    /// # Errors
    /// When it does not end after SIGTERM.
    pub(crate) async fn stop(mut self) -> Result<Stopped> {
        let Process(pid) = self.process()?;
        kill(Pid::from_raw(pid), Signal::SIGTERM).map_err(|error| failed("SIGTERM", &error))?;
        let ended = tokio::time::timeout(GRACE, self.process.wait()).await;
        ended
            .map_err(|_| failed(self.name(), &format!("does not end within {GRACE:?}")))?
            .map_err(|error| failed(self.name(), &error))?;
        Ok(Stopped(self.settings, self.namespaces))
    }

    /// Kills the driver, and takes its mounts away, as a power cut does. The node's directory stays.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub(crate) async fn cut_power(mut self) -> Result<Settings> {
        let killed = self.process.kill().await;
        killed.map_err(|error| failed(self.name(), &error))?;
        Ok(self.settings)
    }

    /// Creates pods of this node with a volume of a class each; `run` makes their names unique.
    ///
    /// # Errors
    /// When the API server refuses a pod.
    pub(crate) async fn volumes(
        settings: &Settings,
        namespace: &crate::namespace::Namespace,
        (class, run): (&str, &str),
        count: usize,
    ) -> Result<Vec<Volume>> {
        let root = settings.directory.to_string_lossy();
        let place = (&*root, settings.directory.as_path());
        Volume::create(namespace, (&settings.name, class, run), place, count).await
    }

    /// Returns the path at which this process sees what is mounted in the driver's namespace.
    ///
    /// # Errors
    /// When the driver has ended.
    pub(crate) fn path(&self, path: &str) -> Result<PathBuf> {
        let Process(pid) = self.process()?;
        Ok(PathBuf::from(format!("/proc/{pid}/root{path}")))
    }

    /// Makes a volume's directory as old as the epoch. The existing driver takes its age for the time
    /// since the last refresh.
    ///
    /// # Errors
    /// When it is not mounted.
    pub(crate) fn age(&self, volume: &Volume) -> Result<()> {
        let path = self.path(&volume.target())?;
        let old = TimeSpec::new(1, 0);
        let follow = UtimensatFlags::FollowSymlink;
        utimensat(nix::fcntl::AT_FDCWD, &path, &old, &old, follow)
            .map_err(|error| failed(&volume.target(), &error))
    }

    /// Reads a file of a volume.
    ///
    /// # Errors
    /// When it is not there.
    pub(crate) fn read(&self, volume: &Volume, file: &str) -> Result<String> {
        let path = self.path(&format!("{}/{file}", volume.target()))?;
        fs::read_to_string(&path).map_err(|error| failed(&path.display().to_string(), &error))
    }
}

/// A node whose driver has been stopped.
pub(crate) struct Stopped(Settings, Namespaces);

impl Stopped {
    /// Starts the driver again, with the mounts that it had.
    ///
    /// # Errors
    /// As of [`Node::start`].
    pub(crate) async fn start(self) -> Result<Node> {
        Node::start_in(self.0, Some(self.1)).await
    }
}

/// Publishes a volume; returns the time in milliseconds and the answer.
pub(crate) async fn publish(
    mut client: NodeClient<Channel>,
    volume: &Volume,
) -> (f64, std::result::Result<(), Status>) {
    timed(client.node_publish_volume(volume.publish())).await
}

/// Unpublishes a volume; returns the time in milliseconds and the answer.
pub(crate) async fn unpublish(
    mut client: NodeClient<Channel>,
    volume: &Volume,
) -> (f64, std::result::Result<(), Status>) {
    timed(client.node_unpublish_volume(volume.unpublish())).await
}

/// Waits for an answer as long as kubelet does.
async fn timed<T>(
    call: impl Future<Output = std::result::Result<T, Status>>,
) -> (f64, std::result::Result<(), Status>) {
    let started = Instant::now();
    let answer = match tokio::time::timeout(DEADLINE, call).await {
        Ok(answer) => answer.map(drop),
        Err(_) => Err(Status::deadline_exceeded(format!(
            "no answer within {DEADLINE:?}"
        ))),
    };
    (started.elapsed().as_secs_f64() * 1000.0, answer)
}

fn spawn(settings: &Settings, namespaces: Option<&Namespaces>) -> Result<Child> {
    let Settings {
        directory, name, ..
    } = settings;
    let providers = settings.providers.display();
    let flags = [
        format!("--endpoint=unix://{}", socket(settings).display()),
        format!("--nodeid={name}"),
        format!("--kubeconfig={}", settings.kubeconfig.display()),
        format!("--provider-volume={providers}"),
        format!("--additional-provider-volume-paths={providers}"),
        "--metrics-addr=127.0.0.1:0".to_owned(),
    ];
    let prepared = || {
        fs::create_dir_all(directory.join("csi"))?;
        fs::create_dir_all(directory.join("pods"))?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(log(settings))?;
        Ok((log.try_clone()?, log))
    };
    let (output, errors) = prepared().map_err(|error: std::io::Error| failed(name, &error))?;
    let command = isolated::command(&settings.e2e, namespaces, &settings.driver);
    Command::from(command)
        .args(flags)
        .args(&settings.flags)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(name, &error))
}

fn socket(settings: &Settings) -> PathBuf {
    settings.directory.join("csi/csi.sock")
}

fn log(settings: &Settings) -> PathBuf {
    settings.directory.join("log")
}

fn pid_of(process: &Child) -> Result<Process> {
    let pid = process.id().and_then(|pid| i32::try_from(pid).ok());
    pid.map(Process)
        .ok_or_else(|| failed("a driver", &"has ended"))
}

async fn connect(settings: &Settings, process: &mut Child) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket(settings).display()))
        .map_err(|error| failed(&settings.name, &error))?;
    let started = Instant::now();
    loop {
        match endpoint.connect().await {
            Ok(channel) => return Ok(channel),
            Err(_) if started.elapsed() < LIMIT && matches!(process.try_wait(), Ok(None)) => {
                tokio::time::sleep(AGAIN).await;
            }
            Err(error) => {
                let log = fs::read_to_string(log(settings)).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(10)..].join("\n");
                let why = format!("its socket does not answer: {error}; its last lines:\n{tail}");
                return Err(failed(&settings.name, &why));
            }
        }
    }
}

/// The tests' provider, for all drivers.
pub(crate) struct Provider {
    program: PathBuf,
    directory: PathBuf,
    address: SocketAddr,
    process: Option<Child>,
}

impl Provider {
    /// Starts the provider; its socket and its log go to a directory.
    ///
    /// # Errors
    /// When it does not answer.
    pub(crate) async fn start(program: &Path, directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).map_err(|error| failed("the provider", &error))?;
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|free| free.local_addr());
        let mut provider = Self {
            program: program.to_owned(),
            directory: directory.to_owned(),
            address: free.map_err(|error| failed("a port", &error))?,
            process: None,
        };
        provider.bring_back().await?;
        Ok(provider)
    }

    /// Returns the number of Mount calls since the provider's start.
    ///
    /// # Errors
    /// When it does not answer.
    pub(crate) async fn calls(&self) -> Result<f64> {
        let answer = embedded::get(self.address, "/calls").await;
        let answer = answer.map_err(|error| failed("the provider", &error))?;
        let calls: serde_json::Value = serde_json::from_str(&answer.body)
            .map_err(|error| failed("the provider's calls", &error))?;
        calls["mountCalls"]
            .as_f64()
            .ok_or_else(|| failed("the provider's calls", &answer.body))
    }

    /// Returns a connection to its socket, which the first call makes.
    ///
    /// # Errors
    /// When the socket's path is none.
    pub(crate) fn channel(&self) -> Result<Channel> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", self.socket().display()))
            .map_err(|error| failed("the provider's socket", &error))?;
        // It refuses other authorities, as the existing driver's provider for tests does.
        let localhost = http::Uri::from_static("http://localhost");
        Ok(endpoint.origin(localhost).connect_lazy())
    }

    fn socket(&self) -> PathBuf {
        self.directory.join(format!("{PROVIDER}.sock"))
    }

    /// Kills the provider; its socket stays.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub(crate) async fn take_away(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else {
            return Ok(());
        };
        process
            .kill()
            .await
            .map_err(|error| failed("the provider", &error))
    }

    /// Starts the provider if it does not run; returns when it answers.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub(crate) async fn bring_back(&mut self) -> Result<()> {
        if self.process.is_some() {
            return Ok(());
        }
        let socket = self.socket();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.directory.join("log"));
        let process = Command::new(&self.program)
            .arg(format!("--endpoint=unix://{}", socket.display()))
            .arg(format!("--http-addr={}", self.address))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.map_err(|error| failed("the provider", &error))?)
            .kill_on_drop(true)
            .spawn();
        self.process = Some(process.map_err(|error| failed("the provider", &error))?);
        let started = Instant::now();
        while let Err(error) = self.calls().await {
            if started.elapsed() > LIMIT {
                return Err(error);
            }
            tokio::time::sleep(AGAIN).await;
        }
        Ok(())
    }
}
