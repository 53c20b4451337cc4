//! The budgets: limits of the driver's size, memory, requests and time, measured on its release build
//! in an embedded cluster.
//!
//! The calls go to the driver's CSI socket directly, so that the embedded kubelet is not measured.
//! The driver asks the API server, over TLS, and the provider, over its socket; both run on the same
//! machine.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bench::{
    Bench, REFRESH, Table, Volume, built, class, failed, per, percentile, rotating,
};
use crate::cluster::Result;
use crate::embedded::Embedded;

const CLASS: &str = "budget";
const PUBLISHES: usize = 1000;
const MANY: usize = 50;
/// The bytes of an object.
const SIZE: usize = 16384;

/// Returns a class with two objects of 16 KiB, or of another size, and annotations.
fn budget_class(size: usize, annotations: &Value) -> String {
    let object = |name| format!("- {{objectName: {name}, contentSize: {size}}}\n");
    let objects = format!("array:\n{}{}", object("one"), object("two"));
    class(CLASS, &json!({"objects": objects}), annotations).to_string()
}

/// The time after which the driver has released the memory that it needed for a burst.
const AT_REST: Duration = Duration::from_secs(10);

/// The time after which kubelet looks at a volume again, if nothing happens to its pod. A look that comes
/// sooner reads the class.
const BETWEEN_LOOKS: Duration = Duration::from_secs(60);

/// Measures the driver and prints a table with the budgets.
///
/// # Errors
/// When a value exceeds its budget, or cannot be measured.
pub async fn run() -> Result<()> {
    let binaries = built().await?;
    let mut table = Table::default();
    let size = fs::metadata(&binaries.driver)
        .map_err(|error| failed("the binary", &error))?
        .len();
    #[expect(clippy::cast_precision_loss, reason = "a few megabytes")]
    table.at_most("binary, MB", size as f64 / 1e6, 10.0);

    let cluster = Embedded::start(rotating(&binaries, &[])?).await?;
    let bench = Bench::prepare(&cluster).await?;
    let class = budget_class(SIZE, &json!({}));
    bench.namespace.apply(&class).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    table.at_most("idle VmRSS, MiB", bench.rss()?, 10.0);

    let mut publish = Latency::default();
    for concurrency in [1, MANY] {
        let pods = bench
            .volumes(CLASS, &concurrency.to_string(), PUBLISHES)
            .await?;
        cluster.api().reset_requests();
        let (started, cpu) = (Instant::now(), bench.cpu()?);
        let latencies = bench.publish_all(&pods, concurrency).await?;
        let (seconds, cpu) = (started.elapsed().as_secs_f64(), bench.cpu()? - cpu);
        let at = format!("at concurrency {concurrency}");
        publish.set(concurrency, percentile(&latencies, 50));
        table.note(&format!("publish p50 {at}, ms"), percentile(&latencies, 50));
        table.note(&format!("publish p99 {at}, ms"), percentile(&latencies, 99));
        let rate = per(&pods) / seconds;
        if concurrency == MANY {
            // About half of what is measured, because values vary by half. The driver could do 300, but
            // the API server and this harness, which are not optimized, share its cores.
            table.at_least(&format!("publishes per second {at}"), rate, 150.0);
            publish.cpu = cpu * 1000.0 / per(&pods);
            table.note(&format!("CPU time of a publish {at}, ms"), publish.cpu);
        } else {
            table.note(&format!("publishes per second {at}"), rate);
        }
        let (reads, writes) = bench.requests();
        table.at_most(
            &format!("API reads per publish {at}"),
            reads / per(&pods),
            1.0,
        );
        table.at_most(
            &format!("API writes per publish {at}"),
            writes / per(&pods),
            1.0,
        );
        table.at_most(
            &format!("VmRSS at the end of {} publishes {at}, MiB", pods.len()),
            bench.rss()?,
            16.0,
        );
        tokio::time::sleep(AT_REST).await;
        table.at_most(
            &format!("VmRSS {} s later {at}, MiB", AT_REST.as_secs()),
            bench.rss()?,
            11.0,
        );

        if concurrency == MANY {
            looks(&bench, &pods, &publish, &mut table).await?;
            refreshes(&bench, &pods, &mut table).await?;
        }

        cluster.api().reset_requests();
        bench.unpublish_all(&pods).await?;
        let (reads, writes) = bench.requests();
        table.at_most(
            &format!("API requests per unpublish {at}"),
            (reads + writes) / per(&pods),
            0.0,
        );
    }
    table.print();
    table.verdict()
}

