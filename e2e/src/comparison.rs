//! Measures this driver and the existing one side by side: the same calls to both, in turn, in front of
//! the same API server and the same provider. What `e2e bench` runs.

mod chart;
mod measure;
mod report;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::bench::{ControlPlane, Provider, Run, binaries, failed};
use crate::binaries::Binaries;
use crate::cluster::Result;
use crate::previous::upstream_driver;
use measure::Measurement;
use report::{Figures, Report};

/// The settings of a comparison.
#[derive(Clone, Debug)]
pub struct Options {
    /// The number of rounds. Each measures one driver after the other.
    pub rounds: usize,
    /// The time between the publish of volumes and the look at them. kubelet's is 60 to 90 seconds.
    pub rest: Duration,
    /// The number of volumes that are published one at a time; the other numbers follow from it.
    pub volumes: usize,
    /// Whether the API server is a real one, which needs root and the Kubernetes binaries.
    pub real: bool,
    /// Whether the existing driver is measured, too, if there is one.
    pub existing: bool,
    /// The directory of the documentation into which the report is written, if it is.
    pub docs: Option<PathBuf>,
}

/// A driver that is measured.
struct Subject {
    name: &'static str,
    version: String,
    program: PathBuf,
}

/// Measures, and prints the report.
///
/// # Errors
/// When a driver does not do what is measured, or the report cannot be written.
pub async fn run(options: &Options) -> Result<()> {
    let built = tokio::task::spawn_blocking(binaries).await;
    let binaries = built
        .map_err(|error| failed("build", &error))?
        .map_err(|error| failed("build", &error))?;
    let report = measure(options, &binaries).await?;
    println!("{}", report.markdown());
    match &options.docs {
        Some(docs) => report.write(docs),
        None => Ok(()),
    }
}

async fn measure(options: &Options, binaries: &Binaries) -> Result<Report> {
    let subjects = subjects(binaries, options.existing);
    // Short, because the paths of sockets below it may have 107 bytes at most.
    let directory = tempfile::Builder::new()
        .prefix("bench-")
        .tempdir()
        .map_err(|error| failed("a directory", &error))?;
    let plane = ControlPlane::start(options.real, binaries, directory.path()).await?;
    let run = Run::now(cluster(&plane).await?);
    let providers = directory.path().join("providers");
    let provider = Provider::start(&binaries.fake_provider, &providers).await?;
    let mut figures: Vec<Figures> = subjects.iter().map(|_| Figures::default()).collect();
    for round in 0..options.rounds {
        let mut order: Vec<usize> = (0..subjects.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for number in order {
            let subject = &subjects[number];
            eprintln!(
                "round {} of {}: {}",
                round + 1,
                options.rounds,
                subject.name
            );
            let measurement = Measurement {
                options,
                plane: &plane,
                provider: &provider,
                settings: settings(binaries, subject, &plane, directory.path(), round),
            };
            let measured = measurement.run().await;
            figures[number].add(measured.map_err(|error| failed(subject.name, &error))?);
        }
    }
    let subjects = subjects
        .into_iter()
        .map(|subject| (subject.name, subject.version))
        .zip(figures)
        .collect();
    Ok(Report {
        run,
        rounds: options.rounds,
        subjects,
    })
}

/// Returns ours and, if it is there and asked for, the existing driver.
fn subjects(binaries: &Binaries, existing: bool) -> Vec<Subject> {
    let subject = |name, program: PathBuf| Subject {
        name,
        version: version(&program),
        program,
    };
    let mut subjects = vec![subject("this driver", binaries.driver.clone())];
    let other = upstream_driver();
    if existing && other.is_file() {
        subjects.push(subject("existing driver", other));
    } else if existing {
        eprintln!(
            "the existing driver is not measured: there is no {}",
            other.display()
        );
    }
    subjects
}

/// Returns the version that a driver prints.
fn version(program: &Path) -> String {
    let printed = Command::new(program).arg("--version").output();
    let printed = printed.map(|output| output.stdout).unwrap_or_default();
    let info: serde_json::Value = serde_json::from_slice(&printed).unwrap_or_default();
    info["BuildVersion"].as_str().unwrap_or("?").to_owned()
}

/// Returns the version of a real API server.
async fn cluster(plane: &ControlPlane) -> Result<String> {
    if plane.name() == "embedded" {
        return Ok("the embedded API server".to_owned());
    }
    let version = plane.client().apiserver_version().await;
    let version = version.map_err(|error| failed("the API server's version", &error))?;
    Ok(format!("Kubernetes {} with etcd", version.git_version))
}

fn settings(
    binaries: &Binaries,
    subject: &Subject,
    plane: &ControlPlane,
    directory: &Path,
    round: usize,
) -> crate::bench::Settings {
    let name = format!("{}-{round}", subject.name.replace(' ', "-"));
    let flags = [
        "--enable-secret-rotation=true",
        "--rotation-poll-interval=1h",
    ];
    crate::bench::Settings {
        e2e: binaries.e2e.clone(),
        driver: subject.program.clone(),
        directory: directory.join(&name),
        name,
        kubeconfig: plane.kubeconfig().to_owned(),
        providers: directory.join("providers"),
        flags: flags.map(str::to_owned).to_vec(),
    }
}

#[cfg(test)]
mod tests;
