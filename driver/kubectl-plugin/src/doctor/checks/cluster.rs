//! Checks of the API's objects, and of all nodes together.

use std::collections::{BTreeMap, BTreeSet};

use driver::cluster::resources::{GROUP, VERSION};
use kube::ResourceExt as _;
use serde_json::Value;

use super::{
    super::{
        facts::{Facts, KINDS},
        nodes::{Asked, named, node_of},
    },
    Found,
};
use crate::{
    cluster::Read,
    installation::{DRIVER, NodeSays, is_ready},
};

/// The definitions that this version of the driver comes with, in the order of [`KINDS`].
const DEFINITIONS: [&str; 2] = [
    include_str!("../../../../../deploy/secrets-store.csi.x-k8s.io_secretproviderclasses.yaml"),
    include_str!(
        "../../../../../deploy/secrets-store.csi.x-k8s.io_secretproviderclasspodstatuses.yaml"
    ),
];
/// The audiences of tokens that AWS's provider can use.
const OF_AWS: [&str; 2] = ["sts.amazonaws.com", "pods.eks.amazonaws.com"];
/// The names that a line has.
const NAMED: usize = 5;

pub(super) fn kinds(facts: &Facts, found: &mut Found<'_>) {
    for ((kind, definition), wanted) in KINDS.iter().zip(&facts.definitions).zip(DEFINITIONS) {
        let name = format!("{kind}.{GROUP}");
        let next = format!("kubectl apply -f deploy/{GROUP}_{kind}.yaml");
        let Read::Is(definition) = definition else {
            if definition.is_missing() {
                found.add(format!("there is no CustomResourceDefinition {name}"), next);
            }
            continue;
        };
        let version = definition
            .spec
            .versions
            .iter()
            .find(|version| version.name == VERSION);
        let Some(version) = version.filter(|version| version.served) else {
            found.add(
                format!("the CustomResourceDefinition {name} does not serve version {VERSION}"),
                next,
            );
            continue;
        };
        let there = serde_json::to_value(&version.schema).unwrap_or_default();
        let wanted: Value = serde_saphyr::from_str(wanted).unwrap_or_default();
        let mut lacking = BTreeSet::new();
        let versions = wanted["spec"]["versions"].as_array();
        for wanted in versions
            .into_iter()
            .flatten()
            .filter(|wanted| wanted["name"] == VERSION)
        {
            lacks(
                &wanted["schema"]["openAPIV3Schema"],
                &there["openAPIV3Schema"],
                "",
                &mut lacking,
            );
        }
        if !lacking.is_empty() {
            let fields: Vec<_> = lacking.into_iter().take(NAMED).collect();
            found.add(
                format!(
                    "the CustomResourceDefinition {name} is of an earlier version: it lacks {}, which the API server drops from what is applied",
                    fields.join(", ")
                ),
                next,
            );
        }
    }
}

/// Finds the fields that a schema lacks.
fn lacks(wanted: &Value, there: &Value, at: &str, lacking: &mut BTreeSet<String>) {
    let fields = wanted["properties"].as_object();
    for (name, field) in fields.into_iter().flatten() {
        let path = format!("{at}.{name}");
        match &there["properties"][name] {
            Value::Null => {
                lacking.insert(path.trim_start_matches('.').to_owned());
            }
            other => lacks(field, other, &path, lacking),
        }
    }
    if wanted["items"].is_object() {
        lacks(
            &wanted["items"],
            &there["items"],
            &format!("{at}[]"),
            lacking,
        );
    }
}

