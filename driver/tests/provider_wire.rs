//! What comes over a provider's socket: long errors, hostile bytes, hanging stores, and answers
//! that take more than they look like. Whatever it is, one call ends with a sentence and the
//! others do not notice.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::{path::Path, sync::Arc, time::Duration};

use driver::{
    error::{Error, Result},
    metrics::Metrics,
    provider::{Limits, MountCall, Providers, Reply, Urgency},
};
use proto::provider::{
    File, MountRequest, MountResponse, ObjectVersion, VersionRequest, VersionResponse,
    csi_driver_provider_server::{CsiDriverProvider, CsiDriverProviderServer},
};
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Request, Response, Status, transport::Server};

/// Longer than anything takes that should take no time, on a busy machine.
const SOON: Duration = Duration::from_secs(8);
/// The deadline of a call that may take its time.
const LONG: Duration = Duration::from_secs(60);
const MAX_MESSAGE: usize = 4 << 20;

/// A provider that does what the attributes of a call say.
struct Obedient;

#[tonic::async_trait]
impl CsiDriverProvider for Obedient {
    async fn version(
        &self,
        _: Request<VersionRequest>,
    ) -> std::result::Result<Response<VersionResponse>, Status> {
        Ok(Response::new(VersionResponse::default()))
    }

    async fn mount(
        &self,
        request: Request<MountRequest>,
    ) -> std::result::Result<Response<MountResponse>, Status> {
        let wish = request.into_inner().attributes;
        let words: Vec<&str> = wish.split(' ').collect();
        let number = |at: usize| words[at].parse::<usize>().unwrap();
        let version = |n: usize| ObjectVersion {
            id: n.to_string(),
            version: "1".to_owned(),
        };
        let mut answer = MountResponse {
            object_version: vec![version(0)],
            ..MountResponse::default()
        };
        match words[0] {
            "hang" => std::future::pending().await,
            "slow" => sleep(Duration::from_millis(500)).await,
            "refuse" => {
                let message = words[2].repeat(number(1) / words[2].len());
                return Err(Status::permission_denied(format!("denied: {message}")));
            }
            "details" => {
                let details = vec![7; number(1)];
                return Err(Status::with_details(
                    Code::PermissionDenied,
                    "denied: see the details",
                    details.into(),
                ));
            }
            "files" => answer.files = vec![File::default(); number(1)],
            "versions" => answer.object_version = vec![ObjectVersion::default(); number(1)],
            "long" => answer.object_version[0].version = "v".repeat(number(1)),
            "content" => {
                answer.files = vec![File {
                    path: "a".to_owned(),
                    contents: vec![7; number(1)],
                    ..File::default()
                }];
            }
            _ => {}
        }
        Ok(Response::new(answer))
    }
}

struct Node {
    dir: tempfile::TempDir,
    metrics: Metrics,
    providers: Arc<Providers>,
}

impl Node {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            max_calls: 16,
            max_bytes: 64 << 20,
            max_message_bytes: MAX_MESSAGE,
        };
        let metrics = Metrics::new();
        let search = vec![dir.path().to_owned()];
        let providers = Arc::new(Providers::new(search, limits, metrics.clone()));
        Self {
            dir,
            metrics,
            providers,
        }
    }

    fn socket(&self) -> UnixListener {
        UnixListener::bind(self.dir.path().join("test.sock")).unwrap()
    }

    /// A node on which the obedient provider runs.
    fn obedient() -> Self {
        let node = Self::new();
        let incoming = UnixListenerStream::new(node.socket());
        let service = CsiDriverProviderServer::new(Obedient).max_encoding_message_size(1 << 30);
        let server = Server::builder().add_service(service);
        tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
        node
    }

    async fn mount(&self, class: &str, wish: &str, within: Duration) -> Result<Reply> {
        mount(&self.providers, class, wish, within).await
    }

    /// Calls of many classes that will have no answer, once they are in flight or wait.
    async fn hang(&self, classes: impl IntoIterator<Item = String>) -> JoinSet<()> {
        let mut hanging = JoinSet::new();
        let mut count = 0;
        for class in classes {
            let providers = Arc::clone(&self.providers);
            hanging.spawn(async move {
                let reply = mount(&providers, &class, "hang", LONG).await;
                assert!(reply.is_err());
            });
            count += 1;
        }
        let counted = || {
            let page = self.metrics.render();
            let value = |name: &str| {
                let start = format!("secrets_store_provider_calls_{name}{{");
                let line = page.lines().find(|line| line.starts_with(&start))?;
                line.rsplit(' ').next()?.parse::<usize>().ok()
            };
            Some(value("in_flight")? + value("waiting")?)
        };
        let since = Instant::now();
        while counted() != Some(count) {
            assert!(since.elapsed() < LONG, "{:?} of {count}", counted());
            sleep(Duration::from_millis(5)).await;
        }
        hanging
    }
}

