//! The daemons' processes. Each has a log and a file with its process id, so that a later run can
//! stop what an earlier one left.

use std::ffi::OsStr;
use std::fmt::Display;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cluster::{Error, Result};

const POLL: Duration = Duration::from_millis(50);
/// The time between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(10);

/// The daemons of one state directory.
pub(super) struct Processes {
    pids: PathBuf,
    logs: PathBuf,
}

impl Processes {
    pub(super) fn new(state: &Path) -> Self {
        Self {
            pids: state.join("pids"),
            logs: state.join("logs"),
        }
    }

    /// Starts a daemon whose output goes to `logs/<name>.log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn start<I>(&self, name: &str, program: &Path, args: I) -> Result<()>
    where
        I: IntoIterator<Item: AsRef<OsStr>>,
    {
        let mut command = Command::new(program);
        command.args(args);
        self.start_command(name, command)
    }

    /// Starts a daemon from a command that may have an environment of its own.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn start_command(&self, name: &str, mut command: Command) -> Result<()> {
        let failed = |error: &dyn Display| Error::Start(format!("start {name}: {error}"));
        for dir in [&self.pids, &self.logs] {
            fs::create_dir_all(dir).map_err(|error| failed(&error))?;
        }
        let mut log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log(name))
            .map_err(|error| failed(&error))?;
        writeln!(log, "{command:?}").map_err(|error| failed(&error))?;
        let errors = log.try_clone().map_err(|error| failed(&error))?;
        command
            // An interrupt at the terminal goes to the test, which stops the daemons.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors);
        let child = command.spawn().map_err(|error| failed(&error))?;
        fs::write(
            self.pids.join(format!("{name}.command")),
            command_line(&command),
        )
        .map_err(|error| failed(&error))?;
        let pid = child.id();
        let started = start_time(pid).ok_or_else(|| failed(&self.tail(name)))?;
        fs::write(self.pids.join(name), format!("{pid} {started}")).map_err(|error| failed(&error))
    }

    /// Stops a daemon and starts it again with the same arguments.
    ///
    /// # Errors
    /// When it does not stop or start, or was never started.
    pub(super) fn restart(&self, name: &str) -> Result<()> {
        let path = self.pids.join(format!("{name}.command"));
        let line = fs::read(&path)
            .map_err(|error| Error::Start(format!("{}: {error}", path.display())))?;
        self.stop(name)?;
        let mut words = line.split(|byte| *byte == 0).map(OsStr::from_bytes);
        let program = words.next().unwrap_or_default();
        self.start(name, Path::new(program), words)
    }

    /// Returns whether the process that was started under that name still runs.
    pub(super) fn is_alive(&self, name: &str) -> bool {
        self.pid(name).is_some()
    }

    /// Sends a signal to a daemon.
    ///
    /// # Errors
    /// When it does not run.
    pub(super) fn signal(&self, name: &str, signal: Signal) -> Result<()> {
        let failed = |reason: &dyn Display| Error::Start(format!("signal {name}: {reason}"));
        let pid = self.pid(name).ok_or_else(|| failed(&"it does not run"))?;
        kill(pid, signal).map_err(|error| failed(&error))
    }

    /// Stops a daemon, by SIGKILL if need be. Does nothing for one that is gone.
    ///
    /// # Errors
    /// When the process survives SIGKILL.
    pub(super) fn stop(&self, name: &str) -> Result<()> {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            let Some(pid) = self.pid(name) else { break };
            // The process may end before the signal.
            let _gone = kill(pid, signal);
            let asked = Instant::now();
            while self.is_alive(name) && asked.elapsed() < GRACE {
                std::thread::sleep(POLL);
            }
        }
        match self.pid(name) {
            Some(pid) => Err(Error::Start(format!(
                "{name}, process {pid}, does not stop"
            ))),
            None => {
                let _not_there = fs::remove_file(self.pids.join(name));
                Ok(())
            }
        }
    }

    /// Waits until `holds` returns true, which is the daemon's work.
    ///
    /// # Errors
    /// [`Error::Start`] with the last lines of the daemon's log when it dies or takes too long.
    pub(super) fn wait_for(
        &self,
        name: &str,
        what: &str,
        limit: Duration,
        mut holds: impl FnMut() -> bool,
    ) -> Result<()> {
        let started = Instant::now();
        while !holds() {
            let why = if !self.is_alive(name) {
                "died".to_owned()
            } else if started.elapsed() > limit {
                format!("took more than {limit:?}")
            } else {
                std::thread::sleep(POLL);
                continue;
            };
            let tail = self.tail(name);
            return Err(Error::Start(format!(
                "{what}: {name} {why}; its last lines:\n{tail}"
            )));
        }
        Ok(())
    }

    fn pid(&self, name: &str) -> Option<Pid> {
        let text = fs::read_to_string(self.pids.join(name)).ok()?;
        let (pid, started) = text.split_once(' ')?;
        let pid = pid.parse().ok()?;
        let same = start_time(pid)? == started.trim().parse::<u64>().ok()?;
        same.then_some(Pid::from_raw(i32::try_from(pid).ok()?))
    }

    fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    fn tail(&self, name: &str) -> String {
        let log = fs::read(self.log(name)).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

/// Returns program and arguments with zeroes between them, as the kernel shows them.
fn command_line(command: &Command) -> Vec<u8> {
    let mut words = vec![command.get_program()];
    words.extend(command.get_args());
    let words: Vec<&[u8]> = words.into_iter().map(OsStr::as_bytes).collect();
    words.join(&0)
}

/// Returns when a process was started, in the kernel's ticks: number and time together identify a
/// process. Returns `None` for one that is gone or a zombie.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    if matches!(fields.first(), Some(&("Z" | "X"))) {
        return None;
    }
    fields.get(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_found_again_and_stopped_by_a_later_run() {
        let state = tempfile::tempdir().unwrap();
        let earlier = Processes::new(state.path());
        earlier
            .start("sleeper", Path::new("/bin/sleep"), ["600"])
            .unwrap();
        let later = Processes::new(state.path());
        assert!(later.is_alive("sleeper"));
        let before = later.pid("sleeper");
        later.restart("sleeper").unwrap();
        assert!(later.is_alive("sleeper") && later.pid("sleeper") != before);
        later.stop("sleeper").unwrap();
        assert!(!earlier.is_alive("sleeper"));
        later.stop("sleeper").unwrap();
    }

    /// The kernel uses process ids again.
    #[test]
    fn another_process_with_the_same_number_is_not_touched() {
        let state = tempfile::tempdir().unwrap();
        let processes = Processes::new(state.path());
        fs::create_dir_all(&processes.pids).unwrap();
        let me = std::process::id();
        fs::write(processes.pids.join("other"), format!("{me} 1")).unwrap();
        assert!(!processes.is_alive("other"));
        processes.stop("other").unwrap();
    }

    #[test]
    fn the_error_quotes_a_daemon_that_dies() {
        let state = tempfile::tempdir().unwrap();
        let processes = Processes::new(state.path());
        processes
            .start(
                "broken",
                Path::new("/bin/sh"),
                ["-c", "echo no way; sleep 0.2; exit 1"],
            )
            .unwrap();
        let error = processes
            .wait_for("broken", "an answer", GRACE, || false)
            .unwrap_err();
        assert!(
            error.to_string().contains("broken died") && error.to_string().contains("no way"),
            "{error}"
        );
    }
}
