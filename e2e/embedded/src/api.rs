//! A Kubernetes API server in this process: small, fast to start, and strict.
//!
//! It serves what CSI drivers, the kubelet and kube's client rely on, and refuses what a real one
//! refuses: forbidden requests, invalid and unknown fields, conflicts, missing namespaces. Objects
//! live in memory only.
//!
//! ```text
//! listener     the sockets: api.sock (administrators), pods.sock (TLS and bearer tokens), a port
//! server       one request: identity, interception, disturbance, permission, verb, answer
//!   request    verb and object out of method and address      rbac       roles and bindings
//!   discovery  what is served                                 tokens     service account tokens
//!   exec       commands in containers
//!   render     objects and lists on the wire                  watch      changes on the wire
//! objects      create, update, patch for every kind          deletion   delete for every kind
//!   body       from a body to the stored form and back        admission  defaults and rules of built-in kinds
//!   schema     rules of custom kinds                          fields     sets of fields and their managers
//!   selectors  labels and fields
//! store        objects, revisions, histories                  collector  ownership and namespaces
//! resources    the table of kinds                             status     refusals, field_error
//! ```
//!
//! Differences from a real server: the only patch is the merge patch, CEL rules are not evaluated,
//! definitions with `pattern` are refused, unknown fields are dropped whatever `fieldValidation` says,
//! tables are not rendered, no warnings are sent, managed fields
//! have most lists as a whole, the pages of a list are not of one revision, collections are not deleted as a whole,
//! periodic bookmarks are not sent, every deletion is background deletion, ClusterRoles are not
//! aggregated, admission does not inject token volumes, discovery does not list reviews, bodies are
//! read as JSON only, commands in containers have no input, and no controller runs for workloads.

mod admission;
mod body;
mod collector;
mod deletion;
mod discovery;
mod exec;
mod field_error;
mod fields;
mod listener;
mod objects;
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
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
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
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, UnixStream},
    task::{AbortHandle, JoinSet},
};
use tower::{Layer, service_fn};

use crate::lock;

use body::{Target, WriteOptions};
pub use exec::{Exec, Output};
use listener::Certificates;
use request::RequestInfo;
use server::Server;
use store::Store;
use tokens::Tokens;

/// A running API server. Dropping it closes every connection and forgets every object.
pub struct ApiServer {
    server: Arc<Server>,
    ca_pem: String,
    client: Client,
    collector: AbortHandle,
    tasks: Mutex<JoinSet<()>>,
}

/// The reason why the API server does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory for the sockets cannot be made private.
    #[error("cannot prepare {path} for the sockets of the API server: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A socket cannot be opened.
    #[error("cannot listen on {path}: {source}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The system's error.
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

/// A request by `pods.sock` or by [`ApiServer::kubeconfig`], for counting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `system:serviceaccount:<namespace>:<name>`, `system:anonymous`, or empty for a bad token and
    /// for [`ApiServer::kubeconfig`].
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

/// A request as an interceptor sees it.
#[derive(Debug)]
pub struct Call<'a> {
    /// The HTTP method.
    pub method: &'a str,
    /// The path and the query.
    pub uri: &'a str,
    /// The body; empty for none.
    pub body: &'a [u8],
}

/// The effect of an interceptor on a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reaction {
    /// It is served.
    Serve,
    /// The other reaction follows that much later.
    Delay(Duration, Box<Reaction>),
    /// It is answered with this HTTP status and body, and not served.
    Answer(u16, String),
    /// It is never answered.
    Hang,
    /// Its connection is closed.
    Close,
}

