//! Reports the results of reconciliations: events on pods, and metrics.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use tokio::time::Instant;

use super::{SecretSync, Volume, cache::ClassKey};
use crate::{
    cluster::{
        Class,
        events::{REPEAT_EVERY, Series, Severity},
        pod_status::{Aspect, Cause, Trouble},
        secrets::{Reconciled, SyncError},
    },
    record::{ASKED, ClassState},
};

/// The reason of the event about a Secret that is not as desired, as in the existing driver.
const FAILED: &str = "FailedToCreateSecret";

/// Stands for the name of a Secret in reports about all Secrets of a class.
pub(super) const WHOLE_CLASS: &str = "";

/// The volumes, and what their pods have been told of their Secrets.
#[derive(Default)]
pub(super) struct Told(Mutex<HashMap<String, OfVolume>>);

/// What is known of the Secrets of one volume, and what its pod has been told.
#[derive(Default)]
struct OfVolume {
    /// The errors that the pod has been told, by Secret, so that it is told of each once.
    errors: BTreeMap<String, ToldError>,
    /// The Secrets that are not as desired, with the cause.
    wrong: BTreeMap<String, Cause>,
    /// The time since when one of them is not.
    since: Option<Timestamp>,
    /// The Secrets that have been found in order. `None` once all of the class have been checked.
    checked: Option<BTreeSet<String>>,
    /// The time of the last repetition of an event.
    repeated: Option<Instant>,
}

/// An error of a Secret, and the events that tell it.
#[derive(Clone)]
struct ToldError {
    identity: String,
    series: Series,
}

impl Told {
    fn volumes(&self) -> MutexGuard<'_, HashMap<String, OfVolume>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a mounted volume, whose pod can be told something.
    pub(super) fn add(&self, volume_id: &str) {
        let mut volumes = self.volumes();
        if !volumes.contains_key(volume_id) {
            let unknown = OfVolume {
                checked: Some(BTreeSet::new()),
                ..OfVolume::default()
            };
            volumes.insert(volume_id.to_owned(), unknown);
        }
    }

    /// Removes a volume that is being unpublished.
    pub(super) fn remove(&self, volume_id: &str) {
        self.volumes().remove(volume_id);
    }

    /// Takes back that a pod has been told of an error, because the event could not be posted.
    /// `before` is the error that the pod was told before.
    fn take_back(
        &self,
        volume_id: &str,
        secret: &str,
        error: Option<&str>,
        before: Option<ToldError>,
    ) {
        let mut volumes = self.volumes();
        // If the pod has been told something else since, that stands.
        if let Some(told) = volumes.get_mut(volume_id)
            && told.error(secret) == error
        {
            set(&mut told.errors, secret, before);
        }
    }
}

impl OfVolume {
    /// Returns the error of a Secret that the pod has been told.
    fn error(&self, secret: &str) -> Option<&str> {
        let error = self.errors.get(secret)?;
        Some(&error.identity)
    }

    /// Notes whether a Secret is as desired; `class` is the one that makes it.
    fn note(&mut self, class: &Class, secret: &str, error: Option<&SyncError>) {
        match error {
            Some(error) => {
                let identity = format!("{secret}\n{}", error.identity());
                let cause = Cause::new(&identity, &error.to_string());
                self.wrong.insert(secret.to_owned(), cause);
            }
            None => {
                self.wrong.remove(secret);
            }
        }
        if let Some(checked) = &mut self.checked {
            if error.is_none() && secret != WHOLE_CLASS {
                checked.insert(secret.to_owned());
            }
            if are_all(class, |name| checked.contains(name)) {
                self.checked = None;
            }
        }
        if self.wrong.is_empty() {
            self.since = None;
        } else if self.since.is_none() {
            self.since = Some(Timestamp::now());
        }
    }

