//! Tests that failures in one namespace do not delay the Secrets and events of others. The API server
//! behaves differently for each namespace.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "api/server.rs"]
mod server;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "sync/volumes.rs"]
mod volumes;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use driver::{
    cluster::{
        Class, Cluster, events::Severity, interval::Intervals, pod_status::DesiredPodStatus,
    },
    metrics::Metrics,
    mount::Tmpfs,
    record::{Pod, Record},
    sync::{Options, SecretSync},
};
use embedded::api::{ApiServer, Call, Reaction};
use rstest::rstest;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// The interval between two checks of the driver.
const EVERY: Duration = Duration::from_millis(200);
/// The time limit for things that happen at once, on a machine that may be busy.
const SOON: Duration = Duration::from_secs(120);

/// The way in which the API server answers writes in a namespace.
#[derive(Debug, Clone, Copy)]
enum Temper {
    /// It accepts them.
    Good,
    /// It answers with this code.
    Refuses(u16),
    /// It never answers.
    Hangs,
    /// It has a Secret that is being deleted, and stays.
    HeldByAFinalizer,
}

#[derive(Default)]
struct Behavior {
    tempers: BTreeMap<String, Temper>,
    /// Whether no request is answered at all.
    away: bool,
    requests: usize,
    /// The number of events that have been refused.
    refused_events: usize,
}

struct Api {
    server: ApiServer,
    behavior: Arc<Mutex<Behavior>>,
}

impl Api {
    async fn start(dir: &Path) -> (Self, Cluster) {
        let (server, cluster) = server::start(dir).await;
        let behavior = Arc::<Mutex<Behavior>>::default();
        let current = Arc::clone(&behavior);
        server.intercept(move |call| current.lock().unwrap().react(call));
        (Self { server, behavior }, cluster)
    }

    /// Creates a namespace with a class and a pod.
    fn put_namespace(&self, namespace: &str) {
        server::put_namespace(&self.server, namespace);
        let class_path = format!(
            "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/{namespace}/secretproviderclasses/db"
        );
        self.server.put(&class_path, class(namespace)).unwrap();
        let owner = json!({"apiVersion": "x/v1", "kind": "Set", "name": "rs", "uid": "rs"});
        let pod = json!({
            "metadata": {"name": "web", "uid": "web", "ownerReferences": [owner]},
            "status": {"phase": "Running"},
        });
        let pod_path = format!("/api/v1/namespaces/{namespace}/pods/web");
        self.server.put(&pod_path, pod).unwrap();
    }

    fn set(&self, namespace: &str, temper: Temper) {
        let mut behavior = self.behavior.lock().unwrap();
        behavior.tempers.insert(namespace.to_owned(), temper);
    }

