//! Reports the results of reconciliations: events on pods, and metrics.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{SecretSync, Volume, cache::ClassKey};
use crate::cluster::{
    Class,
    events::Severity,
    secrets::{Reconciled, SyncError},
};

/// The reason of the event about a Secret that is not as desired, as in the existing driver.
const FAILED: &str = "FailedToCreateSecret";

/// Stands for the name of a Secret in reports about all Secrets of a class.
pub(super) const WHOLE_CLASS: &str = "";

/// The errors that the pods have been told about, by volume and Secret, so that a pod is told of a
/// lasting error once.
#[derive(Default)]
pub(super) struct Told(Mutex<HashMap<String, BTreeMap<String, String>>>);

impl Told {
    fn volumes(&self) -> MutexGuard<'_, HashMap<String, BTreeMap<String, String>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a mounted volume, whose pod can be told something.
    pub(super) fn add(&self, volume_id: &str) {
        let mut volumes = self.volumes();
        if !volumes.contains_key(volume_id) {
            volumes.insert(volume_id.to_owned(), BTreeMap::new());
        }
    }

    /// Removes a volume that is being unpublished.
    pub(super) fn remove(&self, volume_id: &str) {
        self.volumes().remove(volume_id);
    }

    /// Tells a pod of an error of a Secret, or with `None` that it is over, unless the pod knows. It
    /// counts as told if `announce`, which gets the error that the pod was told before, returns
    /// `true`.
    fn tell(
        &self,
        volume_id: &str,
        secret: &str,
        error: Option<&str>,
        announce: impl FnOnce(Option<String>) -> bool,
    ) {
        let mut volumes = self.volumes();
        let Some(told) = volumes.get_mut(volume_id) else {
            return;
        };
        let before = told.get(secret);
        if before.map(String::as_str) != error && announce(before.cloned()) {
            set(told, secret, error.map(str::to_owned));
        }
    }

    /// Takes back that a pod has been told of an error, because the event could not be posted.
    /// `before` is the error that the pod was told before.
    fn take_back(
        &self,
        volume_id: &str,
        secret: &str,
        error: Option<&str>,
        before: Option<String>,
    ) {
        let mut volumes = self.volumes();
        // If the pod has been told something else since, that stands.
        if let Some(told) = volumes.get_mut(volume_id)
            && told.get(secret).map(String::as_str) == error
        {
            set(told, secret, before);
        }
    }
}

fn set(told: &mut BTreeMap<String, String>, secret: &str, error: Option<String>) {
    match error {
        None => told.remove(secret),
        Some(error) => told.insert(secret.to_owned(), error),
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
            // No volume has content, or the Secret is left to other nodes: nothing was compared.
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
            let event = (Severity::Warning, FAILED, error.to_string());
            self.tell(volume, secret, Some(error.identity()), event);
        }
    }

    /// Tells all pods that knew of an error of a Secret that it is over.
    fn report_in_step(&self, class: &Class, secret: &str, volumes: &[Volume]) {
        let Some(first) = volumes.first() else {
            return;
        };
        let key = ClassKey::new(&first.pod.namespace, &class.identity.name);
        for cached in self.cache.volumes_of(&key) {
            let message = format!("Secret {secret} matches the volume again");
            let event = (Severity::Normal, "SecretSynced", message);
            self.tell(&cached.volume, secret, None, event);
        }
    }

    /// Forgets the errors of whole classes that the pods of some volumes were told. The Secrets
    /// report for themselves from now on.
    pub(super) fn forget_class_error(&self, volumes: &[Volume]) {
        for volume in volumes {
            self.told.tell(&volume.id, WHOLE_CLASS, None, |_| true);
        }
    }

    /// Tells a volume's pod of an error of a Secret, or with `None` that it is over, unless the pod
    /// knows. If the event cannot be posted, the pod counts as not told.
    fn tell(
        &self,
        volume: &Volume,
        secret: &str,
        error: Option<&str>,
        (severity, reason, message): (Severity, &'static str, String),
    ) {
        self.told.tell(&volume.id, secret, error, |before| {
            let told = Arc::clone(&self.told);
            let (id, secret) = (volume.id.clone(), secret.to_owned());
            let error = error.map(str::to_owned);
            let ended = move |posted: bool| {
                if !posted {
                    told.take_back(&id, &secret, error.as_deref(), before);
                }
            };
            self.cluster
                .announce(&volume.pod, severity, reason, &message, ended)
        });
    }
}
