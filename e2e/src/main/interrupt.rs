//! Ends work when this process is told to end, so that all that it started is dropped: processes, mounts
//! and directories.

use std::fmt;
use std::io;
use std::process::ExitCode;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// The time that threads get that block, such as one that starts a local cluster or waits for cargo. What
/// they leave is torn down by the cluster's guard.
const BLOCKED: Duration = Duration::from_secs(30);
/// The time in which further signals belong to the first.
const SAME: Duration = Duration::from_secs(1);
/// The time in which this process hears of a signal that has ended one of its children.
const NOTICED: Duration = Duration::from_millis(200);

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// The error of work that was ended by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interrupted {
    /// SIGINT, as of Ctrl-C.
    Interrupt,
    /// SIGTERM.
    Terminate,
}

impl Interrupted {
    /// Returns the exit code that shells give a program that the signal ended: 128 and its number.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, text: &mut fmt::Formatter<'_>) -> fmt::Result {
        text.write_str("ended before its time; what it had started is gone")
    }
}

impl std::error::Error for Interrupted {}

/// The error of a command that could not judge what it is there to judge.
#[derive(Debug)]
pub(crate) struct NoVerdict(pub(crate) Box<dyn std::error::Error>);

impl NoVerdict {
    /// The exit code, which is also that for arguments that make no sense.
    const CODE: u8 = 2;
}

impl fmt::Display for NoVerdict {
    fn fmt(&self, text: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(text)
    }
}

impl std::error::Error for NoVerdict {}

/// Runs work to its end, or until SIGINT or SIGTERM, which drop it. A second signal, a second later or
/// more, ends this process at once.
///
/// # Errors
/// The error of the work, [`Interrupted`], or why there is no runtime.
pub(crate) fn run<E>(work: impl Future<Output = Result<(), E>>) -> Outcome
where
    Box<dyn std::error::Error>: From<E>,
{
    let runtime = Runtime::new()?;
    let outcome = runtime.block_on(async {
        let (tell, mut told) = oneshot::channel();
        // A task, because dropping the work may block for long.
        tokio::spawn(Signals::listen()?.tell(tell));
        tokio::select! {
            done = work => match done {
                Ok(()) => Ok(()),
                // A signal to the group also ends a node, which the work may notice first.
                Err(error) => match tokio::time::timeout(NOTICED, told).await {
                    Ok(Ok(interrupted)) => Err(interrupted.into()),
                    _ => Err(error.into()),
                },
            },
            Ok(interrupted) = &mut told => Err(interrupted.into()),
        }
    });
    if is_interrupted(&outcome) {
        runtime.shutdown_timeout(BLOCKED);
    }
    outcome
}

fn is_interrupted(outcome: &Outcome) -> bool {
    matches!(outcome, Err(error) if error.is::<Interrupted>())
}

/// Returns the exit code of a command that failed.
pub(crate) fn exit_code(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    if error.is::<NoVerdict>() {
        return NoVerdict::CODE.into();
    }
    let interrupted = error.downcast_ref::<Interrupted>();
    interrupted.map_or(ExitCode::FAILURE, |signal| signal.code().into())
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> Interrupted {
        tokio::select! {
            _ = self.interrupt.recv() => Interrupted::Interrupt,
            _ = self.terminate.recv() => Interrupted::Terminate,
        }
    }

    /// Tells of the first signal, and ends this process with the second.
    async fn tell(mut self, tell: oneshot::Sender<Interrupted>) {
        let first = self.next().await;
        eprintln!("ending what was started; a second signal leaves it");
        if tell.send(first).is_err() {
            // The work has ended by itself.
            return;
        }
        // One command may send several, to this process and to its group.
        tokio::time::sleep(SAME).await;
        if let Ok(mut later) = Self::listen() {
            let second = later.next().await;
            std::process::exit(second.code().into());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use e2e::binaries::{BIN_DIR_VARIABLE, Binaries};
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    use rstest::rstest;

    const LIMIT: Duration = Duration::from_secs(120);

    /// Returns the processes that have a path in their command line.
    fn processes(path: &Path) -> Vec<String> {
        let all = fs::read_dir("/proc").unwrap().flatten();
        let commands =
            all.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
        let path = path.to_str().unwrap();
        commands.filter(|command| command.contains(path)).collect()
    }

    fn wait_until(what: &str, is_so: impl Fn() -> bool) {
        let started = Instant::now();
        while !is_so() {
            assert!(started.elapsed() < LIMIT, "still waiting for {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    #[rstest]
    #[case::scale(Signal::SIGINT, 130, &["scale", "--nodes", "2", "--volumes", "2"])]
    #[case::bench(Signal::SIGTERM, 143, &["bench", "--rounds", "1", "--volumes", "2"])]
    #[case::demo(Signal::SIGINT, 130, &["demo"])]
    #[case::chaos(Signal::SIGTERM, 143, &["chaos", "--seed", "1"])]
    fn a_command_that_is_interrupted_leaves_nothing(
        #[case] signal: Signal,
        #[case] code: i32,
        #[case] arguments: &[&str],
    ) {
        let binaries = Binaries::find(|_| {}).unwrap();
        let directory = tempfile::Builder::new().prefix("e").tempdir().unwrap();
        let mut command = Command::new(&binaries.e2e)
            .args(arguments)
            .env("TMPDIR", directory.path())
            .env(BIN_DIR_VARIABLE, binaries.e2e.parent().unwrap())
            .env("E2E_CLUSTER", "embedded")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        wait_until("a process", || !processes(directory.path()).is_empty());
        std::thread::sleep(Duration::from_millis(300));
        kill(Pid::from_raw(i32::try_from(command.id()).unwrap()), signal).unwrap();
        assert_eq!(command.wait().unwrap().code(), Some(code));
        wait_until("the processes to be gone", || {
            processes(directory.path()).is_empty()
        });
        let left: Vec<_> = fs::read_dir(directory.path()).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
