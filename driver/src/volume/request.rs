//! The requests for a volume, and the outcome of a publish.

use tokio::time::Instant;
use zeroize::Zeroizing;

use super::{policy::Every, target::TargetPath};
use crate::{error::Error, files::Access, record::Pod, secret::SecretMap};

/// The key of service account tokens, for kubelet and for providers.
pub const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// The beginning of the keys that only kubelet gives.
const OF_KUBELET: &str = "csi.storage.k8s.io/";

/// The keys that kubelet gives, in their only spelling
/// (`getPodInfoAttrs` and `podServiceAccountTokenAttrs` in `pkg/volume/csi/csi_mounter.go`).
const KEYS_OF_KUBELET: [&str; 6] = [
    "csi.storage.k8s.io/ephemeral",
    "csi.storage.k8s.io/pod.name",
    "csi.storage.k8s.io/pod.namespace",
    "csi.storage.k8s.io/pod.uid",
    "csi.storage.k8s.io/serviceAccount.name",
    TOKENS,
];

/// The origin of an attribute, by its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// kubelet gives it. It overrides what the pod's author wrote under the same key.
    Kubelet,
    /// It has the form of kubelet's, and this driver does not know it.
    Unknown,
    /// It resembles a key of kubelet, which kubelet does not write: somebody wants it to be taken for one.
    Imitation,
    /// A user.
    User,
}

impl Origin {
    /// Returns the origin of an attribute with this key.
    pub fn of(key: &str) -> Self {
        let plain: String = key
            .chars()
            .filter(|c| c.is_ascii_graphic())
            .map(|c| c.to_ascii_lowercase())
            .collect();
        let is_form = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        if KEYS_OF_KUBELET.contains(&key) {
            Self::Kubelet
        } else if !plain.starts_with(OF_KUBELET) {
            Self::User
        } else if KEYS_OF_KUBELET
            .iter()
            .any(|known| known.eq_ignore_ascii_case(&plain))
            || !key
                .strip_prefix(OF_KUBELET)
                .is_some_and(|rest| rest.chars().all(is_form))
        {
            Self::Imitation
        } else {
            Self::Unknown
        }
    }
}

/// A `NodePublishVolume` request whose form has been checked.
pub struct PublishRequest {
    /// kubelet's volume handle.
    pub volume_id: String,
    /// The path at which the volume must appear.
    pub target: TargetPath,
    /// The pod of the volume.
    pub pod: Pod,
    /// The name of the SecretProviderClass, in the pod's namespace.
    pub class: String,
    /// The volume's attributes: the user's, and those that kubelet adds. Without tokens.
    pub attributes: SecretMap,
    /// The data of the pod's nodePublishSecretRef. Without tokens.
    pub secrets: SecretMap,
    /// Service account tokens as kubelet's JSON, when the CSIDriver asks for them.
    pub tokens: Option<Zeroizing<String>>,
    /// The default mode and the group of the files.
    pub access: Access,
    /// The interval of refreshes, if the volume's attributes set one.
    pub every: Option<Every>,
    /// The time by which the provider must have answered, so that the rest of the call's time is
    /// enough to finish or to undo.
    pub deadline: Instant,
}

/// A `NodeUnpublishVolume` request whose form has been checked.
pub struct UnpublishRequest {
    /// kubelet's volume handle.
    pub volume_id: String,
    /// The path at which the volume is mounted.
    pub target: TargetPath,
}

/// The outcome of a publish that did not fail.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// The volume was published already and not due for a refresh; no provider was asked.
    AlreadyPublished,
    /// The volume is published now.
    Published,
    /// The volume was published already and has been refreshed.
    Refreshed {
        /// Whether its content changed.
        changed: bool,
    },
    /// The volume was published already, its refresh failed, and it keeps its content.
    Kept(Error),
}
