//! The end-to-end cases of the existing driver with its fixtures, without the parts about Secrets.
//!
//! Its suite is `test/bats/e2e-provider.bats` of kubernetes-sigs/secrets-store-csi-driver, v1.6.0;
//! the fixtures are in `test/bats/tests/e2e_provider`. A name such as `ep_05_to_08` names the cases
//! of that file that a scenario covers, counted from the first `@test`; `ep` is short for
//! "e2e-provider". Cases 1, 14 to 19, 22 and 23 (with Secrets) and 24 to 26 are in `tokens.rs`,
//! `secrets.rs` and `rotation.rs`. `ak_05` is the fifth case of `test/bats/akeyless.bats`.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use e2e::cluster::Cluster as _;
use k8s_openapi::{
    api::rbac::v1::{ClusterRole, ClusterRoleBinding},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::Api;

use crate::{
    harness::Scenario,
    objects::{MOUNT, pod},
};

const KEY: &str = "-----BEGIN PUBLIC KEY-----\nThis is mock key\n-----END PUBLIC KEY-----";

/// Returns the class of the cases 5 and 9.
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

/// The CRDs are established, and roles and bindings have the usual names.
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

/// A class of the deprecated version `v1alpha1` is mounted.
#[tokio::test]
async fn ep_05_to_08_v1alpha1() {
    let s = Scenario::start().await;
    s.apply(&fixture("v1alpha1", "e2e-provider")).await;
    s.apply(pod("secrets-store-inline-crd", &["e2e-provider"]))
        .await;
    s.ready("secrets-store-inline-crd").await;
    reads_foo_and_fookey(&s, MOUNT).await;
    insta::assert_snapshot!(s.state("secrets-store-inline-crd").await);
}

/// A class of version `v1` is mounted, and unmounted without an error in the log.
#[tokio::test]
async fn ep_09_to_13_v1_and_unmount() {
    let s = Scenario::start().await;
    s.apply(&fixture("v1", "e2e-provider")).await;
    s.apply(pod("secrets-store-inline-crd", &["e2e-provider"]))
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

/// A class in another namespace than the pod's is not found.
#[tokio::test]
async fn ep_20_no_class_in_the_pods_namespace() {
    let s = Scenario::start().await;
    s.apply(pod("busybox", &["e2e-provider-sync"])).await;
    let event = s
        .failed_mount("busybox", "failed to get secretproviderclass")
        .await;
    let after = event
        .split_once("failed to get secretproviderclass [namespace]/e2e-provider-sync")
        .unwrap()
        .1;
    assert!(after.contains("not found"), "{event}");
}

/// One pod mounts two classes.
#[tokio::test]
async fn ep_21_to_23_two_classes_in_one_pod() {
    let s = Scenario::start().await;
    for name in ["e2e-provider-spc-0", "e2e-provider-spc-1"] {
        s.apply(&fixture("v1", name)).await;
    }
    s.apply(pod(
        "secrets-store-inline-crd",
        &["e2e-provider-spc-0", "e2e-provider-spc-1"],
    ))
    .await;
    s.ready("secrets-store-inline-crd").await;
    reads_foo_and_fookey(&s, MOUNT).await;
    reads_foo_and_fookey(&s, &format!("{MOUNT}-1")).await;
    insta::assert_snapshot!(s.pod_statuses().await);
}
