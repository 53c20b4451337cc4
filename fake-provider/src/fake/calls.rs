//! Counts calls, so that a test sees how often the driver called, and how often concurrently.

use std::collections::BTreeMap;
use std::sync::Mutex;

use serde::Serialize;

use crate::lock;
use crate::server::Pod;

/// The answer of `/calls`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Counts {
    /// Well-formed Mount calls that began since the last reset.
    pub(super) mount_calls: u64,
    /// Version calls since the last reset.
    pub(super) version_calls: u64,
    /// Mount calls that have begun and not ended; a reset does not change it.
    pub(super) in_flight: u64,
    /// The largest number in flight since the last reset.
    pub(super) max_in_flight: u64,
    /// Mount calls by `<pod namespace>/<pod name>`. Calls that name no pod are not in it.
    pub(super) mount_calls_by_pod: BTreeMap<String, u64>,
}

/// The counters of all calls.
#[derive(Debug, Default)]
pub(super) struct Calls(Mutex<Counts>);

impl Calls {
    /// Counts a Version call.
    pub(super) fn version(&self) {
        lock(&self.0).version_calls += 1;
    }

    /// Counts a Mount call. It is in flight until the guard is dropped, which also happens when the
    /// caller gives up.
    pub(super) fn mount(&self, pod: Pod<'_>) -> InFlight<'_> {
        let mut counts = lock(&self.0);
        counts.mount_calls += 1;
        if !pod.namespace.is_empty() && !pod.name.is_empty() {
            let pod = format!("{}/{}", pod.namespace, pod.name);
            *counts.mount_calls_by_pod.entry(pod).or_default() += 1;
        }
        counts.in_flight += 1;
        counts.max_in_flight = counts.max_in_flight.max(counts.in_flight);
        InFlight(self)
    }

    /// Returns the counts.
    pub(super) fn read(&self) -> Counts {
        lock(&self.0).clone()
    }

    /// Sets all counts to zero, but for the calls in flight.
    pub(super) fn reset(&self) {
        let mut counts = lock(&self.0);
        let in_flight = counts.in_flight;
        *counts = Counts {
            in_flight,
            max_in_flight: in_flight,
            ..Counts::default()
        };
    }
}

/// A Mount call that has not ended.
#[derive(Debug)]
pub(super) struct InFlight<'a>(&'a Calls);

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
        let pod = Pod {
            namespace: "ns",
            name: "web",
            uid: "",
            service_account: "",
        };
        let first = calls.mount(pod);
        drop(calls.mount(pod));
        assert_eq!(calls.read().max_in_flight, 2);
        assert_eq!(calls.read().mount_calls_by_pod["ns/web"], 2);

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
