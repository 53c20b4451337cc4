//! Gives up what the process does not need, before any other thread starts, and checks the directories
//! that it trusts.
//!
//! The driver's container is privileged, because Kubernetes lets only privileged containers make mounts
//! that other pods see. Container runtimes give such a container every capability, and ignore the seccomp
//! profile of its pod. So the driver limits itself, in the same way wherever it runs:
//!
//! - It drops all capabilities but those of [`capabilities::kept`], from all sets of its only thread.
//! - It sets `no_new_privs`, so that no program that it could start has more rights than it.
//! - It is not dumpable: another process of its user can neither read its memory nor attach to it, and no
//!   core is written. A tracer needs `CAP_SYS_PTRACE` in the driver's user namespace, as root has.
//! - It locks its memory, so that secrets are not swapped, where it may raise the limit for that.
//! - It installs a seccomp filter with the system calls that it uses ([`seccomp`]).
//!
//! A step that fails is logged with what follows from it, and the driver starts. `--hardening=false`
//! leaves all of these steps out, for debuggers and for systems with unusual system calls.
//!
//! The filter is the driver's own and not only the profile `deploy/seccomp/secrets-store-csi-driver.json`,
//! because kubelet's profiles have no effect on a privileged container. Besides, the driver's own filter
//! need not allow what a program needs only to start, such as `execve`. The profile is written from the
//! same list of system calls.

pub mod capabilities;
mod code;
mod directories;
pub mod seccomp;
mod wiping;

use std::{
    fs, io,
    sync::atomic::{AtomicBool, Ordering},
};

use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};

use crate::config::Config;
use capabilities::Capability;
pub use code::unmap_code;
pub use directories::check as check_directories;
pub use wiping::Wiping;

/// Returns the user as which the process runs.
pub fn user() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// Hardens the process. Must be called while it has a single thread: later threads inherit the result.
pub fn harden(config: &Config) {
    if !config.hardening {
        tracing::warn!(
            "--hardening=false: the driver keeps its capabilities, can be traced, and may make any system call"
        );
        return;
    }
    report(
        "limit the size of a core to zero",
        "a core could hold secrets",
        setrlimit(Resource::RLIMIT_CORE, 0, 0),
    );
    report(
        "become not dumpable",
        "processes of the same user can read the driver's memory",
        prctl::set_dumpable(false),
    );
    let lock = lock_memory();
    report(
        "set no_new_privs",
        "a program that the driver started could have more rights than the driver",
        prctl::set_no_new_privs(),
    );
    match capabilities::reduce_to(&capabilities::kept(config, lock)) {
        Ok(missing) => missing.iter().for_each(report_missing),
        Err(error) => {
            tracing::warn!(%error, "the driver could not drop its capabilities, and keeps them")
        }
    }
    report(
        "install its seccomp filter",
        "the driver may make any system call",
        seccomp::install(),
    );
}

fn report_missing(missing: &Capability) {
    tracing::warn!(
        capability = missing.name,
        "the driver was started without this capability: {}",
        missing.without
    );
}

/// Logs a step that failed, and what follows.
fn report<E: std::fmt::Display>(step: &str, otherwise: &str, result: Result<(), E>) {
    if let Err(error) = result {
        tracing::warn!(%error, "the driver could not {step}: {otherwise}");
    }
}

/// How the driver may lock memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryLock {
    /// There is no limit for locked memory.
    Unlimited,
    /// With the capability `IPC_LOCK`, for which limits do not count.
    ByCapability,
    /// Not.
    None,
}

/// Keeps memory from being swapped, that of now and that of later. Pages are locked when they are first
/// used, so that the process does not grow.
///
/// With a limit for locked memory, a later allocation could fail. So the limit is lifted before, or the
/// memory is locked only if limits do not count.
fn lock_memory() -> MemoryLock {
    const LIMIT: Resource = Resource::RLIMIT_MEMLOCK;
    let all = libc::RLIM_INFINITY;
    let (soft, hard) = getrlimit(LIMIT).unwrap_or((0, 0));
    let lifted =
        soft == all || setrlimit(LIMIT, all, hard).is_ok() || setrlimit(LIMIT, all, all).is_ok();
    let locked = if lifted {
        lock().map(|()| MemoryLock::Unlimited)
    } else {
        // With a limit of zero only the capability allows it, and only if it is one of the node and not
        // only of a user namespace.
        let locked = setrlimit(LIMIT, 0, hard)
            .map_err(io::Error::from)
            .and_then(|()| lock());
        locked.map(|()| MemoryLock::ByCapability)
    };
    locked.unwrap_or_else(|error| {
        // Without swap there is nothing to warn of.
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        if swaps.lines().count() > 1 {
            tracing::warn!(%error, "the driver could not lock its memory, and this node has swap: secrets that the driver is working on may be swapped. It needs CAP_IPC_LOCK, CAP_SYS_RESOURCE, or an unlimited RLIMIT_MEMLOCK");
        }
        MemoryLock::None
    })
}

/// Whether the memory is locked.
static LOCKED: AtomicBool = AtomicBool::new(false);

#[allow(unsafe_code)]
fn lock() -> io::Result<()> {
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    // SAFETY: mlockall(2) takes no pointer, and changes no content of memory.
    match unsafe { libc::mlockall(flags) } {
        0 => {
            LOCKED.store(true, Ordering::Relaxed);
            Ok(())
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives memory back to the system with `release`. The kernel does not take locked pages back, so they
/// are unlocked for this moment.
#[allow(unsafe_code)]
pub fn while_unlocked(release: impl FnOnce()) {
    let locked = LOCKED.load(Ordering::Relaxed);
    if locked {
        // SAFETY: munlockall(2) takes nothing, and changes no content of memory.
        unsafe { libc::munlockall() };
    }
    release();
    if locked && let Err(error) = lock() {
        tracing::warn!(%error, "the driver could not lock its memory again, so that it may be swapped");
    }
}
