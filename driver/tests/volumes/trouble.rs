//! Checks what a pod and its pod status are told while something lasts: refreshes that fail, and
//! content that changes.

use std::time::{Duration, Instant};

use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, TestRunner},
};
use serde_json::{Value, json};
use tonic::Code;

use crate::{
    events::pass,
    harness::{Answer, Class, EAGER, Volume, World, alone, class},
};

const OURS: &str = "secrets-store.csi.k8s.io/";
/// The time for work in the background on a busy machine.
const SOON: Duration = Duration::from_secs(60);
const MINUTE: Duration = Duration::from_secs(60);
/// Flags with which refreshes are an hour apart, and errors reach kubelet.
const SELDOM: [&str; 3] = [
    "--enable-secret-rotation",
    "--rotation-poll-interval=1h",
    "--republish-errors=surface",
];

/// What happens to a volume before it is looked at.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    /// Refreshes fail from now on, or still do.
    Fail,
    /// Refreshes succeed.
    Work,
    /// The driver starts again.
    Restart,
    /// Somebody removes all annotations.
    Remove,
    /// Somebody writes annotations of the driver.
    Invent,
    /// Somebody deletes the pod status.
    Delete,
}

fn status(world: &World, volume: &Volume) -> Value {
    world.api.get(&volume.pod_status()).unwrap_or_default()
}

fn annotation(status: &Value, name: &str) -> Option<String> {
    let value = &status["metadata"]["annotations"][format!("{OURS}{name}")];
    value.as_str().map(str::to_owned)
}

