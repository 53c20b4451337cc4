//! Counts refreshes, as the existing driver's `rotation_reconcile_*`, and shows when each provider
//! last succeeded.
//!
//! The label `rotated` says whether the content changed. (The existing driver always sets it to
//! `true`.)

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use jiff::Timestamp;
use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use tokio::time::Instant;

use super::{
    Metrics,
    labels::{FAILED_TO_MOUNT, Label, LabelSet, OS_TYPE},
};

/// The upper bounds of the buckets in seconds: those of the existing driver (ten steps from 0.1 to
/// 2.0), and some beyond for calls that take longer.
pub(super) const BOUNDS: [f64; 16] = [
    0.1, 0.13493, 0.18206, 0.24565, 0.33145, 0.44721, 0.60342, 0.81418, 1.09856, 1.48227, 2.0, 5.0,
    10.0, 30.0, 60.0, 120.0,
];

pub(super) struct Series {
    reconcile: Family<LabelSet, Counter>,
    reconcile_error: Family<LabelSet, Counter>,
    duration: Family<LabelSet, Histogram, fn() -> Histogram>,
    last_success: Family<LabelSet, Gauge>,
    /// The provider of each volume. A provider that no volume uses has no last success.
    volumes: Mutex<HashMap<String, Label>>,
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
            "Time that successful refreshes took",
            series.duration.clone(),
        );
        registry.register(
            "secrets_store_last_success_timestamp_seconds",
            "When a volume of this provider was last published or refreshed",
            series.last_success.clone(),
        );
        series
    }

    fn volumes(&self) -> MutexGuard<'_, HashMap<String, Label>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the gauge of `provider` if no volume uses it.
    fn forget_unused(&self, volumes: &HashMap<String, Label>, provider: Option<Label>) {
        if let Some(provider) = provider
            && !volumes.values().any(|other| *other == provider)
        {
            self.last_success.remove(&vec![provider]);
        }
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

    /// Notes when a volume was published or refreshed. The gauge shows the latest time of all
    /// volumes of the provider.
    pub fn success(&self, provider: &str, volume_id: &str, at: Timestamp) {
        // A provider that filled a volume exists, even if this process has not seen its socket yet.
        self.0.labels.seen(provider, |_| true);
        let provider = self.0.labels.provider(provider);
        let series = &self.0.rotation;
        let mut volumes = series.volumes();
        let before = volumes.insert(volume_id.to_owned(), provider.clone());
        series.forget_unused(&volumes, before);
        let latest = series.last_success.get_or_create_owned(&vec![provider]);
        latest.inner().fetch_max(at.as_second(), Ordering::Relaxed);
    }

    /// Forgets a volume that is gone. The gauge of a provider goes with its last volume.
    pub fn volume_gone(&self, volume_id: &str) {
        let series = &self.0.rotation;
        let mut volumes = series.volumes();
        let before = volumes.remove(volume_id);
        series.forget_unused(&volumes, before);
        drop(volumes);
        self.volume_has_no_state(volume_id);
    }
}

/// Counts one refresh. Counts it as failed with `FailedToMount` when it is dropped without a
/// result.
#[derive(Debug)]
#[must_use = "dropping the guard counts a failure"]
pub struct RefreshGuard {
    metrics: Option<Metrics>,
    provider: String,
    started: Instant,
}

impl RefreshGuard {
    /// Counts the refresh as successful. `rotated` tells whether the content changed.
    pub fn succeeded(mut self, rotated: bool) {
        if let Some(metrics) = self.metrics.take() {
            let series = &metrics.0.rotation;
            let labels = vec![
                metrics.0.labels.provider(&self.provider),
                OS_TYPE,
                rotated_label(rotated),
            ];
            series.reconcile.get_or_create(&labels).inc();
            let duration = series.duration.get_or_create(&vec![OS_TYPE]);
            duration.observe(self.started.elapsed().as_secs_f64());
        }
    }

    /// Counts the refresh as failed with `error_type`: a reason of the driver, or the provider's
    /// error code.
    pub fn failed(mut self, error_type: &str) {
        self.count_failure(error_type);
    }

    /// Does not count the refresh, because it was given up before its result was known.
    pub fn not_counted(mut self) {
        self.metrics = None;
    }

    fn count_failure(&mut self, error_type: &str) {
        if let Some(metrics) = self.metrics.take() {
            let values = &metrics.0.labels;
            let labels = vec![
                values.provider(&self.provider),
                values.error_type(&self.provider, error_type),
                OS_TYPE,
                rotated_label(false),
            ];
            let failed = &metrics.0.rotation.reconcile_error;
            failed.get_or_create(&labels).inc();
        }
    }
}

fn rotated_label(rotated: bool) -> Label {
    ("rotated", if rotated { "true" } else { "false" }.into())
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
        // The class names another provider now.
        metrics.success("azure", "csi-2", at(2));
        assert_eq!(gauges(), [azure]);
        metrics.success("vault", "csi-2", at(9));
        assert_eq!(gauges(), [azure, r#"provider="vault"} 9"#]);
        metrics.volume_gone("csi-2");
        metrics.volume_gone("csi-3");
        assert!(gauges().is_empty(), "{:?}", gauges());
    }
}
