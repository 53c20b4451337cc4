//! Checks that the memory for classes and records does not grow with what tenants write into them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "api/server.rs"]
mod server;

use std::{
    collections::BTreeMap,
    env, fs,
    os::unix::net::UnixStream,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use driver::{
    cluster::{Cluster, interval::Intervals},
    error::Error,
    metrics::Metrics,
    mount::Tmpfs,
    record::{self, Object, Pod, Record, Records, Writer},
    sync::{Options, SecretSync},
};
use embedded::api::{ApiServer, Reaction};
use jiff::Timestamp;
use rstest::rstest;
use serde_json::{Map, Value, json};

/// The variable with the kubeconfig of a child that measures its memory.
const CHILD: &str = "KUBECONFIG_OF_A_CHILD_THAT_MEASURES_ITS_MEMORY";
const CLASSES: usize = 60;
/// The number of classes that are mounted before the measurement. After this many, the holes that a
/// class leaves in the heap do not grow.
const FIRST: usize = 40;
/// The size of the large part of a class in bytes. An object of the API has at most 1.5 MiB.
const LARGE: usize = 900 * 1024;

/// Returns a map of strings of about this many bytes.
fn map_of(bytes: usize, prefix: &str, each: usize) -> Value {
    let entries = (0..bytes / each).map(|n| (format!("{prefix}{n}"), "x".repeat(each).into()));
    Value::Object(entries.collect::<Map<_, _>>())
}

/// Returns a class with one large part.
fn class(name: &str, large: &str) -> Value {
    let mut annotations = json!({});
    let mut provider = "test".to_owned();
    let mut parameters = json!({"a": "b"});
    let mut objects = json!([]);
    let entry = |n: usize| json!({"objectName": "nowhere", "key": format!("key-{n}")});
    let secret = |n: usize, data: Value| json!({"secretName": format!("s{n}"), "type": "Opaque", "data": data});
    match large {
        "provider" => provider = "x".repeat(LARGE),
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
        "spec": {"provider": provider, "parameters": parameters, "secretObjects": objects},
    })
}

/// Starts an API server that creates each class when it is read, and accepts every write.
async fn start(dir: &Path, large: &'static str) -> (ApiServer, Cluster) {
    let (server, cluster) = server::start(dir).await;
    server.intercept(move |call| {
        let path = call.uri.split('?').next().unwrap();
        let name = path.rsplit('/').next().unwrap();
        let object = if name.starts_with("class-") {
            class(name, large)
        } else {
            json!({})
        };
        Reaction::Answer(200, object.to_string())
    });
    (server, cluster)
}

/// Returns the memory of this process in KiB.
fn memory() -> u64 {
    field_of(std::process::id(), "VmRSS:")
}

/// Returns a field of `/proc/<pid>/status` in KiB.
fn field_of(process: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(field));
    let digits = line.unwrap().split_whitespace().nth(1);
    digits.unwrap().parse().unwrap()
}

fn record(number: usize, class: &record::ClassState, provider: &str) -> Record {
    Record {
        volume_id: format!("csi-{number}"),
        target_path: "/nowhere".into(),
        pod: Pod {
            name: format!("web-{number}"),
            namespace: "shop".to_owned(),
            uid: "u".to_owned(),
        },
        class: class.clone(),
        provider: provider.to_owned(),
        pod_status: format!("class-{number}"),
        objects: Vec::new(),
        changes_of_versions: 0,
        writer: Writer::Driver,
        orders: BTreeMap::new(),
        coming: None,
        last_success: Timestamp::UNIX_EPOCH,
        last_change: Timestamp::UNIX_EPOCH,
        files: None,
        failing_since: None,
    }
}

/// Mounts a class. Fails if the class is refused when it is read.
async fn mount(sync: &SecretSync, cluster: &Cluster, number: usize) -> Result<(), Error> {
    let name = format!("class-{number}");
    let class = cluster.class("shop", &name).await?;
    let volume = record(number, &class.identity, &class.provider);
    sync.volume_mounted(&volume, &class).await.unwrap();
    Ok(())
}

