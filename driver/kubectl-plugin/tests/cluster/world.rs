//! A cluster of one pod, whose objects a test may change before it starts.

use std::{fs, path::PathBuf, process::Stdio};

use embedded::api::{ApiServer, Output, Reaction};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

/// The node of the pod.
const NODE: &str = "node-1";
const UID: &str = "f0a0ec01-1c2d-40a2-bee6-b6863bdee566";

/// Returns the time so many seconds ago.
pub(crate) fn ago(seconds: i64) -> Value {
    let time = Timestamp::now() - SignedDuration::from_secs(seconds);
    json!(format!("{time:.0}"))
}

/// The objects. One that is null does not exist.
pub(crate) struct World {
    pub(crate) pod: Value,
    pub(crate) class: Value,
    pub(crate) pod_status: Value,
    pub(crate) secret: Value,
    pub(crate) node: Value,
    pub(crate) csi_node: Value,
    pub(crate) csi_driver: Value,
    /// The driver's pod.
    pub(crate) driver: Value,
    /// What the driver's `status --json` prints.
    pub(crate) status: Value,
    /// The status of the driver's DaemonSet.
    pub(crate) set_status: Value,
    /// The directory of the node in which the driver's DaemonSet looks for providers.
    pub(crate) providers_on_node: Option<&'static str>,
    pub(crate) driver_namespace: &'static str,
    pub(crate) existing_driver: bool,
    /// Pieces of addresses that may not be read.
    pub(crate) forbidden: Vec<&'static str>,
    /// Addresses and objects besides.
    pub(crate) others: Vec<(String, Value)>,
    /// Addresses of kinds that the API server of the tests does not have, and what they answer.
    pub(crate) answers: Vec<(String, Value)>,
    /// Roles of `deploy/` that are applied.
    pub(crate) roles: Vec<&'static str>,
    /// Drivers on further nodes.
    pub(crate) more_nodes: usize,
    has_kinds: bool,
}

