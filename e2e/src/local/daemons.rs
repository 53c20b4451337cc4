//! The daemons of the control plane and of the node, and their settings.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::json;

use super::layout::{
    API_PORT, BRIDGE, CONTAINERD_SOCKET, DNS_ADDRESS, ETCD_PORT, KUBELET_ROOT, NODE, NODE_ADDRESS,
    PODS, SERVICES,
};
use super::pki::Pki;
use super::processes::Processes;
use super::tools::Tools;
use crate::cluster::{Error, Result};
use crate::images::{self, Image};

/// In the order in which they are stopped: kubelet first, so that nothing is started again.
pub(super) const NAMES: [&str; 6] = [
    "kubelet",
    "kube-scheduler",
    "kube-controller-manager",
    API_SERVER,
    "etcd",
    "containerd",
];
pub(super) const API_SERVER: &str = "kube-apiserver";
/// The time in which a daemon has to answer. It usually takes seconds; a busy machine takes longer.
const LIMIT: Duration = Duration::from_secs(90);
/// Runs runc without the capability that this machine lacks. `.ci/with-docker` uses it, too.
const RUNC_WRAPPER: &str = include_str!("runc-without-sys-resource.sh");
/// The position of CAP_SYS_RESOURCE in the kernel's capability sets.
const CAP_SYS_RESOURCE: u32 = 24;

/// Starts the daemons, each after those that it needs.
pub(super) struct Daemons<'a> {
    pub(super) state: &'a Path,
    pub(super) tools: &'a Tools,
    pub(super) pki: &'a Pki,
    pub(super) processes: &'a Processes,
}

