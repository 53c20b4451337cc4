//! The demo, and the processes of the embedded cluster that are run from the same executable.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use e2e::embedded::node;

#[derive(Parser)]
#[command(version, about = "The Secrets Store CSI driver, end to end")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A node of the embedded cluster.
    #[command(hide = true)]
    Node(node::Args),
    /// A container of an embedded node.
    #[command(hide = true)]
    Container(node::ContainerArgs),
}

// Not `tokio::main`: a node enters its namespaces while it has one thread.
fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Node(args) => {
            log_to_stderr();
            node::run(&args)
        }
        Command::Container(args) => Err(node::run_container(&args)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn log_to_stderr() {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
}
