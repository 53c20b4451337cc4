//! What the driver counts, and what it tells about itself over HTTP.
//!
//! Names and labels are those of the existing driver, whose dashboards and alerts go on working.
//! A publish or unpublish is counted by a guard: whoever takes one and returns early, by error or
//! by panic, has counted a failure.
//!
//! Label values that come from outside (a provider's name, its error code) are bounded in length,
//! alphabet and number, so that nobody can grow the driver's memory or the scraper's by naming
//! things, or use up what names of real providers need.

mod doors;
pub mod http;
mod labels;
mod memory;
pub mod provider;
mod rotation;
mod sync;

use std::fmt;
use std::fs;
use std::sync::Arc;

use jiff::Timestamp;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

pub use rotation::RefreshGuard;

use crate::config::BUILD_VERSION;

/// The scope that the existing driver's series carry.
const SCOPE: [(&str, &str); 3] = [
    ("otel_scope_name", "sigs.k8s.io/secrets-store-csi-driver"),
    ("otel_scope_version", ""),
    ("otel_scope_schema_url", ""),
];
/// `os_type` of every series, in Go's spelling.
const OS_TYPE: &str = "linux";
/// The failure that is counted when nobody said more.
const FAILED_TO_MOUNT: &str = "FailedToMount";
/// The counters of this process. Clones count into the same series.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    publish: Family<Published, Counter>,
    publish_error: Family<PublishFailed, Counter>,
    unpublish: Family<Unpublished, Counter>,
    unpublish_error: Family<Unpublished, Counter>,
    rotation: rotation::Series,
    sync: sync::Series,
    memory: memory::Series,
    provider_calls: provider::ProviderCalls,
    labels: labels::Labels,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Published {
    provider: String,
    os_type: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PublishFailed {
    provider: String,
    error_type: String,
    os_type: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Unpublished {
    os_type: &'static str,
}

impl Metrics {
    /// Counters at zero. A series appears with its first count.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process {
            started: Timestamp::now(),
        }));
        let target = [
            ("service_name".into(), "secrets-store-csi-driver".into()),
            ("service_version".into(), BUILD_VERSION.into()),
        ];
        registry
            .sub_registry_with_labels(target.into_iter())
            .register(
                "target_info",
                "What this process is",
                ConstGauge::new(1_u64),
            );
        let provider_calls = provider::ProviderCalls::register(&mut registry);
        let scope = SCOPE.map(|(name, value)| (name.into(), value.into()));
        let scoped = registry.sub_registry_with_labels(scope.into_iter());
        let publish = Family::default();
        let publish_error = Family::default();
        let unpublish = Family::default();
        let unpublish_error = Family::default();
        scoped.register("node_publish", "Successful publish calls", publish.clone());
        scoped.register(
            "node_publish_error",
            "Failed publish calls",
            publish_error.clone(),
        );
        scoped.register(
            "node_unpublish",
            "Successful unpublish calls",
            unpublish.clone(),
        );
        scoped.register(
            "node_unpublish_error",
            "Failed unpublish calls",
            unpublish_error.clone(),
        );
        let rotation = rotation::Series::register(scoped);
        let sync = sync::Series::register(scoped);
        let memory = memory::Series::register(scoped);
        Self(Arc::new(Inner {
            registry,
            publish,
            publish_error,
            unpublish,
            unpublish_error,
            rotation,
            sync,
            memory,
            provider_calls,
            labels: labels::Labels::default(),
        }))
    }

    /// A provider's socket was seen, so that its name may be a label's value. `still_there` says
    /// the same of others, and is asked only when there are too many.
    pub fn provider_seen(&self, name: &str, still_there: impl Fn(&str) -> bool) {
        self.0.labels.seen(name, still_there);
    }

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

    /// The page that is served at `/metrics`, in OpenMetrics text.
    pub fn render(&self) -> String {
        let mut page = String::new();
        if let Err(error) = text::encode(&mut page, &self.0.registry) {
            tracing::error!(%error, "cannot render the metrics page");
        }
        page
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

/// Counts one publish: as failed with `FailedToMount` when dropped without a word.
#[derive(Debug)]
#[must_use = "dropping the guard counts a failure"]
pub struct PublishGuard {
    metrics: Option<Metrics>,
    provider: String,
}

impl PublishGuard {
    /// Says whose publish it is, as soon as that is known.
    pub fn provider(&mut self, name: &str) {
        name.clone_into(&mut self.provider);
    }

    /// The volume is published.
    pub fn succeeded(mut self) {
        if let Some(metrics) = self.metrics.take() {
            let provider = metrics.0.labels.provider(&self.provider);
            metrics
                .0
                .publish
                .get_or_create(&Published {
                    provider,
                    os_type: OS_TYPE,
                })
                .inc();
        }
    }

    /// It is not, for this reason: one of the driver's own, or the provider's error code.
    pub fn failed(mut self, error_type: &str) {
        self.count_failure(error_type);
    }

    /// There was nothing to do.
    pub fn not_counted(mut self) {
        self.metrics = None;
    }

    fn count_failure(&mut self, error_type: &str) {
        if let Some(metrics) = self.metrics.take() {
            let provider = metrics.0.labels.provider(&self.provider);
            let error_type = metrics.0.labels.error_type(&self.provider, error_type);
            let labels = PublishFailed {
                provider,
                error_type,
                os_type: OS_TYPE,
            };
            metrics.0.publish_error.get_or_create(&labels).inc();
        }
    }
}

impl Drop for PublishGuard {
    fn drop(&mut self) {
        self.count_failure(FAILED_TO_MOUNT);
    }
}

/// Counts one unpublish: as failed when dropped without a word.
#[derive(Debug)]
#[must_use = "dropping the guard counts a failure"]
pub struct UnpublishGuard {
    metrics: Option<Metrics>,
}

impl UnpublishGuard {
    /// The volume is gone.
    pub fn succeeded(mut self) {
        if let Some(metrics) = self.metrics.take() {
            metrics
                .0
                .unpublish
                .get_or_create(&Unpublished { os_type: OS_TYPE })
                .inc();
        }
    }

    /// It is not.
    pub fn failed(self) {
        drop(self);
    }
}

impl Drop for UnpublishGuard {
    fn drop(&mut self) {
        if let Some(metrics) = self.metrics.take() {
            metrics
                .0
                .unpublish_error
                .get_or_create(&Unpublished { os_type: OS_TYPE })
                .inc();
        }
    }
}

/// What the kernel says about this process, read anew for every page.
#[derive(Debug)]
struct Process {
    started: Timestamp,
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let started = self.started.as_millisecond() as f64 / 1000.0;
        let gauges = [
            (
                "process_start_time_seconds",
                "When the process started, since the epoch",
                Some(started),
            ),
            (
                "process_resident_memory_bytes",
                "Memory in use",
                resident_memory(),
            ),
            ("process_open_fds", "Open file descriptors", open_files()),
        ];
        for (name, help, value) in gauges {
            if let Some(value) = value {
                let gauge = ConstGauge::new(value);
                gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
            }
        }
        Ok(())
    }
}

fn resident_memory() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u32 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(f64::from(kibibytes) * 1024.0)
}

fn open_files() -> Option<f64> {
    let open = fs::read_dir("/proc/self/fd").ok()?.count();
    // One of them is the one that was opened to count.
    u32::try_from(open.saturating_sub(1)).ok().map(f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The page without the lines of this process, which differ from run to run, and with the
    /// series of each counter sorted.
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

    #[test]
    fn the_page_knows_this_process() {
        let page = Metrics::new().render();
        for name in [
            "process_start_time_seconds",
            "process_resident_memory_bytes",
            "process_open_fds",
        ] {
            let line = page
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap();
            assert!(line.trim().parse::<f64>().unwrap() > 1.0, "{name}{line}");
        }
    }
}
