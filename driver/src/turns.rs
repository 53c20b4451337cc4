//! Takes turns: of those who want the same thing for the same reason, only so many go at once, in
//! the order in which they came. Whoever has another reason does not wait for them.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Lets at most a fixed number go at once for each key. A key that nobody waits for and nobody
/// holds a turn of takes no memory.
pub struct Turns<K> {
    at_once: usize,
    queues: Mutex<HashMap<K, Arc<Semaphore>>>,
}

/// A turn. It ends when this is dropped.
pub struct Turn {
    _permit: Option<OwnedSemaphorePermit>,
}

impl<K: Hash + Eq> Turns<K> {
    /// Lets `at_once` go at once for each key.
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
            // Whoever waits for a queue or holds a turn of it has a clone of it.
            queues.retain(|_, queue| Arc::strong_count(queue) > 1);
            let new = || Arc::new(Semaphore::new(self.at_once));
            Arc::clone(queues.entry(key).or_insert_with(new))
        };
        // Nobody closes a queue.
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
