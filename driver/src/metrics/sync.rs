//! Counts what happens to synced Secrets. The existing driver declares the first two metrics and
//! never records them.

use std::time::Duration;

use prometheus_client::{
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};

use super::{
    Metrics,
    labels::{LabelSet, OS_TYPE},
    rotation::BOUNDS,
};

pub(super) struct Series {
    synced: Family<LabelSet, Counter>,
    failed: Family<LabelSet, Counter>,
    duration: Family<LabelSet, Histogram, fn() -> Histogram>,
}

impl Series {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let series = Self {
            synced: Family::default(),
            failed: Family::default(),
            duration: Family::new_with_constructor(|| Histogram::new(BOUNDS)),
        };
        registry.register(
            "sync_k8s_secret",
            "Secrets that were created or changed",
            series.synced.clone(),
        );
        registry.register(
            "sync_k8s_secret_error",
            "Failed attempts to create, change or keep a Secret",
            series.failed.clone(),
        );
        registry.register(
            "k8s_secret_duration_sec",
            "Time that it took to create or change a Secret",
            series.duration.clone(),
        );
        series
    }
}

impl Metrics {
    /// Counts a Secret that has been created or changed, and the time that this took.
    pub fn secret_synced(&self, provider: &str, took: Duration) {
        let series = &self.0.sync;
        let labels = vec![self.0.labels.provider(provider), OS_TYPE];
        series.synced.get_or_create(&labels).inc();
        let duration = series.duration.get_or_create(&vec![OS_TYPE]);
        duration.observe(took.as_secs_f64());
    }

    /// Counts a failed attempt, with a reason of the driver.
    pub fn secret_failed(&self, provider: &str, error_type: &'static str) {
        let labels = vec![
            self.0.labels.provider(provider),
            ("error_type", error_type.into()),
            OS_TYPE,
        ];
        self.0.sync.failed.get_or_create(&labels).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_the_existing_drivers_and_appear_with_the_first_count() {
        let metrics = Metrics::new();
        metrics.provider_seen("vault", |_| true);
        assert!(!metrics.render().contains("k8s_secret_total"));
        metrics.secret_synced("vault", Duration::from_millis(150));
        metrics.secret_failed("vault", "Forbidden");
        metrics.secret_failed("vault", "Forbidden");
        let page = metrics.render();
        let value = |start: &str, label: &str| {
            let line = page
                .lines()
                .find(|line| line.starts_with(start) && line.contains(label));
            line.unwrap().rsplit(' ').next().unwrap().to_owned()
        };
        assert_eq!(value("sync_k8s_secret_total{", r#"provider="vault""#), "1");
        let forbidden = r#"error_type="Forbidden""#;
        assert_eq!(value("sync_k8s_secret_error_total{", forbidden), "2");
        assert_eq!(
            value("k8s_secret_duration_sec_bucket{", r#"le="0.18206""#),
            "1"
        );
        assert_eq!(value("k8s_secret_duration_sec_bucket{", r#"le="0.1""#), "0");
    }
}
