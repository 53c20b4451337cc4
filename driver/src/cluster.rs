//! Everything asked of the API server, each with a time limit. The kube crate stops here.
//!
//! Nothing is watched or listed: a publish reads one class by name and writes one pod status,
//! and so the cost is bounded by what runs on the node. A driver that has no API server still
//! serves CSI; a publish then says so.

pub mod events;
pub mod holders;
pub mod pod_status;
pub mod resources;
pub mod secrets;

use std::{
    collections::BTreeMap,
    error::Error as StdError,
    future::Future,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kube::{
    Api, Client, Config,
    api::GetParams,
    config::{KubeConfigOptions, Kubeconfig},
    core::Status,
};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OnceCell, Semaphore};
use tokio_util::task::TaskTracker;
use tonic::Code;

use crate::{
    error::{Error, Reason, Result},
    record::{self, is_object_name},
};
use events::Events;
use resources::{SecretObject, SecretObjectData, SecretProviderClass};
use secrets::Missing;

/// How long one request may take. Short against kubelet's two minutes, so that a publish can
/// say what hung.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// How many requests run at a time while they are answered soon. Each has a connection, which is
/// kept for the next one and takes some 70 KB.
const MOST_REQUESTS: usize = 8;

/// How long a request waits for its turn. After that it runs beside the others.
const TURN_WITHIN: Duration = Duration::from_secs(1);

/// Annotations that start like this are addressed to this driver.
const OUR_ANNOTATIONS: &str = "secrets-store.csi.k8s.io/";

/// What is remembered of a class's annotations that are addressed to this driver: so many, and of
/// a longer value its beginning and a hash, so that another value is another all the same.
const MOST_ANNOTATIONS: usize = 16;
const LONGEST_ANNOTATION: usize = 256;

/// How many Secrets a class may make, of how many entries together, and how many bytes all names,
/// keys, labels and annotations of them may have. They are kept in memory while a pod of the class
/// runs, and looked at again and again.
const MOST_SECRETS: usize = 100;
const MOST_ENTRIES: usize = 1_000;
const MOST_TEXT: usize = 128 * 1024;

/// The API server. Clones share one client.
#[derive(Clone)]
pub struct Cluster {
    kubeconfig: Option<PathBuf>,
    user_agent: String,
    node: String,
    client: Arc<OnceCell<Client>>,
    events: Arc<Events>,
    away: Arc<AtomicBool>,
    /// The turns of requests, as many at a time as connections are worth keeping.
    requests: Arc<Semaphore>,
    /// Secrets that are being made anew, which is finished whoever stops waiting for it.
    replacing: TaskTracker,
    /// Those of them that have been deleted and could not be made yet.
    missing: Arc<Missing>,
}

/// What a volume needs of a SecretProviderClass.
#[derive(Debug, Clone)]
pub struct Class {
    /// Which class, and which state of it.
    pub identity: record::Class,
    /// `spec.provider`, not empty.
    pub provider: String,
    /// `spec.parameters`, not empty.
    pub parameters: BTreeMap<String, String>,
    /// `spec.secretObjects`.
    pub secret_objects: Vec<SecretObject>,
    /// Why none of its `secretObjects` are here, when they are more than are kept of one class.
    pub too_much: Option<String>,
}

impl Class {
    /// Returns what is remembered while a volume of the class is mounted. What only the provider
    /// needs to know is not.
    pub fn remembered(&self) -> Self {
        Self {
            identity: self.identity.clone(),
            provider: self.provider.clone(),
            parameters: BTreeMap::new(),
            secret_objects: self.secret_objects.clone(),
            too_much: self.too_much.clone(),
        }
    }
}

impl Cluster {
    /// The API server that a kubeconfig file names, or else the one of the cluster that this
    /// process runs in. Nothing is read or connected before the first request. Events say that
    /// they come from `node`.
    pub fn new(kubeconfig: Option<PathBuf>, version: &str, node: &str) -> Self {
        Self {
            kubeconfig,
            user_agent: format!(
                "csi-secrets-store/controller/{version} ({}/{})",
                std::env::consts::OS,
                std::env::consts::ARCH
            ),
            node: node.to_owned(),
            client: Arc::default(),
            events: Arc::default(),
            away: Arc::default(),
            requests: Arc::new(Semaphore::new(MOST_REQUESTS)),
            replacing: TaskTracker::new(),
            missing: Arc::default(),
        }
    }