    /// Returns what is wrong, or `None` if not everything has been checked yet.
    fn trouble(&self, class: &Class) -> Option<Option<Trouble>> {
        match self.since {
            Some(since) => Some(Some(Trouble::new(since, self.causes(class)))),
            None => self.checked.is_none().then_some(None),
        }
    }

    /// Returns the causes of all that is wrong: of the whole class, and then of its Secrets in its order.
    fn causes(&self, class: &Class) -> Vec<&Cause> {
        let made = class.secret_objects.iter();
        let made = made.map(|object| object.secret_name.as_str());
        // A check with an earlier state of the class may have ended after a later one.
        let others = self.wrong.keys().map(String::as_str);
        let mut named = BTreeSet::new();
        [WHOLE_CLASS]
            .into_iter()
            .chain(made)
            .chain(others)
            .filter(|secret| named.insert(*secret))
            .filter_map(|secret| self.wrong.get(secret))
            .collect()
    }
}

/// Returns whether something holds for all Secrets of a class.
fn are_all(class: &Class, holds: impl Fn(&str) -> bool) -> bool {
    let mut objects = class.secret_objects.iter();
    objects.all(|object| holds(&object.secret_name))
}

fn set(errors: &mut BTreeMap<String, ToldError>, secret: &str, error: Option<ToldError>) {
    match error {
        None => errors.remove(secret),
        Some(error) => errors.insert(secret.to_owned(), error),
    };
}

impl SecretSync {
    /// Reports the result of a reconciliation to the pods of the volumes that it was made for.
    pub(super) fn report(
        &self,
        class: &Class,
        secret: &str,
        volumes: &[Volume],
        result: &Result<Option<Reconciled>, SyncError>,
    ) {
        match result {
            Err(error) => self.report_error(class, secret, volumes, error),
            // No volume has content, or the Secret is left to other nodes or to a refresh: nothing was
            // compared.
            Ok(None) => {}
            Ok(Some(reconciled)) => {
                if let (Reconciled::Recreated, Some(first)) = (reconciled, volumes.first()) {
                    let message = format!(
                        "Secret {secret} was deleted and re-created, because the type of an existing Secret cannot change"
                    );
                    // This is no error, so that it does not matter if the event is not accepted.
                    let _ = self.cluster.announce(
                        &first.pod,
                        Severity::Normal,
                        "SecretRecreated",
                        &message,
                        |_| {},
                    );
                }
                self.report_in_step(class, secret, volumes);
            }
        }
    }

    /// Counts an error of a Secret, and tells it to the pods of some volumes.
    pub(super) fn report_error(
        &self,
        class: &Class,
        secret: &str,
        volumes: &[Volume],
        error: &SyncError,
    ) {
        if !volumes.is_empty() {
            let error_type = error.error_type().label();
            self.metrics.secret_failed(&class.provider, error_type);
        }
        for volume in volumes {
            self.tell(volume, class, secret, Some(error));
        }
    }

    /// Tells all pods that knew of an error of a Secret that it is over.
    fn report_in_step(&self, class: &Class, secret: &str, volumes: &[Volume]) {
        let Some(first) = volumes.first() else {
            return;
        };
        let key = ClassKey::new(&first.pod.namespace, &class.identity.name);
        for cached in self.cache.volumes_of(&key) {
            self.tell(&cached.volume, class, secret, None);
        }
    }

    /// Tells the pods of a class that they are not refreshed, although it has been changed to ask for
    /// that, because the driver refreshes nothing. `known` is the state of the class before.
    pub(super) fn tell_of_ignored_refresh(
        &self,
        key: &ClassKey,
        known: Option<&ClassState>,
        class: &Class,
    ) {
        let asked = class.identity.annotations.get(ASKED);
        let before = known.and_then(|known| known.annotations.get(ASKED));
        if self.refreshes || asked.is_none() || asked == before {
            return;
        }
        let message = format!(
            "SecretProviderClass {} asks for a refresh with its annotation {ASKED}, but the driver does not refresh volumes: set the chart's value enableSecretRotation to true (--enable-secret-rotation), or replace the pod",
            key.name
        );
        for cached in self.cache.volumes_of(key) {
            // The next change of the annotation is told again.
            let _ = self.cluster.announce(
                &cached.volume.pod,
                Severity::Warning,
                "MountRefreshIgnored",
                &message,
                |_| {},
            );
        }
    }

