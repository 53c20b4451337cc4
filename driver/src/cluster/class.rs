//! Reads SecretProviderClasses.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use http::{HeaderValue, header::ACCEPT};
use kube::{
    Api, Resource as _,
    api::{GetParams, ListParams},
    core::Request,
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::time::timeout;

use super::{
    Cluster, Freshness, Wanted,
    classes::Source,
    request::Failure,
    resources::{SecretObject, SecretObjectData, SecretProviderClass},
};
use crate::{
    error::{Error, Reason, Result},
    hex,
    quoted::quoted,
    record::{self, is_object_name},
};

/// The prefix of annotations that are addressed to this driver.
const OUR_ANNOTATIONS: &str = "secrets-store.csi.k8s.io/";

/// The time within which a caller that has time wants a class.
const IN_TIME: Duration = Duration::from_secs(1);

/// Limits for the annotations that are kept in memory: their number, and the length of a value.
/// A longer value is replaced by its beginning and a hash, so that it still differs from others.
const MAX_ANNOTATIONS: usize = 16;
const MAX_ANNOTATION_LENGTH: usize = 256;

/// Limits for the Secrets of one class: their number, the number of all their entries, and the
/// bytes of all names, keys, labels and annotations. They are kept in memory while a pod of the
/// class runs, and checked again and again.
const MAX_SECRETS: usize = 100;
const MAX_ENTRIES: usize = 1_000;
const MAX_TEXT: usize = 128 * 1024;

/// The number of classes that a message lists.
const MOST_LISTED: usize = 5;

/// Asks for the metadata of a list's objects only, or else for the objects.
const METADATA: HeaderValue = HeaderValue::from_static(
    "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json",
);

/// The time for which an error waits for its turn to list classes.
const LISTING_WAIT: Duration = Duration::from_secs(2);

/// A list of classes, of which only the names are read.
#[derive(Deserialize)]
struct Found {
    /// The API server writes null for no items.
    items: Option<Vec<Named>>,
}

#[derive(Deserialize)]
struct Named {
    metadata: Name,
}

#[derive(Deserialize)]
struct Name {
    name: Option<String>,
}

/// The largest length of `spec.provider` in bytes. It is kept in memory as well. The names that
/// lead to a socket are shorter.
const MAX_PROVIDER: usize = 253;

/// The parts of a SecretProviderClass that a volume needs.
#[derive(Debug, Clone)]
pub struct Class {
    /// The identity of the class, and which state of it this is.
    pub identity: record::ClassState,
    /// `spec.provider`, not empty.
    pub provider: String,
    /// `spec.parameters`, not empty.
    pub parameters: BTreeMap<String, String>,
    /// `spec.secretObjects`, without spaces around its names, types and keys.
    pub secret_objects: Arc<[SecretObject]>,
    /// The limit that `spec.secretObjects` exceeds, as a sentence. `secret_objects` is empty then.
    pub too_much: Option<String>,
}

impl Class {
    /// Returns the parts that stay in memory while a volume of the class is mounted: all but the
    /// parameters, which only the provider needs.
    pub fn without_parameters(&self) -> Self {
        Self {
            identity: self.identity.clone(),
            provider: self.provider.clone(),
            parameters: BTreeMap::new(),
            secret_objects: Arc::clone(&self.secret_objects),
            too_much: self.too_much.clone(),
        }
    }

    /// Checks an object of the API server, and takes the parts that a volume needs.
    fn read(spc: SecretProviderClass, namespace: &str, name: &str) -> Result<Self> {
        if spc.spec.provider.is_empty() {
            return Err(Error::precondition(format!(
                "provider not set in {namespace}/{name}: set spec.provider of the SecretProviderClass"
            )));
        }
        // Many volumes keep the name.
        if spc.spec.provider.len() > MAX_PROVIDER {
            return Err(Error::precondition(format!(
                "invalid provider: provider {} of {namespace}/{name} is too long; spec.provider of the SecretProviderClass has 1 to 30 letters, digits, \"-\" or \"_\"",
                quoted(&spc.spec.provider, 60)
            ))
            .with_reason(Reason::FailedToLookupProviderGrpcClient));
        }
        if spc.spec.parameters.is_empty() {
            return Err(Error::precondition(format!(
                "parameters not set in {namespace}/{name}: set spec.parameters of the SecretProviderClass to what provider {} needs",
                quoted(&spc.spec.provider, 60)
            )));
        }
        let too_much = too_much(&spc.spec.secret_objects);
        let secret_objects = match too_much {
            Some(_) => Arc::default(),
            None => spc.spec.secret_objects.into_iter().map(trimmed).collect(),
        };
        Ok(Class {
            identity: record::ClassState {
                name: name.to_owned(),
                uid: spc.metadata.uid.unwrap_or_default(),
                generation: spc.metadata.generation,
                resource_version: spc.metadata.resource_version.unwrap_or_default(),
                annotations: addressed_to_us(spc.metadata.annotations.unwrap_or_default()),
            },
            provider: spc.spec.provider,
            parameters: spc.spec.parameters,
            secret_objects,
            too_much,
        })
    }
}

impl Cluster {
    /// Reads a class, as it is now. Callers that ask for it at the same time share one request.
    ///
    /// # Errors
    /// Fails if it cannot be read, or has no provider or no parameters.
    pub async fn class(&self, namespace: &str, name: &str) -> Result<Arc<Class>> {
        let wanted = Wanted {
            freshness: Freshness::Present,
            known: None,
            with_parameters: true,
        };
        self.known_class(namespace, name, &wanted).await
    }

    /// Returns a class as the driver remembers it, if that is as `wanted`, or else as the API server
    /// answers.
    ///
    /// # Errors
    /// The same as for [`Cluster::class`].
    pub async fn known_class(
        &self,
        namespace: &str,
        name: &str,
        wanted: &Wanted<'_>,
    ) -> Result<Arc<Class>> {
        if !is_object_name(name) {
            let error = Error::invalid(format!(
                "failed to get secretproviderclass {namespace}/{}: this cannot be the name of an object",
                quoted(name, 100)
            ));
            return Err(error.with_reason(Reason::SecretProviderClassNotFound));
        }
        let read = |source| self.read_class(namespace, name, source);
        self.classes.get(namespace, name, wanted, read).await
    }

    /// Returns a class as [`known_class`](Self::known_class) does, for a caller that has time: after a second
    /// without an answer, and for a moment after a failure, it gets an error. A read that has begun goes on.
    ///
    /// # Errors
    /// The same as for [`Cluster::class`], and UNAVAILABLE if there is no answer in time.
    pub async fn class_in_time(
        &self,
        namespace: &str,
        name: &str,
        wanted: &Wanted<'_>,
    ) -> Result<Arc<Class>> {
        if let Some(class) = self.classes.enough(namespace, name, wanted) {
            return class;
        }
        let late = || {
            Error::unavailable(format!(
                "failed to get secretproviderclass {namespace}/{}: the API server does not answer in time",
                quoted(name, 100)
            ))
        };
        if self.classes.is_in_trouble(namespace, name) {
            return Err(late());
        }
        let reading = {
            let (cluster, namespace, name) = (self.clone(), namespace.to_owned(), name.to_owned());
            let (freshness, known) = (wanted.freshness, wanted.known.cloned());
            let with_parameters = wanted.with_parameters;
            async move {
                let wanted = Wanted {
                    freshness,
                    known: known.as_ref(),
                    with_parameters,
                };
                cluster.known_class(&namespace, &name, &wanted).await
            }
        };
        // Given up with the caller, reads of a slow API server would never end.
        match timeout(IN_TIME, tokio::spawn(reading)).await {
            Ok(Ok(class)) => class,
            Ok(Err(_)) => Err(late()),
            Err(_) => {
                self.classes.note_late(namespace, name);
                Err(late())
            }
        }
    }

    /// Returns a class as the driver remembers it, and how long ago it was read. Sends no request.
    pub fn remembered_class(&self, namespace: &str, name: &str) -> Option<(Arc<Class>, Duration)> {
        self.classes.find_any(namespace, name)
    }

    /// Returns how long ago a class was read; no time if it is not remembered.
    pub fn age_of_class(&self, namespace: &str, name: &str) -> Duration {
        self.classes.age(namespace, name).unwrap_or_default()
    }

    /// Returns whether a class of this name makes this Secret. It does not only if the API server
    /// says that there is no such class, or if the class itself does not name the Secret.
    ///
    /// # Errors
    /// Fails if the class cannot be read.
    pub(super) async fn class_makes(
        &self,
        namespace: &str,
        name: &str,
        secret: &str,
    ) -> Result<bool> {
        if !is_object_name(name) {
            // No class can have this name.
            return Ok(false);
        }
        let api: Api<SecretProviderClass> = Api::namespaced(self.client().await?, namespace);
        // The cache may not have a class yet that has just been created.
        for how in [GetParams::any(), GetParams::default()] {
            match self.read(api.get_with(name, &how)).await {
                // A class without a provider mounts nothing: this is hardly a class.
                Ok(class) if !is_class(&class, name) || class.spec.provider.is_empty() => {
                    return Err(Failure::WrongObject.into_error());
                }
                Ok(class) => {
                    let mut objects = class.spec.secret_objects.into_iter().map(trimmed);
                    if objects.any(|object| object.secret_name == secret) {
                        return Ok(true);
                    }
                }
                Err(failure) if failure.is_not_found(name) => {}
                Err(failure) => return Err(failure.into_error()),
            }
        }
        Ok(false)
    }

    /// Returns the end of a sentence with some classes of a namespace, or nothing if they cannot be
    /// listed. One list at a time is read, and only metadata where the API server gives that, because a
    /// class may be large. Others wait for their turn, because a sentence that comes and goes makes one
    /// trouble look like two.
    async fn classes_in(&self, namespace: &str) -> String {
        let Ok(Ok(_turn)) = timeout(LISTING_WAIT, self.listing.acquire()).await else {
            return String::new();
        };
        let some = ListParams::default().limit(MOST_LISTED as u32);
        let path = SecretProviderClass::url_path(&(), Some(namespace));
        let request = Request::new(path).list(&some).map(|mut request| {
            request.headers_mut().insert(ACCEPT, METADATA);
            request
        });
        let Ok(found) = self.ask::<Found>(request).await else {
            return String::new();
        };
        let found = found.items.unwrap_or_default();
        let names = found.iter().filter_map(|c| c.metadata.name.as_deref());
        let names: Vec<_> = names
            .take(MOST_LISTED)
            .map(|name| quoted(name, 60).to_string())
            .collect();
        if names.is_empty() {
            format!("; there are none in {namespace}")
        } else {
            format!("; in {namespace} there are: {}", names.join(", "))
        }
    }

    async fn read_class(&self, namespace: &str, name: &str, source: Source) -> Result<Class> {
        let how = match source {
            Source::Cache => GetParams::any(),
            Source::Store => GetParams::default(),
        };
        let failed = |error: Error| {
            error
                .context(format_args!(
                    "failed to get secretproviderclass {namespace}/{name}"
                ))
                .with_reason(Reason::SecretProviderClassNotFound)
        };
        let api: Api<SecretProviderClass> =
            Api::namespaced(self.client().await.map_err(failed)?, namespace);
        let spc = self.read(api.get_with(name, &how)).await;
        let spc = match spc {
            Ok(spc) => spc,
            Err(failure) if failure.is_not_found(name) => {
                let error = failure.into_error();
                // The store is asked next where the cache knows of no class.
                let there = match source {
                    Source::Cache => String::new(),
                    Source::Store => self.classes_in(namespace).await,
                };
                return Err(failed(Error::new(
                    error.code(),
                    format!(
                        "{error}; create it in the pod's namespace, or correct secretProviderClass in the pod's volumeAttributes{there}"
                    ),
                )));
            }
            Err(failure) => return Err(failed(failure.into_error())),
        };
        if !is_class(&spc, name) {
            return Err(failed(Failure::WrongObject.into_error()));
        }
        Class::read(spc, namespace, name)
    }
}

#[cfg(test)]
impl Class {
    /// Makes a class `db` with these entries.
    pub(crate) fn with_secrets(secret_objects: Vec<SecretObject>) -> Self {
        Self {
            identity: record::ClassState {
                name: "db".into(),
                uid: "u".into(),
                generation: Some(1),
                resource_version: "1".into(),
                annotations: BTreeMap::new(),
            },
            provider: "vault".into(),
            parameters: BTreeMap::new(),
            secret_objects: secret_objects.into(),
            too_much: None,
        }
    }
}

/// Reads bytes as a class that the API server has.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) -> Option<Class> {
    use crate::fuzz::assert_readable;

    let spc: SecretProviderClass = serde_json::from_slice(bytes).ok()?;
    let class = match Class::read(spc, "shop", "db") {
        Ok(class) => class,
        Err(error) => {
            assert_readable(&error);
            return None;
        }
    };
    if let Some(why) = &class.too_much {
        assert_readable(why);
    }
    assert!(class.secret_objects.len() <= MAX_SECRETS);
    let kept = class.without_parameters();
    let annotations = kept.identity.annotations.values();
    assert!(annotations.clone().count() <= MAX_ANNOTATIONS);
    assert!(
        annotations
            .map(String::len)
            .all(|length| length <= MAX_ANNOTATION_LENGTH)
    );
    Some(kept)
}

