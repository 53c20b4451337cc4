//! The [`Cluster`] interface over a real API server and the machine that is the node.

use std::fs::{self, DirEntry};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, ServiceAccount};
use kube::ResourceExt;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, LogParams, Patch,
    PatchParams,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::daemons::ctr;
use super::layout::{KUBELET_ROOT, NODE};
use super::processes::{Processes, start_time};
use crate::cluster::{
    Ability, Action, Cluster, Component, Error, HttpAnswer, Result, api as api_error,
};
use crate::embedded::api::Disturbance;
use crate::host::{fetch, mount_points};
use crate::install::{DRIVER, NAMESPACE, wait_rolled_out};
use crate::tree::{Tree, View};

const POLL: Duration = Duration::from_millis(50);
const LIMIT: Duration = Duration::from_secs(60);
/// A label that no node has: a DaemonSet that selects it runs nowhere.
const STOPPED: &str = "e2e/stopped";
/// The DaemonSet of the tests' provider.
const PROVIDER: &str = "fake-provider";

/// A way to the cluster. It belongs to the runtime in which it was made.
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
        let failed = |error: &dyn std::fmt::Display| {
            Error::Start(format!("{}: {error}", kubeconfig.display()))
        };
        let read = Kubeconfig::read_from(kubeconfig).map_err(|error| failed(&error))?;
        let config = kube::Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
            .await
            .map_err(|error| failed(&error))?;
        Ok(Self {
            client: kube::Client::try_from(config).map_err(|error| failed(&error))?,
            kubeconfig: kubeconfig.to_owned(),
            kubectl,
            ctr,
            state,
        })
    }

    pub(super) fn kube_client(&self) -> kube::Client {
        self.client.clone()
    }

    /// Makes the cluster as new: what earlier scenarios left is gone, driver and provider run
    /// and have just been started.
    ///
    /// # Errors
    /// What does not go or does not come.
    pub async fn renew(&self) -> Result<()> {
        self.delete_namespaces().await?;
        self.delete_classes_of_default().await?;
        let started = Instant::now();
        let sets = Api::<DaemonSet>::namespaced(self.client(), NAMESPACE);
        let list = sets
            .list(&ListParams::default())
            .await
            .map_err(api_error("list DaemonSets".to_owned()))?;
        for set in list {
            let name = set.name_any();
            if name == DRIVER || name == PROVIDER {
                self.run_daemon_set(&name, true).await?;
            } else {
                sets.delete(&name, &DeleteParams::default())
                    .await
                    .map_err(api_error(format!("delete DaemonSet {name}")))?;
            }
        }
        // By the driver that is still there: the new one counts from nothing.
        self.wait_for_volumes_to_go(started).await?;
        let pods = Api::<Pod>::namespaced(self.client(), NAMESPACE);
        let list_pods = async || {
            pods.list(&ListParams::default())
                .await
                .map_err(api_error(format!("list pods in {NAMESPACE}")))
        };
        let old = list_pods().await?.items;
        for pod in &old {
            let deleted = pods.delete(&pod.name_any(), &DeleteParams::default()).await;
            match deleted {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                other => {
                    other.map_err(api_error(format!("delete pod {}", pod.name_any())))?;
                }
            }
        }
        loop {
            let now = list_pods().await?.items;
            let left = now
                .iter()
                .find(|pod| old.iter().any(|old| old.uid() == pod.uid()));
            let Some(left) = left else { break };
            self.give_up(started, &format!("pod {} to go", left.name_any()))
                .await?;
        }
        wait_rolled_out(&self.client, LIMIT).await
    }

    /// Restarts kubelet, whose containers go on meanwhile. Returns when it is registered anew.
    ///
    /// # Errors
    /// When it does not come back.
    pub async fn restart_kubelet(&self) -> Result<()> {
        let state = self.state.clone();
        let restarted =
            tokio::task::spawn_blocking(move || Processes::new(&state).restart("kubelet"));
        restarted.await.map_err(|error| refused(&error))??;
        wait_rolled_out(&self.client, LIMIT).await
    }

    async fn delete_namespaces(&self) -> Result<()> {
        let namespaces = Api::<Namespace>::all(self.client());
        let list = namespaces
            .list(&ListParams::default())
            .await
            .map_err(api_error("list namespaces".to_owned()))?;
        let now = DeleteParams {
            grace_period_seconds: Some(0),
            ..DeleteParams::default()
        };
        for namespace in list {
            let name = namespace.name_any();
            if !name.starts_with("e2e-") || namespace.metadata.deletion_timestamp.is_some() {
                continue;
            }
            // Sooner than the namespace's own deletion would.
            let pods = Api::<Pod>::namespaced(self.client(), &name);
            pods.delete_collection(&now, &ListParams::default())
                .await
                .map_err(api_error(format!("delete pods in {name}")))?;
            namespaces
                .delete(&name, &DeleteParams::default())
                .await
                .map_err(api_error(format!("delete namespace {name}")))?;
        }
        Ok(())
    }

    async fn delete_classes_of_default(&self) -> Result<()> {
        let kind = GroupVersionKind::gvk("secrets-store.csi.x-k8s.io", "v1", "SecretProviderClass");
        let resource = ApiResource::from_gvk_with_plural(&kind, "secretproviderclasses");
        Api::<DynamicObject>::namespaced_with(self.client(), "default", &resource)
            .delete_collection(&DeleteParams::default(), &ListParams::default())
            .await
            .map(drop)
            .map_err(api_error("delete classes in default".to_owned()))
    }

    /// kubelet is done with a pod later than the API server is. A volume's directory goes after
    /// the driver was called.
    async fn wait_for_volumes_to_go(&self, started: Instant) -> Result<()> {
        let pods = Path::new(KUBELET_ROOT).join("pods");
        loop {
            let Some(left) = csi_volume_in(&pods) else {
                return Ok(());
            };
            self.give_up(started, &format!("volume {} to go", left.display()))
                .await?;
        }
    }

    async fn give_up(&self, started: Instant, what: &str) -> Result<()> {
        if started.elapsed() > LIMIT {
            return Err(Error::Timeout {
                what: what.to_owned(),
                after: LIMIT,
                last: format!("see {}/logs", self.state.display()),
            });
        }
        tokio::time::sleep(POLL).await;
        Ok(())
    }

    /// Lets a DaemonSet run on the node or not, as an administrator stops one.
    async fn run_daemon_set(&self, name: &str, run: bool) -> Result<()> {
        let value = match run {
            true => json!(null),
            false => json!("true"),
        };
        let patch = json!({"spec": {"template": {"spec": {"nodeSelector": {STOPPED: value}}}}});
        Api::<DaemonSet>::namespaced(self.client(), NAMESPACE)
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .map(drop)
            .map_err(api_error(format!("patch DaemonSet {name}")))
    }

    /// The pod of a component that is not on its way out.
    async fn pod_of(&self, node: &str, component: &Component) -> Result<Option<Pod>> {
        if node != NODE {
            return Err(Error::Impossible(format!("there is no node {node}")));
        }
        let pods = Api::<Pod>::namespaced(self.client(), NAMESPACE)
            .list(&ListParams::default())
            .await
            .map_err(api_error(format!("list pods in {NAMESPACE}")))?;
        Ok(pods.items.into_iter().find(|pod| {
            pod.metadata.deletion_timestamp.is_none()
                && pod.spec.iter().any(|spec| {
                    spec.containers
                        .iter()
                        .any(|container| container.name == component.container())
                })
        }))
    }

    async fn running_pod_of(&self, node: &str, component: &Component) -> Result<Pod> {
        let pod = self.pod_of(node, component).await?;
        pod.ok_or_else(|| {
            Error::Impossible(format!("{} does not run on {node}", component.container()))
        })
    }

    /// SIGKILL from outside of its namespaces, where nothing holds it back.
    async fn kill(&self, node: &str, component: &Component) -> Result<()> {
        let pod = self.running_pod_of(node, component).await?;
        let statuses = pod.status.and_then(|status| status.container_statuses);
        let id = statuses
            .unwrap_or_default()
            .into_iter()
            .find(|status| status.name == component.container())
            .and_then(|status| status.container_id)
            .unwrap_or_default();
        let id = id.trim_start_matches("containerd://");
        let tasks =
            ctr(&self.ctr, &self.state, &["tasks", "ls"]).map_err(|error| refused(&error))?;
        let pid = pid_of_task(&tasks, id).ok_or_else(|| {
            Error::Impossible(format!("{} does not run on {node}", component.container()))
        })?;
        let before = start_time(pid.unsigned_abs());
        kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(|error| refused(&error))?;
        let started = Instant::now();
        while start_time(pid.unsigned_abs()) == before && before.is_some() {
            self.give_up(started, &format!("process {pid} to go"))
                .await?;
        }
        Ok(())
    }

    /// The DaemonSet to which a component's pod belongs.
    fn daemon_set_of(component: &Component) -> &str {
        match component {
            Component::Driver => DRIVER,
            Component::Provider(name) => name,
        }
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

    fn can(&self, ability: Ability) -> bool {
        match ability {
            Ability::LookAtNodes | Ability::StopProcesses | Ability::OtherUsers => true,
            Ability::DisturbApi | Ability::Reboot => false,
        }
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
        let found = self.pod(namespace, pod).await?;
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
        match Tree::read(path, View::Disk) {
            Ok(tree) => Ok(Some(tree)),
            Err(_) if !path.exists() => Ok(None),
            Err(error) => Err(refused(&error)),
        }
    }

    async fn mounts(&self, _: &str, below: &Path) -> Result<Vec<PathBuf>> {
        mount_points(below).map_err(|error| refused(&error))
    }

    /// A process is stopped by taking its DaemonSet off the node, as an administrator does it.
    /// kubelet would start a single stopped process again.
    async fn act(&self, node: &str, component: &Component, action: Action) -> Result<()> {
        let set = Self::daemon_set_of(component);
        let started = Instant::now();
        match action {
            Action::Kill => self.kill(node, component).await,
            Action::Stop => {
                let pods = Api::<Pod>::namespaced(self.client(), NAMESPACE);
                let pod = self.running_pod_of(node, component).await?;
                self.run_daemon_set(set, false).await?;
                loop {
                    let now = pods
                        .get_opt(&pod.name_any())
                        .await
                        .map_err(api_error(format!("get pod {}", pod.name_any())))?;
                    if now.is_none_or(|now| now.uid() != pod.uid()) {
                        return Ok(());
                    }
                    self.give_up(started, &format!("{set} to stop")).await?;
                }
            }
            Action::Start => {
                self.run_daemon_set(set, true).await?;
                while self.pod_of(node, component).await?.is_none() {
                    self.give_up(started, &format!("{set} to start")).await?;
                }
                wait_rolled_out(&self.client, LIMIT).await
            }
        }
    }

    /// The log of the container before its last restart, which is all that kubelet keeps, and
    /// that since.
    async fn log(&self, node: &str, component: &Component) -> Result<String> {
        let pod = self.running_pod_of(node, component).await?;
        let name = pod.name_any();
        let statuses = pod.status.and_then(|status| status.container_statuses);
        let restarted = statuses
            .unwrap_or_default()
            .iter()
            .any(|status| status.name == component.container() && status.restart_count > 0);
        let pods = Api::<Pod>::namespaced(self.client(), NAMESPACE);
        let mut text = String::new();
        for previous in [true, false] {
            if previous && !restarted {
                continue;
            }
            let params = LogParams {
                container: Some(component.container().to_owned()),
                previous,
                ..LogParams::default()
            };
            let log = pods.logs(&name, &params).await;
            text += &log.map_err(api_error(format!("logs of pod {name}")))?;
        }
        Ok(text)
    }

    async fn get(
        &self,
        node: &str,
        component: &Component,
        port: u16,
        path: &str,
    ) -> Result<HttpAnswer> {
        let pod = self.running_pod_of(node, component).await?;
        let address: Option<IpAddr> = pod
            .status
            .as_ref()
            .and_then(|status| status.pod_ip.as_deref()?.parse().ok());
        let address = address
            .ok_or_else(|| Error::Impossible(format!("pod {} has no address", pod.name_any())))?;
        fetch(SocketAddr::new(address, port), path)
            .await
            .map_err(|error| refused(&error))
    }

    async fn reboot(&self, _: &str) -> Result<()> {
        Err(Error::Impossible(
            "the node is this machine, which is not rebooted".to_owned(),
        ))
    }

    async fn disturb_api(&self, _: Disturbance) -> Result<()> {
        Err(Error::Impossible(
            "the API server is a real one, which does not misbehave".to_owned(),
        ))
    }

    /// A pod is refused without the account, and waits with a complaint without the authority.
    async fn wait_namespace(&self, namespace: &str) -> Result<()> {
        let accounts = Api::<ServiceAccount>::namespaced(self.client(), namespace);
        let maps = Api::<ConfigMap>::namespaced(self.client(), namespace);
        let started = Instant::now();
        loop {
            let account = accounts
                .get_opt("default")
                .await
                .map_err(api_error(format!("get ServiceAccount in {namespace}")))?;
            let authority = maps
                .get_opt("kube-root-ca.crt")
                .await
                .map_err(api_error(format!("get ConfigMap in {namespace}")))?;
            if account.is_some() && authority.is_some() {
                return Ok(());
            }
            self.give_up(started, &format!("namespace {namespace} to be filled"))
                .await?;
        }
    }
}

/// A CSI volume's directory that is still there, of whatever pod.
fn csi_volume_in(pods: &Path) -> Option<PathBuf> {
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    let volumes = |pod: DirEntry| entries(&pod.path().join("volumes/kubernetes.io~csi"));
    entries(pods)
        .flat_map(volumes)
        .map(|volume| volume.path())
        .next()
}

/// The process of a container out of `ctr tasks ls`.
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
