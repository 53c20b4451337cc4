//! Finds the driver in a cluster, whatever it was called and wherever it was installed, and asks a driver's pod
//! what is on its node.

use std::{path::PathBuf, time::Duration};

use driver::status::Status;
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Container, ContainerStateTerminated, ContainerStatus, Pod, PodSpec},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{AttachParams, ListParams},
};
use tokio::{io::AsyncReadExt as _, time::timeout};

use crate::{
    cluster::{Listed, Read, list},
    text::one_line,
};

/// The name of the driver, as in `spec.volumes[].csi.driver`.
pub const DRIVER: &str = "secrets-store.csi.k8s.io";

/// The next thing to do for someone who may not look at the driver; the finding follows.
pub(crate) const TELL: &str = "give this to those who run the driver";

/// The program of the images of this driver and of the existing one.
const PROGRAM: &str = "/secrets-store-csi";

/// Namespaces where the driver usually is, for someone who may not list the DaemonSets of all of them.
const USUAL_NAMESPACES: [&str; 5] = [
    "kube-system",
    "csi-secrets-store",
    "secrets-store-csi-driver",
    "secrets-store",
    "openshift-cluster-csi-drivers",
];

/// The time that a command in a container may take, and the largest answer.
const COMMAND: Duration = Duration::from_secs(15);
const MAX_ANSWER: u64 = 32 * 1024 * 1024;
/// The number of DaemonSets that are looked at.
const MAX_SETS: usize = 5_000;

/// A DaemonSet of the driver.
#[derive(Debug, Clone)]
pub struct Installed {
    /// The DaemonSet.
    pub set: DaemonSet,
    /// The name of the driver's container in it.
    pub container: String,
}

impl Installed {
    fn of(set: DaemonSet) -> Option<Self> {
        let container = driver_container(set.spec.template.spec.as_ref()?)?
            .name
            .clone();
        Some(Self { set, container })
    }

    /// Returns the namespace.
    pub fn namespace(&self) -> String {
        self.set.namespace().unwrap_or_default()
    }

    /// Returns the labels of its pods, as kubectl's `-l` takes them.
    pub fn selector(&self) -> String {
        let labels = self.set.spec.selector.match_labels.iter().flatten();
        let labels: Vec<_> = labels
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        labels.join(",")
    }

    /// Returns the service account of its pods.
    pub fn service_account(&self) -> String {
        let spec = self.set.spec.template.spec.as_ref();
        let account = spec.and_then(|spec| spec.service_account_name.clone());
        account.unwrap_or_else(|| "default".to_owned())
    }

    /// Returns the directories of the node that its pods have at these paths.
    pub fn host_paths(&self, paths: &[PathBuf]) -> Vec<String> {
        let Some(spec) = self.set.spec.template.spec.as_ref() else {
            return Vec::new();
        };
        let mut containers = spec.containers.iter();
        let container = containers.find(|container| container.name == self.container);
        let mounts = container
            .into_iter()
            .flat_map(|c| c.volume_mounts.iter().flatten());
        let mounts = mounts.filter(|mount| {
            paths
                .iter()
                .any(|path| path.as_os_str() == mount.mount_path.as_str())
        });
        let found = mounts.filter_map(|mount| {
            let mut volumes = spec.volumes.iter().flatten();
            let volume = volumes.find(|volume| volume.name == mount.name)?;
            Some(volume.host_path.as_ref()?.path.clone())
        });
        found.collect()
    }

    /// Reads its pod on a node.
    pub async fn pod_on(&self, client: &Client, node: &str) -> Read<Option<Pod>> {
        let api: Api<Pod> = Api::namespaced(client.clone(), &self.namespace());
        let params = ListParams::default()
            .labels(&self.selector())
            .fields(&format!("spec.nodeName={node}"));
        let pods = list(&api, params, 10).await;
        // While one pod replaces another, both are there.
        pods.map(|pods| {
            let lives = |pod: &Pod| pod.metadata.deletion_timestamp.is_none();
            let (living, ending): (Vec<_>, Vec<_>) = pods.items.into_iter().partition(lives);
            living.into_iter().chain(ending).next()
        })
    }
}

/// Returns the driver's container of a pod, if it is one of this driver or of the existing one. The name
/// `secrets-store` is what tools of both rely on; the arguments are those that no sidecar has.
fn driver_container(pod: &PodSpec) -> Option<&Container> {
    let has = |container: &&Container, flags: &[&str]| {
        let args = container.args.iter().flatten();
        let mut args = args.chain(container.command.iter().flatten());
        args.any(|arg| {
            flags
                .iter()
                .any(|flag| arg.trim_start_matches('-').starts_with(flag))
        })
    };
    let is_linux = pod
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| key != "kubernetes.io/os" || value == "linux");
    let mut containers = pod.containers.iter();
    containers
        .find(|container| {
            has(container, &["endpoint="])
                && (container.name == "secrets-store"
                    || has(container, &["provider-volume=", "rotation-poll-interval="]))
        })
        .filter(|_| is_linux)
}

/// Finds the DaemonSets of the driver. `only` names their namespace, if the person knows it.
pub async fn find(client: &Client, only: Option<&str>) -> Read<Vec<Installed>> {
    let ours = |sets: Listed<DaemonSet>| sets.items.into_iter().filter_map(Installed::of);
    let in_namespace = async |namespace: &str| {
        let api: Api<DaemonSet> = Api::namespaced(client.clone(), namespace);
        list(&api, ListParams::default(), MAX_SETS).await
    };
    if let Some(namespace) = only {
        let sets = in_namespace(namespace).await;
        return sets.map(|sets| ours(sets).collect());
    }
    let everywhere: Api<DaemonSet> = Api::all(client.clone());
    let why = match list(&everywhere, ListParams::default(), MAX_SETS).await {
        Read::Is(sets) => return Read::Is(ours(sets).collect()),
        Read::Unknown(why) => why,
        other => return other.map(|_| Vec::new()),
    };
    let mut found = Vec::new();
    for namespace in USUAL_NAMESPACES {
        if let Read::Is(sets) = in_namespace(namespace).await {
            found.extend(ours(sets));
        }
    }
    match found.is_empty() {
        true => Read::Unknown(why),
        false => Read::Is(found),
    }
}

