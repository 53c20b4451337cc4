//! The user as which a provider runs.

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt as _, chown},
        process::CommandExt as _,
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use fake_provider::server::{Server, Socket};
use nix::unistd::geteuid;
use tonic::Code;

use crate::{Node, PATIENCE, Recorder};

/// The user as which Google's provider runs.
const USER: u32 = 1000;
/// The variable with the path of the socket, for the process that is the provider.
const SOCKET: &str = "SOCKET_OF_THE_PROVIDER";

/// A provider in a process of another user, killed when dropped.
struct OfAnotherUser(Child);

impl OfAnotherUser {
    /// Starts a provider in the node's directory, which has to be writable for its user.
    fn start(node: &Node) -> Self {
        let socket = node.path("providers/test.sock");
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["peers::a_provider_of_this_user", "--exact", "--ignored"])
            .env(SOCKET, &socket)
            .uid(USER)
            .gid(USER)
            .stdout(Stdio::null())
            .spawn();
        let started = Self(child.unwrap());
        let since = Instant::now();
        while !socket.exists() {
            assert!(since.elapsed() < PATIENCE, "the provider makes no socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        started
    }
}

impl Drop for OfAnotherUser {
    fn drop(&mut self) {
        // This fails only if the process has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
#[ignore = "the tests below run it, as another user"]
async fn a_provider_of_this_user() {
    let socket = PathBuf::from(std::env::var_os(SOCKET).unwrap());
    let socket = Socket::bind(socket).unwrap();
    Server::new(socket, Recorder::default())
        .run(std::future::pending())
        .await
        .unwrap();
}

/// Makes a node whose socket directory anybody can write to, as only a careless administrator does.
/// Returns `None` where there is no other user.
async fn careless() -> Option<Node> {
    if !geteuid().is_root() {
        eprintln!("skipped: an ordinary user has no other users");
        return None;
    }
    let node = Node::new().await;
    for (name, mode) in [(".", 0o755), ("providers", 0o777)] {
        fs::set_permissions(node.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    Some(node)
}

#[tokio::test]
async fn a_provider_of_a_stranger_is_sent_nothing() {
    let Some(node) = careless().await else { return };
    let _provider = OfAnotherUser::start(&node);
    let mut driver = node.driver(&["--provider-health-check", "--provider-uids=1001,7"]);
    let since = Instant::now();
    let refused = driver.publish(node.request("one", &[])).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    for part in [
        "runs as user 1000",
        "test.sock",
        "--provider-uids",
        "was sent nothing",
    ] {
        assert!(refused.message().contains(part), "{refused:?}");
    }
    // It is no failure that passes, so it is not tried again.
    assert!(!refused.message().contains("attempts"), "{refused:?}");
    assert!(since.elapsed() < PATIENCE);
    // The health check does not speak to it either.
    let healthy = |log: &str| {
        log.contains("the provider is not healthy") && log.contains("runs as user 1000")
    };
    while !healthy(&driver.log()) {
        assert!(since.elapsed() < PATIENCE, "{}", driver.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_user_is_allowed_by_a_flag_or_as_the_owner_of_the_directory() {
    for flag in ["--provider-uids=7,1000", "--provider-uids=any"] {
        let Some(node) = careless().await else { return };
        let _provider = OfAnotherUser::start(&node);
        node.driver(&[flag])
            .publish(node.request("one", &[]))
            .await
            .unwrap();
    }
    // As Google's manifest does it.
    let node = Node::new().await;
    fs::set_permissions(node.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    chown(node.path("providers"), Some(USER), Some(USER)).unwrap();
    let _provider = OfAnotherUser::start(&node);
    node.driver(&[])
        .publish(node.request("one", &[]))
        .await
        .unwrap();
}
