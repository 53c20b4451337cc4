//! Reads what the driver needs in the cluster.

use std::collections::BTreeMap;

use driver::cluster::resources::{GROUP, SecretProviderClass, SecretProviderClassPodStatus};
use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::{
    api::{
        core::v1::Pod,
        storage::v1::{CSIDriver, CSINode},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{Api, Client, ResourceExt as _, api::ListParams};

use super::{
    Scope,
    access::Access,
    nodes::{self, Asked},
    overdue::{self, Late},
};
use crate::{
    cluster::{Listed, Read, ResourceAttributes, list, list_metadata, may, read},
    installation::{self, DRIVER, Installed, NodeSays},
};

/// The plurals of the driver's kinds.
pub(super) const KINDS: [&str; 2] = ["secretproviderclasses", "secretproviderclasspodstatuses"];

/// The objects of each kind that are read at most.
const MAX_PODS: usize = 2_000;
const MAX_CSI_NODES: usize = 10_000;
const MAX_CLASSES: usize = 5_000;
const MAX_STATUSES: usize = 5_000;
/// The pod statuses whose pods are looked for, and the requests for that at the same time.
const MAX_OWNERS: usize = 100;
const AT_ONCE: usize = 8;

/// What the driver may do: group, resource, verbs. The first rules of `deploy/rbac-secretproviderclass.yaml`.
const RIGHTS: &[(&str, &str, &[&str])] = &[
    ("", "events", &["create", "patch"]),
    ("", "pods", &["get"]),
    (GROUP, "secretproviderclasses", &["get"]),
    (
        GROUP,
        "secretproviderclasspodstatuses",
        &["create", "delete", "get", "update"],
    ),
];

/// What it may do besides if classes have `secretObjects`: `deploy/optional/rbac-secretprovidersyncing.yaml`.
const RIGHTS_ON_SECRETS: &[(&str, &str, &[&str])] =
    &[("", "secrets", &["create", "delete", "get", "patch"])];

/// Everything that is known of the cluster.
pub(super) struct Facts {
    pub(super) now: Timestamp,
    /// The version of the API server.
    pub(super) version: String,
    /// The definitions of the driver's kinds, in the order of [`KINDS`].
    pub(super) definitions: Vec<Read<CustomResourceDefinition>>,
    pub(super) csi_driver: Read<CSIDriver>,
    pub(super) installed: Read<Vec<Installed>>,
    /// The rights that the driver's service account lacks.
    pub(super) rights: Read<Vec<String>>,
    pub(super) classes: Read<Listed<SecretProviderClass>>,
    /// The nodes on which the driver is registered, if all were read.
    pub(super) registered: Read<Listed<CSINode>>,
    /// The driver's pods.
    pub(super) pods: Read<Listed<Pod>>,
    /// What the drivers that were asked say.
    pub(super) asked: Vec<Asked>,
    /// The volumes of these nodes that kubelet has not looked at since their refresh was due.
    pub(super) overdue: Late,
    /// Whether the drivers can ask the API server.
    pub(super) access: Access,
    /// Pod statuses whose pods are gone, as namespace and name.
    pub(super) orphans: Read<Listed<String>>,
    pub(super) statuses: usize,
}

impl Facts {
    /// Reads them.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub(super) async fn read(client: &Client, scope: &Scope) -> Result<Self, String> {
        let version = match read(client.apiserver_version()).await {
            Read::Is(version) => version.git_version,
            other => {
                let why = other
                    .unknown()
                    .unwrap_or("this is not the address of an API server");
                return Err(format!("the API server cannot be asked: {why}"));
            }
        };
        let csi_drivers: Api<CSIDriver> = Api::all(client.clone());
        let csi_nodes: Api<CSINode> = Api::all(client.clone());
        let all_classes: Api<SecretProviderClass> = Api::all(client.clone());
        let driver_namespace = scope.driver_namespace.as_deref();
        let (definitions, csi_driver, installed, registered, classes, orphans) = tokio::join!(
            definitions(client),
            read(csi_drivers.get(DRIVER)),
            installation::find(client, driver_namespace),
            list(&csi_nodes, ListParams::default(), MAX_CSI_NODES),
            list(&all_classes, ListParams::default(), MAX_CLASSES),
            orphans(client),
        );
        let (statuses, orphans) = orphans;
        let pods = pods(client, &installed).await;
        let syncs = classes.found().is_some_and(|classes| {
            classes
                .items
                .iter()
                .any(|class| !class.spec.secret_objects.is_empty())
        });
        let (rights, asked, access) = tokio::join!(
            rights(client, &installed, syncs),
            nodes::ask(client, &installed, &pods, scope.nodes),
            Access::read(client, &installed),
        );
        let overdue = overdue::find(client, &asked, &classes).await;
        Ok(Self {
            now: Timestamp::now(),
            version,
            definitions,
            csi_driver,
            installed,
            rights,
            classes,
            registered,
            pods,
            asked,
            overdue,
            access,
            orphans,
            statuses,
        })
    }

    /// Returns what was looked at, in words.
    pub(super) fn looked_at(&self) -> Vec<String> {
        let mut lines = vec![format!("an API server of version {}", self.version)];
        for installed in self.installed.found().into_iter().flatten() {
            lines.push(format!(
                "DaemonSet {}/{}",
                installed.namespace(),
                installed.set.name_any()
            ));
        }
        let cut = |is_cut| if is_cut { ", and not the rest" } else { "" };
        if let Read::Is(classes) = &self.classes {
            let count = counted(classes.items.len(), "SecretProviderClass", "es");
            lines.push(format!("{count}{}", cut(classes.is_cut)));
        }
        if let Read::Is(orphans) = &self.orphans {
            let count = counted(self.statuses.min(MAX_OWNERS), "pod status", "es");
            let is_cut = orphans.is_cut || self.statuses > MAX_OWNERS;
            lines.push(format!("{count}{}", cut(is_cut)));
        }
        if let Read::Is(pods) = &self.pods {
            let answered = self
                .asked
                .iter()
                .filter(|asked| asked.status().is_some())
                .count();
            lines.push(format!(
                "{}{}, of which {answered} said what is on their nodes",
                counted(pods.items.len(), "pod of the driver", ""),
                cut(pods.is_cut)
            ));
            let running = pods.items.iter().filter(|pod| nodes::runs(pod)).count();
            if running > self.asked.len() {
                lines.push(format!(
                    "{} of these nodes were asked, those first whose pods are not ready; --nodes {running} asks all",
                    self.asked.len()
                ));
            }
        }
        let existing = self
            .asked
            .iter()
            .filter(|asked| matches!(asked.says, NodeSays::ExistingDriver));
        let existing: Vec<_> = existing.map(|asked| asked.node.as_str()).collect();
        if !existing.is_empty() {
            let named = nodes::named(&existing);
            lines.push(format!(
                "the existing driver on {named}, which says nothing of its node"
            ));
        }
        lines
    }

    /// Returns whether the kinds, the CSIDriver and the DaemonSet could be read: the rest stands on them.
    pub(super) fn is_known(&self) -> bool {
        self.definitions
            .iter()
            .all(|definition| definition.unknown().is_none())
            && self.csi_driver.unknown().is_none()
            && self.installed.unknown().is_none()
    }

    /// Returns what could not be found out.
    pub(super) fn unknown(&self, scope: &Scope) -> Vec<String> {
        let mut lines = Vec::new();
        let mut add = |what: &str, why: Option<&str>| {
            lines.extend(why.map(|why| format!("{what}: {why}")));
        };
        for (kind, definition) in KINDS.iter().zip(&self.definitions) {
            add(
                &format!("the CustomResourceDefinition {kind}.{GROUP}"),
                definition.unknown(),
            );
        }
        add(
            &format!("the CSIDriver {DRIVER}"),
            self.csi_driver.unknown(),
        );
        let installed = "the driver's DaemonSet (name its namespace with --driver-namespace)";
        add(installed, self.installed.unknown());
        add("the driver's rights", self.rights.unknown());
        add("the classes", self.classes.unknown());
        add(
            "where the driver is registered (CSINode)",
            self.registered.unknown(),
        );
        if self.installed.unknown().is_none() {
            add("the driver's pods", self.pods.unknown());
        }
        add(
            "whether kubelet looks at the volumes in time",
            self.overdue.unknown.as_deref(),
        );
        add(
            "whether pods wait for a driver that cannot ask the API server (their events)",
            self.access.silent.unknown(),
        );
        add("pod statuses whose pods are gone", self.orphans.unknown());
        let has_drivers = self.pods.found().is_some_and(|pods| !pods.items.is_empty());
        if scope.nodes == 0 && has_drivers {
            add("what is on the nodes", Some("none was asked (--nodes 0)"));
        }
        // The same words of many nodes are said once.
        let mut silent: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for asked in &self.asked {
            if let NodeSays::Unknown(why) = &asked.says {
                silent.entry(why).or_default().push(&asked.node);
            }
        }
        for (why, nodes) in silent {
            add(&format!("what is on {}", nodes::named(&nodes)), Some(why));
        }
        lines
    }
}

/// Returns a number with what it counts, which has this ending if there are several.
fn counted(count: usize, what: &str, ending: &str) -> String {
    match (count, ending) {
        (1, _) => format!("1 {what}"),
        (_, "") => format!("{count} {}", what.replacen("pod ", "pods ", 1)),
        _ => format!("{count} {what}{ending}"),
    }
}

async fn definitions(client: &Client) -> Vec<Read<CustomResourceDefinition>> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let mut all = Vec::new();
    for kind in KINDS {
        all.push(read(api.get(&format!("{kind}.{GROUP}"))).await);
    }
    all
}

