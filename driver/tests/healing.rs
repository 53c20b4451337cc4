//! Tests that failures in one namespace do not delay the Secrets and events of others. The API server
//! is a minimal one that behaves differently for each namespace.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "sync/volumes.rs"]
mod volumes;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::Ipv4Addr,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{Method, StatusCode, Uri},
};
use driver::{
    cluster::{Class, Cluster, events::Severity, pod_status::DesiredPodStatus},
    metrics::Metrics,
    mount::Tmpfs,
    record::{Pod, Record},
    sync::{Options, SecretSync},
};
use rstest::rstest;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    time::{sleep, timeout},
};
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
struct Objects {
    tempers: BTreeMap<String, Temper>,
    /// The namespaces whose Secret exists.
    secrets: BTreeSet<String>,
    /// The messages of events, with their namespaces.
    events: Vec<(String, String)>,
    /// Whether no request is answered at all.
    away: bool,
    requests: usize,
    /// The number of events that have been refused.
    refused_events: usize,
}

#[derive(Clone, Default)]
struct Api(Arc<Mutex<Objects>>);

impl Api {
    async fn start(dir: &Path) -> (Self, Cluster) {
        let api = Self::default();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let server = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(answer).with_state(api.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {}}],
        });
        let path = dir.join("kubeconfig");
        fs::write(&path, kubeconfig.to_string()).unwrap();
        (api, Cluster::new(Some(path), "test", "node-1"))
    }

    fn set(&self, namespace: &str, temper: Temper) {
        let mut objects = self.0.lock().unwrap();
        objects.tempers.insert(namespace.to_owned(), temper);
    }

    fn events(&self, namespace: &str) -> Vec<String> {
        let objects = self.0.lock().unwrap();
        let of_namespace = objects.events.iter().filter(|(ns, _)| ns == namespace);
        of_namespace.map(|(_, message)| message.clone()).collect()
    }

    /// Deletes the Secret of a namespace and waits until it is there again.
    async fn heals(&self, namespace: &str) {
        self.0.lock().unwrap().secrets.remove(namespace);
        let healed = async {
            while !self.0.lock().unwrap().secrets.contains(namespace) {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let healed = timeout(SOON, healed).await;
        assert!(healed.is_ok(), "the Secret of {namespace} stays away");
    }
}

fn status(code: u16) -> (StatusCode, String) {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "code": code, "reason": "x", "message": "failed calling webhook"});
    (StatusCode::from_u16(code).unwrap(), status.to_string())
}

fn secret(namespace: &str, going: bool) -> Value {
    let object = json!({
        "metadata": {
            "name": "creds", "namespace": namespace, "uid": "s", "resourceVersion": "1",
            "deletionTimestamp": going.then_some("2026-11-23T10:00:00Z"),
            "labels": {"secrets-store.csi.k8s.io/managed": "true"},
        },
        "type": "Opaque", "data": {"pw": "aHVudGVyMg=="},
    });
    object
}