pub(super) fn csi_driver(facts: &Facts, found: &mut Found<'_>) {
    let next = "kubectl apply -f deploy/csidriver.yaml";
    let spec = match &facts.csi_driver {
        Read::Is(driver) => &driver.spec,
        Read::Missing => return found.add(format!("there is no CSIDriver {DRIVER}"), next),
        _ => return,
    };
    let is_ephemeral = spec
        .volume_lifecycle_modes
        .iter()
        .flatten()
        .any(|mode| mode == "Ephemeral");
    let next = format!("kubectl delete csidriver {DRIVER} && {next}");
    for (is_so, field, without) in [
        (
            spec.pod_info_on_mount == Some(true),
            "podInfoOnMount: true",
            "the driver does not know the pod of a volume and refuses it",
        ),
        (
            is_ephemeral,
            "volumeLifecycleModes: [Ephemeral]",
            "no pod may mount its volumes",
        ),
        (
            spec.attach_required == Some(false),
            "attachRequired: false",
            "volumes wait for a controller that does not exist",
        ),
    ] {
        if !is_so {
            found.add(
                format!("the CSIDriver {DRIVER} lacks {field}: {without}"),
                next.clone(),
            );
        }
    }
    if spec.fs_group_policy.as_deref() == Some("None") {
        found.add(
            format!("the CSIDriver {DRIVER} has fsGroupPolicy: None: kubelet does not tell the driver the fsGroup of pods, and containers that are not root may not read their files"),
            next,
        );
    }
}

pub(super) fn installed(facts: &Facts, found: &mut Found<'_>) {
    if facts.installed.found().is_some_and(Vec::is_empty) {
        found.add(
            "no DaemonSet of the driver is installed; install the chart, or apply deploy/",
            "kubectl get daemonsets -A",
        );
    }
}

pub(super) fn two_drivers(facts: &Facts, found: &mut Found<'_>) {
    let sets = facts.installed.found().map_or(&[][..], Vec::as_slice);
    let mut by_node: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for pod in facts.pods() {
        let owners = pod.owner_references();
        let set = sets.iter().find(|set| {
            owners
                .iter()
                .any(|owner| Some(&owner.uid) == set.set.uid().as_ref())
        });
        if let (Some(node), Some(set)) = (node_of(pod), set) {
            let name = format!("{}/{}", set.namespace(), set.set.name_any());
            by_node.entry(node).or_default().insert(name);
        }
    }
    let mut nodes_by_sets: BTreeMap<Vec<String>, Vec<String>> = BTreeMap::new();
    for (node, sets) in by_node.into_iter().filter(|(_, sets)| sets.len() > 1) {
        nodes_by_sets
            .entry(sets.into_iter().collect())
            .or_default()
            .push(node.to_owned());
    }
    for (sets, nodes) in nodes_by_sets {
        let what = format!(
            "on {}: {} are there at the same time, and each takes kubelet's calls from the other; remove one",
            named(&nodes),
            sets.join(" and ")
        );
        found.add_of_nodes(
            nodes,
            what,
            "kubectl get daemonsets -A | grep secrets-store",
        );
    }
    let existing = facts
        .asked
        .iter()
        .filter(|asked| matches!(asked.says, NodeSays::ExistingDriver));
    let existing: Vec<_> = existing.map(|asked| asked.node.clone()).collect();
    if !existing.is_empty() && existing.len() < facts.asked.len() {
        let what = format!(
            "on {}: the existing driver runs, and this one on others; finish or undo the move",
            named(&existing)
        );
        let next = facts
            .installed
            .found()
            .and_then(|sets| sets.first())
            .map_or_else(String::new, |set| {
                format!(
                    "kubectl -n {} rollout status daemonset {}",
                    set.namespace(),
                    set.set.name_any()
                )
            });
        found.add_of_nodes(existing, what, next);
    }
}