/// Publishes as kubelet does until something holds of the pod status.
async fn until(world: &World, volume: &Volume, case: &str, holds: impl Fn(&Value) -> bool) {
    let started = Instant::now();
    loop {
        let _ = world.publish_patiently(volume).await;
        let status = status(world, volume);
        if holds(&status) {
            return;
        }
        assert!(started.elapsed() < SOON, "{case}: {status:#}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn edit(world: &World, volume: &Volume, annotations: Value) {
    let mut object = status(world, volume);
    if object.is_null() {
        return;
    }
    object["metadata"]["annotations"] = annotations;
    world.api.put(&volume.pod_status(), object);
}

/// Whatever happens to a volume, to its pod status and to the driver: the pod status says that the
/// volume is stale exactly while it is, and at rest nothing is written.
#[test]
fn the_pod_status_says_that_refreshes_fail_for_as_long_as_they_do() {
    alone(async {
        let flags = [&EAGER[..], &["--sync-interval=100ms"]].concat();
        let mut world = World::start(&flags).await;
        let kinds = [
            Step::Fail,
            Step::Work,
            Step::Restart,
            Step::Remove,
            Step::Invent,
            Step::Delete,
        ];
        let histories = prop::collection::vec(prop::sample::select(kinds.to_vec()), 1..7);
        let mut runner = TestRunner::new(Config::with_cases(10));
        for _ in 0..runner.config().cases {
            let history = histories.new_tree(&mut runner).unwrap().current();
            let volume = world.volume_of_its_own();
            world.publish_patiently(&volume).await.unwrap();
            let mut fails = false;
            for step in &history {
                match step {
                    Step::Fail | Step::Work => {
                        fails = *step == Step::Fail;
                        let answer = Answer {
                            status: fails.then_some(Code::PermissionDenied),
                            ..Answer::file("pw", "one")
                        };
                        world.provider.answers(&volume.class, answer);
                    }
                    Step::Restart => {
                        world.stop_driver().await;
                        world.start_driver().await;
                    }
                    Step::Remove => edit(&world, &volume, json!({"team": "shop"})),
                    Step::Invent => edit(
                        &world,
                        &volume,
                        json!({
                            "team": "shop", format!("{OURS}stale-since"): "tomorrow",
                            format!("{OURS}stale-reason"): "none of your business",
                            format!("{OURS}secrets-out-of-step-since"): "2026-01-01T00:00:00Z",
                        }),
                    ),
                    Step::Delete => world.api.remove(&volume.pod_status()),
                }
                let case = format!("{step:?} of {history:?}");
                until(&world, &volume, &case, |status| {
                    let since = annotation(status, "stale-since");
                    let why = annotation(status, "stale-reason").unwrap_or_default();
                    let is_told = since.is_some_and(|since| since.starts_with("20"))
                        && why.contains("the store says no");
                    !status.is_null()
                        && (is_told == fails)
                        && (fails || why.is_empty())
                        && annotation(status, "secrets-out-of-step-since").is_none()
                })
                .await;
                let before = status(&world, &volume);
                for _ in 0..3 {
                    let _ = world.publish_patiently(&volume).await;
                }
                assert_eq!(before, status(&world, &volume), "{case}: written at rest");
                if matches!(step, Step::Remove | Step::Invent) {
                    assert_eq!(before["metadata"]["annotations"]["team"], "shop", "{case}");
                }
            }
            world.unpublish(&volume).await.unwrap();
        }
    });
}

/// A volume whose refreshes failed is published anew, and has its next refresh an hour later. Its mount is
/// gone, or its content; the driver has started again, or it has seen the failure itself.
#[test]
fn a_publish_ends_the_trouble_of_refreshes() {
    alone(async {
        let mut world = World::start(&SELDOM).await;
        for (restarts, empties) in [(true, false), (false, false), (true, true), (false, true)] {
            let case = format!("restarts: {restarts}, empties: {empties}");
            let volume = world.volume_of_its_own();
            world.publish_patiently(&volume).await.unwrap();
            let answer = Answer {
                status: Some(Code::PermissionDenied),
                ..Answer::default()
            };
            world.provider.answers(&volume.class, answer);
            pass(2 * 60 * MINUTE).await;
            until(&world, &volume, &case, |status| {
                annotation(status, "stale-since").is_some()
            })
            .await;
            let answer = Answer::file("pw", "one");
            world.provider.answers(&volume.class, answer);
            if restarts {
                world.stop_driver().await;
            }
            if empties {
                let link = volume.target.join("..data");
                std::fs::remove_file(link).unwrap();
            } else {
                volume.unmount();
            }
            if restarts {
                world.start_driver().await;
            }
            until(&world, &volume, &case, |status| {
                annotation(status, "stale-since").is_none()
                    && annotation(status, "stale-reason").is_none()
            })
            .await;
            let recovered = || world.api.events_of(&volume, "MountRotationComplete");
            let started = Instant::now();
            while recovered() == 0 {
                assert!(started.elapsed() < SOON, "{case}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            world.unpublish(&volume).await.unwrap();
        }
    });
}

/// The end of failures of refreshes that this driver has not brought about.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    /// Another driver on the same node has refreshed the volume.
    OtherDriver,
    /// The edit of the class, with which refreshes failed, is taken back.
    Reverted,
}

/// A class is edited, and its refresh fails. The next refresh is an hour away when the failures end.
#[test]
fn failures_end_without_a_refresh_that_is_due() {
    alone(async {
        let mut world = World::start(&SELDOM).await;
        for (end, restarts) in [
            (End::OtherDriver, false),
            (End::OtherDriver, true),
            (End::Reverted, false),
            (End::Reverted, true),
        ] {
            let case = format!("{end:?}, restarts: {restarts}");
            let volume = world.volume_of_its_own();
            world.publish_patiently(&volume).await.unwrap();
            let fails = Answer {
                status: Some(Code::PermissionDenied),
                ..Answer::default()
            };
            world.provider.answers(&volume.class, fails);
            let edited = class(&volume.class, 2);
            world.api.class_is(&volume.class, [Class::Is(edited)]);
            // The class is read seldom while nothing fails.
            pass(5 * MINUTE).await;
            until(&world, &volume, &case, |status| {
                annotation(status, "stale-since").is_some()
            })
            .await;
            if restarts {
                world.stop_driver().await;
            }
            match end {
                End::OtherDriver => refreshed_by_another_driver(&world, &volume, restarts),
                End::Reverted => {
                    let answer = Answer::file("pw", "one");
                    world.provider.answers(&volume.class, answer);
                    let reverted = class(&volume.class, 3);
                    world.api.class_is(&volume.class, [Class::Is(reverted)]);
                }
            }
            if restarts {
                world.start_driver().await;
            } else {
                pass(5 * MINUTE).await;
            }
            until(&world, &volume, &case, |status| {
                annotation(status, "stale-since").is_none()
                    && annotation(status, "stale-reason").is_none()
            })
            .await;
            world.unpublish(&volume).await.unwrap();
        }
    });
}

/// Writes the record of a volume as another driver does that has refreshed it with the edited class.
fn refreshed_by_another_driver(world: &World, volume: &Volume, is_stopped: bool) {
    let records = std::fs::read_dir(world.state_dir()).unwrap();
    let mut written = 0;
    for path in records.map(|entry| entry.unwrap().path()) {
        let text = std::fs::read(&path).unwrap();
        let Ok(mut record) = serde_json::from_slice::<Value>(&text) else {
            continue;
        };
        if record["volumeId"] == volume.id {
            let failed = std::mem::take(&mut record["failingSince"]);
            // Time has passed for the driver that runs, but not for the next one.
            record["lastSuccess"] = match is_stopped {
                true => json!(jiff::Timestamp::now()),
                false => failed,
            };
            record["class"]["generation"] = json!(2);
            record["class"]["resourceVersion"] = json!("20");
            let next = path.with_extension("next");
            std::fs::write(&next, record.to_string()).unwrap();
            std::fs::rename(next, path).unwrap();
            written += 1;
        }
    }
    assert_eq!(written, 1, "no record of {}", volume.id);
}

/// Refreshes fail for one cause after another: the pod status names the present one, and the beginning of
/// the whole.
#[test]
fn the_reason_of_a_stale_volume_follows_its_cause() {
    alone(async {
        let flags = [&EAGER[..], &["--sync-interval=1s"]].concat();
        let mut world = World::start(&flags).await;
        let volume = world.volume_of_its_own();
        world.publish_patiently(&volume).await.unwrap();
        let mut since = None;
        let causes = [
            (Code::PermissionDenied, "PERMISSION_DENIED"),
            (Code::NotFound, "NOT_FOUND"),
            (Code::PermissionDenied, "PERMISSION_DENIED"),
            (Code::Unauthenticated, "UNAUTHENTICATED"),
            (Code::FailedPrecondition, "FAILED_PRECONDITION"),
            (Code::NotFound, "NOT_FOUND"),
        ];
        for (code, name) in causes {
            let answer = Answer {
                status: Some(code),
                ..Answer::default()
            };
            world.provider.answers(&volume.class, answer);
            until(&world, &volume, name, |status| {
                let why = annotation(status, "stale-reason").unwrap_or_default();
                why.contains(name)
            })
            .await;
            let told = annotation(&status(&world, &volume), "stale-since");
            assert!(told.is_some(), "{name}");
            assert_eq!(*since.get_or_insert(told.clone()), told, "{name}");
        }
    });
}

/// In three hours of failures there is one event, which counts on often enough to be there still.
#[test]
fn an_event_is_repeated_for_as_long_as_refreshes_fail() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let volume = world.volume_of_its_own();
        world.publish_patiently(&volume).await.unwrap();
        let answer = Answer {
            status: Some(Code::PermissionDenied),
            ..Answer::default()
        };
        world.provider.answers(&volume.class, answer);
        let events = || {
            let events = world.api.events().into_iter();
            let mine = events.filter(|event| event["reason"] == "MountRotationFailed");
            mine.collect::<Vec<_>>()
        };
        let posted = async |count: i64| {
            let started = Instant::now();
            while events().iter().all(|event| event["count"] != count) {
                assert!(started.elapsed() < SOON, "{count}: {:#?}", events());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        world.publish_patiently(&volume).await.unwrap_err();
        posted(1).await;
        for count in 2..=5 {
            for _ in 0..3 {
                pass(3 * MINUTE).await;
                world.publish_patiently(&volume).await.unwrap_err();
            }
            pass(2 * MINUTE).await;
            world.publish_patiently(&volume).await.unwrap_err();
            posted(count).await;
            assert_eq!(events().len(), 1);
        }
        let told = events().remove(0);
        assert!(told["lastTimestamp"].as_str() >= told["firstTimestamp"].as_str());
        // The API server has forgotten it.
        let name = told["metadata"]["name"].as_str().unwrap();
        world
            .api
            .remove(&format!("/api/v1/namespaces/shop/events/{name}"));
        pass(11 * MINUTE).await;
        world.publish_patiently(&volume).await.unwrap_err();
        posted(6).await;
    });
}

/// Each change of the content is counted, whatever version the provider gives it, and told once.
#[test]
fn content_that_changes_under_a_constant_version_is_seen() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        for numbers in [false, true] {
            let volume = world.volume_of_its_own();
            let mut object = class(&volume.class, 1);
            if numbers {
                object["metadata"]["annotations"] =
                    json!({format!("{OURS}number-versions"): "true"});
            }
            world.api.class_is(&volume.class, [Class::Is(object)]);
            let changes = [
                ("a", "v1", "v1"),
                ("a", "v1", "v1"),
                ("b", "v1", "v1+1"),
                ("b", "v1", "v1+1"),
                ("a", "v1", "v1+2"),
                ("c", "v2", "v2"),
                ("d", "v2", "v2+1"),
                ("d", "v3", "v3"),
            ];
            let (mut count, mut content) = (0, "");
            for (text, version, numbered) in changes {
                count += i32::from(content != text);
                let is_same = content == text;
                content = text;
                let answer = Answer {
                    version: Some(version.to_owned()),
                    ..Answer::file("pw", text)
                };
                world.provider.answers(&volume.class, answer);
                let before = status(&world, &volume);
                world.publish_patiently(&volume).await.unwrap();
                let after = status(&world, &volume);
                let case = format!("{text} {version}: {after:#}");
                let shown = if numbers { numbered } else { version };
                let objects = world.api.status_of(&volume).unwrap();
                assert_eq!(objects, [("object".to_owned(), shown.to_owned())], "{case}");
                let changes = annotation(&after, "content-changes");
                assert_eq!(changes, Some(count.to_string()), "{case}");
                let changed = |status| annotation(status, "content-changed");
                assert_eq!(changed(&before) == changed(&after), is_same, "{case}");
            }
            let started = Instant::now();
            while world.api.events_of(&volume, "MountContentChanged") == 0 {
                assert!(started.elapsed() < SOON, "no event");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            assert_eq!(world.api.events_of(&volume, "MountContentChanged"), 1);
            // The changes that came at once are in the count of the next post.
            pass(11 * MINUTE).await;
            world.publish_patiently(&volume).await.unwrap();
            let is_all = |event: &Value| {
                event["reason"] == "MountContentChanged"
                    && event["involvedObject"]["uid"] == volume.uid
                    && event["count"] == count - 1
            };
            while !world.api.events().iter().any(is_all) {
                assert!(started.elapsed() < SOON, "{:#?}", world.api.events());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
}
