//! Stops the driver after each step that changes something outside of it, starts it again, and has
//! kubelet try again. Or holds the thread there while something else happens. Or has each step fail once, and kubelet
//! tries again, too.
//!
//! The steps are those that a traced run of the driver makes: system calls on files and mounts, requests
//! to the API server and to the provider and their answers. Nothing here lists them, so a step that is
//! new in the driver is stopped at, too. All the time a pod reads the volume, and everything that
//! becomes of the Secret is seen. In the end all is as if nothing had happened, and after the unpublish
//! nothing is left.
//!
//! A failure prints the steps until the driver was stopped, and a command that stops it there again.

#![cfg(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64")
))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod calls;
mod history;
mod node;
mod operations;
mod reader;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../api/server.rs"]
mod server;
mod state;
mod steps;
mod tracer;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    io::{self, Write as _},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use rstest::rstest;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use node::until;
use operations::{Meanwhile, Operation, Run, Then};
use state::{State, difference};
use steps::is_of_node;
use tracer::{How, Traced};

/// Says to a process that it is the one that a test has started for itself.
const ALONE: &str = "ALONE_WITH_ITS_MOUNTS";
/// The crash point that is to be tried alone: what follows, and the step.
const POINT: &str = "CRASH_POINT";

/// The number of nodes at a time.
const NODES: usize = 6;
/// The same while drivers are held, or have time to wait for in another way.
const WAITING_NODES: usize = 16;
/// How often a step is waited for that a traced run had and others have not.
const TRIES: usize = 4;
/// The most points of an operation. There are more only if the same step has other names in other runs.
const MOST: usize = 1000;
/// More than any run takes.
const LIMIT: Duration = Duration::from_secs(240);

#[rstest]
#[case::publish(Operation::Publish)]
#[case::refused_publish(Operation::RefusedPublish)]
#[case::refresh(Operation::Refresh)]
#[case::refresh_without_change(Operation::RefreshWithoutChange)]
#[case::refused_refresh(Operation::RefusedRefresh)]
#[case::recovered_refresh(Operation::RecoveredRefresh)]
#[case::asked_refresh(Operation::AskedRefresh)]
#[case::refresh_of_edited_class(Operation::RefreshOfEditedClass)]
#[case::refresh_with_other_type(Operation::RefreshWithOtherType)]
#[case::unpublish(Operation::Unpublish)]
#[case::deleted_secret(Operation::DeletedSecret)]
#[case::altered_secret(Operation::AlteredSecret)]
#[case::deleted_pod_status(Operation::DeletedPodStatus)]
#[case::class_with_another_secret(Operation::ClassWithAnotherSecret)]
#[case::annotated_class(Operation::AnnotatedClass)]
#[case::deleted_newer_secret(Operation::DeletedNewerSecret)]
#[case::start(Operation::Start)]
#[case::publish_of_written_files(Operation::PublishOfWrittenFiles)]
#[case::refresh_of_written_files(Operation::RefreshOfWrittenFiles)]
#[case::unpublish_of_written_files(Operation::UnpublishOfWrittenFiles)]
#[case::publish_of_bare_pod(Operation::PublishOfBarePod)]
#[case::refresh_of_bare_pod(Operation::RefreshOfBarePod)]
#[case::unpublish_of_bare_pod(Operation::UnpublishOfBarePod)]
#[case::unpublish_of_ended_pod(Operation::UnpublishOfEndedPod)]
#[case::publish_after_namesake(Operation::PublishAfterNamesake)]
#[case::publish_after_reboot(Operation::PublishAfterReboot)]
#[case::publish_of_written_files_after_reboot(Operation::PublishOfWrittenFilesAfterReboot)]
#[case::unpublish_of_buried_volume(Operation::UnpublishOfBuriedVolume)]
#[case::publish_over_torn_record(Operation::PublishOverTornRecord)]
#[case::hung_publish(Operation::HungPublish)]
#[case::hung_refresh(Operation::HungRefresh)]
#[case::refresh_of_new_class(Operation::RefreshOfNewClass)]
fn stopped_after_each_step(#[case] operation: Operation) {
    try_alone(operation, How::Stopped);
}

