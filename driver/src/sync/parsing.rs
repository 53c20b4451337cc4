//! Runs the reading and parsing of synced objects in threads of their own.
//!
//! The author of the objects determines how long that takes. So it never takes one of the threads
//! that mounts and unmounts need, a namespace has one thread at a time, and the namespaces take
//! turns. A job that no caller waits for any more is told so, and keeps its thread until it has
//! ended. An object that was refused as a certificate or key is not read again while it is the same.

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

/// The number of refused objects that are remembered. One that is forgotten is read once more.
const MAX_REFUSED: usize = 500;

/// The number of jobs that run at once. A long job leaves another thread to the other namespaces.
const THREADS: usize = 2;

/// Runs jobs, each in a thread that ends with it.
pub(super) struct Parsing {
    namespaces: Turns<String>,
    threads: Arc<Semaphore>,
}

/// The caller of a job, which may stop waiting for the result.
#[derive(Clone, Default)]
pub(super) struct Caller {
    given_up: Arc<AtomicBool>,
}

impl Caller {
    /// Returns whether the job may end, because no caller waits for its result any more.
    pub(super) fn is_gone(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// Makes a caller that has stopped waiting.
    #[cfg(test)]
    pub(super) fn gone() -> Self {
        let caller = Self::default();
        caller.given_up.store(true, Ordering::Relaxed);
        caller
    }
}

/// Tells a job, when this is dropped, that no caller waits for it any more.
struct GiveUp(Caller);

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
    /// Runs a job for a namespace when it is that namespace's turn. Dropping the future tells the job
    /// that it may end.
    ///
    /// # Errors
    /// Fails if no thread can be started, or the job panicked.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        namespace: &str,
        job: impl FnOnce(&Caller) -> T + Send + 'static,
    ) -> io::Result<T> {
        let turn = self.namespaces.take(namespace.to_owned()).await;
        // At most one job of a namespace waits here, so that namespaces take turns.
        let thread = Arc::clone(&self.threads).acquire_owned().await;
        let caller = Caller::default();
        let _give_up = GiveUp(caller.clone());
        let (answer, answered) = oneshot::channel();
        thread::Builder::new()
            .name("parse".to_owned())
            .spawn(move || {
                let _held = (turn, thread);
                // The panic hook has logged a panic.
                if let Ok(result) = catch_unwind(AssertUnwindSafe(|| job(&caller))) {
                    // Fails if no caller waits any more.
                    let _ = answer.send(result);
                }
            })?;
        answered
            .await
            .map_err(|_| io::Error::other("a bug in the driver; see the driver's log on this node"))
    }
}

/// The objects that were refused as certificates and keys, by their digests.
#[derive(Default)]
pub(super) struct RefusedObjects(Mutex<Refused>);

#[derive(Default)]
struct Refused {
    reasons: HashMap<Digest, Unusable>,
    /// From the oldest to the newest.
    in_order: VecDeque<Digest>,
}

impl RefusedObjects {
    /// Returns why an object was refused, if it was.
    pub(super) fn find(&self, of: &Digest) -> Option<Unusable> {
        let refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        refused.reasons.get(of).cloned()
    }

    /// Remembers a refused object, in place of the oldest one if there are too many.
    pub(super) fn add(&self, of: Digest, why: Unusable) {
        let mut refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.reasons.insert(of, why).is_some() {
            return;
        }
        refused.in_order.push_back(of);
        if refused.in_order.len() > MAX_REFUSED
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
    fn the_objects_that_were_refused_last_are_remembered() {
        let refused = RefusedObjects::default();
        let of = |number: usize| Digest::of([&number.to_be_bytes()[..]]);
        for number in 0..2 * MAX_REFUSED {
            let why = Unusable::because(number.to_string());
            refused.add(of(number), why.clone());
            refused.add(of(number), why);
        }
        assert!(refused.find(&of(0)).is_none());
        let found = refused.find(&of(MAX_REFUSED)).unwrap();
        assert_eq!(found.to_string(), MAX_REFUSED.to_string());
        assert_eq!(refused.0.lock().unwrap().reasons.len(), MAX_REFUSED);
    }

    use tokio::time::timeout;

    const LONG: Duration = Duration::from_secs(60);

    /// Returns a job that runs until the sender is dropped or no caller waits for it.
    fn endless() -> (mpsc::Sender<()>, impl FnOnce(&Caller) + Send + 'static) {
        let (hold, held) = mpsc::channel::<()>();
        let job = move |caller: &Caller| {
            let step = Duration::from_millis(1);
            while !caller.is_gone()
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
                let job = move |_: &Caller| {
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
    async fn a_job_without_a_caller_ends_and_frees_its_thread() {
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
