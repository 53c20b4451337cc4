//! What a Secret should be: a class's entry and the mounted files make it, and nothing else does.
//!
//! Everything that the API server would refuse is refused here first, with the class, the Secret
//! and the key by name: its own answer would name none of the three that the user can change.

use std::{collections::BTreeMap, fmt};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{
    Deserializer as _,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::Value;
use zeroize::Zeroizing;

use super::{
    Problem, Trouble,
    tls::{self, KeyFormat, Parts},
};
use crate::{
    cluster::{Class, is_object_name, resources::SecretObject},
    secret::Secret,
};

/// On a class: how the private keys of its TLS Secrets are written, `traditional` or `original`.
pub const TLS_KEY_FORMAT: &str = "secrets-store.csi.k8s.io/tls-key-format";

/// As an object's name: all of them.
const ALL: &str = "*";

/// The API server takes no more in the values of one Secret.
const MOST_BYTES: usize = 1024 * 1024;

const TLS: &str = "kubernetes.io/tls";
const CERTIFICATE: &str = "tls.crt";
const PRIVATE_KEY: &str = "tls.key";

/// Keys without which a Secret of a type is of no use, and mostly refused by the API server:
/// https://kubernetes.io/docs/concepts/configuration/secret/#secret-types
const REQUIRED: [(&str, &[&str]); 7] = [
    (TLS, &[CERTIFICATE, PRIVATE_KEY]),
    ("kubernetes.io/dockerconfigjson", &[".dockerconfigjson"]),
    ("kubernetes.io/dockercfg", &[".dockercfg"]),
    ("kubernetes.io/ssh-auth", &["ssh-privatekey"]),
    (
        "bootstrap.kubernetes.io/token",
        &["token-id", "token-secret"],
    ),
    // Either of them does.
    ("kubernetes.io/basic-auth", &["username", "password"]),
    ("kubernetes.io/service-account-token", &[]),
];

/// A Secret as it should be, without what the driver adds for itself.
pub struct Desired {
    /// Its name, which is one.
    pub name: String,
    /// Its type.
    pub type_: String,
    /// Labels that the class asks for.
    pub labels: BTreeMap<String, String>,
    /// Annotations that the class asks for.
    pub annotations: BTreeMap<String, String>,
    /// All of its data.
    pub data: BTreeMap<String, Secret>,
}

/// Whether a file of the volume is needed for these entries.
pub fn needs(objects: &[SecretObject], path: &str) -> bool {
    let names = objects.iter().flat_map(|object| &object.data);
    names
        .map(|data| data.object_name.trim())
        .any(|name| name == ALL || name == path)
}

/// The name of an entry's Secret, in which there is nothing that could lead to another object.
///
/// # Errors
/// When it is no name.
pub fn name<'a>(class: &Class, object: &'a SecretObject) -> Result<&'a str, Problem> {
    let name = object.secret_name.trim();
    let refuse = |why: &str| Err(invalid(format!("{}: {why}", class.identity.name)));
    if name.is_empty() {
        return refuse("an entry of secretObjects has no secretName");
    }
    if !is_object_name(name) {
        return refuse(&format!(
            "secretName {name:.100?} cannot be the name of a Secret: use lower case letters, digits, \"-\" and \".\""
        ));
    }
    Ok(name)
}

/// Makes the Secret of one entry.
///
/// # Errors
/// Names the class, the Secret and the key, and what to change.
pub fn desired(
    class: &Class,
    object: &SecretObject,
    files: &BTreeMap<String, Secret>,
) -> Result<Desired, Problem> {
    let secret = name(class, object)?;
    let at = Place {
        class: &class.identity.name,
        secret,
    };
    let type_ = object.type_.trim();
    if type_.is_empty() {
        return Err(at.invalid("type is empty: set it, Opaque for a Secret of any content"));
    }
    if object.data.is_empty() {
        return Err(at.invalid("data is empty: name the objects that the Secret is made of"));
    }
    let mut data = values(&at, object, files)?;
    if type_ == TLS {
        split(&at, class, object, files, &mut data)?;
    }
    check(&at, type_, object, &data)?;
    Ok(Desired {
        name: secret.to_owned(),
        type_: type_.to_owned(),
        labels: object.labels.clone(),
        annotations: object.annotations.clone(),
        data,
    })
}

/// Where in the class something is wrong.
struct Place<'a> {
    class: &'a str,
    secret: &'a str,
}

impl Place<'_> {
    fn problem(&self, trouble: Trouble, what: impl fmt::Display) -> Problem {
        Problem::new(
            trouble,
            format!(
                "SecretProviderClass {}, Secret {}: {what}",
                self.class, self.secret
            ),
        )
    }

    fn invalid(&self, what: impl fmt::Display) -> Problem {
        self.problem(Trouble::InvalidClass, what)
    }
}