impl World {
    /// A pod that runs, with a volume of one class, which makes a Secret.
    pub(crate) fn in_order() -> Self {
        let target = format!("/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~csi/secrets/mount");
        Self {
            pod: json!({
                "metadata": {"name": "web", "uid": UID, "creationTimestamp": ago(3_600)},
                "spec": {
                    "nodeName": NODE,
                    "containers": [{"name": "main", "image": "shop",
                        "volumeMounts": [{"name": "secrets", "mountPath": "/mnt", "readOnly": true}]}],
                    "volumes": [{"name": "secrets", "csi": {
                        "driver": "secrets-store.csi.k8s.io", "readOnly": true,
                        "volumeAttributes": {"secretProviderClass": "db"},
                    }}],
                },
                "status": {
                    "phase": "Running", "startTime": ago(3_600),
                    "conditions": [{"type": "Ready", "status": "True"}],
                    "containerStatuses": [{"name": "main", "image": "shop", "imageID": "", "ready": true,
                        "restartCount": 0, "state": {"running": {"startedAt": ago(3_590)}}}],
                },
            }),
            class: json!({
                "metadata": {"name": "db"},
                "spec": {"provider": "vault", "parameters": {"objects": "x"}, "secretObjects": [
                    {"secretName": "creds", "type": "Opaque", "data": [{"objectName": "password", "key": "pw"}]}]},
            }),
            pod_status: json!({
                "metadata": {
                    "name": "web-shop-db", "creationTimestamp": ago(3_595),
                    "annotations": {"secrets-store.csi.k8s.io/content-changes": "2",
                        "secrets-store.csi.k8s.io/content-changed": ago(1_800)},
                    "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "web", "uid": UID}],
                },
                "status": {"podName": "web", "secretProviderClassName": "db", "mounted": true,
                    "targetPath": target, "objects": [{"id": "password", "version": "v2"}]},
            }),
            secret: json!({"metadata": {"name": "creds"}, "type": "Opaque"}),
            node: json!({
                "metadata": {"name": NODE, "labels": {"kubernetes.io/os": "linux"}},
                "status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": ago(9_000)}]},
            }),
            csi_node: json!({"metadata": {"name": NODE}, "spec": {"drivers": [
                {"name": "secrets-store.csi.k8s.io", "nodeID": NODE}]}}),
            csi_driver: json!({"metadata": {"name": "secrets-store.csi.k8s.io"}, "spec": {
                "attachRequired": false, "podInfoOnMount": true, "requiresRepublish": true,
                "volumeLifecycleModes": ["Ephemeral"]}}),
            driver: json!({
                "metadata": {"name": "driver-x7k2p", "labels": {"app": "csi-secrets-store"}, "ownerReferences":
                    [{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "csi-secrets-store", "uid": "set-1"}]},
                "spec": {"nodeName": NODE, "containers": [
                    {"name": "secrets-store", "image": "secrets-store-csi"},
                    {"name": "node-driver-registrar", "image": "registrar"}]},
                "status": {
                    "phase": "Running",
                    "conditions": [{"type": "Ready", "status": "True"}],
                    "containerStatuses": [{"name": "secrets-store", "image": "", "imageID": "", "ready": true,
                        "restartCount": 0, "state": {"running": {"startedAt": ago(9_000)}}}],
                },
            }),
            status: json!({
                "version": "0.1.0", "node": NODE, "time": ago(0),
                "driver": {"path": "/csi/csi.sock", "answers": true},
                "refreshes": true, "refreshIntervalSeconds": 600, "shortestRefreshIntervalSeconds": 30,
                "providerDirectories": ["/var/run/secrets-store-csi-providers"],
                "providers": [{"name": "vault", "path": "/var/run/secrets-store-csi-providers/vault.sock", "answers": true}],
                "calls": [{"provider": "vault", "succeeded": 40, "failed": {}}],
                "memory": {"limit": 209_715_200, "room": 100_000_000, "used": 16_384},
                "volumes": [{
                    "id": "csi-1", "pod": {"name": "web", "namespace": "shop", "uid": UID},
                    "targetPath": target, "class": "db", "provider": "vault", "podStatus": "web-shop-db",
                    "mounted": true, "lastSuccess": ago(120), "lastChange": ago(1_800),
                    "objects": [{"id": "password", "version": "v2"}],
                    "files": ["db/password"], "fileCount": 1,
                }],
            }),
            set_status: json!({"currentNumberScheduled": 1, "desiredNumberScheduled": 1,
                "numberMisscheduled": 0, "numberReady": 1}),
            providers_on_node: None,
            driver_namespace: "kube-system",
            existing_driver: false,
            forbidden: Vec::new(),
            others: Vec::new(),
            answers: Vec::new(),
            roles: vec![
                "rbac-secretproviderclass.yaml",
                "optional/rbac-secretprovidersyncing.yaml",
            ],
            more_nodes: 0,
            has_kinds: true,
        }
    }

    /// Makes the pod one that waits for its volumes.
    pub(crate) fn not_started(&mut self) {
        self.pod["status"] = json!({
            "phase": "Pending", "startTime": ago(3_600),
            "containerStatuses": [{"name": "main", "image": "shop", "imageID": "", "ready": false,
                "restartCount": 0, "state": {"waiting": {"reason": "ContainerCreating"}}}],
        });
        self.pod_status = json!(null);
        self.status["volumes"] = json!([]);
    }

    /// Makes the cluster one without the driver's kinds.
    pub(crate) fn remove_kinds(&mut self) {
        self.not_started();
        self.class = json!(null);
        self.has_kinds = false;
    }

    /// Gives the pod a volume of a ConfigMap.
    pub(crate) fn with_config_map(&mut self) {
        let volumes = self.pod["spec"]["volumes"].as_array_mut().unwrap();
        volumes.push(json!({"name": "config", "configMap": {"name": "web-config"}}));
    }

    /// Adds an event of the pod.
    pub(crate) fn event(&mut self, reason: &str, message: &str) {
        let pod = json!({"kind": "Pod", "namespace": "shop", "name": "web", "uid": UID});
        self.event_of(&pod, reason, message);
    }

    /// Adds an event of an object.
    pub(crate) fn event_of(&mut self, object: &Value, reason: &str, message: &str) {
        let name = format!("web.{}", self.others.len());
        let event = json!({
            "metadata": {"name": name},
            "involvedObject": object,
            "reason": reason, "message": message, "type": "Warning",
            "firstTimestamp": ago(300), "lastTimestamp": ago(20), "count": 5,
        });
        let path = format!("/api/v1/namespaces/shop/events/{name}");
        self.others.push((path, event));
    }

    /// Starts the API server.
    pub(crate) async fn start(self) -> Running {
        let dir = tempfile::tempdir().unwrap();
        let api = ApiServer::start(&dir.path().join("api")).await.unwrap();
        let deploy = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../deploy");
        if self.has_kinds {
            for kind in ["secretproviderclasses", "secretproviderclasspodstatuses"] {
                let file = deploy.join(format!("secrets-store.csi.x-k8s.io_{kind}.yaml"));
                let text = fs::read_to_string(file).unwrap();
                embedded::apply(&api.client(), "default", &text)
                    .await
                    .unwrap();
            }
        }
        for role in self.roles {
            let text = fs::read_to_string(deploy.join(role)).unwrap();
            embedded::apply(&api.client(), "default", &text)
                .await
                .unwrap();
        }
        let mut set = json!({
            "metadata": {"name": "csi-secrets-store", "uid": "set-1"},
            "spec": {
                "selector": {"matchLabels": {"app": "csi-secrets-store"}},
                "template": {
                    "metadata": {"labels": {"app": "csi-secrets-store"}},
                    "spec": {"serviceAccountName": "secrets-store-csi-driver", "containers": [{
                        "name": "secrets-store", "image": "secrets-store-csi",
                        "args": ["--endpoint=$(CSI_ENDPOINT)", "--nodeid=$(KUBE_NODE_NAME)"],
                    }]},
                },
            },
            "status": self.set_status,
        });
        if let Some(path) = self.providers_on_node {
            let spec = &mut set["spec"]["template"]["spec"];
            spec["volumes"] = json!([{"name": "providers", "hostPath": {"path": path}}]);
            spec["containers"][0]["volumeMounts"] = json!([{"name": "providers",
                "mountPath": "/var/run/secrets-store-csi-providers"}]);
        }
        let (ns, group) = (
            self.driver_namespace,
            "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop",
        );
        let storage = "/apis/storage.k8s.io/v1";
        let mut objects = vec![
            ("/api/v1/namespaces/shop/pods/web".to_owned(), self.pod),
            (format!("{group}/secretproviderclasses/db"), self.class),
            (
                format!("{group}/secretproviderclasspodstatuses/web-shop-db"),
                self.pod_status,
            ),
            (
                "/api/v1/namespaces/shop/secrets/creds".to_owned(),
                self.secret,
            ),
            (format!("/api/v1/nodes/{NODE}"), self.node),
            (format!("{storage}/csinodes/{NODE}"), self.csi_node),
            (
                format!("{storage}/csidrivers/secrets-store.csi.k8s.io"),
                self.csi_driver,
            ),
            (
                format!("/apis/apps/v1/namespaces/{ns}/daemonsets/csi-secrets-store"),
                set,
            ),
            (
                format!("/api/v1/namespaces/{ns}/pods/driver-x7k2p"),
                self.driver,
            ),
        ];
        objects.extend(self.others);
        for number in 2..self.more_nodes + 2 {
            let mut driver = objects[8].1.clone();
            driver["metadata"]["name"] = json!(format!("driver-{number:05}"));
            driver["metadata"]["uid"] = json!(format!("driver-{number}"));
            driver["spec"]["nodeName"] = json!(format!("node-{number}"));
            let mut csi_node = objects[5].1.clone();
            csi_node["metadata"]["name"] = json!(format!("node-{number}"));
            objects.push((
                format!("/api/v1/namespaces/{ns}/pods/driver-{number:05}"),
                driver,
            ));
            objects.push((format!("{storage}/csinodes/node-{number}"), csi_node));
        }
        for (path, mut object) in objects.into_iter().filter(|(_, object)| !object.is_null()) {
            let parts: Vec<_> = path.split('/').collect();
            if let Some(at) = parts.iter().position(|part| *part == "namespaces") {
                object["metadata"]["namespace"] = json!(parts[at + 1]);
            }
            object["metadata"]["resourceVersion"] = json!("1");
            api.put(&path, object).unwrap();
        }
        api.stop_collector();
        let (forbidden, answers) = (self.forbidden, self.answers);
        api.intercept(move |call| {
            let refuses = forbidden.iter().any(|piece| call.uri.contains(piece));
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "reason": "Forbidden", "message": "you may not", "code": 403});
            let address = call.uri.split('?').next().unwrap_or_default();
            let mut answers = answers.iter();
            match answers.find(|(path, _)| address.ends_with(path)) {
                _ if refuses => Reaction::Answer(403, status.to_string()),
                Some((_, answer)) => Reaction::Answer(200, answer.to_string()),
                None => Reaction::Serve,
            }
        });
        let (existing, status) = (self.existing_driver, self.status.to_string());
        api.run_commands(move |exec| {
            let output = played(existing, &status, &exec.command);
            async move { Ok(output) }
        });
        let kubeconfig = dir.path().join("kubeconfig");
        fs::write(&kubeconfig, api.kubeconfig().await.unwrap()).unwrap();
        Running {
            api,
            _dir: dir,
            kubeconfig,
        }
    }
}

