//! Checks the directory of records on a full or read-only disk, and with unreadable records.

use std::{fs, io::Write as _, os::unix::fs::PermissionsExt as _, path::Path};

use driver::mount::TargetState;
use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, TestRunner},
};
use serde_json::{Value, json};

use crate::harness::{Answer, Class, EAGER, Volume, World, alone, class, read_only, tmpfs};

/// Starts a node whose records are on a disk of their own.
async fn with_disk(flags: &[&str], options: &str) -> World {
    let mut world = World::start(flags).await;
    world.stop_driver().await;
    tmpfs(&world.state_dir(), options);
    world.start_driver().await;
    world
}

#[test]
fn a_pod_goes_although_its_record_cannot() {
    alone(async { goes_without_record(false).await });
}

#[test]
fn a_pod_goes_although_its_record_cannot_and_the_driver_starts_again() {
    alone(async { goes_without_record(true).await });
}

/// A pod goes although its record cannot. That goes with the next record that changes, or when the driver starts.
async fn goes_without_record(restarts: bool) {
    let mut world = with_disk(&EAGER, "size=1m").await;
    let volumes: Vec<Volume> = (0..5).map(|_| world.volume_of_its_own()).collect();
    for volume in &volumes {
        world.publish_patiently(volume).await.unwrap();
    }
    read_only(&world.state_dir(), true);
    for volume in &volumes {
        world.unpublish(volume).await.unwrap();
        assert_eq!(volume.state(), TargetState::Absent);
        assert!(world.record_file(volume).exists());
        world.unpublish(volume).await.unwrap();
    }
    if restarts {
        for volume in &volumes[1..] {
            fs::remove_dir_all(volume.target.parent().unwrap()).unwrap();
        }
        world.stop_driver().await;
        read_only(&world.state_dir(), false);
        world.start_driver().await;
        world.client().await;
    } else {
        read_only(&world.state_dir(), false);
    }
    // The volume can be published again once the disk is writable.
    let there = |world: &World| {
        let files = volumes.iter().map(|volume| world.record_file(volume));
        files.map(|file| file.exists()).collect::<Vec<_>>()
    };
    for _ in 0..2 {
        world.publish_patiently(&volumes[0]).await.unwrap();
        assert_eq!(volumes[0].reads()["pw"], "one");
        assert_eq!(there(&world), [true, false, false, false, false]);
    }
    world.unpublish(&volumes[0]).await.unwrap();
    assert_eq!(there(&world), [false; 5]);
}

/// Somebody removes the directory of records while the driver runs, at any point of a volume's life.
#[test]
fn a_directory_that_somebody_removes() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let volumes: Vec<Volume> = (0..3).map(|_| world.volume_of_its_own()).collect();
        world.publish_patiently(&volumes[0]).await.unwrap();
        world.publish_patiently(&volumes[1]).await.unwrap();
        fs::remove_dir_all(world.state_dir()).unwrap();
        world.unpublish(&volumes[0]).await.unwrap();
        // One that is new, and one whose record was there.
        for volume in &volumes[1..] {
            world.publish_patiently(volume).await.unwrap();
            assert_eq!(volume.reads()["pw"], "one");
            assert!(world.record_file(volume).exists());
        }
        let mode = fs::metadata(world.state_dir()).unwrap().permissions();
        assert_eq!(mode.mode() & 0o7777, 0o700);
        fs::remove_dir_all(world.state_dir()).unwrap();
        for volume in &volumes {
            world.unpublish(volume).await.unwrap();
            assert_eq!(volume.state(), TargetState::Absent);
        }
    });
}

/// Fills a disk up to this many free bytes.
fn fill(disk: &Path, free: usize) {
    let mut file = fs::File::create(disk.join("fill")).unwrap();
    let page = [0_u8; 4096];
    while file.write_all(&page).is_ok() {}
    let length = file.metadata().unwrap().len();
    file.set_len(length.saturating_sub(free as u64)).unwrap();
}

