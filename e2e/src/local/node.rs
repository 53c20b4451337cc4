//! The [`Cluster`] interface over a real API server and the machine that is the node.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use kube::ResourceExt;
use kube::config::Kubeconfig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::daemons::ctr;
use super::layout::{NODE, STATE};
use super::network::{self, Cut};
use super::processes::Processes;
use crate::cluster::{Action, Cluster, Component, Error, HttpAnswer, Result};
use crate::host::mount_points;
use crate::install::wait_rolled_out;
use crate::namespace::Namespace;
use crate::real::{self, LIMIT, running_pod_of};
use crate::tree::{Tree, View};

/// A connection to the cluster. It belongs to the runtime in which it was made.
pub struct Local {
    client: kube::Client,
    kubeconfig: PathBuf,
    kubectl: PathBuf,
    ctr: PathBuf,
    state: PathBuf,
}

impl Local {
    pub(super) async fn connect(
        kubeconfig: &Path,
        kubectl: PathBuf,
        ctr: PathBuf,
        state: PathBuf,
    ) -> Result<Self> {
        let read = Kubeconfig::read_from(kubeconfig)
            .map_err(|error| Error::Start(format!("{}: {error}", kubeconfig.display())))?;
        Ok(Self {
            client: real::client(read).await?,
            kubeconfig: kubeconfig.to_owned(),
            kubectl,
            ctr,
            state,
        })
    }

    /// Makes the cluster as new: deletes what earlier scenarios left, and replaces the pods of driver
    /// and provider.
    ///
    /// # Errors
    /// When something is not gone, or not there, in time.
    pub async fn renew(&self) -> Result<()> {
        real::renew(self).await
    }

    /// Deletes what earlier scenarios left, and keeps the pods of driver and providers.
    ///
    /// # Errors
    /// When something is not gone in time.
    pub async fn tidy(&self) -> Result<()> {
        real::tidy(self).await
    }

    /// Restarts kubelet, whose containers keep running; returns when it has registered the driver.
    ///
    /// # Errors
    /// When it is not back in time.
    pub async fn restart_kubelet(&self) -> Result<()> {
        let state = self.state.clone();
        let restarted =
            tokio::task::spawn_blocking(move || Processes::new(&state).restart("kubelet"));
        restarted.await.map_err(|error| refused(&error))??;
        wait_rolled_out(&self.client, LIMIT).await
    }

    /// A directory that goes with the cluster.
    pub const SCRATCH: &str = STATE;

    /// Returns the process of a component on the node, if it runs.
    ///
    /// # Errors
    /// When the API server does not answer, or the container runtime does not.
    pub async fn process(&self, node: &str, component: &Component) -> Result<Option<i32>> {
        let id = match real::container_of(&self.client, node, component).await {
            Err(Error::Impossible(_)) => return Ok(None),
            id => id?,
        };
        let tasks = ctr(&self.ctr, &self.state, &["tasks", "ls"]);
        Ok(pid_of_task(&tasks.map_err(|error| refused(&error))?, &id))
    }

    /// Keeps pods, and nobody else, from the API server until [`mend_api`](Self::mend_api).
    ///
    /// # Errors
    /// When the rule cannot be made.
    pub fn cut_api(&self, how: Cut) -> Result<()> {
        network::cut_api(how)
    }

    /// Lets pods reach the API server again. Returns the number of packets that were lost.
    ///
    /// # Errors
    /// When the rule cannot be removed.
    pub fn mend_api(&self) -> Result<u64> {
        network::mend_api()
    }

    /// Halts the API server, or lets it go on.
    ///
    /// # Errors
    /// When it does not run.
    pub fn halt_api(&self, halt: bool) -> Result<()> {
        let signal = if halt {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        };
        Processes::new(&self.state).signal("kube-apiserver", signal)
    }

    /// Sends SIGKILL from outside of its namespaces, where process 1 cannot ignore it. Waits until
    /// another container runs.
    async fn kill(&self, node: &str, component: &Component) -> Result<()> {
        let id = real::container_of(&self.client, node, component).await?;
        let pid = self.process(node, component).await?.ok_or_else(|| {
            Error::Impossible(format!("{} does not run on {node}", component.container()))
        })?;
        kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(|error| refused(&error))?;
        real::wait_replaced(&self.client, node, component, &id).await
    }
}

