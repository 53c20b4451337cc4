//! A long run that records memory, descriptors, threads and latency of the release build over time, and
//! draws them: pods come and go, their content rotates, and kubelet's publishes go on.

mod chart;

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::bench::{Bench, REFRESH, Table, Volume, built, class, failed, percentile, rotating};
use crate::cluster::Result;
use crate::embedded::Embedded;

const CLASS: &str = "soak";
/// The number of volumes, and of those that are replaced in each round.
const VOLUMES: usize = 110;
const REPLACED: usize = 22;
const AT_ONCE: usize = 20;
/// The shortest time of a round. It leaves the driver at rest for a part of it.
const ROUND: Duration = Duration::from_secs(10);
/// The rounds before the driver's memory counts: allocators keep what the first storms needed.
const WARM_UP: usize = 6;
/// The bounds of the growth from the first tenth of the rounds to the last.
const MEMORY_GROWTH: f64 = 1.0;
const OTHER_GROWTH: f64 = 2.0;

/// The state of the driver at the end of a round.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// The minutes since the start.
    minute: f64,
    /// The resident memory in MiB.
    memory: f64,
    descriptors: f64,
    threads: f64,
    /// The times of publishes of new volumes, in milliseconds.
    p50: f64,
    p99: f64,
    /// The 99th percentile of the time of a publish of a mounted volume that is not due.
    look: f64,
}

/// A function that takes one value of a sample.
type Value = fn(&Sample) -> f64;

/// Runs for so many minutes, writes the chart to a file, and prints a table with the bounds.
///
/// # Errors
/// When a call fails, the chart cannot be written, or the driver grows.
pub async fn run(minutes: u64, chart: &Path) -> Result<()> {
    let binaries = built().await?;
    let cluster = Embedded::start(rotating(&binaries, &[])?).await?;
    let bench = Bench::prepare(&cluster).await?;
    let samples = record(&bench, Duration::from_secs(60 * minutes)).await?;
    chart::draw(chart, &samples).map_err(|error| failed(&chart.display().to_string(), &error))?;
    println!(
        "{} rounds; the chart is in {}",
        samples.len(),
        chart.display()
    );
    let table = compare(&samples).ok_or_else(|| failed("the run", &"too short to compare"))?;
    table.print();
    table.verdict()
}

/// Replaces, reads again and rotates volumes until the time is over.
async fn record(bench: &Bench<'_>, time: Duration) -> Result<Vec<Sample>> {
    apply(bench, 0).await?;
    let mut volumes = VecDeque::from(bench.volumes(CLASS, "first", VOLUMES).await?);
    bench
        .publish_all(volumes.make_contiguous(), AT_ONCE)
        .await?;
    let (started, mut samples) = (Instant::now(), Vec::new());
    while started.elapsed() < time {
        let round = Instant::now();
        let number = samples.len() + 1;
        let gone: Vec<Volume> = volumes.drain(..REPLACED).collect();
        bench.unpublish_all(&gone).await?;
        bench.delete_pods(&gone).await?;
        let new = bench.volumes(CLASS, &number.to_string(), REPLACED).await?;
        let published = bench.publish_all(&new, AT_ONCE).await?;
        volumes.extend(new);
        let looked = bench
            .publish_all(volumes.make_contiguous(), AT_ONCE)
            .await?;
        apply(bench, number).await?;
        bench
            .publish_all(volumes.make_contiguous(), AT_ONCE)
            .await?;
        tokio::time::sleep(ROUND.saturating_sub(round.elapsed())).await;
        samples.push(Sample {
            minute: started.elapsed().as_secs_f64() / 60.0,
            memory: bench.rss()?,
            descriptors: bench.descriptors()?,
            threads: bench.threads()?,
            p50: percentile(&published, 50),
            p99: percentile(&published, 99),
            look: percentile(&looked, 99),
        });
    }
    Ok(samples)
}

/// Gives the class new content, and makes its volumes due.
async fn apply(bench: &Bench<'_>, round: usize) -> Result<()> {
    let objects = format!(
        "array:\n- {{objectName: one, content: \"{round}\"}}\n- {{objectName: two, contentSize: 16384}}\n"
    );
    let asked = json!({REFRESH: round.to_string()});
    let class = class(CLASS, &json!({"objects": objects}), &asked);
    bench.namespace.apply(&class.to_string()).await.map(drop)
}

/// Compares the last tenth of the rounds with the first one after the warm-up.
fn compare(samples: &[Sample]) -> Option<Table> {
    let samples = samples.get(WARM_UP..)?;
    let tenth = (samples.len() / 10).max(1);
    let (first, last) = (samples.get(..tenth)?, samples.get(samples.len() - tenth..)?);
    let mean = |samples: &[Sample], value: Value| {
        let count = f64::from(u32::try_from(samples.len()).unwrap_or(u32::MAX));
        samples.iter().map(value).sum::<f64>() / count
    };
    let mut table = Table::default();
    let rows: [(&str, Value, f64); 3] = [
        (
            "resident memory, MiB",
            |sample| sample.memory,
            MEMORY_GROWTH,
        ),
        ("descriptors", |sample| sample.descriptors, OTHER_GROWTH),
        ("threads", |sample| sample.threads, OTHER_GROWTH),
    ];
    for (what, value, growth) in rows {
        let (before, after) = (mean(first, value), mean(last, value));
        table.note(&format!("{what}, first tenth"), before);
        table.at_most(&format!("{what}, last tenth"), after, before + growth);
    }
    for (what, value) in [
        ("publish p50, ms", (|sample| sample.p50) as Value),
        ("publish p99, ms", |sample| sample.p99),
        ("publish of a mounted volume, p99, ms", |sample| sample.look),
    ] {
        table.note(&format!("{what}, first tenth"), mean(first, value));
        table.note(&format!("{what}, last tenth"), mean(last, value));
    }
    Some(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(memory: fn(usize) -> f64) -> Vec<Sample> {
        let sample = |round| Sample {
            minute: 0.0,
            memory: memory(round),
            descriptors: 30.0,
            threads: 4.0,
            p50: 1.0,
            p99: 2.0,
            look: 1.0,
        };
        (0..100).map(sample).collect()
    }

    #[test]
    fn a_driver_that_grows_is_found_and_one_that_warms_up_is_not() {
        let steady = samples(|round| if round < WARM_UP { 5.0 } else { 12.0 });
        assert!(compare(&steady).unwrap().verdict().is_ok());
        let growing = samples(|round| 10.0 + f64::from(u32::try_from(round).unwrap()) / 50.0);
        assert!(compare(&growing).unwrap().verdict().is_err());
        assert!(compare(&steady[..WARM_UP]).is_none());
    }
}
