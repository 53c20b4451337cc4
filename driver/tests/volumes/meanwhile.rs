//! Checks providers that change the target during a call: the driver writes content only into its own
//! tmpfs, and other file systems keep their files.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use driver::mount::TargetState;
use serde_json::json;

use crate::{
    acts::{Act, make_device},
    harness::{Answer, Class, EAGER, Volume, World, alone, class, is_final},
};

/// The content that must not be written outside of the volume.
const SECRET: &str = "the-new-content";
/// The content before.
const FORMER: &str = "the-former-content";

/// The publish during which the provider acts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    FirstPublish,
    Refresh {
        /// Whether the driver wrote the present content, and not the provider.
        of_driver: bool,
    },
}

/// The action of the provider after that.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    AnswersFiles,
    AnswersSameFiles,
    WritesFiles,
    Nothing,
}

/// Returns the action after which the driver, or else the provider, has written the content.
fn writer(of_driver: bool) -> Then {
    if of_driver {
        Then::AnswersFiles
    } else {
        Then::WritesFiles
    }
}

fn answer(then: Then, text: &str) -> Answer {
    let file = ("pw".to_owned(), text.as_bytes().to_vec());
    let (files, writes) = match then {
        Then::AnswersFiles | Then::AnswersSameFiles => (vec![file], Vec::new()),
        Then::WritesFiles => (Vec::new(), vec![file]),
        Then::Nothing => (Vec::new(), Vec::new()),
    };
    Answer {
        files,
        writes,
        version: Some(text.to_owned()),
        ..Answer::default()
    }
}

/// Returns every file below a directory, without following links.
fn tree(directory: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let Ok(entries) = fs::read_dir(directory) else {
        return found;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            found.insert(path.clone(), String::new());
            found.extend(tree(&path));
        } else if metadata.is_file() {
            let text = fs::read_to_string(&path).unwrap();
            found.insert(path, text);
        } else {
            found.insert(path, "neither".to_owned());
        }
    }
    found
}

/// Creates a directory of the host with files of various names, also those of a volume.
fn host_directory(world: &World, volume: &Volume) -> PathBuf {
    let host = world.dir.path().join(format!("host-{}", volume.id));
    for directory in ["deep/deeper", "..2020_01_01_00_00_00.1", "..aside"] {
        fs::create_dir_all(host.join(directory)).unwrap();
    }
    for file in [
        "kept",
        "deep/deeper/kept",
        "..2020_01_01_00_00_00.1/kept",
        "..aside/kept",
        "..link_tmp",
    ] {
        fs::write(host.join(file), "of the host").unwrap();
    }
    std::os::unix::fs::symlink("..2020_01_01_00_00_00.1", host.join("..data")).unwrap();
    host
}

async fn run(world: &mut World, act: &str, when: When, then: Then) {
    let case = format!("{act}, {when:?}, {then:?}");
    let volume = world.volume_of_its_own();
    let host = host_directory(world, &volume);
    let act = match act {
        "bind" => Act::Binds(host.clone()),
        "tmpfs" => Act::MountsTmpfs,
        "umount" => Act::Unmounts,
        "umount and write" => Act::UnmountsAndWrites,
        other => unreachable!("{other}"),
    };
    let on_top = matches!(act, Act::Binds(_) | Act::MountsTmpfs);
    if let When::Refresh { of_driver } = when {
        let first = writer(of_driver);
        world.provider.answers(&volume.class, answer(first, FORMER));
        world.publish_patiently(&volume).await.expect(&case);
    }
    let text = match (then, when) {
        (Then::AnswersSameFiles, When::Refresh { .. }) => FORMER,
        _ => SECRET,
    };
    let before = (
        world.record(&volume).map(|record| record.objects),
        world.api.status_of(&volume),
    );
    let mut kept = tree(&host);
    let evil = Answer {
        act: Some(act.clone()),
        ..answer(then, text)
    };
    world.provider.answers(&volume.class, evil);
    let status = match world.publish_patiently(&volume).await {
        Err(status) => status,
        Ok(()) => panic!("nothing that a pod sees is the driver's, and it says OK: {case}"),
    };
    if matches!(act, Act::Binds(_)) && then == Then::WritesFiles {
        // The provider itself has written this file.
        kept.insert(host.join("pw"), SECRET.to_owned());
    }
    assert_eq!(tree(&host), kept, "{case}: {status}");
    let message = status.message();
    let target = volume.target.to_str().unwrap();
    assert!(message.contains(target), "{case}: {status}");
    assert!(
        message.contains("while the provider was called"),
        "{case}: {status}"
    );
    let now = tree(&volume.target);
    match when {
        When::FirstPublish => {
            assert_eq!(volume.state(), TargetState::Absent, "{case}");
            assert!(!world.record_file(&volume).exists(), "{case}");
            assert_eq!(world.api.status_of(&volume), None, "{case}");
        }
        When::Refresh { .. } => {
            assert!(!is_final(status.code()), "{case}: {status}");
            let after = (
                world.record(&volume).map(|record| record.objects),
                world.api.status_of(&volume),
            );
            assert_eq!(after, before, "{case}");
            let written = now.values().any(|found| found == SECRET);
            assert!(!written || then == Then::WritesFiles, "{case}: {now:?}");
            // Once the provider behaves, a mount on top is still refused, and a volume that was
            // unmounted is mounted again.
            let well = answer(Then::AnswersFiles, SECRET);
            world.provider.answers(&volume.class, well);
            let again = world.publish_patiently(&volume).await;
            assert_eq!(again.is_err(), on_top, "{case}: {again:?}");
            if on_top {
                assert_eq!(tree(&volume.target), now, "{case}");
                assert!(!is_final(again.unwrap_err().code()), "{case}");
            } else {
                assert_eq!(volume.state(), TargetState::Mounted, "{case}");
                assert_eq!(volume.reads()["pw"], SECRET, "{case}");
            }
        }
    }
    world.unpublish(&volume).await.expect(&case);
    assert_eq!(volume.state(), TargetState::Absent, "{case}");
    assert!(!world.record_file(&volume).exists(), "{case}");
    assert_eq!(tree(&host), kept, "{case}");
}

