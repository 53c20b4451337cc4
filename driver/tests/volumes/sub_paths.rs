//! Checks that what kubelet makes in a volume for a `subPath` that is not there is no new content.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    time::{Duration, Instant},
};

use serde_json::json;
use tonic::Code;

use crate::harness::{Answer, EAGER, World, alone};

/// The time for work in the background on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// A pod mounts `web.kye` of a volume that has `web.key`. Nothing is told of new content until there is
/// some.
#[test]
fn a_directory_that_kubelet_made_is_no_new_content() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let volume = world.volume_of_its_own();
        let spec = json!({"containers": [{
            "name": "app", "volumeMounts": [{"name": "secrets", "mountPath": "/k", "subPath": "web.kye"}],
        }]});
        world.api.pod_is(&volume, spec);
        let answers = |text: &str| {
            let answer = Answer {
                version: Some("v1".to_owned()),
                files: vec![
                    ("web.key".to_owned(), text.into()),
                    ("d/pw".to_owned(), text.into()),
                ],
                ..Answer::default()
            };
            world.provider.answers(&volume.class, answer);
        };
        answers("one");
        world.publish_patiently(&volume).await.unwrap();
        let status = || {
            let annotations =
                world.api.get(&volume.pod_status()).unwrap()["metadata"]["annotations"].clone();
            ["content-changed", "content-changes"]
                .map(|name| annotations[format!("secrets-store.csi.k8s.io/{name}")].clone())
        };
        let state = || {
            let record = world.record(&volume).unwrap();
            let content = fs::read_link(volume.target.join("..data")).unwrap();
            (record.last_change, record.orders, content, status())
        };
        let before = state();
        let mut made = Vec::new();
        for path in ["web.kye", "deep/er", "d/pww"] {
            let path = volume.target.join(path);
            fs::create_dir_all(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o750)).unwrap();
            made.push((path.clone(), fs::metadata(&path).unwrap().ino()));
            for _ in 0..3 {
                let success = world.record(&volume).unwrap().last_success;
                world.publish_patiently(&volume).await.unwrap();
                let record = world.record(&volume).unwrap();
                assert!(record.last_success > success, "not refreshed");
                assert_eq!(state(), before, "{path:?}");
            }
        }
        let is_there = |(path, inode): &(std::path::PathBuf, u64)| {
            fs::metadata(path).is_ok_and(|now| now.ino() == *inode)
        };
        assert!(made.iter().all(is_there), "{made:?}");
        // A provider that answers without files is not taken for one that wrote these itself.
        world.provider.answers(&volume.class, Answer::default());
        let refused = world.publish_patiently(&volume).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        assert_eq!(volume.reads()["web.key"], "one");
        answers("one");
        world.publish_patiently(&volume).await.unwrap();
        assert_eq!(state(), before);

        // New content is told, and those beside it stay.
        answers("two");
        world.publish_patiently(&volume).await.unwrap();
        assert_eq!(volume.reads()["web.key"], "two");
        assert!(made[..2].iter().all(is_there), "{made:?}");
        let after = state();
        assert!(after.0 > before.0 && after.2 != before.2);
        assert_ne!(after.3, before.3);
        let told = |reason| world.api.events_of(&volume, reason);
        let started = Instant::now();
        while told("MountContentChanged") == 0 || told("MountSubPathNotRefreshed") == 0 {
            assert!(started.elapsed() < SOON, "{:#?}", world.api.events());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Events wait for their turn, so that earlier ones would be there by now.
        assert_eq!(told("MountContentChanged"), 1);

        // A file of the directory's name appears.
        let answer = Answer::file("web.kye", "three");
        world.provider.answers(&volume.class, answer);
        world.publish_patiently(&volume).await.unwrap();
        assert_eq!(volume.reads()["web.kye"], "three");
    });
}
