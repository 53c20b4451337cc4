//! Service account tokens and secret references: they reach the provider, and are seen nowhere
//! else.

use std::time::Duration;

use e2e::cluster::Cluster as _;
use serde_json::json;

use crate::{
    harness::{Scenario, scenario, until},
    objects::{MOUNT, class, pod},
    settings::{Need, REFRESH_OFTEN, TokenPlace},
};

/// Returns the needs of these scenarios: a driver that refreshes often and logs all it can, and
/// tokens in this place.
const fn tokens(place: TokenPlace) -> [Need; 4] {
    [
        Need::Republish,
        REFRESH_OFTEN,
        Need::Flags(&["--rotation-backoff=1s", "-v=10"]),
        Need::Tokens {
            audiences: &["vault", "sts.example.com"],
            place,
        },
    ]
}

/// The provider requires a token for each audience, as in the first case of upstream's
/// `e2e-provider.bats` (`upstream.rs` explains the names). The tokens are bound to the pod. They
/// reach the provider among the attributes, wherever kubelet puts them.
#[rstest::rstest]
#[case::in_the_context(TokenPlace::Context)]
#[case::in_secrets(TokenPlace::Secrets)]
#[tokio::test]
async fn ep_01_tokens_reach_the_provider(#[case] place: TokenPlace) {
    let s = scenario!(tokens(place));
    s.provider_control("/validate-token-requests?audience=vault,sts.example.com")
        .await;
    let objects = "
        - {objectName: claims, contentFrom: tokenClaims}
        - {objectName: secrets, contentFrom: secrets}
        ";
    s.apply(class("db", objects)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let tree = s.reads("web", MOUNT).await;
    let texts = tree.texts();
    assert_eq!(texts["secrets"], "null", "none but tokens");
    insta::assert_snapshot!("tokens_are_bound_to_the_pod", s.redacted(texts["claims"]));
}

/// The provider gets the tokens that kubelet has renewed.
#[tokio::test]
async fn renewed_tokens_reach_the_provider() {
    let [republish, often, flags, tokens] = tokens(TokenPlace::Context);
    // A real kubelet renews a token when a fifth of its ten minutes is left.
    let minutes = Need::Embedded("kubelet renews tokens after minutes");
    let s = scenario!([republish, often, flags, tokens, minutes]);
    s.apply(class(
        "db",
        "- {objectName: digests, contentFrom: tokenDigests}",
    ))
    .await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let digests = async || s.reads("web", MOUNT).await.texts()["digests"].to_owned();
    let before = digests().await;
    until("other tokens have come", async || digests().await != before).await;
}

/// When no token is configured, the error explains how to configure one.
#[tokio::test]
async fn a_missing_token_is_explained() {
    let s = Scenario::start().await;
    s.provider_control("/validate-token-requests?audience=vault")
        .await;
    s.apply(class("db", "- {objectName: foo}")).await;
    s.apply(pod("web", &["db"])).await;
    insta::assert_snapshot!(s.failed_mount("web", "rpc error").await);
}

/// The Secret that a pod names in `nodePublishSecretRef` reaches the provider as a JSON object of
/// strings. This is the fifth case of upstream's `test/bats/akeyless.bats`, the only suite of
/// upstream that uses such a reference, with the fake provider.
#[tokio::test]
async fn ak_05_a_secret_reference() {
    let s = Scenario::start().await;
    let objects = "
        - {objectName: secrets, contentFrom: secrets}
        - {objectName: attributes, contentFrom: attributes}
        ";
    s.apply(class("db", objects)).await;
    s.apply(pod("web", &["db"]).secret_reference("secrets-store-creds"))
        .await;
    let missing = s.failed_mount("web", "NodePublishSecretRef").await;
    assert!(missing.contains("not found"), "{missing}");
    let labels = json!({"secrets-store.csi.k8s.io/used": "true"});
    s.apply(json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "secrets-store-creds", "labels": labels},
        "stringData": {"access-id": "p-1", "access-key": "k\"1"},
    }))
    .await;
    s.ready("web").await;
    let tree = s.reads("web", MOUNT).await;
    insta::assert_snapshot!(tree.texts()["secrets"]);
    assert!(!tree.texts()["attributes"].contains("p-1"));
}

const CANARY: &str = "canary-5f1c9e";

/// With the most verbose log, on success and after every error, secrets are in the volume only: in
/// no log line, event, metric, record or error.
#[tokio::test]
async fn canaries_are_seen_nowhere() {
    let s = scenario!(tokens(TokenPlace::Context));
    s.apply(json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "creds"},
        "stringData": {"key": format!("{CANARY}-reference")},
    }))
    .await;
    let object = format!("- {{objectName: password, content: {CANARY}-content}}");
    let faults = [
        ("fine", ""),
        (
            "denied",
            "- {times: 1, status: {code: PERMISSION_DENIED, message: no}}",
        ),
        ("code", "- {times: 1, errorCode: Refused}"),
        ("path", "- {times: 1, badPath: ../x}"),
        ("oversize", "- {times: 1, oversize: 5000000}"),
        ("versions", "- {times: 1, missingVersions: true}"),
        (
            "throttled",
            "- {times: 1, status: {code: RESOURCE_EXHAUSTED, message: slowly}}",
        ),
    ];
    for (name, fault) in faults {
        let class = class(name, &object).faults(fault);
        s.apply(class.parameter("key", &format!("{CANARY}-parameter")))
            .await;
        let pod = pod(name, &[name]).secret_reference("creds");
        s.apply(pod.attribute("own", &format!("{CANARY}-attribute")))
            .await;
    }
    for (name, _) in faults {
        s.ready(name).await;
        let password = format!("{CANARY}-content");
        assert_eq!(s.reads(name, MOUNT).await.texts()["password"], password);
    }
    // Also while a refresh fails.
    let fault = "- {status: {code: UNAUTHENTICATED, message: token expired}}";
    s.apply(class("fine", &object).faults(fault)).await;
    until("the refresh fails", async || {
        s.namespace.reconcile("fine").await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let events = s.namespace.events("fine").await.unwrap();
        let mut reasons = events.iter().filter_map(|event| event.reason.as_deref());
        reasons.any(|reason| reason == "MountRotationFailed")
    })
    .await;

    let driver = s.node();
    let driver = s.cluster.driver(&driver);
    let log = driver.log().await.unwrap();
    assert!(
        log.contains("asking the provider"),
        "not at its loudest: {log}"
    );
    let mut told = vec![("log", log), ("metrics", driver.metrics().await.unwrap())];
    for (name, _) in faults {
        let events = s.namespace.events(name).await.unwrap();
        told.push(("events", serde_json::to_string(&events).unwrap()));
    }
    let statuses = s.pod_status_objects().await;
    told.push(("statuses", serde_json::to_string(&statuses).unwrap()));
    let records = "/var/lib/kubelet/plugins/csi-secrets-store/records";
    let node = s.node();
    let records = s.cluster.node_tree(&node, records.as_ref()).await.unwrap();
    told.push(("records", serde_json::to_string(&records).unwrap()));
    for (place, text) in told {
        assert!(!text.contains(CANARY), "{place}: {text}");
        // Every token begins with this: {"alg":
        assert!(!text.contains("eyJhbGci"), "{place}: {text}");
    }
}