pub(super) fn rollout(facts: &Facts, found: &mut Found<'_>) {
    for installed in facts.installed.found().into_iter().flatten() {
        let set = &installed.set;
        let (Some(status), name) = (
            &set.status,
            format!("{}/{}", installed.namespace(), set.name_any()),
        ) else {
            continue;
        };
        let wanted = status.desired_number_scheduled;
        let next = format!(
            "kubectl -n {} rollout status daemonset {}",
            installed.namespace(),
            set.name_any()
        );
        if wanted == 0 {
            // A rollout to no node is finished, so its status says nothing.
            let next = next.replace("rollout status", "describe");
            found.add(format!("DaemonSet {name} fits no node; compare its nodeSelector and affinity with the nodes' labels"), next);
        } else if status.number_ready < wanted {
            found.add(
                format!(
                    "DaemonSet {name} has {} of {wanted} pods ready",
                    status.number_ready
                ),
                next,
            );
        } else if status.updated_number_scheduled.unwrap_or(wanted) < wanted
            || status.observed_generation < set.metadata.generation
        {
            found.add(format!("DaemonSet {name} is not rolled out: {} of {wanted} pods are of the last revision", status.updated_number_scheduled.unwrap_or(0)), next);
        }
    }
}

pub(super) fn rights(facts: &Facts, found: &mut Found<'_>) {
    let Some(lacking) = facts.rights.found().filter(|lacking| !lacking.is_empty()) else {
        return;
    };
    let of_secrets = |right: &&String| right.ends_with(" secrets");
    let (secrets, others): (Vec<_>, Vec<_>) = lacking.iter().partition(of_secrets);
    let account = facts.installed.found().and_then(|sets| sets.first());
    let account = account.map_or_else(String::new, |set| {
        format!(
            "system:serviceaccount:{}:{}",
            set.namespace(),
            set.service_account()
        )
    });
    for (rights, fix) in [
        (
            others,
            "apply deploy/rbac-secretproviderclass.yaml, or install the chart again",
        ),
        (
            secrets,
            "classes have secretObjects; set syncSecret.enabled=true, or apply deploy/optional/rbac-secretprovidersyncing.yaml",
        ),
    ] {
        if let Some(first) = rights.first() {
            let rights: Vec<&str> = rights.iter().map(|right| right.as_str()).collect();
            found.add(
                format!("the driver may not {}: {fix}", rights.join(", ")),
                format!("kubectl auth can-i {first} --as {account}"),
            );
        }
    }
}

pub(super) fn registration(facts: &Facts, found: &mut Found<'_>) {
    let Some(registered) = facts.registered.found().filter(|list| !list.is_cut) else {
        return;
    };
    let known: BTreeSet<String> = registered
        .items
        .iter()
        .filter(|node| node.spec.drivers.iter().any(|driver| driver.name == DRIVER))
        .map(kube::ResourceExt::name_any)
        .collect();
    let lacking = facts.pods().filter(|pod| is_ready(pod)).filter_map(node_of);
    let lacking: Vec<_> = lacking
        .filter(|node| !known.contains(*node))
        .map(str::to_owned)
        .collect();
    let Some(first) = lacking.first() else {
        return;
    };
    let next = format!("kubectl get csinode {first} -o yaml");
    let what = format!(
        "on {}: the driver runs, and kubelet does not know it; look at the registrar's log, and set linux.kubeletRootDir if kubelet's root directory is not /var/lib/kubelet",
        named(&lacking)
    );
    found.add_of_nodes(lacking, what, next);
}

pub(super) fn versions(facts: &Facts, found: &mut Found<'_>) {
    let mut nodes_by_version: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for asked in &facts.asked {
        if let Some(status) = asked.status() {
            nodes_by_version
                .entry(&status.version)
                .or_default()
                .push(&asked.node);
        }
    }
    if nodes_by_version.len() > 1 {
        let each: Vec<_> = nodes_by_version
            .iter()
            .map(|(version, nodes)| format!("{version} on {}", named(nodes)))
            .collect();
        found.add(
            format!(
                "drivers of several versions run: {}; finish the rollout",
                each.join("; ")
            ),
            "kubectl get daemonsets -A | grep secrets-store",
        );
    }
}

