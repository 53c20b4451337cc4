//! The kubelet against the embedded API server and a CSI driver of a few lines, without
//! namespaces: its root is a temporary directory and nothing is mounted.

mod fake_driver;

use k8s_openapi::api::core::v1::Event as EventObject;
use kube::api::{DeleteParams, ListParams, PostParams};
use proto::csi as wire;
use proto::csi::node_server::NodeServer;
use proto::registration::registration_server::RegistrationServer;
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Code, Status};

use super::volumes::Volume;
use super::*;
use crate::api::ApiServer;
use crate::eventually;
use fake_driver::Fake;

const DRIVER: &str = "secrets-store.csi.k8s.io";

/// A node's directory, an API server, and a kubelet.
struct World {
    dir: tempfile::TempDir,
    api: ApiServer,
    tasks: JoinSet<()>,
    sync_period: Option<Duration>,
}

impl World {
    async fn new() -> Self {
        Self::with(json!({}), None).await
    }

    /// Starts with more fields in the CSIDriver's spec.
    async fn with(fields: serde_json::Value, sync_period: Option<Duration>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("kubelet/plugins_registry")).unwrap();
        let api = ApiServer::start(&dir.path().join("api")).await.unwrap();
        let mut csi_driver = json!({
            "apiVersion": "storage.k8s.io/v1",
            "kind": "CSIDriver",
            "metadata": {"name": DRIVER},
            "spec": {"attachRequired": false, "podInfoOnMount": true, "volumeLifecycleModes": ["Ephemeral"]},
        });
        for (name, value) in fields.as_object().unwrap() {
            csi_driver["spec"][name] = value.clone();
        }
        crate::apply(&api.client(), "default", &csi_driver.to_string())
            .await
            .unwrap();
        let mut world = Self {
            dir,
            api,
            tasks: JoinSet::new(),
            sync_period,
        };
        world.start_kubelet();
        world
    }

    /// Starts with a driver that is registered.
    async fn with_driver(fake: &Fake) -> Self {
        let mut world = Self::new().await;
        world.serve(fake.clone());
        world.registered().await;
        world
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("kubelet")
    }

    fn start_kubelet(&mut self) {
        let config = Config {
            node: "n".to_owned(),
            root: self.root(),
            csi_timeout: Duration::from_secs(60),
            sync_period: self.sync_period,
            longest_pause: backoff::LONGEST,
            // The fake's server is tonic's, which refuses another.
            path_authority: false,
        };
        let client = self.api.client();
        self.tasks
            .spawn(async move { run(config, client).await.unwrap() });
    }

    /// Serves the driver and the registration; the sockets go when the result is dropped.
    fn serve(&mut self, mut fake: Fake) -> PathBuf {
        let csi = self.dir.path().join("csi.sock");
        let registration = self.root().join("plugins_registry/d-reg.sock");
        fake.endpoint = csi.display().to_string();
        if fake.versions.is_empty() {
            fake.versions = vec!["1.0.0".to_owned()];
        }
        let listen = |path: &PathBuf| UnixListenerStream::new(UnixListener::bind(path).unwrap());
        let node = Server::builder().add_service(NodeServer::new(fake.clone()));
        let registrar = Server::builder().add_service(RegistrationServer::new(fake));
        let node = node.serve_with_incoming(listen(&csi));
        let registrar = registrar.serve_with_incoming(listen(&registration));
        self.tasks.spawn(async { node.await.unwrap() });
        self.tasks.spawn(async { registrar.await.unwrap() });
        registration
    }

    async fn drivers(&self) -> Vec<(String, String)> {
        let nodes: Api<CSINode> = Api::all(self.api.client());
        let node = nodes.get_opt("n").await.unwrap();
        let drivers = node.map(|node| node.spec.drivers).unwrap_or_default();
        drivers
            .into_iter()
            .map(|driver| (driver.name, driver.node_id))
            .collect()
    }

    async fn registered(&self) {
        eventually("the driver is in the CSINode", async || {
            self.drivers().await == [(DRIVER.to_owned(), "id-1".to_owned())]
        })
        .await;
    }

    async fn create_pod(&self, change: impl FnOnce(&mut serde_json::Value)) -> Pod {
        let mut pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "p", "namespace": "default"},
            "spec": {
                "nodeName": "n",
                "terminationGracePeriodSeconds": 1,
                "securityContext": {"fsGroup": 1004},
                "containers": [{"name": "c", "image": "i"}],
                "volumes": [{"name": "secrets", "csi": {
                    "driver": DRIVER,
                    "readOnly": true,
                    "volumeAttributes": {"secretProviderClass": "s", "csi.storage.k8s.io/pod.name": "forged"},
                }}],
            },
        });
        change(&mut pod["spec"]);
        let pod: Pod = serde_json::from_value(pod).unwrap();
        self.pods()
            .create(&PostParams::default(), &pod)
            .await
            .unwrap()
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.api.client(), "default")
    }

    async fn delete_pod(&self) {
        let params = DeleteParams::default();
        self.pods().delete("p", &params).await.unwrap();
    }

    /// Creates a Secret with the value `v` of the key `k`.
    async fn create_secret(&self, name: &str) {
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name},
            "stringData": {"k": "v"}});
        crate::apply(&self.api.client(), "default", &secret.to_string())
            .await
            .unwrap();
    }

    async fn ready(&self) {
        eventually("the pod is ready", async || {
            let pod = self.pods().get("p").await.unwrap();
            crate::is_ready(&pod)
        })
        .await;
    }

    async fn gone(&self) {
        eventually("the pod is gone", async || {
            self.pods().get_opt("p").await.unwrap().is_none()
        })
        .await;
        assert_eq!(pods_on_disk(&self.root()), Vec::<String>::new());
    }

    async fn event(&self, reason: &str) -> EventObject {
        let events: Api<EventObject> = Api::namespaced(self.api.client(), "default");
        let mut found = None;
        eventually("an event", async || {
            let list = events.list(&ListParams::default()).await.unwrap();
            let mut events = list.items.into_iter();
            found = events.find(|event| event.reason.as_deref() == Some(reason));
            found.is_some()
        })
        .await;
        found.unwrap()
    }
}

