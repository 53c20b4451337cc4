//! Computes the data that a Secret should have, from an entry of a class and the mounted files.
//!
//! Everything that the API server would refuse is refused here first, with the class, the Secret
//! and the key by name: its own answer would name none of the three that the user can change.

mod batch;
mod values;

use std::{collections::BTreeMap, sync::Arc};

use serde::de::IgnoredAny;

use super::tls::{self, KeyFormat};
use crate::{
    cluster::{
        Class,
        resources::SecretObject,
        secrets::{ErrorType, SyncError},
    },
    quoted::quoted,
    record::is_object_name,
    secret::Secret,
};
pub(super) use batch::{Batch, Computed, compute};
#[cfg(test)]
use values::PARSED;
pub(super) use values::Sources;
use values::{Needs, key_of, values};

/// The annotation of a class that says how the private keys of its TLS Secrets are written:
/// `traditional` or `original`.
const TLS_KEY_FORMAT: &str = "secrets-store.csi.k8s.io/tls-key-format";

/// The object name that stands for all objects.
const ALL: &str = "*";

/// The number of bytes that the API server accepts in the values of one Secret.
const MAX_BYTES: usize = 1024 * 1024;

const TLS: &str = "kubernetes.io/tls";
const CERTIFICATE: &str = "tls.crt";
const PRIVATE_KEY: &str = "tls.key";

/// The keys that a Secret of a type must have:
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
    // One of the two is enough.
    ("kubernetes.io/basic-auth", &["username", "password"]),
    ("kubernetes.io/service-account-token", &[]),
];

/// The data of a Secret, by key.
pub(super) type SecretData = BTreeMap<String, Secret>;

/// One entry of `secretObjects`, whose Secret has a valid name that no other entry has.
#[derive(Clone, Copy)]
pub(super) struct Entry<'a> {
    /// The class.
    pub(super) class: &'a Class,
    /// The entry.
    pub(super) object: &'a SecretObject,
}

impl<'a> Entry<'a> {
    /// Checks the name of an entry's Secret.
    ///
    /// # Errors
    /// Fails if it is not a name, so that it could lead to another object, or another entry has it.
    pub(super) fn new(class: &'a Class, object: &'a SecretObject) -> Result<Self, SyncError> {
        let name = &object.secret_name;
        let entry = Self { class, object };
        let invalid = |why: String| {
            SyncError::new(ErrorType::InvalidClass, why)
                .context(format_args!("SecretProviderClass {}", class.identity.name))
        };
        if name.is_empty() {
            let why = "an entry of secretObjects has no secretName";
            return Err(invalid(why.to_owned()));
        }
        if !is_object_name(name) {
            return Err(invalid(format!(
                "secretName {} cannot be the name of a Secret: use lower case letters, digits, \"-\" and \".\"",
                quoted(name, 100)
            )));
        }
        let of_name = class.secret_objects.iter();
        if of_name.filter(|other| other.secret_name == *name).count() > 1 {
            return Err(entry.error(SyncError::new(
                ErrorType::InvalidClass,
                "two entries of secretObjects have this secretName; put their data into one",
            )));
        }
        Ok(entry)
    }

    /// Returns the name of the Secret.
    pub(super) fn name(&self) -> &'a str {
        &self.object.secret_name
    }

    /// Adds the names of the class and the Secret to an error.
    pub(super) fn error(&self, error: SyncError) -> SyncError {
        error.context(format_args!(
            "SecretProviderClass {}, Secret {}",
            self.class.identity.name,
            self.name()
        ))
    }
}

/// Computes the data of the Secret of an entry, which is one of those that the sources were parsed
/// for. Ends early if no caller waits for it any more.
///
/// # Errors
/// Names the key, and what to change.
pub(super) fn data<'a>(
    entry: Entry<'a>,
    sources: &mut Sources<'a>,
) -> Result<SecretData, SyncError> {
    let object = entry.object;
    if object.type_.is_empty() {
        return Err(invalid("type is empty: set it, for example to Opaque"));
    }
    if object.data.is_empty() {
        return Err(invalid(
            "data is empty: name the objects that the Secret is made of",
        ));
    }
    let mut data = values(object, sources)?;
    if object.type_ == TLS {
        pair_certificate(entry, sources, &mut data)?;
    }
    check(object, &data)?;
    Ok(data)
}

fn invalid(what: impl Into<String>) -> SyncError {
    SyncError::new(ErrorType::InvalidClass, what)
}

fn too_large() -> SyncError {
    SyncError::new(
        ErrorType::TooLarge,
        format!(
            "its values have more than the {MAX_BYTES} bytes that a Secret holds; read the object from the volume instead, or split it"
        ),
    )
}

