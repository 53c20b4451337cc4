//! Talks to the API server. Each request has a time limit.
//!
//! The driver watches nothing: a publish reads one class by name and writes one pod status, so the cost
//! is bounded by what runs on the node. What has been read of a class is remembered for a while and shared
//! by all volumes of the class (module `classes`). Some classes of a namespace are listed only to name them
//! in the error about one that is not there. A driver without an API server still
//! serves CSI; a publish then fails and says so.

mod class;
mod classes;
mod connection;
pub mod events;
pub mod interval;
pub mod pod_status;
mod pods;
mod request;
pub mod resources;
pub mod secrets;

use std::{
    error::Error as StdError,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::sync::{OnceCell, Semaphore};
use tokio_util::task::TaskTracker;

use crate::error::{Error, Result};
pub use class::Class;
#[cfg(any(test, fuzzing))]
pub(crate) use class::fuzz as fuzz_class;
#[cfg(test)]
pub(crate) use class::trimmed;
pub(crate) use classes::Classes;
pub use classes::{Freshness, Wanted};
use events::Events;
use pod_status::Troubles;
use request::MAX_REQUESTS;
use secrets::Missing;

/// A client of the API server. Clones share one connection pool.
#[derive(Clone)]
pub struct Cluster {
    kubeconfig: Option<PathBuf>,
    user_agent: String,
    node: String,
    client: Arc<OnceCell<Client>>,
    classes: Arc<Classes>,
    events: Arc<Events>,
    troubles: Arc<Troubles>,
    away: Arc<AtomicBool>,
    /// The turns of requests: as many at a time as connections are worth keeping.
    requests: Arc<Semaphore>,
    /// The turn of a list of classes, which a message names.
    listing: Arc<Semaphore>,
    /// The tasks that replace Secrets. They are finished even if no caller waits for them.
    replacing: TaskTracker,
    /// The Secrets that have been deleted to be replaced and are not there again yet.
    missing: Arc<Missing>,
}

impl Cluster {
    /// Makes a client of the API server that a kubeconfig file names, or else of the cluster that
    /// this process runs in. Nothing is read or connected before the first request. Events name
    /// `node` as their source.
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
            classes: Arc::default(),
            events: Arc::default(),
            troubles: Arc::default(),
            away: Arc::default(),
            requests: Arc::new(Semaphore::new(MAX_REQUESTS)),
            listing: Arc::new(Semaphore::new(1)),
            replacing: TaskTracker::new(),
            missing: Arc::default(),
        }
    }

    /// Waits until every Secret that was deleted to be replaced is there again, or given up for now.
    pub async fn finish(&self) {
        self.replacing.close();
        self.replacing.wait().await;
    }

    /// Returns the name of this node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Returns whether the API server is away: the last request that only reads got no answer, or
    /// was told to come back later. Writes do not count, because a webhook, a finalizer or a quota
    /// of one namespace decides on them.
    pub fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    /// Returns the kube client, which the first call that finds a configuration makes.
    async fn client(&self) -> Result<Client> {
        let client = self.client.get_or_try_init(|| self.connect()).await;
        if client.is_err() {
            self.away.store(true, Ordering::Relaxed);
        }
        client.cloned()
    }

    async fn connect(&self) -> Result<Client> {
        let failed =
            |why: String| Error::unavailable(format!("cannot connect to the API server: {why}"));
        let mut config = match &self.kubeconfig {
            None => Config::incluster().map_err(|error| {
                failed(format!(
                    "{error}; run in a cluster with a service account token, or give --kubeconfig"
                ))
            })?,
            Some(path) => {
                let wrong = |error: &dyn StdError| {
                    failed(format!("--kubeconfig {}: {error}", path.display()))
                };
                let file = Kubeconfig::read_from(path).map_err(|error| wrong(&error))?;
                Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                    .await
                    .map_err(|error| wrong(&error))?
            }
        };
        config.headers.push((
            http::header::USER_AGENT,
            http::HeaderValue::from_str(&self.user_agent)
                .map_err(|error| Error::internal(format!("user agent: {error}")))?,
        ));
        connection::connect(&config).map_err(|error| failed(error.to_string()))
    }
}
