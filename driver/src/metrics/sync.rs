//! What is counted of synced Secrets. The existing driver declares the first two and never
//! records them.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};

use super::{Metrics, OS_TYPE, rotation::BOUNDS};

pub(super) struct Series {
    synced: Family<Synced, Counter>,
    failed: Family<Failed, Counter>,
    duration: Family<Os, Histogram, fn() -> Histogram>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Synced {
    provider: String,
    os_type: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Failed {
    provider: String,
    error_type: &'static str,
    os_type: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Os {
    os_type: &'static str,
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
            "Attempts after which a Secret was not as it should be",
            series.failed.clone(),
        );
        registry.register(
            "k8s_secret_duration_sec",
            "How long it took to create or change a Secret",
            series.duration.clone(),
        );
        series
    }
}

impl Metrics {
    /// A Secret has been created or changed, in this time.
    pub fn secret_synced(&self, provider: &str, took: Duration) {
        let series = &self.0.sync;
        let provider = self.0.labels.provider(provider);
        let os_type = OS_TYPE;
        series
            .synced
            .get_or_create(&Synced { provider, os_type })
            .inc();
        series
            .duration
            .get_or_create(&Os { os_type })
            .observe(took.as_secs_f64());
    }

    /// A Secret is not as it should be, for this reason.
    pub fn secret_failed(&self, provider: &str, error_type: &'static str) {
        let labels = Failed {
            provider: self.0.labels.provider(provider),
            error_type,
            os_type: OS_TYPE,
        };
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
