//! The seccomp profile in `deploy/`, for runtimes that apply one.

use std::{collections::BTreeMap, fs, io, os::unix::process::CommandExt as _, path::Path};

use driver::hardening::seccomp;
use nix::libc;
use serde_json::{Value, json};

use crate::Node;

const FILE: &str = "../deploy/seccomp/secrets-store-csi-driver.json";

/// Returns the profile in the form of the OCI's runtime specification. Names that an architecture does
/// not have are ignored there.
fn rendered() -> Value {
    let names: Vec<&str> = seccomp::profile().into_keys().collect();
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": libc::ENOSYS,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
        "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}],
    })
}

/// `just manifests` writes the profile.
#[cfg(target_arch = "x86_64")]
#[test]
fn the_profile_is_rendered_from_the_drivers_filter() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE);
    let text = serde_json::to_string_pretty(&rendered()).unwrap() + "\n";
    if std::env::var_os("UPDATE_DEPLOY").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &text).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == text, "{FILE} is stale: run `just manifests`");
}

/// The program starts and works under the profile, where everything else is refused from the first
/// instruction on.
#[tokio::test]
async fn the_driver_runs_under_the_profile() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE)).unwrap();
    let profile: Value = serde_json::from_str(&text).unwrap();
    let numbers: BTreeMap<&str, i64> = seccomp::profile();
    let names = profile["syscalls"][0]["names"].as_array().unwrap();
    let allowed = names
        .iter()
        .filter_map(|name| numbers.get(name.as_str().unwrap()));
    let allowed: Vec<i64> = allowed.copied().collect();
    assert!(allowed.len() > 50);

    let node = Node::new().await;
    let provider = node.serve("test");
    // `unshare` makes the mounts, and then starts the program under the profile.
    let mut command = node.command();
    command.arg(std::env::current_exe().unwrap());
    command.args([
        "profile::a_program_under_the_profile",
        "--exact",
        "--nocapture",
        "--ignored",
    ]);
    let run: Vec<String> = [env!("CARGO_BIN_EXE_secrets-store-csi").to_owned()]
        .into_iter()
        .chain(node.flags())
        .collect();
    command.env(RUN, serde_json::to_string(&(allowed, run)).unwrap());
    let mut driver = node.start_as_it_is(command);
    for volume in ["one", "two"] {
        driver.publish(node.request(volume, &[])).await.unwrap();
    }
    assert_eq!(provider.asked.lock().unwrap().len(), 2);
    let status = fs::read_to_string(driver.proc("status")).unwrap();
    let filters = status
        .lines()
        .find(|line| line.starts_with("Seccomp_filters"));
    assert_eq!(
        filters.unwrap().split_whitespace().last(),
        Some("2"),
        "{status}"
    );
}

/// The variable with the numbers of the allowed calls, and a command.
const RUN: &str = "PROGRAM_UNDER_THE_PROFILE";

/// Becomes the driver under the profile.
#[test]
#[ignore = "the test above runs it, in a process of its own"]
fn a_program_under_the_profile() {
    let run = std::env::var(RUN).unwrap();
    let (allowed, run): (Vec<i64>, Vec<String>) = serde_json::from_str(&run).unwrap();
    let mut command = std::process::Command::new(&run[0]);
    command.args(&run[1..]);
    nix::sys::prctl::set_no_new_privs().unwrap();
    load(&allowed).unwrap();
    panic!("{}", command.exec());
}

#[allow(unsafe_code)]
fn load(allowed: &[i64]) -> io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code.try_into().unwrap(),
        jt: 0,
        jf: 0,
        k,
    };
    let answer = |k| statement(libc::BPF_RET | libc::BPF_K, k);
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for number in allowed {
        let number = u32::try_from(*number).unwrap();
        let mut jump = statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number);
        jump.jf = 1;
        program.extend([jump, answer(libc::SECCOMP_RET_ALLOW)]);
    }
    let refused = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
    program.push(answer(refused));
    let filter = libc::sock_fprog {
        len: program.len().try_into().unwrap(),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel copies `len` instructions from the pointer, which is valid for as many.
    let done = unsafe {
        let mode = libc::SECCOMP_MODE_FILTER;
        libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const filter)
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
