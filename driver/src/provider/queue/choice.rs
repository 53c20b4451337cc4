//! Chooses the class that starts the next call, and the call that gives way.

use std::{cmp::Reverse, collections::HashMap};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Call, Calls, HANGS, PROBED, Standing, Urgency,
    shares::{HeldPlaces, Lack, Shares},
};
use crate::provider::line::ClassName;

/// The number of times that waiting classes are passed by classes of a better standing before one
/// of them goes first.
const PASSED_AT_MOST: usize = 8;

/// The number of times that waiting classes were passed in a row.
#[derive(Default)]
pub(super) struct Passed {
    new: usize,
    hung: usize,
    /// The answered classes that wait while the one that was answered last goes first.
    answered: usize,
}

impl Calls {
    /// Returns the classes that take turns for the next place: all waiting classes of one
    /// standing, or the one of them that goes first. Counts the classes that are passed.
    pub(super) fn choose(
        &mut self,
        shares: &Shares,
        urgency: Urgency,
        now: Instant,
    ) -> Vec<ClassName> {
        let held = HeldPlaces::of(self, now);
        let hung_lately = |at| now.duration_since(at) < HANGS;
        let some_hang = held.some_hang() || self.last_hung.is_some_and(hung_lately);
        let line = match urgency {
            Urgency::FirstMount => &self.first_mounts,
            Urgency::Refresh => &self.refreshes,
        };
        let mut ready: HashMap<&ClassName, Standing> = HashMap::new();
        for class in line.classes() {
            if !ready.contains_key(class) && held.lacks(shares, class, urgency).is_none() {
                let standing = match held.standing(class) {
                    // While nothing hangs, new classes take turns with answered ones.
                    Standing::New if !some_hang => Standing::Answered,
                    standing => standing,
                };
                ready.insert(class, standing);
            }
        }
        let Some(best) = ready.values().min().copied() else {
            return Vec::new();
        };
        let waits = |standing| ready.values().any(|ready| *ready == standing);
        let (new, hung) = (waits(Standing::New), waits(Standing::Hung));
        let standing = self.passed.next(best, new, hung);
        let candidates: Vec<&ClassName> = ready
            .iter()
            .filter(|(_, ready)| **ready == standing)
            .map(|(class, _)| *class)
            .collect();
        let first = match standing {
            Standing::Answered if some_hang && self.passed.answered < PASSED_AT_MOST => {
                candidates.iter().max_by_key(|class| self.last_end(class))
            }
            Standing::Answered | Standing::New => None,
            Standing::Hung => {
                let last_tried = self.last_tried(now);
                candidates.iter().min_by_key(|class| {
                    let of_namespace = last_tried.get(class.namespace.as_ref());
                    (of_namespace, self.last_end(class))
                })
            }
        };
        let first = first.map(|class| (*class).clone());
        let chosen = match &first {
            Some(first) => vec![first.clone()],
            None => candidates.into_iter().cloned().collect(),
        };
        self.passed.count(standing, new, hung, first.is_some());
        chosen
    }

    /// Returns when the last call of a class ended.
    fn last_end(&self, class: &ClassName) -> Option<Instant> {
        self.standings.get(class).map(|(_, at)| *at)
    }

    /// Returns for each namespace when a call of a hung class was last in flight.
    fn last_tried(&self, now: Instant) -> HashMap<&str, Instant> {
        let ended = self
            .standings
            .iter()
            .filter(|(_, (standing, _))| *standing == Standing::Hung)
            .map(|(class, (_, at))| (class, *at));
        let in_flight = self.in_flight.iter().map(|call| (&call.class, now));
        let mut last: HashMap<&str, Instant> = HashMap::new();
        for (class, at) in ended.chain(in_flight) {
            let last = last.entry(class.namespace.as_ref()).or_insert(at);
            *last = (*last).max(at);
        }
        last
    }

    /// Chooses the call that gives way to `class`, which waits: the oldest call of the class of
    /// which most calls hang.
    pub(super) fn give_way(
        &mut self,
        shares: &Shares,
        class: &ClassName,
        urgency: Urgency,
        now: Instant,
    ) -> Option<CancellationToken> {
        let held = HeldPlaces::of(self, now);
        let lack = held.lacks(shares, class, urgency)?;
        if lack == Lack::OwnShare {
            return None;
        }
        let calls = &self.in_flight;
        let hanging: Vec<&Call> = calls
            .iter()
            .filter(|call| call.hangs(now) && call.gives_way_to.is_none())
            .collect();
        // One call at a time gives way to a class that has no call in flight.
        let may_have_one = urgency == Urgency::FirstMount
            && held.of_class(class) == 0
            && !calls
                .iter()
                .any(|call| call.gives_way_to.as_ref() == Some(class));
        let (fair, patience) = match held.standing(class) {
            Standing::Answered | Standing::New => (
                hanging.len() > shares.hung || (may_have_one && hanging.len() > shares.probes),
                HANGS,
            ),
            Standing::Hung => (may_have_one, PROBED),
        };
        if !fair {
            return None;
        }
        let of_class = |call: &Call| hanging.iter().filter(|c| c.class == call.class).count();
        let id = hanging
            .iter()
            .filter(|call| call.waits_for(now) >= patience)
            .filter(|call| lack == Lack::Room || call.class.namespace == class.namespace)
            .max_by_key(|call| (of_class(call), Reverse(call.since)))?
            .id;
        let victim = self.in_flight.iter_mut().find(|call| call.id == id)?;
        victim.gives_way_to = Some(class.clone());
        Some(victim.give_way.clone())
    }
}

impl Passed {
    /// Returns the standing whose turn it is: the `best` one that waits, or one that was passed too
    /// often. `new` and `hung` tell whether such classes wait.
    fn next(&self, best: Standing, new: bool, hung: bool) -> Standing {
        if hung && self.hung >= PASSED_AT_MOST {
            Standing::Hung
        } else if new && self.new >= PASSED_AT_MOST {
            Standing::New
        } else {
            best
        }
    }

    /// Counts a place that was given to the `chosen` standing. `first` tells whether it was given to
    /// one class instead of the class whose turn it is.
    fn count(&mut self, chosen: Standing, new: bool, hung: bool, first: bool) {
        match chosen {
            Standing::Answered => {
                self.answered = if first { self.answered + 1 } else { 0 };
                self.new += usize::from(new);
            }
            Standing::New => self.new = 0,
            Standing::Hung => {}
        }
        self.hung = match chosen {
            Standing::Hung => 0,
            Standing::Answered | Standing::New => self.hung + usize::from(hung),
        };
    }
}
