//! Calls the fake provider over a real socket, in this process, as the driver does.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "all of this file is a test"
)]

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fake_provider::fake::{Error, Options, bind};
use proto::provider::csi_driver_provider_client::CsiDriverProviderClient;
use proto::provider::{MountRequest, MountResponse, ObjectVersion, VersionRequest};
use rstest::rstest;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

const FOO_AND_KEY: &str =
    "array:\n- |\n  objectName: foo\n  objectVersion: v1\n- |\n  objectName: fookey\n";
const KEY: &str = "-----BEGIN PUBLIC KEY-----\nThis is mock key\n-----END PUBLIC KEY-----";
const TOKENS_KEY: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// A provider that runs until it is stopped, in a directory of its own.
struct Running {
    dir: TempDir,
    http: SocketAddr,
    client: CsiDriverProviderClient<Channel>,
    stop: CancellationToken,
    ended: JoinHandle<Result<(), Error>>,
}

impl Running {
    async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    async fn start_with(change: impl FnOnce(&mut Options)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut options = Options::new(socket_in(dir.path()));
        options.http_addr = Some("127.0.0.1:0".to_owned());
        change(&mut options);
        let bound = bind(options).await.unwrap();
        let http = bound.http_addr().unwrap();
        let stop = CancellationToken::new();
        let ended = tokio::spawn(bound.run(stop.clone()));
        let client = connect(&socket_in(dir.path()), Some("http://localhost"));
        Self {
            dir,
            http,
            client,
            stop,
            ended,
        }
    }

    async fn mount(&self, attributes: &[(&str, &str)]) -> Result<MountResponse, Status> {
        self.send(request(attributes)).await
    }

    /// Mounts with these objects and faults, as pod `uid-1`.
    async fn mount_with(&self, objects: &str, faults: &str) -> Result<MountResponse, Status> {
        let attributes = [
            ("objects", objects),
            ("faults", faults),
            ("csi.storage.k8s.io/pod.uid", "uid-1"),
        ];
        self.mount(&attributes).await
    }

    async fn send(&self, request: MountRequest) -> Result<MountResponse, Status> {
        let mut client = self.client.clone();
        let answer = tokio::time::timeout(Duration::from_secs(20), client.mount(request)).await;
        answer
            .expect("an answer in time")
            .map(tonic::Response::into_inner)
    }

    async fn http(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.http).await.unwrap();
        let length = body.len();
        let text = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (
            head.split(' ').nth(1).unwrap().parse().unwrap(),
            body.to_owned(),
        )
    }

    async fn calls(&self) -> serde_json::Value {
        serde_json::from_str(&self.http("GET", "/calls", "").await.1).unwrap()
    }

    async fn wait_for_calls_in_flight(&self, wanted: u64) {
        let waiting = async {
            while self.calls().await["inFlight"] != wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let in_time = tokio::time::timeout(Duration::from_secs(10), waiting).await;
        assert!(
            in_time.is_ok(),
            "never {wanted} calls in flight: {}",
            self.calls().await
        );
    }
}

fn socket_in(dir: &Path) -> PathBuf {
    dir.join("fake.sock")
}

fn connect(socket: &Path, origin: Option<&str>) -> CsiDriverProviderClient<Channel> {
    let mut endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    if let Some(origin) = origin {
        endpoint = endpoint.origin(origin.parse().unwrap());
    }
    CsiDriverProviderClient::new(endpoint.connect_lazy()).max_decoding_message_size(64 << 20)
}

fn request(attributes: &[(&str, &str)]) -> MountRequest {
    let attributes: BTreeMap<_, _> = attributes.iter().copied().collect();
    MountRequest {
        attributes: serde_json::to_string(&attributes).unwrap(),
        secrets: "{}".to_owned(),
        target_path: "/".to_owned(),
        permission: "640".to_owned(),
        current_object_version: Vec::new(),
    }
}

/// Returns path, content and version of each object.
fn seen(response: &MountResponse) -> Vec<(&str, &str, &str)> {
    assert_eq!(response.files.len(), response.object_version.len());
    let pairs = response.files.iter().zip(&response.object_version);
    pairs
        .map(|(file, version)| {
            (
                &*file.path,
                std::str::from_utf8(&file.contents).unwrap(),
                &*version.version,
            )
        })
        .collect()
}

// Upstream's own unit tests of its provider, over the wire.

