//! Entries of classes, files of volumes, and what they make or why they do not.

use super::*;
use crate::{cluster::resources::SecretObjectData, volume::record};
use rstest::rstest;
use serde_json::json;

fn class(objects: &[SecretObject]) -> Class {
    Class {
        identity: record::Class {
            name: "db".into(),
            uid: "u".into(),
            generation: Some(1),
            resource_version: "1".into(),
            annotations: BTreeMap::new(),
        },
        provider: "vault".into(),
        parameters: BTreeMap::new(),
        secret_objects: objects.to_vec(),
    }
}

fn entry(type_: &str, data: serde_json::Value) -> SecretObject {
    let object = json!({"secretName": " creds ", "type": type_, "data": data});
    serde_json::from_value(object).unwrap()
}

fn volume(files: &[(&str, &str)]) -> BTreeMap<String, Secret> {
    let file = |(path, text): &(&str, &str)| ((*path).to_owned(), (*text).to_owned().into());
    files.iter().map(file).collect()
}

fn made(object: &SecretObject, files: &[(&str, &str)]) -> Result<Desired, String> {
    let class = class(std::slice::from_ref(object));
    desired(&class, object, &volume(files)).map_err(|problem| problem.to_string())
}

fn texts(desired: &Desired) -> BTreeMap<&str, &str> {
    let text = |value| std::str::from_utf8(Secret::expose(value)).unwrap();
    let data = desired.data.iter();
    data.map(|(key, value)| (key.as_str(), text(value)))
        .collect()
}

const FILES: &[(&str, &str)] = &[
    ("password", "hunter2"),
    ("deep/user", "admin"),
    (
        "creds",
        r#"{"a": {"b": 1}, "password": "x\n\"y", "none": null}"#,
    ),
    ("encoded", "aHVudGVyMg==\n"),
    ("empty", ""),
];

#[rstest]
#[case::trimmed(json!([{"objectName": " password ", "key": " pw "}]), &[("pw", "hunter2")])]
#[case::nested_path(json!([{"objectName": "deep/user", "key": "user"}]), &[("user", "admin")])]
#[case::one_object_twice(
    json!([{"objectName": "password", "key": "a"}, {"objectName": "password", "key": "b"}]),
    &[("a", "hunter2"), ("b", "hunter2")]
)]
#[case::the_last_of_one_key(
    json!([{"objectName": "password", "key": "a"}, {"objectName": "deep/user", "key": "a"}]),
    &[("a", "admin")]
)]
#[case::empty_value(json!([{"objectName": "empty", "key": "a"}]), &[("a", "")])]
#[case::json_string(json!([{"objectName": "creds", "key": "a", "jsonKey": "password"}]), &[("a", "x\n\"y")])]
#[case::json_object(json!([{"objectName": "creds", "key": "a", "jsonKey": "a"}]), &[("a", r#"{"b":1}"#)])]
#[case::json_null(json!([{"objectName": "creds", "key": "a", "jsonKey": "none"}]), &[("a", "null")])]
#[case::base64(json!([{"objectName": "encoded", "key": "a", "encoding": "base64"}]), &[("a", "hunter2")])]
fn values_come_from_the_files(#[case] data: serde_json::Value, #[case] expected: &[(&str, &str)]) {
    let made = made(&entry("Opaque", data), FILES).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(
        (made.name.as_str(), made.type_.as_str()),
        ("creds", "Opaque")
    );
    assert_eq!(texts(&made), expected.iter().copied().collect());
}

#[test]
fn all_objects_and_what_is_named_wins() {
    let files = &[("a", "1"), ("b/c", "2"), ("d", "3")];
    let data = json!([{"objectName": "d", "key": "a"}, {"objectName": "*"}]);
    let made = made(&entry("Opaque", data), files).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(
        texts(&made),
        BTreeMap::from([("a", "3"), ("b.c", "2"), ("d", "3")])
    );
}

