//! The existing driver's own end-to-end cases (contract C.4) with its fixtures (C.3), without
//! the parts about Secrets.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use e2e::cluster::Cluster as _;
use k8s_openapi::{
    api::rbac::v1::{ClusterRole, ClusterRoleBinding},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::Api;

use crate::harness::{MOUNT, Scenario, pod};

const KEY: &str = "-----BEGIN PUBLIC KEY-----\nThis is mock key\n-----END PUBLIC KEY-----";

/// The fixture of EP-05 and EP-09.
fn fixture(api_version: &str, name: &str) -> String {
    format!(
        "apiVersion: secrets-store.csi.x-k8s.io/{api_version}
kind: SecretProviderClass
metadata:
  name: {name}
spec:
  provider: e2e-provider
  parameters:
    objects: |
      array:
        - |
          objectName: foo
          objectType: secret
          objectVersion: v1
        - |
          objectName: fookey
          objectType: secret
          objectVersion: v1
"
    )
}

async fn reads_foo_and_fookey(s: &Scenario, path: &str) {
    let tree = s.reads("secrets-store-inline-crd", path).await;
    assert_eq!(tree.texts()["foo"], "secret");
    assert_eq!(BASE64.encode(tree.texts()["fookey"]), BASE64.encode(KEY));
}

#[tokio::test]
async fn ep_02_to_04_what_is_installed() {
    let s = Scenario::start().await;
    let crds = Api::<CustomResourceDefinition>::all(s.cluster.client());
    for plural in ["secretproviderclasses", "secretproviderclasspodstatuses"] {
        let crd = crds
            .get(&format!("{plural}.secrets-store.csi.x-k8s.io"))
            .await
            .unwrap();
        let conditions = crd.status.unwrap().conditions.unwrap();
        assert!(
            conditions
                .iter()
                .any(|c| c.type_ == "Established" && c.status == "True")
        );
    }
    let roles = Api::<ClusterRole>::all(s.cluster.client());
    for role in [
        "secretproviderclasses-role",
        "secretproviderclasses-admin-role",
        "secretproviderclasses-viewer-role",
        "secretproviderclasspodstatuses-viewer-role",
        "secretprovidersyncing-role",
    ] {
        roles.get(role).await.unwrap();
    }
    let bindings = Api::<ClusterRoleBinding>::all(s.cluster.client());
    for binding in [
        "secretproviderclasses-rolebinding",
        "secretprovidersyncing-rolebinding",
    ] {
        bindings.get(binding).await.unwrap();
    }
}

#[tokio::test]
async fn ep_05_to_08_v1alpha1() {
    let s = Scenario::start().await;
    s.apply(&fixture("v1alpha1", "e2e-provider")).await;
    s.apply(&pod("secrets-store-inline-crd", &["e2e-provider"]))
        .await;
    s.ready("secrets-store-inline-crd").await;
    reads_foo_and_fookey(&s, MOUNT).await;
    insta::assert_snapshot!(s.state("secrets-store-inline-crd").await);
}

#[tokio::test]
async fn ep_09_to_13_v1_and_unmount() {
    let s = Scenario::start().await;
    s.apply(&fixture("v1", "e2e-provider")).await;
    s.apply(&pod("secrets-store-inline-crd", &["e2e-provider"]))
        .await;
    s.ready("secrets-store-inline-crd").await;
    reads_foo_and_fookey(&s, MOUNT).await;
    insta::assert_snapshot!(s.state("secrets-store-inline-crd").await);
    s.delete("secrets-store-inline-crd").await;
    s.nothing_is_left().await;
    let log = s.cluster.driver(&s.node()).log().await.unwrap();
    assert!(log.contains("unpublished"), "{log}");
    let failed = |line: &str| {
        line.starts_with('E') && line.contains("failed to clean and unmount target path")
    };
    assert!(!log.lines().any(failed), "{log}");
}

#[tokio::test]
async fn ep_20_no_class_in_the_pods_namespace() {
    let s = Scenario::start().await;
    s.apply(&pod("busybox", &["e2e-provider-sync"])).await;
    let event = s
        .failed_mount("busybox", "failed to get secretproviderclass")
        .await;
    let after = event
        .split_once("failed to get secretproviderclass [namespace]/e2e-provider-sync")
        .unwrap()
        .1;
    assert!(after.contains("not found"), "{event}");
}

#[tokio::test]
async fn ep_21_to_23_two_classes_in_one_pod() {
    let s = Scenario::start().await;
    for name in ["e2e-provider-spc-0", "e2e-provider-spc-1"] {
        s.apply(&fixture("v1", name)).await;
    }
    s.apply(&pod(
        "secrets-store-inline-crd",
        &["e2e-provider-spc-0", "e2e-provider-spc-1"],
    ))
    .await;
    s.ready("secrets-store-inline-crd").await;
    reads_foo_and_fookey(&s, MOUNT).await;
    reads_foo_and_fookey(&s, &format!("{MOUNT}-1")).await;
    insta::assert_snapshot!(s.pod_statuses().await);
}
