//! The cluster of a scenario: an embedded one of its own, or a turn on one that all share.
//!
//! `E2E_CLUSTER` names it: `embedded` (default), `local` or `kind`. A shared cluster is started
//! once per run. Its guard tears it down, because no test knows that it is the last one.

use std::{
    fmt,
    fs::File,
    io::Write as _,
    os::{fd::AsRawFd as _, unix::net::UnixListener},
    path::{Path, PathBuf},
    sync::{
        Mutex as Lock, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use e2e::{
    binaries::{Binaries, logs_dir},
    cluster::{Action, Cluster, Component, HttpAnswer, Result},
    embedded::{Embedded, standard},
    images,
    install::{Form, Installation},
    kind::{self, Kind},
    local::{self, Local, Running},
    providers::{self, Provider},
    skipped::skip,
    tree::Tree,
};
use embedded::api::Disturbance;
use tokio::sync::{Mutex, MutexGuard, OnceCell};

use crate::settings::{self, Need};

/// The cluster that `E2E_CLUSTER` names.
#[derive(Clone, Copy, Debug)]
pub enum ClusterName {
    Embedded,
    Local,
    Kind { nodes: usize },
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Embedded => "embedded",
            Self::Local => "local",
            Self::Kind { .. } => "kind",
        })
    }
}

pub enum Target {
    Embedded(Box<Embedded>),
    Local(
        Local,
        #[expect(dead_code, reason = "held")] MutexGuard<'static, ()>,
    ),
    Kind(
        Kind,
        #[expect(dead_code, reason = "held")] MutexGuard<'static, ()>,
    ),
}

/// Held by the scenario whose turn it is on a shared cluster: scenarios restart its driver and
/// count its calls.
static TURN: Mutex<()> = Mutex::const_new(());
/// The local cluster of this process, or the reason why there is none.
static LOCAL: OnceLock<std::result::Result<Running, String>> = OnceLock::new();
/// The kind cluster of this process, or the reason why there is none.
static KIND: OnceCell<std::result::Result<kind::Running, String>> = OnceCell::const_new();
/// The installation with which a shared cluster starts.
static STANDARD: OnceLock<Installation> = OnceLock::new();
/// The needs of the last scenario, while the next one may use the cluster as it has left it.
static KEPT: Lock<Option<String>> = Lock::new(None);
/// The manifests of the real providers whose images a shared cluster has.
static REAL_PROVIDERS: OnceCell<Vec<String>> = OnceCell::const_new();
/// Whether a scenario has installed something else, which is not undone yet.
static ANOTHER: AtomicBool = AtomicBool::new(false);

impl Target {
    /// Returns a cluster that has what is needed. Where there is none, lists the test as skipped.
    pub async fn find(needs: &[Need]) -> Option<Self> {
        let name = std::env::var("E2E_CLUSTER").unwrap_or_else(|_| "embedded".to_owned());
        let name = match name.as_str() {
            "embedded" => ClusterName::Embedded,
            "local" => ClusterName::Local,
            "kind" => ClusterName::Kind {
                nodes: kind_options().nodes.for_pods().len(),
            },
            other => panic!("E2E_CLUSTER={other}: it is embedded, local or kind"),
        };
        if let Some(missing) = needs.iter().find_map(|need| need.missing(name)) {
            skip(&missing);
            return None;
        }
        Some(match name {
            ClusterName::Embedded => Self::Embedded(Box::new(embedded(needs).await)),
            ClusterName::Local => local(needs).await,
            ClusterName::Kind { .. } => kind(needs).await,
        })
    }

    /// Returns the embedded cluster, for a scenario that needs it.
    pub fn embedded(&self) -> &Embedded {
        match self {
            Self::Embedded(cluster) => cluster,
            _ => panic!("the scenario does not say that it needs the embedded cluster"),
        }
    }

    /// Returns an administrator's kubeconfig, in YAML.
    pub async fn kubeconfig(&self) -> String {
        match self {
            Self::Embedded(cluster) => cluster.api().kubeconfig().await.unwrap(),
            Self::Local(..) => {
                let running = LOCAL.get().unwrap().as_ref().unwrap();
                std::fs::read_to_string(running.kubeconfig()).unwrap()
            }
            Self::Kind(..) => {
                let running = KIND.get().unwrap().as_ref().unwrap();
                running.kubeconfig().to_owned()
            }
        }
    }

