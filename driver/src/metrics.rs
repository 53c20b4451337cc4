//! Counts what the driver does, and serves `/metrics` and `/healthz`.
//!
//! The names and labels are those of the existing driver, so that dashboards and alerts keep
//! working. A call is counted by a guard: a guard that is dropped early, by an error or a panic,
//! counts a failure.
//!
//! Label values that come from outside (the name of a provider, its error code) are bounded in
//! length, alphabet and number. Invented names can neither fill the memory of the driver or of
//! the scraper, nor use up the number that real providers need.

pub mod http;
mod labels;
mod memory;
pub mod provider;
mod publish;
mod rotation;
mod server;
mod sync;

use std::fmt;
use std::fs;
use std::sync::Arc;

use jiff::Timestamp;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

pub use publish::{PublishGuard, UnpublishGuard};
pub use rotation::RefreshGuard;
#[cfg(any(test, fuzzing))]
pub(crate) use server::fuzz as fuzz_server;

use crate::config::BUILD_VERSION;

/// The scope labels that the series of the existing driver carry.
const SCOPE: [(&str, &str); 3] = [
    ("otel_scope_name", "sigs.k8s.io/secrets-store-csi-driver"),
    ("otel_scope_version", ""),
    ("otel_scope_schema_url", ""),
];

/// The metrics of this process. Clones count into the same series.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    publish: publish::Series,
    rotation: rotation::Series,
    sync: sync::Series,
    memory: memory::Series,
    provider_calls: provider::Series,
    labels: labels::Labels,
}

impl Metrics {
    /// Creates the metrics. A series appears on the page with its first count.
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
            .register("target_info", "Target metadata", ConstGauge::new(1_u64));
        let provider_calls = provider::Series::register(&mut registry);
        let scope = SCOPE.map(|(name, value)| (name.into(), value.into()));
        let scoped = registry.sub_registry_with_labels(scope.into_iter());
        let publish = publish::Series::register(scoped);
        let rotation = rotation::Series::register(scoped);
        let sync = sync::Series::register(scoped);
        let memory = memory::Series::register(scoped);
        Self(Arc::new(Inner {
            registry,
            publish,
            rotation,
            sync,
            memory,
            provider_calls,
            labels: labels::Labels::default(),
        }))
    }

    /// Admits the name of a provider whose socket exists as a label value. `still_there` returns
    /// whether another provider's socket exists; it is called only when too many names are admitted.
    pub fn provider_seen(&self, name: &str, still_there: impl Fn(&str) -> bool) {
        self.0.labels.seen(name, still_there);
    }

    /// Renders the page that `/metrics` serves, in OpenMetrics text.
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

/// The metrics of this process, which are read from the kernel for every page.
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
                "Start time of the process, in seconds since the epoch",
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
    // The directory itself is open while its entries are counted.
    u32::try_from(open.saturating_sub(1)).ok().map(f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

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