    /// Waits until nothing is half done: no Secret has been deleted that is to be made anew.
    pub async fn finish(&self) {
        self.replacing.close();
        self.replacing.wait().await;
    }

    /// Returns the name of this node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Returns whether the API server is away: the last request that only reads got no answer, or
    /// was told to come back later. What becomes of a write says nothing about that, because
    /// somebody's webhook, finalizer or quota decides on it; it is the written object's own trouble.
    pub fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    /// Reads a class, as it is now.
    ///
    /// # Errors
    /// When it cannot be read, or says no provider or no parameters.
    pub async fn class(&self, namespace: &str, name: &str) -> Result<Class> {
        self.read_class(namespace, name, &GetParams::default())
            .await
    }

    /// Reads a class as the API server remembers it: perhaps a moment old, and cheap for it,
    /// because it need not ask its store.
    ///
    /// # Errors
    /// As [`Cluster::class`].
    pub async fn remembered_class(&self, namespace: &str, name: &str) -> Result<Class> {
        self.read_class(namespace, name, &GetParams::any()).await
    }

    /// Whether there is a class of this name that makes this Secret. Nothing but the API server's
    /// word that there is no such class, or the class itself, says that it does not.
    ///
    /// # Errors
    /// When the class cannot be read.
    async fn class_makes(&self, namespace: &str, name: &str, secret: &str) -> Result<bool> {
        if !is_object_name(name) {
            // No class can have this name.
            return Ok(false);
        }
        let api: Api<SecretProviderClass> = Api::namespaced(self.client().await?, namespace);
        // What the API server remembers may be older than a class that has just been made.
        for how in [GetParams::any(), GetParams::default()] {
            match self.read(api.get_with(name, &how)).await {
                // A class without a provider mounts nothing: what answers so is hardly a class.
                Ok(class) if !is_class(&class, name) || class.spec.provider.is_empty() => {
                    return Err(not_the_class());
                }
                Ok(class) => {
                    let mut made = class.spec.secret_objects.iter();
                    if made.any(|object| object.secret_name.trim() == secret) {
                        return Ok(true);
                    }
                }
                Err(Failure::Refused {
                    code: 404, object, ..
                }) if object == name => {}
                Err(failure) => return Err(failure.into_error()),
            }
        }
        Ok(false)
    }

    async fn read_class(&self, namespace: &str, name: &str, how: &GetParams) -> Result<Class> {
        let failed = |error: Error| {
            error
                .context(format_args!(
                    "failed to get secretproviderclass {namespace}/{name}"
                ))
                .with_reason(Reason::SecretProviderClassNotFound)
        };
        if !is_object_name(name) {
            return Err(failed(Error::invalid(format!(
                "{name:.100?} cannot be the name of an object"
            ))));
        }
        let api: Api<SecretProviderClass> =
            Api::namespaced(self.client().await.map_err(failed)?, namespace);
        let spc = self
            .read(api.get_with(name, how))
            .await
            .map_err(|failure| failed(failure.into_error()))?;
        if !is_class(&spc, name) {
            return Err(failed(not_the_class()));
        }

        if spc.spec.provider.is_empty() {
            return Err(Error::precondition(format!(
                "provider not set in {namespace}/{name}: set spec.provider of the SecretProviderClass"
            )));
        }
        if spc.spec.parameters.is_empty() {
            return Err(Error::precondition(format!(
                "parameters not set in {namespace}/{name}: set spec.parameters of the SecretProviderClass to what provider {:?} needs",
                spc.spec.provider
            )));
        }
        let too_much = too_much(&spc.spec.secret_objects);
        let secret_objects = match too_much {
            Some(_) => Vec::new(),
            None => spc.spec.secret_objects,
        };
        Ok(Class {
            identity: record::Class {
                name: name.to_owned(),
                uid: spc.metadata.uid.unwrap_or_default(),
                generation: spc.metadata.generation,
                resource_version: spc.metadata.resource_version.unwrap_or_default(),
                annotations: addressed_to_us(spc.metadata.annotations.unwrap_or_default()),
            },
            provider: spc.spec.provider,
            parameters: spc.spec.parameters,
            secret_objects,
            too_much,
        })
    }

