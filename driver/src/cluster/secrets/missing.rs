//! Secrets that this process has deleted, because their type was to change, and that are not there
//! again yet.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{Refusal, decision::Existing};
use crate::error::Error;

/// How many Secrets may be missing at a time, and how many of one namespace. Each is kept in memory
/// until it is there again.
const MOST: usize = 16;
const MOST_OF_NAMESPACE: usize = 2;

/// A Secret that nobody has tried to make for so long is not wanted any more. Whoever wants one
/// tries every few minutes.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(30 * 60);

/// Namespace and name of a Secret.
type Key = (String, String);

/// The Secrets that are missing.
#[derive(Default)]
pub(in crate::cluster) struct Missing(Mutex<HashMap<Key, Entry>>);

struct Entry {
    former: Arc<Existing>,
    step: Step,
    asked_for: Instant,
}

/// How far a Secret that is made anew has come.
#[derive(Debug, Clone)]
pub(super) enum Step {
    /// The former one is being deleted.
    Deleting,
    /// It is being made.
    Making,
    /// It could not be made: why.
    Failed(String),
}

impl Missing {
    fn entries(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|_, entry| {
            !matches!(entry.step, Step::Failed(_)) || entry.asked_for.elapsed() < FORGOTTEN_AFTER
        });
        entries
    }

    /// Begins with a Secret that is about to be deleted.
    ///
    /// # Errors
    /// When as many are missing as may be.
    pub(super) fn begin(&self, key: &Key, former: &Arc<Existing>) -> Result<(), Refusal> {
        let mut entries = self.entries();
        let of_namespace = entries.keys().filter(|(ns, _)| *ns == key.0).count();
        if entries.len() >= MOST || of_namespace >= MOST_OF_NAMESPACE {
            return Err(Refusal::Failed(Error::unavailable(format!(
                "its type is to change, for which the driver deletes it, but other Secrets that were deleted for that have to be there again first ({of_namespace} in this namespace are missing, {} in all)",
                entries.len()
            ))));
        }
        let entry = Entry {
            former: Arc::clone(former),
            step: Step::Deleting,
            asked_for: Instant::now(),
        };
        entries.insert(key.clone(), entry);
        Ok(())
    }

    /// Returns how far a Secret has come that is missing, and what it was. Whoever asks wants it.
    pub(super) fn find(&self, key: &Key) -> Option<(Step, Arc<Existing>)> {
        let mut entries = self.entries();
        let entry = entries.get_mut(key)?;
        entry.asked_for = Instant::now();
        Some((entry.step.clone(), Arc::clone(&entry.former)))
    }

    /// A missing Secret has come so far.
    pub(super) fn is_at(&self, key: &Key, step: Step) {
        if let Some(entry) = self.entries().get_mut(key) {
            entry.step = step;
        }
    }

    /// A Secret is there again, or has never been deleted.
    pub(super) fn is_there(&self, key: &Key) {
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

    fn key(namespace: usize, name: usize) -> Key {
        (namespace.to_string(), name.to_string())
    }

    #[tokio::test(start_paused = true)]
    async fn few_are_missing_at_a_time_and_those_that_nobody_wants_are_forgotten() {
        let missing = Missing::default();
        let mut begun = 0;
        for namespace in 0..20 {
            for name in 0..20 {
                let key = key(namespace, name);
                if missing.begin(&key, &former()).is_ok() {
                    begun += 1;
                    missing.is_at(&key, Step::Failed("no".to_owned()));
                }
            }
        }
        assert_eq!(begun, MOST);
        assert!(missing.find(&key(0, MOST_OF_NAMESPACE)).is_none());
        missing.is_at(&key(1, 1), Step::Making);
        for _ in 0..5 {
            tokio::time::advance(FORGOTTEN_AFTER / 3).await;
            assert!(missing.find(&key(0, 0)).is_some(), "it is wanted");
        }
        let left = missing.entries().len();
        assert_eq!(left, 2, "one is wanted, and one is being made");
        missing.is_there(&key(0, 0));
        assert!(missing.find(&key(0, 0)).is_none());
        assert!(missing.begin(&key(0, 0), &former()).is_ok());
    }
}
