//! The two programs that a kind cluster needs.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::layout::NAME;
use crate::cluster::{Error, Result};

/// Names the kind executable; without it, the one on the path is used.
pub const KIND_VARIABLE: &str = "KIND";

/// The Docker network of the test clusters, and its bridge on the machine.
pub(super) const NETWORK: &str = "kind-e2e";
/// The limit of all commands but making a cluster.
pub(super) const A_MOMENT: Duration = Duration::from_secs(120);

/// Docker and kind.
#[derive(Clone, Debug)]
pub(super) struct Tools {
    docker: PathBuf,
    kind: PathBuf,
}

impl Tools {
    /// Finds both programs, and checks that a Docker engine answers.
    ///
    /// # Errors
    /// Names what is missing, and how to get it.
    pub(super) async fn find() -> Result<Self> {
        let docker = on_path("docker").ok_or_else(|| {
            missing(
                "docker",
                "install Docker Engine (Debian and Ubuntu: apt install docker.io), or Docker \
                 Desktop, https://docs.docker.com/engine/install",
            )
        })?;
        let kind = match std::env::var_os(KIND_VARIABLE) {
            Some(path) => PathBuf::from(path),
            None => on_path("kind").ok_or_else(|| {
                missing(
                    "kind",
                    "go install sigs.k8s.io/kind@latest, brew install kind, apt install kind \
                     (Debian 14 and later), or https://kind.sigs.k8s.io; $KIND names one that is \
                     not on the path",
                )
            })?,
        };
        let tools = Self { docker, kind };
        let engine = ["version", "--format", "{{.Server.Version}}"];
        tools.docker(engine, A_MOMENT).await.map_err(|reason| {
            Error::Start(format!(
                "no Docker engine answers: start it (systemctl start docker, or dockerd as root), \
                 and be in group docker; {reason}"
            ))
        })?;
        Ok(tools)
    }

    /// Runs docker; returns its output, or a sentence with what it wrote to standard error.
    pub(super) async fn docker<A: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = A>,
        limit: Duration,
    ) -> std::result::Result<String, String> {
        let mut command = Command::new(&self.docker);
        command.args(args);
        run(command, limit).await
    }

    /// Runs kind in the network of the test clusters.
    pub(super) async fn kind<A: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = A>,
        limit: Duration,
    ) -> std::result::Result<String, String> {
        let mut command = Command::new(&self.kind);
        command
            .args(args)
            .env("KIND_EXPERIMENTAL_PROVIDER", "docker")
            .env("KIND_EXPERIMENTAL_DOCKER_NETWORK", NETWORK);
        run(command, limit).await
    }

    /// Runs kubectl as an administrator on the first node, which has it and the credentials.
    pub(super) async fn kubectl(&self, args: &[&str]) -> std::result::Result<String, String> {
        let node = format!("{NAME}-control-plane");
        let kubectl = ["kubectl", "--kubeconfig=/etc/kubernetes/admin.conf"];
        let kubectl = ["exec", node.as_str()].into_iter().chain(kubectl);
        self.docker(kubectl.chain(args.iter().copied()), A_MOMENT)
            .await
    }
}

fn missing(program: &str, how: &str) -> Error {
    Error::Start(format!("there is no {program} on the path: {how}"))
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

async fn run(mut command: Command, limit: Duration) -> std::result::Result<String, String> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let shown = format!("{:?}", command.as_std());
    let output = tokio::time::timeout(limit, command.output())
        .await
        .map_err(|_| format!("{shown} took longer than {limit:?}"))?
        .map_err(|error| format!("{shown}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!(
        "{shown}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}
