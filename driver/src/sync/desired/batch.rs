//! Computes the data of several Secrets of a class at once.
//!
//! The Secrets of a class are often reconciled one after the other, and made of the same objects. So
//! one job reads and parses the objects once and computes the next Secrets as well, up to the number
//! of bytes that one Secret may have.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    io,
};

use super::{Entry, MAX_BYTES, Needs, SecretData, Sources, bytes_of, data};
use crate::{
    cluster::{
        Class,
        resources::SecretObject,
        secrets::{ErrorType, SyncError},
    },
    quoted::quoted,
    record::Records,
    sync::{
        content::{Origin, VolumeContent},
        parsing::{Caller, RefusedObjects},
    },
};

/// The number of bytes up to which the objects of one Secret are read. It is more than a Secret may
/// have, because a Secret may use parts of the objects only.
const MAX_READ: u64 = 8 * 1024 * 1024;

/// The number of files that the error about a missing one names.
const MOST_NAMED: usize = 10;

/// The computed data of Secrets, by the Secret's name.
pub(in crate::sync) type Computed = BTreeMap<String, Result<SecretData, SyncError>>;

/// The Secrets of one content that have been computed and not used yet. Together they have no more
/// bytes than one Secret may have, beside the one that was asked for. It lives as long as a run
/// through the Secrets of a class.
#[derive(Default)]
pub(in crate::sync) struct Batch {
    origin: Option<Origin>,
    computed: Computed,
}

impl Batch {
    /// Makes a batch of the Secrets that were computed from a content.
    pub(in crate::sync) fn new(origin: Origin, computed: Computed) -> Self {
        Self {
            origin: Some(origin),
            computed,
        }
    }

    /// Returns the names of the Secrets.
    pub(in crate::sync) fn names(&self) -> BTreeSet<String> {
        self.computed.keys().cloned().collect()
    }

    /// Takes a Secret, if it was computed from this content. Secrets of other content are dropped.
    pub(in crate::sync) fn take(
        &mut self,
        name: &str,
        origin: &Origin,
    ) -> Option<Result<SecretData, SyncError>> {
        if self.origin.as_ref() != Some(origin) {
            *self = Self::default();
        }
        self.computed.remove(name)
    }

    /// Puts back the data of a Secret that is needed once more.
    pub(in crate::sync) fn put_back(&mut self, name: &str, data: SecretData) {
        self.computed.insert(name.to_owned(), Ok(data));
    }
}

/// The paths of the files of a volume: a few of them, and the number of all.
#[derive(Default)]
struct Names(RefCell<(BTreeSet<String>, usize)>);

impl Names {
    fn add(&self, path: &str) {
        let (some, count) = &mut *self.0.borrow_mut();
        *count += 1;
        some.insert(path.to_owned());
        if some.len() > MOST_NAMED {
            some.pop_last();
        }
    }

    /// Adds to the error about a missing object what the volume has.
    fn explain(&self, data: &mut Result<SecretData, SyncError>) {
        let Err(error) = data else { return };
        if error.error_type() != ErrorType::ObjectNotFound {
            return;
        }
        let (some, count) = &*self.0.borrow();
        let names: Vec<_> = some.iter().map(|n| quoted(n, 60).to_string()).collect();
        let more = match count.saturating_sub(some.len()) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        *error = match names.is_empty() {
            true => error.clone().and("the volume has no files"),
            false => error.clone().and(format_args!(
                "the volume has {}{more}. An object with an alias is mounted under the alias",
                names.join(", ")
            )),
        };
    }
}

/// Computes the Secret of this name from a content, and those that follow it in the class, as far as
/// there is room. Returns `None` if the content has been replaced meanwhile.
///
/// # Errors
/// Fails if the volume cannot be read.
pub(in crate::sync) fn compute(
    class: &Class,
    first: &str,
    content: &VolumeContent,
    records: &Records,
    refused: &RefusedObjects,
    caller: &Caller,
) -> io::Result<Option<Computed>> {
    let objects = class.secret_objects.iter();
    let mut objects: Vec<_> = objects
        .skip_while(|object| object.secret_name != first)
        .collect();
    loop {
        let needs = Needs::of(objects.iter().copied());
        let there = Names::default();
        let snapshot = content.read(records, MAX_READ, |path| {
            there.add(path);
            needs.includes(path)
        })?;
        let Some(snapshot) = snapshot else {
            return Ok(None);
        };
        if snapshot.is_all {
            let sources = Sources::parse(objects.iter().copied(), &snapshot.files, refused, caller);
            let mut computed = compute_from(class, &objects, sources);
            computed.values_mut().for_each(|data| there.explain(data));
            return Ok(Some(computed));
        }
        if objects.len() == 1 {
            let too_large = SyncError::new(
                ErrorType::TooLarge,
                format!(
                    "its objects have more than {MAX_READ} bytes together, the most that the driver reads for one Secret; let the pod read the files, or use fewer objects"
                ),
            );
            return Ok(Some(Computed::from([(first.to_owned(), Err(too_large))])));
        }
        // Together they need too much; the first one alone may not.
        objects.truncate(1);
    }
}

