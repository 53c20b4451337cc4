//! Sources of values: certificates in all forms, and the options that upstream does not have.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use rstest::rstest;

use super::*;

macro_rules! fixture {
    ($name:literal) => {
        include_bytes!(concat!("../../../../driver/src/sync/tls/fixtures/", $name)).as_slice()
    };
}

fn tls_class(bundle: &[u8]) -> Class {
    let object = format!(
        "- {{objectName: bundle, contentBase64: {:?}}}",
        BASE64.encode(bundle)
    );
    let secret = SecretObject::new("creds", &[("tls.crt", "bundle"), ("tls.key", "bundle")]);
    class("db", &object).secret_objects([secret.of_type("kubernetes.io/tls")])
}

/// A Secret has leaf, chain and key in upstream's form, whatever the order and format of the
/// object.
#[tokio::test]
async fn certificates_in_any_form() {
    let s = Scenario::start().await;
    let [leaf, middle, root] = [
        fixture!("rsa.crt.pem"),
        fixture!("middle.crt.pem"),
        fixture!("root.crt.pem"),
    ];
    let (chain, key) = (
        [leaf, middle, root].concat(),
        fixture!("rsa.traditional.pem"),
    );
    let rsa = fixture!("rsa.key.pem");
    for (name, bundle) in [
        ("ordered", [leaf, middle, root, rsa].concat()),
        ("reversed", [rsa, root, middle, leaf].concat()),
        ("pkcs1", [key, middle, leaf, root].concat()),
        ("modern", fixture!("modern.p12").to_vec()),
        ("legacy", fixture!("legacy.p12").to_vec()),
        ("triple-des", fixture!("triple-des.p12").to_vec()),
        ("plain", fixture!("plain.p12").to_vec()),
    ] {
        s.apply(tls_class(&bundle)).await;
        s.apply(pod(name, &["db"])).await;
        s.ready(name).await;
        assert_eq!(
            s.value("creds", "tls.crt").await.unwrap().as_bytes(),
            chain,
            "{name}"
        );
        assert_eq!(
            s.value("creds", "tls.key").await.unwrap().as_bytes(),
            key,
            "{name}"
        );
        s.delete(name).await;
        s.no_secret("creds").await;
    }
    for (name, certificate, key, written) in [
        (
            "ec",
            fixture!("prime256v1.crt.pem"),
            fixture!("prime256v1.key.pem"),
            fixture!("prime256v1.traditional.pem"),
        ),
        (
            "ed25519",
            fixture!("ed25519.crt.pem"),
            fixture!("ed25519.key.pem"),
            fixture!("ed25519.key.pem"),
        ),
    ] {
        s.apply(tls_class(&[key, certificate].concat())).await;
        s.apply(pod(name, &["db"])).await;
        s.ready(name).await;
        assert_eq!(
            s.value("creds", "tls.key").await.unwrap().as_bytes(),
            written,
            "{name}"
        );
        s.delete(name).await;
        s.no_secret("creds").await;
    }
}

/// No incomplete or empty Secret is written; an event on the pod explains why.
#[tokio::test]
async fn certificates_that_cannot_be_used() {
    let s = Scenario::start().await;
    let mut text = String::new();
    let wrong = [fixture!("rsa.crt.pem"), fixture!("ed25519.key.pem")].concat();
    for (name, bundle) in [
        ("wrong-key", wrong.as_slice()),
        ("no-key", fixture!("rsa.crt.pem")),
        ("no-certificate", fixture!("rsa.key.pem")),
        ("password", fixture!("password.p12")),
        ("encrypted-key", fixture!("encrypted.key.pem")),
        ("garbage", b"not a certificate".as_slice()),
        ("empty", b"".as_slice()),
    ] {
        s.apply(tls_class(bundle)).await;
        s.apply(pod(name, &["db"])).await;
        s.ready(name).await;
        let told = s.failed_sync(name, "Secret creds").await;
        writeln!(text, "{name}: {told}").unwrap();
        assert!(s.secret("creds").await.is_none());
        s.delete(name).await;
    }
    insta::assert_snapshot!(text);
}

#[tokio::test]
async fn all_keys_decoded_and_out_of_json() {
    let s = Scenario::start().await;
    let objects = r#"- {objectName: user, content: admin}
- {objectName: nested, path: deep/er, content: value}
- {objectName: creds, content: '{"password": "hunter2", "port": 5432}'}
- {objectName: encoded, content: aHVudGVyMg==}"#;
    let everything = SecretObject::all_objects("everything");
    let parts = json!([
        {"objectName": "creds", "jsonKey": "password", "key": "password"},
        {"objectName": "creds", "jsonKey": "port", "key": "port"},
        {"objectName": "encoded", "encoding": "base64", "key": "decoded"},
    ]);
    let parts = SecretObject::new("parts", &[]).with("data", parts);
    s.apply(class("db", objects).secret_objects([everything, parts]))
        .await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    insta::assert_snapshot!(s.secrets().await);
}

/// Keys that a type requires are checked before the API server is asked; the event names them.
#[rstest]
#[case::docker("kubernetes.io/dockerconfigjson", ".dockerconfigjson")]
#[case::basic_auth("kubernetes.io/basic-auth", "username")]
#[case::ssh("kubernetes.io/ssh-auth", "ssh-privatekey")]
#[tokio::test]
async fn keys_that_a_type_needs(#[case] type_: &str, #[case] key: &str) {
    let s = Scenario::start().await;
    let wrong = creds().of_type(type_);
    let class = class("db", "- {objectName: password, content: '{\"auths\": {}}'}");
    s.apply(class.clone().secret_objects([wrong.clone()])).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let told = s.failed_sync("web", key).await;
    assert!(
        told.contains(type_) && told.contains("Secret creds"),
        "{told}"
    );
    assert!(s.secret("creds").await.is_none());
    s.apply(class.secret_objects([wrong.key(key)])).await;
    s.apply(pod("later", &["db"])).await;
    s.ready("later").await;
    let secret = s.secret("creds").await.unwrap();
    assert_eq!(secret.type_.as_deref(), Some(type_));
}
