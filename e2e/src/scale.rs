//! Many real driver processes in front of one API server, called in kubelet's rhythm: what the API server
//! and the provider get to do when nothing happens, when something happens everywhere at once, and when
//! one of them is away. What `e2e scale` runs.

mod chart;
mod fleet;
mod kubelet;
mod record;
mod report;
mod sampler;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::bench::{Site, built, class, failed};
use crate::binaries::Binaries;
use crate::cluster::Result;
use fleet::Fleet;
use report::Report;

/// The annotation of a class that sets the interval of refreshes.
const INTERVAL: &str = "secrets-store.csi.k8s.io/rotation-poll-interval";
/// The file whose content changes.
const FILE: &str = "one";

/// The settings of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The number of nodes.
    pub nodes: usize,
    /// The number of volumes of each node.
    pub volumes: usize,
    /// The number of classes, of which each node mounts all as far as it has volumes.
    pub classes: usize,
    /// The shortest time between two looks of kubelet at a volume; the longest is half as much more.
    pub look: Duration,
    /// The interval of refreshes.
    pub interval: Duration,
    /// The length of the phases without disturbance.
    pub rest: Duration,
    /// The shortest time of the phases after a change and after an outage.
    pub after: Duration,
    /// The time for which the API server, and then the provider, is away.
    pub away: Duration,
    /// The number of nodes that a rolling update takes at a time.
    pub at_once: usize,
    /// Whether the API server is a real one, which needs root and the Kubernetes binaries.
    pub real: bool,
    /// The directory of the documentation into which the report is written, if it is.
    pub docs: Option<PathBuf>,
}

/// Runs all phases, and prints the report.
///
/// # Errors
/// When a driver does not start, a volume has not the newest content at the end of a phase in which it
/// should, or the report cannot be written.
pub async fn run(options: &Options) -> Result<()> {
    if let Some(docs) = &options.docs {
        Report::check(docs)?;
    }
    let report = measure(options, &built().await?).await?;
    println!("{}", report.markdown());
    match &options.docs {
        Some(docs) => report.write(docs),
        None => Ok(()),
    }
}

async fn measure(options: &Options, binaries: &Binaries) -> Result<Report> {
    allow_open_files()?;
    let Site {
        run,
        plane,
        directory,
    } = Site::prepare(options.real, binaries).await?;
    let mut scale = Scale {
        fleet: Fleet::prepare(options, binaries, plane, directory.path()).await?,
        options,
        content: 0,
    };
    scale.phases().await?;
    let record = scale.fleet.end().await?;
    Ok(Report::of(run, options, &record))
}

struct Scale<'a> {
    options: &'a Options,
    fleet: Fleet,
    content: usize,
}

impl Scale<'_> {
    async fn phases(&mut self) -> Result<()> {
        let Options {
            rest, after, away, ..
        } = *self.options;
        self.apply(&json!({})).await?;

        self.fleet.begin("first start of all nodes").await?;
        self.fleet.start().await?;
        self.fleet.all_published().await?;

        // Volumes that were published together are looked at, and due, at different times then.
        self.fleet.begin("settling").await?;
        tokio::time::sleep(self.settled()).await;
        self.fleet.begin("at rest").await?;
        tokio::time::sleep(rest).await;

        self.fleet.begin("class of all pods edited").await?;
        self.edit_and_wait("class of all pods edited").await?;

        self.fleet.begin("rolling update").await?;
        self.fleet.roll(self.options.at_once).await?;
        self.fleet.check(&self.content.to_string())?;

        self.fleet.begin("all nodes boot").await?;
        self.fleet.cut_power().await?;
        self.fleet.start().await?;
        self.fleet.all_published().await?;
        self.fleet.begin("after the boot").await?;
        tokio::time::sleep(after).await;

        self.fleet.begin("API server away").await?;
        self.fleet.plane().take_away()?;
        tokio::time::sleep(away).await;
        self.fleet.begin("API server back").await?;
        self.fleet.plane().bring_back()?;
        tokio::time::sleep(after).await;

        self.fleet.begin("provider away").await?;
        self.fleet.provider().await.take_away().await?;
        tokio::time::sleep(away).await;
        self.fleet.begin("provider back").await?;
        self.fleet.provider().await.bring_back().await?;
        tokio::time::sleep(after).await;

        self.fleet.begin("an hour's interval, settling").await?;
        self.edit_and_wait("class edited after the outages").await?;
        self.apply(&json!({INTERVAL: "1h"})).await?;
        tokio::time::sleep(self.settled()).await;
        self.fleet.begin("at rest, an hour's interval").await?;
        tokio::time::sleep(rest).await;
        Ok(())
    }

    /// Returns the time in which each volume was looked at, and refreshed, at its own time.
    fn settled(&self) -> Duration {
        self.options.look * 3 / 2 + self.options.interval / 2
    }

    /// Gives the classes another content; returns when all volumes have it, and not before `after`.
    async fn edit_and_wait(&mut self, what: &str) -> Result<()> {
        self.content += 1;
        let started = Instant::now();
        self.apply(&json!({})).await?;
        let content = self.content.to_string();
        self.fleet.wait_content(&content, what).await?;
        let rest = self.options.after.saturating_sub(started.elapsed());
        tokio::time::sleep(rest).await;
        Ok(())
    }

    async fn apply(&self, annotations: &Value) -> Result<()> {
        let objects = format!(
            "array:\n- {{objectName: {FILE}, content: \"{}\"}}\n- {{objectName: two, contentSize: 4096}}\n",
            self.content
        );
        let parameters = json!({"objects": objects});
        let namespace = self.fleet.plane().namespace();
        for number in 0..self.options.classes {
            let class = class(&class_name(number), &parameters, annotations);
            namespace.apply(&class.to_string()).await?;
        }
        Ok(())
    }
}

/// Returns the name of one of the classes.
fn class_name(number: usize) -> String {
    format!("scale-{number}")
}

/// Raises the limit of open files: this process has several for each node, and usually may have 1,024.
fn allow_open_files() -> Result<()> {
    let limit = Resource::RLIMIT_NOFILE;
    let raised = getrlimit(limit).and_then(|(_, most)| setrlimit(limit, most, most));
    raised.map_err(|error| failed("the limit of open files", &error))
}

/// Returns how long it takes since an instant, in seconds.
fn seconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests;
