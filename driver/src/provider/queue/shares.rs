//! The shares of the places that classes, namespaces and refreshes may hold.

use std::collections::HashMap;

use tokio::time::Instant;

use super::{Calls, Standing, Standings, Urgency};
use crate::provider::line::ClassName;

/// The number of places, and how many of them may be held.
#[derive(Clone, Copy)]
pub(super) struct Shares {
    pub(super) most: usize,
    /// Kept for classes with no call in flight.
    for_new_classes: usize,
    /// The part of those that is kept for namespaces with no call in flight.
    for_new_namespaces: usize,
    /// The most that refreshes may hold.
    pub(super) for_refreshes: usize,
    /// The part of the last places that refreshes get before first mounts do.
    least_for_refreshes: usize,
    /// The most that all hung classes together may hold.
    pub(super) hung: usize,
    /// The most that all new and hung classes together may hold.
    untrusted: usize,
    /// The places that hung classes keep when other classes need one.
    pub(super) probes: usize,
    /// The most that one new or hung class may hold.
    untrusted_class: usize,
    /// The most that all new and hung classes of a namespace may hold.
    untrusted_namespace: usize,
}

impl Shares {
    pub(super) fn of(most: usize) -> Self {
        let most = most.max(1);
        let for_new_classes = if most == 1 { 0 } else { (most / 4).max(1) };
        Self {
            most,
            for_new_classes,
            for_new_namespaces: for_new_classes.div_ceil(2),
            for_refreshes: (most / 2).max(1),
            least_for_refreshes: (most / 8).max(1),
            hung: (most / 2).max(1),
            untrusted: most - most / 4,
            probes: most / 8,
            untrusted_class: (most / 8).max(1),
            untrusted_namespace: (most / 4).max(1),
        }
    }

    /// Returns the most that one class, or one namespace, may hold.
    pub(super) fn of_one(&self) -> usize {
        self.most - self.for_new_classes
    }
}

/// The reason why a class may not start a call now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lack {
    /// It holds its share, or refreshes hold theirs.
    OwnShare,
    /// Its namespace holds its share.
    NamespaceShare,
    /// No place that it may have is free.
    Room,
}

/// The number of places that classes and namespaces hold.
pub(super) struct HeldPlaces<'a> {
    total: usize,
    refreshes: usize,
    classes: HashMap<&'a ClassName, usize>,
    namespaces: HashMap<&'a str, usize>,
    /// The places of each namespace that classes hold which are new or hung.
    untrusted: HashMap<&'a str, usize>,
    new: usize,
    hung: usize,
    hanging: Vec<&'a ClassName>,
    standings: &'a Standings,
    /// Whether refreshes wait.
    refreshes_wait: bool,
}

impl<'a> HeldPlaces<'a> {
    pub(super) fn of(calls: &'a Calls, now: Instant) -> Self {
        let Calls {
            in_flight: calls,
            standings,
            refreshes,
            ..
        } = calls;
        let mut usage = Self {
            total: calls.len(),
            refreshes: 0,
            classes: HashMap::new(),
            namespaces: HashMap::new(),
            untrusted: HashMap::new(),
            new: 0,
            hung: 0,
            hanging: calls
                .iter()
                .filter(|call| call.hangs(now))
                .map(|call| &call.class)
                .collect(),
            standings,
            refreshes_wait: !refreshes.is_empty(),
        };
        for call in calls {
            usage.refreshes += usize::from(call.urgency == Urgency::Refresh);
            *usage.classes.entry(&call.class).or_default() += 1;
            let namespace = call.class.namespace.as_ref();
            *usage.namespaces.entry(namespace).or_default() += 1;
            let standing = usage.standing(&call.class);
            if standing != Standing::Answered {
                *usage.untrusted.entry(namespace).or_default() += 1;
            }
            usage.new += usize::from(standing == Standing::New);
            usage.hung += usize::from(standing == Standing::Hung);
        }
        usage
    }

    /// Returns whether some calls in flight hang.
    pub(super) fn some_hang(&self) -> bool {
        !self.hanging.is_empty()
    }

    pub(super) fn standing(&self, class: &ClassName) -> Standing {
        if self.hanging.contains(&class) {
            return Standing::Hung;
        }
        let last = self.standings.get(class);
        last.map_or(Standing::New, |(standing, _)| *standing)
    }

    pub(super) fn of_class(&self, class: &ClassName) -> usize {
        self.classes.get(class).copied().unwrap_or_default()
    }

    fn of_namespace(&self, class: &ClassName) -> usize {
        let namespace = class.namespace.as_ref();
        self.namespaces.get(namespace).copied().unwrap_or_default()
    }

    /// Returns why `class` may not start a call now, or `None` if it may.
    pub(super) fn lacks(
        &self,
        shares: &Shares,
        class: &ClassName,
        urgency: Urgency,
    ) -> Option<Lack> {
        let standing = self.standing(class);
        let answered = standing == Standing::Answered;
        let of_one_class = if answered {
            shares.of_one()
        } else {
            shares.untrusted_class
        };
        let refreshes_are_full =
            urgency == Urgency::Refresh && self.refreshes >= shares.for_refreshes;
        let namespace = class.namespace.as_ref();
        let untrusted = self.untrusted.get(namespace).copied().unwrap_or_default();
        if self.of_class(class) >= of_one_class || refreshes_are_full {
            Some(Lack::OwnShare)
        } else if self.of_namespace(class) >= shares.of_one()
            || (!answered && untrusted >= shares.untrusted_namespace)
        {
            Some(Lack::NamespaceShare)
        } else if !self.is_room(shares, class, urgency, standing) {
            Some(Lack::Room)
        } else {
            None
        }
    }

    /// Returns whether a place is free that `class` may have. The last ones are kept for classes and
    /// namespaces that have none, and for refreshes that wait.
    fn is_room(
        &self,
        shares: &Shares,
        class: &ClassName,
        urgency: Urgency,
        standing: Standing,
    ) -> bool {
        let free = shares.most.saturating_sub(self.total);
        let of_standing = match standing {
            Standing::Answered => true,
            Standing::New => self.new + self.hung < shares.untrusted,
            Standing::Hung => self.new + self.hung < shares.untrusted && self.hung < shares.hung,
        };
        // The first mounts of one namespace may hold all places but the last ones, and nothing tells
        // how long.
        let for_refreshes = shares.least_for_refreshes.saturating_sub(self.refreshes);
        let (may_have_last, kept) = match urgency {
            Urgency::FirstMount if self.refreshes_wait => {
                (self.of_class(class) == 0, for_refreshes)
            }
            Urgency::FirstMount => (self.of_class(class) == 0, 0),
            Urgency::Refresh => (for_refreshes > 0, 0),
        };
        of_standing
            && free > 0
            && (free > shares.for_new_classes || may_have_last)
            && (free > shares.for_new_namespaces + kept || self.of_namespace(class) == 0)
    }
}
