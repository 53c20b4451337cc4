//! What the volumes of this node make of the entries of a class: which content is the newest, and
//! the Secrets that come out of it.
//!
//! The Secrets of a class are often made one after the other, of the same objects. So one job
//! reads and parses them once, and makes the next ones as well, up to as many bytes as one Secret
//! may have. What was made is remembered as a digest, so that a look at a Secret of which nothing
//! has changed reads nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    ATTEMPTS, MOST_READ, Problem, Sync, Trouble, Volume,
    content::{Held, Origin, Stamp},
    desired::{self, Desired, MOST_BYTES, Needs, Sources},
    known::{Mounted, SecretKey},
    parsing::{Refusals, Waiting},
    unavailable,
};
use crate::{
    cluster::{
        Class,
        resources::SecretObject,
        secrets::{Data, Digest},
    },
    record::{Record, Records},
};

/// What came out of an entry, by the name of the Secret.
type Made = BTreeMap<String, Result<Desired, Problem>>;

/// Secrets that have been made before it was their turn, of no more bytes than one Secret and the
/// one that was asked for. It lives as long as a run through the Secrets of a class.
#[derive(Default)]
pub(super) struct Ahead {
    of: Option<Origin>,
    made: Made,
}

impl Ahead {
    /// The names of the Secrets that are there.
    pub(super) fn names(&self) -> BTreeSet<String> {
        self.made.keys().cloned().collect()
    }

    /// Puts a Secret back that has not been needed.
    pub(super) fn put_back(&mut self, desired: Desired) {
        self.made.insert(desired.name.clone(), Ok(desired));
    }
}

impl Sync {
    /// Makes the Secret that the newest content of the volumes makes, and says which content that
    /// is. None when none of them has any. Mounts do not wait for it.
    pub(super) async fn made(
        &self,
        class: &Arc<Class>,
        object: &SecretObject,
        volumes: &[Mounted],
        pending: Option<&Record>,
        ahead: &mut Ahead,
    ) -> Result<Option<(Desired, Stamp)>, Problem> {
        let name = object.secret_name.as_str();
        for _ in 0..ATTEMPTS {
            let Some(newest) = self.newest(class, volumes, pending).await? else {
                return Ok(None);
            };
            let (stamp, origin) = (newest.stamp(), newest.origin(class));
            if ahead.of.as_ref() != Some(&origin) {
                *ahead = Ahead::default();
            }
            if let Some(made) = ahead.made.remove(name) {
                return made.map(|desired| Some((desired, stamp)));
            }
            let namespace = newest.volume.pod.namespace.clone();
            let is_versioned = newest.is_versioned();
            let (of_class, first) = (Arc::clone(class), name.to_owned());
            let (records, refusals) = (self.records.clone(), Arc::clone(&self.refusals));
            let job = move |waiting: &Waiting| {
                made(&of_class, &first, &newest, &records, &refusals, waiting)
            };
            let made = self.parsing.run(&namespace, job).await;
            let made = made.unwrap_or_else(|error| Err(unavailable(class, &error)));
            if let Some(made) = made? {
                if is_versioned {
                    self.remember_made(&namespace, class, &origin, &made);
                }
                *ahead = Ahead {
                    of: Some(origin),
                    made,
                };
                let made = ahead.made.remove(name);
                let made = made.unwrap_or_else(|| Err(unavailable(class, &"it is not made")));
                return made.map(|desired| Some((desired, stamp)));
            }
        }
        let why = "the volume kept changing while it was read; trying again";
        Err(unavailable(class, &why))
    }

    /// What came out of the newest content before, as a digest. None when something may have
    /// changed since.
    pub(super) async fn made_before(
        &self,
        key: &SecretKey,
        class: &Class,
        volumes: &[Mounted],
    ) -> Result<Option<(Digest, Stamp)>, Problem> {
        let newest = self.newest(class, volumes, None).await?;
        let Some(newest) = newest.filter(Held::is_versioned) else {
            return Ok(None);
        };
        let before = self.known.made_before(key, &newest.origin(class));
        let digest = before.transpose()?;
        Ok(digest.map(|digest| (digest, newest.stamp())))
    }

    fn remember_made(&self, namespace: &str, class: &Class, origin: &Origin, made: &Made) {
        for (name, made) in made {
            let outcome = match made {
                Ok(desired) => Ok(Data::digest(&desired.data)),
                // It may come out otherwise next time.
                Err(problem) if problem.trouble == Trouble::Unavailable => continue,
                Err(problem) => Err(problem.clone()),
            };
            let key = SecretKey {
                namespace: namespace.to_owned(),
                class: class.identity.name.clone(),
                name: name.clone(),
            };
            self.known.set_made(key, origin.clone(), outcome);
        }
    }

    /// The newest content of some volumes.
    async fn newest(
        &self,
        class: &Class,
        volumes: &[Mounted],
        pending: Option<&Record>,
    ) -> Result<Option<Held>, Problem> {
        let (records, pending) = (self.records.clone(), pending.cloned());
        let tmpfs = Arc::clone(&self.tmpfs);
        let volumes: Vec<Volume> = volumes.iter().map(|v| v.volume.clone()).collect();
        let find = move || {
            let (mut all, mut failed) = (Vec::new(), None);
            for volume in &volumes {
                match Held::find(&records, &tmpfs, volume, pending.as_ref()) {
                    Ok(found) => all.extend(found),
                    Err(error) => failed = Some(error),
                }
            }
            (all, failed)
        };
        let (all, failed) = blocking(find).await;
        if let (true, Some(error)) = (all.is_empty(), failed) {
            return Err(unavailable(class, &error));
        }
        let newer = |one: Held, other: Held| match other.stamp().is_newer_than(&one.stamp()) {
            true => other,
            false => one,
        };
        Ok(all.into_iter().reduce(newer))
    }
}

