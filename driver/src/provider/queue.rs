//! The queue in front of a provider: decides which call may start, and which one waits.
//!
//! A provider has a limited number of calls in flight. These places are shared, so that classes
//! whose store hangs cannot take them all. A class has one of three standings: it is *answered*
//! when its last call was, *new* when no call of it has ended yet, and *hung* when its last call had
//! no answer, or one in flight has waited for [`HANGS`].
//!
//! - All hung classes together may hold half of the places; hung and new ones together three
//!   quarters.
//! - A class that is new or hung may hold an eighth of the places, and all such classes of a
//!   namespace together a quarter.
//! - A class, and a namespace, may hold three quarters at most. The last quarter is for classes
//!   that have no call in flight, and half of that for namespaces that have none.
//! - Refreshes may hold half of the places, and of the last quarter an eighth of all. While they wait and hold less
//!   than that eighth, first mounts of namespaces with a call in flight leave it to them.
//! - A call that hangs gives way: it ends, and kubelet calls again. It does so for an answered or
//!   a new class that finds no place, while hanging calls hold more than half of the places, or
//!   more than an eighth if that class has no call in flight. For a hung class that has no call in
//!   flight it does so after [`PROBED`], so that each is tried again.
//!
//! Among the calls that wait, those of answered classes go first, then those of new ones, then those
//! of hung ones. A group that was passed too often goes first once. While nothing hangs, new classes
//! take turns with answered ones. Among answered classes and among new ones, namespaces take turns,
//! and so do the classes of a namespace; but while some calls hang, the class that was answered last
//! usually goes first. Among hung classes the namespace goes first whose last call is the longest
//! ago, and in it the class whose last call is the longest ago.
//!
//! First mounts go ahead of refreshes, because a pod waits for them. A refresh that waits is let
//! through after a number of first mounts nevertheless. A caller that stops waiting leaves the
//! queue.

mod choice;
mod shares;

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
    line::{ClassName, Line},
};
use choice::Passed;
use shares::Shares;

/// The number of first mounts in a row after which a refresh that waits is let through.
const FIRST_MOUNTS_IN_A_ROW: usize = 8;

/// The time without an answer after which a call hangs.
pub(super) const HANGS: Duration = Duration::from_secs(10);

/// The time in which the call of a hung class does not give way to other hung classes. A store that
/// is slow but answers has this time.
const PROBED: Duration = Duration::from_secs(30);

/// The number of classes whose standing is remembered. A class that is forgotten is new again.
const MOST_REMEMBERED: usize = 1024;

/// The queue in front of one provider.
pub(super) struct Queue {
    shares: Shares,
    calls: Mutex<Calls>,
}

/// The calls in flight and the calls that wait.
#[derive(Default)]
struct Calls {
    last_id: u64,
    in_flight: Vec<Call>,
    first_mounts: Line<oneshot::Sender<Place>>,
    refreshes: Line<oneshot::Sender<Place>>,
    /// The number of first mounts that went ahead of a waiting refresh.
    in_a_row: usize,
    passed: Passed,
    /// The last time at which a call ended that hung.
    last_hung: Option<Instant>,
    standings: Standings,
}

/// The standing of each class, and the time at which its last call ended. A new class has no entry.
type Standings = HashMap<ClassName, (Standing, Instant)>;

/// A call in flight.
struct Call {
    id: u64,
    class: ClassName,
    urgency: Urgency,
    since: Instant,
    give_way: CancellationToken,
    /// The class for which it was told to give way.
    gives_way_to: Option<ClassName>,
}

/// The standing of a class, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    /// The last call of the class had an answer, also a refusal.
    Answered,
    /// No call of the class has ended.
    New,
    /// The last call of the class had no answer.
    Hung,
}

/// The end of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// The provider answered.
    Answered,
    /// The provider refused. A store that hangs often shows as a late refusal.
    Refused,
    /// No answer came.
    Silent,
    /// The connection broke, which tells nothing about the class.
    Lost,
}

/// The right to have one call in flight. Dropping it lets the next call start.
pub(super) struct Place {
    queue: Arc<Queue>,
    id: u64,
    give_way: CancellationToken,
    /// Whether dropping it frees the place.
    held: bool,
}

