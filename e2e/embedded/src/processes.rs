//! The containers of a node as child processes: each has its own mounts, is restarted when it exits,
//! and ends with the node.
//!
//! A container starts in two steps: the node runs its own executable again, which has one thread and
//! so can create the container's mount namespace in safe code, and then becomes the container's
//! program.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::api::Output;
use crate::namespaces::{PATH, PROGRAMS};

/// The first pause between a container's exit and its restart; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// The time after which a running container is no longer considered to be crash-looping.
const SETTLED: Duration = Duration::from_secs(5);
/// The time from SIGTERM to SIGKILL: the default of `terminationGracePeriodSeconds`.
const GRACE: Duration = Duration::from_secs(30);

/// The first argument of a process that is to become a container; the second is the [`Container`],
/// the third the node's process.
pub(crate) const CONTAINER: &str = "embedded-container";

/// The first argument of a process that is to enter a container; the second is its [`Entry`].
pub(crate) const ENTER: &str = "embedded-enter";

/// A command in a container that runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// The container's process.
    pid: i32,
    env: BTreeMap<String, String>,
    /// The program's path and its arguments.
    command: Vec<String>,
}

/// Enters a container and becomes a program there. Returns only on failure.
///
/// As in a real container, the container's own process has the number 1.
pub(crate) fn enter(entry: &Entry) -> io::Error {
    let enter = || -> io::Result<()> {
        let own = format!("/proc/{}", entry.pid);
        setns(
            fs::File::open(format!("{own}/ns/mnt"))?,
            CloneFlags::CLONE_NEWNS,
        )?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none = None::<&str>;
        mount(
            none,
            "/proc",
            none,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            none,
        )?;
        mount(Some(own.as_str()), "/proc/1", none, MsFlags::MS_BIND, none)?;
        std::env::set_current_dir("/")
    };
    let Some((program, arguments)) = entry.command.split_first() else {
        return io::Error::other("no program");
    };
    match enter() {
        Ok(()) => std::process::Command::new(program)
            .args(arguments)
            .env_clear()
            .env("PATH", PATH)
            .envs(&entry.env)
            .exec(),
        Err(error) => error,
    }
}

/// Everything needed to start a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Container {
    /// Unique on the node.
    pub(crate) name: String,
    /// Its name in [`PROGRAMS`].
    pub(crate) program: String,
    pub(crate) args: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) mounts: Vec<Mount>,
    /// kubelet's root directory on the node.
    pub(crate) kubelet_root: PathBuf,
}

impl Container {
    /// The path of the program in the node.
    pub(crate) fn program(&self) -> PathBuf {
        Path::new(PROGRAMS).join(&self.program)
    }

    /// Whether it has a directory of the node.
    pub(crate) fn has(&self, directory: &Path) -> bool {
        self.mounts.iter().any(|mount| mount.from == directory)
    }

    /// Returns it as its next process is to be.
    fn changed(&self, changes: &Changes) -> Self {
        let mut changed = self.clone();
        for mount in changed.mounts.iter_mut().filter(|_| changes.isolated) {
            // The node's mounts still come, as the disk of the state directory does.
            mount.propagation = mount.propagation.min(Propagation::HostToContainer);
        }
        changed.args.extend(changes.more_args.iter().cloned());
        changed
    }

    /// The path on the node of the Unix socket that its flag `--endpoint` names.
    pub(crate) fn endpoint(&self) -> Option<PathBuf> {
        let mut args = self.args.iter().rev();
        let socket = args.find_map(|arg| arg.strip_prefix("--endpoint=unix://"))?;
        let socket = Path::new(socket);
        let mut mounts = self.mounts.iter();
        let within = mounts.find_map(|mount| {
            let path = socket.strip_prefix(&mount.to).ok()?;
            Some(mount.from.join(path))
        });
        within.or_else(|| Some(socket.to_owned()))
    }
}

/// A directory of the node at a path of the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mount {
    pub(crate) from: PathBuf,
    pub(crate) to: PathBuf,
    pub(crate) propagation: Propagation,
}

/// The mount propagation of a [`Mount`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Propagation {
    /// Later mounts are seen on the side where they are made.
    #[default]
    None,
    /// The container sees later mounts of the node.
    HostToContainer,
    /// Container and node see each other's later mounts.
    Bidirectional,
}

