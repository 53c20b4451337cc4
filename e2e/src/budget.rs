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
    Bench, REFRESH, Table, Volume, binaries, class, failed, per, percentile, rotating,
};
use crate::cluster::Result;
use crate::embedded::Embedded;

const CLASS: &str = "budget";
const PUBLISHES: usize = 1000;
const MANY: usize = 50;

/// Returns a class with two objects of 16 KiB, and annotations.
fn budget_class(annotations: &Value) -> String {
    let objects = "array:\n- {objectName: one, contentSize: 16384}\n- {objectName: two, contentSize: 16384}\n";
    class(CLASS, &json!({"objects": objects}), annotations).to_string()
}

/// The time after which the driver has released the memory that it needed for a burst.
const AT_REST: Duration = Duration::from_secs(10);

/// Measures the driver and prints a table with the budgets.
///
/// # Errors
/// When a value exceeds its budget, or cannot be measured.
pub async fn run() -> Result<()> {
    let binaries = tokio::task::spawn_blocking(binaries).await;
    let binaries = binaries
        .map_err(|error| failed("build", &error))?
        .map_err(|error| failed("build", &error))?;
    let mut table = Table::default();
    let size = fs::metadata(&binaries.driver)
        .map_err(|error| failed("the binary", &error))?
        .len();
    #[expect(clippy::cast_precision_loss, reason = "a few megabytes")]
    table.at_most("binary, MB", size as f64 / 1e6, 10.0);

    let cluster = Embedded::start(rotating(&binaries, &[])?).await?;
    let bench = Bench::prepare(&cluster).await?;
    bench.namespace.apply(&budget_class(&json!({}))).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    table.at_most("idle VmRSS, MiB", bench.rss()?, 10.0);

    for concurrency in [1, MANY] {
        let pods = bench
            .volumes(CLASS, &concurrency.to_string(), PUBLISHES)
            .await?;
        cluster.api().reset_requests();
        let (started, cpu) = (Instant::now(), bench.cpu()?);
        let latencies = bench.publish_all(&pods, concurrency).await?;
        let (seconds, cpu) = (started.elapsed().as_secs_f64(), bench.cpu()? - cpu);
        let at = format!("at concurrency {concurrency}");
        table.note(&format!("publish p50 {at}, ms"), percentile(&latencies, 50));
        table.note(&format!("publish p99 {at}, ms"), percentile(&latencies, 99));
        let rate = per(&pods) / seconds;
        if concurrency == MANY {
            // About half of what is measured, because values vary by half. The driver could do 300, but
            // the API server and this harness, which are not optimized, share its cores.
            table.at_least(&format!("publishes per second {at}"), rate, 150.0);
            let of_cpu = format!("publishes per second of CPU time {at}");
            table.at_least(&of_cpu, per(&pods) / cpu, 300.0);
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
            14.0,
        );

        if concurrency == MANY {
            rest(&bench, &pods, &mut table).await?;
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

/// Measures publishes of mounted volumes: when none is due, and when all are due and nothing has
/// changed.
async fn rest(bench: &Bench<'_>, pods: &[Volume], table: &mut Table) -> Result<()> {
    for (what, reads, calls) in [
        ("republish", 1.0, 0.0),
        ("refresh without change", 2.0, 1.0),
    ] {
        if calls > 0.0 {
            let asked = budget_class(&json!({REFRESH: "1"}));
            bench.namespace.apply(&asked).await?;
        }
        bench.cluster.api().reset_requests();
        let called_before = bench.provider_calls().await?;
        let latencies = bench.publish_all(pods, MANY).await?;
        let called = bench.provider_calls().await? - called_before;
        let (read, written) = bench.requests();
        table.note(
            &format!("{what}, p50 at concurrency {MANY}, ms"),
            percentile(&latencies, 50),
        );
        table.at_most(&format!("API reads per {what}"), read / per(pods), reads);
        table.at_most(&format!("API writes per {what}"), written / per(pods), 0.0);
        table.at_most(
            &format!("provider calls per {what}"),
            called / per(pods),
            calls,
        );
    }
    Ok(())
}
