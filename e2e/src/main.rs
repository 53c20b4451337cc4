//! The command `e2e`: the demo and the budgets. The nodes of the embedded cluster run from the same
//! executable.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use e2e::{budget, demo};

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
}

// Not `tokio::main`: a node enters its namespaces while it has one thread.
fn main() -> ExitCode {
    embedded::take_over();
    let outcome = match Cli::parse().command.unwrap_or(Command::Demo) {
        Command::Demo => in_runtime(demo::run()),
        Command::Budget => in_runtime(budget::run()),
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

fn in_runtime(work: impl Future<Output = e2e::cluster::Result<()>>) -> Outcome {
    let runtime = tokio::runtime::Runtime::new()?;
    Ok(runtime.block_on(work)?)
}
