//! The registration of CSI drivers: kubelet watches `plugins_registry` for sockets, asks each for its
//! driver, and reports the outcome to it.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::storage::v1::{CSINode, CSINodeDriver, CSINodeSpec, VolumeNodeResources};
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use proto::registration::registration_client::RegistrationClient;
use proto::registration::{InfoRequest, PluginInfo, RegistrationStatus};
use tokio::time::Instant;

use super::authority::{self, OtherAuthority};
use super::backoff::{self, Backoff};
use super::csi::{self, Driver};
use crate::lock;

/// The interval at which the directory is read. The real kubelet uses inotify.
const POLL: Duration = Duration::from_millis(100);
/// kubelet's limits: `pkg/kubelet/pluginmanager/operationexecutor/operation_generator.go` of
/// kubernetes/kubernetes.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
const INFO_TIMEOUT: Duration = Duration::from_secs(1);
const NOTIFY_TIMEOUT: Duration = Duration::from_secs(5);

/// The node's registered drivers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Drivers {
    by_name: Arc<Mutex<BTreeMap<String, Registered>>>,
}

#[derive(Clone, Debug)]
struct Registered {
    endpoint: PathBuf,
    version: Version,
}

type Version = (u64, u64, u64);

impl Drivers {
    /// Returns the socket of a driver.
    ///
    /// # Errors
    /// Returns kubelet's text when there is no such driver.
    pub(crate) fn endpoint(&self, name: &str) -> Result<PathBuf, String> {
        lock(&self.by_name)
            .get(name)
            .map(|driver| driver.endpoint.clone())
            .ok_or_else(|| {
                format!("driver name {name} not found in the list of registered CSI drivers")
            })
    }
}

/// The identity of a socket file, which differs from that of a later one at the same path.
type Identity = (u64, i64, i64);

/// The state of a socket.
struct Plugin {
    identity: Identity,
    /// The driver it registered.
    name: Option<String>,
    backoff: Backoff,
    next_attempt: Instant,
}

/// Watches a directory and keeps `drivers` and the node's CSINode in step with it.
pub(crate) struct Registrar {
    pub(crate) client: kube::Client,
    pub(crate) node: String,
    /// `plugins_registry`.
    pub(crate) dir: PathBuf,
    pub(crate) drivers: Drivers,
    /// The deadline of `NodeGetInfo`.
    pub(crate) csi_timeout: Duration,
    /// Whether the socket's path is the authority of calls.
    pub(crate) path_authority: bool,
}

impl Registrar {
    /// Runs until it is dropped.
    pub(crate) async fn run(self) {
        let mut plugins: BTreeMap<PathBuf, Plugin> = BTreeMap::new();
        loop {
            let present = sockets(&self.dir);
            let gone: Vec<PathBuf> = plugins
                .iter()
                .filter(|(path, plugin)| present.get(*path) != Some(&plugin.identity))
                .map(|(path, _)| path.clone())
                .collect();
            for path in gone {
                if let Some(name) = plugins.remove(&path).and_then(|plugin| plugin.name) {
                    self.deregister(&name).await;
                }
            }
            for (path, identity) in present {
                let plugin = plugins.entry(path.clone()).or_insert_with(|| Plugin {
                    identity,
                    name: None,
                    backoff: Backoff::up_to(backoff::LONGEST),
                    next_attempt: Instant::now(),
                });
                if plugin.name.is_some() || plugin.next_attempt > Instant::now() {
                    continue;
                }
                match self.register(&path).await {
                    Ok(name) => {
                        tracing::info!(driver = name, socket = %path.display(), "registered");
                        plugin.name = Some(name);
                    }
                    Err(reason) => {
                        tracing::warn!(socket = %path.display(), reason, "not registered");
                        plugin.next_attempt = Instant::now() + plugin.backoff.next_pause();
                    }
                }
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Carries out the handshake. After GetInfo, the plugin is notified of every outcome.
    async fn register(&self, socket: &Path) -> Result<String, String> {
        let authority = match self.path_authority {
            true => authority::of_path(socket),
            false => b"localhost".to_vec(),
        };
        let connecting = csi::connect_through(socket, DIAL_TIMEOUT, move |stream| {
            OtherAuthority::new(stream, &authority)
        });
        let channel = connecting.await.map_err(|error| error.to_string())?;
        let mut client = RegistrationClient::new(channel);
        let info = within(INFO_TIMEOUT, client.get_info(InfoRequest {})).await?;
        let outcome = self.install(socket, &info).await;
        let status = RegistrationStatus {
            plugin_registered: outcome.is_ok(),
            error: outcome.as_ref().err().cloned().unwrap_or_default(),
        };
        let told = within(NOTIFY_TIMEOUT, client.notify_registration_status(status)).await;
        outcome?;
        if let Err(reason) = told {
            tracing::warn!(
                driver = info.name,
                reason,
                "registered, and the plugin did not take note"
            );
        }
        Ok(info.name)
    }

    async fn install(&self, socket: &Path, info: &PluginInfo) -> Result<(), String> {
        if info.r#type != "CSIPlugin" {
            return Err(format!(
                "no handler registered for plugin type: {} at socket {}",
                info.r#type,
                socket.display()
            ));
        }
        let invalid = |reason: String| {
            format!("RegisterPlugin error -- plugin validation failed with err: {reason}")
        };
        let version = highest_version(&info.supported_versions).map_err(invalid)?;
        if let Some(known) = lock(&self.drivers.by_name).get(&info.name)
            && known.version >= version
        {
            return Err(invalid(format!(
                "driver {} is already registered with version {}.{}.{}",
                info.name, known.version.0, known.version.1, known.version.2
            )));
        }
        let endpoint = match info.endpoint.as_str() {
            "" => socket.to_owned(),
            endpoint => PathBuf::from(endpoint),
        };
        self.publish_driver(&info.name, &endpoint)
            .await
            .map_err(|reason| {
                format!("RegisterPlugin error -- plugin registration failed with err: {reason}")
            })?;
        lock(&self.drivers.by_name).insert(info.name.clone(), Registered { endpoint, version });
        Ok(())
    }

    async fn publish_driver(&self, name: &str, endpoint: &Path) -> Result<(), String> {
        let driver = Driver::connect(endpoint, self.csi_timeout)
            .await
            .map_err(|error| error.to_string())?;
        let info = driver
            .node_info()
            .await
            .map_err(|error| error.to_string())?;
        if info.node_id.is_empty() {
            return Err(format!("driver {name} has an empty node id"));
        }
        let topology = info
            .accessible_topology
            .map(|topology| topology.segments.into_keys().collect());
        let limit = i32::try_from(info.max_volumes_per_node)
            .ok()
            .filter(|limit| *limit > 0);
        let entry = CSINodeDriver {
            name: name.to_owned(),
            node_id: info.node_id,
            topology_keys: topology,
            allocatable: limit.map(|count| VolumeNodeResources { count: Some(count) }),
        };
        self.change_csi_node(|drivers| {
            drivers.retain(|known| known.name != name);
            drivers.push(entry.clone());
        })
        .await
    }

    async fn deregister(&self, name: &str) {
        tracing::info!(driver = name, "deregistered");
        lock(&self.drivers.by_name).remove(name);
        if let Err(reason) = self
            .change_csi_node(|drivers| drivers.retain(|known| known.name != name))
            .await
        {
            tracing::warn!(driver = name, reason, "the CSINode still lists the driver");
        }
    }

    async fn change_csi_node(
        &self,
        change: impl Fn(&mut Vec<CSINodeDriver>),
    ) -> Result<(), String> {
        let nodes: Api<CSINode> = Api::all(self.client.clone());
        let failed = |error: kube::Error| format!("CSINode {}: {error}", self.node);
        let Some(mut node) = nodes.get_opt(&self.node).await.map_err(failed)? else {
            let mut drivers = Vec::new();
            change(&mut drivers);
            let node = CSINode {
                metadata: ObjectMeta {
                    name: Some(self.node.clone()),
                    ..ObjectMeta::default()
                },
                spec: CSINodeSpec { drivers },
                ..CSINode::default()
            };
            return nodes
                .create(&PostParams::default(), &node)
                .await
                .map(|_| ())
                .map_err(failed);
        };
        change(&mut node.spec.drivers);
        let patch = Patch::Merge(serde_json::json!({"spec": {"drivers": node.spec.drivers}}));
        nodes
            .patch(&self.node, &PatchParams::default(), &patch)
            .await
            .map(|_| ())
            .map_err(failed)
    }
}

async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, String> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(csi::CallError::from(status).to_string()),
        Err(_) => Err(format!("no answer within {limit:?}")),
    }
}

