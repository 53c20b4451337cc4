//! Renders the two CRDs from the Rust types, for every served version.
//!
//! The driver itself does not render CRDs: an operator applies the files in `deploy/`.
//!
//! The schemas refuse only wrong types, and have no CEL rules: every object that the existing driver
//! stored stays valid, even if it can never be published. An event on the pod that mounts a class
//! explains what the class lacks, on every cluster alike.

use std::collections::BTreeMap;

use driver::cluster::resources::{GROUP, SecretProviderClass, SecretProviderClassPodStatus};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceColumnDefinition, CustomResourceDefinition, CustomResourceDefinitionNames,
    CustomResourceDefinitionSpec, CustomResourceDefinitionVersion, CustomResourceValidation,
    JSONSchemaProps,
};
use kube::core::{ObjectMeta, Resource};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

/// Returns the CRD of SecretProviderClass.
///
/// The driver neither reads nor writes the `status` of a class, so its types have none. The
/// schemas have one because objects of the existing driver may have it.
pub(crate) fn secret_provider_class() -> CustomResourceDefinition {
    let schema_with_status = |status: Value| {
        let mut schema = schema_of::<SecretProviderClass>();
        schema["properties"]["status"] = status;
        schema
    };
    let v1 = schema_with_status(json!({
        "type": "object",
        "description": "Unused.",
    }));
    let v1alpha1 = schema_with_status(json!({
        "type": "object",
        "description": "Unused.",
        "properties": {
            "byPod": {
                "type": "array",
                "description": "Unused.",
                "items": {
                    "type": "object",
                    "properties": {"id": {"type": "string"}, "namespace": {"type": "string"}},
                },
            },
        },
    }));
    let warning =
        format!("{GROUP}/v1alpha1 is deprecated: write SecretProviderClass as {GROUP}/v1");
    let columns = [column("Provider", "string", ".spec.provider")];
    definition::<SecretProviderClass>("secretproviderclass", v1, v1alpha1, Some(warning), &columns)
}

/// Returns the CRD of SecretProviderClassPodStatus.
pub(crate) fn secret_provider_class_pod_status() -> CustomResourceDefinition {
    let schema = schema_of::<SecretProviderClassPodStatus>();
    let columns = [
        column("Pod", "string", ".status.podName"),
        column("Class", "string", ".status.secretProviderClassName"),
        column("Mounted", "boolean", ".status.mounted"),
    ];
    definition::<SecretProviderClassPodStatus>(
        "secretproviderclasspodstatus",
        schema.clone(),
        schema,
        None,
        &columns,
    )
}

fn definition<K: Resource<DynamicType = ()>>(
    singular: &str,
    v1: Value,
    v1alpha1: Value,
    deprecation_warning: Option<String>,
    columns: &[CustomResourceColumnDefinition],
) -> CustomResourceDefinition {
    let (kind, plural) = (K::kind(&()), K::plural(&()));
    CustomResourceDefinition {
        metadata: ObjectMeta {
            name: Some(format!("{plural}.{GROUP}")),
            // Tools and older manifests read it: it tells the dialect of the schema.
            annotations: Some(BTreeMap::from([(
                "controller-gen.kubebuilder.io/version".to_owned(),
                "v0.16.3".to_owned(),
            )])),
            ..Default::default()
        },
        spec: CustomResourceDefinitionSpec {
            group: GROUP.to_owned(),
            names: CustomResourceDefinitionNames {
                kind: kind.to_string(),
                list_kind: Some(format!("{kind}List")),
                plural: plural.to_string(),
                singular: Some(singular.to_owned()),
                ..Default::default()
            },
            scope: "Namespaced".to_owned(),
            versions: vec![
                version("v1", v1, columns),
                CustomResourceDefinitionVersion {
                    storage: false,
                    deprecated: Some(true),
                    deprecation_warning,
                    ..version("v1alpha1", v1alpha1, columns)
                },
            ],
            ..Default::default()
        },
        ..Default::default()
    }
}

/// Returns a column that `kubectl get` shows beside the name and the age of an object. It does not
/// change the output of `kubectl api-resources`, which scripts read by column.
fn column(name: &str, kind: &str, json_path: &str) -> CustomResourceColumnDefinition {
    CustomResourceColumnDefinition {
        name: name.to_owned(),
        type_: kind.to_owned(),
        json_path: json_path.to_owned(),
        ..Default::default()
    }
}

fn version(
    name: &str,
    schema: Value,
    columns: &[CustomResourceColumnDefinition],
) -> CustomResourceDefinitionVersion {
    // kubectl omits its own age column as soon as there is another column.
    let age = column("Age", "date", ".metadata.creationTimestamp");
    let schema: JSONSchemaProps = serde_json::from_value(schema).unwrap();
    CustomResourceDefinitionVersion {
        name: name.to_owned(),
        served: true,
        storage: true,
        schema: Some(CustomResourceValidation {
            open_api_v3_schema: Some(schema),
        }),
        additional_printer_columns: Some([columns, &[age]].concat()),
        ..Default::default()
    }
}

/// Returns the schema of a custom resource: types and descriptions from the Rust type, and the
/// three fields that every object has.
fn schema_of<K: JsonSchema>() -> Value {
    let mut settings = SchemaSettings::openapi3();
    settings.inline_subschemas = true;
    let mut schema = plain(
        settings
            .into_generator()
            .into_root_schema_for::<K>()
            .to_value(),
    );
    let properties = schema["properties"].as_object_mut().unwrap();
    properties.insert(
        "apiVersion".to_owned(),
        json!({"type": "string", "description": "Group and version of this object's schema."}),
    );
    properties.insert(
        "kind".to_owned(),
        json!({"type": "string", "description": "Which kind of object this is."}),
    );
    properties.insert("metadata".to_owned(), json!({"type": "object"}));
    schema
}

/// Keeps types and descriptions, and drops what the generator adds: defaults, formats, titles. Every
/// field stays optional, and only wrong types are refused.
fn plain(schema: Value) -> Value {
    let Value::Object(schema) = schema else {
        return schema;
    };
    let mut kept = Map::new();
    for (keyword, value) in schema {
        match keyword.as_str() {
            "type" => drop(kept.insert(keyword, value)),
            // The wrapping and the links of Rust comments do not belong in a manifest.
            "description" => {
                let text = value
                    .as_str()
                    .unwrap()
                    .replace('\n', " ")
                    .replace(['[', ']', '`'], "");
                kept.insert(keyword, Value::String(text));
            }
            "items" | "additionalProperties" => drop(kept.insert(keyword, plain(value))),
            "properties" => {
                let Value::Object(properties) = value else {
                    panic!("properties: {value}")
                };
                let properties = properties.into_iter().map(|(k, v)| (k, plain(v))).collect();
                kept.insert(keyword, Value::Object(properties));
            }
            _ => {}
        }
    }
    Value::Object(kept)
}
