//! The checker against providers: the fake one passes, and one with a flaw fails the checks that
//! name the flaw.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "all of this file is a test"
)]

#[path = "conformance/flawed.rs"]
mod flawed;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fake_provider::check::{Checked, GROUPS, Outcome, Selection, Settings, run};
use fake_provider::fake;
use flawed::Flaw;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// The Secret and the token of the settings, for the flaws that are about them.
const SECRET: &str = "ocean-3f9a";
const TOKEN: &str = "amber-7c21";

/// A Secret that is written in another way where it is escaped: its lines are too short to be found.
const PEM: &str = "ocean\n\"3f9a\"\nend";

type Map = BTreeMap<String, String>;

fn map(pairs: &[(&str, &str)]) -> Map {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}

fn settings(socket: PathBuf, dir: &Path) -> Settings {
    Settings {
        socket,
        parameters: Map::new(),
        missing: None,
        outage: None,
        secrets: None,
        tokens: Map::new(),
        pod: map(&[("csi.storage.k8s.io/pod.uid", "uid-1")]),
        target_dir: dir.to_owned(),
        log: None,
        restart: None,
        change: None,
        timeout: Duration::from_secs(10),
        total_timeout: Duration::from_secs(300),
        selection: Selection::default(),
    }
}

fn with(results: &[Checked], outcome: Outcome) -> Vec<&str> {
    let some = results.iter().filter(|result| result.outcome == outcome);
    some.map(|result| result.name).collect()
}

/// A directory that only its owner may write to, whatever the temporary directory's mode is.
fn directory() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fake_provider_passes() {
    let dir = directory();
    let objects = dir.path().join("objects");
    fs::create_dir_all(objects.join("tls")).unwrap();
    fs::write(objects.join("user"), "alice").unwrap();
    fs::write(objects.join("tls/key"), "k").unwrap();
    let socket = dir.path().join("fake.sock");
    let mut options = fake::Options::new(&socket);
    options.objects = Some(objects.clone());
    let stop = CancellationToken::new();
    let serving = tokio::spawn(fake::bind(options).await.unwrap().run(stop.clone()));

    let mut settings = settings(socket, dir.path());
    settings.missing = Some(map(&[(
        "faults",
        "[{status: {code: NOT_FOUND, message: no such object}}]",
    )]));
    settings.outage = Some(map(&[("faults", "[{status: {code: UNAVAILABLE}}]")]));
    settings.change = Some(format!("echo bob > {}/user", objects.display()));
    let results = run(settings, |_| {}).await;
    assert_eq!(with(&results, Outcome::Failed), [""; 0], "{results:#?}");
    let skipped = [
        "unknown-secrets",
        "error-code",
        "secrets-not-in-log",
        "restart-answers",
        "restart-same-socket",
        "restart-same-objects",
    ];
    assert_eq!(with(&results, Outcome::Skipped), skipped, "{results:#?}");
    stop.cancel();
    serving.await.unwrap().unwrap();
}