impl Propagation {
    /// Returns the kernel's flag; none for both directions, with which a bind mount begins.
    fn restriction(self) -> Option<MsFlags> {
        match self {
            Self::None => Some(MsFlags::MS_PRIVATE),
            Self::HostToContainer => Some(MsFlags::MS_SLAVE),
            Self::Bidirectional => None,
        }
    }

    /// Parses a manifest's `mountPropagation`.
    pub(crate) fn named(name: Option<&str>) -> Option<Self> {
        match name {
            None | Some("" | "None") => Some(Self::None),
            Some("HostToContainer") => Some(Self::HostToContainer),
            Some("Bidirectional") => Some(Self::Bidirectional),
            Some(_) => None,
        }
    }
}

/// The state of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The container's name.
    pub name: String,
    /// Its process, if it runs.
    pub pid: Option<i32>,
    /// The number of restarts after it had exited by itself.
    pub restarts: u32,
}

/// Carries out the second step: creates the container's mounts and becomes its program. Returns only
/// on failure.
pub(crate) fn become_container(container: &Container, node: i32) -> io::Error {
    match prepare(container, Pid::from_raw(node)) {
        Ok(()) => std::process::Command::new(container.program())
            .args(&container.args)
            .env_clear()
            .env("PATH", PATH)
            .envs(&container.env)
            .exec(),
        Err(error) => error,
    }
}

fn prepare(container: &Container, node: Pid) -> io::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    // The node may have ended before the line above.
    if getppid() != node {
        return Err(io::Error::other("the node is gone"));
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    for Mount {
        from,
        to,
        propagation,
    } in &container.mounts
    {
        fs::create_dir_all(from)?;
        if from == to {
            continue;
        }
        fs::create_dir_all(to)?;
        let fail = |error: nix::Error| {
            io::Error::other(format!(
                "bind {} to {}: {error}",
                from.display(),
                to.display()
            ))
        };
        let none = None::<&str>;
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(from), to, none, flags, none).map_err(fail)?;
        if let Some(kind) = propagation.restriction() {
            mount(none, to, none, kind | MsFlags::MS_REC, none).map_err(fail)?;
        }
    }
    restrict_kubelet_root(container)
}

/// Restricts kubelet's directory to the container's own mounts, with their propagation. The rest of
/// the node's disk, programs and libraries, is the same for all containers.
fn restrict_kubelet_root(container: &Container) -> io::Result<()> {
    let root = container.kubelet_root.as_path();
    if !root.exists() {
        return Ok(());
    }
    let fail =
        |error: nix::Error| io::Error::other(format!("restrict {}: {error}", root.display()));
    let none = None::<&str>;
    let below = container
        .mounts
        .iter()
        .filter(|mount| mount.to.starts_with(root));
    let widest = below.map(|mount| mount.propagation).max();
    if let Some(kind) = widest.unwrap_or_default().restriction() {
        mount(none, root, none, kind | MsFlags::MS_REC, none).map_err(fail)?;
    }
    if widest.is_none() {
        mount(Some("none"), root, Some("tmpfs"), MsFlags::MS_RDONLY, none).map_err(fail)?;
    }
    Ok(())
}

/// The containers of one node.
#[derive(Clone, Debug)]
pub(crate) struct Processes {
    logs: PathBuf,
    running: Arc<Mutex<BTreeMap<String, Supervised>>>,
}

#[derive(Debug)]
struct Supervised {
    container: Container,
    changes: Arc<Mutex<Changes>>,
    desired: watch::Sender<Desired>,
    status: watch::Receiver<Status>,
}

/// How the next process of a container differs from its manifest.
#[derive(Debug, Default)]
struct Changes {
    /// Whether no mount of it reaches the node.
    isolated: bool,
    more_args: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Desired {
    Running,
    Stopped,
    /// The supervisor ends when its process has.
    Removed,
}

/// The reason why an operation on a container failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("no container {name:?} on this node; there are {there:?}")]
    Unknown { name: String, there: Vec<String> },
    #[error("container {0:?} has no process to kill")]
    NotRunning(String),
    #[error("container {name:?}: {reason}")]
    System { name: String, reason: String },
}

impl Processes {
    /// Logs go to `<logs>/<container>.log`.
    pub(crate) fn new(logs: PathBuf) -> Self {
        Self {
            logs,
            running: Arc::default(),
        }
    }

