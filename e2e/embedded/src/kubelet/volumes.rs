//! An inline CSI volume of a pod: its directory, the files that kubelet writes there, and the two
//! operations on it.
//!
//! The order of steps, the texts of errors and their effect on the directory are those of kubelet
//! (`pkg/volume/csi` of kubernetes/kubernetes, above all `csi_mounter.go`).

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequestSpec};
use k8s_openapi::api::core::v1::{CSIVolumeSource, Pod, Secret};
use k8s_openapi::api::storage::v1::CSIDriver;
use kube::ResourceExt;
use kube::api::Api;
use kube::runtime::reflector::{ObjectRef, Store};
use proto::csi::volume_capability::access_mode::Mode;
use proto::csi::volume_capability::{AccessMode, AccessType, MountVolume};
use proto::csi::{NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::csi::{CallError, Driver};
use super::registration::Drivers;
use super::tokens::{self, Token, service_account};

const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";
const PLUGIN: &str = "kubernetes.io~csi";
const DATA_FILE: &str = "vol_data.json";

/// The parts of the node that both operations need.
#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) client: kube::Client,
    pub(crate) name: String,
    /// kubelet's root directory.
    pub(crate) root: PathBuf,
    pub(crate) drivers: Drivers,
    /// The CSIDriver objects, as kubelet's own cache holds them.
    pub(crate) csi_drivers: Store<CSIDriver>,
    /// The deadline of each call to a driver.
    pub(crate) csi_timeout: Duration,
}

/// The identity and directory of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Its name in the pod.
    pub(crate) name: String,
    /// `<root>/pods/<uid>/volumes/kubernetes.io~csi/<name>`.
    dir: PathBuf,
    driver: String,
    handle: String,
}

/// The knowledge of whether the driver has the volume published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It has not.
    Unmounted,
    /// It may have: a call, or kubelet itself, was interrupted.
    Uncertain,
    /// It has.
    Mounted,
}

/// An operation that failed: kubelet's text, and the state of the volume now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) message: String,
    /// The state of the volume; as before when absent.
    pub(crate) state: Option<State>,
}

/// The content of `vol_data.json`, the only source from which kubelet tears down volumes of pods that
/// are gone from the API.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct VolumeData {
    #[serde(rename = "attachmentID")]
    attachment_id: String,
    driver_name: String,
    node_name: String,
    #[serde(rename = "specVolID")]
    spec_vol_id: String,
    volume_handle: String,
    volume_lifecycle_mode: String,
}

/// Returns the directory of a pod.
pub(crate) fn pod_dir(root: &Path, uid: &str) -> PathBuf {
    root.join("pods").join(uid)
}

fn volumes_dir(root: &Path, uid: &str) -> PathBuf {
    pod_dir(root, uid).join("volumes").join(PLUGIN)
}

/// Returns the volumes of a pod that are on disk, whether the pod still exists or not. Directories
/// without a readable `vol_data.json` are logged and left, as by kubelet.
pub(crate) fn on_disk(root: &Path, uid: &str) -> Vec<Volume> {
    let Ok(entries) = fs::read_dir(volumes_dir(root, uid)) else {
        return Vec::new();
    };
    let mut volumes = Vec::new();
    for entry in entries.flatten() {
        match Volume::read(&entry.path()) {
            Ok(volume) => volumes.push(volume),
            Err(error) => {
                tracing::error!(dir = %entry.path().display(), %error, "a volume cannot be rebuilt")
            }
        }
    }
    volumes
}

/// Removes the directories of a pod that are empty.
pub(crate) fn remove_pod_dirs(root: &Path, uid: &str) {
    let pod = pod_dir(root, uid);
    for dir in [volumes_dir(root, uid), pod.join("volumes"), pod] {
        match fs::remove_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(dir = %dir.display(), %error, "orphaned pod found, but volume paths are still present on disk");
                return;
            }
            _ => {}
        }
    }
}

