//! Tells what the driver's process uses, under the names that Prometheus' client libraries share
//! ([process metrics](https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics)).

use std::fmt;
use std::fs;

use jiff::Timestamp;
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{SysconfVar, sysconf};
use procfs_core::FromRead as _;
use procfs_core::process::Stat;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// The metrics of this process, which are read from the kernel for every page. What cannot be read is
/// left out.
#[derive(Debug)]
pub(super) struct Process {
    started: Timestamp,
}

impl Process {
    /// Says that the process has started now.
    pub(super) fn started() -> Self {
        Self {
            started: Timestamp::now(),
        }
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let used = Used::read();
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
                used.as_ref().map(|used| used.resident),
            ),
            (
                "process_virtual_memory_bytes",
                "Address space in use",
                used.as_ref().map(|used| used.virtual_memory),
            ),
            (
                "process_virtual_memory_max_bytes",
                "Limit of the address space",
                limit(Resource::RLIMIT_AS),
            ),
            ("process_open_fds", "Open file descriptors", open_files()),
            (
                "process_max_fds",
                "Limit of open file descriptors",
                limit(Resource::RLIMIT_NOFILE),
            ),
        ];
        for (name, help, value) in gauges {
            if let Some(value) = value {
                let gauge = ConstGauge::new(value);
                gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
            }
        }
        if let Some(used) = used {
            let (name, help) = ("process_cpu_seconds", "Time on a processor, in seconds");
            let counter = ConstCounter::new(used.cpu_seconds);
            counter.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }
        Ok(())
    }
}

/// What `/proc/self/stat` says.
struct Used {
    cpu_seconds: f64,
    resident: f64,
    virtual_memory: f64,
}

impl Used {
    fn read() -> Option<Self> {
        let stat = Stat::from_file("/proc/self/stat").ok()?;
        let unit = |of| sysconf(of).ok().flatten().map(|value| value as f64);
        Some(Self {
            cpu_seconds: (stat.utime + stat.stime) as f64 / unit(SysconfVar::CLK_TCK)?,
            resident: stat.rss as f64 * unit(SysconfVar::PAGE_SIZE)?,
            virtual_memory: stat.vsize as f64,
        })
    }
}

/// Returns a limit of this process. A limit that is infinite is the largest number, as in Go's programs.
fn limit(of: Resource) -> Option<f64> {
    getrlimit(of).ok().map(|(soft, _)| soft as f64)
}

fn open_files() -> Option<f64> {
    let open = fs::read_dir("/proc/self/fd").ok()?.count();
    // The directory itself is open while its entries are counted.
    u32::try_from(open.saturating_sub(1)).ok().map(f64::from)
}

#[cfg(test)]
mod tests {
    use super::super::Metrics;

    #[test]
    fn the_page_knows_this_process() {
        let value = |name: &str| -> f64 {
            let page = Metrics::new().render();
            let line = page.lines().find_map(|line| line.strip_prefix(name));
            let value = line.and_then(|line| line.strip_prefix(' '));
            value
                .unwrap_or_else(|| panic!("{name}: {page}"))
                .parse()
                .unwrap()
        };
        let now = jiff::Timestamp::now().as_second() as f64;
        assert!((now - value("process_start_time_seconds")).abs() < 600.0);
        let resident = value("process_resident_memory_bytes");
        assert!((1e6..1e12).contains(&resident), "{resident}");
        assert!(value("process_virtual_memory_bytes") > resident);
        assert!(value("process_virtual_memory_max_bytes") > resident);
        assert!((3.0..=value("process_max_fds")).contains(&value("process_open_fds")));

        // Works for a while, which takes time on a processor however busy the machine is.
        let before = value("process_cpu_seconds_total");
        let mut sum = 0_u64;
        while value("process_cpu_seconds_total") < before + 0.05 {
            sum = (0..100_000_u64).fold(sum, u64::wrapping_add);
        }
        std::hint::black_box(sum);
    }
}
