//! Talks to providers: finds the socket, bounds the calls and their answers, shares both between
//! namespaces and classes, and speaks `v1alpha1`. Protobuf stops here.
//!
//! A call waits for its turn, because a provider has as much to do as it may have, then for the
//! answer; both within the caller's deadline. A provider that is away fails a call in seconds,
//! naming the socket; a first mount waits a moment for one that has not started yet.

mod health;
mod line;
mod memory;
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
use line::Owner;
use memory::{Held, Memory};
use queue::{Ending, Place, Queue};
use refusal::{Failed, TooLate};
use socket::Sockets;
use wire::Asking;

/// The mode that providers are told to give files: 0644, always the same, because some keep the wish
/// of one call for others. It is sent as upstream sends it, as a decimal number in JSON: `420`
/// (`filePermission` in `pkg/secrets-store/nodeserver.go`).
const PERMISSION: i32 = 0o644;

/// Attempts while a provider answers UNAVAILABLE or drops the connection, and the waits before
/// the second and third: the existing driver's retry policy.
const ATTEMPTS: usize = 3;
const FIRST_WAIT: Duration = Duration::from_secs(1);
const WAIT_FACTOR: f64 = 1.1;

/// The longest wait that a provider can ask for within one call. When it asks for a longer one, the
/// call ends.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// How long a refresh may take, waiting included. It holds up nobody, is tried again when kubelet
/// looks the next time, and must not hold a place that a pod waits for.
const REFRESH_WITHIN: Duration = Duration::from_secs(30);

/// How often a call that waits for its turn looks whether others hang.
const PRESS_EVERY: Duration = Duration::from_secs(1);

/// The longest part of a provider's error code that is kept.
const LONGEST_CODE: usize = 100;

/// The outcome that is counted when a provider answers with an error code of its own.
const PROVIDER_ERROR: &str = "PROVIDER_ERROR";

/// Where the tokens are among the attributes. JSON puts a backslash before a quote inside of a
/// value, so that this is the key and nothing else.
const TOKENS_KEY: &str = "\"csi.storage.k8s.io/serviceAccount.tokens\":";

/// What a provider is asked for.
pub struct MountCall<'a> {
    /// The provider's name, as the class says it.
    pub provider: &'a str,
    /// The namespace of the pod and of its class.
    pub namespace: &'a str,
    /// The name of the class. Classes share a provider.
    pub class: &'a str,
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
    /// When the answer must be there; for a refresh that may be earlier than the caller says.
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
    /// Their memory, which others wait for.
    _held: Held,
}

/// How much providers may have to do, and how much they may answer.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Calls in flight to one provider.
    pub max_calls: usize,
    /// Memory in bytes for the answers of one provider: from the moment in which an answer begins
    /// to arrive until its files are written.
    pub max_bytes: usize,
    /// The largest answer that is accepted.
    pub max_message_bytes: usize,
}

/// All providers of this node.
pub struct Providers {
    sockets: Sockets,
    limits: Limits,
    metrics: Metrics,
    shared: Mutex<HashMap<String, Shared>>,
}

/// What the calls to one provider share.
#[derive(Clone)]
struct Shared {
    queue: Arc<Queue>,
    memory: Arc<Memory>,
}

impl Providers {
    /// Providers whose sockets are in these directories, the first one that has it wins.
    pub fn new(search: Vec<PathBuf>, limits: Limits, metrics: Metrics) -> Self {
        Self {
            sockets: Sockets::new(search),
            limits,
            metrics,
            shared: Mutex::default(),
        }
    }

