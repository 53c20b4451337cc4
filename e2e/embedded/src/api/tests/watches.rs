//! Tests of watches.

use super::*;

#[tokio::test]
async fn a_watch_sees_every_change_in_order() {
    let setup = Setup::new().await;
    let pods: Api<Pod> = setup.api();
    let before = pods
        .list(&ListParams::default())
        .await
        .unwrap()
        .metadata
        .resource_version
        .unwrap();
    let watch = pods
        .watch(&WatchParams::default().labels("app=x"), &before)
        .await
        .unwrap();
    pin_mut!(watch);

    let label = async |value: Value| {
        let patch = json!({"metadata": {"labels": {"app": value}}});
        merge(&pods, "p", &patch).await.unwrap();
    };
    pods.create(&POST, &pod("p", None)).await.unwrap();
    label(json!("x")).await;
    let patch = json!({"status": {"phase": "Running"}});
    pods.patch_status("p", &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .unwrap();
    label(Value::Null).await;
    label(json!("x")).await;
    pods.delete("p", &DeleteParams::default()).await.unwrap();

    let mut seen = Vec::new();
    let mut last = before.parse::<u64>().unwrap();
    while seen.len() < 5 {
        let event = watch.try_next().await.unwrap().unwrap();
        let (kind, pod) = match event {
            WatchEvent::Added(pod) => ("ADDED", pod),
            WatchEvent::Modified(pod) => ("MODIFIED", pod),
            WatchEvent::Deleted(pod) => ("DELETED", pod),
            other => panic!("{other:?}"),
        };
        let version = pod.metadata.resource_version.unwrap().parse().unwrap();
        assert!(version > last, "versions rise");
        last = version;
        let label = pod.metadata.labels.unwrap_or_default().remove("app");
        assert_eq!(
            label.as_deref(),
            Some("x"),
            "only selected states are shown"
        );
        seen.push((kind, pod.status.unwrap().phase.unwrap()));
    }
    let seen: Vec<_> = seen
        .iter()
        .map(|(kind, phase)| (*kind, phase.as_str()))
        .collect();
    assert_eq!(
        seen,
        [
            ("ADDED", "Pending"),
            ("MODIFIED", "Running"),
            ("DELETED", "Running"),
            ("ADDED", "Running"),
            ("DELETED", "Running")
        ]
    );
}

#[rstest]
#[case::listing(watcher::Config::default())]
#[case::streaming(watcher::Config::default().streaming_lists())]
#[tokio::test]
async fn kubes_watcher_follows(#[case] config: watcher::Config) {
    let setup = Setup::new().await;
    let secrets: Api<Secret> = setup.api();
    secrets.create(&POST, &secret("first")).await.unwrap();
    let names = watcher::watcher(secrets.clone(), config)
        .default_backoff()
        .applied_objects()
        .map_ok(|secret| secret.metadata.name.unwrap());
    pin_mut!(names);
    assert_eq!(names.next().await.unwrap().unwrap(), "first");
    secrets.create(&POST, &secret("second")).await.unwrap();
    assert_eq!(names.next().await.unwrap().unwrap(), "second");
}
