//! Checks long errors, stores that hang, and answers that take more than they look like. One call
//! ends with a sentence, and other calls are not affected.

use std::{sync::Arc, time::Duration};

use driver::error::Result;
use fake_provider::server::{
    Code, Failure, Identity, MountResponse, ObjectVersion, Provider, Request,
};
use proto::provider::File;
use rstest::rstest;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tonic::Status;

use crate::{LONG, Node, identity, mount, refused};

/// Longer than a call that does not wait takes on a busy machine.
const SOON: Duration = Duration::from_secs(8);

/// A provider that does what the attribute `wish` of a call says.
struct Obedient;

impl Provider for Obedient {
    fn identity(&self) -> Identity {
        identity()
    }

    async fn mount(&self, request: Request) -> Result<MountResponse, Failure> {
        let words: Vec<&str> = request.parameter("wish").unwrap().split(' ').collect();
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
                let message = format!("denied: {message}");
                return Err(Failure::new(Code::PermissionDenied, message));
            }
            "details" => {
                let details = vec![7; number(1)];
                return Err(Failure::Status(Status::with_details(
                    Code::PermissionDenied,
                    "denied: see the details",
                    details.into(),
                )));
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
        Ok(answer)
    }
}

/// Returns a node on which the obedient provider runs.
fn obedient() -> Node {
    let node = Node::new(16);
    node.serve("last", Obedient);
    node
}

/// Starts a call of each class that has no answer, and waits until all are in flight or wait.
async fn hang(node: &Node, classes: impl IntoIterator<Item = String>) -> JoinSet<()> {
    let mut hanging = JoinSet::new();
    let mut count = 0;
    for class in classes {
        let providers = Arc::clone(&node.providers);
        hanging.spawn(async move {
            let reply = mount(&providers, &class, "hang", LONG).await;
            assert!(reply.is_err());
        });
        count += 1;
    }
    let counted = || {
        let page = node.metrics.render();
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

#[rstest]
#[case::ascii("a")]
#[case::two_bytes("ä")]
#[case::three_bytes("鍵")]
#[case::percent("%")]
#[case::mixed("é%a鍵\u{1f511}")]
#[tokio::test]
async fn a_long_error_keeps_its_code_and_harms_no_other_call(#[case] word: &str) {
    let node = obedient();
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

/// The driver does not read an error beyond a limit, and says so.
#[rstest]
#[case::ascii("a")]
#[case::two_bytes("ä")]
#[case::percent("%")]
#[tokio::test]
async fn an_error_that_is_not_read_is_said_to_be_too_large(#[case] word: &str) {
    let node = obedient();
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

/// Twenty volumes of a class hang. The next publish of any other class does not wait.
#[rstest]
#[case::another_namespace(vec!["shop/hung"; 20], "web/db")]
#[case::another_class_of_the_namespace(vec!["shop/hung"; 20], "shop/db")]
#[tokio::test]
async fn a_class_that_hangs_stops_no_other(#[case] hung: Vec<&str>, #[case] well: &str) {
    let node = obedient();
    let _hanging = hang(&node, hung.into_iter().map(str::to_owned)).await;
    let reply = node.mount(well, "ok", SOON).await;
    assert!(reply.is_ok(), "{}", refused(reply));
}

#[tokio::test]
async fn a_namespace_of_many_classes_that_hang_stops_no_other() {
    let node = obedient();
    let hung = (0..100).map(|class| format!("hostile/c{class}"));
    let _hanging = hang(&node, hung).await;
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

/// A store that forty namespaces use is down. A class of another store gets its turn.
#[tokio::test]
async fn a_store_that_is_down_for_many_namespaces_stops_no_other() {
    let node = obedient();
    let hung = (0..40).map(|namespace| format!("n{namespace}/db"));
    let _hanging = hang(&node, hung).await;
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
    let node = obedient();
    let error = refused(node.mount("shop/db", wish, LONG).await);
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    assert!(error.to_string().contains(says), "{error}");
    for wish in ["files 4096", "versions 4096", "content 4190000"] {
        let reply = node.mount("shop/db", wish, LONG).await;
        assert!(reply.is_ok(), "{wish}: {}", refused(reply));
    }
}

/// Many answers of the largest size take turns for the memory, and all arrive.
#[tokio::test]
async fn large_answers_take_turns() {
    let node = obedient();
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

/// Answers that are kept hold their memory. A call whose answer finds none fails with a sentence that
/// says so, and does not harm the standing of its class.
#[tokio::test]
async fn an_answer_for_which_there_is_no_memory_says_so() {
    let node = obedient();
    let mut kept = Vec::new();
    // A namespace has half of 64 MiB, and one answer takes 16 MiB while it is read.
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

/// Measures calls to a provider that answers at once. A connection for each call must not be what
/// takes the time of a publish.
#[tokio::test]
async fn a_connection_for_each_call_is_cheap() {
    let node = obedient();
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
