//! Measures the load on the API server and the provider, and the CPU time of the drivers, at intervals.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::record::{Record, Sample};
use super::seconds;
use crate::bench::{ControlPlane, Process, Provider, Requests};

/// What is measured, and the last values.
pub(super) struct Sampler {
    plane: Arc<ControlPlane>,
    provider: Arc<tokio::sync::Mutex<Provider>>,
    processes: Mutex<Vec<Process>>,
    record: Arc<Record>,
    last: tokio::sync::Mutex<Last>,
}

/// The values of the last sample, which count from some start.
struct Last {
    at: Instant,
    requests: Requests,
    calls: f64,
    /// The CPU times by process id.
    times: BTreeMap<i32, f64>,
}

impl Sampler {
    pub(super) fn new(
        plane: Arc<ControlPlane>,
        provider: Arc<tokio::sync::Mutex<Provider>>,
        record: Arc<Record>,
    ) -> Self {
        let last = Last {
            at: Instant::now(),
            requests: Requests::default(),
            calls: 0.0,
            times: BTreeMap::new(),
        };
        Self {
            plane,
            provider,
            processes: Mutex::default(),
            record,
            last: tokio::sync::Mutex::new(last),
        }
    }

    /// Sets the processes of the drivers. The CPU time of those that are new counts from their start.
    pub(super) fn set_processes(&self, processes: Vec<Process>) {
        *self
            .processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = processes;
    }

    /// Takes samples for as long as the task lives.
    pub(super) async fn run(self: Arc<Self>, every: Duration) {
        loop {
            tokio::time::sleep(every).await;
            self.take().await;
        }
    }

    /// Records what has happened since the last sample.
    pub(super) async fn take(&self) {
        let mut last = self.last.lock().await;
        // While one of them is away, it has nothing to tell.
        let requests = self.plane.requests().await;
        let requests = requests.unwrap_or_else(|_| last.requests.clone());
        let calls = self.provider.lock().await.calls().await;
        let calls = calls.unwrap_or(last.calls);
        let cpu = self.cpu(&mut last.times);
        // A real API server, and the provider, count from zero when they come back.
        let new = if requests.total() < last.requests.total() {
            requests.clone()
        } else {
            requests.since(&last.requests)
        };
        let new_calls = if calls < last.calls {
            calls
        } else {
            calls - last.calls
        };
        self.record.sample(Sample {
            at: Instant::now(),
            seconds: seconds(last.at),
            requests: new,
            provider: new_calls,
            cpu,
        });
        last.at = Instant::now();
        (last.requests, last.calls) = (requests, calls);
    }

    /// Returns the CPU time that the drivers have used since the last sample.
    fn cpu(&self, times: &mut BTreeMap<i32, f64>) -> f64 {
        let processes = self
            .processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut cpu = 0.0;
        for process in &*processes {
            // It may have been stopped since.
            if let Ok(time) = process.cpu() {
                cpu += time - times.insert(process.0, time).unwrap_or(0.0);
            }
        }
        cpu
    }
}
