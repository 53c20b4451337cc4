//! Runs a test in a process of its own, because mounts and limits belong to a whole process.

use std::{env, process::Command};

/// The things that a test does not share with others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Own {
    /// Only the process.
    Process,
    /// The process and its mount namespace, in which the test is root.
    Mounts,
}

/// Returns whether this is the process in which the test `name` must run. If it is not, this function
/// runs that process, which has passed the test when this returns.
///
/// A user who may not create namespaces cannot mount: then the test prints this and passes.
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
