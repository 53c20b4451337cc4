//! Shows where the memory of the driver is: at rest, while many volumes are published at once, and after
//! that. What `e2e footprint` runs.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use tokio::time::MissedTickBehavior;
use tonic::transport::Endpoint;

use crate::bench::{
    Bench, Resident, Run, built, check_docs, class, failed, replace_section, rotating,
};
use crate::binaries::Binaries;
use crate::cluster::Result;
use crate::embedded::Embedded;

const COMMAND: &str = "e2e footprint";
/// The page that has the table.
const PAGE: &str = "sizing.md";
const CLASS: &str = "footprint";
/// The number of publishes under way at any time.
const MANY: usize = 50;
/// The time in which the driver becomes idle, and after which it has given back what a burst needed.
const IDLE: Duration = Duration::from_secs(3);
const AT_REST: Duration = Duration::from_secs(15);
/// The time between two readings during the burst.
const EVERY: Duration = Duration::from_millis(10);
/// The number of connections whose memory is measured.
const CONNECTIONS: u32 = 50;

/// The settings of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The number of volumes.
    pub volumes: usize,
    /// The directory of the documentation into whose page about sizes the table is written, if it is.
    pub docs: Option<PathBuf>,
}

/// Measures the release build, and prints a table.
///
/// # Errors
/// When the driver does not do what is measured, or the page cannot be written.
pub async fn run(options: &Options) -> Result<()> {
    if let Some(docs) = &options.docs {
        check_docs(docs, COMMAND, &[PAGE])?;
    }
    let binaries = built().await?;
    let run = Run::now("the embedded API server".to_owned(), &binaries);
    let footprint = measure(options.volumes, &binaries).await?;
    let text = format!(
        "{} Two objects of 4 KiB in each volume.\n\n{}",
        run.sentence(),
        footprint.markdown()
    );
    println!("{text}");
    match &options.docs {
        Some(docs) => replace_section(&docs.join(PAGE), COMMAND, &text),
        None => Ok(()),
    }
}

/// A row of the table: its name and its value in KiB.
type Row = (&'static str, fn(&Resident) -> f64);

/// The memory of a driver at three times.
#[derive(Debug)]
struct Footprint {
    volumes: usize,
    idle: Resident,
    peak: Resident,
    after: Resident,
    /// The heap that a further connection to the CSI socket takes, in KiB.
    connection: f64,
}

async fn measure(volumes: usize, binaries: &Binaries) -> Result<Footprint> {
    let cluster = Embedded::start(rotating(binaries, &[])?).await?;
    let bench = Bench::prepare(&cluster).await?;
    let objects =
        "array:\n- {objectName: one, contentSize: 4096}\n- {objectName: two, contentSize: 4096}\n";
    let class = class(CLASS, &json!({"objects": objects}), &json!({}));
    bench.namespace.apply(&class.to_string()).await?;
    tokio::time::sleep(IDLE).await;
    let idle = bench.process().resident()?;
    let connection = connection(&bench).await?;
    let pods = bench.volumes(CLASS, "peak", volumes).await?;
    let peak = {
        let publishes = bench.publish_all(&pods, MANY);
        tokio::pin!(publishes);
        let mut readings = tokio::time::interval(EVERY);
        readings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut peak = idle;
        loop {
            tokio::select! {
                published = &mut publishes => break published.map(|_| peak)?,
                _ = readings.tick() => {
                    let now = bench.process().resident()?;
                    if now.sum() > peak.sum() {
                        peak = now;
                    }
                }
            }
        }
    };
    tokio::time::sleep(AT_REST).await;
    let after = bench.process().resident()?;
    bench.unpublish_all(&pods).await?;
    Ok(Footprint {
        volumes,
        idle,
        peak,
        after,
        connection,
    })
}

/// Returns the heap that a connection takes after its first call, in KiB.
async fn connection(bench: &Bench<'_>) -> Result<f64> {
    let broken = |error: &dyn std::fmt::Display| failed("a connection", error);
    let before = bench.process().resident()?;
    let endpoint = Endpoint::from_shared(format!("unix://{}", bench.socket().display()))
        .map_err(|error| broken(&error))?;
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let channel = endpoint.connect().await.map_err(|error| broken(&error))?;
        let mut client = proto::csi::identity_client::IdentityClient::new(channel);
        let probed = client.probe(proto::csi::ProbeRequest {}).await;
        probed.map_err(|status| broken(&status.message()))?;
        connections.push(client);
    }
    let after = bench.process().resident()?;
    Ok((after.heap - before.heap) / f64::from(CONNECTIONS))
}

impl Footprint {
    fn markdown(&self) -> String {
        let mut text = format!(
            "| resident memory, MiB | idle | peak of {volumes} publishes, {MANY} at a time | {} s after them |\n\
             |---|---|---|---|\n",
            AT_REST.as_secs(),
            volumes = self.volumes,
        );
        let rows: [Row; 8] = [
            ("code that has run lately, of program and libraries", |r| {
                r.code
            }),
            ("their constants", |r| r.constants),
            ("their variables", |r| r.variables),
            (
                "heap: connections, content under way, what is remembered",
                |r| r.heap,
            ),
            ("stacks of threads", |r| r.stacks),
            ("pages that the kernel maps into each process", |r| r.other),
            ("**sum**", Resident::sum),
            ("page tables and stacks in the kernel, beside it", |r| {
                r.kernel
            }),
        ];
        for (name, value) in rows {
            let [idle, peak, after] =
                [&self.idle, &self.peak, &self.after].map(|resident| value(resident) / 1024.0);
            let _infallible = writeln!(text, "| {name} | {idle:.2} | {peak:.2} | {after:.2} |");
        }
        let grown = (self.after.heap - self.idle.heap) / count(self.volumes);
        let _infallible = write!(
            text,
            "\nA connection to the CSI socket takes {:.1} KiB of the heap, and a published volume {grown:.1} KiB.",
            self.connection
        );
        text
    }
}

fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A debug build and few volumes: it shows that all of it can be measured, and takes seconds.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn memory_has_a_cause_at_each_time() {
        let binaries = Binaries::find(|_| {}).unwrap();
        let footprint = measure(20, &binaries).await.unwrap();
        for resident in [footprint.idle, footprint.peak, footprint.after] {
            assert!(resident.heap > 0.0 && resident.code > 0.0, "{footprint:?}");
            assert!(
                resident.stacks > 0.0 && resident.kernel > 0.0,
                "{footprint:?}"
            );
        }
        assert!(footprint.peak.sum() >= footprint.idle.sum());
        assert_eq!(footprint.markdown().lines().count(), 12);
    }
}
