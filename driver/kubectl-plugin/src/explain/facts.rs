//! Reads all that belongs to a pod's volumes: objects of the API server, and what the node's driver says.

mod expanded;
mod known;
mod taken;
mod written;

use std::collections::{BTreeMap, BTreeSet};

use driver::{
    cluster::resources::{SecretProviderClass, SecretProviderClassPodStatus},
    record::is_object_name,
};
use futures::{StreamExt as _, future::join_all, stream};
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::StatefulSet,
    core::v1::{CSIVolumeSource, Event, Node, Pod, Secret},
    storage::v1::{CSIDriver, CSINode},
};
use kube::{Api, Client, ResourceExt as _, api::ListParams};

pub(super) use taken::{SecretVolume, Take};
use written::Written;

use crate::{
    cluster::{Read, list, list_metadata, read},
    installation::{self, DRIVER, Installed, NodeSays},
};

/// The objects of each kind that are read at most.
const MAX_EVENTS: usize = 1_000;
const MAX_STATUSES: usize = 5_000;
const MAX_CLASSES: usize = 2_000;
const MAX_SECRETS: usize = 100;
/// The requests about Secrets that run at the same time.
const AT_ONCE: usize = 8;

/// Everything that is known of a pod's volumes.
pub(super) struct Facts {
    /// The time at which the facts were read, by this machine's clock.
    pub now: Timestamp,
    /// The pod.
    pub pod: Pod,
    /// The events of the pod, the last one first.
    pub events: Read<Vec<Event>>,
    /// Its volumes of the driver.
    pub volumes: Vec<VolumeFacts>,
    /// The classes of the namespace, if they are needed: a class is missing, or the pod takes a Secret that does not exist
    /// or is the driver's, and that no volume of the pod makes.
    pub classes: Option<Read<Vec<SecretProviderClass>>>,
    /// The classes of the namespace that pods mount, if one of them makes a Secret that the pod takes and that none of its
    /// own makes.
    pub mounted: Option<Read<BTreeSet<String>>>,
    /// The Secrets that classes and containers name: the metadata only.
    pub secrets: BTreeMap<String, Read<Written>>,
    /// The object CSIDriver.
    pub csi_driver: Read<CSIDriver>,
    /// The DaemonSets of the driver.
    pub installed: Read<Vec<Installed>>,
    /// The pod's node, if it has one.
    pub node: Option<NodeFacts>,
    /// The StatefulSet that makes the pod, if one does.
    pub stateful_set: Option<Read<StatefulSet>>,
}

/// What is known of one volume.
pub(super) struct VolumeFacts {
    /// Its name in the pod.
    pub name: String,
    /// Its source in the pod.
    pub source: CSIVolumeSource,
    /// The name of its class; empty if it names none.
    pub class_name: String,
    /// Its class.
    pub class: Read<SecretProviderClass>,
    /// Its pod status.
    pub pod_status: Read<SecretProviderClassPodStatus>,
    /// The other namespaces that have a class of this name, if it is missing here and they may be read.
    pub elsewhere: Vec<String>,
}

/// What is known of a pod's node.
pub(super) struct NodeFacts {
    /// Its name.
    pub name: String,
    /// Its object.
    pub node: Read<Node>,
    /// The drivers that are registered there.
    pub csi_node: Read<CSINode>,
    /// The driver's pod there, and the DaemonSet that it is of.
    pub driver: Read<Option<(Installed, Pod)>>,
    /// What the driver says, if it has a pod there.
    pub says: Option<NodeSays>,
}

impl Facts {
    /// Reads them.
    ///
    /// # Errors
    /// Says why there is nothing to explain.
    pub(super) async fn read(
        client: &Client,
        namespace: &str,
        name: &str,
        driver_namespace: Option<&str>,
    ) -> Result<Self, String> {
        for (text, of) in [(name, "pod"), (namespace, "namespace")] {
            if !is_object_name(text) {
                return Err(format!("{text:?} cannot be the name of a {of}"));
            }
        }
        let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let pod = match read(pods.get(name)).await {
            Read::Is(pod) => pod,
            Read::Missing => return Err(no_pod(&pods, namespace, name).await),
            Read::NoKind => return Err("this is not the address of an API server".to_owned()),
            Read::Unknown(why) => {
                return Err(format!("pod {namespace}/{name} cannot be read: {why}"));
            }
        };
        let csi_drivers: Api<CSIDriver> = Api::all(client.clone());
        let (events, volumes, csi_driver, (installed, node), stateful_set) = tokio::join!(
            events(client, &pod),
            volumes(client, &pod),
            read(csi_drivers.get(DRIVER)),
            node(client, &pod, driver_namespace),
            stateful_set(client, &pod),
        );
        let mut facts = Self {
            now: Timestamp::now(),
            pod,
            events,
            volumes,
            classes: None,
            mounted: None,
            secrets: BTreeMap::new(),
            csi_driver,
            installed,
            node,
            stateful_set,
        };
        facts.read_secrets(client, namespace).await;
        if facts.needs_classes() {
            let classes: Api<SecretProviderClass> = Api::namespaced(client.clone(), namespace);
            let classes = list(&classes, ListParams::default(), MAX_CLASSES).await;
            facts.classes = Some(classes.map(|classes| classes.items));
            facts.read_mounted(client, namespace).await;
        }
        Ok(facts)
    }