#[test]
fn content_comes_into_the_volume_that_was_there_before_the_call_or_nowhere() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let whens = [
            When::FirstPublish,
            When::Refresh { of_driver: true },
            When::Refresh { of_driver: false },
        ];
        let thens = [
            Then::AnswersFiles,
            Then::AnswersSameFiles,
            Then::WritesFiles,
            Then::Nothing,
        ];
        for act in ["bind", "tmpfs", "umount", "umount and write"] {
            for when in whens {
                for then in thens {
                    run(&mut world, act, when, then).await;
                }
            }
        }
    });
}

/// Names that start with two dots are not content unless they lead to content.
#[test]
fn a_volume_in_which_a_pod_sees_nothing_is_refused() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        for name in ["..data", "..x", "..2026_01_01_00_00_00.1", "..."] {
            for act in [
                Act::MakesPipe(name),
                Act::MakesDirectory(name),
                Act::MakesLink(name, "nowhere"),
                Act::MakesLink(name, "..nowhere"),
                Act::MakesLink(name, "/"),
                Act::MakesLink(name, ".."),
            ] {
                let volume = world.volume_of_its_own();
                let evil = Answer {
                    act: Some(act.clone()),
                    ..answer(Then::Nothing, "x")
                };
                world.provider.answers(&volume.class, evil);
                let status = world
                    .publish_patiently(&volume)
                    .await
                    .expect_err(&format!("{act:?}"));
                assert!(status.message().contains("empty"), "{act:?}: {status}");
                assert_eq!(volume.state(), TargetState::Absent, "{act:?}");
                world.unpublish(&volume).await.unwrap();
            }
        }
    });
}

/// The write at which another program acts, between the content and the record.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Between {
    PodStatus,
    Secret,
    PodStatusOfARefresh,
}

async fn come_between(world: &mut World, act: &str, between: Between, of_driver: bool) {
    let case = format!("{act}, {between:?}, of the driver: {of_driver}");
    let volume = world.volume_of_its_own();
    let mut object = class(&volume.class, 1);
    let secret = format!("secret-of-{}", volume.class);
    object["spec"]["secretObjects"] = json!([{"secretName": secret, "type": "Opaque",
        "data": [{"objectName": "pw", "key": "pw"}]}]);
    world.api.class_is(&volume.class, [Class::Is(object)]);
    let pod = json!({
        "metadata": {"name": volume.id, "uid": volume.uid, "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs", "uid": "rs", "controller": true},
        ]},
        "status": {"phase": "Running"},
    });
    let path = format!("/api/v1/namespaces/shop/pods/{}", volume.id);
    world.api.put(&path, pod);
    let then = writer(of_driver);
    if between == Between::PodStatusOfARefresh {
        world.provider.answers(&volume.class, answer(then, FORMER));
        world.publish_patiently(&volume).await.expect(&case);
    }
    world.provider.answers(&volume.class, answer(then, SECRET));
    let host = host_directory(world, &volume);
    let kept = tree(&host);
    let act = match act {
        "bind" => Act::Binds(host.clone()),
        "tmpfs" => Act::MountsTmpfs,
        "volume" => Act::MountsVolume("pw", "foreign"),
        "umount" => Act::Unmounts,
        other => unreachable!("{other}"),
    };
    let at = match between {
        Between::Secret => secret.clone(),
        Between::PodStatus | Between::PodStatusOfARefresh => volume.class.clone(),
    };
    world.api.act_at(&at, act, &volume.target);
    let before = world.record(&volume).map(|record| record.objects);
    let status = match world.publish_patiently(&volume).await {
        Err(status) => status,
        Ok(()) => panic!("nothing that a pod sees is the driver's, and it says OK: {case}"),
    };
    assert!(!world.api.is_to_act_at(&at), "{case}");
    let target = volume.target.to_str().unwrap();
    assert!(status.message().contains(target), "{case}: {status}");
    let after = world.record(&volume).map(|record| record.objects);
    assert_eq!(after, before, "{case}");
    let made = world
        .api
        .get(&format!("/api/v1/namespaces/shop/secrets/{secret}"));
    let value = made.map(|made| made["data"]["pw"].clone());
    let encoded = |text: &str| json!(STANDARD.encode(text));
    let expected = match between {
        Between::PodStatus => None,
        Between::Secret => Some(encoded(SECRET)),
        Between::PodStatusOfARefresh => Some(encoded(FORMER)),
    };
    assert_eq!(value, expected, "{case}");
    if between != Between::PodStatusOfARefresh {
        assert_eq!(volume.state(), TargetState::Absent, "{case}");
        assert_eq!(world.api.status_of(&volume), None, "{case}");
    }
    assert_eq!(tree(&host), kept, "{case}");
    world.unpublish(&volume).await.expect(&case);
    assert_eq!(tree(&host), kept, "{case}");
}

