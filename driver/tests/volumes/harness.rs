//! A driver in this process, with an API server and a provider that do as a test says, in a
//! mount namespace of its own. The driver is reached through its socket, as kubelet does it.

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Arc, Mutex, Weak},
    time::{Duration, Instant},
};

use driver::{
    config::Config,
    mount,
    record::{Record, Records},
};
use embedded::api::{ApiServer, Call, Reaction};
use fake_provider::server::{
    Failure, Identity, MountResponse, ObjectVersion, Provider, Request, Server, Socket,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proto::{
    csi::{
        NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability,
        node_client::NodeClient,
    },
    provider::File,
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use crate::{acts::Act, server};

/// Says to a process that it is the one that a test has started for itself.
const ALONE: &str = "ALONE_WITH_ITS_MOUNTS";

/// Runs a test in a process that has its own mounts, which this starts unless it is that process.
/// The test's name is that of the function that contains `test`. An ordinary user needs user
/// namespaces for it.
pub(crate) fn alone<T: Future<Output = ()>>(test: T) {
    if std::env::var_os(ALONE).is_some() {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        return runtime.enable_all().build().unwrap().block_on(test);
    }
    let name = std::any::type_name::<T>().trim_end_matches("::{{closure}}");
    let (_crate, name) = name.split_once("::").unwrap();
    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let run = command
        .arg("--mount")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&run.stdout),
        String::from_utf8_lossy(&run.stderr),
    );
    assert!(run.status.success(), "{out}\n{err}");
    assert!(out.contains("1 passed"), "no test is called {name}: {out}");
}

/// The answer of an API server when a class is read.
#[derive(Clone, Debug)]
pub(crate) enum Class {
    /// This object.
    Is(Value),
    /// An error with this status.
    Refused(u16),
    /// A refusal with this status, reason and message of the API server.
    RefusedSo(u16, &'static str, &'static str),
    /// An answer that is not JSON, with this status.
    Text(u16, &'static str),
    /// Something that is no class.
    Garbled,
    /// No answer at all.
    Held,
    /// This object, that much later.
    Late(Duration, Value),
}

/// A class in the state that it has at a generation.
pub(crate) fn class(name: &str, generation: i64) -> Value {
    json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
        "metadata": {
            "name": name, "namespace": "shop", "uid": format!("uid-{name}"),
            "generation": generation, "resourceVersion": (generation * 10).to_string(),
        },
        "spec": {"provider": "test", "parameters": {
            "case": name, "generation": generation.to_string(),
        }},
    })
}

#[derive(Default)]
pub(crate) struct ApiState {
    /// The answers for each class, one after the other; the last one stays.
    pub(crate) classes: BTreeMap<String, VecDeque<Class>>,
    /// The number of reads of each class.
    class_reads: BTreeMap<String, usize>,
    /// Whether pod statuses of a class are refused, and how.
    pub(crate) statuses: BTreeMap<String, u16>,
    /// The code with which events are refused, if they are, and their number.
    pub(crate) events_refused: (Option<u16>, usize),
    /// The classes of which the next update of a pod status is served at once and answered that much later.
    late_answers: BTreeMap<String, Duration>,
    /// The status, reason and message with which Secrets of a name are refused.
    pub(crate) secrets: BTreeMap<String, (u16, &'static str, &'static str)>,
    /// The act of another program at a target when this is written next: the pod status of a class,
    /// or a Secret of this name.
    pub(crate) acts: BTreeMap<String, (Act, PathBuf)>,
}

pub(crate) struct Running {
    server: ApiServer,
    kubeconfig: String,
    state: Mutex<ApiState>,
    _dir: tempfile::TempDir,
}

impl Running {
    /// Serves an update of a pod status at once, if its answer is to come late.
    fn late_answer(&self, call: &Call<'_>) -> Option<Reaction> {
        let is_update =
            call.method == "PUT" && call.uri.contains("/secretproviderclasspodstatuses/");
        let mut object: Value = serde_json::from_slice(call.body)
            .ok()
            .filter(|_| is_update)?;
        let class = object["status"]["secretProviderClassName"].as_str()?;
        let time = self.state.lock().unwrap().late_answers.remove(class)?;
        // A later state than any that the server has given.
        object["metadata"]["resourceVersion"] = json!("1000000");
        let path = call.uri.split('?').next()?;
        self.server.put(path, object.clone()).unwrap();
        let answer = Reaction::Answer(200, object.to_string());
        Some(Reaction::Delay(time, Box::new(answer)))
    }
}