async fn answer(
    State(api): State<Api>,
    method: Method,
    uri: Uri,
    body: Bytes,
) -> (StatusCode, String) {
    let path = uri.path().to_owned();
    let parts: Vec<&str> = path.split('/').collect();
    let namespace = parts
        .iter()
        .skip_while(|part| **part != "namespaces")
        .nth(1);
    let namespace = namespace.unwrap().to_string();
    let (temper, away) = {
        let mut objects = api.0.lock().unwrap();
        objects.requests += 1;
        let temper = objects.tempers.get(&namespace).copied();
        (temper.unwrap_or(Temper::Good), objects.away)
    };
    if away {
        // Closes the connection, without any output of the test.
        std::panic::resume_unwind(Box::new("away"));
    }
    if method == Method::GET {
        return match parts.last().copied() {
            Some("creds") if matches!(temper, Temper::HeldByAFinalizer) => {
                (StatusCode::OK, secret(&namespace, true).to_string())
            }
            Some("creds") if api.0.lock().unwrap().secrets.contains(&namespace) => {
                (StatusCode::OK, secret(&namespace, false).to_string())
            }
            Some("creds") => status(404),
            Some("db") => (StatusCode::OK, class(&namespace).to_string()),
            _ => {
                let owner = json!({"apiVersion": "x/v1", "kind": "Set", "name": "rs", "uid": "rs"});
                let pod = json!({
                    "metadata": {"name": "web", "uid": "web", "ownerReferences": [owner]},
                    "status": {"phase": "Running"},
                });
                (StatusCode::OK, pod.to_string())
            }
        };
    }
    match temper {
        Temper::Hangs => std::future::pending().await,
        Temper::Refuses(code) => {
            if path.ends_with("/events") {
                api.0.lock().unwrap().refused_events += 1;
            }
            status(code)
        }
        Temper::Good | Temper::HeldByAFinalizer => {
            let mut object: Value = serde_json::from_slice(&body).unwrap();
            let mut objects = api.0.lock().unwrap();
            match object["message"].take() {
                Value::String(message) => objects.events.push((namespace, message)),
                _ => drop(objects.secrets.insert(namespace)),
            }
            (
                StatusCode::CREATED,
                String::from_utf8(body.to_vec()).unwrap(),
            )
        }
    }
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

async fn mount(sync: &Arc<SecretSync>, cluster: &Cluster, dir: &Path, namespace: &str) {
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
            errors_fail_publish: false,
            interval: EVERY,
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
        mount(&sync, &cluster, dir.path(), namespace).await;
    }
    mount(&sync, &cluster, dir.path(), "quiet").await;
    let stop = run(&sync);
    for namespace in &troubled {
        api.set(namespace, temper);
        api.0.lock().unwrap().secrets.remove(namespace);
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
        mount(&sync, &cluster, dir.path(), &format!("shop-{number}")).await;
    }
    let stop = run(&sync);
    api.heals("shop-7").await;
    api.0.lock().unwrap().away = true;
    sleep(Duration::from_secs(2)).await;
    assert!(cluster.is_away());
    api.0.lock().unwrap().requests = 0;
    sleep(Duration::from_secs(8)).await;
    // Between two checks there are waits of at least half of two, four and eight seconds.
    let requests = api.0.lock().unwrap().requests;
    assert!(requests < 30, "{requests}");
    api.0.lock().unwrap().away = false;
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
    let sync = sync(dir.path(), &cluster);
    let data = json!([{"objectName": "nowhere", "key": "pw"}]);
    let entries = json!([{"secretName": "creds", "type": "Opaque", "data": data}]);
    let class = Class {
        secret_objects: serde_json::from_value(entries).unwrap(),
        ..cluster.class("shop", "db").await.unwrap()
    };
    let volume = volume(dir.path(), "shop");
    api.set("shop", Temper::Refuses(code));
    let told = async {
        while api.events("shop").is_empty() {
            sync.volume_mounted(&volume, &class).await.unwrap();
            if api.0.lock().unwrap().refused_events >= attempts {
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
    let sync = sync(dir.path(), &cluster);
    let entry = |n: usize| {
        let data = json!([{"objectName": "nowhere", "key": "pw"}]);
        json!({"secretName": format!("secret-{n}"), "type": "Opaque", "data": data})
    };
    let entries = Value::from_iter((0..SECRETS).map(entry));
    let class = Class {
        secret_objects: serde_json::from_value(entries).unwrap(),
        ..cluster.class("shop", "db").await.unwrap()
    };
    for number in 0..PODS {
        let volume = Record {
            volume_id: format!("csi-{number}"),
            ..volume(dir.path(), "shop")
        };
        sync.volume_mounted(&volume, &class).await.unwrap();
    }
    let told = async {
        loop {
            for number in 0..PODS {
                let volume = Record {
                    volume_id: format!("csi-{number}"),
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
                pod: &pod,
                class: "db",
                target_path: "/target",
                node: "node-1",
                objects: &[],
                changed: None,
            };
            cluster.write_pod_status(&mounted, None).await.map(drop)
        });
    }
    let since = Instant::now();
    while api.0.lock().unwrap().requests < 8 {
        assert!(since.elapsed() < SOON);
        sleep(Duration::from_millis(10)).await;
    }
    for _ in 0..5 {
        // Far less than a request may take, on a busy machine.
        let class = timeout(Duration::from_secs(10), cluster.class("good", "db")).await;
        assert!(class.expect("it waits for the others").is_ok());
        assert!(!cluster.is_away());
    }
}
