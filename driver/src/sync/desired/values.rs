//! Takes the value of each key out of the mounted files.
//!
//! The cost does not depend on how often the entries of a class name an object, or a part of it: each
//! object is parsed once for all of them, each part is decoded once, each certificate is read once,
//! and nothing is copied beyond the size of a Secret.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::Arc,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{
    Deserializer as _,
    de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};
use zeroize::Zeroizing;

use super::{ALL, CERTIFICATE, MAX_BYTES, PRIVATE_KEY, SecretData, TLS, invalid, too_large};
use crate::{
    cluster::{
        resources::{SecretObject, SecretObjectData},
        secrets::{Digest, ErrorType, SyncError},
    },
    quoted::quoted,
    secret::Secret,
    sync::{
        parsing::{Caller, RefusedObjects},
        tls::{Material, Unusable},
    },
};

/// The memory that a JSON value may take while it is read. A text of a Secret's size takes less,
/// unless it consists of little but brackets and commas.
const MAX_VALUE: usize = 8 * MAX_BYTES;

/// The files that some entries name.
pub(super) struct Needs<'a> {
    all: bool,
    paths: BTreeSet<&'a str>,
}

impl<'a> Needs<'a> {
    /// Returns the files that some entries name.
    pub(super) fn of(objects: impl IntoIterator<Item = &'a SecretObject>) -> Self {
        let data = objects.into_iter().flat_map(|object| &object.data);
        let paths: BTreeSet<_> = data.map(|d| d.object_name.as_str()).collect();
        Self {
            all: paths.contains(ALL),
            paths,
        }
    }

    /// Returns whether a file is among them.
    pub(super) fn includes(&self, path: &str) -> bool {
        self.all || self.paths.contains(path)
    }
}

/// The source of one key's value: an object, or a field of it, and how the value is encoded.
struct ValueSource<'a> {
    key: Cow<'a, str>,
    path: &'a str,
    json_key: &'a str,
    encoding: &'a str,
}

/// The fields of a JSON object that entries name. Missing ones are left out.
type JsonFields<'a> = BTreeMap<&'a str, Result<Secret, ValueTooLarge>>;

/// The error of a JSON value that takes more memory than a value of a Secret may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ValueTooLarge;

/// The files of a volume, and what has been parsed of them for the entries of one class.
pub(in crate::sync) struct Sources<'a> {
    files: &'a SecretData,
    refused: &'a RefusedObjects,
    caller: &'a Caller,
    /// The fields that the entries name, by object; `None` if it is not a JSON object.
    parsed: BTreeMap<&'a str, Option<JsonFields<'a>>>,
    /// The decoded parts, by path and field; `None` if the part is not base64.
    decoded: BTreeMap<(&'a str, &'a str), Option<Secret>>,
    material: HashMap<Digest, Result<Arc<Material>, Unusable>>,
}

impl<'a> Sources<'a> {
    /// Parses the objects of which these entries name fields. Ends early if no caller waits for it
    /// any more; what has not been parsed then counts as missing.
    pub(in crate::sync) fn parse(
        objects: impl IntoIterator<Item = &'a SecretObject>,
        files: &'a SecretData,
        refused: &'a RefusedObjects,
        caller: &'a Caller,
    ) -> Self {
        let mut named: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        let data = objects.into_iter().flat_map(|object| &object.data);
        for entry in data.filter(|entry| !entry.json_key.is_empty()) {
            let (source, field) = (entry.object_name.as_str(), entry.json_key.as_str());
            let paths = files.keys().map(String::as_str);
            for path in paths.filter(|path| source == ALL || source == *path) {
                named.entry(path).or_default().insert(field);
            }
        }
        let named = named.into_iter().take_while(|_| !caller.is_gone());
        let parsed = named.map(|(path, names)| {
            let content = files.get(path).map_or(&[][..], Secret::expose);
            (path, fields(content, &names))
        });
        Self {
            files,
            refused,
            caller,
            parsed: parsed.collect(),
            decoded: BTreeMap::new(),
            material: HashMap::new(),
        }
    }

