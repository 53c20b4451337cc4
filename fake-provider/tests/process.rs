//! Runs the program `fake-provider`: command line, signals, and the fault that ends the process.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "all of this file is a test"
)]

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::provider::MountRequest;
use proto::provider::csi_driver_provider_client::CsiDriverProviderClient;
use rstest::rstest;
use tonic::transport::Endpoint;

/// A running program, which is killed when dropped.
struct Process {
    child: Child,
    log: BufReader<std::process::ChildStderr>,
}

impl Process {
    /// Starts the program and waits until it serves.
    fn start(arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut process = Self::spawn(arguments, environment);
        let mut line = String::new();
        process.log.read_line(&mut line).unwrap();
        assert!(line.contains("serving"), "{line}");
        process
    }

    fn spawn(arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_fake-provider"))
            .args(arguments)
            .env_remove("VALIDATE_TOKENS_AUDIENCE")
            .envs(environment.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Self { child, log }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits for the end of the process, and returns its status and the rest of its log.
    fn wait(mut self) -> (ExitStatus, String) {
        let limit = Instant::now() + Duration::from_secs(20);
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < limit, "it did not end");
            std::thread::sleep(Duration::from_millis(10));
        };
        let mut log = String::new();
        self.log.read_to_string(&mut log).unwrap();
        (status, log)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It fails only if the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn mount(socket: &Path, attributes: &[(&str, &str)]) -> Result<usize, tonic::Status> {
    let attributes: HashMap<_, _> = attributes.iter().copied().collect();
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    let channel = endpoint
        .origin("http://localhost".parse().unwrap())
        .connect_lazy();
    let request = MountRequest {
        attributes: serde_json::to_string(&attributes).unwrap(),
        secrets: "null".to_owned(),
        target_path: "/t".to_owned(),
        permission: "420".to_owned(),
        current_object_version: Vec::new(),
    };
    let response = CsiDriverProviderClient::new(channel).mount(request).await?;
    Ok(response.into_inner().files.len())
}

const FOO: (&str, &str) = ("objects", "array: [{objectName: foo}]");

#[rstest]
#[case(Signal::SIGTERM)]
#[case(Signal::SIGINT)]
#[tokio::test(flavor = "multi_thread")]
async fn a_signal_stops_it_and_removes_the_socket(#[case] signal: Signal) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("made/fake.sock");
    // A stale socket: nobody listens on it.
    fs::create_dir(dir.path().join("made")).unwrap();
    drop(UnixListener::bind(&socket).unwrap());
    let endpoint = format!("--endpoint=unix://{}", socket.display());
    let process = Process::start(&["--http-addr=", &endpoint, "-v=5"], &[]);

    assert_eq!(mount(&socket, &[FOO]).await.unwrap(), 1);
    process.signal(signal);
    let (status, log) = process.wait();
    assert!(status.success(), "{status}: {log}");
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_ends_the_process_in_mid_call_and_the_next_one_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let dir_argument = dir.path().to_str().unwrap();
    let arguments = [
        "--dir",
        dir_argument,
        "--name",
        "fake",
        "--http-addr",
        "127.0.0.1:0",
    ];
    let socket = dir.path().join("fake.sock");
    let process = Process::start(&arguments, &[]);
    mount(&socket, &[FOO, ("faults", "[{crash: true}]")])
        .await
        .unwrap_err();
    let (status, log) = process.wait();
    assert_eq!(status.code(), Some(134), "{log}");
    assert!(socket.exists(), "a crash leaves the socket behind");

    let next = Process::start(&arguments, &[]);
    assert_eq!(mount(&socket, &[FOO]).await.unwrap(), 1);
    drop(next);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_has_no_attribute_secret_or_token() {
    let dir = tempfile::tempdir().unwrap();
    let objects = dir.path().join("objects.yaml");
    fs::write(&objects, "- {name: foo, content: hunter2}\n").unwrap();
    let endpoint = format!("unix://{}", dir.path().join("fake.sock").display());
    let arguments = [
        "--endpoint",
        &endpoint,
        "--http-addr=",
        "-v",
        "9",
        "--objects",
        objects.to_str().unwrap(),
    ];
    let environment = [("VALIDATE_TOKENS_AUDIENCE", "aud"), ("RUST_LOG", "trace")];
    let process = Process::start(&arguments, &environment);
    let socket = dir.path().join("fake.sock");

    let tokens = "csi.storage.k8s.io/serviceAccount.tokens";
    assert_eq!(
        mount(&socket, &[(tokens, r#"{"aud":"hunter2"}"#)])
            .await
            .unwrap(),
        1
    );
    let error = mount(&socket, &[(tokens, "hunter2")]).await.unwrap_err();
    assert!(error.message().contains("not a JSON object"), "{error}");
    mount(&socket, &[("objects", "array: [{content: [hunter2]}]")])
        .await
        .unwrap_err();
    process.signal(Signal::SIGTERM);
    let (_, log) = process.wait();
    assert_eq!(log.matches("Mount failed").count(), 2, "{log}");
    assert!(log.contains("files=1"), "{log}");
    assert!(!log.contains("hunter2"), "{log}");
}

#[rstest]
#[case(&["--endpoint=tcp://127.0.0.1:1"], 1, "must be unix://")]
#[case(&["--endpoint=unix://"], 1, "must be unix://")]
#[case(&["--dir=/x", "--name=a/b"], 1, "must be a plain file name")]
#[case(&["--dir=/x"], 2, "--name")]
#[case(&["--nonsense"], 2, "--nonsense")]
#[case(&["--objects=/does/not/exist"], 1, "objects in /does/not/exist: No such file")]
#[case(&["--http-addr=nowhere"], 1, "cannot serve HTTP on nowhere")]
fn a_mistake_on_the_command_line_is_said(
    #[case] arguments: &[&str],
    #[case] code: i32,
    #[case] expected: &str,
) {
    let (status, log) = Process::spawn(arguments, &[]).wait();
    assert_eq!(status.code(), Some(code), "{log}");
    assert!(log.contains(expected), "{log}");
}