/// Plays the program of the driver's container.
fn played(existing: bool, status: &str, command: &[String]) -> Output {
    let words: Vec<_> = command.iter().map(String::as_str).collect();
    let flag = words.iter().any(|word| word.starts_with("--state-dir"));
    match words.as_slice() {
        // Go's flag package says this, and the usage.
        ["/secrets-store-csi", "--version", ..] if existing && flag => Output {
            code: 2,
            stdout: String::new(),
            stderr: "flag provided but not defined: -state-dir\nUsage of /secrets-store-csi:\n"
                .to_owned(),
        },
        ["/secrets-store-csi", "--version", ..] => Output::default(),
        ["/secrets-store-csi", "status", "--json"] => {
            assert!(!existing, "it would start a second driver");
            Output {
                stdout: status.to_owned(),
                ..Output::default()
            }
        }
        other => panic!("{other:?}"),
    }
}

/// An API server, and a kubeconfig for it.
pub(crate) struct Running {
    api: ApiServer,
    _dir: tempfile::TempDir,
    pub(crate) kubeconfig: PathBuf,
}

/// What the plugin printed.
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Running {
    /// Returns the number of requests so far.
    pub(crate) fn requests(&self) -> usize {
        self.api.requests().len()
    }

    pub(crate) async fn explain(&self, pod: &str) -> Said {
        self.run(&["explain", "pod", pod, "-n", "shop"]).await
    }

    pub(crate) async fn run(&self, args: &[&str]) -> Said {
        let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_kubectl-secrets_store"))
            .args(args)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .stdin(Stdio::null())
            .output()
            .await
            .unwrap();
        Said {
            code: output.status.code().unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}
