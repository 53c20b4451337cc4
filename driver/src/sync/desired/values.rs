//! The value of each key, out of the mounted files.
//!
//! How often the entries of a class name an object, or a part of it, does not decide what that
//! costs: each object is parsed once for all of them, each part is decoded once, each certificate
//! is read once, and nothing is copied beyond what a Secret holds.

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

use super::{ALL, CERTIFICATE, MOST_BYTES, PRIVATE_KEY, Place, TLS};
use crate::{
    cluster::{resources::SecretObject, secrets::Digest},
    secret::Secret,
    sync::{
        Problem, Trouble,
        parsing::{Refusals, Waiting},
        tls::{Parts, Unusable},
    },
};

/// What a JSON value may take in memory while it is read. A text of a Secret's size takes less,
/// unless it is hardly anything but brackets and commas.
const LARGEST_VALUE: usize = 8 * MOST_BYTES;

/// The files that entries are made of.
pub struct Needs<'a> {
    all: bool,
    paths: BTreeSet<&'a str>,
}

impl<'a> Needs<'a> {
    /// Returns what some entries need.
    pub fn of(objects: impl IntoIterator<Item = &'a SecretObject>) -> Self {
        let data = objects.into_iter().flat_map(|object| &object.data);
        let paths: BTreeSet<_> = data.map(|d| d.object_name.as_str()).collect();
        Self {
            all: paths.contains(ALL),
            paths,
        }
    }

    /// Returns whether a file is among them.
    pub fn includes(&self, path: &str) -> bool {
        self.all || self.paths.contains(path)
    }
}

/// What one key gets: an object, perhaps a field of it, perhaps decoded.
struct Wish<'a> {
    key: Cow<'a, str>,
    path: &'a str,
    json_key: &'a str,
    encoding: &'a str,
}

type Files = BTreeMap<String, Secret>;
/// The fields of a JSON object that somebody wishes for, by name. Missing ones are left out.
type Fields<'a> = BTreeMap<&'a str, Result<Secret, TooLarge>>;

/// A JSON value takes more memory than a value that a Secret holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct TooLarge;

/// Files of a volume, and what has been parsed of them for the entries of one class.
pub(in crate::sync) struct Sources<'a> {
    files: &'a Files,
    refusals: &'a Refusals,
    waiting: &'a Waiting,
    /// What the entries name of each object. None: it is no JSON object.
    parsed: BTreeMap<&'a str, Option<Fields<'a>>>,
    /// By path and field. None: it is not base64.
    decoded: BTreeMap<(&'a str, &'a str), Option<Secret>>,
    parts: HashMap<Digest, Result<Arc<Parts>, Unusable>>,
}

impl<'a> Sources<'a> {
    /// Parses what these entries name, as long as somebody waits for it. What is left out then
    /// counts as not being there.
    pub(in crate::sync) fn parse(
        objects: impl IntoIterator<Item = &'a SecretObject>,
        files: &'a Files,
        refusals: &'a Refusals,
        waiting: &'a Waiting,
    ) -> Self {
        let mut wanted: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        let data = objects.into_iter().flat_map(|object| &object.data);
        for entry in data.filter(|entry| !entry.json_key.is_empty()) {
            let (source, field) = (entry.object_name.as_str(), entry.json_key.as_str());
            let paths = files.keys().map(String::as_str);
            for path in paths.filter(|path| source == ALL || source == *path) {
                wanted.entry(path).or_default().insert(field);
            }
        }
        let wanted = wanted.into_iter().take_while(|_| !waiting.is_over());
        let parsed = wanted.map(|(path, names)| {
            let content = files.get(path).map_or(&[][..], Secret::expose);
            (path, fields(content, &names))
        });
        Self {
            files,
            refusals,
            waiting,
            parsed: parsed.collect(),
            decoded: BTreeMap::new(),
            parts: HashMap::new(),
        }
    }

