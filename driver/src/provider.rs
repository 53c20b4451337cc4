//! Talks to providers: finds the socket, keeps one lazy channel for each, bounds the calls, and
//! speaks `v1alpha1`. Protobuf stops here.
//!
//! A call waits for its turn, because a provider has as much to do as it may have, then for the
//! answer; both within the caller's deadline. A provider that is away fails a call in seconds,
//! naming the socket; a first mount waits a moment for one that has not started yet.

mod health;
mod queue;
mod refusal;
mod socket;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use proto::provider::{MountRequest, MountResponse, ObjectVersion};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, Request, Status};
use zeroize::Zeroizing;

use crate::{
    error::{Error, Reason, Result},
    files::File,
    metrics::{Metrics, provider::CallGuard},
    secret::Secret,
    volume::record::Object,
};
use queue::{Place, Queue};
use refusal::Failed;
use socket::{Found, Sockets};

/// What providers are told to give files as a mode: 0644, in decimal (contract F.6).
const PERMISSION: &str = "420";

/// Attempts while a provider answers UNAVAILABLE or drops the connection, and the waits before
/// the second and third: the existing driver's retry policy.
const ATTEMPTS: usize = 3;
const FIRST_WAIT: Duration = Duration::from_secs(1);
const WAIT_FACTOR: f64 = 1.1;

/// Who wants to be left alone for longer is not asked again in the same call.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// The outcome that is counted when a provider answers with an error code of its own.
const PROVIDER_ERROR: &str = "PROVIDER_ERROR";

/// Where the tokens are among the attributes. JSON puts a backslash before a quote inside of a
/// value, so that this is the key and nothing else.
const TOKENS_KEY: &str = "\"csi.storage.k8s.io/serviceAccount.tokens\":";

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
    /// Their memory, which others wait for.
    _held: Place,
}

/// How much providers may have to do, and how much they may answer.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Calls in flight to one provider.
    pub max_calls: usize,
    /// Memory in bytes for the answers of one provider: each call reserves `max_message_bytes`
    /// until its answer is there, and from then on what that takes, until its files are written.
    pub max_bytes: usize,
    /// The largest answer that is accepted.
    pub max_message_bytes: usize,
}

/// All providers of this node.
pub struct Providers {
    sockets: Sockets,
    limits: Limits,
    metrics: Metrics,
    queues: Mutex<HashMap<String, Arc<Queue>>>,
}

impl Providers {
    /// Providers whose sockets are in these directories, the first one that has it wins.
    pub fn new(search: Vec<PathBuf>, limits: Limits, metrics: Metrics) -> Self {
        Self {
            sockets: Sockets::new(search, limits.max_message_bytes),
            limits,
            metrics,
            queues: Mutex::default(),
        }
    }

    /// Asks a provider for the objects of a volume.
    ///
    /// # Errors
    /// Says which provider at which socket, what it answered, and what to do. Knows how long
    /// the provider wants to be left alone, if it said so.
    pub async fn mount(&self, call: MountCall<'_>) -> Result<Reply> {
        let name = call.provider;
        let with_tokens = call.attributes.contains(TOKENS_KEY);
        let mut wait = FIRST_WAIT;
        for attempt in 1.. {
            // Whoever is not there has no queue.
            match call.urgency {
                Urgency::FirstMount => self.sockets.wait(name, call.deadline).await?,
                Urgency::Refresh => drop(self.sockets.find(name)?),
            }
            let (place, counted) = self.turn(&call).await?;
            // A turn may take a while to come, in which the provider may have moved.
            let found = self.sockets.find(name)?;
            let socket = found.path.clone();
            match self.attempt(found, &call).await {
                Ok(response) => return accept(response, name, with_tokens, place, counted),
                Err(status) => {
                    drop(place);
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
    async fn turn(&self, call: &MountCall<'_>) -> Result<(Place, CallGuard)> {
        let queue = self.queue(call.provider);
        let mut counted = self.metrics.provider_call(call.provider);
        match timeout_at(call.deadline, queue.enter(call.urgency)).await {
            Ok(place) => {
                counted.started();
                Ok((place, counted))
            }
            Err(_) => Err(Error::new(
                Code::DeadlineExceeded,
                format!(
                    "provider {:?} is busy: this call waited for its turn until there was no time left, behind {} in flight; is the provider slow, or are --provider-max-calls ({}) and --provider-max-bytes ({}) too small?",
                    call.provider,
                    queue.in_flight(),
                    self.limits.max_calls,
                    self.limits.max_bytes,
                ),
            )
            .with_reason(Reason::GrpcProviderError)),
        }
    }

    fn queue(&self, name: &str) -> Arc<Queue> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = queues.get(name) {
            return Arc::clone(queue);
        }
        let Limits {
            max_calls,
            max_bytes,
            max_message_bytes,
        } = self.limits;
        let queue = Queue::new(max_calls, max_bytes, max_message_bytes);
        queues.insert(name.to_owned(), Arc::clone(&queue));
        queue
    }

    async fn attempt(
        &self,
        mut found: Found,
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
        // What these types print of themselves holds no secret.
        tracing::debug!(provider = call.provider, request = ?request.get_ref(), "asking the provider");
        let answer = match timeout_at(call.deadline, found.client.mount(request)).await {
            Ok(answer) => answer.map(tonic::Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded("no answer")),
        };
        match &answer {
            Ok(response) => {
                tracing::debug!(provider = call.provider, ?response, "the provider answered");
            }
            Err(status) => {
                tracing::debug!(provider = call.provider, code = ?status.code(), message = status.message(), "the provider refused");
            }
        }
        answer
    }
}

/// Takes an answer apart. The provider's own error code is a failure, whatever else it answered.
fn accept(
    mut response: MountResponse,
    name: &str,
    with_tokens: bool,
    place: Place,
    counted: CallGuard,
) -> Result<Reply> {
    if let Some(error) = response.error.filter(|error| !error.code.is_empty()) {
        counted.ended(PROVIDER_ERROR);
        return Err(Error::new(
            Code::Unknown,
            format!(
                "provider {name:?}: mount request failed with provider error code {:.100}{}",
                error.code,
                refusal::token_hint(&error.code, with_tokens),
            ),
        )
        .with_reason(Reason::Provider(error.code)));
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
    let bytes = response.files.iter().map(|file| file.contents.len()).sum();
    let files = response
        .files
        .drain(..)
        .map(|file| (file.path, File::new(file.mode, Secret::from(file.contents))))
        .collect();
    Ok(Reply {
        objects,
        files,
        _held: place.answered(bytes),
    })
}
