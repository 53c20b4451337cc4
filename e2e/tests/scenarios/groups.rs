//! Who may read: pods that do not run as root, with and without a group of the volume.

use std::time::Duration;

use e2e::cluster::{Ability, Cluster as _};

use crate::{
    harness::{MOUNT, Scenario, class, pod, until},
    target::Needs,
};

const OBJECTS: &str = "
        - {objectName: everyone, content: '1'}
        - {objectName: group, content: '1', mode: '0640'}
        - {objectName: owner, content: '1', mode: '0600'}
        - {objectName: nested, path: deep/nested, content: '1', mode: '0440'}
        ";

async fn with_users() -> Option<Scenario> {
    Scenario::needing(Needs {
        republish: true,
        abilities: &[Ability::OtherUsers],
        driver_flags: &[
            "--enable-secret-rotation=true",
            "--rotation-poll-interval=100ms",
            "--min-rotation-poll-interval=100ms",
        ],
        ..Needs::default()
    })
    .await
}

/// A pod whose user is not root, with these further fields of its security context.
fn user(name: &str, more: &str) -> String {
    let context =
        format!("spec:\n  securityContext: {{runAsUser: 1004, runAsGroup: 1004{more}}}\n  term");
    pod(name, &["db"]).replace("spec:\n  term", &context)
}

/// A pod's own look at its volume, with what it may not read; and as root finds it on the disk.
async fn seen(s: &Scenario, name: &str) -> String {
    s.redacted(&format!("{name}\n{}", s.listing(name, MOUNT).await))
}

#[tokio::test]
async fn a_user_with_and_without_the_volumes_group() {
    let Some(s) = with_users().await else { return };
    s.apply(&class("db", OBJECTS)).await;
    for (name, more) in [
        ("without", ""),
        ("with", ", fsGroup: 1004"),
        ("with-another", ", fsGroup: 2000"),
        ("of-the-same-number", ", supplementalGroups: [1004]"),
    ] {
        s.apply(&user(name, more)).await;
        s.ready(name).await;
    }
    let mut text = String::new();
    for name in ["without", "with", "with-another", "of-the-same-number"] {
        text += &seen(&s, name).await;
    }
    insta::assert_snapshot!(text);
}

/// The group holds for what a refresh brings, too.
#[tokio::test]
async fn a_group_holds_after_a_refresh() {
    let Some(s) = with_users().await else { return };
    s.apply(&class("db", OBJECTS)).await;
    s.apply(&user("web", ", fsGroup: 1004")).await;
    s.ready("web").await;
    let after = OBJECTS.replace("'1'", "'2'")
        + "- {objectName: new, path: more/new, content: '2', mode: '0640'}";
    s.apply(&class("db", &after)).await;
    until("the pod reads the new content", async || {
        s.cluster.look_again(&s.namespace, "web").await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        s.reads("web", MOUNT).await.texts().get("more/new") == Some(&"2")
    })
    .await;
    insta::assert_snapshot!(seen(&s, "web").await);
}

/// The mode of files for which the provider gives none, by the volume's attribute.
#[tokio::test]
async fn a_default_mode() {
    let Some(s) = with_users().await else { return };
    s.apply(&class("db", OBJECTS)).await;
    let attribute = "          secretProviderClass: db\n          secrets-store.csi.k8s.io/default-mode: '0400'\n";
    let web =
        user("web", ", fsGroup: 1004").replace("          secretProviderClass: db\n", attribute);
    s.apply(&web).await;
    s.ready("web").await;
    insta::assert_snapshot!(seen(&s, "web").await);
    let wrong = attribute.replace("0400", "rw");
    let wrong = pod("wrong", &["db"]).replace("          secretProviderClass: db\n", &wrong);
    s.apply(&wrong).await;
    insta::assert_snapshot!(
        "a_default_mode_that_is_none",
        s.failed_mount("wrong", "rpc error").await
    );
}
