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

use ring::digest;
use tokio::sync::{Semaphore, oneshot};

use super::Problem;
use crate::turns::Turns;

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

/// What was refused, by a digest of everything that decided.
#[derive(Default)]
pub(super) struct Refusals(Mutex<Refused>);

#[derive(Default)]
struct Refused {
    problems: HashMap<[u8; 32], Problem>,
    in_order: VecDeque<[u8; 32]>,
}

/// Tells inputs apart without keeping them.
pub(super) struct Fingerprint(digest::Context);

impl Fingerprint {
    /// Begins with nothing.
    pub(super) fn new() -> Self {
        Self(digest::Context::new(&digest::SHA256))
    }

    /// Adds a part, which is never mistaken for another or for a piece of one.
    pub(super) fn add(&mut self, part: &[u8]) {
        self.0.update(&part.len().to_be_bytes());
        self.0.update(part);
    }

    /// Ends it.
    pub(super) fn finish(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.0.finish().as_ref());
        bytes
    }
}

impl Refusals {
    /// Returns why this was refused, if it was.
    pub(super) fn find(&self, of: &[u8; 32]) -> Option<Problem> {
        let refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        refused.problems.get(of).cloned()
    }

    /// Remembers a refusal, in place of the oldest one when there are many.
    pub(super) fn add(&self, of: [u8; 32], problem: Problem) {
        let mut refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.problems.insert(of, problem).is_some() {
            return;
        }
        refused.in_order.push_back(of);
        if refused.in_order.len() > MOST_REFUSALS
            && let Some(oldest) = refused.in_order.pop_front()
        {
            refused.problems.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::Trouble;
    use std::{
        collections::HashSet,
        sync::{Mutex, mpsc},
        time::Duration,
    };

    #[test]
    fn the_newest_refusals_are_remembered() {
        let refusals = Refusals::default();
        let of = |number: usize| {
            let mut fingerprint = Fingerprint::new();
            fingerprint.add(&number.to_be_bytes());
            fingerprint.finish()
        };
        for number in 0..2 * MOST_REFUSALS {
            let problem = Problem::new(Trouble::InvalidCertificate, number.to_string());
            refusals.add(of(number), problem.clone());
            refusals.add(of(number), problem);
        }
        assert!(refusals.find(&of(0)).is_none());
        let found = refusals.find(&of(MOST_REFUSALS)).unwrap();
        assert_eq!(found.to_string(), MOST_REFUSALS.to_string());
        assert_eq!(refusals.0.lock().unwrap().problems.len(), MOST_REFUSALS);
    }

    #[test]
    fn parts_are_told_apart() {
        let fingerprints = [
            &[&b"ab"[..], b"c"][..],
            &[b"a", b"bc"],
            &[b"abc"],
            &[b"", b"abc"],
        ];
        let fingerprints = fingerprints.map(|parts| {
            let mut fingerprint = Fingerprint::new();
            parts.iter().for_each(|part| fingerprint.add(part));
            fingerprint.finish()
        });
        assert_eq!(HashSet::from(fingerprints).len(), 4);
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
