//! What a scenario needs that is not so on every cluster, or not as `deploy/` installs it.

use std::time::Duration;

use e2e::{
    install::Form,
    manifest::{add_arguments, change_container, change_object},
    openbao,
    previous::{self, PREVIOUS_VARIABLE, UPSTREAM_VARIABLE},
    providers::{self, Provider},
};
use embedded::Options;
use k8s_openapi::api::{apps::v1::DaemonSet, storage::v1::CSIDriver};
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};

use crate::target::ClusterName;

const DRIVER: &str = "secrets-store.csi.k8s.io";
const DAEMON_SET: &str = "csi-secrets-store";
const CONTAINER: &str = "secrets-store";
/// The annotation with the arguments that the driver was installed with, while it has others.
const INSTALLED: &str = "e2e/installed-args";
/// The interval of the embedded kubelet, where a scenario needs republishing.
const SYNC: Duration = Duration::from_millis(300);

/// A thing that a scenario needs.
#[derive(Clone, Copy, Debug)]
pub enum Need {
    /// Flags of the driver, after those that it is installed with.
    Flags(&'static [&'static str]),
    /// Service account tokens for these audiences.
    Tokens {
        audiences: &'static [&'static str],
        place: TokenPlace,
    },
    /// kubelet publishes mounted volumes again, every second at least.
    Republish,
    /// So many nodes that run pods.
    Nodes(usize),
    /// A deadline of kubelet's calls other than two minutes.
    CsiTimeout(Duration),
    /// A `mountPropagation` of the driver's volume mount of kubelet's pods other than
    /// `Bidirectional`.
    Propagation(&'static str),
    /// Kubernetes' own controllers and its scheduler.
    Controllers,
    /// A driver that registers itself with kubelet.
    OwnRegistration,
    /// An API server that can be made to misbehave.
    DisturbApi,
    /// A node that can be rebooted.
    Reboot,
    /// Containers that run as another user than root, with groups of their own.
    OtherUsers,
    /// A commit to upgrade from.
    PreviousCommit,
    /// The executable of the existing driver.
    ExistingDriver,
    /// A real provider, and fakes of its store. A shared cluster has all real providers.
    RealProvider(Provider),
    /// Flags of a real provider, after its own.
    ProviderFlags(Provider, &'static [&'static str]),
    /// An API server that reads protobuf, in which providers request tokens.
    Protobuf,
    /// The executable of an OpenBao server.
    OpenBaoServer,
    /// No cluster as new: a shared one may be as scenarios with the same needs have left it, with what
    /// driver and providers remember.
    Kept,
    /// The embedded cluster; the text says what real ones do instead.
    Embedded(&'static str),
}

/// A driver that refreshes at every publish.
pub const REFRESH_OFTEN: Need = Need::Flags(&[
    "--enable-secret-rotation=true",
    "--rotation-poll-interval=100ms",
    "--min-rotation-poll-interval=100ms",
]);

/// Where kubelet puts service account tokens in a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenPlace {
    /// The volume context, as in all versions before `serviceAccountTokenInSecrets`.
    Context,
    /// The secrets of the request.
    Secrets,
}

impl Need {
    /// Returns why a cluster does not have it; none when it does.
    pub fn missing(self, cluster: ClusterName) -> Option<String> {
        use ClusterName::{Embedded, Kind, Local};
        let root = nix::unistd::geteuid().is_root();
        let missing = match (self, cluster) {
            (Self::Controllers, Embedded) => "it does not run Kubernetes' own controllers",
            (Self::OtherUsers, Embedded) if !root => {
                "an ordinary user's cluster has no other users"
            }
            (Self::Nodes(2..), Local) => "it has one node",
            (Self::Nodes(count), Kind { nodes }) if count > nodes => "it has too few nodes",
            (Self::CsiTimeout(_), Local | Kind { .. }) => "kubelet's deadline cannot be changed",
            (Self::Propagation(_), Local | Kind { .. }) => {
                "all scenarios share its driver's mounts"
            }
            (Self::OwnRegistration, Local | Kind { .. }) if Form::from_env() != Form::Lean => {
                "its driver is registered by a sidecar"
            }
            (Self::DisturbApi, Local | Kind { .. }) => "its API server does not misbehave",
            (Self::Reboot, Local) => "its node is this machine",
            (Self::PreviousCommit, _) if previous::reference().is_none() => {
                return Some(format!(
                    "{PREVIOUS_VARIABLE} names no commit to upgrade from (just e2e-upgrade)"
                ));
            }
            (Self::ExistingDriver, _) if !previous::upstream_driver().is_file() => {
                return Some(format!(
                    "there is no executable {}, which {UPSTREAM_VARIABLE} changes",
                    previous::upstream_driver().display()
                ));
            }
            (Self::RealProvider(_), Kind { .. }) => {
                "nothing reaches the stores of its real providers from outside of its nodes"
            }
            (Self::RealProvider(provider), Embedded | Local) => {
                return providers::find(provider).err();
            }
            (Self::Protobuf, Embedded) => "its API server does not read protobuf",
            (Self::OpenBaoServer, Local | Kind { .. }) => "it does not run an OpenBao server yet",
            (Self::OpenBaoServer, Embedded) => return openbao::find().err(),
            (Self::Embedded(instead), Local | Kind { .. }) => instead,
            _ => return None,
        };
        Some(format!("the {cluster} cluster: {missing}"))
    }
}

