//! Tests whether a pod status is written: every kind of pod, against every object that may exist.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "api/server.rs"]
mod server;

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use driver::{
    cluster::{
        Cluster,
        pod_status::{Aspect, Cause, DesiredPodStatus, StatusOf, Trouble},
    },
    record::{Object, Pod},
};
use embedded::api::{ApiServer, Reaction};
use rstest::rstest;
use serde_json::{Value, json};

const STATUSES: &str =
    "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasspodstatuses";
const POD: &str = "/api/v1/namespaces/shop/pods/web";
const TARGET: &str = "/pods/ours/mount";

/// An API server that notes writes, but for those of names that are taken.
struct Api {
    server: Arc<ApiServer>,
    writes: Arc<Mutex<Vec<String>>>,
}

impl Api {
    async fn start(dir: &Path) -> (Self, Cluster) {
        let (server, cluster) = server::start(dir).await;
        let server = Arc::new(server);
        let writes = Arc::<Mutex<Vec<String>>>::default();
        let (noted, stored) = (Arc::clone(&writes), Arc::downgrade(&server));
        server.intercept(move |call| {
            if call.method != "GET" {
                let object: Value = serde_json::from_slice(call.body).unwrap();
                let name = object["metadata"]["name"].as_str().unwrap();
                let path = format!("{}/{name}", call.uri.split('?').next().unwrap());
                let stored = stored.upgrade().unwrap();
                if call.method != "POST" || stored.get(&path).is_none() {
                    let mut writes = noted.lock().unwrap();
                    writes.push(format!("{} {name}", call.method));
                }
            }
            Reaction::Serve
        });
        (Self { server, writes }, cluster)
    }

    fn put(&self, path: String, object: Value) {
        self.server.put(&path, object).unwrap();
    }

    fn get(&self, path: &str) -> Option<Value> {
        self.server.get(path)
    }

    fn writes(&self) -> Vec<String> {
        std::mem::take(&mut self.writes.lock().unwrap())
    }
}

/// The object that has the name of our pod's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum There {
    Nothing,
    /// Our pod's status, with the versions of now, or with others.
    Ours,
    OursOfBefore,
    /// The status of another volume of our pod.
    AnotherVolumes,
    /// The status of another pod of the same name, earlier or later.
    AnotherPods,
    /// The status of a pod that is called `web-shop`, in a namespace that is called `shop`.
    OfALikeName,
    /// An object that somebody has made by hand.
    Nobodys,
}

/// The pod that has our pod's name in the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Ours,
    OursThatGoes,
    Another,
    None,
}

