//! Calls providers: finds the socket, bounds the calls and their answers, shares both between
//! namespaces and classes, and speaks `v1alpha1`.
//!
//! A call waits for its turn and then for the answer, both within the caller's deadline. If the
//! provider is away, the call fails within seconds and names the socket; a first mount waits a
//! moment for a provider that has not started yet.

mod health;
mod line;
mod memory;
mod peer;
mod queue;
mod refusal;
mod socket;
mod wire;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    pin::pin,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use proto::provider::{MountRequest, MountResponse, ObjectVersion};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tonic::{Code, Request, Status};
use zeroize::Zeroizing;

use crate::{
    error::{Error, Reason, Result},
    files::File,
    metrics::{Metrics, provider::CallGuard},
    record::Object,
    secret::Secret,
};
use line::ClassName;
use memory::{AnswerMemory, Reserved};
pub use peer::Trusted;
use queue::{Ending, Place, Queue};
use refusal::{FailedCall, TooLate};
use socket::Sockets;
use wire::Asking;

/// The mode that providers are told to give files. It is always 0644, because some providers keep
/// the mode of one call for other calls. It is sent as upstream sends it, as a decimal number in
/// JSON: `420` (`filePermission` in `pkg/secrets-store/nodeserver.go`).
const PERMISSION: i32 = 0o644;

/// The attempts while a provider answers UNAVAILABLE or drops the connection, and the waits before
/// the second and third: the existing driver's retry policy.
const ATTEMPTS: usize = 3;
const FIRST_WAIT: Duration = Duration::from_secs(1);
const WAIT_FACTOR: f64 = 1.1;

/// The longest wait that a provider can ask for within one call. When it asks for a longer one, the
/// call ends.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// The time that a refresh may take, waiting included. No pod waits for a refresh, kubelet causes
/// it again, and it must not hold a place that a pod needs.
const REFRESH_WITHIN: Duration = Duration::from_secs(30);

/// The interval at which a call that waits for its turn checks whether others hang.
const PRESS_EVERY: Duration = Duration::from_secs(1);

/// The number of characters of a provider's error code that are kept.
const LONGEST_CODE: usize = 100;

/// The outcome that is counted when a provider answers with an error code of its own.
const PROVIDER_ERROR: &str = "PROVIDER_ERROR";

/// A request for the objects of a volume.
pub struct MountCall<'a> {
    /// The provider's name, as the class gives it.
    pub provider: &'a str,
    /// The namespace of the pod and of its class.
    pub namespace: &'a str,
    /// The name of the class.
    pub class: &'a str,
    /// A JSON object of strings: parameters and volume attributes, tokens included.
    pub attributes: Zeroizing<String>,
    /// Whether the attributes have service account tokens.
    pub with_tokens: bool,
    /// A JSON object of strings, or `null`.
    pub secrets: Zeroizing<String>,
    /// The target path, for providers that write files themselves.
    pub target: &'a Path,
    /// The objects that the volume holds now.
    pub current: &'a [Object],
    /// Whether a pod waits for the call.
    pub urgency: Urgency,
    /// The time until which the caller waits. A refresh may end earlier.
    pub deadline: Instant,
}

/// Whether a pod waits for a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// A pod cannot start before the call ends.
    FirstMount,
    /// The pod runs with the content that it has.
    Refresh,
}

/// The answer of a provider.
pub struct Reply {
    /// The objects that it fetched, in order of id, each id once.
    pub objects: Vec<Object>,
    /// The paths and files, not yet checked. Empty if the provider writes files itself.
    pub files: Vec<(String, File)>,
    /// The memory of the answer, which other answers wait for.
    _reserved: Reserved,
}

/// The limits of the calls to one provider and of its answers.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The calls in flight.
    pub max_calls: usize,
    /// The memory for answers in bytes. An answer takes it from the moment at which it begins to
    /// arrive until its files are written.
    pub max_bytes: usize,
    /// The largest answer that is accepted, in bytes.
    pub max_message_bytes: usize,
}

