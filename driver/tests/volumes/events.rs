//! Checks the events about refreshes when the API server refuses events for a while.

use std::time::{Duration, Instant};

use tonic::Code;

use crate::harness::{Answer, EAGER, Volume, World, alone};

const FAILED: &str = "MountRotationFailed";
const COMPLETE: &str = "MountRotationComplete";

/// The attempts to post one event, and a time that is longer than the waits between them.
const ATTEMPTS: usize = 4;
const LONGER_THAN_WAITS: Duration = Duration::from_secs(61);

/// The time for work in the background on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// Advances the clock of this process.
pub(crate) async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

/// Waits until all attempts to post an event were refused.
async fn until_given_up(world: &World, case: &str) {
    let started = Instant::now();
    let mut seen = 0;
    let mut looks = 0;
    while seen < ATTEMPTS {
        assert!(started.elapsed() < SOON, "{case}: {seen} attempts");
        tokio::time::sleep(Duration::from_millis(50)).await;
        looks += 1;
        let now = world.api.events_refused();
        // The driver begins its wait a moment after the answer.
        if now != seen {
            (seen, looks) = (now, 0);
        } else if looks % 6 == 0 && now > 0 {
            pass(LONGER_THAN_WAITS).await;
        }
    }
}

/// Publishes repeatedly, as kubelet does, until the event was posted, and then some more.
async fn until_told(world: &World, volume: &Volume, reason: &str, well: bool) {
    let started = Instant::now();
    let mut more = 0;
    while more < 3 {
        let published = world.publish_patiently(volume).await;
        assert_eq!(published.is_ok(), well, "{published:?}");
        more += usize::from(world.api.events_of(volume, reason) > 0);
        assert!(started.elapsed() < SOON, "{reason} is not told");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn fails(world: &World, volume: &Volume) {
    let answer = Answer {
        status: Some(Code::PermissionDenied),
        ..Answer::default()
    };
    world.provider.answers(&volume.class, answer);
}

/// Both events are posted once the API server accepts events, and each only once.
#[test]
fn what_was_refused_is_told_once_events_are_taken() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        for code in [403, 422, 500] {
            let volume = world.volume_of_its_own();
            world.publish_patiently(&volume).await.unwrap();

            world.api.refuse_events(Some(code));
            fails(&world, &volume);
            for _ in 0..3 {
                world.publish_patiently(&volume).await.unwrap_err();
            }
            until_given_up(&world, &format!("{FAILED} is refused with {code}")).await;
            assert_eq!(world.api.events_of(&volume, FAILED), 0);
            world.api.refuse_events(None);
            until_told(&world, &volume, FAILED, false).await;

            world.api.refuse_events(Some(code));
            let well = Answer::file("pw", "one");
            world.provider.answers(&volume.class, well);
            world.publish_patiently(&volume).await.unwrap();
            until_given_up(&world, &format!("{COMPLETE} is refused with {code}")).await;
            assert_eq!(world.api.events_of(&volume, COMPLETE), 0);
            world.api.refuse_events(None);
            until_told(&world, &volume, COMPLETE, true).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            assert_eq!(world.api.events_of(&volume, FAILED), 1, "{code}");
            assert_eq!(world.api.events_of(&volume, COMPLETE), 1, "{code}");
        }
    });
}