/// `class` is NAMESPACE/NAME.
async fn mount(providers: &Providers, class: &str, wish: &str, within: Duration) -> Result<Reply> {
    let (namespace, class) = class.split_once('/').unwrap();
    providers
        .mount(MountCall {
            provider: "test",
            namespace,
            class,
            attributes: wish.to_owned().into(),
            with_tokens: false,
            secrets: "null".to_owned().into(),
            target: Path::new("/target"),
            current: &[],
            urgency: Urgency::FirstMount,
            deadline: Instant::now() + within,
        })
        .await
}

fn refused(reply: Result<Reply>) -> Error {
    match reply {
        Ok(_) => panic!("it was accepted"),
        Err(error) => error,
    }
}

#[rstest]
#[case::ascii("a")]
#[case::two_bytes("ä")]
#[case::three_bytes("鍵")]
#[case::percent("%")]
#[case::mixed("é%a鍵\u{1f511}")]
#[tokio::test]
async fn a_long_error_keeps_its_code_and_harms_no_other_call(#[case] word: &str) {
    let node = Node::obedient();
    for bytes in [0, 1, 700, 15_000, 20_000, 100_000, 1_000_000] {
        let wish = format!("refuse {bytes} {word}");
        let (refusal, other) = tokio::join!(
            node.mount("shop/db", &wish, LONG),
            node.mount("web/db", "slow", LONG)
        );
        let error = refused(refusal);
        let text = error.to_string();
        assert_eq!(error.code(), Code::PermissionDenied, "{bytes}: {text}");
        assert!(text.contains("PERMISSION_DENIED: denied: "), "{text}");
        assert!(text.len() < 1000, "{bytes} bytes became {}", text.len());
        assert!(other.is_ok(), "{bytes}: {}", refused(other));
    }
    let error = refused(node.mount("shop/db", "details 1000000", LONG).await);
    assert_eq!(error.code(), Code::PermissionDenied, "{error}");
}

/// What a provider says is lost where it is more than is read, and the sentence says so.
#[rstest]
#[case::ascii("a")]
#[case::two_bytes("ä")]
#[case::percent("%")]
#[tokio::test]
async fn an_error_that_is_not_read_is_said_to_be_too_large(#[case] word: &str) {
    let node = Node::obedient();
    for megabytes in [4, 7, 20] {
        let wish = format!("refuse {} {word}", megabytes << 20);
        let (refusal, other) = tokio::join!(
            node.mount("shop/db", &wish, LONG),
            node.mount("web/db", "slow", LONG)
        );
        let error = refused(refusal);
        let text = error.to_string();
        assert!(
            text.contains("larger than 4194304 bytes"),
            "{megabytes}: {text}"
        );
        assert!(text.len() < 1000, "{megabytes}: {}", text.len());
        assert!(other.is_ok(), "{megabytes}: {}", refused(other));
    }
}

/// Sixteen volumes of a class hang: the next publish of whatever other class does not wait.
#[rstest]
#[case::another_namespace(vec!["shop/hung"; 20], "web/db")]
#[case::another_class_of_the_namespace(vec!["shop/hung"; 20], "shop/db")]
#[tokio::test]
async fn a_class_that_hangs_stops_no_other(#[case] hung: Vec<&str>, #[case] well: &str) {
    let node = Node::obedient();
    let _hanging = node.hang(hung.into_iter().map(str::to_owned)).await;
    let reply = node.mount(well, "ok", SOON).await;
    assert!(reply.is_ok(), "{}", refused(reply));
}

