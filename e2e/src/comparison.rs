//! Measures this driver and the existing one side by side: the same calls to both, in turn, in front of
//! the same API server and the same provider. What `e2e bench` runs.

mod attempts;
mod chart;
mod floor;
mod measure;
mod report;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::bench::{Provider, Site, built, failed};
use crate::binaries::Binaries;
use crate::cluster::Result;
use crate::previous::upstream_driver;
use attempts::Round;
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

/// Measures, prints the report, and writes it. A driver's call that fails is counted and made again; where
/// a round ends early, what it has measured counts.
///
/// # Errors
/// When a driver could not be measured to the end of each round, after the report was written; when one
/// could not be measured at all, or the report cannot be written.
pub async fn run(options: &Options) -> Result<()> {
    if let Some(docs) = &options.docs {
        Report::check(docs)?;
    }
    let (report, broken) = measure(options, &built().await?).await?;
    println!("{}", report.markdown());
    if let Some(docs) = &options.docs {
        report.write(docs)?;
    }
    match broken {
        0 => Ok(()),
        _ => Err(failed(
            "rounds",
            &format!("{broken} ended early, see above"),
        )),
    }
}

/// Returns the report, and the number of rounds that ended early.
async fn measure(options: &Options, binaries: &Binaries) -> Result<(Report, usize)> {
    let subjects = subjects(binaries, options.existing);
    let site = Site::prepare(options.real, binaries).await?;
    let providers = site.directory.path().join("providers");
    let provider = Provider::start(&binaries.fake_provider, &providers).await?;
    let mut figures: Vec<Figures> = subjects.iter().map(|_| Figures::default()).collect();
    let (mut notes, mut broken) = (Vec::new(), 0);
    for round in 0..options.rounds {
        let mut order: Vec<usize> = (0..subjects.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for number in order {
            let subject = &subjects[number];
            let title = format!(
                "round {} of {}, {}",
                round + 1,
                options.rounds,
                subject.name
            );
            eprintln!("{title}");
            let measurement = Measurement {
                options,
                plane: &site.plane,
                provider: &provider,
                settings: settings(binaries, subject, &site, round),
            };
            let mut measured = Round::default();
            let mut ended = measurement.run(&mut measured).await;
            ended = ended.and(measurement.delete_pods().await);
            if let Err(error) = ended {
                broken += 1;
                measured.notes.push(format!("it ended early: {error}"));
            }
            measured.finish();
            for note in measured.notes {
                eprintln!("  {note}");
                notes.push(format!("{title}: {note}"));
            }
            figures[number].add(measured.figures);
        }
    }
    if let Some(number) = figures.iter().position(Figures::is_empty) {
        return Err(failed(subjects[number].name, &notes.join("; ")));
    }
    let subjects = subjects
        .into_iter()
        .map(|subject| (subject.name, subject.version))
        .zip(figures)
        .collect();
    let report = Report {
        run: site.run,
        rounds: options.rounds,
        subjects,
        notes,
    };
    Ok((report, broken))
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

fn settings(
    binaries: &Binaries,
    subject: &Subject,
    site: &Site,
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
        directory: site.directory.path().join(&name),
        name,
        kubeconfig: site.plane.kubeconfig().to_owned(),
        providers: site.directory.path().join("providers"),
        flags: flags.map(str::to_owned).to_vec(),
    }
}

#[cfg(test)]
mod tests;
