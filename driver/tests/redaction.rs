//! Checks that secrets leave the driver only into the volume and to the provider. The program
//! publishes volumes at its highest verbosity, with a different canary in every place that can hold
//! a secret: some with success, and many that fail. No canary may appear in the log, an answer, the
//! metrics, a record or an object in the API.
//!
//! The driver gets a mount namespace of its own, with `unshare` of util-linux, so that it may
//! mount.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "api/server.rs"]
mod server;

use std::{
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use embedded::api::{ApiServer, Call, Reaction};
use fake_provider::server::{
    Failure, Identity, MountResponse, Object, Provider, Request, Server, Socket,
};
use proto::{
    csi::{
        NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability,
        node_client::NodeClient,
    },
    provider::File,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";
const UID: &str = "7a6ab1a5-0d1d-4a5a-9a7c-3d6c1f3e0a11";
/// The beginning of every canary. The rest tells where it was put.
const CANARY: &str = "canary-";
/// The beginning of a canary in base64, as a Secret holds it.
const ENCODED: &str = "Y2FuYXJ5";

/// The cases of a publish, and the code of its answer. The class carries the case to the API server
/// and the provider below.
const CASES: [(&str, Code); 21] = [
    ("ok", Code::Ok),
    ("synced", Code::Ok),
    ("synced-refused", Code::Ok),
    ("synced-forbidden", Code::Ok),
    ("synced-denied", Code::Ok),
    ("synced-failed", Code::Ok),
    ("synced-garbled", Code::Ok),
    ("synced-tls", Code::Ok),
    ("absent", Code::NotFound),
    ("garbled", Code::Unavailable),
    ("no-such-provider", Code::FailedPrecondition),
    ("bad-path", Code::FailedPrecondition),
    ("two-of-a-name", Code::FailedPrecondition),
    ("too-large", Code::ResourceExhausted),
    ("error", Code::PermissionDenied),
    ("error-code", Code::Unknown),
    ("status-refused", Code::PermissionDenied),
    ("writable", Code::InvalidArgument),
    ("no-capability", Code::InvalidArgument),
    ("no-class", Code::InvalidArgument),
    ("elsewhere", Code::InvalidArgument),
];

/// The failures of a refresh, after a successful publish.
const REFRESHES: [&str; 6] = [
    "refresh-ok",
    "refresh-absent",
    "refresh-garbled",
    "refresh-bad-path",
    "refresh-too-large",
    "refresh-error",
];

#[tokio::test]
async fn no_canary_leaves_the_driver() {
    let dir = tempfile::tempdir().unwrap();
    let (api, kubeconfig) = Api::start(dir.path()).await;
    let provider = Recorder::default();
    let socket = Socket::bind(dir.path().join("test.sock")).unwrap();
    tokio::spawn(Server::new(socket, provider.clone()).run(std::future::pending()));
    let driver = Driver::start(dir.path(), &kubeconfig);
    let mut csi = driver.connect().await;

    let mut said = Vec::new();
    let mut codes = Vec::new();
    for (case, _) in CASES {
        let request = request(dir.path(), case);
        let unpublish = NodeUnpublishVolumeRequest {
            volume_id: request.volume_id.clone(),
            target_path: request.target_path.clone(),
        };
        let answer = csi.node_publish_volume(request).await;
        let status = answer.err().unwrap_or_else(|| Status::new(Code::Ok, ""));
        codes.push((case, status.code()));
        said.push((format!("the answer for {case}"), format!("{status:?}")));
        if case != "elsewhere" {
            csi.node_unpublish_volume(unpublish).await.unwrap();
        }
    }
    assert_eq!(codes, CASES, "{said:#?}");
    for case in REFRESHES {
        for time in ["first", "again", "and again"] {
            let answer = csi.node_publish_volume(request(dir.path(), case)).await;
            assert!(answer.is_ok(), "{case} {time}: {answer:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    // One volume stays published, so that its record can be read.
    csi.node_publish_volume(request(dir.path(), "ok"))
        .await
        .unwrap();
    said.push(("/metrics".to_owned(), driver.metrics().await));
    let log = driver.end();
    for line in [
        "\"published\"",
        "failed to publish",
        "unpublished",
        "refreshed",
        "the refresh failed",
        "Secret written",
        "is not repeated because it may quote the content",
        "FailedToCreateSecret",
        "admission webhook values.example.com denied it",
    ] {
        assert!(log.contains(line), "no {line} in the log:\n{log}");
    }
    said.push(("the log".to_owned(), log));
    let written = api.seen.lock().unwrap().written.join("\n");
    assert!(written.contains("SecretProviderClassPodStatus"));
    let announced = written.matches("MountRotationFailed").count();
    assert_eq!(announced, REFRESHES.len() - 1, "{written}");
    said.push(("an object".to_owned(), written));
    let records = files_below(&dir.path().join("state"));
    assert!(!records.is_empty());
    said.extend(records);

    // The provider received all canaries.
    let asked = provider.asked.lock().unwrap().join("\n");
    for place in ["parameter", "attribute", "secret", "token"] {
        assert!(asked.contains(&format!("{CANARY}{place}")), "{place}");
    }
    for (place, text) in said {
        let found = text
            .lines()
            .find(|line| line.contains(CANARY) || line.contains(ENCODED));
        assert_eq!(found, None, "{place} has a secret");
    }
}

/// Returns the request of kubelet, with canaries.
fn request(dir: &Path, case: &str) -> NodePublishVolumeRequest {
    let canary = |place: &str| format!("{CANARY}{place}");
    let tokens =
        json!({"vault": {"token": canary("token"), "expirationTimestamp": "2026-11-23T18:00:00Z"}});
    let pods = dir.join("kubelet/pods").join(UID);
    let volume = pods.join("volumes/kubernetes.io~csi").join(case);
    fs::create_dir_all(&volume).unwrap();
    let mut request = NodePublishVolumeRequest {
        volume_id: format!("csi-{case}"),
        target_path: volume.join("mount").display().to_string(),
        readonly: true,
        volume_capability: Some(VolumeCapability::default()),
        volume_context: [
            ("csi.storage.k8s.io/pod.name", "web".to_owned()),
            ("csi.storage.k8s.io/pod.namespace", "default".to_owned()),
            ("csi.storage.k8s.io/pod.uid", UID.to_owned()),
            ("secretProviderClass", case.to_owned()),
            ("attribute", canary("attribute")),
            (TOKENS, tokens.to_string()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into(),
        secrets: [
            ("password".to_owned(), canary("secret")),
            // Kubernetes 1.35 may send tokens here.
            (TOKENS.to_owned(), tokens.to_string()),
        ]
        .into(),
        publish_context: [("publish".to_owned(), canary("publish"))].into(),
        ..Default::default()
    };
    match case {
        "writable" => request.readonly = false,
        "no-capability" => request.volume_capability = None,
        "no-class" => drop(request.volume_context.remove("secretProviderClass")),
        "elsewhere" => request.target_path = dir.join("etc").display().to_string(),
        _ => {}
    }
    request
}

/// The driver's process, killed when dropped.
struct Driver {
    process: Child,
    dir: PathBuf,
    metrics: u16,
}

impl Driver {
    fn start(dir: &Path, kubeconfig: &str) -> Self {
        let mut kubeconfig: Value = serde_json::from_str(kubeconfig).unwrap();
        kubeconfig["users"][0]["user"]["token"] = json!(format!("{CANARY}of-the-driver"));
        fs::write(dir.join("kubeconfig"), kubeconfig.to_string()).unwrap();
        let free = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let metrics = free.local_addr().unwrap().port();
        drop(free);
        let mut command = Command::new("unshare");
        if !nix::unistd::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        let process = command
            .args(["--mount", env!("CARGO_BIN_EXE_secrets-store-csi")])
            .arg(format!(
                "--endpoint=unix://{}",
                dir.join("csi.sock").display()
            ))
            .arg(format!("--state-dir={}", dir.join("state").display()))
            .arg(format!("--kubeconfig={}", dir.join("kubeconfig").display()))
            .arg(format!("--provider-volume={}", dir.display()))
            .arg(format!("--metrics-addr=127.0.0.1:{metrics}"))
            .args(["--nodeid=node-1", "--max-call-recv-msg-size=65536", "-v=10"])
            .args([
                "--enable-secret-rotation",
                "--rotation-poll-interval=1ms",
                "--rotation-backoff=1ms",
            ])
            .stderr(fs::File::create(dir.join("log")).unwrap())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            process,
            dir: dir.to_owned(),
            metrics,
        }
    }

    async fn connect(&self) -> NodeClient<Channel> {
        let socket = self.dir.join("csi.sock");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match endpoint.connect().await {
                Ok(channel) => return NodeClient::new(channel),
                Err(_) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("{error}: {}", self.log()),
            }
        }
    }

    async fn metrics(&self) -> String {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.metrics))
            .await
            .unwrap();
        let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).await.unwrap();
        assert!(page.contains("node_publish_total"), "{page}");
        page
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap()
    }

    /// Ends the process and returns its log.
    fn end(mut self) -> String {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.log()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // This fails only if the process has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An API server that has a class for every case.
struct Api {
    _server: ApiServer,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    /// The objects that were written, without Secrets.
    written: Vec<String>,
    /// The names of the objects that were read.
    read: BTreeSet<String>,
    /// The number of Secrets that were to be created.
    secrets: usize,
}

impl Api {
    /// Also returns a kubeconfig.
    async fn start(dir: &Path) -> (Self, String) {
        let (server, kubeconfig) = server::serve(dir).await;
        let owner =
            json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "2"});
        let pod = json!({"metadata": {"name": "web", "uid": UID, "ownerReferences": [owner]}});
        let path = "/api/v1/namespaces/default/pods/web";
        server.put(path, pod).unwrap();
        for name in CASES.map(|(case, _)| case).into_iter().chain(REFRESHES) {
            let path = format!(
                "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/default/secretproviderclasses/{name}"
            );
            server.put(&path, class(name)).unwrap();
        }
        let seen = Arc::<Mutex<Seen>>::default();
        let current = Arc::clone(&seen);
        server.intercept(move |call| current.lock().unwrap().react(call));
        let api = Self {
            _server: server,
            seen,
        };
        (api, kubeconfig)
    }
}

fn class(name: &str) -> Value {
    let provider = match name {
        "no-such-provider" => "nobody",
        _ => "test",
    };
    let type_ = match name {
        "synced-tls" => "kubernetes.io/tls",
        _ => "Opaque",
    };
    let synced = json!([{"secretName": name, "type": type_, "data": [
        {"objectName": "object", "key": "tls.crt"}, {"objectName": "object", "key": "tls.key"},
    ]}]);
    json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
        "metadata": {"name": name, "namespace": "default", "uid": "1", "resourceVersion": "1"},
        "spec": {"provider": provider, "parameters": {
            "case": name, "parameter": format!("{CANARY}parameter"),
        }, "secretObjects": if name.starts_with("synced") { synced } else { json!([]) }},
    })
}

