//! Calls to a provider on a real socket: how many at once, who waits, for whom one waits, and
//! what a refusal says about the next attempt.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use driver::{
    error::Result,
    metrics::Metrics,
    provider::{Limits, MountCall, Providers, Reply, Urgency},
};
use proto::provider::{
    MountRequest, MountResponse, ObjectVersion, VersionRequest, VersionResponse,
    csi_driver_provider_server::{CsiDriverProvider, CsiDriverProviderServer},
};
use tokio::{
    net::UnixListener,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, metadata::MetadataMap, transport::Server};

/// A provider that answers after a while, or refuses.
#[derive(Clone, Default)]
struct Provider {
    name: &'static str,
    takes: Duration,
    refusal: Option<Status>,
    in_flight: Arc<AtomicUsize>,
    peak: Arc<AtomicUsize>,
    calls: Arc<AtomicUsize>,
    version_calls: Arc<AtomicUsize>,
    seen: Arc<Mutex<Vec<MountRequest>>>,
}

#[tonic::async_trait]
impl CsiDriverProvider for Provider {
    async fn version(
        &self,
        _: Request<VersionRequest>,
    ) -> std::result::Result<Response<VersionResponse>, Status> {
        self.version_calls.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(VersionResponse {
            version: "v1alpha1".to_owned(),
            ..Default::default()
        }))
    }

    async fn mount(
        &self,
        request: Request<MountRequest>,
    ) -> std::result::Result<Response<MountResponse>, Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.peak.fetch_max(now, Ordering::SeqCst);
        sleep(self.takes).await;
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        self.seen.lock().unwrap().push(request.into_inner());
        if let Some(refusal) = &self.refusal {
            return Err(refusal.clone());
        }
        let object = ObjectVersion {
            id: "secret/object".to_owned(),
            version: self.name.to_owned(),
        };
        Ok(Response::new(MountResponse {
            object_version: vec![object],
            ..Default::default()
        }))
    }
}

impl Provider {
    /// Serves it as `test` in a directory.
    fn serve(&self, dir: &Path) -> JoinHandle<()> {
        let listener = UnixListener::bind(dir.join("test.sock")).unwrap();
        let service = CsiDriverProviderServer::new(self.clone());
        let server = Server::builder().add_service(service);
        let incoming = UnixListenerStream::new(listener);
        tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() })
    }
}

/// Directories as the driver has them by default: two, the first one searched first.
struct Node {
    dirs: tempfile::TempDir,
    metrics: Metrics,
}

impl Node {
    fn new() -> Self {
        let dirs = tempfile::tempdir().unwrap();
        for name in ["first", "last"] {
            fs::create_dir(dirs.path().join(name)).unwrap();
        }
        Self {
            dirs,
            metrics: Metrics::new(),
        }
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.dirs.path().join(name)
    }

    fn providers(&self, max_calls: usize) -> Arc<Providers> {
        let limits = Limits {
            max_calls,
            max_bytes: 64 << 20,
            max_message_bytes: 4 << 20,
        };
        let search = vec![self.dir("first"), self.dir("last")];
        Arc::new(Providers::new(search, limits, self.metrics.clone()))
    }
}

async fn mount(providers: &Providers, urgency: Urgency, within: Duration) -> Result<Reply> {
    providers
        .mount(MountCall {
            provider: "test",
            namespace: "shop",
            class: "db",
            attributes: "{}".to_owned().into(),
            with_tokens: false,
            secrets: "null".to_owned().into(),
            target: Path::new("/target"),
            current: &[],
            urgency,
            deadline: Instant::now() + within,
        })
        .await
}

const LONG: Duration = Duration::from_secs(60);

