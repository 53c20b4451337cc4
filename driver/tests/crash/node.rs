//! A node with a driver and a provider as they are, an API server in this process, and kubelet's
//! calls. Nothing here is the driver's code.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Weak},
    time::{Duration, Instant, SystemTime},
};

use embedded::api::{ApiServer, Call, Reaction};
use fake_provider::fake;
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proto::csi::{
    NodePublishVolumeRequest, NodeUnpublishVolumeRequest, ProbeRequest, VolumeCapability,
    identity_client::IdentityClient, node_client::NodeClient,
};
use serde_json::{Value, json};
use tokio::{
    process::{Child, Command},
    time::{sleep, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use crate::{
    history::History,
    reader::{Reader, Tree},
    server,
    steps::Names,
    tracer::{Armed, How, Servers, Traced},
};

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// More mounts than the driver takes down in one call.
const BURIED: usize = 34;

const UID: &str = "7a6ab1a5-0d1d-4a5a-9a7c-3d6c1f3e0a11";
/// The earlier pod of the same name.
const NAMESAKE: &str = "another-pod";
/// Another pod that mounts the same class for a while: its name and its UID.
const VISITOR: &str = "visitor";
const NAMESPACE: &str = "/api/v1/namespaces/shop";
const CUSTOM: &str = "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop";

/// The annotation of a class that says how keys are written (docs/tls.md).
pub(crate) const KEY_FORMAT: &str = "secrets-store.csi.k8s.io/tls-key-format";
/// The annotation of a class by whose value its volumes become due (docs/rotation.md).
pub(crate) const REFRESH: &str = "secrets-store.csi.k8s.io/refresh";
/// What somebody else has put on the Secret: a label, and an owner besides that of the driver.
pub(crate) const SOMEBODY: &str = "somebody-else";

/// The kind of pod statuses.
pub(crate) const STATUSES: &str = "secretproviderclasspodstatuses.secrets-store.csi.x-k8s.io";

/// A file of somebody else among the records.
pub(crate) const NOTES: &str = "notes.json";

/// The kind of classes.
const CLASSES: &str = "secretproviderclasses.secrets-store.csi.x-k8s.io";

/// The data of a Secret, or `None` while it is not there.
pub(crate) type Data = Option<BTreeMap<String, String>>;

/// The parts of a class that tests change.
#[derive(Debug, Clone)]
pub(crate) struct Class {
    /// How often it was deleted and made anew.
    pub(crate) incarnation: u64,
    pub(crate) generation: u64,
    /// An annotation, if it has one, and its value. It does not count as another generation.
    pub(crate) annotation: Option<(&'static str, &'static str)>,
    /// The objects that pods get, or all.
    pub(crate) objects: Option<Vec<&'static str>>,
    pub(crate) secret_objects: Value,
    /// The faults of the provider, as the fake provider has them.
    pub(crate) faults: Option<&'static str>,
}

/// What an API server does besides serving.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Odd {
    #[default]
    Nothing,
    /// Its cache has the objects of before the operation.
    Past,
    /// It fails to read classes.
    NoClass,
}

/// The answers of the API server.
#[derive(Default)]
struct Answers {
    odd: Odd,
    /// Objects as they were, by their paths.
    past: BTreeMap<String, Value>,
}

impl Answers {
    fn to(&self, call: &Call<'_>) -> Reaction {
        let (path, query) = call.uri.split_once('?').unwrap_or((call.uri, ""));
        let fails = |code: u16, reason| server::refuse(code, reason, "not now", None);
        let of_class = path.contains("/secretproviderclasses/");
        let kinds = ["/secrets/", "/secretproviderclasspodstatuses/"];
        let is_read = call.method == "GET";
        match self.odd {
            Odd::NoClass if is_read && of_class => fails(500, "InternalError"),
            Odd::Past if is_read && query.contains("resourceVersion=0") => {
                match self.past.get(path) {
                    Some(object) => Reaction::Answer(200, object.to_string()),
                    None if of_class || kinds.iter().any(|kind| path.contains(kind)) => {
                        let name = path.rsplit('/').next();
                        server::refuse(404, "NotFound", "not found", name)
                    }
                    None => Reaction::Serve,
                }
            }
            _ => Reaction::Serve,
        }
    }
}

/// A process of the driver.
enum Driver {
    Traced(Arc<Traced>),
    Plain(Child),
}

pub(crate) struct Node {
    dir: tempfile::TempDir,
    api: Arc<ApiServer>,
    servers: Servers,
    _provider: DropGuard,
    driver: Option<Driver>,
    client: Option<NodeClient<Channel>>,
    reader: Option<Reader>,
    /// The first wait after a refresh that failed.
    pub(crate) backoff: &'static str,
    /// What the API server does besides serving.
    answers: Arc<Mutex<Answers>>,
    pub(crate) files: Arc<Mutex<History<Tree>>>,
    /// The data of the Secret `creds`.
    pub(crate) secret: Arc<Mutex<History<Data>>>,
}

impl Node {
    /// Starts an API server and a provider. The pod has a controller, or it has none.
    pub(crate) async fn start(has_controller: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["kubelet", "state", "registration"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let (api, kubeconfig) = server::serve(dir.path()).await;
        let url: Value = serde_json::from_str(&kubeconfig).unwrap();
        let url = url["clusters"][0]["cluster"]["server"].as_str().unwrap();
        let port = url.rsplit(':').next().unwrap().to_owned();
        fs::write(dir.path().join("kubeconfig"), kubeconfig).unwrap();
        let socket = dir.path().join("test.sock");
        let provider = fake::Options {
            objects: Some(dir.path().join("store.yaml")),
            ..fake::Options::new(&socket)
        };
        fs::write(dir.path().join("store.yaml"), "[]").unwrap();
        let provider = fake::bind(provider).await.unwrap();
        let stop = CancellationToken::new();
        tokio::spawn(provider.run(stop.clone()));
        let api = Arc::new(api);
        let node = Self {
            servers: Servers {
                api: format!("port {port}"),
                provider: socket.display().to_string(),
            },
            _provider: stop.drop_guard(),
            driver: None,
            client: None,
            reader: None,
            backoff: "1ns",
            answers: Arc::default(),
            files: Arc::new(Mutex::new(History::new())),
            secret: Arc::new(Mutex::new(History::new())),
            api,
            dir,
        };
        node.watch();
        node.put_pod(has_controller, "Pending");
        node
    }

    /// Looks at the Secret before each request: that is how the requests before have left it.
    fn watch(&self) {
        let (api, secret) = (Arc::downgrade(&self.api), Arc::downgrade(&self.secret));
        let answers = Arc::clone(&self.answers);
        self.api.intercept(move |call| {
            look_at_secret(&api, &secret);
            answers.lock().unwrap().to(call)
        });
    }

    /// Has the API server remember the objects of now, of which its cache may tell later.
    pub(crate) fn remember_past(&self) {
        let mut past = BTreeMap::new();
        for (kind, path) in [
            ("secrets", format!("{NAMESPACE}/secrets")),
            (CLASSES, format!("{CUSTOM}/secretproviderclasses")),
            (STATUSES, format!("{CUSTOM}/secretproviderclasspodstatuses")),
        ] {
            for object in self.api.all(kind) {
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                past.insert(format!("{path}/{name}"), object);
            }
        }
        self.answers.lock().unwrap().past = past;
    }

    /// Sets what the API server does besides serving.
    pub(crate) fn set_answers(&self, odd: Odd) {
        self.answers.lock().unwrap().odd = odd;
    }

    pub(crate) fn put_pod(&self, has_controller: bool, phase: &str) {
        let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs", "controller": true});
        let owners = if has_controller {
            json!([owner])
        } else {
            json!([])
        };
        let pod = json!({
            "metadata": {"name": "web", "uid": UID, "ownerReferences": owners},
            "status": {"phase": phase},
        });
        self.api.put(&format!("{NAMESPACE}/pods/web"), pod).unwrap();
        fs::create_dir_all(self.target().parent().unwrap()).unwrap();
    }

    /// Puts the pod status of another pod of the same name.
    pub(crate) fn put_status_of_namesake(&self) {
        let owner = json!({"apiVersion": "v1", "kind": "Pod", "name": "web", "uid": NAMESAKE});
        let status = json!({
            "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClassPodStatus",
            "metadata": {
                "name": "web-shop-db", "namespace": "shop", "uid": "status-of-another-pod",
                "resourceVersion": "3",
                "ownerReferences": [owner],
                "labels": {"internal.secrets-store.csi.k8s.io/node-name": "node-1"},
            },
            "status": {
                "podName": "web", "secretProviderClassName": "db", "mounted": true,
                "targetPath": "/somewhere/else", "objects": [{"id": "pw", "version": "0"}],
            },
        });
        let path = format!("{CUSTOM}/secretproviderclasspodstatuses/web-shop-db");
        self.api.put(&path, status).unwrap();
    }

    /// Replaces the pod, as somebody does who deletes it by force and makes it again: the pod of that name
    /// runs on another node now, whose driver has written the pod status.
    pub(crate) fn replace_pod(&self) {
        let pod = json!({
            "metadata": {"name": "web", "uid": NAMESAKE},
            "status": {"phase": "Running"},
        });
        self.api.put(&format!("{NAMESPACE}/pods/web"), pod).unwrap();
        self.put_status_of_namesake();
    }

    /// Returns what the status of the pod in place of this one says.
    pub(crate) fn successor(&self) -> Option<Value> {
        let status = self.status_of_namesake()?;
        Some(json!([status["metadata"]["labels"], status["status"]]))
    }

    /// Returns the pod status that belongs to another pod of the same name, if one does.
    pub(crate) fn status_of_namesake(&self) -> Option<Value> {
        let mut statuses = self.api.all(STATUSES).into_iter();
        statuses.find(|status| status["metadata"]["ownerReferences"][0]["uid"] == NAMESAKE)
    }

    pub(crate) fn put_class(&self, class: &Class) {
        let mut parameters = json!({"for": "the pod"});
        if let Some(objects) = &class.objects {
            let array: Vec<Value> = objects.iter().map(|o| json!({"objectName": o})).collect();
            parameters["objects"] = json!(json!({"array": array}).to_string());
        }
        if let Some(faults) = class.faults {
            parameters["faults"] = json!(faults);
        }
        let annotations = class.annotation.map(|(name, value)| json!({name: value}));
        let version =
            class.incarnation * 1000 + class.generation * 10 + u64::from(annotations.is_some());
        let object = json!({
            "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
            "metadata": {
                "name": "db", "namespace": "shop", "uid": format!("uid-db-{}", class.incarnation),
                "annotations": annotations,
                "generation": class.generation, "resourceVersion": version.to_string(),
            },
            "spec": {
                "provider": "test", "parameters": parameters, "secretObjects": class.secret_objects,
            },
        });
        let path = format!("{CUSTOM}/secretproviderclasses/db");
        self.api.put(&path, object).unwrap();
    }

    /// Changes what the provider serves, in one step.
    pub(crate) fn put_store(&self, objects: &Value) {
        let path = self.dir.path().join("store.yaml");
        let next = self.dir.path().join("store.next");
        fs::write(&next, objects.to_string()).unwrap();
        fs::rename(next, path).unwrap();
    }

    /// Returns a Secret of the pod's namespace.
    pub(crate) fn secret(&self, name: &str) -> Option<Value> {
        self.api.get(&format!("{NAMESPACE}/secrets/{name}"))
    }

    pub(crate) fn put_secret(&self, name: &str, secret: Value) {
        let path = format!("{NAMESPACE}/secrets/{name}");
        self.api.put(&path, secret).unwrap();
    }

    /// Returns a resource version that is later than those of all objects so far.
    pub(crate) async fn later_version(&self) -> String {
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "elsewhere"},
        });
        let client = self.api.client();
        let applied = embedded::apply(&client, "default", &secret.to_string()).await;
        applied.unwrap();
        let written = self.api.get("/api/v1/namespaces/default/secrets/elsewhere");
        let written = written.unwrap();
        self.api
            .remove("/api/v1/namespaces/default/secrets/elsewhere");
        let version = written["metadata"]["resourceVersion"].as_str();
        version.unwrap().to_owned()
    }

    /// Changes a Secret of the pod's namespace as any client does.
    pub(crate) async fn patch_secret(&self, name: &str, change: &Value) {
        let secrets: Api<Secret> = Api::namespaced(self.api.client(), "shop");
        let (how, change) = (PatchParams::default(), Patch::Merge(change));
        secrets.patch(name, &how, &change).await.unwrap();
    }

    /// Replaces a Secret, as any client does, by one that was made of it. Returns whether it was still the same.
    pub(crate) async fn replace_secret(&self, name: &str, secret: &Value) -> bool {
        let secrets: Api<Secret> = Api::namespaced(self.api.client(), "shop");
        let secret: Secret = serde_json::from_value(secret.clone()).unwrap();
        match secrets.replace(name, &PostParams::default(), &secret).await {
            Ok(_) => true,
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// Has somebody else apply a label to the Secret and another owner, as server-side apply does, and if it is the
    /// `whole` of them, the owners that it has.
    pub(crate) fn adorn_secret(&self, whole: bool) {
        let Some(mut secret) = self.secret("creds") else {
            return;
        };
        let metadata = &mut secret["metadata"];
        metadata["labels"][SOMEBODY] = json!("yes");
        let other =
            json!({"apiVersion": "v1", "kind": "ConfigMap", "name": SOMEBODY, "uid": SOMEBODY});
        if let Some(owners) = metadata["ownerReferences"].as_array_mut() {
            owners.push(other);
        }
        let applied = |owner: &String| whole || owner == SOMEBODY;
        let keys = owners_of(metadata).into_iter().filter(applied);
        let keys = keys.map(|uid| (format!("k:{}", json!({"uid": uid})), json!({})));
        let owners: serde_json::Map<String, Value> = keys.collect();
        let label = format!("f:{SOMEBODY}");
        let fields = json!({"f:metadata": {"f:labels": {label: {}}, "f:ownerReferences": owners}});
        let entry = json!({
            "manager": SOMEBODY, "operation": "Apply", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z",
            "fieldsType": "FieldsV1", "fieldsV1": fields,
        });
        if let Some(managers) = metadata["managedFields"].as_array_mut() {
            managers.push(entry);
        }
        self.put_secret("creds", secret);
    }

    /// Returns what the Secret lacks of that which somebody else has applied, `owners` among it.
    pub(crate) fn lacks_adornment(&self, owners: &[String]) -> Option<String> {
        let secret = self.secret("creds")?;
        let metadata = &secret["metadata"];
        let there = owners_of(metadata);
        let is_there = metadata["labels"][SOMEBODY] == "yes"
            && owners.iter().all(|owner| there.contains(owner));
        (!is_there).then(|| {
            format!("somebody else has applied a label and the owners {owners:?}, and the Secret has {metadata}")
        })
    }

    /// Returns the UIDs of the owners of the Secret.
    pub(crate) fn owners_of_secret(&self) -> Vec<String> {
        let secret = self.secret("creds").unwrap_or_default();
        owners_of(&secret["metadata"])
    }

    pub(crate) fn remove_secret(&self, name: &str) {
        self.api.remove(&format!("{NAMESPACE}/secrets/{name}"));
    }

    /// Removes a pod that has no controller, and what lives with it, as the garbage collector does. Returns
    /// what does not live with it and should.
    pub(crate) fn remove_pod(&self) -> Option<String> {
        self.api.remove(&format!("{NAMESPACE}/pods/web"));
        let owned_by = |object: &Value, uid: &Value| {
            let owners = owners_of(&object["metadata"]);
            let mut owners = owners.iter().filter(|owner| *owner != SOMEBODY);
            matches!((owners.next(), owners.next()), (Some(owner), None) if uid == owner)
        };
        let mut statuses = Vec::new();
        for status in self.api.all(STATUSES) {
            // The garbage collector also takes what an earlier pod has left.
            if !owned_by(&status, &json!(UID)) && !owned_by(&status, &json!(NAMESAKE)) {
                return Some(format!("a pod status stays: {status}"));
            }
            statuses.push(status["metadata"]["uid"].clone());
        }
        self.remove_pod_statuses();
        for secret in self.api.all("secrets") {
            if !statuses.iter().any(|status| owned_by(&secret, status)) {
                return Some(format!("the Secret stays: {}", secret["metadata"]));
            }
            let name = secret["metadata"]["name"].as_str().unwrap_or_default();
            self.remove_secret(name);
        }
        None
    }

    pub(crate) fn remove_pod_statuses(&self) {
        for status in self.api.all(STATUSES) {
            let name = status["metadata"]["name"].as_str().unwrap_or_default();
            self.api
                .remove(&format!("{CUSTOM}/secretproviderclasspodstatuses/{name}"));
        }
    }

    /// Takes the owners off the Secret that are gone, as the garbage collector does while there is another one.
    pub(crate) fn remove_absent_owners(&self) {
        let statuses = self.api.all(STATUSES);
        let is_there = |owner: &Value| {
            let mut uids = statuses.iter().map(|status| &status["metadata"]["uid"]);
            owner["uid"] == SOMEBODY || uids.any(|uid| *uid == owner["uid"])
        };
        if let Some(mut secret) = self.secret("creds")
            && let Some(owners) = secret["metadata"]["ownerReferences"].as_array_mut()
        {
            owners.retain(is_there);
            self.put_secret("creds", secret);
        }
    }

    /// Returns whether the Secret lives with the pod status that is there.
    pub(crate) fn secret_lives_with_status(&self) -> bool {
        let owners = self
            .secret("creds")
            .map(|secret| secret["metadata"]["ownerReferences"].clone());
        let owners = owners.as_ref().and_then(Value::as_array);
        let statuses = self.api.all(STATUSES);
        let mut statuses = statuses.iter().map(|status| &status["metadata"]["uid"]);
        statuses.any(|uid| owners.is_some_and(|all| all.iter().any(|owner| owner["uid"] == *uid)))
    }

    /// Returns the annotations of pod statuses by which they tell since when something is wrong.
    pub(crate) fn trouble(&self) -> Vec<String> {
        let statuses = self.api.all(STATUSES);
        let annotations = statuses
            .iter()
            .filter_map(|status| status["metadata"]["annotations"].as_object());
        let names = annotations.flat_map(|annotations| annotations.keys());
        names
            .filter(|name| name.ends_with("-since"))
            .cloned()
            .collect()
    }

    pub(crate) fn look_at_secret(&self) {
        look_at_secret(&Arc::downgrade(&self.api), &Arc::downgrade(&self.secret));
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn target(&self) -> PathBuf {
        target_of(self.dir.path(), UID)
    }

    pub(crate) fn api(&self) -> &ApiServer {
        &self.api
    }

    /// Returns the last lines of the driver's log.
    pub(crate) fn log(&self) -> String {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

/// The interval after which each publish refreshes, and one after which none does.
const AT_ONCE: &str = "1ns";
const NEVER: &str = "24h";

/// The driver's process.
impl Node {
    /// Returns the command of a driver that checks Secrets in this interval, refreshes volumes in that
    /// one, and may register itself.
    fn command(&self, sync_interval: &str, rotation: &str, registers: bool) -> Vec<String> {
        let dir = self.dir.path().display();
        let registration = format!("--registration-dir={dir}/registration");
        let mut command: Vec<String> = [
            env!("CARGO_BIN_EXE_secrets-store-csi").to_owned(),
            format!("--endpoint=unix://{dir}/csi.sock"),
            format!("--state-dir={dir}/state"),
            format!("--kubelet-root-dir={dir}/kubelet"),
            format!("--kubeconfig={dir}/kubeconfig"),
            format!("--provider-volume={dir}"),
            format!("--sync-interval={sync_interval}"),
            "--additional-provider-volume-paths=".to_owned(),
            "--metrics-addr=0".to_owned(),
            "--nodeid=node-1".to_owned(),
            "--enable-secret-rotation".to_owned(),
            format!("--rotation-poll-interval={rotation}"),
            format!("--rotation-backoff={}", self.backoff),
            format!("--rotation-backoff-max={}", self.backoff),
            // So that a call has to wait for that of another volume.
            "--provider-max-calls=1".to_owned(),
            "--republish-errors=surface".to_owned(),
            "-v=5".to_owned(),
        ]
        .into();
        command.extend(registers.then_some(registration));
        command.extend(registers.then(|| format!("--kubelet-registration-path={dir}/csi.sock")));
        command
    }

    /// Starts a driver under a tracer, which checks Secrets in this interval. Each further publish refreshes a volume,
    /// or one does for which it `is_due` for another reason. Fails if it cannot be traced.
    pub(crate) fn start_traced(&mut self, sync_interval: &str, is_due: bool) -> io::Result<()> {
        let rotation = if is_due { AT_ONCE } else { NEVER };
        let command = self.command(sync_interval, rotation, false);
        let traced = Traced::start(&command, self.dir.path(), &self.servers, None)?;
        self.driver = Some(Driver::Traced(Arc::new(traced)));
        self.client = None;
        Ok(())
    }

    /// Starts a driver whose start is traced, and something happens at a step, if one is given.
    pub(crate) fn start_traced_from_the_start(
        &mut self,
        at: Option<(&str, How)>,
    ) -> io::Result<()> {
        let (command, armed) = (self.command("10m", AT_ONCE, true), self.armed(at));
        let traced = Traced::start(&command, self.dir.path(), &self.servers, Some(armed))?;
        self.driver = Some(Driver::Traced(Arc::new(traced)));
        self.client = None;
        Ok(())
    }

    /// Returns how the steps of a driver on this node are named, and at which one what happens.
    pub(crate) fn armed<'a>(&self, at: Option<(&'a str, How)>) -> Armed<'a> {
        let [root, volume] =
            [self.dir.path(), &self.target()].map(|path| path.display().to_string());
        Armed {
            names: Names::new(root, volume),
            at,
        }
    }

    /// Starts a driver as a node does. Each further publish of a volume refreshes it.
    pub(crate) fn start_driver(&mut self, registers: bool) {
        self.spawn(&self.command("1s", AT_ONCE, registers));
    }

    /// The same, and no publish of a volume that is published refreshes it.
    pub(crate) fn start_driver_without_refreshes(&mut self, registers: bool) {
        self.spawn(&self.command("1s", NEVER, registers));
    }

    fn spawn(&mut self, command: &[String]) {
        let log = fs::File::options()
            .append(true)
            .create(true)
            .open(self.dir.path().join("log"));
        let child = Command::new(&command[0])
            .args(&command[1..])
            .stdout(std::process::Stdio::null())
            .stderr(log.unwrap())
            .kill_on_drop(true)
            .spawn();
        self.driver = Some(Driver::Plain(child.unwrap()));
        self.client = None;
    }

    pub(crate) fn traced(&self) -> Option<Arc<Traced>> {
        match &self.driver {
            Some(Driver::Traced(traced)) => Some(Arc::clone(traced)),
            _ => None,
        }
    }

    /// Ends the driver without warning, if it runs.
    pub(crate) async fn kill_driver(&mut self) {
        match self.driver.take() {
            Some(Driver::Traced(traced)) => traced.kill().await,
            Some(Driver::Plain(mut child)) => {
                let _ = child.kill().await;
            }
            None => {}
        }
        self.client = None;
    }

    /// Returns the files and directories of volumes and records that the driver has open. What is in a mount that is
    /// gone has a path from its root on.
    pub(crate) fn open_files(&self) -> Vec<String> {
        let id = match &self.driver {
            Some(Driver::Traced(traced)) => Some(traced.id()),
            Some(Driver::Plain(child)) => child.id(),
            None => None,
        };
        let Some(id) = id else {
            return Vec::new();
        };
        let files = fs::read_dir(format!("/proc/{id}/fd")).unwrap();
        let links = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
        let [pods, records] = ["kubelet/pods", "state/"].map(|path| self.dir.path().join(path));
        let is_of_volume = |path: &PathBuf| {
            let text = path.to_string_lossy();
            path.starts_with(&pods)
                || path.starts_with(&records) && *path != records
                || text == "/"
                || text.starts_with("/..")
        };
        let open = links.filter(is_of_volume);
        open.map(|path| path.display().to_string()).collect()
    }

    /// Waits until the driver says that it is ready, as kubelet's registration does.
    pub(crate) async fn is_ready(&mut self) -> Result<(), String> {
        let uri = format!("unix://{}/csi.sock", self.dir.path().display());
        let endpoint = Endpoint::from_shared(uri).unwrap();
        let ready = async {
            loop {
                if let Ok(channel) = endpoint.connect().await {
                    let mut identity = IdentityClient::new(channel.clone());
                    if let Ok(answer) = identity.probe(ProbeRequest {}).await
                        && answer.into_inner().ready != Some(false)
                    {
                        return NodeClient::new(channel);
                    }
                }
                sleep(Duration::from_millis(2)).await;
            }
        };
        let client = timeout(PATIENCE, ready).await;
        self.client = Some(client.map_err(|_| "the driver never said that it is ready")?);
        Ok(())
    }
}

/// kubelet.
impl Node {
    fn client(&self) -> NodeClient<Channel> {
        self.client.clone().unwrap()
    }

    pub(crate) async fn publish(&self) -> Result<(), Status> {
        self.publish_of("csi-1", "web", UID, &self.target()).await
    }

    /// Makes the call of a kubelet that says nothing of the pod, as with a CSIDriver without `podInfoOnMount`.
    pub(crate) async fn publish_without_pod(&self) -> Result<(), Status> {
        let request = NodePublishVolumeRequest {
            volume_id: "csi-1".to_owned(),
            target_path: self.target().display().to_string(),
            readonly: true,
            volume_capability: Some(VolumeCapability::default()),
            volume_context: [("secretProviderClass".to_owned(), "db".to_owned())].into(),
            ..Default::default()
        };
        let mut client = self.client();
        let call = timeout(PATIENCE, client.node_publish_volume(request)).await;
        call.map_err(|_| Status::new(Code::DeadlineExceeded, "no answer"))??;
        Ok(())
    }

    async fn publish_of(
        &self,
        volume: &str,
        pod: &str,
        uid: &str,
        target: &Path,
    ) -> Result<(), Status> {
        let request = NodePublishVolumeRequest {
            volume_id: volume.to_owned(),
            target_path: target.display().to_string(),
            readonly: true,
            volume_capability: Some(VolumeCapability::default()),
            volume_context: [
                ("csi.storage.k8s.io/pod.name", pod),
                ("csi.storage.k8s.io/pod.namespace", "shop"),
                ("csi.storage.k8s.io/pod.uid", uid),
                ("secretProviderClass", "db"),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
            ..Default::default()
        };
        let mut client = self.client();
        let call = timeout(PATIENCE, client.node_publish_volume(request)).await;
        call.map_err(|_| Status::new(Code::DeadlineExceeded, "no answer"))??;
        Ok(())
    }

    pub(crate) async fn unpublish(&self) -> Result<(), Status> {
        self.unpublish_of("csi-1", &self.target()).await
    }

    async fn unpublish_of(&self, volume: &str, target: &Path) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: volume.to_owned(),
            target_path: target.display().to_string(),
        };
        let mut client = self.client();
        let call = timeout(PATIENCE, client.node_unpublish_volume(request)).await;
        call.map_err(|_| Status::new(Code::DeadlineExceeded, "no answer"))??;
        Ok(())
    }

    /// Publishes the volume of another pod, and unpublishes it. The pod is gone then.
    pub(crate) async fn visit(&self) -> Result<(), Status> {
        let target = target_of(self.dir.path(), VISITOR);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs", "controller": true});
        let pod = json!({
            "metadata": {"name": VISITOR, "uid": VISITOR, "ownerReferences": [owner]},
            "status": {"phase": "Pending"},
        });
        let path = format!("{NAMESPACE}/pods/{VISITOR}");
        self.api.put(&path, pod).unwrap();
        self.publish_of("csi-2", VISITOR, VISITOR, &target).await?;
        self.unpublish_of("csi-2", &target).await?;
        self.api.remove(&path);
        self.api.remove(&format!(
            "{CUSTOM}/secretproviderclasspodstatuses/{VISITOR}-shop-db"
        ));
        Ok(())
    }

    /// Starts the pod's container.
    pub(crate) fn start_pod(&mut self) -> Result<(), String> {
        let reader = Reader::start(&self.target(), Arc::clone(&self.files));
        self.reader = Some(reader.map_err(|error| format!("the pod cannot start: {error}"))?);
        Ok(())
    }

    pub(crate) fn has_pod(&self) -> bool {
        self.reader.is_some()
    }

    /// Ends the pod's container, if it runs.
    pub(crate) async fn end_pod(&mut self) {
        if let Some(reader) = self.reader.take() {
            let _ = tokio::task::spawn_blocking(move || reader.end()).await;
        }
    }

    /// Does what a loss of power does to a node whose file system keeps names better than bytes.
    pub(crate) async fn reboot(&mut self) {
        self.lose_mounts().await;
        self.tear_records();
    }

    /// Does what a loss of power does to processes and mounts.
    pub(crate) async fn lose_mounts(&mut self) {
        self.kill_driver().await;
        self.end_pod().await;
        self.unmount();
    }

    /// Unmounts the volume, and what lies on it.
    pub(crate) fn unmount(&self) {
        while umount2(&self.target(), MntFlags::MNT_DETACH).is_ok() {}
    }

    /// Mounts on the volume, as somebody has done who mounted a volume anew with each of their starts.
    pub(crate) fn bury(&self) -> io::Result<()> {
        for _ in 0..BURIED {
            let none = None::<&str>;
            mount(none, &self.target(), Some("tmpfs"), MsFlags::empty(), none)?;
        }
        Ok(())
    }

    /// Leaves what a crash leaves among the records.
    pub(crate) fn leave_records(&self) {
        let state = self.dir.path().join("state");
        fs::write(state.join("csi-7.7.tmp"), "half").unwrap();
        fs::write(state.join("csi-8.json"), "{\"format\": 1").unwrap();
        // This is nobody's record, and stays.
        fs::write(state.join(NOTES), "{}").unwrap();
    }

    /// Cuts all records in half.
    pub(crate) fn tear_records(&self) {
        for entry in fs::read_dir(self.dir.path().join("state")).unwrap() {
            let path = entry.unwrap().path();
            let length = fs::metadata(&path).unwrap().len();
            let file = fs::File::options().write(true).open(path).unwrap();
            file.set_len(length / 2).unwrap();
        }
    }

    /// Returns whether a record says that refreshes fail.
    pub(crate) fn has_failing_record(&self) -> bool {
        let entries = fs::read_dir(self.dir.path().join("state")).unwrap();
        let texts = entries.filter_map(|entry| fs::read(entry.unwrap().path()).ok());
        let records = texts.filter_map(|text| serde_json::from_slice::<Value>(&text).ok());
        let mut records = records.map(|record| record["failingSince"].clone());
        records.any(|since| !since.is_null())
    }

    /// Returns the UID and the generation of the class in each record.
    pub(crate) fn recorded_classes(&self) -> Vec<Value> {
        let entries = fs::read_dir(self.dir.path().join("state")).unwrap();
        let texts = entries.filter_map(|entry| fs::read(entry.unwrap().path()).ok());
        let records = texts.filter_map(|text| serde_json::from_slice::<Value>(&text).ok());
        let records = records.filter(|record| record["class"].is_object());
        let classes =
            records.map(|record| json!([record["class"]["uid"], record["class"]["generation"]]));
        classes.collect()
    }

    /// Returns the names of the records that nobody can read.
    pub(crate) fn unreadable_records(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("state")).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        let is_unreadable = |path: &PathBuf| {
            let text = fs::read(path).unwrap_or_default();
            path.extension().is_some_and(|end| end == "json")
                && serde_json::from_slice::<Value>(&text).is_err()
        };
        let unreadable = paths.filter(is_unreadable);
        unreadable.map(|path| path.display().to_string()).collect()
    }

    /// Has a minute pass for content that was replaced.
    pub(crate) fn age_content(&self) {
        let past = SystemTime::now() - Duration::from_secs(60);
        for path in self.generations() {
            // The driver may remove it at this moment.
            if let Ok(directory) = fs::File::open(path) {
                let _ = directory.set_modified(past);
            }
        }
    }

    /// Returns the directories of contents in the volume, the present one and those before.
    pub(crate) fn generations(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.target()) else {
            return Vec::new();
        };
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let is_generation = |path: &PathBuf| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with("..2")
        };
        paths.filter(is_generation).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.end();
        }
        // The driver may be in the middle of something. What it mounts later goes with the mount
        // namespace of the test.
        self.driver = None;
        while umount2(&self.target(), MntFlags::MNT_DETACH).is_ok() {}
    }
}