/// Reads the driver's pods.
async fn pods(client: &Client, installed: &Read<Vec<Installed>>) -> Read<Listed<Pod>> {
    let sets = match installed {
        Read::Is(sets) => sets,
        other => return other.clone().map(|_| unread()),
    };
    let mut all = Listed {
        items: Vec::new(),
        is_cut: false,
    };
    for set in sets {
        let api: Api<Pod> = Api::namespaced(client.clone(), &set.namespace());
        let params = ListParams::default().labels(&set.selector());
        match list(&api, params, MAX_PODS).await {
            Read::Is(pods) => {
                all.items.extend(pods.items);
                all.is_cut |= pods.is_cut;
            }
            other => return other,
        }
    }
    Read::Is(all)
}

fn unread<T>() -> Listed<T> {
    Listed {
        items: Vec::new(),
        is_cut: true,
    }
}

/// Finds the rights that the service account of the driver lacks.
async fn rights(
    client: &Client,
    installed: &Read<Vec<Installed>>,
    syncs: bool,
) -> Read<Vec<String>> {
    let sets = match installed {
        Read::Is(sets) => sets,
        other => return other.clone().map(|_| Vec::new()),
    };
    let on_secrets = if syncs { RIGHTS_ON_SECRETS } else { &[] };
    let mut lacking = Vec::new();
    for set in sets {
        let account = (set.namespace(), set.service_account());
        for (group, resource, verbs) in RIGHTS.iter().chain(on_secrets) {
            for verb in *verbs {
                let what = ResourceAttributes {
                    group: Some((*group).to_owned()),
                    resource: Some((*resource).to_owned()),
                    verb: Some((*verb).to_owned()),
                    ..ResourceAttributes::default()
                };
                match may(client, (&account.0, &account.1), what).await {
                    Read::Is(true) => {}
                    Read::Is(false) => lacking.push(format!("{verb} {resource}")),
                    other => return other.map(|_| Vec::new()),
                }
            }
        }
    }
    lacking.dedup();
    Read::Is(lacking)
}