    /// Returns the path of a node's file for this process, if it has access.
    pub fn disk(&self, node: &str, path: &Path) -> Option<PathBuf> {
        match self {
            Self::Embedded(cluster) => {
                let root = cluster.disk(node);
                Some(root.join(path.strip_prefix("/").unwrap()))
            }
            // This machine is the node.
            Self::Local(..) => Some(path.to_owned()),
            Self::Kind(..) => None,
        }
    }

    pub async fn remove_file(&self, node: &str, path: &Path) {
        match (self.disk(node, path), self) {
            (Some(path), _) => std::fs::remove_file(path).unwrap(),
            (None, Self::Kind(cluster, _)) => cluster.remove_file(node, path).await.unwrap(),
            _ => unreachable!(),
        }
    }

    /// Makes a socket that no process listens on, as a crash leaves it.
    pub async fn leave_dead_socket(&self, node: &str, path: &Path) {
        match (self.disk(node, path), self) {
            (Some(path), _) => {
                // The path of a node's disk may be longer than a socket's path can be.
                let directory = File::open(path.parent().unwrap()).unwrap();
                let name = path.file_name().unwrap().to_string_lossy();
                let short = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
                drop(UnixListener::bind(short).unwrap());
            }
            (None, Self::Kind(cluster, _)) => cluster.leave_dead_socket(node, path).await.unwrap(),
            _ => unreachable!(),
        }
    }

    /// Restarts kubelet.
    pub async fn restart_kubelet(&self) {
        match self {
            Self::Embedded(cluster) => {
                let node = &cluster.nodes()[0];
                cluster.restart_kubelet(node).await.unwrap();
            }
            Self::Local(cluster, _) => cluster.restart_kubelet().await.unwrap(),
            Self::Kind(cluster, _) => cluster.restart_kubelet(&cluster.nodes()[0]).await.unwrap(),
        }
    }

    /// Installs something over what is installed, as an operator does, on a shared cluster.
    pub async fn install(&self, installation: &Installation) {
        ANOTHER.store(true, Ordering::Relaxed);
        self.apply_installation(installation).await;
    }

    /// Installs that with which a cluster starts.
    pub async fn install_standard(&self) {
        self.apply_installation(&self.standard()).await;
        ANOTHER.store(false, Ordering::Relaxed);
    }

    /// Undoes the installation of a scenario that failed.
    async fn install_standard_again(&self) {
        if ANOTHER.load(Ordering::Relaxed) {
            self.install_standard().await;
        }
    }

    /// Gives a shared cluster what a scenario needs. It is as new after that, or as scenarios with the
    /// same needs have left it.
    async fn prepare(&self, needs: &[Need]) {
        let wanted = settings::kept(needs);
        let kept = KEPT.lock().unwrap().take();
        if wanted.is_some() && kept == wanted {
            self.tidy().await;
        } else {
            self.install_standard_again().await;
            settings::change(&self.client(), needs).await;
            self.renew().await;
            let is_real = |need: &Need| matches!(need, Need::RealProvider(_));
            if needs.iter().any(is_real) {
                self.install_real_providers(needs).await;
            }
        }
        *KEPT.lock().unwrap() = wanted;
    }

    /// Installs all real providers that there are, until the cluster is made as new, with the flags that
    /// a scenario needs.
    pub async fn install_real_providers(&self, needs: &[Need]) {
        let manifests = REAL_PROVIDERS.get_or_init(async || {
            let built = tokio::task::spawn_blocking(|| {
                let there = |provider: &Provider| providers::find(*provider).is_ok();
                let there: Vec<_> = Provider::ALL.into_iter().filter(there).collect();
                providers::installation(&there)
            });
            let built = built.await.unwrap();
            let Installation { manifests, images } =
                built.unwrap_or_else(|error| panic!("{error}"));
            let only_images = Installation {
                manifests: Vec::new(),
                images,
            };
            self.apply_installation(&only_images).await;
            manifests
        });
        let mut manifests = manifests.await.clone();
        let changed = settings::change_providers(&mut manifests, needs);
        changed.unwrap_or_else(|error| panic!("{error}"));
        let images = Vec::new();
        self.apply_installation(&Installation { manifests, images })
            .await;
    }

