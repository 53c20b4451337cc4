//! A Kubernetes API server in this process: small, fast to start, and strict.
//!
//! It does what the driver, the kubelet and kube's client rely on, and refuses what a real one
//! refuses: forbidden requests, invalid and unknown fields, conflicts, missing namespaces. Objects
//! live in memory only.
//!
//! ```text
//! listener     the two sockets: api.sock (administrators), pods.sock (TLS and bearer tokens)
//! server       one request: identity, disturbance, permission, verb, answer
//!   request    verb and object out of method and address      rbac       roles and bindings
//!   discovery  what is served                                 tokens     service account tokens
//!   render     objects and lists on the wire                  watch      changes on the wire
//! objects      create, update, patch for every kind          deletion   delete for every kind
//!   body       from a body to the stored form and back        admission  defaults and rules of built-in kinds
//!   schema     rules of custom kinds                          patch      the four ways to patch
//!   fields     sets of fields and their managers              selectors  labels and fields
//! store        objects, revisions, histories                  collector  ownership and namespaces
//! resources    the table of kinds                             status     refusals
//! ```
//!
//! Known differences from a real server: CEL rules are not evaluated, definitions with `pattern`
//! are refused, lists of custom kinds are atomic whatever `x-kubernetes-list-type` says, lists are
//! never cut into pages, periodic bookmarks are not sent, foreground deletion is background
//! deletion, admission does not inject token volumes, and no controller runs for workloads.

mod admission;
mod body;
mod collector;
mod deletion;
mod discovery;
mod fields;
mod listener;
mod objects;
mod patch;
mod rbac;
mod render;
mod request;
mod resources;
mod schema;
mod selectors;
mod server;
mod status;
mod store;
mod tokens;
mod watch;

#[cfg(test)]
mod tests;

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper_util::{
    client::legacy::Client as HttpClient,
    rt::{TokioExecutor, TokioIo},
};
use kube::{
    Client, Config,
    client::{Body, ConfigExt},
};
use serde_json::json;
use tokio::{net::UnixStream, task::JoinSet};
use tower::{Layer, service_fn};

use body::{Target, UnknownFields, WriteOptions};
use listener::Certificates;
use server::Server;
use store::Store;
use tokens::Tokens;

/// A running API server. Dropping it closes every connection and forgets every object.
pub struct ApiServer {
    server: Arc<Server>,
    ca_pem: String,
    client: Client,
    _tasks: JoinSet<()>,
}