pub(super) fn republish(facts: &Facts, found: &mut Found<'_>) {
    let refreshes = facts
        .asked
        .iter()
        .filter_map(Asked::status)
        .any(|status| status.refreshes);
    let spec = facts.csi_driver.found().map(|driver| &driver.spec);
    if refreshes && spec.is_some_and(|spec| spec.requires_republish != Some(true)) {
        found.add(
            format!("rotation is on, and the CSIDriver {DRIVER} lacks requiresRepublish: true: no volume is ever refreshed"),
            format!("kubectl patch csidriver {DRIVER} --type merge -p '{{\"spec\":{{\"requiresRepublish\":true}}}}'"),
        );
    }
}

pub(super) fn audiences(facts: &Facts, found: &mut Found<'_>) {
    let (Some(driver), Some(classes)) = (facts.csi_driver.found(), facts.classes.found()) else {
        return;
    };
    let requested: Vec<_> = driver
        .spec
        .token_requests
        .iter()
        .flatten()
        .map(|request| request.audience.as_str())
        .collect();
    let of_aws = classes
        .items
        .iter()
        .filter(|class| class.spec.provider == "aws")
        .count();
    if of_aws > 0 && !requested.iter().any(|audience| OF_AWS.contains(audience)) {
        found.add(
            format!(
                "classes of provider aws are there ({of_aws}), and the CSIDriver requests no token for {}; set tokenRequests",
                OF_AWS.join(" or ")
            ),
            format!("kubectl get csidriver {DRIVER} -o jsonpath='{{.spec.tokenRequests}}'"),
        );
    }
}

/// Classes of providers that no node that was asked has.
pub(super) fn providers(facts: &Facts, found: &mut Found<'_>) {
    let statuses: Vec<_> = facts.asked.iter().filter_map(Asked::status).collect();
    let Some(classes) = facts.classes.found().filter(|_| !statuses.is_empty()) else {
        return;
    };
    let there: BTreeSet<&str> = statuses
        .iter()
        .flat_map(|status| {
            status
                .providers
                .iter()
                .map(|provider| provider.name.as_str())
        })
        .collect();
    let mut classes_by_provider: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for class in &classes.items {
        let provider = class.spec.provider.as_str();
        if !provider.is_empty() && !there.contains(provider) {
            let name = format!(
                "{}/{}",
                class.namespace().unwrap_or_default(),
                class.name_any()
            );
            classes_by_provider.entry(provider).or_default().push(name);
        }
    }
    let there: Vec<_> = there.into_iter().collect();
    for (provider, classes) in classes_by_provider {
        let shown: Vec<_> = classes.iter().take(NAMED).map(String::as_str).collect();
        let more = classes.len().saturating_sub(NAMED);
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        let names = if classes.len() == 1 { "names" } else { "name" };
        let has = match there.is_empty() {
            true => "none".to_owned(),
            false => there.join(", "),
        };
        found.add(
            format!(
                "no node that was asked has provider {provider}, which {}{more} {names}; the nodes have {has}",
                shown.join(", ")
            ),
            "kubectl get daemonsets -A".to_owned(),
        );
    }
}

pub(super) fn pod_statuses(facts: &Facts, found: &mut Found<'_>) {
    let Some(orphans) = facts
        .orphans
        .found()
        .filter(|orphans| !orphans.items.is_empty())
    else {
        return;
    };
    let shown: Vec<_> = orphans
        .items
        .iter()
        .take(NAMED)
        .map(String::as_str)
        .collect();
    let (namespace, name) = orphans
        .items
        .first()
        .and_then(|first| first.split_once('/'))
        .unwrap_or_default();
    found.add(
        format!(
            "{} pod statuses are of pods that are gone ({}): Kubernetes' garbage collector removes them; does it run?",
            orphans.items.len(),
            shown.join(", ")
        ),
        format!("kubectl -n {namespace} get secretproviderclasspodstatus {name} -o yaml"),
    );
}