#[rstest]
#[case(Flaw::None, &[])]
#[case(Flaw::AnyOrder, &[])]
#[case(Flaw::ReadsMounted, &[])]
#[case(Flaw::WritesItself, &[])]
#[case(Flaw::WritesLinks, &[])]
#[case(Flaw::WritesDevice, &["mount-succeeds"])]
#[case(Flaw::SocketType, &["socket-type", "authority-localhost"])]
#[case(Flaw::SocketMode, &["socket-mode"])]
#[case(Flaw::SocketName, &["socket-name"])]
#[case(Flaw::SocketDirectory, &["socket-directory"])]
#[case(Flaw::OtherInterface, &["version-interface"])]
#[case(Flaw::NoName, &["version-names"])]
#[case(Flaw::UnknownMethod, &["unknown-method"])]
#[case(Flaw::OneConnection, &["idle-connections"])]
#[case(Flaw::RefusesUnknownFields, &["unknown-fields"])]
#[case(Flaw::FailsUnknownFields, &["unknown-fields"])]
#[case(Flaw::OneCall, &["calls-at-once", "calls-on-one-connection", "calls-of-two-classes", "modes-concurrent"])]
#[case(Flaw::MixesClasses, &["calls-of-two-classes"])]
#[case(Flaw::MixesContents, &["calls-at-once", "calls-on-one-connection", "calls-of-two-classes"])]
#[case(Flaw::BlocksVersion, &["version-during-mounts"])]
#[case(Flaw::DirectoryAbove, &["socket-directory"])]
#[case(Flaw::SuffersFromDeadlines, &["expired-deadline"])]
#[case(Flaw::SuffersFromCancelledCalls, &["cancelled-calls"])]
#[case(Flaw::RefusesUnknownAttributes, &["unknown-attributes", "large-attributes"])]
#[case(Flaw::RefusesUnknownSecrets, &["unknown-secrets", "large-secrets"])]
#[case(Flaw::RefusesEmptySecrets, &["secrets-empty"])]
#[case(Flaw::RefusesPermission, &["permission-other", "modes-asked-for", "modes-concurrent"])]
#[case(Flaw::OnlyChanges, &["versions-sent"])]
#[case(Flaw::NothingIfUnchanged, &["versions-sent"])]
#[case(Flaw::EchoesVersions, &["versions-of-others"])]
#[case(Flaw::SmallRequests, &["large-attributes", "large-secrets"])]
#[case(Flaw::AcceptsAnything, &["malformed-attributes", "empty-request"])]
#[case(Flaw::EmptyErrorCode, &["malformed-attributes", "empty-request"])]
#[case(Flaw::HangsOnMalformedAttributes, &["malformed-attributes", "empty-request", "secrets-not-in-errors"])]
#[case(Flaw::HangsOnMalformedSecrets, &["malformed-secrets", "secrets-not-in-errors"])]
#[case(Flaw::NoFiles, &["files-present", "change-new-version"])]
#[case(Flaw::WritesBesideAnswer, &["no-files-beside-answer"])]
#[case(Flaw::LargeAnswer, &["answer-bounded"])]
#[case(Flaw::NoVersions, &["versions-present"])]
#[case(Flaw::SameIds, &["version-ids"])]
#[case(Flaw::ManyVersions, &["versions-bounded"])]
#[case(Flaw::Path("/etc/x"), &["paths-relative"])]
#[case(Flaw::Path("a/../b"), &["paths-clean"])]
#[case(Flaw::Path("../b"), &["paths-clean"])]
#[case(Flaw::Path("a//b"), &["paths-clean"])]
#[case(Flaw::Path("..data/x"), &["paths-reserved"])]
#[case(Flaw::Path("a/..b"), &["paths-reserved"])]
#[case(Flaw::Path("a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a/a"), &["paths-short"])]
#[case(Flaw::Path("a\nb"), &["paths-printable"])]
#[case(Flaw::Path("a\u{fffd}"), &["paths-printable"])]
#[case(Flaw::Path("user"), &["paths-unique"])]
#[case(Flaw::Path("user/name"), &["paths-unique"])]
#[case(Flaw::Mode(0o1777), &["modes-in-range"])]
#[case(Flaw::OddMode, &["modes-asked-for"])]
#[case(Flaw::GlobalMode, &["modes-concurrent"])]
#[case(Flaw::ContentChanges, &["content-stable", "restart-same-objects"])]
#[case(Flaw::VersionsChange, &["versions-stable", "restart-same-objects"])]
#[case(Flaw::MissingSucceeds, &["missing-object"])]
#[case(Flaw::ErrorCode(""), &["missing-object", "error-code"])]
#[case(Flaw::MissingUnavailable, &["missing-object-code"])]
#[case(Flaw::Message(""), &["error-message"])]
#[case(Flaw::Message("two\nlines"), &["error-message"])]
#[case(Flaw::ErrorCode("not a label"), &["error-code"])]
#[case(Flaw::ErrorCode("NotFound"), &[])]
#[case(Flaw::NoParametersUnavailable, &["no-parameters"])]
#[case(Flaw::OutageNotFound, &["outage-code"])]
#[case(Flaw::RefusesTokens, &["tokens-accepted"])]
#[case(Flaw::EchoesTokens, &["tokens-not-in-answers", "change-new-version"])]
#[case(Flaw::QuotesTokens, &["tokens-not-in-errors"])]
#[case(Flaw::QuotesSecrets, &["secrets-not-in-errors"])]
#[case(Flaw::LogsSecrets, &["secrets-not-in-log"])]
#[case(Flaw::EchoesOwnToken, &["tokens-not-in-answers", "change-new-version"])]
#[case(Flaw::LogsOwnToken, &["secrets-not-in-log"])]
#[case(Flaw::LogsOwnSecret, &["secrets-not-in-log"])]
#[case(Flaw::LogsEscaped, &["secrets-not-in-log"])]
#[case(Flaw::LogsEncoded, &["secrets-not-in-log"])]
#[case(Flaw::ShowsInFailure("token"), &["secrets-not-in-failures"])]
#[case(Flaw::ShowsInFailure("attributes"), &["secrets-not-in-failures"])]
#[case(Flaw::ShowsInFailure("secrets"), &["secrets-not-in-failures"])]
#[case(Flaw::ShowsInFailure("basic"), &["secrets-not-in-failures"])]
#[case(Flaw::ShowsInFailure("details"), &["secrets-not-in-failures"])]
#[case(Flaw::ShowsInFailure("trailer"), &["secrets-not-in-failures"])]
#[case(Flaw::ShowsInOutage, &["secrets-not-in-failures"])]
#[case(Flaw::Version("plain"), &["versions-reveal-nothing"])]
#[case(Flaw::Version("base64"), &["versions-reveal-nothing"])]
#[case(Flaw::Version("md5"), &["versions-reveal-nothing"])]
#[case(Flaw::Version("sha1"), &["versions-reveal-nothing"])]
#[case(Flaw::Version("ten digits"), &["versions-reveal-nothing"])]
#[case(Flaw::Version("sha256"), &["versions-reveal-nothing"])]
#[case(Flaw::RefusesAndQuotes, &["mount-succeeds", "outage-code", "tokens-not-in-errors", "secrets-not-in-failures"])]
#[case(Flaw::ChangeKeepsVersion, &["change-new-version"])]
#[case(Flaw::OtherSocketAfterRestart, &["restart-same-socket"])]
#[case(Flaw::OtherVersionAfterRestart, &["restart-same-objects"])]
#[tokio::test(flavor = "multi_thread")]
async fn a_flaw_fails_the_checks_that_name_it(#[case] flaw: Flaw, #[case] expected: &[&str]) {
    let dir = directory();
    let flawed = flawed::start(flaw, dir.path());
    let mut settings = settings(flawed.socket.clone(), dir.path());
    settings.parameters = map(&[("objects", "user")]);
    settings.missing = Some(map(&[("objects", "missing")]));
    settings.outage = Some(map(&[("objects", "outage")]));
    settings.log = Some(flawed.log.clone());
    settings.change = Some(format!("echo 2 > {}", flawed.store.display()));
    settings.restart = Some(flawed.restart.clone());
    settings.timeout = flaw.patience();
    if [Flaw::SuffersFromCancelledCalls, Flaw::BlocksVersion].contains(&flaw) {
        settings.selection.only = expected.iter().map(|&name| name.to_owned()).collect();
    }
    if [
        Flaw::RefusesUnknownSecrets,
        Flaw::LogsOwnSecret,
        Flaw::RefusesAndQuotes,
        Flaw::ShowsInFailure("secrets"),
    ]
    .contains(&flaw)
    {
        settings.secrets = Some(map(&[("password", SECRET)]));
    }
    if flaw == Flaw::LogsEscaped {
        settings.secrets = Some(map(&[("password", PEM)]));
    }
    if matches!(
        flaw,
        Flaw::EchoesOwnToken
            | Flaw::LogsOwnToken
            | Flaw::LogsEncoded
            | Flaw::RefusesAndQuotes
            | Flaw::ShowsInOutage
            | Flaw::ShowsInFailure("token" | "basic" | "details" | "trailer")
    ) {
        settings.tokens = map(&[("vault", TOKEN)]);
    }
    let mut reported = Vec::new();
    let results = run(settings, |checked| reported.push(checked.name)).await;
    assert_eq!(with(&results, Outcome::Failed), expected, "{results:#?}");
    assert!(
        reported
            .iter()
            .eq(results.iter().map(|result| &result.name))
    );
    let report = serde_json::to_string(&results).unwrap();
    for part in [&SECRET[..5], &TOKEN[..5], "canary"] {
        assert!(!report.contains(part), "{report}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_does_not_answer_fails_one_check_and_skips_the_rest() {
    let dir = directory();
    let socket = dir.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o600)).unwrap();
    let results = run(settings(socket, dir.path()), |_| {}).await;
    assert_eq!(with(&results, Outcome::Failed), ["authority-localhost"]);
    assert_eq!(with(&results, Outcome::Passed).len(), 5, "{results:#?}");
}

