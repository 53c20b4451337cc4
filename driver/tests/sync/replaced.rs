//! A Secret whose type changes: it is there whatever is refused and whoever stops waiting.

use super::*;

/// The Secret as it is before its type changes, with what others have put on it.
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

/// Whether the Secret is as before, but for what the server writes and the driver's note.
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

/// What others had put there is on the new one as well.
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
    // What is refused, how often, and whether the new Secret is there in the end.
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
    // Without an answer, because the client tries again until the request's time is over.
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
        let ok = match is_new {
            true => is_new_and_whole(&before, &now),
            false => is_as_before(&before, &now),
        };
        assert!(ok, "{refusals:#?}\nbefore {before:#}\nnow {now:#}");
        let deleted = api.count("DELETE");
        let refused_for_good = refusals.first().is_some_and(|r| r.code < 429);
        if refusals.first().is_some_and(|r| r.what == What::Trial) {
            assert_eq!(deleted, 0, "nothing was risked: {refusals:#?}");
        }
        // It is not deleted and put back again and again, and the pod hears of it.
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
                event.contains("stays as it is")
                    || !refused_for_good
                    || event.contains("SecretRecreated"),
                "{event}"
            );
        }
        drop(mount::detach(&web.target_path).unwrap());
    }
}

/// Whoever waited for it stops waiting, at any moment.
#[tokio::test]
async fn given_up_at_any_moment_it_is_there() {
    if !is_alone() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (api, cluster) = Api::start(dir.path()).await;
    let (web, before) = made(dir.path(), &api, &cluster).await;
    let class = cluster.class("shop", "db").await.unwrap();
    let mut became_new = 0;
    for step in 0..24 {
        api.put(SECRET, before.clone());
        api.takes(Duration::from_millis(15));
        let refuses = step % 2 == 1;
        api.refuse(match refuses {
            true => vec![refuse(What::Create, 422, 99)],
            false => vec![],
        });
        let (_, cluster) = (&cluster, cluster.clone());
        let sync = sync(dir.path(), &cluster, EVERY);
        let given_up = Duration::from_millis(6 * step);
        let publish = tokio::time::timeout(given_up, sync.volume_mounted(&web, &class));
        let _ = publish.await;
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
