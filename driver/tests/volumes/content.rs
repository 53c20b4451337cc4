//! Checks that the record tells who wrote the content of a volume, whatever the provider does next,
//! and that no pod status names objects that are not there.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use driver::record::Writer;
use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, TestRunner},
};

use crate::harness::{Answer, EAGER, World, alone};

/// The action of a provider that is asked.
#[derive(Debug, Clone)]
enum Does {
    /// It answers with files.
    Answers(u8),
    /// It writes a file itself and answers without files.
    Writes(u8),
    /// It answers without files and writes none.
    Nothing,
    /// It answers with files and writes one itself.
    Both(u8),
}

#[derive(Debug, Clone)]
struct Step {
    does: Does,
    /// Whether the volume is emptied before.
    emptied: bool,
    /// Whether the object has another version than before.
    new_version: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let does = prop_oneof![
        (0..3_u8).prop_map(Does::Answers),
        (0..3_u8).prop_map(Does::Writes),
        Just(Does::Nothing),
        (0..3_u8).prop_map(Does::Both),
    ];
    let step = (does, prop::bool::weighted(0.1), any::<bool>()).prop_map(
        |(does, emptied, new_version)| Step {
            does,
            emptied,
            new_version,
        },
    );
    prop::collection::vec(step, 1..10)
}

fn file(name: &str, number: u8) -> (String, Vec<u8>) {
    (format!("{name}-{number}"), vec![b'x'; usize::from(number)])
}

#[test]
fn the_record_says_who_wrote_the_content_and_no_status_claims_what_is_not_there() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let mut runner = TestRunner::new(Config::with_cases(120));
        let mut seen = [0; 4];
        for _ in 0..runner.config().cases {
            let steps = steps().new_tree(&mut runner).unwrap().current();
            let volume = world.volume_of_its_own();
            let mut wrote: Option<Writer> = None;
            let mut version = 0;
            for (number, step) in steps.iter().enumerate() {
                if step.emptied && volume.target.is_dir() {
                    for entry in fs::read_dir(&volume.target).unwrap() {
                        let path = entry.unwrap().path();
                        if fs::symlink_metadata(&path).unwrap().is_dir() {
                            fs::remove_dir_all(path).unwrap();
                        } else {
                            fs::remove_file(path).unwrap();
                        }
                    }
                }
                version += usize::from(step.new_version);
                let mut answer = Answer {
                    version: Some(version.to_string()),
                    ..Answer::default()
                };
                match step.does {
                    Does::Answers(number) => answer.files.push(file("driver", number)),
                    Does::Writes(number) => answer.writes.push(file("provider", number)),
                    Does::Nothing => {}
                    Does::Both(number) => {
                        answer.files.push(file("driver", number));
                        answer.writes.push(file("provider", number));
                    }
                }
                let strangers = volume
                    .reads()
                    .keys()
                    .any(|name| name.starts_with("provider"));
                let expected = match step.does {
                    Does::Answers(_) | Does::Both(_) => Some(Writer::Driver),
                    Does::Writes(_) => Some(Writer::Provider),
                    Does::Nothing if strangers && wrote != Some(Writer::Driver) => {
                        Some(Writer::Provider)
                    }
                    Does::Nothing => None,
                };
                let before = (world.record(&volume), world.api.status_of(&volume));
                world.provider.answers(&volume.class, answer);
                let published = world.publish_patiently(&volume).await;
                let case = format!("step {number} of {steps:?}: {published:?}");
                let Some(expected) = expected else {
                    assert!(published.is_err(), "nothing is there: {case}");
                    if let Some(before) = before.0 {
                        let after = world.record(&volume).unwrap();
                        assert_eq!(after.objects, before.objects, "{case}");
                        assert_eq!(after.writer, before.writer, "{case}");
                    }
                    assert_eq!(world.api.status_of(&volume), before.1, "{case}");
                    seen[0] += 1;
                    continue;
                };
                assert!(published.is_ok(), "{case}");
                let record = world.record(&volume).unwrap();
                assert_eq!(record.writer, expected, "{case}");
                assert_eq!(record.objects[0].version, version.to_string(), "{case}");
                let status = world.api.status_of(&volume).unwrap();
                assert_eq!(status[0].1, version.to_string(), "{case}");
                let reads = volume.reads();
                let ours = reads.keys().all(|name| name.starts_with("driver"));
                let theirs = reads.keys().all(|name| name.starts_with("provider"));
                match expected {
                    Writer::Driver => assert!(ours && reads.len() == 1, "{reads:?}: {case}"),
                    Writer::Provider => assert!(theirs && !reads.is_empty(), "{reads:?}: {case}"),
                }
                seen[match (wrote, expected) {
                    (Some(Writer::Provider), Writer::Driver) => 1,
                    (Some(Writer::Driver), Writer::Provider) => 2,
                    _ => 3,
                }] += 1;
                wrote = Some(expected);
            }
            world.unpublish(&volume).await.unwrap();
        }
        assert!(seen.iter().all(|&times| times > 20), "{seen:?}");
    });
}

