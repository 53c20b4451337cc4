//! Runs the plugin against an API server whose objects are those of clusters in trouble. The node's driver is
//! played here; the scenarios of `e2e` have the real one.

use std::fmt::Write as _;

use serde_json::json;

use crate::{
    drivers::DRIVERS,
    looks::LOOKS,
    restarts::RESTARTS,
    situations::situations,
    starts::STARTS,
    waits::WAITS,
    world::{World, ago},
};

/// Compares stories with a snapshot, without times and how long ago they were.
macro_rules! assert_stories {
    ($text:expr) => {
        let filters = vec![
            (r"\d{4}-\d\d-\d\dT[\d:]+Z( \([^)]*\))?", "[time]"),
            (r"\d+[smhd](\d+[smhd])? ago", "[span] ago"),
        ];
        insta::with_settings!({filters => filters}, {
            insta::assert_snapshot!($text);
        });
    };
}

#[tokio::test]
async fn each_situation_has_its_story() {
    let mut text = String::new();
    let all = situations().chain(WAITS).chain(RESTARTS);
    let all = all.chain(STARTS).chain(DRIVERS).chain(LOOKS);
    for (title, change) in all {
        let mut world = World::in_order();
        change(&mut world);
        let said = world.start().await.explain("web").await;
        assert_eq!(said.stderr, "", "{title}");
        writeln!(text, "# {title}: exit code {}\n{}", said.code, said.stdout).unwrap();
    }
    assert_stories!(text);
}

/// The text of others cannot move the cursor, and is not longer than it should be.
#[tokio::test]
async fn texts_of_others_are_one_line() {
    let mut world = World::in_order();
    world.not_started();
    let evil = format!("\u{1b}[2J\r\nnext: rm -rf /\n{}", "x".repeat(10_000));
    world.event(
        "FailedMount",
        &format!("MountVolume.SetUp failed for volume \"secrets\" : {evil}"),
    );
    let said = world.start().await.explain("web").await;
    assert!(!said.stdout.contains('\u{1b}'), "{}", said.stdout);
    assert!(
        said.stdout.contains("it says: [2J next: rm -rf /"),
        "{}",
        said.stdout
    );
    assert!(
        said.stdout.lines().all(|line| line.len() < 1_000),
        "{}",
        said.stdout
    );
}

#[tokio::test]
async fn what_cannot_be_explained_has_exit_code_2() {
    let running = World::in_order().start().await;
    let before = ["-n", "shop", "--output=json", "explain", "pod", "web"];
    let said = running.run(&before).await;
    assert_eq!(
        (said.code, said.stderr.as_str()),
        (0, ""),
        "flags before the command"
    );
    let said = running.explain("we").await;
    assert_eq!(said.code, 2);
    assert_eq!(
        said.stderr,
        "there is no pod we in namespace shop; there are web\n"
    );
    let mut nowhere = running;
    nowhere.kubeconfig = std::path::PathBuf::from("/no/such/file");
    let said = nowhere.explain("web").await;
    assert_eq!(said.code, 2);
    assert!(said.stderr.contains("/no/such/file"), "{}", said.stderr);
}

/// A workload has the pod explained that is not ready.
#[tokio::test]
async fn a_workload_has_one_of_its_pods_explained() {
    let mut world = World::in_order();
    world.pod["metadata"]["labels"] = json!({"app": "web"});
    world.pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
    let mut other = world.pod.clone();
    other["metadata"]["name"] = json!("a-ready-one");
    other["metadata"]["uid"] = json!("other");
    other["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]);
    let ready = "/api/v1/namespaces/shop/pods/a-ready-one".to_owned();
    world.others.push((ready, other));
    let deployment = json!({
        "metadata": {"name": "web"},
        "spec": {
            "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": []}},
        },
    });
    let path = "/apis/apps/v1/namespaces/shop/deployments/web".to_owned();
    world.others.push((path, deployment));
    let running = world.start().await;
    for words in [&["deployment", "web"][..], &["deploy/web"]] {
        let args = [&["explain", "-n", "shop"], words].concat();
        let said = running.run(&args).await;
        assert_eq!(said.stderr, "");
        assert!(
            said.stdout.starts_with("pod shop/web: Running"),
            "{}",
            said.stdout
        );
    }
    let said = running.run(&["explain", "sts", "web", "-n", "shop"]).await;
    assert_eq!(
        (said.code, said.stderr.as_str()),
        (2, "there is no StatefulSet shop/web\n")
    );
}

/// Returns a workload that selects pods of a label.
fn workload(name: &str, app: &str) -> serde_json::Value {
    json!({
        "metadata": {"name": name, "uid": name},
        "spec": {
            "serviceName": "", "schedule": "* * * * *",
            "jobTemplate": {"spec": {"template": {}}},
            "selector": {"matchLabels": {"app": app}},
            "template": {"metadata": {"labels": {"app": app}}, "spec": {"containers": []}},
        },
    })
}

