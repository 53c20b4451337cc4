//! Checks that a provider is told the mounted versions only if the class asks for it and the content
//! is whole.

use std::fs;

use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, TestRunner},
};
use serde_json::json;

use crate::harness::{Answer, Class, EAGER, World, alone, class};

const ANNOTATION: &str = "secrets-store.csi.k8s.io/send-object-versions";

/// The events before a publish of kubelet, and during it.
#[derive(Clone, Debug)]
struct Step {
    annotation: Option<&'static str>,
    edited: bool,
    /// The damage to a file in the volume.
    damaged: Option<Damage>,
    rotated: bool,
    refuses_versions: bool,
    /// Whether the provider omits files from its answer when it is told that they are mounted.
    leaves_out: bool,
    fails: bool,
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    Removed,
    LinkRemoved,
    Renamed,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let annotation = prop_oneof![
        6 => Just(Some("true")),
        1 => Just(Some("false")),
        1 => Just(None),
        1 => prop::sample::select(&["", "True", "1", "yes"][..]).prop_map(Some),
    ];
    let often = prop::bool::weighted;
    let kinds = [Damage::Removed, Damage::LinkRemoved, Damage::Renamed];
    let damaged = prop::option::weighted(0.3, prop::sample::select(kinds.to_vec()));
    let step = (
        annotation,
        often(0.2),
        damaged,
        often(0.5),
        often(0.3),
        often(0.2),
        often(0.1),
    );
    let step = step.prop_map(
        |(annotation, edited, damaged, rotated, refuses_versions, leaves_out, fails)| Step {
            annotation,
            edited,
            damaged,
            rotated,
            refuses_versions,
            leaves_out,
            fails,
        },
    );
    prop::collection::vec(step, 1..8)
}

#[test]
fn versions_are_sent_only_where_the_class_wants_it_and_the_content_is_whole() {
    alone(async {
        let mut world = World::start(&EAGER).await;
        let mut runner = TestRunner::new(Config::with_cases(60));
        let mut seen = [0; 4];
        for _ in 0..runner.config().cases {
            let steps = steps().new_tree(&mut runner).unwrap().current();
            let volume = world.volume_of_its_own();
            let (mut generation, mut version) = (1, 0);
            // The generation, whether the class asked for versions, and the version of the last
            // successful publish.
            let mut success: Option<(i64, bool, u64)> = None;
            for (number, step) in steps.iter().enumerate() {
                generation += i64::from(step.edited);
                version += u64::from(step.rotated);
                let mut object = class(&volume.class, generation);
                let resource_version = 1000 + number;
                object["metadata"]["resourceVersion"] = json!(resource_version.to_string());
                if let Some(value) = step.annotation {
                    object["metadata"]["annotations"] = json!({ANNOTATION: value});
                }
                world.api.class_is(&volume.class, [Class::Is(object)]);
                let names = ["a", "b", "c"];
                world.provider.answers(
                    &volume.class,
                    Answer {
                        files: names
                            .iter()
                            .map(|name| ((*name).to_owned(), version.to_string().into_bytes()))
                            .collect(),
                        version: Some(version.to_string()),
                        refuses_versions: step.refuses_versions,
                        leaves_out: step.leaves_out,
                        status: step.fails.then_some(tonic::Code::NotFound),
                        ..Answer::default()
                    },
                );
                let damaged = step.damaged.filter(|_| success.is_some());
                if let Some(damage) = damaged {
                    let (link, file) = (volume.target.join("b"), volume.target.join("..data/b"));
                    // The file may be missing since an earlier step that failed.
                    let _ = match damage {
                        Damage::Removed => fs::remove_file(file),
                        Damage::LinkRemoved => fs::remove_file(link),
                        Damage::Renamed => fs::rename(&file, file.with_file_name("z")),
                    };
                }
                let is_whole = success.is_some() && volume.reads().len() == names.len();
                world.provider.asked();
                let published = world.publish_patiently(&volume).await;
                let told: Vec<_> = world
                    .provider
                    .asked()
                    .into_iter()
                    .map(|asked| asked["versions"].clone())
                    .collect();
                let case = format!("step {number} of {steps:?}: {published:?}");
                let wants = step.annotation == Some("true");
                let is_known = wants || matches!(step.annotation, None | Some("false"));
                let mounted = match success {
                    Some((of, true, mounted)) if wants && is_whole && of == generation => {
                        Some(json!([mounted.to_string()]))
                    }
                    _ => None,
                };
                let fails_with =
                    mounted.is_some() && (step.refuses_versions || step.leaves_out || step.fails);
                let expected = match (mounted, fails_with) {
                    _ if !is_known => Vec::new(),
                    (None, _) => vec![json!([])],
                    (Some(mounted), false) => vec![mounted],
                    (Some(mounted), true) => vec![mounted, json!([])],
                };
                assert_eq!(told, expected, "{case}");
                let is_refused = step.fails || !is_known;
                assert_eq!(published.is_err(), is_refused, "{case}");
                seen[expected.len()] += 1;
                if published.is_ok() {
                    assert_eq!(volume.reads().len(), names.len(), "{case}");
                    seen[3] += usize::from(!is_whole && success.is_some());
                    success = Some((generation, wants, version));
                }
            }
            world.unpublish(&volume).await.unwrap();
        }
        assert!(seen.iter().all(|&times| times > 5), "{seen:?}");
    });
}