    /// Reads which classes of the namespace pods mount, if that matters: a Secret that the pod takes is made by one that it
    /// does not mount itself.
    async fn read_mounted(&mut self, client: &Client, namespace: &str) {
        let classes = self.classes.as_ref().and_then(Read::found);
        let mut made = classes
            .into_iter()
            .flatten()
            .flat_map(|class| &class.spec.secret_objects);
        let left = self.left_over();
        if !made.any(|made| left.contains(&made.secret_name.as_str())) {
            return;
        }
        let api: Api<SecretProviderClassPodStatus> = Api::namespaced(client.clone(), namespace);
        let statuses = list(&api, ListParams::default(), MAX_STATUSES).await;
        self.mounted = Some(match statuses {
            Read::Is(statuses) if statuses.is_cut => {
                Read::Unknown(format!("there are more than {MAX_STATUSES} pod statuses"))
            }
            statuses => statuses.map(|statuses| {
                let mounted = statuses.items.into_iter().map(|found| found.status);
                let mounted = mounted.filter(|status| status.mounted);
                mounted
                    .map(|status| status.secret_provider_class_name)
                    .collect()
            }),
        });
    }

    /// Returns the Secrets of the driver that the pod takes and that no class of it makes, in the order in which the pod
    /// takes them.
    pub(super) fn left_over(&self) -> Vec<&str> {
        let mut all: Vec<&str> = Vec::new();
        let of_volumes = self.secret_volumes().into_iter();
        let of_volumes = of_volumes.map(|volume| volume.secret);
        let of_images = self.pull_secrets().filter(|_| !self.volumes.is_empty());
        let of_images = of_images.map(str::to_owned);
        let of_environment = self.takes().into_iter().map(|take| take.secret.to_owned());
        for name in of_volumes.chain(of_images).chain(of_environment) {
            let Some((name, Read::Is(written))) = self.secrets.get_key_value(&name) else {
                continue;
            };
            let is_made = self.volumes.iter().any(|volume| volume.makes(name));
            let is_left = written.is_managed && !written.is_of_others;
            let is_left = is_left && !written.is_deleted && !is_made;
            if is_left && !all.contains(&name.as_str()) {
                all.push(name);
            }
        }
        all
    }

    async fn read_secrets(&mut self, client: &Client, namespace: &str) {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
        let mut names: BTreeSet<String> = self.named_secrets();
        let optional = self.takes_if_there().into_iter();
        names.extend(optional.map(|take| take.secret.to_owned()));
        for volume in &self.volumes {
            let reference = volume.source.node_publish_secret_ref.as_ref();
            names.extend(reference.map(|reference| reference.name.clone()));
            let made = volume
                .class
                .found()
                .into_iter()
                .flat_map(|class| &class.spec.secret_objects);
            names.extend(made.map(|made| made.secret_name.clone()));
        }
        names.remove("");
        let each = stream::iter(names.into_iter().take(MAX_SECRETS)).map(|name| {
            let secrets = secrets.clone();
            async move {
                let found = match is_object_name(&name) {
                    true => read(secrets.get_metadata(&name)).await,
                    false => Read::Missing,
                };
                (name, found.map(|found| Written::of(&found.metadata)))
            }
        });
        self.secrets = each.buffer_unordered(AT_ONCE).collect().await;
    }

    /// Returns the Secrets that the pod names: for its environment, as volumes, and for its images.
    fn named_secrets(&self) -> BTreeSet<String> {
        let of_environment = self.takes().into_iter().map(|take| take.secret.to_owned());
        let of_volumes = self.secret_volumes().into_iter();
        let of_volumes = of_volumes.map(|volume| volume.secret);
        let of_images = self.pull_secrets().map(str::to_owned);
        // Those of the images of a pod without volumes of the driver are nobody's business here.
        let of_images = of_images.filter(|_| !self.volumes.is_empty());
        of_environment.chain(of_volumes).chain(of_images).collect()
    }

