//! Holds log lines for the one thread that writes them.
//!
//! Nobody who logs a line waits for the reader of standard error: a container runtime that stops reading
//! would stop all calls with it. tracing-appender has such a queue as well, but bounds the number of lines
//! and not their bytes, starts its thread before the process is hardened, and does not say in the log what
//! is missing there.

use std::{
    collections::VecDeque,
    io::Write,
    mem,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// The bytes of the lines that wait.
const MOST_BYTES: usize = 1024 * 1024;

/// Lines that wait to be written.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// Told when the first line comes, and when the last one is written.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    has_writer: bool,
    lines: VecDeque<String>,
    /// The bytes of `lines` and of the line that is being written.
    bytes: usize,
    /// The number of lines that were lost since the last line of `lines`.
    lost: u64,
}

impl State {
    fn is_idle(&self) -> bool {
        self.bytes == 0 && self.lost == 0
    }
}

impl Queue {
    /// Adds a line, or counts it as lost if there is no room. Gives it back if no thread writes lines yet.
    ///
    /// Once a line is lost, so are all others until those that wait are written: the log then has one gap
    /// and not many.
    pub(super) fn add(&self, line: String) -> Option<String> {
        let mut state = self.lock();
        if !state.has_writer {
            return Some(line);
        }
        if state.lost > 0 || state.bytes + line.len() > MOST_BYTES {
            state.lost += 1;
            return None;
        }
        let was_idle = state.is_idle();
        state.bytes += line.len();
        state.lines.push_back(line);
        if was_idle {
            self.changed.notify_all();
        }
        None
    }

    /// Says whether a thread writes the lines from now on.
    pub(super) fn has_writer(&self, has_writer: bool) {
        self.lock().has_writer = has_writer;
    }

    /// Writes lines as they come, for the rest of the process. `about_lost` makes the line that tells how
    /// many were lost.
    pub(super) fn write_to(&self, mut out: impl Write, about_lost: impl Fn(u64) -> String) -> ! {
        loop {
            let line = self.next(&about_lost);
            // A failure to write to standard error cannot be reported.
            let _ = out.write_all(line.as_bytes());
            self.written(&line);
        }
    }

    fn next(&self, about_lost: impl Fn(u64) -> String) -> String {
        let waits = |state: &mut State| state.lines.is_empty() && state.lost == 0;
        let state = self.changed.wait_while(self.lock(), waits);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = state.lines.pop_front() {
            return line;
        }
        let line = about_lost(mem::take(&mut state.lost));
        state.bytes += line.len();
        line
    }

    fn written(&self, line: &str) {
        let mut state = self.lock();
        state.bytes -= line.len();
        if state.is_idle() {
            // The room for thousands of lines is not kept.
            state.lines = VecDeque::new();
            self.changed.notify_all();
        }
    }

    /// Waits until all lines are written, but no longer than this. Returns whether they are.
    pub(super) fn flush(&self, within: Duration) -> bool {
        let busy = |state: &mut State| !state.is_idle();
        let waited = self.changed.wait_timeout_while(self.lock(), within, busy);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.is_idle()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io,
        sync::{Arc, mpsc},
        thread,
        time::Instant,
    };

    /// Hands over what is written, and waits until somebody takes it.
    struct Pipe(mpsc::SyncSender<String>);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let text = String::from_utf8_lossy(bytes).into_owned();
            self.0.send(text).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Returns a queue, and the end of the pipe that its thread writes to.
    fn queue() -> (Arc<Queue>, mpsc::Receiver<String>) {
        let (sender, receiver) = mpsc::sync_channel(0);
        let queue = Arc::new(Queue::default());
        queue.has_writer(true);
        let own = Arc::clone(&queue);
        thread::spawn(move || own.write_to(Pipe(sender), |lost| format!("{lost} lost")));
        (queue, receiver)
    }

    #[test]
    fn a_line_is_given_back_while_no_thread_writes() {
        let queue = Queue::default();
        assert_eq!(queue.add("early".to_owned()).as_deref(), Some("early"));
        assert!(queue.flush(Duration::ZERO));
        queue.has_writer(true);
        assert_eq!(queue.add("later".to_owned()), None);
        assert!(!queue.flush(Duration::ZERO));
    }

    #[test]
    fn what_has_no_room_is_lost_and_told_in_its_place() {
        const BYTES: usize = 1000;
        let (queue, written) = queue();
        let line = |number: usize| format!("{number:0BYTES$}");
        let fit = MOST_BYTES / BYTES;
        for round in 0..3 {
            for number in 0..fit + 7 {
                assert_eq!(queue.add(line(number)), None);
            }
            let since = Instant::now();
            assert!(!queue.flush(Duration::from_millis(20)), "nobody reads");
            assert!(since.elapsed() < Duration::from_secs(10));
            assert!(queue.lock().bytes <= MOST_BYTES, "round {round}");

            for number in 0..fit {
                assert_eq!(written.recv().unwrap(), line(number));
                // There is room again, and one gap all the same.
                if number < fit - 1 {
                    assert_eq!(queue.add("in the gap".to_owned()), None);
                }
            }
            assert_eq!(written.recv().unwrap(), format!("{} lost", fit + 6));
            assert_eq!(queue.add("after".to_owned()), None);
            assert_eq!(written.recv().unwrap(), "after");
            assert!(queue.flush(Duration::from_secs(60)));
            assert_eq!(queue.lock().lines.capacity(), 0, "round {round}");
        }
    }
}