#[tokio::test]
async fn a_pod_is_published_as_kubelet_does_and_leaves_nothing() {
    let fake = Fake::default();
    let world = World::with_driver(&fake).await;
    let pod = world.create_pod(|_| {}).await;
    world.ready().await;

    let uid = pod.uid().unwrap();
    let volume = world
        .root()
        .join(format!("pods/{uid}/volumes/kubernetes.io~csi/secrets"));
    let requests = fake.published.lock().unwrap().clone();
    let [request] = &requests[..] else {
        panic!("{requests:?}")
    };
    assert!(request.volume_id.starts_with("csi-") && request.volume_id.len() == 68);
    assert_eq!(
        request.target_path,
        volume.join("mount").display().to_string()
    );
    assert!(request.readonly);
    let expected: BTreeMap<&str, &str> = BTreeMap::from([
        ("secretProviderClass", "s"),
        ("csi.storage.k8s.io/pod.name", "p"),
        ("csi.storage.k8s.io/pod.namespace", "default"),
        ("csi.storage.k8s.io/pod.uid", &uid),
        ("csi.storage.k8s.io/serviceAccount.name", "default"),
        ("csi.storage.k8s.io/ephemeral", "true"),
    ]);
    let context: BTreeMap<&str, &str> = request
        .volume_context
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    assert_eq!(context, expected);
    let capability = request.volume_capability.clone().unwrap();
    assert_eq!(
        capability.access_mode.unwrap().mode,
        wire::volume_capability::access_mode::Mode::SingleNodeWriter as i32
    );
    let Some(wire::volume_capability::AccessType::Mount(mount)) = capability.access_type else {
        panic!()
    };
    assert_eq!(mount.volume_mount_group, "1004");

    let data: serde_json::Value =
        serde_json::from_slice(&std::fs::read(volume.join("vol_data.json")).unwrap()).unwrap();
    assert_eq!(data["volumeHandle"], request.volume_id);
    assert_eq!(data["specVolID"], "secrets");
    assert_eq!(data["driverName"], DRIVER);
    assert_eq!(data["nodeName"], "n");
    assert_eq!(data["volumeLifecycleMode"], "Ephemeral");
    assert!(data["attachmentID"].as_str().unwrap().starts_with("csi-"));

    world.delete_pod().await;
    world.gone().await;
    assert_eq!(
        *fake.log.lock().unwrap(),
        ["publish", "published", "unpublish"]
    );
}