impl Daemons<'_> {
    /// Starts the control plane and, with images for it, a node; returns when they are ready.
    ///
    /// # Errors
    /// [`Error::Start`] with the last lines of the daemon that does not come up.
    pub(super) fn start(&self, node: Option<&[Image]>) -> Result<()> {
        self.start_etcd()?;
        self.start_apiserver()?;
        if let Some(images) = node {
            self.start_containerd()?;
            self.import(images)?;
        }
        self.wait_for_api_server()?;
        self.start_controllers()?;
        if node.is_some() {
            self.start_kubelet()?;
        }
        Ok(())
    }

    /// Waits until the API server is ready.
    ///
    /// # Errors
    /// [`Error::Start`] with its last lines when it is not in time.
    pub(super) fn wait_for_api_server(&self) -> Result<()> {
        self.processes
            .wait_for(API_SERVER, "API server", LIMIT, || {
                self.kubectl(&["get", "--raw", "/readyz"]).is_ok()
            })
    }

    /// Runs kubectl as an administrator and returns its output.
    ///
    /// # Errors
    /// What kubectl writes to standard error.
    pub(super) fn kubectl(&self, args: &[&str]) -> std::result::Result<String, String> {
        let output = Command::new(&self.tools.kubectl)
            .arg("--kubeconfig")
            .arg(self.pki.kubeconfig("admin"))
            .arg("--cache-dir")
            .arg(self.state.join("kubectl"))
            .args(args)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| error.to_string())?;
        outcome(&output)
    }

    fn start_etcd(&self) -> Result<()> {
        let client = format!("http://127.0.0.1:{ETCD_PORT}");
        let peer = format!("http://127.0.0.1:{}", ETCD_PORT + 1);
        let data = self.state.join("etcd");
        make_private(&data)?;
        self.processes.start(
            "etcd",
            &self.tools.etcd,
            [
                "--name=local".to_owned(),
                format!("--data-dir={}", data.display()),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster=local={peer}"),
            ],
        )
    }

    fn start_apiserver(&self) -> Result<()> {
        let file = |flag: &str, name: &str| format!("--{flag}={}", self.pki.path(name).display());
        self.processes.start(
            API_SERVER,
            &self.tools.apiserver,
            [
                format!("--etcd-servers=http://127.0.0.1:{ETCD_PORT}"),
                format!("--bind-address={NODE_ADDRESS}"),
                format!("--advertise-address={NODE_ADDRESS}"),
                format!("--secure-port={API_PORT}"),
                format!("--service-cluster-ip-range={SERVICES}"),
                "--allow-privileged=true".to_owned(),
                "--authorization-mode=Node,RBAC".to_owned(),
                "--enable-admission-plugins=NodeRestriction".to_owned(),
                // Without kube-proxy, webhooks are reached at their pods' addresses.
                "--enable-aggregator-routing=true".to_owned(),
                "--kubelet-preferred-address-types=InternalIP".to_owned(),
                "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
                "--requestheader-allowed-names=front-proxy-client".to_owned(),
                "--requestheader-username-headers=X-Remote-User".to_owned(),
                "--requestheader-group-headers=X-Remote-Group".to_owned(),
                "--requestheader-extra-headers-prefix=X-Remote-Extra-".to_owned(),
                file("client-ca-file", "ca.crt"),
                file("tls-cert-file", "apiserver.crt"),
                file("tls-private-key-file", "apiserver.key"),
                file("kubelet-client-certificate", "apiserver-kubelet.crt"),
                file("kubelet-client-key", "apiserver-kubelet.key"),
                file("service-account-key-file", "sa.pub"),
                file("service-account-signing-key-file", "sa.key"),
                file("requestheader-client-ca-file", "front-proxy-ca.crt"),
                file("proxy-client-cert-file", "front-proxy.crt"),
                file("proxy-client-key-file", "front-proxy.key"),
                format!("--cert-dir={}", self.state.join("apiserver").display()),
            ],
        )
    }

    fn start_controllers(&self) -> Result<()> {
        let kubeconfigs = |user: &str| {
            let path = self.pki.kubeconfig(user);
            [
                "kubeconfig",
                "authentication-kubeconfig",
                "authorization-kubeconfig",
            ]
            .map(|flag| format!("--{flag}={}", path.display()))
        };
        // Their ports serve metrics only, which nothing reads here.
        let common = ["--leader-elect=false", "--secure-port=0"].map(str::to_owned);
        let file = |flag: &str, name: &str| format!("--{flag}={}", self.pki.path(name).display());
        let mut args = kubeconfigs("controller-manager").to_vec();
        args.extend(common.clone());
        args.extend([
            "--use-service-account-credentials=true".to_owned(),
            // With the defaults they start five seconds later.
            "--kube-api-qps=300".to_owned(),
            "--kube-api-burst=600".to_owned(),
            format!("--flex-volume-plugin-dir={}", self.plugins().display()),
            file("service-account-private-key-file", "sa.key"),
            file("root-ca-file", "ca.crt"),
            file("cluster-signing-cert-file", "ca.crt"),
            file("cluster-signing-key-file", "ca.key"),
        ]);
        self.processes.start(
            "kube-controller-manager",
            &self.tools.controller_manager,
            args,
        )?;
        let mut args = kubeconfigs("scheduler").to_vec();
        args.extend(common);
        self.processes
            .start("kube-scheduler", &self.tools.scheduler, args)
    }

    fn start_containerd(&self) -> Result<()> {
        let at = |name: &str| self.state.join(name);
        let weak = lacks_sys_resource();
        let runc = if weak {
            wrap_runc(&at("runtime"), &self.tools.runc)?
        } else {
            self.tools.runc.clone()
        };
        let networks = at("cni");
        fs::create_dir_all(&networks).map_err(|error| failed(&networks, &error))?;
        let network = json!({"cniVersion": "0.4.0", "name": "e2e-local", "plugins": [{
            "type": "bridge", "bridge": BRIDGE, "isGateway": true, "hairpinMode": true,
            "ipam": {
                "type": "host-local", "dataDir": at("cni-addresses"),
                "ranges": [[{"subnet": PODS, "gateway": NODE_ADDRESS}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }]});
        write(&networks.join("10-local.conflist"), &network.to_string())?;
        let config = format!(
            r#"version = 2
root = "{state}/containerd/root"
state = "{state}/containerd/state"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.internal.v1.tracing", "io.containerd.nri.v1.nri"]
[grpc]
  address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{state}/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/library/{pause}"
  restrict_oom_score_adj = {weak}
  netns_mounts_under_state_dir = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni}"
    conf_dir = "{networks}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "{runc}"
        Root = "{state}/runc"
        SystemdCgroup = false
"#,
            state = self.state.display(),
            socket = self.socket().display(),
            pause = images::PAUSE,
            cni = self.tools.cni.display(),
            networks = networks.display(),
            runc = runc.display(),
        );
        let path = at("containerd.toml");
        write(&path, &config)?;
        let mut command = Command::new(&self.tools.containerd);
        command.arg("--config").arg(path);
        // containerd finds its shim beside itself. It cannot pull an image: requests that leave the
        // machine go to a proxy that does not exist.
        let beside = self.tools.containerd.parent().unwrap_or(Path::new("/"));
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env(
                "PATH",
                format!("{}:{path}:/usr/sbin:/sbin", beside.display()),
            )
            .env("HTTPS_PROXY", "http://127.0.0.1:9")
            .env("HTTP_PROXY", "http://127.0.0.1:9");
        self.processes.start_command("containerd", command)?;
        self.processes
            .wait_for("containerd", "container runtime", LIMIT, || {
                self.ctr(&["version"]).is_ok()
            })
    }

    /// Imports images into the container runtime.
    ///
    /// # Errors
    /// What `ctr` writes to standard error.
    pub(super) fn import(&self, images: &[Image]) -> Result<()> {
        for image in images {
            let archive = image.archive.display().to_string();
            self.ctr(&["images", "import", &archive])
                .map_err(|error| Error::Start(format!("image {}: {error}", image.name)))?;
        }
        Ok(())
    }

    fn ctr(&self, args: &[&str]) -> std::result::Result<String, String> {
        ctr(&self.tools.ctr, self.state, args)
    }

    /// Starts kubelet; returns when the node is ready.
    fn start_kubelet(&self) -> Result<()> {
        let pki = |name: &str| self.pki.path(name).display().to_string();
        let mut config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": NODE_ADDRESS,
            "healthzPort": 0,
            "authentication": {
                "anonymous": {"enabled": false},
                "webhook": {"enabled": true},
                "x509": {"clientCAFile": pki("ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs",
            "containerRuntimeEndpoint": format!("unix://{}", self.socket().display()),
            "clusterDomain": "cluster.local",
            // No server answers there. With the node's own servers, pods would ask outside.
            "clusterDNS": [DNS_ADDRESS],
            "failSwapOn": false,
            // A process without CAP_SYS_RESOURCE may not lower its OOM score.
            "oomScoreAdj": 0,
            "maxOpenFiles": open_files_limit(),
            "makeIPTablesUtilChains": false,
            // Imported images cannot be pulled again.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {
                "memory.available": "100Mi", "nodefs.available": "1%",
                "nodefs.inodesFree": "1%", "imagefs.available": "1%",
            },
            "podLogsDir": self.state.join("pod-logs"),
            "volumePluginDir": self.plugins(),
            // The interval at which volumes are published again; the default is a minute.
            "syncFrequency": "1s",
        });
        // On cgroup v2, and before 1.31, kubelet does not have the setting.
        if self.tools.minor >= 31 && !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            config["failCgroupV1"] = json!(false);
        }
        // Crashed containers come back within seconds; needs a feature gate before 1.35.
        if self.tools.minor >= 35 {
            config["crashLoopBackOff"] = json!({"maxContainerRestartPeriod": "2s"});
        }
        let path = self.state.join("kubelet.json");
        write(&path, &config.to_string())?;
        self.processes.start(
            "kubelet",
            &self.tools.kubelet,
            [
                format!("--config={}", path.display()),
                format!("--kubeconfig={}", self.pki.kubeconfig("kubelet").display()),
                format!("--hostname-override={NODE}"),
                format!("--node-ip={NODE_ADDRESS}"),
                format!("--root-dir={KUBELET_ROOT}"),
                format!("--cert-dir={}", pki("kubelet")),
            ],
        )?;
        let condition = r#"jsonpath={.status.conditions[?(@.type=="Ready")].status}{.spec.taints}"#;
        self.processes.wait_for("kubelet", "node ready", LIMIT, || {
            let state = self.kubectl(&["get", "node", NODE, "-o", condition]);
            // Ready, and without a taint that keeps pods away.
            state.is_ok_and(|text| text == "True")
        })
    }

    fn plugins(&self) -> PathBuf {
        self.state.join("plugins")
    }

    fn socket(&self) -> PathBuf {
        self.state.join(CONTAINERD_SOCKET)
    }
}

