//! The rights of the process.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    process::Command,
};

use driver::{
    config::Config,
    hardening::{MemoryLock, capabilities::kept},
};
use nix::unistd::geteuid;
use proto::csi::NodeGetInfoRequest;

use crate::{Driver, Node, with_group};

/// The user `nobody`, as which the driver runs where these tests run as root.
const NOBODY: u32 = 65534;

/// Returns the lines of a `status` file of `/proc`.
fn status(path: &std::path::Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

/// Returns the status of each thread of a driver.
fn threads(driver: &Driver) -> Vec<BTreeMap<String, String>> {
    let tasks = fs::read_dir(driver.proc("task")).unwrap();
    tasks
        .map(|task| status(&task.unwrap().path().join("status")))
        .collect()
}

/// Returns the mask of the capabilities that the driver may keep. `IPC_LOCK` depends on the machine.
fn may_keep() -> u64 {
    let kept = kept(&Config::default(), MemoryLock::ByCapability);
    let numbers = BTreeMap::from([
        ("CHOWN", 0),
        ("DAC_OVERRIDE", 1),
        ("FOWNER", 3),
        ("IPC_LOCK", 14),
        ("SYS_ADMIN", 21),
    ]);
    kept.iter().fold(0, |set, it| set | 1 << numbers[it.name])
}

#[tokio::test]
async fn every_thread_keeps_only_what_mounting_needs() {
    let node = Node::new().await;
    let provider = node.serve("test");
    let mut driver = node.driver(&[]);
    // The work on files has threads of its own.
    for volume in ["one", "two", "three"] {
        driver.publish(node.request(volume, &[])).await.unwrap();
    }
    assert_eq!(provider.asked.lock().unwrap().len(), 3);
    let threads = threads(&driver);
    assert!(threads.len() > 1, "{threads:?}");
    for thread in threads {
        let set = |name: &str| u64::from_str_radix(&thread[name], 16).unwrap();
        for name in ["CapPrm", "CapEff", "CapBnd"] {
            let needed = may_keep() & !(1 << 14);
            assert_eq!(set(name) | 1 << 14, may_keep(), "{name} of {thread:?}");
            assert_eq!(set(name) & needed, needed, "{name} of {thread:?}");
        }
        for name in ["CapInh", "CapAmb"] {
            assert_eq!(set(name), 0, "{name} of {thread:?}");
        }
        assert_eq!(thread["NoNewPrivs"], "1", "{thread:?}");
        assert_eq!(thread["Seccomp"], "2", "{thread:?}");
    }
    let log = driver.log();
    assert!(!log.contains("could not"), "{log}");
}

#[tokio::test]
async fn a_port_below_1024_is_served() {
    let node = Node::new().await;
    let config = |flag: &str| Config::parse([flag.into()].into_iter()).unwrap();
    let names = |config: &Config| {
        let kept = kept(config, MemoryLock::Unlimited).into_iter();
        kept.map(|it| it.name).collect::<Vec<_>>()
    };
    let without = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "SYS_ADMIN"];
    assert_eq!(names(&config("--metrics-addr=:1024")), without);
    let with = [&without[..], &["NET_BIND_SERVICE"]].concat();
    assert_eq!(names(&config("--metrics-addr=:1023")), with);
    assert_eq!(names(&config("--healthz-addr=:80")), with);
    // A network of its own has all ports free.
    let mut command = node.command();
    command.arg("--net");
    command.arg(env!("CARGO_BIN_EXE_secrets-store-csi"));
    let mut driver = node.start(command, &["--healthz-addr=0.0.0.0:80"]);
    driver.connect().await;
}

