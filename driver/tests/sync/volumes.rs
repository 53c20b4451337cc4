//! Makes volumes as a node has them: a tmpfs, files, a record. A test that mounts runs once more, in
//! a process with a mount namespace of its own, made by `unshare` of util-linux.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    thread,
};

use driver::{
    files::{File, Payload, open_root, read, swap},
    mount::{self, Tmpfs},
    record::{ClassState, Pod, Record, Records, Writer},
};
use jiff::Timestamp;

/// Returns whether the caller may mount, because it runs in a mount namespace of its own. Otherwise
/// its test has been run in one, and has passed.
pub(crate) fn is_alone() -> bool {
    const ALONE: &str = "DRIVER_TEST_IS_ALONE";
    static ALL: OnceLock<()> = OnceLock::new();
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let run = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        if !nix::unistd::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        let program = std::env::current_exe().unwrap();
        let command = command.arg("--mount").arg(program).args(arguments);
        let status = command.env(ALONE, "yes").status().unwrap();
        assert!(status.success(), "{arguments:?}, in a namespace of its own");
    };
    match thread::current().name() {
        // The thread of a test has the test's name, unless there is only one thread.
        Some("main") | None => {
            ALL.get_or_init(|| run(&["--test-threads=2"]));
        }
        Some(test) => run(&["--exact", test, "--nocapture"]),
    };
    false
}

pub(crate) fn records(dir: &Path) -> Records {
    Records::open(dir.join("records")).unwrap()
}

pub(crate) fn target(dir: &Path, pod: &str) -> PathBuf {
    dir.join(format!("pods/uid-{pod}/volumes/kubernetes.io~csi/v/mount"))
}

pub(crate) fn make_and_mount(target: &Path) {
    fs::create_dir_all(target).unwrap();
    Tmpfs::bounded_by(64 * 1024).mount(target).unwrap();
}

pub(crate) fn write(target: &Path, files: &[(&str, &str)]) {
    let file =
        |(path, text): &(&str, &str)| ((*path).to_owned(), File::new(0, text.as_bytes().to_vec()));
    let payload = Payload::new(files.iter().map(file)).unwrap();
    if let Some(staged) = swap::stage(open_root(target).unwrap(), payload).unwrap() {
        staged.commit().unwrap();
    }
}

/// Returns the record of a volume whose content has this order.
pub(crate) fn record(dir: &Path, pod: &str, order: &str) -> Record {
    let target = target(dir, pod);
    let directory = open_root(&target)
        .and_then(|root| read::content_id(&root))
        .map_or_else(|_| String::new(), |version| version.directory);
    Record {
        volume_id: format!("csi-{pod}"),
        target_path: target,
        pod: Pod {
            name: pod.to_owned(),
            namespace: "shop".to_owned(),
            uid: format!("uid-{pod}"),
        },
        class: ClassState {
            name: "db".to_owned(),
            uid: "class".to_owned(),
            generation: None,
            resource_version: "1".to_owned(),
            annotations: BTreeMap::new(),
        },
        provider: "test".to_owned(),
        pod_status: format!("{pod}-shop-db"),
        objects: Vec::new(),
        changes_of_versions: 0,
        writer: Writer::Driver,
        orders: BTreeMap::from([(directory, order.to_owned())]),
        coming: None,
        last_success: Timestamp::now(),
        last_change: Timestamp::now(),
        files: None,
        failing_since: None,
    }
}

/// Publishes a volume: mounts, writes and records it.
pub(crate) fn volume(dir: &Path, pod: &str) -> Record {
    let target = target(dir, pod);
    make_and_mount(&target);
    write(&target, &[("pw", "hunter2")]);
    let record = record(dir, pod, "0");
    records(dir).put(&record).unwrap();
    record
}

/// Takes a volume down, as unpublish does.
pub(crate) fn take_down(dir: &Path, record: &Record) {
    records(dir).remove(&record.volume_id).unwrap();
    drop(mount::detach(&record.target_path).unwrap());
}