#[tokio::test]
async fn it_starts_tells_its_version_and_stops_clean() {
    let provider = Running::start().await;
    let request = VersionRequest {
        version: "v0".to_owned(),
    };
    let version = provider
        .client
        .clone()
        .version(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (
            &*version.version,
            &*version.runtime_name,
            &*version.runtime_version
        ),
        ("v1alpha1", "E2EMockProvider", "v0.0.10")
    );
    let Running {
        dir,
        stop,
        ended,
        client: _still_connected,
        ..
    } = provider;
    stop.cancel();
    ended.await.unwrap().unwrap();
    assert!(!socket_in(dir.path()).exists());
}

#[tokio::test]
async fn foo_and_fookey_rotate_for_a_pod_that_has_mounted() {
    let provider = Running::start().await;
    let class = [("objects", FOO_AND_KEY)];
    let first = [("foo", "secret", "v1"), ("fookey", KEY, "v1")];
    let response = provider.mount(&class).await.unwrap();
    assert_eq!(seen(&response), first);
    assert_eq!(response.error, None);
    assert_eq!(response.object_version[0].id, "secret/foo");
    assert!(response.files.iter().all(|file| file.mode == 640));
    assert_eq!(seen(&provider.mount(&class).await.unwrap()), first);

    assert_eq!(
        provider.http("GET", "/rotation?rotated=true", "").await,
        (200, String::new())
    );
    let rotated = [("foo", "rotated", "v2"), ("fookey", "rotated", "v2")];
    assert_eq!(seen(&provider.mount(&class).await.unwrap()), rotated);

    let other_pod = [
        ("objects", FOO_AND_KEY),
        ("csi.storage.k8s.io/pod.uid", "other"),
    ];
    assert_eq!(seen(&provider.mount(&other_pod).await.unwrap()), first);
    assert_eq!(
        provider.http("POST", "/rotation?rotated=TRUE", "").await.0,
        200
    );
    assert_eq!(
        seen(&provider.mount(&class).await.unwrap()),
        first,
        "only true means true"
    );
}

#[rstest]
#[case("aud1", Some(r#"{"aud1":{"token":"hunter2"}}"#), None)]
#[case(" aud1,aud2 ", Some(r#"{"aud1":{},"aud2":{},"aud3":{}}"#), None)]
#[case("aud1,aud2", Some(""), Some("no service account tokens came"))]
#[case("aud1,aud2", None, Some("no service account tokens came"))]
#[case(
    "aud1,aud2",
    Some(r#"{"aud1":{"token":"hunter2"}}"#),
    Some(r#"for audience "aud2""#)
)]
#[case("aud1", Some("hunter2"), Some("not a JSON object"))]
#[case("", None, None)]
#[tokio::test]
async fn tokens_of_all_audiences_must_come(
    #[case] audiences: &str,
    #[case] tokens: Option<&str>,
    #[case] refusal: Option<&str>,
) {
    let provider =
        Running::start_with(|options| options.token_audiences = audiences.to_owned()).await;
    let mut attributes = vec![("objects", FOO_AND_KEY)];
    attributes.extend(tokens.map(|tokens| (TOKENS_KEY, tokens)));
    let error = provider.mount(&attributes).await.err();
    assert_eq!(error.is_some(), refusal.is_some(), "{error:?}");
    if let (Some(error), Some(refusal)) = (error, refusal) {
        assert_eq!(error.code(), Code::Unknown);
        assert!(
            error.message().contains(refusal) && !error.message().contains("hunter2"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn audiences_can_be_set_over_http() {
    let provider = Running::start().await;
    provider
        .http("PUT", "/validate-token-requests?audience=a%2Cb", "")
        .await;
    let error = provider
        .mount(&[("objects", FOO_AND_KEY)])
        .await
        .unwrap_err();
    assert_eq!(error.message(), "no service account tokens came");
    provider
        .http("PUT", "/validate-token-requests?audience=", "")
        .await;
    provider.mount(&[("objects", FOO_AND_KEY)]).await.unwrap();
}

// The wire.

#[rstest]
#[case(None, "tonic")]
#[case(Some("http://localhost:80"), "localhost:80")]
#[case(Some("http://Localhost"), "Localhost")]
#[tokio::test]
async fn a_caller_with_another_authority_is_refused(
    #[case] origin: Option<&str>,
    #[case] sent: &str,
) {
    let provider = Running::start().await;
    let mut client = connect(&socket_in(provider.dir.path()), origin);
    let message = format!(":authority must be localhost, got {sent}");
    let mount = client
        .mount(request(&[("objects", FOO_AND_KEY)]))
        .await
        .unwrap_err();
    assert_eq!((mount.code(), mount.message()), (Code::Unknown, &*message));
    let version = client.version(VersionRequest::default()).await.unwrap_err();
    assert_eq!(
        (version.code(), version.message()),
        (Code::Unknown, &*message)
    );
}

/// Each request is wrong in this respect and all later ones, so that the order of the checks shows.
#[rstest]
#[case(
    "[]",
    "",
    "x",
    "",
    "attributes is not a JSON object of strings (line 1, column 0)"
)]
#[case(
    "{\"hunter2\":1}",
    "",
    "x",
    "",
    "attributes is not a JSON object of strings (line 1, column 12)"
)]
#[case(
    "{}",
    "",
    "x",
    "",
    "secrets is not a JSON object of strings (line 1, column 0)"
)]
#[case(
    "{}",
    "[\"hunter2\"]",
    "x",
    "",
    "secrets is not a JSON object of strings (line 1, column 0)"
)]
#[case(
    "{}",
    "null",
    "\"hunter2\"",
    "",
    "permission is not a JSON number (line 1, column 9)"
)]
#[case("{}", "null", "420", "", "target_path is empty")]
#[case("{}", "null", "420", "/", "parameter objects is not set")]
#[case("{\"objects\":\"\"}", "{}", "420", "/", "parameter objects is not set")]
#[tokio::test]
async fn requests_are_checked_in_order(
    #[case] attributes: &str,
    #[case] secrets: &str,
    #[case] permission: &str,
    #[case] target_path: &str,
    #[case] expected: &str,
) {
    let provider = Running::start().await;
    let request = MountRequest {
        attributes: attributes.to_owned(),
        secrets: secrets.to_owned(),
        permission: permission.to_owned(),
        target_path: target_path.to_owned(),
        current_object_version: Vec::new(),
    };
    let error = provider.send(request).await.unwrap_err();
    let code = match expected {
        "parameter objects is not set" => Code::Unknown,
        _ => Code::InvalidArgument,
    };
    assert_eq!((error.code(), error.message()), (code, expected));
}