/// Memory is locked where the driver may do so: as root of the machine, and not only of a user namespace.
#[tokio::test]
async fn the_memory_is_locked() {
    let users = fs::read_to_string("/proc/self/uid_map").unwrap();
    let own = status(std::path::Path::new("/proc/self/status"));
    let own = u64::from_str_radix(&own["CapEff"], 16).unwrap();
    let (ipc_lock, sys_resource) = (1 << 14, 1 << 24);
    if !users.contains("4294967295") || own & (ipc_lock | sys_resource) == 0 {
        eprintln!("skipped: this user may not lock memory");
        return;
    }
    let node = Node::new().await;
    let _provider = node.serve("test");
    let mut driver = node.driver(&[]);
    let mut locked = 0;
    // The first return of free memory, after five seconds, unlocks it for a moment.
    for volume in ["one", "two", "three", "four", "five", "six", "seven"] {
        driver.publish(node.request(volume, &[])).await.unwrap();
        let of_process = status(&driver.proc("status"));
        let kib = |name: &str| {
            let text = of_process[name].split(' ').next();
            text.unwrap().parse::<u64>().unwrap()
        };
        // What is locked when it is used counts as locked as a whole.
        locked += u32::from(kib("VmLck") >= kib("VmRSS"));
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
    assert!(locked >= 6, "{locked} of 7 times");
}

/// Starts a driver as a user who is not root, not even of a user namespace.
fn as_nobody(node: &Node, flags: &[&str]) -> Driver {
    let mut command = Command::new(env!("CARGO_BIN_EXE_secrets-store-csi"));
    if geteuid().is_root() {
        for dir in [node.dir.path(), &node.path("plugin")] {
            std::os::unix::fs::chown(dir, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        std::os::unix::fs::chown(node.path("kubeconfig"), Some(NOBODY), None).unwrap();
        command.uid(NOBODY).gid(NOBODY);
    }
    node.start(command, flags)
}

/// The kernel gives the files in `/proc` of a process that is not dumpable to root.
fn is_dumpable(driver: &Driver) -> bool {
    let owner = fs::metadata(driver.proc("mem")).unwrap().uid();
    let user = match geteuid().is_root() {
        true => NOBODY,
        false => geteuid().as_raw(),
    };
    owner == user
}

#[tokio::test]
async fn nobody_can_read_or_dump_the_process() {
    let node = Node::new().await;
    let mut driver = as_nobody(&node, &[]);
    driver.connect().await;
    assert!(!is_dumpable(&driver));
    let limits = fs::read_to_string(driver.proc("limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core"))
        .unwrap();
    let values: Vec<_> = core.split_whitespace().skip(4).take(2).collect();
    assert_eq!(values, ["0", "0"], "{core}");
    drop(driver);
    // What is checked above is so only because of the hardening.
    let mut driver = as_nobody(&node, &["--hardening=false"]);
    driver.connect().await;
    assert!(is_dumpable(&driver));
    assert_eq!(status(&driver.proc("status"))["NoNewPrivs"], "0");
    let log = driver.log();
    assert!(log.contains("--hardening=false"), "{log}");
}

/// A driver without rights starts, says what does not work, and does not mount.
#[tokio::test]
async fn an_ordinary_users_driver_says_what_does_not_work() {
    let node = Node::new().await;
    let mut driver = as_nobody(&node, &[]);
    let mut csi = driver.connect().await;
    csi.node_get_info(NodeGetInfoRequest {}).await.unwrap();
    let log = driver.log();
    for capability in kept(&Config::default(), MemoryLock::Unlimited) {
        assert!(log.contains(capability.name), "{log}");
        assert!(log.contains(capability.without), "{log}");
    }
    let status = &threads(&driver)[0];
    assert_eq!(status["CapPrm"], "0000000000000000");
    assert_eq!(status["Seccomp"], "2");
}

/// A container with fewer capabilities: all works that does not need the one that is missing.
#[tokio::test]
async fn a_driver_that_lacks_one_capability_does_the_rest() {
    let node = Node::new().await;
    let _provider = node.serve("test");
    let mut command = node.command();
    command.args(["setpriv", "--bounding-set=-chown"]);
    command.arg(env!("CARGO_BIN_EXE_secrets-store-csi"));
    let mut driver = node.start(command, &[]);
    driver.publish(node.request("one", &[])).await.unwrap();
    let log = driver.log();
    assert!(log.contains("volumes of pods with an fsGroup"), "{log}");
    assert!(!log.contains("no volume can be mounted"), "{log}");
    if !geteuid().is_root() {
        eprintln!("skipped the rest: a user namespace of one user has no other group");
        return;
    }
    let refused = driver
        .publish(with_group(node.request("two", &[]), 4321))
        .await;
    let refused = refused.unwrap_err();
    assert!(refused.message().contains("not permitted"), "{refused:?}");
}
