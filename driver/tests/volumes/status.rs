//! Checks what `secrets-store-csi status --json` says of a node.

use std::{os::unix::net::UnixListener, process::Output};

use serde_json::{Value, json};
use tokio::process::Command;
use tonic::Code;

use crate::harness::{Answer, EAGER, World, alone};

async fn run(flags: &[String]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_secrets-store-csi"))
        .arg("status")
        .args(flags)
        .output()
        .await
        .unwrap()
}

#[test]
fn the_status_of_a_node_has_its_volumes_and_providers() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let (well, stale, gone) = (
            world.volume_of_its_own(),
            world.volume_of_its_own(),
            world.volume_of_its_own(),
        );
        for volume in [&well, &stale, &gone] {
            let answer = Answer {
                version: Some("7".to_owned()),
                ..Answer::file("pw", "hunter2")
            };
            world.provider.answers(&volume.class, answer);
            world.publish_patiently(volume).await.unwrap();
        }
        let denied = Answer {
            status: Some(Code::PermissionDenied),
            ..Answer::default()
        };
        world.provider.answers(&stale.class, denied);
        world.publish_patiently(&stale).await.unwrap_err();
        gone.unmount();
        // A provider that has ended leaves its socket behind.
        drop(UnixListener::bind(world.dir.path().join("dead.sock")).unwrap());

        let flags = [vec!["--json".to_owned()], world.flags()].concat();
        let output = run(&flags).await;
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
        let status: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(status["node"], "node-1");
        assert_eq!(status["driver"]["answers"], true, "{text}");
        let provider = |name: &str| {
            let mut all = status["providers"].as_array().unwrap().iter();
            all.find(|provider| provider["name"] == name).unwrap()
        };
        assert_eq!(provider("test")["answers"], true, "{text}");
        assert_eq!(provider("dead")["answers"], false, "{text}");
        assert!(provider("dead")["error"].is_string(), "{text}");
        let volumes = status["volumes"].as_array().unwrap();
        assert_eq!(volumes.len(), 3);
        for (volume, mounted, is_stale) in [
            (&well, true, false),
            (&stale, true, true),
            (&gone, false, false),
        ] {
            let said = volumes.iter().find(|said| said["id"] == volume.id).unwrap();
            assert_eq!(said["mounted"], mounted, "{said}");
            assert_eq!(said["staleSince"].is_string(), is_stale, "{said}");
            assert_eq!(said["pod"]["uid"], volume.uid, "{said}");
            assert_eq!(said["objects"][0]["version"], "7", "{said}");
            let files: &[&str] = if mounted { &["pw"] } else { &[] };
            assert_eq!(said["files"], json!(files), "{said}");
            let count = mounted.then_some(1);
            assert_eq!(said["fileCount"].as_u64(), count, "{said}");
        }
        for wrong in [
            vec![],
            vec!["--json".to_owned(), "--no-such-flag".to_owned()],
        ] {
            assert_eq!(run(&wrong).await.status.code(), Some(2));
        }
    });
}