/// The median time of a call in milliseconds, by concurrency.
#[derive(Default)]
struct Latency {
    alone: f64,
    among_many: f64,
    /// The driver's CPU time of a call among many.
    cpu: f64,
}

impl Latency {
    fn set(&mut self, concurrency: usize, milliseconds: f64) {
        match concurrency {
            1 => self.alone = milliseconds,
            _ => self.among_many = milliseconds,
        }
    }
}

/// Measures kubelet's looks at mounted volumes of which none is due. Times are compared with those of
/// publishes and of empty calls, because they vary with the machine.
async fn looks(
    bench: &Bench<'_>,
    pods: &[Volume],
    publish: &Latency,
    table: &mut Table,
) -> Result<()> {
    // The first look reads record, mount and content; those that are measured compare.
    bench.publish_all(pods, MANY).await?;
    tokio::time::sleep(BETWEEN_LOOKS).await;
    let mut empty = Latency::default();
    for concurrency in [1, MANY] {
        let latencies = bench.empty_calls(pods.len() / 2, concurrency).await?;
        empty.set(concurrency, percentile(&latencies, 50));
        let what = format!("empty call p50 at concurrency {concurrency}, ms");
        table.note(&what, percentile(&latencies, 50));
    }
    bench.cluster.api().reset_requests();
    let called_before = bench.provider_calls().await?;
    let cpu = bench.cpu()?;
    let (some, others) = pods.split_at(pods.len() / 2);
    let alone = bench.publish_all(some, 1).await?;
    let among_many = bench.publish_all(others, MANY).await?;
    let cpu = bench.cpu()? - cpu;
    let (read, written) = bench.requests();
    let called = bench.provider_calls().await? - called_before;
    // The driver reads each class again every five minutes, which may be now.
    let what = format!("API requests of {} looks", pods.len());
    table.at_most(&what, read + written, 1.0);
    let what = format!("provider calls of {} looks", pods.len());
    table.at_most(&what, called, 0.0);
    table.note("look p50 at concurrency 1, ms", percentile(&alone, 50));
    table.at_most(
        "look p50 at concurrency 1, of that of a publish",
        percentile(&alone, 50) / publish.alone,
        0.25,
    );
    // Twice is usual. The examination itself is a dozen system calls.
    for (at, looks, empty) in [
        (1, &alone, empty.alone),
        (MANY, &among_many, empty.among_many),
    ] {
        let what = format!("look p50 at concurrency {at}, of that of an empty call");
        table.at_most(&what, percentile(looks, 50) / empty, 6.0);
    }
    for percent in [50, 99] {
        table.note(
            &format!("look p{percent} at concurrency {MANY}, ms"),
            percentile(&among_many, percent),
        );
    }
    table.at_most(
        &format!("look p99 at concurrency {MANY}, of the p50 of a publish"),
        percentile(&among_many, 99) / publish.among_many,
        1.0,
    );
    let cpu = cpu * 1000.0 / per(pods);
    table.note("CPU time of a look, ms", cpu);
    // 12 to 20 is usual, on busy machines too.
    table.at_most(
        "CPU time of a publish, of that of a look",
        publish.cpu / cpu,
        30.0,
    );
    Ok(())
}

/// Measures refreshes of all volumes at once: when nothing has changed, and when the content has.
async fn refreshes(bench: &Bench<'_>, pods: &[Volume], table: &mut Table) -> Result<()> {
    // The class is read, by volumes together that are looked at together. Of a change the pod status is
    // told, with one read and one write, and the pod, which is read and gets an event. One more is for a conflict.
    for (what, size, reads, writes) in [
        ("refresh without change", SIZE, 1.0, 0.0),
        ("refresh with change", SIZE + 1, 4.0, 3.0),
    ] {
        let asked = budget_class(size, &json!({REFRESH: what}));
        bench.namespace.apply(&asked).await?;
        bench.cluster.api().reset_requests();
        let called_before = bench.provider_calls().await?;
        let latencies = bench.publish_all(pods, MANY).await?;
        bench.settled().await?;
        let called = bench.provider_calls().await? - called_before;
        let (read, written) = bench.requests();
        table.note(
            &format!("{what}, p50 at concurrency {MANY}, ms"),
            percentile(&latencies, 50),
        );
        table.at_most(&format!("API reads per {what}"), read / per(pods), reads);
        table.at_most(
            &format!("API writes per {what}"),
            written / per(pods),
            writes,
        );
        table.at_most(
            &format!("provider calls per {what}"),
            called / per(pods),
            1.0,
        );
    }
    Ok(())
}