/// A mount that another program makes at the target between the content and the record is not
/// recorded as the volume, and not read for a Secret.
#[test]
fn what_is_mounted_before_the_record_is_written_is_no_volume() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        for act in ["bind", "tmpfs", "volume", "umount"] {
            for between in [
                Between::PodStatus,
                Between::Secret,
                Between::PodStatusOfARefresh,
            ] {
                for of_driver in [true, false] {
                    come_between(&mut world, act, between, of_driver).await;
                }
            }
        }
    });
}

/// The error for an unusual volume names the path and what to do. A failed first publish leaves
/// nothing, and a failed refresh leaves the content.
#[test]
fn odd_things_that_a_provider_does_are_named() {
    alone(async {
        // The limit makes volumes small.
        let flags: Vec<&str> = EAGER
            .into_iter()
            .chain(["--max-call-recv-msg-size=65536"])
            .collect();
        let mut world = World::start(&flags).await;
        let first = When::FirstPublish;
        let files = Then::AnswersFiles;
        // Only root outside of the namespace can make devices.
        let makes_devices = make_device(&world.dir.path().join("device")).is_ok();
        let refreshes = [true, false].map(|of_driver| When::Refresh { of_driver });
        let mut rows = vec![(
            Act::MountsBelow("..data"),
            first,
            files,
            "..data",
            "Unmount",
        )];
        for when in [first, refreshes[0], refreshes[1]] {
            rows.push((Act::MountsBelow("other"), when, files, "other", "Unmount"));
            rows.push((
                Act::MountsBelow("..aside"),
                when,
                files,
                "..aside",
                "Unmount",
            ));
            rows.push((Act::MakesReadOnly, when, files, "", "mount -o remount,rw"));
            rows.push((
                Act::Fills("large"),
                when,
                files,
                "",
                "something else fills the volume",
            ));
            if makes_devices {
                let writes = Then::WritesFiles;
                rows.push((
                    Act::MakesDevice("odd"),
                    when,
                    writes,
                    "odd",
                    "made a device",
                ));
            }
        }
        for (act, when, then, path, help) in rows {
            let case = format!("{act:?}, {when:?}, {then:?}");
            let volume = world.volume_of_its_own();
            if let When::Refresh { of_driver } = when {
                let before = writer(of_driver);
                world
                    .provider
                    .answers(&volume.class, answer(before, FORMER));
                world.publish_patiently(&volume).await.expect(&case);
            }
            let odd = Answer {
                act: Some(act.clone()),
                ..answer(then, SECRET)
            };
            world.provider.answers(&volume.class, odd);
            // What is beside new content is no reason to take it back, and is told at the next look.
            let is_beside = matches!(
                (&act, when),
                (Act::MountsBelow("other"), When::Refresh { of_driver: true })
            );
            if is_beside {
                world.publish_patiently(&volume).await.expect(&case);
                world.provider.answers(&volume.class, answer(then, SECRET));
            }
            let status = match world.publish_patiently(&volume).await {
                Err(status) => status,
                Ok(()) => panic!("it says OK: {case}"),
            };
            let message = status.message();
            let target = volume.target.to_str().unwrap();
            for part in [target, path, help] {
                assert!(message.contains(part), "{case}: {message}");
            }
            assert!(
                !message.contains("max-call-recv-msg-size"),
                "{case}: {message}"
            );
            match when {
                When::FirstPublish => assert_eq!(volume.state(), TargetState::Absent, "{case}"),
                When::Refresh { .. } if then == Then::AnswersFiles => {
                    assert!(!is_final(status.code()), "{case}: {status}");
                    let expected = if is_beside { SECRET } else { FORMER };
                    assert_eq!(volume.reads()["pw"], expected, "{case}");
                }
                When::Refresh { .. } => assert!(!is_final(status.code()), "{case}: {status}"),
            }
            world.unpublish(&volume).await.expect(&case);
        }
    });
}