/// Makes the Secret of this name that a content makes, and the ones that follow it in the class,
/// as far as there is room. None when the content has been replaced meanwhile.
fn made(
    class: &Class,
    first: &str,
    newest: &Held,
    records: &Records,
    refusals: &Refusals,
    waiting: &Waiting,
) -> Result<Option<Made>, Problem> {
    let objects = class.secret_objects.iter();
    let mut objects: Vec<_> = objects
        .skip_while(|object| object.secret_name != first)
        .collect();
    loop {
        let needs = Needs::of(objects.iter().copied());
        let snapshot = newest.read(records, MOST_READ, |path| needs.includes(path));
        let Some(snapshot) = snapshot.map_err(|error| unavailable(class, &error))? else {
            return Ok(None);
        };
        if snapshot.is_all {
            let sources =
                Sources::parse(objects.iter().copied(), &snapshot.files, refusals, waiting);
            return Ok(Some(made_of(class, &objects, sources)));
        }
        if objects.len() > 1 {
            // Together they need too much: one by one, then.
            objects.truncate(1);
            continue;
        }
        let too_large = Problem::new(
            Trouble::TooLarge,
            format!(
                "SecretProviderClass {}, Secret {first}: the objects that it is made of have more than {MOST_READ} bytes together, which are not read; read them from the volume instead",
                class.identity.name,
            ),
        );
        return Ok(Some(Made::from([(first.to_owned(), Err(too_large))])));
    }
}

/// Makes Secrets of what has been parsed, at least one, and no more when they have as many bytes
/// as one Secret may have.
fn made_of<'a>(class: &Class, objects: &[&'a SecretObject], mut sources: Sources<'a>) -> Made {
    let (mut made, mut bytes) = (Made::new(), 0);
    for object in objects {
        let desired = desired::desired(class, object, &mut sources);
        let desired = desired.and_then(|desired| whole(desired, class, object));
        if let Ok(desired) = &desired {
            let values = desired.data.values();
            bytes += values.map(|value| value.expose().len()).sum::<usize>();
        }
        if bytes > MOST_BYTES && !made.is_empty() {
            break;
        }
        made.insert(object.secret_name.clone(), desired);
    }
    made
}

/// A Secret that has all that its class names, and anything at all. Nothing else may ever take the
/// place of what is there.
fn whole(desired: Desired, class: &Class, object: &SecretObject) -> Result<Desired, Problem> {
    let named = object.data.iter().map(|entry| entry.key.as_str());
    let lost = named
        .filter(|key| !key.is_empty())
        .find(|key| !desired.data.contains_key(*key));
    let what = match lost {
        Some(key) => format!("key {key:.100?} came out of the volume without a value"),
        None if desired.data.is_empty() => "there is no object in the volume".to_owned(),
        None => return Ok(desired),
    };
    Err(Problem::new(
        Trouble::ObjectNotFound,
        format!(
            "SecretProviderClass {}, Secret {}: {what}",
            class.identity.name, desired.name
        ),
    ))
}

/// Runs short work on the file system where it may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{record, secret::Secret, sync::desired::PARSED};
    use proptest::prelude::*;
    use serde_json::json;

    fn class(objects: serde_json::Value) -> Class {
        Class {
            identity: record::Class {
                name: "db".to_owned(),
                uid: "u".to_owned(),
                generation: None,
                resource_version: "1".to_owned(),
                annotations: BTreeMap::new(),
            },
            provider: "vault".to_owned(),
            parameters: BTreeMap::new(),
            secret_objects: serde_json::from_value(objects).unwrap(),
            too_much: None,
        }
    }

    fn text(made: &Result<Desired, Problem>) -> Result<String, String> {
        let values = |desired: &Desired| {
            let data = desired.data.iter();
            let data = data.map(|(key, value)| (key, String::from_utf8_lossy(value.expose())));
            format!("{:?}", data.collect::<BTreeMap<_, _>>())
        };
        made.as_ref().map(values).map_err(ToString::to_string)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        /// How many Secrets there are does not decide how often an object is parsed, but how much
        /// is made of it does; and each Secret is what it would be alone.
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
            let class = class(objects.into());
            let (refusals, waiting) = (Refusals::default(), Waiting::default());
            let mut left: Vec<&SecretObject> = class.secret_objects.iter().collect();
            let (mut all, mut runs) = (Made::new(), 0);
            PARSED.set(0);
            while !left.is_empty() {
                let sources = Sources::parse(left.iter().copied(), &files, &refusals, &waiting);
                let made = made_of(&class, &left, sources);
                prop_assert!(!made.is_empty());
                let bytes = |made: &Result<Desired, Problem>| {
                    made.as_ref().map_or(0, |made| made.data.values().map(|v| v.expose().len()).sum::<usize>())
                };
                prop_assert!(made.values().map(bytes).sum::<usize>() <= MOST_BYTES);
                left.drain(..made.len());
                all.extend(made);
                runs += 1;
            }
            let bytes = secrets.iter().filter(|(file, field)| *file < 3 && *field < 6).count() * length;
            prop_assert!(runs <= 1 + 2 * bytes / MOST_BYTES, "{runs} runs for {bytes} bytes");
            prop_assert!(PARSED.get() <= runs * 3, "{} objects parsed", PARSED.get());
            for object in &class.secret_objects {
                let sources = Sources::parse([object], &files, &refusals, &waiting);
                let alone = made_of(&class, &[object], sources);
                let name = &object.secret_name;
                prop_assert_eq!(text(&all[name]), text(&alone[name]));
            }
        }
    }
}