fn invalid(what: String) -> Problem {
    Problem::new(Trouble::InvalidClass, format!("SecretProviderClass {what}"))
}

/// The value of each key. What is named wins over what "*" brings.
fn values(
    at: &Place<'_>,
    object: &SecretObject,
    files: &BTreeMap<String, Secret>,
) -> Result<BTreeMap<String, Secret>, Problem> {
    let mut all = BTreeMap::new();
    let mut named = BTreeMap::new();
    for entry in &object.data {
        let (source, key) = (entry.object_name.trim(), entry.key.trim());
        if source.is_empty() {
            return Err(at.invalid(format!(
                "objectName is empty for key {key:.100?}: name the mounted object"
            )));
        }
        if source == ALL {
            if !key.is_empty() {
                return Err(at.invalid(format!(
                    "key {key:.100?} is given with objectName \"*\": leave it out, each object gets its own name as key"
                )));
            }
            for (path, content) in files {
                let key = key_of(path);
                check_key(at, &key)?;
                let value = picked(
                    at,
                    &key,
                    entry.json_key.trim(),
                    entry.encoding.trim(),
                    content,
                )?;
                if all.insert(key.clone(), value).is_some() {
                    return Err(at.invalid(format!(
                        "two mounted objects would both become key {key:?}: name them one by one"
                    )));
                }
            }
            continue;
        }
        if key.is_empty() {
            return Err(at.invalid(format!(
                "key is empty for object {source:.100?}: name the key that it becomes"
            )));
        }
        check_key(at, key)?;
        let Some(content) = files.get(source) else {
            return Err(at.problem(
                Trouble::ObjectNotFound,
                format_args!(
                    "key {key}: there is no object {source:.100?} in the volume; objectName must be the path of a mounted file"
                ),
            ));
        };
        let value = picked(
            at,
            key,
            entry.json_key.trim(),
            entry.encoding.trim(),
            content,
        )?;
        named.insert(key.to_owned(), value);
    }
    all.extend(named);
    Ok(all)
}

/// A path as a key, in which no "/" may stand.
fn key_of(path: &str) -> String {
    path.replace('/', ".")
}

fn check_key(at: &Place<'_>, key: &str) -> Result<(), Problem> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    if key.len() > 253 || !key.bytes().all(allowed) || key == "." || key.starts_with("..") {
        return Err(at.invalid(format!(
            "{key:.100?} cannot be a key of a Secret: use letters, digits, \"-\", \"_\" and \".\""
        )));
    }
    Ok(())
}

/// The part of an object that is asked for, decoded.
fn picked(
    at: &Place<'_>,
    key: &str,
    json_key: &str,
    encoding: &str,
    content: &Secret,
) -> Result<Secret, Problem> {
    let mut value = content.clone();
    if !json_key.is_empty() {
        value = field(value.expose(), json_key).ok_or_else(|| {
            at.problem(
                Trouble::InvalidValue,
                format_args!(
                    "key {key}: the object is not a JSON object with a field {json_key:.100?}"
                ),
            )
        })?;
    }
    match encoding {
        "" => Ok(value),
        "base64" => {
            // Line breaks are usual in it.
            let digits: Zeroizing<Vec<u8>> = Zeroizing::new(
                value
                    .expose()
                    .iter()
                    .copied()
                    .filter(|b| !b.is_ascii_whitespace())
                    .collect(),
            );
            let decoded = STANDARD.decode(digits.as_slice()).map_err(|_| {
                at.problem(
                    Trouble::InvalidValue,
                    format_args!("key {key}: the object is not base64, which encoding says it is"),
                )
            })?;
            Ok(decoded.into())
        }
        other => Err(at.invalid(format!(
            "key {key}: encoding {other:.40?} is not known: base64, or leave it out"
        ))),
    }
}

/// A field of a JSON object: a string's text, or anything else as JSON. The values of other
/// fields are never made.
fn field(json: &[u8], name: &str) -> Option<Secret> {
    struct Field<'a>(&'a str);

    impl<'de> Visitor<'de> for Field<'_> {
        type Value = Option<Value>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<M: MapAccess<'de>>(self, mut fields: M) -> Result<Self::Value, M::Error> {
            let mut found = None;
            while let Some(key) = fields.next_key::<String>()? {
                if key == self.0 {
                    found = Some(fields.next_value()?);
                } else {
                    fields.next_value::<IgnoredAny>()?;
                }
            }
            Ok(found)
        }
    }

    let mut reader = serde_json::Deserializer::from_slice(json);
    let found = reader.deserialize_map(Field(name)).ok()??;
    reader.end().ok()?;
    match found {
        Value::String(text) => Some(text.into()),
        other => Some(other.to_string().into()),
    }
}

