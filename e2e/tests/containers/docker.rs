//! A Docker daemon with our images: the one that runs on this machine, or one that is started for
//! the tests.
//!
//! testcontainers finds its daemon only by `DOCKER_HOST`, and a process cannot safely change its
//! own environment. Therefore each test runs again in a process of its own with that variable; this
//! also keeps tests from sharing a connection whose runtime is gone.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use futures::StreamExt;
use nix::unistd::geteuid;
use testcontainers::bollard::query_parameters::{ImportImageOptions, RemoveImageOptions};
use testcontainers::bollard::{API_DEFAULT_VERSION, Docker, body_full};

use e2e::images::Images;

/// Set in the process in which a test runs for the second time.
const INNER: &str = "E2E_CONTAINERS_INNER";
const HOST: &str = "DOCKER_HOST";
const USUAL_SOCKET: &str = "/var/run/docker.sock";
/// The time in which a daemon has to answer, or to load an image.
const LIMIT_SECONDS: u64 = 60;

/// Starts a daemon; stops it at the end of standard input, which comes with the end of the test
/// process; then removes the daemon's directory. `$1` is that directory, the rest is the daemon's
/// command line.
const KEEPER: &str = r#"
dir=$1; shift
"$@" >"$dir/log" 2>&1 </dev/null &
daemon=$!
cat >/dev/null
kill "$daemon"; wait "$daemon"
grep -o " $dir/[^ ]*" /proc/self/mounts | sort -r | xargs -r umount -l
rm -rf "$dir"
"#;

/// A daemon that has the images.
struct Daemon {
    host: String,
    /// The process that stops a daemon of our own at the end of its standard input.
    _keeper: Option<Child>,
}

static DAEMON: OnceLock<Result<Daemon, String>> = OnceLock::new();

/// Runs a test with a Docker daemon; skips it where there is none.
pub(crate) fn on_docker<T: AsyncFnOnce()>(test: T) {
    if env::var_os(INNER).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap();
        return runtime.block_on(test());
    }
    // `containers::<test>::{{closure}}`
    let name = std::any::type_name::<T>().split("::").nth(1).unwrap();
    let daemon = match DAEMON.get_or_init(Daemon::get) {
        Ok(daemon) => daemon,
        Err(why) => {
            return e2e::skipped::skip(why);
        }
    };
    let output = Command::new(env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(INNER, "1")
        .env(HOST, &daemon.host)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

impl Daemon {
    /// Finds or starts a daemon and loads the images.
    ///
    /// # Errors
    /// The reason why there is none.
    fn get() -> Result<Self, String> {
        if !geteuid().is_root() {
            return Err("the driver's socket is for root only, and this is not root".to_owned());
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let given = env::var(HOST).ok();
        let usual = given.unwrap_or_else(|| format!("unix://{USUAL_SOCKET}"));
        let daemon = if runtime.block_on(answers(&usual)) {
            Self {
                host: usual,
                _keeper: None,
            }
        } else if env::var_os(HOST).is_some() {
            return Err(format!("no Docker daemon answers at $DOCKER_HOST, {usual}"));
        } else {
            Self::start(&runtime)
                .map_err(|why| format!("no Docker daemon answers at {usual}, and {why}"))?
        };
        let images = e2e::images::build(|_| {}).expect("the images cannot be built");
        runtime.block_on(load(&daemon.host, &images));
        Ok(daemon)
    }

    /// Starts a daemon that changes nothing on the host outside of its directory, and no network.
    fn start(runtime: &tokio::runtime::Runtime) -> Result<Self, String> {
        let Some(program) = on_path("dockerd") else {
            return Err("there is no dockerd to start one (Debian: apt install docker.io)".into());
        };
        let dir = tempfile::Builder::new()
            .prefix("e2e-docker-")
            .tempdir_in("/var/tmp")
            .unwrap()
            .keep();
        let at = |name: &str| dir.join(name).display().to_string();
        let host = format!("unix://{}", at("docker.sock"));
        let name = dir.file_name().unwrap().display();
        let mut keeper = Command::new("sh")
            .args(["-c", KEEPER, "keeper"])
            .arg(&dir)
            .arg(program)
            .arg(format!("--host={host}"))
            .arg(format!("--data-root={}", at("data")))
            .arg(format!("--exec-root={}", at("exec")))
            .arg(format!("--pidfile={}", at("pid")))
            // dockerd uses a containerd that already runs.
            .arg(format!("--containerd-namespace={name}"))
            .arg(format!("--containerd-plugins-namespace=plugins.{name}"))
            .args(["--bridge=none", "--iptables=false", "--ip6tables=false"])
            .args(["--ip-forward=false", "--ip-masq=false"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(LIMIT_SECONDS);
        while !runtime.block_on(answers(&host)) {
            let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
            if log.contains("failed to start daemon") || Instant::now() > deadline {
                drop(keeper.stdin.take());
                keeper.wait().unwrap();
                let last = log.lines().last().unwrap_or("it said nothing");
                return Err(format!("a dockerd started here does not come up: {last}"));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(Self {
            host,
            _keeper: Some(keeper),
        })
    }
}

async fn answers(host: &str) -> bool {
    match connect(host) {
        Some(docker) => docker.ping().await.is_ok(),
        None => false,
    }
}

fn connect(host: &str) -> Option<Docker> {
    match host.strip_prefix("unix://") {
        // Checked before, because connecting to an absent socket fails.
        Some(path) if !Path::new(path).exists() => None,
        Some(path) => Docker::connect_with_unix(path, LIMIT_SECONDS, API_DEFAULT_VERSION).ok(),
        None => Docker::connect_with_http(host, LIMIT_SECONDS, API_DEFAULT_VERSION).ok(),
    }
}

async fn load(host: &str, images: &Images) {
    let docker = connect(host).unwrap();
    for image in &images.archives {
        let before = docker.inspect_image(&image.name).await.ok();
        let archive = fs::read(&image.archive).unwrap();
        let options = ImportImageOptions::default();
        let answers: Vec<_> = docker
            .import_image(options, body_full(archive.into()), None)
            .collect()
            .await;
        for answer in answers {
            answer.unwrap_or_else(|error| panic!("load image {}: {error}", image.name));
        }
        // Without this, each change of the code would leave an image without a name.
        let after = docker.inspect_image(&image.name).await.unwrap();
        if let Some(old) = before.and_then(|before| before.id)
            && after.id.as_ref() != Some(&old)
        {
            // Docker refuses it for an image with another name or a container, which others use.
            let _ = docker
                .remove_image(&old, None::<RemoveImageOptions>, None)
                .await;
        }
    }
}

fn on_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}