fn status(pod: &str, uid: Option<&str>, class: &str, target: &str, version: &str) -> Value {
    let owner =
        uid.map(|uid| json!([{"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid}]));
    json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClassPodStatus",
        "metadata": {
            "name": "web-shop-db", "namespace": "shop", "uid": "status", "resourceVersion": "1",
            "labels": {"internal.secrets-store.csi.k8s.io/node-name": "node-1"},
            "ownerReferences": owner,
        },
        "status": {
            "podName": pod, "secretProviderClassName": class, "mounted": true,
            "targetPath": target, "objects": [{"id": "a", "version": version}],
        },
    })
}

async fn world(dir: &Path, there: There, known: Known) -> (Api, Cluster) {
    let (api, cluster) = Api::start(dir).await;
    let object = match there {
        There::Nothing => None,
        There::Ours => Some(status("web", Some("ours"), "db", TARGET, "1")),
        There::OursOfBefore => Some(status("web", Some("ours"), "db", TARGET, "0")),
        There::AnotherVolumes => Some(status("web", Some("ours"), "db", "/pods/ours/2", "1")),
        There::AnotherPods => Some(status("web", Some("another"), "db", "/pods/another", "9")),
        There::OfALikeName => Some(status("web-shop", Some("third"), "db", "/pods/third", "9")),
        There::Nobodys => Some(status("web", None, "db", "/pods/nobody", "9")),
    };
    if let Some(object) = object {
        api.put(format!("{STATUSES}/web-shop-db"), object);
    }
    let pod = |uid: &str, going: Option<&str>| json!({"metadata": {"name": "web", "uid": uid, "deletionTimestamp": going}});
    match known {
        Known::Ours => api.put(POD.to_owned(), pod("ours", None)),
        Known::OursThatGoes => api.put(POD.to_owned(), pod("ours", Some("2026-11-23T10:00:00Z"))),
        Known::Another => api.put(POD.to_owned(), pod("another", None)),
        Known::None => {}
    }
    (api, cluster)
}

fn our_pod() -> Pod {
    Pod {
        name: "web".to_owned(),
        namespace: "shop".to_owned(),
        uid: "ours".to_owned(),
    }
}

fn objects() -> Vec<Object> {
    vec![Object {
        id: "a".to_owned(),
        version: "1".to_owned(),
    }]
}

fn mounted<'a>(pod: &'a Pod, objects: &'a [Object]) -> DesiredPodStatus<'a> {
    DesiredPodStatus {
        volume_id: "csi-1",
        pod,
        class: "db",
        target_path: TARGET,
        node: "node-1",
        objects,
        new_order: None,
    }
}

/// Returns whether the object is still as it was at the beginning.
fn is_as_before(api: &Api, there: There) -> bool {
    let now = api.get(&format!("{STATUSES}/web-shop-db"));
    there == There::Nothing
        || now.is_some_and(|object| object["metadata"]["resourceVersion"] == json!("1"))
}

#[rstest]
#[tokio::test]
async fn a_publish_writes_its_own(
    #[values(
        There::Nothing,
        There::Ours,
        There::OursOfBefore,
        There::AnotherVolumes,
        There::AnotherPods,
        There::OfALikeName,
        There::Nobodys
    )]
    there: There,
    #[values(Known::Ours, Known::OursThatGoes, Known::Another, Known::None)] known: Known,
) {
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = world(dir.path(), there, known).await;
    let (pod, objects) = (our_pod(), objects());
    let written = cluster
        .write_pod_status(&mounted(&pod, &objects), None)
        .await;
    let (written, writes) = (written.unwrap(), api.writes());
    match there {
        There::Nothing => assert_eq!(writes, ["POST web-shop-db"]),
        There::Ours => assert_eq!(writes, Vec::<String>::new()),
        There::OursOfBefore => assert_eq!(writes, ["PUT web-shop-db"]),
        There::AnotherVolumes | There::OfALikeName => {
            assert_eq!(writes.len(), 1);
            assert!(writes[0].starts_with("POST web-shop-db-"), "{writes:?}");
            assert!(is_as_before(&api, there));
        }
        There::AnotherPods | There::Nobodys if known == Known::Ours => {
            assert_eq!(writes, ["PUT web-shop-db"]);
        }
        There::AnotherPods | There::Nobodys => {
            assert_eq!(writes, Vec::<String>::new());
            assert!(is_as_before(&api, there));
            assert_eq!(written.resource_version, "");
            return;
        }
    }
    let object = api.get(&format!("{STATUSES}/{}", written.name)).unwrap();
    assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], "ours");
    assert_eq!(object["status"]["objects"][0]["version"], "1");
    assert_eq!(
        object["metadata"]["resourceVersion"],
        written.resource_version
    );
}

