//! Tests of kinds that come from a CustomResourceDefinition.

use super::*;

#[tokio::test]
async fn custom_kinds_are_pruned_validated_and_served_at_every_version() {
    let setup = Setup::new().await;
    assert_eq!(
        refusal(setup.classes("v1").list(&ListParams::default()).await).0,
        404
    );
    setup.define_classes().await;

    let typo = class("v1", json!({"provider": "a", "typo": 1}));
    let created = setup.classes("v1").create(&POST, &typo).await.unwrap();
    assert_eq!(created.data, json!({"spec": {"provider": "a"}}));
    let wrong = json!({"spec": {"provider": 7}});
    assert_refused(
        merge(&setup.classes("v1"), "spc", &wrong).await,
        422,
        "SecretProviderClass.secrets-store.csi.x-k8s.io \"spc\" is invalid: spec.provider: Invalid value: \
         \"integer\": spec.provider in body must be of type string: \"integer\"",
    );

    let old = setup.classes("v1alpha1").get("spc").await.unwrap();
    assert_eq!(
        old.types.unwrap().api_version,
        "secrets-store.csi.x-k8s.io/v1alpha1"
    );
    let patch = json!({"spec": {"provider": "b"}, "status": {"byPod": [{"id": "1"}]}});
    merge(&setup.classes("v1alpha1"), "spc", &patch)
        .await
        .unwrap();
    let new = setup.classes("v1").get("spc").await.unwrap();
    assert_eq!(
        new.types.unwrap().api_version,
        "secrets-store.csi.x-k8s.io/v1"
    );
    assert_eq!(new.data, json!({"spec": {"provider": "b"}, "status": {}}));
    assert_eq!(new.metadata.generation, Some(2));

    let groups = setup
        .server
        .client()
        .list_api_groups()
        .await
        .unwrap()
        .groups;
    let ours = groups
        .iter()
        .find(|group| group.name == "secrets-store.csi.x-k8s.io")
        .unwrap();
    assert_eq!(ours.preferred_version.as_ref().unwrap().version, "v1");
}
