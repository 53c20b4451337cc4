//! The owners of a Secret, and its deletion with the last one.

use std::time::{Duration, Instant};

use super::*;
use k8s_openapi::api::apps::v1::ReplicaSet;

/// The scenario counts the driver's requests.
const COUNTING: Need = Need::Embedded("the API server does not count requests");

/// A Secret that one Deployment after another uses stays the same object.
#[tokio::test]
async fn hand_over_between_deployments() {
    let s = scenario!([OFTEN]);
    s.apply(syncing("db", "hunter2", [creds()])).await;
    let pod = pod("web", &["db"]).env("creds", "pw");
    s.apply(deployment("round-0", 1, &pod)).await;
    s.all_ready("round-0", 1).await;
    let uid = s.secret("creds").await.unwrap().uid();
    for round in 1..=5 {
        let (last, next) = (format!("round-{}", round - 1), format!("round-{round}"));
        s.apply(deployment(&next, 1, &pod)).await;
        s.all_ready(&next, 1).await;
        s.delete_deployment(&last).await;
        until("only the next one owns it", async || {
            let owners = s.owners("creds").await;
            owners.len() == 1 && owners[0].name.starts_with(&next)
        })
        .await;
        assert_eq!(s.secret("creds").await.unwrap().uid(), uid, "round {round}");
    }
}

#[tokio::test]
async fn scaled_to_zero_and_back() {
    let s = scenario!([OFTEN]);
    s.apply(syncing("db", "hunter2", [creds()])).await;
    let pod = pod("web", &["db"]).env("creds", "pw");
    s.apply(deployment("web", 2, &pod)).await;
    s.all_ready("web", 2).await;
    let before = s.secret("creds").await.unwrap();
    s.scale("web", 0).await;
    until("its pods are gone", async || {
        s.pods_of("web").await.is_empty()
    })
    .await;
    s.nothing_is_left().await;
    s.scale("web", 1).await;
    s.all_ready("web", 1).await;
    let after = s.secret("creds").await.unwrap();
    assert_eq!(after.uid(), before.uid());
    assert_eq!(after.resource_version(), before.resource_version());
}

/// A new ReplicaSet with the name of a deleted one is another owner.
#[tokio::test]
async fn a_replica_set_made_anew_under_its_name() {
    let s = scenario!([OFTEN]);
    s.apply(syncing("db", "hunter2", [creds()])).await;
    s.apply(pod("keeper", &["db"])).await;
    s.ready("keeper").await;
    let uid = s.secret("creds").await.unwrap().uid();
    let set = replica_set("web", &pod("web", &["db"]));
    let api = s.namespace.api::<ReplicaSet>();
    let mut seen = Vec::new();
    for _ in 0..2 {
        s.apply(&set).await;
        s.all_ready("web", 1).await;
        let set = api.get("web").await.unwrap().uid().unwrap();
        until("it owns the Secret", async || {
            s.owners("creds").await.iter().any(|owner| owner.uid == set)
        })
        .await;
        let owners = s.owners("creds").await;
        let sets = owners.iter().filter(|owner| owner.kind == "ReplicaSet");
        assert_eq!(sets.count(), 1, "{owners:?}");
        seen.push(set);
        api.delete("web", &DeleteParams::background())
            .await
            .unwrap();
        until("its pods are gone", async || {
            s.pods_of("web").await.is_empty()
        })
        .await;
    }
    assert_ne!(seen[0], seen[1]);
    s.owned_by("creds", 1).await;
    assert_eq!(s.secret("creds").await.unwrap().uid(), uid);
    s.delete("keeper").await;
    s.no_secret("creds").await;
}

