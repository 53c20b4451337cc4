//! What mounted content takes of the memory of this node.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{Metrics, OS_TYPE};

pub(super) struct Series {
    mounted: Family<Os, Gauge>,
    room: Family<Os, Gauge>,
    limit: Family<Os, Gauge>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Os {
    os_type: &'static str,
}

impl Series {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let series = Self {
            mounted: Family::default(),
            room: Family::default(),
            limit: Family::default(),
        };
        registry.register(
            "secrets_store_mounted_bytes",
            "Memory that the content of all mounted volumes takes",
            series.mounted.clone(),
        );
        registry.register(
            "secrets_store_mounted_bytes_room",
            "Memory that content which the driver writes may take",
            series.room.clone(),
        );
        registry.register(
            "secrets_store_memory_limit_bytes",
            "The driver's memory limit, or half of the machine's memory where it has none",
            series.limit.clone(),
        );
        series
    }
}

impl Metrics {
    /// Says what all mounted volumes hold, what they may hold, and the limit of it, in bytes.
    pub fn memory(&self, mounted: u64, room: u64, limit: u64) {
        let series = &self.0.memory;
        let values = [
            (&series.mounted, mounted),
            (&series.room, room),
            (&series.limit, limit),
        ];
        for (gauge, bytes) in values {
            let gauge = gauge.get_or_create(&Os { os_type: OS_TYPE });
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
