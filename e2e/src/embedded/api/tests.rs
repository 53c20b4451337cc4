//! The server as its clients see it: kube's client on both sockets.

use std::{path::Path, time::Duration};

use futures::{StreamExt, TryStreamExt, pin_mut};
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::{Event, Namespace, Pod, Secret, ServiceAccount},
};
use kube::{
    Api, Client, Config, Error as KubeError,
    api::{
        ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams,
        PostParams, Preconditions, PropagationPolicy, WatchEvent, WatchParams,
    },
    runtime::{WatchStreamExt, watcher},
};
use rstest::rstest;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{TcpListener, UnixStream};
use tokio_rustls::rustls::pki_types::{CertificateDer, pem::PemObject};

use super::{ApiServer, Disturbance};

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
    async fn create(&self, object: Value) -> Value {
        let gvk = GroupVersionKind::try_from(
            serde_json::from_value::<kube::core::TypeMeta>(object.clone()).unwrap(),
        );
        let plural = match object["kind"].as_str().unwrap() {
            "CSIDriver" => "csidrivers".to_owned(),
            "SecretProviderClass" => "secretproviderclasses".to_owned(),
            kind => format!("{}s", kind.to_lowercase()),
        };
        let kind = ApiResource::from_gvk_with_plural(&gvk.unwrap(), &plural);
        let api: Api<DynamicObject> = match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(self.server.client(), namespace, &kind),
            None => Api::all_with(self.server.client(), &kind),
        };
        let object = serde_json::from_value(object).unwrap();
        serde_json::to_value(api.create(&PostParams::default(), &object).await.unwrap()).unwrap()
    }

    async fn define_classes(&self) {
        self.create(classes_definition()).await;
    }

    fn classes(&self, version: &str) -> Api<DynamicObject> {
        classes(self.server.client(), version, "default")
    }

    /// A client of a service account in `default`, by TCP and TLS as in a pod.
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

/// What a node process does: TCP on the loopback to `pods.sock`.
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
                {"name": "v1alpha1", "served": true, "storage": false, "deprecated": true, "schema": schema(by_pod)},
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

/// Code and message of a refusal.
fn refusal<T>(result: Result<T, KubeError>) -> (u16, String) {
    match result {
        Err(KubeError::Api(status)) => (status.code, status.message.clone()),
        Err(other) => panic!("not an answer: {other:?}"),
        Ok(_) => panic!("not refused"),
    }
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..100 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("never happened: {what}");
}

const POST: PostParams = PostParams {
    dry_run: false,
    field_manager: None,
};

#[tokio::test]
async fn objects_are_created_read_and_refused_as_in_a_cluster() {
    let setup = Setup::new().await;
    let secrets: Api<Secret> = setup.api();
    let created = value(&secrets.create(&POST, &secret("s")).await.unwrap());
    assert_eq!(created["data"], json!({"key": "dmFsdWU="}));
    assert_eq!(
        (&created["type"], &created["stringData"]),
        (&json!("Opaque"), &Value::Null)
    );
    assert_eq!(value(&secrets.get("s").await.unwrap()), created);

    assert_eq!(
        refusal(secrets.create(&POST, &secret("s")).await),
        (409, "secrets \"s\" already exists".to_owned())
    );
    assert_eq!(
        refusal(secrets.get("x").await),
        (404, "secrets \"x\" not found".to_owned())
    );
    let elsewhere: Api<Secret> = Api::namespaced(setup.server.client(), "nowhere");
    assert_eq!(
        refusal(elsewhere.create(&POST, &secret("s")).await),
        (404, "namespaces \"nowhere\" not found".to_owned())
    );

    let event = json!({"metadata": {"generateName": "e-"}, "involvedObject": {"namespace": "default"}, "reason": "R"});
    let events: Api<Event> = setup.api();
    let event = events.create(&POST, &object(event)).await.unwrap();
    assert_eq!(event.metadata.name.unwrap().len(), 7);
    let some = ListParams::default().fields("involvedObject.namespace=default,reason=R");
    assert_eq!(events.list(&some).await.unwrap().items.len(), 1);
}