/// Removes the spaces around the names, types and keys of an entry of `secretObjects`.
pub(crate) fn trimmed(mut object: SecretObject) -> SecretObject {
    let trim = |text: &mut String| {
        if text.trim().len() < text.len() {
            *text = text.trim().to_owned();
        }
    };
    trim(&mut object.secret_name);
    trim(&mut object.type_);
    for entry in &mut object.data {
        trim(&mut entry.object_name);
        trim(&mut entry.key);
        trim(&mut entry.json_key);
        trim(&mut entry.encoding);
    }
    object
}

/// Returns the annotations that are addressed to this driver, within the limits for them.
fn addressed_to_us(annotations: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let ours = annotations
        .into_iter()
        .filter(|(name, _)| name.starts_with(OUR_ANNOTATIONS));
    let shortened = ours.map(|(name, mut value)| {
        if value.len() > MAX_ANNOTATION_LENGTH {
            let hash = hex::digits(&Sha256::digest(&value));
            let mut end = MAX_ANNOTATION_LENGTH - hash.len();
            while !value.is_char_boundary(end) {
                end -= 1;
            }
            value.truncate(end);
            value.push_str(&hash);
            value.shrink_to_fit();
        }
        (name, value)
    });
    shortened.take(MAX_ANNOTATIONS).collect()
}

