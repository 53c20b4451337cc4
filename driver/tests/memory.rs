//! What is remembered of classes does not grow with what their authors write into them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::{
    collections::BTreeMap, env, fs, net::Ipv4Addr, path::Path, process::Command, time::Duration,
};

use axum::{
    Router,
    http::{StatusCode, Uri},
};
use driver::{
    cluster::Cluster,
    metrics::Metrics,
    sync::Sync,
    volume::record::{Content, Pod, Record, Records},
};
use jiff::Timestamp;
use rstest::rstest;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;

const CHILD: &str = "A_CHILD_THAT_MEASURES_ITS_MEMORY";
const CLASSES: usize = 60;
/// How many classes come first. The server in this process makes each class up and lets go of it;
/// after so many, the holes that this leaves in the heap are as large as they get.
const FIRST: usize = 40;
/// What a class is large by. An object of the API has at most a megabyte and a half.
const LARGE: usize = 900 * 1024;

/// A map of strings that has about so many bytes.
fn map_of(bytes: usize, prefix: &str, each: usize) -> Value {
    let entries = (0..bytes / each).map(|n| (format!("{prefix}{n}"), "x".repeat(each).into()));
    Value::Object(entries.collect::<Map<_, _>>())
}

/// A class that is large by one of its parts.
fn class(name: &str, large: &str) -> Value {
    let mut annotations = json!({});
    let mut parameters = json!({"a": "b"});
    let mut objects = json!([]);
    let entry = |n: usize| json!({"objectName": "nowhere", "key": format!("key-{n}")});
    let secret = |n: usize, data: Value| json!({"secretName": format!("s{n}"), "type": "Opaque", "data": data});
    match large {
        "one_parameter" => parameters["a"] = "x".repeat(LARGE).into(),
        "parameters" => parameters = map_of(LARGE, "p", 100),
        "our_annotations" => {
            annotations = map_of(LARGE, "secrets-store.csi.k8s.io/a", 1000);
        }
        "one_annotation" => {
            annotations["secrets-store.csi.k8s.io/refresh"] = "x".repeat(LARGE).into();
        }
        "annotations" => annotations = map_of(LARGE, "a", 1000),
        "entries" => objects = json!([secret(0, (0..LARGE / 45).map(entry).collect())]),
        "secrets" => objects = (0..LARGE / 60).map(|n| secret(n, json!([]))).collect(),
        "labels" => {
            objects = json!([secret(0, json!([entry(0)]))]);
            objects[0]["labels"] = map_of(LARGE, "l", 60);
        }
        other => panic!("no part {other}"),
    }
    json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
        "metadata": {
            "name": name, "namespace": "shop", "uid": name, "resourceVersion": "1",
            "annotations": annotations,
        },
        "spec": {"provider": "test", "parameters": parameters, "secretObjects": objects},
    })
}

/// An API server that makes up each class when it is asked, and takes whatever is written.
async fn cluster(dir: &Path, large: &'static str) -> Cluster {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let server = format!("http://{}", listener.local_addr().unwrap());
    let answer = async move |uri: Uri| {
        let name = uri.path().rsplit('/').next().unwrap().to_owned();
        match name.starts_with("class-") {
            true => (StatusCode::OK, class(&name, large).to_string()),
            false => (StatusCode::OK, "{}".to_owned()),
        }
    };
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {}}],
    });
    let path = dir.join("kubeconfig");
    fs::write(&path, kubeconfig.to_string()).unwrap();
    Cluster::new(Some(path), "test", "node-1")
}

/// The memory that this process has now, in KiB.
fn memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let digits = line.unwrap().split_whitespace().nth(1);
    digits.unwrap().parse().unwrap()
}

async fn mount(sync: &Sync, cluster: &Cluster, number: usize) {
    let name = format!("class-{number}");
    let class = cluster.class("shop", &name).await.unwrap();
    let volume = Record {
        volume_id: format!("csi-{number}"),
        target_path: "/nowhere".into(),
        pod: Pod {
            name: format!("web-{number}"),
            namespace: "shop".to_owned(),
            uid: "u".to_owned(),
        },
        class: class.identity.clone(),
        provider: class.provider.clone(),
        pod_status: name,
        objects: Vec::new(),
        content: Content::Driver,
        orders: BTreeMap::new(),
        last_success: Timestamp::UNIX_EPOCH,
        last_change: Timestamp::UNIX_EPOCH,
        failing_since: None,
    };
    sync.volume_mounted(&volume, &class).await.unwrap();
}

#[rstest]
#[case::one_parameter("one_parameter")]
#[case::parameters("parameters")]
#[case::our_annotations("our_annotations")]
#[case::one_annotation("one_annotation")]
#[case::annotations("annotations")]
#[case::entries("entries")]
#[case::secrets("secrets")]
#[case::labels("labels")]
fn sixty_large_classes(#[case] large: &'static str) {
    if env::var_os(CHILD).is_none() {
        // By itself, with an allocator that gives back what is free.
        let own = std::thread::current().name().unwrap().to_owned();
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", &own, "--nocapture"])
            .env(CHILD, "1")
            .env("MALLOC_ARENA_MAX", "1")
            .env("MALLOC_TRIM_THRESHOLD_", "0")
            .env("MALLOC_MMAP_THRESHOLD_", "65536")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout).into_owned()
            + &String::from_utf8_lossy(&child.stderr);
        assert!(
            child.status.success() && said.contains("1 passed"),
            "{said}"
        );
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let cluster = cluster(dir.path(), large).await;
        let hour = Duration::from_secs(3600);
        let records = Records::open(dir.path().join("records")).unwrap();
        let sync = Sync::new(cluster.clone(), records, Metrics::new(), false, hour);
        for number in 0..FIRST {
            mount(&sync, &cluster, number).await;
        }
        let before = memory();
        for number in FIRST..FIRST + CLASSES {
            mount(&sync, &cluster, number).await;
        }
        let grown = memory().saturating_sub(before);
        // They have 50 MiB together.
        assert!(grown < 12 * 1024, "{grown} KiB more for {CLASSES} classes");
    });
}

/// What is remembered of annotations tells one value from another.
#[tokio::test]
async fn long_annotations_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = cluster(dir.path(), "one_annotation").await;
    let class = cluster.class("shop", "class-0").await.unwrap();
    let annotations: BTreeMap<_, _> = class.identity.annotations;
    let value = &annotations["secrets-store.csi.k8s.io/refresh"];
    assert!(value.len() <= 256 && value.starts_with("xxx"), "{value}");
    assert!(!value.chars().all(|c| c == 'x'), "{value}");
}
