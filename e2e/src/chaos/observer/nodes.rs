//! What a node has, and says of itself, for the pods that are there: no mount or record of another, and metrics
//! that count what is mounted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::ListParams;
use nix::sys::statvfs::statvfs;

use crate::cluster::{Cluster as _, Component, Result, api};

use super::super::ground::Ground;
use super::super::lock;
use super::super::world::World;
use super::leaks::{FIND, PLUGIN, PODS};
use super::volumes::path_of;

/// The port of the driver's metrics.
const METRICS: u16 = 8095;
/// The most memory that a file takes besides its content.
const MOST_OF_A_FILE: u64 = 4 << 10;
/// The series of volumes of which a Secret fails.
const OUT_OF_STEP: &str = "secrets_store_volumes_out_of_step";
/// The series that say what is wrong now, or what is not over. Each is zero on a node at rest.
const NOTHING: [&str; 3] = [
    "secrets_store_volumes{state=\"stale\"}",
    "secrets_store_provider_calls_in_flight",
    "secrets_store_provider_calls_waiting",
];

/// Returns what a node has or says that is not so, for the pods of the namespaces that are there.
///
/// # Errors
/// When the node or the API server does not answer.
pub(in super::super) async fn untrue<G: Ground>(
    world: &World,
    ground: &G,
    node: &str,
    namespaces: &[&str],
) -> Result<Vec<String>> {
    world.log.checked("looks at what a node says", 1);
    let mut uids = Vec::new();
    for namespace in namespaces {
        let pods = Api::<Pod>::namespaced(ground.cluster().client(), namespace);
        let pods = pods.list(&ListParams::default()).await;
        let pods = pods.map_err(api("list pods".to_owned()))?;
        uids.extend(pods.into_iter().filter_map(|pod| pod.metadata.uid));
    }
    let mut untrue = Vec::new();
    let mut seen = BTreeSet::new();
    for mount in ground.cluster().mounts(node, Path::new(PODS)).await? {
        let path = mount.to_string_lossy().into_owned();
        let is_known = uids.iter().any(|uid| path.contains(uid.as_str()));
        if !path.contains("kubernetes.io~csi") {
            continue;
        }
        if !is_known {
            untrue.push(format!("mount {path} of a pod that is gone"));
        } else if !seen.insert(path.clone()) {
            untrue.push(format!("more than one mount on {path}"));
        }
    }
    let (volumes, bytes, files) = mounted(world, node);
    let find = ["sh", "-c", FIND, "sh", PLUGIN, "-type", "f"];
    let found = ground.run(node, &find).await?;
    // A lock holds nothing.
    let kept = found.lines().filter(|path| !path.ends_with(".lock"));
    let (records, others): (Vec<&str>, Vec<&str>) = kept.partition(|path| path.ends_with(".json"));
    untrue.extend(others.iter().map(|path| format!("file {path}")));
    let records = records.len();
    if records != volumes {
        untrue.push(format!("{records} records of {volumes} volumes"));
    }
    let driver = Component::Driver;
    let answer = ground.cluster().get(node, &driver, METRICS, "/metrics");
    // A driver that has just begun, or is about to, does not answer yet.
    let said = match answer.await {
        Ok(answer) => numbers(&answer.body),
        Err(error) => return Ok(vec![format!("on {node}: {error}")]),
    };
    let sum = |name: &str| -> f64 {
        let of_it = said.iter().filter(|(series, _)| series.starts_with(name));
        of_it.map(|(_, value)| value).sum()
    };
    for name in NOTHING {
        if sum(name) > 0.0 {
            untrue.push(format!("{name} is {}", sum(name)));
        }
    }
    let exactly = volumes as f64;
    let blocks = bytes as f64;
    let files = (files * MOST_OF_A_FILE) as f64;
    let failing = world.features.out_of_step(node) as f64;
    for (name, least, most) in [
        ("secrets_store_volumes{", exactly, exactly),
        (OUT_OF_STEP, failing, failing),
        ("secrets_store_mounted_bytes{", blocks, blocks + files),
    ] {
        if !(least..=most).contains(&sum(name)) {
            let said = sum(name);
            untrue.push(format!("{name} is {said} instead of {least} to {most}"));
        }
    }
    let untrue = untrue.into_iter().map(|what| format!("on {node}: {what}"));
    Ok(untrue.collect())
}

/// Returns the number of volumes of the pods that run on a node, and of the bytes and files in them.
fn mounted(world: &World, node: &str) -> (usize, u64, u64) {
    let root = lock(&world.roots).get(node).cloned();
    let pods = lock(&world.pods).clone();
    let of_node = pods.values().filter(|pod| pod.ready && pod.node == node);
    let mut paths = Vec::new();
    for (pod, root) in of_node.zip(root.iter().cycle()) {
        paths.extend(pod.classes.iter().map(|class| path_of(pod, root, *class)));
    }
    for root in root.iter() {
        paths.extend(world.features.volumes(node, root));
    }
    let (mut bytes, mut files) = (0, 0);
    for found in paths.iter().filter_map(|path| statvfs(path).ok()) {
        bytes += (found.blocks() - found.blocks_free()) * found.fragment_size();
        files += found.files() - found.files_free();
    }
    (paths.len(), bytes, files)
}

/// Returns the values of a page of metrics, by the series with its labels.
fn numbers(page: &str) -> BTreeMap<String, f64> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            Some((series.to_owned(), value.parse().ok()?))
        })
        .collect()
}
