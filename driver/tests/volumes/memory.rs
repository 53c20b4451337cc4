//! Checks the memory of mounted content: reservations are large enough, content that does not fit is
//! refused in time, and a volume keeps its content.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use driver::{
    files::{File, Payload, open_root, swap},
    memory::{Budget, Limit, Memory, Source},
    mount::{self, TargetState, Tmpfs},
};
use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, TestRunner},
};
use tokio::task::JoinSet;
use tonic::Code;

use crate::harness::{Answer, EAGER, Volume, World, alone, limit_memory};

const MIB: u64 = 1 << 20;

fn limit(mib: u64) -> Limit {
    Limit {
        bytes: mib * MIB,
        source: Source::Cgroup,
    }
}

fn files() -> impl Strategy<Value = Vec<(String, Vec<u8>)>> {
    let name = prop_oneof!["[a-z.-]{1,12}", "[a-z]{100,255}"];
    let path = prop::collection::vec(name, 1..5).prop_map(|names| names.join("/"));
    let content = (0..20_000_usize).prop_map(|length| vec![b'x'; length]);
    prop::collection::vec((path, content), 1..60)
}

/// A volume takes no more memory than was reserved for it, with any content, and all of it is freed
/// with the volume.
#[test]
fn what_is_set_aside_is_enough() {
    alone(async {
        let dir = tempfile::tempdir().unwrap();
        let memory = Memory::new(limit(1000), 0);
        let budget = memory.budget();
        let target = dir.path().join("mount");
        fs::create_dir(&target).unwrap();
        let mut runner = TestRunner::new(Config::with_cases(100));
        for _ in 0..runner.config().cases {
            Tmpfs::bounded_by(64 * MIB).mount(&target).unwrap();
            let mut reserved = 0;
            // The first content, and a replacement.
            for _ in 0..2 {
                let files = files().new_tree(&mut runner).unwrap().current();
                let files = files
                    .into_iter()
                    .map(|(path, content)| (path, File::new(0, content)));
                let Ok(payload) = Payload::new(files) else {
                    continue;
                };
                let before = memory.in_use();
                let reservation = memory.reserve(&target, "a", &payload).unwrap();
                reserved += memory.in_use() - before;
                let staged = swap::stage(open_root(&target).unwrap(), payload).unwrap();
                memory.found(&target, "a", true);
                assert!(memory.in_use() <= 2 * reserved);
                if let Some(staged) = staged {
                    staged.commit().unwrap();
                }
                memory.found(&target, "a", true);
                drop(reservation);
                let used = memory.readings().mounted;
                assert!(0 < used && used <= reserved, "{used} of {reserved}");
                assert!(used <= budget.room());
            }
            mount::detach(&target).unwrap();
            memory.changed(&target);
            assert_eq!(memory.in_use(), 0);
        }
    });
}

/// Returns an answer with one file of this many bytes.
fn of(bytes: u64) -> Answer {
    Answer {
        files: vec![("pw".to_owned(), vec![b'x'; usize::try_from(bytes).unwrap()])],
        version: Some(bytes.to_string()),
        ..Answer::default()
    }
}

/// Fifty threads never reserve more than there is, and all of it is free in the end.
#[test]
fn reservations_of_many_threads_never_exceed_the_room() {
    let memory = Memory::new(limit(200), 64 * MIB);
    let room = memory.budget().room();
    let content = |bytes: u64| {
        let file = File::new(0, vec![b'x'; usize::try_from(bytes).unwrap()]);
        Payload::new([("pw".to_owned(), file)]).unwrap()
    };
    let threads: Vec<_> = (0..50)
        .map(|number: u64| {
            let (memory, content) = (Arc::clone(&memory), content(3 * MIB + number * 4096));
            std::thread::spawn(move || {
                let mut admitted = 0;
                for turn in 0..40 {
                    let target = format!("/volumes/{number}");
                    let namespace = format!("ns-{}", number % 7);
                    if let Ok(reservation) = memory.reserve(target.as_ref(), &namespace, &content) {
                        assert!(memory.in_use() <= room);
                        admitted += 1;
                        if turn % 3 == 0 {
                            std::thread::yield_now();
                        }
                        drop(reservation);
                    }
                }
                admitted
            })
        })
        .collect();
    let admitted: u32 = threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .sum();
    assert!(admitted > 50, "{admitted}");
    assert_eq!(memory.in_use(), 0);
}

/// Returns volumes for which the provider has 3 MiB each.
fn volumes_of_3_mib(world: &mut World, number: usize) -> Vec<Volume> {
    let volume = || {
        let volume = world.volume_of_its_own();
        world.provider.answers(&volume.class, of(3 * MIB));
        volume
    };
    std::iter::repeat_with(volume).take(number).collect()
}

