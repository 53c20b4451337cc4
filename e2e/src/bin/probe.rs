//! A small static executable that runs in a pod, where there is no shell:
//!
//! - `probe tree [--reader] <directory>` prints the tree below a directory as JSON, or `null`;
//! - `probe read <last> <seconds> <pause> <file>... <directory>` reads files, with a pause of so many
//!   milliseconds, until one contains the last number, and prints its findings as JSON;
//! - `probe sleep` waits for SIGTERM or SIGINT: the main process of a test's pod;
//! - `probe dead-socket <path>` leaves a socket that no process listens on, as a crash does;
//! - `probe hung-disk <directory> <milliseconds>` lays a file system over a directory that answers nobody
//!   for so long;
//! - under the names `mount` and `umount` it stands in for these programs, for a driver that runs
//!   them: `mount -t <type> <source> <target>`, `umount <target>`.
//!
//! With `--as <uid>,<gid>[,<group>...]`, `tree` and `read` run as that user. The directory is entered
//! before: in a container its user can reach the mount, on the node only root can.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use e2e::reader::Reader;
use e2e::tree::{Tree, View};
use e2e::user::User;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount, umount2};
use nix::sys::signal::{SigSet, Signal};

const USAGE: &str = "usage: probe [--as <uid>,<gid>[,<group>...]] tree [--reader] <directory> \
     | probe [--as ...] read <last> <seconds> <pause> <file>... <directory> | probe sleep \
     | probe dead-socket <path> | probe hung-disk <directory> <milliseconds>";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let name = std::env::args().next().unwrap_or_default();
    let name = Path::new(&name).file_name().unwrap_or_default();
    if name == "mount" || name == "umount" {
        return exit(mount_or_unmount(&args));
    }
    exit(match args[..] {
        ["--as", user, ref args @ .., directory] => {
            enter_as(user, directory).and_then(|()| read(args, Path::new(".")))
        }
        ["sleep"] => sleep(),
        ["dead-socket", path] => UnixListener::bind(path)
            .map(drop)
            .map_err(|error| format!("{path}: {error}")),
        ["hung-disk", directory, milliseconds] => hung_disk(directory, milliseconds),
        [ref args @ .., directory] => read(args, Path::new(directory)),
        [] => Err(USAGE.to_owned()),
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

fn enter_as(user: &str, directory: &str) -> Result<(), String> {
    let user = User::parse(user).ok_or_else(|| format!("{user} is no user"))?;
    std::env::set_current_dir(directory).map_err(|error| format!("{directory}: {error}"))?;
    user.become_it()
        .map_err(|error| format!("become another user: {error}"))
}

/// Reads a directory.
fn read(args: &[&str], directory: &Path) -> Result<(), String> {
    match args {
        ["tree"] => print(Tree::read_if_there(directory, View::Disk)),
        ["tree", "--reader"] => print(Tree::read_if_there(directory, View::Reader)),
        ["read", args @ ..] => match Reader::parse(args) {
            Some(reader) => print(Ok(reader.read(directory))),
            None => Err(USAGE.to_owned()),
        },
        _ => Err(USAGE.to_owned()),
    }
}

fn print(seen: std::io::Result<impl serde::Serialize>) -> Result<(), String> {
    let seen = seen.map_err(|error| error.to_string())?;
    let json = serde_json::to_string(&seen).map_err(|error| error.to_string())?;
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

/// Mounts a FUSE file system whose requests nobody reads. Whoever waits for it then is told that it is not
/// connected.
fn hung_disk(directory: &str, milliseconds: &str) -> Result<(), String> {
    let lasts = milliseconds
        .parse()
        .map_err(|error| format!("{milliseconds}: {error}"))?;
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let device = device.map_err(|error| format!("/dev/fuse: {error}"))?;
    let failed = |error: Errno| format!("{directory}: {error}");
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0",
        device.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(
        Some("hung"),
        directory,
        Some("fuse"),
        flags,
        Some(options.as_str()),
    )
    .map_err(failed)?;
    std::thread::sleep(Duration::from_millis(lasts));
    // Nobody begins to wait between the two steps.
    let unmounted = umount2(directory, MntFlags::MNT_DETACH).map_err(failed);
    drop(device);
    unmounted
}

/// Waits for a signal: process 1 of a container gets only those that it asks for.
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
