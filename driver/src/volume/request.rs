//! The requests for a volume, and the outcome of a publish.

use tokio::time::Instant;
use zeroize::Zeroizing;

use super::{policy::Every, target::TargetPath};
use crate::{error::Error, files::Access, record::Pod, secret::SecretMap};

/// The key of service account tokens, for kubelet and for providers.
pub const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

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
