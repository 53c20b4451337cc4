//! Who may call a provider now, and who waits.
//!
//! A provider has as many calls in flight as it may have. These places are shared, so that
//! classes whose store hangs cannot take them all:
//!
//! - A class is trusted while its calls are answered: its last call was, and none of those in
//!   flight has waited for [`HANGS`]. A class that is not trusted may hold an eighth of the
//!   places, and all such classes of a namespace together a quarter.
//! - A class, and a namespace, may hold three quarters at most. The last quarter is for classes
//!   that have no call in flight, and half of that for namespaces that have none.
//! - Refreshes may hold half of the places, and none of the last quarter.
//! - When calls that hang hold more than half of the places and a class that has not hung finds
//!   no place, one of them gives way: it ends, and kubelet calls again.
//!
//! Among those who wait, namespaces take turns, and the classes of a namespace do. First mounts
//! go ahead of refreshes, because a pod waits for them; a refresh that waits is let through after
//! a number of first mounts all the same. Whoever stops waiting loses the place in the queue.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    Urgency,
    line::{Line, Owner},
};

/// After so many first mounts in a row a refresh that waits is let through.
const FIRST_MOUNTS_IN_A_ROW: usize = 8;

/// A call that has had no answer for so long hangs.
pub(super) const HANGS: Duration = Duration::from_secs(10);

/// How many classes are remembered. One that is forgotten is not trusted until its next answer.
const MOST_REMEMBERED: usize = 1024;

/// The queue in front of one provider.
pub(super) struct Queue {
    shares: Shares,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last_id: u64,
    calls: Vec<Call>,
    first_mounts: Line<oneshot::Sender<Place>>,
    refreshes: Line<oneshot::Sender<Place>>,
    /// How many first mounts were let through ahead of a waiting refresh.
    in_a_row: usize,
    /// How the last call of a class ended, and when.
    standings: HashMap<Owner, (Standing, Instant)>,
}

/// A call in flight.
struct Call {
    id: u64,
    owner: Owner,
    urgency: Urgency,
    since: Instant,
    give_way: CancellationToken,
}

/// What a class's last call came to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// An answer, also a refusal.
    Answered,
    /// No answer.
    Hung,
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// With an answer.
    Answered,
    /// With a refusal. One that took its time is how a hanging store shows.
    Refused,
    /// Without an answer.
    Silent,
    /// With its connection, which says nothing of the class.
    Lost,
}

/// How many places there are, and who may hold how many.
#[derive(Clone, Copy)]
struct Shares {
    most: usize,
    /// Kept for classes with no call in flight.
    for_new_classes: usize,
    /// Of those, kept for namespaces with no call in flight.
    for_new_namespaces: usize,
    for_refreshes: usize,
    untrusted_class: usize,
    untrusted_namespace: usize,
}

impl Shares {
    fn of(most: usize) -> Self {
        let most = most.max(1);
        let for_new_classes = if most == 1 { 0 } else { (most / 4).max(1) };
        Self {
            most,
            for_new_classes,
            for_new_namespaces: for_new_classes.div_ceil(2),
            for_refreshes: (most / 2).max(1),
            untrusted_class: (most / 8).max(1),
            untrusted_namespace: (most / 4).max(1),
        }
    }

    /// What one class, or one namespace, may hold.
    fn of_one(&self) -> usize {
        self.most - self.for_new_classes
    }
}

/// The right to have one call in flight. Dropping it lets the next one through.
pub(super) struct Place {
    queue: Arc<Queue>,
    id: u64,
    give_way: CancellationToken,
    /// Whether dropping it changes anything.
    held: bool,
}

/// How the calls in flight look to one who waits. Names nobody else's class.
pub(super) struct Ahead {
    in_flight: usize,
    of_class: usize,
    of_namespace: usize,
    hanging: usize,
}

impl fmt::Display for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} calls are in flight: {} of this class, {} of other classes of this namespace, {} of other namespaces; {} of them have had no answer for {} s or more",
            self.in_flight,
            self.of_class,
            self.of_namespace - self.of_class,
            self.in_flight - self.of_namespace,
            self.hanging,
            HANGS.as_secs(),
        )
    }
}