impl Volume {
    /// Returns an inline volume of a pod.
    pub(crate) fn new(root: &Path, uid: &str, name: &str, driver: &str) -> Self {
        Self {
            name: name.to_owned(),
            dir: volumes_dir(root, uid).join(name),
            driver: driver.to_owned(),
            handle: format!("csi-{}", sha256(&[uid, name])),
        }
    }

    fn read(dir: &Path) -> io::Result<Self> {
        let data: VolumeData = serde_json::from_slice(&fs::read(dir.join(DATA_FILE))?)?;
        Ok(Self {
            name: data.spec_vol_id,
            dir: dir.to_owned(),
            driver: data.driver_name,
            handle: data.volume_handle,
        })
    }

    /// Returns the path at which the driver is told to mount.
    pub(crate) fn target(&self) -> PathBuf {
        self.dir.join("mount")
    }

    /// Returns the state that an earlier run of kubelet left: uncertain if there is a `vol_data.json`.
    pub(crate) fn state_on_disk(&self) -> State {
        match self.dir.join(DATA_FILE).exists() {
            true => State::Uncertain,
            false => State::Unmounted,
        }
    }

    /// Publishes the volume (`SetUp`). With `remount` it is published already and stays so whatever
    /// the driver answers.
    pub(crate) async fn set_up(
        &self,
        node: &Node,
        pod: &Pod,
        source: &CSIVolumeSource,
        remount: bool,
    ) -> Result<(), Failure> {
        self.write_data(node).map_err(|error| {
            unchanged(format!(
                "kubernetes.io/csi: failed to save volume info data: {error}"
            ))
        })?;
        let endpoint = node.drivers.endpoint(&self.driver).map_err(|reason| {
            unchanged(format!(
                "kubernetes.io/csi: mounter.SetUpAt failed to get CSI client: {reason}"
            ))
        })?;
        let csi_driver = node.csi_drivers.get(&ObjectRef::new(&self.driver));
        self.check_lifecycle(csi_driver.as_deref())
            .map_err(unchanged)?;
        let mut request = self
            .request(node, pod, source, csi_driver.as_deref())
            .await
            .map_err(unchanged)?;
        // This is the first call of the operation, and so the one that fails if nobody listens.
        let unasked = |error: CallError| {
            unchanged(format!(
                "kubernetes.io/csi: mounter.SetUpAt failed to determine if the node service has VOLUME_MOUNT_GROUP capability: {error}"
            ))
        };
        let driver = Driver::connect(&endpoint, node.csi_timeout)
            .await
            .map_err(unasked)?;
        let mounts_groups = driver.mounts_groups().await.map_err(unasked)?;
        let group = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.security_context.as_ref()?.fs_group);
        if mounts_groups
            && let Some(group) = group
            && let Some(VolumeCapability {
                access_type: Some(AccessType::Mount(mount)),
                ..
            }) = &mut request.volume_capability
        {
            mount.volume_mount_group = group.to_string();
        }
        match driver.publish(request).await {
            Ok(()) => Ok(()),
            Err(error) if remount => Err(unchanged(error.to_string())),
            Err(error) => {
                let failure = judge(&error);
                if failure.state == Some(State::Unmounted)
                    && let Err(error) = self.remove_dirs()
                {
                    tracing::error!(volume = self.name, %error, "the target of a failed publish stays");
                }
                Err(failure)
            }
        }
    }

    /// Unpublishes the volume (`TearDown`). It needs only the files on disk and the driver.
    pub(crate) async fn tear_down(&self, node: &Node) -> Result<(), String> {
        let endpoint = node.drivers.endpoint(&self.driver).map_err(|reason| {
            format!("kubernetes.io/csi: Unmounter.TearDownAt failed to get CSI client: {reason}")
        })?;
        let failed =
            |error: CallError| format!("kubernetes.io/csi: Unmounter.TearDownAt failed: {error}");
        let driver = Driver::connect(&endpoint, node.csi_timeout)
            .await
            .map_err(failed)?;
        let request = NodeUnpublishVolumeRequest {
            volume_id: self.handle.clone(),
            target_path: self.target().to_string_lossy().into_owned(),
        };
        driver.unpublish(request).await.map_err(failed)?;
        self.remove_dirs().map_err(|error| {
            format!(
                "kubernetes.io/csi: Unmounter.TearDownAt failed to clean mount dir [{}]: {error}",
                self.target().display()
            )
        })
    }

    /// Removes the target unless something is mounted on it, then `vol_data.json` and the volume's
    /// directory. Directories that are not empty stay.
    pub(crate) fn remove_dirs(&self) -> io::Result<()> {
        if is_mount_point(&self.target())? {
            return Ok(());
        }
        absent_is_fine(fs::remove_dir(self.target()))?;
        absent_is_fine(fs::remove_file(self.dir.join(DATA_FILE)))?;
        absent_is_fine(fs::remove_dir(&self.dir))
    }

    fn write_data(&self, node: &Node) -> io::Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o750)
            .create(&self.dir)?;
        let data = VolumeData {
            attachment_id: format!("csi-{}", sha256(&[&self.handle, &self.driver, &node.name])),
            driver_name: self.driver.clone(),
            node_name: node.name.clone(),
            spec_vol_id: self.name.clone(),
            volume_handle: self.handle.clone(),
            volume_lifecycle_mode: "Ephemeral".to_owned(),
        };
        fs::write(self.dir.join(DATA_FILE), serde_json::to_vec(&data)?)
    }

    fn check_lifecycle(&self, csi_driver: Option<&CSIDriver>) -> Result<(), String> {
        let refused = |why: String| {
            format!(
                "kubernetes.io/csi: mounter.SetupAt failed to check volume lifecycle mode: \
                 volume mode \"Ephemeral\" not supported by driver {} ({why})",
                self.driver
            )
        };
        let Some(csi_driver) = csi_driver else {
            return Err(refused("no CSIDriver object".to_owned()));
        };
        let modes = csi_driver
            .spec
            .volume_lifecycle_modes
            .as_deref()
            .unwrap_or_default();
        if modes.iter().any(|mode| mode == "Ephemeral") {
            return Ok(());
        }
        Err(refused(format!("only supports {modes:?}")))
    }

    async fn request(
        &self,
        node: &Node,
        pod: &Pod,
        source: &CSIVolumeSource,
        csi_driver: Option<&CSIDriver>,
    ) -> Result<NodePublishVolumeRequest, String> {
        let mut secrets = node_publish_secrets(node, pod, source).await?;
        let mut context: HashMap<String, String> = source
            .volume_attributes
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect();
        let spec = csi_driver.map(|csi_driver| &csi_driver.spec);
        if spec.and_then(|spec| spec.pod_info_on_mount) == Some(true) {
            context.extend(pod_info(pod));
        }
        let audiences = spec
            .and_then(|spec| spec.token_requests.as_deref())
            .unwrap_or_default();
        if !audiences.is_empty() {
            let mut tokens = BTreeMap::new();
            for request in audiences {
                let token = token(node, pod, &request.audience, request.expiration_seconds).await?;
                tokens.insert(request.audience.clone(), token);
            }
            let tokens = serde_json::to_string(&tokens).map_err(|error| error.to_string())?;
            let in_secrets =
                spec.and_then(|spec| spec.service_account_token_in_secrets) == Some(true);
            let place = if in_secrets {
                &mut secrets
            } else {
                &mut context
            };
            place.insert(TOKENS.to_owned(), tokens);
        }
        Ok(NodePublishVolumeRequest {
            volume_id: self.handle.clone(),
            target_path: self.target().to_string_lossy().into_owned(),
            volume_capability: Some(VolumeCapability {
                access_type: Some(AccessType::Mount(MountVolume {
                    fs_type: source.fs_type.clone().unwrap_or_default(),
                    ..MountVolume::default()
                })),
                access_mode: Some(AccessMode {
                    mode: Mode::SingleNodeWriter.into(),
                }),
            }),
            readonly: source.read_only.unwrap_or_default(),
            secrets,
            volume_context: context,
            ..NodePublishVolumeRequest::default()
        })
    }
}