/// Whose answer it was.
fn answered_by(reply: Result<Reply>) -> String {
    match reply {
        Ok(reply) => reply.objects[0].version.clone(),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn a_burst_of_first_mounts_is_over_soon_with_the_default_bounds() {
    let node = Node::new();
    let provider = Provider {
        takes: Duration::from_millis(100),
        ..Provider::default()
    };
    provider.serve(&node.dir("last"));
    let providers = node.providers(16);
    let started = Instant::now();
    let mut burst = tokio::task::JoinSet::new();
    for _ in 0..110 {
        let providers = Arc::clone(&providers);
        burst.spawn(async move {
            answered_by(mount(&providers, Urgency::FirstMount, LONG).await);
        });
    }
    burst.join_all().await;
    let took = started.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    // A class that answers may have three quarters of the places.
    assert_eq!(provider.peak.load(Ordering::SeqCst), 12);
    assert_eq!(provider.calls.load(Ordering::SeqCst), 110);
    let page = node.metrics.render();
    let count = "call_duration_seconds_count{provider=\"test\",outcome=\"OK\"} 110";
    assert!(page.contains(count), "{page}");
}

#[tokio::test]
async fn a_call_that_waits_ends_at_its_deadline_and_leaves_its_place_when_it_is_dropped() {
    let node = Node::new();
    let provider = Provider {
        takes: Duration::from_millis(600),
        ..Provider::default()
    };
    provider.serve(&node.dir("last"));
    let providers = node.providers(1);
    let first = {
        let providers = Arc::clone(&providers);
        tokio::spawn(async move { mount(&providers, Urgency::Refresh, LONG).await.is_ok() })
    };
    while provider.calls.load(Ordering::SeqCst) == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    let dropped = mount(&providers, Urgency::FirstMount, LONG);
    assert!(timeout(Duration::from_millis(50), dropped).await.is_err());
    let waited = mount(&providers, Urgency::FirstMount, Duration::from_millis(100)).await;
    let error = waited.err().unwrap();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(
        error.to_string().contains("--provider-max-calls (1)"),
        "{error}"
    );

    let last = mount(&providers, Urgency::FirstMount, LONG).await;
    assert!(last.is_ok() && first.await.unwrap());
    assert_eq!(provider.calls.load(Ordering::SeqCst), 2, "neither was sent");
    let page = node.metrics.render();
    assert!(
        page.contains("calls_waiting{provider=\"test\"} 0"),
        "{page}"
    );
}

#[tokio::test]
async fn a_first_mount_waits_for_a_provider_that_starts_and_a_refresh_does_not() {
    let node = Node::new();
    let providers = node.providers(16);
    let started = Instant::now();
    let refresh = mount(&providers, Urgency::Refresh, LONG).await;
    let error = refresh.err().unwrap().to_string();
    assert!(error.contains("the sockets there are: none"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(1));

    let first = {
        let providers = Arc::clone(&providers);
        tokio::spawn(async move { mount(&providers, Urgency::FirstMount, LONG).await })
    };
    sleep(Duration::from_millis(300)).await;
    assert!(!first.is_finished());
    let provider = Provider {
        name: "late",
        ..Provider::default()
    };
    provider.serve(&node.dir("first"));
    assert_eq!(answered_by(first.await.unwrap()), "late");
}

#[tokio::test]
async fn the_wait_for_a_provider_ends_well_before_the_deadline() {
    let node = Node::new();
    fs::write(node.dir("last").join("other.sock"), "").unwrap();
    let providers = node.providers(16);
    let waited = async |within| {
        let started = Instant::now();
        let reply = mount(&providers, Urgency::FirstMount, within).await;
        let error = reply.err().unwrap().to_string();
        assert!(
            error.contains("the sockets there are: other.sock"),
            "{error}"
        );
        started.elapsed().as_secs()
    };
    let short = Duration::from_secs(4);
    let (long, short) = tokio::join!(waited(LONG), waited(short));
    assert!(
        (5..10).contains(&long) && (1..4).contains(&short),
        "{long} s, {short} s"
    );
}

#[tokio::test]
async fn a_socket_that_moved_or_was_replaced_is_noticed() {
    let node = Node::new();
    let provider = |name| Provider {
        name,
        ..Provider::default()
    };
    let providers = node.providers(16);
    provider("old").serve(&node.dir("last"));
    let ask = async || answered_by(mount(&providers, Urgency::Refresh, LONG).await);
    assert_eq!(ask().await, "old");

    // The old one still listens, on a socket that nobody finds any more.
    fs::remove_file(node.dir("last").join("test.sock")).unwrap();
    provider("replaced").serve(&node.dir("last"));
    assert_eq!(ask().await, "replaced");

    provider("moved").serve(&node.dir("first"));
    assert_eq!(ask().await, "moved");
    fs::remove_file(node.dir("first").join("test.sock")).unwrap();
    assert_eq!(ask().await, "replaced");
}

/// The same path, the same process id even, and nobody listens at first: what a crash leaves.
#[tokio::test]
async fn a_stale_socket_is_replaced_while_a_call_tries_again() {
    let node = Node::new();
    let path = node.dir("last").join("test.sock");
    drop(UnixListener::bind(&path).unwrap());
    let providers = node.providers(16);
    let asked = tokio::spawn(async move { mount(&providers, Urgency::FirstMount, LONG).await });
    sleep(Duration::from_millis(200)).await;
    fs::remove_file(&path).unwrap();
    let provider = Provider {
        name: "new",
        ..Provider::default()
    };
    provider.serve(&node.dir("last"));
    assert_eq!(answered_by(asked.await.unwrap()), "new");
}

#[tokio::test]
async fn a_provider_that_throttles_is_left_alone() {
    let node = Node::new();
    let mut metadata = MetadataMap::new();
    metadata.insert("grpc-retry-pushback-ms", "30000".parse().unwrap());
    let refusal = Status::with_metadata(Code::ResourceExhausted, "throttled", metadata);
    let provider = Provider {
        refusal: Some(refusal),
        ..Provider::default()
    };
    provider.serve(&node.dir("last"));
    let providers = node.providers(16);
    let error = mount(&providers, Urgency::FirstMount, LONG)
        .await
        .err()
        .unwrap();
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert_eq!(error.retry_after(), Some(Duration::from_secs(30)));
    assert_eq!(provider.calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_provider_that_is_away_for_long_is_not_waited_for_in_the_call() {
    let node = Node::new();
    let mut metadata = MetadataMap::new();
    metadata.insert("grpc-retry-pushback-ms", "30000".parse().unwrap());
    let provider = Provider {
        refusal: Some(Status::with_metadata(Code::Unavailable, "sealed", metadata)),
        ..Provider::default()
    };
    provider.serve(&node.dir("last"));
    let providers = node.providers(16);
    let started = Instant::now();
    let error = mount(&providers, Urgency::Refresh, LONG)
        .await
        .err()
        .unwrap();
    assert_eq!(error.retry_after(), Some(Duration::from_secs(30)));
    assert_eq!(provider.calls.load(Ordering::SeqCst), 1);
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn the_health_check_asks_every_provider_again_and_again() {
    let node = Node::new();
    let provider = Provider::default();
    provider.serve(&node.dir("first"));
    // Nobody listens on it, and it holds up nothing.
    drop(UnixListener::bind(node.dir("last").join("dead.sock")).unwrap());
    let providers = node.providers(16);
    let stop = CancellationToken::new();
    let watching = {
        let (providers, stop) = (Arc::clone(&providers), stop.clone());
        tokio::spawn(async move { providers.watch_health(Duration::ZERO, stop).await })
    };
    let started = Instant::now();
    while provider.version_calls.load(Ordering::SeqCst) < 2 {
        assert!(started.elapsed() < Duration::from_secs(20));
        sleep(Duration::from_millis(20)).await;
    }
    assert!(started.elapsed() > Duration::from_millis(900), "too often");
    stop.cancel();
    timeout(Duration::from_secs(1), watching)
        .await
        .unwrap()
        .unwrap();
}
