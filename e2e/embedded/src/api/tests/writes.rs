//! Tests of creating, updating and patching.

use super::*;

#[tokio::test]
async fn objects_are_created_read_and_refused_as_in_a_cluster() {
    let setup = Setup::new().await;
    let secrets: Api<Secret> = setup.api();
    let created = value(&secrets.create(&POST, &secret("s")).await.unwrap());
    assert_eq!(created["data"], json!({"key": "dmFsdWU="}));
    assert_eq!(
        (&created["type"], &created["stringData"]),
        (&json!("Opaque"), &Value::Null)
    );
    assert_eq!(value(&secrets.get("s").await.unwrap()), created);

    assert_refused(
        secrets.create(&POST, &secret("s")).await,
        409,
        "secrets \"s\" already exists",
    );
    assert_refused(secrets.get("x").await, 404, "secrets \"x\" not found");
    let elsewhere: Api<Secret> = Api::namespaced(setup.server.client(), "nowhere");
    assert_refused(
        elsewhere.create(&POST, &secret("s")).await,
        404,
        "namespaces \"nowhere\" not found",
    );

    let event = json!({"metadata": {"generateName": "e-"}, "involvedObject": {"namespace": "default"}, "reason": "R"});
    let events: Api<Event> = setup.api();
    let event = events.create(&POST, &object(event)).await.unwrap();
    assert_eq!(event.metadata.name.unwrap().len(), 7);
    let some = ListParams::default().fields("involvedObject.namespace=default,reason=R");
    assert_eq!(events.list(&some).await.unwrap().items.len(), 1);
}

/// A dry run of creating an object that exists is refused for that, if for nothing else.
#[tokio::test]
async fn a_trial_passes_all_rules_and_stores_nothing() {
    let setup = Setup::new().await;
    let secrets: Api<Secret> = setup.api();
    let trial = PostParams {
        dry_run: true,
        field_manager: None,
    };
    secrets.create(&trial, &secret("s")).await.unwrap();
    assert!(secrets.get_opt("s").await.unwrap().is_none());
    secrets.create(&POST, &secret("s")).await.unwrap();
    assert_refused(
        secrets.create(&trial, &secret("s")).await,
        409,
        "secrets \"s\" already exists",
    );
    let mut invalid = secret("s");
    invalid.type_ = Some("kubernetes.io/tls".to_owned());
    let (code, why) = refusal(secrets.create(&trial, &invalid).await);
    assert_eq!(code, 422, "{why}");
}

#[tokio::test]
async fn updates_need_the_version_they_read_and_a_reason() {
    let setup = Setup::new().await;
    let secrets: Api<Secret> = setup.api();
    let first = secrets.create(&POST, &secret("s")).await.unwrap();
    let same = secrets.replace("s", &POST, &first).await.unwrap();
    assert_eq!(same, first, "an update that changes nothing is no write");

    let patch = json!({"data": {"more": "eA=="}, "metadata": {"labels": {"a": "b"}}});
    let second = merge(&secrets, "s", &patch).await.unwrap();
    assert_eq!(
        value(&second)["data"],
        json!({"key": "dmFsdWU=", "more": "eA=="})
    );
    let again = merge(&secrets, "s", &patch).await.unwrap();
    assert_eq!(again, second);

    assert_refused(
        secrets.replace("s", &POST, &first).await,
        409,
        "Operation cannot be fulfilled on secrets \"s\": the object has been modified; \
         please apply your changes to the latest version and try again",
    );
    let mut other_uid = second.clone();
    other_uid.metadata.uid = Some("other".to_owned());
    assert_eq!(
        refusal(secrets.replace("s", &POST, &other_uid).await).0,
        409
    );
    let mut unconditional = first;
    unconditional.metadata.resource_version = None;
    secrets.replace("s", &POST, &unconditional).await.unwrap();

    setup.define_classes().await;
    let spc = setup
        .classes("v1")
        .create(&POST, &class("v1", json!({"provider": "a"})))
        .await
        .unwrap();
    assert_eq!(spc.metadata.generation, Some(1));
    let (code, message) = refusal(
        setup
            .classes("v1")
            .replace("spc", &POST, &class("v1", json!({})))
            .await,
    );
    assert_eq!(code, 422);
    assert!(
        message.ends_with(
            "metadata.resourceVersion: Invalid value: 0: must be specified for an update"
        ),
        "{message}"
    );
}

/// Unlike a real server, this one knows none of these patches.
#[rstest]
#[case("application/strategic-merge-patch+json")]
#[case("application/json-patch+json")]
#[case("application/apply-patch+yaml")]
#[tokio::test]
async fn other_patches_are_refused(#[case] kind: &str) {
    let setup = Setup::new().await;
    setup
        .api::<Secret>()
        .create(&POST, &secret("s"))
        .await
        .unwrap();
    let patch = http::Request::patch("/api/v1/namespaces/default/secrets/s")
        .header(http::header::CONTENT_TYPE, kind)
        .body(b"[]".to_vec());
    let (code, why) = refusal(setup.server.client().request::<Value>(patch.unwrap()).await);
    assert_eq!(code, 415, "{why}");
}

/// Unlike a real server, this one has whole objects only; a client that also takes these gets them.
#[tokio::test]
async fn a_client_that_takes_metadata_only_gets_no_more() {
    let setup = Setup::new().await;
    let secrets: Api<Secret> = setup.api();
    secrets.create(&POST, &secret("s")).await.unwrap();
    let metadata = secrets.get_metadata("s").await.unwrap();
    assert_eq!(metadata.metadata.name.as_deref(), Some("s"));
    let only = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io";
    let get = http::Request::get("/api/v1/namespaces/default/secrets/s")
        .header(http::header::ACCEPT, only)
        .body(Vec::new());
    let got = setup.server.client().request::<Value>(get.unwrap()).await;
    let got = got.unwrap();
    assert_eq!(got["kind"], "PartialObjectMetadata");
    let mut keys = got.as_object().unwrap().keys();
    assert!(
        keys.all(|key| ["apiVersion", "kind", "metadata"].contains(&key.as_str())),
        "{got}"
    );
    let either = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
    let get = http::Request::get("/api/v1/namespaces/default/secrets/s")
        .header(http::header::ACCEPT, either)
        .body(Vec::new());
    let got = setup.server.client().request::<Value>(get.unwrap()).await;
    assert_eq!(got.unwrap()["type"], "Opaque");
}
