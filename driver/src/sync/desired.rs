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
mod tests;
