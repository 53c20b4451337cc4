//! Finds volumes whose content changes at each refresh, which no store intends: an object that is the
//! store's whole answer, for example, with the ID of the request in it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The number of refreshes in a row that changed the content, after which the pod is told.
const MOST_IN_A_ROW: u32 = 5;

/// Counts the refreshes of each volume that changed its content, since the last one that did not.
#[derive(Clone, Default)]
pub(super) struct Restless(Arc<Mutex<HashMap<String, Count>>>);

#[derive(Default)]
struct Count {
    in_a_row: u32,
    told: bool,
}

impl Restless {
    /// Counts a refresh that succeeded. Returns, once, how many in a row have changed the content,
    /// when they are many. The pod counts as told until [`untold`](Self::untold) is called.
    pub(super) fn refreshed(&self, volume_id: &str, changed: bool) -> Option<u32> {
        let mut volumes = self.volumes();
        if !changed && !volumes.get(volume_id).is_some_and(|count| count.told) {
            volumes.remove(volume_id);
            return None;
        }
        let count = volumes.entry(volume_id.to_owned()).or_default();
        count.in_a_row = if changed { count.in_a_row + 1 } else { 0 };
        if count.told || count.in_a_row < MOST_IN_A_ROW {
            return None;
        }
        count.told = true;
        Some(count.in_a_row)
    }

    /// Returns whether the pod was told, and the refreshes change the content still.
    pub(super) fn is_told(&self, volume_id: &str) -> bool {
        let volumes = self.volumes();
        let count = volumes.get(volume_id);
        count.is_some_and(|count| count.told && count.in_a_row >= MOST_IN_A_ROW)
    }

    /// Forgets that the pod was told, because the event could not be posted.
    pub(super) fn untold(&self, volume_id: &str) {
        if let Some(count) = self.volumes().get_mut(volume_id) {
            count.told = false;
        }
    }

    /// Forgets a volume that is gone.
    pub(super) fn gone(&self, volume_id: &str) {
        self.volumes().remove(volume_id);
    }

    fn volumes(&self) -> MutexGuard<'_, HashMap<String, Count>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn many_changes_in_a_row_are_told_once(
            refreshes in prop::collection::vec((prop::bool::weighted(0.8), prop::bool::weighted(0.8)), 0..60)
        ) {
            let restless = Restless::default();
            let (mut in_a_row, mut is_told) = (0, false);
            for (changed, is_posted) in refreshes {
                in_a_row = if changed { in_a_row + 1 } else { 0 };
                let expected = (!is_told && in_a_row >= MOST_IN_A_ROW).then_some(in_a_row);
                prop_assert_eq!(restless.refreshed("v", changed), expected);
                is_told |= expected.is_some();
                if expected.is_some() && !is_posted {
                    restless.untold("v");
                    is_told = false;
                }
            }
            restless.gone("v");
            prop_assert!(restless.volumes().is_empty());
        }
    }
}