/// An API server that answers some requests as a test says.
#[derive(Clone)]
pub(crate) struct Api(Arc<Running>);

impl Api {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (server, kubeconfig) = server::serve(dir.path()).await;
        let running = Arc::new(Running {
            server,
            kubeconfig,
            state: Mutex::default(),
            _dir: dir,
        });
        let weak: Weak<Running> = Arc::downgrade(&running);
        running.server.intercept(move |call| match weak.upgrade() {
            Some(running) => match running.late_answer(call) {
                Some(late) => late,
                None => running.state.lock().unwrap().react(call),
            },
            None => Reaction::Close,
        });
        Self(running)
    }

    pub(crate) fn class_is(&self, name: &str, answers: impl IntoIterator<Item = Class>) {
        let answers = answers.into_iter().collect();
        let mut state = self.0.state.lock().unwrap();
        state.classes.insert(name.to_owned(), answers);
    }

    /// Returns the number of reads of each class since the last time that this was called.
    pub(crate) fn class_reads(&self) -> BTreeMap<String, usize> {
        std::mem::take(&mut self.0.state.lock().unwrap().class_reads)
    }

    /// Refuses the pod statuses of a class, or takes them again.
    pub(crate) fn refuse_status(&self, class: &str, code: Option<u16>) {
        let mut state = self.0.state.lock().unwrap();
        match code {
            Some(code) => state.statuses.insert(class.to_owned(), code),
            None => state.statuses.remove(class),
        };
    }

    /// Serves the next update of a pod status of a class at once, and answers it that much later.
    pub(crate) fn answer_status_late(&self, class: &str, time: Duration) {
        let mut state = self.0.state.lock().unwrap();
        state.late_answers.insert(class.to_owned(), time);
    }

    /// Refuses a Secret, as the API server does with this status, reason and message.
    pub(crate) fn refuse_secret(&self, name: &str, how: (u16, &'static str, &'static str)) {
        let mut state = self.0.state.lock().unwrap();
        state.secrets.insert(name.to_owned(), how);
    }

    /// Refuses events, or takes them again.
    pub(crate) fn refuse_events(&self, code: Option<u16>) {
        self.0.state.lock().unwrap().events_refused = (code, 0);
    }

    /// Returns the number of events that have been refused since then.
    pub(crate) fn events_refused(&self) -> usize {
        self.0.state.lock().unwrap().events_refused.1
    }

    pub(crate) fn events(&self) -> Vec<Value> {
        self.0.server.all("events")
    }

    /// Returns the number of events of a reason about the pod of a volume.
    pub(crate) fn events_of(&self, volume: &Volume, reason: &str) -> usize {
        let is_it = |event: &&Value| {
            event["involvedObject"]["uid"] == volume.uid && event["reason"] == reason
        };
        self.events().iter().filter(is_it).count()
    }

    /// Does something at a target as soon as the pod status of this class, or the Secret of this
    /// name, is written.
    pub(crate) fn act_at(&self, written: &str, act: Act, target: &Path) {
        let mut state = self.0.state.lock().unwrap();
        let act = (act, target.to_owned());
        state.acts.insert(written.to_owned(), act);
    }

    /// Whether that has not happened yet.
    pub(crate) fn is_to_act_at(&self, written: &str) -> bool {
        self.0.state.lock().unwrap().acts.contains_key(written)
    }

    pub(crate) fn put(&self, path: &str, object: Value) {
        self.0.server.put(path, object).unwrap();
    }

    pub(crate) fn get(&self, path: &str) -> Option<Value> {
        self.0.server.get(path)
    }

    pub(crate) fn remove(&self, path: &str) {
        self.0.server.remove(path);
    }

    /// Gives the pod of a volume another specification.
    pub(crate) fn pod_is(&self, volume: &Volume, spec: Value) {
        let mut pod = self.get(&volume.pod()).unwrap();
        let metadata = pod["metadata"].as_object_mut().unwrap();
        metadata.remove("resourceVersion");
        pod["spec"] = spec;
        self.put(&volume.pod(), pod);
    }

    /// The objects and versions that the pod status of a volume names, if there is one.
    pub(crate) fn status_of(&self, volume: &Volume) -> Option<Vec<(String, String)>> {
        let kind = "secretproviderclasspodstatuses.secrets-store.csi.x-k8s.io";
        let statuses = self.0.server.all(kind);
        let status = statuses
            .iter()
            .find(|object| object["status"]["targetPath"] == volume.target.to_str().unwrap())?;
        let objects = status["status"]["objects"].as_array()?;
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        Some(
            objects
                .iter()
                .map(|object| (text(&object["id"]), text(&object["version"])))
                .collect(),
        )
    }
}

