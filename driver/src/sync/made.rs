//! What the volumes of this node make of an entry of a class: which content is the newest, and the
//! Secret that comes out of it.

use std::sync::Arc;

use super::{
    ATTEMPTS, MOST_READ, Problem, Sync, Trouble, Volume,
    content::{Held, Stamp},
    desired::{self, Desired, Needs},
    known::Mounted,
    parsing::{Fingerprint, Refusals, Waiting},
    unavailable,
};
use crate::{
    cluster::{Class, resources::SecretObject},
    files::read::Snapshot,
    volume::record::{Record, Records},
};

impl Sync {
    /// Makes the Secret that the newest content of the volumes makes, and says which content that
    /// is. None when none of them has any. Mounts do not wait for it.
    pub(super) async fn made(
        &self,
        class: &Arc<Class>,
        object: &SecretObject,
        volumes: &[Mounted],
        pending: Option<&Record>,
    ) -> Result<Option<(Desired, Stamp)>, Problem> {
        for _ in 0..ATTEMPTS {
            let Some(newest) = self.newest(class, volumes, pending).await? else {
                return Ok(None);
            };
            let stamp = newest.stamp();
            let namespace = newest.volume.pod.namespace.clone();
            let (of_class, object) = (Arc::clone(class), object.clone());
            let (records, refusals) = (self.records.clone(), Arc::clone(&self.refusals));
            let job = move |waiting: &Waiting| {
                made(&of_class, &object, &newest, &records, &refusals, waiting)
            };
            let made = self.parsing.run(&namespace, job).await;
            let made = made.unwrap_or_else(|error| Err(unavailable(class, &error)));
            if let Some(desired) = made? {
                return Ok(Some((desired, stamp)));
            }
        }
        let why = "the volume kept changing while it was read; trying again";
        Err(unavailable(class, &why))
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

/// Makes the Secret that a content makes. None when the content has been replaced meanwhile.
fn made(
    class: &Class,
    object: &SecretObject,
    newest: &Held,
    records: &Records,
    refusals: &Refusals,
    waiting: &Waiting,
) -> Result<Option<Desired>, Problem> {
    let needs = Needs::of(object);
    let snapshot = newest.read(records, MOST_READ, |path| needs.includes(path));
    let Some(snapshot) = snapshot.map_err(|error| unavailable(class, &error))? else {
        return Ok(None);
    };
    if !snapshot.is_all {
        return Err(Problem::new(
            Trouble::TooLarge,
            format!(
                "SecretProviderClass {}, Secret {}: the objects that it is made of have more than {MOST_READ} bytes together, which are not read; read them from the volume instead",
                class.identity.name,
                object.secret_name.trim()
            ),
        ));
    }
    let fingerprint = fingerprint(class, object, &snapshot);
    if let Some(problem) = refusals.find(&fingerprint) {
        return Err(problem);
    }
    let desired = desired::desired(class, object, &snapshot.files, waiting);
    if let Err(problem) = &desired
        && problem.trouble == Trouble::InvalidCertificate
        && !waiting.is_over()
    {
        refusals.add(fingerprint, problem.clone());
    }
    whole(desired?, class, object).map(Some)
}

/// A Secret that has all that its class names, and anything at all. Nothing else may ever take the
/// place of what is there.
fn whole(desired: Desired, class: &Class, object: &SecretObject) -> Result<Desired, Problem> {
    let named = object.data.iter().map(|entry| entry.key.trim());
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

/// Tells what a Secret is made of from what another is, or the same one at another time.
fn fingerprint(class: &Class, object: &SecretObject, snapshot: &Snapshot) -> [u8; 32] {
    let mut fingerprint = Fingerprint::new();
    for part in [
        &class.identity.uid,
        &class.identity.resource_version,
        &object.secret_name,
    ] {
        fingerprint.add(part.as_bytes());
    }
    for (path, content) in &snapshot.files {
        fingerprint.add(path.as_bytes());
        fingerprint.add(content.expose());
    }
    fingerprint.finish()
}

/// Runs short work on the file system where it may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}
