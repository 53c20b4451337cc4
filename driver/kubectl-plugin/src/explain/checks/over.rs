//! Finds volumes that a container mounts over what it needs: its program, or what else is mounted there.

use k8s_openapi::api::core::v1::{Container, VolumeMount};

use crate::explain::facts::Facts;

/// The directories where programs are looked up, and where they have their libraries.
const OF_PROGRAMS: [&str; 13] = [
    "/",
    "/bin",
    "/sbin",
    "/usr",
    "/usr/bin",
    "/usr/sbin",
    "/usr/local",
    "/usr/local/bin",
    "/usr/local/sbin",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
];
/// Pieces of what a runtime says that does not find a program.
const NO_PROGRAM: [&str; 2] = ["executable file not found", "no such file or directory"];

/// Returns which mount of a container is in the way, if the runtime's words and the mounts say so.
pub(super) fn mount(facts: &Facts, container: &str, said: &str) -> Option<String> {
    let mut containers = facts.containers();
    let container = containers.find(|found| found.name == container)?;
    if let Some(at) = between(said, "to rootfs at \"", "\"") {
        return of_mount(container, at, said);
    }
    if !NO_PROGRAM.iter().any(|piece| said.contains(piece)) {
        return None;
    }
    let program = between(said, "exec: \"", "\"").unwrap_or_default();
    let mut mounts = container.volume_mounts.iter().flatten();
    let mount = mounts.find(|mount| match program.starts_with('/') {
        true => is_below(program, path(mount)) || OF_PROGRAMS.contains(&path(mount)),
        false => OF_PROGRAMS.contains(&path(mount)),
    })?;
    Some(format!(
        "volume {} lies over {} and hides all that the image has there: choose another mountPath",
        mount.name,
        path(mount)
    ))
}

/// Returns which mount is in the way of another one, or cannot be where it is.
fn of_mount(container: &Container, at: &str, said: &str) -> Option<String> {
    let mounts = || container.volume_mounts.iter().flatten();
    if let Some(mount) = mounts().find(|mount| path(mount) == at.trim_end_matches('/')) {
        if said.contains("not a directory") {
            return Some(format!(
                "volume {} is mounted at {at}, which is a file in the image: choose a directory as mountPath",
                mount.name
            ));
        }
        let over = mounts().find(|over| path(over) != at && is_below(at, path(over)))?;
        return Some(below(over, &format!("volume {} at {at}", mount.name), said));
    }
    let over = mounts().find(|over| is_below(at, path(over)))?;
    Some(below(over, at, said))
}

fn below(over: &VolumeMount, what: &str, said: &str) -> String {
    let why = match said.contains("read-only file system") {
        true => ", where nothing can be made",
        false => "",
    };
    format!(
        "volume {} is mounted at {}{why}, and {what} is to be mounted below it: choose another mountPath",
        over.name,
        path(over)
    )
}

/// Returns the path of a mount without a slash at its end.
fn path(mount: &VolumeMount) -> &str {
    match mount.mount_path.trim_end_matches('/') {
        "" => "/",
        path => path,
    }
}

/// Returns whether a path is another one, or below it.
fn is_below(path: &str, directory: &str) -> bool {
    let rest = path.strip_prefix(directory.trim_end_matches('/'));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn between<'a>(text: &'a str, begin: &str, end: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(begin)?;
    Some(rest.split_once(end)?.0)
}