impl ApiState {
    fn react(&mut self, call: &Call<'_>) -> Reaction {
        let path = call.uri.split('?').next().unwrap();
        let name = path.rsplit('/').next().unwrap();
        let refuse = |code: u16, reason: &str| {
            server::refuse(code, reason, "refused by the test", Some(name))
        };
        if path.contains("/secretproviderclasses/") {
            *self.class_reads.entry(name.to_owned()).or_default() += 1;
            let Some(answers) = self.classes.get_mut(name) else {
                return refuse(404, "NotFound");
            };
            let answer = answers.front().cloned().unwrap();
            if answers.len() > 1 {
                answers.pop_front();
            }
            return match answer {
                Class::Is(object) => Reaction::Answer(200, object.to_string()),
                Class::Refused(code) => refuse(code, "x"),
                Class::RefusedSo(code, reason, message) => {
                    server::refuse(code, reason, message, Some(name))
                }
                Class::Text(code, text) => Reaction::Answer(code, text.to_owned()),
                Class::Garbled => Reaction::Answer(200, json!({"spec": 7}).to_string()),
                Class::Held => Reaction::Hang,
                Class::Late(time, object) => {
                    let answer = Reaction::Answer(200, object.to_string());
                    Reaction::Delay(time, Box::new(answer))
                }
            };
        }
        if call.method == "GET" {
            return Reaction::Serve;
        }
        if name == "events"
            && let (Some(code), refusals) = &mut self.events_refused
        {
            *refusals += 1;
            return refuse(*code, "x");
        }
        let body: Value = serde_json::from_slice(call.body).unwrap_or_default();
        let class = body["status"]["secretProviderClassName"].as_str();
        let written = match class {
            None if path.contains("/secrets") => body["metadata"]["name"].as_str(),
            class => class,
        };
        if let Some((act, target)) = written.and_then(|written| self.acts.remove(written)) {
            act.carry_out(&target);
        }
        if path.contains("/secrets")
            && let Some((code, reason, message)) = body["metadata"]["name"]
                .as_str()
                .and_then(|name| self.secrets.get(name))
        {
            return server::refuse(*code, reason, message, Some(name));
        }
        match class.and_then(|class| self.statuses.get(class)) {
            Some(code) => refuse(*code, "x"),
            None => Reaction::Serve,
        }
    }
}

/// The answer of the provider for a class.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answer {
    pub(crate) status: Option<Code>,
    pub(crate) error_code: Option<&'static str>,
    /// The message of a refusal, if it is not empty.
    pub(crate) says: &'static str,
    pub(crate) hangs: bool,
    /// Whether the provider fails when it is told which versions are mounted.
    pub(crate) refuses_versions: bool,
    /// Whether the provider answers with its first file only, when it is told which versions are
    /// mounted.
    pub(crate) leaves_out: bool,
    /// The files of the answer.
    pub(crate) files: Vec<(String, Vec<u8>)>,
    /// The version of the only object, or `None` to name no object.
    pub(crate) version: Option<String>,
    /// The mode of the files. `None` for the permission of the request.
    pub(crate) mode: Option<i32>,
    /// The change that the provider makes at the target before it writes and answers.
    pub(crate) act: Option<Act>,
    /// The files that the provider writes itself.
    pub(crate) writes: Vec<(String, Vec<u8>)>,
}

impl Answer {
    /// Returns an answer with one file.
    pub(crate) fn file(name: &str, text: &str) -> Self {
        Self {
            files: vec![(name.to_owned(), text.as_bytes().to_vec())],
            version: Some(text.to_owned()),
            ..Self::default()
        }
    }
}

/// A provider with an answer for each class. It records the requests.
#[derive(Clone, Default)]
pub(crate) struct TestProvider(Arc<Mutex<ProviderState>>);