#[tokio::test]
async fn updates_need_the_version_they_read_and_a_reason() {
    let setup = Setup::new().await;
    let secrets: Api<Secret> = setup.api();
    let first = secrets.create(&POST, &secret("s")).await.unwrap();
    let same = secrets.replace("s", &POST, &first).await.unwrap();
    assert_eq!(same, first, "an update that changes nothing is no write");

    let patch = json!({"data": {"more": "eA=="}, "metadata": {"labels": {"a": "b"}}});
    let second = secrets
        .patch("s", &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .unwrap();
    assert_eq!(
        value(&second)["data"],
        json!({"key": "dmFsdWU=", "more": "eA=="})
    );
    let again = secrets
        .patch("s", &PatchParams::default(), &Patch::Strategic(&patch))
        .await
        .unwrap();
    assert_eq!(again, second);

    assert_eq!(
        refusal(secrets.replace("s", &POST, &first).await),
        (
            409,
            "Operation cannot be fulfilled on secrets \"s\": the object has been modified; \
             please apply your changes to the latest version and try again"
                .to_owned()
        )
    );
    let mut other_uid = second.clone();
    other_uid.metadata.uid = Some("other".to_owned());
    assert_eq!(
        refusal(secrets.replace("s", &POST, &other_uid).await).0,
        409
    );
    let mut unconditional = first;
    unconditional.metadata.resource_version = None;
    secrets.replace("s", &POST, &unconditional).await.unwrap();

    setup.define_classes().await;
    let spc = setup
        .classes("v1")
        .create(&POST, &class("v1", json!({"provider": "a"})))
        .await
        .unwrap();
    assert_eq!(spc.metadata.generation, Some(1));
    let (code, message) = refusal(
        setup
            .classes("v1")
            .replace("spc", &POST, &class("v1", json!({})))
            .await,
    );
    assert_eq!(code, 422);
    assert!(
        message.ends_with(
            "metadata.resourceVersion: Invalid value: 0: must be specified for an update"
        ),
        "{message}"
    );
}

#[tokio::test]
async fn two_managers_apply_to_one_secret() {
    let setup = Setup::new().await;
    let secrets: Api<Secret> = setup.api();
    let apply = async |manager: &str, owner: &str, data: Value| {
        let config = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "ownerReferences": [
            {"apiVersion": "v1", "kind": "Namespace", "name": owner, "uid": uid_of(&setup, owner).await}]}, "data": data});
        secrets
            .patch("s", &PatchParams::apply(manager), &Patch::Apply(&config))
            .await
    };
    apply("one", "default", json!({"a": "MQ=="})).await.unwrap();
    let both = apply("two", "kube-system", json!({"b": "MQ=="}))
        .await
        .unwrap();
    assert_eq!(both.metadata.owner_references.as_ref().unwrap().len(), 2);
    let again = apply("two", "kube-system", json!({"b": "MQ=="}))
        .await
        .unwrap();
    assert_eq!(
        again.metadata.resource_version,
        both.metadata.resource_version
    );

    assert_eq!(
        refusal(apply("two", "kube-system", json!({"a": "Mg=="})).await),
        (
            409,
            "Apply failed with 1 conflict: conflict with \"one\": .data.a".to_owned()
        )
    );
    let after = apply("two", "kube-system", json!({"c": "MQ=="}))
        .await
        .unwrap();
    assert_eq!(value(&after)["data"], json!({"a": "MQ==", "c": "MQ=="}));

    let ghost =
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "gone", "uid": "u"}});
    let (code, message) = refusal(
        secrets
            .patch("gone", &PatchParams::apply("one"), &Patch::Apply(&ghost))
            .await,
    );
    assert!(code == 409 && message.contains("uid mismatch"), "{message}");
}

async fn uid_of(setup: &Setup, namespace: &str) -> String {
    let namespaces: Api<Namespace> = Api::all(setup.server.client());
    namespaces
        .get(namespace)
        .await
        .unwrap()
        .metadata
        .uid
        .unwrap()
}