#[rstest]
#[case::publish(Operation::Publish)]
#[case::refresh(Operation::Refresh)]
#[case::refresh_of_edited_class(Operation::RefreshOfEditedClass)]
#[case::publish_of_bare_pod(Operation::PublishOfBarePod)]
#[case::refresh_of_bare_pod(Operation::RefreshOfBarePod)]
#[case::publish_of_written_files(Operation::PublishOfWrittenFiles)]
#[case::refresh_of_written_files(Operation::RefreshOfWrittenFiles)]
#[case::unpublish(Operation::Unpublish)]
#[case::unpublish_of_bare_pod(Operation::UnpublishOfBarePod)]
#[case::deleted_secret(Operation::DeletedSecret)]
#[case::altered_secret(Operation::AlteredSecret)]
#[case::refresh_with_other_type(Operation::RefreshWithOtherType)]
#[case::class_with_another_secret(Operation::ClassWithAnotherSecret)]
#[case::refresh_of_new_class(Operation::RefreshOfNewClass)]
fn held_after_each_step(#[case] operation: Operation) {
    try_alone(operation, How::Held);
}

#[cfg(target_arch = "x86_64")]
#[rstest]
#[case::publish(Operation::Publish)]
#[case::refresh(Operation::Refresh)]
#[case::refresh_without_change(Operation::RefreshWithoutChange)]
#[case::refresh_of_edited_class(Operation::RefreshOfEditedClass)]
#[case::recovered_refresh(Operation::RecoveredRefresh)]
#[case::unpublish(Operation::Unpublish)]
#[case::start(Operation::Start)]
#[case::publish_of_written_files(Operation::PublishOfWrittenFiles)]
#[case::refresh_of_written_files(Operation::RefreshOfWrittenFiles)]
#[case::unpublish_of_written_files(Operation::UnpublishOfWrittenFiles)]
#[case::publish_after_reboot(Operation::PublishAfterReboot)]
#[case::unpublish_of_buried_volume(Operation::UnpublishOfBuriedVolume)]
#[case::refused_publish(Operation::RefusedPublish)]
#[case::refused_refresh(Operation::RefusedRefresh)]
#[case::unpublish_of_ended_pod(Operation::UnpublishOfEndedPod)]
#[case::publish_of_written_files_after_reboot(Operation::PublishOfWrittenFilesAfterReboot)]
#[case::deleted_secret(Operation::DeletedSecret)]
#[case::altered_secret(Operation::AlteredSecret)]
#[case::refresh_with_other_type(Operation::RefreshWithOtherType)]
#[case::publish_of_bare_pod(Operation::PublishOfBarePod)]
#[case::unpublish_of_bare_pod(Operation::UnpublishOfBarePod)]
#[case::class_with_another_secret(Operation::ClassWithAnotherSecret)]
#[case::publish_over_torn_record(Operation::PublishOverTornRecord)]
fn each_step_fails(#[case] operation: Operation) {
    try_alone(operation, How::Failed);
}

/// What takes too long to be tried at each step, or is like another operation step by step.
#[rstest]
#[case::slow_publish(Operation::SlowPublish)]
#[case::slow_refresh(Operation::SlowRefresh)]
#[case::publish_of_edited_class(Operation::PublishOfEditedClass)]
#[case::refresh_of_modes(Operation::RefreshOfModes)]
#[case::asked_after_failure(Operation::AskedAfterFailure)]
#[case::unpublish_of_last_ended_pod(Operation::UnpublishOfLastEndedPod)]
#[case::unpublish_of_evicted_pod(Operation::UnpublishOfEvictedPod)]
fn undisturbed(#[case] operation: Operation) {
    with_mounts(try_once(operation));
}

fn try_alone(operation: Operation, how: How) {
    with_mounts(try_all(operation, how));
}

/// Does an operation, and nothing happens to the driver.
async fn try_once(operation: Operation) {
    match run(operation, Then::Again, How::Stopped, None).await {
        Ok(run) => {
            let log = run.log;
            if let Err(why) = run.outcome {
                panic!("{operation:?}: {why}\n{log}");
            }
        }
        Err(error) => untraceable(operation, &error),
    }
}

/// Runs a test in a process that has its own mounts.
fn with_mounts(test: impl Future<Output = ()>) {
    if std::env::var_os(ALONE).is_none() {
        return alone();
    }
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(test);
}