/// Puts what a scenario needs into the options of its own cluster.
pub fn configure(options: &mut Options, needs: &[Need]) -> e2e::cluster::Result<()> {
    for need in needs {
        let manifests = &mut options.manifests;
        match *need {
            Need::Flags(flags) => add_arguments(manifests, CONTAINER, flags)?,
            Need::Tokens { .. } => change_tokens(manifests, &[*need])?,
            Need::Propagation(propagation) => {
                change_container(manifests, CONTAINER, |container| {
                    let mounts = container["volumeMounts"].as_array_mut().unwrap();
                    let mut mounts = mounts.iter_mut();
                    let pods = mounts.find(|mount| mount["mountPropagation"] == "Bidirectional");
                    pods.unwrap()["mountPropagation"] = propagation.into();
                })?;
            }
            Need::Republish => options.sync_period = Some(SYNC),
            Need::Nodes(count) => options.nodes = count,
            Need::RealProvider(provider) => providers::add(options, provider),
            Need::ProviderFlags(..) => change_providers(manifests, &[*need])?,
            Need::OpenBaoServer => openbao::add(options),
            Need::CsiTimeout(timeout) => options.csi_timeout = timeout,
            _ => {}
        }
    }
    Ok(())
}

/// Puts the tokens that a scenario needs into the manifest of the driver's CSIDriver.
pub fn change_tokens(manifests: &mut [String], needs: &[Need]) -> e2e::cluster::Result<()> {
    for need in needs {
        if let Need::Tokens { audiences, place } = need {
            change_object(manifests, "CSIDriver", DRIVER, |driver| {
                driver["spec"]["tokenRequests"] = token_requests(audiences);
                let in_secrets = *place == TokenPlace::Secrets;
                driver["spec"]["serviceAccountTokenInSecrets"] = in_secrets.into();
            })?;
        }
    }
    Ok(())
}

/// Puts flags of real providers that a scenario needs into their manifests.
pub fn change_providers(manifests: &mut [String], needs: &[Need]) -> e2e::cluster::Result<()> {
    for need in needs {
        if let Need::ProviderFlags(provider, flags) = need {
            add_arguments(manifests, &provider.container(), flags)?;
        }
    }
    Ok(())
}

/// Returns a text that is equal for scenarios that may use a shared cluster one after the other; none
/// for a scenario that needs one as new.
pub fn kept(needs: &[Need]) -> Option<String> {
    let text = |need: &Need| match need {
        Need::RealProvider(_) => "RealProvider ".to_owned(),
        // It runs as long as its scenario.
        Need::OpenBaoServer => String::new(),
        other => format!("{other:?} "),
    };
    let kept = needs.iter().any(|need| matches!(need, Need::Kept));
    kept.then(|| needs.iter().map(text).collect())
}

/// Gives a cluster that runs what a scenario needs, and takes away what an earlier one needed. The
/// driver's pods are replaced after that.
pub async fn change(client: &kube::Client, needs: &[Need]) {
    let flags = needs.iter().flat_map(|need| match need {
        Need::Flags(flags) => *flags,
        _ => &[],
    });
    let flags = flags.map(|flag| (*flag).to_owned()).collect();
    change_flags(client, flags).await.unwrap();
    let tokens = needs.iter().find_map(|need| match need {
        Need::Tokens { audiences, place } => Some((*audiences, *place)),
        _ => None,
    });
    let (requests, in_secrets) = match tokens {
        None => (Value::Null, Value::Null),
        Some((audiences, place)) => (
            token_requests(audiences),
            (place == TokenPlace::Secrets).into(),
        ),
    };
    let spec = json!({"tokenRequests": requests, "serviceAccountTokenInSecrets": in_secrets});
    let patch = Patch::Merge(json!({"spec": spec}));
    let drivers = Api::<CSIDriver>::all(client.clone());
    let params = PatchParams::default();
    drivers.patch(DRIVER, &params, &patch).await.unwrap();
}

fn token_requests(audiences: &[&str]) -> Value {
    let request = |audience: &&str| json!({"audience": audience, "expirationSeconds": 600});
    audiences.iter().map(request).collect()
}

async fn change_flags(client: &kube::Client, flags: Vec<String>) -> kube::Result<()> {
    let sets = Api::<DaemonSet>::namespaced(client.clone(), "kube-system");
    let mut set = sets.get(DAEMON_SET).await?;
    let annotations = set.metadata.annotations.get_or_insert_default();
    let noted = annotations.get(INSTALLED);
    let noted: Option<Vec<String>> = noted.map(|noted| serde_json::from_str(noted).unwrap());
    if noted.is_none() && flags.is_empty() {
        return Ok(());
    }
    let pod = set.spec.template.spec.as_mut().unwrap();
    let mut containers = pod.containers.iter_mut();
    let driver = containers.find(|c| c.name == CONTAINER).unwrap();
    let installed = noted.unwrap_or_else(|| driver.args.take().unwrap_or_default());
    driver.args = Some(installed.iter().cloned().chain(flags).collect());
    let installed = serde_json::to_string(&installed).unwrap();
    annotations.insert(INSTALLED.to_owned(), installed);
    let replaced = sets.replace(DAEMON_SET, &Default::default(), &set).await;
    replaced.map(drop)
}