/// Finds pod statuses whose pods are gone. Returns how many pod statuses there are, too.
async fn orphans(client: &Client) -> (usize, Read<Listed<String>>) {
    let api: Api<SecretProviderClassPodStatus> = Api::all(client.clone());
    let statuses = match list_metadata(&api, ListParams::default(), MAX_STATUSES).await {
        Read::Is(statuses) => statuses,
        other => return (0, other.map(|_| unread())),
    };
    let count = statuses.items.len();
    // The oldest ones first: a new one may be of a pod that is just going away.
    let mut sorted = statuses.items;
    sorted.sort_by_key(|status| status.creation_timestamp().map(|time| time.0));
    let each = stream::iter(sorted.into_iter().take(MAX_OWNERS)).map(|status| async move {
        let namespace = status.namespace()?;
        let owner = status
            .owner_references()
            .iter()
            .find(|owner| owner.kind == "Pod")?;
        let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
        let is_gone = match read(pods.get_metadata(&owner.name)).await {
            Read::Missing => true,
            Read::Is(pod) => pod.uid().is_some_and(|uid| uid != owner.uid),
            _ => false,
        };
        is_gone.then(|| format!("{namespace}/{}", status.name_any()))
    });
    let mut items: Vec<String> = each
        .buffer_unordered(AT_ONCE)
        .filter_map(std::future::ready)
        .collect()
        .await;
    items.sort();
    let is_cut = statuses.is_cut;
    (count, Read::Is(Listed { items, is_cut }))
}
