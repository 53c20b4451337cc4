//! What follows from the facts of a pod: whether its volumes are mounted, and what the node's driver says of them.

use driver::status::{self, Status};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Container;
use kube::ResourceExt as _;

use super::{Facts, VolumeFacts};
use crate::{cluster::Read, explain::state, installation::NodeSays};

impl VolumeFacts {
    /// Returns when its class was changed last, as far as its metadata says so: what it asks for, or its annotations.
    pub(in crate::explain) fn changed_at(&self) -> Option<Timestamp> {
        let class = self.class.found()?;
        let managed = class.metadata.managed_fields.iter().flatten();
        let written = managed.filter_map(|entry| entry.time.as_ref());
        let all = written.chain(class.metadata.creation_timestamp.as_ref());
        all.map(|time| time.0).max()
    }
}

impl Facts {
    /// Returns what the node's driver says, if it could be asked.
    pub(in crate::explain) fn status(&self) -> Option<&Status> {
        match self.node.as_ref()?.says.as_ref()? {
            NodeSays::Status(status) => Some(status),
            _ => None,
        }
    }

    /// Returns what the node's driver has recorded of a volume.
    pub(in crate::explain) fn record(&self, volume: &VolumeFacts) -> Option<&status::Volume> {
        let uid = self.pod.metadata.uid.as_deref()?;
        let end = format!("/{}/mount", volume.name);
        let mut volumes = self.status()?.volumes.iter();
        volumes.find(|found| {
            found.pod.uid == uid && found.target_path.to_string_lossy().ends_with(&end)
        })
    }

    /// Returns whether a volume is mounted, if that is known.
    pub(in crate::explain) fn is_mounted(&self, volume: &VolumeFacts) -> Option<bool> {
        if self.status().is_some() {
            return Some(self.record(volume).is_some_and(|record| record.mounted));
        }
        let has_begun = state::has_begun(&self.pod) && !self.has_ended();
        match &volume.pod_status {
            Read::Is(status) if status.status.mounted && self.may_outlive_its_volumes() => None,
            Read::Is(status) if status.status.mounted => Some(true),
            // kubelet starts no container before all volumes are mounted.
            _ if has_begun && !self.is_deleted() && self.is_used(volume) => Some(true),
            Read::Is(_) | Read::Missing => Some(false),
            _ => None,
        }
    }

    /// Returns whether all volumes of the driver are known to be mounted that containers mount.
    pub(in crate::explain) fn has_volumes(&self) -> bool {
        let mut used = self.volumes.iter().filter(|volume| self.is_used(volume));
        used.all(|volume| self.is_mounted(volume) == Some(true))
    }

    /// Returns whether somebody has deleted the pod.
    pub(in crate::explain) fn is_deleted(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }

    /// Returns whether somebody wants the pod to stay until something is done.
    pub(in crate::explain) fn has_finalizers(&self) -> bool {
        !self.pod.finalizers().is_empty()
    }

    /// Returns whether the pod may be there only because something else than its volumes keeps it. Its pod statuses
    /// stay as long as it does. Without a driver on the node, nothing has taken its volumes down.
    pub(in crate::explain) fn may_outlive_its_volumes(&self) -> bool {
        let mut statuses = state::statuses(&self.pod).peekable();
        let have_ended = statuses.peek().is_some()
            && statuses.all(|(_, status)| {
                let state = status.state.as_ref();
                state.is_some_and(|state| state.terminated.is_some())
            });
        let has_ended = have_ended && !self.lacks_driver();
        self.is_deleted() && (self.has_finalizers() || has_ended)
    }

    /// Returns whether the pod has ended: its volumes are gone then.
    pub(in crate::explain) fn has_ended(&self) -> bool {
        let status = self.pod.status.as_ref();
        let phase = status.and_then(|status| status.phase.as_deref());
        matches!(phase, Some("Succeeded" | "Failed"))
    }

    /// Returns whether a container of the pod mounts a volume. kubelet does not mount one that none does.
    pub(in crate::explain) fn is_used(&self, volume: &VolumeFacts) -> bool {
        self.containers().any(|container| mounts(container, volume))
    }

    /// Returns whether the container of this name mounts a volume.
    pub(in crate::explain) fn is_mounted_by(&self, volume: &VolumeFacts, container: &str) -> bool {
        self.containers()
            .any(|other| other.name == container && mounts(other, volume))
    }

    pub(in crate::explain) fn containers(&self) -> impl Iterator<Item = &Container> {
        let spec = self.pod.spec.iter();
        spec.flat_map(|spec| {
            spec.init_containers
                .iter()
                .flatten()
                .chain(&spec.containers)
        })
    }
}

fn mounts(container: &Container, volume: &VolumeFacts) -> bool {
    let mut mounts = container.volume_mounts.iter().flatten();
    mounts.any(|mount| mount.name == volume.name)
}