    pub(super) fn files(&self) -> &'a Files {
        self.files
    }

    pub(super) fn waiting(&self) -> &'a Waiting {
        self.waiting
    }

    /// Reads the certificates and keys of a value, or remembers them.
    pub(super) fn parts(&mut self, value: &Secret) -> Result<Arc<Parts>, Unusable> {
        let digest = Digest::of([value.expose()]);
        if let Some(known) = self.parts.get(&digest) {
            return known.clone();
        }
        let read = match self.refusals.find(&digest) {
            Some(why) => Err(why),
            None => Parts::read(value.expose(), self.waiting).map(Arc::new),
        };
        if !self.waiting.is_over() {
            if let Err(why) = &read {
                self.refusals.add(digest, why.clone());
            }
            self.parts.insert(digest, read.clone());
        }
        read
    }

    /// The part of an object that is asked for, as it is there.
    fn part(&self, at: &Place<'_>, wish: &Wish<'a>) -> Result<&Secret, Problem> {
        let (key, json_key) = (&wish.key, wish.json_key);
        let part = match json_key {
            "" => self.files.get(wish.path).map(Ok),
            _ => {
                let fields = self.parsed.get(wish.path).and_then(Option::as_ref);
                fields
                    .and_then(|fields| fields.get(json_key))
                    .map(Result::as_ref)
            }
        };
        match part {
            Some(Ok(part)) => Ok(part),
            Some(Err(TooLarge)) => Err(at.problem(
                Trouble::TooLarge,
                format_args!("key {key}: the field {json_key:.100?} is too large for a Secret"),
            )),
            None => Err(at.problem(
                Trouble::InvalidValue,
                format_args!(
                    "key {key}: the object is not a JSON object with a field {json_key:.100?}"
                ),
            )),
        }
    }

    /// Decodes what is asked for, if it is encoded and has not been decoded before.
    fn decode(&mut self, at: &Place<'_>, wish: &Wish<'a>) -> Result<(), Problem> {
        let name = (wish.path, wish.json_key);
        if wish.encoding.is_empty() || self.decoded.contains_key(&name) {
            return Ok(());
        }
        at.still_wanted(self.waiting)?;
        let decoded = decoded(self.part(at, wish)?);
        self.decoded.insert(name, decoded);
        Ok(())
    }

    /// The value that is asked for.
    fn value(&self, at: &Place<'_>, wish: &Wish<'a>) -> Result<&Secret, Problem> {
        if wish.encoding.is_empty() {
            return self.part(at, wish);
        }
        let decoded = self.decoded.get(&(wish.path, wish.json_key));
        decoded.and_then(Option::as_ref).ok_or_else(|| {
            at.problem(
                Trouble::InvalidValue,
                format_args!(
                    "key {}: the object is not base64, which encoding says it is",
                    wish.key
                ),
            )
        })
    }
}

#[cfg(test)]
thread_local! {
    /// How often a JSON text was parsed in this thread.
    pub(in crate::sync) static PARSED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Makes the value of each key. Of several entries with one key the last wins, and what is named
/// wins over what "*" brings.
pub(super) fn values<'a>(
    at: &Place<'_>,
    object: &'a SecretObject,
    sources: &mut Sources<'a>,
) -> Result<BTreeMap<String, Secret>, Problem> {
    let wishes = wishes(at, object, sources.files)?;
    at.still_wanted(sources.waiting)?;
    for wish in &wishes {
        sources.decode(at, wish)?;
    }
    let mut chosen: BTreeMap<&str, &Secret> = BTreeMap::new();
    for wish in &wishes {
        chosen.insert(&wish.key, sources.value(at, wish)?);
    }
    copied(at, &object.type_, chosen)
}

/// Copies the values, as far as they fit into a Secret. What a certificate and its key come from
/// may be more than what is made of it.
fn copied(
    at: &Place<'_>,
    type_: &str,
    chosen: BTreeMap<&str, &Secret>,
) -> Result<BTreeMap<String, Secret>, Problem> {
    let mut values = BTreeMap::new();
    let mut bytes = 0_usize;
    for (key, value) in chosen {
        let length = value.expose().len();
        let is_part = type_ == TLS && (key == CERTIFICATE || key == PRIVATE_KEY);
        bytes += if is_part { 0 } else { length };
        if bytes.max(length) > MOST_BYTES {
            return Err(at.too_large());
        }
        values.insert(key.to_owned(), value.clone());
    }
    Ok(values)
}