    /// Runs a container and keeps it running; one of the same name that differs is replaced.
    pub(crate) async fn apply(&self, container: Container) {
        let same = self
            .lock()
            .get(&container.name)
            .is_some_and(|known| known.container == container);
        if same {
            return;
        }
        self.remove(&container.name).await;
        let name = container.name.clone();
        let (desired, desired_seen) = watch::channel(Desired::Running);
        let first = Status {
            name: name.clone(),
            pid: None,
            restarts: 0,
        };
        let (status_set, status) = watch::channel(first);
        let log = self.log(&name);
        let changes = Arc::default();
        let start = Start {
            container: container.clone(),
            changes: Arc::clone(&changes),
            log,
        };
        tokio::spawn(supervise(start, desired_seen, status_set));
        self.lock().insert(
            name,
            Supervised {
                container,
                changes,
                desired,
                status,
            },
        );
    }

    /// Stops a container for good.
    pub(crate) async fn remove(&self, name: &str) {
        let Some(supervised) = self.lock().remove(name) else {
            return;
        };
        supervised.desired.send_replace(Desired::Removed);
        let mut status = supervised.status;
        // An error means that the supervisor is gone, and the process with it.
        let _ended = status.wait_for(|status| status.pid.is_none()).await;
    }

    /// Sends SIGTERM, and SIGKILL after the grace period; returns when the process is gone. It stays
    /// away until [`Processes::start`].
    pub(crate) async fn stop(&self, name: &str) -> Result<(), Error> {
        self.want(name, Desired::Stopped, |status| status.pid.is_none())
            .await
    }

    /// Starts a stopped container; returns when there is a process.
    pub(crate) async fn start(&self, name: &str) -> Result<(), Error> {
        self.want(name, Desired::Running, |status| status.pid.is_some())
            .await
    }

    /// Sends SIGKILL; returns when the process is gone. It is restarted as after any crash.
    pub(crate) async fn kill(&self, name: &str) -> Result<(), Error> {
        let (_, mut status) = self.find(name)?;
        let pid = status
            .borrow()
            .pid
            .ok_or_else(|| Error::NotRunning(name.to_owned()))?;
        kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(|error| system(name, &error))?;
        status
            .wait_for(|status| status.pid != Some(pid))
            .await
            .map_err(|error| system(name, &error))?;
        Ok(())
    }

    /// Decides whether the mounts of a container's next processes reach the node, as far as its manifest
    /// says so.
    pub(crate) fn isolate(&self, name: &str, isolated: bool) -> Result<(), Error> {
        self.change(name, |changes| changes.isolated = isolated)
    }

