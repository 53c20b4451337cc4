//! Parses requests: checks their form, and turns them into types of the modules below.

use std::{collections::HashMap, path::Path, time::Duration};

use proto::csi::{
    NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability,
    volume_capability::AccessType,
};
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use zeroize::Zeroizing;

use crate::{
    error::{Error, Result},
    files::{self, Access},
    quoted::quoted,
    record::{Pod, is_object_name},
    secret::SecretMap,
    volume::{
        Origin, PublishRequest, TOKENS, UnpublishRequest,
        policy::{self, Every},
        target::TargetPath,
    },
};

/// The keys that kubelet adds to a volume's context for a driver with `podInfoOnMount`:
/// <https://kubernetes-csi.github.io/docs/pod-info.html>.
pub(super) const POD_NAME: &str = "csi.storage.k8s.io/pod.name";
pub(super) const POD_NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";
const POD_UID: &str = "csi.storage.k8s.io/pod.uid";
/// The volume attribute that names the class.
const CLASS: &str = "secretProviderClass";

/// The volume attribute with the mode, in octal, of files for which the provider gives none.
const MODE: &str = "secrets-store.csi.k8s.io/default-mode";

/// The deadline of a caller that sends none: kubelet's deadline for a call.
const USUAL_DEADLINE: Duration = Duration::from_secs(120);

/// Parses a publish. Checks in the order and reports in the words of upstream's `NodePublishVolume`
/// (`pkg/secrets-store/nodeserver.go`), except that `readOnly` is checked before anything is read.
pub(super) fn publish_request(
    request: NodePublishVolumeRequest,
    deadline: Instant,
    root: Option<&Path>,
) -> Result<PublishRequest> {
    check_form(&request)?;
    let mut attributes = attributes(request.volume_context)?;
    let mut secrets: SecretMap = request.secrets.into_iter().collect();
    // Attributes that are addressed to the driver are not passed on to the provider.
    let every = attributes
        .remove(policy::INTERVAL)
        .map(|text| Every::parse(&text).map_err(|why| wrong_attribute(policy::INTERVAL, &why)))
        .transpose()?;
    let default_mode = attributes
        .remove(MODE)
        .map(|text| mode(&text).map_err(|why| wrong_attribute(MODE, why)))
        .transpose()?
        .unwrap_or(files::DEFAULT_MODE);
    let access = Access {
        default_mode,
        group: group(request.volume_capability)?,
    };
    // Since Kubernetes 1.35 tokens may come in `secrets`. They are removed from both maps, so that a
    // provider gets them once, among the attributes.
    let in_context = attributes.remove(TOKENS);
    let tokens = secrets
        .remove(TOKENS)
        .or(in_context)
        .filter(|tokens| !tokens.is_empty());
    let class = match attributes.expose(CLASS) {
        Some(class) if !class.is_empty() => class.to_owned(),
        _ => {
            return Err(Error::invalid(
                "secretProviderClass is not set: name the SecretProviderClass in the pod's spec.volumes[].csi.volumeAttributes.secretProviderClass",
            ));
        }
    };
    let pod = pod(&attributes)?;
    Ok(PublishRequest {
        target: TargetPath::parse(&request.target_path, root, Some(&pod.uid))?,
        volume_id: request.volume_id,
        pod,
        class,
        attributes,
        secrets,
        tokens,
        access,
        every,
        deadline,
    })
}

/// Checks that the required fields are set, and `readOnly`.
fn check_form(request: &NodePublishVolumeRequest) -> Result<()> {
    let missing = if request.volume_capability.is_none() {
        "Volume capability"
    } else if request.volume_id.is_empty() {
        "Volume ID"
    } else if request.target_path.is_empty() {
        "Target path"
    } else if request.volume_context.is_empty() {
        "Volume attributes"
    } else if !request.readonly {
        return Err(Error::invalid(
            "Readonly is not true in request: set `readOnly: true` in the pod's spec.volumes[].csi of this volume",
        ));
    } else {
        return Ok(());
    };
    Err(Error::invalid(format!("{missing} missing in request")))
}

/// Returns the attributes of a volume, without those that only a later kubelet may give: a provider could
/// trust them, and a pod's author can write them as well.
fn attributes(context: HashMap<String, String>) -> Result<SecretMap> {
    let mut attributes = SecretMap::default();
    for (key, value) in context {
        match Origin::of(&key) {
            Origin::Kubelet | Origin::User => attributes.insert(key, value),
            Origin::Unknown => {
                tracing::debug!(key = %quoted(&key, 100), "this attribute is not passed on: its key is kubelet's");
                drop(Zeroizing::new(value));
            }
            Origin::Imitation => {
                drop(Zeroizing::new(value));
                return Err(Error::invalid(format!(
                    "attribute {} in the pod's spec.volumes[].csi.volumeAttributes resembles a key of kubelet; only kubelet gives attributes that begin with csi.storage.k8s.io/, so remove it",
                    quoted(&key, 100)
                )));
            }
        }
    }
    Ok(attributes)
}