    /// Returns the messages of the events in a namespace.
    fn events(&self, namespace: &str) -> Vec<String> {
        let events = self.server.all("events").into_iter();
        let of_namespace = events.filter(|event| event["metadata"]["namespace"] == namespace);
        of_namespace
            .map(|event| event["message"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Deletes the Secret of a namespace and waits until it is there again.
    async fn heals(&self, namespace: &str) {
        let path = secret_path(namespace);
        self.server.remove(&path);
        let healed = async {
            while self.server.get(&path).is_none() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let healed = timeout(SOON, healed).await;
        assert!(healed.is_ok(), "the Secret of {namespace} stays away");
    }

    /// Changes the Secret of a namespace to one that is being deleted, and stays.
    fn hold_by_a_finalizer(&self, namespace: &str) {
        let path = secret_path(namespace);
        let mut secret = self.server.get(&path).unwrap();
        secret["metadata"]["finalizers"] = json!(["example.com/stays"]);
        secret["metadata"]["deletionTimestamp"] = json!("2026-11-23T10:00:00Z");
        self.server.put(&path, secret).unwrap();
    }
}

impl Behavior {
    fn react(&mut self, call: &Call<'_>) -> Reaction {
        self.requests += 1;
        if self.away {
            return Reaction::Close;
        }
        let mut parts = call.uri.split('/').skip_while(|part| *part != "namespaces");
        let namespace = parts.nth(1).unwrap();
        match self.tempers.get(namespace) {
            Some(Temper::Hangs) if call.method != "GET" => Reaction::Hang,
            Some(Temper::Refuses(code)) if call.method != "GET" => {
                self.refused_events += usize::from(call.uri.contains("/events"));
                server::refuse(*code, "x", "failed calling webhook", None)
            }
            _ => Reaction::Serve,
        }
    }
}

fn secret_path(namespace: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/secrets/creds")
}

fn class(namespace: &str) -> Value {
    json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
        "metadata": {"name": "db", "namespace": namespace, "uid": namespace, "resourceVersion": "1"},
        "spec": {
            "provider": "test", "parameters": {"a": "b"},
            "secretObjects": [{
                "secretName": "creds", "type": "Opaque",
                "data": [{"objectName": "pw", "key": "pw"}],
            }],
        },
    })
}

async fn mount(api: &Api, sync: &Arc<SecretSync>, cluster: &Cluster, dir: &Path, namespace: &str) {
    api.put_namespace(namespace);
    let class = cluster.class(namespace, "db").await.unwrap();
    sync.volume_mounted(&volume(dir, namespace), &class)
        .await
        .unwrap();
}

/// Mounts and records the volume of a namespace's pod.
fn volume(dir: &Path, namespace: &str) -> Record {
    let target = volumes::target(dir, namespace);
    if !target.exists() {
        volumes::make_and_mount(&target);
    }
    volumes::write(&target, &[("pw", "hunter2")]);
    let record = Record {
        pod: Pod {
            name: "web".to_owned(),
            namespace: namespace.to_owned(),
            uid: "web".to_owned(),
        },
        ..volumes::record(dir, namespace, "0")
    };
    volumes::records(dir).put(&record).unwrap();
    record
}

fn sync(dir: &Path, cluster: &Cluster) -> Arc<SecretSync> {
    let (cluster, records) = (cluster.clone(), volumes::records(dir));
    let tmpfs = Arc::new(Tmpfs::bounded_by(1));
    Arc::new(SecretSync::new(
        cluster,
        records,
        tmpfs,
        Metrics::new(),
        Options {
            refreshes: true,
            errors_fail_publish: false,
            intervals: Intervals {
                refresh: EVERY,
                least: Duration::ZERO,
                sync: EVERY,
            },
        },
    ))
}

fn run(sync: &Arc<SecretSync>) -> CancellationToken {
    let (sync, stop) = (Arc::clone(sync), CancellationToken::new());
    let ended = stop.clone();
    tokio::spawn(async move { sync.run(ended).await });
    stop
}

/// The Secret of a namespace is created again each time that it is deleted, while checks of many
/// others fail for any reason.
#[rstest]
#[case::a_webhook_that_fails(Temper::Refuses(500), 12)]
#[case::too_many_requests(Temper::Refuses(429), 5)]
#[case::a_storm_of_conflicts(Temper::Refuses(409), 12)]
#[case::a_webhook_that_is_away(Temper::Refuses(503), 3)]
#[case::a_namespace_that_goes(Temper::Refuses(403), 3)]
#[case::a_webhook_that_hangs(Temper::Hangs, 12)]
#[case::a_finalizer(Temper::HeldByAFinalizer, 12)]
#[tokio::test]
async fn the_trouble_of_some_namespaces(#[case] temper: Temper, #[case] count: usize) {
    if !volumes::is_alone() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let sync = sync(dir.path(), &cluster);
    let troubled: Vec<String> = (0..count).map(|n| format!("a-troubled-{n}")).collect();
    for namespace in &troubled {
        mount(&api, &sync, &cluster, dir.path(), namespace).await;
    }
    mount(&api, &sync, &cluster, dir.path(), "quiet").await;
    let stop = run(&sync);
    for namespace in &troubled {
        api.set(namespace, temper);
        match temper {
            Temper::HeldByAFinalizer => api.hold_by_a_finalizer(namespace),
            _ => api.server.remove(&secret_path(namespace)),
        }
    }
    let all = async {
        for _ in 0..10 {
            api.heals("quiet").await;
        }
    };
    assert!(timeout(SOON, all).await.is_ok(), "ten in two minutes");
    assert!(!cluster.is_away());
    for namespace in &troubled {
        api.set(namespace, Temper::Good);
    }
    api.heals(&troubled[0]).await;
    stop.cancel();
}

/// A refresh writes the pod status before its record. A check that finds the pod status missing in between
/// writes the versions of the record from before, so the refresh has to learn of it.
#[tokio::test]
async fn a_refresh_learns_that_its_pod_status_was_written_meanwhile() {
    if !volumes::is_alone() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let sync = sync(dir.path(), &cluster);
    mount(&api, &sync, &cluster, dir.path(), "shop").await;
    let record = volume(dir.path(), "shop");
    assert!(!sync.take_status_written(&record.volume_id));
    let stop = run(&sync);
    let path = format!(
        "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasspodstatuses/{}",
        record.pod_status
    );
    for _ in 0..2 {
        let written = async {
            while api.server.get(&path).is_none() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        assert!(timeout(SOON, written).await.is_ok(), "{path} stays away");
        assert!(sync.take_status_written(&record.volume_id));
        assert!(!sync.take_status_written(&record.volume_id));
        api.server.remove(&path);
    }
    // What could not be corrected is tried again.
    sync.status_may_be_old(&record.volume_id);
    assert!(sync.take_status_written(&record.volume_id));
    stop.cancel();
}

/// The driver sends few requests for a while, and restores everything soon after the API server is back.
#[tokio::test]
async fn an_api_server_that_is_away_is_left_alone() {
    if !volumes::is_alone() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let sync = sync(dir.path(), &cluster);
    for number in 0..20 {
        mount(&api, &sync, &cluster, dir.path(), &format!("shop-{number}")).await;
    }
    let stop = run(&sync);
    api.heals("shop-7").await;
    api.behavior.lock().unwrap().away = true;
    sleep(Duration::from_secs(2)).await;
    assert!(cluster.is_away());
    api.behavior.lock().unwrap().requests = 0;
    sleep(Duration::from_secs(8)).await;
    // Between two checks there are waits of at least half of two, four and eight seconds.
    let requests = api.behavior.lock().unwrap().requests;
    assert!(requests < 30, "{requests}");
    api.behavior.lock().unwrap().away = false;
    api.heals("shop-7").await;
    stop.cancel();
}

/// Hundreds of events of one namespace are refused or get no answer.
#[rstest]
#[case::hangs(Temper::Hangs)]
#[case::refuses(Temper::Refuses(500))]
#[tokio::test]
async fn events_of_one_namespace_wait_for_themselves(#[case] temper: Temper) {
    if !volumes::is_alone() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    api.put_namespace("quiet");
    api.set("noisy", temper);
    let pod = |namespace: &str| volume(dir.path(), namespace).pod;
    let announce = |namespace: &str, message: &str| {
        cluster.announce(&pod(namespace), Severity::Normal, "Told", message, |_| {})
    };
    let accepted = (0..300).filter(|n| announce("noisy", &n.to_string()));
    let accepted = accepted.count();
    assert!((1..300).contains(&accepted), "{accepted}");
    for number in 0..20 {
        assert!(announce("quiet", &number.to_string()));
    }
    let posted = async {
        while api.events("quiet").len() < 20 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(
        timeout(SOON, posted).await.is_ok(),
        "{:?}",
        api.events("quiet")
    );
}

/// A pod is told of a lasting error once, however long the event was refused before: for one attempt
/// to post it, or for all of them, after which it is announced again.
#[rstest]
#[case::a_role_that_is_missing_for_a_moment(403, 1)]
#[case::a_webhook_that_fails_for_a_moment(500, 1)]
#[case::a_role_that_is_missing_until_posting_has_ended(403, 4)]
#[tokio::test]
async fn trouble_is_told_though_its_event_is_refused_for_a_while(
    #[case] code: u16,
    #[case] attempts: usize,
) {
    if !volumes::is_alone() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    api.put_namespace("shop");
    let sync = sync(dir.path(), &cluster);
    let data = json!([{"objectName": "nowhere", "key": "pw"}]);
    let entries = json!([{"secretName": "creds", "type": "Opaque", "data": data}]);
    let class = Class {
        secret_objects: serde_json::from_value::<Vec<_>>(entries).unwrap().into(),
        ..Class::clone(&*cluster.class("shop", "db").await.unwrap())
    };
    let volume = Record {
        class: class.identity.clone(),
        ..volume(dir.path(), "shop")
    };
    api.set("shop", Temper::Refuses(code));
    let told = async {
        while api.events("shop").is_empty() {
            sync.volume_mounted(&volume, &class).await.unwrap();
            if api.behavior.lock().unwrap().refused_events >= attempts {
                api.set("shop", Temper::Good);
            }
            sleep(EVERY).await;
        }
    };
    let told = timeout(2 * SOON, told).await;
    assert!(told.is_ok(), "it is never told");
    for _ in 0..5 {
        sync.volume_mounted(&volume, &class).await.unwrap();
        sleep(EVERY).await;
    }
    assert_eq!(api.events("shop").len(), 1);
}

/// With more errors than can be told at once, each pod is still told of each of them, once.
#[tokio::test]
async fn what_is_not_told_now_is_told_later() {
    if !volumes::is_alone() {
        return;
    }
    const SECRETS: usize = 90;
    const PODS: usize = 3;
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    api.put_namespace("shop");
    let sync = sync(dir.path(), &cluster);
    let entry = |n: usize| {
        let data = json!([{"objectName": "nowhere", "key": "pw"}]);
        json!({"secretName": format!("secret-{n}"), "type": "Opaque", "data": data})
    };
    let entries = Value::from_iter((0..SECRETS).map(entry));
    let class = Class {
        secret_objects: serde_json::from_value::<Vec<_>>(entries).unwrap().into(),
        ..Class::clone(&*cluster.class("shop", "db").await.unwrap())
    };
    for number in 0..PODS {
        let volume = Record {
            volume_id: format!("csi-{number}"),
            class: class.identity.clone(),
            ..volume(dir.path(), "shop")
        };
        sync.volume_mounted(&volume, &class).await.unwrap();
    }
    let told = async {
        loop {
            for number in 0..PODS {
                let volume = Record {
                    volume_id: format!("csi-{number}"),
                    class: class.identity.clone(),
                    ..volume(dir.path(), "shop")
                };
                sync.volume_mounted(&volume, &class).await.unwrap();
            }
            if api.events("shop").len() >= SECRETS * PODS {
                break;
            }
            sleep(EVERY).await;
        }
    };
    assert!(
        timeout(SOON, told).await.is_ok(),
        "{}",
        api.events("shop").len()
    );
    sleep(EVERY).await;
    let mut times: BTreeMap<String, usize> = BTreeMap::new();
    for message in api.events("shop") {
        *times.entry(message).or_default() += 1;
    }
    assert_eq!(times.len(), SECRETS);
    assert!(times.values().all(|times| *times == PODS), "{times:?}");
}

/// Requests take turns, so that a burst needs few connections. Requests that get no answer, because
/// of one namespace's webhook for example, delay no others.
#[tokio::test]
async fn requests_of_one_namespace_that_hang_hold_up_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    api.put_namespace("good");
    api.set("bad", Temper::Hangs);
    let mut hanging = tokio::task::JoinSet::new();
    for number in 0..100 {
        let cluster = cluster.clone();
        hanging.spawn(async move {
            let pod = Pod {
                name: format!("web-{number}"),
                namespace: "bad".to_owned(),
                uid: format!("uid-{number}"),
            };
            let mounted = DesiredPodStatus {
                volume_id: "csi-1",
                pod: &pod,
                class: "db",
                target_path: "/target",
                node: "node-1",
                objects: &[],
                new_order: None,
            };
            cluster.write_pod_status(&mounted, None).await.map(drop)
        });
    }
    let since = Instant::now();
    while api.behavior.lock().unwrap().requests < 8 {
        assert!(since.elapsed() < SOON);
        sleep(Duration::from_millis(10)).await;
    }
    for _ in 0..5 {
        // Far less than a request may take, on a busy machine.
        let class = timeout(Duration::from_secs(10), cluster.class("good", "db")).await;
        assert!(class.expect("it waits for the others").is_ok());
        assert!(!cluster.is_away());
    }
    // Once they hang, none of them makes a request wait for even a moment.
    while api.behavior.lock().unwrap().requests < 100 {
        assert!(since.elapsed() < SOON);
        sleep(Duration::from_millis(10)).await;
    }
    sleep(Duration::from_millis(1_500)).await;
    let begun = Instant::now();
    for _ in 0..20 {
        cluster.class("good", "db").await.unwrap();
    }
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "twenty reads took {took:?}");
}
