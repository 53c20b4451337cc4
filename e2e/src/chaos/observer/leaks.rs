//! What must not be left when all pods are gone.

use std::fs;
use std::path::Path;

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::ListParams;

use crate::cluster::{Cluster as _, Result, api};
use crate::install::pod_statuses;

use super::super::ground::Ground;
use super::super::world::World;

pub(super) const PODS: &str = "/var/lib/kubelet/pods";
/// Lists what is there; what vanishes meanwhile is not.
pub(super) const FIND: &str = "find \"$@\" 2>/dev/null || true";
pub(super) const PLUGIN: &str = "/var/lib/kubelet/plugins/csi-secrets-store";
/// The descriptors, other than sockets, by which a driver between two calls may have more than it had at the
/// start.
const MORE_FILES: usize = 3;
/// The sockets by which it may have more: connections to the API server and to providers are kept for a
/// minute and a half after they were used.
const MORE_SOCKETS: usize = 32;
/// The threads by which it may have more: checks that never end use one after another.
const MORE_THREADS: usize = 4;
/// The memory by which a driver without work may have more than at the start. The allocator keeps
/// some, and the build of the tests more than that of a release.
const MORE_MEMORY: u64 = 48 << 20;

/// The resources of a driver's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Usage {
    pub(in super::super) files: usize,
    pub(in super::super) sockets: usize,
    pub(in super::super) memory: u64,
    pub(in super::super) threads: usize,
}

/// Returns the resources of the driver on a node; none while it does not run.
///
/// # Errors
/// When the node does not answer.
pub(in super::super) async fn usage<G: Ground>(ground: &G, node: &str) -> Result<Option<Usage>> {
    let Some(process) = ground.driver_process(node).await? else {
        return Ok(None);
    };
    let process = format!("/proc/{process}");
    let Ok(all) = fs::read_dir(Path::new(&process).join("fd")) else {
        return Ok(None);
    };
    let targets = all
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok());
    let (sockets, files): (Vec<_>, Vec<_>) =
        targets.partition(|target| target.to_string_lossy().starts_with("socket:"));
    let status = fs::read_to_string(Path::new(&process).join("status")).unwrap_or_default();
    let number = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches(" kB").parse().ok()
    };
    Ok(number("VmRSS:").map(|kib| Usage {
        files: files.len(),
        sockets: sockets.len(),
        memory: kib << 10,
        threads: number("Threads:").unwrap_or_default() as usize,
    }))
}

/// Returns what is left on a node and of the namespaces after all pods were deleted. `idle` is what
/// the driver had at the start.
///
/// # Errors
/// When the node or the API server does not answer.
pub(in super::super) async fn left<G: Ground>(
    world: &World,
    ground: &G,
    node: &str,
    idle: Usage,
    namespaces: &[&str],
) -> Result<Vec<String>> {
    world.log.checked("looks for leaks", 1);
    let mut left = Vec::new();
    for mount in ground.cluster().mounts(node, Path::new(PODS)).await? {
        if mount.to_string_lossy().contains("kubernetes.io~csi") {
            left.push(format!("mount {}", mount.display()));
        }
    }
    let pods = ground.run(
        node,
        &["sh", "-c", FIND, "sh", PODS, "-path", "*kubernetes.io~csi*"],
    );
    left.extend(pods.await?.lines().map(|path| format!("directory {path}")));
    let plugin = ground.run(
        node,
        &["sh", "-c", FIND, "sh", PLUGIN, "-not", "-type", "d"],
    );
    let socket = format!("{PLUGIN}/csi.sock");
    let files = plugin.await?;
    left.extend(
        files
            .lines()
            // A lock holds nothing.
            .filter(|path| **path != socket && !path.ends_with(".lock"))
            .map(|path| format!("file {path}")),
    );
    if !files.lines().any(|path| path == socket) {
        left.push(format!("no socket {socket}"));
    }
    for namespace in namespaces {
        let statuses = pod_statuses(&ground.cluster().client(), namespace);
        let statuses = statuses.list(&ListParams::default()).await;
        let statuses = statuses.map_err(api("list pod statuses".to_owned()))?;
        left.extend(
            statuses
                .iter()
                .map(|found| format!("pod status {:?}", found.metadata.name)),
        );
        let secrets = Api::<Secret>::namespaced(ground.cluster().client(), namespace);
        let secrets = secrets.list(&ListParams::default()).await;
        let secrets = secrets.map_err(api("list Secrets".to_owned()))?;
        left.extend(
            secrets
                .iter()
                .map(|found| format!("Secret {:?}", found.metadata.name)),
        );
    }
    let mut left: Vec<String> = left
        .into_iter()
        .map(|what| format!("on {node}: {what}"))
        .collect();
    left.extend(excess(ground, node, idle).await?);
    // A thread ends a while after its last work.
    let threads = usage(ground, node).await?.map_or(0, |now| now.threads);
    if threads > idle.threads + MORE_THREADS {
        let idle = idle.threads;
        left.push(format!("on {node}: {threads} threads, {idle} at the start"));
    }
    Ok(left)
}

/// Returns by what a node's driver has more than at the start, whatever number of volumes is mounted: a
/// driver holds nothing open for a volume.
///
/// # Errors
/// When the node does not answer.
pub(in super::super) async fn excess<G: Ground>(
    ground: &G,
    node: &str,
    idle: Usage,
) -> Result<Vec<String>> {
    let Some(now) = usage(ground, node).await? else {
        return Ok(vec![format!("on {node}: no driver")]);
    };
    let mut more = Vec::new();
    for (what, now, idle, allowed) in [
        ("files", now.files, idle.files, MORE_FILES),
        ("sockets", now.sockets, idle.sockets, MORE_SOCKETS),
    ] {
        if now > idle + allowed {
            more.push(format!("on {node}: {now} open {what}, {idle} at the start"));
        }
    }
    if now.memory > idle.memory + MORE_MEMORY {
        let (now, idle) = (now.memory, idle.memory);
        more.push(format!(
            "on {node}: {now} bytes of memory, {idle} at the start"
        ));
    }
    Ok(more)
}
