//! Secrets that are deleted or changed by others, classes that change, content that changes.

use std::time::Duration;

use super::*;
use embedded::api::Disturbance;

#[tokio::test]
async fn deleted_and_altered_secrets_heal() {
    let s = scenario!([OFTEN]);
    s.apply(syncing("db", "hunter2", [creds()])).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let before = s.secrets().await;
    insta::assert_snapshot!(before);
    let healed = async || {
        until("the Secret is as it was", async || {
            s.secrets().await == before
        })
        .await;
    };
    let all = DeleteParams::default();
    s.secrets_api().delete("creds", &all).await.unwrap();
    healed().await;
    s.patch_secret("creds", json!({"data": {"pw": "eA==", "more": "eA=="}}))
        .await;
    healed().await;
    s.patch_secret(
        "creds",
        json!({"metadata": {
            "labels": {"environment": "prod", "secrets-store.csi.k8s.io/managed": null},
            "annotations": {"note": null},
        }}),
    )
    .await;
    healed().await;
    s.patch_secret("creds", json!({"metadata": {"ownerReferences": null}}))
        .await;
    healed().await;
    // Labels and annotations of others stay, and are no reason to write.
    s.patch_secret(
        "creds",
        json!({"metadata": {"labels": {"foreign": "1"}, "annotations": {"foreign": "1"}}}),
    )
    .await;
    let version = s.secret("creds").await.unwrap().resource_version();
    s.checked_again().await;
    let now = s.secret("creds").await.unwrap();
    assert_eq!(now.resource_version(), version);
    assert_eq!(now.labels()["foreign"], "1");
}

