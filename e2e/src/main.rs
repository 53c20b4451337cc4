//! The command `e2e`: the demo and the budgets. The nodes of the embedded cluster run from the same
//! executable.

// Beside this file they would be modules of the library.
#[path = "main/arguments.rs"]
mod arguments;
#[path = "main/interrupt.rs"]
mod interrupt;

use std::any::Any;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use arguments::{count, interval, is_real, minutes, seconds};
use clap::{Parser, Subcommand};
use e2e::binaries::Binaries;
use e2e::providers::{self, Provider};
use e2e::{budget, chaos, comparison, demo, footprint, isolated, load, local, scale, soak, stores};
use interrupt::NoVerdict;

/// Run the Secrets Store CSI driver end to end. Without a command, run the demo.
///
/// The executables of this workspace are built first, with `cargo build`, where they are stale. With
/// E2E_BIN_DIR=DIRECTORY those in the directory are used, and nothing is built, but for the images that
/// `chaos` installs with E2E_CLUSTER=local.
///
/// Ctrl-C and SIGTERM end and remove what a command has started.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Mount a pod's secrets on an embedded cluster, show them, and tear everything down.
    Demo,
    /// Measure the release build of the driver against its budgets, and fail when it exceeds one.
    Budget,
    /// Show where the memory of the release build of the driver is: at rest, at the peak of many publishes,
    /// and after them.
    Footprint {
        /// The number of volumes.
        #[arg(long, default_value_t = 1000, value_parser = count())]
        volumes: usize,
        /// The directory whose sizing.md gets the table.
        #[arg(long)]
        docs: Option<PathBuf>,
    },
    /// Put load on the release build of the driver, and fail when time or memory exceeds its bound.
    Load {
        /// The number of rotations of 200 volumes.
        #[arg(long, default_value_t = 200, value_parser = count())]
        rotations: usize,
    },
    /// Run for long, draw memory, descriptors, threads and latency over time, and fail when one grows.
    Soak {
        /// The length of the run.
        #[arg(long, default_value_t = 60)]
        minutes: u64,
        /// The file of the chart.
        #[arg(long, default_value = "target/soak.svg")]
        chart: PathBuf,
    },
    /// Measure this driver and the existing one side by side: the same calls to both, in turn. Needs root
    /// and the Kubernetes binaries, unless E2E_CLUSTER=embedded.
    Bench {
        /// The number of rounds; each measures both drivers.
        #[arg(long, default_value_t = 5, value_parser = count())]
        rounds: usize,
        /// The seconds between the publish of volumes and the look at them.
        #[arg(long, default_value = "62", value_parser = seconds)]
        rest: Duration,
        /// The number of volumes that are published one at a time, and at 110 at once.
        #[arg(long, default_value_t = 110, value_parser = count())]
        volumes: usize,
        /// The directory into which benchmarks.md, .json and .svg are written.
        #[arg(long)]
        docs: Option<PathBuf>,
    },
    /// Run many drivers in front of one API server in kubelet's rhythm: at rest, in a rolling update, when
    /// all nodes boot, when the API server or the provider is away. E2E_CLUSTER=local takes a real API
    /// server.
    Scale(Scale),
    /// Tear down a local cluster when the process that started this one is gone.
    #[command(hide = true)]
    Guard,
    /// Let faults of all kinds strike an embedded cluster, or with E2E_CLUSTER=local real Kubernetes on
    /// this machine, and check all the time that the driver keeps its promises. Exits with 1 when it
    /// does not, and with 2 when the run itself could not be made.
    Chaos {
        /// The seed that decides what happens when; by default one that no run had.
        #[arg(long)]
        seed: Option<u64>,
        /// The minutes after which no further round begins.
        #[arg(long, default_value = "1", value_parser = minutes)]
        minutes: f64,
        /// Run the schedule in this file, as a run printed it, instead of one of a seed.
        #[arg(long, value_name = "FILE")]
        schedule: Option<PathBuf>,
        /// The number of runs that make a schedule smaller that failed.
        #[arg(long, default_value_t = 8)]
        reduce: usize,
        /// Print the schedule and end.
        #[arg(long)]
        dry_run: bool,
        /// Print the timeline of a good run, too.
        #[arg(long)]
        verbose: bool,
    },
    /// Run provider-check against the real providers in the folder that $E2E_PROVIDERS names.
    CheckProviders {
        /// Check only the providers of these names.
        names: Vec<String>,
    },
    /// Serve fakes of the stores of real providers, on the loopback.
    Stores {
        /// The directory of the certificate and of the socket for commands.
        directory: PathBuf,
        /// Send a command in JSON to the stores that serve this directory, and print the answer, for
        /// example '{"command": "put", "service": "vault", "name": "password", "value": "hunter2"}'.
        /// The documentation of `e2e::stores::Command` has all commands.
        #[arg(long, value_name = "COMMAND")]
        send: Option<String>,
    },
}