    /// Asks a provider for the objects of a volume.
    ///
    /// # Errors
    /// Says which provider at which socket, what it answered, and what to do. Has the wait that the
    /// provider asked for, if it did.
    pub async fn mount(&self, mut call: MountCall<'_>) -> Result<Reply> {
        if call.urgency == Urgency::Refresh {
            call.deadline = call.deadline.min(Instant::now() + REFRESH_WITHIN);
        }
        let name = call.provider;
        let owner = Owner::new(call.namespace, call.class);
        let with_tokens = call.attributes.contains(TOKENS_KEY);
        let mut wait = FIRST_WAIT;
        for attempt in 1.. {
            // Whoever is not there has no queue.
            match call.urgency {
                Urgency::FirstMount => self.sockets.wait(name, call.deadline).await?,
                Urgency::Refresh => drop(self.sockets.find(name)?),
            }
            let still_there = |name: &str| self.sockets.find(name).is_ok();
            self.metrics.provider_seen(name, still_there);
            let shared = self.shared(name);
            let (place, counted) = self.turn(&shared.queue, &owner, &call).await?;
            // A turn may take a while to come, in which the provider may have moved.
            let socket = self.sockets.find(name)?;
            let channel = wire::channel(&socket)?;
            let waits_for_memory = Arc::default();
            let asking = Asking {
                waits_for_memory: &waits_for_memory,
                owner: &owner,
                memory: &shared.memory,
                max_message_bytes: self.limits.max_message_bytes,
            };
            let answer = tokio::select! {
                biased;
                answer = ask(&call, channel, asking) => answer,
                () = place.has_to_give_way() => {
                    counted.ended(refusal::code_name(Code::Cancelled));
                    place.ended(Ending::Silent);
                    return Err(gave_way(name, &socket));
                }
            };
            match answer {
                Ok((response, held)) => {
                    place.ended(Ending::Answered);
                    return accept(response, name, with_tokens, held, counted);
                }
                Err(status) => {
                    place.ended(refusal::ending(&status));
                    counted.ended(refusal::code_name(status.code()));
                    let pause = refusal::retry_after(&status).map_or(wait, |told| told.max(wait));
                    let again = attempt < ATTEMPTS
                        && refusal::is_transient(&status)
                        && pause <= LONGEST_WAIT
                        && Instant::now() + pause < call.deadline;
                    if !again {
                        let failed = Failed {
                            provider: name,
                            socket: &socket,
                            attempts: attempt,
                            max_message_bytes: self.limits.max_message_bytes,
                            max_bytes: self.limits.max_bytes,
                            with_tokens,
                        };
                        return Err(failed.explain(&status));
                    }
                    tracing::debug!(provider = name, code = ?status.code(), attempt, "the provider is not available; trying again");
                    sleep(pause).await;
                    wait = wait.mul_f64(WAIT_FACTOR);
                }
            }
        }
        unreachable!("the loop above ends by returning")
    }

    /// Waits until the call may go.
    async fn turn(
        &self,
        queue: &Arc<Queue>,
        owner: &Owner,
        call: &MountCall<'_>,
    ) -> Result<(Place, CallGuard)> {
        let mut counted = self.metrics.provider_call(call.provider);
        let mut entering = pin!(queue.enter(owner, call.urgency));
        loop {
            tokio::select! {
                biased;
                place = &mut entering => {
                    counted.started();
                    return Ok((place, counted));
                }
                () = sleep_until(call.deadline) => return Err(self.busy(queue, owner, call)),
                () = sleep(PRESS_EVERY) => queue.press(owner, call.urgency),
            }
        }
    }

    fn busy(&self, queue: &Queue, owner: &Owner, call: &MountCall<'_>) -> Error {
        Error::new(
            Code::DeadlineExceeded,
            format!(
                "provider {:?} is busy: this call waited for its turn until its deadline. {}. Is the provider or its store slow, or is --provider-max-calls ({}) too small?",
                call.provider,
                queue.ahead_of(owner),
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
            memory: Memory::new(self.limits.max_bytes),
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
) -> Result<(MountResponse, Held), Status> {
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
    // The provider is told when we stop waiting. tonic enforces what it sends, and would
    // call it CANCELLED; a little later, so that the line below is the one that decides.
    let left = call.deadline.saturating_duration_since(Instant::now());
    request.set_timeout(left + Duration::from_millis(500));
    // What these types print of themselves holds no secret.
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

/// Says that a call ended for the sake of others. kubelet calls again.
fn gave_way(name: &str, socket: &Path) -> Error {
    Error::unavailable(format!(
        "provider {name:?} at {} did not answer this call for {} s or more, and the driver ended it to let other SecretProviderClasses call; the driver tries again. Is the store of this class slow or unreachable?",
        socket.display(),
        queue::HANGS.as_secs(),
    ))
    .with_reason(Reason::GrpcProviderError)
}

/// Returns the mode that a provider has chosen for a file, or 0. Many copy the permission that they
/// were asked for into every file that has none of its own, and have chosen nothing.
fn chosen(mode: i32) -> i32 {
    if mode == PERMISSION { 0 } else { mode }
}

/// Takes an answer apart. The provider's own error code is a failure, whatever else it answered.
fn accept(
    mut response: MountResponse,
    name: &str,
    with_tokens: bool,
    held: Held,
    counted: CallGuard,
) -> Result<Reply> {
    if let Some(error) = response.error.filter(|error| !error.code.is_empty()) {
        counted.ended(PROVIDER_ERROR);
        let code: String = error.code.chars().take(LONGEST_CODE).collect();
        return Err(Error::new(
            Code::Unknown,
            format!(
                "provider {name:?}: mount request failed with provider error code {code}{}",
                refusal::token_hint(&code, with_tokens),
            ),
        )
        .with_reason(Reason::Provider(code)));
    }
    counted.ended(refusal::code_name(Code::Ok));
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
        .map(|file| {
            let mode = chosen(file.mode);
            (file.path, File::new(mode, Secret::from(file.contents)))
        })
        .collect();
    Ok(Reply {
        objects,
        files,
        _held: held,
    })
}
