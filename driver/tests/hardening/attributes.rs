//! What a pod's author writes into the attributes of a volume. kubelet puts its own attributes over
//! them, under its own keys and no others.

use std::sync::{Arc, Mutex};

use embedded::api::Reaction;
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};
use serde_json::{Value, json};
use tonic::Code;

use crate::{Node, UID};

const PREFIX: &str = "csi.storage.k8s.io/";
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// The number of pods, each with attributes of its own.
const PODS: usize = 200;

/// Returns a key of kubelet, a user's, or something between them.
fn key() -> impl Strategy<Value = String> {
    let of_kubelet = prop::sample::select(vec![
        "pod.name",
        "pod.namespace",
        "pod.uid",
        "serviceAccount.name",
        "serviceAccount.tokens",
        "ephemeral",
        "node.name",
        "a/b",
        "",
    ]);
    let spelling = 0..9;
    let spelled = (of_kubelet, spelling).prop_map(|(rest, spelling)| {
        let key = format!("{PREFIX}{rest}");
        match spelling {
            0 | 1 => key,
            2 => key.to_ascii_uppercase(),
            3 => format!(" {key}"),
            4 => format!("{key}\t"),
            5 => format!("\u{200b}{key}"),
            6 => key.replace('.', "\u{ad}."),
            7 => format!("{PREFIX}{}", rest.to_ascii_lowercase()),
            _ => key.replacen('/', "//", 1),
        }
    });
    let of_driver = prop::sample::select(vec![
        "SecretProviderClass",
        "secretProviderClass ",
        "secretproviderclass",
        "secretProviderClassNamespace",
        "namespace",
        "provider",
        "providerName",
        "parameters",
        "of",
        "secrets",
        "nodePublishSecretRef",
        "targetPath",
        "permission",
    ]);
    prop_oneof![
        4 => spelled,
        3 => of_driver.prop_map(str::to_owned),
        1 => "[a-zA-Z./-]{1,20}",
    ]
}

/// Returns what an author would like to have instead.
fn value() -> impl Strategy<Value = String> {
    let wishes = [
        "other",
        "other/db",
        "../../other/secretproviderclasses/db",
        "..%2f..%2fother",
        "mock_provider",
        "forbidden",
        "/etc",
        r#"{"vault":{"token":"mine"}}"#,
        "",
    ];
    prop::sample::select(wishes.to_vec()).prop_map(str::to_owned)
}

/// Returns the value of `secretProviderClass`: mostly the right one.
fn class() -> impl Strategy<Value = String> {
    prop_oneof![4 => Just("db".to_owned()), 1 => value()]
}

/// Whatever an author writes, the driver reads classes of the pod's namespace only, asks only the provider
/// of the class, and tells it of kubelet's attributes only what kubelet said.
#[tokio::test]
async fn an_author_cannot_speak_for_kubelet() {
    let node = Node::new().await;
    node.put_class("other", "db", "forbidden");
    let asked_api = Arc::<Mutex<Vec<String>>>::default();
    let seen = Arc::clone(&asked_api);
    node.api.intercept(move |call| {
        seen.lock().unwrap().push(call.uri.to_owned());
        Reaction::Serve
    });
    let (provider, forbidden) = (node.serve("test"), node.serve("forbidden"));
    let mut driver = node.driver(&[]);

    let mut runner = TestRunner::default();
    let pods = (prop::collection::vec((key(), value()), 0..6), class());
    let (mut published, mut refused) = (0, 0);
    for number in 0..PODS {
        let (author, class) = pods.new_tree(&mut runner).unwrap().current();
        let mut author: Vec<(&str, &str)> = author
            .iter()
            .map(|(k, v)| (k.as_str(), v.as_str()))
            .collect();
        author.push(("secretProviderClass", &class));
        let volume = format!("v{number}");
        match driver.publish(node.request(&volume, &author)).await {
            Ok(()) => {
                published += 1;
                let sent = provider.asked.lock().unwrap().pop().unwrap();
                check_sent(&sent, &author);
            }
            Err(status) => {
                refused += 1;
                let codes = [Code::InvalidArgument, Code::NotFound];
                assert!(codes.contains(&status.code()), "{author:?}: {status:?}");
            }
        }
        assert!(provider.asked.lock().unwrap().is_empty(), "{author:?}");
    }
    assert!(
        published > PODS / 10 && refused > PODS / 10,
        "{published}, {refused}"
    );
    assert_eq!(*forbidden.asked.lock().unwrap(), [] as [Value; 0]);
    let asked_api = asked_api.lock().unwrap();
    for uri in asked_api.iter().filter(|uri| uri.contains("/namespaces/")) {
        assert!(uri.contains("/namespaces/shop/"), "{uri}");
    }
}

/// Checks what the provider was sent: of keys that resemble kubelet's, only kubelet's, with its values.
fn check_sent(sent: &Value, author: &[(&str, &str)]) {
    let context = format!("{author:?}: {sent}");
    let said = json!({
        "csi.storage.k8s.io/ephemeral": "true",
        "csi.storage.k8s.io/pod.name": "web",
        "csi.storage.k8s.io/pod.namespace": "shop",
        "csi.storage.k8s.io/pod.uid": UID,
        "csi.storage.k8s.io/serviceAccount.name": "default",
    });
    for (key, value) in sent.as_object().unwrap() {
        let plain: String = key.chars().filter(char::is_ascii_graphic).collect();
        if !plain.to_ascii_lowercase().starts_with(PREFIX) {
            continue;
        }
        // A kubelet that gives no tokens overrides none. Whoever has a token can use it without the
        // driver, too.
        let is_authors_token = key == TOKENS && author.contains(&(key, value.as_str().unwrap()));
        assert!(
            said.get(key) == Some(value) || is_authors_token,
            "{key}: {context}"
        );
    }
    for (key, _) in said.as_object().unwrap() {
        assert!(sent.get(key).is_some(), "{key}: {context}");
    }
}

/// kubelet's tokens go over the author's, and those of a class are none.
#[tokio::test]
async fn tokens_come_from_kubelet() {
    let node = Node::new().await;
    let provider = node.serve("test");
    let path = "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasses/db";
    let mut class = node.api.get(path).unwrap();
    for key in [
        TOKENS,
        "CSI.storage.k8s.io/pod.namespace",
        "csi.storage.k8s.io/pod.uid",
    ] {
        class["spec"]["parameters"][key] = json!("of the class");
    }
    node.api.put(path, class).unwrap();
    let mut driver = node.driver(&[]);

    driver.publish(node.request("none", &[])).await.unwrap();
    let sent = provider.asked.lock().unwrap().pop().unwrap();
    assert_eq!(sent.get(TOKENS), None, "{sent}");
    assert!(!sent.to_string().contains("of the class"), "{sent}");

    // Since Kubernetes 1.35, kubelet may give them among the secrets.
    let mut request = node.request("some", &[(TOKENS, "the author's")]);
    request.secrets = [(TOKENS.to_owned(), "kubelet's".to_owned())].into();
    driver.publish(request).await.unwrap();
    let sent = provider.asked.lock().unwrap().pop().unwrap();
    assert_eq!(sent[TOKENS], "kubelet's", "{sent}");
}