/// The providers of this node.
pub struct Providers {
    sockets: Sockets,
    trusted: Trusted,
    limits: Limits,
    metrics: Metrics,
    shared: Mutex<HashMap<String, Shared>>,
}

/// Returns the names and the sockets of the providers in some directories, of which an earlier one goes
/// before a later one.
pub fn sockets(directories: Vec<PathBuf>) -> Vec<(String, PathBuf)> {
    Sockets::new(directories).all()
}

/// The queue and the memory that the calls to one provider share.
#[derive(Clone)]
struct Shared {
    queue: Arc<Queue>,
    memory: Arc<AnswerMemory>,
}

/// The failure of one attempt.
enum AttemptError {
    /// An error after which there is no further attempt.
    Final(Error),
    /// A status from the call to this socket.
    Status(PathBuf, Status),
}

impl From<Error> for AttemptError {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl Providers {
    /// Creates the providers whose sockets are in the directories of `search`. The first directory
    /// that has a socket wins. A provider must run as a user that is `trusted`.
    pub fn new(search: Vec<PathBuf>, trusted: Trusted, limits: Limits, metrics: Metrics) -> Self {
        Self {
            sockets: Sockets::new(search),
            trusted,
            limits,
            metrics,
            shared: Mutex::default(),
        }
    }

    /// Asks a provider for the objects of a volume.
    ///
    /// # Errors
    /// Names the provider and its socket, what it answered, and what to do. The error has the wait
    /// that the provider asked for, if it asked for one.
    pub async fn mount(&self, mut call: MountCall<'_>) -> Result<Reply> {
        if call.urgency == Urgency::Refresh {
            call.deadline = call.deadline.min(Instant::now() + REFRESH_WITHIN);
        }
        let class = ClassName::new(call.namespace, call.class);
        let mut wait = FIRST_WAIT;
        for attempt in 1.. {
            let (socket, status) = match self.attempt(&call, &class).await {
                Ok(reply) => return Ok(reply),
                Err(AttemptError::Final(error)) => return Err(error),
                Err(AttemptError::Status(socket, status)) => (socket, status),
            };
            let pause = refusal::retry_after(&status).map_or(wait, |told| told.max(wait));
            let again = attempt < ATTEMPTS
                && refusal::is_transient(&status)
                && pause <= LONGEST_WAIT
                && Instant::now() + pause < call.deadline;
            if !again {
                let failed = FailedCall {
                    provider: call.provider,
                    socket: &socket,
                    attempts: attempt,
                    limits: self.limits,
                    with_tokens: call.with_tokens,
                };
                return Err(failed.explain(&status));
            }
            tracing::debug!(provider = call.provider, code = ?status.code(), attempt, "the provider is not available; trying again");
            sleep(pause).await;
            wait = wait.mul_f64(WAIT_FACTOR);
        }
        unreachable!("the loop above ends by returning")
    }

    /// Finds the socket, waits for a place, and calls the provider once.
    async fn attempt(
        &self,
        call: &MountCall<'_>,
        class: &ClassName,
    ) -> Result<Reply, AttemptError> {
        let name = call.provider;
        // A call to a provider without a socket waits in no queue.
        match call.urgency {
            Urgency::FirstMount => self.sockets.wait(name, call.deadline).await?,
            Urgency::Refresh => drop(self.sockets.find(name)?),
        }
        let still_there = |name: &str| self.sockets.find(name).is_ok();
        self.metrics.provider_seen(name, still_there);
        let shared = self.shared(name);
        let (place, counted) = self.turn(&shared.queue, class, call).await?;
        // The provider may have moved while the call waited for its turn.
        let socket = self.sockets.find(name)?;
        let channel = wire::channel(&socket, &self.trusted)?;
        let asking = Asking {
            class,
            memory: &shared.memory,
            max_message_bytes: self.limits.max_message_bytes,
            waits_for_memory: &Arc::default(),
        };
        let answer = tokio::select! {
            biased;
            answer = ask(call, channel, asking) => answer,
            () = place.has_to_give_way() => {
                counted.ended(refusal::code_name(Code::Cancelled));
                place.ended(Ending::Silent);
                return Err(gave_way(name, &socket).into());
            }
        };
        match answer {
            Ok((response, reserved)) => {
                place.ended(Ending::Answered);
                counted.ended(match error_code(&response) {
                    Some(_) => PROVIDER_ERROR,
                    None => refusal::code_name(Code::Ok),
                });
                Ok(accept(call, response, reserved)?)
            }
            Err(status) => {
                place.ended(refusal::ending(&status));
                counted.ended(refusal::code_name(status.code()));
                Err(AttemptError::Status(socket, status))
            }
        }
    }

