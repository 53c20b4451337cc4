//! Checks that whoever answers in the API server's place keeps nobody waiting but who asked: answers without an end
//! are given up, and everything else goes on meanwhile.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use driver::cluster::Cluster;
use rstest::rstest;
use tokio::time::{interval, timeout};

/// The longest time for which everything else may have to wait. Without bounds it is many seconds.
const PAUSE: Duration = Duration::from_secs(2);
/// The deadline of a request, and some time to spare.
const DEADLINE: Duration = Duration::from_secs(20);
/// The number of requests at a time.
const AT_ONCE: usize = 4;

const CHUNKED: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";

/// Answers each request with a beginning, and then with the same over and over. Returns a client of it.
fn answers_without_end(dir: &Path, beginning: &str, unit: &str) -> Cluster {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (beginning, units) = (beginning.to_owned(), unit.repeat(65_536 / unit.len()));
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (beginning, units) = (beginning.clone(), units.clone());
            thread::spawn(move || answer(stream.unwrap(), &beginning, &units));
        }
    });
    let kubeconfig = format!(
        r#"{{"apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{{"name": "c", "context": {{"cluster": "c", "user": "u"}}}}],
        "clusters": [{{"name": "c", "cluster": {{"server": "http://{address}"}}}}],
        "users": [{{"name": "u", "user": {{}}}}]}}"#
    );
    let path = dir.join("kubeconfig");
    fs::write(&path, kubeconfig).unwrap();
    Cluster::new(Some(path), "test", "node-1")
}

/// Ends when the other end has closed the connection.
fn answer(mut stream: TcpStream, beginning: &str, units: &str) {
    let mut request = [0; 4096];
    let _read = stream.read(&mut request);
    if stream.write_all(beginning.as_bytes()).is_ok() {
        while stream.write_all(units.as_bytes()).is_ok() {}
    }
}

#[rstest]
#[case::continue_("", "HTTP/1.1 100 Continue\r\n\r\n")]
#[case::processing("", "HTTP/1.1 102 Processing\r\n\r\n")]
#[case::early_hints("", "HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\n\r\n")]
#[case::unknown_interim("", "HTTP/1.1 199 x\r\n\r\n")]
#[case::blank_lines("", "\r\n")]
#[case::reason("HTTP/1.1 200 ", "a")]
#[case::headers("HTTP/1.1 200 OK\r\n", "a: b\r\n")]
#[case::one_header("HTTP/1.1 200 OK\r\na: ", "b")]
#[case::extensions_of_a_chunk(&format!("{CHUNKED}1"), ";a=b")]
#[case::digits_of_a_chunk(CHUNKED, "0")]
#[case::small_chunks(CHUNKED, "1\r\n \r\n")]
#[case::trailers(&format!("{CHUNKED}0\r\n"), "a: b\r\n")]
#[case::body_until_the_end("HTTP/1.1 200 OK\r\n\r\n", " ")]
#[tokio::test]
async fn without_an_end_are_given_up(#[case] beginning: &str, #[case] unit: &str) {
    let dir = tempfile::tempdir().unwrap();
    let cluster = answers_without_end(dir.path(), beginning, unit);
    let begun = Instant::now();
    let asks = (0..AT_ONCE).map(|number| {
        let cluster = cluster.clone();
        tokio::spawn(async move {
            cluster
                .class("shop", &format!("class-{number}"))
                .await
                .map(drop)
        })
    });
    let asks: Vec<_> = asks.collect();
    // It is one thread on which all run.
    let mut longest = Duration::ZERO;
    let mut ticks = interval(Duration::from_millis(10));
    let mut last = Instant::now();
    while !asks.iter().all(|ask| ask.is_finished()) && begun.elapsed() < 2 * DEADLINE {
        ticks.tick().await;
        longest = longest.max(last.elapsed());
        last = Instant::now();
    }
    let took = begun.elapsed();
    for ask in asks {
        let error = timeout(DEADLINE, ask).await.unwrap().unwrap().unwrap_err();
        assert!(error.to_string().contains("class-"), "{error}");
    }
    assert!(longest < PAUSE, "others waited for {longest:?}");
    assert!(took < DEADLINE, "given up after {took:?}");
}

/// A single one is not read until the deadline of the request: its bytes are counted.
#[rstest]
#[case::continue_("HTTP/1.1 100 Continue\r\n\r\n")]
#[case::early_hints("HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\n\r\n")]
#[tokio::test]
async fn interim_answers_are_bounded(#[case] unit: &str) {
    let dir = tempfile::tempdir().unwrap();
    let cluster = answers_without_end(dir.path(), "", unit);
    let error = cluster.class("shop", "class-0").await.map(drop);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("has more than 8 MiB"), "{error}");
}
