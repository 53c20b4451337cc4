//! Runs a program under ptrace(2), notes each step by which it changes something outside of itself,
//! and kills it right after a given one, holds the thread that has made it there for a while, or has a given one
//! fail.
//!
//! A step is noted when its system call has succeeded, and the program is killed before it learns of
//! that. So the end of each step is also the beginning of the next one. A thread is held at the same moment, and the
//! others go on. A step that is to fail is not taken: the program gets an error in its place. A request does not go
//! out then, and an answer is lost: its request has been carried out.

use std::{
    collections::HashMap,
    fs, io,
    io::Write as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tokio::sync::watch;

use crate::{
    calls::{Call, Effect, Peer, Registers, fail, path_of, skip},
    steps::{Names, Server},
};

/// The addresses of the servers, as [`Peer`] has them.
#[derive(Debug, Clone)]
pub(crate) struct Servers {
    pub(crate) api: String,
    pub(crate) provider: String,
}

/// A program that runs under a tracer. It is killed when this is dropped.
pub(crate) struct Traced {
    leader: Pid,
    seen: Arc<Mutex<Seen>>,
    ended: watch::Receiver<bool>,
}

/// What a tracer has seen since it was armed.
#[derive(Default)]
struct Seen {
    names: Option<Names>,
    steps: Vec<String>,
    at: Option<(String, How)>,
    is_hit: bool,
    /// Whether the thread that was held goes on.
    is_released: bool,
}

/// What happens at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// The program is killed right after it.
    Stopped,
    /// The thread that has taken it is held right after it.
    Held,
    /// It fails.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "calls are changed on x86_64 only")
    )]
    Failed,
}

/// How steps are named, and at which one what happens.
pub(crate) struct Armed<'a> {
    pub(crate) names: Names,
    pub(crate) at: Option<(&'a str, How)>,
}

impl Seen {
    fn arm(&mut self, armed: Armed<'_>) {
        self.names = Some(armed.names);
        self.at = armed.at.map(|(step, how)| (step.to_owned(), how));
    }

    /// Returns whether the step of this name is to fail, and notes it then.
    fn fails(&mut self, name: impl FnOnce(&mut Names) -> Option<String>) -> bool {
        let (Some(names), Some((step, How::Failed)), false) = (&self.names, &self.at, self.is_hit)
        else {
            return false;
        };
        let Some(name) = name(&mut names.clone()).filter(|name| name == step) else {
            return false;
        };
        self.is_hit = true;
        self.steps.push(name);
        true
    }
}

impl Traced {
    /// Starts a program, whose steps are noted from its first one on if it is armed. Fails if it cannot
    /// be traced here.
    pub(crate) fn start(
        command: &[String],
        root: &Path,
        servers: &Servers,
        armed: Option<Armed<'_>>,
    ) -> io::Result<Self> {
        let seen = Arc::<Mutex<Seen>>::default();
        if let Some(armed) = armed {
            seen.lock().unwrap().arm(armed);
        }
        let (end, ended) = watch::channel(false);
        let (started, starts) = std::sync::mpsc::channel();
        let (command, shared) = (command.to_vec(), Arc::clone(&seen));
        let (root, servers) = (root.to_owned(), servers.clone());
        // Only the thread that traces a process may wait for it.
        thread::spawn(move || {
            let child = match begin(&command, &root.join("log")) {
                Ok(child) => child,
                Err(error) => return drop(started.send(Err(error))),
            };
            let leader = Pid::from_raw(child.id().cast_signed());
            let _ = started.send(Ok(leader));
            let mut tracer = Tracer {
                leader,
                seen: shared,
                root: root.display().to_string(),
                servers,
                threads: HashMap::new(),
                connections: HashMap::new(),
                held: None,
            };
            tracer.run();
            let _ = end.send(true);
        });
        let leader = starts.recv().map_err(io::Error::other)??;
        Ok(Self {
            leader,
            seen,
            ended,
        })
    }

    /// Notes steps from now on.
    pub(crate) fn arm(&self, armed: Armed<'_>) {
        self.seen.lock().unwrap().arm(armed);
    }

    /// Returns whether a step that begins like this has been noted.
    pub(crate) fn has_step(&self, beginning: &str) -> bool {
        let seen = self.seen.lock().unwrap();
        seen.steps.iter().any(|step| step.starts_with(beginning))
    }

    /// Notes no more steps. Returns those so far, and whether the program came to the given one.
    pub(crate) fn disarm(&self) -> (Vec<String>, bool) {
        let mut seen = self.seen.lock().unwrap();
        seen.names = None;
        (seen.steps.clone(), seen.is_hit)
    }

    /// Returns whether the program has come to the step at which something was to happen.
    pub(crate) fn is_hit(&self) -> bool {
        self.seen.lock().unwrap().is_hit
    }