#[tokio::test]
async fn a_namespace_of_many_classes_that_hang_stops_no_other() {
    let node = Node::obedient();
    let hung = (0..100).map(|class| format!("hostile/c{class}"));
    let _hanging = node.hang(hung).await;
    for namespace in ["web", "mail", "web", "web"] {
        let class = format!("{namespace}/db");
        let reply = node.mount(&class, "ok", SOON).await;
        assert!(reply.is_ok(), "{}", refused(reply));
    }
    let error = refused(
        node.mount("hostile/one-more", "ok", Duration::from_millis(300))
            .await,
    );
    assert_eq!(error.code(), Code::DeadlineExceeded);
    let text = error.to_string();
    assert!(
        text.contains("4 calls are in flight: 0 of this class, 4 of other classes"),
        "{text}"
    );
    assert!(!text.contains("hostile/c"), "{text}");
}

/// A store that forty namespaces use is down. The class of another store gets its turn.
#[tokio::test]
async fn a_store_that_is_down_for_many_namespaces_stops_no_other() {
    let node = Node::obedient();
    let hung = (0..40).map(|namespace| format!("n{namespace}/db"));
    let _hanging = node.hang(hung).await;
    let reply = node.mount("web/db", "ok", LONG).await;
    assert!(reply.is_ok(), "{}", refused(reply));
}

#[rstest]
#[case::empty_files("files 4097", "4097 files")]
#[case::long_versions("long 1048577", "bytes of object ids and versions")]
#[case::two_million_files("files 2000000", "2000000 files")]
#[case::empty_versions("versions 4097", "4097 object versions")]
#[case::two_million_versions("versions 2000000", "2000000 object versions")]
#[case::too_long("content 4194400", "more than 4194304 bytes")]
#[tokio::test]
async fn an_answer_that_takes_too_much_is_refused(#[case] wish: &str, #[case] says: &str) {
    let node = Node::obedient();
    let error = refused(node.mount("shop/db", wish, LONG).await);
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    assert!(error.to_string().contains(says), "{error}");
    for wish in ["files 4096", "versions 4096", "content 4190000"] {
        let reply = node.mount("shop/db", wish, LONG).await;
        assert!(reply.is_ok(), "{wish}: {}", refused(reply));
    }
}

/// Many answers of the largest size at once: they take turns for the memory, and all arrive.
#[tokio::test]
async fn large_answers_take_turns() {
    let node = Node::obedient();
    let mut calls = JoinSet::new();
    for namespace in 0..30 {
        let providers = Arc::clone(&node.providers);
        calls.spawn(async move {
            let class = format!("n{}/db", namespace % 3);
            let reply = mount(&providers, &class, "content 4000000", LONG).await;
            reply
                .map(|reply| reply.files.len())
                .map_err(|error| error.to_string())
        });
    }
    for answered in calls.join_all().await {
        assert_eq!(answered, Ok(1));
    }
}

/// Answers that are kept hold their memory; who finds none says so, and no class is to blame.
#[tokio::test]
async fn an_answer_for_which_there_is_no_memory_says_so() {
    let node = Node::obedient();
    let mut kept = Vec::new();
    // A namespace has half of 64 MiB, and one answer takes sixteen while it is read.
    for _ in 0..5 {
        kept.push(node.mount("shop/db", "content 4000000", LONG).await);
    }
    let late = node
        .mount("shop/db", "content 4000000", Duration::from_secs(2))
        .await;
    let error = refused(late);
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    assert!(
        error.to_string().contains("--provider-max-bytes"),
        "{error}"
    );
    assert!(kept.iter().all(Result::is_ok));
    let other = node.mount("web/db", "content 4000000", LONG).await;
    assert!(other.is_ok(), "{}", refused(other));
    drop(kept);
    let again = node.mount("shop/db", "content 4000000", LONG).await;
    assert!(again.is_ok(), "{}", refused(again));
}

/// One frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH: u8 = 5;
const PING: u8 = 6;
const GO_AWAY: u8 = 7;
const WINDOW: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

/// A header field that enters no table.
fn field(name: &str, value: &[u8]) -> Vec<u8> {
    let length = |length: usize| match u8::try_from(length) {
        Ok(short @ ..127) => vec![short],
        _ => {
            let mut rest = length - 127;
            let mut bytes = vec![127];
            while rest >= 128 {
                bytes.push((rest % 128 + 128) as u8);
                rest /= 128;
            }
            bytes.push(rest as u8);
            bytes
        }
    };
    [
        vec![0],
        length(name.len()),
        name.as_bytes().to_vec(),
        length(value.len()),
        value.to_vec(),
    ]
    .concat()
}

