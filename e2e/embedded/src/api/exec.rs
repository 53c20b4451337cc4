//! `pods/exec`: commands in containers, over a WebSocket with the subprotocols of kubectl and kube's client.
//!
//! A frame's first byte is its channel: 1 and 2 are what the command prints, 3 is a Status with which it
//! ended (`staging/src/k8s.io/apimachinery/pkg/util/remotecommand` of kubernetes/kubernetes). There is
//! no standard input and no terminal.

use std::{collections::HashMap, pin::Pin, sync::Arc};

use axum::extract::Query;
use bytes::Bytes;
use futures::SinkExt as _;
use http::{HeaderMap, HeaderValue, Request as HttpRequest, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::{body::Incoming, upgrade};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};

use super::{request::RequestInfo, server::Answer, status::Status};

/// The subprotocols, the best one first.
const PROTOCOLS: [&str; 2] = ["v5.channel.k8s.io", "v4.channel.k8s.io"];
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ENDED: u8 = 3;
/// The bytes of a frame.
const PIECE: usize = 32 * 1024;

/// A command that is to run in a container of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exec {
    /// The pod as it is stored.
    pub pod: Value,
    /// The container's name; the first one of the pod if the request names none.
    pub container: String,
    /// The program and its arguments.
    pub command: Vec<String>,
}

/// The output of a command.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Output {
    /// The exit code.
    pub code: i32,
    /// What it printed to standard output.
    pub stdout: String,
    /// What it printed to standard error.
    pub stderr: String,
}

/// The function that runs a command. An error is a sentence that says why the command could not be started.
pub(super) type Runner =
    dyn Fn(Exec) -> Pin<Box<dyn Future<Output = Result<Output, String>> + Send>> + Send + Sync;

/// Returns whether a request is one of these.
pub(super) fn is_exec(info: &RequestInfo) -> bool {
    info.qualified() == "pods" && info.subresource == "exec"
}

/// Reads the command of a request for a pod.
///
/// # Errors
/// Returns 400 when there is none, or no such container.
pub(super) fn command(uri: &Uri, pod: &Value) -> Result<Exec, Status> {
    let Query(query) = Query::<Vec<(String, String)>>::try_from_uri(uri)
        .map_err(|error| Status::bad_request(error.to_string()))?;
    let command: Vec<String> = query
        .iter()
        .filter(|(name, _)| name == "command")
        .map(|(_, value)| value.clone())
        .collect();
    if command.is_empty() {
        return Err(Status::bad_request(
            "you must specify at least 1 command for the container".to_owned(),
        ));
    }
    let query: HashMap<String, String> = query.into_iter().collect();
    let containers = pod["spec"]["containers"].as_array();
    let mut names = containers
        .into_iter()
        .flatten()
        .filter_map(|container| container["name"].as_str());
    let found = match query.get("container") {
        Some(asked) => names.find(|name| name == asked),
        None => names.next(),
    };
    let Some(container) = found else {
        let asked = query.get("container").map_or("", String::as_str);
        return Err(Status::bad_request(format!(
            "container {asked} is not valid for pod {}",
            pod["metadata"]["name"].as_str().unwrap_or_default()
        )));
    };
    Ok(Exec {
        pod: pod.clone(),
        container: container.to_owned(),
        command,
    })
}

/// Answers a request for a WebSocket, over which the command's output is sent once it has ended.
///
/// # Errors
/// Returns 400 when the request is for something else.
pub(super) fn begin(
    request: HttpRequest<Incoming>,
    exec: Exec,
    runner: Option<Arc<Runner>>,
) -> Result<Answer, Status> {
    let (key, protocol) = handshake(request.headers())
        .ok_or_else(|| Status::bad_request("Upgrade request required".to_owned()))?;
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|error| Status::bad_request(error.to_string()))?;
    tokio::spawn(async move {
        let output = match runner {
            Some(runner) => runner(exec).await,
            None => Err("no container runs here".to_owned()),
        };
        match upgrade::on(request).await {
            Ok(stream) => send(TokioIo::new(stream), output).await,
            Err(error) => tracing::debug!(%error, "a WebSocket was not opened"),
        }
    });
    let mut answer = Response::new(Empty::<Bytes>::new().boxed());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    let protocol = HeaderValue::from_static(protocol);
    headers.insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
    Ok(answer)
}

/// Returns the key of a handshake and the subprotocol that both sides know.
fn handshake(headers: &HeaderMap) -> Option<(String, &'static str)> {
    let text = |name| headers.get(name)?.to_str().ok();
    if !text(header::UPGRADE)?.eq_ignore_ascii_case("websocket") {
        return None;
    }
    let offered = text(header::SEC_WEBSOCKET_PROTOCOL)?;
    let is_offered = |known: &&str| offered.split(',').any(|protocol| protocol.trim() == *known);
    let protocol = PROTOCOLS.into_iter().find(is_offered)?;
    Some((text(header::SEC_WEBSOCKET_KEY)?.to_owned(), protocol))
}

async fn send<S>(stream: S, output: Result<Output, String>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut socket = WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
    let status = match &output {
        Err(reason) => json!({
            "status": "Failure", "reason": "InternalError", "message": reason, "code": 500,
        }),
        Ok(Output { code: 0, .. }) => json!({"status": "Success"}),
        Ok(Output { code, .. }) => json!({
            "status": "Failure",
            "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
    };
    let output = output.unwrap_or_default();
    let printed = [(STDOUT, output.stdout), (STDERR, output.stderr)];
    let mut frames: Vec<Vec<u8>> = Vec::new();
    for (channel, text) in printed {
        let pieces = text.as_bytes().chunks(PIECE);
        frames.extend(pieces.map(|piece| [&[channel], piece].concat()));
    }
    let mut status = status;
    status["metadata"] = json!({});
    frames.push([&[ENDED], status.to_string().as_bytes()].concat());
    for frame in frames {
        if let Err(error) = socket.send(Message::Binary(frame.into())).await {
            tracing::debug!(%error, "the reader of a command's output is gone");
            return;
        }
    }
    // The other side may be gone first.
    let _closed = socket.close(None).await;
}
