//! Checks the program as a process: which driver's socket is at the path when several start and
//! end, and that neither strangers can stop it by TCP, nor who does not read its log.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proto::csi::{
    GetPluginInfoRequest, NodePublishVolumeRequest, ProbeRequest, identity_client::IdentityClient,
    node_client::NodeClient,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    process::{Child, Command},
    time::timeout,
};
use tonic::{Code, transport::Endpoint};

/// Longer than any step of these tests takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

struct Driver {
    name: &'static str,
    process: Child,
}

impl Driver {
    fn start(dir: &Path, name: &'static str) -> Self {
        Self::start_with(dir, name, "true", &["--metrics-addr="])
    }

    /// Starts a driver with the limits that a shell command sets.
    fn start_with(dir: &Path, name: &'static str, limits: &str, flags: &[&str]) -> Self {
        Self::start_logging_to(Stdio::null(), dir, name, limits, flags)
    }

    fn start_logging_to(
        log: Stdio,
        dir: &Path,
        name: &'static str,
        limits: &str,
        flags: &[&str],
    ) -> Self {
        let process = Command::new("sh")
            .args(["-c", "eval $0 && exec \"$@\"", limits])
            .arg(env!("CARGO_BIN_EXE_secrets-store-csi"))
            .arg(format!("--endpoint=unix://{}", socket(dir).display()))
            .arg(format!("--state-dir={}", dir.join(name).display()))
            .args(["--nodeid=node", "--drivername", name])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { name, process }
    }

    async fn end(mut self, by: Signal) {
        let id = self.process.id().unwrap();
        kill(Pid::from_raw(id.try_into().unwrap()), by).unwrap();
        self.process.wait().await.unwrap();
    }
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("csi.sock")
}

/// Returns the name of the driver that answers at the path.
async fn who_answers(dir: &Path) -> Option<String> {
    let uri = format!("unix://{}", socket(dir).display());
    let channel = Endpoint::from_shared(uri).unwrap().connect().await.ok()?;
    let mut identity = IdentityClient::new(channel);
    let info = identity.get_plugin_info(GetPluginInfoRequest {}).await;
    Some(info.ok()?.into_inner().name)
}

async fn wait_for(dir: &Path, name: &str) {
    let since = Instant::now();
    while who_answers(dir).await.as_deref() != Some(name) {
        assert!(since.elapsed() < PATIENCE, "{name} never answered");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Returns every order in which two drivers start and end.
fn schedules() -> Vec<[&'static str; 4]> {
    let mut all = Vec::new();
    for first in ["start a", "start b"] {
        let second = if first == "start a" {
            "start b"
        } else {
            "start a"
        };
        let (one, two) = (&first[6..], &second[6..]);
        let end = |name| if name == "a" { "end a" } else { "end b" };
        all.push([first, end(one), second, end(two)]);
        all.push([first, second, end(one), end(two)]);
        all.push([first, second, end(two), end(one)]);
    }
    all
}

/// The driver that started last answers at the path for as long as it runs. When it ends, by either
/// signal, the other one soon answers there, if it runs. A driver that ends by SIGTERM leaves no
/// socket of its own there.
#[tokio::test]
async fn the_driver_that_came_last_keeps_the_path() {
    let signals = [Signal::SIGTERM, Signal::SIGKILL];
    let mut all = tokio::task::JoinSet::new();
    for schedule in schedules() {
        for end_of_a in signals {
            for end_of_b in signals {
                all.spawn(come_and_go(schedule, end_of_a, end_of_b));
            }
        }
    }
    while let Some(ended) = all.join_next().await {
        ended.unwrap();
    }
}

async fn come_and_go(schedule: [&str; 4], end_of_a: Signal, end_of_b: Signal) {
    let dir = tempfile::tempdir().unwrap();
    let mut running: Vec<Driver> = Vec::new();
    let mut owner: Option<&str> = None;
    for step in schedule {
        let context = format!("{schedule:?} with {end_of_a}, {end_of_b}, at {step:?}");
        match step.split_once(' ').unwrap() {
            ("start", name) => {
                let name = if name == "a" { "driver.a" } else { "driver.b" };
                running.push(Driver::start(dir.path(), name));
                wait_for(dir.path(), name).await;
                owner = Some(name);
            }
            (_, letter) => {
                let name = format!("driver.{letter}");
                let at = running.iter().position(|driver| driver.name == name);
                let by = if letter == "a" { end_of_a } else { end_of_b };
                running.remove(at.unwrap()).end(by).await;
                if owner == Some(name.as_str()) {
                    owner = running.first().map(|survivor| survivor.name);
                    match owner {
                        Some(survivor) => wait_for(dir.path(), survivor).await,
                        None => {
                            let left = socket(dir.path()).exists();
                            assert_eq!(left, by == Signal::SIGKILL, "{context}");
                        }
                    }
                }
            }
        }
        let answers = who_answers(dir.path()).await;
        assert_eq!(answers.as_deref(), owner, "{context}");
    }
}

/// Returns an address that is free now.
fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// Returns the status and the text of an answer, or `None` if the connection ended without one.
async fn ask(address: &str, request: &[u8]) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    // A server that has answered already may close the connection.
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    assert!(read.is_ok(), "{address} neither answers nor ends");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1)?.parse().ok()?;
    Some((status, answer))
}