/// Why the API server does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory for the sockets cannot be made private.
    #[error("cannot prepare {path} for the sockets of the API server: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A socket cannot be opened.
    #[error("cannot listen on {path}: {source}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The certificates cannot be made.
    #[error("cannot make the certificates of the API server: {0}")]
    Certificates(#[from] rcgen::Error),
    /// The certificates cannot be used.
    #[error("cannot use the certificates of the API server: {0}")]
    Tls(#[from] tokio_rustls::rustls::Error),
    /// An object every cluster has cannot be created.
    #[error("cannot create {object}: {why}")]
    Bootstrap {
        /// The object.
        object: String,
        /// The refusal.
        why: String,
    },
}

/// A request somebody other than an administrator made, for counting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `system:serviceaccount:<namespace>:<name>`, `system:anonymous`, or empty for a bad token.
    pub user: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete` or `deletecollection`; for a
    /// path that is no resource, the HTTP method in lower case.
    pub verb: String,
    /// API group, empty for the core group.
    pub group: String,
    /// Plural, empty for paths that are no resource.
    pub resource: String,
    /// Empty for the object itself.
    pub subresource: String,
    /// Empty for cluster-scoped requests.
    pub namespace: String,
    /// Empty for requests to a collection.
    pub name: String,
    /// HTTP status of the answer.
    pub status: u16,
}

/// What happens to the requests of everybody but administrators.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Disturbance {
    /// They are answered.
    None,
    /// Connections are closed, those under way too.
    Refuse,
    /// Every answer comes that much later.
    Slow(Duration),
    /// No request is answered until the disturbance is another one; watches under way go on.
    Hang,
    /// Matching requests are refused with this status; afterwards nothing is disturbed any more.
    Fail {
        /// HTTP status.
        status: u16,
        /// Only this verb, as in [`Request::verb`].
        verb: Option<String>,
        /// Only this resource, as in [`Request::resource`].
        resource: Option<String>,
        /// How many requests.
        times: u32,
    },
}

impl ApiServer {
    /// Starts a server with the namespaces every cluster has.
    ///
    /// It listens on `<dir>/api.sock`, plain HTTP/1.1, where everybody is an administrator, and on
    /// `<dir>/pods.sock`, TLS with a certificate for 127.0.0.1, localhost and
    /// kubernetes.default.svc, where bearer tokens say who asks. The directory becomes private (0700).
    ///
    /// # Errors
    /// The directory or a socket in it cannot be used.
    pub async fn start(dir: &Path) -> Result<ApiServer, Error> {
        let unusable = |source| Error::Directory {
            path: dir.to_owned(),
            source,
        };
        fs::create_dir_all(dir).map_err(unusable)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(unusable)?;

        let (store, chores) = Store::new();
        bootstrap(&store)?;
        let store = Arc::new(store);
        let server = Arc::new(Server {
            store: store.clone(),
            tokens: Tokens::default(),
            requests: Mutex::default(),
            disturbance: tokio::sync::watch::Sender::new(Disturbance::None),
        });
        let certificates = Certificates::generate()?;
        let ca_pem = certificates.ca_pem.clone();
        let admins = listener::bind(&dir.join("api.sock"))?;
        let pods = listener::bind(&dir.join("pods.sock"))?;
        let mut tasks = JoinSet::new();
        tasks.spawn(collector::run(store, chores));
        tasks.spawn(listener::serve_admins(admins, server.clone()));
        tasks.spawn(listener::serve_pods(pods, server.clone(), certificates));
        Ok(ApiServer {
            server,
            ca_pem,
            client: connect(&dir.join("api.sock")),
            _tasks: tasks,
        })
    }

    /// An administrator's client.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// The authority that signed the certificate of `pods.sock`, as in a pod's `ca.crt`.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// Every request of others than administrators so far; a watch counts when it begins.
    pub fn requests(&self) -> Vec<Request> {
        self.server
            .requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Starts counting anew.
    pub fn reset_requests(&self) {
        self.server
            .requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// Disturbs the requests of others than administrators from now on.
    pub fn disturb(&self, disturbance: Disturbance) {
        self.server.disturbance.send_replace(disturbance);
    }
}

/// An administrator's client over the `api.sock` of a server in any process. Needs a tokio runtime.
pub fn connect(socket: &Path) -> Client {
    let socket = socket.to_owned();
    let connector = service_fn(move |_: http::Uri| {
        let socket = socket.clone();
        Box::pin(async move { UnixStream::connect(socket).await.map(TokioIo::new) })
    });
    let http = HttpClient::builder(TokioExecutor::new()).build::<_, Body>(connector);
    let base = Config::new(http::Uri::from_static("http://localhost")).base_uri_layer();
    Client::new(base.layer(http), "default")
}

/// Creates what every cluster starts with.
fn bootstrap(store: &Store) -> Result<(), Error> {
    let namespaces = ["default", "kube-system", "kube-public", "kube-node-lease"]
        .map(|name| ("namespaces", json!({"metadata": {"name": name}})));
    for (kind, object) in namespaces.into_iter().chain(rbac::bootstrap_objects()) {
        let failed = |why: String| Error::Bootstrap {
            object: format!("{kind} {}", object["metadata"]["name"]),
            why,
        };
        let resource = store
            .resource(kind)
            .ok_or_else(|| failed("unknown kind".to_owned()))?;
        let target = Target::of(resource, "", "");
        let options = WriteOptions {
            manager: fields::Manager {
                name: "kube-apiserver".to_owned(),
                apply: false,
                api_version: target.resource.storage.clone(),
                subresource: String::new(),
            },
            dry_run: false,
            unknown_fields: UnknownFields::Refuse,
        };
        store
            .create(&target, object.clone(), &options)
            .map_err(|status| failed(status.message))?;
    }
    Ok(())
}
