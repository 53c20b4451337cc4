//! Runs a test in a process of its own, for what belongs to a whole process: its mounts, its
//! limits.

use std::{env, process::Command};

/// What of the test's process is its own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Own {
    /// Nothing but the process.
    Process,
    /// The table of mounts too, in which the test is root.
    Mounts,
}

/// Whether this is the process in which the test `name` is to run. If it is not, that process is
/// started, and has passed when this returns.
///
/// An ordinary user who may not make namespaces cannot mount: then the test says so and passes.
pub(crate) fn alone(name: &str, own: Own) -> bool {
    const ALONE: &str = "TEST_ALONE";
    if env::var_os(ALONE).is_some() {
        return true;
    }
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--propagation", "private"]);
    if !nix::unistd::geteuid().is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    let mut command = match own {
        Own::Process => Command::new(env::current_exe().unwrap()),
        Own::Mounts => {
            let mut probe = Command::new(unshare.get_program());
            let may = probe.args(unshare.get_args()).arg("true").status();
            if !may.is_ok_and(|status| status.success()) {
                eprintln!("skipped: {name}: this user may not make namespaces");
                return false;
            }
            unshare.arg(env::current_exe().unwrap());
            unshare
        }
    };
    let run = command
        .args(["--exact", name, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&run.stdout);
    let errors = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{text}\n{errors}");
    assert!(
        text.contains("1 passed"),
        "no test {name}: {text}\n{errors}"
    );
    false
}
