//! Edits of classes: that Secrets follow each kind of them, and when a pod is told that an edited class names an
//! object which its volume does not have: not while the refresh is on its way that may bring the object.

use base64::{Engine as _, prelude::BASE64_STANDARD as BASE64};
use driver::{record::Coming, sync::Options};
use jiff::Timestamp;
use rstest::rstest;
use serde_json::{Value, json};

use crate::{
    Api, Duration, EVERY, Refuse, SECRET, What, class, creds, is_alone, options, put_status,
    record, records, run, sync_of, until, volume, write,
};

/// What becomes of the volume after its class was edited.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Then {
    /// A refresh brings the object.
    Brought,
    /// A refresh does not bring the object.
    NotBrought,
    /// The driver refreshes nothing.
    NoRotation,
    /// Refreshes fail.
    Fails,
    /// kubelet does not look at the volume for a long time.
    NoLook,
}

fn edited(secret: &str) -> Value {
    let new = json!({"objectName": "new", "key": "new"});
    match secret {
        "creds" => json!([{"secretName": "creds", "type": "Opaque",
            "data": [{"objectName": "pw", "key": "pw"}, new]}]),
        other => json!([creds()[0], {"secretName": other, "type": "Opaque", "data": [new]}]),
    }
}

/// Lets time pass, also the time in which many checks are due.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

/// A class gets a key, or a Secret, of an object that its volume does not have yet.
#[rstest]
#[tokio::test]
async fn an_object_that_an_edit_adds(
    #[values("creds", "other")] secret: &str,
    #[values(
        Then::Brought,
        Then::NotBrought,
        Then::NoRotation,
        Then::Fails,
        Then::NoLook
    )]
    then: Then,
) {
    if !is_alone() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let before = class(&api, &cluster, creds()).await;
    let options = Options {
        refreshes: then != Then::NoRotation,
        ..options(EVERY)
    };
    let sync = sync_of(dir.path(), &cluster, options);
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    let web = volume(dir.path(), "web");
    put_status(&api, &web);
    sync.volume_mounted(&web, &before).await.unwrap();
    if then == Then::Fails {
        let mut failing = record(dir.path(), "web", "0");
        failing.failing_since = Some(Timestamp::now());
        records(dir.path()).put(&failing).unwrap();
    }
    let stop = run(&sync);
    api.put_class(&edited(secret), "2");
    let told = || {
        let events = api.events().into_iter();
        let failures = events.filter(|event| event.contains("FailedToCreateSecret"));
        failures.collect::<Vec<_>>().concat()
    };
    if !matches!(then, Then::NoRotation | Then::Fails) {
        api.requests();
        let is_read = || api.count("secretproviderclasses/db") > 2;
        until("the class is read", is_read).await;
        tokio::time::sleep(EVERY * 5).await;
        assert_eq!(told(), "");
        // Its content is not replaced by less.
        assert!(api.get(SECRET).unwrap()["data"]["pw"].is_string());
    }
    let after = cluster.class("shop", "db").await.unwrap();
    let refreshed = || {
        let mut fresh = record(dir.path(), "web", "3");
        fresh.class = after.identity.clone();
        records(dir.path()).put(&fresh).unwrap();
        fresh
    };
    match then {
        Then::Brought => {
            write(&web.target_path, &[("pw", "hunter2"), ("new", "x")]);
            sync.volume_mounted(&refreshed(), &after).await.unwrap();
            let path = SECRET.replace("creds", secret);
            assert!(api.get(&path).unwrap()["data"]["new"].is_string());
            tokio::time::sleep(EVERY * 5).await;
            assert_eq!(told(), "");
        }
        Then::NotBrought => sync.volume_mounted(&refreshed(), &after).await.unwrap(),
        Then::NoLook => pass(Duration::from_secs(301)).await,
        Then::NoRotation | Then::Fails => {}
    }
    if then != Then::Brought {
        until("the pod is told", || told().contains("new")).await;
        assert!(told().contains(secret) && !told().contains("hunter2"));
    }
    stop.cancel();
}

