//! Changes of the machine, and how they are undone.
//!
//! The state directory records each setting before it is changed. [`restore`] needs only that
//! directory, and does nothing where nothing was changed.

use std::fmt::Display;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::layout::{CONTAINERD_SOCKET, KUBELET_ROOT};
use super::network;
use crate::cluster::{Error, Result};
use crate::host::mount_points;

/// The kernel settings that kubelet and the network plugins change.
const SYSCTLS: [&str; 7] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
    "net/ipv4/ip_forward",
];

/// The directories that are created outside of the state directory, parents first.
const ELSEWHERE: [&str; 7] = [
    KUBELET_ROOT,
    "/etc/kubernetes",
    "/etc/kubernetes/secrets-store-csi-providers",
    "/var/run/secrets-store-csi-providers",
    "/var/lib/cni",
    "/var/log/containers",
    "/var/log/pods",
];
/// The directories with the sockets of containerd's shims. Their place cannot be chosen, and Docker
/// uses them, too.
const SHIM_SOCKETS: [&str; 2] = ["/run/containerd/s", "/run/containerd"];

/// Records what will be changed, mounts kubelet's root and makes the network.
///
/// # Errors
/// When the machine runs another kubelet, or a change fails.
pub(super) fn prepare(state: &Path) -> Result<()> {
    refuse_another_kubelet()?;
    fs::create_dir_all(state).map_err(|error| failed(state, &error))?;
    let absent: Vec<&str> = ELSEWHERE
        .into_iter()
        .filter(|path| !Path::new(path).exists())
        .collect();
    write(&state.join("elsewhere"), &absent.join("\n"))?;
    let mut saved = String::new();
    for name in SYSCTLS {
        if let Ok(value) = fs::read_to_string(Path::new("/proc/sys").join(name)) {
            saved.push_str(&format!("{name} {}\n", value.trim()));
        }
    }
    write(&state.join("sysctls"), &saved)?;
    mount_kubelet_root(state)?;
    network::make()
}

/// Undoes all changes of [`prepare`] and of the daemons, which have to be stopped before.
///
/// # Errors
/// Names what could not be undone; all else is undone.
pub(super) fn restore(state: &Path) -> Result<()> {
    let mut problems = Vec::new();
    kill_shims(state);
    kill_pods(&mut problems);
    unmount(state, &mut problems);
    note(&mut problems, network::remove());
    for line in lines(&state.join("sysctls")) {
        if let Some((name, value)) = line.split_once(' ') {
            let path = Path::new("/proc/sys").join(name);
            note(&mut problems, write(&path, value));
        }
    }
    // In directories that existed before, only what belongs to this cluster.
    remove_links(Path::new("/var/log/containers"), state);
    remove_network_results(Path::new("/var/lib/cni/results"), state);
    for path in lines(&state.join("elsewhere")).iter().rev() {
        remove_if_unmounted(Path::new(path), &mut problems);
    }
    for path in SHIM_SOCKETS {
        // Fails while another program uses it.
        let _in_use = fs::remove_dir(path);
    }
    // Last, because it records what there is to undo.
    if problems.is_empty() {
        remove_if_unmounted(state, &mut problems);
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::Start(format!("not undone: {}", problems.join("; "))))
}

fn refuse_another_kubelet() -> Result<()> {
    let refuse = |what: String| {
        Err(Error::Start(format!(
            "{what}: this machine seems to run a kubelet already, and the local cluster would \
             interfere with it"
        )))
    };
    let mut entries = fs::read_dir(KUBELET_ROOT).into_iter().flatten();
    if entries.next().is_some() {
        return refuse(format!("{KUBELET_ROOT} is not empty"));
    }
    match pod_cgroups().first() {
        Some(path) => refuse(format!("{} exists", path.display())),
        None => Ok(()),
    }
}

/// Mounts kubelet's root as a shared bind mount: what the driver mounts below it in its container
/// appears on the node.
fn mount_kubelet_root(state: &Path) -> Result<()> {
    let root = Path::new(KUBELET_ROOT);
    let inner = state.join("kubelet");
    for dir in [root, &inner] {
        fs::create_dir_all(dir).map_err(|error| failed(dir, &error))?;
    }
    let none = None::<&str>;
    mount(Some(&inner), root, none, MsFlags::MS_BIND, none)
        .map_err(|error| failed(root, &error))?;
    // Private first, so that it does not share mounts with the state directory's file system.
    for kind in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
        mount(none, root, none, kind | MsFlags::MS_REC, none)
            .map_err(|error| failed(root, &error))?;
    }
    Ok(())
}

