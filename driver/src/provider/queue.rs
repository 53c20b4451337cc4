//! Who may call a provider now, and who waits.
//!
//! A provider has as many calls in flight as it may have. These places are shared, so that
//! classes whose store hangs cannot take them all, however many they are. A class has one of three
//! standings: it is *answered* when its last call was, *new* when no call of it has ended yet, and
//! *hung* when its last call had no answer, or one in flight has waited for [`HANGS`].
//!
//! - All hung classes together may hold half of the places; hung and new ones together three
//!   quarters.
//! - A class that is new or hung may hold an eighth of the places, and all such classes of a
//!   namespace together a quarter.
//! - A class, and a namespace, may hold three quarters at most. The last quarter is for classes
//!   that have no call in flight, and half of that for namespaces that have none.
//! - Refreshes may hold half of the places, and none of the last quarter.
//! - A call that hangs gives way: it ends, and kubelet calls again. It does so for an answered or
//!   a new class that finds no place, while hanging calls hold more than half of the places, or
//!   more than an eighth if that class has no call in flight. For a hung class that has no call in
//!   flight it does so after [`PROBED`], so that each is tried again.
//!
//! Among those who wait, answered classes go first, then new ones, then hung ones; who is passed
//! too often goes first once. While nothing hangs, new classes take turns with answered ones. Of the answered ones, namespaces take turns, and the classes of a
//! namespace do, and so it is with new ones; but while some calls hang, the class whose answer is
//! the latest goes first, though not always. Of the hung ones it is the turn of the namespace, and then of the class,
//! whose last call is the longest ago.
//!
//! First mounts go ahead of refreshes, because a pod waits for them; a refresh that waits is let
//! through after a number of first mounts all the same. Whoever stops waiting loses the place in
//! the queue.

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

/// For so long the call of a hung class is left alone by other hung classes. A store that is slow
/// but does answer has this time.
const PROBED: Duration = Duration::from_secs(30);

/// So often those who wait are passed by others of a better standing before one goes first.
const PASSED_AT_MOST: usize = 8;

/// How many classes are remembered. One that is forgotten is new again.
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
    /// How often new and hung classes, and the one at the head of the answered ones, were passed.
    passed_new: usize,
    passed_hung: usize,
    passed_head: usize,
    /// When a call last ended that hung.
    last_hung: Option<Instant>,
    /// How the last call of a class ended, and when. A new class has no entry.
    standings: HashMap<Owner, (Standing, Instant)>,
}

/// A call in flight.
struct Call {
    id: u64,
    owner: Owner,
    urgency: Urgency,
    since: Instant,
    give_way: CancellationToken,
    /// For which class it was told to give way.
    gives_way_to: Option<Owner>,
}

/// What is known of a class, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    /// Its last call had an answer, also a refusal.
    Answered,
    /// No call of it has ended.
    New,
    /// Its last call had no answer.
    Hung,
}

