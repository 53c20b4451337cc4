//! Tests of the server with kube's client on both sockets.

mod access;
mod custom_kinds;
mod lifecycle;
mod watches;
mod writes;

use std::{path::Path, time::Duration};

use futures::{StreamExt, TryStreamExt, pin_mut};
use k8s_openapi::api::{
    authentication::v1::{
        BoundObjectReference, TokenRequest, TokenRequestSpec, TokenReview, TokenReviewSpec,
    },
    core::v1::{Event, Namespace, Pod, Secret, ServiceAccount},
};
use kube::{
    Api, Client, Config, Error as KubeError,
    api::{
        ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams,
        PostParams, Preconditions, WatchEvent, WatchParams,
    },
    runtime::{WatchStreamExt, watcher},
};
use rstest::rstest;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{TcpListener, UnixStream};
use tokio_rustls::rustls::pki_types::{CertificateDer, pem::PemObject};

use crate::{apply, eventually};

use super::{ApiServer, Disturbance, Reaction};

struct Setup {
    server: ApiServer,
    dir: TempDir,
}

impl Setup {
    async fn new() -> Setup {
        let dir = tempfile::tempdir().unwrap();
        let server = ApiServer::start(dir.path()).await.unwrap();
        Setup { server, dir }
    }

    fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.server.client(), "default")
    }

    /// Creates an object of any kind from JSON.
    async fn create(&self, object: Value) {
        let manifest = object.to_string();
        apply(&self.server.client(), "default", &manifest)
            .await
            .unwrap();
    }

    async fn define_classes(&self) {
        self.create(classes_definition()).await;
    }

    fn classes(&self, version: &str) -> Api<DynamicObject> {
        classes(self.server.client(), version, "default")
    }

    /// Returns a client of a service account in `default`, over TCP and TLS as in a pod.
    async fn pod_client(&self, account: &str) -> Client {
        if account != "default" {
            self.create(json!({"apiVersion": "v1", "kind": "ServiceAccount",
                "metadata": {"name": account, "namespace": "default"}}))
                .await;
        }
        let token = self
            .token(account, &TokenRequestSpec::default())
            .await
            .unwrap();
        self.client_with(Some(token)).await
    }

    /// Gives a service account in `default` a ClusterRole with these rules.
    async fn allow(&self, account: &str, rules: Value) {
        let api_version = "rbac.authorization.k8s.io/v1";
        self.create(json!({"apiVersion": api_version, "kind": "ClusterRole",
            "metadata": {"name": account}, "rules": rules}))
            .await;
        self.create(json!({"apiVersion": api_version, "kind": "ClusterRoleBinding",
            "metadata": {"name": account},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": account},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": "default"}]}))
            .await;
    }

    async fn token(&self, account: &str, spec: &TokenRequestSpec) -> Result<String, KubeError> {
        let request = TokenRequest {
            spec: Some(spec.clone()),
            ..TokenRequest::default()
        };
        let accounts: Api<ServiceAccount> = self.api();
        let answer = accounts
            .create_token_request(account, &PostParams::default(), &request)
            .await?;
        Ok(answer.status.unwrap().token.unwrap())
    }

    async fn client_with(&self, token: Option<String>) -> Client {
        let port = proxy(&self.dir.path().join("pods.sock")).await;
        let mut config = Config::new(format!("https://127.0.0.1:{port}").parse().unwrap());
        let authority = CertificateDer::from_pem_slice(self.server.ca_pem().as_bytes()).unwrap();
        config.root_cert = Some(vec![authority.to_vec()]);
        config.auth_info.token = token.map(Into::into);
        Client::try_from(config).unwrap()
    }
}

/// Forwards TCP on the loopback to `pods.sock`, as a node does.
async fn proxy(socket: &Path) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let socket = socket.to_owned();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let socket = socket.clone();
            tokio::spawn(async move {
                let mut server = UnixStream::connect(socket).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    port
}

fn classes(client: Client, version: &str, namespace: &str) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk("secrets-store.csi.x-k8s.io", version, "SecretProviderClass");
    let kind = ApiResource::from_gvk_with_plural(&gvk, "secretproviderclasses");
    Api::namespaced_with(client, namespace, &kind)
}

fn classes_definition() -> Value {
    let spec = json!({"type": "object", "properties": {
        "provider": {"type": "string"},
        "parameters": {"type": "object", "additionalProperties": {"type": "string"}},
    }});
    let schema = |status: Value| {
        json!({"openAPIV3Schema": {"type": "object", "properties": {
            "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"},
            "spec": spec, "status": status,
        }}})
    };
    let by_pod = json!({"type": "object", "properties": {"byPod": {"type": "array", "items": {
        "type": "object", "properties": {"id": {"type": "string"}}}}}});
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "secretproviderclasses.secrets-store.csi.x-k8s.io"},
        "spec": {
            "group": "secrets-store.csi.x-k8s.io",
            "scope": "Namespaced",
            "names": {"kind": "SecretProviderClass", "listKind": "SecretProviderClassList",
                "plural": "secretproviderclasses", "singular": "secretproviderclass"},
            "versions": [
                {"name": "v1", "served": true, "storage": true, "schema": schema(json!({"type": "object"}))},
                {"name": "v1alpha1", "served": true, "storage": false, "schema": schema(by_pod)},
            ],
        },
    })
}

fn class(version: &str, spec: Value) -> DynamicObject {
    object(json!({
        "apiVersion": format!("secrets-store.csi.x-k8s.io/{version}"),
        "kind": "SecretProviderClass",
        "metadata": {"name": "spc", "namespace": "default"},
        "spec": spec,
    }))
}

fn object<K: DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

fn value(object: &impl Serialize) -> Value {
    serde_json::to_value(object).unwrap()
}

fn secret(name: &str) -> Secret {
    object(json!({"metadata": {"name": name}, "stringData": {"key": "value"}}))
}

fn pod(name: &str, node: Option<&str>) -> Pod {
    object(json!({"metadata": {"name": name},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]}}))
}

/// Returns the code and message of a refusal.
fn refusal<T>(result: Result<T, KubeError>) -> (u16, String) {
    match result {
        Err(KubeError::Api(status)) => (status.code, status.message.clone()),
        Err(other) => panic!("not an answer: {other:?}"),
        Ok(_) => panic!("not refused"),
    }
}

/// Checks the code of a refusal, and the end of its message.
fn assert_refused<T>(result: Result<T, KubeError>, code: u16, message: &str) {
    let (found, text) = refusal(result);
    assert!(found == code && text.ends_with(message), "{found}: {text}");
}

/// Changes an object by a merge patch.
async fn merge<K>(api: &Api<K>, name: &str, patch: &Value) -> Result<K, KubeError>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    let patch = Patch::Merge(patch);
    api.patch(name, &PatchParams::default(), &patch).await
}

const POST: PostParams = PostParams {
    dry_run: false,
    field_manager: None,
};
