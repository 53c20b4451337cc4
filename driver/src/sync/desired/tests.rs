//! Tests the data that entries of classes and files of volumes give, and the errors.

use super::*;
use crate::{
    cluster::resources::SecretObjectData,
    sync::parsing::{Caller, RefusedObjects},
};
use rstest::rstest;
use serde_json::json;

fn entry(type_: &str, data: serde_json::Value) -> SecretObject {
    let object = json!({"secretName": " creds ", "type": type_, "data": data});
    crate::cluster::trimmed(serde_json::from_value(object).unwrap())
}

fn volume(files: &[(&str, &str)]) -> BTreeMap<String, Secret> {
    let file = |(path, text): &(&str, &str)| ((*path).to_owned(), (*text).to_owned().into());
    files.iter().map(file).collect()
}

fn computed(object: &SecretObject, files: &[(&str, &str)]) -> Result<SecretData, String> {
    let class = Class::with_secrets(vec![object.clone()]);
    compute_alone(&class, object, &volume(files)).map_err(|error| error.to_string())
}

/// Computes the Secret of one entry alone.
fn compute_alone(
    class: &Class,
    object: &SecretObject,
    files: &SecretData,
) -> Result<SecretData, SyncError> {
    let (refused, caller) = (RefusedObjects::default(), Caller::default());
    let mut sources = Sources::parse([object], files, &refused, &caller);
    let entry = Entry::new(class, object)?;
    data(entry, &mut sources).map_err(|error| entry.error(error))
}

fn texts(data: &SecretData) -> BTreeMap<&str, &str> {
    let text = |value| std::str::from_utf8(Secret::expose(value)).unwrap();
    let data = data.iter();
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
    let computed = computed(&entry("Opaque", data), FILES).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(texts(&computed), expected.iter().copied().collect());
}

#[test]
fn all_objects_and_what_is_named_wins() {
    let files = &[("a", "1"), ("b/c", "2"), ("d", "3")];
    let data = json!([{"objectName": "d", "key": "a"}, {"objectName": "*"}]);
    let computed = computed(&entry("Opaque", data), files).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(
        texts(&computed),
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
#[case::no_base64("Opaque", json!([{"objectName": "password", "key": "a", "encoding": "base64"}]), "not valid base64")]
#[case::encoding("Opaque", json!([{"objectName": "password", "key": "a", "encoding": "rot13"}]), "\"rot13\" is not supported")]
#[case::docker_key("kubernetes.io/dockerconfigjson", json!([{"objectName": "creds", "key": "config"}]), "needs key .dockerconfigjson")]
#[case::docker_value("kubernetes.io/dockerconfigjson", json!([{"objectName": "password", "key": ".dockerconfigjson"}]), "needs a JSON object")]
#[case::docker_old("kubernetes.io/dockercfg", json!([{"objectName": "creds", "key": "x"}]), "needs key .dockercfg")]
#[case::basic_auth("kubernetes.io/basic-auth", json!([{"objectName": "password", "key": "pw"}]), "username or password")]
#[case::ssh("kubernetes.io/ssh-auth", json!([{"objectName": "password", "key": "id_rsa"}]), "needs key ssh-privatekey, and it is missing")]
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
    let error = computed(&entry(type_, data), FILES).err().unwrap();
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
    let computed = computed(&entry(type_, data), FILES).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(texts(&computed), BTreeMap::from([(key, "hunter2")]));
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
    let object = crate::cluster::trimmed(object);
    let error = Entry::new(&Class::with_secrets(Vec::new()), &object)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains(why) && error.contains("SecretProviderClass db"),
        "{error}"
    );
}

#[test]
fn a_secret_holds_no_more_than_the_api_takes() {
    let data = json!([{"objectName": "a", "key": "a"}, {"objectName": "b", "key": "b"}]);
    let object = entry("Opaque", data);
    let text = "x".repeat(MAX_BYTES - 1);
    assert!(computed(&object, &[("a", &text), ("b", "y")]).is_ok());
    let error = computed(&object, &[("a", &text), ("b", "yy")])
        .err()
        .unwrap();
    assert!(
        error.contains("more than the 1048576 bytes that a Secret holds"),
        "{error}"
    );
}

