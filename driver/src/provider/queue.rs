//! Who may call a provider now, and who waits.
//!
//! A provider has as many calls in flight as it may have, and answers take as much memory as
//! they may take. A call reserves the largest answer that is accepted, for nobody knows how
//! large an answer is before it is there; from then on it holds what the answer really takes,
//! until its files are written. At least one call is always let through, however small the
//! memory.
//!
//! First mounts go ahead of refreshes, because a pod waits for them. A refresh that waits is let
//! through after a number of first mounts all the same. Whoever stops waiting loses the place
//! in the queue; whoever is done gives room to the next.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

use super::Urgency;

/// After so many first mounts in a row a refresh that waits is let through.
const FIRST_MOUNTS_IN_A_ROW: usize = 8;

/// The queue in front of one provider.
pub(super) struct Queue {
    max_calls: usize,
    max_bytes: usize,
    /// What a call reserves.
    answer_bytes: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    calls: usize,
    bytes: usize,
    first_mounts: Waiting,
    refreshes: Waiting,
    /// How many first mounts were let through ahead of a waiting refresh.
    in_a_row: usize,
}

/// Those who wait, in their order. One who has stopped waiting has closed the channel.
type Waiting = VecDeque<oneshot::Sender<Place>>;

/// The right to have one call in flight, and after it the memory of its answer. Dropping it
/// lets the next one through.
pub(super) struct Place {
    queue: Arc<Queue>,
    in_flight: bool,
    bytes: usize,
}

impl Queue {
    pub(super) fn new(max_calls: usize, max_bytes: usize, answer_bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            max_calls: max_calls.max(1),
            max_bytes,
            answer_bytes,
            state: Mutex::default(),
        })
    }

    /// Waits for a place. A dropped future has none and waits for none.
    pub(super) async fn enter(self: &Arc<Self>, urgency: Urgency) -> Place {
        loop {
            let place = {
                let (sender, place) = oneshot::channel();
                let mut state = self.lock();
                let line = match urgency {
                    Urgency::FirstMount => &mut state.first_mounts,
                    Urgency::Refresh => &mut state.refreshes,
                };
                line.retain(|waiting| !waiting.is_closed());
                line.push_back(sender);
                place
            };
            self.let_through();
            // The queue outlives this call, and nobody drops a sender without an answer.
            if let Ok(place) = place.await {
                return place;
            }
        }
    }

    /// How many calls are in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.lock().calls
    }

    /// Gives places away as long as there is room.
    fn let_through(self: &Arc<Self>) {
        loop {
            let next = {
                let mut state = self.lock();
                if !self.has_room(&state) {
                    return;
                }
                let Some(next) = state.next() else { return };
                state.calls += 1;
                state.bytes += self.answer_bytes;
                next
            };
            let place = Place {
                queue: Arc::clone(self),
                in_flight: true,
                bytes: self.answer_bytes,
            };
            // Who has stopped waiting in this moment gives the place back, without calling this
            // function again, which may be many calls deep already.
            if let Err(mut unwanted) = next.send(place) {
                unwanted.give_back();
            }
        }
    }

    fn has_room(&self, state: &State) -> bool {
        let alone = state.calls == 0 && state.bytes == 0;
        state.calls < self.max_calls
            && (alone || state.bytes.saturating_add(self.answer_bytes) <= self.max_bytes)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Counters and queues are whole whoever panicked while holding them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whose turn it is.
    fn next(&mut self) -> Option<oneshot::Sender<Place>> {
        for line in [&mut self.first_mounts, &mut self.refreshes] {
            line.retain(|waiting| !waiting.is_closed());
        }
        let refresh_is_due = self.in_a_row >= FIRST_MOUNTS_IN_A_ROW || self.first_mounts.is_empty();
        if refresh_is_due && let Some(refresh) = self.refreshes.pop_front() {
            self.in_a_row = 0;
            return Some(refresh);
        }
        if self.refreshes.is_empty() {
            self.in_a_row = 0;
        } else {
            self.in_a_row += 1;
        }
        self.first_mounts.pop_front()
    }
}