/// Returns the sockets in a directory except hidden ones, which kubelet ignores.
fn sockets(dir: &Path) -> BTreeMap<PathBuf, Identity> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return BTreeMap::new();
    };
    entries
        .flatten()
        .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
        .filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            let identity = (metadata.ino(), metadata.ctime(), metadata.ctime_nsec());
            metadata
                .file_type()
                .is_socket()
                .then(|| (entry.path(), identity))
        })
        .collect()
}

/// Returns the highest version of those that kubelet supports, which have the major number 0 or 1.
fn highest_version(versions: &[String]) -> Result<Version, String> {
    if versions.is_empty() {
        return Err("no supported versions reported".to_owned());
    }
    versions
        .iter()
        .filter_map(|text| parse_version(text))
        .filter(|version| version.0 <= 1)
        .max()
        .ok_or_else(|| {
            format!("none of the versions {versions:?} is supported; kubelet speaks 0.x and 1.x")
        })
}

fn parse_version(text: &str) -> Option<Version> {
    let mut numbers = text
        .trim_start_matches('v')
        .split('.')
        .map(str::parse::<u64>);
    let major = numbers.next()?.ok()?;
    let minor = numbers.next().unwrap_or(Ok(0)).ok()?;
    let patch = numbers.next().unwrap_or(Ok(0)).ok()?;
    Some((major, minor, patch))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(&["1.0.0"], Ok((1, 0, 0)))]
    #[case(&["0.3.0", "v1.2", "2.0.0"], Ok((1, 2, 0)))]
    #[case(&["2.0.0"], Err(()))]
    #[case(&["one"], Err(()))]
    #[case(&[], Err(()))]
    fn the_highest_version_kubelet_speaks_is_chosen(
        #[case] versions: &[&str],
        #[case] expected: Result<Version, ()>,
    ) {
        let versions: Vec<String> = versions.iter().map(|&v| v.to_owned()).collect();
        assert_eq!(highest_version(&versions).map_err(|_| ()), expected);
    }

    #[test]
    fn only_visible_sockets_are_plugins_and_a_new_one_at_the_same_path_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a-reg.sock");
        let first = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let _hidden = std::os::unix::net::UnixListener::bind(dir.path().join(".b.sock")).unwrap();
        std::fs::write(dir.path().join("file.sock"), "").unwrap();
        let before = sockets(dir.path());
        assert_eq!(before.keys().collect::<Vec<_>>(), [&path]);
        drop(first);
        std::fs::remove_file(&path).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let _second = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_ne!(sockets(dir.path()), before);
    }
}