/// `:status 200` and the content type.
fn answer_begins() -> Vec<u8> {
    let block = [vec![0x88], field("content-type", b"application/grpc")].concat();
    frame(HEADERS, END_HEADERS, 1, &block)
}

fn trailers(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let block: Vec<u8> = fields
        .iter()
        .flat_map(|(name, value)| field(name, value))
        .collect();
    frame(HEADERS, END_HEADERS | END_STREAM, 1, &block)
}

/// An answer with one object: the prefix, and protobuf.
fn message() -> Vec<u8> {
    frame(DATA, 0, 1, &[0, 0, 0, 0, 5, 0x0a, 0x03, 0x0a, 0x01, b'x'])
}

/// A name, what is sent first, and what is sent again and again after it.
type Attack = (&'static str, Vec<u8>, Option<Vec<u8>>);

/// What a hostile provider sends after its SETTINGS. Some of it is sent for as long as somebody
/// reads.
fn attacks() -> Vec<Attack> {
    let begun = |rest: Vec<u8>| [answer_begins(), rest].concat();
    let endless_head = frame(
        HEADERS,
        0,
        1,
        &[vec![0x88], field("a", &[b'a'; 1000])].concat(),
    );
    vec![
        ("nothing and an end", vec![], None),
        (
            "another protocol",
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            None,
        ),
        (
            "GOAWAY before the answer",
            frame(GO_AWAY, 0, 0, &[0; 8]),
            None,
        ),
        (
            "GOAWAY within the answer",
            begun(frame(GO_AWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 11])),
            None,
        ),
        (
            "RST_STREAM within the answer",
            begun([message(), frame(RESET, 0, 1, &[0, 0, 0, 2])].concat()),
            None,
        ),
        (
            "a reset of the wrong size",
            begun(frame(RESET, 0, 1, &[0, 0])),
            None,
        ),
        (
            "a frame that is too large",
            begun(vec![0xff, 0xff, 0xff, DATA, 0, 0, 0, 0, 1]),
            None,
        ),
        ("settings on a stream", frame(SETTINGS, 0, 1, &[]), None),
        (
            "settings of the wrong size",
            frame(SETTINGS, 0, 0, &[0; 5]),
            None,
        ),
        (
            "a window that overflows",
            begun(frame(WINDOW, 0, 0, &[0x7f, 0xff, 0xff, 0xff]).repeat(3)),
            None,
        ),
        (
            "a push",
            begun(frame(PUSH, END_HEADERS, 1, &[0, 0, 0, 2, 0x88])),
            None,
        ),
        (
            "a head that ends nowhere",
            endless_head,
            Some(frame(CONTINUATION, 0, 1, &field("b", &[b'b'; 16_000]))),
        ),
        (
            "a head of empty pieces",
            frame(HEADERS, 0, 1, &[0x88]),
            Some(frame(CONTINUATION, 0, 1, &[]).repeat(100)),
        ),
        (
            "a head that is no HPACK",
            frame(HEADERS, END_HEADERS, 1, &[0xff; 40]),
            None,
        ),
        (
            "a status that is none",
            frame(
                HEADERS,
                END_HEADERS | END_STREAM,
                1,
                &field(":status", b"abc"),
            ),
            None,
        ),
        (
            "an HTTP error",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x8d]),
            None,
        ),
        (
            "trailers without a status",
            begun([message(), trailers(&[("a", b"b")])].concat()),
            None,
        ),
        (
            "a status of letters",
            begun([message(), trailers(&[("grpc-status", b"many")])].concat()),
            None,
        ),
        (
            "a message that is no text",
            begun(trailers(&[
                ("grpc-status", b"7"),
                ("grpc-message", b"%ff%fe%zz%"),
            ])),
            None,
        ),
        (
            "details that are no base64",
            begun(trailers(&[
                ("grpc-status", b"7"),
                ("grpc-status-details-bin", b"!!!"),
            ])),
            None,
        ),
        (
            "an answer of four gigabytes",
            begun(frame(DATA, 0, 1, &[0, 0xff, 0xff, 0xff, 0xff, 1])),
            None,
        ),
        (
            "an answer that is compressed",
            begun(frame(DATA, 0, 1, &[1, 0, 0, 0, 1, 1])),
            None,
        ),
        (
            "an answer that is no protobuf",
            begun(
                [
                    frame(DATA, 0, 1, &[0, 0, 0, 0, 3, 0xff, 0xff, 0xff]),
                    trailers(&[("grpc-status", b"0")]),
                ]
                .concat(),
            ),
            None,
        ),
        (
            "half a prefix",
            begun(
                [
                    frame(DATA, 0, 1, &[0, 0]),
                    trailers(&[("grpc-status", b"0")]),
                ]
                .concat(),
            ),
            None,
        ),
        ("no answer", begun(trailers(&[("grpc-status", b"0")])), None),
        (
            "two answers",
            begun([message(), message(), trailers(&[("grpc-status", b"0")])].concat()),
            None,
        ),
        (
            "pings",
            begun(vec![]),
            Some(frame(PING, 0, 0, &[7; 8]).repeat(100)),
        ),
        (
            "empty data for ever",
            begun(vec![]),
            Some(frame(DATA, 0, 1, &[]).repeat(100)),
        ),
    ]
}