    /// Returns the installation with which a shared cluster starts.
    pub fn standard(&self) -> Installation {
        STANDARD.get().unwrap().clone()
    }

    async fn tidy(&self) {
        let tidied = match self {
            Self::Embedded(_) => return,
            Self::Local(cluster, _) => cluster.tidy().await,
            Self::Kind(cluster, _) => cluster.tidy().await,
        };
        tidied.unwrap_or_else(|error| panic!("{error}"));
    }

    /// Makes a shared cluster as new.
    async fn renew(&self) {
        let renewed = match self {
            Self::Embedded(_) => return,
            Self::Local(cluster, _) => cluster.renew().await,
            Self::Kind(cluster, _) => cluster.renew().await,
        };
        renewed.unwrap_or_else(|error| panic!("{error}"));
    }

    async fn apply_installation(&self, installation: &Installation) {
        let done = match self {
            Self::Embedded(_) => unreachable!("the scenario is skipped"),
            Self::Local(..) => {
                let running = LOCAL.get().unwrap().as_ref().unwrap();
                running.install(installation).await
            }
            Self::Kind(..) => {
                let running = KIND.get().unwrap().as_ref().unwrap();
                running.install(installation).await
            }
        };
        done.unwrap_or_else(|error| panic!("{error}"));
    }

    /// Returns the kernel's mount table, as the node's kubelet sees it.
    pub async fn mount_table(&self, node: &str) -> String {
        if let Self::Kind(cluster, _) = self {
            return cluster.mount_table(node).await.unwrap();
        }
        let process = self.process_on(node).await.unwrap();
        std::fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap()
    }

    /// Returns the root directory of the node with its mounts, if this process has access.
    pub async fn root_of(&self, node: &str) -> Option<PathBuf> {
        let process = self.process_on(node).await?;
        Some(PathBuf::from(format!("/proc/{process}/root")))
    }

    /// Returns the name in `/proc` of a process that sees the node's mounts; `None` for kind.
    async fn process_on(&self, node: &str) -> Option<String> {
        let process = match self {
            Self::Embedded(cluster) => {
                let containers = cluster.containers(node).await.unwrap();
                let driver = containers
                    .into_iter()
                    .find(|c| c.name == Component::Driver.container())
                    .unwrap();
                driver.pid.unwrap().to_string()
            }
            Self::Local(..) => "self".to_owned(),
            Self::Kind(..) => return None,
        };
        Some(process)
    }
}

async fn embedded(needs: &[Need]) -> Embedded {
    let binaries = tokio::task::spawn_blocking(|| Binaries::find(|_| {}));
    let binaries = binaries.await.unwrap().unwrap();
    let mut options = standard(&binaries).unwrap();
    settings::configure(&mut options, needs).unwrap_or_else(|error| panic!("{error}"));
    Embedded::start(options)
        .await
        .unwrap_or_else(|error| panic!("{error}"))
}

async fn local(needs: &[Need]) -> Target {
    let turn = TURN.lock().await;
    // In a thread of its own, because it has a runtime of its own.
    let running = tokio::task::spawn_blocking(|| {
        let start = || LOCAL.get_or_init(start_local);
        std::thread::scope(|scope| scope.spawn(start).join().unwrap())
    });
    let running = match running.await.unwrap() {
        Ok(running) => running,
        Err(error) => panic!("{error}"),
    };
    let target = Target::Local(running.connect().await.unwrap(), turn);
    target.prepare(needs).await;
    target
}

fn start_local() -> std::result::Result<Running, String> {
    let guard = PathBuf::from(env!("CARGO_BIN_EXE_local"));
    let options = local::Options::standard(|_| {}, guard).map_err(|error| error.to_string())?;
    STANDARD.get_or_init(|| options.installation.clone());
    Running::start(&options, |step| say(&format!("local cluster: {step}")))
        .map_err(|error| error.to_string())
}

fn kind_options() -> kind::Options {
    let options = kind::Options::from_env().unwrap_or_else(|error| panic!("{error}"));
    kind::Options {
        guard: Some(env!("CARGO_BIN_EXE_e2e-kind").into()),
        ..options
    }
}

async fn kind(needs: &[Need]) -> Target {
    let turn = TURN.lock().await;
    let running = match KIND.get_or_init(start_kind).await {
        Ok(running) => running,
        Err(error) => panic!("{error}"),
    };
    let target = Target::Kind(running.connect().await.unwrap(), turn);
    target.prepare(needs).await;
    target
}