#[tokio::test]
async fn what_the_driver_sent_can_be_read_from_the_volume() {
    let provider = Running::start().await;
    let objects = "array:\n\
        - {objectName: a, contentFrom: attributes}\n\
        - {objectName: s, contentFrom: secrets}\n\
        - {objectName: p, contentFrom: permission}\n\
        - {objectName: t, contentFrom: targetPath}\n\
        - {objectName: v, contentFrom: currentObjectVersion}\n";
    let mut sent = request(&[
        ("objects", objects),
        (TOKENS_KEY, r#"{"aud":{"token":"hunter2"}}"#),
    ]);
    sent.secrets = "null".to_owned();
    sent.target_path = "/volume".to_owned();
    sent.current_object_version = vec![ObjectVersion {
        id: "secret/a".into(),
        version: "v1".into(),
    }];
    let response = provider.send(sent).await.unwrap();
    let contents: Vec<&str> = seen(&response)
        .iter()
        .map(|(_, contents, _)| *contents)
        .collect();

    let attributes: BTreeMap<String, String> = serde_json::from_str(contents[0]).unwrap();
    assert_eq!(attributes["objects"], objects);
    assert_eq!(attributes[TOKENS_KEY], r#"{"aud":"<token>"}"#);
    assert_eq!(contents[1..4], ["null", "640", "/volume"]);
    let versions: serde_json::Value = serde_json::from_str(contents[4]).unwrap();
    assert_eq!(
        versions,
        serde_json::json!([{"id": "secret/a", "version": "v1"}])
    );
}

#[tokio::test]
async fn an_object_is_set_over_http() {
    let provider = Running::start().await;
    let path = "/objects?name=foo&content=set%20by%20hand&version=8";
    provider.http("GET", path, "").await;
    let class = [("objects", FOO_AND_KEY)];
    let after = provider.mount(&class).await.unwrap();
    assert_eq!(after.files[0].contents, b"set by hand");
    assert_eq!(after.object_version[0].version, "8");
    assert_ne!(after.files[1].contents, b"set by hand");
    provider.http("GET", "/objects?name=foo&content=", "").await;
    let emptied = provider.mount(&class).await.unwrap();
    assert_eq!(emptied.files[0].contents, b"");
    assert_ne!(emptied.object_version[0].version, "8");
}

#[tokio::test]
async fn a_directory_is_served_as_it_is_now() {
    let source = tempfile::tempdir().unwrap();
    fs::create_dir(source.path().join("tls")).unwrap();
    fs::write(source.path().join("foo"), "one").unwrap();
    fs::write(source.path().join("tls/key"), "k").unwrap();
    let path = source.path().to_owned();
    let provider = Running::start_with(|options| options.objects = Some(path)).await;

    let before = provider.mount(&[]).await.unwrap();
    let names = |r: &MountResponse| r.files.iter().map(|f| f.path.clone()).collect::<Vec<_>>();
    assert_eq!(names(&before), ["foo", "tls/key"]);
    fs::write(source.path().join("foo"), "two").unwrap();
    fs::remove_file(source.path().join("tls/key")).unwrap();
    let after = provider.mount(&[]).await.unwrap();
    assert_eq!(names(&after), ["foo"]);
    assert_eq!(after.files[0].contents, b"two");
    assert_ne!(
        before.object_version[0].version,
        after.object_version[0].version
    );

    // A class that names objects finds them there first, then in upstream's table.
    provider.http("GET", "/rotation?rotated=true", "").await;
    let named = provider.mount(&[("objects", FOO_AND_KEY)]).await.unwrap();
    let foo_version = &*after.object_version[0].version;
    assert_eq!(
        seen(&named),
        [("foo", "two", foo_version), ("fookey", "rotated", "v2")]
    );
}

// Faults.

#[tokio::test]
async fn a_status_strikes_so_many_times_and_then_no_more() {
    let provider = Running::start().await;
    let faults = "[{times: 2, status: {code: UNAVAILABLE, message: try later}}]";
    for _ in 0..2 {
        let error = provider.mount_with(FOO_AND_KEY, faults).await.unwrap_err();
        assert_eq!(
            (error.code(), error.message()),
            (Code::Unavailable, "try later")
        );
    }
    // A failed call is no mount, so this pod does not rotate yet.
    provider.http("GET", "/rotation?rotated=true", "").await;
    let response = provider.mount_with(FOO_AND_KEY, faults).await.unwrap();
    assert_eq!(seen(&response)[0], ("foo", "secret", "v1"));
}

#[tokio::test]
async fn a_delay_comes_before_the_other_faults() {
    let provider = Running::start().await;
    let faults = "[{delay: 150ms}, {delay: 150ms, errorCode: Throttled}]";
    let begun = std::time::Instant::now();
    let response = provider.mount_with(FOO_AND_KEY, faults).await.unwrap();
    assert!(
        begun.elapsed() >= Duration::from_millis(300),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(response.error.unwrap().code, "Throttled");
    assert!(response.files.is_empty() && response.object_version.is_empty());
}

#[rstest]
#[case("[{badPath: '../evil'}]", &["foo", "fookey", "../evil"])]
#[case("[{badPath: /etc/evil}]", &["foo", "fookey", "/etc/evil"])]
#[case("[{badPath: \"a\\0b\"}]", &["foo", "fookey", "a\0b"])]
#[case("[{object: fookey, badPath: '..'}]", &["foo", ".."])]
#[case("[{object: absent, badPath: '..'}]", &["foo", "fookey"])]
#[tokio::test]
async fn a_bad_path_is_sent_as_it_is(#[case] faults: &str, #[case] expected: &[&str]) {
    let provider = Running::start().await;
    let response = provider.mount_with(FOO_AND_KEY, faults).await.unwrap();
    let paths: Vec<&str> = response.files.iter().map(|file| &*file.path).collect();
    assert_eq!(paths, expected);
}

#[tokio::test]
async fn more_than_grpc_allows_by_default_can_be_sent_and_versions_be_missing() {
    let provider = Running::start().await;
    let faults = "[{oversize: 5000000, missingVersions: true}]";
    let response = provider.mount_with(FOO_AND_KEY, faults).await.unwrap();
    let last = response.files.last().unwrap();
    assert_eq!((&*last.path, last.contents.len()), ("oversize", 5_000_000));
    assert!(response.object_version.is_empty());

    let socket = socket_in(provider.dir.path());
    let mut limited = connect(&socket, Some("http://localhost")).max_decoding_message_size(4 << 20);
    let attributes = [("objects", FOO_AND_KEY), ("faults", faults)];
    let error = limited.mount(request(&attributes)).await.unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange);
}

#[tokio::test]
async fn files_can_be_written_the_old_way() {
    use std::os::unix::fs::PermissionsExt;
    let provider = Running::start().await;
    let target = provider.dir.path().join("volume");
    let objects = "array: [{objectName: a/b, content: x}, {objectName: c, content: y, mode: 0600}]";
    let mut old = request(&[("objects", objects), ("faults", "[{writeFiles: true}]")]);
    old.target_path = target.to_str().unwrap().to_owned();
    old.permission = "416".to_owned();
    let response = provider.send(old).await.unwrap();
    assert!(response.files.is_empty());
    assert_eq!(response.object_version.len(), 2);
    let written = |name: &str| {
        let path = target.join(name);
        (
            fs::read_to_string(&path).unwrap(),
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        )
    };
    assert_eq!(written("a/b"), ("x".to_owned(), 0o640));
    assert_eq!(written("c"), ("y".to_owned(), 0o600));
}

#[tokio::test]
async fn changed_only_leaves_out_files_of_mounted_versions() {
    let provider = Running::start().await;
    let objects = "array: [{objectName: a, content: x}, {objectName: b, content: y, version: v2}]";
    let mut sent = request(&[("objects", objects), ("faults", "[{changedOnly: true}]")]);
    let paths = |response: &MountResponse| -> Vec<String> {
        let files = response.files.iter();
        files.map(|file| file.path.clone()).collect()
    };
    let first = provider.send(sent.clone()).await.unwrap();
    assert_eq!(paths(&first), ["a", "b"]);
    // The id of one and the version of another do not make a mounted version.
    let version = |id: &str, version: &str| ObjectVersion {
        id: id.to_owned(),
        version: version.to_owned(),
    };
    sent.current_object_version = vec![version("secret/a", "v1"), version("secret/b", "v1")];
    let changed = provider.send(sent.clone()).await.unwrap();
    assert_eq!(paths(&changed), ["b"]);
    assert_eq!(changed.object_version, first.object_version);
    sent.current_object_version = first.object_version;
    let none = provider.send(sent).await.unwrap();
    assert!(none.files.is_empty());
}

// Manners.

fn ids(response: &MountResponse) -> Vec<&str> {
    let versions = response.object_version.iter();
    versions.map(|version| version.id.as_str()).collect()
}

#[tokio::test]
async fn aws_writes_files_keeps_the_latest_permission_and_echoes_versions() {
    use std::os::unix::fs::PermissionsExt;
    let provider = Running::start().await;
    let with = |faults: &str, permission: u32, target: &str| {
        let objects = "array: [{objectName: foo, content: secret}]";
        let mut sent = request(&[("objects", objects), ("manners", "aws"), ("faults", faults)]);
        sent.permission = permission.to_string();
        let target = provider.dir.path().join(target);
        sent.target_path = target.display().to_string();
        sent.current_object_version = vec![ObjectVersion {
            id: "gone".into(),
            version: "1".into(),
        }];
        sent
    };
    let mode = |target: &str| {
        let file = provider.dir.path().join(target).join("foo");
        fs::metadata(file).unwrap().permissions().mode() & 0o777
    };
    let slow = provider.send(with("[{delay: 300ms}]", 0o400, "slow"));
    let fast = async {
        provider.wait_for_calls_in_flight(1).await;
        provider.send(with("", 0o600, "fast")).await
    };
    let (slow, fast) = tokio::join!(slow, fast);
    assert_eq!(ids(&slow.unwrap()), ["foo", "gone"]);
    assert!(fast.unwrap().files.is_empty());
    assert_eq!((mode("slow"), mode("fast")), (0o600, 0o600));

    let denied = with("[{describeDenied: true}]", 0o644, "denied");
    let error = provider.send(denied.clone()).await.unwrap_err();
    assert!(error.message().ends_with("are granted for: foo"), "{error}");
    let without = MountRequest {
        current_object_version: Vec::new(),
        ..denied
    };
    provider.send(without).await.unwrap();
}

#[rstest]
#[case("", "secret/foo", Some("v1"))]
#[case("aws", "foo", Some("4887f178-cea4-22f6-47d5-e01f63e8fc71"))]
#[case("azure", "secret/foo", Some("4887f178cea422f647d5e01f63e8fc71"))]
#[case("vault", "foo", Some("LRYv4qdEGzGtfoubuM0bFxOUVcP07_HyNE22m9D85iE="))]
#[case(
    "gcp",
    "projects/shop/secrets/foo/versions/latest",
    Some("projects/shop/secrets/foo/versions/v1")
)]
#[case("nobody", "", None)]
#[tokio::test]
async fn ids_and_versions_are_those_of_the_provider(
    #[case] manners: &str,
    #[case] id: &str,
    #[case] version: Option<&str>,
) {
    let provider = Running::start().await;
    let target = provider.dir.path().join("volume");
    let attributes = [
        ("objects", "array: [{objectName: foo, content: secret}]"),
        ("manners", manners),
    ];
    let mut sent = request(&attributes);
    sent.target_path = target.display().to_string();
    let answer = provider.send(sent).await.ok();
    let versions = answer.as_ref().map(|answer| &answer.object_version[0]);
    assert_eq!(
        versions.map(|v| (&*v.id, &*v.version)),
        version.map(|v| (id, v))
    );
}