#[derive(clap::Args)]
struct Scale {
    /// The number of nodes, each of which is a process of the driver.
    #[arg(long, default_value_t = 300, value_parser = count())]
    nodes: usize,
    /// The number of volumes of each node.
    #[arg(long, default_value_t = 30, value_parser = count())]
    volumes: usize,
    /// The number of classes among which the volumes of each node are divided; each node reads each of them.
    #[arg(long, default_value_t = 1, value_parser = count())]
    classes: usize,
    /// The seconds of the phases without disturbance.
    #[arg(long, default_value = "180", value_parser = seconds)]
    rest: Duration,
    /// The seconds after a change or an outage.
    #[arg(long, default_value = "120", value_parser = seconds)]
    after: Duration,
    /// The seconds for which the API server, and then the provider, is away.
    #[arg(long, default_value = "120", value_parser = seconds)]
    away: Duration,
    /// The seconds between two looks of kubelet at a volume; at most half as much more.
    #[arg(long, default_value = "60", value_parser = interval)]
    look: Duration,
    /// The seconds of the interval of refreshes.
    #[arg(long, default_value = "120", value_parser = interval)]
    interval: Duration,
    /// The number of nodes that a rolling update takes at a time; by default a tenth.
    #[arg(long, value_parser = count())]
    at_once: Option<usize>,
    /// The directory into which scale.md, .json and .svg are written.
    #[arg(long)]
    docs: Option<PathBuf>,
}

impl Scale {
    fn into_options(self) -> e2e::cluster::Result<scale::Options> {
        if self.classes > self.volumes {
            let more =
                "--classes may not be more than --volumes, or some class would have no volume";
            return Err(e2e::cluster::Error::Impossible(more.to_owned()));
        }
        Ok(scale::Options {
            nodes: self.nodes,
            volumes: self.volumes,
            classes: self.classes,
            look: self.look,
            interval: self.interval,
            rest: self.rest,
            after: self.after,
            away: self.away,
            at_once: self.at_once.unwrap_or(self.nodes / 10).max(1),
            real: is_real(false)?,
            docs: self.docs,
        })
    }
}

// Not `tokio::main`: a node enters its namespaces while it has one thread.
fn main() -> ExitCode {
    embedded::take_over();
    isolated::take_over();
    until_nobody_reads(command)
}

/// The exit code that shells give a program whose reader has gone: 128 and the number of SIGPIPE.
const NOBODY_READS: u8 = 141;