/// Computes Secrets from parsed objects: at least one, and no more once they have as many bytes as
/// one Secret may have.
fn compute_from<'a>(
    class: &'a Class,
    objects: &[&'a SecretObject],
    mut sources: Sources<'a>,
) -> Computed {
    let (mut computed, mut bytes) = (Computed::new(), 0);
    for object in objects {
        let entry = Entry::new(class, object);
        let data = entry.and_then(|entry| data(entry, &mut sources));
        let data = data.and_then(|data| complete(data, object));
        bytes += data.as_ref().map_or(0, bytes_of);
        if bytes > MAX_BYTES && !computed.is_empty() {
            break;
        }
        computed.insert(object.secret_name.clone(), data);
    }
    computed
}

/// Checks that a Secret has every key that its entry names, and any key at all. Nothing less may
/// replace the content of a Secret.
fn complete(data: SecretData, object: &SecretObject) -> Result<SecretData, SyncError> {
    let named = object.data.iter().map(|entry| entry.key.as_str());
    let lost = named
        .filter(|key| !key.is_empty())
        .find(|key| !data.contains_key(*key));
    let what = match lost {
        Some(key) => format!(
            "no value for key {} was found in the volume",
            quoted(key, 100)
        ),
        None if data.is_empty() => "no object was found in the volume".to_owned(),
        None => return Ok(data),
    };
    Err(SyncError::new(ErrorType::ObjectNotFound, what))
}

#[cfg(test)]
mod tests {
    use super::{super::PARSED, *};
    use crate::secret::Secret;
    use proptest::prelude::*;
    use serde_json::json;

    fn text(computed: &Result<SecretData, SyncError>) -> Result<String, String> {
        let values = |data: &SecretData| {
            let data = data.iter();
            let data = data.map(|(key, value)| (key, String::from_utf8_lossy(value.expose())));
            format!("{:?}", data.collect::<BTreeMap<_, _>>())
        };
        computed.as_ref().map(values).map_err(ToString::to_string)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        /// An object is parsed as often as its Secrets fill a whole Secret, and not once for each of
        /// them; and each Secret has the data that it would have alone.
        #[test]
        fn a_run_parses_each_object_as_often_as_it_fills_a_secret(
            secrets in proptest::collection::vec((0..4_usize, 0..8_usize), 1..100),
            length in prop::sample::select(vec![1_usize, 1_000, 100_000]),
        ) {
            let fields: BTreeMap<String, String> = (0..6)
                .map(|field| (field.to_string(), field.to_string().repeat(length)))
                .collect();
            let json = serde_json::to_string(&fields).unwrap();
            let files: BTreeMap<String, Secret> = (0..3)
                .map(|file| (format!("file-{file}"), json.clone().into()))
                .collect();
            let objects: Vec<_> = secrets.iter().enumerate().map(|(number, (file, field))| json!({
                "secretName": format!("s-{number}"), "type": "Opaque",
                "data": [{"objectName": format!("file-{file}"), "key": "k", "jsonKey": field.to_string()}],
            })).collect();
            let class = Class::with_secrets(serde_json::from_value(serde_json::Value::from(objects)).unwrap());
            let (refused, caller) = (RefusedObjects::default(), Caller::default());
            let mut left: Vec<&SecretObject> = class.secret_objects.iter().collect();
            let (mut all, mut runs) = (Computed::new(), 0);
            PARSED.set(0);
            while !left.is_empty() {
                let sources = Sources::parse(left.iter().copied(), &files, &refused, &caller);
                let computed = compute_from(&class, &left, sources);
                prop_assert!(!computed.is_empty());
                let bytes = |data: &Result<SecretData, SyncError>| data.as_ref().map_or(0, bytes_of);
                prop_assert!(computed.values().map(bytes).sum::<usize>() <= MAX_BYTES);
                left.drain(..computed.len());
                all.extend(computed);
                runs += 1;
            }
            let bytes = secrets.iter().filter(|(file, field)| *file < 3 && *field < 6).count() * length;
            prop_assert!(runs <= 1 + 2 * bytes / MAX_BYTES, "{runs} runs for {bytes} bytes");
            prop_assert!(PARSED.get() <= runs * 3, "{} objects parsed", PARSED.get());
            for object in class.secret_objects.iter() {
                let sources = Sources::parse([object], &files, &refused, &caller);
                let alone = compute_from(&class, &[object], sources);
                let name = &object.secret_name;
                prop_assert_eq!(text(&all[name]), text(&alone[name]));
            }
        }
    }
}
