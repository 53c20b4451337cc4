//! Secrets that the driver must not write, and drivers without permission to write any.

use super::*;
use k8s_openapi::api::rbac::v1::ClusterRoleBinding;
use kube::api::PostParams;

#[tokio::test]
async fn a_secret_of_somebody_else() {
    let s = scenario!([OFTEN]);
    s.apply(json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "creds", "labels": {"app": "theirs"}},
        "data": {"theirs": "cHJlY2lvdXM="},
    }))
    .await;
    s.apply(syncing("db", "hunter2", [creds()])).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let mut text = s.failed_sync("web", "the driver did not make").await;
    s.checked_again().await;
    write!(text, "\n{}", s.secrets().await).unwrap();
    assert_eq!(
        s.messages("web", "FailedToCreateSecret").await.len(),
        1,
        "once"
    );
    s.patch_secret(
        "creds",
        json!({"metadata": {"annotations": {"secrets-store.csi.k8s.io/adopt": "true"}}}),
    )
    .await;
    s.secret_says("creds", "pw", "hunter2").await;
    until("the pod is told", async || {
        !s.messages("web", "SecretSynced").await.is_empty()
    })
    .await;
    write!(text, "adopted\n{}", s.secrets().await).unwrap();
    insta::assert_snapshot!(text);
    assert!(
        s.metric("sync_k8s_secret_error_total", &["Unmanaged"])
            .await
            >= 1.0
    );
}

#[tokio::test]
async fn two_classes_and_one_secret() {
    let s = scenario!([OFTEN]);
    s.apply(syncing("db", "hunter2", [creds()])).await;
    s.apply(syncing("other", "different", [creds()])).await;
    s.apply(syncing("alike", "hunter2", [creds()])).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    s.apply(pod("rival", &["other"])).await;
    s.ready("rival").await;
    let mut text = s.failed_sync("rival", "makes other content").await;
    // Equal content is not a conflict.
    s.apply(pod("friend", &["alike"])).await;
    s.ready("friend").await;
    let version = s.secret("creds").await.unwrap().resource_version();
    s.checked_again().await;
    let now = s.secret("creds").await.unwrap();
    assert_eq!(now.resource_version(), version, "no alternation");
    assert_eq!(
        s.messages("friend", "FailedToCreateSecret").await,
        Vec::<String>::new()
    );
    write!(text, "\n{}", s.secrets().await).unwrap();
    // The first class no longer declares it, and the other gets it.
    s.delete("friend").await;
    s.owned_by("creds", 1).await;
    s.apply(syncing("db", "hunter2", [creds().name("mine")]))
        .await;
    s.secret_says("creds", "pw", "different").await;
    s.secret_says("mine", "pw", "hunter2").await;
    s.owned_by("creds", 2).await;
    write!(text, "given up\n{}", s.secrets().await).unwrap();
    insta::assert_snapshot!(text);
}

/// Without the syncing role, volumes are mounted all the same, and an event on the pod names what
/// is missing.
#[tokio::test]
async fn without_the_syncing_role() {
    let s = scenario!([OFTEN]);
    let bindings = Api::<ClusterRoleBinding>::all(s.cluster.client());
    let name = "secretprovidersyncing-rolebinding";
    let mut binding = bindings.get(name).await.unwrap();
    bindings
        .delete(name, &DeleteParams::default())
        .await
        .unwrap();
    s.apply(syncing("db", "hunter2", [creds()])).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let told = s.failed_sync("web", "syncSecret.enabled").await;
    let reads = s.reads("web", MOUNT).await;
    let made = s.secret("creds").await;
    binding.metadata.resource_version = None;
    binding.metadata.uid = None;
    let again = bindings.create(&PostParams::default(), &binding).await;
    again.unwrap();
    assert_eq!(reads.texts()["password"], "hunter2");
    assert!(made.is_none());
    assert!(
        told.contains("SecretProviderClass db, Secret creds"),
        "{told}"
    );
    s.secret_says("creds", "pw", "hunter2").await;
}

#[tokio::test]
async fn errors_that_fail_the_mount() {
    let s = scenario!([Need::Flags(&["--sync-errors=fail"])]);
    let nowhere = creds().object("nowhere");
    s.apply(syncing("db", "hunter2", [nowhere])).await;
    s.apply(pod("web", &["db"])).await;
    insta::assert_snapshot!(s.failed_mount("web", "rpc error").await);
    assert!(s.pod_status_objects().await.is_empty());
    s.apply(syncing("db", "hunter2", [creds()])).await;
    s.ready("web").await;
    assert_eq!(s.value("creds", "pw").await.unwrap(), "hunter2");
}

/// An error of a Secret does not make the driver refresh a fresh volume.
#[tokio::test]
async fn errors_that_fail_no_refresh() {
    let s = scenario!([
        Need::Republish,
        Need::Flags(&[
            "--enable-secret-rotation=true",
            "--rotation-poll-interval=1h",
            "--sync-errors=fail",
        ])
    ]);
    s.apply(syncing("db", "hunter2", [creds()])).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let nowhere = creds().object("nowhere");
    s.apply(syncing("db", "hunter3", [nowhere])).await;
    until("the file is the class's", async || {
        s.namespace.reconcile("web").await.unwrap();
        s.reads("web", MOUNT).await.texts()["password"] == "hunter3"
    })
    .await;
    s.failed_sync("web", "nowhere").await;
    let calls = s.provider_calls("web").await;
    for _ in 0..3 {
        s.namespace.reconcile("web").await.unwrap();
        s.checked_again().await;
    }
    assert_eq!(s.provider_calls("web").await, calls, "it is fresh");
    for reason in ["MountRotationFailed", "MountRotationComplete"] {
        assert_eq!(s.messages("web", reason).await, Vec::<String>::new());
    }
    assert_eq!(
        s.value("creds", "pw").await.unwrap(),
        "hunter2",
        "as it was"
    );
    s.apply(syncing("db", "hunter3", [creds()])).await;
    until("the Secret follows", async || {
        s.namespace.reconcile("web").await.unwrap();
        s.value("creds", "pw").await.as_deref() == Some("hunter3")
    })
    .await;
}

/// The driver posts one event, however often it checks.
#[tokio::test]
async fn more_than_a_secret_holds() {
    let s = scenario!([OFTEN]);
    let large = class("db", "- {objectName: large, contentSize: 1048577}");
    let secret = creds().object("large");
    s.apply(large.secret_objects([secret])).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let told = s.failed_sync("web", "bytes").await;
    insta::assert_snapshot!(told);
    s.checked_again().await;
    assert_eq!(s.messages("web", "FailedToCreateSecret").await.len(), 1);
    assert!(s.secret("creds").await.is_none());
}