#[tokio::test]
async fn custom_kinds_are_pruned_validated_and_served_at_every_version() {
    let setup = Setup::new().await;
    assert_eq!(
        refusal(setup.classes("v1").list(&ListParams::default()).await).0,
        404
    );
    setup.define_classes().await;

    let typo = class("v1", json!({"provider": "a", "typo": 1}));
    let created = setup.classes("v1").create(&POST, &typo).await.unwrap();
    assert_eq!(created.data, json!({"spec": {"provider": "a"}}));
    let wrong = json!({"spec": {"provider": 7}});
    assert_eq!(
        refusal(setup.classes("v1").patch("spc", &PatchParams::default(), &Patch::Merge(&wrong)).await),
        (
            422,
            "SecretProviderClass.secrets-store.csi.x-k8s.io \"spc\" is invalid: spec.provider: Invalid value: \
             \"integer\": spec.provider in body must be of type string: \"integer\""
                .to_owned()
        )
    );

    let old = setup.classes("v1alpha1").get("spc").await.unwrap();
    assert_eq!(
        old.types.unwrap().api_version,
        "secrets-store.csi.x-k8s.io/v1alpha1"
    );
    let patch = json!({"spec": {"provider": "b"}, "status": {"byPod": [{"id": "1"}]}});
    setup
        .classes("v1alpha1")
        .patch("spc", &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .unwrap();
    let new = setup.classes("v1").get("spc").await.unwrap();
    assert_eq!(
        new.types.unwrap().api_version,
        "secrets-store.csi.x-k8s.io/v1"
    );
    assert_eq!(new.data, json!({"spec": {"provider": "b"}, "status": {}}));
    assert_eq!(new.metadata.generation, Some(2));

    let path = "/apis/secrets-store.csi.x-k8s.io/v1alpha1/namespaces/default/secretproviderclasses";
    let request = http::Request::get(path)
        .body(kube::client::Body::empty())
        .unwrap();
    let answer = setup.server.client().send(request).await.unwrap();
    assert_eq!(
        answer.headers()[http::header::WARNING],
        "299 - \"secrets-store.csi.x-k8s.io/v1alpha1 SecretProviderClass is deprecated\""
    );
    let groups = setup
        .server
        .client()
        .list_api_groups()
        .await
        .unwrap()
        .groups;
    let ours = groups
        .iter()
        .find(|group| group.name == "secrets-store.csi.x-k8s.io")
        .unwrap();
    assert_eq!(ours.preferred_version.as_ref().unwrap().version, "v1");
}

#[tokio::test]
async fn a_watch_sees_every_change_in_order() {
    let setup = Setup::new().await;
    let pods: Api<Pod> = setup.api();
    let before = pods
        .list(&ListParams::default())
        .await
        .unwrap()
        .metadata
        .resource_version
        .unwrap();
    let watch = pods
        .watch(&WatchParams::default().labels("app=x"), &before)
        .await
        .unwrap();
    pin_mut!(watch);

    let label = async |value: Value| {
        let patch = json!({"metadata": {"labels": {"app": value}}});
        pods.patch("p", &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .unwrap();
    };
    pods.create(&POST, &pod("p", None)).await.unwrap();
    label(json!("x")).await;
    let patch = json!({"status": {"phase": "Running"}});
    pods.patch_status("p", &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .unwrap();
    label(Value::Null).await;
    label(json!("x")).await;
    pods.delete("p", &DeleteParams::default()).await.unwrap();

    let mut seen = Vec::new();
    let mut last = before.parse::<u64>().unwrap();
    while seen.len() < 5 {
        let event = watch.try_next().await.unwrap().unwrap();
        let (kind, pod) = match event {
            WatchEvent::Added(pod) => ("ADDED", pod),
            WatchEvent::Modified(pod) => ("MODIFIED", pod),
            WatchEvent::Deleted(pod) => ("DELETED", pod),
            other => panic!("{other:?}"),
        };
        let version = pod.metadata.resource_version.unwrap().parse().unwrap();
        assert!(version > last, "versions rise");
        last = version;
        seen.push((kind, pod.status.unwrap().phase.unwrap()));
    }
    let seen: Vec<_> = seen
        .iter()
        .map(|(kind, phase)| (*kind, phase.as_str()))
        .collect();
    assert_eq!(
        seen,
        [
            ("ADDED", "Pending"),
            ("MODIFIED", "Running"),
            ("DELETED", "Running"),
            ("ADDED", "Running"),
            ("DELETED", "Running")
        ]
    );
}

#[rstest]
#[case::listing(watcher::Config::default())]
#[case::streaming(watcher::Config::default().streaming_lists())]
#[tokio::test]
async fn kubes_watcher_follows(#[case] config: watcher::Config) {
    let setup = Setup::new().await;
    let secrets: Api<Secret> = setup.api();
    secrets.create(&POST, &secret("first")).await.unwrap();
    let names = watcher::watcher(secrets.clone(), config)
        .default_backoff()
        .applied_objects()
        .map_ok(|secret| secret.metadata.name.unwrap());
    pin_mut!(names);
    assert_eq!(names.next().await.unwrap().unwrap(), "first");
    secrets.create(&POST, &secret("second")).await.unwrap();
    assert_eq!(names.next().await.unwrap().unwrap(), "second");
}

#[tokio::test]
async fn metadata_alone_can_be_asked_for() {
    let setup = Setup::new().await;
    let secrets: Api<Secret> = setup.api();
    secrets.create(&POST, &secret("s")).await.unwrap();
    let list = secrets.list_metadata(&ListParams::default()).await.unwrap();
    assert_eq!(
        list.items[0].types.as_ref().unwrap().kind,
        "PartialObjectMetadata"
    );
    let one = value(&secrets.get_metadata("s").await.unwrap());
    assert_eq!(
        (&one["metadata"]["name"], &one["data"]),
        (&json!("s"), &Value::Null)
    );
}

#[tokio::test]
async fn a_pod_on_a_node_goes_when_the_kubelet_says_so() {
    let setup = Setup::new().await;
    let pods: Api<Pod> = setup.api();
    let created = pods.create(&POST, &pod("p", Some("node"))).await.unwrap();
    assert_eq!(
        created.spec.unwrap().service_account_name.as_deref(),
        Some("default")
    );

    pods.delete("p", &DeleteParams::default()).await.unwrap();
    let dying = pods.get("p").await.unwrap().metadata;
    assert_eq!(dying.deletion_grace_period_seconds, Some(30));
    assert!(dying.deletion_timestamp.is_some());
    let wrong = DeleteParams {
        preconditions: Some(Preconditions {
            uid: Some("other".to_owned()),
            resource_version: None,
        }),
        ..DeleteParams::default()
    };
    assert_eq!(refusal(pods.delete("p", &wrong).await).0, 409);
    pods.delete("p", &DeleteParams::default().grace_period(0))
        .await
        .unwrap();
    assert_eq!(refusal(pods.get("p").await).0, 404);

    let mut unknown = pod("q", None);
    unknown.spec.as_mut().unwrap().service_account_name = Some("who".to_owned());
    assert_eq!(
        refusal(pods.create(&POST, &unknown).await),
        (
            403,
            "pods \"q\" is forbidden: error looking up service account default/who: serviceaccount \"who\" not found"
                .to_owned()
        )
    );
}

#[tokio::test]
async fn finalizers_hold_an_object_until_they_are_gone() {
    let setup = Setup::new().await;
    let secrets: Api<Secret> = setup.api();
    let mut held = secret("s");
    held.metadata.finalizers = Some(vec!["x.io/hold".to_owned()]);
    secrets.create(&POST, &held).await.unwrap();
    secrets.delete("s", &DeleteParams::default()).await.unwrap();
    assert!(
        secrets
            .get("s")
            .await
            .unwrap()
            .metadata
            .deletion_timestamp
            .is_some()
    );
    let release = json!({"metadata": {"finalizers": null}});
    secrets
        .patch("s", &PatchParams::default(), &Patch::Merge(&release))
        .await
        .unwrap();
    assert_eq!(refusal(secrets.get("s").await).0, 404);
}

#[tokio::test]
async fn what_nobody_owns_any_more_is_collected() {
    let setup = Setup::new().await;
    let (pods, secrets) = (setup.api::<Pod>(), setup.api::<Secret>());
    let mut references = Vec::new();
    for name in ["one", "two"] {
        let pod = pods.create(&POST, &pod(name, None)).await.unwrap();
        references.push(
            json!({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod.metadata.uid}),
        );
    }
    let owned = |name: &str, owners: &[Value]| {
        object::<Secret>(json!({"metadata": {"name": name, "ownerReferences": owners}}))
    };
    secrets
        .create(&POST, &owned("by-both", &references))
        .await
        .unwrap();
    secrets
        .create(&POST, &owned("by-one", &references[..1]))
        .await
        .unwrap();
    let mut recreated = references[1].clone();
    recreated["uid"] = json!("another-uid");
    secrets
        .create(&POST, &owned("by-former", &[recreated]))
        .await
        .unwrap();

    pods.delete("one", &DeleteParams::default()).await.unwrap();
    let gone = async |name: &str| secrets.get_opt(name).await.unwrap().is_none();
    eventually("by-one goes", async || gone("by-one").await).await;
    eventually("by-former goes", async || gone("by-former").await).await;
    eventually("by-both loses its dead owner", async || {
        let left = secrets
            .get("by-both")
            .await
            .unwrap()
            .metadata
            .owner_references
            .unwrap();
        value(&left) == json!(references[1..])
    })
    .await;

    let orphan = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Orphan),
        ..DeleteParams::default()
    };
    pods.delete("two", &orphan).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(
        secrets
            .get("by-both")
            .await
            .unwrap()
            .metadata
            .owner_references,
        None
    );
}

#[tokio::test]
async fn a_namespace_goes_with_all_that_is_in_it() {
    let setup = Setup::new().await;
    let namespaces: Api<Namespace> = Api::all(setup.server.client());
    let namespace = |name: &str| object::<Namespace>(json!({"metadata": {"name": name}}));
    namespaces.create(&POST, &namespace("n")).await.unwrap();
    let pods: Api<Pod> = Api::namespaced(setup.server.client(), "n");
    let secrets: Api<Secret> = Api::namespaced(setup.server.client(), "n");
    pods.create(&POST, &pod("p", Some("node"))).await.unwrap();
    secrets.create(&POST, &secret("s")).await.unwrap();

    namespaces
        .delete("n", &DeleteParams::default())
        .await
        .unwrap();
    eventually("the secret goes", async || {
        secrets.get_opt("s").await.unwrap().is_none()
    })
    .await;
    let (code, message) = refusal(secrets.create(&POST, &secret("t")).await);
    assert_eq!(code, 403);
    assert!(
        message.ends_with(
            "unable to create new content in namespace n because it is being terminated"
        )
    );
    assert!(
        pods.get("p")
            .await
            .unwrap()
            .metadata
            .deletion_timestamp
            .is_some()
    );
    pods.delete("p", &DeleteParams::default().grace_period(0))
        .await
        .unwrap();
    eventually("the namespace goes", async || {
        namespaces.get_opt("n").await.unwrap().is_none()
    })
    .await;
}

#[tokio::test]
async fn service_accounts_may_do_what_roles_say() {
    let setup = Setup::new().await;
    setup.define_classes().await;
    setup
        .create(json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "r"},
            "rules": [
                {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
                {"apiGroups": ["storage.k8s.io"], "resources": ["csidrivers"], "verbs": ["list"],
                    "resourceNames": ["secrets-store.csi.k8s.io"]},
            ]}))
        .await;
    setup
        .create(json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": {"name": "r"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "r"},
            "subjects": [{"kind": "ServiceAccount", "name": "driver", "namespace": "default"}]}))
        .await;
    let client = setup.pod_client("driver").await;

    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    assert_eq!(
        refusal(pods.get("p").await),
        (404, "pods \"p\" not found".to_owned())
    );
    assert_eq!(
        refusal(pods.patch_status("p", &PatchParams::default(), &Patch::Merge(json!({}))).await),
        (
            403,
            "pods \"p\" is forbidden: User \"system:serviceaccount:default:driver\" cannot patch resource \
             \"pods/status\" in API group \"\" in the namespace \"default\""
                .to_owned()
        )
    );
    assert_eq!(
        refusal(classes(client.clone(), "v1", "x").get("spc").await),
        (
            403,
            "secretproviderclasses.secrets-store.csi.x-k8s.io \"spc\" is forbidden: User \
             \"system:serviceaccount:default:driver\" cannot get resource \"secretproviderclasses\" in API group \
             \"secrets-store.csi.x-k8s.io\" in the namespace \"x\""
                .to_owned()
        )
    );
    let drivers: Api<k8s_openapi::api::storage::v1::CSIDriver> = Api::all(client.clone());
    let ours = ListParams::default().fields("metadata.name=secrets-store.csi.k8s.io");
    drivers.list(&ours).await.unwrap();
    let (code, message) = refusal(drivers.list(&ListParams::default()).await);
    assert_eq!(code, 403);
    assert!(
        message.ends_with("in API group \"storage.k8s.io\" at the cluster scope"),
        "{message}"
    );
    client.apiserver_version().await.unwrap();

    let statuses: Vec<_> = setup
        .server
        .requests()
        .into_iter()
        .map(|r| (r.verb, r.resource, r.status))
        .collect();
    assert_eq!(statuses[0], ("get".to_owned(), "pods".to_owned(), 404));
    assert_eq!(statuses.len(), 6);
    setup.server.reset_requests();
    assert_eq!(setup.server.requests(), []);
}

