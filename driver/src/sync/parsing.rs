//! Gives the reading and parsing of synced objects threads of their own.
//!
//! How long that takes is up to whoever wrote the objects. So it never takes one of the threads
//! that mounts and unmounts need, a namespace has one thread at a time, and the namespaces take
//! turns. A job that nobody waits for any more is told so, and keeps its thread until it has ended.
//! What was refused after long work is not worked on again as long as it is the same.

use std::{
    collections::{HashMap, VecDeque},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use tokio::sync::{Semaphore, oneshot};

use super::tls::Unusable;
use crate::{cluster::secrets::Digest, turns::Turns};

/// How many refusals are remembered. One that is forgotten costs its work once more.
const MOST_REFUSALS: usize = 500;

/// How many jobs run at once. One that takes long leaves another thread to the other namespaces.
const THREADS: usize = 2;

/// Runs jobs, in threads that live as long as their job.
pub(super) struct Parsing {
    namespaces: Turns<String>,
    threads: Arc<Semaphore>,
}

/// Tells a job whether somebody still waits for its result.
#[derive(Clone, Default)]
pub(super) struct Waiting {
    given_up: Arc<AtomicBool>,
}

impl Waiting {
    /// Returns whether the job may end, because nobody waits for its result any more.
    pub(super) fn is_over(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// Nobody waits.
    #[cfg(test)]
    pub(super) fn over() -> Self {
        let waiting = Self::default();
        waiting.given_up.store(true, Ordering::Relaxed);
        waiting
    }
}

/// Gives up the job of a future that is dropped.
struct GiveUp(Waiting);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.given_up.store(true, Ordering::Relaxed);
    }
}

impl Default for Parsing {
    fn default() -> Self {
        Self {
            namespaces: Turns::new(1),
            threads: Arc::new(Semaphore::new(THREADS)),
        }
    }
}

impl Parsing {
    /// Runs a job for a namespace when it is that namespace's turn. Dropping the future gives the
    /// job up.
    ///
    /// # Errors
    /// When the system has no thread for it, or the job panicked.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        namespace: &str,
        job: impl FnOnce(&Waiting) -> T + Send + 'static,
    ) -> io::Result<T> {
        let turn = self.namespaces.take(namespace.to_owned()).await;
        // A namespace has one job here at most, so that this queue is one of namespaces.
        let thread = Arc::clone(&self.threads).acquire_owned().await;
        let waiting = Waiting::default();
        let _give_up = GiveUp(waiting.clone());
        let (answer, answered) = oneshot::channel();
        thread::Builder::new()
            .name("parse".to_owned())
            .spawn(move || {
                let _held = (turn, thread);
                // The panic hook has said where it was.
                if let Ok(result) = catch_unwind(AssertUnwindSafe(|| job(&waiting))) {
                    // Nobody may wait for it any more.
                    let _ = answer.send(result);
                }
            })?;
        answered
            .await
            .map_err(|_| io::Error::other("a bug in the driver; see the driver's log on this node"))
    }
}

/// Which objects were refused as certificates and keys, and why.
#[derive(Default)]
pub(super) struct Refusals(Mutex<Refused>);

#[derive(Default)]
struct Refused {
    reasons: HashMap<Digest, Unusable>,
    in_order: VecDeque<Digest>,
}

impl Refusals {
    /// Returns why this was refused, if it was.
    pub(super) fn find(&self, of: &Digest) -> Option<Unusable> {
        let refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        refused.reasons.get(of).cloned()
    }

