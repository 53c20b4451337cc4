//! Explains workloads that lack pods: one of those that are there is explained, and why the others are missing.

use serde_json::{Value, json};

use crate::world::{World, ago};

const WHY: &str = "pods \"web-7f-\" is forbidden: error looking up service account shop/gone";

/// A workload of the pod.
struct Case {
    /// The list of its kind, and the kind.
    kinds: (&'static str, &'static str),
    /// Its spec and status, besides what every one has.
    spec: Value,
    status: Value,
    /// The object whose event says that a pod could not be made, and how long ago it did.
    event: Option<(&'static str, &'static str, i64)>,
    code: i32,
    /// What is said.
    says: &'static str,
}

impl Case {
    fn of(kind: &'static str, spec: Value, status: Value) -> Self {
        let path = match kind {
            "Job" => "/apis/batch/v1/namespaces/shop/jobs",
            "Deployment" => "/apis/apps/v1/namespaces/shop/deployments",
            "ReplicaSet" => "/apis/apps/v1/namespaces/shop/replicasets",
            "StatefulSet" => "/apis/apps/v1/namespaces/shop/statefulsets",
            _ => "/apis/apps/v1/namespaces/shop/daemonsets",
        };
        Self {
            kinds: (path, kind),
            spec,
            status,
            event: None,
            code: 0,
            says: "",
        }
    }

    fn event(mut self, kind: &'static str, name: &'static str, age: i64) -> Self {
        self.event = Some((kind, name, age));
        self
    }

    fn says(mut self, code: i32, says: &'static str) -> Self {
        (self.code, self.says) = (code, says);
        self
    }
}

/// A ReplicaSet of the Deployment `web`.
fn set(name: &str, revision: &str, owner: &str) -> Value {
    json!({"metadata": {"name": name, "uid": name, "annotations": {"deployment.kubernetes.io/revision": revision},
        "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": owner, "uid": owner}]}})
}

