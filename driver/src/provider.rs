//! Talks to providers: finds the socket, keeps one lazy channel for each, and speaks
//! `v1alpha1`. Protobuf stops here.
//!
//! A socket is looked up again for every call, and its channel is kept only while the same
//! socket file is there: a provider that restarted, moved or was replaced is found without a
//! restart of the driver. A provider that is away fails a call in seconds, naming the socket.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use http::Uri;
use proto::provider::{
    MountRequest, MountResponse, ObjectVersion, csi_driver_provider_client::CsiDriverProviderClient,
};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};
use zeroize::Zeroizing;

use crate::{
    error::{Error, Reason, Result},
    files::File,
    secret::Secret,
    volume::record::Object,
};

/// What providers are told to give files as a mode: 0644, in decimal (contract F.6).
const PERMISSION: &str = "420";

/// Attempts while a provider answers UNAVAILABLE or drops the connection, and the waits before
/// the second and third: the existing driver's retry policy.
const ATTEMPTS: usize = 3;
const FIRST_WAIT: Duration = Duration::from_secs(1);
const WAIT_FACTOR: f64 = 1.1;

/// A unix socket either accepts at once or has a full backlog.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What a provider is asked for.
pub struct MountCall<'a> {
    /// The provider's name, as the class says it.
    pub provider: &'a str,
    /// A JSON object of strings: parameters and volume attributes, tokens included.
    pub attributes: Zeroizing<String>,
    /// A JSON object of strings, or `null`.
    pub secrets: Zeroizing<String>,
    /// Where the volume is, for providers that write files themselves.
    pub target: &'a Path,
    /// What the volume holds now.
    pub current: &'a [Object],
    /// Who goes ahead when the provider has as much to do as it may have.
    pub urgency: Urgency,
    /// When the answer must be there.
    pub deadline: Instant,
}

/// How much waits for a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// A pod that cannot start.
    FirstMount,
    /// Nothing: the pod runs with what it has.
    Refresh,
}

/// What a provider answered.
pub struct Reply {
    /// The objects it fetched, in order of id, each id once.
    pub objects: Vec<Object>,
    /// The files, not yet checked. None: the provider writes them itself.
    pub files: Vec<(String, File)>,
}

/// All providers of this node.
pub struct Providers {
    search: Vec<PathBuf>,
    max_message_bytes: usize,
    clients: Mutex<HashMap<PathBuf, Connected>>,
}

/// A channel and the socket file it leads to.
struct Connected {
    socket: SocketId,
    client: CsiDriverProviderClient<Channel>,
}

/// Tells a socket from one that replaced it under the same path. Inode numbers are used again
/// at once by some file systems, so the time of the change counts too.
#[derive(PartialEq, Eq, Clone, Copy)]
struct SocketId {
    device: u64,
    inode: u64,
    changed: (i64, i64),
}

impl Providers {
    /// Providers whose sockets are in these directories, the first one that has it wins.
    /// `max_message_bytes` bounds an answer.
    pub fn new(search: Vec<PathBuf>, max_message_bytes: usize) -> Self {
        Self {
            search,
            max_message_bytes,
            clients: Mutex::default(),
        }
    }

    /// Asks a provider for the objects of a volume.
    ///
    /// # Errors
    /// Says which provider at which socket, what it answered, and what to do.
    pub async fn mount(&self, call: MountCall<'_>) -> Result<Reply> {
        let name = call.provider;
        let (socket, client) = self.find(name)?;
        let mut wait = FIRST_WAIT;
        for attempt in 1.. {
            match self.attempt(client.clone(), &call).await {
                Ok(response) => return accept(name, response),
                Err(status) => {
                    let again = attempt < ATTEMPTS
                        && is_transient(&status)
                        && Instant::now() + wait < call.deadline;
                    if !again {
                        return Err(self.explain(name, &socket, &status, attempt));
                    }
                    tracing::info!(provider = name, code = ?status.code(), attempt, "the provider is not available; trying again");
                    sleep(wait).await;
                    wait = wait.mul_f64(WAIT_FACTOR);
                }
            }
        }
        unreachable!("the loop above ends by returning")
    }

    async fn attempt(
        &self,
        mut client: CsiDriverProviderClient<Channel>,
        call: &MountCall<'_>,
    ) -> Result<MountResponse, Status> {
        let mut request = Request::new(MountRequest {
            attributes: call.attributes.to_string(),
            secrets: call.secrets.to_string(),
            target_path: call.target.display().to_string(),
            permission: PERMISSION.to_owned(),
            current_object_version: call
                .current
                .iter()
                .map(|o| ObjectVersion {
                    id: o.id.clone(),
                    version: o.version.clone(),
                })
                .collect(),
        });
        // The provider is told when we stop waiting. tonic enforces what it sends, and would
        // call it CANCELLED; a little later, so that the line below is the one that decides.
        let left = call.deadline.saturating_duration_since(Instant::now());
        request.set_timeout(left + Duration::from_millis(500));
        match timeout_at(call.deadline, client.mount(request)).await {
            Ok(answer) => answer.map(tonic::Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded("no answer")),
        }
    }

