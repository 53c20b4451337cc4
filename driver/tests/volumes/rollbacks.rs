//! Checks Secrets of classes with volumes on two nodes, while the store changes, also back to former
//! values, and pods come, go and miss values.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use serde_json::{Value, json};

use crate::harness::{Answer, Class, EAGER, Volume, World, alone, class};

/// The time for a few checks of the driver on a busy machine.
const SOON: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The store has this value from now on.
    Store(u8),
    /// A node refreshes its volume, if it has one.
    Refresh(usize),
    /// A pod starts on a node that has none.
    Comes(usize),
    /// The pod of a node ends.
    Goes(usize),
}

fn histories() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..3_u8).prop_map(Step::Store),
        3 => (0..2_usize).prop_map(Step::Refresh),
        2 => (0..2_usize).prop_map(Step::Comes),
        1 => (0..2_usize).prop_map(Step::Goes),
    ];
    prop::collection::vec(step, 1..16)
}

/// A class whose volumes go through a history.
struct Case {
    name: String,
    history: Vec<Step>,
    store: u8,
    pods: [Option<Volume>; 2],
}

impl Case {
    async fn go(&mut self, nodes: &mut [World; 2], step: Step) {
        match step {
            Step::Store(value) => {
                self.store = value;
                for node in nodes.iter() {
                    let answer = Answer::file("pw", &value.to_string());
                    node.provider.answers(&self.name, answer);
                }
            }
            Step::Refresh(node) => {
                if let Some(volume) = &self.pods[node] {
                    nodes[node].publish_patiently(volume).await.unwrap();
                }
            }
            Step::Comes(node) if self.pods[node].is_none() => {
                let volume = nodes[node].volume(&self.name);
                let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs",
                    "uid": "rs", "controller": true});
                let pod = json!({
                    "metadata": {"name": volume.id, "uid": volume.uid, "ownerReferences": [owner]},
                    "status": {"phase": "Running"},
                });
                let path = format!("/api/v1/namespaces/shop/pods/{}", volume.id);
                nodes[node].api.put(&path, pod);
                nodes[node].publish_patiently(&volume).await.unwrap();
                self.pods[node] = Some(volume);
            }
            Step::Comes(_) => {}
            Step::Goes(node) => {
                if let Some(volume) = self.pods[node].take() {
                    nodes[node].unpublish(&volume).await.unwrap();
                }
            }
        }
    }

    fn is_in_step(&self, nodes: &[World; 2]) -> bool {
        let path = format!("/api/v1/namespaces/shop/secrets/{}", self.name);
        let secret = nodes[0].api.get(&path).unwrap_or_default();
        secret["data"]["pw"] == STANDARD.encode(self.store.to_string())
    }

    /// Returns the resource versions of the pod statuses of its volumes.
    fn versions(&self, nodes: &[World; 2]) -> BTreeMap<String, Value> {
        let version = |volume: &Volume| {
            let path = volume.pod_status();
            let status = nodes[0].api.get(&path).unwrap();
            (path, status["metadata"]["resourceVersion"].clone())
        };
        self.pods.iter().flatten().map(version).collect()
    }
}

async fn refresh_all(nodes: &mut [World; 2], cases: &mut [Case]) {
    for case in cases {
        for node in [0, 1] {
            case.go(nodes, Step::Refresh(node)).await;
        }
    }
}

/// When every volume has been refreshed, the Secret has the value of the store, even if the store
/// had this value before or a node has missed another one. After that nothing is written.
#[test]
fn a_secret_follows_the_store_also_back() {
    alone(async {
        let flags: Vec<&str> = EAGER.into_iter().chain(["--sync-interval=1s"]).collect();
        let first = World::start(&flags).await;
        let second = World::beside(&first, &flags).await;
        let mut nodes = [first, second];
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        use Step::*;
        let back = vec![Comes(0), Comes(1), Store(1), Refresh(1), Goes(1), Store(0)];
        let mut back_on_one = back.clone();
        back_on_one.extend([
            Refresh(0),
            Comes(1),
            Store(2),
            Refresh(0),
            Goes(0),
            Store(0),
        ]);
        let mut all = vec![back, back_on_one];
        all.extend((0..14).map(|_| histories().new_tree(&mut runner).unwrap().current()));
        let mut cases = Vec::new();
        for (number, history) in all.into_iter().enumerate() {
            let name = format!("case-{number}");
            let mut object = class(&name, 1);
            object["spec"]["secretObjects"] = json!([{"secretName": name, "type": "Opaque",
                "data": [{"objectName": "pw", "key": "pw"}]}]);
            nodes[0].api.class_is(&name, [Class::Is(object)]);
            let mut case = Case {
                name,
                history: history.clone(),
                store: 0,
                pods: [None, None],
            };
            case.go(&mut nodes, Store(0)).await;
            for step in history {
                case.go(&mut nodes, step).await;
            }
            if case.pods.iter().all(Option::is_none) {
                case.go(&mut nodes, Comes(0)).await;
            }
            cases.push(case);
        }
        let started = Instant::now();
        loop {
            refresh_all(&mut nodes, &mut cases).await;
            let behind = cases.iter().filter(|case| !case.is_in_step(&nodes));
            let behind: Vec<_> = behind.map(|case| &case.history).collect();
            if behind.is_empty() {
                break;
            }
            assert!(started.elapsed() < SOON, "behind the store: {behind:#?}");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        let started = Instant::now();
        loop {
            let versions = |cases: &[Case]| -> Vec<_> {
                cases.iter().map(|case| case.versions(&nodes)).collect()
            };
            let before = versions(&cases);
            // Each Secret is checked in this time.
            tokio::time::sleep(Duration::from_millis(2500)).await;
            refresh_all(&mut nodes, &mut cases).await;
            let now: Vec<_> = cases.iter().map(|case| case.versions(&nodes)).collect();
            if now == before {
                break;
            }
            assert!(started.elapsed() < SOON, "pod statuses are written at rest");
        }
        assert!(cases.iter().all(|case| case.is_in_step(&nodes)));
        for node in &mut nodes {
            node.stop_driver().await;
        }
    });
}
