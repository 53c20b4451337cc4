//! Providers that are slow, throttled, late or gone, and the limits on calls to them.

use std::time::{Duration, Instant};

use e2e::cluster::Cluster as _;

use crate::{
    harness::{Scenario, scenario, until},
    objects::{MOUNT, class, pod},
    settings::Need,
};

const OBJECT: &str = "- {objectName: password, content: hunter2}";

/// Starts many pods at once; returns the time until all are ready.
async fn burst(s: &Scenario, pods: usize, delay: &str) -> Duration {
    s.apply(class("db", OBJECT).faults(&format!("- {{delay: {delay}}}")))
        .await;
    let names: Vec<String> = (0..pods).map(|number| format!("web-{number}")).collect();
    let started = Instant::now();
    for name in &names {
        s.apply(pod(name, &["db"])).await;
    }
    for name in &names {
        s.ready(name).await;
    }
    started.elapsed()
}

#[tokio::test]
async fn two_hundred_pods_start_and_their_class_has_its_share_of_calls() {
    let s = scenario!([Need::Embedded("a kubelet takes 110 pods")]);
    burst(&s, 200, "500ms").await;
    let calls = s.provider_counts().await;
    assert_eq!(calls["mountCalls"], 200, "{calls}");
    // Three quarters of the places; the rest is reserved for other classes.
    assert_eq!(calls["maxInFlight"], 12, "{calls}");
    let counted = "secrets_store_provider_call_duration_seconds_count";
    let labels = ["provider=\"e2e-provider\"", "outcome=\"OK\""];
    assert_eq!(s.metric(counted, &labels).await, 200.0);
}

/// A node's maximum of pods, with a provider that answers in 100 ms. The driver logs the time of
/// each mount. A test in the driver's crate, which a busy machine affects less, has a limit of five
/// seconds for all of them.
#[tokio::test]
async fn a_burst_of_110_first_mounts() {
    let s = scenario!([Need::Embedded("a kubelet does not start 110 pods at once")]);
    let took = burst(&s, 110, "100ms").await;
    let calls = s.provider_counts().await;
    assert_eq!(calls["mountCalls"], 110, "{calls}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    let log = s.cluster.driver(&s.node()).log().await.unwrap();
    let published = log.lines().filter(|line| line.contains("] \"published\""));
    let longest = published
        .filter_map(|line| {
            let (_, rest) = line.split_once("milliseconds=")?;
            rest.split(' ').next()?.parse::<u64>().ok()
        })
        .max();
    let longest = longest.unwrap();
    println!("110 first mounts: all pods ready after {took:.1?}, longest mount {longest} ms");
    // One call after the other would take eleven seconds; a quiet machine takes about one.
    assert!(longest < 10_000, "one of 110 mounts took {longest} ms");
}

/// A pod and its provider start together: the first mount waits for the socket, without an event of
/// kubelet.
#[tokio::test]
async fn a_first_mount_waits_for_a_provider_that_starts() {
    let s = scenario!([Need::Embedded(
        "a provider takes longer to start than the driver waits"
    )]);
    let node = s.node();
    let provider = s.cluster.provider(&node, "fake-provider");
    provider.stop().await.unwrap();
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    // kubelet has made the volume's directory, and called the driver.
    until("the driver is called", async || {
        s.leftovers(&node).await.contains("kubernetes.io~csi/")
    })
    .await;
    provider.start().await.unwrap();
    s.ready("web").await;
    assert_eq!(s.reads("web", MOUNT).await.texts()["password"], "hunter2");
    let events = s.namespace.events("web").await.unwrap();
    let failed = events
        .iter()
        .filter(|e| e.reason.as_deref() == Some("FailedMount"));
    assert_eq!(failed.count(), 0, "{events:?}");
}

/// The health check logs changes only, and delays no mount.
#[tokio::test]
async fn the_health_check_tells_what_changes() {
    let s = scenario!([Need::Flags(&[
        "--provider-health-check",
        "--provider-health-check-interval=1s",
    ])]);
    let node = s.node();
    // What is logged of the provider's state. The driver may have seen the provider of the scenario
    // before, which was replaced while this driver started.
    let states = async || {
        let log = s.cluster.driver(&node).log().await.unwrap();
        let is_state =
            |line: &&str| line.contains("the provider is") || line.contains("socket is gone");
        log.lines()
            .filter(is_state)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let ends_with = async |text: &str| states().await.last().is_some_and(|l| l.contains(text));
    until("the provider is healthy", async || {
        ends_with("the provider is healthy").await
    })
    .await;
    let provider = s.cluster.provider(&node, "fake-provider");
    provider.stop().await.unwrap();
    until("the provider is gone", async || {
        ends_with("the provider's socket is gone").await
    })
    .await;
    provider.start().await.unwrap();
    until("the provider is healthy again", async || {
        ends_with("the provider is healthy").await
    })
    .await;
    let before = states().await;
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    // A provider whose state has not changed is not logged.
    assert!(s.provider_counts().await["versionCalls"].as_u64() > Some(0));
    assert_eq!(states().await, before);
}