async fn token(
    node: &Node,
    pod: &Pod,
    audience: &str,
    seconds: Option<i64>,
) -> Result<Token, String> {
    let account = pod.spec.as_ref().map_or("default", service_account);
    let namespace = pod.namespace().unwrap_or_default();
    let spec = TokenRequestSpec {
        audiences: Some(vec![audience.to_owned()]),
        expiration_seconds: seconds,
        bound_object_ref: Some(BoundObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
        }),
        ..TokenRequestSpec::default()
    };
    tokens::request(&node.client, &namespace, account, spec).await
}

async fn node_publish_secrets(
    node: &Node,
    pod: &Pod,
    source: &CSIVolumeSource,
) -> Result<HashMap<String, String>, String> {
    let Some(name) = source
        .node_publish_secret_ref
        .as_ref()
        .map(|reference| reference.name.as_str())
    else {
        return Ok(HashMap::new());
    };
    let namespace = pod.namespace().unwrap_or_default();
    let secrets: Api<Secret> = Api::namespaced(node.client.clone(), &namespace);
    let secret = secrets.get(name).await.map_err(|error| {
        format!("fetching NodePublishSecretRef {namespace}/{name} failed: kubernetes.io/csi: failed to find the secret {name} in the namespace {namespace} with error: {}", api_message(&error))
    })?;
    // Go turns any bytes into a string, but protobuf requires UTF-8.
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(secret
        .data
        .unwrap_or_default()
        .into_iter()
        .map(|(key, value)| (key, text(value.0)))
        .collect())
}

