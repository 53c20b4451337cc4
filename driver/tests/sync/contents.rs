//! Tests which of a node's volumes have content, with generated states of several volumes.

use super::*;
use driver::mount::Detached;
use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use rstest::rstest;

/// The record of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Recorded {
    No,
    Yes,
    ForAnotherPod,
    ForAnotherPlace,
    Torn,
}

/// The files in a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lies {
    Nothing,
    /// Files that the driver has written completely.
    Complete,
    /// A content directory to which no `..data` leads.
    Partial,
    /// Files in the root directory.
    Plain,
}

/// The mount at a target path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mount {
    Nothing,
    Own,
    /// A tmpfs as an earlier driver mounts it.
    OfAnEarlierDriver,
    /// A tmpfs of another program: alone, or over a volume that has content.
    Foreign,
    ForeignOver,
    /// A bind mount of the same directory.
    Bind,
}

fn mount_at(target: &Path, args: &[&str]) {
    let mut mount = std::process::Command::new("mount");
    assert!(mount.args(args).arg(target).status().unwrap().success());
}

#[derive(Debug, Clone)]
struct State {
    mount: Mount,
    recorded: Recorded,
    lies: Lies,
    by_provider: bool,
    order: u64,
}

impl State {
    /// Returns whether the volume has content, by the documented rule.
    fn counts(&self) -> bool {
        let complete = if self.by_provider {
            self.lies != Lies::Nothing
        } else {
            self.lies == Lies::Complete
        };
        let mounted = matches!(self.mount, Mount::Own | Mount::OfAnEarlierDriver);
        mounted && self.recorded == Recorded::Yes && complete
    }

    fn make(&self, dir: &Path, pod: &str) {
        let target = target(dir, pod);
        match self.mount {
            Mount::Own => make_and_mount(&target),
            Mount::ForeignOver => {
                make_and_mount(&target);
                write(&target, &[("pw", "covered")]);
            }
            _ => fs::create_dir_all(&target).unwrap(),
        }
        match self.mount {
            Mount::Nothing | Mount::Own => {}
            Mount::OfAnEarlierDriver => mount_at(&target, &["-t", "tmpfs", "tmpfs"]),
            Mount::Foreign | Mount::ForeignOver => mount_at(&target, &["-t", "tmpfs", "foreign"]),
            Mount::Bind => mount_at(&target, &["--bind", target.to_str().unwrap()]),
        }
        let text = format!("of {pod}");
        match self.lies {
            Lies::Nothing => {}
            Lies::Complete => write(&target, &[("pw", &text), ("deep/pw", "x")]),
            Lies::Partial => {
                let tree = target.join("..2026_11_23_16_19_05.123456789");
                fs::create_dir(&tree).unwrap();
                fs::write(tree.join("pw"), &text).unwrap();
            }
            Lies::Plain => fs::write(target.join("pw"), &text).unwrap(),
        }
        let mut record = record(dir, pod, &self.order.to_string());
        if self.by_provider {
            record.writer = Writer::Provider;
            record.orders = BTreeMap::from([(String::new(), self.order.to_string())]);
        }
        let path = dir.join("records").join(format!("csi-{pod}.json"));
        match self.recorded {
            Recorded::No => return,
            Recorded::Yes => {}
            Recorded::ForAnotherPod => record.pod.uid = "another".to_owned(),
            Recorded::ForAnotherPlace => record.target_path = dir.join("elsewhere"),
            Recorded::Torn => {
                fs::write(path, "{\"format\":1,\"vol").unwrap();
                return;
            }
        }
        records(dir).put(&record).unwrap();
    }
}

fn states() -> impl Strategy<Value = Vec<State>> {
    use {Lies::*, Recorded::*};
    let recorded = prop_oneof![
        3 => Just(Yes),
        1 => prop::sample::select(vec![No, ForAnotherPod, ForAnotherPlace, Torn]),
    ];
    let lies = prop_oneof![
        3 => Just(Complete),
        1 => prop::sample::select(vec![Nothing, Partial, Plain]),
    ];
    let mount = prop_oneof![
        3 => Just(Mount::Own),
        3 => prop::sample::select(vec![
            Mount::Nothing,
            Mount::OfAnEarlierDriver,
            Mount::Foreign,
            Mount::ForeignOver,
            Mount::Bind,
        ]),
    ];
    let by_provider = prop::bool::weighted(0.2);
    let state =
        (mount, recorded, lies, by_provider).prop_map(|(mount, recorded, lies, by_provider)| {
            State {
                mount,
                recorded,
                // A provider never leaves a directory of the driver's.
                lies: match (by_provider, lies) {
                    (true, Partial) => Plain,
                    (_, lies) => lies,
                },
                by_provider,
                order: 0,
            }
        });
    let orders = Just((1..=5_u64).collect::<Vec<_>>()).prop_shuffle();
    (prop::collection::vec(state, 1..5), orders).prop_map(|(mut states, orders)| {
        for (state, order) in states.iter_mut().zip(orders) {
            state.order = order;
        }
        states
    })
}