/// The calls in flight as a waiting call sees them. It names no other class.
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
    /// Creates a queue for `most` calls in flight.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            shares: Shares::of(most),
            calls: Mutex::default(),
        })
    }

    /// Waits for a place. Dropping the future leaves the queue.
    pub(super) async fn enter(self: &Arc<Self>, class: &ClassName, urgency: Urgency) -> Place {
        loop {
            let place = {
                let (sender, place) = oneshot::channel();
                self.lock().line(urgency).push(class.clone(), sender);
                place
            };
            self.let_through();
            // A sender is dropped unused only if its receiver is gone.
            if let Ok(place) = place.await {
                return place;
            }
        }
    }

    /// Counts the calls in flight, for the error of a call of `class` that found no place.
    pub(super) fn ahead_of(&self, class: &ClassName) -> Ahead {
        let calls = self.lock();
        let now = Instant::now();
        let count = |counts: &dyn Fn(&Call) -> bool| {
            calls.in_flight.iter().filter(|call| counts(call)).count()
        };
        Ahead {
            in_flight: calls.in_flight.len(),
            of_class: count(&|call| call.class == *class),
            of_namespace: count(&|call| call.class.namespace == class.namespace),
            hanging: count(&|call| call.hangs(now)),
        }
    }

    /// Makes one call that hangs give way to `class`, which waits, if that is fair.
    pub(super) fn press(self: &Arc<Self>, class: &ClassName, urgency: Urgency) {
        let now = Instant::now();
        let victim = self.lock().give_way(&self.shares, class, urgency, now);
        if let Some(victim) = victim {
            victim.cancel();
        }
    }

    /// Gives places to calls that wait, as long as there are some.
    fn let_through(self: &Arc<Self>) {
        loop {
            let (next, id, give_way) = {
                let mut calls = self.lock();
                let now = Instant::now();
                let Some((class, urgency, next)) = calls.next(&self.shares, now) else {
                    return;
                };
                let (id, give_way) = calls.start(class, urgency, now);
                (next, id, give_way)
            };
            let place = Place {
                queue: Arc::clone(self),
                id,
                give_way,
                held: true,
            };
            // If the receiver has just stopped waiting, the place is freed here: dropping `place`
            // would call this function again, perhaps many calls deep.
            if let Err(mut unused) = next.send(place) {
                unused.held = false;
                self.lock().end(unused.id, None);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Calls> {
        // A panic elsewhere leaves the counters and lines whole.
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
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

impl Calls {
    fn line(&mut self, urgency: Urgency) -> &mut Line<oneshot::Sender<Place>> {
        match urgency {
            Urgency::FirstMount => &mut self.first_mounts,
            Urgency::Refresh => &mut self.refreshes,
        }
    }

    /// Takes the call whose turn it is.
    fn next(
        &mut self,
        shares: &Shares,
        now: Instant,
    ) -> Option<(ClassName, Urgency, oneshot::Sender<Place>)> {
        if self.in_flight.len() >= shares.most {
            return None;
        }
        for line in [&mut self.first_mounts, &mut self.refreshes] {
            line.retain(|waiting| !waiting.is_closed());
        }
        let order = if self.in_a_row >= FIRST_MOUNTS_IN_A_ROW {
            [Urgency::Refresh, Urgency::FirstMount]
        } else {
            [Urgency::FirstMount, Urgency::Refresh]
        };
        for urgency in order {
            let chosen = self.choose(shares, urgency, now);
            let taken = self.line(urgency).take(|class| chosen.contains(class));
            if let Some((class, sender)) = taken {
                self.in_a_row = match urgency {
                    Urgency::FirstMount if !self.refreshes.is_empty() => self.in_a_row + 1,
                    _ => 0,
                };
                return Some((class, urgency, sender));
            }
        }
        None
    }

    fn start(
        &mut self,
        class: ClassName,
        urgency: Urgency,
        now: Instant,
    ) -> (u64, CancellationToken) {
        self.last_id += 1;
        let give_way = CancellationToken::new();
        self.in_flight.push(Call {
            id: self.last_id,
            class,
            urgency,
            since: now,
            give_way: give_way.clone(),
            gives_way_to: None,
        });
        (self.last_id, give_way)
    }

    /// Ends a call. A call that was given up (`None`) changes the standing of its class only if it
    /// hung.
    fn end(&mut self, id: u64, ending: Option<Ending>) {
        let Some(at) = self.in_flight.iter().position(|call| call.id == id) else {
            return;
        };
        let call = self.in_flight.swap_remove(at);
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
            && !self.standings.contains_key(&call.class)
            && let Some(oldest) = self.standings.iter().min_by_key(|(_, (_, at))| *at)
        {
            let oldest = oldest.0.clone();
            self.standings.remove(&oldest);
        }
        self.standings.insert(call.class, (standing, now));
    }
}

impl Place {
    /// Tells how the call ended, and lets the next call start.
    pub(super) fn ended(self, ending: Ending) {
        self.queue.lock().end(self.id, Some(ending));
    }

    /// Completes when this call has to give way to another one.
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
