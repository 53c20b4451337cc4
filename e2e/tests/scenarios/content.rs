//! Files in a container are those that the provider sends: content, modes, trees, sizes.

use e2e::cluster::Cluster as _;
use e2e::tree::{Content, View};

use crate::{
    harness::{Scenario, scenario},
    objects::{MOUNT, class, pod},
    settings::Need,
};

#[tokio::test]
async fn one_object() {
    let s = Scenario::start().await;
    s.apply(class(
        "db",
        "- {objectName: password, content: hunter2, version: v7}",
    ))
    .await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    insta::assert_snapshot!(s.state("web").await);
    assert_eq!(s.provider_calls("web").await, 1);
    assert_eq!(
        s.metric(
            "node_publish_total",
            &["provider=\"e2e-provider\"", "os_type=\"linux\""]
        )
        .await,
        1.0
    );
}

#[tokio::test]
async fn many_objects_with_modes() {
    let s = Scenario::start().await;
    s.apply(class(
        "db",
        "
        - {objectName: z-last, content: z, version: '3'}
        - {objectName: none, content: the default mode}
        - {objectName: owner, content: a, mode: '0400'}
        - {objectName: group, content: b, mode: '0640'}
        - {objectName: zero, content: e, mode: '0'}
        - {objectName: everyone, content: c, mode: '0444'}
        - {objectName: executable, content: d, mode: '0755'}
        - {objectName: beyond, content: the set-user-ID bit is dropped, mode: '4711'}
        ",
    ))
    .await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    insta::assert_snapshot!(s.state("web").await);
}

#[tokio::test]
async fn nested_paths() {
    let s = Scenario::start().await;
    s.apply(class(
        "db",
        "
        - {objectName: a, path: db/creds/user, content: u}
        - {objectName: b, path: db/creds/password, content: p, mode: '0400'}
        - {objectName: c, path: db/host, content: h}
        - {objectName: d, path: top, content: t}
        - {objectName: e, path: .hidden/dots.., content: a dot is no parent}
        ",
    ))
    .await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let volume = s.volume_and_disk("web", MOUNT).await;
    insta::assert_snapshot!(volume + &s.pod_statuses().await);
}

#[tokio::test]
async fn binary_empty_and_large_contents() {
    let s = Scenario::start().await;
    s.apply(class(
        "db",
        "
        - {objectName: binary, contentBase64: '/wABAgP+'}
        - {objectName: empty, content: ''}
        - {objectName: large, contentSize: 3145728}
        ",
    ))
    .await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    insta::assert_snapshot!(s.state("web").await);
    let tree = s.reads("web", MOUNT).await;
    let large = tree.get("large").unwrap();
    assert!(matches!(
        large.content,
        Some(Content::Digest {
            size: 3_145_728,
            ..
        })
    ));
}

#[tokio::test]
async fn two_volumes_with_two_classes() {
    let s = Scenario::start().await;
    s.apply(class("db", "- {objectName: password, content: of db}"))
        .await;
    s.apply(class("api", "- {objectName: token, content: of api}"))
        .await;
    s.apply(pod("web", &["db", "api"])).await;
    s.ready("web").await;
    let second = s.volume("web", &format!("{MOUNT}-1")).await;
    insta::assert_snapshot!(s.state("web").await + &second);
}

/// Each volume has a pod status of its own. The one that is mounted first gets the plain name, so
/// the snapshot sorts them by path and leaves the names out.
#[tokio::test]
async fn two_volumes_with_one_class() {
    let s = Scenario::start().await;
    s.apply(class("db", "- {objectName: password, content: of db}"))
        .await;
    s.apply(pod("web", &["db", "db"])).await;
    s.ready("web").await;
    for path in [MOUNT.to_owned(), format!("{MOUNT}-1")] {
        assert_eq!(s.reads("web", &path).await.texts()["password"], "of db");
    }
    let mut statuses = s.pod_status_objects().await;
    let plain = format!("web-{}-db", s.namespace);
    let names: Vec<_> = statuses
        .iter()
        .map(|o| o.metadata.name.clone().unwrap())
        .collect();
    assert_eq!(names.len(), 2);
    assert!(names.contains(&plain), "{names:?}");
    assert!(
        names.iter().all(|name| name == &plain
            || name
                .strip_prefix(&plain)
                .is_some_and(|rest| rest.len() == 11)),
        "{names:?}"
    );
    statuses.sort_by_key(|o| o.data["status"]["targetPath"].to_string());
    let shown: Vec<_> = statuses
        .iter()
        .map(|o| s.redacted(&serde_json::to_string_pretty(&o.data["status"]).unwrap()))
        .collect();
    insta::assert_snapshot!(shown.join("\n"));
}

