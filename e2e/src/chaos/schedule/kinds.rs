//! What can happen in a run: the actions of tenants and the faults.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::super::editions::Edit;

/// The milliseconds from which on a disk that hangs has to be told by the health check. The driver says so
/// when no work on files has ended for 30 seconds (docs/operating.md); kubelet's calls first have to take all
/// threads, and those that are given up after ten seconds come again.
pub(in super::super) const HUNG_FOR_LONG: u64 = 45_000;

/// An action of somebody, or a fault. `lasts` is in milliseconds. A number of a node counts modulo
/// the nodes that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "what")]
pub(in super::super) enum What {
    /// A pod comes, unless it is there.
    Create { pod: usize, node: usize },
    /// A pod is deleted.
    Delete { pod: usize },
    /// A pod is deleted by force: it is gone from the API before its volumes are.
    ForceDelete { pod: usize },
    /// A pod may run no longer than it has: it fails, and its object stays without its volumes.
    Expire { pod: usize },
    /// A pod is deleted by force, and one of the same name comes at once on another node.
    Move { pod: usize, node: usize },
    /// The store gets new values of a class's objects.
    Rotate { class: usize },
    /// The store gets the values of a class's objects again that it had before the last change.
    RollBack { class: usize },
    /// A class changes.
    EditClass { class: usize, edit: Edit },
    /// A class is deleted, and made anew after a while, as it was or with another text.
    RemakeClass {
        class: usize,
        lasts: u64,
        anew: bool,
    },
    /// A class of those that ask for more says what a number decides, see [`features`](super::super::features).
    ChangeFeature { feature: usize, number: u64 },
    /// Somebody deletes the statuses of a pod.
    DeleteStatus { pod: usize },
    /// Somebody changes the versions in the statuses of a pod.
    AlterStatus { pod: usize },
    /// Somebody deletes a synced Secret.
    DeleteSecret { class: usize },
    /// Somebody changes a value of a synced Secret and adds a key, or removes a key. If `order`, the Secret
    /// also has the order of content from another cluster, as one that was restored from a backup.
    AlterSecret {
        class: usize,
        remove: bool,
        order: bool,
    },
    /// Somebody adds a label and an owner to a synced Secret, which has to keep them.
    AdornSecret { class: usize },
    /// The driver is killed.
    KillDriver { node: usize },
    /// A second driver serves at the socket of the first. It ends, or the first ends and starts anew meanwhile, and
    /// the second is killed and leaves its socket.
    TwoDrivers {
        node: usize,
        lasts: u64,
        killed: bool,
    },
    /// The provider answers late.
    ProviderSlow { node: usize, lasts: u64, by: u64 },
    /// The provider does not answer, and is killed after that.
    ProviderHung { node: usize, lasts: u64 },
    /// The provider is stopped; its socket is absent or dead.
    ProviderGone {
        node: usize,
        lasts: u64,
        socket: bool,
    },
    /// The provider fails, or its answers must not be used.
    ProviderWrong { node: usize, lasts: u64, how: usize },
    /// The provider is killed.
    KillProvider { node: usize },
    /// A second provider takes the socket, and goes again.
    ReplaceProvider { node: usize, lasts: u64 },
    /// The API server answers the driver late.
    ApiSlow { lasts: u64, by: u64 },
    /// The API server refuses every second request of the driver with this status.
    ApiRefuses { lasts: u64, status: u16 },
    /// The API server answers every second write of the driver with a conflict.
    ApiConflicts { lasts: u64 },
    /// The API server answers half of the driver's reads with what was true at the beginning of the
    /// fault.
    ApiPast { lasts: u64 },
    /// The API server refuses each write of a Secret, as a quota does.
    SecretsRefused { lasts: u64 },
    /// The API server closes the driver's connections.
    ApiGone { lasts: u64 },
    /// The API server does not answer the driver.
    ApiHung { lasts: u64 },
    /// kubelet publishes each volume again while it is being published, and gives calls up early, as one
    /// does that starts anew again and again. The provider answers as much as `by` later, and its store
    /// changes meanwhile.
    RepeatCalls { node: usize, lasts: u64, by: u64 },
    /// kubelet starts anew.
    RestartKubelet { node: usize },
    /// The node loses its power.
    Reboot { node: usize },
    /// Somebody empties the directory of the providers' sockets.
    WipeProviders { node: usize },
    /// Somebody empties the directory of kubelet's registration sockets, and kubelet starts anew.
    WipeRegistry { node: usize },
    /// Somebody empties the driver's own directory: its socket and the records.
    WipePlugin { node: usize },
    /// The disk with the records is read-only.
    DiskReadOnly { node: usize, lasts: u64 },
    /// The disk with the records is full.
    DiskFull { node: usize, lasts: u64 },
    /// The disk with the records does not answer. If it lasts for [`HUNG_FOR_LONG`], the driver has to say that
    /// it is not healthy, and is restarted then.
    DiskHung { node: usize, lasts: u64 },
    /// What the driver mounts stays in its container, as without `mountPropagation: Bidirectional`. A pod comes
    /// meanwhile.
    PropagationLost { node: usize, pod: usize, lasts: u64 },
    /// The driver starts anew with another bound of a provider's answers, and so of its volumes, as one does
    /// whose chart was upgraded, and after a while as before.
    OtherBound { node: usize, lasts: u64, bytes: u64 },
    /// The driver stands still for a while, as on a virtual machine that is suspended.
    DriverPaused { node: usize, lasts: u64 },
    /// A single request of the driver to the API server fails. `kind` counts modulo the kinds of requests that
    /// it has sent so far.
    ApiFailsOnce { kind: usize, how: usize },
    /// A single call to the provider fails, or hangs.
    ProviderFailsOnce { node: usize, hangs: bool },
    /// Large and small answers for one tenant and middle-sized ones for another come at once, and there is
    /// little memory.
    AnswersCompete { node: usize },
    /// Somebody alters files in the volumes of a pod, which is deleted after they were put in order. `how` counts
    /// modulo the ways.
    AlterFiles { pod: usize, how: usize },
    /// Somebody unmounts the volumes of a pod, which is deleted after they were mounted again.
    UnmountVolumes { pod: usize },
    /// Somebody makes the volumes of a pod read-only for a while.
    VolumesReadOnly { pod: usize, lasts: u64 },
    /// A crash leaves half a record.
    TearRecord { node: usize },
    /// The clock of a node is stepped by so many seconds, and the driver starts anew.
    StepClock { node: usize, by: i64 },
    /// The driver's memory limit is close to what is mounted.
    MemoryNear { node: usize, lasts: u64 },
    /// Somebody mounts so many times on each volume of a pod, which is deleted then.
    BuryVolumes { pod: usize, mounts: usize },
    /// The hostile tenant runs pods.
    Hostile { node: usize, lasts: u64, how: usize },
}