/// A bare pod's status is deleted, and with it the Secret that it owns. The driver creates both
/// again.
#[tokio::test]
async fn a_pod_status_that_is_deleted_returns_with_its_secret() {
    let s = scenario!([OFTEN]);
    s.apply(syncing("db", "hunter2", [creds()])).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let (statuses, secrets) = (s.pod_statuses().await, s.secrets().await);
    let uid = async || {
        let found = s.pod_status_objects().await;
        found.first().and_then(|status| status.metadata.uid.clone())
    };
    for _ in 0..2 {
        let before = uid().await;
        s.delete_pod_statuses().await;
        until("the pod status is there again", async || {
            let now = uid().await;
            now.is_some() && now != before
        })
        .await;
        let now = uid().await;
        until("its Secret lives with it", async || {
            let owners = s.owners("creds").await;
            owners.len() == 1 && Some(&owners[0].uid) == now.as_ref()
        })
        .await;
    }
    assert_eq!(s.secrets().await, secrets);
    let without_counts = |text: &str| {
        let lines = text.lines().filter(|line| !line.contains("content-change"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(
        without_counts(&s.pod_statuses().await),
        without_counts(&statuses)
    );
    assert_eq!(s.provider_calls("web").await, 1, "nobody was asked");
}

/// A new driver restores a Secret that an earlier one made, without the provider.
#[tokio::test]
async fn a_new_driver_heals_from_the_mount() {
    let s = scenario!([OFTEN]);
    s.apply(syncing("db", "hunter2", [creds()])).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let before = s.secrets().await;
    s.cluster.driver(&s.node()).kill().await.unwrap();
    let all = DeleteParams::default();
    s.secrets_api().delete("creds", &all).await.unwrap();
    until("the Secret is there again", async || {
        s.secrets().await == before
    })
    .await;
    assert_eq!(s.provider_calls("web").await, 1, "nobody was asked");
}

#[tokio::test]
async fn a_class_that_changes() {
    let s = scenario!([OFTEN]);
    let more = SecretObject::new("more", &[("a", "password")]);
    s.apply(syncing("db", "hunter2", [creds(), more])).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let (uid, mut text) = (s.secret("creds").await.unwrap().uid(), s.secrets().await);
    // Another key, other labels, and one Secret fewer.
    let changed = SecretObject::new("creds", &[("password", "password")])
        .with("labels", json!({"team": "shop"}));
    s.apply(syncing("db", "hunter2", [changed.clone()])).await;
    s.secret_says("creds", "password", "hunter2").await;
    until("the other is let go", async || {
        let more = s.secret("more").await.unwrap();
        !more.annotations().contains_key(SINCE)
    })
    .await;
    assert_eq!(s.secret("creds").await.unwrap().uid(), uid);
    text += &format!("after the class changed\n{}", s.secrets().await);
    // Another type, which needs a new Secret.
    let retyped = changed.of_type("kubernetes.io/basic-auth");
    s.apply(syncing("db", "hunter2", [retyped])).await;
    until("the type is another", async || {
        let secret = s.secret("creds").await;
        secret.is_some_and(|s| s.type_.as_deref() == Some("kubernetes.io/basic-auth"))
    })
    .await;
    assert_ne!(s.secret("creds").await.unwrap().uid(), uid);
    text += &format!("after the type changed\n{}", s.secrets().await);
    until("the pod is told", async || {
        !s.messages("web", "SecretRecreated").await.is_empty()
    })
    .await;
    text += &s.messages("web", "SecretRecreated").await.join("\n");
    insta::assert_snapshot!(text);
    // A released Secret is deleted with the last of its owners, too.
    s.delete("web").await;
    s.no_secret("more").await;
    s.no_secret("creds").await;
}

/// Without rotation, only the driver's periodic check notices the change.
#[tokio::test]
async fn a_class_that_gets_its_first_secret() {
    let s = scenario!([OFTEN]);
    s.apply(class("db", "- {objectName: password, content: hunter2}"))
        .await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let before = s.secrets().await;
    s.apply(syncing("db", "hunter2", [creds()])).await;
    s.secret_says("creds", "pw", "hunter2").await;
    insta::assert_snapshot!(format!("{before}its class changes\n{}", s.secrets().await));
    s.delete("web").await;
    s.no_secret("creds").await;
}

/// The Secret follows the file with one write.
#[tokio::test]
async fn rotation_reaches_the_secret_with_the_file() {
    let s = scenario!([Need::Republish, REFRESH_OFTEN]);
    s.apply(foo_class("db", "creds")).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    assert_eq!(s.value("creds", "username").await.unwrap(), "secret");
    let version = s.secret("creds").await.unwrap().resource_version();
    // Refreshes without change write nothing.
    let calls = s.provider_calls("web").await;
    until("it is refreshed", async || {
        s.namespace.reconcile("web").await.unwrap();
        s.provider_calls("web").await > calls + 1
    })
    .await;
    assert_eq!(s.secret("creds").await.unwrap().resource_version(), version);
    let written = s.metric("sync_k8s_secret_total", &[]).await;
    s.provider_control("/rotation?rotated=true").await;
    until("file and Secret are rotated", async || {
        s.namespace.reconcile("web").await.unwrap();
        let file = s.reads("web", MOUNT).await.texts()["foo"] == "rotated";
        file && s.value("creds", "username").await.as_deref() == Some("rotated")
    })
    .await;
    assert_eq!(s.metric("sync_k8s_secret_total", &[]).await, written + 1.0);
    assert!(s.metric("k8s_secret_duration_sec_count", &[]).await >= 1.0);
    s.provider_control("/rotation?rotated=false").await;
}

/// A pod that has mounted an older value never overwrites a newer one.
#[tokio::test]
async fn two_nodes_with_different_versions() {
    let s = scenario!([Need::Nodes(2), OFTEN]);
    let nodes = s.cluster.nodes();
    // Named, because another scenario may have closed the node to the scheduler.
    let on = |name: &str, node: &str| pod(name, &["db"]).on_node(node);
    s.apply(syncing("db", "old", [creds()])).await;
    s.apply(on("first", &nodes[0])).await;
    s.ready("first").await;
    s.apply(syncing("db", "new", [creds()])).await;
    s.apply(on("second", &nodes[1])).await;
    s.ready("second").await;
    assert_eq!(s.reads("first", MOUNT).await.texts()["password"], "old");
    assert_eq!(s.value("creds", "pw").await.unwrap(), "new");
    let version = s.secret("creds").await.unwrap().resource_version();
    s.checked_again().await;
    let now = s.secret("creds").await.unwrap();
    assert_eq!(now.resource_version(), version, "nobody wrote");
    s.patch_secret("creds", json!({"data": {"pw": "eA=="}}))
        .await;
    s.secret_says("creds", "pw", "new").await;
    assert_eq!(s.owners("creds").await.len(), 2);
    // The pod with the newer value is gone; the value stays.
    s.delete("second").await;
    s.owned_by("creds", 1).await;
    s.checked_again().await;
    assert_eq!(s.value("creds", "pw").await.unwrap(), "new");
}

/// An API server that is away or slow, refuses requests or reports conflicts delays the Secret
/// only.
#[tokio::test]
async fn an_api_server_in_trouble() {
    let s = scenario!([Need::DisturbApi, OFTEN]);
    s.apply(syncing("db", "hunter2", [creds()])).await;
    let refused = |status| Disturbance::Fail {
        status,
        verb: Some("create".to_owned()),
        resource: Some("secrets".to_owned()),
        times: 2,
    };
    for (name, disturbance) in [
        ("refused", refused(500)),
        ("conflicting", refused(409)),
        ("slow", Disturbance::Slow(Duration::from_millis(500))),
    ] {
        s.cluster.disturb_api(disturbance).await.unwrap();
        s.apply(pod(name, &["db"]).env("creds", "pw")).await;
        s.ready(name).await;
        s.cluster.disturb_api(Disturbance::None).await.unwrap();
        assert_eq!(s.value("creds", "pw").await.unwrap(), "hunter2");
        s.delete(name).await;
        s.no_secret("creds").await;
    }
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let before = s.secrets().await;
    s.cluster.disturb_api(Disturbance::Refuse).await.unwrap();
    let all = DeleteParams::default();
    s.secrets_api().delete("creds", &all).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(s.secret("creds").await.is_none());
    s.cluster.disturb_api(Disturbance::None).await.unwrap();
    until("the Secret is there again", async || {
        s.secrets().await == before
    })
    .await;
}

/// After a reboot, nothing is mounted, and the provider is slow or away. Neither an empty directory
/// nor an incomplete volume counts as content, so the Secrets keep their data.
#[tokio::test]
async fn a_reboot_before_the_provider_is_back() {
    let s = scenario!([Need::Reboot, OFTEN]);
    let make = |name: &str, faults: &str| {
        let all = SecretObject::all_objects(&format!("{name}-all"));
        let named = creds().name(&format!("{name}-named"));
        syncing(name, "hunter2", [all, named]).faults(faults)
    };
    for name in ["slow", "away"] {
        s.apply(make(name, "")).await;
        s.apply(pod(name, &[name])).await;
        s.ready(name).await;
    }
    let before = s.secrets().await;
    s.apply(make("slow", "- {delay: 20s}")).await;
    s.apply(make("away", "- {status: {code: UNAVAILABLE}}"))
        .await;
    s.cluster.reboot(&s.node()).await.unwrap();
    for _ in 0..30 {
        assert_eq!(s.secrets().await, before);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    s.apply(make("away", "")).await;
    until("both are mounted again", async || {
        s.provider_calls("slow").await > 0
            && s.provider_calls("away").await > 0
            && s.mounts().await.len() == 2
    })
    .await;
    for name in ["slow", "away"] {
        s.ready(name).await;
        assert_eq!(s.reads(name, MOUNT).await.texts()["password"], "hunter2");
        let told = s.messages(name, "FailedToCreateSecret").await;
        assert_eq!(told, Vec::<String>::new());
    }
    s.checked_again().await;
    let values = async || s.value("slow-all", "password").await;
    assert_eq!(values().await.as_deref(), Some("hunter2"));
}

/// If the API server refuses the new type, the Secret stays.
#[tokio::test]
async fn a_type_that_is_refused() {
    let s = scenario!([Need::DisturbApi, OFTEN]);
    s.apply(syncing("db", "hunter2", [creds()])).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let (uid, before) = (s.secret("creds").await.unwrap().uid(), s.secrets().await);
    let refused = Disturbance::Fail {
        status: 403,
        verb: Some("create".to_owned()),
        resource: Some("secrets".to_owned()),
        times: 1000,
    };
    s.cluster.disturb_api(refused).await.unwrap();
    let retyped = creds().of_type("example.com/typed");
    s.apply(syncing("db", "hunter2", [retyped])).await;
    s.checked_again().await;
    s.checked_again().await;
    let now = s.secret("creds").await.unwrap();
    assert_eq!((now.uid(), s.secrets().await), (uid, before));
    s.cluster.disturb_api(Disturbance::None).await.unwrap();
    until("the type is another", async || {
        let secret = s.secret("creds").await;
        secret.is_some_and(|s| s.type_.as_deref() == Some("example.com/typed"))
    })
    .await;
    assert_eq!(s.value("creds", "pw").await.as_deref(), Some("hunter2"));
}
