//! What a Secret should be: a class's entry and the mounted files make it, and nothing else does.
//!
//! Everything that the API server would refuse is refused here first, with the class, the Secret
//! and the key by name: its own answer would name none of the three that the user can change.

mod values;

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::de::IgnoredAny;

use super::{
    Problem, Trouble,
    parsing::Waiting,
    tls::{self, KeyFormat},
};
use crate::{
    cluster::{Class, resources::SecretObject},
    record::is_object_name,
    secret::Secret,
};
pub use values::Needs;
#[cfg(test)]
pub(super) use values::PARSED;
pub(super) use values::Sources;
use values::{key_of, values};

/// On a class: how the private keys of its TLS Secrets are written, `traditional` or `original`.
pub const TLS_KEY_FORMAT: &str = "secrets-store.csi.k8s.io/tls-key-format";

/// As an object's name: all of them.
const ALL: &str = "*";

/// The API server takes no more in the values of one Secret.
pub(super) const MOST_BYTES: usize = 1024 * 1024;

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

/// The name of an entry's Secret, in which there is nothing that could lead to another object.
///
/// # Errors
/// When it is no name.
pub fn name<'a>(class: &Class, object: &'a SecretObject) -> Result<&'a str, Problem> {
    let name = object.secret_name.as_str();
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

/// Makes the Secret of one of the entries that the sources were parsed for, as long as somebody
/// waits for it.
///
/// # Errors
/// Names the class, the Secret and the key, and what to change.
pub(super) fn desired<'a>(
    class: &Class,
    object: &'a SecretObject,
    sources: &mut Sources<'a>,
) -> Result<Desired, Problem> {
    let secret = name(class, object)?;
    let at = Place {
        class: &class.identity.name,
        secret,
    };
    let type_ = object.type_.as_str();
    if type_.is_empty() {
        return Err(at.invalid("type is empty: set it, Opaque for a Secret of any content"));
    }
    if object.data.is_empty() {
        return Err(at.invalid("data is empty: name the objects that the Secret is made of"));
    }
    let mut data = values(&at, object, sources)?;
    if type_ == TLS {
        split(&at, class, object, sources, &mut data)?;
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

    fn too_large(&self) -> Problem {
        self.problem(
            Trouble::TooLarge,
            format_args!(
                "its values have more than the {MOST_BYTES} bytes that a Secret holds; read the object from the volume instead, or split it"
            ),
        )
    }

    /// Ends the work when nobody waits for it any more.
    fn still_wanted(&self, waiting: &Waiting) -> Result<(), Problem> {
        match waiting.is_over() {
            true => Err(self.problem(Trouble::Unavailable, "nobody waits for it any more")),
            false => Ok(()),
        }
    }
}

fn invalid(what: String) -> Problem {
    Problem::new(Trouble::InvalidClass, format!("SecretProviderClass {what}"))
}

/// Makes certificate and key out of the objects that the two keys come from.
fn split(
    at: &Place<'_>,
    class: &Class,
    object: &SecretObject,
    sources: &mut Sources<'_>,
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
    let files = sources.files();
    let source = |key: &str| {
        let named = object.data.iter().rev().find(|entry| entry.key == key);
        match named {
            Some(entry) => entry.object_name.clone(),
            None => files
                .keys()
                .find(|path| key_of(path) == key)
                .cloned()
                .unwrap_or_default(),
        }
    };
    // Either missing is said by the check of the required keys.
    let (Some(certificates), Some(keys)) = (data.get(CERTIFICATE), data.get(PRIVATE_KEY)) else {
        return Ok(());
    };
    let mut parts = |key: &str, value: &Secret| {
        sources.parts(value).map_err(|why| {
            at.problem(
                Trouble::InvalidCertificate,
                format_args!(
                    "key {key}: object {:.100?} cannot be used: {why}",
                    source(key)
                ),
            )
        })
    };
    let is_one_object = certificates == keys;
    let certificates = parts(CERTIFICATE, certificates)?;
    let keys = match is_one_object {
        true => Arc::clone(&certificates),
        false => parts(PRIVATE_KEY, keys)?,
    };
    let pair = tls::pair(&certificates, &keys, format, sources.waiting())
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
        return Err(at.too_large());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
