//! Checks that a pod status says which Secrets are not in step, for as long as they are not.

use serde_json::{Value, json};

use crate::{EVERY, class, put_status, run, start, sync, until, volume};

const STATUS: &str = "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasspodstatuses/web-shop-db";

fn entry(secret: &str, object: &str) -> Value {
    json!({"secretName": secret, "type": "Opaque", "data": [{"objectName": object, "key": "pw"}]})
}

#[tokio::test]
async fn a_secret_that_is_not_in_step_stands_on_the_pod_status() {
    let (dir, api, cluster) = start!();
    let wrong = json!([
        entry("creds", "pw"),
        entry("other", "absent"),
        entry("third", "absent")
    ]);
    let class = class(&api, &cluster, wrong).await;
    api.pod("web", Some(("ReplicaSet", "rs")), "Running");
    let web = volume(dir.path(), "web");
    put_status(&api, &web);
    // As the API server has it; without, it takes no update.
    let mut status = api.get(STATUS).unwrap();
    status["metadata"]["resourceVersion"] = json!("1");
    api.put(STATUS, status);
    let said = |name: &str| {
        let status = api.get(STATUS).unwrap();
        let key = format!("secrets-store.csi.k8s.io/secrets-out-of-step-{name}");
        let value = status["metadata"]["annotations"][key].as_str();
        value.map(str::to_owned)
    };
    let first = sync(dir.path(), &cluster, EVERY);
    first.volume_mounted(&web, &class).await.unwrap();
    let stop = run(&first);
    until("the trouble is told", || said("since").is_some()).await;
    until("both are told", || {
        said("reason").is_some_and(|why| why.contains("other") && why.contains("absent"))
    })
    .await;
    let since = said("since");
    assert!(!said("reason").unwrap().contains("hunter2"));
    api.requests();
    tokio::time::sleep(EVERY * 5).await;
    assert_eq!(api.count("PUT /apis"), 0, "written at rest");
    stop.cancel();

    // A driver that starts again finds the trouble, and its beginning.
    let again = sync(dir.path(), &cluster, EVERY);
    let stop = run(&again);
    until("it has checked", || api.count("/secrets/creds") > 3).await;
    assert_eq!(said("since"), since);

    // The class makes less, and what it makes is in step.
    api.put_class(&json!([entry("creds", "pw"), entry("third", "pw")]), "2");
    until("the trouble is over", || said("since").is_none()).await;
    assert_eq!(said("reason"), None);
    stop.cancel();
}