    pub(super) fn files(&self) -> &'a SecretData {
        self.files
    }

    pub(super) fn caller(&self) -> &'a Caller {
        self.caller
    }

    /// Reads the certificates and keys of a value, each value once.
    pub(super) fn material(&mut self, value: &Secret) -> Result<Arc<Material>, Unusable> {
        let digest = Digest::of([value.expose()]);
        if let Some(known) = self.material.get(&digest) {
            return known.clone();
        }
        let read = match self.refused.find(&digest) {
            Some(why) => Err(why),
            None => Material::read(value.expose(), self.caller).map(Arc::new),
        };
        if !self.caller.is_gone() {
            if let Err(why) = &read {
                self.refused.add(digest, why.clone());
            }
            self.material.insert(digest, read.clone());
        }
        read
    }

    /// Returns the part of an object that is a key's source, without decoding it.
    fn part(&self, source: &ValueSource<'a>) -> Result<&Secret, SyncError> {
        let (key, json_key) = (&source.key, source.json_key);
        let part = match json_key {
            "" => self.files.get(source.path).map(Ok),
            _ => {
                let fields = self.parsed.get(source.path).and_then(Option::as_ref);
                fields
                    .and_then(|fields| fields.get(json_key))
                    .map(Result::as_ref)
            }
        };
        match part {
            Some(Ok(part)) => Ok(part),
            Some(Err(ValueTooLarge)) => Err(SyncError::new(
                ErrorType::TooLarge,
                format!(
                    "key {key}: the field {} is too large for a Secret",
                    quoted(json_key, 100)
                ),
            )),
            None => Err(SyncError::new(
                ErrorType::InvalidValue,
                format!(
                    "key {key}: the object is not a JSON object with a field {}",
                    quoted(json_key, 100)
                ),
            )),
        }
    }

    /// Decodes a key's source, if it is encoded and has not been decoded before.
    fn decode(&mut self, source: &ValueSource<'a>) -> Result<(), SyncError> {
        let name = (source.path, source.json_key);
        if source.encoding.is_empty() || self.decoded.contains_key(&name) {
            return Ok(());
        }
        self.check_caller()?;
        let decoded = decoded(self.part(source)?);
        self.decoded.insert(name, decoded);
        Ok(())
    }

    /// Returns a key's value.
    fn value(&self, source: &ValueSource<'a>) -> Result<&Secret, SyncError> {
        if source.encoding.is_empty() {
            return self.part(source);
        }
        let decoded = self.decoded.get(&(source.path, source.json_key));
        decoded.and_then(Option::as_ref).ok_or_else(|| {
            SyncError::new(
                ErrorType::InvalidValue,
                format!(
                    "key {}: encoding is base64, but the value is not valid base64",
                    source.key
                ),
            )
        })
    }

    /// Ends the work if no caller waits for it any more.
    fn check_caller(&self) -> Result<(), SyncError> {
        if self.caller.is_gone() {
            return Err(SyncError::unavailable(
                "cancelled, because no caller waits for it",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
thread_local! {
    /// The number of JSON texts that were parsed in this thread.
    pub(super) static PARSED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Computes the value of each key. Of several entries with one key the last wins, and a named object
/// wins over one that "*" includes.
pub(super) fn values<'a>(
    object: &'a SecretObject,
    sources: &mut Sources<'a>,
) -> Result<SecretData, SyncError> {
    let value_sources = value_sources(object, sources.files)?;
    sources.check_caller()?;
    for source in &value_sources {
        sources.decode(source)?;
    }
    let mut chosen: BTreeMap<&str, &Secret> = BTreeMap::new();
    for source in &value_sources {
        chosen.insert(&source.key, sources.value(source)?);
    }
    copied(&object.type_, chosen)
}

/// Copies the values, unless they are larger than a Secret may be. The objects that a certificate
/// and its key come from are not counted, because only parts of them are used.
fn copied(type_: &str, chosen: BTreeMap<&str, &Secret>) -> Result<SecretData, SyncError> {
    let mut values = BTreeMap::new();
    let mut bytes = 0_usize;
    for (key, value) in chosen {
        let length = value.expose().len();
        let is_part = type_ == TLS && (key == CERTIFICATE || key == PRIVATE_KEY);
        bytes += if is_part { 0 } else { length };
        if bytes.max(length) > MAX_BYTES {
            return Err(too_large());
        }
        values.insert(key.to_owned(), value.clone());
    }
    Ok(values)
}

/// Returns the sources of all keys: first those that "*" includes, then those that are named.
fn value_sources<'a>(
    object: &'a SecretObject,
    files: &'a SecretData,
) -> Result<Vec<ValueSource<'a>>, SyncError> {
    let mut all = Vec::new();
    let mut keys_of_all = BTreeSet::new();
    let mut named = Vec::new();
    for entry in &object.data {
        check_entry(entry)?;
        let value_source = |key, path| ValueSource {
            key,
            path,
            json_key: entry.json_key.as_str(),
            encoding: entry.encoding.as_str(),
        };
        let (source, key) = (entry.object_name.as_str(), entry.key.as_str());
        if source == ALL {
            for path in files.keys() {
                let key = key_of(path);
                check_key(&key)?;
                if !keys_of_all.insert(key.clone()) {
                    return Err(invalid(format!(
                        "two mounted objects would both become key {key:?}: name them one by one"
                    )));
                }
                all.push(value_source(Cow::Owned(key), path.as_str()));
            }
            continue;
        }
        check_key(key)?;
        if !files.contains_key(source) {
            return Err(SyncError::new(
                ErrorType::ObjectNotFound,
                format!(
                    "key {key}: there is no object {} in the volume; objectName must be the path of a mounted file",
                    quoted(source, 100)
                ),
            ));
        }
        named.push(value_source(Cow::Borrowed(key), source));
    }
    all.append(&mut named);
    Ok(all)
}

/// Checks the form of an entry of `data`, whatever the volume has.
fn check_entry(entry: &SecretObjectData) -> Result<(), SyncError> {
    let (source, key, encoding) = (&entry.object_name, &entry.key, &entry.encoding);
    if source.is_empty() {
        return Err(invalid(format!(
            "objectName is empty for key {}: name the mounted object",
            quoted(key, 100)
        )));
    }
    if !["", "base64"].contains(&encoding.as_str()) {
        return Err(invalid(format!(
            "key {}: encoding {} is not supported: write base64, or leave encoding out",
            quoted(key, 100),
            quoted(encoding, 40)
        )));
    }
    if source == ALL && !key.is_empty() {
        return Err(invalid(format!(
            "key {} is given with objectName \"*\": leave it out, each object gets its own name as key",
            quoted(key, 100)
        )));
    }
    if source != ALL && key.is_empty() {
        return Err(invalid(format!(
            "key is empty for object {}: name the key that it becomes",
            quoted(source, 100)
        )));
    }
    Ok(())
}

/// Decodes base64, which may contain line breaks.
fn decoded(encoded: &Secret) -> Option<Secret> {
    let mut digits = Zeroizing::new(Vec::with_capacity(encoded.expose().len()));
    digits.extend(encoded.expose().iter().filter(|b| !b.is_ascii_whitespace()));
    STANDARD.decode(digits.as_slice()).ok().map(Secret::from)
}

/// Returns the key for a path: a key cannot contain "/".
pub(super) fn key_of(path: &str) -> String {
    path.replace('/', ".")
}

fn check_key(key: &str) -> Result<(), SyncError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    if key.len() > 253 || !key.bytes().all(allowed) || key == "." || key.starts_with("..") {
        return Err(invalid(format!(
            "{} cannot be a key of a Secret: use letters, digits, \"-\", \"_\" and \".\"",
            quoted(key, 100)
        )));
    }
    Ok(())
}

/// Reads fields of a JSON object: the text of a string, or the JSON of anything else. The values of
/// other fields are skipped. Returns `None` if it is not a JSON object.
fn fields<'a>(json: &[u8], names: &BTreeSet<&'a str>) -> Option<JsonFields<'a>> {
    #[cfg(test)]
    PARSED.set(PARSED.get() + 1);
    struct Named<'n, 'a>(&'n BTreeSet<&'a str>);

    impl<'de, 'a> Visitor<'de> for Named<'_, 'a> {
        type Value = JsonFields<'a>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<M: MapAccess<'de>>(self, mut fields: M) -> Result<Self::Value, M::Error> {
            let mut found = JsonFields::new();
            while let Some(name) = fields.next_key::<Cow<'_, str>>()? {
                let Some(name) = self.0.get(&*name) else {
                    fields.next_value::<IgnoredAny>()?;
                    continue;
                };
                // If several fields have one name, the last counts.
                let mut room = Some(MAX_VALUE);
                let value = fields.next_value_seed(BoundedValue(&mut room))?;
                let value = match (room, value) {
                    (None, _) => Err(ValueTooLarge),
                    (Some(_), Value::String(text)) => Ok(text.into()),
                    (Some(_), other) => Ok(other.to_string().into()),
                };
                found.insert(name, value);
            }
            Ok(found)
        }
    }

    let mut reader = serde_json::Deserializer::from_slice(json);
    let found = reader.deserialize_map(Named(names)).ok()?;
    reader.end().ok()?;
    Some(found)
}

