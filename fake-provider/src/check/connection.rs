//! Checks of connections and calls: authority, concurrency, deadlines, cancellation, and `Version`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::join_all;
use http::uri::PathAndQuery;
use proto::provider::MountResponse;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use super::subject::{Answer, LARGEST_ANSWER, error_code};
use super::{Check, FIRST_CALL, Finding, Subject, failed, needs};
use crate::server::INTERFACE;

/// The number of calls that the driver has in flight to a provider at most, by default.
const CALLS: usize = 16;

/// The time for which `Version` is called beside Mounts.
const VERSIONS: Duration = Duration::from_secs(5);

const NAMING: &str = "https://github.com/grpc/grpc/blob/master/doc/naming.md";
const HTTP2: &str = "https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md";
const STATUS_CODES: &str = "https://grpc.github.io/grpc/core/md_doc_statuscodes.html";
const CANCELLATION: &str = "https://grpc.io/docs/guides/cancellation/";
const DEADLINES: &str = "https://grpc.io/docs/guides/deadlines/";
const HEALTH: &str = "https://github.com/kubernetes-sigs/secrets-store-csi-driver/blob/main/pkg/secrets-store/provider_client.go";
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
        name: "calls-of-two-classes",
        rule: "Mounts of different classes at the same time have the answers of their own classes.",
        source: HTTP2,
        run: |s| Box::pin(calls_of_two_classes(s)),
    },
    Check {
        name: "version-during-mounts",
        rule: "Version answers within 5 seconds also while Mounts wait for the store.",
        source: HEALTH,
        run: |s| Box::pin(version_during_mounts(s)),
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
    sleep(Duration::from_millis(50)).await;
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

/// What a Mount answers when no other one runs.
struct Alone {
    answer: Answer,
    /// Whether a second Mount has the same content, modes and versions.
    is_stable: bool,
}

impl Alone {
    async fn of(subject: &Subject) -> Result<Self, Finding> {
        let first = subject.first().await?;
        let answer = subject.succeeds(subject.request()).await?;
        Ok(Self {
            is_stable: answer.files == first.files && answer.versions == first.versions,
            answer,
        })
    }

    /// Checks the outcome of a Mount of the same objects beside others.
    fn same(&self, subject: &Subject, beside: Result<Answer, Status>) -> Result<(), Finding> {
        let beside =
            beside.map_err(|status| failed(format!("one failed: {}", subject.told(&status))))?;
        let differs = if beside.paths() != self.answer.paths() {
            "files"
        } else if self.is_stable && beside.files != self.answer.files {
            "content or modes"
        } else if self.is_stable && beside.versions != self.answer.versions {
            "versions"
        } else {
            return Ok(());
        };
        Err(failed(format!(
            "one has other {differs} than a Mount alone"
        )))
    }
}

async fn calls_at_once(subject: &Subject, sharing: Sharing) -> Result<(), Finding> {
    let alone = Alone::of(subject).await?;
    let shared = subject.client()?;
    let calls = (0..CALLS).map(|_| async {
        match sharing {
            Sharing::None => subject.mount(subject.request()).await,
            Sharing::OneConnection => subject.mount_on(shared.clone(), subject.request()).await,
        }
    });
    for answer in join_all(calls).await {
        alone.same(subject, answer)?;
    }
    Ok(())
}

async fn calls_of_two_classes(subject: &Subject) -> Result<(), Finding> {
    const ROUNDS: usize = 4;
    let missing = subject.settings.missing.as_ref();
    let missing = subject.request_for(missing.ok_or_else(|| needs("--missing"))?);
    let alone = Alone::of(subject).await?;
    if subject.mount(missing.clone()).await.is_ok() {
        return Err(Finding::Skipped("missing-object failed".to_owned()));
    }
    for round in 0..ROUNDS {
        let calls = (0..CALLS).map(|number| {
            let exists = (number + round) % 2 == 0;
            let request = if exists {
                subject.request()
            } else {
                missing.clone()
            };
            async move { (exists, subject.mount(request).await) }
        });
        for (exists, answer) in join_all(calls).await {
            if exists {
                alone.same(subject, answer)?;
            } else if answer.is_ok() {
                let reason = "beside others, a Mount of an object that does not exist succeeds";
                return Err(failed(reason));
            }
        }
    }
    Ok(())
}

async fn version_during_mounts(subject: &Subject) -> Result<(), Finding> {
    // Mounts that take long show most.
    let request = if let Some(outage) = &subject.settings.outage {
        subject.request_for(outage)
    } else {
        subject.first().await?;
        subject.request()
    };
    let ended = AtomicBool::new(false);
    let mounts = async {
        join_all((0..CALLS).map(|_| subject.mount(request.clone()))).await;
        ended.store(true, Ordering::SeqCst);
        std::future::pending().await
    };
    let versions = async {
        let limit = Instant::now() + VERSIONS;
        loop {
            if let Err(Finding::Failed(reason)) = subject.version().await {
                return Err(failed(format!("while Mounts are under way: {reason}")));
            }
            if ended.load(Ordering::SeqCst) || Instant::now() > limit {
                return Ok(());
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        outcome = versions => outcome,
        never = mounts => never,
    }
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
    subject.recovers().await
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
    subject.recovers().await
}