impl Seen {
    fn react(&mut self, call: &Call<'_>) -> Reaction {
        let path = call.uri.split('?').next().unwrap();
        let name = path.rsplit('/').next().unwrap();
        if call.method == "GET" {
            return self.read(path, name);
        }
        let object: Value = serde_json::from_slice(call.body).unwrap();
        let text = String::from_utf8_lossy(call.body).into_owned();
        if path.ends_with("/secrets") {
            assert!(text.contains(ENCODED), "a Secret has its content");
            return self.create_secret(object["metadata"]["name"].as_str().unwrap());
        }
        if !path.contains("/secrets/") {
            self.written.push(text);
        }
        match object["status"]["secretProviderClassName"].as_str() {
            Some("status-refused") => refuse(403, name),
            _ => Reaction::Serve,
        }
    }

    /// Reads an object. A class `refresh-CASE` is read well the first time.
    fn read(&mut self, path: &str, name: &str) -> Reaction {
        let first = self.read.insert(name.to_owned());
        let case = name.strip_prefix("refresh-").filter(|_| !first);
        match case.unwrap_or(name) {
            "absent" => refuse(404, name),
            "garbled" => {
                let garbled = json!({"spec": format!("{CANARY}body")});
                Reaction::Answer(200, garbled.to_string())
            }
            "synced-garbled" if path.contains("/secrets/") => {
                let garbled = json!({"metadata": {}, "data": {"key": format!("{CANARY}!")}});
                Reaction::Answer(200, garbled.to_string())
            }
            _ => Reaction::Serve,
        }
    }