/// Replaces the objects under `tls.crt` and `tls.key` by the certificate and the key in them.
fn pair_certificate(
    entry: Entry<'_>,
    sources: &mut Sources<'_>,
    data: &mut SecretData,
) -> Result<(), SyncError> {
    let format = key_format(entry.class)?;
    // If either is missing, the check of the required keys says so.
    let (Some(certificates), Some(keys)) = (data.get(CERTIFICATE), data.get(PRIVATE_KEY)) else {
        return Ok(());
    };
    let files = sources.files();
    let mut parts = |key: &str, value: &Secret| {
        sources.material(value).map_err(|why| {
            let source = source_of(key, entry.object, files);
            SyncError::new(
                ErrorType::InvalidCertificate,
                format!(
                    "key {key}: object {} cannot be used: {why}",
                    quoted(source, 100)
                ),
            )
        })
    };
    let is_one_object = certificates == keys;
    let certificates = parts(CERTIFICATE, certificates)?;
    let keys = if is_one_object {
        Arc::clone(&certificates)
    } else {
        parts(PRIVATE_KEY, keys)?
    };
    let pair = tls::pair(&certificates, &keys, format, sources.caller())
        .map_err(|why| SyncError::new(ErrorType::InvalidCertificate, why.to_string()))?;
    data.insert(CERTIFICATE.to_owned(), pair.certificate);
    data.insert(PRIVATE_KEY.to_owned(), pair.key);
    Ok(())
}

/// Returns the form in which a class wants private keys.
fn key_format(class: &Class) -> Result<KeyFormat, SyncError> {
    let annotation = class.identity.annotations.get(TLS_KEY_FORMAT);
    match annotation.map(|value| value.trim()) {
        None | Some("traditional") => Ok(KeyFormat::Traditional),
        Some("original") => Ok(KeyFormat::Original),
        Some(other) => Err(invalid(format!(
            "annotation {TLS_KEY_FORMAT} of the class is {}; it must be traditional or original",
            quoted(other, 40)
        ))),
    }
}

/// Returns the path of the object that a key's value comes from.
fn source_of<'a>(key: &str, object: &'a SecretObject, files: &'a SecretData) -> &'a str {
    let mut named = object.data.iter().rev();
    match named.find(|entry| entry.key == key) {
        Some(entry) => &entry.object_name,
        None => {
            let path = files.keys().find(|path| key_of(path) == key);
            path.map_or("", String::as_str)
        }
    }
}

/// Checks what the type of a Secret requires, and what every Secret has to keep to.
fn check(object: &SecretObject, data: &SecretData) -> Result<(), SyncError> {
    let type_ = object.type_.as_str();
    let missing = |what: String| Err(SyncError::new(ErrorType::MissingKey, what));
    let required = REQUIRED.iter().find(|(name, _)| *name == type_);
    let keys = required.map(|(_, keys)| *keys).unwrap_or_default();
    let has_value = |key: &&&str| data.get(**key).is_some_and(|v| !v.expose().is_empty());
    match type_ {
        "kubernetes.io/basic-auth" => {
            if !keys.iter().any(|key| data.contains_key(*key)) {
                return missing(format!(
                    "type {type_} needs key username or password; add one of them to data"
                ));
            }
        }
        "kubernetes.io/service-account-token" => {
            const ACCOUNT: &str = "kubernetes.io/service-account.name";
            if object.annotations.get(ACCOUNT).is_none_or(String::is_empty) {
                return missing(format!(
                    "type {type_} needs annotation {ACCOUNT}; add it to annotations of the entry"
                ));
            }
        }
        _ => {
            if let Some(key) = keys.iter().find(|key| !has_value(key)) {
                let how = if data.contains_key(*key) {
                    "is empty"
                } else {
                    "is missing"
                };
                return missing(format!("type {type_} needs key {key}, and it {how}"));
            }
        }
    }
    for key in [".dockerconfigjson", ".dockercfg"] {
        let is_json = |value: &Secret| {
            serde_json::from_slice::<BTreeMap<String, IgnoredAny>>(value.expose()).is_ok()
        };
        if keys.contains(&key) && !data.get(key).is_some_and(is_json) {
            return Err(SyncError::new(
                ErrorType::InvalidValue,
                format!(
                    "key {key}: type {type_} needs a JSON object, but the value is not a JSON object"
                ),
            ));
        }
    }
    if bytes_of(data) > MAX_BYTES {
        return Err(too_large());
    }
    Ok(())
}

/// Returns the number of bytes of all values.
fn bytes_of(data: &SecretData) -> usize {
    data.values().map(|value| value.expose().len()).sum()
}

/// Computes the Secrets of a class and files that are both read from bytes: the class as JSON, a
/// NUL byte, and the files as a JSON object.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    use super::parsing::{Caller, RefusedObjects};
    use crate::fuzz::assert_readable;

    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let Some(class) = parts.next().and_then(crate::cluster::fuzz_class) else {
        return;
    };
    let files: BTreeMap<String, String> = parts
        .next()
        .and_then(|files| serde_json::from_slice(files).ok())
        .unwrap_or_default();
    let files: SecretData = files.into_iter().map(|(k, v)| (k, v.into())).collect();
    let (refused, caller) = (RefusedObjects::default(), Caller::default());
    let mut sources = Sources::parse(class.secret_objects.iter(), &files, &refused, &caller);
    for object in class.secret_objects.iter() {
        let entry = match Entry::new(&class, object) {
            Ok(entry) => entry,
            Err(error) => {
                assert_readable(&error);
                continue;
            }
        };
        match data(entry, &mut sources) {
            Ok(data) => {
                assert!(is_object_name(entry.name()));
                assert!(bytes_of(&data) <= MAX_BYTES);
            }
            Err(error) => assert_readable(&entry.error(error)),
        }
    }
}

#[cfg(test)]
mod tests;
