//! Tests how Secrets are kept in step with volumes: the requests that it takes, when owners are
//! removed, and what of a node's volumes is content.
//!
//! The volumes are real: each test runs once more, in a process with a mount namespace of its own,
//! made by `unshare` of util-linux.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod api;
mod contents;
mod costs;
mod edited;
mod refused;
mod replaced;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../api/server.rs"]
mod server;
mod trouble;
mod volumes;
mod webhooks;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use api::{Api, CLASS, Refuse, SECRET, What};
use driver::{
    cluster::{Class, Cluster, interval::Intervals},
    metrics::Metrics,
    mount::{self, Tmpfs},
    record::{Record, Writer},
    sync::{Options, SecretSync},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use volumes::{is_alone, make_and_mount, record, records, take_down, target, volume, write};

/// The interval between two checks of the driver.
const EVERY: Duration = Duration::from_millis(200);

/// Starts an API server, and returns its directory, itself and a client. Ends the test if it has been
/// run in a mount namespace of its own.
macro_rules! start {
    () => {{
        if !$crate::is_alone() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (api, cluster) = $crate::Api::start(dir.path()).await;
        (dir, api, cluster)
    }};
}
use start;

/// Puts a class into the API, and returns it as the driver reads it.
async fn class(api: &Api, cluster: &Cluster, secret_objects: Value) -> Class {
    api.put_class(&secret_objects, "1");
    let class = cluster.class("shop", "db").await.unwrap();
    api.requests();
    Class::clone(&class)
}

fn creds() -> Value {
    // White space around names and keys does not count.
    json!([{"secretName": " creds ", "type": " Opaque ", "data": [{"objectName": " pw ", "key": " pw "}]}])
}

fn sync(dir: &Path, cluster: &Cluster, every: Duration) -> Arc<SecretSync> {
    sync_with(dir, cluster, every, false)
}

fn sync_with(
    dir: &Path,
    cluster: &Cluster,
    every: Duration,
    errors_fail_publish: bool,
) -> Arc<SecretSync> {
    let options = Options {
        errors_fail_publish,
        ..options(every)
    };
    sync_of(dir, cluster, options)
}

fn options(every: Duration) -> Options {
    Options {
        refreshes: true,
        errors_fail_publish: false,
        intervals: Intervals {
            refresh: every,
            least: Duration::ZERO,
            sync: every,
        },
    }
}

fn sync_of(dir: &Path, cluster: &Cluster, options: Options) -> Arc<SecretSync> {
    let (cluster, records) = (cluster.clone(), records(dir));
    let tmpfs = Arc::new(Tmpfs::bounded_by(1));
    let metrics = Metrics::new();
    Arc::new(SecretSync::new(cluster, records, tmpfs, metrics, options))
}

fn run(sync: &Arc<SecretSync>) -> CancellationToken {
    let (sync, stop) = (Arc::clone(sync), CancellationToken::new());
    let ended = stop.clone();
    tokio::spawn(async move { sync.run(ended).await });
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

/// Writes the pod status of a volume, as its publish does.
fn put_status(api: &Api, volume: &Record) {
    let path = format!(
        "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasspodstatuses/{}",
        volume.pod_status
    );
    let owner =
        json!({"apiVersion": "v1", "kind": "Pod", "name": volume.pod.name, "uid": volume.pod.uid});
    api.put(
        &path,
        json!({
            "metadata": {"uid": path, "ownerReferences": [owner]},
            "status": {
                "podName": volume.pod.name,
                "secretProviderClassName": volume.class.name,
                "targetPath": volume.target_path,
                "mounted": true,
                "objects": [],
            },
        }),
    );
}

/// Returns the number of reads of pod statuses among these requests, and the other requests.
fn without_statuses(requests: Vec<String>) -> (usize, Vec<String>) {
    let is_of_status = |request: &String| {
        request.starts_with("GET") && request.contains("/secretproviderclasspodstatuses/")
    };
    let (statuses, others): (Vec<_>, Vec<_>) = requests.into_iter().partition(is_of_status);
    (statuses.len(), others)
}

/// A class without Secrets costs no request when it is mounted, and one read in an interval. The
/// Secrets that it gets later are made for the pods that mount it already.
#[tokio::test]
async fn a_class_that_gets_its_first_secrets() {
    let (dir, api, cluster) = start!();
    let class = class(&api, &cluster, json!([])).await;
    let sync = sync(dir.path(), &cluster, EVERY);
    for name in ["web", "other"] {
        api.pod(name, Some(("ReplicaSet", name)), "Running");
        let volume = volume(dir.path(), name);
        put_status(&api, &volume);
        sync.volume_mounted(&volume, &class).await.unwrap();
    }
    assert_eq!(api.requests(), Vec::<String>::new());
    let stop = run(&sync);
    tokio::time::sleep(EVERY * 5).await;
    let (statuses, requests) = without_statuses(api.requests());
    assert!(statuses <= 4, "{statuses}");
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

/// A publish that fails without its Secrets begins anew, and would never end if it gave each attempt
/// less time than the API server needs.
#[tokio::test]
async fn a_publish_that_needs_its_secrets_waits_for_a_slow_api_server() {
    let (dir, api, cluster) = start!();
    let names = ["creds", "second", "third", "fourth"];
    let objects = names.map(|name| {
        json!({"secretName": name, "type": "Opaque", "data": [{"objectName": "pw", "key": "pw"}]})
    });
    let class = class(&api, &cluster, json!(objects)).await;
    let sync = sync_with(dir.path(), &cluster, EVERY, true);
    api.pod("web", Some(("ReplicaSet", "rs")), "Pending");
    let volume = volume(dir.path(), "web");
    put_status(&api, &volume);
    api.takes(Duration::from_secs(3));
    let started = Instant::now();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(90);
    let mounted = sync.volume_mounted_by(&volume, &class, deadline).await;
    mounted.unwrap();
    assert!(
        started.elapsed() > Duration::from_secs(21),
        "nothing was slow"
    );
    for name in names {
        let secret = format!("/api/v1/namespaces/shop/secrets/{name}");
        assert!(api.get(&secret).is_some(), "{name}");
    }
}

/// Fifty volumes at once cause one write; each reads its pod and the Secret. Later there is one read
/// of the Secret and one of the class in an interval, however many volumes there are, and one of each
/// pod status in twenty intervals.
#[tokio::test]
async fn fifty_volumes_at_once_and_at_rest() {
    let (dir, api, cluster) = start!();
    let class = class(&api, &cluster, creds()).await;
    let sync = sync(dir.path(), &cluster, EVERY * 2);
    let volumes: Vec<_> = (0..50)
        .map(|number| volume(dir.path(), &format!("web-{number}")))
        .collect();
    let mut mounting = tokio::task::JoinSet::new();
    for volume in &volumes {
        put_status(&api, volume);
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
    let stop = run(&sync);
    // At most one read of each pod status in twenty intervals, and two other reads in each. On a busy machine
    // there are fewer, and the first ones come late.
    let began = Instant::now();
    let (mut statuses, mut requests) = (0, Vec::new());
    while began.elapsed() < EVERY * 2 * 40 || statuses == 0 || requests.len() < 8 {
        assert!(
            began.elapsed() < Duration::from_secs(120),
            "{statuses} {requests:?}"
        );
        tokio::time::sleep(EVERY).await;
        let (more, others) = without_statuses(api.requests());
        statuses += more;
        requests.extend(others);
    }
    let intervals = began.elapsed().as_millis() / (EVERY * 2).as_millis();
    assert!(
        statuses as u128 <= 50 * (intervals / 20).max(1),
        "{statuses} in {intervals} intervals"
    );
    assert!(
        requests.len() as u128 <= 2 * intervals + 10,
        "{intervals} intervals: {requests:?}"
    );
    for request in requests {
        assert!(
            request.starts_with("GET") && request.ends_with("resourceVersion=0"),
            "{request}"
        );
    }
    stop.cancel();
}

/// A bare pod that has ended keeps its object and its pod status. Its pod status stops owning a Secret
/// that has another owner, and never one that has not.
#[tokio::test]
async fn pods_that_have_ended_let_go() {
    let (dir, api, cluster) = start!();
    let class = class(&api, &cluster, creds()).await;
    let sync = sync(dir.path(), &cluster, EVERY);
    let (bare, web) = (volume(dir.path(), "bare"), volume(dir.path(), "web"));
    api.pod("bare", None, "Running");
    api.put(
        "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasspodstatuses/bare-shop-db",
        json!({"metadata": {
            "uid": "status",
            "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "bare", "uid": "uid-bare"}],
        }}),
    );
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    sync.volume_mounted(&bare, &class).await.unwrap();
    assert_eq!(api.owners(), ["status"]);
    sync.volume_mounted(&web, &class).await.unwrap();
    assert_eq!(api.owners(), ["status", "rs"]);
    let stop = run(&sync);
    api.pod("bare", None, "Succeeded");
    take_down(dir.path(), &bare);
    sync.forget(&bare.volume_id);
    until("the ended pod lets go", || api.owners() == ["rs"]).await;
    // The last owner is left to the garbage collector.
    api.pod("web", Some(("Job", "rs")), "Succeeded");
    take_down(dir.path(), &web);
    sync.forget(&web.volume_id);
    api.requests();
    until("it is looked after", || api.count("/secrets/creds") > 0).await;
    tokio::time::sleep(EVERY * 3).await;
    assert_eq!(api.owners(), ["rs"]);
    stop.cancel();
}

/// A pod that is going away does not get its Secret again.
#[tokio::test]
async fn nobody_makes_secrets_for_pods_that_go() {
    let (dir, api, cluster) = start!();
    let class = class(&api, &cluster, creds()).await;
    let sync = sync(dir.path(), &cluster, EVERY);
    let web = volume(dir.path(), "web");
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    sync.volume_mounted(&web, &class).await.unwrap();
    let pod = "/api/v1/namespaces/shop/pods/web";
    let mut going = api.get(pod).unwrap();
    going["metadata"]["deletionTimestamp"] = json!("2026-11-23T10:00:00Z");
    api.put(pod, going);
    api.remove(SECRET);
    let stop = run(&sync);
    tokio::time::sleep(EVERY * 5).await;
    assert!(api.get(SECRET).is_none());
    // The pod is alive again, as if it had not been deleted.
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    until("the Secret is there", || api.get(SECRET).is_some()).await;
    stop.cancel();
}

/// The driver does not remove an owner that somebody else has put on a Secret.
#[tokio::test]
async fn a_job_that_the_user_put_on_the_secret_stays() {
    let (dir, api, cluster) = start!();
    let class = class(&api, &cluster, creds()).await;
    let sync = sync(dir.path(), &cluster, EVERY);
    let web = volume(dir.path(), "web");
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    sync.volume_mounted(&web, &class).await.unwrap();
    // The user adds the Job as an owner before a pod of that Job mounts the class.
    let mut secret = api.get(SECRET).unwrap();
    let owners = secret["metadata"]["ownerReferences"]
        .as_array_mut()
        .unwrap();
    owners.push(json!({"apiVersion": "x/v1", "kind": "Job", "name": "job", "uid": "job"}));
    api.put(SECRET, secret);
    let job = volume(dir.path(), "job");
    api.pod("job", Some(("Job", "job")), "Running");
    sync.volume_mounted(&job, &class).await.unwrap();
    assert_eq!(api.owners(), ["rs", "job"]);
    let stop = run(&sync);
    api.pod("job", Some(("Job", "job")), "Succeeded");
    take_down(dir.path(), &job);
    sync.forget(&job.volume_id);
    api.requests();
    until("it is looked after", || api.count("/pods/job") > 0).await;
    api.requests();
    until("and again", || api.count("/secrets/creds") > 2).await;
    assert_eq!(api.owners(), ["rs", "job"]);
    // A Secret that is not the driver's stays as it is, too.
    let theirs = json!({
        "metadata": {"name": "creds", "uid": "theirs", "resourceVersion": "1", "ownerReferences": [
            {"apiVersion": "x/v1", "kind": "ReplicaSet", "name": "rs", "uid": "rs"},
            {"apiVersion": "x/v1", "kind": "Job", "name": "job", "uid": "job"},
        ]},
        "type": "Opaque", "data": {"theirs": "eA=="},
    });
    api.put(SECRET, theirs.clone());
    api.put_class(&json!([]), "2");
    api.pod("web", Some(("ReplicaSet", "rs")), "Succeeded");
    take_down(dir.path(), &web);
    sync.forget(&web.volume_id);
    api.requests();
    until("it is looked after", || api.count("/pods/web") > 0).await;
    tokio::time::sleep(EVERY * 3).await;
    assert_eq!(api.get(SECRET), Some(theirs));
    stop.cancel();
}

/// A proxy may answer with anything in the API server's place. Such an answer is no Secret of
/// somebody else, and nothing is written because of it.
#[tokio::test]
async fn an_answer_that_is_not_the_secret_says_nothing_of_it() {
    if !is_alone() {
        return;
    }
    for answer in [
        json!({"metadata": {}}),
        json!({"metadata": {"name": ""}}),
        json!({"metadata": {"name": "another", "uid": "u", "resourceVersion": "1"}}),
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (api, cluster) = Api::start(dir.path()).await;
        let class = class(&api, &cluster, creds()).await;
        let web = volume(dir.path(), "web");
        api.pod("web", Some(("ReplicaSet", "rs")), "Running");
        api.put(SECRET, answer.clone());
        let sync = sync(dir.path(), &cluster, EVERY);
        sync.volume_mounted(&web, &class).await.unwrap();
        until("the pod is told", || !api.events().is_empty()).await;
        let told = api.events().concat();
        assert!(told.contains("not the object that was asked for"), "{told}");
        assert!(!told.contains("the driver did not make"), "{told}");
        assert_eq!(api.get(SECRET), Some(answer));
        drop(mount::detach(&web.target_path).unwrap());
    }
}

/// A driver that has just started knows from its records the newest state of a class.
#[tokio::test]
async fn a_new_driver_believes_no_class_that_is_older_than_the_mounted_one() {
    let (dir, api, cluster) = start!();
    let mut two = creds();
    two[0]["data"] = json!([
        {"objectName": "pw", "key": "pw"}, {"objectName": "pw", "key": "again"},
    ]);
    api.put_class(&two, "20");
    let class = cluster.class("shop", "db").await.unwrap();
    // Of several volumes, the one with the newest class decides.
    for (pod, resource_version) in [("old", "7"), ("web", "20"), ("older", "3")] {
        let mut record = volume(dir.path(), pod);
        record.class.resource_version = resource_version.to_owned();
        records(dir.path()).put(&record).unwrap();
        api.pod(pod, Some(("ReplicaSet", "rs")), "Running");
    }
    let web = records(dir.path()).get("csi-web").unwrap();
    let before = sync(dir.path(), &cluster, EVERY);
    before.volume_mounted(&web, &class).await.unwrap();
    let made = api.get(SECRET).unwrap()["data"].clone();
    assert_eq!(made.as_object().unwrap().len(), 2);
    for stale in ["19", "3", "1"] {
        api.put_class(&creds(), stale);
        let stop = run(&sync(dir.path(), &cluster, EVERY));
        api.requests();
        until("it has been read again", || api.count(CLASS) > 4).await;
        tokio::time::sleep(EVERY * 3).await;
        assert_eq!(api.get(SECRET).unwrap()["data"], made, "{stale}");
        stop.cancel();
    }
    // A newer state counts.
    api.put_class(&creds(), "21");
    let stop = run(&sync(dir.path(), &cluster, EVERY));
    until("the key has gone", || {
        api.get(SECRET).unwrap()["data"].as_object().unwrap().len() == 1
    })
    .await;
    stop.cancel();
}

/// A pod that comes while a Secret is checked does not hear what is wrong with the content of others.
#[tokio::test]
async fn a_pod_hears_nothing_of_content_that_was_checked_before_it_came() {
    let (dir, api, cluster) = start!();
    let of_absent = json!([{"secretName": "creds", "type": "Opaque", "data": [{"objectName": "absent", "key": "pw"}]}]);
    let class = class(&api, &cluster, of_absent).await;
    let sync = sync(dir.path(), &cluster, EVERY);
    let old = volume(dir.path(), "old");
    for pod in ["old", "new"] {
        api.pod(pod, Some(("ReplicaSet", "rs")), "Running");
    }
    sync.volume_mounted(&old, &class).await.unwrap();
    until("the pod hears that the object is missing", || {
        api.events().len() == 1
    })
    .await;

    // The check waits for the owners of the pod, which have to be read again.
    sync.pod_status_is_new(&old.pod, &old.volume_id);
    api.requests();
    api.takes(Duration::from_secs(1));
    let stop = run(&sync);
    until("the check has begun", || api.count("/pods/old") > 0).await;
    api.takes(Duration::ZERO);
    let at = target(dir.path(), "new");
    make_and_mount(&at);
    write(&at, &[("absent", "hunter2")]);
    let new = record(dir.path(), "new", "1");
    sync.volume_mounted(&new, &class).await.unwrap();
    assert!(api.get(SECRET).is_some());
    records(dir.path()).put(&new).unwrap();
    api.requests();
    until("everything is checked again", || api.count(SECRET) >= 3).await;
    let of_new = |event: &String| event.contains(r#""name":"new""#);
    assert_eq!(api.events().into_iter().find(of_new), None);
    stop.cancel();
}

/// What is wrong with all Secrets of a class is said once, and not for each of them.
#[tokio::test]
async fn a_pod_that_cannot_be_read_is_one_event() {
    let (dir, api, cluster) = start!();
    let entry = |number: usize| json!({"secretName": format!("creds-{number}"), "type": "Opaque", "data": [{"objectName": "pw", "key": "pw"}]});
    let class = class(&api, &cluster, (0..20).map(entry).collect()).await;
    let sync = sync(dir.path(), &cluster, EVERY);
    let web = volume(dir.path(), "web");
    put_status(&api, &web);
    let error = json!({"kind": "Status", "apiVersion": "v1", "code": 404});
    api.put("/api/v1/namespaces/shop/pods/web", error);
    sync.volume_mounted(&web, &class).await.unwrap();
    until("the pod is told", || !api.events().is_empty()).await;
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    let stop = run(&sync);
    until("all Secrets are there", || {
        (0..20).all(|number| {
            let path = format!("/api/v1/namespaces/shop/secrets/creds-{number}");
            api.get(&path).is_some()
        })
    })
    .await;
    assert_eq!(api.events().len(), 1, "{:#?}", api.events());
    stop.cancel();
}

/// A class gets the Secret of another only if the API server says that the other does not exist, or
/// if the other does not name the Secret.
#[tokio::test]
async fn a_class_that_cannot_be_read_keeps_its_secret() {
    let (dir, api, cluster) = start!();
    let class = class(&api, &cluster, creds()).await;
    let sync = sync(dir.path(), &cluster, EVERY);
    let web = volume(dir.path(), "web");
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    let of_rival = |of: &str| {
        let mut secret = api.get(SECRET).unwrap();
        secret["metadata"]["annotations"]["secrets-store.csi.k8s.io/class"] = json!(of);
        secret["metadata"]["annotations"]["secrets-store.csi.k8s.io/class-uid"] = json!("earlier");
        secret["data"] = json!({"pw": "cml2YWw="});
        secret
    };
    let rival = "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasses/rival";
    let makes = |secret: &str, spec: Value| {
        let mut object = json!({
            "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
            "metadata": {"name": "rival", "namespace": "shop", "uid": "anew", "resourceVersion": "1"},
            "spec": {"secretObjects": [{"secretName": secret, "type": "Opaque"}]},
        });
        for (key, value) in spec.as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        object
    };
    let whole = json!({"provider": "test", "parameters": {"a": "b"}});
    sync.volume_mounted(&web, &class).await.unwrap();
    let theirs = of_rival("rival");
    // The class was deleted and created again, and makes the Secret under its new UID as well.
    api.put(rival, makes(" creds ", whole.clone()));
    api.put(SECRET, theirs.clone());
    sync.volume_mounted(&web, &class).await.unwrap();
    assert_eq!(api.get(SECRET).unwrap()["data"], theirs["data"]);
    // It cannot be mounted any more, and still makes the Secret of the pods that mounted it.
    api.put(rival, makes(" creds ", json!({})));
    sync.volume_mounted(&web, &class).await.unwrap();
    assert_eq!(api.get(SECRET).unwrap()["data"], theirs["data"]);
    // An answer that is not that class says nothing about it.
    let metadata =
        json!({"name": "rival", "namespace": "shop", "uid": "anew", "resourceVersion": "1"});
    let empty = json!({"provider": "test", "parameters": {"a": "b"}});
    for answer in [
        json!({}),
        json!({"metadata": {"name": "rival"}}),
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}),
        json!({"metadata": metadata}),
        json!({"metadata": metadata, "spec": {}}),
        json!({"metadata": {"name": "another", "uid": "anew"}, "spec": empty}),
        json!({"metadata": {"name": "rival", "uid": ""}, "spec": empty}),
    ] {
        api.put(rival, answer.clone());
        sync.volume_mounted(&web, &class).await.unwrap();
        assert_eq!(api.get(SECRET).unwrap()["data"], theirs["data"], "{answer}");
    }
    api.remove(rival);
    // After 503 the client itself tries again, until the request's time is over.
    let codes = [400, 401, 403, 404, 406, 409, 410, 422, 500, 502, 503];
    for code in codes {
        // This 404 is not about the class: its kind is not served for now.
        let message = "the server could not find the requested resource".to_owned();
        api.refuse(vec![Refuse {
            what: What::Class,
            code,
            times: 99,
            message,
        }]);
        sync.volume_mounted(&web, &class).await.unwrap();
        assert_eq!(api.get(SECRET).unwrap()["data"], theirs["data"], "{code}");
    }
    api.refuse(vec![]);
    api.put(rival, json!({"spec": "not one"}));
    sync.volume_mounted(&web, &class).await.unwrap();
    assert_eq!(
        api.get(SECRET).unwrap()["data"],
        theirs["data"],
        "not a class"
    );
    // It makes another Secret now.
    api.put(rival, makes("another", whole));
    sync.volume_mounted(&web, &class).await.unwrap();
    assert_eq!(
        api.get(SECRET).unwrap()["data"],
        json!({"pw": "aHVudGVyMg=="})
    );
    api.put(SECRET, theirs);
    api.remove(rival);
    sync.volume_mounted(&web, &class).await.unwrap();
    assert_eq!(
        api.get(SECRET).unwrap()["data"],
        json!({"pw": "aHVudGVyMg=="}),
        "gone"
    );
    // The Secrets of this driver's own class are not released while it cannot be read.
    let stop = run(&sync);
    let signed = api.get(SECRET).unwrap();
    for code in [401, 403, 404, 500] {
        let message = "no".to_owned();
        api.refuse(vec![Refuse {
            what: What::Class,
            code,
            times: 3,
            message,
        }]);
        api.requests();
        until("the class is looked at", || api.count(CLASS) >= 4).await;
        assert_eq!(
            api.get(SECRET).unwrap()["metadata"]["annotations"],
            signed["metadata"]["annotations"]
        );
    }
    stop.cancel();
}
