//! The cluster under a run: what a [`Cluster`] has not, and a run disturbs or looks at.

use std::path::PathBuf;

use embedded::api::ApiServer;

use crate::cluster::{Cluster, Component, Error, Result};
use crate::embedded::Embedded;

/// A cluster whose nodes can be disturbed and looked into from this process.
pub(super) trait Ground: Cluster {
    /// Returns the directory through which this process sees a node's files and mounts, until the
    /// node's next reboot.
    async fn root(&self, node: &str) -> Result<PathBuf>;

    /// Runs a program on a node, as root, and returns what it prints.
    async fn run(&self, node: &str, command: &[&str]) -> Result<String>;

    /// Returns the driver's process on a node, if it runs.
    async fn driver_process(&self, node: &str) -> Result<Option<i32>>;

    /// Starts a node's kubelet anew.
    async fn restart_kubelet(&self, node: &str) -> Result<()>;

    /// Returns the API server, if it can be made to misbehave.
    fn api_server(&self) -> Option<&ApiServer>;
}

impl Ground for Embedded {
    async fn root(&self, node: &str) -> Result<PathBuf> {
        let process = self.process(node).await?;
        Ok(PathBuf::from(format!("/proc/{process}/root")))
    }

    async fn run(&self, node: &str, command: &[&str]) -> Result<String> {
        self.exec(node, command).await
    }

    async fn driver_process(&self, node: &str) -> Result<Option<i32>> {
        let containers = self.containers(node).await?;
        let name = Component::Driver.container();
        let driver = containers.into_iter().find(|found| found.name == name);
        let driver =
            driver.ok_or_else(|| Error::Impossible(format!("node {node} has no driver")))?;
        Ok(driver.pid)
    }

    async fn restart_kubelet(&self, node: &str) -> Result<()> {
        Embedded::restart_kubelet(self, node).await
    }

    fn api_server(&self) -> Option<&ApiServer> {
        Some(self.api())
    }
}