/// A pod starts with the class of before the edit, which the driver knows by then. Its refresh is on its way as
/// well; but a publish that needs its Secrets begins anew, with the edited class.
#[rstest]
#[tokio::test]
async fn a_mount_with_the_class_of_before(#[values(false, true)] errors_fail_publish: bool) {
    if !is_alone() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let before = class(&api, &cluster, creds()).await;
    let options = Options {
        errors_fail_publish,
        ..options(EVERY)
    };
    let sync = sync_of(dir.path(), &cluster, options);
    let [web, other] = ["web", "other"].map(|name| {
        api.pod(name, Some(("ReplicaSet", "rs")), "Running");
        let volume = volume(dir.path(), name);
        put_status(&api, &volume);
        volume
    });
    sync.volume_mounted(&web, &before).await.unwrap();
    api.put_class(&edited("creds"), "2");
    let stop = run(&sync);
    api.requests();
    let is_read = || api.count("secretproviderclasses/db") > 2;
    until("the class is read", is_read).await;
    let mounted = sync.volume_mounted(&other, &before).await;
    assert_eq!(mounted.is_err(), errors_fail_publish, "{mounted:?}");
    tokio::time::sleep(EVERY * 5).await;
    let told = api.events().concat();
    assert_eq!(told.contains("FailedToCreateSecret"), errors_fail_publish);
    stop.cancel();
}

/// The one that finds content of a later state of the class.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Finder {
    Check,
    CheckAfterRestart,
    /// The mount of another pod with the class of before.
    Mount,
}

/// A refresh puts the content of an edited class in place, which somebody finds who does not know the edit. The Secret
/// stays as it is until then: content and class of different states never belonged together.
#[rstest]
#[tokio::test]
async fn content_of_a_later_state_of_the_class(
    #[values("coming", "recorded")] content: &str,
    #[values(Finder::Check, Finder::CheckAfterRestart, Finder::Mount)] finder: Finder,
) {
    if !is_alone() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let before = class(&api, &cluster, creds()).await;
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    let web = volume(dir.path(), "web");
    put_status(&api, &web);
    let mut sync = sync_of(dir.path(), &cluster, options(EVERY));
    sync.volume_mounted(&web, &before).await.unwrap();
    let written = api.get(SECRET).unwrap();
    if finder == Finder::CheckAfterRestart {
        sync = sync_of(dir.path(), &cluster, options(EVERY));
    }
    let objects = json!([{"secretName": "creds", "type": "Opaque",
        "data": [{"objectName": "pw", "key": "pw"}, {"objectName": "new", "key": "new"}]}]);
    api.put_class(&objects, "2");
    write(&web.target_path, &[("pw", "hunter3"), ("new", "x")]);
    let mut found = record(dir.path(), "web", "3");
    let mut edited = found.class.clone();
    edited.resource_version = "2".to_owned();
    if content == "recorded" {
        found.class = edited;
    } else {
        let (directory, _) = found.orders.first_key_value().unwrap();
        let directory = directory.clone();
        found.orders.extend(web.orders.clone());
        found.coming = Some(Coming {
            directory,
            class: edited,
        });
    }
    records(dir.path()).put(&found).unwrap();
    let refusal = Refuse {
        what: What::Class,
        code: 403,
        times: usize::MAX,
        message: String::new(),
    };
    api.refuse(vec![refusal]);
    if finder == Finder::Mount {
        api.pod("other", Some(("ReplicaSet", "rs")), "Running");
        let other = volume(dir.path(), "other");
        put_status(&api, &other);
        sync.volume_mounted(&other, &before).await.unwrap();
        assert_eq!(api.get(SECRET).unwrap(), written);
    }
    let stop = run(&sync);
    tokio::time::sleep(EVERY * 5).await;
    assert_eq!(api.get(SECRET).unwrap(), written);
    api.refuse(Vec::new());
    until("the Secret follows both", || {
        let data = &api.get(SECRET).unwrap()["data"];
        data["new"].is_string() && data["pw"] != written["data"]["pw"]
    })
    .await;
    stop.cancel();
}

