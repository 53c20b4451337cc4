//! Volumes of pods that no kubelet runs, and kubelet's requests for them.

use std::fs;
use std::path::Path;

use futures::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::PostParams;
use proto::csi::volume_capability::{AccessType, MountVolume};
use proto::csi::{NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability};
use serde_json::json;

use super::{MANY, failed};
use crate::cluster::Result;
use crate::namespace::Namespace;

/// A volume of a pod that no kubelet runs.
#[derive(Clone, Debug)]
pub(crate) struct Volume {
    class: String,
    namespace: String,
    pod: String,
    uid: String,
    /// The directory that stands for kubelet's root.
    root: String,
}

impl Volume {
    /// Creates pods of a node, and returns a volume of a class for each. `root` is kubelet's
    /// directory as the driver sees it, `disk` as this process sees it.
    pub(crate) async fn create(
        namespace: &Namespace,
        (node, class, run): (&str, &str, &str),
        (root, disk): (&str, &Path),
        count: usize,
    ) -> Result<Vec<Self>> {
        let api = namespace.api::<Pod>();
        let made = stream::iter(0..count).map(|number| {
            let api = api.clone();
            async move {
                let pod = json!({
                    "metadata": {"name": format!("pod-{run}-{number}")},
                    "spec": {
                        "nodeName": node,
                        "containers": [{"name": "main", "image": "none"}],
                        "tolerations": [{"operator": "Exists"}],
                    },
                });
                let pod: Pod =
                    serde_json::from_value(pod).map_err(|error| failed("a pod", &error))?;
                let made = api.create(&PostParams::default(), &pod).await;
                let made = made.map_err(|error| failed("a pod", &error))?;
                let volume = Self {
                    class: class.to_owned(),
                    namespace: namespace.name().to_owned(),
                    pod: made.name_any(),
                    uid: made.uid().unwrap_or_default(),
                    root: root.to_owned(),
                };
                // kubelet makes the parent of the target.
                let parent = format!("pods/{}/volumes/kubernetes.io~csi/secrets", volume.uid);
                fs::create_dir_all(disk.join(parent))
                    .map_err(|error| failed("a pod's directory", &error))?;
                Ok(volume)
            }
        });
        made.buffer_unordered(MANY)
            .collect::<Vec<_>>()
            .await
            .into_iter()
            .collect()
    }

    pub(crate) fn pod(&self) -> &str {
        &self.pod
    }

    pub(crate) fn uid(&self) -> &str {
        &self.uid
    }

    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Returns the path at which the driver mounts the volume.
    pub(crate) fn target(&self) -> String {
        let (root, uid) = (&self.root, &self.uid);
        format!("{root}/pods/{uid}/volumes/kubernetes.io~csi/secrets/mount")
    }

    /// Returns kubelet's request to publish it.
    pub(crate) fn publish(&self) -> NodePublishVolumeRequest {
        let context = [
            ("secretProviderClass", &*self.class),
            ("csi.storage.k8s.io/pod.name", &self.pod),
            ("csi.storage.k8s.io/pod.namespace", &self.namespace),
            ("csi.storage.k8s.io/pod.uid", &self.uid),
            ("csi.storage.k8s.io/serviceAccount.name", "default"),
            ("csi.storage.k8s.io/ephemeral", "true"),
        ];
        NodePublishVolumeRequest {
            volume_id: format!("csi-{}", self.uid),
            target_path: self.target(),
            volume_capability: Some(VolumeCapability {
                access_type: Some(AccessType::Mount(MountVolume::default())),
                ..Default::default()
            }),
            readonly: true,
            volume_context: context
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ..Default::default()
        }
    }

    /// Returns kubelet's request to unpublish it.
    pub(crate) fn unpublish(&self) -> NodeUnpublishVolumeRequest {
        NodeUnpublishVolumeRequest {
            volume_id: format!("csi-{}", self.uid),
            target_path: self.target(),
        }
    }
}
