//! Defines the two custom resources as Rust types, at the storage version `v1`.
//!
//! An object without any fields deserializes: each field has a default, and a field that a class must
//! have is checked where it is needed, with a message for its author. Empty fields are left out when
//! serializing, as Kubernetes does. `tests/manifests.rs` renders the CRDs in `deploy/` from these
//! types and their comments.

use std::borrow::Cow;
use std::collections::BTreeMap;

use kube::core::{NamespaceResourceScope, ObjectMeta, Resource};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The API group of both custom resources.
pub const GROUP: &str = "secrets-store.csi.x-k8s.io";
/// The stored version, and the only one that the driver uses. The API server converts objects that
/// were written as `v1alpha1`.
pub const VERSION: &str = "v1";
/// [`GROUP`] and [`VERSION`] as in an object's `apiVersion`.
pub const API_VERSION: &str = "secrets-store.csi.x-k8s.io/v1";

/// The objects of an external store that a volume holds, and the provider that delivers them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SecretProviderClass {
    /// Always [`API_VERSION`]; a field because objects carry it on the wire.
    #[schemars(skip)]
    pub api_version: String,
    /// Always `SecretProviderClass`.
    #[schemars(skip)]
    pub kind: String,
    /// The name, namespace, UID and so on.
    #[schemars(skip)]
    pub metadata: ObjectMeta,
    /// The provider, the objects to request from it, and the Secrets to make of them.
    pub spec: SecretProviderClassSpec,
}

/// The specification of a [`SecretProviderClass`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SecretProviderClassSpec {
    /// Name of the provider. The driver finds it at the socket of this name in the provider
    /// directories of the node.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub provider: String,
    /// Parameters of the provider, which name the objects. The driver passes them on unread.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<String, String>,
    /// Secrets to make of the mounted objects. A Secret is deleted with the last of its owners. These
    /// are the controllers of the pods that mount this class, and the SecretProviderClassPodStatus of
    /// a pod without a controller.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secret_objects: Vec<SecretObject>,
}

/// One Secret to make of mounted objects.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SecretObject {
    /// Name of the Secret, in the namespace of the class.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub secret_name: String,
    /// Type of the Secret, such as Opaque or kubernetes.io/tls.
    #[serde(rename = "type", skip_serializing_if = "String::is_empty")]
    pub type_: String,
    /// Labels that the Secret gets.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations that the Secret gets.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Keys of the Secret and the object that each one's value comes from.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<SecretObjectData>,
}

/// One key of a synced Secret.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SecretObjectData {
    /// Path of the mounted object inside the volume; "*" for every object that is mounted, each
    /// under its own name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub object_name: String,
    /// Key in the Secret. Leave it out if objectName is "*".
    #[serde(skip_serializing_if = "String::is_empty")]
    pub key: String,
    /// Field of the object, which must be a JSON object then. The Secret gets the value of this
    /// field: a string as it is, anything else as JSON.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub json_key: String,
    /// Encoding of the value in the store: base64, which is decoded for the Secret. If it is left
    /// out, the Secret gets the value as it is.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub encoding: String,
}

/// A record of the objects that the driver has mounted into one volume of one pod. The driver
/// writes it for people and other tools.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SecretProviderClassPodStatus {
    /// Always [`API_VERSION`]; a field because objects carry it on the wire.
    #[schemars(skip)]
    pub api_version: String,
    /// Always `SecretProviderClassPodStatus`.
    #[schemars(skip)]
    pub kind: String,
    /// The name, namespace, labels, owner and so on.
    #[schemars(skip)]
    pub metadata: ObjectMeta,
    /// The mounted volume. It is part of the object itself: there is no status subresource.
    pub status: PodStatus,
}

/// The content of a [`SecretProviderClassPodStatus`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStatus {
    /// Name of the pod that mounts the volume.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub pod_name: String,
    /// Name of the SecretProviderClass that the volume was made from.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub secret_provider_class_name: String,
    /// Whether the volume is mounted with its content.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub mounted: bool,
    /// Path on the node at which the volume is mounted.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub target_path: String,
    /// The objects in the volume and their versions, sorted by id.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub objects: Vec<ObjectVersion>,
}

