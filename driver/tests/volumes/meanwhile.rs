//! What a provider does to the target while it is asked: content comes into the driver's own
//! tmpfs or nowhere, and what is not the driver's keeps its files.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use driver::mount::State;

use crate::harness::{Act, Answer, EAGER, Volume, World, alone, block_on, is_final};

/// The content that must not come to lie outside.
const SECRET: &str = "the-new-content";
/// The content before.
const FORMER: &str = "the-former-content";

/// When the provider does it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    FirstPublish,
    /// The content of now was written by the driver, or by the provider itself.
    Refresh {
        of_driver: bool,
    },
}

/// What the provider does after it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    AnswersFiles,
    AnswersSameFiles,
    WritesFiles,
    Nothing,
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

/// Every file below a directory, without following links.
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

/// A directory of the host with files that look like anything, a volume's own names included.
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
        let first = match of_driver {
            true => Then::AnswersFiles,
            false => Then::WritesFiles,
        };
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
        // The provider has written this itself.
        kept.insert(host.join("pw"), SECRET.to_owned());
    }
    assert_eq!(tree(&host), kept, "{case}: {status}");
    let message = status.message();
    let target = volume.target.to_str().unwrap();
    assert!(message.contains(target), "{case}: {status}");
    assert!(
        message.contains("while the provider was asked"),
        "{case}: {status}"
    );
    let now = tree(&volume.target);
    match when {
        When::FirstPublish => {
            assert_eq!(volume.state(), State::Absent, "{case}");
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
            // The provider behaves again: what lies on top stays refused, what was taken off is
            // mounted again.
            let well = answer(Then::AnswersFiles, SECRET);
            world.provider.answers(&volume.class, well);
            let again = world.publish_patiently(&volume).await;
            assert_eq!(again.is_err(), on_top, "{case}: {again:?}");
            if on_top {
                assert_eq!(tree(&volume.target), now, "{case}");
                assert!(!is_final(again.unwrap_err().code()), "{case}");
            } else {
                assert_eq!(volume.state(), State::Mounted, "{case}");
                assert_eq!(volume.reads()["pw"], SECRET, "{case}");
            }
        }
    }
    world.unpublish(&volume).await.expect(&case);
    assert_eq!(volume.state(), State::Absent, "{case}");
    assert!(!world.record_file(&volume).exists(), "{case}");
    assert_eq!(tree(&host), kept, "{case}");
}

#[test]
fn content_comes_into_the_volume_that_was_there_before_the_call_or_nowhere() {
    if !alone("meanwhile::content_comes_into_the_volume_that_was_there_before_the_call_or_nowhere")
    {
        return;
    }
    block_on(async {
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

/// Names that start with two dots are no content, unless they lead to some.
#[test]
fn a_volume_in_which_a_pod_sees_nothing_is_refused() {
    if !alone("meanwhile::a_volume_in_which_a_pod_sees_nothing_is_refused") {
        return;
    }
    block_on(async {
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
                assert_eq!(volume.state(), State::Absent, "{act:?}");
                world.unpublish(&volume).await.unwrap();
            }
        }
    });
}
