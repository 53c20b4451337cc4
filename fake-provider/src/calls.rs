//! Counts calls, so that a test can see how often and how many at once the driver called.

use std::collections::BTreeMap;
use std::sync::Mutex;

use serde::Serialize;

use crate::lock;

/// What `/calls` answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Counts {
    /// Mount calls begun since the last reset.
    pub(crate) mount_calls: u64,
    /// Version calls since the last reset.
    pub(crate) version_calls: u64,
    /// Mount calls that have begun and not ended; a reset does not change it.
    pub(crate) in_flight: u64,
    /// The most there were in flight at once since the last reset.
    pub(crate) max_in_flight: u64,
    /// Mount calls by `<pod namespace>/<pod name>`, for calls that name their pod.
    pub(crate) mount_calls_by_pod: BTreeMap<String, u64>,
}

/// The counters.
#[derive(Debug, Default)]
pub(crate) struct Calls(Mutex<Counts>);

impl Calls {
    pub(crate) fn version(&self) {
        lock(&self.0).version_calls += 1;
    }

    /// Counts a Mount call, in flight until the guard is dropped, which also happens when the
    /// caller gives up.
    pub(crate) fn mount(&self) -> InFlight<'_> {
        let mut counts = lock(&self.0);
        counts.mount_calls += 1;
        counts.in_flight += 1;
        counts.max_in_flight = counts.max_in_flight.max(counts.in_flight);
        InFlight(self)
    }

    pub(crate) fn read(&self) -> Counts {
        lock(&self.0).clone()
    }

    pub(crate) fn reset(&self) {
        let mut counts = lock(&self.0);
        let in_flight = counts.in_flight;
        *counts = Counts {
            in_flight,
            max_in_flight: in_flight,
            ..Counts::default()
        };
    }
}

/// One Mount call that has not ended.
#[derive(Debug)]
pub(crate) struct InFlight<'a>(&'a Calls);

impl InFlight<'_> {
    /// Says whose call it is, once that is known.
    pub(crate) fn of_pod(&self, namespace: &str, name: &str) {
        let pod = format!("{namespace}/{name}");
        *lock(&self.0.0).mount_calls_by_pod.entry(pod).or_default() += 1;
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        lock(&self.0.0).in_flight -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_keeps_what_is_in_flight() {
        let calls = Calls::default();
        let first = calls.mount();
        drop(calls.mount());
        first.of_pod("ns", "web");
        assert_eq!(calls.read().max_in_flight, 2);

        calls.reset();
        let expected = Counts {
            in_flight: 1,
            max_in_flight: 1,
            ..Counts::default()
        };
        assert_eq!(calls.read(), expected);
        drop(first);
        assert_eq!(calls.read().in_flight, 0);
    }
}
