//! Checks that a failed publish that leaves something behind has no final code. After a final code
//! kubelet forgets the volume and never unpublishes it.

use std::{fs, sync::Arc};

use driver::mount::TargetState;
use proto::csi::{
    NodePublishVolumeRequest, VolumeCapability,
    volume_capability::{AccessType, MountVolume},
};
use serde_json::json;
use tokio::{sync::Semaphore, task::JoinSet};
use tonic::Code;

use crate::harness::{
    Answer, Class, EAGER, Volume, World, alone, class, is_final, read_only, tmpfs,
};

/// The record of a volume.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Recorded {
    Nothing,
    Well,
    Torn,
    OfAnotherPod,
}

/// The state of its target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum There {
    Nothing,
    Directory,
    EmptyMount,
    Content,
    /// Content that the provider wrote itself.
    Strangers,
    BrokenContent,
    File,
}

pub(crate) const RECORDED: [Recorded; 4] = [
    Recorded::Nothing,
    Recorded::Well,
    Recorded::Torn,
    Recorded::OfAnotherPod,
];

pub(crate) const THERE: [There; 7] = [
    There::Nothing,
    There::Directory,
    There::EmptyMount,
    There::Content,
    There::Strangers,
    There::BrokenContent,
    There::File,
];

/// The step that fails, and its failure.
#[derive(Clone, Debug)]
enum Failure {
    Class(Class),
    Provider(Answer),
    PodStatus(u16),
    Request(&'static str),
}

fn failures() -> Vec<Failure> {
    let http = [400, 401, 403, 404, 409, 422, 429, 500, 503];
    let codes = (1..=16).map(Code::from_i32);
    let provider = codes.map(|code| Answer {
        status: Some(code),
        ..Answer::default()
    });
    let file = Answer::file("pw", "two");
    let answers = [
        Answer {
            error_code: Some("STORE_SAYS_NO"),
            ..file.clone()
        },
        Answer {
            hangs: true,
            ..Answer::default()
        },
        // These are: neither objects nor files; objects without files; an invalid path.
        Answer::default(),
        Answer {
            files: Vec::new(),
            ..file.clone()
        },
        Answer {
            files: vec![("../pw".to_owned(), Vec::new())],
            ..file
        },
    ];
    let mut no_provider = class("x", 1);
    no_provider["spec"]["provider"] = json!("");
    let mut no_parameters = class("x", 1);
    no_parameters["spec"]["parameters"] = json!({});
    let mut absent_provider = class("x", 1);
    absent_provider["spec"]["provider"] = json!("nobody");
    let mut bad_name = class("x", 1);
    bad_name["spec"]["provider"] = json!("../x");
    let classes = [no_provider, no_parameters, absent_provider, bad_name];
    let requests = [
        "writable",
        "capability",
        "context",
        "class",
        "no pod",
        "interval",
        "mode",
        "group",
        "another pod",
        "class name",
        "id",
    ];
    let mut failures = Vec::new();
    failures.extend(http.map(|code| Failure::Class(Class::Refused(code))));
    failures.extend(classes.map(|object| Failure::Class(Class::Is(object))));
    failures.push(Failure::Class(Class::Garbled));
    failures.extend(provider.chain(answers).map(Failure::Provider));
    failures.extend([400, 403, 404, 422, 500].map(Failure::PodStatus));
    failures.extend(requests.map(Failure::Request));
    failures
}

/// Returns an invalid request.
fn spoilt(volume: &Volume, how: &str) -> NodePublishVolumeRequest {
    let mut request = volume.request();
    let mut say = |name: &str, value: &str| {
        let context = &mut request.volume_context;
        context.insert(name.to_owned(), value.to_owned());
    };
    match how {
        "interval" => say("secrets-store.csi.k8s.io/rotation-poll-interval", "soon"),
        "mode" => say("secrets-store.csi.k8s.io/default-mode", "0999"),
        "another pod" => say("csi.storage.k8s.io/pod.uid", "uid-of-another"),
        "class" => say("secretProviderClass", ""),
        "class name" => say("secretProviderClass", "../x"),
        "no pod" => say("csi.storage.k8s.io/pod.name", ""),
        "writable" => request.readonly = false,
        "capability" => request.volume_capability = None,
        "context" => request.volume_context.clear(),
        "id" => request.volume_id.clear(),
        "group" => {
            let mount = MountVolume {
                volume_mount_group: "staff".to_owned(),
                ..Default::default()
            };
            let capability = VolumeCapability {
                access_type: Some(AccessType::Mount(mount)),
                ..Default::default()
            };
            request.volume_capability = Some(capability);
        }
        other => panic!("{other}"),
    }
    request
}

/// Brings a volume into a state.
async fn bring(world: &World, volume: &Volume, recorded: Recorded, there: There) {
    world.publish_patiently(volume).await.unwrap();
    alter(world, volume, recorded, there);
}

/// Brings a published volume into a state.
pub(crate) fn alter(world: &World, volume: &Volume, recorded: Recorded, there: There) {
    let within = |name: &str| volume.target.join(name);
    let clear = || {
        for entry in fs::read_dir(&volume.target).unwrap() {
            let path = entry.unwrap().path();
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                fs::remove_dir_all(&path).unwrap();
            } else {
                fs::remove_file(&path).unwrap();
            }
        }
    };
    match there {
        There::Content => {}
        There::EmptyMount => clear(),
        There::Strangers => {
            clear();
            fs::write(within("pw"), "written by a provider").unwrap();
        }
        There::BrokenContent => {
            let data = fs::read_link(within("..data")).unwrap();
            fs::remove_dir_all(within(data.to_str().unwrap())).unwrap();
        }
        There::Nothing | There::Directory | There::File => {
            volume.unmount();
            if there != There::Directory {
                fs::remove_dir(&volume.target).unwrap();
            }
            if there == There::File {
                fs::write(&volume.target, "x").unwrap();
            }
        }
    }
    let file = world.record_file(volume);
    match recorded {
        Recorded::Well => {}
        Recorded::Nothing => fs::remove_file(file).unwrap(),
        Recorded::Torn => fs::write(file, "{\"format\":1,").unwrap(),
        Recorded::OfAnotherPod => {
            let text = fs::read_to_string(&file).unwrap();
            let other = text.replace(&format!("\"{}\"", volume.uid), "\"uid-of-another\"");
            assert_ne!(text, other);
            fs::write(file, other).unwrap();
        }
    }
}