async fn get(address: &str, path: &str) -> u16 {
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    let answer = ask(address, request.as_bytes()).await;
    answer.map_or(0, |(status, _)| status)
}

/// Returns a number of `/proc/<pid>/status`, or the clock ticks that the process has used.
fn of_process(driver: &Driver, what: &str) -> u64 {
    let pid = driver.process.id().unwrap();
    let read = |name| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
    if what == "ticks" {
        let stat = read("stat");
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        return fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    }
    let status = read("status");
    let line = status.lines().find_map(|line| line.strip_prefix(what));
    line.unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

/// Raises the limit of open files of this process, and returns it.
fn own_descriptors() -> u64 {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let wanted = hard.min(8192);
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).unwrap();
    wanted
}

/// Opens 1,100 connections to each port of a driver that may have 1,024 open files. Some of them are
/// silent, some begin a request, and some never end its head.
#[tokio::test]
async fn strangers_cannot_stop_the_driver_by_tcp() {
    // A lower limit of this process allows fewer.
    let each = 1100.min(own_descriptors() / 2 - 100);
    let dir = tempfile::tempdir().unwrap();
    let (metrics, healthz) = (free_address(), free_address());
    let flags = [
        &format!("--metrics-addr={metrics}"),
        &format!("--healthz-addr={healthz}"),
    ];
    let flags = flags.map(String::as_str);
    let driver = Driver::start_with(dir.path(), "driver.a", "ulimit -n 1024", &flags);
    wait_for(dir.path(), "driver.a").await;

    let mut held = Vec::new();
    for at in 0..each {
        for address in [&metrics, &healthz] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let begin: &[u8] = match at % 3 {
                0 => b"",
                1 => b"GET /metr",
                _ => b"GET /metrics HTTP/1.1\r\nHost: x\r\n",
            };
            let _ = stream.write_all(begin).await;
            held.push(stream);
        }
    }
    let before = of_process(&driver, "ticks");
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(3) {
        assert_eq!(get(&metrics, "/metrics").await, 200);
        assert_eq!(get(&healthz, "/healthz").await, 200);
        let uri = format!("unix://{}", socket(dir.path()).display());
        let channel = Endpoint::from_shared(uri).unwrap().connect().await.unwrap();
        let probed = IdentityClient::new(channel).probe(ProbeRequest {}).await;
        assert!(probed.is_ok(), "{probed:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // A process that spins uses a hundred ticks in each second.
    let used = of_process(&driver, "ticks") - before;
    assert!(used < 150, "{used} ticks in {:?}", since.elapsed());
    drop(held);

    // Sends heads without an end on many connections.
    let mut heads = tokio::task::JoinSet::new();
    for _ in 0..each.min(300) {
        let metrics = metrics.clone();
        heads.spawn(async move {
            let mut stream = TcpStream::connect(&metrics).await.unwrap();
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\n").await;
            let field = [b"a: ".as_slice(), &[b'a'; 4000], b"\r\n"].concat();
            for _ in 0..95 {
                if stream.write_all(&field).await.is_err() {
                    break;
                }
            }
            stream
        });
    }
    let _streams = heads.join_all().await;
    assert_eq!(get(&metrics, "/metrics").await, 200);
    let peak = of_process(&driver, "VmHWM:");
    assert!(peak < 80 * 1024, "{peak} KiB");
}

/// Invalid requests are refused or their connection is closed soon, and valid ones are answered.
#[tokio::test]
async fn requests_that_are_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let metrics = free_address();
    let flag = format!("--metrics-addr={metrics}");
    let driver = Driver::start_with(dir.path(), "driver.a", "true", &[&flag]);
    wait_for(dir.path(), "driver.a").await;
    let get_metrics: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
    let large_head = [
        b"GET /metrics HTTP/1.1\r\na: ".as_slice(),
        &[b'a'; 40_000],
        b"\r\n\r\n",
    ]
    .concat();
    let many_fields = [
        b"GET /metrics HTTP/1.1\r\n".as_slice(),
        &b"a: b\r\n".repeat(500),
        b"\r\n",
    ]
    .concat();
    let long_path = [b"GET /".as_slice(), &[b'a'; 100_000], b" HTTP/1.1\r\n\r\n"].concat();
    let http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let body = [
        b"GET /metrics HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n".as_slice(),
        &[0; 100_000],
    ]
    .concat();
    let post = b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello";
    let cases: [(&str, &[u8], &[u16]); 11] = [
        ("a request", get_metrics, &[200]),
        ("many at once", &get_metrics.repeat(1000), &[200]),
        (
            "only the head of one",
            b"HEAD /metrics HTTP/1.1\r\n\r\n",
            &[200],
        ),
        (
            "a page that is not there",
            b"GET / HTTP/1.0\r\n\r\n",
            &[404],
        ),
        ("a body", &body, &[200]),
        ("another method", post, &[405]),
        ("a large head", &large_head, &[431]),
        ("many fields", &many_fields, &[431]),
        ("a long path", &long_path, &[414, 431]),
        ("HTTP/2", http2, &[0, 400, 505]),
        ("garbage", &[0xff; 10_000], &[0, 400]),
    ];
    for (name, request, expected) in cases {
        let status = ask(&metrics, request).await.map_or(0, |(status, _)| status);
        assert!(expected.contains(&status), "{name}: {status}");
    }
    // The driver closes a connection that stops within the head.
    let since = Instant::now();
    assert!(
        ask(&metrics, b"GET /metr")
            .await
            .is_none_or(|(status, _)| status == 408)
    );
    assert!(since.elapsed() < PATIENCE / 2, "{:?}", since.elapsed());
    // A client that does not read its answer does not cost memory.
    let mut deaf = TcpStream::connect(&metrics).await.unwrap();
    deaf.write_all(get_metrics).await.unwrap();
    let peak = of_process(&driver, "VmHWM:");
    assert!(peak < 80 * 1024, "{peak} KiB");
}