/// Returns what each key gets: first what "*" brings, then what is named.
fn wishes<'a>(
    at: &Place<'_>,
    object: &'a SecretObject,
    files: &'a Files,
) -> Result<Vec<Wish<'a>>, Problem> {
    let mut all = Vec::new();
    let mut keys_of_all = BTreeSet::new();
    let mut named = Vec::new();
    for entry in &object.data {
        let (source, key) = (entry.object_name.as_str(), entry.key.as_str());
        let (json_key, encoding) = (entry.json_key.as_str(), entry.encoding.as_str());
        if source.is_empty() {
            return Err(at.invalid(format!(
                "objectName is empty for key {key:.100?}: name the mounted object"
            )));
        }
        if !["", "base64"].contains(&encoding) {
            return Err(at.invalid(format!(
                "key {key}: encoding {encoding:.40?} is not known: base64, or leave it out"
            )));
        }
        if source == ALL {
            if !key.is_empty() {
                return Err(at.invalid(format!(
                    "key {key:.100?} is given with objectName \"*\": leave it out, each object gets its own name as key"
                )));
            }
            for path in files.keys() {
                let key = key_of(path);
                check_key(at, &key)?;
                if !keys_of_all.insert(key.clone()) {
                    return Err(at.invalid(format!(
                        "two mounted objects would both become key {key:?}: name them one by one"
                    )));
                }
                all.push(Wish {
                    key: Cow::Owned(key),
                    path,
                    json_key,
                    encoding,
                });
            }
            continue;
        }
        if key.is_empty() {
            return Err(at.invalid(format!(
                "key is empty for object {source:.100?}: name the key that it becomes"
            )));
        }
        check_key(at, key)?;
        if !files.contains_key(source) {
            return Err(at.problem(
                Trouble::ObjectNotFound,
                format_args!(
                    "key {key}: there is no object {source:.100?} in the volume; objectName must be the path of a mounted file"
                ),
            ));
        }
        named.push(Wish {
            key: Cow::Borrowed(key),
            path: source,
            json_key,
            encoding,
        });
    }
    all.append(&mut named);
    Ok(all)
}

/// Decodes base64, in which line breaks are usual.
fn decoded(encoded: &Secret) -> Option<Secret> {
    let mut digits = Zeroizing::new(Vec::with_capacity(encoded.expose().len()));
    digits.extend(encoded.expose().iter().filter(|b| !b.is_ascii_whitespace()));
    STANDARD.decode(digits.as_slice()).ok().map(Secret::from)
}

/// A path as a key, in which no "/" may stand.
pub(super) fn key_of(path: &str) -> String {
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

/// Reads fields of a JSON object: a string's text, or anything else as JSON. The values of other
/// fields are never made. None when it is no JSON object.
fn fields<'a>(json: &[u8], names: &BTreeSet<&'a str>) -> Option<Fields<'a>> {
    #[cfg(test)]
    PARSED.set(PARSED.get() + 1);
    struct Wanted<'n, 'a>(&'n BTreeSet<&'a str>);

    impl<'de, 'a> Visitor<'de> for Wanted<'_, 'a> {
        type Value = Fields<'a>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<M: MapAccess<'de>>(self, mut fields: M) -> Result<Self::Value, M::Error> {
            let mut found = Fields::new();
            while let Some(name) = fields.next_key::<Cow<'_, str>>()? {
                let Some(name) = self.0.get(&*name) else {
                    fields.next_value::<IgnoredAny>()?;
                    continue;
                };
                // Of several fields of one name the last counts.
                let mut room = Some(LARGEST_VALUE);
                let value = fields.next_value_seed(Bounded(&mut room))?;
                let value = match (room, value) {
                    (None, _) => Err(TooLarge),
                    (Some(_), Value::String(text)) => Ok(text.into()),
                    (Some(_), other) => Ok(other.to_string().into()),
                };
                found.insert(name, value);
            }
            Ok(found)
        }
    }

    let mut reader = serde_json::Deserializer::from_slice(json);
    let found = reader.deserialize_map(Wanted(names)).ok()?;
    reader.end().ok()?;
    Some(found)
}

/// Reads a JSON value that takes no more memory than there is room for. When there is no room
/// left, the rest is read and thrown away.
struct Bounded<'r>(&'r mut Option<usize>);

impl Bounded<'_> {
    fn take(&mut self, text: usize) -> bool {
        let taken = size_of::<Value>() + text;
        *self.0 = self.0.and_then(|room| room.checked_sub(taken));
        self.0.is_some()
    }

    fn made<E>(mut self, text: usize, value: impl FnOnce() -> Value) -> Result<Value, E> {
        Ok(if self.take(text) {
            value()
        } else {
            Value::Null
        })
    }
}

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        self.made(0, || Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        self.made(0, || value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        self.made(0, || value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        self.made(0, || value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("no number"))?;
        self.made(0, || number.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        self.made(text.len(), || text.into())
    }

    fn visit_seq<S: SeqAccess<'de>>(mut self, mut items: S) -> Result<Value, S::Error> {
        let mut values = Vec::new();
        self.take(0);
        while let Some(value) = items.next_element_seed(Bounded(self.0))? {
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
            let value = fields.next_value_seed(Bounded(self.0))?;
            match self.0 {
                Some(_) => drop(values.insert(name, value)),
                None => values = Map::new(),
            }
        }
        Ok(values.into())
    }
}