/// A provider that copies the permission of the request into a file has not chosen a mode.
#[test]
fn a_default_mode_is_for_every_file_without_a_mode_of_its_own() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let mut runner = TestRunner::new(Config::with_cases(60));
        let chosen = prop_oneof![
            2 => Just(None),
            1 => Just(Some(0)),
            3 => (1..0o777_i32).prop_map(Some),
            1 => Just(Some(0o100_644)),
            1 => Just(Some(0o4755)),
        ];
        let default = proptest::option::of(1..=0o777_u32);
        for _ in 0..runner.config().cases {
            let volume = world.volume_of_its_own();
            // The first content, and a replacement.
            for text in ["one", "two"] {
                let (mode, default) = (chosen.clone(), default.clone())
                    .new_tree(&mut runner)
                    .unwrap()
                    .current();
                let answer = Answer {
                    mode,
                    ..Answer::file("pw", text)
                };
                world.provider.answers(&volume.class, answer);
                let mut request = volume.request();
                if let Some(default) = default {
                    let name = "secrets-store.csi.k8s.io/default-mode".to_owned();
                    request.volume_context.insert(name, format!("{default:o}"));
                }
                world.publish(request).await.unwrap();
                let expected = match mode {
                    None | Some(0 | 0o644) => default.unwrap_or(0o644),
                    Some(mode) => mode.cast_unsigned() & 0o777,
                };
                let metadata = fs::metadata(volume.target.join("pw")).unwrap();
                let found = metadata.permissions().mode() & 0o7777;
                assert_eq!(found, expected, "{mode:?} {default:?}");
            }
            world.unpublish(&volume).await.unwrap();
        }
    });
}

/// The content is, for example, the whole answer of a store, with the ID of the request in it.
#[test]
fn content_that_never_stays_the_same_is_told_once() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let (restless, steady) = (world.volume_of_its_own(), world.volume_of_its_own());
        for number in 0..20 {
            let text = format!("request {number}");
            let answer = Answer::file("pw", &text);
            world.provider.answers(&restless.class, answer);
            world.publish_patiently(&restless).await.unwrap();
            world.publish_patiently(&steady).await.unwrap();
        }
        let told = || {
            let events = world.api.events().into_iter();
            let told = events.filter(|event| event["reason"] == "MountChangesAtEachRefresh");
            let pods = told.map(|event| {
                let object = ["regarding", "involvedObject"].map(|key| &event[key]["name"]);
                object
                    .into_iter()
                    .find_map(|name| name.as_str())
                    .unwrap()
                    .to_owned()
            });
            pods.collect::<Vec<_>>()
        };
        while told().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert_eq!(told(), [restless.id.as_str()]);
    });
}

/// Of files that a provider writes one after the other, some are no content: neither for a driver that starts
/// meanwhile, nor for the Secrets.
#[test]
fn a_mount_without_content_is_unfinished_until_the_provider_has_written_all() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let volume = world.volume_of_its_own();
        let written = Answer {
            writes: ["a", "b"]
                .map(|name| (name.to_owned(), b"x".to_vec()))
                .into(),
            version: Some("1".to_owned()),
            ..Answer::default()
        };
        world.provider.answers(&volume.class, written.clone());
        world.publish_patiently(&volume).await.unwrap();
        let reads = volume.reads();
        // A crash between mount and mark leaves the same.
        for name in ["a", "b"] {
            fs::remove_file(volume.target.join(name)).unwrap();
        }
        let hangs = Answer {
            hangs: true,
            ..Answer::default()
        };
        world.provider.answers(&volume.class, hangs);
        let mark = volume.target.join("..unfinished");
        let seen = async {
            while world.provider.waits() == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            mark.exists()
        };
        let (published, is_marked) = tokio::join!(world.publish(volume.request()), seen);
        assert!(published.is_err() && is_marked);
        world.provider.answers(&volume.class, written);
        world.publish_patiently(&volume).await.unwrap();
        assert!(!mark.exists());
        assert_eq!(volume.reads(), reads);
    });
}
