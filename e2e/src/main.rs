//! The command `e2e`: the demo and the budgets. The nodes of the embedded cluster run from the same
//! executable.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use e2e::binaries::Binaries;
use e2e::providers::{self, Provider};
use e2e::{budget, demo, load, soak, stores};

/// Run the Secrets Store CSI driver end to end. Without a command, run the demo.
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
    /// Put load on the release build of the driver, and fail when time or memory exceeds its bound.
    Load {
        /// The number of rotations of 200 volumes.
        #[arg(long, default_value_t = 200)]
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
    /// Run provider-check against the real providers in the folder that $E2E_PROVIDERS names.
    CheckProviders {
        /// Check only the providers of these names.
        names: Vec<String>,
    },
    /// Serve fakes of the stores of real providers, on the loopback.
    Stores {
        /// The directory of the certificate and of the socket for commands.
        directory: PathBuf,
        /// Send a command in JSON to the stores that serve this directory, and print the answer.
        #[arg(long, value_name = "COMMAND")]
        send: Option<String>,
    },
}

// Not `tokio::main`: a node enters its namespaces while it has one thread.
fn main() -> ExitCode {
    embedded::take_over();
    let outcome = match Cli::parse().command.unwrap_or(Command::Demo) {
        Command::Demo => in_runtime(demo::run()),
        Command::Budget => in_runtime(budget::run()),
        Command::Load { rotations } => in_runtime(load::run(rotations)),
        Command::Soak { minutes, chart } => in_runtime(soak::run(minutes, &chart)),
        Command::CheckProviders { names } => in_runtime(check_providers(names)),
        Command::Stores { directory, send } => in_runtime(run_stores(directory, send)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn in_runtime<E>(work: impl Future<Output = Result<(), E>>) -> Outcome
where
    Box<dyn std::error::Error>: From<E>,
{
    let runtime = tokio::runtime::Runtime::new()?;
    Ok(runtime.block_on(work)?)
}

async fn check_providers(names: Vec<String>) -> Outcome {
    let binaries = tokio::task::spawn_blocking(|| Binaries::find(|_| {})).await??;
    for provider in Provider::ALL {
        if names.is_empty() || names.iter().any(|name| name == provider.name()) {
            let report = providers::check(&binaries, provider).await?;
            println!("{}\n{report}", provider.name());
        }
    }
    Ok(())
}

async fn run_stores(directory: PathBuf, send: Option<String>) -> Outcome {
    if let Some(command) = send {
        let answer = stores::send(&directory, &serde_json::from_str(&command)?).await?;
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