    /// The provider's socket and a client for it.
    fn find(&self, name: &str) -> Result<(PathBuf, CsiDriverProviderClient<Channel>)> {
        let lookup = |message: String| {
            Error::precondition(message).with_reason(Reason::FailedToLookupProviderGrpcClient)
        };
        if !is_provider_name(name) {
            return Err(lookup(format!(
                "invalid provider: provider {name:.60?} is not a provider name; spec.provider of the SecretProviderClass has 1 to 30 letters, digits, \"-\" or \"_\""
            )));
        }
        for directory in &self.search {
            let path = directory.join(format!("{name}.sock"));
            match socket_id(&path) {
                Ok(Some(socket)) => return Ok((path.clone(), self.client(path, socket)?)),
                Ok(None) => {}
                Err(error) => {
                    return Err(lookup(format!(
                        "provider {name:?}: cannot look at {}: {error}",
                        path.display()
                    )));
                }
            }
        }
        let searched: Vec<_> = self
            .search
            .iter()
            .map(|d| d.display().to_string())
            .collect();
        Err(lookup(format!(
            "provider not found: provider {name:?} has no socket {name}.sock in {}; the sockets there are: {}. Is the provider running on this node, and is spec.provider of the SecretProviderClass right?",
            searched.join(", "),
            self.sockets().unwrap_or_else(|| "none".to_owned()),
        )))
    }

    /// The names of the sockets there are, for an error message.
    fn sockets(&self) -> Option<String> {
        let mut names: Vec<String> = self
            .search
            .iter()
            .filter_map(|directory| fs::read_dir(directory).ok())
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.ends_with(".sock"))
            .take(20)
            .collect();
        names.sort();
        (!names.is_empty()).then(|| names.join(", "))
    }

    fn client(&self, path: PathBuf, socket: SocketId) -> Result<CsiDriverProviderClient<Channel>> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connected) = clients.get(&path)
            && connected.socket == socket
        {
            return Ok(connected.client.clone());
        }
        let channel = Endpoint::from_shared(format!("unix://{}", path.display()))
            .map_err(|error| {
                Error::internal(format!(
                    "the provider socket {} is no address: {error}",
                    path.display()
                ))
            })?
            // Providers refuse any other authority (contract C.2).
            .origin(Uri::from_static("http://localhost"))
            .connect_timeout(CONNECT_TIMEOUT)
            .connect_lazy();
        let client =
            CsiDriverProviderClient::new(channel).max_decoding_message_size(self.max_message_bytes);
        clients.insert(
            path,
            Connected {
                socket,
                client: client.clone(),
            },
        );
        Ok(client)
    }

    /// Turns a provider's status into a sentence. A provider's own message goes into it: it is
    /// what the person with the broken pod needs, and providers know what they may say.
    fn explain(&self, name: &str, socket: &Path, status: &Status, attempts: usize) -> Error {
        let at = format!("provider {name:?} at {}", socket.display());
        let times = if attempts > 1 {
            format!(" after {attempts} attempts")
        } else {
            String::new()
        };
        let error = if is_over_the_limit(status) {
            Error::new(
                Code::ResourceExhausted,
                format!(
                    "{at} answered with more than {} bytes; raise --max-call-recv-msg-size of the driver (chart value maxCallRecvMsgSize), or split the SecretProviderClass",
                    self.max_message_bytes
                ),
            )
        } else if let Some(why) = connection_failure(status) {
            Error::unavailable(format!(
                "{at} does not answer{times} ({why}); is the provider running on this node?"
            ))
        } else if status.code() == Code::DeadlineExceeded {
            Error::new(
                Code::DeadlineExceeded,
                format!("{at} did not answer in time{times}"),
            )
        } else {
            Error::new(
                status.code(),
                format!(
                    "{at} answered {}{times}: {}",
                    code_name(status.code()),
                    status.message()
                ),
            )
        };
        error.with_reason(Reason::GrpcProviderError)
    }
}

/// A name that cannot leave the socket directory (contract C.8, less the empty name).
fn is_provider_name(name: &str) -> bool {
    (1..=30).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

fn socket_id(path: &Path) -> io::Result<Option<SocketId>> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => Ok(Some(SocketId {
            device: metadata.dev(),
            inode: metadata.ino(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })),
        Ok(_) => Err(io::Error::other("it is not a socket")),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn accept(name: &str, mut response: MountResponse) -> Result<Reply> {
    if let Some(error) = response.error.filter(|error| !error.code.is_empty()) {
        return Err(Error::new(
            Code::Unknown,
            format!(
                "provider {name:?}: mount request failed with provider error code {:.100}",
                error.code
            ),
        )
        .with_reason(Reason::Provider(error.code)));
    }
    if response.object_version.is_empty() {
        return Err(Error::precondition(format!(
            "provider {name:?}: missing object versions: it answered without naming any object. Does the SecretProviderClass list at least one object?"
        ))
        .with_reason(Reason::GrpcProviderError));
    }
    let mut objects: Vec<Object> = response
        .object_version
        .drain(..)
        .map(|o| Object {
            id: o.id,
            version: o.version,
        })
        .collect();
    // An id that comes twice: the last one counts, as in a map.
    objects.reverse();
    objects.sort_by(|a, b| a.id.cmp(&b.id));
    objects.dedup_by(|a, b| a.id == b.id);
    let files = response
        .files
        .drain(..)
        .map(|file| (file.path, File::new(file.mode, Secret::from(file.contents))))
        .collect();
    Ok(Reply { objects, files })
}

/// Whether trying again may help: the provider says so, or its connection broke. A connection
/// that breaks under a call shows as CANCELLED or UNKNOWN with a transport error inside.
fn is_transient(status: &Status) -> bool {
    status.code() == Code::Unavailable || connection_failure(status).is_some()
}

/// What a status that tonic made of a broken connection is about; none for a status that a
/// provider sent.
fn connection_failure(status: &Status) -> Option<String> {
    let mut source = std::error::Error::source(status)?;
    while let Some(deeper) = source.source() {
        source = deeper;
    }
    Some(source.to_string())
}

/// tonic refuses a message over the limit with OUT_OF_RANGE, before it decodes it.
fn is_over_the_limit(status: &Status) -> bool {
    status.code() == Code::OutOfRange
        && status
            .message()
            .contains("decoded message length too large")
}

/// A code as the gRPC specification spells it.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