/// Answers one connection: as an attack says, or well if the call wishes so.
async fn raw(mut stream: UnixStream, attack: (Vec<u8>, Option<Vec<u8>>)) -> std::io::Result<()> {
    let mut came = Vec::new();
    let wishes = |came: &[u8], wish: &[u8]| came.windows(wish.len()).any(|part| part == wish);
    while !wishes(&came, b"WELL") && !wishes(&came, b"ATTACK") {
        if stream.read_buf(&mut came).await? == 0 {
            return Ok(());
        }
    }
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
    stream.write_all(&frame(SETTINGS, ACK, 0, &[])).await?;
    if wishes(&came, b"WELL") {
        sleep(Duration::from_secs(1)).await;
        let whole = [
            answer_begins(),
            message(),
            trailers(&[("grpc-status", b"0")]),
        ]
        .concat();
        stream.write_all(&whole).await?;
        sleep(LONG).await;
        return Ok(());
    }
    stream.write_all(&attack.0).await?;
    while let Some(more) = &attack.1 {
        stream.write_all(more).await?;
        // The answers to pings have to go somewhere.
        came.clear();
        let _ = timeout(Duration::ZERO, stream.read_buf(&mut came)).await;
        tokio::task::yield_now().await;
    }
    sleep(Duration::from_millis(100)).await;
    Ok(())
}

#[tokio::test]
async fn whatever_a_provider_sends_ends_one_call_with_a_sentence() {
    let mut tried = JoinSet::new();
    for (name, first, forever) in attacks() {
        tried.spawn(async move {
            let node = Node::new();
            let listener = node.socket();
            tokio::spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    tokio::spawn(raw(stream, (first.clone(), forever.clone())));
                }
            });
            let deadline = Duration::from_secs(20);
            let (attacked, well) = tokio::join!(
                node.mount("shop/db", "ATTACK", deadline),
                node.mount("web/db", "WELL", LONG)
            );
            assert!(well.is_ok(), "{name}: {}", refused(well));
            let error = refused(attacked);
            assert!(
                error.to_string().contains("provider \"test\""),
                "{name}: {error}"
            );
            assert!(error.to_string().len() < 1000, "{name}: {error}");
            let page = node.metrics.render();
            let left = "secrets_store_provider_calls_in_flight{provider=\"test\"} 0";
            assert!(page.contains(left), "{name}: {page}");
            println!("{name}: {:?} {error}", error.code());
        });
    }
    tried.join_all().await;
}

/// How long a call takes beside a provider that answers at once. A connection for each call must
/// not be what a publish spends its time on.
#[tokio::test]
async fn a_connection_for_each_call_is_cheap() {
    let node = Node::obedient();
    let mut times = Vec::new();
    for _ in 0..200 {
        let started = Instant::now();
        assert!(node.mount("shop/db", "ok", LONG).await.is_ok());
        times.push(started.elapsed());
    }
    times.sort();
    println!("p50 {:?}, p90 {:?}", times[100], times[180]);
    assert!(times[100] < Duration::from_millis(50), "{:?}", times[100]);
}