/// An edit of a class whose Secret has a key and a certificate.
#[derive(Debug, Clone, Copy)]
enum Edit {
    /// An annotation gets another value. The API server counts it as no new generation.
    Annotation,
    /// The annotation goes.
    NoAnnotation,
    /// The Secret gets one more key.
    Key,
    /// The class is deleted and made again, and begins with the first generation.
    Anew,
}

/// Whatever is edited, and whatever was before: the Secret is as the class says.
#[rstest]
#[case(&[Edit::Annotation, Edit::NoAnnotation, Edit::Annotation])]
#[case(&[Edit::Key, Edit::Annotation, Edit::Key])]
#[case(&[Edit::Annotation, Edit::Anew, Edit::Annotation, Edit::Anew])]
#[tokio::test]
async fn secrets_follow_each_edit_of_a_class(#[case] edits: &[Edit]) {
    if !is_alone() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let (mut annotated, mut has_ca, mut uid, mut generation, mut version) = (false, false, 1, 1, 1);
    let put = |annotated, has_ca, uid, generation, version: i32| {
        let mut data = vec![
            json!({"objectName": "bundle", "key": "tls.crt"}),
            json!({"objectName": "bundle", "key": "tls.key"}),
        ];
        if has_ca {
            data.push(json!({"objectName": "ca", "key": "ca.crt"}));
        }
        let objects = json!([{"secretName": "creds", "type": "kubernetes.io/tls", "data": data}]);
        let mut metadata = json!({"uid": format!("class-{uid}"), "generation": generation});
        if annotated {
            metadata["annotations"] =
                json!({"secrets-store.csi.k8s.io/tls-key-format": "original"});
        }
        api.put_class_with(&objects, &version.to_string(), &metadata);
    };
    put(annotated, has_ca, uid, generation, version);
    let sync = sync_of(dir.path(), &cluster, options(EVERY));
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    let web = volume(dir.path(), "web");
    put_status(&api, &web);
    let bundle = concat!(
        include_str!("../../src/sync/tls/fixtures/rsa.key.pem"),
        include_str!("../../src/sync/tls/fixtures/rsa.crt.pem")
    );
    write(&web.target_path, &[("bundle", bundle), ("ca", "as it is")]);
    let class = cluster.class("shop", "db").await.unwrap();
    sync.volume_mounted(&web, &class).await.unwrap();
    let stop = run(&sync);
    for edit in edits {
        match edit {
            Edit::Annotation => annotated = true,
            Edit::NoAnnotation => annotated = false,
            Edit::Key => (has_ca, generation) = (!has_ca, generation + 1),
            Edit::Anew => (annotated, uid, generation) = (!annotated, uid + 1, 1),
        }
        version += 1;
        put(annotated, has_ca, uid, generation, version);
        let follows = || {
            let data = &api.get(SECRET).unwrap()["data"];
            let key = data["tls.key"].as_str().unwrap_or_default();
            let key = String::from_utf8(BASE64.decode(key).unwrap()).unwrap();
            // RSA keys are rewritten to the older form, unless the class asks for the original.
            key.starts_with("-----BEGIN PRIVATE KEY") == annotated
                && data["ca.crt"].is_string() == has_ca
        };
        until(&format!("{edit:?} of {edits:?} is followed"), follows).await;
    }
    stop.cancel();
}

/// What the class asks for after its edit.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Edited {
    Key,
    Type,
    Label,
    /// The class is deleted and made again.
    Anew,
}