/// Whether there is an object is known of a volume that was mounted before, so that no write is tried that
/// must fail.
#[rstest]
#[case::first(There::Nothing, None, &["create"])]
#[case::changed(There::OursOfBefore, Some("web-shop-db"), &["get", "update"])]
#[case::unchanged(There::Ours, Some("web-shop-db"), &["get"])]
#[case::deleted_by_hand(There::Nothing, Some("web-shop-db"), &["get", "create"])]
#[case::left_by_an_earlier_pod(There::AnotherPods, None, &["create", "get", "get", "update"])]
#[tokio::test]
async fn a_write_takes_these_requests(
    #[case] there: There,
    #[case] before: Option<&str>,
    #[case] expected: &[&str],
) {
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = world(dir.path(), there, Known::Ours).await;
    let (pod, objects) = (our_pod(), objects());
    api.server.reset_requests();
    let written = cluster
        .write_pod_status(&mounted(&pod, &objects), before)
        .await;
    assert_eq!(written.unwrap().name, "web-shop-db");
    let requests = api.server.requests();
    let verbs: Vec<_> = requests.iter().map(|request| &*request.verb).collect();
    assert_eq!(verbs, expected);
}

#[rstest]
#[tokio::test]
async fn a_look_makes_it_again_for_a_pod_that_lives(
    #[values(
        There::Nothing,
        There::Ours,
        There::OursOfBefore,
        There::AnotherPods,
        There::Nobodys
    )]
    there: There,
    #[values(Known::Ours, Known::OursThatGoes, Known::Another, Known::None)] known: Known,
) {
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = world(dir.path(), there, known).await;
    let (pod, objects) = (our_pod(), objects());
    let mounted = mounted(&pod, &objects);
    let made = cluster.keep_pod_status(&mounted, "web-shop-db").await;
    let (made, writes) = (made.unwrap(), api.writes());
    let is_ours = matches!(there, There::Ours | There::OursOfBefore);
    if is_ours || known != Known::Ours {
        assert_eq!(writes, Vec::<String>::new());
        assert!(!made && is_as_before(&api, there));
        return;
    }
    assert!(made && writes.len() == 1, "{writes:?}");
    let object = api.get(&format!("{STATUSES}/web-shop-db")).unwrap();
    assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], "ours");
    assert_eq!(object["status"]["targetPath"], TARGET);
}

/// The owner of an object that somebody has edited by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owned {
    Ours,
    Nobodys,
    NoField,
    AnEarlierPods,
    OfALikeName,
}

const PARTS: [&str; 5] = [
    "podName",
    "secretProviderClassName",
    "mounted",
    "targetPath",
    "objects",
];

/// Whichever fields somebody removed by hand, and whoever is left as the owner: the object is
/// repaired, and no second one is made beside it.
#[rstest]
#[tokio::test]
async fn what_somebody_emptied_is_repaired_in_place(
    #[values(
        Owned::Ours,
        Owned::Nobodys,
        Owned::NoField,
        Owned::AnEarlierPods,
        Owned::OfALikeName
    )]
    owned: Owned,
    #[values(true, false)] by_a_check: bool,
) {
    let dir = tempfile::tempdir().unwrap();
    let path = format!("{STATUSES}/web-shop-db");
    for removed in 0..=1_usize << PARTS.len() {
        let (api, cluster) = world(dir.path(), There::Ours, Known::Ours).await;
        let mut object = status("web", Some("ours"), "db", TARGET, "1");
        let whole = object.clone();
        let removes = |number: usize| removed & (1 << number) != 0;
        for (number, part) in PARTS.into_iter().enumerate() {
            if removes(number) {
                object["status"].as_object_mut().unwrap().remove(part);
            }
        }
        let metadata = object["metadata"].as_object_mut().unwrap();
        let owner = |name: &str, uid: &str| json!([{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}]);
        match owned {
            Owned::Ours => {}
            Owned::Nobodys => drop(metadata.insert("ownerReferences".to_owned(), json!([]))),
            Owned::NoField => drop(metadata.remove("ownerReferences")),
            Owned::AnEarlierPods => {
                metadata.insert("ownerReferences".to_owned(), owner("web", "before"));
            }
            Owned::OfALikeName => {
                metadata.insert("ownerReferences".to_owned(), owner("web-shop", "third"));
            }
        }
        // The last object has lost its whole status.
        if removed == 1 << PARTS.len() {
            object.as_object_mut().unwrap().remove("status");
        }
        let is_whole = object == whole;
        api.put(path.clone(), object);
        let (pod, objects) = (our_pod(), objects());
        let mounted = mounted(&pod, &objects);
        if by_a_check {
            let kept = cluster.keep_pod_status(&mounted, "web-shop-db").await;
            assert_eq!(kept.unwrap(), !is_whole, "{removed:b}");
        } else {
            let written = cluster.write_pod_status(&mounted, Some("web-shop-db"));
            let is_ours = written.await.unwrap().name == "web-shop-db";
            let names_pod = !removes(0) && removed < 1 << PARTS.len();
            assert_eq!(is_ours, owned != Owned::OfALikeName || names_pod);
        }
        let writes = api.writes();
        let of_another = owned == Owned::OfALikeName && (removes(0) || removed == 1 << PARTS.len());
        if of_another {
            // It may belong to the pod that still owns it.
            assert!(writes.len() == 1 && writes[0].starts_with("POST web-shop-db-"));
            continue;
        }
        let expected: &[&str] = if is_whole { &[] } else { &["PUT web-shop-db"] };
        assert_eq!(writes, expected, "{removed:b}");
        let now = api.get(&path).unwrap();
        assert_eq!(now["status"], whole["status"], "{removed:b}");
        let owners = "ownerReferences";
        assert_eq!(now["metadata"][owners], whole["metadata"][owners]);
    }
}

