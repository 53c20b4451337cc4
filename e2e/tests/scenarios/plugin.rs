//! `kubectl secrets-store` against a cluster: the plugin's own binary, a kubeconfig, and commands that run in
//! the driver's container.

use std::{fmt::Write as _, process::Stdio};

use e2e::{binaries::Binaries, cluster::Cluster as _};
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::{Pod, ServiceAccount},
};
use kube::{
    ResourceExt as _,
    api::{Api, DeleteParams, ListParams, PostParams},
};
use serde_json::{Value, json};

use crate::{
    harness::{Scenario, scenario, until},
    objects::{SecretObject, class, pod},
    settings::Need,
};

/// A driver that refreshes on request only, and checks Secrets every second.
const NEEDS: &[Need] = &[
    Need::Republish,
    Need::Flags(&[
        "--enable-secret-rotation=true",
        "--rotation-poll-interval=10m",
        "--rotation-backoff=1s",
        "--rotation-backoff-max=4s",
        "--sync-interval=1s",
    ]),
];

const OBJECT: &str = "- {objectName: password, content: hunter2}";
const DENIED: &str = "- {status: {code: PERMISSION_DENIED, message: no role for this pod}}";

/// The plugin, with a kubeconfig.
struct Plugin {
    dir: tempfile::TempDir,
}

/// What the plugin printed.
struct Said {
    code: Option<i32>,
    text: String,
}

impl Plugin {
    /// Returns a plugin with an administrator's rights.
    async fn new(s: &Scenario) -> Self {
        Self::with(&s.cluster.kubeconfig().await)
    }

    fn with(kubeconfig: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config"), kubeconfig).unwrap();
        Self { dir }
    }

    /// Returns a plugin with the rights of a service account.
    async fn of_account(s: &Scenario, account: &str) -> Self {
        let accounts: Api<ServiceAccount> = s.namespace.api();
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                expiration_seconds: Some(3600),
                ..TokenRequestSpec::default()
            }),
            ..TokenRequest::default()
        };
        let token = accounts
            .create_token_request(account, &PostParams::default(), &request)
            .await
            .unwrap();
        let text = s.cluster.kubeconfig().await;
        let mut config: Value = serde_saphyr::from_str(&text).unwrap();
        config["users"][0]["user"] = json!({"token": token.status.unwrap().token});
        Self::with(&config.to_string())
    }

    async fn run(&self, s: &Scenario, args: &[&str]) -> Said {
        let plugin = Binaries::find(|_| ()).unwrap().plugin();
        let output = tokio::process::Command::new(plugin)
            .args(args)
            .args(["-n", s.namespace.name(), "--kubeconfig"])
            .arg(self.dir.path().join("config"))
            .stdin(Stdio::null())
            .output()
            .await
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8(text).unwrap();
        // No story has a secret.
        assert!(!text.contains("hunter2"), "{text}");
        Said {
            code: output.status.code(),
            text: s.told(&text).await,
        }
    }

    async fn explain(&self, s: &Scenario, pod: &str) -> Said {
        self.run(s, &["explain", "pod", pod]).await
    }

    /// Waits until the story of a pod has a text.
    async fn explains(&self, s: &Scenario, pod: &str, what: &str) -> Said {
        until(&format!("the story of {pod} has {what:?}"), async || {
            self.explain(s, pod).await.text.contains(what)
        })
        .await;
        self.explain(s, pod).await
    }
}

impl Scenario {
    /// Replaces what differs from run to run in what the plugin says.
    async fn told(&self, text: &str) -> String {
        let pods: Api<Pod> = Api::all(self.cluster.client());
        let pods = pods.list(&ListParams::default()).await.unwrap();
        let drivers = pods.iter().filter(|pod| {
            let mut containers = pod.spec.iter().flat_map(|spec| &spec.containers);
            containers.any(|container| container.name == "secrets-store")
        });
        let mut text = text.to_owned();
        for driver in drivers {
            text = text.replace(&driver.name_any(), "[driver]");
        }
        self.redacted(&text)
    }
}

/// Compares stories with a snapshot, without times and how long ago they were.
macro_rules! assert_stories {
    ($text:expr) => {
        // How many calls of other pods failed before is not known.
        let filters = vec![
            (r"\d{4}-\d\d-\d\dT[\d:]+Z( \([^)]*\))?", "[time]"),
            (r"\d+[smhd](\d+[smhd])? ago", "[span] ago"),
            (r"\nTo know:\n  - of \d+ calls [^\n]*\n", ""),
        ];
        insta::with_settings!({filters => filters}, {
            insta::assert_snapshot!($text);
        });
    };
}