/// A node that does not know an edit of the class yet gets newer content than the node that knows it. It does not
/// undo the edit, whether or not it can read the class meanwhile. A generation that somebody has put on the
/// Secret by hand keeps nobody from writing it.
#[rstest]
#[tokio::test]
async fn a_node_that_does_not_know_an_edit(
    #[values(Edited::Key, Edited::Type, Edited::Label, Edited::Anew)] edit: Edited,
    #[values(false, true)] class_is_refused: bool,
    #[values(false, true)] by_a_mount: bool,
) {
    if !is_alone() {
        return;
    }
    let [one, two] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (api, cluster) = Api::start(one.path()).await;
    let put = |edited: bool, version: i32| {
        let edited = |of: Edited| edited && (edit == of || edit == Edited::Anew);
        let key = if edited(Edited::Key) { "new" } else { "pw" };
        let mut object = json!({"secretName": "creds", "type": "Opaque", "labels": {"app": "shop"},
            "data": [{"objectName": "pw", "key": key}]});
        if edited(Edited::Type) {
            object["type"] = json!("example.com/edited");
        }
        if edited(Edited::Label) {
            object["labels"]["app"] = json!("edited");
        }
        let mut metadata = json!({"generation": version});
        if edited(Edited::Anew) {
            metadata = json!({"generation": 1, "uid": "class-again"});
        }
        api.put_class_with(&json!([object]), &version.to_string(), &metadata);
    };
    put(false, 1);
    let before = cluster.class("shop", "db").await.unwrap();
    let sync = sync_of(one.path(), &cluster, options(EVERY));
    let other_cluster = api.client(two.path()).await;
    let other = sync_of(two.path(), &other_cluster, options(EVERY));
    let volumes = [(one.path(), "web"), (two.path(), "other")].map(|(dir, name)| {
        api.pod(name, Some(("ReplicaSet", "rs")), "Running");
        let volume = volume(dir, name);
        put_status(&api, &volume);
        volume
    });
    sync.volume_mounted(&volumes[0], &before).await.unwrap();
    put(true, 2);
    let after = other_cluster.class("shop", "db").await.unwrap();
    write(&volumes[1].target_path, &[("pw", "later")]);
    let mut later = record(two.path(), "other", "3");
    later.class = after.identity.clone();
    records(two.path()).put(&later).unwrap();
    other.volume_mounted(&later, &after).await.unwrap();
    let written = || {
        let secret = api.get(SECRET).unwrap();
        let label = secret["metadata"]["labels"]["app"].clone();
        let keys: Vec<_> = secret["data"]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect();
        json!([label, keys, secret["type"]])
    };
    let edited = written();
    if class_is_refused {
        let refusal = Refuse {
            what: What::Class,
            code: 403,
            times: usize::MAX,
            message: String::new(),
        };
        api.refuse(vec![refusal]);
    }
    // The newest content of all is on the node that knows the class of before.
    write(&volumes[0].target_path, &[("pw", "newest")]);
    let newest = record(one.path(), "web", "4");
    records(one.path()).put(&newest).unwrap();
    if by_a_mount {
        let mounted = sync.volume_mounted(&newest, &before).await;
        assert_eq!(written(), edited, "{mounted:?}");
    }
    let stop = run(&sync);
    for _ in 0..20 {
        assert_eq!(written(), edited);
        tokio::time::sleep(EVERY / 4).await;
    }
    api.refuse(Vec::new());
    let has_newest = || {
        api.get(SECRET).unwrap()["data"]
            .to_string()
            .contains(&BASE64.encode("newest"))
    };
    until("the newest content is there", has_newest).await;
    assert_eq!(written(), edited);
    // Nobody has edited the class so often.
    let mut claimed = api.get(SECRET).unwrap();
    claimed["metadata"]["annotations"]["secrets-store.csi.k8s.io/class-generation"] = json!("1000");
    claimed["data"] = json!({"stranger": "eA=="});
    api.put(SECRET, claimed);
    until("it is mended", has_newest).await;
    assert_eq!(written(), edited);
    stop.cancel();
}