    /// Forgets the errors of whole classes that the pods of some volumes were told, and those of
    /// Secrets that the class does not make any more. The Secrets report for themselves from now on.
    pub(super) fn forget_class_error(&self, class: &Class, volumes: &[Volume]) {
        for volume in volumes {
            let mut told = self.told.volumes();
            let Some(of_volume) = told.get_mut(&volume.id) else {
                continue;
            };
            let is_made = |secret: &str| !are_all(class, |name| name != secret);
            of_volume.errors.retain(|secret, _| is_made(secret));
            of_volume.wrong.retain(|secret, _| is_made(secret));
            // An entry without a name reports under this one.
            if !is_made(WHOLE_CLASS) {
                of_volume.note(class, WHOLE_CLASS, None);
            }
            self.show(volume, of_volume, class);
        }
    }

    /// Tells a volume's pod of an error of a Secret, or with `None` that it is over, unless the pod
    /// knows. If the event cannot be posted, the pod counts as not told. An error that lasts is told
    /// again from time to time.
    fn tell(&self, volume: &Volume, class: &Class, secret: &str, error: Option<&SyncError>) {
        let mut volumes = self.told.volumes();
        let Some(told) = volumes.get_mut(&volume.id) else {
            return;
        };
        told.note(class, secret, error);
        self.show(volume, told, class);
        let identity = error.map(SyncError::identity);
        if told.error(secret) == identity {
            if let Some(error) = error {
                self.repeat(volume, told, secret, error);
            }
            return;
        }
        let (severity, reason, message) = match error {
            Some(error) => (Severity::Warning, FAILED, error.to_string()),
            None => {
                let message = format!("Secret {secret} matches the volume again");
                (Severity::Normal, "SecretSynced", message)
            }
        };
        let before = told.errors.get(secret).cloned();
        let all = Arc::clone(&self.told);
        let (id, name) = (volume.id.clone(), secret.to_owned());
        let owned = identity.map(str::to_owned);
        let ended = move |posted: bool| {
            if !posted {
                all.take_back(&id, &name, owned.as_deref(), before);
            }
        };
        let series = self
            .cluster
            .begin_series(&volume.pod, severity, reason, &message, ended);
        if let Some(series) = series {
            let now = identity.map(|identity| ToldError {
                identity: identity.to_owned(),
                series,
            });
            set(&mut told.errors, secret, now);
        }
    }

    /// Tells a pod of an error again, if it is time: of one Secret of a volume after the other.
    fn repeat(&self, volume: &Volume, told: &mut OfVolume, secret: &str, error: &SyncError) {
        let is_recent = |at: Instant| at.elapsed() < REPEAT_EVERY;
        if told.repeated.is_some_and(is_recent) {
            return;
        }
        let alike = told.errors.len();
        let Some(lasting) = told.errors.get_mut(secret) else {
            return;
        };
        let (severity, message) = (Severity::Warning, error.to_string());
        let series = (&mut lasting.series, alike, 1);
        if self
            .cluster
            .repeat(&volume.pod, severity, FAILED, &message, series)
        {
            told.repeated = Some(Instant::now());
        }
    }

    /// Shows on the pod status and in the metrics whether the Secrets of a volume are in step.
    fn show(&self, volume: &Volume, told: &OfVolume, class: &Class) {
        let Some(trouble) = told.trouble(class) else {
            return;
        };
        self.metrics.volume_in_step(&volume.id, trouble.is_none());
        self.cluster
            .set_trouble(volume.status(), Aspect::Secrets, trouble);
    }
}