/// Kills the shims, which survive containerd, and removes their sockets.
fn kill_shims(state: &Path) {
    let socket = state.join(CONTAINERD_SOCKET).into_os_string();
    let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    for (pid, process) in processes() {
        let command = fs::read(process.join("cmdline")).unwrap_or_default();
        let is_shim = command
            .split(|byte| *byte == 0)
            .any(|argument| argument == socket.as_encoded_bytes())
            && command.starts_with(b"/")
            && contains(&command, b"containerd-shim");
        if !is_shim {
            continue;
        }
        let held = held_sockets(&process, &sockets);
        let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
        for path in held {
            let _not_there = fs::remove_file(path);
        }
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn processes() -> Vec<(i32, PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
        .collect()
}

/// Returns the paths of the listening sockets below containerd's directory that a process has open.
fn held_sockets(process: &Path, table: &str) -> Vec<PathBuf> {
    let descriptors = fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    let inodes: Vec<String> = descriptors
        .filter_map(|entry| {
            let target = fs::read_link(entry.path()).ok()?;
            let target = target.to_str()?.strip_prefix("socket:[")?;
            Some(target.strip_suffix(']')?.to_owned())
        })
        .collect();
    table
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (inode, path) = (fields.get(6)?, fields.get(7)?);
            let ours = path.starts_with("/run/containerd/") && inodes.iter().any(|i| i == inode);
            ours.then(|| PathBuf::from(path))
        })
        .collect()
}

/// Returns the cgroups of pods, one in each hierarchy.
fn pod_cgroups() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let mut candidates = vec![root.join("kubepods")];
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten();
    candidates.extend(hierarchies.map(|entry| entry.path().join("kubepods")));
    candidates.retain(|path| path.is_dir());
    candidates
}

/// Kills the processes of pods and removes their cgroups.
fn kill_pods(problems: &mut Vec<String>) {
    let mut left = Vec::new();
    for _ in 0..20 {
        left.clear();
        for path in pod_cgroups() {
            remove_cgroup(&path, &mut left);
        }
        if left.is_empty() {
            return;
        }
        for pid in &left {
            let _gone = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    problems.push(format!("processes {left:?} of pods do not go"));
}

/// Removes a cgroup and those in it; collects the processes that prevent it.
fn remove_cgroup(path: &Path, left: &mut Vec<i32>) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path(), left);
        }
    }
    let processes = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    left.extend(
        processes
            .lines()
            .filter_map(|line| line.parse::<i32>().ok()),
    );
    // Fails while it has processes, which the caller reports.
    let _in_use = fs::remove_dir(path);
}

/// Unmounts all below the state directory and kubelet's root, innermost first.
fn unmount(state: &Path, problems: &mut Vec<String>) {
    for root in [state, Path::new(KUBELET_ROOT)] {
        let mut points = match mount_points(root) {
            Ok(points) => points,
            Err(error) => {
                problems.push(format!("mounts at {}: {error}", root.display()));
                continue;
            }
        };
        points.reverse();
        for point in points {
            let unmounted = umount2(&point, MntFlags::empty())
                .or_else(|_| umount2(&point, MntFlags::MNT_DETACH));
            // A mount may have gone together with another one.
            if let Err(error) = unmounted
                && mount_points(&point).is_ok_and(|left| left.contains(&point))
            {
                problems.push(format!("mount {}: {error}", point.display()));
            }
        }
    }
}

/// Removes the links that kubelet makes to each container's log.
fn remove_links(dir: &Path, to: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(to)) {
            let _gone = fs::remove_file(entry.path());
        }
    }
}

/// Removes the results that network plugins cache for each pod; they contain a path of the state
/// directory.
fn remove_network_results(dir: &Path, state: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let text = fs::read(entry.path()).unwrap_or_default();
        if contains(&text, state.as_os_str().as_encoded_bytes()) {
            let _gone = fs::remove_file(entry.path());
        }
    }
}

/// Removes a directory, unless something is mounted in it.
fn remove_if_unmounted(path: &Path, problems: &mut Vec<String>) {
    match mount_points(path) {
        Ok(points) if points.is_empty() => {}
        _ => return problems.push(format!("{} has mounts in it", path.display())),
    }
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            problems.push(format!("{}: {error}", path.display()));
        }
        _ => {}
    }
}

fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn note(problems: &mut Vec<String>, outcome: Result<()>) {
    if let Err(error) = outcome {
        problems.push(error.to_string());
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| failed(path, &error))
}

fn failed(path: &Path, error: &dyn Display) -> Error {
    Error::Start(format!("{}: {error}", path.display()))
}
