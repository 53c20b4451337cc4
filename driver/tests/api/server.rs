//! The embedded API server for a driver in this process.

use std::{fs, path::Path};

use driver::cluster::Cluster;
use embedded::{
    api::{ApiServer, Reaction},
    apply,
};
use serde_json::json;

const KINDS: [&str; 2] = [
    include_str!("../../../deploy/secrets-store.csi.x-k8s.io_secretproviderclasses.yaml"),
    include_str!("../../../deploy/secrets-store.csi.x-k8s.io_secretproviderclasspodstatuses.yaml"),
];

/// Starts a server with the driver's kinds and the namespace `shop`, and returns a kubeconfig for it.
///
/// Owners are not collected, because tests name some that do not exist.
pub(crate) async fn serve(dir: &Path) -> (ApiServer, String) {
    let server = ApiServer::start(&dir.join("api")).await.unwrap();
    server.stop_collector();
    for kind in KINDS {
        apply(&server.client(), "default", kind).await.unwrap();
    }
    put_namespace(&server, "shop");
    let kubeconfig = server.kubeconfig().await.unwrap();
    (server, kubeconfig)
}

/// Does the same, and returns the driver's client.
pub(crate) async fn start(dir: &Path) -> (ApiServer, Cluster) {
    let (server, kubeconfig) = serve(dir).await;
    let path = dir.join("kubeconfig");
    fs::write(&path, kubeconfig).unwrap();
    (server, Cluster::new(Some(path), "test", "node-1"))
}

pub(crate) fn put_namespace(server: &ApiServer, name: &str) {
    let path = format!("/api/v1/namespaces/{name}");
    server
        .put(&path, json!({"metadata": {"name": name}}))
        .unwrap();
}

/// Refuses a request, about an object of this name if there is one.
pub(crate) fn refuse(code: u16, reason: &str, message: &str, name: Option<&str>) -> Reaction {
    let mut status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "code": code, "reason": reason, "message": message});
    if let Some(name) = name {
        status["details"] = json!({"name": name});
    }
    Reaction::Answer(code, status.to_string())
}
