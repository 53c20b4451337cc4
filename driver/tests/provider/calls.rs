//! Checks how many calls a provider has at once, which calls wait, and when the driver tries again.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use driver::{
    error::Result,
    provider::{Providers, Reply, Urgency},
};
use fake_provider::server::{Code, Failure, Identity, MountResponse, Object, Provider, Request};
use tokio::{
    net::UnixListener,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, metadata::MetadataMap};

use crate::{LONG, Node, call, identity, refused};

/// A provider that answers after a while, or refuses.
#[derive(Clone, Default)]
struct Slow {
    name: &'static str,
    takes: Duration,
    refusal: Option<Status>,
    in_flight: Arc<AtomicUsize>,
    peak: Arc<AtomicUsize>,
    calls: Arc<AtomicUsize>,
    version_calls: Arc<AtomicUsize>,
}

impl Provider for Slow {
    fn identity(&self) -> Identity {
        self.version_calls.fetch_add(1, Ordering::SeqCst);
        identity()
    }

    async fn mount(&self, _: Request) -> Result<MountResponse, Failure> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.peak.fetch_max(now, Ordering::SeqCst);
        sleep(self.takes).await;
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        if let Some(refusal) = &self.refusal {
            return Err(Failure::Status(refusal.clone()));
        }
        let object = Object {
            id: "secret/object".to_owned(),
            version: self.name.to_owned(),
            path: "object".to_owned(),
            ..Object::default()
        };
        Ok([object].into_iter().collect())
    }
}

async fn mount(providers: &Providers, urgency: Urgency, within: Duration) -> Result<Reply> {
    call(providers, "shop/db", "", urgency, within).await
}

