//! What an operator installs says what the contract says, and the generated part of it is up to
//! date. `UPDATE_DEPLOY=1 cargo test -p driver --test manifests` writes the generated files anew.

// A test crate outside of its #[test] functions.
#![allow(clippy::panic, clippy::unwrap_used)]

#[path = "manifests/crds.rs"]
mod crds;

use std::fs;
use std::path::PathBuf;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use rstest::rstest;

fn deploy(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(file)
}

#[rstest]
#[case(
    "secrets-store.csi.x-k8s.io_secretproviderclasses.yaml",
    crds::secret_provider_class()
)]
#[case(
    "secrets-store.csi.x-k8s.io_secretproviderclasspodstatuses.yaml",
    crds::secret_provider_class_pod_status()
)]
fn crds_are_rendered_from_the_rust_types(
    #[case] file: &str,
    #[case] definition: CustomResourceDefinition,
) {
    let yaml = serde_saphyr::to_string(&definition).unwrap();
    let rendered = format!(
        "# Rendered from driver/src/cluster/resources.rs by driver/tests/manifests.rs.\n{yaml}"
    );
    if std::env::var_os("UPDATE_DEPLOY").is_some() {
        fs::write(deploy(file), &rendered).unwrap();
    }
    let committed = fs::read_to_string(deploy(file)).unwrap_or_default();
    assert!(
        committed == rendered,
        "deploy/{file} is stale: run UPDATE_DEPLOY=1 cargo test -p driver --test manifests"
    );
}

/// The tree of fields, as `path: type` lines without the three fields every object has.
fn fields(path: &str, schema: &JSONSchemaProps, lines: &mut Vec<String>) {
    let kind = schema.type_.as_deref().unwrap_or("?");
    match (&schema.items, &schema.additional_properties) {
        (Some(JSONSchemaPropsOrArray::Schema(items)), _) => {
            fields(&format!("{path}[]"), items, lines)
        }
        (_, Some(JSONSchemaPropsOrBool::Schema(values))) => {
            fields(&format!("{path}{{}}"), values, lines)
        }
        _ if schema.properties.is_none() => lines.push(format!("{path}: {kind}")),
        _ => {}
    }
    for (name, property) in schema.properties.iter().flatten() {
        let common = path.is_empty() && ["apiVersion", "kind", "metadata"].contains(&name.as_str());
        if !common {
            fields(&format!("{path}.{name}"), property, lines);
        }
    }
    let bare = JSONSchemaProps {
        type_: schema.type_.clone(),
        description: schema.description.clone(),
        items: schema.items.clone(),
        properties: schema.properties.clone(),
        additional_properties: schema.additional_properties.clone(),
        ..Default::default()
    };
    assert_eq!(
        *schema, bare,
        "{path} says more than a type and a description"
    );
}

const CLASS_SPEC: [&str; 8] = [
    ".spec.parameters{}: string",
    ".spec.provider: string",
    ".spec.secretObjects[].annotations{}: string",
    ".spec.secretObjects[].data[].key: string",
    ".spec.secretObjects[].data[].objectName: string",
    ".spec.secretObjects[].labels{}: string",
    ".spec.secretObjects[].secretName: string",
    ".spec.secretObjects[].type: string",
];
const POD_STATUS: [&str; 6] = [
    ".status.mounted: boolean",
    ".status.objects[].id: string",
    ".status.objects[].version: string",
    ".status.podName: string",
    ".status.secretProviderClassName: string",
    ".status.targetPath: string",
];

#[rstest]
#[case(crds::secret_provider_class(), "v1", &CLASS_SPEC, &[".status: object"])]
#[case(crds::secret_provider_class(), "v1alpha1", &CLASS_SPEC, &[".status.byPod[].id: string", ".status.byPod[].namespace: string"])]
#[case(crds::secret_provider_class_pod_status(), "v1", &POD_STATUS, &[])]
#[case(crds::secret_provider_class_pod_status(), "v1alpha1", &POD_STATUS, &[])]
fn crds_have_the_fields_of_the_contract(
    #[case] definition: CustomResourceDefinition,
    #[case] version: &str,
    #[case] expected: &[&str],
    #[case] status: &[&str],
) {
    let version = definition
        .spec
        .versions
        .iter()
        .find(|v| v.name == version)
        .unwrap();
    let schema = version
        .schema
        .as_ref()
        .unwrap()
        .open_api_v3_schema
        .as_ref()
        .unwrap();
    let mut lines = Vec::new();
    fields("", schema, &mut lines);
    assert_eq!(lines, [expected, status].concat());
}