impl Queue {
    /// A queue for `most` calls in flight.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            shares: Shares::of(most),
            state: Mutex::default(),
        })
    }

    /// Waits for a place. A dropped future has none and waits for none.
    pub(super) async fn enter(self: &Arc<Self>, owner: &Owner, urgency: Urgency) -> Place {
        loop {
            let place = {
                let (sender, place) = oneshot::channel();
                self.lock().line(urgency).push(owner.clone(), sender);
                place
            };
            self.let_through();
            // The queue outlives this call, and nobody drops a sender without an answer.
            if let Ok(place) = place.await {
                return place;
            }
        }
    }

    /// Who holds the places.
    pub(super) fn ahead_of(&self, owner: &Owner) -> Ahead {
        let state = self.lock();
        let now = Instant::now();
        let count =
            |counts: &dyn Fn(&Call) -> bool| state.calls.iter().filter(|c| counts(c)).count();
        Ahead {
            in_flight: state.calls.len(),
            of_class: count(&|call| call.owner == *owner),
            of_namespace: count(&|call| call.owner.namespace == owner.namespace),
            hanging: count(&|call| call.hangs(now)),
        }
    }

    /// Makes one call that hangs give way to `owner`, who waits, if that is fair.
    pub(super) fn press(self: &Arc<Self>, owner: &Owner, urgency: Urgency) {
        let now = Instant::now();
        let victim = self.lock().gives_way(&self.shares, owner, urgency, now);
        if let Some(victim) = victim {
            victim.cancel();
        }
    }

    /// Gives places away as long as there is room.
    fn let_through(self: &Arc<Self>) {
        loop {
            let (next, id, give_way) = {
                let mut state = self.lock();
                let now = Instant::now();
                let Some((owner, urgency, next)) = state.next(&self.shares, now) else {
                    return;
                };
                let (id, give_way) = state.start(owner, urgency, now);
                (next, id, give_way)
            };
            let place = Place {
                queue: Arc::clone(self),
                id,
                give_way,
                held: true,
            };
            // Who has stopped waiting in this moment gives the place back, without calling this
            // function again, which may be many calls deep already.
            if let Err(mut unwanted) = next.send(place) {
                unwanted.held = false;
                self.lock().end(unwanted.id, None);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Counters and queues are whole whoever panicked while holding them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Call {
    fn hangs(&self, now: Instant) -> bool {
        now.duration_since(self.since) >= HANGS
    }
}

impl State {
    fn line(&mut self, urgency: Urgency) -> &mut Line<oneshot::Sender<Place>> {
        match urgency {
            Urgency::FirstMount => &mut self.first_mounts,
            Urgency::Refresh => &mut self.refreshes,
        }
    }

    /// Whose turn it is.
    fn next(
        &mut self,
        shares: &Shares,
        now: Instant,
    ) -> Option<(Owner, Urgency, oneshot::Sender<Place>)> {
        if self.calls.len() >= shares.most {
            return None;
        }
        for line in [&mut self.first_mounts, &mut self.refreshes] {
            line.retain(|waiting| !waiting.is_closed());
        }
        let calls = Holders::of(&self.calls, &self.standings, now);
        let take = |line: &mut Line<_>, urgency| {
            line.take(|owner| calls.may_start(shares, owner, urgency))
        };
        let refresh_is_due = self.in_a_row >= FIRST_MOUNTS_IN_A_ROW;
        let order = match refresh_is_due {
            true => [Urgency::Refresh, Urgency::FirstMount],
            false => [Urgency::FirstMount, Urgency::Refresh],
        };
        for urgency in order {
            let taken = match urgency {
                Urgency::FirstMount => take(&mut self.first_mounts, urgency),
                Urgency::Refresh => take(&mut self.refreshes, urgency),
            };
            if let Some((owner, sender)) = taken {
                self.in_a_row = match urgency {
                    Urgency::FirstMount if !self.refreshes.is_empty() => self.in_a_row + 1,
                    _ => 0,
                };
                return Some((owner, urgency, sender));
            }
        }
        None
    }

    fn start(&mut self, owner: Owner, urgency: Urgency, now: Instant) -> (u64, CancellationToken) {
        self.last_id += 1;
        let give_way = CancellationToken::new();
        self.calls.push(Call {
            id: self.last_id,
            owner,
            urgency,
            since: now,
            give_way: give_way.clone(),
        });
        (self.last_id, give_way)
    }

    /// A call is over. One that was given up counts only if it hung.
    fn end(&mut self, id: u64, ending: Option<Ending>) {
        let Some(at) = self.calls.iter().position(|call| call.id == id) else {
            return;
        };
        let call = self.calls.swap_remove(at);
        let now = Instant::now();
        let standing = match ending {
            Some(Ending::Answered) => Standing::Answered,
            Some(Ending::Silent) => Standing::Hung,
            Some(Ending::Refused) | None if call.hangs(now) => Standing::Hung,
            Some(Ending::Refused) => Standing::Answered,
            Some(Ending::Lost) | None => return,
        };
        if self.standings.len() >= MOST_REMEMBERED
            && !self.standings.contains_key(&call.owner)
            && let Some(oldest) = self.standings.iter().min_by_key(|(_, (_, at))| *at)
        {
            let oldest = oldest.0.clone();
            self.standings.remove(&oldest);
        }
        self.standings.insert(call.owner, (standing, now));
    }

    /// Which call gives way to `owner`: the oldest of the class of which most calls hang.
    fn gives_way(
        &self,
        shares: &Shares,
        owner: &Owner,
        urgency: Urgency,
        now: Instant,
    ) -> Option<CancellationToken> {
        let holders = Holders::of(&self.calls, &self.standings, now);
        let has_hung = self
            .standings
            .get(owner)
            .is_some_and(|(standing, _)| *standing == Standing::Hung);
        if has_hung
            || holders.is_room(shares, owner)
            || !holders.within_share(shares, owner, urgency)
        {
            return None;
        }
        let hanging: Vec<&Call> = self
            .calls
            .iter()
            .filter(|call| call.hangs(now) && !call.give_way.is_cancelled())
            .collect();
        if hanging.len() <= shares.most.div_ceil(2) {
            return None;
        }
        let of_class = |call: &Call| hanging.iter().filter(|c| c.owner == call.owner).count();
        let victim = hanging
            .iter()
            .max_by_key(|call| (of_class(call), std::cmp::Reverse(call.since)))?;
        Some(victim.give_way.clone())
    }
}

/// The calls in flight, counted by who holds them.
struct Holders<'a> {
    total: usize,
    refreshes: usize,
    classes: HashMap<&'a Owner, usize>,
    namespaces: HashMap<&'a str, usize>,
    /// Of namespaces: the calls of classes that are not trusted.
    untrusted: HashMap<&'a str, usize>,
    hanging: Vec<&'a Owner>,
    standings: &'a HashMap<Owner, (Standing, Instant)>,
}

impl<'a> Holders<'a> {
    fn of(
        calls: &'a [Call],
        standings: &'a HashMap<Owner, (Standing, Instant)>,
        now: Instant,
    ) -> Self {
        let mut holders = Self {
            total: calls.len(),
            refreshes: 0,
            classes: HashMap::new(),
            namespaces: HashMap::new(),
            untrusted: HashMap::new(),
            hanging: calls
                .iter()
                .filter(|c| c.hangs(now))
                .map(|c| &c.owner)
                .collect(),
            standings,
        };
        for call in calls {
            holders.refreshes += usize::from(call.urgency == Urgency::Refresh);
            *holders.classes.entry(&call.owner).or_default() += 1;
            let namespace = call.owner.namespace.as_ref();
            *holders.namespaces.entry(namespace).or_default() += 1;
            if !holders.trusts(&call.owner) {
                *holders.untrusted.entry(namespace).or_default() += 1;
            }
        }
        holders
    }

    fn trusts(&self, owner: &Owner) -> bool {
        let answered = self.standings.get(owner).map(|(standing, _)| *standing);
        answered == Some(Standing::Answered) && !self.hanging.contains(&owner)
    }

    fn of_class(&self, owner: &Owner) -> usize {
        self.classes.get(owner).copied().unwrap_or_default()
    }

    fn of_namespace(&self, owner: &Owner) -> usize {
        let namespace = owner.namespace.as_ref();
        self.namespaces.get(namespace).copied().unwrap_or_default()
    }

    fn may_start(&self, shares: &Shares, owner: &Owner, urgency: Urgency) -> bool {
        self.is_room(shares, owner) && self.within_share(shares, owner, urgency)
    }

    /// Whether there is a place that `owner` may have: the last ones are for those who have none.
    fn is_room(&self, shares: &Shares, owner: &Owner) -> bool {
        let free = shares.most.saturating_sub(self.total);
        free > 0
            && (free > shares.for_new_classes || self.of_class(owner) == 0)
            && (free > shares.for_new_namespaces || self.of_namespace(owner) == 0)
    }

    /// Whether `owner` holds less than it may, whoever else holds what.
    fn within_share(&self, shares: &Shares, owner: &Owner, urgency: Urgency) -> bool {
        let untrusted = |namespace| self.untrusted.get(namespace).copied().unwrap_or_default();
        let of_class = match self.trusts(owner) {
            true => shares.of_one(),
            false => shares.untrusted_class,
        };
        let of_urgency = match urgency {
            Urgency::FirstMount => true,
            Urgency::Refresh => {
                self.refreshes < shares.for_refreshes
                    && shares.most - self.total.min(shares.most) > shares.for_new_classes
            }
        };
        of_urgency
            && self.of_class(owner) < of_class
            && self.of_namespace(owner) < shares.of_one()
            && (self.trusts(owner)
                || untrusted(owner.namespace.as_ref()) < shares.untrusted_namespace)
    }
}

impl Place {
    /// Says how the call ended, and lets the next one through.
    pub(super) fn ended(self, ending: Ending) {
        self.queue.lock().end(self.id, Some(ending));
    }

    /// Ends when this call has to give way to others.
    pub(super) async fn has_to_give_way(&self) {
        self.give_way.cancelled().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.held {
            self.queue.lock().end(self.id, None);
            self.queue.let_through();
        }
    }
}

#[cfg(test)]
mod tests;