/// Returns the pod that the attributes name.
fn pod(attributes: &SecretMap) -> Result<Pod> {
    let required = |key: &str| match attributes.expose(key) {
        Some(value) if !value.is_empty() => Ok(value.to_owned()),
        _ => Err(Error::invalid(format!(
            "{key} missing in request: the CSIDriver object of this driver needs `podInfoOnMount: true`"
        ))),
    };
    // These names become part of the paths of requests to the API server.
    let name = |key: &str| {
        let name = required(key)?;
        if !is_object_name(&name) {
            return Err(Error::invalid(format!(
                "{key} {} in request cannot be the name of an object",
                quoted(&name, 100)
            )));
        }
        Ok(name)
    };
    Ok(Pod {
        name: name(POD_NAME)?,
        namespace: name(POD_NAMESPACE)?,
        uid: required(POD_UID)?,
    })
}

/// Parses the group that kubelet asks for: the pod's fsGroup, which it passes on to drivers with the
/// capability `VOLUME_MOUNT_GROUP` (<https://kubernetes-csi.github.io/docs/support-fsgroup.html>).
fn group(capability: Option<VolumeCapability>) -> Result<Option<u32>> {
    let Some(AccessType::Mount(mount)) = capability.and_then(|it| it.access_type) else {
        return Ok(None);
    };
    match mount.volume_mount_group.as_str() {
        "" => Ok(None),
        text => match text.parse::<u32>() {
            // Only the form in which kubelet writes a number is accepted. The largest number is no
            // group: with it chown(2) leaves the group as it is.
            Ok(group) if group != u32::MAX && group.to_string() == text => Ok(Some(group)),
            _ => Err(Error::invalid(format!(
                "volume mount group {} in request is not a group ID: set the pod's spec.securityContext.fsGroup to a number from 0 to {}",
                quoted(text, 20),
                u32::MAX - 1
            ))),
        },
    }
}

/// Parses a file mode: octal digits, at most 0777.
fn mode(text: &str) -> Result<u32, &'static str> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    u32::from_str_radix(digits, 8)
        .ok()
        .filter(|mode| (1..=0o777).contains(mode) && !digits.starts_with('+'))
        .ok_or("write an octal mode such as \"0640\", at most \"0777\"")
}

fn wrong_attribute(name: &str, why: &str) -> Error {
    Error::invalid(format!(
        "attribute {name} in the pod's spec.volumes[].csi.volumeAttributes is wrong: {why}"
    ))
}

/// Parses an unpublish.
pub(super) fn unpublish_request(
    request: NodeUnpublishVolumeRequest,
    root: Option<&Path>,
) -> Result<UnpublishRequest> {
    if request.volume_id.is_empty() {
        return Err(Error::invalid("Volume ID missing in request"));
    }
    if request.target_path.is_empty() {
        return Err(Error::invalid("Target path missing in request"));
    }
    Ok(UnpublishRequest {
        target: TargetPath::parse(&request.target_path, root, None)?,
        volume_id: request.volume_id,
    })
}

/// Returns the time by which a provider must have answered for the call to end within its caller's
/// deadline: a fifth of the time, at most ten seconds, is left for the remaining steps.
pub(super) fn deadline(metadata: &MetadataMap) -> Instant {
    let whole = metadata
        .get("grpc-timeout")
        .and_then(|value| grpc_timeout(value.to_str().ok()?))
        .map_or(USUAL_DEADLINE, |timeout| timeout.min(USUAL_DEADLINE));
    let remaining_steps = (whole / 5).min(Duration::from_secs(10));
    Instant::now() + (whole - remaining_steps)
}

/// Parses the value of the header `grpc-timeout`: up to eight digits and a unit
/// (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>).
fn grpc_timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => amount.checked_mul(3600).map(Duration::from_secs),
        "M" => amount.checked_mul(60).map(Duration::from_secs),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