/// Returns the bytes of text in `secretObjects`.
pub(super) fn text_of(objects: &[SecretObject]) -> usize {
    let text_of_map = |map: &BTreeMap<String, String>| -> usize {
        map.iter().map(|(key, value)| key.len() + value.len()).sum()
    };
    let text_of_entry = |entry: &SecretObjectData| {
        entry.object_name.len() + entry.key.len() + entry.json_key.len() + entry.encoding.len()
    };
    let text_of_object = |object: &SecretObject| {
        let entries: usize = object.data.iter().map(text_of_entry).sum();
        let maps = text_of_map(&object.labels) + text_of_map(&object.annotations);
        object.secret_name.len() + object.type_.len() + entries + maps
    };
    objects.iter().map(text_of_object).sum()
}

/// Returns which limit the Secrets of a class exceed, and what to do about it.
fn too_much(objects: &[SecretObject]) -> Option<String> {
    let entries: usize = objects.iter().map(|object| object.data.len()).sum();
    let text = text_of(objects);
    let (count, limit, what) = if objects.len() > MAX_SECRETS {
        (objects.len(), MAX_SECRETS, "Secrets")
    } else if entries > MAX_ENTRIES {
        (entries, MAX_ENTRIES, "entries of data")
    } else if text > MAX_TEXT {
        let what = "bytes of names, keys, labels and annotations";
        (text, MAX_TEXT, what)
    } else {
        return None;
    };
    Some(format!(
        "secretObjects has {count} {what}; the limit is {limit}, so no Secret of this class is made. Divide them among several classes, or use objectName \"*\""
    ))
}

/// Returns whether an answer is the class that was asked for, and not the invention of a proxy.
fn is_class(answer: &SecretProviderClass, name: &str) -> bool {
    let uid = answer.metadata.uid.as_deref();
    answer.metadata.name.as_deref() == Some(name) && uid.is_some_and(|uid| !uid.is_empty())
}
