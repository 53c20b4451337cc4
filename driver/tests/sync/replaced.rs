//! Tests a Secret whose type changes: it exists whatever is refused, and if the caller gives up.

use super::*;
use rstest::rstest;

/// Makes the Secret as it is before its type changes, with metadata of others.
async fn made(dir: &Path, api: &Api, cluster: &Cluster) -> (Record, Value) {
    let class = class(api, cluster, creds()).await;
    let web = volume(dir, "web");
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    let sync = sync(dir, cluster, EVERY);
    sync.volume_mounted(&web, &class).await.unwrap();
    let mut secret = api.get(SECRET).unwrap();
    secret["metadata"]["labels"]["theirs"] = json!("1");
    secret["metadata"]["annotations"]["theirs"] = json!("1");
    let owners = secret["metadata"]["ownerReferences"]
        .as_array_mut()
        .unwrap();
    owners.push(json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "c", "uid": "theirs"}));
    api.put(SECRET, secret.clone());
    let retyped = json!([{"secretName": "creds", "type": "example.com/typed", "data": [
        {"objectName": "pw", "key": "pw"}, {"objectName": "pw", "key": "more"},
    ]}]);
    api.put_class(&retyped, "2");
    (web, secret)
}

fn refuse(what: What, code: u16, times: usize) -> Refuse {
    let message = format!(
        "admission webhook \"values.example.com\" denied the request: \"hunter2\" is weak ({code})"
    );
    Refuse {
        what,
        code,
        times,
        message,
    }
}

/// Returns whether the Secret is as before, except for server-side fields and the driver's annotation.
fn is_as_before(before: &Value, now: &Value) -> bool {
    let part = |secret: &Value, part: &str| secret["metadata"][part].clone();
    let annotations = |secret: &Value| {
        let mut annotations = part(secret, "annotations");
        let map = annotations.as_object_mut().unwrap();
        map.remove("secrets-store.csi.k8s.io/refused-type");
        annotations
    };
    before["data"] == now["data"]
        && before["type"] == now["type"]
        && part(before, "labels") == part(now, "labels")
        && part(before, "ownerReferences") == part(now, "ownerReferences")
        && annotations(before) == annotations(now)
}

/// Returns whether the Secret has its new type and the metadata of others.
fn is_new_and_whole(before: &Value, now: &Value) -> bool {
    now["type"] == "example.com/typed"
        && now["data"] == json!({"pw": "aHVudGVyMg==", "more": "aHVudGVyMg=="})
        && now["metadata"]["labels"]["theirs"] == "1"
        && now["metadata"]["annotations"]["theirs"] == "1"
        && now["metadata"]["ownerReferences"] == before["metadata"]["ownerReferences"]
}

#[tokio::test]
async fn refused_at_any_step_it_is_there() {
    if !is_alone() {
        return;
    }
    // Each case: what is refused, how often, and whether the new Secret is there in the end.
    let mut cases = vec![(vec![], true)];
    for code in [400, 403, 413, 422] {
        cases.push((vec![refuse(What::Trial, code, 99)], false));
        cases.push((vec![refuse(What::Create, code, 99)], false));
        cases.push((vec![refuse(What::Delete, code, 99)], false));
    }
    for code in [500, 502] {
        cases.push((vec![refuse(What::Trial, code, 99)], false));
        cases.push((vec![refuse(What::Delete, code, 99)], false));
        cases.push((vec![refuse(What::Create, code, 2)], true));
        let both = vec![
            refuse(What::Create, 422, 99),
            refuse(What::PutBack, code, 2),
        ];
        cases.push((both, false));
    }
    // The client itself tries again after 503, until the request's time is over.
    cases.push((vec![refuse(What::Delete, 503, 99)], false));
    for (refusals, is_new) in cases {
        let dir = tempfile::tempdir().unwrap();
        let (api, cluster) = Api::start(dir.path()).await;
        let (web, before) = made(dir.path(), &api, &cluster).await;
        let class = cluster.class("shop", "db").await.unwrap();
        let sync = sync(dir.path(), &cluster, EVERY);
        api.refuse(refusals.clone());
        api.requests();
        sync.volume_mounted(&web, &class).await.unwrap();
        let now = api.get(SECRET).unwrap();
        let ok = if is_new {
            is_new_and_whole(&before, &now)
        } else {
            is_as_before(&before, &now)
        };
        assert!(ok, "{refusals:#?}\nbefore {before:#}\nnow {now:#}");
        let deleted = api.count("DELETE");
        let refused_for_good = refusals.first().is_some_and(|r| r.code < 429);
        if refusals.first().is_some_and(|r| r.what == What::Trial) {
            assert_eq!(deleted, 0, "nothing was risked: {refusals:#?}");
        }
        // It is not deleted and put back again and again, and the pod is told.
        sync.volume_mounted(&web, &class).await.unwrap();
        if !is_new && refusals[0].what == What::Create {
            assert_eq!(api.count("DELETE"), deleted, "{refusals:#?}");
        }
        if refused_for_good {
            until("the pod is told", || !api.events().is_empty()).await;
        }
        for event in api.events() {
            assert!(
                !event.contains("hunter2") && !event.contains("is weak"),
                "{event}"
            );
            assert!(
                event.contains("the existing Secret is kept")
                    || !refused_for_good
                    || event.contains("SecretRecreated"),
                "{event}"
            );
        }
        drop(mount::detach(&web.target_path).unwrap());
    }
}