#[rstest]
#[case::no_type("", json!([{"objectName": "password", "key": "a"}]), "type is empty")]
#[case::no_data("Opaque", json!([]), "data is empty")]
#[case::no_object_name("Opaque", json!([{"objectName": " ", "key": "a"}]), "objectName is empty for key \"a\"")]
#[case::no_key("Opaque", json!([{"objectName": "password", "key": ""}]), "key is empty for object \"password\"")]
#[case::bad_key("Opaque", json!([{"objectName": "password", "key": "a/b"}]), "\"a/b\" cannot be a key")]
#[case::missing_file("Opaque", json!([{"objectName": "nope", "key": "a"}]), "key a: there is no object \"nope\"")]
#[case::hidden_file("Opaque", json!([{"objectName": "../password", "key": "a"}]), "there is no object")]
#[case::all_with_a_key("Opaque", json!([{"objectName": "*", "key": "a"}]), "leave it out")]
#[case::no_such_field("Opaque", json!([{"objectName": "creds", "key": "a", "jsonKey": "x"}]), "key a: the object is not a JSON object with a field \"x\"")]
#[case::no_json("Opaque", json!([{"objectName": "password", "key": "a", "jsonKey": "x"}]), "not a JSON object")]
#[case::no_base64("Opaque", json!([{"objectName": "password", "key": "a", "encoding": "base64"}]), "not base64")]
#[case::encoding("Opaque", json!([{"objectName": "password", "key": "a", "encoding": "rot13"}]), "\"rot13\" is not known")]
#[case::docker_key("kubernetes.io/dockerconfigjson", json!([{"objectName": "creds", "key": "config"}]), "needs key .dockerconfigjson")]
#[case::docker_value("kubernetes.io/dockerconfigjson", json!([{"objectName": "password", "key": ".dockerconfigjson"}]), "needs a JSON object")]
#[case::docker_old("kubernetes.io/dockercfg", json!([{"objectName": "creds", "key": "x"}]), "needs key .dockercfg")]
#[case::basic_auth("kubernetes.io/basic-auth", json!([{"objectName": "password", "key": "pw"}]), "username or password")]
#[case::ssh("kubernetes.io/ssh-auth", json!([{"objectName": "password", "key": "id_rsa"}]), "needs key ssh-privatekey, and it is not there")]
#[case::ssh_empty("kubernetes.io/ssh-auth", json!([{"objectName": "empty", "key": "ssh-privatekey"}]), "ssh-privatekey, and it is empty")]
#[case::bootstrap("bootstrap.kubernetes.io/token", json!([{"objectName": "password", "key": "token-id"}]), "needs key token-secret")]
#[case::account("kubernetes.io/service-account-token", json!([{"objectName": "password", "key": "x"}]), "kubernetes.io/service-account.name")]
#[case::tls_key("kubernetes.io/tls", json!([{"objectName": "password", "key": "x"}]), "needs key tls.crt")]
#[case::tls_garbage("kubernetes.io/tls", json!([{"objectName": "password", "key": "tls.crt"}, {"objectName": "password", "key": "tls.key"}]), "key tls.crt: object \"password\" cannot be used")]
fn what_cannot_be_is_refused(
    #[case] type_: &str,
    #[case] data: serde_json::Value,
    #[case] why: &str,
) {
    let error = made(&entry(type_, data), FILES).err().unwrap();
    assert!(error.contains(why), "{error}");
    assert!(
        error.starts_with("SecretProviderClass db, Secret creds: "),
        "{error}"
    );
    assert!(!error.contains("hunter2"), "{error}");
}

#[rstest]
#[case::user("kubernetes.io/basic-auth", "username")]
#[case::any("shop.example/custom", "anything")]
fn types_that_have_what_they_need(#[case] type_: &str, #[case] key: &str) {
    let data = json!([{"objectName": "password", "key": key}]);
    let made = made(&entry(type_, data), FILES).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(made.type_, type_);
}

#[rstest]
#[case::empty("", "no secretName")]
#[case::blank("  ", "no secretName")]
#[case::elsewhere("../../kube-system/secrets/x", "cannot be the name")]
#[case::upper_case("Creds", "cannot be the name")]
#[case::query("a?b", "cannot be the name")]
fn names_that_are_none(#[case] name: &str, #[case] why: &str) {
    let object = SecretObject {
        secret_name: name.into(),
        ..SecretObject::default()
    };
    let error = super::name(&class(&[]), &object).err().unwrap().to_string();
    assert!(
        error.contains(why) && error.contains("SecretProviderClass db"),
        "{error}"
    );
}

#[test]
fn a_secret_holds_no_more_than_the_api_takes() {
    let data = json!([{"objectName": "a", "key": "a"}, {"objectName": "b", "key": "b"}]);
    let object = entry("Opaque", data);
    let text = "x".repeat(MOST_BYTES - 1);
    assert!(made(&object, &[("a", &text), ("b", "y")]).is_ok());
    let error = made(&object, &[("a", &text), ("b", "yy")]).err().unwrap();
    assert!(error.contains("1048577 bytes"), "{error}");
}

#[test]
fn only_what_is_needed_is_read() {
    let named = |name: &str| SecretObject {
        data: vec![SecretObjectData {
            object_name: name.into(),
            ..SecretObjectData::default()
        }],
        ..SecretObject::default()
    };
    assert!(needs(&[named(" a ")], "a") && !needs(&[named("a")], "b"));
    assert!(needs(&[named("a"), named("*")], "b"));
}

#[test]
fn a_tls_secret_gets_pairs_in_the_form_that_the_class_asks_for() {
    let key = include_str!("../tls/fixtures/rsa.key.pem");
    let bundle = format!("{key}{}", include_str!("../tls/fixtures/rsa.crt.pem"));
    let data = json!([
        {"objectName": "bundle", "key": "tls.crt"},
        {"objectName": "bundle", "key": "tls.key"},
        {"objectName": "ca", "key": "ca.crt"},
    ]);
    let object = entry(TLS, data);
    let files = volume(&[("bundle", &bundle), ("ca", "as it is")]);
    for (format, expected) in [
        (
            None,
            Some(include_str!("../tls/fixtures/rsa.traditional.pem")),
        ),
        (Some("original"), Some(key)),
        (Some("pkcs9"), None),
    ] {
        let mut class = class(&[]);
        let annotation = format.map(|format| (TLS_KEY_FORMAT.to_owned(), format.to_owned()));
        class.identity.annotations.extend(annotation);
        let made = desired(&class, &object, &files).ok();
        let made = made.as_ref().map(|made| texts(made)["tls.key"]);
        assert_eq!(made, expected);
    }
    let made = desired(&class(&[]), &object, &files).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(texts(&made)["ca.crt"], "as it is");
}