fn cases() -> Vec<Case> {
    let deployment = |wanted, current, updated| {
        Case::of(
            "Deployment",
            json!({"replicas": wanted}),
            json!({"replicas": current, "updatedReplicas": updated}),
        )
    };
    let job = |spec, status| Case::of("Job", spec, status);
    let failed = json!([{"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "too long"}]);
    vec![
        deployment(1, 1, 0).event("ReplicaSet", "web-7f", 300).says(
            1,
            "  - Deployment web has 0 of 1 pods of its present template: ReplicaSet web-7f cannot make the others\n    it says: pods \"web-7f-\" is forbidden: error looking up service account shop/gone (5m",
        ),
        deployment(2, 1, 1).event("ReplicaSet", "web-7f", 20).says(
            1,
            "  - Deployment web has 1 of 2 pods: ReplicaSet web-7f cannot make the others\n",
        ),
        // The event of an earlier ReplicaSet, of another Deployment, or of a time long gone.
        deployment(1, 1, 0).event("ReplicaSet", "web-5d", 20).says(
            0,
            "  - Deployment web has 0 of 1 pods of its present template, and no event says that one could not be made\n",
        ),
        deployment(2, 1, 1)
            .event("ReplicaSet", "web-9a", 20)
            .says(0, "has 1 of 2 pods, and no event says"),
        deployment(2, 1, 1)
            .event("ReplicaSet", "web-7f", 1_300)
            .says(0, "has 1 of 2 pods, and no event says"),
        deployment(1, 1, 1)
            .event("ReplicaSet", "web-7f", 20)
            .says(0, "Nothing is wrong with its volumes."),
        Case::of(
            "Deployment",
            json!({"replicas": 2}),
            json!({"replicas": 1, "updatedReplicas": 1, "conditions": [
                {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "exceeded quota"}]}),
        )
        .says(
            1,
            "  - Deployment web has 1 of 2 pods, and the others cannot be made\n    it says: exceeded quota\n    next:    kubectl -n shop describe deployment web\n",
        ),
        Case::of("ReplicaSet", json!({"replicas": 3}), json!({"replicas": 2}))
            .event("ReplicaSet", "web", 20)
            .says(1, "ReplicaSet web has 2 of 3 pods: ReplicaSet web cannot"),
        Case::of("StatefulSet", json!({"replicas": 3, "serviceName": ""}), json!({"replicas": 2}))
            .event("StatefulSet", "web", 20)
            .says(1, "StatefulSet web has 2 of 3 pods: StatefulSet web cannot"),
        Case::of(
            "DaemonSet",
            json!({}),
            json!({"desiredNumberScheduled": 3, "currentNumberScheduled": 2, "numberMisscheduled": 0, "numberReady": 2}),
        )
        .event("DaemonSet", "web", 20)
        .says(1, "DaemonSet web has 2 of 3 pods: DaemonSet web cannot"),
        job(json!({"parallelism": 2, "completions": 3}), json!({"active": 1, "succeeded": 1}))
            .event("Job", "web", 20)
            .says(1, "Job web has 1 of 2 pods: Job web cannot"),
        job(json!({"parallelism": 2, "completions": 3}), json!({"active": 1, "succeeded": 2}))
            .event("Job", "web", 20)
            .says(0, "Nothing is wrong with its volumes."),
        job(json!({}), json!({"conditions": failed}))
            .event("Job", "web", 20)
            .says(0, "  - Job web has failed (DeadlineExceeded): too long\n"),
    ]
}

#[tokio::test]
async fn a_workload_says_why_pods_are_missing() {
    for case in cases() {
        let mut world = World::in_order();
        world.pod["metadata"]["labels"] = json!({"app": "web"});
        let ((path, kind), title) = (case.kinds, format!("{:?} {}", case.kinds, case.status));
        let mut object = json!({
            "metadata": {"name": "web", "uid": "web"}, "status": case.status,
            "spec": {"selector": {"matchLabels": {"app": "web"}},
                "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": []}}},
        });
        let spec = object["spec"].as_object_mut().unwrap();
        spec.extend(case.spec.as_object().unwrap().clone());
        world.answers.push((format!("{path}/web"), object));
        let sets = [
            set("web-5d", "2", "web"),
            set("web-7f", "10", "web"),
            set("web-9a", "11", "other"),
        ];
        let sets = json!({"metadata": {}, "items": sets});
        world.answers.push(("/replicasets".to_owned(), sets));
        if let Some((kind, name, age)) = case.event {
            let object = json!({"kind": kind, "namespace": "shop", "name": name, "uid": name});
            world.event_of(&object, "FailedCreate", WHY);
            world.others.last_mut().unwrap().1["lastTimestamp"] = ago(age);
        }
        let running = world.start().await;
        let said = running
            .run(&["explain", kind.to_lowercase().as_str(), "web", "-n", "shop"])
            .await;
        assert_eq!(
            (said.code, said.stderr.as_str()),
            (case.code, ""),
            "{title}: {}",
            said.stdout
        );
        assert!(
            said.stdout.starts_with("pod shop/web: Running"),
            "{title}: {}",
            said.stdout
        );
        assert!(said.stdout.contains(case.says), "{title}: {}", said.stdout);
    }
}

/// A pod that was evicted, or that failed before a Job was complete, says nothing of the present.
#[tokio::test]
async fn pods_that_have_ended_are_looked_at_last() {
    let complete = json!({"conditions": [{"type": "Complete", "status": "True"}], "succeeded": 1});
    for (kinds, status, other, expected) in [
        (
            "deployments",
            json!({"replicas": 1, "updatedReplicas": 1}),
            "Running",
            "pod shop/web: Running",
        ),
        ("jobs", complete, "Succeeded", "pod shop/web: Succeeded"),
        (
            "jobs",
            json!({"active": 1}),
            "Running",
            "pod shop/web: Running",
        ),
        (
            "jobs",
            json!({"failed": 2}),
            "Failed",
            "pod shop/a-failed-one: Failed",
        ),
    ] {
        let mut world = World::in_order();
        world.pod["metadata"]["labels"] = json!({"app": "web"});
        world.pod["status"]["phase"] = json!(other);
        world.pod["status"]["containerStatuses"] = json!([]);
        let mut failed = world.pod.clone();
        failed["metadata"]["name"] = json!("a-failed-one");
        failed["metadata"]["uid"] = json!("other");
        failed["status"] = json!({"phase": "Failed"});
        let path = "/api/v1/namespaces/shop/pods/a-failed-one".to_owned();
        world.others.push((path, failed));
        let group = if kinds == "jobs" { "batch" } else { "apps" };
        let object = json!({
            "metadata": {"name": "web", "uid": "web"}, "status": status,
            "spec": {"selector": {"matchLabels": {"app": "web"}}, "template": {"metadata": {}}},
        });
        let path = format!("/apis/{group}/v1/namespaces/shop/{kinds}/web");
        world.answers.push((path, object));
        let running = world.start().await;
        let said = running.run(&["explain", kinds, "web", "-n", "shop"]).await;
        assert!(
            said.stdout.starts_with(expected),
            "{kinds} {other}: {}{}",
            said.stdout,
            said.stderr
        );
    }
}

/// Someone who may not read events is told so.
#[tokio::test]
async fn missing_pods_without_events_are_named_as_not_known() {
    let mut world = World::in_order();
    world.pod["metadata"]["labels"] = json!({"app": "web"});
    world.forbidden = vec!["/events"];
    let path = "/apis/apps/v1/namespaces/shop/deployments/web".to_owned();
    let object = json!({
        "metadata": {"name": "web", "uid": "web"}, "status": {"replicas": 1},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {}, "spec": {"containers": []}}},
    });
    world.answers.push((path, object));
    let running = world.start().await;
    let said = running.run(&["explain", "deploy/web", "-n", "shop"]).await;
    assert_eq!((said.code, said.stderr.as_str()), (0, ""));
    let expected = "  - why Deployment web has 1 of 2 pods: its events: forbidden\n";
    assert!(said.stdout.contains(expected), "{}", said.stdout);
}