/// The caller gives up at any moment.
#[tokio::test]
async fn given_up_at_any_moment_it_is_there() {
    let (dir, api, cluster) = start!();
    let (web, before) = made(dir.path(), &api, &cluster).await;
    let class = cluster.class("shop", "db").await.unwrap();
    let mut became_new = 0;
    // The time that it takes where nobody gives up, on this machine.
    let mut whole = Duration::from_secs(60);
    for step in (0..=24).rev() {
        api.put(SECRET, before.clone());
        api.takes(Duration::from_millis(15));
        let refuses = step % 2 == 1;
        let refusals = refuses.then(|| refuse(What::Create, 422, 99));
        api.refuse(refusals.into_iter().collect());
        let sync = sync(dir.path(), &cluster, EVERY);
        let began = Instant::now();
        let given_up = whole * step / 24;
        let publish = tokio::time::timeout(given_up, sync.volume_mounted(&web, &class));
        let _ = publish.await;
        if step == 24 {
            whole = began.elapsed();
        }
        cluster.finish().await;
        api.takes(Duration::ZERO);
        let now = api.get(SECRET);
        let now = now.unwrap_or_else(|| panic!("lost, given up after {given_up:?}"));
        let is_new = is_new_and_whole(&before, &now);
        assert!(is_new || is_as_before(&before, &now), "{now:#}");
        assert!(!(is_new && refuses));
        became_new += usize::from(is_new);
    }
    assert!(became_new > 0, "some of them came that far");
    drop(mount::detach(&web.target_path).unwrap());
}

/// Returns the Secret as another node makes it, without the metadata of others.
fn of_another_node(before: &Value) -> Value {
    let mut theirs = before.clone();
    theirs["type"] = json!("example.com/typed");
    theirs["data"] = json!({"pw": "aHVudGVyMg==", "more": "aHVudGVyMg=="});
    let metadata = theirs["metadata"].as_object_mut().unwrap();
    metadata["uid"] = json!("another");
    metadata["labels"] = json!({"secrets-store.csi.k8s.io/managed": "true"});
    let annotations = metadata["annotations"].as_object_mut().unwrap();
    annotations.remove("theirs");
    let owners = metadata["ownerReferences"].as_array_mut().unwrap();
    owners.retain(|owner| owner["uid"] != "theirs");
    theirs
}