/// Checks that nothing is left of a failed publish if its code is final.
fn judge(world: &World, volume: &Volume, code: Code, case: &str) {
    if is_final(code) {
        assert!(
            !volume.target.exists() && fs::symlink_metadata(&volume.target).is_err(),
            "{code:?} is final, and something is at the target: {case}"
        );
        // The driver cannot find the record of a request without an id.
        assert!(
            !world.record_file(volume).exists() || case.contains("\"id\""),
            "{code:?} is final, and there is a record: {case}"
        );
    }
}

/// Publishes a volume in some state while something fails.
async fn fails(
    world: &World,
    volume: &Volume,
    recorded: Recorded,
    there: There,
    failure: Failure,
) -> Code {
    bring(world, volume, recorded, there).await;
    let case = format!("{recorded:?}, {there:?}, {failure:?}");
    let before = volume.reads();
    let mut request = volume.request();
    match failure {
        Failure::Class(answer) => world.api.class_is(&volume.class, [answer]),
        Failure::Provider(answer) => world.provider.answers(&volume.class, answer),
        Failure::PodStatus(code) => {
            // A new version makes the driver write the pod status.
            let new = Answer::file("pw", "two");
            world.provider.answers(&volume.class, new);
            world.api.refuse_status(&volume.class, Some(code));
        }
        Failure::Request(how) => request = spoilt(volume, how),
    }
    let held = volume.target.is_dir().then(|| volume.device());
    let answer = world.publish(request).await;
    let code = answer.err().map_or(Code::Ok, |status| status.code());
    judge(world, volume, code, &case);
    if matches!(there, There::Content | There::Strangers) {
        assert_eq!(Some(volume.device()), held, "the mount stays: {case}");
    }
    if (recorded, there) == (Recorded::Well, There::Content) && code != Code::Ok {
        assert_eq!(volume.reads(), before, "the content stays: {case}");
    }
    // The volume can be unpublished in every case.
    world.unpublish(volume).await.unwrap();
    assert_eq!(volume.state(), TargetState::Absent, "{case}");
    assert!(!world.record_file(volume).exists(), "{case}");
    code
}

#[test]
fn final_codes_say_that_nothing_is_left() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let mut cases = Vec::new();
        for recorded in RECORDED {
            for there in THERE {
                for failure in failures() {
                    cases.push((recorded, there, failure, world.volume_of_its_own()));
                }
            }
        }
        let world = Arc::new(world);
        let at_once = Arc::new(Semaphore::new(48));
        let mut running = JoinSet::new();
        for (recorded, there, failure, volume) in cases {
            let (world, at_once) = (Arc::clone(&world), Arc::clone(&at_once));
            running.spawn(async move {
                let _turn = at_once.acquire().await.unwrap();
                fails(&world, &volume, recorded, there, failure).await
            });
        }
        let ran = running.join_all().await;
        let finals = ran.iter().filter(|code| is_final(**code)).count();
        assert!(finals > 100, "{finals} of {}", ran.len());
    });
}

/// A foreign file system whose content the driver cannot examine is mounted at the target.
#[test]
fn a_foreign_file_system_at_the_target_is_not_final() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        for spoil in [
            None,
            Some("writable"),
            Some("interval"),
            Some("another pod"),
        ] {
            let volume = world.volume_of_its_own();
            fs::create_dir(&volume.target).unwrap();
            let no: Option<&str> = None;
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(no, &volume.target, Some("ramfs"), flags, no).unwrap();
            let request = match spoil {
                None => volume.request(),
                Some(how) => spoilt(&volume, how),
            };
            let answer = world.publish(request).await;
            if let Err(status) = answer {
                assert!(!is_final(status.code()), "{spoil:?}: {status}");
            }
            volume.unmount();
        }
    });
}

/// The disk of the node refuses the record.
#[test]
fn a_record_that_cannot_be_written_is_not_final_while_anything_is_left() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        world.stop_driver().await;
        tmpfs(&world.state_dir(), "mode=0700,size=16m");
        world.start_driver().await;
        let mut cases = Vec::new();
        for recorded in RECORDED {
            for there in THERE {
                let volume = world.volume_of_its_own();
                bring(&world, &volume, recorded, there).await;
                cases.push((recorded, there, volume));
            }
        }
        read_only(&world.state_dir(), true);
        for (recorded, there, volume) in &cases {
            let case = format!("{recorded:?}, {there:?}");
            let before = volume.reads();
            world
                .provider
                .answers(&volume.class, Answer::file("pw", "two"));
            let status = world.publish(volume.request()).await.unwrap_err();
            assert!(status.message().contains("Read-only"), "{status}: {case}");
            judge(&world, volume, status.code(), &case);
            if matches!(there, There::Content | There::Strangers) {
                assert_eq!(volume.reads(), before, "nothing has changed: {case}");
            }
        }
        for (_, _, volume) in &cases {
            world.unpublish(volume).await.unwrap();
            assert_eq!(volume.state(), TargetState::Absent);
        }
        read_only(&world.state_dir(), false);
    });
}
