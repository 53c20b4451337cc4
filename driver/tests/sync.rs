//! What keeping Secrets costs and when it lets go, counted at an API server that is as small as
//! can be. Volumes are directories: only their content matters here.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::{
    collections::BTreeMap,
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
    cluster::{Class, Cluster},
    metrics::Metrics,
    sync::{Sync, Volume},
    volume::record::{Pod, Records},
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Between two looks of the driver.
const EVERY: Duration = Duration::from_millis(200);

/// Objects by path, and the requests so far.
type Stored = (BTreeMap<String, Value>, Vec<String>);

#[derive(Clone, Default)]
struct Api(Arc<Mutex<Stored>>);

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

    fn put(&self, path: &str, object: Value) {
        self.0.lock().unwrap().0.insert(path.to_owned(), object);
    }

    fn get(&self, path: &str) -> Option<Value> {
        self.0.lock().unwrap().0.get(path).cloned()
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().1)
    }

    fn put_class(&self, secret_objects: &Value, resource_version: &str) {
        let object = json!({
            "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
            "metadata": {
                "name": "db", "namespace": "shop", "uid": "class",
                "resourceVersion": resource_version,
            },
            "spec": {"provider": "test", "parameters": {"a": "b"}, "secretObjects": secret_objects},
        });
        self.put(CLASS, object);
    }

    fn pod(&self, name: &str, owner: Option<(&str, &str)>, phase: &str) {
        let owners = owner.map(|(kind, uid)| {
            json!([{"apiVersion": "x/v1", "kind": kind, "name": uid, "uid": uid, "controller": true}])
        });
        let object = json!({
            "metadata": {"name": name, "uid": format!("uid-{name}"), "ownerReferences": owners},
            "status": {"phase": phase},
        });
        self.put(&format!("/api/v1/namespaces/shop/pods/{name}"), object);
    }

    /// UIDs of the owners of the Secret.
    fn owners(&self) -> Vec<String> {
        let secret = self.get(SECRET).unwrap();
        let owners = secret["metadata"]["ownerReferences"].as_array().unwrap();
        let uid = |owner: &Value| owner["uid"].as_str().unwrap().to_owned();
        owners.iter().map(uid).collect()
    }
}

const SECRET: &str = "/api/v1/namespaces/shop/secrets/creds";
const CLASS: &str = "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasses/db";

async fn answer(
    State(api): State<Api>,
    method: Method,
    uri: Uri,
    body: Bytes,
) -> (StatusCode, String) {
    let refusal = |code: StatusCode| {
        let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
            "code": code.as_u16(), "reason": "x", "message": "no"});
        (code, status.to_string())
    };
    let mut state = api.0.lock().unwrap();
    let (objects, requests) = &mut *state;
    requests.push(format!("{method} {uri}"));
    let path = uri.path().to_owned();
    match method {
        Method::GET => match objects.get(&path) {
            Some(object) => (StatusCode::OK, object.to_string()),
            None => refusal(StatusCode::NOT_FOUND),
        },
        Method::POST if path.ends_with("/secrets") => {
            if objects.contains_key(SECRET) {
                return refusal(StatusCode::CONFLICT);
            }
            let mut object: Value = serde_json::from_slice(&body).unwrap();
            object["metadata"]["resourceVersion"] = json!("1");
            objects.insert(SECRET.to_owned(), object.clone());
            (StatusCode::CREATED, object.to_string())
        }
        Method::PATCH => {
            let object = objects.get_mut(&path).unwrap();
            let patch: Value = serde_json::from_slice(&body).unwrap();
            let owners = &patch["metadata"]["ownerReferences"];
            if !owners.is_null() {
                object["metadata"]["ownerReferences"] = owners.clone();
            }
            (StatusCode::OK, object.to_string())
        }
        _ => (StatusCode::CREATED, "{}".to_owned()),
    }
}

/// A class in the API, and as the driver reads it.
async fn class(api: &Api, cluster: &Cluster, secret_objects: Value) -> Class {
    api.put_class(&secret_objects, "1");
    let class = cluster.class("shop", "db").await.unwrap();
    api.requests();
    class
}

fn creds() -> Value {
    json!([{"secretName": "creds", "type": "Opaque", "data": [{"objectName": "pw", "key": "pw"}]}])
}

fn volume(dir: &Path, pod: &str) -> Volume {
    let target = dir.join(pod);
    fs::create_dir(&target).unwrap();
    fs::write(target.join("pw"), "hunter2").unwrap();
    Volume {
        id: format!("csi-{pod}"),
        pod: Pod {
            name: pod.to_owned(),
            namespace: "shop".to_owned(),
            uid: format!("uid-{pod}"),
        },
        target,
        pod_status: format!("{pod}-shop-db"),
    }
}