/// A request to delete it has an effect although its answer is lost, and another node makes it.
#[tokio::test]
async fn deleted_without_an_answer_it_becomes_whole() {
    let (dir, api, cluster) = start!();
    let (web, before) = made(dir.path(), &api, &cluster).await;
    let class = cluster.class("shop", "db").await.unwrap();
    let sync = sync(dir.path(), &cluster, EVERY);
    put_status(&api, &web);
    api.hangs(&[What::Delete]);
    api.requests();
    let publish = async { sync.volume_mounted(&web, &class).await.unwrap() };
    let meanwhile = async {
        until("it is deleted", || api.count("DELETE") > 0).await;
        api.put(SECRET, of_another_node(&before));
    };
    tokio::join!(publish, meanwhile);
    let stop = run(&sync);
    until("it is whole", || {
        is_new_and_whole(&before, &api.get(SECRET).unwrap())
    })
    .await;
    stop.cancel();
    drop(mount::detach(&web.target_path).unwrap());
}

/// The reason why the Secret is missing for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Away {
    /// The API server answers with an error.
    Fails(u16),
    /// The API server refuses the new Secret and the former one.
    RefusesBoth(u16),
    /// The API server does not answer.
    Hangs,
}

/// While a Secret is missing, the pod is told and nothing else waits for it. No metadata of others is
/// lost, whoever creates the Secret in the end.
#[rstest]
#[tokio::test]
async fn missing_for_a_while_it_comes_back_whole(
    #[values(
        Away::Fails(500),
        Away::Fails(502),
        Away::RefusesBoth(403),
        Away::RefusesBoth(422),
        Away::Hangs
    )]
    away: Away,
    #[values(false, true)] another_node_makes_it: bool,
) {
    let (dir, api, cluster) = start!();
    let (web, before) = made(dir.path(), &api, &cluster).await;
    let mut two = api.get(CLASS).unwrap()["spec"]["secretObjects"].clone();
    let other = "/api/v1/namespaces/shop/secrets/other";
    let entries = two.as_array_mut().unwrap();
    entries.push(json!({"secretName": "other", "type": "Opaque", "data": [{"objectName": "pw", "key": "pw"}]}));
    api.put_class(&creds(), "3");
    let class = cluster.class("shop", "db").await.unwrap();
    let sync = sync(dir.path(), &cluster, EVERY);
    put_status(&api, &web);
    sync.volume_mounted(&web, &class).await.unwrap();
    api.put_class(&json!([entries[1]]), "4");
    let class = cluster.class("shop", "db").await.unwrap();
    sync.volume_mounted(&web, &class).await.unwrap();
    assert!(api.get(other).is_some());
    // The class stopped making the first Secret, which is restored to its former state.
    api.put(SECRET, before.clone());

    match away {
        Away::Fails(code) => api.refuse(vec![refuse(What::Create, code, usize::MAX)]),
        Away::RefusesBoth(code) => api.refuse(vec![
            refuse(What::Create, code, usize::MAX),
            refuse(What::PutBack, code, usize::MAX),
        ]),
        Away::Hangs => api.hangs(&[What::Create, What::PutBack]),
    }
    api.put_class(&two, "5");
    let stop = run(&sync);
    until("it is deleted", || api.get(SECRET).is_none()).await;
    let told = |text: &str| api.events().iter().any(|event| event.contains(text));
    until("the pod hears that it is missing", || {
        told("Secret creds: it is missing")
    })
    .await;
    assert!(told(
        "it was deleted to change its type to example.com/typed"
    ));
    for _ in 0..3 {
        let mut changed = api.get(other).unwrap();
        changed["data"]["pw"] = json!("b3RoZXI=");
        api.put(other, changed);
        until("the other one is put right", || {
            api.get(other).unwrap()["data"]["pw"] == "aHVudGVyMg=="
        })
        .await;
    }
    assert!(api.get(SECRET).is_none());
    if another_node_makes_it {
        api.put(SECRET, of_another_node(&before));
    } else {
        api.refuse(vec![]);
        api.hangs(&[]);
    }
    until("it is there again, and whole", || {
        api.get(SECRET)
            .is_some_and(|now| is_new_and_whole(&before, &now))
    })
    .await;
    until("the pod hears that", || {
        told("Secret creds matches the volume")
    })
    .await;
    for event in api.events() {
        assert!(
            !event.contains("hunter2") && !event.contains("is weak"),
            "{event}"
        );
    }
    stop.cancel();
    drop(mount::detach(&web.target_path).unwrap());
}