fn look_at_secret(api: &Weak<ApiServer>, history: &Weak<Mutex<History<Data>>>) {
    if let (Some(api), Some(history)) = (api.upgrade(), history.upgrade()) {
        let secret = api.get(&format!("{NAMESPACE}/secrets/creds"));
        let data = secret.map(|secret| data(&secret));
        let mut history = history.lock().unwrap();
        history.see("the Secret creds", &data, |state| *state == data);
    }
}

/// Returns the target path of the volume of a pod.
fn target_of(node: &Path, uid: &str) -> PathBuf {
    let pod = node.join("kubelet/pods").join(uid);
    pod.join("volumes/kubernetes.io~csi/secrets/mount")
}

/// Returns the UIDs of the owners of an object.
fn owners_of(metadata: &Value) -> Vec<String> {
    let owners = metadata["ownerReferences"].as_array().into_iter().flatten();
    let uids = owners.filter_map(|owner| owner["uid"].as_str());
    uids.map(str::to_owned).collect()
}

/// Returns the data of a Secret, as it is in the API.
pub(crate) fn data(secret: &Value) -> BTreeMap<String, String> {
    let data = secret["data"].as_object().into_iter().flatten();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    data.map(|(key, value)| (key.clone(), text(value)))
        .collect()
}

/// Waits until something holds.
pub(crate) async fn until(what: &str, holds: impl Fn() -> bool) -> Result<(), String> {
    let started = Instant::now();
    while !holds() {
        if started.elapsed() > PATIENCE {
            return Err(format!("waited in vain until {what}"));
        }
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}
