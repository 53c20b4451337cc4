//! Runs file system work where it may block, and tells whether that work gets anywhere.
//!
//! Each publish and each unpublish needs one of a few threads. A disk or a mount that does not
//! answer can keep all of them, and then the driver answers calls and can do none. Only a restart
//! helps then, and so whoever asks for the driver's health is told.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{Instant, timeout},
};

/// How long a question may wait among the work before the progress of the others is looked at.
/// Short against the three seconds in which the livenessprobe sidecar wants its answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long no work may have ended, while some waits, until the threads count as stuck.
const STUCK_AFTER: Duration = Duration::from_secs(30);

/// How much work has ended since the driver started. The threads are the process's.
static ENDED: AtomicU64 = AtomicU64::new(0);

/// Runs file system work where it may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let ended = spawn_blocking(work).await;
    ENDED.fetch_add(1, Ordering::Relaxed);
    match ended {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// Whether the threads get anywhere.
pub struct Health {
    patience: Duration,
    stuck_after: Duration,
    ended: &'static AtomicU64,
    question: Arc<Question>,
}

/// A piece of work that does nothing, of which at most one waits.
struct Question {
    state: Mutex<State>,
    answered: Notify,
}

struct State {
    waits: bool,
    /// How much work had ended when progress was last seen, and when that was.
    ended: u64,
    since: Instant,
}

impl Default for Health {
    fn default() -> Self {
        Self::of(&ENDED, PATIENCE, STUCK_AFTER)
    }
}

impl Health {
    fn of(ended: &'static AtomicU64, patience: Duration, stuck_after: Duration) -> Self {
        let state = State {
            waits: false,
            ended: 0,
            since: Instant::now(),
        };
        Self {
            patience,
            stuck_after,
            ended,
            question: Arc::new(Question {
                state: Mutex::new(state),
                answered: Notify::new(),
            }),
        }
    }

    /// Checks that file system work ends. However much of it waits, it is enough that some of it
    /// has ended lately.
    ///
    /// # Errors
    /// A sentence for the log when none has.
    pub async fn check(&self) -> Result<(), String> {
        let question = &self.question;
        // Hears an answer from now on.
        let answered = question.answered.notified();
        if !std::mem::replace(&mut question.state().waits, true) {
            self.progressed();
            let asked = Arc::clone(question);
            spawn_blocking(move || {
                asked.state().waits = false;
                asked.answered.notify_waiters();
            });
        }
        if timeout(self.patience, answered).await.is_ok() || !question.state().waits {
            return Ok(());
        }
        let (seen, since) = {
            let state = question.state();
            (state.ended, state.since)
        };
        if self.ended.load(Ordering::Relaxed) != seen {
            self.progressed();
            return Ok(());
        }
        let stuck = since.elapsed();
        if stuck < self.stuck_after {
            return Ok(());
        }
        Err(format!(
            "no work on a file system has ended for {} seconds although some waits: a disk, a mount or the state directory does not answer, and no volume can be published or taken down",
            stuck.as_secs()
        ))
    }

    fn progressed(&self) {
        let mut state = self.question.state();
        state.ended = self.ended.load(Ordering::Relaxed);
        state.since = Instant::now();
    }
}

impl Question {
    fn state(&self) -> MutexGuard<'_, State> {
        // Whoever panicked while holding it left every part of it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use tokio::runtime::Runtime;

    const LONG: Duration = Duration::from_secs(60);

    /// A runtime with one thread for work, and a health of its own.
    fn one_thread(stuck_after: Duration) -> (Runtime, Health) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        let ended = Box::leak(Box::new(AtomicU64::new(0)));
        (
            runtime,
            Health::of(ended, Duration::from_millis(5), stuck_after),
        )
    }

    /// Keeps the thread until the sender is dropped.
    fn keep_busy() -> mpsc::Sender<()> {
        let (hold, held) = mpsc::channel::<()>();
        spawn_blocking(move || held.recv());
        hold
    }

    async fn until_it_is(health: &Health, able: bool) {
        let reached = async { while health.check().await.is_ok() != able {} };
        assert!(timeout(LONG, reached).await.is_ok(), "never {able}");
    }

    #[test]
    fn threads_that_are_stuck_are_told_from_those_that_are_not() {
        let (runtime, health) = one_thread(Duration::from_millis(50));
        runtime.block_on(async {
            health.check().await.unwrap();
            for _ in 0..3 {
                let hold = keep_busy();
                until_it_is(&health, false).await;
                drop(hold);
                until_it_is(&health, true).await;
            }
        });
    }

    /// The thread is always busy, and the question never gets its turn; but other work ends.
    #[test]
    fn threads_that_are_busy_are_able() {
        let (runtime, health) = one_thread(Duration::ZERO);
        runtime.block_on(async {
            let hold = keep_busy();
            for _ in 0..20 {
                let (checked, ()) = tokio::join!(health.check(), async {
                    health.ended.fetch_add(1, Ordering::Relaxed);
                });
                checked.unwrap();
            }
            health.check().await.unwrap_err();
            drop(hold);
        });
    }

    #[test]
    fn one_question_waits_at_most() {
        let (runtime, health) = one_thread(LONG);
        runtime.block_on(async {
            let hold = keep_busy();
            for _ in 0..20 {
                health.check().await.unwrap();
            }
            assert_eq!(Arc::strong_count(&health.question), 2);
            drop(hold);
        });
    }
}