/// Pods in all kinds of trouble, and what the plugin says of each.
#[tokio::test]
async fn the_story_of_a_pod() {
    let s = scenario!(NEEDS);
    let plugin = Plugin::new(&s).await;
    let mut text = String::new();
    let mut tell = |title: &str, said: Said| {
        writeln!(
            text,
            "# {title}: exit code {}\n{}",
            said.code.unwrap(),
            said.text
        )
        .unwrap();
    };
    let made = |secret: &str, object: &str| [SecretObject::new(secret, &[("pw", object)])];
    s.apply(class("db", OBJECT).secret_objects(made("creds", "password")))
        .await;
    s.apply(class("mail", "- {objectName: smtp, content: hunter2}"))
        .await;

    s.apply(pod("fine", &["db", "mail"])).await;
    s.ready("fine").await;
    tell(
        "two volumes and a Secret",
        plugin.explains(&s, "fine", "creds (there)").await,
    );
    let json = plugin.run(&s, &["explain", "pod/fine", "-o", "json"]).await;
    assert_eq!(json.code, Some(0));
    let json: Value = serde_json::from_str(&json.text).unwrap();
    assert_eq!(
        json["volumes"][0]["objects"],
        json!([{"id": "secret/password", "version": "v1"}]),
        "{json}"
    );
    assert_eq!(json["volumes"][0]["refreshes"], "due", "{json}");
    assert_eq!(json["trouble"], json!([]), "{json}");
    let nobody = plugin.run(&s, &["explain", "pod", "fin"]).await;
    tell("no such pod", nobody);

    s.apply(pod("misspelt", &["dbs"])).await;
    s.failed_mount("misspelt", "dbs").await;
    tell(
        "a class that is not there",
        plugin.explain(&s, "misspelt").await,
    );

    s.apply(class("elsewhere", OBJECT).provider("nobody")).await;
    s.apply(pod("lonely", &["elsewhere"])).await;
    s.failed_mount("lonely", "has no socket").await;
    tell(
        "a provider that is not there",
        plugin.explain(&s, "lonely").await,
    );

    s.apply(class("denied", OBJECT).faults(DENIED)).await;
    s.apply(pod("denied", &["mail", "denied"])).await;
    s.failed_mount("denied", "no role for this pod").await;
    tell(
        "one of two volumes is refused",
        plugin.explains(&s, "denied", "no role").await,
    );

    s.apply(class("wrong", OBJECT).secret_objects(made("other", "passwort")))
        .await;
    s.apply(pod("wrong", &["wrong"])).await;
    s.ready("wrong").await;
    tell(
        "a Secret of an object that is not there",
        // An event tells it first, and then the pod status, which has no age.
        plugin
            .explains(&s, "wrong", "mounted under the alias\n")
            .await,
    );

    s.apply(pod("envy", &["mail"]).env("creds-of-others", "pw"))
        .await;
    s.apply(class("others", OBJECT).secret_objects(made("creds-of-others", "password")))
        .await;
    plugin
        .explains(&s, "envy", "CreateContainerConfigError")
        .await;
    tell(
        "an environment of another class",
        plugin.explains(&s, "envy", "class others makes it").await,
    );

    s.apply(class("stale", OBJECT)).await;
    s.apply(pod("stale", &["stale"])).await;
    s.ready("stale").await;
    s.apply(class("stale", OBJECT).faults(DENIED)).await;
    until("the refresh fails", async || {
        s.namespace.reconcile("stale").await.unwrap();
        plugin.explain(&s, "stale").await.text.contains("it says:")
    })
    .await;
    tell("a refresh that fails", plugin.explain(&s, "stale").await);

    assert_stories!(text);
}

