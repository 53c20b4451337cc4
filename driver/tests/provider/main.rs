//! Calls providers on real sockets.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod answers;
mod bytes;
mod calls;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use driver::{
    error::{Error, Result},
    metrics::Metrics,
    provider::{Limits, MountCall, Providers, Reply, Trusted, Urgency},
};
use fake_provider::server::{Identity, Provider, Server, Socket};
use serde_json::json;
use tokio::time::Instant;

/// The deadline of a call that may take its time.
const LONG: Duration = Duration::from_secs(60);
/// The largest answer that is accepted.
const MAX_MESSAGE: usize = 4 << 20;

/// A node with two directories of sockets, as the driver has by default. `first` is searched first.
struct Node {
    dirs: tempfile::TempDir,
    metrics: Metrics,
    providers: Arc<Providers>,
}

impl Node {
    /// Creates a node whose provider may have this many calls in flight.
    fn new(max_calls: usize) -> Self {
        let dirs = tempfile::tempdir().unwrap();
        let search = ["first", "last"].map(|name| dirs.path().join(name));
        for dir in &search {
            fs::create_dir(dir).unwrap();
        }
        let limits = Limits {
            max_calls,
            max_bytes: 64 << 20,
            max_message_bytes: MAX_MESSAGE,
        };
        let metrics = Metrics::new();
        let trusted = Trusted {
            uids: Some(Vec::new()),
            own: nix::unistd::geteuid().as_raw(),
        };
        let providers = Providers::new(search.into(), trusted, limits, metrics.clone());
        Self {
            dirs,
            metrics,
            providers: Arc::new(providers),
        }
    }

    /// Returns the path of the socket of the provider `test` in a directory.
    fn socket(&self, dir: &str) -> PathBuf {
        self.dirs.path().join(dir).join("test.sock")
    }

    /// Serves a provider as `test` in a directory.
    fn serve(&self, dir: &str, provider: impl Provider) {
        let socket = Socket::bind(self.socket(dir)).unwrap();
        let server = Server::new(socket, provider).require_localhost();
        tokio::spawn(server.run(std::future::pending()));
    }

    async fn mount(&self, class: &str, wish: &str, within: Duration) -> Result<Reply> {
        mount(&self.providers, class, wish, within).await
    }
}

/// Asks for a first mount of a class, which is NAMESPACE/NAME, with one attribute for the provider.
async fn mount(providers: &Providers, class: &str, wish: &str, within: Duration) -> Result<Reply> {
    call(providers, class, wish, Urgency::FirstMount, within).await
}

async fn call(
    providers: &Providers,
    class: &str,
    wish: &str,
    urgency: Urgency,
    within: Duration,
) -> Result<Reply> {
    let (namespace, class) = class.split_once('/').unwrap();
    providers
        .mount(MountCall {
            provider: "test",
            namespace,
            class,
            attributes: json!({"wish": wish}).to_string().into(),
            with_tokens: false,
            secrets: "null".to_owned().into(),
            target: Path::new("/target"),
            current: &[],
            urgency,
            deadline: Instant::now() + within,
        })
        .await
}

fn refused(reply: Result<Reply>) -> Error {
    match reply {
        Ok(_) => panic!("the driver accepted the answer"),
        Err(error) => error,
    }
}

/// Returns the identity of a provider, whose content no test reads.
fn identity() -> Identity {
    Identity {
        name: "test".to_owned(),
        version: "1".to_owned(),
    }
}
