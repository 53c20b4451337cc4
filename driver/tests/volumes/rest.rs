//! Checks what kubelet's looks at published volumes cost while nothing changes, and that a change is
//! noticed all the same.

use std::time::{Duration, Instant};

use driver::cluster::interval::Intervals;

use crate::harness::{Answer, Class, Volume, World, alone, class};

const CLASSES: usize = 4;
const VOLUMES: usize = 200;
const ROUNDS: usize = 4;
const FLAGS: [&str; 3] = [
    "--enable-secret-rotation",
    "--rotation-poll-interval=10s",
    "--sync-interval=2s",
];
/// The planned time between two reads of a class with these flags.
const BETWEEN_READS: Duration = Duration::from_secs(10);
/// A time between two looks at a volume that counts as kubelet's own with these flags.
const BETWEEN_LOOKS: Duration = Duration::from_secs(8);

/// Looks at all volumes, one after the other.
async fn look_at(world: &World, volumes: &[Volume]) {
    let mut kubelet = world.client().await;
    for volume in volumes {
        kubelet.node_publish_volume(volume.request()).await.unwrap();
    }
}

#[test]
fn all_volumes_of_a_class_share_its_reads_and_a_touched_pod_has_its_own() {
    alone(async {
        let intervals = Intervals {
            refresh: BETWEEN_READS,
            least: Duration::ZERO,
            sync: Duration::from_secs(2),
        };
        assert_eq!(intervals.between_reads(None), BETWEEN_READS);
        let mut world = World::start(&FLAGS).await;
        let name = |number: usize| format!("class-{}", number % CLASSES);
        for number in 0..CLASSES {
            let name = name(number);
            world.api.class_is(&name, [Class::Is(class(&name, 1))]);
            world.provider.answers(&name, Answer::file("pw", "one"));
        }
        let volumes: Vec<Volume> = (0..VOLUMES).map(|n| world.volume(&name(n))).collect();
        look_at(&world, &volumes).await;

        world.api.class_reads();
        world.provider.asked();
        let started = Instant::now();
        for _ in 0..ROUNDS {
            tokio::time::sleep(BETWEEN_LOOKS).await;
            look_at(&world, &volumes).await;
        }
        let most = started.elapsed().as_secs() / BETWEEN_READS.as_secs() + 1;
        let reads = world.api.class_reads();
        for number in 0..CLASSES {
            let reads = reads.get(&name(number)).copied().unwrap_or_default();
            assert!(1 <= reads && reads as u64 <= most, "{reads} of {most}");
        }
        // Refreshes share them as well.
        assert!(world.provider.asked().len() >= VOLUMES);

        let [first, .., last] = volumes.as_slice() else {
            unreachable!()
        };
        for touched in [first, last] {
            let name = &touched.class;
            world.api.class_is(name, [Class::Is(class(name, 2))]);
            world.provider.answers(name, Answer::file("pw", "two"));
            look_at(&world, std::slice::from_ref(touched)).await;
            assert_eq!(touched.reads()["pw"], "two");
        }
        // What one has found, the others need not ask for.
        tokio::time::sleep(BETWEEN_READS / 2).await;
        look_at(&world, &volumes).await;
        for volume in &volumes {
            let is_edited = [&first.class, &last.class].contains(&&volume.class);
            let content = if is_edited { "two" } else { "one" };
            assert_eq!(volume.reads()["pw"], content);
        }
    });
}

/// A class that is deleted, or made anew, is noticed by looks that ask nobody, within the time between
/// two reads.
#[test]
fn a_class_that_is_deleted_or_made_anew_is_noticed() {
    alone(async {
        let mut world = World::start(&[&FLAGS[..], &["--republish-errors=surface"]].concat()).await;
        let volume = world.volume_of_its_own();
        let name = volume.class.clone();
        world.publish_patiently(&volume).await.unwrap();
        let anew = {
            let mut class = class(&name, 1);
            class["metadata"]["uid"] = "another".into();
            class["metadata"]["resourceVersion"] = "100".into();
            class
        };
        world.provider.answers(&name, Answer::file("pw", "two"));
        for (state, fails) in [(Class::Refused(404), true), (Class::Is(anew), false)] {
            world.api.class_is(&name, [state]);
            let changed = Instant::now();
            loop {
                tokio::time::sleep(BETWEEN_READS * 3 / 5).await;
                if world.publish_patiently(&volume).await.is_err() == fails {
                    break;
                }
                let within = 2 * BETWEEN_READS + Duration::from_secs(30);
                assert!(changed.elapsed() < within, "not noticed");
            }
        }
        assert_eq!(volume.reads()["pw"], "two");
    });
}
