//! Runs a program in a mount namespace of its own: what it mounts reaches nobody else, and is gone with
//! the last process and the last open descriptor of the namespace.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{getegid, geteuid};

/// The first argument of a process that is to become such a program.
const ISOLATED: &str = "isolated";
/// Stands for namespaces that do not exist yet.
const NEW: &str = "new";

/// Becomes a program in a mount namespace if this process was started to become one, and does not
/// return then. Otherwise it does nothing.
///
/// `e2e` calls it first in `main`, while it has one thread.
pub fn take_over() {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().as_deref() != Some(OsStr::new(ISOLATED)) {
        return;
    }
    let error = match become_program(arguments) {
        Ok(error) | Err(error) => error,
    };
    eprintln!("run a program in a mount namespace of its own: {error}");
    std::process::exit(1);
}

/// The namespaces of a process, which exist as long as this does.
pub(crate) struct Namespaces {
    user: File,
    mount: File,
}

impl Namespaces {
    /// Keeps the namespaces of a process.
    ///
    /// # Errors
    /// When the process is gone.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        let open = |name| File::open(format!("/proc/{pid}/ns/{name}"));
        Ok(Self {
            user: open("user")?,
            mount: open("mnt")?,
        })
    }

    fn paths(&self) -> [OsString; 2] {
        let own = std::process::id();
        [&self.user, &self.mount].map(|file| format!("/proc/{own}/fd/{}", file.as_raw_fd()).into())
    }
}

/// Returns the command that runs a program in these namespaces, or in new ones. `e2e` is the
/// executable that calls [`take_over`]. The process ends with the thread that starts it.
pub(crate) fn command(e2e: &Path, namespaces: Option<&Namespaces>, program: &Path) -> Command {
    let mut command = Command::new(e2e);
    let namespaces = namespaces.map_or_else(|| [NEW, NEW].map(OsString::from), Namespaces::paths);
    command.arg(ISOLATED).args(namespaces).arg(program);
    command
}

/// Returns only the reason why it failed.
fn become_program(mut arguments: impl Iterator<Item = OsString>) -> io::Result<io::Error> {
    let mut next = || arguments.next().ok_or(io::ErrorKind::InvalidInput);
    let (user, mounts, program) = (next()?, next()?, next()?);
    if user == NEW {
        make_namespaces()?;
    } else {
        join(Path::new(&user), Path::new(&mounts))?;
    }
    // Not earlier: a process that enters a user namespace loses it (prctl(2)).
    set_pdeathsig(Signal::SIGKILL)?;
    Ok(Command::new(program).args(arguments).exec())
}

fn make_namespaces() -> io::Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    // Root in a container without CAP_SYS_ADMIN needs a user namespace like any user.
    if !uid.is_root() || unshare(CloneFlags::CLONE_NEWNS).is_err() {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUSER)?;
        // The kernel requires this before an unprivileged process writes a group map.
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
        fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    }
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
    Ok(())
}

fn join(user: &Path, mounts: &Path) -> io::Result<()> {
    // Opened before: from within the user namespace, the descriptors of the caller cannot be reached.
    let is_own = fs::read_link(user)? == fs::read_link("/proc/self/ns/user")?;
    let (user, mounts) = (File::open(user)?, File::open(mounts)?);
    // A process may not join the user namespace that it is in.
    if !is_own {
        setns(user, CloneFlags::CLONE_NEWUSER)?;
    }
    setns(mounts, CloneFlags::CLONE_NEWNS)?;
    Ok(())
}
