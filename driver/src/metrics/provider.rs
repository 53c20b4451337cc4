//! Counts the calls to providers.

use std::time::Instant;

use prometheus_client::{
    metrics::{family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use super::{
    Metrics,
    labels::{Label, LabelSet},
};

/// The upper bounds of the buckets in seconds: from a provider that has its answer in memory to one
/// that uses up kubelet's deadline.
const BOUNDS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];

/// The outcome of a call that its caller gave up.
const CANCELLED: &str = "CANCELLED";

/// The series of calls to providers.
pub(super) struct Series {
    duration: Family<LabelSet, Histogram, fn() -> Histogram>,
    in_flight: Family<LabelSet, Gauge>,
    waiting: Family<LabelSet, Gauge>,
}

impl Series {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let series = Self {
            duration: Family::new_with_constructor(|| Histogram::new(BOUNDS)),
            in_flight: Family::default(),
            waiting: Family::default(),
        };
        registry.register_with_unit(
            "secrets_store_provider_call_duration",
            "Time that calls to providers took, without the wait for their turn",
            Unit::Seconds,
            series.duration.clone(),
        );
        registry.register(
            "secrets_store_provider_calls_in_flight",
            "Calls that a provider has not answered yet",
            series.in_flight.clone(),
        );
        registry.register(
            "secrets_store_provider_calls_waiting",
            "Calls to a provider that wait for their turn",
            series.waiting.clone(),
        );
        series
    }
}

impl Metrics {
    /// Starts to count one call, which waits for its turn.
    pub fn provider_call(&self, provider: &str) -> CallGuard {
        let provider = self.0.labels.provider(provider);
        let series = &self.0.provider_calls;
        let labels = vec![provider.clone()];
        let now = series.waiting.get_or_create_owned(&labels);
        now.inc();
        CallGuard {
            metrics: self.clone(),
            in_flight: series.in_flight.get_or_create_owned(&labels),
            now,
            provider,
            started: None,
        }
    }
}

/// Counts one call to a provider. Counts it as given up when it is dropped without an outcome. A
/// call that was never sent has no duration.
#[derive(Debug)]
#[must_use = "dropping the guard counts a call that was given up"]
pub struct CallGuard {
    metrics: Metrics,
    provider: Label,
    in_flight: Gauge,
    /// The gauge that counts this call now.
    now: Gauge,
    started: Option<Instant>,
}

impl CallGuard {
    /// Counts the call as in flight instead of waiting.
    pub fn started(&mut self) {
        self.now.dec();
        self.now = self.in_flight.clone();
        self.now.inc();
        self.started = Some(Instant::now());
    }

    /// Counts the end of the call. `outcome` is a gRPC code, or another constant.
    pub fn ended(mut self, outcome: &'static str) {
        self.observe(outcome);
    }

    fn observe(&mut self, outcome: &'static str) {
        if let Some(started) = self.started.take() {
            let labels = vec![self.provider.clone(), ("outcome", outcome.into())];
            let duration = &self.metrics.0.provider_calls.duration;
            let duration = duration.get_or_create(&labels);
            duration.observe(started.elapsed().as_secs_f64());
        }
    }
}

impl Drop for CallGuard {
    fn drop(&mut self) {
        self.observe(CANCELLED);
        self.now.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(metrics: &Metrics, name: &str) -> Vec<String> {
        let page = metrics.render();
        let mut lines: Vec<String> = page
            .lines()
            .filter(|line| line.starts_with(&format!("secrets_store_provider_{name}")))
            .map(str::to_owned)
            .collect();
        lines.sort();
        lines
    }

    #[test]
    fn a_call_is_counted_where_it_is_and_by_how_it_ended() {
        let metrics = Metrics::new();
        metrics.provider_seen("vault", |_| true);
        let mut call = metrics.provider_call("vault");
        let waiting = "calls_waiting{provider=\"vault\"}";
        let in_flight = "calls_in_flight{provider=\"vault\"}";
        let value = |name: &str| {
            let lines = lines(&metrics, name);
            lines
                .iter()
                .find_map(|line| line.split(' ').nth(1)?.parse::<i64>().ok())
        };
        assert_eq!((value(waiting), value(in_flight)), (Some(1), Some(0)));
        call.started();
        assert_eq!((value(waiting), value(in_flight)), (Some(0), Some(1)));
        call.ended("OK");
        assert_eq!((value(waiting), value(in_flight)), (Some(0), Some(0)));

        let mut given_up = metrics.provider_call("vault");
        given_up.started();
        drop(given_up);
        drop(metrics.provider_call("vault"));
        assert_eq!((value(waiting), value(in_flight)), (Some(0), Some(0)));
        assert_eq!(
            lines(&metrics, "call_duration_seconds_count"),
            [
                "secrets_store_provider_call_duration_seconds_count{provider=\"vault\",outcome=\"CANCELLED\"} 1",
                "secrets_store_provider_call_duration_seconds_count{provider=\"vault\",outcome=\"OK\"} 1",
            ]
        );
    }
}