/// With manners, an object has to be stored; without, it is empty.
#[tokio::test]
async fn an_object_that_is_stored_nowhere_is_missing() {
    let provider = Running::start().await;
    let objects = ("objects", "array: [{objectName: later}]");
    provider.mount(&[objects]).await.unwrap();
    let error = provider.mount(&[objects, ("manners", "gcp")]).await;
    let error = error.unwrap_err();
    assert_eq!(error.code(), Code::Internal);
    assert!(error.message().contains("not found"), "{error}");
    let stored = provider
        .http("GET", "/objects?name=later&content=x", "")
        .await;
    assert_eq!(stored.0, 200);
    provider
        .mount(&[objects, ("manners", "gcp")])
        .await
        .unwrap();
    assert_eq!(provider.http("GET", "/reset", "").await.0, 200);
    let error = provider.mount(&[objects, ("manners", "gcp")]).await;
    assert_eq!(error.unwrap_err().code(), Code::Internal);
}

#[tokio::test]
async fn a_mistake_in_the_faults_is_said() {
    let provider = Running::start().await;
    let error = provider
        .mount_with(FOO_AND_KEY, "[{tims: 1}]")
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::Unknown);
    assert!(
        error
            .message()
            .starts_with("parameter faults: YAML not understood at line 1"),
        "{error}"
    );
}

