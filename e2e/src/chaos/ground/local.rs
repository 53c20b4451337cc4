//! Real Kubernetes on this machine under a run. The machine is the node.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use super::super::good::{How, SingleBounds};
use super::super::schedule::{HUNG_FOR_LONG, What};
use super::super::world::Bounds;
use super::{Ground, PROVIDER};
use crate::binaries::{Binaries, logs_dir};
use crate::cluster::{Cluster as _, Component, Error, Result};
use crate::local::{Cut, Local, Options, Running};
use crate::manifest::{add_arguments, change_container, change_object};

/// kubelet waits up to 32 seconds after an attempt at a volume that has failed for half a minute, as the
/// longest fault lasts, and its calls have two minutes. The container runtime starts and ends pods, on
/// cores that all of the cluster shares.
const BOUNDS: Bounds = Bounds {
    converge: Duration::from_secs(120),
    publish: Duration::from_secs(60),
    fetch: Duration::from_secs(60),
    follow: Duration::from_secs(120),
    silence: Duration::from_secs(45),
    gone: Duration::from_secs(180),
    good: None,
    single: SingleBounds {
        quick: Duration::from_secs(10),
        silent: Duration::from_secs(130),
    },
};
/// The directory of the objects in the provider's container.
const OBJECTS: &str = "/chaos";
/// The time in which the driver notices another memory limit.
const MEASURED: Duration = Duration::from_secs(11);
/// The time in which a slow API server answers before it halts again.
const BREATH: Duration = Duration::from_millis(150);

/// Writes the memory limit `$2` of the control group of the process `$1`.
const LIMIT_MEMORY: &str = r#"
set -e
v1=$(sed -n 's/^[0-9]*:memory:/\/sys\/fs\/cgroup\/memory/p' "/proc/$1/cgroup")
v2=$(sed -n 's/^0::/\/sys\/fs\/cgroup/p' "/proc/$1/cgroup")
if [ -n "$v1" ]; then echo "$2" > "$v1/memory.limit_in_bytes"; else echo "$2" > "$v2/memory.max"; fi
"#;

/// A local cluster. Its end is [`OnLocal::end`]; the guard is for runs that break off.
pub(in super::super) struct OnLocal {
    cluster: Local,
    running: Option<Running>,
    /// The directory of `probe`.
    programs: PathBuf,
}

impl OnLocal {
    /// Starts one whose provider reads the objects in a file of a directory.
    ///
    /// # Errors
    /// When it does not start.
    pub(in super::super) async fn start(shared: &Path, flags: &[&str]) -> Result<Self> {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let shared = shared.to_owned();
        let (running, programs) = blocking(move || start(&shared, &flags))
            .await
            .and_then(|started| started)?;
        let cluster = running.connect().await?;
        Ok(Self {
            cluster,
            running: Some(running),
            programs,
        })
    }

    /// Tears it down. Keeps the logs of a run that has found something.
    ///
    /// # Errors
    /// When the logs cannot be kept.
    pub(in super::super) async fn end(mut self, is_good: bool) -> Result<()> {
        let Some(running) = self.running.take() else {
            return Ok(());
        };
        let kept = blocking(move || {
            if is_good {
                return Ok(());
            }
            let dir = logs_dir("chaos");
            println!("logs and objects are in {}", dir.display());
            running.keep_logs(&dir)
        });
        kept.await.and_then(|kept| kept)
    }

    /// Cuts the pods off from the API server for a while; returns the number of lost packets.
    async fn cut(&self, how: Cut, lasts: u64) -> Result<u64> {
        self.cluster.cut_api(how)?;
        tokio::time::sleep(Duration::from_millis(lasts)).await;
        self.cluster.mend_api()
    }

    /// Halts the API server again and again; returns how often.
    async fn slow(&self, lasts: u64, by: u64) -> Result<u64> {
        let begun = Instant::now();
        let mut halts = 0;
        while begun.elapsed() < Duration::from_millis(lasts) {
            self.cluster.halt_api(true)?;
            tokio::time::sleep(Duration::from_millis(by)).await;
            self.cluster.halt_api(false)?;
            halts += 1;
            tokio::time::sleep(BREATH).await;
        }
        Ok(halts)
    }
}

fn start(shared: &Path, flags: &[String]) -> Result<(Running, PathBuf)> {
    let failed = |error: &dyn std::fmt::Display| Error::Start(error.to_string());
    let binaries = Binaries::find(|_| {}).map_err(|error| failed(&error))?;
    let guard = binaries.e2e.with_file_name("local");
    let mut options = Options::standard(|_| {}, guard)?;
    let manifests = &mut options.installation.manifests;
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    super::prepare(manifests, &flags)?;
    add_arguments(
        manifests,
        PROVIDER,
        &[&format!("--objects={OBJECTS}/objects.json")],
    )?;
    change_container(manifests, PROVIDER, |container| {
        // Hostile classes ask it for much. The run is about the driver.
        container["resources"] = json!({"limits": {"cpu": "1", "memory": "512Mi"}});
        let mount = json!({"name": "objects", "mountPath": OBJECTS, "readOnly": true});
        container["volumeMounts"]
            .as_array_mut()
            .into_iter()
            .for_each(|all| all.push(mount.clone()));
    })?;
    change_object(manifests, "DaemonSet", PROVIDER, |set| {
        let volume = json!({"name": "objects", "hostPath": {"path": shared}});
        let volumes = set["spec"]["template"]["spec"]["volumes"].as_array_mut();
        volumes.into_iter().for_each(|all| all.push(volume.clone()));
    })?;
    let programs = binaries
        .probe
        .parent()
        .map(PathBuf::from)
        .unwrap_or_default();
    let running = Running::start(&options, |step| eprintln!("local cluster: {step}"))?;
    Ok((running, programs))
}