    /// Waits for a place until the deadline.
    async fn turn(
        &self,
        queue: &Arc<Queue>,
        class: &ClassName,
        call: &MountCall<'_>,
    ) -> Result<(Place, CallGuard)> {
        let mut counted = self.metrics.provider_call(call.provider);
        let mut entering = pin!(queue.enter(class, call.urgency));
        loop {
            tokio::select! {
                biased;
                place = &mut entering => {
                    counted.started();
                    return Ok((place, counted));
                }
                () = sleep_until(call.deadline) => return Err(self.busy(queue, class, call)),
                () = sleep(PRESS_EVERY) => queue.press(class, call.urgency),
            }
        }
    }

    fn busy(&self, queue: &Queue, class: &ClassName, call: &MountCall<'_>) -> Error {
        Error::new(
            Code::DeadlineExceeded,
            format!(
                "provider {:?} is busy: this call waited for its turn until its deadline. {}. Is the provider or its store slow, or is --provider-max-calls ({}) too small?",
                call.provider,
                queue.ahead_of(class),
                self.limits.max_calls,
            ),
        )
        .with_reason(Reason::GrpcProviderError)
    }

    fn shared(&self, name: &str) -> Shared {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = shared.get(name) {
            return shared.clone();
        }
        let new = Shared {
            queue: Queue::new(self.limits.max_calls),
            memory: AnswerMemory::new(self.limits.max_bytes),
        };
        shared.insert(name.to_owned(), new.clone());
        new
    }
}

/// Sends a call and waits for its answer, until the deadline.
async fn ask(
    call: &MountCall<'_>,
    channel: tonic::transport::Channel,
    asking: Asking<'_>,
) -> Result<(MountResponse, Reserved), Status> {
    let mut request = Request::new(MountRequest {
        attributes: call.attributes.to_string(),
        secrets: call.secrets.to_string(),
        target_path: call.target.display().to_string(),
        permission: PERMISSION.to_string(),
        current_object_version: call
            .current
            .iter()
            .map(|o| ObjectVersion {
                id: o.id.clone(),
                version: o.version.clone(),
            })
            .collect(),
    });
    // The provider is told the deadline. tonic would end the call with CANCELLED at the timeout
    // that it sends; half a second more lets `timeout_at` below end it first.
    let left = call.deadline.saturating_duration_since(Instant::now());
    request.set_timeout(left + Duration::from_millis(500));
    // The `Debug` output of these types holds no secret.
    tracing::debug!(provider = call.provider, request = ?request.get_ref(), "asking the provider");
    let waits_for_memory = Arc::clone(asking.waits_for_memory);
    let answer = match timeout_at(call.deadline, wire::mount(channel, request, asking)).await {
        Ok(answer) => answer,
        Err(_) if waits_for_memory.load(Ordering::Relaxed) => {
            Err(refusal::too_late(TooLate::Memory))
        }
        Err(_) => Err(refusal::too_late(TooLate::Answer)),
    };
    match &answer {
        Ok((response, _)) => {
            tracing::debug!(provider = call.provider, ?response, "the provider answered");
        }
        Err(status) => {
            tracing::debug!(provider = call.provider, code = ?status.code(), message = refusal::clipped(status.message()), "the provider refused");
        }
    }
    answer
}

/// Returns the error of a call that gave way to another one. kubelet calls again.
fn gave_way(name: &str, socket: &Path) -> Error {
    Error::unavailable(format!(
        "provider {name:?} at {} did not answer this call for {} s or more, and the driver ended it to let other SecretProviderClasses call; kubelet calls again. Is the store of this class slow or unreachable?",
        socket.display(),
        queue::HANGS.as_secs(),
    ))
    .with_reason(Reason::GrpcProviderError)
}

/// Returns the mode that a provider has chosen for a file, or 0. Many providers copy the permission
/// that they were asked for into every file that has no mode of its own.
fn chosen(mode: i32) -> i32 {
    if mode == PERMISSION { 0 } else { mode }
}

/// Returns the error code that a provider gives in its answer.
fn error_code(response: &MountResponse) -> Option<&str> {
    let error = response.error.as_ref()?;
    Some(error.code.as_str()).filter(|code| !code.is_empty())
}

/// Takes an answer apart. An answer with an error code is a failure, even if it has objects.
fn accept(call: &MountCall<'_>, response: MountResponse, reserved: Reserved) -> Result<Reply> {
    let (objects, files) = parts(call.provider, call.with_tokens, response)?;
    Ok(Reply {
        objects,
        files,
        _reserved: reserved,
    })
}

/// The objects and the files of an answer.
type Parts = (Vec<Object>, Vec<(String, File)>);

/// Returns the parts of an answer.
fn parts(name: &str, with_tokens: bool, mut response: MountResponse) -> Result<Parts> {
    if let Some(code) = error_code(&response) {
        let code: String = code.chars().take(LONGEST_CODE).collect();
        let code = refusal::on_one_line(&code);
        return Err(Error::new(
            Code::Unknown,
            format!(
                "provider {name:?}: mount request failed with provider error code {code}; see the provider's log{}",
                refusal::token_hint(&code, with_tokens),
            ),
        )
        .with_reason(Reason::Provider(code)));
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
    // The last one counts of an id that comes more than once, as in a map.
    objects.reverse();
    objects.sort_by(|a, b| a.id.cmp(&b.id));
    objects.dedup_by(|a, b| a.id == b.id);
    let files = response
        .files
        .drain(..)
        .map(|file| {
            let mode = chosen(file.mode);
            (file.path, File::new(mode, Secret::from(file.contents)))
        })
        .collect();
    Ok((objects, files))
}

/// Reads bytes as a provider's answer, and as the headers of a failed call.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    use crate::{files::Payload, fuzz::assert_readable};

    let failed = FailedCall {
        provider: "vault",
        socket: Path::new("/var/run/secrets-store-csi-providers/vault.sock"),
        attempts: 2,
        limits: Limits {
            max_calls: 1,
            max_bytes: 1 << 20,
            max_message_bytes: 1 << 20,
        },
        with_tokens: false,
    };
    match wire::fuzz_answer(bytes) {
        Ok(answer) => match parts("vault", true, answer) {
            Ok((objects, files)) => {
                assert!(!objects.is_empty());
                assert!(objects.is_sorted_by(|a, b| a.id < b.id));
                match Payload::new(files) {
                    Ok(payload) => crate::files::assert_is_inside(&payload),
                    Err(invalid) => assert_readable(&invalid),
                }
            }
            Err(error) => assert_readable(&error),
        },
        Err(status) => assert_readable(&failed.explain(&status)),
    }
    if let Some(status) = wire::fuzz_status(bytes) {
        assert!(refusal::retry_after(&status).is_none_or(|wait| wait <= Duration::from_secs(3600)));
        refusal::is_transient(&status);
        refusal::ending(&status);
        assert_readable(&failed.explain(&status));
    }
}
