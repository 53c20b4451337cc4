//! The binary: flags, logging, the runtime, signals and the exit code.

use std::{process::ExitCode, time::Duration};

use driver::config::Config;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Threads for file system work. The async part needs one: disk and peers decide the pace.
const BLOCKING_THREADS: usize = 4;

/// How many files the driver may have open.
const MOST_DESCRIPTORS: u64 = 65_536;

/// How often memory that a burst of publishes took is given back to the system.
const TRIM_EVERY: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let config = match Config::parse(std::env::args_os().skip(1)) {
        Ok(config) => config,
        Err(exit) => return say(&exit),
    };
    if let Err(error) = driver::logging::init(&config) {
        return say(&driver::config::Exit {
            code: 1,
            text: format!("no logging: {error}"),
        });
    }
    std::panic::set_hook(Box::new(|panic| {
        // Where, and not what: a panic's text may hold a piece of what it fell over.
        let place = panic
            .location()
            .map(ToString::to_string)
            .unwrap_or_default();
        tracing::error!(place, "a bug in the driver");
    }));
    one_arena();
    raise_descriptors();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build();
    let ended = runtime.and_then(|runtime| runtime.block_on(serve(config)));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("the driver cannot run: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(config: Config) -> std::io::Result<()> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let signalled = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: running calls are finished first");
        signalled.cancel();
    });
    tokio::spawn(async {
        loop {
            tokio::time::sleep(TRIM_EVERY).await;
            trim();
        }
    });
    driver::run(config, stop).await
}

#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what --version and --help are for"
)]
fn say(exit: &driver::config::Exit) -> ExitCode {
    if exit.code == 0 {
        println!("{}", exit.text);
    } else {
        eprintln!("{}", exit.text);
    }
    ExitCode::from(u8::try_from(exit.code).unwrap_or(1))
}

/// Raises the soft limit of open files to the hard one. Without that, a system's usual soft limit
/// of 1024 is what anybody has to use up. More than [`MOST_DESCRIPTORS`] are of no use.
fn raise_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        let wanted = hard.min(MOST_DESCRIPTORS);
        match soft < wanted {
            true => setrlimit(Resource::RLIMIT_NOFILE, wanted, hard),
            false => Ok(()),
        }
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// Sets the allocator to one heap for all threads (`M_ARENA_MAX` in mallopt(3)): with several, memory
/// freed in one is no use to another. After a burst of 500 publishes of 1 MiB each by 50 callers, with
/// two worker threads and nothing bounded, 22 MB stayed with several heaps and 16 MB with one.
#[allow(unsafe_code)]
fn one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) only sets a number inside the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives free memory in the middle of the heap back to the system.
#[allow(unsafe_code)]
fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes the allocator's own lock and only releases free pages.
    unsafe {
        libc::malloc_trim(0);
    }
}