/// Runs this test in a process that has its own mounts. An ordinary user needs user namespaces for it.
fn alone() {
    let name = std::thread::current().name().unwrap().to_owned();
    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let run = command
        .arg("--mount")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&run.stdout);
    let err = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{out}\n{err}");
    assert!(out.contains("1 passed"), "no test is called {name}: {out}");
    for line in out.lines().filter(|line| line.starts_with("crash points")) {
        println!("{line}");
    }
    for line in out.lines().filter(|line| line.starts_with("skipped")) {
        // Past the capture of tests, which hides why nothing was tried.
        let _ = writeln!(io::stderr(), "{line}");
    }
}

/// A place at which the driver is stopped.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Point {
    then: Then,
    step: String,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.then, self.step)
    }
}

/// A run that has ended.
struct Ended {
    /// Whether the driver came to the step.
    is_hit: bool,
    steps: Vec<String>,
    outcome: Result<State, String>,
    log: String,
}

/// Stops the driver at all points of an operation, or has them fail.
async fn try_all(operation: Operation, how: How) {
    let started = Instant::now();
    let mut undisturbed = BTreeMap::new();
    let mut points = Points::of(how);
    points.waits = matches!(
        operation,
        Operation::DeletedPodStatus | Operation::DeletedNewerSecret | Operation::AnnotatedClass
    );
    let follows = match how {
        How::Stopped => operation.follows().to_vec(),
        How::Held => operation.meanwhile(),
        How::Failed => vec![Then::Again],
    };
    for then in &follows {
        let run = match run(operation, *then, how, None).await {
            Ok(run) => run,
            Err(error) => return untraceable(operation, &error),
        };
        let state = run.outcome.unwrap_or_else(|why| {
            panic!("{operation:?}, {then}, without a crash: {why}\n{}", run.log)
        });
        let asks = run.steps.iter().any(|step| step.starts_with("provider: "));
        assert_eq!(asks, operation.asks_provider(), "{:#?}", run.steps);
        undisturbed.insert(*then, state);
        points.add(*then, &run.steps, place(&follows, *then));
    }
    if let Ok(wanted) = std::env::var(POINT) {
        points.keep_only(&wanted);
    }
    let undisturbed = Arc::new(undisturbed);
    let mut running = JoinSet::new();
    let mut failures = Vec::new();
    let nodes = match how {
        How::Stopped | How::Failed if !operation.mostly_waits() => NODES,
        _ => WAITING_NODES,
    };
    loop {
        while running.len() < nodes
            && failures.len() < 3
            && let Some(point) = points.queue.pop_front()
        {
            running.spawn(async move {
                let at = Some(point.step.as_str());
                let ended = run(operation, point.then, how, at).await;
                (point, ended.unwrap())
            });
        }
        let Some(ended) = running.join_next().await else {
            break;
        };
        let (point, mut ended) = ended.unwrap();
        points.ended(&point, &ended, place(&follows, point.then));
        if let Ok(state) = &ended.outcome
            && let Some(difference) = difference(&undisturbed[&point.then], state)
        {
            ended.outcome = Err(difference);
        }
        if let Err(why) = &ended.outcome {
            failures.push(failure(operation, &point, how, &ended, why));
        }
    }
    assert!(
        failures.is_empty(),
        "{} points failed, first: {}",
        failures.len(),
        failures.join("\n\n")
    );
    println!("{}", points.summary(operation, started.elapsed()));
    points.check();
}

/// Returns the place of something among all that may follow, and their number.
fn place(follows: &[Then], then: Then) -> (usize, usize) {
    let place = follows.iter().position(|one| *one == then);
    (place.unwrap_or_default(), follows.len())
}

/// Returns whether a driver that waits for something has read an object more than twice: it does so again and again.
fn is_read_again(step: &str) -> bool {
    let number = step.rsplit_once('#').map(|(_, number)| number.parse());
    step.starts_with("API server: GET ") && matches!(number, Some(Ok(3_u32..)))
}

/// Says that nothing can be tried, if tracing is refused.
fn untraceable(operation: Operation, error: &io::Error) {
    let refused = [Errno::EPERM, Errno::ENOSYS, Errno::EACCES].map(|errno| errno as i32);
    let is_refused = error
        .raw_os_error()
        .is_some_and(|code| refused.contains(&code));
    assert!(is_refused, "{error}");
    println!(
        "skipped: crash points of {operation:?}: this machine refuses ptrace(2), as the seccomp profile of a container may: {error}"
    );
}