/// A whole driver with a small limit refuses content that does not fit, with a sentence. A refused
/// first publish leaves nothing, and a refused refresh leaves the content.
#[test]
fn a_driver_refuses_what_does_not_fit() {
    alone(async {
        // The driver has 20 MiB, answers have 21, and content has 22.
        if !limit_memory(64 * MIB) {
            println!("skipped: no cgroup that limits memory is mounted here");
            return;
        }
        assert_eq!(driver::memory::limit(Path::new("/")), limit(64));
        let flags: Vec<&str> = EAGER
            .into_iter()
            .chain(["--max-call-recv-msg-size=16777216"])
            .collect();
        let mut world = World::start(&flags).await;
        let room = Budget::of(limit(64), 64 * MIB).room();
        let volumes = volumes_of_3_mib(&mut world, 40);
        let world = Arc::new(world);
        let mut publishing = JoinSet::new();
        for volume in volumes {
            let world = Arc::clone(&world);
            publishing.spawn(async move {
                let answer = world.publish_patiently(&volume).await;
                (volume, answer)
            });
        }
        let (mut mounted, mut refused) = (Vec::new(), 0);
        for (volume, answer) in publishing.join_all().await {
            match answer {
                Ok(()) => mounted.push(volume),
                Err(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                    for part in ["64.0 MiB", "linux.driver.resources.limits.memory"] {
                        assert!(status.message().contains(part), "{status}");
                    }
                    assert_eq!(volume.state(), TargetState::Absent);
                    refused += 1;
                }
            }
        }
        // All volumes are in one namespace, which may have three quarters.
        let held = mounted.len() as u64 * 3 * MIB;
        assert!(
            held <= room && held >= room / 2,
            "{held} of {room}, {refused} refused"
        );
        // One refresh fits because the volume's own content makes room, and one does not fit.
        let volume = &mounted[0];
        world.provider.answers(&volume.class, of(2 * MIB));
        world.publish_patiently(volume).await.unwrap();
        assert_eq!(volume.reads()["pw"].len() as u64, 2 * MIB);
        world.provider.answers(&volume.class, of(12 * MIB - 4096));
        let status = world.publish_patiently(volume).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert_eq!(volume.reads()["pw"].len() as u64, 2 * MIB);
        // A driver that restarts counts all mounted volumes, also those without a record.
        let forgotten = mounted.pop().unwrap();
        fs::remove_file(world.record_file(&forgotten)).unwrap();
        let kubelets = "{\"driverName\":\"secrets-store.csi.k8s.io\"}";
        let beside = forgotten.target.with_file_name("vol_data.json");
        fs::write(beside, kubelets).unwrap();
        let mut world = Arc::into_inner(world).unwrap();
        world.stop_driver().await;
        world.restart_with(&flags).await;
        let another = world.volume_of_its_own();
        world.provider.answers(&another.class, of(10 * MIB));
        let status = world.publish_patiently(&another).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert!(
            status.message().contains("of this node are in use"),
            "{status}"
        );
        // All memory is free after the volumes are unpublished.
        for volume in mounted.iter().chain([&forgotten]) {
            world.unpublish(volume).await.unwrap();
        }
        world.publish_patiently(&another).await.unwrap();
        assert_eq!(another.reads()["pw"].len() as u64, 10 * MIB);
    });
}

/// A cgroup with a memory limit. Dropping it removes the cgroup.
struct Cgroup(PathBuf);

impl Cgroup {
    /// Creates a cgroup, or prints why that is not possible.
    fn limited(bytes: u64) -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let paths = own.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next()?, parts.next()?.trim_start_matches('/'));
            match controllers {
                "" => Some((Path::new("/sys/fs/cgroup").join(path), "memory.max")),
                "memory" => Some((
                    Path::new("/sys/fs/cgroup/memory").join(path),
                    "memory.limit_in_bytes",
                )),
                _ => None,
            }
        });
        for (parent, file) in paths {
            let cgroup =
                Self(parent.join(format!("secrets-store-csi-volumes-{}", std::process::id())));
            if fs::create_dir(&cgroup.0).is_ok() {
                if fs::write(cgroup.0.join(file), bytes.to_string()).is_ok() {
                    return Some(cgroup);
                }
                println!("no {file} in {}", cgroup.0.display());
            }
        }
        println!("skipped: no cgroup with a memory limit can be made here");
        None
    }

    fn peak(&self) -> Option<u64> {
        let names = ["memory.peak", "memory.max_usage_in_bytes"];
        let text = names
            .iter()
            .find_map(|name| fs::read_to_string(self.0.join(name)).ok())?;
        text.trim().parse().ok()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// A driver in a cgroup with a real limit survives more content than fits, and so does the next
/// driver after it was killed.
#[test]
fn a_process_below_a_real_limit_is_not_killed() {
    alone(async {
        let Some(cgroup) = Cgroup::limited(64 * MIB) else {
            return;
        };
        let mut world = World::start(&[]).await;
        world.stop_driver().await;
        let volumes = volumes_of_3_mib(&mut world, 60);
        let world = Arc::new(world);
        let mut held = Vec::new();
        for life in ["first", "second"] {
            let mut driver = world.start_process(&cgroup.0);
            let _client = world.client().await;
            let mut publishing = JoinSet::new();
            for volume in volumes.clone() {
                let world = Arc::clone(&world);
                publishing.spawn(async move { world.publish_patiently(&volume).await });
            }
            let answers = publishing.join_all().await;
            assert!(driver.runs(), "{life}: it has ended");
            let mounted = answers.iter().filter(|answer| answer.is_ok()).count();
            for status in answers.iter().filter_map(|answer| answer.as_ref().err()) {
                assert_eq!(status.code(), Code::ResourceExhausted, "{life}: {status}");
            }
            println!(
                "{life}: {mounted} volumes, at most {:?} bytes",
                cgroup.peak()
            );
            assert!((4..=7).contains(&mounted), "{life}: {mounted}");
            held.push(mounted);
            drop(driver);
        }
        assert_eq!(held[0], held[1]);
        // The unmounts free the memory.
        for volume in &volumes {
            if volume.state() == TargetState::Mounted {
                volume.unmount();
            }
        }
    });
}