/// The pod of a Job that runs for too long fails, and its object stays without its volumes.
#[tokio::test]
async fn a_pod_that_has_run_as_long_as_it_may_loses_its_volumes_and_keeps_its_object() {
    let fake = Fake::default();
    let world = World::with_driver(&fake).await;
    world.create_pod(|_| {}).await;
    world.ready().await;
    let deadline = Patch::Merge(json!({"spec": {"activeDeadlineSeconds": 1}}));
    let pods = world.pods();
    let patched = pods.patch("p", &PatchParams::default(), &deadline).await;
    patched.unwrap();
    eventually("the volume is gone", async || {
        pods_on_disk(&world.root()).is_empty()
    })
    .await;
    let status = pods.get("p").await.unwrap().status.unwrap();
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!(status.reason.as_deref(), Some("DeadlineExceeded"));
    assert!(status.start_time.is_some());
    world.delete_pod().await;
    world.gone().await;
    assert_eq!(
        *fake.log.lock().unwrap(),
        ["publish", "published", "unpublish"]
    );
}

#[tokio::test]
async fn a_final_error_cleans_up_and_is_told_in_kubelets_words() {
    let fake = Fake::default();
    let missing = || Status::new(Code::Unknown, "no such class");
    fake.errors.lock().unwrap().extend([missing(), missing()]);
    let world = World::with_driver(&fake).await;
    world.create_pod(|_| {}).await;
    let event = world.event("FailedMount").await;
    assert_eq!(
        event.message.as_deref(),
        Some(
            "MountVolume.SetUp failed for volume \"secrets\" : rpc error: code = Unknown desc = no such class"
        )
    );
    assert_eq!(event.source.unwrap().host.as_deref(), Some("n"));
    let uid = world.pods().get("p").await.unwrap().uid().unwrap();
    let csi = world
        .root()
        .join(format!("pods/{uid}/volumes/kubernetes.io~csi"));
    assert_eq!(std::fs::read_dir(csi).unwrap().count(), 0);
    world.ready().await;
    assert_eq!(world.event("FailedMount").await.count, Some(2));
}

#[tokio::test]
async fn after_an_uncertain_error_the_volume_is_unpublished_all_the_same() {
    let fake = Fake::default();
    let busy = || Status::new(Code::Aborted, "busy");
    fake.errors
        .lock()
        .unwrap()
        .extend([busy(), busy(), busy(), busy()]);
    let world = World::with_driver(&fake).await;
    world.create_pod(|_| {}).await;
    world.event("FailedMount").await;
    let uid = world.pods().get("p").await.unwrap().uid().unwrap();
    let data = world.root().join(format!(
        "pods/{uid}/volumes/kubernetes.io~csi/secrets/vol_data.json"
    ));
    assert!(data.exists());
    world.delete_pod().await;
    world.gone().await;
    assert_eq!(fake.log.lock().unwrap().last(), Some(&"unpublish"));
}

