//! Checks that secrets leave the driver only into the volume and to the provider. The program
//! publishes volumes at its highest verbosity, with a different canary in every place that can hold
//! a secret: some with success, and many that fail. No canary may appear in the log, an answer, the
//! metrics, a record or an object in the API.
//!
//! The driver gets a mount namespace of its own, with `unshare` of util-linux, so that it may
//! mount.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{Method, StatusCode, Uri},
};
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
    net::{TcpListener, TcpStream},
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
    let bodies = Bodies::default();
    let api = serve_api(bodies.clone()).await;
    let provider = Recorder::default();
    let socket = Socket::bind(dir.path().join("test.sock")).unwrap();
    tokio::spawn(Server::new(socket, provider.clone()).run(std::future::pending()));
    let driver = Driver::start(dir.path(), &api);
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
    let written = bodies.0.lock().unwrap().join("\n");
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
    fn start(dir: &Path, api: &str) -> Self {
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": api}}],
            "users": [{"name": "u", "user": {"token": format!("{CANARY}of-the-driver")}}],
        });
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

/// The objects that were written to the API, and the classes that were read.
#[derive(Clone, Default)]
struct Bodies(Arc<Mutex<Vec<String>>>, Arc<Mutex<Vec<String>>>);

impl Bodies {
    /// Returns the case of a class. A class `refresh-CASE` is read well the first time.
    fn case<'a>(&self, class: &'a str) -> &'a str {
        let mut read = self.1.lock().unwrap();
        let first = !read.iter().any(|earlier| earlier == class);
        read.push(class.to_owned());
        match class.strip_prefix("refresh-") {
            Some(_) if first => class,
            Some(case) => case,
            None => class,
        }
    }
}

/// Serves an API that has a class for every case and accepts pod statuses. Returns its address.
async fn serve_api(bodies: Bodies) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().fallback(answer).with_state(bodies);
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}")
}

async fn answer(
    State(bodies): State<Bodies>,
    method: Method,
    uri: Uri,
    body: Bytes,
) -> (StatusCode, String) {
    let name = uri.path().rsplit('/').next().unwrap();
    let refusal = |code: StatusCode| {
        let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
            "code": code.as_u16(), "reason": "Refused", "message": "refused by the test",
            "details": {"name": name}});
        (code, status.to_string())
    };
    let text = String::from_utf8_lossy(&body).into_owned();
    if method == Method::POST {
        let object: Value = serde_json::from_str(&text).unwrap();
        if object["kind"] == "Secret" {
            assert!(text.contains(ENCODED), "a Secret has its content");
            return answer_secret(object["metadata"]["name"].as_str().unwrap());
        }
        bodies.0.lock().unwrap().push(text.clone());
        return match object["status"]["secretProviderClassName"].as_str() {
            Some("status-refused") => refusal(StatusCode::FORBIDDEN),
            _ => (StatusCode::CREATED, text),
        };
    }
    match bodies.case(name) {
        "absent" => refusal(StatusCode::NOT_FOUND),
        "garbled" => (
            StatusCode::OK,
            json!({"spec": format!("{CANARY}body")}).to_string(),
        ),
        _ if method == Method::GET && uri.path().contains("/secretproviderclasses/") => {
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
            let object = json!({
                "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
                "metadata": {"name": name, "namespace": "default", "uid": "1", "resourceVersion": "1"},
                "spec": {"provider": provider, "parameters": {
                    "case": name, "parameter": format!("{CANARY}parameter"),
                }, "secretObjects": if name.starts_with("synced") { synced } else { json!([]) }},
            });
            (StatusCode::OK, object.to_string())
        }
        "web" if uri.path().contains("/pods/") => {
            let owner =
                json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "2"});
            let pod = json!({"metadata": {"name": name, "uid": UID, "ownerReferences": [owner]}});
            (StatusCode::OK, pod.to_string())
        }
        "synced-garbled" if uri.path().contains("/secrets/") => {
            let garbled = json!({"metadata": {}, "data": {"key": format!("{CANARY}!")}});
            (StatusCode::OK, garbled.to_string())
        }
        _ => refusal(StatusCode::NOT_FOUND),
    }
}

/// Answers the creation of a Secret. Some are refused with a message that quotes the content, each
/// time in another form.
fn answer_secret(name: &str) -> (StatusCode, String) {
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    let content = format!("{CANARY}content");
    let quoted = match ASKED.fetch_add(1, Ordering::SeqCst) % 5 {
        0 => content,
        1 => format!("{ENCODED}LWNvbnRlbnQ="),
        2 => format!("line one\\n{}", &content[..CANARY.len() + 3]),
        3 => format!("{:?}", format!("\"{content}\"\n")),
        _ => format!("\n\t{CANARY}\n"),
    };
    let (code, message) = match name {
        "synced-refused" => (
            StatusCode::UNPROCESSABLE_ENTITY,
            format!("{quoted} is weak"),
        ),
        "synced-forbidden" => (StatusCode::FORBIDDEN, format!("{quoted} is not allowed")),
        "synced-denied" => (
            StatusCode::FORBIDDEN,
            format!("admission webhook \"values.example.com\" denied the request: {quoted}"),
        ),
        "synced-failed" => (StatusCode::INTERNAL_SERVER_ERROR, quoted.clone()),
        _ => return (StatusCode::CREATED, "{}".to_owned()),
    };
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "code": code.as_u16(), "reason": quoted, "message": message});
    (code, status.to_string())
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