impl What {
    /// Returns the name of the kind, as in a schedule.
    pub(in super::super) fn kind(&self) -> String {
        let value = serde_json::to_value(self).unwrap_or_default();
        value["what"].as_str().unwrap_or_default().to_owned()
    }

    /// Returns whether it is an action of users, not a fault.
    pub(in super::super) fn is_action(&self) -> bool {
        matches!(
            self,
            Self::Create { .. }
                | Self::Delete { .. }
                | Self::ForceDelete { .. }
                | Self::Expire { .. }
                | Self::Move { .. }
                | Self::Rotate { .. }
                | Self::RollBack { .. }
                | Self::EditClass { .. }
                | Self::RemakeClass { .. }
                | Self::ChangeFeature { .. }
                | Self::DeleteStatus { .. }
                | Self::AlterStatus { .. }
                | Self::DeleteSecret { .. }
                | Self::AlterSecret { .. }
                | Self::AdornSecret { .. }
        )
    }

    /// Returns the node whose driver starts anew because of this, at its beginning, meanwhile or at its end.
    pub(in super::super) fn restarts_driver_of(&self) -> Option<usize> {
        match *self {
            Self::KillDriver { node }
            | Self::TwoDrivers { node, .. }
            | Self::Reboot { node }
            | Self::WipePlugin { node }
            | Self::DiskReadOnly { node, .. }
            | Self::DiskFull { node, .. }
            | Self::PropagationLost { node, .. }
            | Self::OtherBound { node, .. }
            | Self::AnswersCompete { node }
            | Self::TearRecord { node }
            | Self::StepClock { node, .. }
            | Self::MemoryNear { node, .. } => Some(node),
            Self::DiskHung { node, lasts } if lasts >= HUNG_FOR_LONG => Some(node),
            _ => None,
        }
    }

    /// Returns whether it is a single failure, which nobody may notice for longer than until the next attempt.
    pub(in super::super) fn is_single(&self) -> bool {
        matches!(
            self,
            Self::ApiFailsOnce { .. } | Self::ProviderFailsOnce { .. }
        )
    }

    /// Returns the node of a fault that must not meet another one of that node: each changes the
    /// node's processes or mounts, and changes them back.
    pub(super) fn alone_on(&self) -> Option<usize> {
        match *self {
            Self::TwoDrivers { node, .. }
            | Self::ReplaceProvider { node, .. }
            | Self::ProviderGone { node, .. }
            | Self::ProviderHung { node, .. }
            | Self::ProviderSlow { node, .. }
            | Self::ProviderWrong { node, .. }
            | Self::RepeatCalls { node, .. }
            | Self::KillProvider { node }
            | Self::Reboot { node }
            | Self::WipeProviders { node }
            | Self::WipePlugin { node }
            | Self::WipeRegistry { node }
            | Self::DiskReadOnly { node, .. }
            | Self::DiskFull { node, .. }
            | Self::DiskHung { node, .. }
            | Self::PropagationLost { node, .. }
            | Self::OtherBound { node, .. }
            | Self::DriverPaused { node, .. }
            | Self::ProviderFailsOnce { node, .. }
            | Self::AnswersCompete { node }
            | Self::TearRecord { node }
            | Self::StepClock { node, .. }
            | Self::MemoryNear { node, .. } => Some(node),
            _ => None,
        }
    }

    /// Returns the milliseconds that it lasts.
    pub(in super::super) fn lasts(&self) -> u64 {
        let value = serde_json::to_value(self).unwrap_or_default();
        value["lasts"].as_u64().unwrap_or(1_500)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind())?;
        let value = serde_json::to_value(self).unwrap_or_default();
        for (name, value) in value.as_object().into_iter().flatten() {
            if name != "what" {
                write!(f, " {name}={value}")?;
            }
        }
        Ok(())
    }
}