#[rstest]
#[case::provider("provider")]
#[case::one_parameter("one_parameter")]
#[case::parameters("parameters")]
#[case::our_annotations("our_annotations")]
#[case::one_annotation("one_annotation")]
#[case::annotations("annotations")]
#[case::entries("entries")]
#[case::secrets("secrets")]
#[case::labels("labels")]
fn sixty_large_classes(#[case] large: &'static str) {
    let dir = tempfile::tempdir().unwrap();
    let Some(kubeconfig) = env::var_os(CHILD) else {
        // Runs the test in a process of its own, without the API server, and with an allocator that
        // returns free memory.
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _server = runtime.block_on(start(dir.path(), large));
        let own = std::thread::current().name().unwrap().to_owned();
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", &own, "--nocapture"])
            .env(CHILD, dir.path().join("kubeconfig"))
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
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let cluster = Cluster::new(Some(kubeconfig.into()), "test", "node-1");
        let hour = Duration::from_secs(3600);
        let records = Records::open(dir.path().join("records")).unwrap();
        let tmpfs = Arc::new(Tmpfs::bounded_by(1));
        let options = Options {
            refreshes: true,
            errors_fail_publish: false,
            intervals: Intervals {
                refresh: hour,
                least: hour,
                sync: hour,
            },
        };
        let sync = SecretSync::new(cluster.clone(), records, tmpfs, Metrics::new(), options);
        for number in 0..FIRST {
            let is_refused = mount(&sync, &cluster, number).await.is_err();
            assert_eq!(is_refused, large == "provider");
        }
        let before = memory();
        let mut errors = Vec::new();
        for number in FIRST..FIRST + CLASSES {
            // Errors stay as long as refreshes fail.
            errors.extend(mount(&sync, &cluster, number).await.err());
        }
        // The classes have 50 MiB together. Work that was given up on a busy machine ends soon.
        let since = Instant::now();
        loop {
            let grown = memory().saturating_sub(before);
            if grown < 12 * 1024 {
                break;
            }
            let waited = since.elapsed() > Duration::from_secs(60);
            assert!(!waited, "{grown} KiB more for {CLASSES} classes");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
}

/// A provider may name many objects, and the record of a volume has them all. The memory that a
/// driver takes when it starts does not grow with them.
#[test]
fn sixty_records_of_many_objects() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let records = Records::open(&state).unwrap();
    let objects: Vec<Object> = (0..4000)
        .map(|n| Object {
            id: format!("secret/{n:-<100}"),
            version: "v".repeat(100),
        })
        .collect();
    let volume = dir.path().join("pods/u/volumes/kubernetes.io~csi/v");
    fs::create_dir_all(&volume).unwrap();
    let target = volume.join("mount");
    for number in 0..CLASSES {
        let mut record = record(
            number,
            &record::ClassState {
                name: format!("class-{number}"),
                uid: "u".to_owned(),
                generation: Some(1),
                resource_version: "1".to_owned(),
                annotations: BTreeMap::new(),
            },
            "test",
        );
        // The directory of the pod exists, so that the record stays.
        record.target_path = target.clone();
        record.objects.clone_from(&objects);
        records.put(&record).unwrap();
    }
    let socket = dir.path().join("csi.sock");
    let mut driver = Command::new(env!("CARGO_BIN_EXE_secrets-store-csi"))
        .arg(format!("--endpoint=unix://{}", socket.display()))
        .arg(format!("--state-dir={}", state.display()))
        .args(["--nodeid=node", "--metrics-addr="])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let since = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(since.elapsed() < Duration::from_secs(60), "no socket");
        std::thread::sleep(Duration::from_millis(10));
    }
    // The sync of Secrets reads the records a moment later.
    std::thread::sleep(Duration::from_secs(2));
    let peak = field_of(driver.id(), "VmHWM:");
    let left = fs::read_dir(&state).unwrap().count();
    driver.kill().unwrap();
    driver.wait().unwrap();
    assert_eq!(left, CLASSES);
    // The records have 50 MiB together, and twice that in memory.
    assert!(peak < 60 * 1024, "{peak} KiB at the most");
}

/// Long values of annotations are shortened so that different values stay different.
#[tokio::test]
async fn long_annotations_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, cluster) = start(dir.path(), "one_annotation").await;
    let class = cluster.class("shop", "class-0").await.unwrap();
    let annotations: &BTreeMap<_, _> = &class.identity.annotations;
    let value = &annotations["secrets-store.csi.k8s.io/refresh"];
    assert!(value.len() <= 256 && value.starts_with("xxx"), "{value}");
    assert!(!value.chars().all(|c| c == 'x'), "{value}");
}

/// An answer that is larger than any object is not read to its end, whatever its status is.
#[rstest]
#[case::an_object_of_7_mib(7, 200, None)]
#[case::an_object_of_9_mib(9, 200, Some("has more than 8 MiB"))]
#[case::a_refusal_of_9_mib(9, 500, Some("has more than 8 MiB"))]
#[tokio::test]
async fn large_answers_are_refused(
    #[case] mib: usize,
    #[case] status: u16,
    #[case] refused: Option<&str>,
) {
    let dir = tempfile::tempdir().unwrap();
    let (server, cluster) = server::start(dir.path()).await;
    server.intercept(move |_| {
        let mut object = class("class-0", "one_parameter");
        object["spec"]["ignored"] = "x".repeat(mib << 20).into();
        Reaction::Answer(status, object.to_string())
    });
    let read = cluster.class("shop", "class-0").await.map(drop);
    match refused {
        None => read.unwrap(),
        Some(why) => {
            let error = read.unwrap_err().to_string();
            assert!(
                error.contains("secretproviderclass shop/class-0"),
                "{error}"
            );
            assert!(error.contains(why), "{error}");
        }
    }
    assert!(!cluster.is_away(), "it answers");
}
