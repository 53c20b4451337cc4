//! Starts and stops the local cluster by hand:
//!
//! - `local up` starts it, prints how to use it, and tears it down when interrupted;
//! - `local down` tears down what a killed run left; it waits for a cluster that still runs;
//! - `local guard` is started by tests: it tears down when they are gone.

use std::process::ExitCode;

use e2e::cluster::Error;
use e2e::local::{self, Options, Running};
use nix::sys::signal::{SigSet, Signal};

const USAGE: &str = "usage: local up | local down

  up     starts the local cluster, prints how to use it, and tears it down when interrupted
  down   tears down what a killed run left; waits for a cluster that still runs, and says for which
         process when that takes longer than 5 s

`up` first builds the images of driver and provider with `cargo build`. docs/testing.md says what has to
be installed.";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args[..] {
        ["up"] => up(),
        ["down"] => local::tear_down(|holder| eprintln!("{}", waiting(holder))),
        ["help" | "-h" | "--help"] => {
            println!("{USAGE}");
            Ok(())
        }
        ["guard"] => local::guard(),
        _ => Err(Error::Impossible(USAGE.to_owned())),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns what is said of the process that runs a cluster.
fn waiting(holder: Option<u32>) -> String {
    let process = holder.map_or_else(
        || "another process".to_owned(),
        |pid| format!("the process {pid}"),
    );
    format!(
        "waiting for the end of a local cluster that {process} runs; end that process, or this wait with Ctrl-C"
    )
}

fn up() -> Result<(), Error> {
    let failed = |error: &dyn std::fmt::Display| Error::Start(error.to_string());
    // Blocked before there is a second thread, so that no thread is killed by them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().map_err(|error| failed(&error))?;
    let guard = std::env::current_exe().map_err(|error| failed(&error))?;
    let options = Options::standard(|_| {}, guard)?;
    let running = Running::start(&options, |step| eprintln!("{step}"))?;
    println!("export KUBECONFIG={}", running.kubeconfig().display());
    println!("logs are in {}; Ctrl-C ends it", running.logs().display());
    signals.wait().map_err(|error| failed(&error))?;
    Ok(())
}