    /// Creates a Secret. Some are refused with a message that quotes the content, each time in another
    /// form.
    fn create_secret(&mut self, name: &str) -> Reaction {
        let content = format!("{CANARY}content");
        self.secrets += 1;
        let quoted = match self.secrets % 5 {
            1 => content,
            2 => format!("{ENCODED}LWNvbnRlbnQ="),
            3 => format!("line one\\n{}", &content[..CANARY.len() + 3]),
            4 => format!("{:?}", format!("\"{content}\"\n")),
            _ => format!("\n\t{CANARY}\n"),
        };
        let (code, message) = match name {
            "synced-refused" => (422, format!("{quoted} is weak")),
            "synced-forbidden" => (403, format!("{quoted} is not allowed")),
            "synced-denied" => (
                403,
                format!("admission webhook \"values.example.com\" denied the request: {quoted}"),
            ),
            "synced-failed" => (500, quoted.clone()),
            _ => return Reaction::Serve,
        };
        server::refuse(code, &quoted, &message, None)
    }
}

fn refuse(code: u16, name: &str) -> Reaction {
    server::refuse(code, "Refused", "refused by the test", Some(name))
}

/// A provider that records each request, and answers as the class's `case` says.
#[derive(Clone, Default)]
struct Recorder {
    asked: Arc<Mutex<Vec<String>>>,
}