/// A class written as v1alpha1 works like one written as v1.
#[tokio::test]
async fn both_api_versions() {
    let s = Scenario::start().await;
    let old = class(
        "old",
        "- {objectName: password, content: written as v1alpha1}",
    );
    s.apply(old.v1alpha1()).await;
    s.apply(class(
        "new",
        "- {objectName: password, content: written as v1}",
    ))
    .await;
    s.apply(pod("web", &["old", "new"])).await;
    s.ready("web").await;
    let second = s.volume("web", &format!("{MOUNT}-1")).await;
    insta::assert_snapshot!(s.state("web").await + &second);
}

/// The provider gets the class's parameters, the volume's attributes, which take precedence, and
/// kubelet's keys.
#[tokio::test]
async fn what_the_provider_is_sent() {
    let s = Scenario::start().await;
    let objects = "
        - {objectName: attributes, contentFrom: attributes}
        - {objectName: secrets, contentFrom: secrets}
        - {objectName: permission, contentFrom: permission}
        - {objectName: target, contentFrom: targetPath}
        - {objectName: current, contentFrom: currentObjectVersion}
        ";
    let class = class("db", objects)
        .parameter("color", "of the class")
        .parameter("shape", "of the class");
    s.apply(class).await;
    s.apply(pod("web", &["db"]).attribute("color", "of the volume"))
        .await;
    s.ready("web").await;
    let tree = s.reads("web", MOUNT).await;
    let texts: Vec<_> = tree
        .texts()
        .into_iter()
        .map(|(name, text)| format!("{name}: {text}"))
        .collect();
    insta::assert_snapshot!(s.redacted(&texts.join("\n")));
}

/// Providers that write files themselves, as all did before the driver did it, keep working.
#[tokio::test]
async fn a_provider_that_writes_its_own_files() {
    let s = Scenario::start().await;
    let objects = "
        - {objectName: password, content: hunter2}
        - {objectName: user, path: db/user, content: root}
        ";
    s.apply(class("db", objects).faults("- {writeFiles: true}"))
        .await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let volume = s.volume_and_disk("web", MOUNT).await;
    insta::assert_snapshot!(volume + &s.pod_statuses().await);
    s.delete("web").await;
    s.nothing_is_left().await;
}

/// The volume is a tmpfs with the documented options.
#[tokio::test]
async fn the_volume_is_a_bounded_tmpfs() {
    let s = Scenario::start().await;
    s.apply(class("db", "- {objectName: password, content: hunter2}"))
        .await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let disk = s
        .cluster
        .tree(s.namespace.name(), "web", MOUNT, View::Disk)
        .await
        .unwrap();
    assert_eq!(disk.get(".").unwrap().mode, "0755");
    let mounts = s.mounts().await;
    let [line] = mounts.as_slice() else {
        panic!("{mounts:?}")
    };
    for option in [
        "nosuid",
        "nodev",
        "noexec",
        "size=",
        "nr_inodes=",
        "mode=755",
    ] {
        assert!(line.contains(option), "{option} is missing in {line}");
    }
}

/// Without mount propagation, the pod would get an empty directory.
#[tokio::test]
async fn a_driver_whose_mounts_nobody_sees_refuses_to_mount() {
    for propagation in ["None", "HostToContainer"] {
        let s = scenario!([Need::Propagation(propagation)]);
        s.apply(class("db", "- {objectName: password, content: hunter2}"))
            .await;
        s.apply(pod("web", &["db"])).await;
        let event = s.failed_mount("web", "rpc error").await;
        insta::assert_snapshot!("a_driver_whose_mounts_nobody_sees_refuses_to_mount", event);
        assert_eq!(s.provider_calls("web").await, 0, "refused before that");
        s.delete("web").await;
        s.nothing_is_left().await;
    }
}
