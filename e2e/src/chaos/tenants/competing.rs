//! Tenants whose answers compete for the memory of a driver.

use serde_json::{Value, json};

use super::{INTERVAL, VOLUME, pod_of, volume};

/// The pods with large and with small answers. The large ones take several times the memory that there is.
const GREEDY: usize = 6;
/// The pods with middle-sized answers, and how many of them come at the same time.
const MODEST: usize = 6;
const WAVE: usize = 2;
/// The number of objects of a class.
const OBJECTS: usize = 3;
/// The sizes of the objects of large, small and middle-sized answers, in bytes. Not all large ones have room when
/// they are mounted.
const LARGE: usize = 1_300_000;
const SMALL: usize = 100;
const MIDDLE: usize = 300_000;

/// Returns the classes and pods of a tenant with large and small answers, which are fetched again and again.
pub(in super::super) fn of_the_greedy(number: usize, node: &str) -> Vec<Value> {
    let sizes = [("large", LARGE), ("small", SMALL)];
    let of = |(name, size)| objects(&format!("{name}-{number}"), node, size, GREEDY);
    sizes.into_iter().flat_map(of).collect()
}

/// Returns a class and pods of another tenant, with answers of a usual size: waves of what comes at the same
/// time, each with the class.
pub(in super::super) fn of_the_modest(number: usize, node: &str) -> Vec<Vec<Value>> {
    let mut all = objects(&format!("middle-{number}"), node, MIDDLE, MODEST).into_iter();
    let class = all.next();
    let pods: Vec<Value> = all.collect();
    let waves = pods.chunks(WAVE);
    waves
        .map(|wave| class.iter().chain(wave).cloned().collect())
        .collect()
}

fn objects(name: &str, node: &str, size: usize, pods: usize) -> Vec<Value> {
    let array: Vec<Value> = (0..OBJECTS)
        .map(|object| json!({"objectName": format!("o{object}"), "contentSize": size}))
        .collect();
    let class = json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1",
        "kind": "SecretProviderClass",
        "metadata": {"name": name, "annotations": {INTERVAL: "1s"}},
        "spec": {
            "provider": "e2e-provider",
            "parameters": {"objects": json!({"array": array}).to_string()},
        },
    });
    let volume = volume(VOLUME, json!({"secretProviderClass": name}));
    let pods = (0..pods).map(|pod| {
        pod_of(
            &format!("{name}-{pod}"),
            node,
            std::slice::from_ref(&volume),
        )
    });
    std::iter::once(class).chain(pods).collect()
}
