//! Read permission of pods that do not run as root, with and without a group of the volume.

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    harness::{Scenario, scenario, until},
    objects::{MOUNT, Pod, class, pod},
    settings::{Need, REFRESH_OFTEN},
};

const OBJECTS: &str = "
        - {objectName: everyone, content: '1'}
        - {objectName: group, content: '1', mode: '0640'}
        - {objectName: owner, content: '1', mode: '0600'}
        - {objectName: nested, path: deep/nested, content: '1', mode: '0440'}
        ";

const USERS: &[Need] = &[Need::Republish, Need::OtherUsers, REFRESH_OFTEN];

/// Returns a pod that runs as user 1004.
fn user(name: &str, fs_group: Option<u32>, supplemental_groups: &[u32]) -> Pod {
    let mut context = json!({"runAsUser": 1004, "runAsGroup": 1004});
    if let Some(group) = fs_group {
        context["fsGroup"] = group.into();
    }
    if !supplemental_groups.is_empty() {
        context["supplementalGroups"] = Value::from(supplemental_groups);
    }
    pod(name, &["db"]).with("securityContext", context)
}

/// Returns the volume as the pod's user reads it, with the files that it has no permission for.
async fn seen(s: &Scenario, name: &str) -> String {
    s.redacted(&format!("{name}\n{}", s.listing(name, MOUNT).await))
}

#[tokio::test]
async fn a_user_with_and_without_the_volumes_group() {
    let s = scenario!(USERS);
    s.apply(class("db", OBJECTS)).await;
    let mut text = String::new();
    for (name, fs_group, supplemental_groups) in [
        ("without", None, [].as_slice()),
        ("with", Some(1004), &[]),
        ("with-another", Some(2000), &[]),
        ("of-the-same-number", None, &[1004]),
    ] {
        s.apply(user(name, fs_group, supplemental_groups)).await;
        s.ready(name).await;
        text += &seen(&s, name).await;
    }
    insta::assert_snapshot!(text);
}

/// Files of a refresh have the group, too.
#[tokio::test]
async fn a_group_holds_after_a_refresh() {
    let s = scenario!(USERS);
    s.apply(class("db", OBJECTS)).await;
    s.apply(user("web", Some(1004), &[])).await;
    s.ready("web").await;
    let after = OBJECTS.replace("'1'", "'2'")
        + "- {objectName: new, path: more/new, content: '2', mode: '0640'}";
    s.apply(class("db", &after)).await;
    until("the pod reads the new content", async || {
        s.namespace.reconcile("web").await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        s.reads("web", MOUNT).await.texts().get("more/new") == Some(&"2")
    })
    .await;
    insta::assert_snapshot!(seen(&s, "web").await);
}

/// An attribute of the volume sets the mode of files for which the provider gives none.
#[tokio::test]
async fn a_default_mode() {
    let s = scenario!(USERS);
    s.apply(class("db", OBJECTS)).await;
    let attribute = "secrets-store.csi.k8s.io/default-mode";
    let web = user("web", Some(1004), &[]).attribute(attribute, "0400");
    s.apply(web).await;
    s.ready("web").await;
    insta::assert_snapshot!(seen(&s, "web").await);
    s.apply(pod("wrong", &["db"]).attribute(attribute, "rw"))
        .await;
    insta::assert_snapshot!(
        "a_default_mode_that_is_none",
        s.failed_mount("wrong", "rpc error").await
    );
}