    /// Lets the thread go on that is held, now or as soon as it would be.
    pub(crate) fn release(&self) {
        self.seen.lock().unwrap().is_released = true;
    }

    /// Returns the number of the process.
    pub(crate) fn id(&self) -> u32 {
        self.leader.as_raw().cast_unsigned()
    }

    /// Waits until the program has ended.
    pub(crate) async fn ended(&self) {
        let mut ended = self.ended.clone();
        // The tracer has gone if this fails, and the program with it.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    pub(crate) async fn kill(&self) {
        let _ = kill(self.leader, Signal::SIGKILL);
        self.ended().await;
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        if !*self.ended.borrow() {
            let _ = kill(self.leader, Signal::SIGKILL);
        }
    }
}

/// Starts a shell that waits, begins to trace it, and has it become the program.
fn begin(command: &[String], log: &Path) -> io::Result<Child> {
    let mut child = Command::new("sh")
        .args(["-c", "read go && exec \"$@\" </dev/null", "sh"])
        .args(command)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(fs::File::options().create(true).append(true).open(log)?)
        .spawn()?;
    let shell = Pid::from_raw(child.id().cast_signed());
    let options = Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_EXITKILL;
    if let Err(refused) = ptrace::seize(shell, options) {
        let _ = child.kill();
        let _ = child.wait();
        return Err(refused.into());
    }
    ptrace::interrupt(shell)?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(b"go\n")?;
    }
    Ok(child)
}

/// The tracer of one process, which runs in the thread that started it.
struct Tracer {
    leader: Pid,
    seen: Arc<Mutex<Seen>>,
    root: String,
    servers: Servers,
    /// The call in which each thread is.
    threads: HashMap<Pid, Option<Begun>>,
    connections: HashMap<i32, Server>,
    /// The thread that does not go on until it is released.
    held: Option<Pid>,
}

/// The pause between two looks whether a thread is to go on.
const HELD: Duration = Duration::from_millis(1);

/// A system call that has begun.
struct Begun {
    call: Call,
    effect: Effect,
    described: String,
    /// The error with which it fails, if it is not carried out.
    fails: Option<Errno>,
}

impl Tracer {
    /// Follows all threads until the process has ended.
    fn run(&mut self) {
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        loop {
            // Nothing but a change of the program ends a wait.
            let flags = match self.held {
                Some(_) => flags | WaitPidFlag::WNOHANG,
                None => flags,
            };
            let (thread, signal) = match waitpid(None, Some(flags)) {
                Ok(WaitStatus::StillAlive) => {
                    self.let_go();
                    continue;
                }
                Err(Errno::EINTR) => continue,
                Err(_) => return,
                Ok(WaitStatus::Exited(ended, _) | WaitStatus::Signaled(ended, ..)) => {
                    if ended == self.leader {
                        return;
                    }
                    self.threads.remove(&ended);
                    continue;
                }
                Ok(WaitStatus::PtraceSyscall(thread)) => {
                    self.at_call(thread);
                    (thread, None)
                }
                Ok(WaitStatus::Stopped(thread, signal)) => (thread, Some(signal)),
                Ok(WaitStatus::PtraceEvent(thread, ..)) => (thread, None),
                Ok(_) => continue,
            };
            if self.held != Some(thread) {
                // A thread that has been killed meanwhile is met again above.
                let _ = ptrace::syscall(thread, signal);
            }
        }
    }

    /// Lets the thread go on that is held, if it is to.
    fn let_go(&mut self) {
        if self.seen.lock().unwrap().is_released {
            let held = self.held.take();
            let _ = held.map(|thread| ptrace::syscall(thread, None));
        } else {
            thread::sleep(HELD);
        }
    }

    fn at_call(&mut self, thread: Pid) {
        let Ok(registers) = Registers::of(thread) else {
            return;
        };
        match self.threads.insert(thread, None).flatten() {
            Some(begun) => self.ends(thread, begun, registers.result),
            None if registers.is_begin => {
                let begun = self.begins(thread, registers.call);
                self.threads.insert(thread, Some(begun));
            }
            // The end of the call that has made this thread.
            None => {}
        }
    }

