//! The memory for the answers of one provider.
//!
//! The first five bytes of an answer tell its length. The rest stays with the provider until there
//! is memory for it. A namespace may hold half of the memory, and namespaces take turns. A single
//! answer always gets the memory that it needs, even if that is more than there is.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::line::{ClassName, Line};

/// The memory for the answers of one provider.
pub(super) struct AnswerMemory {
    most: usize,
    answers: Mutex<Answers>,
}

#[derive(Default)]
struct Answers {
    held: Vec<Answer>,
    last_id: u64,
    waiting: Line<Arriving>,
}

/// An answer that has memory.
struct Answer {
    id: u64,
    class: ClassName,
    bytes: usize,
}

/// An answer that waits for memory.
struct Arriving {
    bytes: usize,
    sender: oneshot::Sender<Reserved>,
}

/// The memory of one answer. Dropping it frees the memory for the next answer.
pub(super) struct Reserved {
    memory: Arc<AnswerMemory>,
    id: u64,
    held: bool,
}

impl AnswerMemory {
    /// Creates a memory of `most` bytes.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            answers: Mutex::default(),
        })
    }

    /// Waits until `bytes` are free, and reserves them. Dropping the future ends the wait.
    pub(super) async fn reserve(self: &Arc<Self>, class: &ClassName, bytes: usize) -> Reserved {
        loop {
            let reserved = {
                let (sender, reserved) = oneshot::channel();
                let arriving = Arriving { bytes, sender };
                self.lock().waiting.push(class.clone(), arriving);
                reserved
            };
            self.let_through();
            // A sender is dropped unused only if its receiver is gone.
            if let Ok(reserved) = reserved.await {
                return reserved;
            }
        }
    }

    /// Reserves memory for answers that wait, as long as there is some.
    fn let_through(self: &Arc<Self>) {
        loop {
            let (arriving, id) = {
                let mut answers = self.lock();
                let Some((class, arriving)) = answers.next(self.most) else {
                    return;
                };
                answers.last_id += 1;
                let (id, bytes) = (answers.last_id, arriving.bytes);
                answers.held.push(Answer { id, class, bytes });
                (arriving, id)
            };
            let reserved = Reserved {
                memory: Arc::clone(self),
                id,
                held: true,
            };
            // If the receiver has just stopped waiting, the memory is freed here: dropping
            // `reserved` would call this function again.
            if let Err(mut unused) = arriving.sender.send(reserved) {
                unused.held = false;
                self.lock().free(id);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Answers> {
        // A panic elsewhere leaves the lists whole.
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Answers {
    /// Takes the answer whose turn it is. If it needs more memory than there is, those behind it
    /// wait, so that it gets its turn.
    fn next(&mut self, most: usize) -> Option<(ClassName, Arriving)> {
        self.waiting.retain(|arriving| !arriving.sender.is_closed());
        let held = &self.held;
        let total: usize = held.iter().map(|answer| answer.bytes).sum();
        let within_share = |class: &ClassName, arriving: &Arriving| {
            let own: usize = held
                .iter()
                .filter(|answer| answer.class.namespace == class.namespace)
                .map(|answer| answer.bytes)
                .sum();
            own == 0 || own.saturating_add(arriving.bytes) <= most / 2
        };
        let fits = |arriving: &Arriving| total == 0 || total.saturating_add(arriving.bytes) <= most;
        self.waiting.take_if(within_share, fits)
    }

    fn free(&mut self, id: u64) {
        self.held.retain(|answer| answer.id != id);
    }
}

impl Reserved {
    /// Frees what the answer does not need: it has been decoded and takes `bytes`.
    pub(super) fn shrink_to(&self, bytes: usize) {
        {
            let mut answers = self.memory.lock();
            if let Some(answer) = answers.held.iter_mut().find(|a| a.id == self.id) {
                answer.bytes = answer.bytes.min(bytes);
            }
        }
        self.memory.let_through();
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.held {
            self.memory.lock().free(self.id);
            self.memory.let_through();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{future::Future, pin::Pin, task::Poll};

    type Taking = Pin<Box<dyn Future<Output = Reserved>>>;

    fn taking(memory: &Arc<AnswerMemory>, namespace: &str, bytes: usize) -> Taking {
        let (memory, class) = (Arc::clone(memory), ClassName::new(namespace, "db"));
        Box::pin(async move { memory.reserve(&class, bytes).await })
    }

    fn now(taking: &mut Taking) -> Option<Reserved> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        // A test is one poll of a task. Without `unconstrained`, its channels would use up the
        // budget that tokio gives to a poll, and wait for the next one.
        let taking = std::pin::pin!(tokio::task::unconstrained(taking.as_mut()));
        match taking.poll(&mut context) {
            Poll::Ready(held) => Some(held),
            Poll::Pending => None,
        }
    }

    fn total(memory: &AnswerMemory) -> usize {
        let answers = memory.lock();
        answers.held.iter().map(|answer| answer.bytes).sum()
    }

    #[test]
    fn an_answer_that_is_smaller_than_expected_gives_back_the_rest() {
        let memory = AnswerMemory::new(20);
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
        let memory = AnswerMemory::new(5);
        let only = now(&mut taking(&memory, "a", 10)).unwrap();
        let mut next = taking(&memory, "b", 10);
        assert!(now(&mut next).is_none());
        drop(only);
        assert!(now(&mut next).is_some());
    }

    #[test]
    fn a_namespace_holds_half_and_a_large_answer_gets_its_turn() {
        let memory = AnswerMemory::new(100);
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
        /// Answers come, go and are given up in any order: no more is held than there is, except
        /// for one answer alone, and every answer gets its memory.
        #[test]
        fn memory_is_bounded_and_everybody_gets_some(
            most in 1_usize..200,
            steps in proptest::collection::vec((0..4_u8, 0..5_u8, 1..120_usize, any::<usize>()), 1..100),
        ) {
            let memory = AnswerMemory::new(most);
            let (mut waiting, mut held): (Vec<Taking>, Vec<Reserved>) = Default::default();
            let admit = |waiting: &mut Vec<Taking>, held: &mut Vec<Reserved>| {
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