impl Place {
    /// The answer is there and takes this much memory. The call is over; the memory is held
    /// until this is dropped.
    pub(super) fn answered(mut self, bytes: usize) -> Self {
        {
            let mut state = self.queue.lock();
            state.calls -= 1;
            let kept = bytes.min(self.bytes);
            state.bytes -= self.bytes - kept;
            self.bytes = kept;
            self.in_flight = false;
        }
        self.queue.let_through();
        self
    }

    fn give_back(&mut self) {
        let mut state = self.queue.lock();
        state.calls -= usize::from(self.in_flight);
        state.bytes -= self.bytes;
        drop(state);
        self.in_flight = false;
        self.bytes = 0;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.in_flight || self.bytes > 0 {
            self.give_back();
            self.queue.let_through();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{future::Future, pin::Pin, task::Poll};

    type Entering = Pin<Box<dyn Future<Output = Place>>>;

    fn entering(queue: &Arc<Queue>, urgency: Urgency) -> Entering {
        let queue = Arc::clone(queue);
        let mut entering: Entering = Box::pin(async move { queue.enter(urgency).await });
        // A first poll, which takes the place in the queue.
        assert!(now(&mut entering).is_none(), "there was room");
        entering
    }

    /// The place, if it was given.
    fn now(entering: &mut Entering) -> Option<Place> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match entering.as_mut().poll(&mut context) {
            Poll::Ready(place) => Some(place),
            Poll::Pending => None,
        }
    }

    #[tokio::test]
    async fn first_mounts_go_ahead_and_refreshes_are_not_starved() {
        let queue = Queue::new(1, 100, 1);
        let mut place = queue.enter(Urgency::Refresh).await;
        let mut line: Vec<(&str, Entering)> = Vec::new();
        for _ in 0..2 {
            line.push(("refresh", entering(&queue, Urgency::Refresh)));
        }
        for _ in 0..FIRST_MOUNTS_IN_A_ROW + 2 {
            line.push(("first", entering(&queue, Urgency::FirstMount)));
        }
        let mut order = Vec::new();
        while !line.is_empty() {
            drop(place);
            let (at, next) = line
                .iter_mut()
                .enumerate()
                .find_map(|(at, (_, entering))| Some((at, now(entering)?)))
                .expect("somebody's turn");
            order.push(line.remove(at).0);
            place = next;
        }
        let mut expected = vec!["first"; FIRST_MOUNTS_IN_A_ROW];
        expected.extend(["refresh", "first", "first", "refresh"]);
        assert_eq!(order, expected);
    }

    #[tokio::test]
    async fn who_stops_waiting_has_no_place() {
        let queue = Queue::new(1, 100, 1);
        let place = queue.enter(Urgency::FirstMount).await;
        let gone = entering(&queue, Urgency::FirstMount);
        let mut waits = entering(&queue, Urgency::Refresh);
        drop(gone);
        drop(place);
        let place = now(&mut waits).expect("its turn");
        // One who got the place and went before it saw it.
        let mut last = entering(&queue, Urgency::Refresh);
        let unseen = entering(&queue, Urgency::FirstMount);
        drop(place);
        drop(unseen);
        assert!(now(&mut last).is_some());
        assert_eq!(queue.in_flight(), 0);
    }

    #[tokio::test]
    async fn an_answer_holds_its_memory_until_it_is_dropped() {
        // Two answers of up to ten bytes, although four calls may be in flight.
        let queue = Queue::new(4, 20, 10);
        let first = queue.enter(Urgency::FirstMount).await;
        let second = queue.enter(Urgency::FirstMount).await;
        let mut third = entering(&queue, Urgency::FirstMount);
        let first = first.answered(1);
        assert!(now(&mut third).is_none(), "ten are reserved, one is held");
        let second = second.answered(9);
        let third = now(&mut third).expect("ten are held");
        let mut fourth = entering(&queue, Urgency::FirstMount);
        drop(second);
        assert!(now(&mut fourth).is_none(), "ten are reserved, one is held");
        drop(first);
        assert!(now(&mut fourth).is_some());
        drop(third);
    }

    #[tokio::test]
    async fn one_call_goes_through_however_small_the_memory() {
        let queue = Queue::new(4, 5, 10);
        let only = queue.enter(Urgency::Refresh).await;
        let mut next = entering(&queue, Urgency::Refresh);
        drop(only.answered(3));
        assert!(now(&mut next).is_some());
    }
}
