//! The memory that the answers of one provider take, and who waits for some.
//!
//! How large an answer is stands in its first five bytes; the rest stays with the provider until
//! there is memory for it. A namespace may hold half of the memory, and namespaces take turns.
//! One answer always gets what it needs, however small the memory is.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::line::{Line, Owner};

/// The memory for the answers of one provider.
pub(super) struct Memory {
    most: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    holders: Vec<Holder>,
    last_id: u64,
    waiting: Line<Wish>,
}

struct Holder {
    id: u64,
    owner: Owner,
    bytes: usize,
}

struct Wish {
    bytes: usize,
    sender: oneshot::Sender<Held>,
}

/// Memory that one answer holds. Dropping it gives it to the next.
pub(super) struct Held {
    memory: Arc<Memory>,
    id: u64,
    held: bool,
}

impl Memory {
    /// Memory of `most` bytes.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            state: Mutex::default(),
        })
    }

    /// Waits for `bytes`. A dropped future has none and waits for none.
    pub(super) async fn take(self: &Arc<Self>, owner: &Owner, bytes: usize) -> Held {
        loop {
            let held = {
                let (sender, held) = oneshot::channel();
                self.lock()
                    .waiting
                    .push(owner.clone(), Wish { bytes, sender });
                held
            };
            self.let_through();
            // The memory outlives this call, and nobody drops a sender without an answer.
            if let Ok(held) = held.await {
                return held;
            }
        }
    }

    fn let_through(self: &Arc<Self>) {
        loop {
            let (wish, id) = {
                let mut state = self.lock();
                let Some((owner, wish)) = state.next(self.most) else {
                    return;
                };
                state.last_id += 1;
                let (id, bytes) = (state.last_id, wish.bytes);
                state.holders.push(Holder { id, owner, bytes });
                (wish, id)
            };
            let held = Held {
                memory: Arc::clone(self),
                id,
                held: true,
            };
            // Who has stopped waiting in this moment gives it back without calling this again.
            if let Err(mut unwanted) = wish.sender.send(held) {
                unwanted.held = false;
                self.lock().forget(id);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The lists are whole whoever panicked while holding them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whose turn it is. One who is next and needs more than there is holds up those behind, so
    /// that it gets its turn.
    fn next(&mut self, most: usize) -> Option<(Owner, Wish)> {
        self.waiting.retain(|wish| !wish.sender.is_closed());
        let holders = &self.holders;
        let total: usize = holders.iter().map(|holder| holder.bytes).sum();
        let within_share = |owner: &Owner, wish: &Wish| {
            let own: usize = holders
                .iter()
                .filter(|holder| holder.owner.namespace == owner.namespace)
                .map(|holder| holder.bytes)
                .sum();
            own == 0 || own.saturating_add(wish.bytes) <= most / 2
        };
        let fits = |wish: &Wish| total == 0 || total.saturating_add(wish.bytes) <= most;
        self.waiting.take_if(within_share, |_, wish| fits(wish))
    }

    fn forget(&mut self, id: u64) {
        self.holders.retain(|holder| holder.id != id);
    }
}

impl Held {
    /// The answer has been read and takes this much.
    pub(super) fn shrink_to(&self, bytes: usize) {
        {
            let mut state = self.memory.lock();
            if let Some(holder) = state.holders.iter_mut().find(|h| h.id == self.id) {
                holder.bytes = holder.bytes.min(bytes);
            }
        }
        self.memory.let_through();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.held {
            self.memory.lock().forget(self.id);
            self.memory.let_through();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{future::Future, pin::Pin, task::Poll};

    type Taking = Pin<Box<dyn Future<Output = Held>>>;

    fn taking(memory: &Arc<Memory>, namespace: &str, bytes: usize) -> Taking {
        let (memory, owner) = (Arc::clone(memory), Owner::new(namespace, "db"));
        Box::pin(async move { memory.take(&owner, bytes).await })
    }

    fn now(taking: &mut Taking) -> Option<Held> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        // All of a test is one poll for tokio, which would make a channel wait for the next one.
        let taking = std::pin::pin!(tokio::task::unconstrained(taking.as_mut()));
        match taking.poll(&mut context) {
            Poll::Ready(held) => Some(held),
            Poll::Pending => None,
        }
    }

    fn total(memory: &Memory) -> usize {
        memory
            .lock()
            .holders
            .iter()
            .map(|holder| holder.bytes)
            .sum()
    }

    #[test]
    fn an_answer_that_is_smaller_than_feared_gives_back_the_rest() {
        let memory = Memory::new(20);
        let first = now(&mut taking(&memory, "a", 10)).unwrap();
        let _second = now(&mut taking(&memory, "b", 10)).unwrap();
        let mut third = taking(&memory, "c", 9);
        assert!(now(&mut third).is_none());
        first.shrink_to(1);
        assert!(now(&mut third).is_some());
        first.shrink_to(100);
        assert_eq!(total(&memory), 11, "it never grows");
    }

    #[test]
    fn one_answer_goes_through_however_small_the_memory() {
        let memory = Memory::new(5);
        let only = now(&mut taking(&memory, "a", 10)).unwrap();
        let mut next = taking(&memory, "b", 10);
        assert!(now(&mut next).is_none());
        drop(only);
        assert!(now(&mut next).is_some());
    }

    #[test]
    fn a_namespace_holds_half_and_a_large_wish_gets_its_turn() {
        let memory = Memory::new(100);
        let _held = now(&mut taking(&memory, "crowd", 50)).unwrap();
        let mut more = taking(&memory, "crowd", 1);
        assert!(now(&mut more).is_none());
        let small = now(&mut taking(&memory, "web", 40)).unwrap();
        let mut large = taking(&memory, "files", 50);
        assert!(now(&mut large).is_none());
        let mut later = taking(&memory, "mail", 1);
        assert!(
            now(&mut later).is_none(),
            "it would go ahead of the large one"
        );
        drop(small);
        assert!(now(&mut large).is_some());
        assert!(now(&mut later).is_some());
    }

    proptest! {
        /// Whoever comes, goes and gives up: no more is held than there is, but for one answer
        /// alone, and everybody gets what they wait for.
        #[test]
        fn memory_is_bounded_and_everybody_gets_some(
            most in 1_usize..200,
            steps in proptest::collection::vec((0..4_u8, 0..5_u8, 1..120_usize, any::<usize>()), 1..100),
        ) {
            let memory = Memory::new(most);
            let (mut waiting, mut held): (Vec<Taking>, Vec<Held>) = Default::default();
            let admit = |waiting: &mut Vec<Taking>, held: &mut Vec<Held>| {
                waiting.retain_mut(|taking| match now(taking) {
                    Some(got) => { held.push(got); false }
                    None => true,
                });
            };
            for (what, namespace, bytes, which) in steps {
                match what {
                    0 | 1 => waiting.push(taking(&memory, &namespace.to_string(), bytes)),
                    2 if !held.is_empty() => drop(held.swap_remove(which % held.len())),
                    3 if !waiting.is_empty() => drop(waiting.swap_remove(which % waiting.len())),
                    _ => {}
                }
                admit(&mut waiting, &mut held);
                prop_assert!(total(&memory) <= most || held.len() == 1);
            }
            while !waiting.is_empty() {
                prop_assert!(held.pop().is_some(), "somebody waits while nothing is held");
                admit(&mut waiting, &mut held);
            }
            drop(held);
            prop_assert_eq!(total(&memory), 0);
        }
    }
}