/// Why a class may not start a call now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lack {
    /// It, or refreshes, hold what they may.
    OwnShare,
    /// Its namespace holds what it may.
    NamespaceShare,
    /// There is no place that it may have.
    Room,
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
    /// Of all hung classes together.
    hung: usize,
    /// Of all new and hung classes together.
    untrusted: usize,
    /// What hung classes keep when others press for a place.
    probes: usize,
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
            hung: (most / 2).max(1),
            untrusted: most - most / 4,
            probes: most / 8,
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
        let victim = self.lock().give_way(&self.shares, owner, urgency, now);
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
        self.waits_for(now) >= HANGS
    }

    fn waits_for(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
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
        let refresh_is_due = self.in_a_row >= FIRST_MOUNTS_IN_A_ROW;
        let order = match refresh_is_due {
            true => [Urgency::Refresh, Urgency::FirstMount],
            false => [Urgency::FirstMount, Urgency::Refresh],
        };
        for urgency in order {
            let chosen = self.choose(shares, urgency, now);
            let taken = self
                .line(urgency)
                .take(|owner| chosen.iter().any(|chosen| chosen == owner));
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

    /// The classes among which it is somebody's turn: all of one standing, or the one of them that
    /// goes first. Counts who is passed.
    fn choose(&mut self, shares: &Shares, urgency: Urgency, now: Instant) -> Vec<Owner> {
        let holders = Holders::of(&self.calls, &self.standings, now);
        let line = match urgency {
            Urgency::FirstMount => &self.first_mounts,
            Urgency::Refresh => &self.refreshes,
        };
        let some_hang = !holders.hanging.is_empty()
            || self
                .last_hung
                .is_some_and(|at| now.duration_since(at) < HANGS);
        // While nothing hangs, new classes take turns with answered ones.
        let rank = |standing| match standing {
            Standing::New if !some_hang => Standing::Answered,
            standing => standing,
        };
        let mut ready: HashMap<&Owner, Standing> = HashMap::new();
        for owner in line.owners() {
            if !ready.contains_key(owner) && holders.lacks(shares, owner, urgency).is_none() {
                ready.insert(owner, rank(holders.standing(owner)));
            }
        }
        let is_ready = |standing| ready.values().any(|ready| *ready == standing);
        let (new, hung) = (is_ready(Standing::New), is_ready(Standing::Hung));
        let chosen = if hung && self.passed_hung >= PASSED_AT_MOST {
            Standing::Hung
        } else if new && self.passed_new >= PASSED_AT_MOST {
            Standing::New
        } else {
            match ready.values().min() {
                Some(best) => *best,
                None => return Vec::new(),
            }
        };
        let of_chosen = ready
            .iter()
            .filter(|(_, standing)| **standing == chosen)
            .map(|(owner, _)| *owner);
        let first = match chosen {
            Standing::Answered if some_hang && self.passed_head < PASSED_AT_MOST => of_chosen
                .clone()
                .max_by_key(|owner| self.standings.get(*owner).map(|(_, at)| *at)),
            Standing::Answered | Standing::New => None,
            Standing::Hung => {
                let of_namespaces = self.last_tried(now);
                of_chosen.clone().min_by_key(|owner| {
                    let of_class = self.standings.get(*owner).map(|(_, at)| *at);
                    (of_namespaces.get(owner.namespace.as_ref()), of_class)
                })
            }
        };
        let owners = match first {
            Some(first) => vec![first.clone()],
            None => of_chosen.cloned().collect(),
        };
        if chosen == Standing::Answered {
            self.passed_head = if first.is_some() {
                self.passed_head + 1
            } else {
                0
            };
        }
        self.passed_new = match (new, chosen) {
            (true, Standing::Answered) => self.passed_new + 1,
            (_, Standing::New) => 0,
            _ => self.passed_new,
        };
        self.passed_hung = match (hung, chosen) {
            (_, Standing::Hung) => 0,
            (true, _) => self.passed_hung + 1,
            (false, _) => self.passed_hung,
        };
        owners
    }

    /// When a call of a hung class of each namespace was last in flight.
    fn last_tried(&self, now: Instant) -> HashMap<&str, Instant> {
        let ended = self
            .standings
            .iter()
            .filter(|(_, (standing, _))| *standing == Standing::Hung)
            .map(|(owner, (_, at))| (owner, *at));
        let in_flight = self.calls.iter().map(|call| (&call.owner, now));
        let mut last: HashMap<&str, Instant> = HashMap::new();
        for (owner, at) in ended.chain(in_flight) {
            let last = last.entry(owner.namespace.as_ref()).or_insert(at);
            *last = (*last).max(at);
        }
        last
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
            gives_way_to: None,
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
        if standing == Standing::Hung {
            self.last_hung = Some(now);
        }
        if self.standings.len() >= MOST_REMEMBERED
            && !self.standings.contains_key(&call.owner)
            && let Some(oldest) = self.standings.iter().min_by_key(|(_, (_, at))| *at)
        {
            let oldest = oldest.0.clone();
            self.standings.remove(&oldest);
        }
        self.standings.insert(call.owner, (standing, now));
    }

    /// Chooses the call that gives way to `owner`, who waits: the oldest of the class of which
    /// most calls hang.
    fn give_way(
        &mut self,
        shares: &Shares,
        owner: &Owner,
        urgency: Urgency,
        now: Instant,
    ) -> Option<CancellationToken> {
        let holders = Holders::of(&self.calls, &self.standings, now);
        let lack = holders.lacks(shares, owner, urgency)?;
        let standing = holders.standing(owner);
        let has_none = urgency == Urgency::FirstMount && holders.of_class(owner) == 0;
        if lack == Lack::OwnShare {
            return None;
        }
        let hanging: Vec<&Call> = self
            .calls
            .iter()
            .filter(|call| call.hangs(now) && call.gives_way_to.is_none())
            .collect();
        // One call at a time gives way to a class that has none in flight.
        let may_have_one = has_none
            && !self
                .calls
                .iter()
                .any(|call| call.gives_way_to.as_ref() == Some(owner));
        let (fair, patience) = match standing {
            Standing::Answered | Standing::New => (
                hanging.len() > shares.hung || (may_have_one && hanging.len() > shares.probes),
                HANGS,
            ),
            Standing::Hung => (may_have_one, PROBED),
        };
        if !fair {
            return None;
        }
        let of_class = |call: &Call| hanging.iter().filter(|c| c.owner == call.owner).count();
        let id = hanging
            .iter()
            .filter(|call| call.waits_for(now) >= patience)
            .filter(|call| lack == Lack::Room || call.owner.namespace == owner.namespace)
            .max_by_key(|call| (of_class(call), std::cmp::Reverse(call.since)))?
            .id;
        let victim = self.calls.iter_mut().find(|call| call.id == id)?;
        victim.gives_way_to = Some(owner.clone());
        Some(victim.give_way.clone())
    }
}

/// The calls in flight, counted by who holds them.
struct Holders<'a> {
    total: usize,
    refreshes: usize,
    classes: HashMap<&'a Owner, usize>,
    namespaces: HashMap<&'a str, usize>,
    /// Of namespaces: the calls of classes that are new or hung.
    untrusted: HashMap<&'a str, usize>,
    new: usize,
    hung: usize,
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
            new: 0,
            hung: 0,
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
            let standing = holders.standing(&call.owner);
            if standing != Standing::Answered {
                *holders.untrusted.entry(namespace).or_default() += 1;
            }
            holders.new += usize::from(standing == Standing::New);
            holders.hung += usize::from(standing == Standing::Hung);
        }
        holders
    }

    fn standing(&self, owner: &Owner) -> Standing {
        if self.hanging.contains(&owner) {
            return Standing::Hung;
        }
        let last = self.standings.get(owner);
        last.map_or(Standing::New, |(standing, _)| *standing)
    }

    fn of_class(&self, owner: &Owner) -> usize {
        self.classes.get(owner).copied().unwrap_or_default()
    }

    fn of_namespace(&self, owner: &Owner) -> usize {
        let namespace = owner.namespace.as_ref();
        self.namespaces.get(namespace).copied().unwrap_or_default()
    }

    /// What `owner` lacks to start a call, if anything.
    fn lacks(&self, shares: &Shares, owner: &Owner, urgency: Urgency) -> Option<Lack> {
        let standing = self.standing(owner);
        let answered = standing == Standing::Answered;
        let of_one_class = match answered {
            true => shares.of_one(),
            false => shares.untrusted_class,
        };
        let refreshes_are_full =
            urgency == Urgency::Refresh && self.refreshes >= shares.for_refreshes;
        let namespace = owner.namespace.as_ref();
        let untrusted = self.untrusted.get(namespace).copied().unwrap_or_default();
        if self.of_class(owner) >= of_one_class || refreshes_are_full {
            Some(Lack::OwnShare)
        } else if self.of_namespace(owner) >= shares.of_one()
            || (!answered && untrusted >= shares.untrusted_namespace)
        {
            Some(Lack::NamespaceShare)
        } else if !self.is_room(shares, owner, urgency, standing) {
            Some(Lack::Room)
        } else {
            None
        }
    }

    /// Whether there is a place that `owner` may have: the last ones are for those who have none.
    fn is_room(
        &self,
        shares: &Shares,
        owner: &Owner,
        urgency: Urgency,
        standing: Standing,
    ) -> bool {
        let free = shares.most.saturating_sub(self.total);
        let has_none = urgency == Urgency::FirstMount && self.of_class(owner) == 0;
        let of_standing = match standing {
            Standing::Answered => true,
            Standing::New => self.new + self.hung < shares.untrusted,
            Standing::Hung => self.new + self.hung < shares.untrusted && self.hung < shares.hung,
        };
        of_standing
            && free > 0
            && (free > shares.for_new_classes || has_none)
            && (free > shares.for_new_namespaces || self.of_namespace(owner) == 0)
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
