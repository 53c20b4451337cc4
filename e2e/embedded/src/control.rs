//! The control socket of a node, both ends. The test process inspects and disturbs a node with it.
//!
//! The protocol is HTTP over a Unix socket: a POST carries a [`Command`] as JSON, the answer the
//! result as JSON, or a sentence with a status of 400 and more. By hand:
//! `curl --unix-socket control.sock -d '"containers"' http://node/`.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::Full;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;

use crate::exchange::{exchange, get};
use crate::namespaces::{PATH, PROGRAMS};
use crate::processes::Processes;

/// A request to a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Command {
    /// Runs a program; the result is what it prints, or an error with what it prints to stderr.
    Exec { arguments: Vec<String> },
    /// Runs a program among the mounts of a container, and with its environment; the result is its
    /// exit code and what it prints.
    ExecIn {
        container: String,
        arguments: Vec<String>,
    },
    /// Lists the status of every container.
    Containers,
    /// Sends SIGKILL; the node restarts the container.
    Kill { container: String },
    /// Sends SIGTERM; the container stays away.
    Stop { container: String },
    /// Undoes a stop.
    Start { container: String },
    /// Decides whether the mounts of a container's next processes stay within it.
    Isolate { container: String, isolated: bool },
    /// Gives a container's next processes these arguments besides those of its manifest.
    AddArgs {
        container: String,
        arguments: Vec<String>,
    },
    /// Reads all that a container has printed since the node was made.
    Log { container: String },
    /// Starts the kubelet anew; the containers go on.
    RestartKubelet,
    /// Sends a GET over the node's loopback.
    Get { port: u16, path: String },
}

/// The reason why a node did not carry out a command.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The node refused.
    #[error("node: {0}")]
    Refused(String),
    /// There is no node at the socket, or it went away.
    #[error("control socket {}: {reason}", socket.display())]
    Unreachable {
        /// The path of the socket.
        socket: PathBuf,
        /// The error of the connection.
        reason: String,
    },
}

/// The test's end of the socket.
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

/// The node's end of the socket.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) processes: Processes,
    pub(crate) restart_kubelet: Arc<Notify>,
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
        let processes = &self.processes;
        match command {
            Command::Exec { arguments } => json(&exec(&arguments).await?),
            Command::ExecIn {
                container,
                arguments,
            } => json(&processes.exec(&container, &arguments).await?),
            Command::Containers => json(&processes.list()),
            Command::Kill { container } => done(processes.kill(&container).await),
            Command::Stop { container } => done(processes.stop(&container).await),
            Command::Start { container } => done(processes.start(&container).await),
            Command::Isolate {
                container,
                isolated,
            } => done(processes.isolate(&container, isolated)),
            Command::AddArgs {
                container,
                arguments,
            } => done(processes.add_args(&container, arguments)),
            Command::RestartKubelet => {
                self.restart_kubelet.notify_one();
                Ok(serde_json::Value::Null)
            }
            Command::Log { container } => {
                let path = processes.log(&container);
                let log =
                    std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
                json(&String::from_utf8_lossy(&log))
            }
            Command::Get { port, path } => {
                json(&get((Ipv4Addr::LOCALHOST, port).into(), &path).await?)
            }
        }
    }
}

fn json<T: Serialize>(value: &T) -> Result<serde_json::Value, String> {
    serde_json::to_value(value).map_err(|error| error.to_string())
}

fn done<E: std::fmt::Display>(outcome: Result<(), E>) -> Result<serde_json::Value, String> {
    let done = outcome.map(|()| serde_json::Value::Null);
    done.map_err(|error| error.to_string())
}

async fn exec(arguments: &[String]) -> Result<String, String> {
    let (program, arguments) = arguments.split_first().ok_or("no program")?;
    let output = tokio::process::Command::new(program)
        .args(arguments)
        .env("PATH", format!("{PROGRAMS}:{PATH}"))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| format!("run {program}: {error}"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(match stderr.trim() {
            "" => format!("{program}: {}", output.status),
            reason => reason.to_owned(),
        });
    }
    String::from_utf8(output.stdout).map_err(|error| format!("the output of {program}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::processes::Status;

    #[tokio::test]
    async fn a_node_says_why_it_does_not_obey() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("control.sock");
        let server = Server {
            processes: Processes::new(dir.path().to_owned()),
            restart_kubelet: Arc::default(),
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