/// A pod status whose usual name was taken when it was written first keeps its name, also if the
/// object that took the usual name is emptied or gone.
#[rstest]
#[tokio::test]
async fn a_name_of_its_own_stays(
    #[values(There::Nothing, There::Ours, There::AnotherVolumes, There::OfALikeName)] there: There,
) {
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = world(dir.path(), There::AnotherVolumes, Known::Ours).await;
    let (pod, objects) = (our_pod(), objects());
    let mounted = mounted(&pod, &objects);
    let first = cluster.write_pod_status(&mounted, None).await.unwrap();
    assert!(first.name.starts_with("web-shop-db-"));
    let base = format!("{STATUSES}/web-shop-db");
    match there {
        There::Nothing => api.server.remove(&base),
        There::Ours => {
            let mut emptied = api.get(&base).unwrap();
            emptied["status"] = json!({});
            api.put(base, emptied);
        }
        _ => {}
    }
    api.writes();
    let again = cluster.write_pod_status(&mounted, Some(&first.name)).await;
    assert_eq!(again.unwrap().name, first.name);
    assert_eq!(api.writes(), Vec::<String>::new());
}

/// Trouble that changes all the time is written a few times at once, and then once in an interval; the
/// last of it is told, too.
#[tokio::test]
async fn trouble_that_changes_all_the_time_is_written_now_and_then() {
    const EVERY: Duration = Duration::from_secs(4);
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = world(dir.path(), There::Ours, Known::Ours).await;
    let pod = our_pod();
    cluster.add_volume("csi-1", EVERY);
    let tell = |why: Option<&str>| {
        let status = StatusOf {
            volume_id: "csi-1",
            pod: &pod,
            name: "web-shop-db",
        };
        let now = jiff::Timestamp::now();
        let trouble = why.map(|why| Trouble::new(now, [&Cause::new(why, why)]));
        cluster.set_trouble(status, Aspect::Secrets, trouble);
    };
    let started = Instant::now();
    for number in 0_u32.. {
        if started.elapsed() > 4 * EVERY {
            break;
        }
        let why = number.to_string();
        tell((number % 3 > 0).then_some(why.as_str()));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let writes = api.writes().len();
    assert!((4..=8).contains(&writes), "{writes}");
    tell(Some("the last one"));
    let (_, reason) = Aspect::Secrets.annotations();
    let is_told = || {
        let status = api.get(&format!("{STATUSES}/web-shop-db")).unwrap();
        status["metadata"]["annotations"][reason] == "the last one"
    };
    let told = Instant::now();
    while !is_told() {
        assert!(told.elapsed() < 10 * EVERY, "it is not told");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
