//! What is left of secrets in the driver's memory.

use std::{
    fs,
    io::{Read as _, Seek as _, SeekFrom},
    sync::Arc,
    time::{Duration, Instant},
};

use fake_provider::server::{
    Failure, Identity, MountResponse, Object, Provider, Request, Server, Socket,
};
use serde_json::json;
use tokio::sync::Notify;

use crate::{Driver, Node, PATIENCE};

const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// A provider that answers when it is told to.
#[derive(Clone, Default)]
struct Waiting {
    asked: Arc<Notify>,
    go: Arc<Notify>,
    content: Vec<u8>,
}

impl Provider for Waiting {
    fn identity(&self) -> Identity {
        Identity {
            name: "test".to_owned(),
            version: "1".to_owned(),
        }
    }

    async fn mount(&self, _request: Request) -> Result<MountResponse, Failure> {
        self.asked.notify_one();
        self.go.notified().await;
        let object = Object {
            id: "secret/object".to_owned(),
            version: "v1".to_owned(),
            path: "object".to_owned(),
            mode: 0o644,
            contents: self.content.clone(),
        };
        Ok([object].into_iter().collect())
    }
}

/// Returns how often each text is in the memory of a driver.
fn found(driver: &Driver, texts: &[String]) -> Vec<usize> {
    let maps = fs::read_to_string(driver.proc("maps")).unwrap();
    let mut memory = fs::File::open(driver.proc("mem")).unwrap();
    let mut counts = vec![0; texts.len()];
    for line in maps.lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        // What belongs to no file, and can be written to.
        if !rest.starts_with("rw") || rest.contains(" /") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        memory.seek(SeekFrom::Start(start)).unwrap();
        // A range may be gone by now.
        if memory.read_exact(&mut bytes).is_err() {
            continue;
        }
        for (count, text) in counts.iter_mut().zip(texts) {
            *count += occurrences(&bytes, text.as_bytes());
        }
    }
    counts
}

fn occurrences(bytes: &[u8], text: &[u8]) -> usize {
    let first = text[0];
    let mut count = 0;
    let mut at = 0;
    while let Some(next) = bytes[at..].iter().position(|byte| *byte == first) {
        count += usize::from(bytes[at + next..].starts_with(text));
        at += next + 1;
    }
    count
}

/// During a call the driver's memory has the secrets of the call. When the call is over, and its
/// connections are closed, they are nowhere.
#[tokio::test]
async fn what_held_a_secret_is_wiped() {
    let node = Node::new().await;
    let texts = ["token", "reference", "content"].map(|of| format!("canary-{of}-0123456789abcdef"));
    let [token, reference, content] = &texts;
    let provider = Waiting {
        content: content.repeat(2000).into_bytes(),
        ..Waiting::default()
    };
    let socket = Socket::bind(node.path("providers/test.sock")).unwrap();
    let server = Server::new(socket, provider.clone());
    tokio::spawn(server.run(std::future::pending()));
    let mut driver = node.driver(&[]);
    let tokens = json!({"vault": {"token": token}}).to_string();
    for volume in ["one", "two"] {
        let mut request = node.request(volume, &[]);
        request
            .volume_context
            .insert(TOKENS.to_owned(), tokens.clone());
        request
            .secrets
            .insert("password".to_owned(), reference.clone());
        let mut csi = driver.connect().await;
        let publish = tokio::spawn(async move { csi.node_publish_volume(request).await });
        provider.asked.notified().await;
        let during = found(&driver, &texts);
        assert!(during[0] > 0 && during[1] > 0, "{during:?}");
        provider.go.notify_one();
        publish.await.unwrap().unwrap();
    }
    let since = Instant::now();
    loop {
        let after = found(&driver, &texts);
        if after == [0, 0, 0] {
            return;
        }
        assert!(since.elapsed() < PATIENCE, "{after:?} are left");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