#[tokio::test]
async fn a_pod_deleted_during_its_publish_waits_for_the_answer() {
    let gate = Arc::new(Semaphore::new(0));
    let fake = Fake {
        gate: Some(Arc::clone(&gate)),
        ..Fake::default()
    };
    let world = World::with_driver(&fake).await;
    world.create_pod(|_| {}).await;
    eventually("publish begins", async || {
        !fake.log.lock().unwrap().is_empty()
    })
    .await;
    world.delete_pod().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(*fake.log.lock().unwrap(), ["publish"]);
    gate.add_permits(1);
    world.gone().await;
    assert_eq!(
        *fake.log.lock().unwrap(),
        ["publish", "published", "unpublish"]
    );
}

#[tokio::test]
async fn a_restarted_kubelet_cleans_up_after_a_pod_that_vanished() {
    let mut world = World::new().await;
    let fake = Fake::default();
    let socket = world.serve(fake.clone());
    world.registered().await;
    world.create_pod(|_| {}).await;
    world.ready().await;
    world.tasks.shutdown().await;
    let now = DeleteParams {
        grace_period_seconds: Some(0),
        ..DeleteParams::default()
    };
    world.pods().delete("p", &now).await.unwrap();
    std::fs::remove_file(&socket).unwrap();
    std::fs::remove_file(world.dir.path().join("csi.sock")).unwrap();
    world.start_kubelet();
    // The driver comes back later than kubelet.
    tokio::time::sleep(Duration::from_millis(300)).await;
    world.serve(fake.clone());
    eventually("nothing is left", async || {
        pods_on_disk(&world.root()).is_empty()
    })
    .await;
    assert_eq!(fake.log.lock().unwrap().last(), Some(&"unpublish"));
}

#[tokio::test]
async fn a_driver_is_refused_and_told_why_and_goes_with_its_socket() {
    let mut world = World::new().await;
    let (notified, mut told) = mpsc::unbounded_channel();
    let refused = Fake {
        versions: vec!["2.0.0".into()],
        notified: Some(notified.clone()),
        ..Fake::default()
    };
    let socket = world.serve(refused);
    let status = told.recv().await.unwrap();
    assert!(!status.plugin_registered);
    assert!(status.error.contains("2.0.0"), "{}", status.error);

    std::fs::remove_file(&socket).unwrap();
    std::fs::remove_file(world.dir.path().join("csi.sock")).unwrap();
    let socket = world.serve(Fake {
        notified: Some(notified),
        ..Fake::default()
    });
    while !told.recv().await.unwrap().plugin_registered {}
    world.registered().await;

    std::fs::remove_file(&socket).unwrap();
    eventually("the driver is gone", async || {
        world.drivers().await.is_empty()
    })
    .await;
    world.create_pod(|_| {}).await;
    let message = world.event("FailedMount").await.message.unwrap();
    assert!(
        message.ends_with(
            "driver name secrets-store.csi.k8s.io not found in the list of registered CSI drivers"
        ),
        "{message}"
    );
}

#[tokio::test]
async fn a_container_waits_for_the_secret_in_its_environment() {
    let world = World::with_driver(&Fake::default()).await;
    let reference = json!({"name": "s", "key": "k"});
    world
        .create_pod(|spec| {
            spec["containers"][0]["env"] =
                json!([{"name": "A", "valueFrom": {"secretKeyRef": reference}}])
        })
        .await;
    eventually("the container waits", async || {
        let status = world
            .pods()
            .get("p")
            .await
            .unwrap()
            .status
            .unwrap_or_default();
        let containers = status.container_statuses.unwrap_or_default();
        containers.iter().any(|container| {
            let waiting = container
                .state
                .as_ref()
                .and_then(|state| state.waiting.as_ref());
            waiting.and_then(|waiting| waiting.reason.as_deref())
                == Some("CreateContainerConfigError")
        })
    })
    .await;
    assert_eq!(
        world.event("Failed").await.message.as_deref(),
        Some("Error: secret \"s\" not found")
    );
    world.create_secret("s").await;
    world.ready().await;
}