/// Fifty pods of one ReplicaSet share a Secret: it is written once, and never again at rest. Prints
/// the numbers of requests.
#[tokio::test]
async fn fifty_pods_and_one_write() {
    let s = scenario!([COUNTING, OFTEN]);
    let cluster = s.cluster.embedded();
    let requests = |verbs: &[&str], resource: &str| {
        let all = cluster.api().requests();
        let of_driver = all.iter().filter(|request| {
            request.user.ends_with(":secrets-store-csi-driver")
                && verbs.contains(&request.verb.as_str())
                && (request.resource == resource || resource.is_empty())
        });
        of_driver.count()
    };
    const WRITES: &[&str] = &["create", "update", "patch", "delete"];
    s.apply(syncing("db", "hunter2", [creds()])).await;
    let started = Instant::now();
    s.apply(deployment(
        "web",
        50,
        &pod("web", &["db"]).env("creds", "pw"),
    ))
    .await;
    let mut delay = None;
    until("the Secret is there", async || {
        s.secret("creds").await.is_some()
    })
    .await;
    delay.get_or_insert(started.elapsed());
    let pods = s.all_ready("web", 50).await;
    assert_eq!(requests(WRITES, "secrets"), 1);
    for pod in &pods {
        assert_eq!(s.messages(pod, "Failed").await, Vec::<String>::new());
    }
    let version = s.secret("creds").await.unwrap().resource_version();
    cluster.api().reset_requests();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(requests(WRITES, ""), 0, "at rest");
    let statuses = requests(&["get"], "secretproviderclasspodstatuses");
    // Each pod status is read every twenty seconds.
    assert!(statuses <= 50, "{statuses} reads in ten seconds");
    let reads = requests(&["get"], "") - statuses;
    // Secret and class are read every second, as the flag sets it.
    assert!((10..=40).contains(&reads), "{reads} reads in ten seconds");
    assert_eq!(requests(&["list", "watch"], ""), 0);
    assert_eq!(s.secret("creds").await.unwrap().resource_version(), version);
    println!(
        "50 pods: 1 write of a Secret; at rest, looking every second: 0 writes, {reads} reads and {statuses} of pod statuses in 10 s; the Secret was there {delay:?} after the Deployment was applied"
    );
}

/// With a class without Secrets, a publish needs one read and one write. The class is also read
/// once in an interval, which is long here; `driver/tests/sync/main.rs` counts that.
#[tokio::test]
async fn a_class_without_secrets_costs_nothing_more() {
    let s = scenario!([COUNTING, Need::Flags(&["--sync-interval=1h"])]);
    let cluster = s.cluster.embedded();
    s.apply(class("db", "- {objectName: password, content: hunter2}"))
        .await;
    cluster.api().reset_requests();
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    s.checked_again().await;
    let all = cluster.api().requests();
    let mut of_driver: Vec<_> = all
        .iter()
        .filter(|request| request.user.ends_with(":secrets-store-csi-driver"))
        .map(|request| format!("{} {}", request.verb, request.resource))
        .collect();
    of_driver.sort();
    assert_eq!(
        of_driver,
        [
            "create secretproviderclasspodstatuses",
            "get secretproviderclasses"
        ]
    );
}

/// A pod does not wait for its Secret, which exists when its volume is published. Prints the time
/// that this takes.
#[tokio::test]
async fn the_secret_is_there_when_the_publish_returns() {
    let s = Scenario::start().await;
    s.apply(syncing("db", "hunter2", [creds()])).await;
    for round in 0..5 {
        let name = format!("web-{round}");
        let started = Instant::now();
        s.apply(pod(&name, &["db"]).env("creds", "pw")).await;
        until("the Secret is there", async || {
            s.secret("creds").await.is_some()
        })
        .await;
        println!(
            "round {round}: the Secret was there {:?} after the pod was applied",
            started.elapsed()
        );
        s.ready(&name).await;
        assert_eq!(s.messages(&name, "Failed").await, Vec::<String>::new());
        s.delete(&name).await;
        s.no_secret("creds").await;
    }
}

/// A StatefulSet and a Job own Secrets, too.
#[tokio::test]
async fn other_controllers() {
    let s = scenario!([Need::Controllers]);
    s.apply(syncing("db", "hunter2", [creds()])).await;
    s.apply(stateful_set("web", &pod("web", &["db"]).env("creds", "pw")))
        .await;
    s.ready("web-0").await;
    s.apply(job("once", &pod("once", &["db"]).env("creds", "pw")))
        .await;
    s.all_ready("once", 1).await;
    insta::assert_snapshot!(s.secrets().await);
}
