//! Finds the volumes that kubelet has not looked at since their refresh was due. The driver is not asked then, so that
//! it records no failure of its own.

use std::collections::BTreeMap;

use driver::{
    cluster::{interval::INTERVAL, resources::SecretProviderClass},
    record,
    status::{Status, Volume},
};
use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, ResourceExt as _};

use super::nodes::Asked;
use crate::{
    cluster::{Listed, Read, read},
    due,
};

/// The pods that are read at most, those first whose volumes are due for longest, and how many at the same time.
const MAX_PODS: usize = 100;
const AT_ONCE: usize = 8;

/// A volume whose refresh is due for longer than kubelet's rhythm explains.
#[derive(Debug, Clone)]
pub(super) struct Overdue {
    pub(super) node: String,
    pub(super) pod: record::Pod,
    /// Its name in the pod.
    pub(super) volume: String,
    pub(super) due: Timestamp,
}

/// A volume of a node, and what is known of it.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    asked: &'a Asked,
    status: &'a Status,
    volume: &'a Volume,
    /// The interval of its class.
    of_class: Option<&'a str>,
    due: Timestamp,
}

/// The volumes that were found, and why others may be missing.
#[derive(Default)]
pub(super) struct Late {
    /// Those first that are due for longest.
    pub(super) volumes: Vec<Overdue>,
    pub(super) unknown: Option<String>,
}

/// The intervals of classes, by namespace and name.
type Intervals<'a> = BTreeMap<(&'a str, &'a str), Option<&'a str>>;

/// Finds them on the nodes that were asked. What cannot be read of classes is said of these.
pub(super) async fn find(
    client: &Client,
    asked: &[Asked],
    classes: &Read<Listed<SecretProviderClass>>,
) -> Late {
    let classes = classes.found().into_iter();
    let intervals = classes.flat_map(|classes| &classes.items);
    let intervals: Intervals<'_> = intervals.filter_map(interval).collect();
    let each = asked.iter();
    let mut candidates: Vec<_> = each
        .flat_map(|asked| candidates(asked, &intervals))
        .collect();
    candidates.sort_by_key(|candidate| candidate.due);
    let mut late = Late::default();
    if candidates.len() > MAX_PODS {
        let count = candidates.len();
        late.unknown = Some(format!(
            "of {count} volumes that may be late, {MAX_PODS} were looked at"
        ));
    }
    let each = stream::iter(candidates.into_iter().take(MAX_PODS));
    let each = each.map(|candidate| async move {
        let pod = &candidate.volume.pod;
        let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace);
        (candidate, read(pods.get(&pod.name)).await)
    });
    let all: Vec<_> = each.buffered(AT_ONCE).collect().await;
    for (candidate, pod) in all {
        late.volumes
            .extend(pod.found().and_then(|pod| candidate.confirmed(pod)));
        // A pod that is gone has volumes that are about to be unmounted.
        if let Some(why) = pod.unknown() {
            let namespace = &candidate.volume.pod.namespace;
            late.unknown = Some(format!("pods of namespace {namespace}: {why}"));
        }
    }
    late
}

fn interval(class: &SecretProviderClass) -> Option<((&str, &str), Option<&str>)> {
    let metadata = &class.metadata;
    let key = (metadata.namespace.as_deref()?, metadata.name.as_deref()?);
    let every = class.annotations().get(INTERVAL);
    Some((key, every.map(String::as_str)))
}

/// Returns the volumes of a node that are late, as far as their classes tell.
fn candidates<'a>(
    asked: &'a Asked,
    intervals: &Intervals<'a>,
) -> impl Iterator<Item = Candidate<'a>> {
    let volumes = asked.status().into_iter().flat_map(|status| {
        let volumes = status.volumes.iter();
        volumes.map(move |volume| (status, volume))
    });
    volumes.filter_map(move |(status, volume)| {
        if !volume.mounted || volume.stale_since.is_some() {
            return None;
        }
        let class = (volume.pod.namespace.as_str(), volume.class.as_str());
        let of_class = *intervals.get(&class)?;
        let due = due::next(status, volume, of_class).due()?;
        let is_late = due::is_late(status, volume, due, asked.started);
        is_late.then_some(Candidate {
            asked,
            status,
            volume,
            of_class,
            due,
        })
    })
}

impl Candidate<'_> {
    /// Returns the volume if it is late by what its pod says, and kubelet looks at the volumes of the pod.
    fn confirmed(&self, pod: &Pod) -> Option<Overdue> {
        let is_it = pod.metadata.uid.as_deref() == Some(&self.volume.pod.uid);
        if !is_it || !is_looked_at(pod) {
            return None;
        }
        let name = self.name()?;
        let volumes = pod.spec.as_ref()?.volumes.iter().flatten();
        let mut sources = volumes.filter(|volume| volume.name == name);
        let source = sources.next()?.csi.as_ref()?;
        let attributes = source.volume_attributes.as_ref();
        let own = attributes.and_then(|all| all.get(INTERVAL));
        let interval = own.map(String::as_str).or(self.of_class);
        let due = due::next(self.status, self.volume, interval).due()?;
        let is_late = due::is_late(self.status, self.volume, due, self.asked.started);
        is_late.then(|| Overdue {
            node: self.asked.node.clone(),
            pod: self.volume.pod.clone(),
            volume: name.to_owned(),
            due,
        })
    }

    /// Returns the volume's name in its pod, which kubelet makes its path of.
    fn name(&self) -> Option<&str> {
        self.volume.target_path.parent()?.file_name()?.to_str()
    }
}

/// Returns whether kubelet looks at the volumes of a pod: not if it ends or has ended, and not while the hook of a
/// container may run that kubelet waits for.
fn is_looked_at(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref());
    let has_hook = |name: &str| {
        let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
        let mut hooks = containers.filter(|container| container.name == name);
        hooks.any(|container| {
            let lifecycle = container.lifecycle.as_ref();
            lifecycle.is_some_and(|lifecycle| lifecycle.post_start.is_some())
        })
    };
    let mut statuses = status
        .iter()
        .flat_map(|s| s.container_statuses.iter().flatten());
    let waits = statuses.any(|status| {
        let state = status.state.as_ref();
        let runs = state.is_some_and(|state| state.running.is_some());
        !runs && has_hook(&status.name)
    });
    pod.metadata.deletion_timestamp.is_none()
        && !matches!(phase, Some("Succeeded" | "Failed"))
        && !waits
}
