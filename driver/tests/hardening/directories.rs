//! The directories of state and sockets.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
};

use nix::unistd::geteuid;
use rstest::rstest;

use crate::Node;

/// A directory as others must not have it.
const WARNING: &str = "others than its owner can make files";

/// kubelet's directories and those of the existing driver's manifests have these modes.
#[rstest]
#[case::a_host_path(0o755, 0o755)]
#[case::kubelets(0o750, 0o755)]
#[case::private(0o700, 0o700)]
#[tokio::test]
async fn usual_directories_are_not_mentioned(#[case] plugin: u32, #[case] providers: u32) {
    let node = Node::new().await;
    for (name, mode) in [("plugin", plugin), ("providers", providers)] {
        fs::set_permissions(node.path(name), Permissions::from_mode(mode)).unwrap();
    }
    let mut driver = node.driver(&[]);
    driver.connect().await;
    let log = driver.log();
    assert!(!log.contains("director"), "{log}");
    let records = fs::metadata(node.path("plugin/records")).unwrap();
    assert_eq!(records.mode() & 0o7777, 0o700);
}

#[rstest]
#[case("plugin", 0o777)]
#[case("plugin", 0o1777)]
#[case("providers", 0o775)]
#[case("providers", 0o757)]
#[tokio::test]
async fn a_directory_that_others_can_write_to_is_warned_of(#[case] name: &str, #[case] mode: u32) {
    let node = Node::new().await;
    fs::set_permissions(node.path(name), Permissions::from_mode(mode)).unwrap();
    let mut driver = node.driver(&[]);
    driver.connect().await;
    let log = driver.log_with(WARNING).await;
    let line = log.lines().find(|line| line.contains(WARNING)).unwrap();
    assert!(
        line.contains(&node.path(name).display().to_string()),
        "{line}"
    );
    assert!(line.contains(&format!("{mode:04o}")), "{line}");
}

#[tokio::test]
async fn others_lose_their_rights_on_the_state_directory() {
    let node = Node::new().await;
    let state = node.path("plugin/records");
    fs::create_dir(&state).unwrap();
    fs::set_permissions(&state, Permissions::from_mode(0o777)).unwrap();
    let mut driver = node.driver(&[]);
    driver.connect().await;
    assert_eq!(fs::metadata(&state).unwrap().mode() & 0o7777, 0o700);
    driver.log_with("its mode is now 0700").await;
}

#[tokio::test]
async fn a_state_directory_that_is_none_or_of_somebody_else_is_refused() {
    let node = Node::new().await;
    let state = node.path("plugin/records");
    std::os::unix::fs::symlink(node.path("providers"), &state).unwrap();
    let log = node.driver(&[]).fails().await;
    assert!(
        log.contains("the state directory") && log.contains("not a directory"),
        "{log}"
    );
    if !geteuid().is_root() {
        eprintln!("skipped the rest: an ordinary user cannot give a directory away");
        return;
    }
    fs::remove_file(&state).unwrap();
    fs::create_dir(&state).unwrap();
    chown(&state, Some(1000), None).unwrap();
    let log = node.driver(&[]).fails().await;
    assert!(log.contains("it belongs to user 1000"), "{log}");
}

/// kubelet may have its directory anywhere; the driver publishes below the one that it is told.
#[tokio::test]
async fn another_kubelet_root() {
    let node = Node::new().await;
    let provider = node.serve("test");
    let own = format!("--kubelet-root-dir={}", node.path("kubelet").display());
    let mut driver = node.driver(&[&own]);
    driver.publish(node.request("one", &[])).await.unwrap();
    drop(driver);
    let mut driver = node.driver(&["--kubelet-root-dir=/var/lib/kubelet"]);
    let refused = driver.publish(node.request("two", &[])).await.unwrap_err();
    assert!(
        refused.message().contains("/var/lib/kubelet"),
        "{refused:?}"
    );
    assert_eq!(provider.asked.lock().unwrap().len(), 1);
}
