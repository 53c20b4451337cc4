//! Admission webhooks that change what the driver writes, each time: the driver writes no more often than it
//! checks, deletes nothing, and tells the pods.

use rstest::rstest;
use serde_json::{Value, json};

use crate::{
    Api, EVERY, Instant, SECRET, class, creds, is_alone, options, put_status, run, sync_of, volume,
};

/// The number of intervals for which requests are counted.
const INTERVALS: u32 = 10;

/// Lets some intervals pass. Returns the number of checks of one object that may have begun: the time between two
/// varies.
async fn some_intervals() -> usize {
    let started = Instant::now();
    tokio::time::sleep(EVERY * INTERVALS).await;
    (started.elapsed().as_secs_f64() / EVERY.mul_f64(0.8).as_secs_f64()) as usize + 2
}

/// Counts the requests since the last call that write an object, by their verbs.
fn writes(api: &Api, path: &str) -> [usize; 3] {
    let requests = api.requests();
    ["POST", "PATCH", "DELETE"].map(|verb| {
        let is_write = |request: &&String| {
            let begins = request.starts_with(verb) || verb == "PATCH" && request.starts_with("PUT");
            begins && request.contains(path) && !request.contains("dryRun")
        };
        requests.iter().filter(is_write).count()
    })
}

/// A webhook changes each pod status that is stored, so that it owns no Secret, or says less than it should.
#[rstest]
#[tokio::test]
async fn a_pod_status_that_is_never_stored_as_it_is_written(
    #[values("no owner", "another owner", "no target", "no objects", "not mounted")]
    change: &'static str,
    #[values(None, Some(("ReplicaSet", "rs")))] controller: Option<(&str, &str)>,
) {
    if !is_alone() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let class = class(&api, &cluster, creds()).await;
    let sync = sync_of(dir.path(), &cluster, options(EVERY));
    api.pod("web", controller, "Running");
    let web = volume(dir.path(), "web");
    api.mutate(move |kind, object| {
        if !kind.starts_with("secretproviderclasspodstatuses") {
            return;
        }
        let owners = &mut object["metadata"]["ownerReferences"];
        match change {
            "no owner" => *owners = json!([]),
            "another owner" => owners[0]["uid"] = json!("another"),
            "no target" => drop(
                object["status"]
                    .as_object_mut()
                    .unwrap()
                    .remove("targetPath"),
            ),
            "no objects" => object["status"]["objects"] = json!([]),
            _ => object["status"]["mounted"] = json!(false),
        }
    });
    // The record names an object.
    let mut mounted = web.clone();
    mounted.objects.push(driver::record::Object {
        id: "pw".to_owned(),
        version: "1".to_owned(),
    });
    crate::records(dir.path()).put(&mounted).unwrap();
    let _ = sync.volume_mounted(&mounted, &class).await;
    let stop = run(&sync);
    api.requests();
    let checks = some_intervals().await;
    let written: usize = writes(&api, "/secretproviderclasspodstatuses").iter().sum();
    // Its Secret needs the pod status of a pod without a controller, which is looked at soon.
    let least = usize::from(controller.is_none());
    assert!((least..=checks).contains(&written), "{written} writes");
    stop.cancel();
}

/// What a webhook changes in each Secret that is stored.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Change {
    Type,
    Value,
    NoKey,
    Label,
    NoManaged,
    NoOrder,
    NoOwner,
    /// Labels, annotations and owners of others, which are no concern of the driver.
    More,
}

impl Change {
    fn apply(self, secret: &mut Value) {
        let remove =
            |object: &mut Value, key: &str| drop(object.as_object_mut().unwrap().remove(key));
        match self {
            Self::Type => {
                // The API server refuses another type for a Secret that is there.
                secret["type"] = json!("example.com/hunter2");
            }
            Self::Value => secret["data"]["pw"] = json!("b3RoZXI="),
            Self::NoKey => remove(&mut secret["data"], "pw"),
            Self::Label => secret["metadata"]["labels"]["app"] = json!("other"),
            Self::NoManaged => {
                remove(
                    &mut secret["metadata"]["labels"],
                    "secrets-store.csi.k8s.io/managed",
                );
            }
            Self::NoOrder => remove(
                &mut secret["metadata"]["annotations"],
                "secrets-store.csi.k8s.io/content-order",
            ),
            Self::NoOwner => secret["metadata"]["ownerReferences"] = json!([]),
            Self::More => {
                secret["metadata"]["labels"]["more"] = json!("1");
                secret["metadata"]["annotations"]["more"] = json!("1");
                let owners = secret["metadata"]["ownerReferences"]
                    .as_array_mut()
                    .unwrap();
                if owners.len() < 2 {
                    owners.push(
                        json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "m", "uid": "m"}),
                    );
                }
            }
        }
    }
}

/// A webhook changes each Secret that is stored, or from the second content on.
#[rstest]
#[tokio::test]
async fn a_secret_that_is_never_stored_as_it_is_written(
    #[values(
        Change::Type,
        Change::Value,
        Change::NoKey,
        Change::Label,
        Change::NoManaged,
        Change::NoOrder,
        Change::NoOwner,
        Change::More
    )]
    change: Change,
    #[values(false, true)] from_the_first_on: bool,
) {
    if !is_alone() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let mut objects = creds();
    objects[0]["labels"] = json!({"app": "shop"});
    let first = class(&api, &cluster, objects.clone()).await;
    let sync = sync_of(dir.path(), &cluster, options(EVERY));
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    let web = volume(dir.path(), "web");
    put_status(&api, &web);
    let webhook = move |kind: &str, object: &mut Value| {
        if kind == "secrets" {
            change.apply(object);
        }
    };
    let told = || {
        let events = api.events().into_iter();
        events
            .filter(|event| event.contains("FailedToCreateSecret"))
            .collect::<Vec<_>>()
            .concat()
    };
    if from_the_first_on {
        api.mutate(webhook);
    }
    sync.volume_mounted(&web, &first).await.unwrap();
    let stop = run(&sync);
    api.requests();
    if !from_the_first_on {
        assert_eq!(told(), "");
        api.mutate(webhook);
        // Something is to be written: the class asks for another type, label and key.
        objects[0]["type"] = json!("example.com/asked");
        objects[0]["labels"]["app"] = json!("edited");
        objects[0]["data"] =
            json!([{"objectName": "pw", "key": "pw"}, {"objectName": "pw", "key": "again"}]);
        api.put_class(&objects, "2");
        tokio::time::sleep(EVERY * 5).await;
    }
    tokio::time::sleep(EVERY * 3).await;
    let deleted = api.count("DELETE");
    assert!(
        deleted == 0 || !from_the_first_on,
        "deleted {deleted} times"
    );
    api.requests();
    let checks = some_intervals().await;
    let [created, patched, deleted] = writes(&api, "/namespaces/shop/secrets");
    let times = format!("{created} created, {patched} patched, {deleted} deleted");
    assert!(
        api.get(SECRET).is_some() && created == 0 && deleted == 0,
        "{times}"
    );
    assert!(patched <= checks, "{times} in {checks} checks");
    let is_told = told();
    if change == Change::More {
        assert!(is_told.is_empty() && patched == 0, "{times}: {is_told}");
    } else {
        assert!(is_told.contains("webhook"), "{is_told}");
    }
    assert!(!is_told.contains("hunter2"), "{is_told}");
    stop.cancel();
}
