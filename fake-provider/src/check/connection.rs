//! Checks of connections and calls: authority, concurrency, deadlines, cancellation, and `Version`.

use std::time::Duration;

use http::uri::PathAndQuery;
use proto::provider::MountResponse;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use super::subject::{LARGEST_ANSWER, error_code};
use super::{Check, FIRST_CALL, Finding, Subject, failed};
use crate::server::INTERFACE;

/// The number of calls that the driver has in flight to a provider at most, by default.
const CALLS: usize = 16;

const NAMING: &str = "https://github.com/grpc/grpc/blob/master/doc/naming.md";
const HTTP2: &str = "https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md";
const STATUS_CODES: &str = "https://grpc.github.io/grpc/core/md_doc_statuscodes.html";
const CANCELLATION: &str = "https://grpc.io/docs/guides/cancellation/";
const DEADLINES: &str = "https://grpc.io/docs/guides/deadlines/";
const UNKNOWN_FIELDS: &str = "https://protobuf.dev/programming-guides/proto3/#unknowns";
const SERVICE: &str = "https://github.com/kubernetes-sigs/secrets-store-csi-driver/blob/main/provider/v1alpha1/service.proto";

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: FIRST_CALL,
        rule: "Version answers a caller with :authority localhost within 5 seconds.",
        source: NAMING,
        run: |s| Box::pin(async { s.version().await.map(drop) }),
    },
    Check {
        name: "version-interface",
        rule: "Version answers with the interface version v1alpha1.",
        source: SERVICE,
        run: |s| Box::pin(version_interface(s)),
    },
    Check {
        name: "version-names",
        rule: "Version answers with the provider's name and its own version.",
        source: SERVICE,
        run: |s| Box::pin(version_names(s)),
    },
    Check {
        name: "unknown-method",
        rule: "A method that the provider does not have fails with UNIMPLEMENTED.",
        source: STATUS_CODES,
        run: |s| Box::pin(unknown_method(s)),
    },
    Check {
        name: "connections-in-turn",
        rule: "Each call may come on a new connection.",
        source: HTTP2,
        run: |s| Box::pin(connections_in_turn(s)),
    },
    Check {
        name: "idle-connections",
        rule: "Connections on which nothing arrives do not block others.",
        source: HTTP2,
        run: |s| Box::pin(idle_connections(s)),
    },
    Check {
        name: "garbage-connection",
        rule: "Bytes that are not HTTP/2 end their own connection only.",
        source: HTTP2,
        run: |s| Box::pin(garbage_connection(s)),
    },
    Check {
        name: "unknown-fields",
        rule: "Fields that the provider does not know are ignored.",
        source: UNKNOWN_FIELDS,
        run: |s| Box::pin(unknown_fields(s)),
    },
    Check {
        name: "calls-at-once",
        rule: "Sixteen Mounts on connections of their own succeed at the same time.",
        source: HTTP2,
        run: |s| Box::pin(calls_at_once(s, Sharing::None)),
    },
    Check {
        name: "calls-on-one-connection",
        rule: "Sixteen Mounts on one connection succeed at the same time.",
        source: HTTP2,
        run: |s| Box::pin(calls_at_once(s, Sharing::OneConnection)),
    },
    Check {
        name: "expired-deadline",
        rule: "A Mount whose deadline passes does not harm later ones.",
        source: DEADLINES,
        run: |s| Box::pin(expired_deadline(s)),
    },
    Check {
        name: "cancelled-calls",
        rule: "Mounts whose callers give up do not harm later ones.",
        source: CANCELLATION,
        run: |s| Box::pin(cancelled_calls(s)),
    },
];

async fn version_interface(subject: &Subject) -> Result<(), Finding> {
    match subject.version().await?.version.as_str() {
        INTERFACE => Ok(()),
        other => Err(failed(format!("it answers {other:?}"))),
    }
}

async fn version_names(subject: &Subject) -> Result<(), Finding> {
    let version = subject.version().await?;
    if version.runtime_name.is_empty() || version.runtime_version.is_empty() {
        return Err(failed("runtime_name or runtime_version is empty"));
    }
    Ok(())
}

/// A Mount request with a field that is not in the interface.
#[derive(Clone, PartialEq, prost::Message)]
struct Extended {
    #[prost(string, tag = "1")]
    attributes: String,
    #[prost(string, tag = "2")]
    secrets: String,
    #[prost(string, tag = "3")]
    target_path: String,
    #[prost(string, tag = "4")]
    permission: String,
    #[prost(string, tag = "1000")]
    unknown: String,
}

async fn unknown_method(subject: &Subject) -> Result<(), Finding> {
    let path = PathAndQuery::from_static("/v1alpha1.CSIDriverProvider/Unknown");
    match call(subject, path, Extended::default()).await? {
        Err(status) if status.code() == Code::Unimplemented => Ok(()),
        Err(status) => Err(failed(format!("it fails with {}", subject.told(&status)))),
        Ok(_) => Err(failed("it succeeds")),
    }
}

