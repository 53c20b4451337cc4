//! Checks classes that are read out of order, from a cache that lags behind or a slow server: no
//! provider is asked with an older class than the one that is mounted.

use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, TestRunner},
};
use serde_json::Value;

use crate::harness::{Answer, Class, EAGER, World, alone, class};

/// A publish of kubelet, and the state in which it happens.
#[derive(Debug, Clone)]
struct Look {
    /// The generations that the API server returns, one after the other.
    reads: Vec<i64>,
    /// Whether the provider answers.
    answers: bool,
    versions: Versions,
}

/// The versions that the API server gives to a class.
#[derive(Debug, Clone, Copy)]
enum Versions {
    Both,
    NoGeneration,
    /// The resource version is not a number.
    NoNumbers,
}

fn looks() -> impl Strategy<Value = Vec<Look>> {
    let versions = prop_oneof![
        4 => Just(Versions::Both),
        1 => Just(Versions::NoGeneration),
        1 => Just(Versions::NoNumbers),
    ];
    let look = (
        prop::collection::vec(1_i64..8, 1..4),
        prop::bool::weighted(0.7),
    );
    (versions, prop::collection::vec(look, 1..12)).prop_map(|(versions, looks)| {
        looks
            .into_iter()
            .map(|(reads, answers)| Look {
                reads,
                answers,
                versions,
            })
            .collect()
    })
}

fn state(name: &str, generation: i64, versions: Versions) -> Class {
    let mut object = class(name, generation);
    match versions {
        Versions::Both => {}
        Versions::NoGeneration => {
            let metadata = object["metadata"].as_object_mut().unwrap();
            metadata.remove("generation");
        }
        Versions::NoNumbers => {
            object["metadata"]["resourceVersion"] = format!("v{generation}").into();
        }
    }
    Class::Is(object)
}

fn generation(asked: &Value) -> i64 {
    asked["generation"].as_str().unwrap().parse().unwrap()
}

/// Returns an answer with a file that holds the generation of the class.
fn answer(generation: i64) -> Answer {
    Answer::file("generation", &generation.to_string())
}

#[test]
fn no_provider_is_asked_with_an_older_class_than_the_mounted_one() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let mut runner = TestRunner::new(Config::with_cases(150));
        let mut refreshed = 0;
        for _ in 0..runner.config().cases {
            let looks = looks().new_tree(&mut runner).unwrap().current();
            let volume = world.volume_of_its_own();
            let name = &volume.class;
            let mut mounted = 0;
            let mut newest = 0;
            for look in &looks {
                let reads = look.reads.iter();
                let reads = reads.map(|&generation| state(name, generation, look.versions));
                world.api.class_is(name, reads);
                let refusal = Answer {
                    status: Some(tonic::Code::PermissionDenied),
                    ..Answer::default()
                };
                world
                    .provider
                    .answers(name, if look.answers { answer(0) } else { refusal });
                world.provider.asked();
                let published = world.publish_patiently(&volume).await;
                for asked in world.provider.asked() {
                    let asked = generation(&asked);
                    assert!(asked >= mounted, "{asked} after {mounted}: {looks:?}");
                    newest = newest.max(asked);
                    if published.is_ok() {
                        mounted = asked;
                        refreshed += 1;
                    }
                }
                if mounted > 0 {
                    let record = world.record(&volume).unwrap();
                    let version = record.class.resource_version.trim_start_matches('v');
                    let recorded: i64 = version.parse().unwrap();
                    assert!(recorded == mounted || recorded == mounted * 10);
                }
            }
            // Reads out of order do not prevent the newest class from being used.
            let last = &looks[0].versions;
            world.api.class_is(name, [state(name, 9, *last)]);
            world.provider.answers(name, answer(9));
            world.publish_patiently(&volume).await.unwrap();
            assert_eq!(volume.reads()["generation"], "9");
            world.unpublish(&volume).await.unwrap();
        }
        assert!(refreshed > 300, "{refreshed}");
    });
}

/// If a node lost the content and has the record, the class that it reads must not be older.
#[test]
fn a_volume_that_is_mounted_again_gets_no_older_class() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        for unmounted in [false, true] {
            let volume = world.volume_of_its_own();
            let name = &volume.class;
            world.api.class_is(name, [state(name, 5, Versions::Both)]);
            world.publish_patiently(&volume).await.unwrap();
            if unmounted {
                volume.unmount();
            } else {
                std::fs::remove_file(volume.target.join("..data")).unwrap();
            }
            world.provider.asked();
            world.api.class_is(name, [state(name, 4, Versions::Both)]);
            let status = world.publish_patiently(&volume).await.unwrap_err();
            assert_eq!(status.code(), tonic::Code::Unavailable);
            assert!(status.message().contains("older state"), "{status}");
            assert_eq!(world.provider.asked(), Vec::<Value>::new());
            world.api.class_is(name, [state(name, 5, Versions::Both)]);
            world.publish_patiently(&volume).await.unwrap();
            assert_eq!(volume.reads()["pw"], "one");
        }
    });
}

/// A class that a cache does not have yet is not announced as gone.
#[test]
fn a_class_that_a_cache_does_not_know_yet_is_read_again() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let volume = world.volume_of_its_own();
        world.publish_patiently(&volume).await.unwrap();
        let name = &volume.class;
        let whole = Class::Is(class(name, 1));
        world.api.class_is(name, [Class::Refused(404), whole]);
        world.publish_patiently(&volume).await.unwrap();
        world.api.class_is(name, [Class::Refused(404)]);
        assert!(world.publish_patiently(&volume).await.is_err());
    });
}