/// Does an operation on a node of its own, and what follows. Stops the driver after a step or has it fail, if
/// one is given. Fails only if nothing can be traced.
async fn run(operation: Operation, then: Then, how: How, at: Option<&str>) -> io::Result<Ended> {
    let at = at.map(|step| (step, how));
    let mut run = Run::start(operation, then, how).await?;
    let mut ended = Ended {
        is_hit: false,
        steps: Vec::new(),
        outcome: Err(format!("it has not ended within {LIMIT:?}")),
        log: String::new(),
    };
    let all = async {
        run.set_up().await?;
        let traced = run.arm(at)?;
        if let Then::Meanwhile(meanwhile) = then {
            run.disturb(meanwhile, &traced, at.is_some()).await?;
            (ended.steps, ended.is_hit) = traced.disarm();
            run.go_on(false, &ended.steps).await?;
            return run.end().await;
        }
        let before = run.told();
        let (mut is_gone, mut is_answered) = (false, false);
        let acted = tokio::select! {
            acted = run.act() => {
                is_answered = true;
                acted
            }
            () = traced.ended() => {
                is_gone = true;
                Ok(())
            }
            // What failed may be what the end of the operation waits for.
            () = failed_for_a_while(&traced, at) => Ok(()),
        };
        (ended.steps, ended.is_hit) = traced.disarm();
        let has_failed = ended.is_hit && matches!(at, Some((_, How::Failed)));
        let is_killed = ended.is_hit && !has_failed;
        // A start that fails may end it, and it is started again.
        let may_end = is_killed || has_failed && operation == Operation::Start;
        if is_gone && !may_end {
            return Err("the driver has ended by itself".to_owned());
        }
        let is_stopped = is_killed || is_gone;
        if is_stopped {
            run.node.kill_driver().await;
        } else if !has_failed {
            acted?;
        } else {
            run.was_cut_off = at.is_some_and(|(step, _)| !is_of_node(step));
            // The record goes with the next change. The volume must not wait for it.
            let is_of_record = at.is_some_and(|(step, _)| step.contains("/state/"));
            if operation.is_unpublish() && is_of_record {
                acted?;
            }
            run.has_pod_status()?;
            // A server may have carried out that of which the driver knows nothing.
            if !run.was_cut_off {
                if !is_answered {
                    // A refresh under way writes the pod status before the content.
                    let _agree_or_not = until("content and pod status agree", || {
                        run.check_told(&before).is_ok()
                    })
                    .await;
                }
                run.check_told(&before)?;
            }
        }
        run.has_failed = has_failed;
        run.go_on(is_stopped, &ended.steps).await?;
        run.end().await
    };
    if let Ok(outcome) = timeout(LIMIT, all).await {
        ended.outcome = outcome;
    }
    ended.log = run.node.log();
    run.node.kill_driver().await;
    Ok(ended)
}

/// Waits until a step has failed, and then for longer than an operation takes.
async fn failed_for_a_while(traced: &Traced, at: Option<(&str, How)>) {
    while !(traced.is_hit() && matches!(at, Some((_, How::Failed)))) {
        sleep(Duration::from_millis(20)).await;
    }
    sleep(Duration::from_millis(1_500)).await;
}

fn failure(operation: Operation, point: &Point, how: How, ended: &Ended, why: &str) -> String {
    let test = format!("{operation:?}");
    let steps = ended.steps.join("\n  ");
    let at = match how {
        How::Stopped => "stopped after a step",
        How::Held => "held after a step",
        How::Failed => "a step fails",
    };
    format!(
        "{test}, {at}, then {}:\n  {}\n{why}\nThe steps until then:\n  {steps}\nThe driver's last words:\n{}\nTo try it there again:\n  {POINT}='{point}' cargo test --workspace --test crash -- {}",
        point.then,
        point.step,
        ended.log,
        test_name(),
    )
}

fn test_name() -> String {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--exact");
    arguments.nth(1).unwrap_or_default()
}