    /// The client, made at the first use that finds a configuration.
    async fn client(&self) -> Result<Client> {
        let client = self.client.get_or_try_init(|| self.connect()).await;
        if client.is_err() {
            self.away.store(true, Ordering::Relaxed);
        }
        client.cloned()
    }

    /// Runs a request that only reads, as [`limited`] does, and notes whether it was answered.
    fn read<'a, T: 'a>(&'a self, request: impl Request<T> + 'a) -> impl Answer<T> + 'a {
        let answer = self.in_turn(request);
        async move {
            let answer = answer.await;
            let away = matches!(
                answer,
                Err(Failure::NoAnswer(_)
                    | Failure::Refused {
                        // Too many requests, and what stands before an API server that is not there.
                        code: 429 | 502..=504,
                        ..
                    })
            );
            self.away.store(away, Ordering::Relaxed);
            answer
        }
    }

    /// Runs a request as [`limited`] does, after those that run already. It waits for them for a
    /// moment only: those that the API server does not answer, because of one namespace's webhook
    /// for example, hold up nobody else. Its time begins when it is sent.
    fn in_turn<'a, T: 'a>(&'a self, request: impl Request<T> + 'a) -> impl Answer<T> + 'a {
        let request = limited(request);
        async move {
            let _turn = tokio::time::timeout(TURN_WITHIN, self.requests.acquire()).await;
            request.await
        }
    }

    async fn connect(&self) -> Result<Client> {
        let config = match &self.kubeconfig {
            None => Config::incluster().map_err(|error| {
                Error::unavailable(format!("no API server: {error}; run in a cluster with a service account token, or give --kubeconfig"))
            })?,
            Some(path) => {
                let wrong = |error: &dyn StdError| Error::unavailable(format!("no API server: --kubeconfig {}: {error}", path.display()));
                let file = Kubeconfig::read_from(path).map_err(|error| wrong(&error))?;
                Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(|error| wrong(&error))?
            }
        };
        let mut config = config;
        config.headers.push((
            http::header::USER_AGENT,
            http::HeaderValue::from_str(&self.user_agent)
                .map_err(|error| Error::internal(format!("user agent: {error}")))?,
        ));
        Client::try_from(config)
            .map_err(|error| Error::unavailable(format!("no API server: {error}")))
    }
}

/// The annotations that are addressed to this driver, within the bounds of what is remembered.
fn addressed_to_us(annotations: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let ours = annotations
        .into_iter()
        .filter(|(name, _)| name.starts_with(OUR_ANNOTATIONS));
    let shortened = ours.map(|(name, mut value)| {
        if value.len() > LONGEST_ANNOTATION {
            let hash: String = Sha256::digest(&value)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            let mut end = LONGEST_ANNOTATION - hash.len();
            while !value.is_char_boundary(end) {
                end -= 1;
            }
            value.truncate(end);
            value.push_str(&hash);
            value.shrink_to_fit();
        }
        (name, value)
    });
    shortened.take(MOST_ANNOTATIONS).collect()
}

/// Says which bound the Secrets of a class do not keep to, and what to do.
fn too_much(objects: &[SecretObject]) -> Option<String> {
    let text_of_map = |map: &BTreeMap<String, String>| -> usize {
        map.iter().map(|(key, value)| key.len() + value.len()).sum()
    };
    let text_of_entry = |entry: &SecretObjectData| {
        entry.object_name.len() + entry.key.len() + entry.json_key.len() + entry.encoding.len()
    };
    let text_of = |object: &SecretObject| {
        let entries: usize = object.data.iter().map(text_of_entry).sum();
        let maps = text_of_map(&object.labels) + text_of_map(&object.annotations);
        object.secret_name.len() + object.type_.len() + entries + maps
    };
    let entries: usize = objects.iter().map(|object| object.data.len()).sum();
    let text: usize = objects.iter().map(text_of).sum();
    let (count, most, what) = if objects.len() > MOST_SECRETS {
        (objects.len(), MOST_SECRETS, "Secrets")
    } else if entries > MOST_ENTRIES {
        (entries, MOST_ENTRIES, "entries of data")
    } else if text > MOST_TEXT {
        let what = "bytes of names, keys, labels and annotations";
        (text, MOST_TEXT, what)
    } else {
        return None;
    };
    Some(format!(
        "its secretObjects have {count} {what}, and {most} at most are made of one class; none of them is made. Divide them among several classes, or use objectName \"*\""
    ))
}