async fn start_kind() -> std::result::Result<kind::Running, String> {
    let images = tokio::task::spawn_blocking(|| images::build(|_| {}));
    let images = images.await.unwrap().map_err(|error| error.to_string())?;
    let load =
        kind::Load::standard(&images, &Form::from_env()).map_err(|error| error.to_string())?;
    STANDARD.get_or_init(|| load.installation.clone());
    kind::Running::start(kind_options(), &load, |step| {
        say(&format!("kind cluster: {step}"))
    })
    .await
    .map_err(|error| error.to_string())
}

/// Keeps logs and objects of a failed scenario, before the next one deletes them.
impl Drop for Target {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        if let Ok(mut kept) = KEPT.lock() {
            *kept = None;
        }
        let thread = std::thread::current();
        let dir = logs_dir(&thread.name().unwrap_or("scenario").replace("::", "-"));
        // This thread already runs a runtime.
        let outcome = std::thread::scope(|scope| scope.spawn(|| self.keep_logs(&dir)).join());
        match outcome {
            Ok(None) => {}
            Ok(Some(Ok(()))) => say(&format!("logs and objects are in {}", dir.display())),
            Ok(Some(Err(error))) => say(&error.to_string()),
            Err(_) => say("logs could not be kept"),
        }
    }
}

impl Target {
    /// Returns `None` for a cluster that has not started.
    fn keep_logs(&self, dir: &Path) -> Option<Result<()>> {
        match self {
            Self::Embedded(cluster) => Some(cluster.as_ref().keep_logs(dir)),
            Self::Local(..) => Some(LOCAL.get()?.as_ref().ok()?.keep_logs(dir)),
            Self::Kind(..) => {
                let running = KIND.get()?.as_ref().ok()?;
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap();
                Some(runtime.block_on(running.keep_logs(dir)))
            }
        }
    }
}

/// Writes a line that is shown even if the test passes.
fn say(line: &str) {
    let _nobody_listens = writeln!(std::io::stderr(), "{line}");
}

/// Makes the same call on any of the clusters.
macro_rules! on {
    ($target:expr, $cluster:ident => $call:expr) => {
        match $target {
            Target::Embedded($cluster) => {
                let $cluster = $cluster.as_ref();
                $call
            }
            Target::Local($cluster, _) => $call,
            Target::Kind($cluster, _) => $call,
        }
    };
}

impl Cluster for Target {
    fn name(&self) -> &'static str {
        on!(self, cluster => cluster.name())
    }

    fn client(&self) -> kube::Client {
        on!(self, cluster => cluster.client())
    }

    fn nodes(&self) -> Vec<String> {
        on!(self, cluster => cluster.nodes())
    }

    async fn probe(
        &self,
        namespace: &str,
        pod: &str,
        path: &str,
        arguments: &[String],
    ) -> Result<String> {
        on!(self, cluster => cluster.probe(namespace, pod, path, arguments).await)
    }

    async fn node_tree(&self, node: &str, path: &Path) -> Result<Option<Tree>> {
        on!(self, cluster => cluster.node_tree(node, path).await)
    }

    async fn mounts(&self, node: &str, below: &Path) -> Result<Vec<PathBuf>> {
        on!(self, cluster => cluster.mounts(node, below).await)
    }

    async fn act(&self, node: &str, component: &Component, action: Action) -> Result<()> {
        on!(self, cluster => cluster.act(node, component, action).await)
    }

    async fn log(&self, node: &str, component: &Component) -> Result<String> {
        on!(self, cluster => cluster.log(node, component).await)
    }

    async fn get(
        &self,
        node: &str,
        component: &Component,
        port: u16,
        path: &str,
    ) -> Result<HttpAnswer> {
        on!(self, cluster => cluster.get(node, component, port, path).await)
    }

    async fn reboot(&self, node: &str) -> Result<()> {
        on!(self, cluster => cluster.reboot(node).await)
    }

    async fn disturb_api(&self, disturbance: Disturbance) -> Result<()> {
        on!(self, cluster => cluster.disturb_api(disturbance).await)
    }

    async fn wait_namespace(&self, namespace: &str) -> Result<()> {
        on!(self, cluster => cluster.wait_namespace(namespace).await)
    }
}