#[derive(Default)]
struct ProviderState {
    answers: BTreeMap<String, Answer>,
    /// The attributes of each request, with the mounted versions as `versions`.
    asked: Vec<Value>,
    /// The number of calls that hang or have hung.
    hung: usize,
}

impl TestProvider {
    pub(crate) fn answers(&self, class: &str, answer: Answer) {
        let mut state = self.0.lock().unwrap();
        state.answers.insert(class.to_owned(), answer);
    }

    /// Returns the number of calls that the provider has let hang.
    pub(crate) fn waits(&self) -> usize {
        self.0.lock().unwrap().hung
    }

    /// Returns the requests since the last time that this was called.
    pub(crate) fn asked(&self) -> Vec<Value> {
        std::mem::take(&mut self.0.lock().unwrap().asked)
    }
}

impl Provider for TestProvider {
    fn identity(&self) -> Identity {
        Identity {
            name: "test".to_owned(),
            version: "1".to_owned(),
        }
    }

    async fn mount(&self, request: Request) -> Result<MountResponse, Failure> {
        let versions = request.mounted_versions();
        let mut answer = {
            let mut state = self.0.lock().unwrap();
            let mut attributes = json!(request.attributes());
            attributes["versions"] = versions.iter().map(|of| of.version.clone()).collect();
            state.asked.push(attributes);
            let answer = state.answers.get(request.parameter("case").unwrap());
            answer.cloned().unwrap_or_default()
        };
        if answer.refuses_versions && !versions.is_empty() {
            return Err(Failure::new(Code::PermissionDenied, "may not describe"));
        }
        if answer.leaves_out && !versions.is_empty() {
            answer.files.truncate(1);
        }
        if answer.hangs {
            self.0.lock().unwrap().hung += 1;
            std::future::pending::<()>().await;
        }
        if !answer.says.is_empty() {
            return Err(Failure::new(Code::Unauthenticated, answer.says));
        }
        if let Some(code) = answer.status {
            return Err(Failure::new(code, "the store says no"));
        }
        let target = request.target_path();
        if let Some(act) = &answer.act {
            act.carry_out(target);
        }
        for (path, contents) in &answer.writes {
            fs::write(target.join(path), contents).unwrap();
        }
        let object = |version| ObjectVersion {
            id: "object".to_owned(),
            version,
        };
        let mode = answer.mode.unwrap_or(request.permission().cast_signed());
        let file = |(path, contents)| File {
            path,
            mode,
            contents,
        };
        Ok(MountResponse {
            object_version: answer.version.map(object).into_iter().collect(),
            error: answer.error_code.map(|code| proto::provider::Error {
                code: code.to_owned(),
            }),
            files: answer.files.into_iter().map(file).collect(),
        })
    }
}

/// A volume as kubelet asks for it.
#[derive(Clone, Debug)]
pub(crate) struct Volume {
    pub(crate) id: String,
    pub(crate) class: String,
    pub(crate) uid: String,
    pub(crate) target: PathBuf,
}

impl Volume {
    /// Returns the request that kubelet sends.
    pub(crate) fn request(&self) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            volume_id: self.id.clone(),
            target_path: self.target.display().to_string(),
            readonly: true,
            volume_capability: Some(VolumeCapability::default()),
            volume_context: [
                ("csi.storage.k8s.io/pod.name", self.id.as_str()),
                ("csi.storage.k8s.io/pod.namespace", "shop"),
                ("csi.storage.k8s.io/pod.uid", &self.uid),
                ("secretProviderClass", &self.class),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
            ..Default::default()
        }
    }

    /// The path of its pod at the API server.
    pub(crate) fn pod(&self) -> String {
        format!("/api/v1/namespaces/shop/pods/{}", self.id)
    }

    /// The path of its pod status at the API server.
    pub(crate) fn pod_status(&self) -> String {
        format!(
            "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasspodstatuses/{}-shop-{}",
            self.id, self.class
        )
    }

    pub(crate) fn state(&self) -> mount::TargetState {
        mount::state(&self.target).unwrap()
    }

    /// Returns the files that a container reads, without the driver's own names.
    pub(crate) fn reads(&self) -> BTreeMap<String, String> {
        let Ok(entries) = fs::read_dir(&self.target) else {
            return BTreeMap::new();
        };
        entries
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_file())
            .map(|path| {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                (name, fs::read_to_string(&path).unwrap())
            })
            .collect()
    }

    /// Which mount it is.
    pub(crate) fn device(&self) -> u64 {
        fs::metadata(&self.target).unwrap().dev()
    }

    pub(crate) fn unmount(&self) {
        umount2(&self.target, MntFlags::MNT_DETACH).unwrap();
    }
}

