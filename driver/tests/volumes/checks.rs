//! Checks that the driver's periodic checks and the refreshes of a volume do not undo each other's work.

use std::time::{Duration, Instant};

use crate::{
    events::pass,
    harness::{Answer, EAGER, Volume, World, alone},
};

/// The time from a mount on in which its pod status is not checked: less than twenty of `--sync-interval`,
/// and less than requests may take.
const NOT_CHECKED: Duration = Duration::from_secs(14);
/// The time that a refresh waits for the answer to the write of its pod status. The check comes meanwhile.
const HELD: Duration = Duration::from_secs(12);

/// Waits until the pod status of a volume names this version of its object, for as long as a refresh waits
/// for its answer.
async fn until_said(world: &World, volume: &Volume, version: &str) {
    let started = Instant::now();
    let expected = vec![("object".to_owned(), version.to_owned())];
    loop {
        let said = world.api.status_of(volume);
        if said.as_ref() == Some(&expected) {
            return;
        }
        assert!(started.elapsed() < HELD, "no {version}, but {said:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Somebody deletes the pod status that a refresh has just written. A check writes it again, from the record
/// that is still that of before.
#[test]
fn a_check_during_a_refresh_does_not_leave_the_versions_of_before() {
    alone(async {
        let flags = [&EAGER[..], &["--sync-interval=1s"]].concat();
        let mut world = World::start(&flags).await;
        let volume = world.volume_of_its_own();
        world.publish_patiently(&volume).await.unwrap();
        until_said(&world, &volume, "one").await;
        pass(NOT_CHECKED).await;

        let answer = Answer::file("pw", "two");
        world.provider.answers(&volume.class, answer);
        world.api.answer_status_late(&volume.class, HELD);
        let meanwhile = async {
            until_said(&world, &volume, "two").await;
            world.api.remove(&volume.pod_status());
            until_said(&world, &volume, "one").await;
            assert_eq!(volume.reads()["pw"], "one", "the refresh was not held");
        };
        let (refreshed, ()) = tokio::join!(world.publish_patiently(&volume), meanwhile);
        refreshed.unwrap();
        assert_eq!(volume.reads()["pw"], "two");
        let said = world.api.status_of(&volume).unwrap();
        assert_eq!(said, [("object".to_owned(), "two".to_owned())]);
    });
}