/// The points of an operation.
struct Points {
    how: How,
    /// Whether the driver comes to the operation only some intervals later.
    waits: bool,
    queue: VecDeque<Point>,
    /// How often each was tried, or `None` once the driver was stopped there.
    known: BTreeMap<Point, Option<usize>>,
    /// The points at which the driver is not stopped.
    left_out: BTreeSet<Point>,
    runs: usize,
}

impl Points {
    fn of(how: How) -> Self {
        Self {
            how,
            waits: false,
            queue: VecDeque::new(),
            known: BTreeMap::new(),
            left_out: BTreeSet::new(),
            runs: 0,
        }
    }

    /// Adds the steps of a run that are not known. After each step kubelet tries again, with and
    /// without a change in the store. Of the rest one follows in turn, which saves time.
    fn add(&mut self, then: Then, steps: &[String], (place, places): (usize, usize)) {
        for (index, step) in steps.iter().enumerate() {
            let step = step.clone();
            let point = Point { then, step };
            let is_known = self.known.contains_key(&point) || self.left_out.contains(&point);
            let is_out = self.waits && is_read_again(&point.step);
            if is_known || is_out || self.known.len() > MOST {
                continue;
            }
            let is_in_turn = match then {
                Then::Again | Then::Changed => true,
                Then::Replaced => index % 2 == 0,
                Then::Elsewhere => index % 2 == 1,
                Then::Unpublish => index % 3 == 0,
                Then::TornRecords => index % 3 == 1,
                Then::Reboot => index % 3 == 2,
                // Between these the driver last looks at the mount.
                Then::Meanwhile(Meanwhile::Unmounted) => point.step.starts_with("API server: "),
                // Two of many at each step, or one of few.
                Then::Meanwhile(_) => (index + place) % places < 1 + usize::from(places > 3),
            };
            if is_in_turn || std::env::var_os(POINT).is_some() {
                self.known.insert(point.clone(), Some(0));
                self.queue.push_back(point);
            } else {
                self.left_out.insert(point);
            }
        }
    }

    /// Keeps only the point that somebody wants.
    fn keep_only(&mut self, wanted: &str) {
        self.queue.retain(|point| point.to_string() == wanted);
        assert!(!self.queue.is_empty(), "no run has the point {wanted:?}");
        let queue = &self.queue;
        self.known.retain(|point, _| queue.contains(point));
    }

    /// Notes the end of a run. A step that it has not come to is tried again.
    fn ended(&mut self, point: &Point, ended: &Ended, place: (usize, usize)) {
        self.runs += 1;
        // What happens meanwhile leads to other steps.
        if std::env::var_os(POINT).is_none() && self.how != How::Held {
            self.add(point.then, &ended.steps, place);
        }
        let Some(tries) = self.known.get_mut(point) else {
            return;
        };
        if ended.is_hit {
            *tries = None;
        } else if let Some(tries) = tries {
            *tries += 1;
            if *tries < TRIES {
                self.queue.push_back(point.clone());
            }
        }
    }

    fn missed(&self) -> Vec<String> {
        let missed = self.known.iter().filter(|(_, tries)| tries.is_some());
        missed.map(|(point, _)| point.to_string()).collect()
    }

    fn summary(&self, operation: Operation, took: Duration) -> String {
        let missed = self.missed();
        let mut said = format!(
            "crash points of {operation:?}, {:?}: {} reached, {} not, in {} runs and {:.1} s",
            self.how,
            self.known.len() - missed.len(),
            missed.len(),
            self.runs,
            took.as_secs_f64()
        );
        for point in missed {
            said += &format!("\ncrash points: not reached: {point}");
        }
        said
    }

    /// Checks that nearly all points were reached: otherwise their names do not name them. A request
    /// that the driver makes at its own time may be in one run only; it is two points.
    fn check(&self) {
        let (all, missed) = (self.known.len(), self.missed());
        assert!(all > 0, "the driver has done nothing");
        assert!(all <= MOST, "there are always other steps: {missed:#?}");
        // The checks that run beside an operation are at other times in each run.
        let may_miss = match self.how {
            How::Stopped | How::Failed if !self.waits => 2 + all / 10,
            _ => 2 + all / 4,
        };
        assert!(
            missed.len() <= may_miss,
            "of {all}, not reached: {missed:#?}"
        );
    }
}
