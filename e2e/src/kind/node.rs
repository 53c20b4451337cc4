//! The [`Cluster`] interface over kind: pods through the API server, nodes through Docker.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use http_body_util::BodyExt as _;
use k8s_openapi::api::storage::v1::CSINode;
use kube::ResourceExt;
use kube::api::{Api, Patch, PatchParams};
use kube::config::Kubeconfig;
use serde_json::json;

use super::layout::{Nodes, PROBE, START_LIMIT};
use super::tools::{A_MOMENT, Tools};
use crate::cluster::{
    Action, Cluster, Component, Error, HttpAnswer, Result, api as api_error, poll,
};
use crate::host::mount_points_in;
use crate::install::{NAMESPACE, missing};
use crate::real::{self, LIMIT, running_pod_of};
use crate::tree::Tree;

/// A connection to the cluster. It belongs to the runtime in which it was made.
pub struct Kind {
    tools: Tools,
    nodes: Nodes,
    client: kube::Client,
}

impl Kind {
    pub(super) async fn connect(tools: Tools, nodes: Nodes, kubeconfig: &str) -> Result<Self> {
        let read = Kubeconfig::from_yaml(kubeconfig)
            .map_err(|error| Error::Start(format!("kind's kubeconfig: {error}")))?;
        Ok(Self {
            tools,
            nodes,
            client: real::client(read).await?,
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

    /// Returns the kernel's mount table, as a node's kubelet sees it.
    ///
    /// # Errors
    /// When Docker does not reach the node.
    pub async fn mount_table(&self, node: &str) -> Result<String> {
        self.on(node, &["cat", "/proc/self/mountinfo"]).await
    }

    /// Restarts a node's kubelet; returns when it has registered the driver.
    ///
    /// # Errors
    /// When it is not back in time.
    pub async fn restart_kubelet(&self, node: &str) -> Result<()> {
        self.forget_registration(node).await?;
        self.on(node, &["systemctl", "restart", "kubelet"]).await?;
        self.wait_registered(node).await
    }

    /// Deletes the registration of drivers, so that only a new one counts.
    async fn forget_registration(&self, node: &str) -> Result<()> {
        let none = Patch::Merge(json!({"spec": {"drivers": []}}));
        Api::<CSINode>::all(self.client())
            .patch(node, &PatchParams::default(), &none)
            .await
            .map(drop)
            .map_err(api_error(format!("patch CSINode {node}")))
    }

    /// Waits until everything runs and every kubelet has registered the driver. The API server may be
    /// down together with its node for a while.
    async fn wait_registered(&self, node: &str) -> Result<()> {
        poll(
            &format!("node {node} to be back"),
            START_LIMIT,
            async || {
                Ok(match missing(&self.client).await {
                    Ok(None) => ControlFlow::Break(()),
                    Ok(Some(missing)) => ControlFlow::Continue(format!("missing: {missing}")),
                    Err(error) => ControlFlow::Continue(error.to_string()),
                })
            },
        )
        .await
    }

    /// Removes a file of a node's disk.
    ///
    /// # Errors
    /// When it does not exist.
    pub async fn remove_file(&self, node: &str, path: &Path) -> Result<()> {
        let path = path.to_string_lossy();
        self.on(node, &["rm", &path]).await.map(drop)
    }

    /// Makes a socket on a node's disk that no process listens on.
    ///
    /// # Errors
    /// When the path exists.
    pub async fn leave_dead_socket(&self, node: &str, path: &Path) -> Result<()> {
        let path = path.to_string_lossy();
        self.on(node, &[PROBE, "dead-socket", &path])
            .await
            .map(drop)
    }

    /// Runs a program on a node.
    async fn on(&self, node: &str, args: &[&str]) -> Result<String> {
        let args = ["exec", node].into_iter().chain(args.iter().copied());
        let output = self.tools.docker(args, A_MOMENT).await;
        output.map_err(|reason| node_error(node, reason))
    }

    /// Sends SIGKILL from outside of its namespaces, where process 1 cannot ignore it. Waits until
    /// another container runs.
    async fn kill(&self, node: &str, component: &Component) -> Result<()> {
        let id = real::container_of(&self.client, node, component).await?;
        let kill = [
            "ctr",
            "--namespace",
            "k8s.io",
            "tasks",
            "kill",
            "--signal",
            "SIGKILL",
            &id,
        ];
        self.on(node, &kill).await?;
        real::wait_replaced(&self.client, node, component, &id).await
    }
}

impl Cluster for Kind {
    fn name(&self) -> &'static str {
        "kind"
    }

    fn client(&self) -> kube::Client {
        self.client.clone()
    }

    fn nodes(&self) -> Vec<String> {
        self.nodes.for_pods()
    }

    async fn probe(
        &self,
        namespace: &str,
        pod: &str,
        mount_path: &str,
        arguments: &[String],
    ) -> Result<String> {
        let failed = |reason: &dyn std::fmt::Display| {
            Error::Impossible(format!("probe in pod {namespace}/{pod}: {reason}"))
        };
        let mut args = vec!["-n", namespace, "exec", pod, "--", "/probe"];
        args.extend(arguments.iter().map(String::as_str));
        args.push(mount_path);
        let what = format!("the container of pod {namespace}/{pod} to run");
        poll(&what, LIMIT, async || {
            match self.tools.kubectl(&args).await {
                Ok(printed) => Ok(ControlFlow::Break(printed)),
                // After a reboot the API server still has the pod's status of before.
                Err(reason) if reason.contains("container not found") => {
                    Ok(ControlFlow::Continue(reason))
                }
                Err(reason) => Err(failed(&reason)),
            }
        })
        .await
    }

    async fn node_tree(&self, node: &str, path: &Path) -> Result<Option<Tree>> {
        let path = path.to_string_lossy();
        let args = ["exec", node, PROBE, "tree", &path];
        let json = self
            .tools
            .docker(args, A_MOMENT)
            .await
            .map_err(|reason| node_error(node, reason))?;
        serde_json::from_str(&json).map_err(|error| node_error(node, format!("probe: {error}")))
    }

    async fn mounts(&self, node: &str, below: &Path) -> Result<Vec<PathBuf>> {
        Ok(mount_points_in(&self.mount_table(node).await?, below))
    }

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

    /// Goes over the API server, which reaches every pod: this process may not reach the nodes.
    async fn get(
        &self,
        node: &str,
        component: &Component,
        port: u16,
        path: &str,
    ) -> Result<HttpAnswer> {
        let pod = running_pod_of(&self.client, node, component).await?;
        let proxy = format!(
            "/api/v1/namespaces/{NAMESPACE}/pods/{}:{port}/proxy{path}",
            pod.name_any()
        );
        let what = format!("GET {proxy}");
        let request = http::Request::get(proxy)
            .body(kube::client::Body::empty())
            .map_err(|error| Error::Impossible(format!("{what}: {error}")))?;
        let answer = self.client.send(request).await;
        let answer = answer.map_err(api_error(what.clone()))?;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await;
        let body = body.map_err(api_error(what))?.to_bytes();
        Ok(HttpAnswer {
            status,
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    }

    async fn reboot(&self, node: &str) -> Result<()> {
        self.forget_registration(node).await?;
        self.tools
            .docker(["restart", "--time", "0", node], A_MOMENT)
            .await
            .map_err(|reason| node_error(node, reason))?;
        self.wait_registered(node).await?;
        // The provider's socket is in memory, and gone with the node. A stopped provider has no pod.
        let provider = Component::Provider("fake-provider".to_owned());
        match real::pod_of(&self.client, node, &provider).await? {
            Some(_) => real::wait_serving(self, node, &provider, START_LIMIT).await,
            None => Ok(()),
        }
    }

    async fn wait_namespace(&self, namespace: &str) -> Result<()> {
        real::wait_namespace(&self.client, namespace).await
    }
}

fn node_error(node: &str, reason: String) -> Error {
    Error::Node {
        node: node.to_owned(),
        reason,
    }
}
