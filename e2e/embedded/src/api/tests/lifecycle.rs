//! Tests of deletion and garbage collection.

use super::*;

#[tokio::test]
async fn a_pod_on_a_node_goes_when_the_kubelet_says_so() {
    let setup = Setup::new().await;
    let pods: Api<Pod> = setup.api();
    let created = pods.create(&POST, &pod("p", Some("node"))).await.unwrap();
    assert_eq!(
        created.spec.unwrap().service_account_name.as_deref(),
        Some("default")
    );

    pods.delete("p", &DeleteParams::default()).await.unwrap();
    let dying = pods.get("p").await.unwrap().metadata;
    assert_eq!(dying.deletion_grace_period_seconds, Some(30));
    assert!(dying.deletion_timestamp.is_some());
    let wrong = DeleteParams {
        preconditions: Some(Preconditions {
            uid: Some("other".to_owned()),
            resource_version: None,
        }),
        ..DeleteParams::default()
    };
    assert_eq!(refusal(pods.delete("p", &wrong).await).0, 409);
    pods.delete("p", &DeleteParams::default().grace_period(0))
        .await
        .unwrap();
    assert_eq!(refusal(pods.get("p").await).0, 404);

    let mut unknown = pod("q", None);
    unknown.spec.as_mut().unwrap().service_account_name = Some("who".to_owned());
    assert_refused(
        pods.create(&POST, &unknown).await,
        403,
        "pods \"q\" is forbidden: error looking up service account default/who: serviceaccount \"who\" not found",
    );
}

#[tokio::test]
async fn finalizers_hold_an_object_until_they_are_gone() {
    let setup = Setup::new().await;
    let secrets: Api<Secret> = setup.api();
    let mut held = secret("s");
    held.metadata.finalizers = Some(vec!["x.io/hold".to_owned()]);
    secrets.create(&POST, &held).await.unwrap();
    secrets.delete("s", &DeleteParams::default()).await.unwrap();
    assert!(
        secrets
            .get("s")
            .await
            .unwrap()
            .metadata
            .deletion_timestamp
            .is_some()
    );
    let release = json!({"metadata": {"finalizers": null}});
    merge(&secrets, "s", &release).await.unwrap();
    assert_eq!(refusal(secrets.get("s").await).0, 404);
}

#[tokio::test]
async fn what_nobody_owns_any_more_is_collected() {
    let setup = Setup::new().await;
    let (pods, secrets) = (setup.api::<Pod>(), setup.api::<Secret>());
    let mut references = Vec::new();
    for name in ["one", "two"] {
        let pod = pods.create(&POST, &pod(name, None)).await.unwrap();
        references.push(
            json!({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod.metadata.uid}),
        );
    }
    let owned = |name: &str, owners: &[Value]| {
        object::<Secret>(json!({"metadata": {"name": name, "ownerReferences": owners}}))
    };
    secrets
        .create(&POST, &owned("by-both", &references))
        .await
        .unwrap();
    secrets
        .create(&POST, &owned("by-one", &references[..1]))
        .await
        .unwrap();
    let mut recreated = references[1].clone();
    recreated["uid"] = json!("another-uid");
    secrets
        .create(&POST, &owned("by-former", &[recreated]))
        .await
        .unwrap();

    pods.delete("one", &DeleteParams::default()).await.unwrap();
    let gone = async |name: &str| secrets.get_opt(name).await.unwrap().is_none();
    eventually("by-one goes", async || gone("by-one").await).await;
    eventually("by-former goes", async || gone("by-former").await).await;
    eventually("by-both loses its dead owner", async || {
        let left = secrets
            .get("by-both")
            .await
            .unwrap()
            .metadata
            .owner_references
            .unwrap();
        value(&left) == json!(references[1..])
    })
    .await;
}

#[tokio::test]
async fn a_namespace_goes_with_all_that_is_in_it() {
    let setup = Setup::new().await;
    let namespaces: Api<Namespace> = Api::all(setup.server.client());
    let namespace = |name: &str| object::<Namespace>(json!({"metadata": {"name": name}}));
    namespaces.create(&POST, &namespace("n")).await.unwrap();
    let pods: Api<Pod> = Api::namespaced(setup.server.client(), "n");
    let secrets: Api<Secret> = Api::namespaced(setup.server.client(), "n");
    pods.create(&POST, &pod("p", Some("node"))).await.unwrap();
    secrets.create(&POST, &secret("s")).await.unwrap();

    namespaces
        .delete("n", &DeleteParams::default())
        .await
        .unwrap();
    eventually("the secret goes", async || {
        secrets.get_opt("s").await.unwrap().is_none()
    })
    .await;
    let (code, message) = refusal(secrets.create(&POST, &secret("t")).await);
    assert_eq!(code, 403);
    assert!(
        message.ends_with(
            "unable to create new content in namespace n because it is being terminated"
        )
    );
    assert!(
        pods.get("p")
            .await
            .unwrap()
            .metadata
            .deletion_timestamp
            .is_some()
    );
    pods.delete("p", &DeleteParams::default().grace_period(0))
        .await
        .unwrap();
    let lasting = namespaces.delete("default", &DeleteParams::default()).await;
    assert_refused(
        lasting,
        403,
        "namespaces \"default\" is forbidden: this namespace may not be deleted",
    );
    eventually("the namespace goes", async || {
        namespaces.get_opt("n").await.unwrap().is_none()
    })
    .await;
}
