//! A small static binary that runs inside a pod, where there is no shell:
//!
//! - `probe tree [--reader] <directory>` prints what stands below a directory, as JSON;
//! - `probe sleep` waits for SIGTERM or SIGINT: the main process of a test's pod;
//! - `probe dead-socket <path>` leaves a socket that nobody listens on, as a crash does;
//! - under the names `mount` and `umount` it does what these do, for a driver that runs them:
//!   `mount -t <type> <source> <target>`, `umount <target>`.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;

use e2e::tree::{Tree, View};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{SigSet, Signal};

const USAGE: &str = "usage: probe tree [--reader] <directory> | probe sleep \
     | probe dead-socket <path>";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let name = std::env::args().next().unwrap_or_default();
    let name = Path::new(&name).file_name().unwrap_or_default();
    if name == "mount" || name == "umount" {
        return exit(mount_or_unmount(&args));
    }
    exit(match args[..] {
        ["tree", path] => tree(path, View::Disk),
        ["tree", "--reader", path] => tree(path, View::Reader),
        ["sleep"] => sleep(),
        ["dead-socket", path] => UnixListener::bind(path)
            .map(drop)
            .map_err(|error| format!("{path}: {error}")),
        _ => Err(USAGE.to_owned()),
    })
}

fn exit(outcome: Result<(), String>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn tree(path: &str, view: View) -> Result<(), String> {
    let tree = Tree::read(Path::new(path), view).map_err(|error| error.to_string())?;
    let json = serde_json::to_string(&tree).map_err(|error| error.to_string())?;
    println!("{json}");
    Ok(())
}

fn mount_or_unmount(args: &[&str]) -> Result<(), String> {
    let failed = |target: &str, error: Errno| format!("{target}: {error}");
    match *args {
        ["-t", kind, source, target] => {
            let flags = MsFlags::empty();
            mount(Some(source), target, Some(kind), flags, None::<&str>)
                .map_err(|error| failed(target, error))
        }
        [target] => umount(target).map_err(|error| failed(target, error)),
        _ => Err(format!("{args:?} is not what a driver asks for")),
    }
}

/// As process 1 of a container it gets no signal that it does not ask for.
fn sleep() -> Result<(), String> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals
        .thread_block()
        .and_then(|()| signals.wait())
        .map(|_| ())
        .map_err(|error| format!("wait for a signal: {error}"))
}