/// What a driver's pod says of its node.
#[derive(Debug, Clone)]
pub enum NodeSays {
    /// All of it.
    Status(Box<Status>),
    /// It is the existing driver, which has no such command.
    ExistingDriver,
    /// It could not be asked: why.
    Unknown(String),
}

/// Asks the driver of a pod what is on its node.
pub async fn ask(client: &Client, pod: &Pod, container: &str) -> NodeSays {
    // The existing driver takes any word for nothing and starts once more. A flag that it does not have ends it.
    let is_this = [PROGRAM, "--version", "--state-dir=/nowhere"];
    match run(client, pod, container, &is_this).await {
        Ok(ended) if ended.code == 0 => {}
        Ok(ended) if ended.stderr.contains("flag provided but not defined") => {
            return NodeSays::ExistingDriver;
        }
        Ok(ended) => return NodeSays::Unknown(ended.trouble()),
        Err(why) => return NodeSays::Unknown(why),
    }
    match run(client, pod, container, &[PROGRAM, "status", "--json"]).await {
        Ok(ended) if ended.code == 0 => match serde_json::from_str(&ended.stdout) {
            Ok(status) => NodeSays::Status(Box::new(status)),
            Err(error) => NodeSays::Unknown(format!(
                "its answer cannot be read ({error}); the plugin and the driver may be of different versions"
            )),
        },
        Ok(ended) => NodeSays::Unknown(ended.trouble()),
        Err(why) => NodeSays::Unknown(why),
    }
}

/// What a command printed.
#[derive(Debug, Default)]
struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
    /// Why it did not run, by the API server or the node.
    message: String,
}

impl Ended {
    fn trouble(&self) -> String {
        let text = match self.stderr.trim() {
            "" => &self.message,
            stderr => stderr,
        };
        one_line(text, 200)
    }
}

async fn run(
    client: &Client,
    pod: &Pod,
    container: &str,
    command: &[&str],
) -> Result<Ended, String> {
    let too_long = |_| format!("no answer within {} seconds", COMMAND.as_secs());
    let done = timeout(COMMAND, run_now(client, pod, container, command)).await;
    done.map_err(too_long)?
}

async fn run_now(
    client: &Client,
    pod: &Pod,
    container: &str,
    command: &[&str],
) -> Result<Ended, String> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let params = AttachParams::default()
        .container(container)
        .stdin(false)
        .stdout(true)
        .stderr(true);
    let mut process = match api
        .exec(&pod.name_any(), command.iter().copied(), &params)
        .await
    {
        Ok(process) => process,
        Err(kube::Error::Api(status)) if status.code == 403 => {
            return Err("you may not run commands in its pod (create pods/exec)".to_owned());
        }
        Err(error) => return Err(one_line(&error.to_string(), 200)),
    };
    let status = process.take_status();
    let (stdout, stderr) = (process.stdout(), process.stderr());
    let read = async |stream: Option<_>| {
        let mut text = String::new();
        if let Some(stream) = stream {
            let read = tokio::io::AsyncReadExt::take(stream, MAX_ANSWER);
            tokio::pin!(read);
            read.read_to_string(&mut text).await?;
        }
        std::io::Result::Ok(text)
    };
    let (stdout, stderr) = tokio::join!(read(stdout), read(stderr));
    let broken = |error: std::io::Error| format!("its answer broke off: {error}");
    let mut ended = Ended {
        stdout: stdout.map_err(broken)?,
        stderr: stderr.map_err(broken)?,
        ..Ended::default()
    };
    let status = match status {
        Some(status) => status.await,
        None => None,
    };
    let Some(status) = status else {
        return Err("the connection ended before the command".to_owned());
    };
    if status.status.as_deref() != Some("Success") {
        let causes = status
            .details
            .iter()
            .flat_map(|details| details.causes.iter().flatten());
        let code = causes
            .filter(|cause| cause.reason.as_deref() == Some("ExitCode"))
            .find_map(|cause| cause.message.as_deref()?.parse().ok());
        ended.code = code.unwrap_or(-1);
        ended.message = status.message.unwrap_or_default();
    }
    Ok(ended)
}

/// Returns the last end of a container of the driver that crashes: it failed in the last minutes, and not only because
/// somebody or the node ended it once.
pub(crate) fn crash(status: &ContainerStatus, now: Timestamp) -> Option<&ContainerStateTerminated> {
    const LATELY: i64 = 600;
    /// What the exit code of a container is at least that a signal ended.
    const SIGNAL: i32 = 128;
    let mut states = status.state.iter().chain(&status.last_state);
    let ended = states.find_map(|state| state.terminated.as_ref())?;
    let time = ended.finished_at.as_ref();
    let is_of_now = time.is_none_or(|time| now.duration_since(time.0).as_secs() <= LATELY);
    let is_own = ended.exit_code < SIGNAL || ended.reason.as_deref() == Some("OOMKilled");
    let is_crash = is_own || status.restart_count >= 2;
    (ended.exit_code != 0 && is_of_now && is_crash).then_some(ended)
}

/// Returns whether a pod is ready.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten());
    conditions
        .into_iter()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}
