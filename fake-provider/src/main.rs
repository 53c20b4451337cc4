//! The program `fake-provider`: command line, log and signals around [`fake_provider::fake`].

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use fake_provider::fake::{Error, Options, serve, socket_of_endpoint, socket_of_name};
use fake_provider::server::termination;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

/// Serves made-up secrets to the Secrets Store CSI driver, for tests and demos.
#[derive(Debug, Parser)]
#[command(args_override_self = true)]
struct Arguments {
    /// The socket to serve on
    #[arg(long, default_value = "unix:///tmp/e2e-provider.sock")]
    endpoint: String,

    /// Serve on <DIR>/<NAME>.sock instead
    #[arg(long, requires = "name", conflicts_with = "endpoint")]
    dir: Option<PathBuf>,

    /// The provider's name, as in spec.provider of a SecretProviderClass
    #[arg(long, requires = "dir")]
    name: Option<String>,

    /// The address to serve HTTP at: host:port, or :port for all addresses; empty for no HTTP
    #[arg(long, default_value = ":8080")]
    http_addr: String,

    /// The objects to serve: a YAML file, or a directory in which each file is an object
    #[arg(long)]
    objects: Option<PathBuf>,

    /// The audiences, separated by commas, for which each Mount must bring a token
    #[arg(long, env = "VALIDATE_TOKENS_AUDIENCE", default_value = "")]
    token_audiences: String,

    /// Log each call, not only failed ones; the number is for compatibility
    #[arg(short, num_args = 0..=1, default_value_t = 0, default_missing_value = "1")]
    verbosity: u8,
}

impl Arguments {
    fn into_options(self) -> Result<Options, Error> {
        let socket = match (self.dir, self.name) {
            (Some(dir), Some(name)) => socket_of_name(&dir, &name)?,
            _ => socket_of_endpoint(&self.endpoint)?,
        };
        Ok(Options {
            socket,
            http_addr: Some(self.http_addr).filter(|addr| !addr.is_empty()),
            objects: self.objects,
            token_audiences: self.token_audiences,
        })
    }
}

#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    start_logging(arguments.verbosity);
    match run(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let options = arguments.into_options()?;
    let terminated = termination()?;
    let stop = CancellationToken::new();
    let serving = serve(options, stop.clone());
    let on_signal = async {
        terminated.await;
        stop.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = serving => Ok(ended?),
        () = on_signal => Ok(()),
    }
}

/// Logs to standard error, and only this crate's messages: h2 and hyper would log headers.
fn start_logging(verbosity: u8) {
    let level = if verbosity == 0 {
        LevelFilter::INFO
    } else {
        LevelFilter::DEBUG
    };
    let ours = Targets::new().with_target("fake_provider", level);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(false);
    tracing_subscriber::registry()
        .with(lines.with_filter(ours))
        .init();
}