fn run(sync: &Arc<Sync>, dir: &Path) -> CancellationToken {
    let (sync, stop) = (Arc::clone(sync), CancellationToken::new());
    let (records, ended) = (Records::open(dir.join("records")).unwrap(), stop.clone());
    tokio::spawn(async move { sync.run(&records, ended).await });
    stop
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "waited for {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Nothing when it is mounted, and one look at the class in an interval; so that the Secrets that
/// it gets later are made for the pods that mount it already, and live with them.
#[tokio::test]
async fn a_class_that_gets_its_first_secrets() {
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let class = class(&api, &cluster, json!([])).await;
    let sync = Arc::new(Sync::new(cluster.clone(), Metrics::new(), false, EVERY));
    for name in ["web", "other"] {
        api.pod(name, Some(("ReplicaSet", name)), "Running");
        let volume = volume(dir.path(), name);
        sync.volume_mounted(&volume, &class).await.unwrap();
    }
    assert_eq!(api.requests(), Vec::<String>::new());
    let stop = run(&sync, dir.path());
    tokio::time::sleep(EVERY * 5).await;
    let requests = api.requests();
    assert!((3..=8).contains(&requests.len()), "{requests:?}");
    for request in requests {
        assert!(
            request.starts_with("GET") && request.contains("secretproviderclasses/db"),
            "{request}"
        );
    }
    api.put_class(&creds(), "2");
    until("the Secret is there", || api.get(SECRET).is_some()).await;
    assert_eq!(api.owners(), ["other", "web"]);
    stop.cancel();
}

/// Fifty at once: one write; each reads its pod and the Secret. At rest one look at the Secret
/// and one at the class in an interval, however many volumes there are.
#[tokio::test]
async fn fifty_volumes_at_once_and_at_rest() {
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let class = class(&api, &cluster, creds()).await;
    let sync = Arc::new(Sync::new(cluster, Metrics::new(), false, EVERY * 10));
    let volumes: Vec<_> = (0..50)
        .map(|number| volume(dir.path(), &format!("web-{number}")))
        .collect();
    let mut mounting = tokio::task::JoinSet::new();
    for volume in &volumes {
        api.pod(&volume.pod.name, Some(("ReplicaSet", "rs")), "Pending");
        let (sync, class, volume) = (Arc::clone(&sync), class.clone(), volume.clone());
        mounting.spawn(async move { sync.volume_mounted(&volume, &class).await });
    }
    while let Some(mounted) = mounting.join_next().await {
        mounted.unwrap().unwrap();
    }
    let requests = api.requests();
    let count = |part: &str| requests.iter().filter(|r| r.starts_with(part)).count();
    assert_eq!((count("GET"), count("POST"), count("PATCH")), (100, 1, 0));
    assert_eq!(api.owners(), ["rs"]);
    let stop = run(&sync, dir.path());
    tokio::time::sleep(EVERY * 50).await;
    let requests = api.requests();
    // Five intervals, of two looks each, with their jitter.
    assert!((8..=14).contains(&requests.len()), "{requests:?}");
    for request in requests {
        assert!(
            request.starts_with("GET") && request.ends_with("resourceVersion=0"),
            "{request}"
        );
    }
    stop.cancel();
}

/// A bare pod that has ended keeps its object and its pod status; it lets go of the Secret that
/// another lives with, and never of one that has no other owner.
#[tokio::test]
async fn pods_that_have_ended_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let class = class(&api, &cluster, creds()).await;
    let sync = Arc::new(Sync::new(cluster, Metrics::new(), false, EVERY));
    let (bare, web) = (volume(dir.path(), "bare"), volume(dir.path(), "web"));
    api.pod("bare", None, "Running");
    api.put(
        "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasspodstatuses/bare-shop-db",
        json!({"metadata": {"uid": "status"}}),
    );
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    sync.volume_mounted(&bare, &class).await.unwrap();
    assert_eq!(api.owners(), ["status"]);
    sync.volume_mounted(&web, &class).await.unwrap();
    assert_eq!(api.owners(), ["status", "rs"]);
    let stop = run(&sync, dir.path());
    api.pod("bare", None, "Succeeded");
    fs::remove_dir_all(&bare.target).unwrap();
    sync.forget(&bare.id);
    until("the ended pod lets go", || api.owners() == ["rs"]).await;
    // The Secret of the last is left to the collector.
    api.pod("web", Some(("Job", "rs")), "Succeeded");
    fs::remove_dir_all(&web.target).unwrap();
    sync.forget(&web.id);
    api.requests();
    until("it is looked after", || {
        let requests = api.0.lock().unwrap().1.clone();
        requests
            .iter()
            .any(|request| request.contains("/secrets/creds"))
    })
    .await;
    assert_eq!(api.owners(), ["rs"]);
    stop.cancel();
}

/// A pod that is going away does not get its Secret again.
#[tokio::test]
async fn nobody_makes_secrets_for_pods_that_go() {
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let class = class(&api, &cluster, creds()).await;
    let sync = Arc::new(Sync::new(cluster, Metrics::new(), false, EVERY));
    let web = volume(dir.path(), "web");
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    sync.volume_mounted(&web, &class).await.unwrap();
    let pod = "/api/v1/namespaces/shop/pods/web";
    let mut going = api.get(pod).unwrap();
    going["metadata"]["deletionTimestamp"] = json!("2026-11-23T10:00:00Z");
    api.put(pod, going);
    api.0.lock().unwrap().0.remove(SECRET);
    let stop = run(&sync, dir.path());
    tokio::time::sleep(EVERY * 5).await;
    assert!(api.get(SECRET).is_none());
    // Alive again, as if it had never gone.
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    until("the Secret is there", || api.get(SECRET).is_some()).await;
    stop.cancel();
}
