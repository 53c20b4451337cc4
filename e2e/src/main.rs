//! The demo, the budgets, and the processes of the embedded cluster that are run from the same
//! executable.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use e2e::embedded::node;
use e2e::{budget, demo};

/// The Secrets Store CSI driver, end to end. Without a command: the demo.
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
    /// Measure the driver against its budgets; fails when it is over one.
    Budget,
    /// A node of the embedded cluster.
    #[command(hide = true)]
    Node(node::Args),
    /// A container of an embedded node.
    #[command(hide = true)]
    Container(node::ContainerArgs),
}

// Not `tokio::main`: a node enters its namespaces while it has one thread.
fn main() -> ExitCode {
    let outcome = match Cli::parse().command.unwrap_or(Command::Demo) {
        Command::Demo => in_runtime(demo::run()),
        Command::Budget => in_runtime(budget::run()),
        Command::Node(args) => {
            log_to_stderr();
            node::run(&args).map_err(Into::into)
        }
        Command::Container(args) => Err(node::run_container(&args).into()),
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

fn log_to_stderr() {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
}
