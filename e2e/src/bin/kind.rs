//! Starts and stops the kind cluster by hand:
//!
//! - `e2e-kind up` makes it and installs into it; `kind export kubeconfig --name e2e` gives access;
//! - `e2e-kind down` deletes it, its network and the rule that keeps packets on this machine;
//! - `e2e-kind guard` is started by tests: it deletes the cluster when they are gone.

use std::process::ExitCode;

use e2e::cluster::Error;
use e2e::images;
use e2e::install::Form;
use e2e::kind::{self, Load, Options, Running};

const USAGE: &str = "usage: e2e-kind up | e2e-kind down";

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args[..] {
        ["up"] => up().await,
        ["down"] => kind::tear_down().await,
        ["guard"] => kind::guard().await,
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

async fn up() -> Result<(), Error> {
    let images = images::build(|_| {}).map_err(|error| Error::Start(error.to_string()))?;
    let load = Load::standard(&images, &Form::from_env())?;
    let started = Running::start(Options::from_env()?, &load, |step| eprintln!("{step}")).await?;
    println!("kind export kubeconfig --name e2e");
    // Without a guard, the cluster stays.
    drop(started);
    Ok(())
}