impl Cluster for Local {
    fn name(&self) -> &'static str {
        "local"
    }

    fn client(&self) -> kube::Client {
        self.client.clone()
    }

    fn nodes(&self) -> Vec<String> {
        vec![NODE.to_owned()]
    }

    /// Runs `probe` in the container that has the mount.
    async fn probe(
        &self,
        namespace: &str,
        pod: &str,
        mount_path: &str,
        arguments: &[String],
    ) -> Result<String> {
        let name = format!("pod {namespace}/{pod}");
        let found = Namespace::of(self.client(), namespace).pod(pod).await?;
        let container = found
            .iter()
            .filter_map(|pod| pod.spec.as_ref())
            .flat_map(|spec| &spec.containers)
            .find(|container| {
                let mut mounts = container.volume_mounts.iter().flatten();
                mounts.any(|mount| mount.mount_path == mount_path)
            })
            .ok_or_else(|| Error::Impossible(format!("{name} mounts nothing at {mount_path}")))?;
        let mut command = tokio::process::Command::new(&self.kubectl);
        command
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .arg("--cache-dir")
            .arg(self.state.join("kubectl"))
            .args(["exec", "-n", namespace, pod, "-c", &container.name])
            .args(["--", "/probe"])
            .args(arguments)
            .arg(mount_path)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = command.output().await.map_err(|error| refused(&error))?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            return Err(Error::Impossible(format!("{name}: {}", complaint.trim())));
        }
        String::from_utf8(output.stdout)
            .map_err(|error| Error::Impossible(format!("{name}: probe's output: {error}")))
    }

    /// This machine is the node.
    async fn node_tree(&self, _: &str, path: &Path) -> Result<Option<Tree>> {
        Tree::read_if_there(path, View::Disk).map_err(|error| refused(&error))
    }

    async fn mounts(&self, _: &str, below: &Path) -> Result<Vec<PathBuf>> {
        mount_points(below).map_err(|error| refused(&error))
    }

    /// Stops a process by taking its DaemonSet off the node, as an administrator does: kubelet would
    /// start a single stopped process again.
    async fn act(&self, node: &str, component: &Component, action: Action) -> Result<()> {
        match action {
            Action::Kill => self.kill(node, component).await,
            Action::Stop => real::stop(&self.client, node, component).await,
            Action::Start => real::start(self, node, component).await,
        }
    }

    async fn log(&self, node: &str, component: &Component) -> Result<String> {
        real::log(&self.client, node, component).await
    }

    async fn get(
        &self,
        node: &str,
        component: &Component,
        port: u16,
        path: &str,
    ) -> Result<HttpAnswer> {
        let pod = running_pod_of(&self.client, node, component).await?;
        let address: Option<IpAddr> = pod
            .status
            .as_ref()
            .and_then(|status| status.pod_ip.as_deref()?.parse().ok());
        let address = address
            .ok_or_else(|| Error::Impossible(format!("pod {} has no address", pod.name_any())))?;
        embedded::get(SocketAddr::new(address, port), path)
            .await
            .map_err(|error| refused(&error))
    }

    async fn wait_namespace(&self, namespace: &str) -> Result<()> {
        real::wait_namespace(&self.client, namespace).await
    }
}

/// Returns the process of a container in the output of `ctr tasks ls`.
fn pid_of_task(table: &str, id: &str) -> Option<i32> {
    table.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        (fields.next()? == id).then(|| fields.next()?.parse().ok())?
    })
}

fn refused(reason: &dyn std::fmt::Display) -> Error {
    Error::Node {
        node: NODE.to_owned(),
        reason: reason.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_process_is_found_by_its_whole_id() {
        let table = "TASK    PID     STATUS    \nab12    4711    RUNNING\nab1    12    STOPPED\n";
        assert_eq!(pid_of_task(table, "ab12"), Some(4711));
        assert_eq!(pid_of_task(table, "ab1"), Some(12));
        assert_eq!(pid_of_task(table, ""), None);
    }
}
