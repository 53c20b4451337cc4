//! The binary. Sets up flags, logging, the runtime and signals, and returns the exit code.

use std::{
    ffi::OsString,
    io::{self, Write as _},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use driver::{
    config::{Config, Exit},
    status::{Status, flags_of_the_driver},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Wipes what is freed.
#[global_allocator]
static ALLOCATOR: driver::hardening::Wiping = driver::hardening::Wiping;

/// The number of threads for file system work. The async part runs on one more thread.
const BLOCKING_THREADS: usize = 4;

/// The number of files that the driver may have open.
const MOST_DESCRIPTORS: u64 = 65_536;

/// The time between two returns of memory to the system, as after a burst of publishes.
const TRIM_EVERY: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    if args.next().is_some_and(|first| first == "status") {
        return say(&status(args.collect()));
    }
    let config = match Config::parse(std::env::args_os().skip(1)) {
        Ok(config) => config,
        Err(exit) => return say(&exit),
    };
    let log = match driver::logging::init(&config) {
        Ok(log) => log,
        Err(error) => {
            return say(&Exit {
                code: 1,
                text: format!("cannot set up logging: {error}"),
            });
        }
    };
    let of_panics = log.clone();
    std::panic::set_hook(Box::new(move |panic| {
        // Only the place is logged, because a panic's text may contain a secret.
        let place = panic
            .location()
            .map(ToString::to_string)
            .unwrap_or_default();
        tracing::error!(
            place,
            "the driver panicked, which is a bug; please report it with this place"
        );
        // A panic within another one ends the process at once.
        of_panics.flush();
    }));
    one_arena();
    raise_descriptors();
    driver::hardening::harden(&config);
    log.start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build();
    let ended = runtime.and_then(|runtime| runtime.block_on(serve(config)));
    let code = match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("the driver cannot run: {error}");
            ExitCode::FAILURE
        }
    };
    log.flush();
    code
}

/// Returns what `status` says: JSON, or why it cannot be said. Without flags of its own, it uses those of
/// the driver that runs in this container.
fn status(args: Vec<OsString>) -> Exit {
    let fails = |code, text: String| Exit { code, text };
    let (json, flags): (Vec<_>, Vec<_>) = args
        .into_iter()
        .partition(|arg| arg == "--json" || arg == "-json");
    if json.is_empty() {
        return fails(
            2,
            "usage: secrets-store-csi status --json [FLAGS]".to_owned(),
        );
    }
    let flags = match flags.is_empty() {
        true => flags_of_the_driver(Path::new("/proc")).unwrap_or_default(),
        false => flags,
    };
    let config = match Config::parse(flags.into_iter()) {
        Ok(config) => config,
        Err(exit) => return exit,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let read = runtime.and_then(|runtime| runtime.block_on(Status::read(&config)));
    let text = read.and_then(|status| Ok(serde_json::to_string_pretty(&status)?));
    text.map_or_else(
        |error| {
            let records = config.state_dir.display();
            fails(
                1,
                format!("the records in {records} cannot be read: {error}"),
            )
        },
        |text| Exit { code: 0, text },
    )
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

/// Writes what was asked for or why the driver does not start, and returns the exit code for it.
fn say(exit: &Exit) -> ExitCode {
    let written = if exit.code == 0 {
        writeln!(io::stdout(), "{}", exit.text)
    } else {
        writeln!(io::stderr(), "{}", exit.text)
    };
    match written {
        // A reader that goes before the end, as in `--help | head`, has what it wants.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
        _ => ExitCode::from(u8::try_from(exit.code).unwrap_or(1)),
    }
}

/// Raises the soft limit of open files to the hard one, but to no more than [`MOST_DESCRIPTORS`]. The
/// usual soft limit of 1024 is easily used up by connections.
fn raise_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        let limit = hard.min(MOST_DESCRIPTORS);
        if soft < limit {
            setrlimit(Resource::RLIMIT_NOFILE, limit, hard)
        } else {
            Ok(())
        }
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files could not be raised");
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

/// Gives free memory in the middle of the heap, and code that has not run lately, back to the system,
/// which keeps locked pages.
#[allow(unsafe_code)]
fn trim() {
    driver::hardening::while_unlocked(|| {
        #[cfg(target_env = "gnu")]
        // SAFETY: malloc_trim(3) takes the allocator's own lock and only releases free pages.
        unsafe {
            libc::malloc_trim(0);
        }
        driver::hardening::unmap_code();
    });
}