/// The driver raises its limit of open files to the hard limit, up to 65,536.
#[tokio::test]
async fn the_soft_limit_of_files_is_raised() {
    let dir = tempfile::tempdir().unwrap();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let driver = Driver::start_with(
        dir.path(),
        "driver.a",
        "ulimit -S -n 256",
        &["--metrics-addr="],
    );
    wait_for(dir.path(), "driver.a").await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", driver.process.id().unwrap()));
    let limits = limits.unwrap();
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let soft: u64 = line
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(soft, hard.min(65_536));
}

/// Runs the program in an empty directory until it ends by itself. Returns its exit code and what it wrote
/// to standard error.
async fn run(dir: &Path, args: &[&str], stdout: Stdio) -> (Option<i32>, String) {
    let program = Command::new(env!("CARGO_BIN_EXE_secrets-store-csi"))
        .args(args)
        .current_dir(dir)
        .env("TMPDIR", dir)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let ended = timeout(PATIENCE, program.wait_with_output()).await;
    let output = ended.unwrap_or_else(|_| panic!("{args:?}: the program goes on"));
    let output = output.unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    (output.status.code(), stderr)
}

/// `help | head`: the reader has gone before anything is written.
#[tokio::test]
async fn a_reader_that_goes_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    for flag in ["--help", "--version"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let outcome = run(dir.path(), &[flag], writer.into()).await;
        assert_eq!(outcome, (Some(0), String::new()), "{flag}");
    }
    let full = std::fs::File::options().write(true).open("/dev/full");
    let outcome = run(dir.path(), &["--help"], full.unwrap().into()).await;
    assert_eq!(outcome, (Some(1), String::new()));
}