/// A workload without pods has the event that says why.
#[tokio::test]
async fn a_workload_without_pods_says_why() {
    const WHY: &str = "pods \"web-5d-\" is forbidden: exceeded quota";
    let mut world = World::in_order();
    for (path, name) in [
        ("deployments", "web"),
        ("statefulsets", "db"),
        ("deployments", "idle"),
    ] {
        let path = format!("/apis/apps/v1/namespaces/shop/{path}/{name}");
        world.others.push((path, workload(name, "none")));
    }
    for (kind, name) in [
        ("ReplicaSet", "web-5d"),
        ("ReplicaSet", "web-other-5d"),
        ("StatefulSet", "db"),
    ] {
        let object = json!({"kind": kind, "namespace": "shop", "name": name, "uid": name});
        world.event_of(&object, "FailedCreate", WHY);
    }
    let running = world.start().await;
    for (kind, name, maker) in [
        ("deployment", "web", "ReplicaSet web-5d"),
        ("sts", "db", "StatefulSet db"),
    ] {
        let said = running.run(&["explain", kind, name, "-n", "shop"]).await;
        assert_eq!(
            (said.code, said.stderr.as_str()),
            (1, ""),
            "{}",
            said.stdout
        );
        let expected = format!("  - {maker} cannot make its pods\n    it says: {WHY} (2");
        assert!(said.stdout.contains(&expected), "{}", said.stdout);
        let next = format!("next:    kubectl -n shop describe {}", maker.to_lowercase());
        assert!(said.stdout.contains(&next), "{}", said.stdout);
    }
    let said = running.run(&["explain", "deploy/idle", "-n", "shop"]).await;
    assert_eq!(said.code, 2);
    assert!(
        said.stderr
            .starts_with("Deployment shop/idle has no pods, and no event says"),
        "{}",
        said.stderr
    );
}

/// A CronJob has the pod of its newest Job explained.
#[tokio::test]
async fn a_cron_job_has_its_newest_job_explained() {
    let mut world = World::in_order();
    world.pod["metadata"]["labels"] = json!({"app": "newest"});
    let batch = "/apis/batch/v1/namespaces/shop";
    for name in ["nightly", "weekly"] {
        let path = format!("{batch}/cronjobs/{name}");
        world.answers.push((path, workload(name, name)));
    }
    let mut jobs = Vec::new();
    for (name, owner, age) in [
        ("a", "nightly", 900),
        ("newest", "nightly", 60),
        ("z", "other", 1),
    ] {
        let mut job = workload(name, name);
        job["metadata"]["creationTimestamp"] = ago(age);
        job["metadata"]["ownerReferences"] =
            json!([{"apiVersion": "batch/v1", "kind": "CronJob", "name": owner, "uid": owner}]);
        let path = format!("{batch}/jobs/{name}");
        world.answers.push((path, job.clone()));
        jobs.push(job);
    }
    let all = json!({"metadata": {}, "items": jobs});
    world.answers.push((format!("{batch}/jobs"), all));
    let running = world.start().await;
    let said = running
        .run(&["explain", "cronjob", "nightly", "-n", "shop"])
        .await;
    assert_eq!(said.stderr, "");
    assert!(
        said.stdout.starts_with("pod shop/web: Running"),
        "{}",
        said.stdout
    );
    let said = running.run(&["explain", "cj/weekly", "-n", "shop"]).await;
    assert_eq!(said.code, 2);
    assert!(
        said.stderr
            .starts_with("CronJob shop/weekly has run no Job yet"),
        "{}",
        said.stderr
    );
}

/// The first line says what is wrong with a command line; the usage follows.
#[tokio::test]
async fn a_wrong_command_line_has_its_reason_first() {
    let running = World::in_order().start().await;
    for (words, why) in [
        (
            &["explain", "pod", "-n", "t01"][..],
            "the pod's name is missing: explain pod NAME",
        ),
        (
            &["explain", "deploy/"],
            "the deploy's name is missing: explain deploy NAME",
        ),
        (&["explain"], "the pod's name is missing: explain pod NAME"),
        (
            &["explain", "pod", "a", "b"],
            "explain takes one kind and one name, and not pod a b",
        ),
        (
            &["explain", "service", "a"],
            "\"service\" is not explained; a pod or its workload is",
        ),
        (
            &["doctor", "node-1"],
            "doctor takes no \"node-1\"; it examines the whole cluster",
        ),
        (
            &["lint"],
            "lint needs a file, a directory, or - for standard input",
        ),
        (
            &["explian", "pod"],
            "\"explian\" is not a command; they are explain, doctor and lint",
        ),
        (&["explain", "--what"], "--what is not known"),
    ] {
        let said = running.run(words).await;
        assert_eq!(said.code, 2, "{words:?}");
        let mut lines = said.stderr.lines();
        assert_eq!(lines.next(), Some(why), "{words:?}");
        assert!(lines.any(|line| line == "usage:"), "{words:?}");
    }
    let said = running.explain("web\r").await;
    assert_eq!(
        (said.code, said.stderr.as_str()),
        (2, "\"web\\r\" cannot be the name of a pod\n")
    );
}
