//! Checks the promises of the driver all the time, from outside: it reads what pods read, watches
//! what the API server has, and knows the history of the store. It shares no code with the driver.

mod calm;
mod content;
mod fresh;
mod kept;
mod leaks;
mod nodes;
mod secrets;
mod statuses;
mod traces;
mod volumes;
mod warnings;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use embedded::is_ready;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::Api;
use kube::api::ListParams;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinSet;

use super::features;
use super::lock;
use super::tenants::{classes_of, pod_name};
use super::world::{LIST, Watched, World};
use crate::install::pod_statuses;
pub(super) use calm::lacking;
pub(super) use leaks::{Usage, excess, left, usage};
pub(super) use nodes::untrue;
pub(super) use traces::{TOLD, untraced};
use volumes::Suspicion;
pub(super) use volumes::{is_mount, path_of};
pub(super) use warnings::warned;

/// The parts of the observer that run all the time. Dropping it ends them.
pub(super) struct Observer {
    stop: Arc<AtomicBool>,
    readers: Vec<JoinHandle<()>>,
    _tasks: JoinSet<()>,
}

impl Observer {
    /// Starts to observe.
    pub(super) fn start(world: &Arc<World>, client: &kube::Client) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (out, suspicions) = unbounded_channel();
        let readers = [volumes::read_all, volumes::read_all_slowly].map(|read| {
            let (world, stop, out) = (Arc::clone(world), Arc::clone(&stop), out.clone());
            std::thread::spawn(move || read(&world, &stop, &out))
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(list_pods(Arc::clone(world), client.clone()));
        tasks.spawn(confirm(Arc::clone(world), client.clone(), suspicions));
        tasks.spawn(secrets::watch(Arc::clone(world), client.clone()));
        tasks.spawn(fresh::watch(Arc::clone(world), client.clone()));
        tasks.spawn(features::watch(Arc::clone(world), client.clone()));
        Self {
            stop,
            readers: readers.into(),
            _tasks: tasks,
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for reader in self.readers.drain(..) {
            if reader.join().is_err() {
                eprintln!("a reader of the volumes broke off");
            }
        }
    }
}

/// Keeps the list of pods, and checks the time that each takes until it is ready.
async fn list_pods(world: Arc<World>, client: kube::Client) {
    let secrets = Api::<Secret>::namespaced(client.clone(), &world.namespace);
    let statuses = pod_statuses(&client, &world.namespace);
    let api = Api::<Pod>::namespaced(client, &world.namespace);
    let mut ready = VecDeque::new();
    loop {
        if let Ok(list) = api.list(&ListParams::default()).await {
            let now_ready = note_pods(&world, &list.items);
            for (pod, is_undisturbed) in now_ready {
                if is_undisturbed {
                    secrets::judge_environment(&world, &secrets, &pod).await;
                }
                ready.push_back((Instant::now(), pod));
            }
        }
        while let Some((seen, pod)) = ready.pop_front() {
            if seen.elapsed() < secrets::LATER {
                ready.push_front((seen, pod));
                break;
            }
            secrets::judge_ready(&world, &pod);
            statuses::judge_owner(&world, &statuses, &pod).await;
        }
        world.listed();
        tokio::time::sleep(LIST).await;
    }
}

/// Keeps the list of pods. Returns those that have become ready, and whether nothing disturbed them.
fn note_pods(world: &World, list: &[Pod]) -> Vec<(Watched, bool)> {
    let mut known = lock(&world.pods);
    known.retain(|uid, _| {
        list.iter()
            .any(|pod| pod.metadata.uid.as_ref() == Some(uid))
    });
    let mut ready = Vec::new();
    for pod in list {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let before = known.get(&uid).cloned();
        let Some(pod) = watched(world, pod, before.as_ref()) else {
            continue;
        };
        check_waiting(world, &pod, before.as_ref());
        if pod.ready && before.as_ref().is_none_or(|before| !before.ready) {
            ready.push((pod.clone(), is_undisturbed(world, before.as_ref())));
        }
        known.insert(uid, pod);
    }
    ready
}

/// Returns whether there was no fault but a hostile tenant, and no single failure, since a pod that is ready
/// now was created.
fn is_undisturbed(world: &World, before: Option<&Watched>) -> bool {
    let since = before.and_then(|before| before.waiting);
    since.is_some_and(|since| {
        world.is_calm_since(since) && world.good.allowance(since) == Duration::ZERO
    })
}

/// Returns whether the containers of a pod have ended and do not start again.
pub(super) fn has_ended(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

/// Returns a well-behaved pod.
fn watched(world: &World, pod: &Pod, before: Option<&Watched>) -> Option<Watched> {
    let name = pod.metadata.name.clone()?;
    let number = (0..super::schedule::PODS).find(|number| pod_name(*number) == name)?;
    let is_deleted = pod.metadata.deletion_timestamp.is_some();
    let ended = has_ended(pod);
    let ready = is_ready(pod) && !is_deleted && !ended;
    let waiting = before.and_then(|before| before.waiting);
    let waiting = waiting.or(Some(world.now()));
    let created = before.map(|before| before.created).unwrap_or_else(|| {
        // It has whole seconds, and is not later than the creation.
        let at = pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
        let age = at.map_or(Duration::ZERO, |at| {
            jiff::Timestamp::now().duration_since(at).unsigned_abs()
        });
        world.log.tell(format!("pod {name} is there"));
        let now = Instant::now();
        now.checked_sub(age).unwrap_or(now)
    });
    Some(Watched {
        uid: pod.metadata.uid.clone()?,
        node: pod.spec.as_ref()?.node_name.clone()?,
        classes: classes_of(number),
        ready,
        created,
        ended,
        waiting: waiting.filter(|_| !ready && !is_deleted && !ended),
        name,
    })
}

/// Checks how long a pod has waited, and since when nothing but a hostile tenant can be the reason.
fn check_waiting(world: &World, pod: &Watched, before: Option<&Watched>) {
    world.log.checked("looks at a pod", 1);
    let Some(since) = pod.waiting else {
        if let Some(since) = before.and_then(|before| before.waiting)
            && pod.ready
        {
            world.log.tell(format!("pod {} is ready", pod.name));
            if world.is_calm_since(since) {
                world
                    .log
                    .took("publish without a fault", world.now() - since);
            }
        }
        return;
    };
    let waits = world.now().saturating_sub(since);
    if waits > world.bounds_since(since).silence {
        world.fails(pod, "it is not ready", since);
    }
    let Some(calm) = *lock(&world.calm) else {
        return;
    };
    // A pod that waited during a fault has the time to converge.
    if calm < since && waits > world.bounds_since(since).publish {
        let text = format!("pod {} ({}) waits", pod.name, pod.uid);
        world.log.find("a pod is ready within its bound", text);
    }
}

/// Confirms suspicions: what was seen counts if the pod still runs afterwards, on a node that was up.
async fn confirm(
    world: Arc<World>,
    client: kube::Client,
    mut suspicions: UnboundedReceiver<Suspicion>,
) {
    let api = Api::<Pod>::namespaced(client, &world.namespace);
    while let Some(suspicion) = suspicions.recv().await {
        world.log.checked("suspicions", 1);
        let Suspicion {
            pod,
            root,
            invariant,
            seen,
        } = suspicion;
        let Ok(Some(now)) = api.get_opt(&pod.name).await else {
            continue;
        };
        let is_same = now.metadata.uid.as_ref() == Some(&pod.uid);
        let runs = is_ready(&now) && now.metadata.deletion_timestamp.is_none() && !has_ended(&now);
        if is_same && runs && world.is_up(&pod.node, &root) && !world.is_buried(&pod.uid) {
            world.log.find(invariant, seen);
        }
    }
}