async fn unknown_fields(subject: &Subject) -> Result<(), Finding> {
    subject.first().await?;
    let target = subject.target()?;
    let request = subject.request();
    let request = Extended {
        attributes: request.attributes,
        secrets: request.secrets,
        target_path: target.path(),
        permission: request.permission,
        unknown: "unknown".to_owned(),
    };
    let path = PathAndQuery::from_static("/v1alpha1.CSIDriverProvider/Mount");
    match call(subject, path, request).await? {
        Ok(answer) => match error_code(&answer) {
            None => Ok(()),
            Some(code) => Err(failed(format!("Mount failed: error code {code:?}"))),
        },
        Err(status) => Err(failed(format!("Mount failed: {}", subject.told(&status)))),
    }
}

/// Calls a method with a message that is not of the interface.
async fn call(
    subject: &Subject,
    path: PathAndQuery,
    message: Extended,
) -> Result<Result<MountResponse, Status>, Finding> {
    let mut client =
        tonic::client::Grpc::new(subject.channel()?).max_decoding_message_size(LARGEST_ANSWER);
    let calling = async {
        let ready = client.ready().await;
        ready.map_err(|error| Status::unavailable(format!("cannot connect: {error}")))?;
        let codec = ProstCodec::<Extended, MountResponse>::default();
        client.unary(subject.timed(message), path, codec).await
    };
    match timeout(subject.settings.timeout, calling).await {
        Ok(answer) => Ok(answer.map(tonic::Response::into_inner)),
        Err(_) => Err(failed("no answer in time")),
    }
}

async fn connections_in_turn(subject: &Subject) -> Result<(), Finding> {
    for _ in 0..CALLS {
        subject.version().await?;
    }
    Ok(())
}

async fn connect(subject: &Subject) -> Result<UnixStream, Finding> {
    let connecting = UnixStream::connect(&subject.settings.socket).await;
    connecting.map_err(|error| failed(format!("cannot connect: {error}")))
}

async fn idle_connections(subject: &Subject) -> Result<(), Finding> {
    let mut open = Vec::new();
    for _ in 0..CALLS {
        open.push(connect(subject).await?);
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    subject.answers_after("opening 16 connections").await
}

async fn garbage_connection(subject: &Subject) -> Result<(), Finding> {
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096]] {
        let mut stream = connect(subject).await?;
        // It fails if the provider has closed the connection already, which is right.
        let _ = stream.write_all(garbage).await;
        let _ = stream.shutdown().await;
    }
    subject.answers_after("bytes that are not HTTP/2").await
}

/// The way in which concurrent calls use connections.
#[derive(Clone, Copy)]
enum Sharing {
    None,
    OneConnection,
}

async fn calls_at_once(subject: &Subject, sharing: Sharing) -> Result<(), Finding> {
    let expected = subject.first().await?.paths();
    let shared = subject.client()?;
    let calls = (0..CALLS).map(|_| async {
        match sharing {
            Sharing::None => subject.mount(subject.request()).await,
            Sharing::OneConnection => subject.mount_on(shared.clone(), subject.request()).await,
        }
    });
    for answer in futures::future::join_all(calls).await {
        let answer =
            answer.map_err(|status| failed(format!("one failed: {}", subject.told(&status))))?;
        if answer.paths() != expected {
            return Err(failed("one has other files than a Mount alone"));
        }
    }
    Ok(())
}

async fn expired_deadline(subject: &Subject) -> Result<(), Finding> {
    subject.first().await?;
    let target = subject.target()?;
    // With the first deadline, the request may not arrive.
    for milliseconds in [1, 5, 25] {
        let mut message = subject.request();
        message.target_path = target.path();
        let mut request = Request::new(message);
        request.set_timeout(Duration::from_millis(milliseconds));
        let limit = subject.settings.timeout;
        // It may answer in time, which is right as well.
        let _ = timeout(limit, subject.client()?.mount(request)).await;
    }
    recovers(subject).await
}

async fn cancelled_calls(subject: &Subject) -> Result<(), Finding> {
    subject.first().await?;
    let target = subject.target()?;
    let mut calls = JoinSet::new();
    // Each is given up at another moment: some before they arrive, some before the answer.
    for milliseconds in 1..=32 {
        let mut client = subject.client()?;
        let mut request = subject.request();
        request.target_path = target.path();
        let request = subject.timed(request);
        let limit = Duration::from_millis(milliseconds);
        calls.spawn(async move { timeout(limit, client.mount(request)).await.map(drop) });
    }
    calls.join_all().await;
    recovers(subject).await
}

/// Checks that a Mount succeeds soon: calls that nobody waits for may take a moment to end.
async fn recovers(subject: &Subject) -> Result<(), Finding> {
    const PAUSE: Duration = Duration::from_millis(100);
    // The provider may not have noticed yet that nobody waits.
    tokio::time::sleep(PAUSE).await;
    for _ in 0..10 {
        if subject.succeeds(subject.request()).await.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
    }
    subject.succeeds(subject.request()).await.map(drop)
}
