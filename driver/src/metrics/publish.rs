//! Counts publishes and unpublishes.

use prometheus_client::{
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use super::{
    Metrics,
    labels::{FAILED_TO_MOUNT, LabelSet, OS_TYPE},
};

pub(super) struct Series {
    published: Family<LabelSet, Counter>,
    publish_failed: Family<LabelSet, Counter>,
    unpublished: Family<LabelSet, Counter>,
    unpublish_failed: Family<LabelSet, Counter>,
}

impl Series {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let mut counter = |name, help| {
            let family = Family::<LabelSet, Counter>::default();
            registry.register(name, help, family.clone());
            family
        };
        Self {
            published: counter("node_publish", "Successful publish calls"),
            publish_failed: counter("node_publish_error", "Failed publish calls"),
            unpublished: counter("node_unpublish", "Successful unpublish calls"),
            unpublish_failed: counter("node_unpublish_error", "Failed unpublish calls"),
        }
    }
}

impl Metrics {
    /// Starts to count one publish.
    pub fn publish(&self) -> PublishGuard {
        PublishGuard {
            metrics: Some(self.clone()),
            provider: String::new(),
        }
    }

    /// Starts to count one unpublish.
    pub fn unpublish(&self) -> UnpublishGuard {
        UnpublishGuard {
            metrics: Some(self.clone()),
        }
    }
}

/// Counts one publish. Counts it as failed with `FailedToMount` when it is dropped without a
/// result.
#[derive(Debug)]
#[must_use = "dropping the guard counts a failure"]
pub struct PublishGuard {
    metrics: Option<Metrics>,
    provider: String,
}

impl PublishGuard {
    /// Names the provider of the volume, as soon as it is known.
    pub fn provider(&mut self, name: &str) {
        name.clone_into(&mut self.provider);
    }

    /// Counts the publish as successful.
    pub fn succeeded(mut self) {
        if let Some(metrics) = self.metrics.take() {
            let labels = vec![metrics.0.labels.provider(&self.provider), OS_TYPE];
            metrics.0.publish.published.get_or_create(&labels).inc();
        }
    }

    /// Counts the publish as failed with `error_type`: a reason of the driver, or the provider's
    /// error code.
    pub fn failed(mut self, error_type: &str) {
        self.count_failure(error_type);
    }

    /// Does not count the publish, because there was nothing to do.
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
            ];
            let failed = &metrics.0.publish.publish_failed;
            failed.get_or_create(&labels).inc();
        }
    }
}

impl Drop for PublishGuard {
    fn drop(&mut self) {
        self.count_failure(FAILED_TO_MOUNT);
    }
}

/// Counts one unpublish. Counts it as failed when it is dropped without a result.
#[derive(Debug)]
#[must_use = "dropping the guard counts a failure"]
pub struct UnpublishGuard {
    metrics: Option<Metrics>,
}

impl UnpublishGuard {
    /// Counts the unpublish as successful.
    pub fn succeeded(mut self) {
        if let Some(metrics) = self.metrics.take() {
            let unpublished = &metrics.0.publish.unpublished;
            unpublished.get_or_create(&vec![OS_TYPE]).inc();
        }
    }

    /// Counts the unpublish as failed.
    pub fn failed(self) {
        drop(self);
    }
}

impl Drop for UnpublishGuard {
    fn drop(&mut self) {
        if let Some(metrics) = self.metrics.take() {
            let failed = &metrics.0.publish.unpublish_failed;
            failed.get_or_create(&vec![OS_TYPE]).inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the page without the metrics of this process, which differ from run to run, and with
    /// the series of each counter sorted.
    fn page(metrics: &Metrics) -> String {
        let page = metrics.render();
        let mut lines: Vec<&str> = page
            .lines()
            .filter(|line| !line.contains("process_"))
            .collect();
        for lines in lines.chunk_by_mut(|a, b| a.starts_with('#') == b.starts_with('#')) {
            lines.sort_unstable();
        }
        lines.join("\n")
    }

    #[test]
    fn the_page_has_the_series_of_the_existing_driver() {
        let metrics = Metrics::new();
        for provider in ["vault", "azure"] {
            metrics.provider_seen(provider, |_| true);
        }
        for provider in ["vault", "vault", ""] {
            let mut guard = metrics.publish();
            guard.provider(provider);
            guard.succeeded();
        }
        metrics.publish().not_counted();
        drop(metrics.publish());
        let mut guard = metrics.clone().publish();
        guard.provider("azure");
        guard.failed("GRPCProviderError");
        metrics.unpublish().succeeded();
        metrics.unpublish().failed();
        drop(metrics.unpublish());
        insta::assert_snapshot!(page(&metrics));
    }

    #[test]
    fn series_appear_with_their_first_count() {
        assert!(
            !page(&Metrics::new()).contains("node_"),
            "{}",
            page(&Metrics::new())
        );
    }

    #[test]
    fn a_panic_counts_as_a_failure() {
        let metrics = Metrics::new();
        let inner = metrics.clone();
        let publish = std::thread::spawn(move || {
            let _guard = inner.publish();
            panic!("in the middle of a publish");
        });
        assert!(publish.join().is_err());
        assert!(
            page(&metrics).contains(r#"error_type="FailedToMount""#),
            "{}",
            page(&metrics)
        );
    }

    #[test]
    fn names_of_no_provider_leave_room_for_those_that_are() {
        let metrics = Metrics::new();
        for bogus in 0..200 {
            let name = format!("bogus-{bogus}");
            let mut guard = metrics.publish();
            guard.provider(&name);
            guard.failed("FailedToLookupProviderGRPCClient");
            metrics.refresh(&name).failed(&format!("code-{bogus}"));
            metrics.secret_failed(&name, "Forbidden");
        }
        metrics.provider_seen("vault", |_| true);
        let mut guard = metrics.publish();
        guard.provider("vault");
        guard.failed("quote\" and\nnewline");
        let page = page(&metrics);
        assert!(!page.contains("bogus") && !page.contains("code-"), "{page}");
        let failed: Vec<&str> = page
            .lines()
            .filter(|line| line.starts_with("node_publish_error_total"))
            .collect();
        assert_eq!(failed.len(), 2, "{failed:#?}");
        assert!(
            failed
                .iter()
                .any(|line| line.contains("provider=\"other\"") && line.ends_with(" 200"))
        );
        assert!(failed.iter().any(|line| {
            line.contains("provider=\"vault\"")
                && line.contains("error_type=\"quote__and_newline\"")
        }));
    }
}