/// Returns the reason of a check.
fn reason<'a>(results: &'a [Checked], name: &str) -> &'a str {
    let result = results.iter().find(|result| result.name == name);
    result.unwrap().reason.as_deref().unwrap_or_default()
}

#[rstest]
#[case(
    Flaw::SuffersFromDeadlines,
    "since expired-deadline, no Mount succeeds"
)]
#[case(Flaw::HangsOnMalformedAttributes, "the time is over")]
#[tokio::test(flavor = "multi_thread")]
async fn checks_that_tell_nothing_any_more_are_skipped(#[case] flaw: Flaw, #[case] why: &str) {
    let dir = directory();
    let flawed = flawed::start(flaw, dir.path());
    let mut settings = settings(flawed.socket.clone(), dir.path());
    settings.parameters = map(&[("objects", "user")]);
    if flaw == Flaw::HangsOnMalformedAttributes {
        settings.total_timeout = Duration::from_secs(2);
        settings.selection.only = vec!["malformed-attributes".to_owned(), "answer".to_owned()];
    }
    let results = run(settings, |_| {}).await;
    assert_eq!(with(&results, Outcome::Failed).len(), 1, "{results:#?}");
    assert_eq!(reason(&results, "content-stable"), why, "{results:#?}");
}

#[rstest]
#[case::fails("touhc x", "ended with", &["restart-answers", "restart-same-socket", "restart-same-objects"])]
#[case::changes_nothing("true", "the content is the same", &[])]
#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_does_not_do_what_it_should_fails(
    #[case] command: &str,
    #[case] why: &str,
    #[case] also: &[&str],
) {
    let dir = directory();
    let flawed = flawed::start(Flaw::None, dir.path());
    let mut settings = settings(flawed.socket.clone(), dir.path());
    settings.parameters = map(&[("objects", "user")]);
    settings.change = Some(command.to_owned());
    settings.restart = Some(command.to_owned());
    settings.selection.only = vec!["restart".to_owned()];
    let results = run(settings, |_| {}).await;
    let expected = [&["change-new-version"], also].concat();
    assert_eq!(with(&results, Outcome::Failed), expected, "{results:#?}");
    let told = reason(&results, "change-new-version");
    assert!(told.contains(why), "{told}");
}

