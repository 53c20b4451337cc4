//! Limits how many callers with the same key run at once. Others wait for their turn in the order of
//! their calls. Callers with different keys do not wait for each other.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The turns of all keys. A key without a turn in use and without a waiting caller takes no memory.
pub struct Turns<K> {
    at_once: usize,
    queues: Mutex<HashMap<K, Arc<Semaphore>>>,
}

/// A turn. Dropping it ends it.
pub struct Turn {
    _permit: Option<OwnedSemaphorePermit>,
}

impl<K: Hash + Eq> Turns<K> {
    /// Creates turns of which each key has `at_once` at the same time.
    pub fn new(at_once: usize) -> Self {
        Self {
            at_once,
            queues: Mutex::default(),
        }
    }

    /// Waits for a turn of this key.
    pub async fn take(&self, key: K) -> Turn {
        let queue = {
            let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
            // A waiting caller, and a turn that is in use, have a clone of the queue.
            queues.retain(|_, queue| Arc::strong_count(queue) > 1);
            let new = || Arc::new(Semaphore::new(self.at_once));
            Arc::clone(queues.entry(key).or_insert_with(new))
        };
        // Acquiring fails only if the queue is closed, which never happens.
        let permit = queue.acquire_owned().await.ok();
        Turn { _permit: permit }
    }

    #[cfg(test)]
    fn keys(&self) -> usize {
        self.queues.lock().unwrap().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{future::Future, pin::pin, task::Poll};

    async fn is_ready<F: Future>(future: F) -> bool {
        let mut future = pin!(future);
        std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context).is_ready())).await
    }

    #[tokio::test]
    async fn one_key_waits_and_the_others_do_not() {
        let turns = Turns::new(2);
        let (first, _second) = (turns.take("a").await, turns.take("a").await);
        assert!(!is_ready(turns.take("a")).await);
        assert!(is_ready(turns.take("b")).await);
        drop(first);
        assert!(is_ready(turns.take("a")).await);
    }

    #[tokio::test]
    async fn keys_that_nobody_uses_are_forgotten() {
        let turns = Turns::new(1);
        for number in 0..1000 {
            turns.take(number).await;
        }
        let _turn = turns.take(0).await;
        assert_eq!(turns.keys(), 1);
    }
}