#[tokio::test]
async fn an_argument_that_is_no_flag_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = format!("--endpoint=unix://{}", socket(dir.path()).display());
    let records = dir.path().join("records");
    for argument in ["help", "status", "-", "--log-format-json", "false"] {
        let args = [&endpoint, "--log-format-json", argument, "again"];
        let (code, stderr) = run(dir.path(), &args, Stdio::null()).await;
        assert_eq!(code, Some(2), "{argument}: {stderr}");
        assert!(stderr.starts_with("unexpected argument"), "{stderr}");
        assert!(!records.exists() && !socket(dir.path()).exists());
    }
}

/// Makes calls that are refused, whose lines have some MiB together.
async fn make_calls_that_log(dir: &Path) {
    let uri = format!("unix://{}", socket(dir).display());
    let channel = Endpoint::from_shared(uri).unwrap().connect().await.unwrap();
    let mut node = NodeClient::new(channel);
    for _ in 0..150 {
        let request = NodePublishVolumeRequest {
            volume_id: "v".repeat(10_000),
            ..Default::default()
        };
        let answer = timeout(PATIENCE, node.node_publish_volume(request)).await;
        // A call that waits for the log ends here.
        let refused = answer.unwrap().unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
}

/// A container runtime that does not read the log holds up neither calls nor the end of the driver.
#[tokio::test]
async fn a_log_that_nobody_reads_holds_nothing_up() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--metrics-addr=", "-v=6"];
    let name = "driver.a";
    let mut driver = Driver::start_logging_to(Stdio::piped(), dir.path(), name, "true", &flags);
    wait_for(dir.path(), name).await;
    make_calls_that_log(dir.path()).await;
    assert!(of_process(&driver, "VmHWM:") < 40 * 1024);

    let mut log = BufReader::new(driver.process.stderr.take().unwrap()).lines();
    let mut whole = 0;
    let lost = loop {
        let line = timeout(PATIENCE, log.next_line()).await.unwrap();
        let line = line.unwrap().unwrap();
        if line.contains("log lines were lost here") {
            break line;
        }
        let is_whole = line.starts_with(['I', 'W', 'E']) && line.matches(".rs:").count() == 1;
        assert!(is_whole, "{line}");
        whole += 1;
    };
    // A call has two lines.
    let (_, lost) = lost.split_once(" lost=").unwrap();
    let lost: usize = lost.parse().unwrap();
    assert!(whole > 20 && whole + lost >= 300, "{whole} and {lost}");

    make_calls_that_log(dir.path()).await;
    let since = Instant::now();
    driver.end(Signal::SIGTERM).await;
    assert!(since.elapsed() < PATIENCE / 2, "{:?}", since.elapsed());
}