#[tokio::test]
async fn tokens_are_worth_what_they_are_bound_to() {
    let setup = Setup::new().await;
    let bad = setup.client_with(Some("a.b.c".to_owned())).await;
    assert_eq!(
        refusal(bad.apiserver_version().await),
        (401, "Unauthorized".to_owned())
    );
    let nobody: Api<Pod> = Api::namespaced(setup.client_with(None).await, "default");
    let (code, message) = refusal(nobody.get("p").await);
    assert!(
        code == 403 && message.contains("User \"system:anonymous\""),
        "{message}"
    );

    let pods: Api<Pod> = setup.api();
    pods.create(&POST, &pod("p", None)).await.unwrap();
    let mut spec = TokenRequestSpec {
        bound_object_ref: Some(BoundObjectReference {
            kind: Some("Pod".to_owned()),
            name: Some("p".to_owned()),
            ..BoundObjectReference::default()
        }),
        ..TokenRequestSpec::default()
    };
    let client = setup
        .client_with(Some(setup.token("default", &spec).await.unwrap()))
        .await;
    client.apiserver_version().await.unwrap();
    pods.delete("p", &DeleteParams::default()).await.unwrap();
    assert_eq!(refusal(client.apiserver_version().await).0, 401);
    assert_eq!(refusal(setup.token("default", &spec).await).0, 404);

    spec.bound_object_ref = None;
    spec.audiences = Some(vec!["vault".to_owned()]);
    let foreign = setup
        .client_with(Some(setup.token("default", &spec).await.unwrap()))
        .await;
    assert_eq!(refusal(foreign.apiserver_version().await).0, 401);
    spec.expiration_seconds = Some(60);
    assert_eq!(refusal(setup.token("default", &spec).await).0, 422);
}

