//! Checks that a look at a volume at which nothing has changed needs no thread that may block, and that
//! the look after it notices every change, whoever made it.

use std::{sync::mpsc, time::Duration};

use driver::mount::TargetState;
use nix::mount::{MsFlags, mount};
use tokio::time::timeout;

use crate::{
    harness::{Answer, Volume, World, alone, tmpfs},
    states::{RECORDED, Recorded, THERE, There, alter},
};

/// A time after which the stamp of a record is trusted.
const SETTLED: Duration = Duration::from_millis(3100);
/// The time in which a look has its answer, unless it waits for a thread.
const ANSWERED: Duration = Duration::from_secs(5);
/// The number of threads of a runtime of tokio that may block.
const THREADS: usize = 512;

/// Keeps all threads busy that may block, as a disk does that hangs, until the result is dropped.
async fn no_threads() -> mpsc::Sender<()> {
    let (hold, held) = mpsc::channel::<()>();
    let held = std::sync::Arc::new(std::sync::Mutex::new(held));
    for _ in 0..THREADS {
        let held = std::sync::Arc::clone(&held);
        tokio::task::spawn_blocking(move || held.lock().map(|held| held.recv()).is_ok());
    }
    hold
}

/// Looks at volumes while no thread is free, and returns whether all looks had an answer.
async fn all_answered(world: &World, volumes: &[Volume]) -> bool {
    let hold = no_threads().await;
    let looks = async {
        for volume in volumes {
            world.publish_patiently(volume).await.unwrap();
        }
    };
    let answered = timeout(ANSWERED, looks).await.is_ok();
    drop(hold);
    answered
}

/// Brings volumes into the state in which the next look needs no thread.
async fn seen(world: &World, volumes: &[Volume]) {
    for volume in volumes {
        world.publish_patiently(volume).await.unwrap();
    }
    tokio::time::sleep(SETTLED).await;
    for volume in volumes {
        world.publish_patiently(volume).await.unwrap();
    }
    assert!(all_answered(world, volumes).await, "a look needs a thread");
}

#[test]
fn what_is_altered_after_a_look_is_noticed_by_the_next_one() {
    alone(async {
        let mut world = World::start(&[]).await;
        let states: Vec<_> = RECORDED
            .into_iter()
            .flat_map(|recorded| THERE.map(|there| (recorded, there)))
            .filter(|state| *state != (Recorded::Well, There::Content))
            .collect();
        let volumes: Vec<_> = states.iter().map(|_| world.volume_of_its_own()).collect();
        seen(&world, &volumes).await;
        for (volume, (recorded, there)) in volumes.iter().zip(states) {
            let case = format!("{recorded:?}, {there:?}");
            alter(&world, volume, recorded, there);
            let two = Answer::file("pw", "two");
            world.provider.answers(&volume.class, two);
            world.publish_patiently(volume).await.unwrap();
            assert_eq!(volume.state(), TargetState::Mounted, "{case}");
            assert_eq!(volume.reads()["pw"], "two", "{case}");
            let record = world.record(volume).map(|record| record.pod.uid);
            assert_eq!(record.as_ref(), Some(&volume.uid), "{case}");
        }
    });
}

/// The mounts that another program makes over a volume.
#[test]
fn what_is_mounted_over_a_volume_after_a_look_is_noticed_by_the_next_one() {
    alone(async {
        let mut world = World::start(&[]).await;
        let [empty, bound, other, covered, whole] = [(); 5].map(|()| world.volume_of_its_own());
        let volumes = [&empty, &bound, &covered, &whole].map(Clone::clone);
        world.publish_patiently(&other).await.unwrap();
        seen(&world, &volumes).await;
        let no: Option<&str> = None;
        let bind = |from: &std::path::Path, to: &std::path::Path| {
            mount(Some(from), to, no, MsFlags::MS_BIND, no).unwrap();
        };
        tmpfs(&empty.target, "mode=0755");
        bind(world.dir.path(), &bound.target);
        // This one has content.
        bind(&other.target, &covered.target);
        for (volume, says) in [
            (&empty, Some("not a volume of this driver")),
            (&bound, Some("other than tmpfs")),
            (&covered, None),
            (&whole, None),
        ] {
            let answer = world.publish_patiently(volume).await;
            match (answer, says) {
                (Err(status), Some(says)) => {
                    assert!(status.message().contains(says), "{status}");
                }
                (answer, says) => assert!(answer.is_ok() && says.is_none(), "{says:?}: {answer:?}"),
            }
        }
        // What covers it is not the mount that was seen, so that a thread examines it again.
        let before = covered.clone();
        covered.unmount();
        assert!(all_answered(&world, &[whole]).await);
        world.publish_patiently(&before).await.unwrap();
        assert_eq!(before.reads()["pw"], "one");
    });
}

/// `rest` checks that an edited class is noticed.
#[test]
fn the_end_of_the_interval_after_a_look_is_noticed_by_the_next_one() {
    alone(async {
        let flags = ["--enable-secret-rotation", "--rotation-poll-interval=12s"];
        let mut world = World::start(&flags).await;
        let volume = world.volume_of_its_own();
        // A look that comes sooner than half of the interval reads the class.
        let rhythm = Duration::from_millis(6500);
        world.publish_patiently(&volume).await.unwrap();
        tokio::time::sleep(rhythm).await;
        world.publish_patiently(&volume).await.unwrap();
        let two = Answer::file("pw", "two");
        world.provider.answers(&volume.class, two);
        tokio::time::sleep(rhythm + Duration::from_secs(2)).await;
        world.publish_patiently(&volume).await.unwrap();
        assert_eq!(volume.reads()["pw"], "two");
    });
}