    fn needs_classes(&self) -> bool {
        let has_one_missing = self.volumes.iter().any(|volume| volume.class.is_missing());
        let mut taken = self.named_secrets().into_iter();
        let of_others = taken.any(|secret| {
            let is_missing = self.secrets.get(&secret).is_some_and(Read::is_missing);
            is_missing && !self.volumes.iter().any(|volume| volume.makes(&secret))
        });
        has_one_missing || of_others || !self.left_over().is_empty()
    }
}

impl VolumeFacts {
    /// Returns whether its class makes a Secret.
    pub(super) fn makes(&self, secret: &str) -> bool {
        let made = self
            .class
            .found()
            .into_iter()
            .flat_map(|class| &class.spec.secret_objects);
        made.into_iter().any(|made| made.secret_name == secret)
    }
}

/// Says that there is no such pod, and which ones there are whose names begin alike.
async fn no_pod(pods: &Api<Pod>, namespace: &str, name: &str) -> String {
    const SHOWN: usize = 5;
    let found = list_metadata(pods, ListParams::default(), 2_000).await;
    let names = found.found().map(|found| {
        let names = found.items.iter().map(kube::ResourceExt::name_any);
        let mut names: Vec<_> = names.filter(|found| found.starts_with(name)).collect();
        names.sort();
        names
    });
    match names {
        Some(names) if !names.is_empty() => format!(
            "there is no pod {name} in namespace {namespace}; there are {}{}",
            names
                .iter()
                .take(SHOWN)
                .cloned()
                .collect::<Vec<_>>()
                .join(", "),
            if names.len() > SHOWN {
                " and others"
            } else {
                ""
            }
        ),
        _ => format!(
            "there is no pod {name} in namespace {namespace}; name another namespace with -n"
        ),
    }
}

async fn stateful_set(client: &Client, pod: &Pod) -> Option<Read<StatefulSet>> {
    let mut owners = pod.owner_references().iter();
    let set = owners.find(|owner| owner.controller == Some(true))?;
    if set.kind != "StatefulSet" {
        return None;
    }
    let sets: Api<StatefulSet> =
        Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let found = read(sets.get(&set.name)).await;
    // One of the same name made later has nothing to do with the pod.
    let is_other = found
        .found()
        .is_some_and(|found| found.uid().as_ref() != Some(&set.uid));
    Some(if is_other { Read::Missing } else { found })
}

async fn events(client: &Client, pod: &Pod) -> Read<Vec<Event>> {
    let api: Api<Event> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let of_pod = ListParams::default().fields(&format!("involvedObject.name={}", pod.name_any()));
    let events = list(&api, of_pod, MAX_EVENTS).await;
    events.map(|events| {
        let uid = pod.uid();
        let is_of_it = |event: &Event| event.involved_object.uid == uid;
        let mut events: Vec<_> = events.items.into_iter().filter(is_of_it).collect();
        events.sort_by_key(|event| std::cmp::Reverse(time_of(event)));
        events
    })
}

/// Returns the last time of an event.
pub(crate) fn time_of(event: &Event) -> Option<Timestamp> {
    let series = event
        .series
        .as_ref()
        .and_then(|series| series.last_observed_time.as_ref());
    let micro = series.or(event.event_time.as_ref()).map(|time| time.0);
    let last = event
        .last_timestamp
        .as_ref()
        .or(event.first_timestamp.as_ref());
    last.map(|time| time.0).max(micro)
}

async fn volumes(client: &Client, pod: &Pod) -> Vec<VolumeFacts> {
    let volumes = pod
        .spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten());
    let ours = volumes.filter_map(|volume| {
        let source = volume
            .csi
            .clone()
            .filter(|source| source.driver == DRIVER)?;
        Some((volume.name.clone(), source))
    });
    let ours: Vec<_> = ours.collect();
    if ours.is_empty() {
        return Vec::new();
    }
    let statuses = pod_statuses(client, pod).await;
    let each = ours
        .into_iter()
        .map(|(name, source)| volume(client, pod, name, source, &statuses));
    join_all(each).await
}