#[tokio::test]
async fn disturbances_hit_everybody_but_administrators() {
    let setup = Setup::new().await;
    let client = setup.pod_client("default").await;
    let ask =
        async || tokio::time::timeout(Duration::from_millis(500), client.apiserver_version()).await;
    assert!(ask().await.unwrap().is_ok());

    setup.server.disturb(Disturbance::Fail {
        status: 500,
        verb: Some("get".to_owned()),
        resource: Some("pods".to_owned()),
        times: 1,
    });
    assert!(ask().await.unwrap().is_ok(), "another resource");
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    assert_eq!(refusal(pods.get("p").await).0, 500);
    assert_eq!(refusal(pods.get("p").await).0, 403, "one time only");

    setup.server.disturb(Disturbance::Hang);
    assert!(ask().await.is_err());
    setup.server.client().apiserver_version().await.unwrap();
    setup
        .server
        .disturb(Disturbance::Slow(Duration::from_millis(200)));
    let start = std::time::Instant::now();
    assert!(ask().await.unwrap().is_ok());
    assert!(start.elapsed() >= Duration::from_millis(200));

    setup.server.disturb(Disturbance::Refuse);
    assert!(matches!(ask().await, Ok(Err(error)) if !matches!(error, KubeError::Api(_))));
    setup.server.disturb(Disturbance::None);
    assert!(ask().await.unwrap().is_ok());
}

/// Run with `cargo test -p e2e --lib creates_per_second -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn creates_per_second() {
    const COUNT: usize = 10_000;
    let setup = Setup::new().await;
    let secrets: Api<Secret> = setup.api();
    let start = std::time::Instant::now();
    futures::stream::iter(0..COUNT)
        .for_each_concurrent(50, async |number| {
            secrets
                .create(&POST, &secret(&format!("s{number}")))
                .await
                .unwrap();
        })
        .await;
    println!(
        "{:.0} creates per second",
        COUNT as f64 / start.elapsed().as_secs_f64()
    );
}