/// The report comes line by line, and no target path stays, which may have secrets.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_program_reports_at_once_and_cleans_up_when_it_is_interrupted(
    #[values(Signal::SIGINT, Signal::SIGTERM)] signal: Signal,
) {
    let dir = directory();
    let flawed = flawed::start(Flaw::HangsOnMalformedAttributes, dir.path());
    let targets = dir.path().join("targets");
    fs::create_dir(&targets).unwrap();
    let parameters = dir.path().join("parameters");
    fs::write(&parameters, "objects: user").unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_provider-check"))
        .arg(&flawed.socket)
        .args(["--only", "socket,malformed-attributes", "--parameters"])
        .arg(&parameters)
        .arg("--target-dir")
        .arg(&targets)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    for _ in 0..5 {
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        assert!(line.starts_with("ok      socket-"), "{line}");
    }
    // The Mount after the first one hangs, and its target path is there.
    let limit = Instant::now() + Duration::from_secs(20);
    while !flawed.hangs() || fs::read_dir(&targets).unwrap().count() == 0 {
        assert!(Instant::now() < limit, "no Mount is under way");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(2));
    let left: Vec<_> = fs::read_dir(&targets).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_report_that_is_lost_is_exit_code_2_and_a_reader_may_leave() {
    let dir = directory();
    let socket = dir.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let socket = socket.display().to_string();
    for arguments in [&["--list"][..], &[&*socket, "--only", "socket-type"]] {
        let run = |out: Stdio| {
            let mut program = Command::new(env!("CARGO_BIN_EXE_provider-check"));
            let output = program.args(arguments).stdout(out).output().unwrap();
            (
                output.status.code(),
                String::from_utf8(output.stderr).unwrap(),
            )
        };
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let (code, err) = run(full.into());
        assert_eq!(code, Some(2), "{arguments:?}");
        assert!(err.contains("cannot write the report: No space"), "{err}");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let (code, err) = run(writer.into());
        assert_eq!((code, &*err), (Some(0), ""), "{arguments:?}");
    }
}

fn provider_check(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_provider-check"))
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// Kills the process of a file when it is dropped.
struct Kill(PathBuf);

impl Drop for Kill {
    fn drop(&mut self) {
        let kill = format!("kill -9 $(cat {})", self.0.display());
        let _ = Command::new("/bin/sh").args(["-c", &kill]).status();
    }
}

/// The program restarts the other program: `kill -9` leaves the socket behind.
#[test]
fn the_program_checks_a_restart_and_reports_as_text_and_json() {
    let dir = directory();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let start = format!(
        "{} --dir {} --name fake --http-addr= -v=1 2>>{} & echo $! > {}",
        env!("CARGO_BIN_EXE_fake-provider"),
        dir.path().display(),
        at("log"),
        at("pid"),
    );
    let shell = |command: &str| {
        let status = Command::new("/bin/sh").args(["-c", command]).status();
        assert!(status.unwrap().success());
    };
    let _kill = Kill(dir.path().join("pid"));
    shell(&start);
    let limit = Instant::now() + Duration::from_secs(30);
    while !dir.path().join("fake.sock").exists() {
        assert!(Instant::now() < limit, "it does not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    fs::write(at("parameters"), "objects: 'array: [{objectName: foo}]'\n").unwrap();
    fs::write(at("tokens"), r#"{"vault": "hunter2"}"#).unwrap();
    let (socket, parameters, tokens) = (at("fake.sock"), at("parameters"), at("tokens"));
    let (log, target, stop) = (
        at("log"),
        at("targets"),
        format!("kill -9 $(cat {})", at("pid")),
    );
    let restart = format!("{stop}; {start}");
    let common = [
        socket.as_str(),
        "--parameters",
        &parameters,
        "--tokens",
        &tokens,
        "--log",
        &log,
        "--target-dir",
        &target,
    ];

    let (code, out, err) = provider_check(&[&common[..], &["--restart", &restart]].concat());
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains("ok      restart-same-objects\n"), "{out}");
    assert!(out.contains("ok      secrets-not-in-log\n"), "{out}");

    let json = [
        "--output",
        "json",
        "--only",
        "answer",
        "--skip",
        "paths-short",
    ];
    let (code, out, err) = provider_check(&[&common[..], &json].concat());
    assert_eq!(code, Some(0), "{out}{err}");
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["counts"]["passed"], 16, "{out}");
    assert_eq!(report["checks"][0]["name"], "files-present");

    let (code, out, _) = provider_check(&[&socket, "--target-dir", &target]);
    assert_eq!(code, Some(1), "{out}");
    assert!(
        out.contains("FAILED  mount-succeeds: without --parameters it fails"),
        "{out}"
    );
}

#[rstest]
#[case(&["/nowhere.sock"], "/nowhere.sock: No such file")]
#[case(&["x.sock", "--only", "nonsense"], "there is no check or group \"nonsense\"")]
#[case(&["x.sock", "--parameters", "/nowhere"], "/nowhere: No such file")]
#[case(&["Cargo.toml", "--log", "/nowhere"], "/nowhere: No such file")]
#[case(&["Cargo.toml", "--only", "missing-object"], "nothing was checked of missing-object: needs --missing")]
#[case(&["Cargo.toml", "--only", "socket-mode,error-code"], "nothing was checked of error-code: needs")]
#[case(&["Cargo.toml", "--only", "restart"], "nothing was checked of restart")]
#[case(&["Cargo.toml", "--only", "socket", "--skip", "socket"], "nothing was checked of socket: --skip")]
#[case(&[], "<SOCKET>")]
fn a_mistake_on_the_command_line_is_exit_code_2(
    #[case] arguments: &[&str],
    #[case] expected: &str,
) {
    let (code, _, err) = provider_check(arguments);
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains(expected), "{err}");
}

#[test]
fn all_checks_are_listed() {
    let (code, out, _) = provider_check(&["--list"]);
    assert_eq!(code, Some(0));
    let checks: usize = GROUPS.iter().map(|(_, checks)| checks.len()).sum();
    assert_eq!(out.matches("https://").count(), checks);

    let (_, out, _) = provider_check(&["--list", "--only", "socket", "--skip", "socket-name"]);
    assert_eq!(out.matches("https://").count(), 4, "{out}");
    let (_, out, _) = provider_check(&["--list", "--only", "socket", "--output", "json"]);
    let listed: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(listed["checks"][0]["name"], "socket-type", "{out}");
    assert_eq!(listed["checks"].as_array().unwrap().len(), 5, "{out}");
}