/// Runs what blocks, and may have a runtime of its own, in a thread of its own.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let thread = || std::thread::spawn(work).join();
    let joined = tokio::task::spawn_blocking(thread).await;
    let joined = joined.map_err(|error| Error::Start(error.to_string()))?;
    joined.map_err(|_| Error::Start("a thread of the local cluster broke off".to_owned()))
}

impl Ground for OnLocal {
    type Cluster = Local;

    fn cluster(&self) -> &Local {
        &self.cluster
    }

    fn bounds(&self) -> Bounds {
        BOUNDS
    }

    /// kubelet looks after 90 seconds. A look relies on a class that may be as old as the interval.
    fn seldom(&self) -> &'static str {
        "15s"
    }

    /// kubelet's directory is this machine's. What the driver mounts in its container appears there.
    async fn root(&self, _: &str) -> Result<PathBuf> {
        Ok(PathBuf::from("/"))
    }

    fn scratch(&self) -> &'static str {
        Local::SCRATCH
    }

    async fn run(&self, node: &str, command: &[&str]) -> Result<String> {
        let failed = |reason: String| Error::Node {
            node: node.to_owned(),
            reason,
        };
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}:/usr/sbin:/sbin", self.programs.display());
        let (program, arguments) = command
            .split_first()
            .ok_or_else(|| failed("there is no command".to_owned()))?;
        let output = tokio::process::Command::new(program)
            .args(arguments)
            .env("PATH", path)
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(|error| failed(format!("{program}: {error}")))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(failed(String::from_utf8_lossy(&output.stderr).into_owned()))
    }

    async fn driver_process(&self, node: &str) -> Result<Option<i32>> {
        self.cluster.process(node, &Component::Driver).await
    }

    async fn restart_kubelet(&self, _: &str) -> Result<()> {
        self.cluster.restart_kubelet().await
    }

    fn cannot(&self, what: What) -> Option<&'static str> {
        match what {
            What::Reboot { .. } => Some("the node is this machine, which is not rebooted"),
            What::ApiRefuses { .. }
            | What::ApiConflicts { .. }
            | What::ApiPast { .. }
            | What::ApiFailsOnce { .. }
            | What::SecretsRefused { .. } => Some("a real API server answers what is true"),
            What::DiskHung { lasts, .. } if lasts >= HUNG_FOR_LONG => {
                Some("kubelet's own liveness probe takes minutes")
            }
            What::OtherBound { .. } => Some("scenarios upgrade the driver there"),
            What::PropagationLost { .. } => {
                Some("a container starts with the mounts of its manifest")
            }
            What::AnswersCompete { .. } => {
                Some("kubelet's pauses are longer than the bound that a pod has")
            }
            What::Hostile {
                how: super::super::tenants::WEBHOOK,
                ..
            } => Some("a webhook is not set up there"),
            _ => None,
        }
    }

    fn stops_at_once(&self) -> bool {
        false
    }

    /// kubelet looks after 90 seconds.
    fn leaves_deadlines_to_the_driver(&self) -> bool {
        false
    }

    fn has_liveness_probes(&self) -> bool {
        true
    }

    async fn strike_api(&self, what: What) -> Result<u64> {
        match what {
            What::ApiSlow { lasts, by } => self.slow(lasts, by).await,
            What::ApiGone { lasts } => self.cut(Cut::Refused, lasts).await,
            What::ApiHung { lasts } => self.cut(Cut::Silent, lasts).await,
            other => Err(Error::Impossible(format!("{other} is not possible here"))),
        }
    }

    /// Does nothing: see [`cannot`](Self::cannot).
    async fn hang_writes(&self, _: &str, _: u64) {}

    async fn isolate_driver(&self, _: &str, _: bool) -> Result<()> {
        let text = "a container of Kubernetes has the mounts of its manifest".to_owned();
        Err(Error::Impossible(text))
    }

    async fn add_arguments(&self, _: &str, _: &[&str]) -> Result<()> {
        let text = "a container of Kubernetes has the arguments of its manifest".to_owned();
        Err(Error::Impossible(text))
    }

    fn requests(&self) -> Option<(u64, u64)> {
        None
    }

    async fn fail_once(&self, _: usize, _: usize) -> Result<Option<(String, How)>> {
        let text = "no request of a real API server fails at will".to_owned();
        Err(Error::Impossible(text))
    }

    async fn shrink_memory(&self, node: &str, machine: u64) -> Result<u64> {
        let limit = machine << 20;
        let driver = self.driver_process(node).await?;
        let driver = driver.ok_or_else(|| Error::Impossible("no driver runs".to_owned()))?;
        let (driver, text) = (driver.to_string(), limit.to_string());
        self.run(node, &["sh", "-c", LIMIT_MEMORY, "sh", &driver, &text])
            .await?;
        tokio::time::sleep(MEASURED).await;
        Ok(limit)
    }

    /// Another container has another control group.
    async fn restore_memory(&self, node: &str) -> Result<()> {
        self.cluster.driver(node).kill().await
    }
}