fn api_message(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

fn pod_info(pod: &Pod) -> [(String, String); 5] {
    let account = pod.spec.as_ref().map_or("default", service_account);
    [
        ("pod.name", pod.name_any()),
        ("pod.namespace", pod.namespace().unwrap_or_default()),
        ("pod.uid", pod.uid().unwrap_or_default()),
        ("serviceAccount.name", account.to_owned()),
        ("ephemeral", "true".to_owned()),
    ]
    .map(|(key, value)| (format!("csi.storage.k8s.io/{key}"), value))
}

fn unchanged(message: String) -> Failure {
    Failure {
        message,
        state: None,
    }
}

fn judge(error: &CallError) -> Failure {
    let state = if error.is_uncertain() {
        State::Uncertain
    } else {
        State::Unmounted
    };
    Failure {
        message: error.to_string(),
        state: Some(state),
    }
}

/// Returns whether a path is a mount point, by kubelet's check: its device differs from its parent's.
fn is_mount_point(path: &Path) -> io::Result<bool> {
    let here = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let parent = fs::symlink_metadata(path.parent().unwrap_or(path))?;
    Ok(here.dev() != parent.dev())
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn sha256(parts: &[&str]) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update(part.as_bytes());
    }
    crate::hex(&digest.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handle_and_target_are_kubelets() {
        let volume = Volume::new(Path::new("/k"), "uid-1", "secrets", "d");
        // printf 'uid-1secrets' | sha256sum
        assert_eq!(
            volume.handle,
            "csi-a6c970caee5cd8f948b03753322bb4387a975639a79681246d20295ab31080fb"
        );
        assert_eq!(
            volume.target(),
            Path::new("/k/pods/uid-1/volumes/kubernetes.io~csi/secrets/mount")
        );
    }

    #[test]
    fn only_empty_directories_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let volume = Volume::new(root.path(), "u", "v", "d");
        fs::create_dir_all(volume.target()).unwrap();
        fs::write(volume.dir.join(DATA_FILE), "{}").unwrap();
        fs::write(volume.target().join("somebody's"), "").unwrap();
        assert!(volume.remove_dirs().is_err());
        assert_eq!(volume.state_on_disk(), State::Uncertain);
        fs::remove_file(volume.target().join("somebody's")).unwrap();
        volume.remove_dirs().unwrap();
        remove_pod_dirs(root.path(), "u");
        assert!(!pod_dir(root.path(), "u").exists());
        volume.remove_dirs().unwrap();
    }
}
