//! Remembers the Secrets that this process has deleted to change their type, and that are not there
//! again yet.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{SyncError, object::Existing};

/// The number of Secrets that may be missing at a time, in all and in one namespace. Each is kept in
/// memory until it is there again.
const MAX_MISSING: usize = 16;
const MAX_OF_NAMESPACE: usize = 2;

/// The time after which a missing Secret is forgotten, unless there was another attempt to create
/// it. As long as a pod needs it, there is one every few minutes.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(30 * 60);

/// The namespace and name of a Secret.
type NamespacedName = (String, String);

/// The missing Secrets.
#[derive(Default)]
pub(in crate::cluster) struct Missing(Mutex<HashMap<NamespacedName, MissingSecret>>);

struct MissingSecret {
    former: Arc<Existing>,
    step: Replacing,
    asked_for: Instant,
}

/// The progress of a Secret that is being replaced.
#[derive(Debug, Clone)]
pub(super) enum Replacing {
    /// The former one is being deleted.
    Deleting,
    /// The new one is being created.
    Creating,
    /// The new one could not be created, for this reason.
    Failed(String),
}

impl Replacing {
    /// Returns the error of a Secret that is missing, for the type that it should have.
    pub(super) fn error(self, namespace: &str, desired_type: &str) -> SyncError {
        let why = match self {
            Self::Deleting => {
                return SyncError::unavailable(
                    "its type change waits: the API server has not answered the request to delete it yet",
                );
            }
            Self::Creating => "the API server has not answered yet".to_owned(),
            Self::Failed(why) => why,
        };
        SyncError::missing(namespace, desired_type, why)
    }
}

impl Missing {
    fn entries(&self) -> MutexGuard<'_, HashMap<NamespacedName, MissingSecret>> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|_, entry| {
            !matches!(entry.step, Replacing::Failed(_))
                || entry.asked_for.elapsed() < FORGOTTEN_AFTER
        });
        entries
    }

    /// Adds a Secret that is about to be deleted.
    ///
    /// # Errors
    /// Fails if too many are missing already.
    pub(super) fn begin(
        &self,
        key: &NamespacedName,
        former: &Arc<Existing>,
    ) -> Result<(), SyncError> {
        let mut entries = self.entries();
        let of_namespace = entries.keys().filter(|(ns, _)| *ns == key.0).count();
        if entries.len() >= MAX_MISSING || of_namespace >= MAX_OF_NAMESPACE {
            return Err(SyncError::unavailable(format_args!(
                "its type change waits: {of_namespace} Secrets of this namespace, and {} in all, were deleted to change their type and are not re-created yet",
                entries.len()
            )));
        }
        let entry = MissingSecret {
            former: Arc::clone(former),
            step: Replacing::Deleting,
            asked_for: Instant::now(),
        };
        entries.insert(key.clone(), entry);
        Ok(())
    }

    /// Returns the progress of a missing Secret, and the former one. Counts as an attempt to create it.
    pub(super) fn find(&self, key: &NamespacedName) -> Option<(Replacing, Arc<Existing>)> {
        let mut entries = self.entries();
        let entry = entries.get_mut(key)?;
        entry.asked_for = Instant::now();
        Some((entry.step.clone(), Arc::clone(&entry.former)))
    }

    /// Sets the progress of a missing Secret.
    pub(super) fn set_step(&self, key: &NamespacedName, step: Replacing) {
        if let Some(entry) = self.entries().get_mut(key) {
            entry.step = step;
        }
    }

    /// Removes a Secret that is there again, or was not deleted after all.
    pub(super) fn remove(&self, key: &NamespacedName) {
        self.entries().remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn former() -> Arc<Existing> {
        Arc::new(serde_json::from_value(json!({"metadata": {}})).unwrap())
    }

    fn key(namespace: usize, name: usize) -> NamespacedName {
        (namespace.to_string(), name.to_string())
    }

    #[tokio::test(start_paused = true)]
    async fn few_are_missing_at_a_time_and_those_without_attempts_are_forgotten() {
        let missing = Missing::default();
        let mut begun = 0;
        for namespace in 0..20 {
            for name in 0..20 {
                let key = key(namespace, name);
                if missing.begin(&key, &former()).is_ok() {
                    begun += 1;
                    missing.set_step(&key, Replacing::Failed("no".to_owned()));
                }
            }
        }
        assert_eq!(begun, MAX_MISSING);
        assert!(missing.find(&key(0, MAX_OF_NAMESPACE)).is_none());
        missing.set_step(&key(1, 1), Replacing::Creating);
        for _ in 0..5 {
            tokio::time::advance(FORGOTTEN_AFTER / 3).await;
            assert!(missing.find(&key(0, 0)).is_some(), "an attempt was made");
        }
        let left = missing.entries().len();
        assert_eq!(
            left, 2,
            "an attempt was made for one, and one is being created"
        );
        missing.remove(&key(0, 0));
        assert!(missing.find(&key(0, 0)).is_none());
        assert!(missing.begin(&key(0, 0), &former()).is_ok());
    }
}