/// Ends the work when nobody reads its output any more, as in `e2e | head`. `println!` panics then; this
/// panic is not reported, and takes down what runs, such as a cluster.
fn until_nobody_reads(work: fn() -> ExitCode) -> ExitCode {
    fn is_about_that(panic: &dyn Any) -> bool {
        let text = panic.downcast_ref::<String>();
        text.is_some_and(|text| {
            text.starts_with("failed printing to stdout") && text.contains("Broken pipe")
        })
    }
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !is_about_that(panic.payload()) {
            report(panic);
        }
    }));
    match std::panic::catch_unwind(work) {
        Ok(code) => code,
        Err(panic) if is_about_that(&*panic) => NOBODY_READS.into(),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn command() -> ExitCode {
    let outcome = match Cli::parse().command.unwrap_or(Command::Demo) {
        Command::Demo => interrupt::run(demo::run()),
        Command::Budget => interrupt::run(budget::run()),
        Command::Footprint { volumes, docs } => {
            interrupt::run(run_footprint(footprint::Options { volumes, docs }))
        }
        Command::Load { rotations } => interrupt::run(load::run(rotations)),
        Command::Soak { minutes, chart } => interrupt::run(soak::run(minutes, &chart)),
        Command::Bench {
            rounds,
            rest,
            volumes,
            docs,
        } => interrupt::run(bench(rounds, rest, volumes, docs)),
        Command::Scale(options) => interrupt::run(run_scale(options)),
        Command::Guard => local::guard().map_err(Into::into),
        Command::Chaos {
            seed,
            minutes,
            schedule,
            reduce,
            dry_run,
            verbose,
        } => match chaos_options(seed, minutes, schedule, reduce, verbose) {
            Ok((_, options)) if dry_run => {
                println!("{}", options.schedule);
                Ok(())
            }
            Ok((site, options)) => interrupt::run(run_chaos(site, options)),
            Err(error) => Err(NoVerdict(error).into()),
        },
        Command::CheckProviders { names } => interrupt::run(check_providers(names)),
        Command::Stores { directory, send } => interrupt::run(run_stores(directory, send)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            interrupt::exit_code(&*error)
        }
    }
}

type Outcome = Result<(), Box<dyn std::error::Error>>;

async fn bench(rounds: usize, rest: Duration, volumes: usize, docs: Option<PathBuf>) -> Outcome {
    let options = comparison::Options {
        rounds,
        rest,
        volumes,
        real: is_real(true)?,
        existing: true,
        docs,
    };
    Ok(comparison::run(&options).await?)
}

async fn run_footprint(options: footprint::Options) -> Outcome {
    Ok(footprint::run(&options).await?)
}

async fn run_scale(options: Scale) -> Outcome {
    Ok(scale::run(&options.into_options()?).await?)
}

fn chaos_options(
    seed: Option<u64>,
    minutes: f64,
    schedule: Option<PathBuf>,
    reductions: usize,
    verbose: bool,
) -> Result<(chaos::Site, chaos::Options), Box<dyn std::error::Error>> {
    let site = chaos::Site::from_env()?;
    let schedule = match schedule {
        Some(path) => {
            let schedule = chaos::Schedule::read(&path);
            schedule.map_err(|error| format!("{}: {error}", path.display()))?
        }
        None => {
            let seed = seed.unwrap_or_else(chaos::fresh_seed);
            chaos::Schedule::of_minutes(seed, minutes, site.nodes())
        }
    };
    let options = chaos::Options {
        schedule,
        limit: Duration::from_secs_f64(minutes * 60.0),
        reductions,
        verbose,
    };
    Ok((site, options))
}

async fn run_chaos(site: chaos::Site, options: chaos::Options) -> Outcome {
    let is_good = chaos::run(site, &options).await;
    match is_good.map_err(|error| NoVerdict(error.into()))? {
        true => Ok(()),
        false => Err("the driver broke a promise, see above".into()),
    }
}

async fn check_providers(names: Vec<String>) -> Outcome {
    let known = Provider::ALL.map(Provider::name);
    if let Some(unknown) = names.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(format!(
            "there is no provider {unknown:?}; known are {}",
            known.join(", ")
        )
        .into());
    }
    let binaries = tokio::task::spawn_blocking(|| Binaries::find(|_| {})).await??;
    let mut failed = Vec::new();
    for provider in Provider::ALL {
        if names.is_empty() || names.iter().any(|name| name == provider.name()) {
            let checked = providers::check(&binaries, provider).await?;
            println!("{}\n{}", provider.name(), checked.report);
            if !checked.passed {
                failed.push(provider.name());
            }
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => Err(format!("checks of {} failed, see above", failed.join(", ")).into()),
    }
}

async fn run_stores(directory: PathBuf, send: Option<String>) -> Outcome {
    if let Some(command) = send {
        let command = serde_json::from_str(&command)
            .map_err(|error| format!("the command: {error}; see e2e stores --help"))?;
        let answer = stores::send(&directory, &command)
            .await
            .map_err(|error| format!("the stores of {}: {error}", directory.display()))?;
        println!("{}", serde_json::to_string(&answer)?);
        return Ok(());
    }
    let (vault, proxy) = (stores::VAULT_PORT, stores::PROXY_PORT);
    stores::Stores::start(&directory, vault, proxy)
        .await?
        .run()
        .await;
    Ok(())
}
