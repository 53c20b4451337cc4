//! Shows how much of the node's memory mounted content takes.

use prometheus_client::{
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{
    Metrics,
    labels::{LabelSet, OS_TYPE},
};

pub(super) struct Series {
    mounted: Family<LabelSet, Gauge>,
    room: Family<LabelSet, Gauge>,
    limit: Family<LabelSet, Gauge>,
}

impl Series {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let mut gauge = |name, help| {
            let family = Family::<LabelSet, Gauge>::default();
            registry.register(name, help, family.clone());
            family
        };
        Self {
            mounted: gauge(
                "secrets_store_mounted_bytes",
                "Memory that the content of all mounted volumes takes",
            ),
            room: gauge(
                "secrets_store_mounted_bytes_room",
                "Limit of the memory for content that the driver writes",
            ),
            limit: gauge(
                "secrets_store_memory_limit_bytes",
                "The driver's memory limit, or half of the machine's memory if it has none",
            ),
        }
    }
}

impl Metrics {
    /// Sets the gauges: what all mounted volumes hold, what they may hold, and the memory limit, in
    /// bytes.
    pub fn memory(&self, mounted: u64, room: u64, limit: u64) {
        let series = &self.0.memory;
        let values = [
            (&series.mounted, mounted),
            (&series.room, room),
            (&series.limit, limit),
        ];
        for (gauge, bytes) in values {
            let gauge = gauge.get_or_create(&vec![OS_TYPE]);
            gauge.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_in_bytes_once_it_is_known() {
        let metrics = Metrics::new();
        assert!(!metrics.render().contains("secrets_store_mounted_bytes{"));
        metrics.memory(1, 2, 3);
        metrics.memory(4096, 1 << 20, u64::MAX);
        let page = metrics.render();
        for (name, value) in [
            ("secrets_store_mounted_bytes{", "4096"),
            ("secrets_store_mounted_bytes_room{", "1048576"),
            ("secrets_store_memory_limit_bytes{", "9223372036854775807"),
        ] {
            let line = page.lines().find(|line| line.starts_with(name)).unwrap();
            assert!(line.ends_with(&format!(" {value}")), "{line}");
        }
    }
}