    /// Gives a container's next processes these arguments besides those of its manifest.
    pub(crate) fn add_args(&self, name: &str, more_args: Vec<String>) -> Result<(), Error> {
        self.change(name, |changes| changes.more_args = more_args)
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Changes)) -> Result<(), Error> {
        self.find(name)?;
        if let Some(supervised) = self.lock().get(name) {
            change(&mut crate::lock(&supervised.changes));
        }
        Ok(())
    }

    /// Returns the state of every container.
    pub(crate) fn list(&self) -> Vec<Status> {
        self.lock()
            .values()
            .map(|supervised| supervised.status.borrow().clone())
            .collect()
    }

    /// Runs a command in a container. The path of the image's entry point, whatever its directory, is that of
    /// the container's program.
    pub(crate) async fn exec(&self, name: &str, command: &[String]) -> Result<Output, String> {
        let (container, status) = self.find_container(name)?;
        let pid = status.borrow().pid;
        let mut command = command.to_vec();
        if let Some(program) = command.first_mut()
            && Path::new(program).file_name() == container.program().file_name()
        {
            *program = container.program().display().to_string();
        }
        let entry = Entry {
            pid: pid.ok_or_else(|| format!("container {name} does not run"))?,
            env: container.env,
            command,
        };
        let entry = serde_json::to_string(&entry).map_err(|error| error.to_string())?;
        let output = tokio::process::Command::new("/proc/self/exe")
            .args([ENTER, &entry])
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(|error| format!("enter container {name}: {error}"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Output {
            // A signal has no code; the shell's way to tell of it is not known here.
            code: output.status.code().unwrap_or(137),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        })
    }

    fn find_container(&self, name: &str) -> Result<(Container, watch::Receiver<Status>), String> {
        let all = self.lock();
        let found = all
            .get(name)
            .ok_or_else(|| format!("no container {name} runs here"))?;
        Ok((found.container.clone(), found.status.clone()))
    }

    /// Returns the file with a container's output.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    async fn want(
        &self,
        name: &str,
        desired: Desired,
        reached: fn(&Status) -> bool,
    ) -> Result<(), Error> {
        let (set, mut status) = self.find(name)?;
        set.send_replace(desired);
        status
            .wait_for(reached)
            .await
            .map_err(|error| system(name, &error))?;
        Ok(())
    }

    fn find(&self, name: &str) -> Result<(watch::Sender<Desired>, watch::Receiver<Status>), Error> {
        let running = self.lock();
        match running.get(name) {
            Some(supervised) => Ok((supervised.desired.clone(), supervised.status.clone())),
            None => Err(Error::Unknown {
                name: name.to_owned(),
                there: running.keys().cloned().collect(),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Supervised>> {
        crate::lock(&self.running)
    }
}

fn system(name: &str, reason: &dyn std::fmt::Display) -> Error {
    Error::System {
        name: name.to_owned(),
        reason: reason.to_string(),
    }
}

/// All that the start of a container needs.
struct Start {
    container: Container,
    changes: Arc<Mutex<Changes>>,
    log: PathBuf,
}

async fn supervise(
    start: Start,
    mut desired: watch::Receiver<Desired>,
    status: watch::Sender<Status>,
) {
    let name = start.container.name.clone();
    let mut pause = FIRST_PAUSE;
    loop {
        // An error here and below means that the other end is gone: the node ends.
        match desired
            .wait_for(|desired| *desired != Desired::Stopped)
            .await
            .map(|desired| *desired)
        {
            Ok(Desired::Running) => {}
            _ => return,
        }
        let started = tokio::time::Instant::now();
        match spawn(&start) {
            Ok(mut child) => {
                let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
                status.send_modify(|status| status.pid = pid);
                tokio::select! {
                    exit = child.wait() => tracing::info!(container = name, ?exit, "exited"),
                    () = no_longer_desired(&mut desired) => terminate(&mut child, pid).await,
                }
                status.send_modify(|status| status.pid = None);
            }
            Err(error) => tracing::error!(container = name, %error, "does not start"),
        }
        if *desired.borrow() != Desired::Running {
            pause = FIRST_PAUSE;
            continue;
        }
        if started.elapsed() > SETTLED {
            pause = FIRST_PAUSE;
        }
        status.send_modify(|status| status.restarts += 1);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = desired.changed() => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Returns when the container should no longer run, or when the node ends.
async fn no_longer_desired(desired: &mut watch::Receiver<Desired>) {
    let _seen = desired
        .wait_for(|desired| *desired != Desired::Running)
        .await;
}

async fn terminate(child: &mut tokio::process::Child, pid: Option<i32>) {
    if let Some(pid) = pid {
        // It may have exited by itself just now.
        let _gone = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if tokio::time::timeout(GRACE, child.wait()).await.is_err()
        && let Err(error) = child.kill().await
    {
        tracing::error!(%error, "a container outlives SIGKILL");
    }
}

fn spawn(start: &Start) -> io::Result<tokio::process::Child> {
    let container = start.container.changed(&crate::lock(&start.changes));
    let log = &start.log;
    if let Some(dir) = log.parent() {
        fs::create_dir_all(dir)?;
    }
    let output = OpenOptions::new().create(true).append(true).open(log)?;
    tokio::process::Command::new("/proc/self/exe")
        .arg(CONTAINER)
        .arg(serde_json::to_string(&container)?)
        .arg(std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .kill_on_drop(true)
        .spawn()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_mount_of_an_isolated_container_reaches_the_node() {
        let mount = |propagation| Mount {
            from: "/a".into(),
            to: "/b".into(),
            propagation,
        };
        let all = [
            Propagation::None,
            Propagation::HostToContainer,
            Propagation::Bidirectional,
        ];
        let container = Container {
            name: "driver".to_owned(),
            program: "driver".to_owned(),
            args: Vec::new(),
            env: BTreeMap::new(),
            mounts: all.map(mount).into(),
            kubelet_root: "/k".into(),
        };
        let isolated = container.changed(&Changes {
            isolated: true,
            ..Changes::default()
        });
        let propagations: Vec<_> = isolated.mounts.iter().map(|m| m.propagation).collect();
        let expected = [
            Propagation::None,
            Propagation::HostToContainer,
            Propagation::HostToContainer,
        ];
        assert_eq!(propagations, expected);
    }
}