/// Parses bytes as requests of kubelet.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    use crate::fuzz::assert_readable;
    use prost::Message as _;

    let kubelet = Path::new("/var/lib/kubelet");
    for root in [None, Some(kubelet)] {
        if let Ok(request) = NodePublishVolumeRequest::decode(bytes) {
            match publish_request(request, Instant::now(), root) {
                Ok(publish) => {
                    assert!(is_object_name(&publish.pod.namespace));
                    assert!(is_object_name(&publish.pod.name));
                    assert_is_target(&publish.target, root, Some(&publish.pod.uid));
                    assert!(publish.attributes.expose(TOKENS).is_none());
                    assert!((1..=0o777).contains(&publish.access.default_mode));
                }
                Err(error) => assert_readable(&error),
            }
        }
        if let Ok(request) = NodeUnpublishVolumeRequest::decode(bytes) {
            match unpublish_request(request, root) {
                Ok(unpublish) => assert_is_target(&unpublish.target, root, None),
                Err(error) => assert_readable(&error),
            }
        }
    }
    if let Ok(value) = tonic::metadata::MetadataValue::try_from(bytes) {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", value);
        assert!(deadline(&metadata) <= Instant::now() + USUAL_DEADLINE);
    }
}

/// Fails unless a target path is below kubelet's directory of the pod's volumes.
#[cfg(any(test, fuzzing))]
fn assert_is_target(target: &TargetPath, root: Option<&Path>, pod_uid: Option<&str>) {
    let path = target.as_path();
    let text = target.as_str();
    assert!(text.split('/').all(|name| name != ".." && name != "."));
    assert!(root.is_none_or(|root| path.starts_with(root.join("pods"))));
    assert!(pod_uid.is_none_or(|uid| text.contains(&format!("/pods/{uid}/volumes/"))));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proto::csi::volume_capability::MountVolume;
    use rstest::rstest;
    use tonic::Code;

    fn valid() -> NodePublishVolumeRequest {
        let context = [
            (POD_NAME, "web"),
            (POD_NAMESPACE, "shop"),
            (POD_UID, "u-1"),
            (CLASS, "vault"),
            ("mine", "kept"),
        ];
        NodePublishVolumeRequest {
            volume_id: "csi-1".into(),
            target_path: "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/s/mount".into(),
            volume_capability: Some(VolumeCapability::default()),
            readonly: true,
            volume_context: context.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            ..Default::default()
        }
    }

    fn with_group(group: &str) -> VolumeCapability {
        VolumeCapability {
            access_type: Some(AccessType::Mount(MountVolume {
                volume_mount_group: group.to_owned(),
                ..Default::default()
            })),
            ..Default::default()
        }
    }

    #[test]
    fn what_is_said_to_the_driver_is_taken_and_not_passed_on() {
        let mut request = valid();
        for (name, value) in [(policy::INTERVAL, "1h"), (MODE, "0440")] {
            request.volume_context.insert(name.into(), value.into());
        }
        request.volume_capability = Some(with_group("1004"));
        let parsed = parse(request).ok().unwrap();
        assert_eq!(
            parsed.every,
            Some(Every::Interval(Duration::from_secs(3600)))
        );
        let access = Access {
            default_mode: 0o440,
            group: Some(1004),
        };
        assert_eq!(parsed.access, access);
        let passed_on = parsed.attributes.expose_json().unwrap();
        assert!(
            !passed_on.contains("secrets-store.csi.k8s.io"),
            "{}",
            *passed_on
        );
        assert!(passed_on.contains("mine"));

        let plain = parse(valid()).ok().unwrap();
        assert_eq!((plain.every, plain.access), (None, Access::default()));
    }

    proptest! {
        /// A text that is no name of an object gets into no path of the API.
        #[test]
        fn names_that_are_none_are_refused(
            key in prop::sample::select(vec![POD_NAME, POD_NAMESPACE]),
            name in prop_oneof![
                r"[a-z]{0,3}[/?#%. A-Z_\\\x00-\x1f\x7fé-][a-z./]{0,6}",
                Just("../../x".to_owned()),
                Just("..".to_owned()),
                Just("a".repeat(254)),
                r"[a-z0-9]{1,5}([-.][a-z0-9]{1,3}){0,2}",
            ],
        ) {
            let mut request = valid();
            request.volume_context.insert(key.into(), name.clone());
            let parsed = parse(request);
            prop_assert_eq!(parsed.is_ok(), is_object_name(&name), "{:?}", name);
            if let Err(error) = parsed {
                prop_assert_eq!(error.code(), Code::InvalidArgument);
                prop_assert!(error.to_string().contains(key), "{}", error);
            }
        }
    }

    fn parse(request: NodePublishVolumeRequest) -> Result<PublishRequest> {
        publish_request(request, Instant::now(), None)
    }

    #[rstest]
    #[case::capability(|r: &mut NodePublishVolumeRequest| r.volume_capability = None, "Volume capability missing")]
    #[case::id(|r: &mut NodePublishVolumeRequest| r.volume_id.clear(), "Volume ID missing")]
    #[case::target(|r: &mut NodePublishVolumeRequest| r.target_path.clear(), "Target path missing")]
    #[case::context(|r: &mut NodePublishVolumeRequest| r.volume_context.clear(), "Volume attributes missing")]
    #[case::read_only(|r: &mut NodePublishVolumeRequest| r.readonly = false, "readOnly: true")]
    #[case::class(|r: &mut NodePublishVolumeRequest| { r.volume_context.remove(CLASS); }, "secretProviderClass is not set")]
    #[case::pod_info(|r: &mut NodePublishVolumeRequest| { r.volume_context.remove(POD_UID); }, "podInfoOnMount")]
    #[case::interval(|r: &mut NodePublishVolumeRequest| { r.volume_context.insert(policy::INTERVAL.into(), "soon".into()); }, "rotation-poll-interval")]
    #[case::mode(|r: &mut NodePublishVolumeRequest| { r.volume_context.insert(MODE.into(), "0888".into()); }, "default-mode")]
    #[case::mode_beyond_permissions(|r: &mut NodePublishVolumeRequest| { r.volume_context.insert(MODE.into(), "4755".into()); }, "at most")]
    #[case::group(|r: &mut NodePublishVolumeRequest| r.volume_capability = Some(with_group("staff")), "not a group ID")]
    #[case::group_minus_one(|r: &mut NodePublishVolumeRequest| r.volume_capability = Some(with_group("4294967295")), "fsGroup")]
    #[case::group_too_large(|r: &mut NodePublishVolumeRequest| r.volume_capability = Some(with_group("4294967296")), "fsGroup")]
    #[case::group_negative(|r: &mut NodePublishVolumeRequest| r.volume_capability = Some(with_group("-1")), "fsGroup")]
    #[case::group_with_a_sign(|r: &mut NodePublishVolumeRequest| r.volume_capability = Some(with_group("+5")), "fsGroup")]
    #[case::group_with_a_nought(|r: &mut NodePublishVolumeRequest| r.volume_capability = Some(with_group("05")), "fsGroup")]
    #[case::group_with_a_space(|r: &mut NodePublishVolumeRequest| r.volume_capability = Some(with_group(" 5")), "fsGroup")]
    #[case::another_pods_target(|r: &mut NodePublishVolumeRequest| { r.volume_context.insert(POD_UID.into(), "u-2".into()); }, "does not belong")]
    fn what_is_wrong_with_a_request_is_named(
        #[case] spoil: fn(&mut NodePublishVolumeRequest),
        #[case] why: &str,
    ) {
        let mut request = valid();
        spoil(&mut request);
        let error = parse(request).err().unwrap();
        assert!(error.to_string().contains(why), "{error}");
        assert_eq!(error.code(), Code::InvalidArgument);
    }

    #[rstest]
    #[case::nowhere(None, None, None)]
    #[case::in_the_context(Some("context"), None, Some("context"))]
    #[case::in_secrets(None, Some("secrets"), Some("secrets"))]
    #[case::secrets_first(Some("context"), Some("secrets"), Some("secrets"))]
    #[case::empty(Some(""), None, None)]
    fn tokens_are_taken_out_of_both_maps(
        #[case] context: Option<&str>,
        #[case] secrets: Option<&str>,
        #[case] expected: Option<&str>,
    ) {
        let mut request = valid();
        if let Some(tokens) = context {
            request.volume_context.insert(TOKENS.into(), tokens.into());
        }
        if let Some(tokens) = secrets {
            request.secrets.insert(TOKENS.into(), tokens.into());
        }
        let parsed = parse(request).ok().unwrap();
        assert_eq!(parsed.tokens.as_ref().map(|t| t.as_str()), expected);
        assert_eq!(parsed.attributes.expose(TOKENS), None);
        assert_eq!(parsed.attributes.expose("mine"), Some("kept"));
        assert!(parsed.secrets.is_empty());
    }

    #[rstest]
    #[case::kubelets("119999m", Some(Duration::from_millis(119_999)))]
    #[case::seconds("5S", Some(Duration::from_secs(5)))]
    #[case::hours("1H", Some(Duration::from_secs(3600)))]
    #[case::nanos("99999999n", Some(Duration::from_nanos(99_999_999)))]
    #[case::no_unit("5", None)]
    #[case::no_digits("S", None)]
    #[case::empty("", None)]
    #[case::not_ascii("5µ", None)]
    fn deadlines(#[case] header: &str, #[case] expected: Option<Duration>) {
        assert_eq!(grpc_timeout(header), expected);
    }
}
