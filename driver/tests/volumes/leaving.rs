//! Checks that the end of a pod does not wait for a provider that does not answer.

use std::time::{Duration, Instant};

use driver::mount::TargetState;
use serde_json::json;
use tonic::Code;

use crate::harness::{Answer, EAGER, Volume, World, alone};

/// A time that is far shorter than a call to a provider may take.
const SOON: Duration = Duration::from_secs(30);

fn hanging() -> Answer {
    Answer {
        hangs: true,
        ..Answer::default()
    }
}

/// First mounts and refreshes learn that the pod ends from an unpublish, and from the API server,
/// because kubelet sends no unpublish before its publish has ended.
#[test]
fn a_pod_that_goes_does_not_wait_for_a_provider_that_hangs() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let mut cases = Vec::new();
        for is_refresh in [false, true] {
            for unpublishes in [false, true] {
                let volume = world.volume_of_its_own();
                if is_refresh {
                    world.publish_patiently(&volume).await.unwrap();
                }
                world.provider.answers(&volume.class, hanging());
                if !unpublishes {
                    let mut pod = world.api.get(&volume.pod()).unwrap();
                    pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
                    world.api.put(&volume.pod(), pod);
                }
                cases.push((is_refresh, unpublishes, volume));
            }
        }
        let world = &world;
        let run = async |(is_refresh, unpublishes, volume): &(bool, bool, Volume)| {
            let started = Instant::now();
            let case = format!("refresh: {is_refresh}, unpublish: {unpublishes}");
            let publish = async {
                let answer = world.publish_patiently(volume).await;
                assert_eq!(answer.unwrap_err().code(), Code::Cancelled, "{case}");
            };
            let unpublish = async {
                if *unpublishes {
                    // The publish waits for the provider now.
                    while volume.state() != TargetState::Mounted || world.provider.waits() < 4 {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    world.try_to_unpublish(volume).await.unwrap();
                    assert!(started.elapsed() < SOON / 3, "{case}");
                }
            };
            tokio::join!(publish, unpublish);
            assert!(started.elapsed() < SOON, "{case}: {:?}", started.elapsed());
            let kept = *is_refresh && !unpublishes;
            assert_eq!(world.record(volume).is_some(), kept, "{case}");
            assert_eq!(volume.state() == TargetState::Mounted, kept, "{case}");
        };
        let [a, b, c, d] = &cases[..] else {
            unreachable!("four cases")
        };
        tokio::join!(run(a), run(b), run(c), run(d));
    });
}