#[tokio::test]
async fn a_failed_republish_is_told_and_changes_nothing() {
    let period = Some(Duration::from_millis(100));
    let mut world = World::with(json!({"requiresRepublish": true}), period).await;
    let fake = Fake::default();
    world.serve(fake.clone());
    world.registered().await;
    let pod = world.create_pod(|_| {}).await;
    world.ready().await;
    let publishes = || fake.published.lock().unwrap().len();
    eventually("it is republished", async || publishes() > 2).await;
    let failure = Status::new(Code::Internal, "provider away");
    fake.errors.lock().unwrap().push_back(failure);
    let message = world.event("FailedMount").await.message.unwrap();
    assert!(
        message.ends_with("code = Internal desc = provider away"),
        "{message}"
    );
    let volume = Volume::new(&world.root(), &pod.uid().unwrap(), "secrets", DRIVER);
    assert!(volume.target().exists());
    let before = publishes();
    eventually("it is tried again", async || publishes() > before).await;
    world.ready().await;
    world.delete_pod().await;
    world.gone().await;
}

/// A changed annotation makes kubelet republish at once, a status that it writes itself does not, and
/// nothing is republished before the pod runs.
#[tokio::test]
async fn a_changed_annotation_makes_kubelet_republish_at_once() {
    let mut world = World::with(json!({"requiresRepublish": true}), None).await;
    let fake = Fake::default();
    world.serve(fake.clone());
    world.registered().await;
    let lacks_secret = |spec: &mut serde_json::Value| {
        spec["containers"][0]["envFrom"] = json!([{"secretRef": {"name": "late"}}]);
    };
    world.create_pod(lacks_secret).await;
    let publishes = || fake.published.lock().unwrap().len();
    eventually("it is published", async || publishes() == 1).await;
    let annotate = async |value: &str| {
        let patch = Patch::Merge(json!({"metadata": {"annotations": {"look": value}}}));
        let (pods, params) = (world.pods(), PatchParams::default());
        pods.patch("p", &params, &patch).await.unwrap();
    };
    annotate("before it runs").await;
    world.event("Failed").await;
    world.create_secret("late").await;
    world.ready().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(
        publishes(),
        1,
        "the pod did not run, and then nothing changed"
    );
    for number in 2..4 {
        annotate(&number.to_string()).await;
        eventually("it is republished", async || publishes() == number).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(publishes(), 3);
}

#[tokio::test]
async fn tokens_and_the_publish_secret_reach_the_driver() {
    let requests = json!({"tokenRequests": [{"audience": "a"}, {"audience": "b"}]});
    let mut world = World::with(requests, None).await;
    let fake = Fake::default();
    world.serve(fake.clone());
    world.registered().await;
    let with_secret = |spec: &mut serde_json::Value| {
        spec["volumes"][0]["csi"]["nodePublishSecretRef"] = json!({"name": "s"});
    };
    world.create_pod(with_secret).await;
    let message = world.event("FailedMount").await.message.unwrap();
    assert!(
        message.contains("fetching NodePublishSecretRef default/s failed"),
        "{message}"
    );
    world.create_secret("s").await;
    world.ready().await;
    let request = fake.published.lock().unwrap()[0].clone();
    assert_eq!(
        request.secrets.iter().collect::<Vec<_>>(),
        [(&"k".to_owned(), &"v".to_owned())]
    );
    let tokens = &request.volume_context["csi.storage.k8s.io/serviceAccount.tokens"];
    let tokens: serde_json::Value = serde_json::from_str(tokens).unwrap();
    for audience in ["a", "b"] {
        assert!(
            tokens[audience]["token"]
                .as_str()
                .is_some_and(|token| token.len() > 20)
        );
        assert!(
            tokens[audience]["expirationTimestamp"]
                .as_str()
                .unwrap()
                .ends_with('Z')
        );
    }
}
