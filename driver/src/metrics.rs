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
mod page;
mod process;
pub mod provider;
mod publish;
mod rotation;
mod server;
mod sync;
mod volumes;

use std::fmt;
use std::sync::Arc;

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
    volumes: volumes::Series,
    provider_calls: provider::Series,
    labels: labels::Labels,
}

impl Metrics {
    /// Creates the metrics. A series appears on the page with its first count.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(process::Process::started()));
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
        let volumes = volumes::Series::register(scoped);
        Self(Arc::new(Inner {
            registry,
            publish,
            rotation,
            sync,
            memory,
            volumes,
            provider_calls,
            labels: labels::Labels::default(),
        }))
    }

    /// Admits the name of a provider whose socket exists as a label value. `still_there` returns
    /// whether another provider's socket exists; it is called only when too many names are admitted.
    pub fn provider_seen(&self, name: &str, still_there: impl Fn(&str) -> bool) {
        self.0.labels.seen(name, still_there);
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