/// Makes certificate and key out of the objects that the two keys come from.
fn split(
    at: &Place<'_>,
    class: &Class,
    object: &SecretObject,
    files: &BTreeMap<String, Secret>,
    data: &mut BTreeMap<String, Secret>,
) -> Result<(), Problem> {
    let format = match class
        .identity
        .annotations
        .get(TLS_KEY_FORMAT)
        .map(|v| v.trim())
    {
        None | Some("traditional") => KeyFormat::Traditional,
        Some("original") => KeyFormat::Original,
        Some(other) => {
            return Err(at.invalid(format!(
                "annotation {TLS_KEY_FORMAT} of the class is {other:.40?}: traditional or original"
            )));
        }
    };
    let source = |key: &str| {
        let named = object
            .data
            .iter()
            .rev()
            .find(|entry| entry.key.trim() == key);
        match named {
            Some(entry) => entry.object_name.trim().to_owned(),
            None => files
                .keys()
                .find(|path| key_of(path) == key)
                .cloned()
                .unwrap_or_default(),
        }
    };
    let parts = |key: &str| -> Result<Option<Parts>, Problem> {
        let Some(value) = data.get(key) else {
            return Ok(None);
        };
        let parts = Parts::read(value.expose()).map_err(|why| {
            at.problem(
                Trouble::InvalidCertificate,
                format_args!(
                    "key {key}: object {:.100?} cannot be used: {why}",
                    source(key)
                ),
            )
        })?;
        Ok(Some(parts))
    };
    // Either missing is said by the check of the required keys.
    let (Some(certificates), Some(keys)) = (parts(CERTIFICATE)?, parts(PRIVATE_KEY)?) else {
        return Ok(());
    };
    let pair = tls::pair(&certificates, &keys, format)
        .map_err(|why| at.problem(Trouble::InvalidCertificate, why))?;
    data.insert(CERTIFICATE.to_owned(), pair.certificate);
    data.insert(PRIVATE_KEY.to_owned(), pair.key);
    Ok(())
}

/// What a type requires, and what any Secret must keep to.
fn check(
    at: &Place<'_>,
    type_: &str,
    object: &SecretObject,
    data: &BTreeMap<String, Secret>,
) -> Result<(), Problem> {
    let missing = |what: String| at.problem(Trouble::MissingKey, what);
    let required = REQUIRED.iter().find(|(name, _)| *name == type_);
    let keys = required.map(|(_, keys)| *keys).unwrap_or_default();
    let there = |key: &&&str| data.get(**key).is_some_and(|v| !v.expose().is_empty());
    match type_ {
        "kubernetes.io/basic-auth" => {
            if !keys.iter().any(|key| data.contains_key(*key)) {
                return Err(missing(format!(
                    "type {type_} needs key username or password, and neither is there"
                )));
            }
        }
        "kubernetes.io/service-account-token" => {
            const ACCOUNT: &str = "kubernetes.io/service-account.name";
            if object.annotations.get(ACCOUNT).is_none_or(String::is_empty) {
                return Err(missing(format!(
                    "type {type_} needs annotation {ACCOUNT}, and it is not there"
                )));
            }
        }
        _ => {
            if let Some(key) = keys.iter().find(|key| !there(key)) {
                let how = if data.contains_key(*key) {
                    "is empty"
                } else {
                    "is not there"
                };
                return Err(missing(format!(
                    "type {type_} needs key {key}, and it {how}"
                )));
            }
        }
    }
    for key in [".dockerconfigjson", ".dockercfg"] {
        let is_json = |value: &Secret| {
            serde_json::from_slice::<BTreeMap<String, IgnoredAny>>(value.expose()).is_ok()
        };
        if keys.contains(&key) && !data.get(key).is_some_and(is_json) {
            return Err(at.problem(
                Trouble::InvalidValue,
                format_args!("key {key}: type {type_} needs a JSON object, and the value is none"),
            ));
        }
    }
    let bytes: usize = data.values().map(|value| value.expose().len()).sum();
    if bytes > MOST_BYTES {
        return Err(at.problem(
            Trouble::TooLarge,
            format_args!(
                "its values have {bytes} bytes, and a Secret holds {MOST_BYTES}; read the object from the volume instead, or split it"
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
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
    fn values_come_from_the_files(
        #[case] data: serde_json::Value,
        #[case] expected: &[(&str, &str)],
    ) {
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
        let key = include_str!("tls/fixtures/rsa.key.pem");
        let bundle = format!("{key}{}", include_str!("tls/fixtures/rsa.crt.pem"));
        let data = json!([
            {"objectName": "bundle", "key": "tls.crt"},
            {"objectName": "bundle", "key": "tls.key"},
            {"objectName": "ca", "key": "ca.crt"},
        ]);
        let object = entry(TLS, data);
        let files = volume(&[("bundle", &bundle), ("ca", "as it is")]);
        for (format, expected) in [
            (None, Some(include_str!("tls/fixtures/rsa.traditional.pem"))),
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
}
