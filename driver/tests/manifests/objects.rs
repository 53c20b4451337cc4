//! Reads the files of `deploy/`, and checks or updates the generated ones.

use std::fs;
use std::path::PathBuf;

use driver::config::Config;
use k8s_openapi::api::core::v1::Container;
use kube::core::Resource;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Returns the path of a file of `deploy/`.
pub(crate) fn deploy(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(file)
}

/// Fails if a file of `deploy/` differs from what is generated now. With `UPDATE_DEPLOY` set, writes
/// the file.
pub(crate) fn keep(file: &str, generated: &str) {
    if std::env::var_os("UPDATE_DEPLOY").is_some() {
        fs::write(deploy(file), generated).unwrap();
    }
    let committed = fs::read_to_string(deploy(file)).unwrap_or_default();
    assert!(
        committed == generated,
        "deploy/{file} is stale: run `just manifests`"
    );
}

/// Returns the objects of type `K` in a manifest. Fails on a field that Kubernetes does not know.
pub(crate) fn objects<K: Resource<DynamicType = ()> + DeserializeOwned + Serialize>(
    manifest: &str,
) -> Vec<K> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(manifest).unwrap();
    let ours = |document: &Value| {
        document["apiVersion"] == *K::api_version(&()) && document["kind"] == *K::kind(&())
    };
    documents
        .into_iter()
        .filter(ours)
        .map(|document| {
            let object: K = serde_json::from_value(document.clone()).unwrap();
            assert_eq!(serde_json::to_value(&object).unwrap(), document);
            object
        })
        .collect()
}

/// Returns the settings that the driver reads from its container's arguments on a node `node-1`.
pub(crate) fn config(container: &Container) -> Config {
    let value = |name: &str| {
        let mut env = container.env.iter().flatten();
        env.find(|variable| variable.name == name).unwrap().clone()
    };
    let endpoint = value("CSI_ENDPOINT").value.unwrap();
    let node = value("KUBE_NODE_NAME")
        .value_from
        .unwrap()
        .field_ref
        .unwrap();
    assert_eq!(node.field_path, "spec.nodeName");
    let args = container.args.iter().flatten().map(|arg| {
        arg.replace("$(CSI_ENDPOINT)", &endpoint)
            .replace("$(KUBE_NODE_NAME)", "node-1")
            .into()
    });
    Config::parse(args).unwrap()
}