    fn begins(&self, thread: Pid, call: Call) -> Begun {
        let effect = call.effect(thread);
        let is_armed = || self.seen.lock().unwrap().names.is_some();
        let described = match effect {
            // Before a rename, for example, the descriptors still have the old names.
            Effect::Changes if is_armed() => call.describe(thread),
            Effect::Moves { out: true } if is_armed() => {
                self.written(thread, call).unwrap_or_default()
            }
            Effect::Connects => Peer::at(thread, call.args[1]).map_or_else(String::new, |p| p.0),
            _ => String::new(),
        };
        let connection = self.connections.get(&call.descriptor()).copied();
        let (fails, error) = match (&effect, connection) {
            (Effect::Connects, _) => (false, Errno::EPIPE),
            (Effect::Moves { out: true }, Some(server)) => {
                let fails = self.fails(|names| {
                    let bytes = call.moved(thread, call.to_move());
                    names.sent(server, call.descriptor(), &bytes)
                });
                (fails, Errno::EPIPE)
            }
            _ if described.is_empty() => (false, Errno::EPIPE),
            _ => (
                self.fails(|names| Some(names.name(&described))),
                call.error(),
            ),
        };
        if fails {
            skip(thread);
        }
        let fails = fails.then_some(error);
        Begun {
            call,
            effect,
            described,
            fails,
        }
    }

    /// Returns whether the step of this name is to fail.
    fn fails(&self, name: impl FnOnce(&mut Names) -> Option<String>) -> bool {
        self.seen.lock().unwrap().fails(name)
    }

    /// Returns whether the answer that has just been received is lost.
    fn is_lost(&self, thread: Pid, call: Call, length: i64) -> bool {
        let Some(server) = self.connections.get(&call.descriptor()).copied() else {
            return false;
        };
        self.fails(|names| {
            let bytes = call.moved(thread, usize::try_from(length).unwrap_or(0));
            names.received(server, call.descriptor(), &bytes)
        })
    }

    /// Describes a call that writes into a file, other than the log.
    fn written(&self, thread: Pid, call: Call) -> Option<String> {
        let descriptor = call.descriptor();
        if self.connections.contains_key(&descriptor) {
            return None;
        }
        let path = path_of(thread, descriptor)?;
        let is_it = path.starts_with(&self.root) && path != Path::new(&self.root).join("log");
        is_it.then(|| format!("write {}", path.display()))
    }

    fn ends(&mut self, thread: Pid, begun: Begun, result: i64) {
        let Begun {
            call,
            effect,
            described,
            fails,
        } = begun;
        if let Some(error) = fails {
            return fail(thread, error);
        }
        let descriptor = call.descriptor();
        match effect {
            Effect::Moves { out: false } if result > 0 && self.is_lost(thread, call, result) => {
                fail(thread, Errno::ECONNRESET);
            }
            Effect::Connects => {
                // EINPROGRESS is no failure.
                if result == 0 || result == -i64::from(nix::libc::EINPROGRESS) {
                    self.connected(descriptor, &described);
                }
            }
            Effect::Closes => drop(self.connections.remove(&descriptor)),
            Effect::Moves { out } if result > 0 => self.moved(thread, call, out, result),
            Effect::Changes if result >= 0 => {
                self.step(thread, |names| Some(names.name(&described)));
            }
            Effect::Moves { .. } | Effect::Changes | Effect::None => {}
        }
    }

    fn connected(&mut self, descriptor: i32, peer: &str) {
        let server = if peer == self.servers.api {
            Server::Api
        } else if peer == self.servers.provider {
            Server::Provider
        } else {
            return;
        };
        self.connections.insert(descriptor, server);
    }

    /// Notes bytes that were moved, unless they concern only the process and its log.
    fn moved(&mut self, thread: Pid, call: Call, out: bool, length: i64) {
        if self.seen.lock().unwrap().names.is_none() {
            return;
        }
        let descriptor = call.descriptor();
        if let Some(server) = self.connections.get(&descriptor).copied() {
            let bytes = call.moved(thread, usize::try_from(length).unwrap_or(0));
            self.step(thread, |names| match out {
                true => names.sent(server, descriptor, &bytes),
                false => names.received(server, descriptor, &bytes),
            });
        } else if out && let Some(written) = self.written(thread, call) {
            self.step(thread, |names| Some(names.name(&written)));
        }
    }

    /// Notes a step, and kills the program or holds the thread if it is the one.
    fn step(&mut self, thread: Pid, name: impl FnOnce(&mut Names) -> Option<String>) {
        let mut seen = self.seen.lock().unwrap();
        let how = seen.at.as_ref().map(|(_, how)| *how);
        if seen.is_hit && how != Some(How::Held) {
            return;
        }
        let Some(name) = seen.names.as_mut().and_then(name) else {
            return;
        };
        let is_it = matches!(&seen.at, Some((step, _)) if *step == name);
        seen.steps.push(name);
        match how {
            Some(How::Stopped) if is_it => {
                seen.is_hit = true;
                let _ = kill(self.leader, Signal::SIGKILL);
            }
            Some(How::Held) if is_it => {
                seen.is_hit = true;
                self.held = Some(thread);
            }
            _ => {}
        }
    }
}