const SECRET: &str = "/api/v1/namespaces/shop/secrets/creds";

/// Returns a class with a Secret.
fn synced(name: &str) -> Value {
    let mut object = class(name, 1);
    object["spec"]["secretObjects"] = json!([{
        "secretName": "creds", "type": "Opaque", "data": [{"objectName": "pw", "key": "pw"}],
    }]);
    object
}

/// On a full disk a publish is either refused before anything has changed, or done as a whole: files,
/// Secret and pod status agree.
#[test]
fn a_full_disk_changes_all_or_nothing() {
    alone(async {
        let mut world = with_disk(&EAGER, "size=256k").await;
        let mut runner = TestRunner::new(Config::with_cases(40));
        let free = prop_oneof![Just(0_usize), 0..40_000_usize];
        let text = 1..12_000_usize;
        let (mut done, mut refused) = (0, 0);
        for _ in 0..runner.config().cases {
            let (free, long, first) = (free.clone(), text.clone(), any::<bool>())
                .new_tree(&mut runner)
                .unwrap()
                .current();
            let volume = world.volume_of_its_own();
            world
                .api
                .class_is(&volume.class, [Class::Is(synced(&volume.class))]);
            world.api.put(
                &format!("/api/v1/namespaces/shop/pods/{}", volume.id),
                json!({"metadata": {"name": volume.id, "uid": volume.uid, "ownerReferences": [
                    {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs", "controller": true},
                ]}, "status": {"phase": "Pending"}}),
            );
            let secret = |world: &World| {
                let secret = world.api.get(SECRET);
                secret.map(|secret| secret["data"]["pw"].clone())
            };
            if !first {
                world.publish_patiently(&volume).await.unwrap();
            }
            let before = (volume.reads(), secret(&world), world.api.status_of(&volume));
            assert_eq!(before.1.is_some(), !first);
            fill(&world.state_dir(), free);
            // A long version makes a long record.
            let new = Answer {
                version: Some("v".repeat(long)),
                ..Answer::file("pw", "two")
            };
            world.provider.answers(&volume.class, new);
            let published = world.publish_patiently(&volume).await;
            let after = (volume.reads(), secret(&world), world.api.status_of(&volume));
            match &published {
                Ok(()) => {
                    assert_eq!(after.0["pw"], "two");
                    assert_eq!(after.1, Some("dHdv".into()));
                    done += 1;
                }
                Err(status) => {
                    assert_eq!(after, before, "{status}");
                    assert!(status.message().contains("record"), "{status}");
                    assert_eq!(status.code(), tonic::Code::ResourceExhausted);
                    refused += 1;
                }
            }
            if first && published.is_err() {
                assert_eq!(volume.state(), TargetState::Absent);
                assert!(!world.record_file(&volume).exists());
            }
            fs::remove_file(world.state_dir().join("fill")).unwrap();
            world.publish_patiently(&volume).await.unwrap();
            assert_eq!(volume.reads()["pw"], "two");
            assert_eq!(secret(&world), Some("dHdv".into()));
            world.unpublish(&volume).await.unwrap();
            world.api.remove(SECRET);
            let left = fs::read_dir(world.state_dir()).unwrap().count();
            assert_eq!(left, 0, "nothing is left of it");
        }
        assert!(done > 3 && refused > 3, "{done} done, {refused} refused");
    });
}

/// An unreadable record of a mounted volume is replaced, and the volume is filled in place.
#[test]
fn a_live_volume_without_a_readable_record_is_filled_in_place() {
    alone(async {
        let mut world = World::start(&[]).await;
        let spoil: [fn(&Path); 6] = [
            |at| fs::write(at, "").unwrap(),
            |at| fs::write(at, &fs::read(at).unwrap()[..40]).unwrap(),
            |at| {
                let text = fs::read_to_string(at).unwrap();
                fs::write(at, text.replace("\"format\":1", "\"format\":7")).unwrap();
            },
            |at| {
                fs::File::options()
                    .write(true)
                    .open(at)
                    .unwrap()
                    .set_len(1 << 40)
                    .unwrap()
            },
            |at| {
                fs::remove_file(at).unwrap();
                fs::create_dir_all(at.join("x/y")).unwrap();
            },
            |at| {
                fs::remove_file(at).unwrap();
                nix::unistd::mkfifo(at, nix::sys::stat::Mode::S_IRWXU).unwrap();
            },
        ];
        for (number, spoil) in spoil.into_iter().enumerate() {
            let volume = world.volume_of_its_own();
            world.publish_patiently(&volume).await.unwrap();
            let held = volume.device();
            spoil(&world.record_file(&volume));
            fs::create_dir(world.state_dir().join(format!("{}.tmp", volume.id))).unwrap();
            world.publish_patiently(&volume).await.unwrap();
            assert_eq!(volume.device(), held, "{number}");
            assert_eq!(volume.reads()["pw"], "one", "{number}");
            assert!(world.record(&volume).is_some(), "{number}");
            world.provider.asked();
            world.publish_patiently(&volume).await.unwrap();
            assert_eq!(world.provider.asked(), Vec::<Value>::new(), "{number}");
            spoil(&world.record_file(&volume));
            world.unpublish(&volume).await.unwrap();
            assert!(!world.record_file(&volume).exists(), "{number}");
        }
    });
}

/// A record with values that kubelet and the API cannot have is removed at the start, and its volume
/// is published again in place.
#[test]
fn a_record_of_what_cannot_be_is_none() {
    alone(async {
        let mut world = World::start(&[]).await;
        let elsewhere = world.dir.path().join("elsewhere");
        let rows = [
            ("/targetPath", "/etc".to_owned(), false),
            ("/targetPath", "mount".to_owned(), false),
            (
                "/targetPath",
                "/pods/UID/volumes/kubernetes.io~csi/v/mount".to_owned(),
                false,
            ),
            (
                "/targetPath",
                format!(
                    "{}/pods/UID/volumes/kubernetes.io~csi/v/mount",
                    elsewhere.display()
                ),
                false,
            ),
            ("/pod/uid", "another".to_owned(), false),
            ("/pod/name", "../../x".to_owned(), false),
            ("/pod/namespace", "a/b".to_owned(), false),
            ("/class/name", "..".to_owned(), false),
            ("/podStatus", "x?y".to_owned(), false),
            ("/provider", "another".to_owned(), true),
        ];
        let mut volumes = Vec::new();
        for (place, value, stays) in rows {
            let volume = world.volume_of_its_own();
            world.publish_patiently(&volume).await.expect(place);
            volumes.push((volume, place, value, stays));
        }
        world.stop_driver().await;
        for (volume, place, value, _) in &volumes {
            // A target with the form of kubelet's paths exists.
            let value = value.replace("UID", &volume.uid);
            if value.starts_with(elsewhere.to_str().unwrap()) {
                fs::create_dir_all(Path::new(&value).parent().unwrap()).unwrap();
            }
            let file = world.record_file(volume);
            let mut record: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
            *record.pointer_mut(place).unwrap() = json!(value);
            fs::write(&file, record.to_string()).unwrap();
        }
        world.start_driver().await;
        drop(world.client().await);
        for (volume, place, value, stays) in &volumes {
            let is_there = world.record_file(volume).exists();
            assert_eq!(is_there, *stays, "{place} {value}");
            let device = volume.device();
            world.publish_patiently(volume).await.expect(place);
            assert_eq!(volume.device(), device, "{place} {value}");
            assert_eq!(volume.reads()["pw"], "one", "{place} {value}");
            assert!(world.record(volume).is_some(), "{place} {value}");
        }
        world.stop_driver().await;
    });
}
