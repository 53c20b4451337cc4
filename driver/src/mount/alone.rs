//! Runs a test in a process of its own, because mounts and limits belong to a whole process.

use std::{any::type_name, env, process::Command};

/// The things that a test does not share with others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Own {
    /// Only the process.
    Process,
    /// The process and its mount namespace, in which the test is root.
    Mounts,
}

/// Runs a test in a process of its own, which this starts unless it is that process. The test's name is
/// that of the function that contains `test`.
///
/// A user who may not create namespaces cannot mount: then the test prints this and passes.
pub(crate) fn alone<T: FnOnce()>(own: Own, test: T) {
    const ALONE: &str = "TEST_ALONE";
    if env::var_os(ALONE).is_some() {
        return test();
    }
    let name = type_name::<T>().trim_end_matches("::{{closure}}");
    let (_crate, name) = name.split_once("::").unwrap();
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
                return;
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
}
