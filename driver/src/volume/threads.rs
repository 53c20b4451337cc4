//! Runs file system work on threads that may block, and tells whether that work makes progress.
//!
//! Each publish and each unpublish needs one of a few threads. A disk or a mount that does not
//! answer can block all of them. Only a restart helps then, so the driver reports that it is not
//! healthy.

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

/// The time for which a health check waits for a thread before it asks for the progress of other
/// work. It is well below the three seconds within which the livenessprobe sidecar needs an answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// The time without any finished work, while some waits, after which the threads count as stuck.
const STUCK_AFTER: Duration = Duration::from_secs(30);

/// The number of pieces of work that have ended since the driver started, on the threads that the
/// whole process shares.
static ENDED: AtomicU64 = AtomicU64::new(0);

/// Runs file system work on a thread that may block.
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

/// Checks whether the threads make progress.
pub(super) struct ThreadHealth {
    patience: Duration,
    stuck_after: Duration,
    ended: &'static AtomicU64,
    probe: Arc<Probe>,
}

/// A piece of work that does nothing. At most one waits for a thread.
struct Probe {
    progress: Mutex<Progress>,
    done: Notify,
}

struct Progress {
    /// Whether a probe waits for a thread.
    probe_waits: bool,
    /// The number of pieces of work that had ended when it was last seen to grow, and when that was.
    ended: u64,
    since: Instant,
}

impl Default for ThreadHealth {
    fn default() -> Self {
        Self::of(&ENDED, PATIENCE, STUCK_AFTER)
    }
}

impl ThreadHealth {
    fn of(ended: &'static AtomicU64, patience: Duration, stuck_after: Duration) -> Self {
        let progress = Progress {
            probe_waits: false,
            ended: 0,
            since: Instant::now(),
        };
        Self {
            patience,
            stuck_after,
            ended,
            probe: Arc::new(Probe {
                progress: Mutex::new(progress),
                done: Notify::new(),
            }),
        }
    }

    /// Checks that some file system work has ended lately, however much of it waits.
    ///
    /// # Errors
    /// A sentence for the log when none has.
    pub(super) async fn check(&self) -> Result<(), String> {
        let probe = &self.probe;
        // Registered before the probe starts, so that its end is not missed.
        let done = probe.done.notified();
        if !std::mem::replace(&mut probe.progress().probe_waits, true) {
            self.progressed();
            let started = Arc::clone(probe);
            spawn_blocking(move || {
                started.progress().probe_waits = false;
                started.done.notify_waiters();
            });
        }
        if timeout(self.patience, done).await.is_ok() || !probe.progress().probe_waits {
            return Ok(());
        }
        let (seen, since) = {
            let progress = probe.progress();
            (progress.ended, progress.since)
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
            "file system operations wait, and none has ended for {} seconds: a disk, a mount or the state directory does not answer, and no volume can be published or taken down",
            stuck.as_secs()
        ))
    }

    fn progressed(&self) {
        let mut progress = self.probe.progress();
        progress.ended = self.ended.load(Ordering::Relaxed);
        progress.since = Instant::now();
    }
}

impl Probe {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        // A panic while it was held has left each field whole.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use tokio::runtime::Runtime;

    const LONG: Duration = Duration::from_secs(60);

    /// Returns a runtime with one thread for work, and a health of its own.
    fn one_thread(stuck_after: Duration) -> (Runtime, ThreadHealth) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        let ended = Box::leak(Box::new(AtomicU64::new(0)));
        (
            runtime,
            ThreadHealth::of(ended, Duration::from_millis(5), stuck_after),
        )
    }

    /// Blocks the thread until the sender is dropped.
    fn keep_busy() -> mpsc::Sender<()> {
        let (hold, held) = mpsc::channel::<()>();
        spawn_blocking(move || held.recv());
        hold
    }

    async fn until_it_is(health: &ThreadHealth, able: bool) {
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

    /// The thread is always busy, so that the probe never runs; but other work ends.
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
    fn one_probe_waits_at_most() {
        let (runtime, health) = one_thread(LONG);
        runtime.block_on(async {
            let hold = keep_busy();
            for _ in 0..20 {
                health.check().await.unwrap();
            }
            assert_eq!(Arc::strong_count(&health.probe), 2);
            drop(hold);
        });
    }
}