async fn volume(
    client: &Client,
    pod: &Pod,
    name: String,
    source: CSIVolumeSource,
    statuses: &Read<Vec<SecretProviderClassPodStatus>>,
) -> VolumeFacts {
    let namespace = pod.namespace().unwrap_or_default();
    let attributes = source.volume_attributes.iter().flatten();
    let class_name = attributes
        .filter(|(key, _)| *key == "secretProviderClass")
        .map(|(_, value)| value.clone())
        .next_back()
        .unwrap_or_default();
    let classes: Api<SecretProviderClass> = Api::namespaced(client.clone(), &namespace);
    let class = match is_object_name(&class_name) {
        false => Read::Missing,
        true => read(classes.get(&class_name)).await,
    };
    let elsewhere = match class.is_missing() && is_object_name(&class_name) {
        true => elsewhere(client, &class_name).await,
        false => Vec::new(),
    };
    let end = format!("/{name}/mount");
    let pod_status = match statuses {
        Read::Is(all) => {
            let found = all.iter().find(|found| {
                found.status.target_path.ends_with(&end)
                    && found.status.secret_provider_class_name == class_name
            });
            found.cloned().map_or(Read::Missing, Read::Is)
        }
        other => other
            .clone()
            .map(|_| SecretProviderClassPodStatus::default()),
    };
    VolumeFacts {
        name,
        source,
        class_name,
        class,
        pod_status,
        elsewhere,
    }
}

/// Reads the pod statuses of a pod: its names can be those of other volumes, so the owner decides.
async fn pod_statuses(client: &Client, pod: &Pod) -> Read<Vec<SecretProviderClassPodStatus>> {
    let namespace = pod.namespace().unwrap_or_default();
    let api: Api<SecretProviderClassPodStatus> = Api::namespaced(client.clone(), &namespace);
    let uid = pod.uid().unwrap_or_default();
    let statuses = list(&api, ListParams::default(), MAX_STATUSES).await;
    statuses.map(|statuses| {
        let is_of_it = |status: &SecretProviderClassPodStatus| {
            let owners = status.metadata.owner_references.iter().flatten();
            owners.into_iter().any(|owner| owner.uid == uid)
        };
        statuses.items.into_iter().filter(is_of_it).collect()
    })
}

async fn elsewhere(client: &Client, class: &str) -> Vec<String> {
    let all: Api<SecretProviderClass> = Api::all(client.clone());
    let named = ListParams::default().fields(&format!("metadata.name={class}"));
    let found = list_metadata(&all, named, MAX_CLASSES).await;
    let found = found.found().into_iter().flat_map(|found| &found.items);
    found.filter_map(kube::ResourceExt::namespace).collect()
}

async fn node(
    client: &Client,
    pod: &Pod,
    driver_namespace: Option<&str>,
) -> (Read<Vec<Installed>>, Option<NodeFacts>) {
    let installed = installation::find(client, driver_namespace);
    let Some(name) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) else {
        return (installed.await, None);
    };
    let nodes: Api<Node> = Api::all(client.clone());
    let csi_nodes: Api<CSINode> = Api::all(client.clone());
    let (installed, node, csi_node) = tokio::join!(
        installed,
        read(nodes.get(&name)),
        read(csi_nodes.get(&name))
    );
    let driver = driver_on(client, &installed, &name).await;
    let says = match &driver {
        Read::Is(Some((installed, pod))) if is_running(pod, &installed.container) => {
            Some(installation::ask(client, pod, &installed.container).await)
        }
        _ => None,
    };
    let facts = NodeFacts {
        name,
        node,
        csi_node,
        driver,
        says,
    };
    (installed, Some(facts))
}

/// Finds the driver's pod on a node.
async fn driver_on(
    client: &Client,
    installed: &Read<Vec<Installed>>,
    node: &str,
) -> Read<Option<(Installed, Pod)>> {
    let sets = match installed {
        Read::Is(sets) => sets,
        other => return other.clone().map(|_| None),
    };
    for set in sets {
        match set.pod_on(client, node).await {
            Read::Is(None) => {}
            Read::Is(Some(pod)) => return Read::Is(Some((set.clone(), pod))),
            other => return other.map(|_| None),
        }
    }
    Read::Is(None)
}

/// Returns whether a container of a pod runs.
pub(super) fn is_running(pod: &Pod, container: &str) -> bool {
    let statuses = pod
        .status
        .iter()
        .flat_map(|status| status.container_statuses.iter().flatten());
    let mut statuses = statuses.filter(|status| status.name == container);
    statuses.any(|status| {
        status
            .state
            .as_ref()
            .is_some_and(|state| state.running.is_some())
    })
}