/// A Job that has failed has deleted its pods; their events are still there.
#[tokio::test]
async fn a_job_without_pods_says_what_became_of_it() {
    for (condition, code, expected) in [
        (
            json!({"type": "Failed", "status": "True", "reason": "DeadlineExceeded",
                "message": "Job was active longer than specified deadline"}),
            1,
            "Job nightly in namespace shop: no pods\n\nWrong:\n  - pod nightly-x7k2p of it, which is gone, could not mount its volumes\n    it says: MountVolume.SetUp failed for volume \"secrets\" : no role (2",
        ),
        (
            json!({"type": "Complete", "status": "True", "message": "done"}),
            2,
            "Job shop/nightly has no pods: its condition is Complete (done)\n",
        ),
        (
            json!({"type": "Suspended", "status": "True"}),
            2,
            "Job shop/nightly has no pods: its condition is Suspended\n",
        ),
    ] {
        let mut world = World::in_order();
        let path = "/apis/batch/v1/namespaces/shop/jobs/nightly".to_owned();
        let object = json!({
            "metadata": {"name": "nightly", "uid": "nightly"}, "status": {"conditions": [condition]},
            "spec": {"selector": {"matchLabels": {"job": "nightly"}}, "template": {}},
        });
        world.answers.push((path, object));
        for (pod, said) in [
            ("nightly-x7k2p", "no role"),
            ("nightly-report-aaaaa", "another Job"),
        ] {
            let pod = json!({"kind": "Pod", "namespace": "shop", "name": pod, "uid": pod});
            let said = format!("MountVolume.SetUp failed for volume \"secrets\" : {said}");
            world.event_of(&pod, "FailedMount", &said);
        }
        let running = world.start().await;
        let said = running
            .run(&["explain", "job", "nightly", "-n", "shop"])
            .await;
        assert_eq!(said.code, code, "{}{}", said.stdout, said.stderr);
        let text = format!("{}{}", said.stdout, said.stderr);
        assert!(text.starts_with(expected), "{text}");
        if code == 1 {
            let failed = "  - Job nightly has failed (DeadlineExceeded)\n    it says: Job was active longer than specified deadline\n    next:    kubectl -n shop describe job nightly\n";
            assert!(text.contains(failed), "{text}");
            assert!(!text.contains("another Job"), "{text}");
        }
    }
}