/// One object of the external store, at one version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ObjectVersion {
    /// Name of the object at the provider.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// The version of the object that is mounted, as the provider reported it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub version: String,
}

impl Default for SecretProviderClass {
    fn default() -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            kind: Self::kind(&()).into_owned(),
            metadata: ObjectMeta::default(),
            spec: SecretProviderClassSpec::default(),
        }
    }
}

impl Default for SecretProviderClassPodStatus {
    fn default() -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            kind: Self::kind(&()).into_owned(),
            metadata: ObjectMeta::default(),
            status: PodStatus::default(),
        }
    }
}

/// Tells the kube client the path of a custom resource.
macro_rules! custom_resource {
    ($type:ty, kind: $kind:literal, plural: $plural:literal) => {
        impl Resource for $type {
            type DynamicType = ();
            type Scope = NamespaceResourceScope;

            fn kind(_: &()) -> Cow<'_, str> {
                Cow::Borrowed($kind)
            }
            fn group(_: &()) -> Cow<'_, str> {
                Cow::Borrowed(GROUP)
            }
            fn version(_: &()) -> Cow<'_, str> {
                Cow::Borrowed(VERSION)
            }
            fn plural(_: &()) -> Cow<'_, str> {
                Cow::Borrowed($plural)
            }
            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

custom_resource!(SecretProviderClass, kind: "SecretProviderClass", plural: "secretproviderclasses");
custom_resource!(
    SecretProviderClassPodStatus,
    kind: "SecretProviderClassPodStatus",
    plural: "secretproviderclasspodstatuses"
);

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_class_with_nothing_in_it_deserializes() {
        let spc: SecretProviderClass = serde_json::from_value(json!({
            "apiVersion": API_VERSION, "kind": "SecretProviderClass", "metadata": {"name": "empty"},
        }))
        .unwrap();
        assert_eq!(spc.spec, SecretProviderClassSpec::default());
        assert_eq!(spc.metadata.name.as_deref(), Some("empty"));
    }

    #[test]
    fn a_full_class_keeps_every_field() {
        let full = json!({
            "apiVersion": API_VERSION,
            "kind": "SecretProviderClass",
            "metadata": {"name": "db", "namespace": "shop"},
            "spec": {
                "provider": "vault",
                "parameters": {"roleName": "shop"},
                "secretObjects": [{
                    "secretName": "db", "type": "Opaque",
                    "labels": {"team": "shop"}, "annotations": {"note": "x"},
                    "data": [{"objectName": "db/password", "key": "password"}],
                }],
            },
        });
        let spc: SecretProviderClass = serde_json::from_value(full.clone()).unwrap();
        assert_eq!(
            spc.spec.secret_objects[0].data[0].object_name,
            "db/password"
        );
        assert_eq!(serde_json::to_value(&spc).unwrap(), full);
    }

    #[test]
    fn a_pod_status_goes_over_the_wire_as_kubernetes_writes_it() {
        let status = SecretProviderClassPodStatus {
            metadata: ObjectMeta {
                name: Some("web-shop-db".into()),
                ..Default::default()
            },
            status: PodStatus {
                pod_name: "web".into(),
                mounted: true,
                objects: vec![ObjectVersion {
                    id: "secret/db".into(),
                    version: "7".into(),
                }],
                ..Default::default()
            },
            ..Default::default()
        };
        assert_eq!(
            serde_json::to_value(&status).unwrap(),
            json!({
                "apiVersion": API_VERSION,
                "kind": "SecretProviderClassPodStatus",
                "metadata": {"name": "web-shop-db"},
                "status": {
                    "podName": "web", "mounted": true,
                    "objects": [{"id": "secret/db", "version": "7"}],
                },
            })
        );
        assert_eq!(
            SecretProviderClassPodStatus::url_path(&(), Some("shop")),
            "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasspodstatuses"
        );
    }
}