type Interceptor = dyn Fn(&Call<'_>) -> Reaction + Send + Sync;

/// A disturbance of the requests by `pods.sock` and by [`ApiServer::kubeconfig`].
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
        /// The verb of the requests that match, as in [`Request::verb`]; any when absent.
        verb: Option<String>,
        /// The resource of the requests that match, as in [`Request::resource`]; any when absent.
        resource: Option<String>,
        /// The number of requests that fail.
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
            interceptor: Mutex::default(),
            runner: Mutex::default(),
        });
        let certificates = Certificates::generate()?;
        let ca_pem = certificates.ca_pem.clone();
        let admins = listener::bind(&dir.join("api.sock"))?;
        let pods = listener::bind(&dir.join("pods.sock"))?;
        let mut tasks = JoinSet::new();
        let collector = tasks.spawn(collector::run(store, chores));
        tasks.spawn(listener::serve_admins(admins, server.clone()));
        tasks.spawn(listener::serve_pods(pods, server.clone(), certificates));
        Ok(ApiServer {
            server,
            ca_pem,
            client: connect(&dir.join("api.sock")),
            collector,
            tasks: Mutex::new(tasks),
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

    /// Returns every request so far that came by `pods.sock` or by [`ApiServer::kubeconfig`], whoever
    /// answered it; a watch counts when it begins.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.server.requests).clone()
    }

    /// Forgets the requests so far.
    pub fn reset_requests(&self) {
        lock(&self.server.requests).clear();
    }

    /// Disturbs the requests by `pods.sock` and by [`ApiServer::kubeconfig`] from now on.
    pub fn disturb(&self, disturbance: Disturbance) {
        self.server.disturbance.send_replace(disturbance);
    }

    /// Calls `interceptor` from now on for each request that comes by `pods.sock` or by
    /// [`ApiServer::kubeconfig`], unless its body is too large or broke off. It replaces an earlier
    /// one.
    pub fn intercept(&self, interceptor: impl Fn(&Call<'_>) -> Reaction + Send + Sync + 'static) {
        *lock(&self.server.interceptor) = Some(Arc::new(interceptor));
    }

    /// Lets `webhook` change each object that a client writes from now on, as a mutating admission webhook does.
    /// Its first argument is the qualified name of the kind, such as `secrets` or
    /// `certificatesigningrequests.certificates.k8s.io`. It replaces an earlier one.
    pub fn mutate(&self, webhook: impl Fn(&str, &mut Value) + Send + Sync + 'static) {
        self.server.store.set_webhook(Arc::new(webhook));
    }

    /// Calls `runner` from now on for each command that a client wants to run in a container
    /// (`pods/exec`). Without it, none can be started.
    pub fn run_commands<R, F>(&self, runner: R)
    where
        R: Fn(Exec) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Output, String>> + Send + 'static,
    {
        *lock(&self.server.runner) = Some(Arc::new(move |exec| Box::pin(runner(exec))));
    }

    /// Listens on a free port of the loopback, without TLS, and returns a kubeconfig for it. Its
    /// user is an administrator whose requests are intercepted, disturbed and counted; with a token of a
    /// service account, it has the rights of that.
    ///
    /// # Errors
    /// When there is no port.
    pub async fn kubeconfig(&self) -> io::Result<String> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let server = format!("http://{}", listener.local_addr()?);
        let serve = listener::serve_loopback(listener, self.server.clone());
        lock(&self.tasks).spawn(serve);
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {}}],
        });
        Ok(kubeconfig.to_string())
    }

    /// Stops the garbage collector: objects whose owners are gone stay, as do deleted namespaces.
    pub fn stop_collector(&self) {
        self.collector.abort();
    }

    /// Stores an object at a path such as `/api/v1/namespaces/default/pods/web` exactly as it is,
    /// whatever the rules. Its uid and resource version are those that it contains.
    ///
    /// # Errors
    /// Returns a sentence when the path is not that of an object.
    pub fn put(&self, path: &str, object: Value) -> Result<(), String> {
        let target = self.target(path)?;
        self.server.store.place(target.key(), object);
        Ok(())
    }

    /// Returns the object at a path.
    pub fn get(&self, path: &str) -> Option<Value> {
        let target = self.target(path).ok()?;
        let current = self.server.store.current(&target).ok()?;
        Some(Value::clone(&current))
    }

    /// Removes the object at a path, whatever its finalizers and grace period.
    pub fn remove(&self, path: &str) {
        let Ok(target) = self.target(path) else {
            return;
        };
        while let Ok(current) = self.server.store.current(&target) {
            // It may have been written meanwhile.
            let _raced = self.server.store.remove(&target.key(), &current);
        }
    }

    /// Returns all objects of a kind such as `pods` or `deployments.apps`.
    pub fn all(&self, kind: &str) -> Vec<Value> {
        let (_, objects) = self.server.store.list(kind, None);
        objects.iter().map(|object| Value::clone(object)).collect()
    }

    fn target(&self, path: &str) -> Result<Target, String> {
        let uri = path.parse().map_err(|error| format!("{path}: {error}"))?;
        let info = RequestInfo::parse(&http::Method::GET, &uri).map_err(|status| status.message)?;
        let target = self.server.target(&info).map_err(|status| status.message)?;
        match target.name.as_str() {
            "" => Err(format!("{path} is no object's path")),
            _ => Ok(target),
        }
    }
}

/// Returns an administrator's client over the `api.sock` of a server in any process. It needs a tokio
/// runtime.
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

/// Creates the namespaces and roles that every cluster starts with.
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
                api_version: target.resource.storage.clone(),
                subresource: String::new(),
            },
            dry_run: false,
        };
        store
            .create(&target, object.clone(), &options)
            .map_err(|status| failed(status.message))?;
    }
    Ok(())
}