impl Provider for Recorder {
    fn identity(&self) -> Identity {
        Identity {
            name: "test".to_owned(),
            version: "1".to_owned(),
        }
    }

    async fn mount(&self, request: Request) -> Result<MountResponse, Failure> {
        let mut case = request.parameter("case").unwrap();
        if let Some(at_refresh) = case.strip_prefix("refresh-") {
            let mine = format!("\"case\": \"{case}\"");
            let earlier = self.asked.lock().unwrap();
            if earlier.iter().any(|asked| asked.contains(&mine)) {
                case = at_refresh;
            }
        }
        if !request.mounted_versions().is_empty() {
            return Err(Failure::new(Code::Internal, "no class asks for versions"));
        }
        let asked = format!("{:?}{:?}", request.attributes(), request.secrets());
        self.asked.lock().unwrap().push(asked);
        let content = |times: usize| format!("{CANARY}content").repeat(times).into_bytes();
        let file = |path: &str, times| File {
            path: path.to_owned(),
            mode: 0o644,
            contents: content(times),
        };
        let object = Object {
            id: "secret/object".to_owned(),
            version: "v1".to_owned(),
            path: "object".to_owned(),
            mode: 0o644,
            contents: content(1),
        };
        let mut response: MountResponse = [object].into_iter().collect();
        match case {
            "bad-path" => response.files.push(file("../object", 1)),
            "two-of-a-name" => response.files.push(file("object", 2)),
            "too-large" => response.files.push(file("large", 10_000)),
            "error" => {
                return Err(Failure::new(Code::PermissionDenied, "the store says no"));
            }
            "error-code" => {
                response.error = Some(proto::provider::Error {
                    code: "STORE_SAYS_NO".to_owned(),
                });
            }
            _ => {}
        }
        Ok(response)
    }
}

/// Returns the path and the text of every file below a directory.
fn files_below(dir: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            let text = fs::read(&path).unwrap();
            let text = String::from_utf8_lossy(&text).into_owned();
            found.push((path.display().to_string(), text));
        }
    }
    found
}
