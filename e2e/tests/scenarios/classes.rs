//! SecretProviderClasses that are missing, late or incomplete.

use serde_json::json;

use crate::{
    harness::Scenario,
    objects::{Class, class, pod},
};

/// kubelet's event has the text that tools search for, and the pod starts once the class exists.
#[tokio::test]
async fn a_missing_class_that_appears() {
    let s = Scenario::start().await;
    s.apply(pod("web", &["db"])).await;
    let event = s
        .failed_mount("web", "failed to get secretproviderclass")
        .await;
    insta::assert_snapshot!(event);
    // Upstream's suites (`test/bats/*.bats`) search for
    // `FailedMount.*failed to get secretproviderclass <namespace>/<name>.*not found`.
    let tail = event
        .split_once("failed to get secretproviderclass [namespace]/db")
        .unwrap()
        .1;
    assert!(tail.contains("not found"), "{event}");
    s.nothing_of_the_driver_is_left().await;
    assert!(s.pod_status_objects().await.is_empty());
    assert!(
        s.metric(
            "node_publish_error_total",
            &["error_type=\"SecretProviderClassNotFound\""]
        )
        .await
            >= 1.0
    );

    s.apply(class("db", "- {objectName: password, content: hunter2}"))
        .await;
    s.ready("web").await;
    insta::assert_snapshot!("a_class_that_appeared", s.state("web").await);
}

#[tokio::test]
async fn a_class_in_another_namespace_is_not_found() {
    let s = Scenario::start().await;
    s.apply(class("db", "- {objectName: password}").namespace("default"))
        .await;
    s.apply(pod("web", &["db"])).await;
    s.failed_mount("web", "failed to get secretproviderclass")
        .await;
}

#[tokio::test]
async fn classes_that_say_too_little() {
    let s = Scenario::start().await;
    let mut events = Vec::new();
    for (name, class) in [
        ("nothing", Class::without_spec("nothing")),
        (
            "no-provider",
            Class::of("no-provider", json!({"parameters": {"a": "b"}})),
        ),
        (
            "no-parameters",
            Class::of("no-parameters", json!({"provider": "e2e-provider"})),
        ),
        ("no-objects", class("no-objects", "")),
    ] {
        s.apply(class).await;
        s.apply(pod(name, &[name])).await;
        events.push(s.failed_mount(name, "rpc error").await);
    }
    insta::assert_snapshot!(events.join("\n"));
    s.nothing_of_the_driver_is_left().await;
}

#[tokio::test]
async fn a_volume_that_is_not_read_only_or_names_no_class() {
    let s = Scenario::start().await;
    let mut writable = pod("writable", &["db"]);
    writable.csi()["readOnly"] = false.into();
    let mut without = pod("without", &["db"]);
    without.csi()["volumeAttributes"] = json!({"anything": "else"});
    let mut events = Vec::new();
    for (name, manifest) in [("writable", writable), ("without", without)] {
        s.apply(&manifest).await;
        events.push(s.failed_mount(name, "rpc error").await);
    }
    insta::assert_snapshot!(events.join("\n"));
}