/// The Secret includes "*", so that any file that is taken for content shows. It is made from the
/// newest volume with content, or stays as it was, and no pod is told of an error.
#[tokio::test]
async fn only_what_is_mounted_recorded_and_complete_is_content() {
    if !is_alone() {
        return;
    }
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    for _ in 0..40 {
        let states = states().new_tree(&mut runner).unwrap().current();
        only_content_decides(&states).await;
    }
}

async fn only_content_decides(states: &[State]) {
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let all = json!([{"secretName": "creds", "type": "Opaque", "data": [{"objectName": "*"}]}]);
    api.put_class(&all, "1");
    records(dir.path());
    for (number, state) in states.iter().enumerate() {
        let pod = format!("web-{number}");
        api.pod(&pod, Some(("ReplicaSet", "rs")), "Running");
        state.make(dir.path(), &pod);
    }
    // An earlier driver wrote the Secret: without an order, older than all volumes.
    let before = json!({
        "metadata": {
            "name": "creds", "uid": "u", "resourceVersion": "100",
            "labels": {"secrets-store.csi.k8s.io/managed": "true"},
            "annotations": {
                "secrets-store.csi.k8s.io/class": "db",
                "secrets-store.csi.k8s.io/class-uid": "class",
                "secrets-store.csi.k8s.io/content-since": "2020-01-01T00:00:00Z",
            },
        },
        "type": "Opaque", "data": {"pw": "YmVmb3Jl"},
    });
    api.put(SECRET, before.clone());
    let sync = sync(dir.path(), &cluster, Duration::from_millis(40));
    let stop = run(&sync);
    let counting = states
        .iter()
        .enumerate()
        .filter(|(_, state)| state.counts());
    let newest = counting.max_by_key(|(_, state)| state.order);
    if states.iter().any(|s| {
        matches!(
            s.recorded,
            Recorded::Yes | Recorded::ForAnotherPod | Recorded::ForAnotherPlace
        )
    }) {
        // Each check of the class is followed by one of the Secret.
        until("the class has been looked at", || api.count(CLASS) >= 6).await;
    }
    stop.cancel();
    let secret = api.get(SECRET).unwrap();
    match newest {
        None => assert_eq!(secret, before, "{states:#?}"),
        Some((number, state)) => {
            let text = base64(&format!("of web-{number}"));
            assert_eq!(secret["data"]["pw"], text, "{states:#?}");
            let order =
                &secret["metadata"]["annotations"]["secrets-store.csi.k8s.io/content-order"];
            assert_eq!(*order, state.order.to_string());
        }
    }
    assert_eq!(api.events(), Vec::<String>::new(), "{states:#?}");
    for number in 0..states.len() {
        let target = target(dir.path(), &format!("web-{number}"));
        while !matches!(mount::detach(&target).unwrap(), Detached::Nothing) {}
    }
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// A volume that an earlier driver recorded, without orders, replaces no content with a plausible
/// order, whatever the version of its pod status and the clocks say, until a refresh has given it an
/// order. If the Secret has none, the times decide, and no order is invented.
#[rstest]
#[case::touched_since(Some("15"), "17", "2020-01-01T00:00:00Z", false)]
#[case::touched_long_before(Some("15"), "3", "2020-01-01T00:00:00Z", false)]
#[case::newer_by_the_clocks(Some("15"), "17", "2126-01-01T00:00:00Z", false)]
#[case::of_another_cluster(Some("900"), "17", "2020-01-01T00:00:00Z", true)]
#[case::of_an_earlier_driver(None, "17", "2020-01-01T00:00:00Z", true)]
#[tokio::test]
async fn a_volume_without_an_order_beats_none(
    #[case] order: Option<&str>,
    #[case] status: &str,
    #[case] since: &str,
    #[case] written: bool,
) {
    let (dir, api, cluster) = start!();
    let class = class(&api, &cluster, creds()).await;
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    let earlier = Record {
        orders: BTreeMap::new(),
        ..volume(dir.path(), "web")
    };
    records(dir.path()).put(&earlier).unwrap();
    let path = "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasspodstatuses/web-shop-db";
    let owners = json!([{"apiVersion": "v1", "kind": "Pod", "name": "web", "uid": "uid-web"}]);
    let metadata =
        json!({"name": "web-shop-db", "resourceVersion": status, "ownerReferences": owners});
    api.put(path, json!({"metadata": metadata}));
    // Except for its content the Secret is as desired, so that nothing else is written.
    let mut before = json!({
        "metadata": {
            "name": "creds", "uid": "u", "resourceVersion": "100",
            "ownerReferences": [{
                "apiVersion": "x/v1", "kind": "ReplicaSet", "name": "rs", "uid": "rs",
            }],
            "labels": {"secrets-store.csi.k8s.io/managed": "true"},
            "annotations": {
                "secrets-store.csi.k8s.io/class": "db",
                "secrets-store.csi.k8s.io/class-uid": "class",
                "secrets-store.csi.k8s.io/content-since": since,
            },
        },
        "type": "Opaque", "data": {"pw": "b3RoZXI="},
    });
    let annotation = "secrets-store.csi.k8s.io/content-order";
    if let Some(order) = order {
        before["metadata"]["annotations"][annotation] = json!(order);
    }
    api.put(SECRET, before);
    let sync = sync(dir.path(), &cluster, EVERY);
    sync.volume_mounted(&earlier, &class).await.unwrap();
    let secret = api.get(SECRET).unwrap();
    assert_eq!(secret["data"]["pw"] == base64("hunter2"), written);
    let said = secret["metadata"]["annotations"].get(annotation);
    assert_eq!(said, (!written).then(|| json!(order)).as_ref());
    let namespace = &earlier.pod.namespace;
    assert_eq!(sync.was_overtaken(namespace, "db"), !written);
    assert!(!sync.was_overtaken(namespace, "db"), "it is said once");
    // A refresh gives the volume an order.
    let refreshed = record(dir.path(), "web", "99");
    records(dir.path()).put(&refreshed).unwrap();
    sync.volume_mounted(&refreshed, &class).await.unwrap();
    let secret = api.get(SECRET).unwrap();
    assert_eq!(secret["data"]["pw"], base64("hunter2"));
    assert_eq!(secret["metadata"]["annotations"][annotation], "99");
    drop(mount::detach(&earlier.target_path).unwrap());
}

/// A deleted Secret is created by the node with the newest content, and by a node with older content
/// only if no other node has created it for longer than an interval.
#[rstest]
#[case::older("15", "14", true)]
#[case::much_older("900", "3", true)]
#[case::newest("15", "15", false)]
#[tokio::test]
async fn a_deleted_secret_is_left_to_the_newest_content(
    #[case] seen: &str,
    #[case] ours: &str,
    #[case] waits: bool,
) {
    let (dir, api, cluster) = start!();
    let class = class(&api, &cluster, creds()).await;
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    volume(dir.path(), "web");
    let record = record(dir.path(), "web", ours);
    records(dir.path()).put(&record).unwrap();
    let sync = sync(dir.path(), &cluster, EVERY);
    sync.volume_mounted(&record, &class).await.unwrap();
    // Another node writes newer content.
    let mut theirs = api.get(SECRET).unwrap();
    theirs["metadata"]["resourceVersion"] = json!("1000");
    theirs["metadata"]["annotations"]["secrets-store.csi.k8s.io/content-order"] = json!(seen);
    if waits {
        theirs["data"]["pw"] = json!(base64("newer"));
    }
    api.put(SECRET, theirs);
    let stop = run(&sync);
    api.requests();
    let read = "GET /api/v1/namespaces/shop/secrets/creds";
    until("it is looked at", || api.count(read) > 2).await;
    let removed = {
        api.remove(SECRET);
        api.requests();
        until("it is made again", || api.get(SECRET).is_some()).await;
        api.requests()
    };
    let made = removed
        .iter()
        .position(|r| r.starts_with("POST") && r.contains("/secrets?"));
    let made = made.unwrap_or_else(|| panic!("{removed:?}"));
    // A check reads the cache first, and the store if something differs.
    let looks = removed[..made]
        .iter()
        .filter(|r| r.starts_with(read))
        .count()
        / 2;
    assert_eq!(looks > 1, waits, "{removed:?}");
    assert_eq!(api.get(SECRET).unwrap()["data"]["pw"], base64("hunter2"));
    stop.cancel();
    drop(mount::detach(&record.target_path).unwrap());
}