/// Someone who may read pods, and nothing else, is told what is not known.
#[tokio::test]
async fn the_story_for_someone_with_few_rights() {
    let s = scenario!(NEEDS);
    let account = "reader";
    s.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account}}))
        .await;
    let group = "rbac.authorization.k8s.io";
    s.apply(json!({
        "apiVersion": format!("{group}/v1"), "kind": "Role", "metadata": {"name": account},
        "rules": [{"apiGroups": [""], "resources": ["pods", "events"], "verbs": ["get", "list"]}],
    }))
    .await;
    s.apply(json!({
        "apiVersion": format!("{group}/v1"), "kind": "RoleBinding", "metadata": {"name": account},
        "roleRef": {"apiGroup": group, "kind": "Role", "name": account},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": s.namespace.name()}],
    }))
    .await;
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    s.apply(pod("misspelt", &["dbs"])).await;
    s.failed_mount("misspelt", "dbs").await;
    let plugin = Plugin::of_account(&s, account).await;
    let (web, misspelt) = (
        plugin.explain(&s, "web").await,
        plugin.explain(&s, "misspelt").await,
    );
    assert_stories!(format!(
        "# mounted: exit code {}\n{}\n# a class that is not there: exit code {}\n{}",
        web.code.unwrap(),
        web.text,
        misspelt.code.unwrap(),
        misspelt.text
    ));
}

/// What only a node of our own can be made to do.
#[tokio::test]
async fn the_story_of_a_broken_node() {
    let s = scenario!([
        Need::Embedded("its mounts are those of this machine"),
        Need::Flags(&["--rotation-poll-interval=10m"]),
    ]);
    let plugin = Plugin::new(&s).await;
    let mut text = String::new();
    let mut tell = |title: &str, said: Said| {
        writeln!(
            text,
            "# {title}: exit code {}\n{}",
            said.code.unwrap(),
            said.text
        )
        .unwrap();
    };
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    tell("rotation is off", plugin.explain(&s, "web").await);

    s.apply(class("db", OBJECT).annotation("secrets-store.csi.k8s.io/refresh", "now"))
        .await;
    tell(
        "a refresh is asked for, and rotation is off",
        plugin.explain(&s, "web").await,
    );
    s.delete_class("db").await;
    tell("the class is deleted", plugin.explain(&s, "web").await);
    s.apply(class("db", OBJECT)).await;

    let mounts = s
        .cluster
        .mounts(&s.node(), "/var/lib/kubelet/pods".as_ref())
        .await
        .unwrap();
    let target = mounts.iter().find(|path| path.ends_with("mount")).unwrap();
    let umount = ["umount", &target.to_string_lossy()];
    s.cluster.embedded().exec(&s.node(), &umount).await.unwrap();
    tell(
        "somebody has unmounted the volume",
        plugin.explain(&s, "web").await,
    );

    let sets: Api<k8s_openapi::api::apps::v1::DaemonSet> =
        Api::namespaced(s.cluster.client(), "kube-system");
    sets.delete("csi-secrets-store", &DeleteParams::default())
        .await
        .unwrap();
    tell(
        "the driver is not installed",
        plugin.explain(&s, "web").await,
    );
    assert_stories!(text);
}

/// A cluster that is in order, and one with a class of a provider that no node has.
#[tokio::test]
async fn the_doctor_of_a_cluster() {
    let s = scenario!(NEEDS);
    let plugin = Plugin::new(&s).await;
    s.apply(
        class("db", OBJECT).secret_objects([SecretObject::new("creds", &[("pw", "password")])]),
    )
    .await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let doctor = async || {
        let said = plugin.run(&s, &["doctor", "-o", "json"]).await;
        let report: Value = serde_json::from_str(&said.text).unwrap();
        (said.code, report)
    };
    let (_, report) = doctor().await;
    assert_eq!(report["unknown"], json!([]), "{report:#}");
    let all = |report: &Value| {
        let all = report["findings"].as_array().unwrap().iter();
        all.map(|finding| finding["check"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    // What pods of other scenarios leave behind on a shared cluster is not looked at.
    for check in [
        "kinds",
        "csi-driver",
        "rollout",
        "rights",
        "registration",
        "driver-socket",
        "mount-propagation",
        "clock",
    ] {
        assert!(!all(&report).contains(&check.to_owned()), "{report:#}");
    }
    let nodes = s.cluster.nodes().len();
    let looked = report["lookedAt"].to_string();
    assert!(
        looked.contains(&format!("of which {nodes} said what")),
        "{report:#}"
    );
    s.apply(class("lonely", OBJECT).provider("nobody")).await;
    let (code, report) = doctor().await;
    assert_eq!(code, Some(1), "{report:#}");
    let what = report["findings"].to_string();
    assert!(
        what.contains("no node that was asked has provider nobody"),
        "{report:#}"
    );
}