#[tokio::test]
async fn hanging_calls_are_counted_until_the_caller_gives_up_or_the_provider_stops() {
    let provider = Running::start().await;
    let hang = |pod: &'static str| {
        let attributes = [
            ("objects", FOO_AND_KEY),
            ("faults", "[{hang: true}]"),
            ("csi.storage.k8s.io/pod.namespace", "ns"),
            ("csi.storage.k8s.io/pod.name", pod),
        ];
        let mut client = provider.client.clone();
        let request = request(&attributes);
        tokio::spawn(async move { client.mount(request).await })
    };
    let (first, second) = (hang("a"), hang("b"));
    provider.wait_for_calls_in_flight(2).await;
    first.abort();
    provider.wait_for_calls_in_flight(1).await;
    assert_eq!(
        provider.calls().await,
        serde_json::json!({
            "mountCalls": 2, "versionCalls": 0, "inFlight": 1, "maxInFlight": 2,
            "mountCallsByPod": {"ns/a": 1, "ns/b": 1},
        })
    );
    provider.http("POST", "/calls/reset", "").await;
    assert_eq!(provider.calls().await["mountCalls"], 0);

    provider.stop.cancel();
    let second = tokio::time::timeout(Duration::from_secs(3), second)
        .await
        .expect("stopping ends what hangs");
    assert_eq!(second.unwrap().unwrap_err().code(), Code::Unavailable);
    provider.ended.await.unwrap().unwrap();
}

#[tokio::test]
async fn faults_can_be_put_and_taken_away_at_run_time() {
    let provider = Running::start().await;
    let (code, reason) = provider.http("PUT", "/faults", "[{tims: 1}]").await;
    assert_eq!(code, 400);
    assert!(
        reason.starts_with("faults: YAML not understood at line 1"),
        "{reason}"
    );

    let faults = "- {object: fookey, status: {code: NOT_FOUND}}\n";
    assert_eq!(
        provider.http("PUT", "/faults", faults).await,
        (200, String::new())
    );
    let error = provider
        .mount(&[("objects", FOO_AND_KEY)])
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    provider
        .mount(&[("objects", "array: [{objectName: foo}]")])
        .await
        .unwrap();
    assert_eq!(provider.http("DELETE", "/faults", "").await.0, 200);
    provider.mount(&[("objects", FOO_AND_KEY)]).await.unwrap();
}