/// Reads a JSON value that takes no more memory than there is room for. If there is no room left,
/// the rest is read and dropped.
struct BoundedValue<'r>(&'r mut Option<usize>);

impl BoundedValue<'_> {
    fn take(&mut self, text: usize) -> bool {
        let taken = size_of::<Value>() + text;
        *self.0 = self.0.and_then(|room| room.checked_sub(taken));
        self.0.is_some()
    }

    fn value<E>(mut self, text: usize, value: impl FnOnce() -> Value) -> Result<Value, E> {
        Ok(if self.take(text) {
            value()
        } else {
            Value::Null
        })
    }
}

impl<'de> DeserializeSeed<'de> for BoundedValue<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for BoundedValue<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        self.value(0, || Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        self.value(0, || value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        self.value(0, || value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        self.value(0, || value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("no number"))?;
        self.value(0, || number.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        self.value(text.len(), || text.into())
    }

    fn visit_seq<S: SeqAccess<'de>>(mut self, mut items: S) -> Result<Value, S::Error> {
        let mut values = Vec::new();
        self.take(0);
        while let Some(value) = items.next_element_seed(BoundedValue(self.0))? {
            match self.0 {
                Some(_) => values.push(value),
                None => values = Vec::new(),
            }
        }
        Ok(values.into())
    }

    fn visit_map<M: MapAccess<'de>>(mut self, mut fields: M) -> Result<Value, M::Error> {
        let mut values = Map::new();
        self.take(0);
        while let Some(name) = fields.next_key::<String>()? {
            self.take(name.len());
            let value = fields.next_value_seed(BoundedValue(self.0))?;
            match self.0 {
                Some(_) => drop(values.insert(name, value)),
                None => values = Map::new(),
            }
        }
        Ok(values.into())
    }
}