/// A driver's process, which ends with this: left alone, it would keep the output of the test open.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn runs(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A node with a driver on it.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) api: Api,
    pub(crate) provider: TestProvider,
    flags: Vec<String>,
    running: Option<(CancellationToken, JoinHandle<std::io::Result<()>>)>,
    volumes: usize,
}

/// Flags with which each look of kubelet is a refresh, and errors reach it.
pub(crate) const EAGER: [&str; 5] = [
    "--enable-secret-rotation",
    "--rotation-poll-interval=1ns",
    "--rotation-backoff=1ns",
    "--rotation-backoff-max=1ns",
    "--republish-errors=surface",
];

impl World {
    /// Starts a driver with these flags beside the usual ones.
    pub(crate) async fn start(flags: &[&str]) -> Self {
        Self::start_at(Api::start().await, 0, flags).await
    }

    /// Starts another node of the same cluster.
    pub(crate) async fn beside(other: &Self, flags: &[&str]) -> Self {
        Self::start_at(other.api.clone(), 1000, flags).await
    }

    /// Starts a driver at an API server. Its volumes are numbered from `volumes` on.
    async fn start_at(api: Api, volumes: usize, flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["kubelet", "kubelet/pods", "state"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        tmpfs(&dir.path().join("kubelet/pods"), "mode=0755");
        let provider = TestProvider::default();
        let socket = Socket::bind(dir.path().join("test.sock")).unwrap();
        tokio::spawn(Server::new(socket, provider.clone()).run(std::future::pending()));
        let mut world = Self {
            dir,
            api,
            provider,
            flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
            running: None,
            volumes,
        };
        world.start_driver().await;
        world
    }

    pub(crate) async fn start_driver(&mut self) {
        let config = Config::parse(self.flags().into_iter().map(Into::into)).unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(driver::run(config, stop.clone()));
        self.running = Some((stop, task));
    }

    /// Starts the driver's binary as a process in a cgroup, in the place of one in this process.
    pub(crate) fn start_process(&self, cgroup: &Path) -> Process {
        let binary = env!("CARGO_BIN_EXE_secrets-store-csi");
        let procs = cgroup.join("cgroup.procs");
        let script = format!("echo $$ > {} && exec \"$@\"", procs.display());
        let started = Command::new("sh")
            .args(["-c", &script, "sh", binary])
            .args(self.flags())
            .stderr(fs::File::create(self.dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        Process(started)
    }

    pub(crate) fn flags(&self) -> Vec<String> {
        let dir = self.dir.path();
        fs::write(dir.join("kubeconfig"), &self.api.0.kubeconfig).unwrap();
        let usual = [
            format!("--endpoint=unix://{}", dir.join("csi.sock").display()),
            format!("--state-dir={}", self.state_dir().display()),
            format!("--kubelet-root-dir={}", dir.join("kubelet").display()),
            format!("--kubeconfig={}", dir.join("kubeconfig").display()),
            format!("--provider-volume={}", dir.display()),
            "--metrics-addr=0".to_owned(),
            "--nodeid=node-1".to_owned(),
        ];
        usual.into_iter().chain(self.flags.clone()).collect()
    }

    /// Starts the driver with other flags.
    pub(crate) async fn restart_with(&mut self, flags: &[&str]) {
        self.flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        self.start_driver().await;
    }

    pub(crate) async fn stop_driver(&mut self) {
        let (stop, task) = self.running.take().unwrap();
        stop.cancel();
        task.await.unwrap().unwrap();
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// A client of kubelet's, on a connection of its own.
    pub(crate) async fn client(&self) -> NodeClient<Channel> {
        let socket = self.dir.path().join("csi.sock");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match endpoint.connect().await {
                Ok(channel) => return NodeClient::new(channel),
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// A new volume of a class, whose directory kubelet has made.
    pub(crate) fn volume(&mut self, class: &str) -> Volume {
        self.volumes += 1;
        let uid = format!("uid-{}", self.volumes);
        let parent = self.dir.path().join(format!(
            "kubelet/pods/{uid}/volumes/kubernetes.io~csi/secrets"
        ));
        fs::create_dir_all(&parent).unwrap();
        let volume = Volume {
            id: format!("csi-{}", self.volumes),
            class: class.to_owned(),
            uid,
            target: parent.join("mount"),
        };
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": volume.id, "namespace": "shop", "uid": volume.uid},
        });
        self.api.put(&volume.pod(), pod);
        volume
    }

    /// A new volume of a class of its own, whose provider answers one file.
    pub(crate) fn volume_of_its_own(&mut self) -> Volume {
        let name = format!("class-{}", self.volumes + 1);
        self.api.class_is(&name, [Class::Is(class(&name, 1))]);
        self.provider.answers(&name, Answer::file("pw", "one"));
        self.volume(&name)
    }

    /// A publish of a kubelet that has little time.
    pub(crate) async fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        let mut request = tonic::Request::new(request);
        request.set_timeout(Duration::from_secs(4));
        let mut client = self.client().await;
        client.node_publish_volume(request).await.map(drop)
    }

    /// A publish that has all the time it wants.
    pub(crate) async fn publish_patiently(&self, volume: &Volume) -> Result<(), Status> {
        let mut client = self.client().await;
        client.node_publish_volume(volume.request()).await.map(drop)
    }

    /// kubelet's unpublish, again and again while the publish before it has not ended.
    pub(crate) async fn unpublish(&self, volume: &Volume) -> Result<(), Status> {
        loop {
            match self.try_to_unpublish(volume).await {
                Err(status) if status.code() == Code::Aborted => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                answer => return answer,
            }
        }
    }

    pub(crate) async fn try_to_unpublish(&self, volume: &Volume) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: volume.id.clone(),
            target_path: volume.target.display().to_string(),
        };
        let mut client = self.client().await;
        client.node_unpublish_volume(request).await.map(drop)
    }

    pub(crate) fn record(&self, volume: &Volume) -> Option<Record> {
        Records::open(self.state_dir()).unwrap().get(&volume.id)
    }

    pub(crate) fn record_file(&self, volume: &Volume) -> PathBuf {
        self.state_dir().join(format!("{}.json", volume.id))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The mounts go with the process's namespace; the temporary directory needs them gone.
        let _ = umount2(&self.state_dir(), MntFlags::MNT_DETACH);
        let _ = umount2(&self.dir.path().join("kubelet/pods"), MntFlags::MNT_DETACH);
    }
}

/// Mounts a tmpfs whose mounts reach other namespaces, as kubelet's directory has it.
pub(crate) fn tmpfs(at: &Path, options: &str) {
    let no: Option<&str> = None;
    mount(
        Some("tmpfs"),
        at,
        Some("tmpfs"),
        MsFlags::empty(),
        Some(options),
    )
    .unwrap();
    mount(no, at, no, MsFlags::MS_SHARED, no).unwrap();
}

/// Makes a mount read-only, or writable again.
pub(crate) fn read_only(at: &Path, yes: bool) {
    let no: Option<&str> = None;
    let flags = if yes {
        MsFlags::MS_RDONLY
    } else {
        MsFlags::empty()
    };
    mount(no, at, no, MsFlags::MS_REMOUNT | flags, no).unwrap();
}

/// Whether kubelet takes a code for the end of the attempt, and forgets the volume.
pub(crate) fn is_final(code: Code) -> bool {
    !matches!(
        code,
        Code::Ok
            | Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Unavailable
            | Code::ResourceExhausted
            | Code::Aborted
    )
}

/// Lets this process see a memory limit, with a tmpfs over each hierarchy of cgroups that may
/// limit memory. Whether there is one.
pub(crate) fn limit_memory(bytes: u64) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut found = false;
    for line in mounts.lines() {
        let (before, after) = line.split_once(" - ").unwrap();
        let after: Vec<&str> = after.split(' ').collect();
        let limits_memory = match after[0] {
            "cgroup2" => true,
            "cgroup" => after[2].split(',').any(|option| option == "memory"),
            _ => false,
        };
        if limits_memory {
            let point = Path::new(before.split(' ').nth(4).unwrap());
            tmpfs(point, "mode=0755");
            for name in ["memory.max", "memory.limit_in_bytes"] {
                fs::write(point.join(name), bytes.to_string()).unwrap();
            }
            found = true;
        }
    }
    found
}