/// Returns whether an answer is the class that was asked for, and not what something between here
/// and the API server made up.
fn is_class(answer: &SecretProviderClass, name: &str) -> bool {
    let uid = answer.metadata.uid.as_deref();
    answer.metadata.name.as_deref() == Some(name) && uid.is_some_and(|uid| !uid.is_empty())
}

fn not_the_class() -> Error {
    Error::unavailable("the answer of the API server is not the object that was asked for")
}

/// Why a request failed.
enum Failure {
    /// The API server answered with an error.
    Refused {
        code: u16,
        /// One word.
        reason: String,
        /// For people. Where a Secret is written it may quote the content.
        message: String,
        /// The name of the object that the error is about, where it is about one.
        object: String,
        /// Whether the namespace is being deleted, so that nothing can be created in it.
        namespace_ends: bool,
    },
    /// It did not answer.
    NoAnswer(String),
    /// Its answer is not the object that was asked for.
    NotUnderstood,
}

impl Failure {
    /// The error for whoever waits for this request. 404 and 403 are the user's to mend and
    /// final; everything else is worth another try.
    fn into_error(self) -> Error {
        match self {
            Self::NoAnswer(why) => {
                Error::unavailable(format!("the API server did not answer: {why}"))
            }
            Self::NotUnderstood => Error::unavailable(
                "the answer of the API server is not the object that was asked for",
            ),
            Self::Refused {
                code,
                message,
                object,
                ..
            } => {
                let code = match code {
                    400 | 422 => Code::InvalidArgument,
                    401 => Code::Unauthenticated,
                    403 => Code::PermissionDenied,
                    // Without an object it is the kind that is not served: not yet, perhaps.
                    404 if !object.is_empty() => Code::NotFound,
                    _ => Code::Unavailable,
                };
                Error::new(code, message)
            }
        }
    }
}

trait Request<T>: Future<Output = kube::Result<T>> + Send {}
impl<T, F: Future<Output = kube::Result<T>> + Send> Request<T> for F {}

trait Answer<T>: Future<Output = Result<T, Failure>> + Send {}
impl<T, F: Future<Output = Result<T, Failure>> + Send> Answer<T> for F {}

/// Runs a request within [`REQUEST_TIMEOUT`]. No error carries a response's body.
fn limited<'a, T: 'a>(request: impl Request<T> + 'a) -> impl Answer<T> + 'a {
    // The library's futures take kilobytes, and whoever awaits one would take as much all along.
    let request = Box::pin(request);
    async move {
        match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(kube::Error::Api(status))) => Err(Failure::Refused {
                code: status.code,
                namespace_ends: is_about_an_ending_namespace(&status),
                object: status.details.map(|about| about.name).unwrap_or_default(),
                reason: status.reason,
                message: status.message,
            }),
            Ok(Err(kube::Error::SerdeError(_))) => Err(Failure::NotUnderstood),
            Ok(Err(error)) => Err(Failure::NoAnswer(innermost(&error))),
            Err(_) => Err(Failure::NoAnswer(format!(
                "no answer within {} seconds",
                REQUEST_TIMEOUT.as_secs()
            ))),
        }
    }
}

fn is_about_an_ending_namespace(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    causes
        .into_iter()
        .any(|cause| cause.reason == "NamespaceTerminating")
}

/// The error at the bottom of a chain: "connection refused" rather than "service error".
fn innermost(error: &dyn StdError) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