/// Returns the name of the provider that answered.
fn answered_by(reply: Result<Reply>) -> String {
    match reply {
        Ok(reply) => reply.objects[0].version.clone(),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn a_burst_of_first_mounts_is_over_soon_with_the_default_bounds() {
    let node = Node::new(16);
    let provider = Slow {
        takes: Duration::from_millis(100),
        ..Slow::default()
    };
    node.serve("last", provider.clone());
    let providers = Arc::clone(&node.providers);
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
    // A class that was answered may have three quarters of the places.
    assert_eq!(provider.peak.load(Ordering::SeqCst), 12);
    assert_eq!(provider.calls.load(Ordering::SeqCst), 110);
    let page = node.metrics.render();
    let count = "call_duration_seconds_count{provider=\"test\",outcome=\"OK\"} 110";
    assert!(page.contains(count), "{page}");
}

#[tokio::test]
async fn a_call_that_waits_ends_at_its_deadline_and_leaves_its_place_when_it_is_dropped() {
    let node = Node::new(1);
    let provider = Slow {
        takes: Duration::from_millis(600),
        ..Slow::default()
    };
    node.serve("last", provider.clone());
    let providers = Arc::clone(&node.providers);
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
    let error = refused(waited);
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(
        error.to_string().contains("--provider-max-calls (1)"),
        "{error}"
    );

    let last = mount(&providers, Urgency::FirstMount, LONG).await;
    assert!(last.is_ok() && first.await.unwrap());
    assert_eq!(
        provider.calls.load(Ordering::SeqCst),
        2,
        "one of the others was sent"
    );
    let page = node.metrics.render();
    assert!(
        page.contains("calls_waiting{provider=\"test\"} 0"),
        "{page}"
    );
}

#[tokio::test]
async fn a_first_mount_waits_for_a_provider_that_starts_and_a_refresh_does_not() {
    let node = Node::new(16);
    let providers = Arc::clone(&node.providers);
    let started = Instant::now();
    let refresh = mount(&providers, Urgency::Refresh, LONG).await;
    let error = refused(refresh).to_string();
    assert!(error.contains("the sockets there are: none"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(1));

    let first = {
        let providers = Arc::clone(&providers);
        tokio::spawn(async move { mount(&providers, Urgency::FirstMount, LONG).await })
    };
    sleep(Duration::from_millis(300)).await;
    assert!(!first.is_finished());
    let provider = Slow {
        name: "late",
        ..Slow::default()
    };
    node.serve("first", provider.clone());
    assert_eq!(answered_by(first.await.unwrap()), "late");
}

#[tokio::test]
async fn the_wait_for_a_provider_ends_well_before_the_deadline() {
    let node = Node::new(16);
    fs::write(node.socket("last").with_file_name("other.sock"), "").unwrap();
    let providers = Arc::clone(&node.providers);
    let waited = async |within| {
        let started = Instant::now();
        let reply = mount(&providers, Urgency::FirstMount, within).await;
        let error = refused(reply).to_string();
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
    let node = Node::new(16);
    let provider = |name| Slow {
        name,
        ..Slow::default()
    };
    let providers = Arc::clone(&node.providers);
    node.serve("last", provider("old"));
    let ask = async || answered_by(mount(&providers, Urgency::Refresh, LONG).await);
    assert_eq!(ask().await, "old");

    // The old provider still listens, on a socket that has no name any more.
    fs::remove_file(node.socket("last")).unwrap();
    node.serve("last", provider("replaced"));
    assert_eq!(ask().await, "replaced");

    node.serve("first", provider("moved"));
    assert_eq!(ask().await, "moved");
    fs::remove_file(node.socket("first")).unwrap();
    assert_eq!(ask().await, "replaced");
}

/// A provider crashed and left its socket, on which no process listens, and starts again.
#[tokio::test]
async fn a_stale_socket_is_replaced_while_a_call_tries_again() {
    let node = Node::new(16);
    let path = node.socket("last");
    drop(UnixListener::bind(&path).unwrap());
    let providers = Arc::clone(&node.providers);
    let asked = tokio::spawn(async move { mount(&providers, Urgency::FirstMount, LONG).await });
    sleep(Duration::from_millis(200)).await;
    fs::remove_file(&path).unwrap();
    let provider = Slow {
        name: "new",
        ..Slow::default()
    };
    node.serve("last", provider.clone());
    assert_eq!(answered_by(asked.await.unwrap()), "new");
}

#[tokio::test]
async fn a_provider_that_throttles_is_left_alone() {
    let node = Node::new(16);
    let mut metadata = MetadataMap::new();
    metadata.insert("grpc-retry-pushback-ms", "30000".parse().unwrap());
    let refusal = Status::with_metadata(Code::ResourceExhausted, "throttled", metadata);
    let provider = Slow {
        refusal: Some(refusal),
        ..Slow::default()
    };
    node.serve("last", provider.clone());
    let providers = Arc::clone(&node.providers);
    let error = refused(mount(&providers, Urgency::FirstMount, LONG).await);
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert_eq!(error.retry_after(), Some(Duration::from_secs(30)));
    assert_eq!(provider.calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_provider_that_is_away_for_long_is_not_waited_for_in_the_call() {
    let node = Node::new(16);
    let mut metadata = MetadataMap::new();
    metadata.insert("grpc-retry-pushback-ms", "30000".parse().unwrap());
    let provider = Slow {
        refusal: Some(Status::with_metadata(Code::Unavailable, "sealed", metadata)),
        ..Slow::default()
    };
    node.serve("last", provider.clone());
    let providers = Arc::clone(&node.providers);
    let started = Instant::now();
    for (calls, urgency) in [(1, Urgency::Refresh), (2, Urgency::FirstMount)] {
        let error = refused(mount(&providers, urgency, LONG).await);
        assert_eq!(error.retry_after(), Some(Duration::from_secs(30)));
        assert_eq!(provider.calls.load(Ordering::SeqCst), calls);
    }
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn the_health_check_asks_every_provider_again_and_again() {
    let node = Node::new(16);
    let provider = Slow::default();
    node.serve("first", provider.clone());
    // No process listens on this socket, which must not delay the others.
    drop(UnixListener::bind(node.socket("last").with_file_name("dead.sock")).unwrap());
    let providers = Arc::clone(&node.providers);
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