/// Runs containerd's own client and returns its output.
///
/// # Errors
/// What it writes to standard error.
pub(super) fn ctr(
    program: &Path,
    state: &Path,
    args: &[&str],
) -> std::result::Result<String, String> {
    let output = Command::new(program)
        .arg("--address")
        .arg(state.join(CONTAINERD_SOCKET))
        .args(["--namespace", "k8s.io"])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    outcome(&output)
}

/// Returns what a program wrote to standard output or, if it failed, to standard error.
fn outcome(output: &Output) -> std::result::Result<String, String> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// Returns whether this machine, as many sandboxes do, withholds CAP_SYS_RESOURCE. runc cannot give
/// it to privileged containers then, and no process may lower an OOM score.
fn lacks_sys_resource() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bounding = status
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:"))
        .and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    bounding.is_some_and(|set| set & (1 << CAP_SYS_RESOURCE) == 0)
}

/// Puts the wrapper and a link to runc, which it runs, into a directory; returns the wrapper's path.
fn wrap_runc(dir: &Path, runc: &Path) -> Result<PathBuf> {
    let wrapper = dir.join("runc-without-sys-resource");
    fs::create_dir_all(dir)
        .and_then(|()| symlink(runc, dir.join("runc")))
        .and_then(|()| fs::write(&wrapper, RUNC_WRAPPER))
        .and_then(|()| fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)))
        .map_err(|error| failed(&wrapper, &error))?;
    Ok(wrapper)
}