    /// Remembers a refusal, in place of the oldest one when there are many.
    pub(super) fn add(&self, of: Digest, why: Unusable) {
        let mut refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.reasons.insert(of, why).is_some() {
            return;
        }
        refused.in_order.push_back(of);
        if refused.in_order.len() > MOST_REFUSALS
            && let Some(oldest) = refused.in_order.pop_front()
        {
            refused.reasons.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::{Mutex, mpsc},
        time::Duration,
    };

    #[test]
    fn the_newest_refusals_are_remembered() {
        let refusals = Refusals::default();
        let of = |number: usize| Digest::of([&number.to_be_bytes()[..]]);
        for number in 0..2 * MOST_REFUSALS {
            let why = Unusable::because(number.to_string());
            refusals.add(of(number), why.clone());
            refusals.add(of(number), why);
        }
        assert!(refusals.find(&of(0)).is_none());
        let found = refusals.find(&of(MOST_REFUSALS)).unwrap();
        assert_eq!(found.to_string(), MOST_REFUSALS.to_string());
        assert_eq!(refusals.0.lock().unwrap().reasons.len(), MOST_REFUSALS);
    }

    use tokio::time::timeout;

    const LONG: Duration = Duration::from_secs(60);

    /// A job that runs until its sender is dropped or nobody waits for it.
    fn endless() -> (mpsc::Sender<()>, impl FnOnce(&Waiting) + Send + 'static) {
        let (hold, held) = mpsc::channel::<()>();
        let job = move |waiting: &Waiting| {
            let step = Duration::from_millis(1);
            while !waiting.is_over()
                && held.recv_timeout(step) == Err(mpsc::RecvTimeoutError::Timeout)
            {}
        };
        (hold, job)
    }

    #[tokio::test]
    async fn a_namespace_does_not_wait_for_the_jobs_of_another() {
        let parsing = Arc::new(Parsing::default());
        let mut holds = Vec::new();
        for _ in 0..50 {
            let (hold, job) = endless();
            holds.push(hold);
            let parsing = Arc::clone(&parsing);
            tokio::spawn(async move { parsing.run("noisy", job).await });
        }
        for _ in 0..3 {
            let answer = timeout(LONG, parsing.run("quiet", |_| 7)).await;
            assert_eq!(answer.unwrap().unwrap(), 7);
        }
    }

    #[tokio::test]
    async fn namespaces_take_turns() {
        let parsing = Arc::new(Parsing::default());
        let (first, job) = endless();
        let holding = tokio::spawn({
            let parsing = Arc::clone(&parsing);
            async move { parsing.run("holds a thread", job).await }
        });
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut jobs = tokio::task::JoinSet::new();
        let (go, wait) = mpsc::channel::<()>();
        let mut wait = Some(wait);
        for namespace in ["a", "a", "a", "a", "b", "c"] {
            let (parsing, order) = (Arc::clone(&parsing), Arc::clone(&order));
            let wait = wait.take();
            jobs.spawn(async move {
                let job = move |_: &Waiting| {
                    wait.map(|wait| wait.recv());
                    order.lock().unwrap().push(namespace);
                };
                parsing.run(namespace, job).await.unwrap();
            });
            tokio::task::yield_now().await;
        }
        drop(go);
        while let Some(job) = jobs.join_next().await {
            job.unwrap();
        }
        let order = order.lock().unwrap().clone();
        assert_eq!(order[..3], ["a", "b", "c"], "{order:?}");
        drop(first);
        holding.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_job_that_nobody_waits_for_ends_and_frees_its_thread() {
        let parsing = Parsing::default();
        for _ in 0..20 {
            let (_hold, job) = endless();
            let given_up = timeout(Duration::from_millis(5), parsing.run("a", job)).await;
            assert!(given_up.is_err());
        }
        let answer = timeout(LONG, parsing.run("a", |_| 7)).await;
        assert_eq!(answer.unwrap().unwrap(), 7);
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_frees_its_thread() {
        let parsing = Parsing::default();
        for _ in 0..5 {
            let answer = parsing.run("a", |_| -> () { panic!("canary-77") }).await;
            let error = answer.unwrap_err().to_string();
            assert!(!error.contains("canary"), "{error}");
        }
        assert_eq!(parsing.run("a", |_| 7).await.unwrap(), 7);
    }
}
