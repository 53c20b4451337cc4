//! Changed secrets reach running pods.

use std::time::Duration;

use e2e::{cluster::Cluster as _, install::classes, reader::Reader};
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::{
    harness::{SOON, Scenario, scenario, until},
    objects::{MOUNT, class, pod},
    settings::{Need, REFRESH_OFTEN},
};

/// A driver that refreshes at every publish, and retries within seconds.
const OFTEN: &[Need] = &[
    Need::Republish,
    REFRESH_OFTEN,
    Need::Flags(&["--rotation-backoff=1s", "--rotation-backoff-max=4s", "-v=5"]),
];

/// A driver that refreshes on request only: its interval is longer than a scenario.
const SELDOM: &[Need] = &[
    Need::Republish,
    Need::Flags(&[
        "--enable-secret-rotation=true",
        "--rotation-poll-interval=10m",
        "-v=5",
    ]),
];

/// The attribute of a volume, and the annotation of a class, with its interval.
const INTERVAL: &str = "secrets-store.csi.k8s.io/rotation-poll-interval";

const OBJECT: &str = "- {objectName: password, content: hunter2}";

/// Makes kubelet reconcile a pod until something holds.
async fn reconciled_until(s: &Scenario, pod: &str, what: &str, holds: impl AsyncFn() -> bool) {
    until(what, async || {
        s.namespace.reconcile(pod).await.unwrap();
        for _ in 0..20 {
            if holds().await {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    })
    .await;
}

async fn reads_text(s: &Scenario, file: &str, text: &str) -> bool {
    let tree = s.reads("web", MOUNT).await;
    tree.texts().get(file) == Some(&text)
}

/// Returns how often a publish of a pod's volume had nothing to do.
async fn found_fresh(s: &Scenario, pod: &str) -> usize {
    let log = s.cluster.driver(&s.node()).log().await.unwrap();
    let of_pod = format!("pod=\"{}/{pod}\"", s.namespace);
    let lines = log.lines();
    lines
        .filter(|line| line.contains("\"already published\"") && line.contains(&of_pod))
        .count()
}

async fn annotate_class(s: &Scenario, name: &str, value: &str) {
    let classes = classes(&s.cluster.client(), s.namespace.name());
    let patch = Patch::Merge(json!({"metadata": {"annotations": {name: value}}}));
    let params = PatchParams::default();
    classes.patch("db", &params, &patch).await.unwrap();
}

/// Returns the messages of the events with a reason; a repeated one as often as it was posted.
async fn events(s: &Scenario, pod: &str, reason: &str) -> Vec<String> {
    let events = s.namespace.events(pod).await.unwrap();
    let of_reason = events
        .into_iter()
        .filter(|e| e.reason.as_deref() == Some(reason));
    let said = of_reason.flat_map(|e| {
        let times = usize::try_from(e.count.unwrap_or(1)).unwrap();
        vec![e.message.unwrap_or_default(); times]
    });
    said.map(|message| s.redacted(&message)).collect()
}

/// One of many objects changes; the others and their versions stay.
#[tokio::test]
async fn one_of_many_objects() {
    let s = scenario!(OFTEN);
    let objects = |content: &str, version: &str| {
        format!(
            "
            - {{objectName: user, content: root}}
            - {{objectName: password, content: {content}, version: {version}}}
            - {{objectName: host, path: db/host, content: db.example}}
            "
        )
    };
    s.apply(class("db", &objects("before", "v1"))).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    assert!(reads_text(&s, "password", "before").await);
    s.apply(class("db", &objects("after", "v2"))).await;
    reconciled_until(&s, "web", "the pod reads the new content", async || {
        reads_text(&s, "password", "after").await
    })
    .await;
    insta::assert_snapshot!(s.state("web").await);
    s.delete("web").await;
    s.nothing_is_left().await;
}

#[tokio::test]
async fn modes_and_paths() {
    let s = scenario!(OFTEN);
    s.apply(class(
        "db",
        "
        - {objectName: stays, content: '1'}
        - {objectName: mode, content: '1', mode: '0644'}
        - {objectName: goes, content: '1'}
        - {objectName: becomes, content: a file}
        - {objectName: was, path: was/a/directory, content: '1'}
        - {objectName: moves, path: here/file, content: '1'}
        ",
    ))
    .await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let before = s.volume_and_disk("web", MOUNT).await;
    s.apply(class(
        "db",
        "
        - {objectName: stays, content: '1'}
        - {objectName: mode, content: '1', mode: '0400'}
        - {objectName: becomes, path: becomes/a/directory, content: '2'}
        - {objectName: was, content: a file}
        - {objectName: moves, path: there/file, content: '1'}
        - {objectName: comes, path: new/file, content: '2'}
        ",
    ))
    .await;
    reconciled_until(&s, "web", "the new paths are there", async || {
        reads_text(&s, "new/file", "2").await
    })
    .await;
    insta::assert_snapshot!(before + &s.volume_and_disk("web", MOUNT).await);
}

/// A reader without pause reads complete versions only, and no gap between them.
#[tokio::test]
async fn a_reader_sees_neither_gap_nor_mixture() {
    let s = scenario!(OFTEN);
    // A real kubelet takes about a second for each.
    let rotations = if s.cluster.name() == "embedded" {
        200
    } else {
        15
    };
    let files = ["a", "b", "deep/c", "deep/d"];
    let objects = |number: u64| {
        let content = format!("{number} ").repeat(400);
        let lines = files.iter().map(|file| {
            format!(
                "- {{objectName: {}, path: {file}, content: '{content}', version: v{number}}}\n",
                file.replace('/', "-")
            )
        });
        lines.collect::<String>()
    };
    s.apply(class("db", &objects(1))).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let reader = Reader {
        files: files.map(str::to_owned).into(),
        last: rotations,
        limit: 4 * SOON,
        pause: Duration::ZERO,
    };
    let rotate = async {
        for number in 2..=rotations {
            s.apply(class("db", &objects(number))).await;
            let version = format!("v{number}");
            reconciled_until(&s, "web", "the version is mounted", async || {
                let statuses = s.pod_status_objects().await;
                statuses[0].data["status"]["objects"][0]["version"] == version.as_str()
            })
            .await;
        }
    };
    let reading = s.cluster.read(s.namespace.name(), "web", MOUNT, &reader);
    let ((), readings) = tokio::join!(rotate, reading);
    let readings = readings.unwrap();
    assert_eq!(readings.gaps, [""; 0], "{readings:?}");
    assert_eq!(readings.mixtures, [""; 0], "{readings:?}");
    assert_eq!(readings.last, rotations, "{readings:?}");
    // The reader has read most of them.
    assert!(readings.numbers > rotations / 2, "{readings:?}");
    assert!(readings.rounds > rotations, "{readings:?}");
}

/// The interval begins at the last success, which is recorded on disk: neither a restart of the
/// driver nor frequent publishes change it.
#[tokio::test]
async fn the_interval_outlives_the_driver() {
    let s = scenario!(SELDOM);
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let statuses = s.pod_status_objects().await;
    let enough = async || found_fresh(&s, "web").await >= 8;
    reconciled_until(&s, "web", "kubelet has looked often", enough).await;
    let looked = found_fresh(&s, "web").await;
    s.cluster.driver(&s.node()).kill().await.unwrap();
    let enough = async || found_fresh(&s, "web").await >= looked + 8;
    reconciled_until(&s, "web", "kubelet has looked as often again", enough).await;
    assert_eq!(s.provider_calls("web").await, 1);
    let now = s.pod_status_objects().await;
    assert_eq!(
        statuses[0].metadata.resource_version, now[0].metadata.resource_version,
        "nothing was written"
    );
}

/// An edited class, and the annotation `refresh`, take effect before the interval is over; other
/// annotations do not.
#[tokio::test]
async fn an_edited_class_and_the_refresh_annotation() {
    let s = scenario!(SELDOM);
    s.apply(class("db", "- {objectName: foo}")).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    s.provider_control("/rotation?rotated=true").await;

    annotate_class(&s, "team", "shop").await;
    let before = found_fresh(&s, "web").await;
    let looked = async || found_fresh(&s, "web").await >= before + 4;
    reconciled_until(&s, "web", "kubelet has looked", looked).await;
    assert_eq!(s.provider_calls("web").await, 1);

    for number in 1..3 {
        annotate_class(&s, "secrets-store.csi.k8s.io/refresh", &number.to_string()).await;
        let called = async || s.provider_calls("web").await == 1 + number;
        reconciled_until(&s, "web", "somebody's request is heard", called).await;
    }
    until("the pod reads the new content", async || {
        reads_text(&s, "foo", "rotated").await
    })
    .await;
    let asked = s.state("web").await;

    s.apply(class(
        "db",
        "- {objectName: foo}\n- {objectName: bar, content: new}",
    ))
    .await;
    let edited = async || reads_text(&s, "bar", "new").await;
    reconciled_until(&s, "web", "the edited class is mounted", edited).await;
    assert_eq!(s.provider_calls("web").await, 4);
    insta::assert_snapshot!(asked + &s.state("web").await);
}

/// A class can have an interval of its own, and so can a volume, which takes precedence.
#[tokio::test]
async fn intervals_of_classes_and_volumes() {
    let s = scenario!(SELDOM);
    s.apply(class("db", OBJECT).annotation(INTERVAL, "1s"))
        .await;
    s.apply(pod("web", &["db"])).await;
    s.apply(pod("never", &["db"]).attribute(INTERVAL, "never"))
        .await;
    s.ready("web").await;
    s.ready("never").await;
    // The minimum of an interval is half a minute, unless a flag lowers it.
    let before = found_fresh(&s, "web").await;
    let looked = async || found_fresh(&s, "web").await >= before + 4;
    reconciled_until(&s, "web", "kubelet has looked", looked).await;
    assert_eq!(s.provider_calls("web").await, 1);
    assert_eq!(s.provider_calls("never").await, 1);
}

/// With a lower minimum, one volume is refreshed often, and one never.
#[tokio::test]
async fn a_volume_may_never_be_refreshed() {
    let s = scenario!(OFTEN);
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.apply(pod("never", &["db"]).attribute(INTERVAL, "never"))
        .await;
    s.ready("web").await;
    s.ready("never").await;
    let looked = async || s.provider_calls("web").await > 3;
    reconciled_until(&s, "web", "the one is refreshed", looked).await;
    let fresh = async || found_fresh(&s, "never").await > 3;
    reconciled_until(&s, "never", "the other is looked at", fresh).await;
    assert_eq!(s.provider_calls("never").await, 1);
}

/// While a provider is away, running pods keep content and status, attempts become rare, and the
/// pod gets one event at the beginning and one at the end.
#[tokio::test]
async fn a_provider_that_is_away() {
    let s = scenario!(OFTEN);
    s.apply(class("db", "- {objectName: foo}")).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let (node, before) = (s.node(), s.state("web").await);
    let provider = s.cluster.provider(&node, "fake-provider");
    provider.stop().await.unwrap();

    let failed = async || !events(&s, "web", "MountRotationFailed").await.is_empty();
    reconciled_until(&s, "web", "the pod's owner is told", failed).await;
    let errors = async || s.metric("rotation_reconcile_error_total", &[]).await;
    let (started, first) = (std::time::Instant::now(), errors().await);
    let fourth = async || errors().await >= first + 3.0;
    reconciled_until(&s, "web", "it is tried again", fourth).await;
    // At least two and four seconds, each up to a fifth shorter, although kubelet publishes all the
    // time.
    let took = started.elapsed();
    assert!(took > Duration::from_secs(4), "{took:?}");
    assert_eq!(s.state("web").await, before);

    provider.start().await.unwrap();
    let started = std::time::Instant::now();
    let told = async || !events(&s, "web", "MountRotationComplete").await.is_empty();
    reconciled_until(&s, "web", "the pod's owner is told again", told).await;
    // The longest backoff, a fifth longer, and kubelet's interval.
    let took = started.elapsed();
    assert!(took < Duration::from_secs(15), "{took:?}");
    assert_eq!(s.state("web").await, before);
    let mut told = events(&s, "web", "MountRotationFailed").await;
    told.extend(events(&s, "web", "MountRotationComplete").await);
    assert_eq!(told.len(), 2, "{told:?}");
    insta::with_settings!({filters => vec![(r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "[time]")]}, {
        insta::assert_snapshot!(told.join("\n"));
    });
    let failed_mounts = events(&s, "web", "FailedMount").await;
    assert!(failed_mounts.is_empty(), "{failed_mounts:?}");
    let log = s.cluster.driver(&node).log().await.unwrap();
    assert!(log.lines().all(|line| !line.starts_with('E')), "{log}");
}

#[tokio::test]
async fn a_deleted_class() {
    let s = scenario!(OFTEN);
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let before = s.state("web").await;
    s.delete_class("db").await;
    let failed = async || !events(&s, "web", "MountRotationFailed").await.is_empty();
    reconciled_until(&s, "web", "the pod's owner is told", failed).await;
    assert_eq!(s.state("web").await, before);
    let told = events(&s, "web", "MountRotationFailed").await;
    insta::with_settings!({filters => vec![(r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "[time]")]}, {
        insta::assert_snapshot!(told.join("\n"));
    });
    s.apply(class("db", "- {objectName: password, content: again}"))
        .await;
    let again = async || reads_text(&s, "password", "again").await;
    reconciled_until(&s, "web", "a class of that name is mounted", again).await;
    s.delete("web").await;
    s.nothing_is_left().await;
}

/// With `--republish-errors=surface`, kubelet gets the errors of refreshes; the content stays.
#[tokio::test]
async fn failures_surface_where_that_is_asked_for() {
    let s = scenario!([
        Need::Republish,
        REFRESH_OFTEN,
        Need::Flags(&["--rotation-backoff=1s", "--republish-errors=surface"]),
    ]);
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let before = s.state("web").await;
    s.apply(class(
        "db",
        "- {objectName: password, path: ../../etc/passwd}",
    ))
    .await;
    let failed = async || !events(&s, "web", "FailedMount").await.is_empty();
    reconciled_until(&s, "web", "kubelet says so", failed).await;
    assert_eq!(s.state("web").await, before);
    insta::assert_snapshot!(events(&s, "web", "FailedMount").await[0]);
}

/// Without rotation, a volume stays as it was mounted, and the provider is not asked.
#[tokio::test]
async fn without_rotation_a_volume_stays_as_it_was_mounted() {
    let s = scenario!([Need::Republish, Need::Flags(&["-v=5"])]);
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    s.apply(class("db", "- {objectName: password, content: changed}"))
        .await;
    let looked = async || found_fresh(&s, "web").await >= 4;
    reconciled_until(&s, "web", "kubelet has looked", looked).await;
    assert!(reads_text(&s, "password", "hunter2").await);
    assert_eq!(s.provider_calls("web").await, 1);
}

/// Rotation and metrics as in the cases 24 to 26 of upstream's `e2e-provider.bats` (`upstream.rs`
/// explains the names), without the part about Secrets.
#[tokio::test]
async fn ep_24_to_26_rotation_and_metrics() {
    let s = scenario!(OFTEN);
    let fixture = "
apiVersion: secrets-store.csi.x-k8s.io/v1
kind: SecretProviderClass
metadata:
  name: e2e-provider-auto-rotation
spec:
  provider: e2e-provider
  parameters:
    objects: |
      array:
        - |
          objectName: foo
          objectType: secret
";
    s.apply(fixture).await;
    let name = "secrets-store-inline-rotation";
    s.apply(pod(name, &["e2e-provider-auto-rotation"])).await;
    s.ready(name).await;
    let reads = async |text: &str| s.reads(name, MOUNT).await.texts()["foo"] == text;
    assert!(reads("secret").await);
    s.provider_control("/rotation?rotated=true").await;
    reconciled_until(&s, name, "the content is rotated", async || {
        reads("rotated").await
    })
    .await;
    insta::assert_snapshot!(s.pod_statuses().await);
    let page = async || s.cluster.driver(&s.node()).metrics().await.unwrap();
    let last_success = "secrets_store_last_success_timestamp_seconds{";
    assert!(page().await.contains(last_success));
    s.delete(name).await;
    until("the volume's end is counted", async || {
        page().await.contains("node_unpublish_total")
    })
    .await;
    // Two drivers may have overlapped before this scenario; this one notices at its next check that
    // the earlier one has taken volumes down.
    until("no volume uses the provider", async || {
        !page().await.contains(last_success)
    })
    .await;
    let page = page().await;
    for family in ["node_publish_total", "rotation_reconcile_total"] {
        assert!(page.contains(family), "{page}");
    }
    let rotated = "rotation_reconcile_total";
    let labels = ["provider=\"e2e-provider\"", "rotated=\"true\""];
    assert_eq!(s.metric(rotated, &labels).await, 1.0);
}