/// Returns the hard limit of open files; kubelet does not start when it asks for more.
fn open_files_limit() -> u64 {
    use nix::sys::resource::{Resource, getrlimit};
    getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(_, hard)| hard.min(1_000_000))
}

fn make_private(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)
        .and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(0o700)))
        .map_err(|error| failed(dir, &error))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| failed(path, &error))
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::Start(format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wrapper_takes_the_capability_out_of_bundle_and_exec() {
        let dir = tempfile::tempdir().unwrap();
        let wrapper = wrap_runc(&dir.path().join("runtime"), Path::new("/bin/echo")).unwrap();
        let spec = dir.path().join("config.json");
        for (before, after) in [
            (
                r#"["CAP_A","CAP_SYS_RESOURCE","CAP_B"]"#,
                r#"["CAP_A","CAP_B"]"#,
            ),
            (r#"["CAP_SYS_RESOURCE"]"#, "[]"),
            (r#"["CAP_A", "CAP_SYS_RESOURCE"]"#, r#"["CAP_A"]"#),
        ] {
            for verb in [
                format!("create --bundle {} id", dir.path().display()),
                format!("exec --process {} id", spec.display()),
            ] {
                fs::write(&spec, before).unwrap();
                let output = Command::new("sh")
                    .arg(&wrapper)
                    .args(format!("--root /x {verb}").split(' '))
                    .output()
                    .unwrap();
                assert_eq!(fs::read_to_string(&spec).unwrap(), after, "{verb}");
                assert_eq!(
                    String::from_utf8_lossy(&output.stdout).trim(),
                    format!("--root /x {verb}")
                );
            }
        }
    }
}
