//! The control socket of a node, both ends: how the test process looks into a node's world and
//! breaks it.
//!
//! HTTP over a Unix socket: a [`Command`] as JSON in a POST, the result as JSON in the answer,
//! or a status of 400 and more with a sentence. By hand:
//! `curl --unix-socket control.sock -d '"containers"' http://node/`.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::Full;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};

use super::namespaces::{BINARIES, KUBELET_ROOT};
use super::processes::{Processes, Status};
use crate::host::{exchange, fetch, mount_points};
use crate::tree::{Tree, View};
use crate::user::User;

/// What can be asked of a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Command {
    /// What stands below a path of the node, by `probe`; null when nothing is there.
    Tree {
        path: PathBuf,
        view: View,
    },
    /// What `probe` prints, run as a container's user with these arguments and the path that the
    /// container has mounted.
    Probe {
        arguments: Vec<String>,
        path: PathBuf,
        user: User,
    },
    /// What every container does.
    Containers,
    /// SIGKILL; the node restarts the container.
    Kill {
        container: String,
    },
    /// SIGTERM; the container stays away.
    Stop {
        container: String,
    },
    Start {
        container: String,
    },
    /// All that a container has printed since the node was made.
    Log {
        container: String,
    },
    /// A GET over the node's loopback.
    Fetch {
        port: u16,
        path: String,
    },
    /// Empties `plugins_registry`, as an administrator or a fresh kubelet might.
    WipePlugins,
    /// Mount points at and below a path.
    Mounts {
        below: PathBuf,
    },
}

/// Why a node did not do as told.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The node itself says no.
    #[error("node: {0}")]
    Refused(String),
    /// There is no node at the socket, or it went away.
    #[error("control socket {}: {reason}", socket.display())]
    Unreachable {
        /// Where the node should listen.
        socket: PathBuf,
        /// What happened.
        reason: String,
    },
}

/// The test's end.
#[derive(Clone, Debug)]
pub(crate) struct Control {
    socket: PathBuf,
}

impl Control {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Sends a command and decodes its result.
    pub(crate) async fn send<T: DeserializeOwned>(&self, command: &Command) -> Result<T, Error> {
        let unreachable = |reason: String| Error::Unreachable {
            socket: self.socket.clone(),
            reason,
        };
        let body = serde_json::to_vec(command).map_err(|error| unreachable(error.to_string()))?;
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| unreachable(error.to_string()))?;
        let request = Request::post("/")
            .header(header::HOST, "node")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| unreachable(error.to_string()))?;
        let (status, body) = exchange(stream, request).await.map_err(unreachable)?;
        if status != StatusCode::OK {
            return Err(Error::Refused(String::from_utf8_lossy(&body).into_owned()));
        }
        serde_json::from_slice(&body).map_err(|error| unreachable(error.to_string()))
    }
}

/// The node's end.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) processes: Processes,
}

impl Server {
    /// Serves until it fails.
    pub(crate) async fn serve(self, socket: &Path) -> io::Result<()> {
        // Left by a node that was killed.
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(socket)?;
        let router = axum::Router::new().fallback(async move |body: Bytes| {
            let answer = match serde_json::from_slice(&body) {
                Ok(command) => self.obey(command).await,
                Err(error) => Err(format!("no command: {error}")),
            };
            match answer.and_then(|value| serde_json::to_string(&value).map_err(|e| e.to_string()))
            {
                Ok(json) => (StatusCode::OK, json),
                Err(reason) => (StatusCode::UNPROCESSABLE_ENTITY, reason),
            }
        });
        axum::serve(listener, router).await
    }

    async fn obey(&self, command: Command) -> Result<serde_json::Value, String> {
        let done = |()| serde_json::Value::Null;
        match command {
            Command::Tree { path, view } => json(&tree(&path, view).await?),
            Command::Probe {
                arguments,
                path,
                user,
            } => json(&probe(&user, &arguments, &path).await?),
            Command::Containers => json::<Vec<Status>>(&self.processes.list()),
            Command::Kill { container } => {
                let killed = self.processes.kill(&container).await;
                killed.map(done).map_err(|error| error.to_string())
            }
            Command::Stop { container } => {
                let stopped = self.processes.stop(&container).await;
                stopped.map(done).map_err(|error| error.to_string())
            }
            Command::Start { container } => {
                let started = self.processes.start(&container).await;
                started.map(done).map_err(|error| error.to_string())
            }
            Command::Log { container } => {
                let path = self.processes.log(&container);
                let log =
                    std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
                json(&String::from_utf8_lossy(&log))
            }
            Command::Fetch { port, path } => {
                json(&fetch((Ipv4Addr::LOCALHOST, port).into(), &path).await?)
            }
            Command::WipePlugins => wipe(&Path::new(KUBELET_ROOT).join("plugins_registry"))
                .map(done)
                .map_err(|error| error.to_string()),
            Command::Mounts { below } => {
                let points = mount_points(&below);
                json(&points.map_err(|error| format!("/proc/self/mountinfo: {error}"))?)
            }
        }
    }
}

fn json<T: Serialize>(value: &T) -> Result<serde_json::Value, String> {
    serde_json::to_value(value).map_err(|error| error.to_string())
}

/// As root, and nothing where nothing is.
async fn tree(path: &Path, view: View) -> Result<Option<Tree>, String> {
    if !path.exists() {
        return Ok(None);
    }
    match probe(&User::default(), &view.arguments(), path).await {
        Ok(json) => serde_json::from_str(&json).map_err(|error| format!("probe's output: {error}")),
        // A volume may go while it is looked at.
        Err(_) if !path.exists() => Ok(None),
        Err(reason) => Err(reason),
    }
}

/// Runs the very binary that looks into volumes on real clusters.
async fn probe(user: &User, arguments: &[String], path: &Path) -> Result<String, String> {
    let output = tokio::process::Command::new(Path::new(BINARIES).join("probe"))
        .args(user.arguments())
        .args(arguments)
        .arg(path)
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| format!("run probe: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    String::from_utf8(output.stdout).map_err(|error| format!("probe's output: {error}"))
}

fn wipe(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        match path.is_dir() {
            true => std::fs::remove_dir_all(path)?,
            false => std::fs::remove_file(path)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_node_says_why_it_does_not_obey() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("control.sock");
        let server = Server {
            processes: Processes::new(dir.path().to_owned()),
        };
        let serving = socket.clone();
        tokio::spawn(async move { server.serve(&serving).await });
        let control = Control::new(socket);
        while !control.socket.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let stop = Command::Stop {
            container: "nobody".into(),
        };
        let error = control.send::<()>(&stop).await.unwrap_err();
        assert!(
            error.to_string().contains("no container \"nobody\""),
            "{error}"
        );
        let statuses: Vec<Status> = control.send(&Command::Containers).await.unwrap();
        assert_eq!(statuses, []);
    }
}