#[test]
fn only_what_is_needed_is_read() {
    let named = |name: &str| {
        crate::cluster::trimmed(SecretObject {
            data: vec![SecretObjectData {
                object_name: name.into(),
                ..SecretObjectData::default()
            }],
            ..SecretObject::default()
        })
    };
    let needs = |object: &SecretObject, path: &str| Needs::of([object]).includes(path);
    assert!(needs(&named(" a "), "a") && !needs(&named("a"), "b"));
    assert!(needs(&named("*"), "b"));
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
        let mut class = Class::with_secrets(Vec::new());
        let annotation = format.map(|format| (TLS_KEY_FORMAT.to_owned(), format.to_owned()));
        class.identity.annotations.extend(annotation);
        let computed = compute_alone(&class, &object, &files).ok();
        let key = computed.as_ref().map(|data| texts(data)["tls.key"]);
        assert_eq!(key, expected);
    }
    let computed = compute_alone(&Class::with_secrets(Vec::new()), &object, &files)
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(texts(&computed)["ca.crt"], "as it is");
}

mod generated {
    use super::*;
    use proptest::prelude::*;

    /// Paths, JSON fields and encodings of which some are there, some are not, and some are alike.
    fn entries() -> impl Strategy<Value = Vec<SecretObjectData>> {
        let text = |texts: &'static [&'static str]| prop::sample::select(texts);
        let entry = (
            text(&["a", "b/c", "json", "encoded", "*", "*"]),
            text(&["", "k", "l", "a", "b.c"]),
            text(&["", "", "x", "y", "z"]),
            text(&["", "", "base64"]),
        );
        let entry = entry.prop_map(|(object_name, key, json_key, encoding)| SecretObjectData {
            object_name: object_name.into(),
            key: if object_name == "*" {
                String::new()
            } else {
                key.into()
            },
            json_key: json_key.into(),
            encoding: encoding.into(),
        });
        prop::collection::vec(entry, 1..12)
    }

    /// The contents of `a`, `b/c`, `json` and `encoded`.
    fn contents() -> impl Strategy<Value = [String; 4]> {
        let json = prop_oneof![
            Just(r#"{"x": "1", "y": [1, {"b": 2.5, "a": null}], "x": "YWJj"}"#),
            Just(r#"{"x": "YWJj", "y": "!", "z": {}}"#),
            Just("[1]"),
        ];
        let content = prop_oneof!["[ -~]{0,8}", Just("YWJj\n".to_owned())];
        let contents = (content.clone(), content.clone(), json, content);
        contents.prop_map(|(a, c, json, encoded)| [a, c, json.to_owned(), encoded])
    }

    /// Returns one entry's value, computed by itself.
    fn one_value(entry: &SecretObjectData, content: &Secret) -> Option<Vec<u8>> {
        let mut value = content.expose().to_vec();
        if !entry.json_key.is_empty() {
            let object: serde_json::Value = serde_json::from_slice(&value).ok()?;
            value = match object.as_object()?.get(&entry.json_key)? {
                serde_json::Value::String(text) => text.clone().into_bytes(),
                other => other.to_string().into_bytes(),
            };
        }
        if entry.encoding == "base64" {
            use base64::Engine as _;
            value.retain(|byte| !byte.is_ascii_whitespace());
            let engine = base64::engine::general_purpose::STANDARD;
            value = engine.decode(&value).ok()?;
        }
        Some(value)
    }

    /// Returns the values of all entries, or `None` if one of them has none.
    fn expected(
        entries: &[SecretObjectData],
        files: &BTreeMap<String, Secret>,
    ) -> Option<BTreeMap<String, Vec<u8>>> {
        let (all, named): (Vec<_>, Vec<_>) = entries.iter().partition(|e| e.object_name == "*");
        let mut values = BTreeMap::new();
        for (number, entry) in all.into_iter().enumerate() {
            for (path, content) in files {
                values.insert(path.replace('/', "."), one_value(entry, content)?);
            }
            if number > 0 {
                return None;
            }
        }
        for entry in named {
            if entry.key.is_empty() {
                return None;
            }
            let content = files.get(&entry.object_name)?;
            values.insert(entry.key.clone(), one_value(entry, content)?);
        }
        Some(values)
    }

    proptest! {
        /// Each key gets the value that its entry would give by itself.
        #[test]
        fn each_key_gets_what_its_entry_says(entries in entries(), contents in contents()) {
            let [a, c, json, encoded] = &contents;
            let files = volume(&[("a", a), ("b/c", c), ("json", json), ("encoded", encoded)]);
            let object = SecretObject {
                data: entries.clone(),
                ..entry("Opaque", json!([]))
            };
            let computed = compute_alone(&Class::with_secrets(Vec::new()), &object, &files).ok();
            let data = computed.map(|data| {
                let value = |(key, value): (String, Secret)| (key, value.expose().to_vec());
                data.into_iter().map(value).collect()
            });
            prop_assert_eq!(data, expected(&entries, &files));
        }
    }
}

/// Tests the cost of a class of half a megabyte, which must not grow with the sum of its entries.
mod costs {
    use super::*;
    use std::{
        env, fs,
        process::Command,
        time::{Duration, Instant},
    };

    const CHILD: &str = "A_CHILD_THAT_MEASURES_ITS_MEMORY";

    fn entries(count: usize, one: impl Fn(usize) -> serde_json::Value) -> SecretObject {
        entry("Opaque", (0..count).map(one).collect())
    }

    fn text_of(length: usize) -> String {
        "x".repeat(length)
    }

    /// Returns a case by its name: a Secret and the files of its volume.
    fn case(name: &str) -> (SecretObject, BTreeMap<String, Secret>) {
        let key = |number: usize| format!("k{number}");
        match name {
            "one_object" => {
                let one = |n: usize| json!({"objectName": "a", "key": key(n)});
                (entries(12_000, one), volume(&[("a", &text_of(64 * 1024))]))
            }
            "one_key" => {
                let one = |_: usize| json!({"objectName": "a", "key": "k"});
                (
                    entries(12_000, one),
                    volume(&[("a", &text_of(1024 * 1024))]),
                )
            }
            "one_json_field" => {
                let one = |n: usize| json!({"objectName": "a", "key": key(n), "jsonKey": "f"});
                let json = json!({"f": text_of(3_500_000)}).to_string();
                (entries(8_000, one), volume(&[("a", &json)]))
            }
            "many_json_fields" => {
                let one = |n: usize| json!({"objectName": "a", "key": key(n), "jsonKey": key(n)});
                let fields: serde_json::Map<_, _> =
                    (0..8_000).map(|n| (key(n), text_of(400).into())).collect();
                let json = serde_json::Value::from(fields).to_string();
                (entries(8_000, one), volume(&[("a", &json)]))
            }
            "one_field_again_and_again" => {
                let one = |_: usize| json!({"objectName": "a", "key": "k", "jsonKey": "f"});
                let json = format!("{{{}\"f\": 1}}", r#""f": [[]], "#.repeat(200_000));
                (entries(1, one), volume(&[("a", &json)]))
            }
            "brackets" => {
                let one = |_: usize| json!({"objectName": "a", "key": "k", "jsonKey": "f"});
                let json = format!("{{\"f\": [[]{}]}}", ",[]".repeat(2_500_000));
                (entries(1, one), volume(&[("a", &json)]))
            }
            "blank_base64" => {
                let one =
                    |n: usize| json!({"objectName": "a", "key": key(n), "encoding": "base64"});
                let text = format!("{}YWJj", " ".repeat(7_000_000));
                (entries(12_000, one), volume(&[("a", &text)]))
            }
            "many_objects" => {
                let paths: Vec<String> = (0..10_000).map(|n| format!("f{n}")).collect();
                let files = paths.iter().map(|path| (path.as_str(), "1"));
                let one =
                    |n: usize| json!({"objectName": format!("f{}", n % 10_000), "key": key(n)});
                (entries(12_000, one), volume(&files.collect::<Vec<_>>()))
            }
            other => panic!("no case {other}"),
        }
    }

    /// Returns the most memory that this process has had, in KiB.
    fn most_memory() -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:"));
        let digits = line.unwrap().split_whitespace().nth(1);
        digits.unwrap().parse().unwrap()
    }

    #[rstest]
    #[case::one_object("one_object", "1048576 bytes")]
    #[case::one_key("one_key", "")]
    #[case::one_json_field("one_json_field", "1048576 bytes")]
    #[case::many_json_fields("many_json_fields", "1048576 bytes")]
    #[case::one_field_again_and_again("one_field_again_and_again", "")]
    #[case::brackets("brackets", "too large for a Secret")]
    #[case::blank_base64("blank_base64", "")]
    #[case::many_objects("many_objects", "")]
    fn neither_memory_nor_time(#[case] name: &str, #[case] says: &str) {
        if env::var(CHILD).is_err() {
            // Runs in a process of its own, so that the memory of other tests is not counted.
            let own = std::thread::current().name().unwrap().to_owned();
            let child = Command::new(env::current_exe().unwrap())
                .args(["--exact", &own, "--nocapture"])
                .env(CHILD, "1")
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&child.stdout).into_owned();
            assert!(
                child.status.success() && said.contains("1 passed"),
                "{said}"
            );
            return;
        }
        let (object, files) = case(name);
        let class = Class::with_secrets(Vec::new());
        let before = most_memory();
        let started = Instant::now();
        let computed = compute_alone(&class, &object, &files);
        let took = started.elapsed();
        match computed {
            Ok(_) => assert_eq!(says, ""),
            Err(error) => {
                let error = error.to_string();
                assert!(!says.is_empty() && error.contains(says), "{error}");
            }
        }
        let more = most_memory() - before;
        assert!(more < 64 * 1024, "{more} KiB more than before");
        assert!(took < Duration::from_secs(60), "{took:?}");
    }
}
