//! What is counted of refreshes: the existing driver's `rotation_reconcile_*`, and when each
//! provider last succeeded.
//!
//! `rotated` says whether the content changed. (The existing driver says `true` always.)

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError, atomic::Ordering},
};

use jiff::Timestamp;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use tokio::time::Instant;

use super::{FAILED_TO_MOUNT, Metrics, OS_TYPE};

/// Upper bounds in seconds: the existing driver's (ten steps from 0.1 to 2.0), and some beyond
/// for what takes longer.
pub(super) const BOUNDS: [f64; 16] = [
    0.1, 0.13493, 0.18206, 0.24565, 0.33145, 0.44721, 0.60342, 0.81418, 1.09856, 1.48227, 2.0, 5.0,
    10.0, 30.0, 60.0, 120.0,
];

pub(super) struct Series {
    reconcile: Family<Reconciled, Counter>,
    reconcile_error: Family<Failed, Counter>,
    duration: Family<Os, Histogram, fn() -> Histogram>,
    last_success: Family<Provider, Gauge>,
    /// The provider of each volume, as a label's value: a provider that no volume uses has no
    /// last success that anybody waits for.
    volumes: Mutex<HashMap<String, String>>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reconciled {
    provider: String,
    os_type: &'static str,
    rotated: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Failed {
    provider: String,
    error_type: String,
    os_type: &'static str,
    rotated: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Os {
    os_type: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Provider {
    provider: String,
}

impl Series {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let series = Self {
            reconcile: Family::default(),
            reconcile_error: Family::default(),
            duration: Family::new_with_constructor(|| Histogram::new(BOUNDS)),
            last_success: Family::default(),
            volumes: Mutex::default(),
        };
        registry.register(
            "rotation_reconcile",
            "Refreshes that succeeded",
            series.reconcile.clone(),
        );
        registry.register(
            "rotation_reconcile_error",
            "Refreshes that failed; the volume keeps its content",
            series.reconcile_error.clone(),
        );
        registry.register(
            "rotation_reconcile_duration_sec",
            "How long successful refreshes took",
            series.duration.clone(),
        );
        registry.register(
            "secrets_store_last_success_timestamp_seconds",
            "When a volume of this provider was last published or refreshed",
            series.last_success.clone(),
        );
        series
    }
}

impl Metrics {
    /// Starts to count one refresh.
    pub fn refresh(&self, provider: &str) -> RefreshGuard {
        RefreshGuard {
            metrics: Some(self.clone()),
            provider: provider.to_owned(),
            started: Instant::now(),
        }
    }

    /// A volume of this provider has been published or refreshed. The latest counts.
    pub fn success(&self, provider: &str, volume_id: &str, at: Timestamp) {
        // Whoever filled a volume was there, also if this process has not seen its socket yet.
        self.0.labels.seen(provider, |_| true);
        let provider = self.0.labels.provider(provider);
        let series = &self.0.rotation;
        let mut volumes = series
            .volumes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let before = volumes.insert(volume_id.to_owned(), provider.clone());
        series.forget_unused(&volumes, before);
        let latest = series
            .last_success
            .get_or_create_owned(&Provider { provider });
        latest.inner().fetch_max(at.as_second(), Ordering::Relaxed);
    }

    /// A volume is gone. With the last one of its provider goes the gauge.
    pub fn volume_gone(&self, volume_id: &str) {
        let series = &self.0.rotation;
        let mut volumes = series
            .volumes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let before = volumes.remove(volume_id);
        series.forget_unused(&volumes, before);
    }
}

impl Series {
    fn forget_unused(&self, volumes: &HashMap<String, String>, provider: Option<String>) {
        if let Some(provider) = provider
            && !volumes.values().any(|other| *other == provider)
        {
            self.last_success.remove(&Provider { provider });
        }
    }
}

/// Counts one refresh: as failed with `FailedToMount` when dropped without a word.
#[derive(Debug)]
#[must_use = "dropping the guard counts a failure"]
pub struct RefreshGuard {
    metrics: Option<Metrics>,
    provider: String,
    started: Instant,
}

impl RefreshGuard {
    /// The volume is fresh; `rotated` when its content changed.
    pub fn succeeded(mut self, rotated: bool) {
        if let Some(metrics) = self.metrics.take() {
            let series = &metrics.0.rotation;
            let labels = Reconciled {
                provider: metrics.0.labels.provider(&self.provider),
                os_type: OS_TYPE,
                rotated: if rotated { "true" } else { "false" },
            };
            series.reconcile.get_or_create(&labels).inc();
            series
                .duration
                .get_or_create(&Os { os_type: OS_TYPE })
                .observe(self.started.elapsed().as_secs_f64());
        }
    }

    /// It is not, for this reason.
    pub fn failed(mut self, error_type: &str) {
        self.count_failure(error_type);
    }

    /// It was given up before it could be told.
    pub fn not_counted(mut self) {
        self.metrics = None;
    }

    fn count_failure(&mut self, error_type: &str) {
        if let Some(metrics) = self.metrics.take() {
            let labels = Failed {
                provider: metrics.0.labels.provider(&self.provider),
                error_type: metrics.0.labels.error_type(&self.provider, error_type),
                os_type: OS_TYPE,
                rotated: "false",
            };
            metrics
                .0
                .rotation
                .reconcile_error
                .get_or_create(&labels)
                .inc();
        }
    }
}

impl Drop for RefreshGuard {
    fn drop(&mut self) {
        self.count_failure(FAILED_TO_MOUNT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refreshes_are_counted_by_what_came_of_them() {
        let metrics = Metrics::new();
        metrics.provider_seen("vault", |_| true);
        metrics.refresh("vault").succeeded(true);
        metrics.refresh("vault").succeeded(false);
        metrics.refresh("vault").failed("GRPCProviderError");
        drop(metrics.refresh("vault"));
        metrics.refresh("vault").not_counted();
        metrics.success("vault", "csi-1", Timestamp::from_second(7).unwrap());
        let page = metrics.render();
        let counted = |name: &str, labels: &[&str]| {
            let line = page
                .lines()
                .find(|line| line.starts_with(name) && labels.iter().all(|l| line.contains(l)));
            line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        };
        for rotated in ["rotated=\"true\"", "rotated=\"false\""] {
            assert_eq!(
                counted(
                    "rotation_reconcile_total{",
                    &[rotated, "provider=\"vault\""]
                ),
                Some(1.0),
                "{page}"
            );
        }
        for reason in ["GRPCProviderError", "FailedToMount"] {
            assert_eq!(
                counted("rotation_reconcile_error_total{", &[reason]),
                Some(1.0),
                "{page}"
            );
        }
        assert_eq!(
            counted("rotation_reconcile_duration_sec_count", &[]),
            Some(2.0)
        );
        assert_eq!(
            counted("secrets_store_last_success_timestamp_seconds{", &["vault"]),
            Some(7.0)
        );
    }

    #[test]
    fn a_provider_that_no_volume_uses_any_more_has_no_last_success() {
        let metrics = Metrics::new();
        let at = |second| Timestamp::from_second(second).unwrap();
        let gauges = || {
            let page = metrics.render();
            let name = "secrets_store_last_success_timestamp_seconds{";
            let mut lines: Vec<String> = page
                .lines()
                .filter_map(|line| line.strip_prefix(name))
                .map(|rest| rest[rest.find("provider=").unwrap()..].to_owned())
                .collect();
            lines.sort();
            lines
        };
        metrics.success("vault", "csi-1", at(5));
        metrics.success("vault", "csi-2", at(4));
        metrics.success("azure", "csi-3", at(3));
        let azure = r#"provider="azure"} 3"#;
        assert_eq!(gauges(), [azure, r#"provider="vault"} 5"#]);
        metrics.volume_gone("csi-1");
        metrics.volume_gone("csi-unknown");
        assert_eq!(gauges(), [azure, r#"provider="vault"} 5"#]);
        // A class that names another provider from now on.
        metrics.success("azure", "csi-2", at(2));
        assert_eq!(gauges(), [azure]);
        metrics.success("vault", "csi-2", at(9));
        assert_eq!(gauges(), [azure, r#"provider="vault"} 9"#]);
        metrics.volume_gone("csi-2");
        metrics.volume_gone("csi-3");
        assert!(gauges().is_empty(), "{:?}", gauges());
    }
}
