//! The three interfaces of the driver as Rust types, exactly as they are on the wire:
//!
//! - [`csi`]: the Container Storage Interface's Identity and Node services, which kubelet calls;
//! - [`provider`]: `v1alpha1`, which the driver calls on a provider's socket;
//! - [`registration`]: kubelet's plugin registration.
//!
//! Messages with secrets have no derived [`Debug`]. The implementations below print chosen fields
//! only, so that a log line or an assertion cannot leak a secret.

// The comments of the generated code are those of the `.proto` files.
#![allow(missing_docs)]

use std::fmt;

/// Container Storage Interface, package `csi.v1`: the Identity and Node services.
pub mod csi {
    #![allow(clippy::all, unreachable_pub, rustdoc::all)]
    tonic::include_proto!("csi.v1");
}

/// The provider interface, package `v1alpha1`.
pub mod provider {
    #![allow(clippy::all, unreachable_pub, rustdoc::all)]
    tonic::include_proto!("v1alpha1");
}

/// kubelet's plugin registration, package `pluginregistration`.
pub mod registration {
    #![allow(clippy::all, unreachable_pub, rustdoc::all)]
    tonic::include_proto!("pluginregistration");
}

/// The keys of a volume's context that identify the pod and may be printed. All others may be secret,
/// such as tokens.
const PRINTABLE_CONTEXT: [&str; 5] = [
    "csi.storage.k8s.io/pod.name",
    "csi.storage.k8s.io/pod.namespace",
    "csi.storage.k8s.io/pod.uid",
    "csi.storage.k8s.io/serviceAccount.name",
    "secretProviderClass",
];

impl fmt::Debug for csi::NodePublishVolumeRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("NodePublishVolumeRequest");
        out.field("volume_id", &self.volume_id)
            .field("target_path", &self.target_path)
            .field("volume_capability", &self.volume_capability)
            .field("readonly", &self.readonly);
        for key in PRINTABLE_CONTEXT {
            if let Some(value) = self.volume_context.get(key) {
                out.field(key, value);
            }
        }
        out.finish_non_exhaustive()
    }
}

impl fmt::Debug for csi::NodeStageVolumeRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeStageVolumeRequest")
            .field("volume_id", &self.volume_id)
            .field("staging_target_path", &self.staging_target_path)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for csi::NodeExpandVolumeRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeExpandVolumeRequest")
            .field("volume_id", &self.volume_id)
            .field("volume_path", &self.volume_path)
            .field("capacity_range", &self.capacity_range)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for provider::MountRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MountRequest")
            .field("target_path", &self.target_path)
            .field("permission", &self.permission)
            .field("current_object_version", &self.current_object_version)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for provider::MountResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MountResponse")
            .field("object_version", &self.object_version)
            .field("error", &self.error)
            .field("files", &self.files)
            .finish()
    }
}

impl fmt::Debug for provider::File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File")
            .field("path", &self.path)
            .field("mode", &format_args!("{:04o}", self.mode))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    const CANARY: &str = "canary-5f1c";

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn debug_of_a_publish_request_names_the_pod_and_no_secret() {
        let request = csi::NodePublishVolumeRequest {
            volume_id: "csi-1".into(),
            target_path: "/t".into(),
            secrets: map(&[
                ("password", CANARY),
                ("csi.storage.k8s.io/serviceAccount.tokens", CANARY),
            ]),
            volume_context: map(&[
                ("csi.storage.k8s.io/pod.name", "web"),
                ("csi.storage.k8s.io/serviceAccount.tokens", CANARY),
                ("mine", CANARY),
            ]),
            publish_context: map(&[("any", CANARY)]),
            ..Default::default()
        };
        let text = format!("{request:?} {request:#?}");
        assert!(text.contains("csi-1") && text.contains("web"), "{text}");
        assert!(!text.contains(CANARY), "{text}");
    }

    #[test]
    fn debug_of_the_other_secret_bearing_messages_prints_no_secret() {
        let file = provider::File {
            path: "db/password".into(),
            mode: 0o600,
            contents: CANARY.into(),
        };
        let response = provider::MountResponse {
            files: vec![file.clone()],
            ..Default::default()
        };
        let request = provider::MountRequest {
            attributes: CANARY.into(),
            secrets: CANARY.into(),
            target_path: "/t".into(),
            ..Default::default()
        };
        let stage = csi::NodeStageVolumeRequest {
            secrets: map(&[("k", CANARY)]),
            ..Default::default()
        };
        let expand = csi::NodeExpandVolumeRequest {
            secrets: map(&[("k", CANARY)]),
            ..Default::default()
        };
        let text = format!("{file:?} {response:?} {request:?} {stage:?} {expand:?}");
        assert!(
            text.contains("db/password") && text.contains("0600"),
            "{text}"
        );
        assert!(!text.contains(CANARY), "{text}");
        let bytes = format!("{:?}", CANARY.as_bytes());
        assert!(!text.contains(bytes.trim_matches(['[', ']'])), "{text}");
    }
}
