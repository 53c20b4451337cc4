//! Tests what the pod is told when the API server refuses a Secret: what refuses it, and no content.

use super::*;
use rstest::rstest;

/// Puts a Secret that a driver has made from other content.
fn put_former(api: &Api, immutable: bool) {
    let former = json!({
        "metadata": {
            "name": "creds", "uid": "u", "resourceVersion": "100",
            "labels": {"secrets-store.csi.k8s.io/managed": "true"},
        },
        "type": "Opaque", "data": {"pw": "Zm9ybWVyLW9uZQ=="}, "immutable": immutable,
    });
    api.put(SECRET, former);
}

fn refusal(what: What, code: u16, message: String) -> Refuse {
    Refuse {
        what,
        code,
        times: 99,
        message,
    }
}

/// The content is `hunter2`, and that of the Secret that may be there is `former-one`.
#[rstest]
#[case::create(What::Create)]
#[case::patch(What::Patch)]
#[case::replace(What::Trial)]
#[tokio::test]
async fn what_refuses_a_secret_is_named(#[case] what: What) {
    let (dir, api, cluster) = start!();
    let type_ = match what {
        What::Trial => "example.com/typed",
        _ => "Opaque",
    };
    let entry = json!([{
        "secretName": "creds", "type": type_, "data": [{"objectName": "pw", "key": "pw"}],
    }]);
    let class = class(&api, &cluster, entry).await;
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    let web = volume(dir.path(), "web");
    if what != What::Create {
        put_former(&api, false);
    }
    let sync = sync_with(dir.path(), &cluster, EVERY, true);
    let policy = |name: &str| {
        format!(
            "secrets \"creds\" is forbidden: ValidatingAdmissionPolicy '{name}' with binding 'all' denied request: hunter2 is weak"
        )
    };
    for (code, message, named) in [
        (422, policy("no-weak-ones"), "ValidatingAdmissionPolicy no-weak-ones with binding all denied it"),
        (422, policy("hunter2"), "HTTP 422;"),
        (
            403,
            "admission webhook \"values.example.com\" denied the request: hunter2 is weak".to_owned(),
            "admission webhook values.example.com denied it",
        ),
        (
            500,
            "Internal error occurred: failed calling webhook \"values.example.com\": hunter2".to_owned(),
            "admission webhook values.example.com could not be called",
        ),
        (
            403,
            "secrets \"creds\" is forbidden: exceeded quota: few, requested: secrets=1, used: secrets=3, limited: secrets=3".to_owned(),
            "ResourceQuota few is used up, HTTP 403",
        ),
    ] {
        api.refuse(vec![refusal(what, code, message)]);
        let error = sync.volume_mounted(&web, &class).await.unwrap_err().to_string();
        assert!(error.contains(named), "{named}: {error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
    // A webhook on changes sees the former content, too.
    if what != What::Create {
        let message = policy("former-one");
        api.refuse(vec![refusal(what, 422, message)]);
        let error = sync.volume_mounted(&web, &class).await.unwrap_err();
        assert!(!error.to_string().contains("former-one"), "{error}");
    }
    drop(mount::detach(&web.target_path).unwrap());
}

/// It is not written again and again, and made anew when it has been deleted.
#[tokio::test]
async fn an_immutable_secret_is_to_be_deleted() {
    let (dir, api, cluster) = start!();
    let class = class(&api, &cluster, creds()).await;
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    let web = volume(dir.path(), "web");
    put_status(&api, &web);
    put_former(&api, true);
    let before = api.get(SECRET).unwrap();
    let sync = sync(dir.path(), &cluster, EVERY);
    sync.volume_mounted(&web, &class).await.unwrap();
    until("the pod is told", || !api.events().is_empty()).await;
    let stop = run(&sync);
    api.requests();
    until("it has been looked at", || api.count("/secrets/creds") > 2).await;
    assert_eq!(api.count("PATCH") + api.count("DELETE"), 0);
    assert_eq!(api.get(SECRET).unwrap(), before);
    let events = api.events();
    assert_eq!(events.len(), 1, "{events:?}");
    for said in [
        "Secret creds: the Secret is immutable",
        "kubectl delete secret -n shop creds",
    ] {
        assert!(events[0].contains(said), "{events:?}");
    }
    api.remove(SECRET);
    until("it is made anew", || api.get(SECRET).is_some()).await;
    let made = api.get(SECRET).unwrap();
    assert_eq!(made["data"], json!({"pw": "aHVudGVyMg=="}));
    assert!(made.get("immutable").is_none(), "{made}");
    stop.cancel();
    drop(mount::detach(&web.target_path).unwrap());
}
