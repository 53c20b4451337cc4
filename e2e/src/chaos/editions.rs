//! The history of the well-behaved classes: what each says, and since when.

use std::sync::Mutex;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::lock;
use super::store::CLASSES;

/// A change of a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Edit {
    /// It gets one more object and key, or loses them again.
    Extra,
    /// Only a text in its parameters changes. Names and versions of its objects stay.
    Text,
    /// It says again what it said before the last change.
    Back,
}

/// What a class says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spec {
    /// The number of the text that the class itself gives to one of its objects. No two specs of a
    /// class have the same one.
    pub(super) edition: u64,
    /// Whether it has one more object and key.
    pub(super) has_extra: bool,
}

/// What all classes say, and said.
pub(super) struct Editions(Mutex<Vec<Class>>);

/// The history of a class.
struct Class {
    /// All that it may have said. Index 0 is edition 1.
    specs: Vec<Spec>,
    now: Spec,
    before: Spec,
    /// The number of changes that have begun, and of those that have ended.
    begun: u64,
    ended: u64,
    /// The time, by [`World::now`](super::world::World::now), at which the last one ended.
    last: Option<Duration>,
    /// Whether a call that had read the class before the one before the last may have been running at
    /// the last one.
    is_close: bool,
}

impl Editions {
    /// Begins a history in which each class has its first edition.
    pub(super) fn start() -> Self {
        let now = Spec {
            edition: 1,
            has_extra: false,
        };
        let first = || Class {
            specs: vec![now],
            now,
            before: now,
            begun: 0,
            ended: 0,
            last: None,
            is_close: false,
        };
        Self(Mutex::new(CLASSES.iter().map(|_| first()).collect()))
    }

    fn with<T>(&self, class: usize, f: impl FnOnce(&mut Class) -> T) -> Option<T> {
        lock(&self.0).get_mut(class).map(f)
    }

    /// Returns what a class says.
    pub(super) fn now(&self, class: usize) -> Option<Spec> {
        self.with(class, |class| class.now)
    }

    /// Returns what a class is to say after an edit.
    pub(super) fn plan(&self, class: usize, edit: Edit) -> Option<Spec> {
        self.with(class, |class| {
            if edit == Edit::Back && class.before != class.now {
                return class.before;
            }
            let spec = Spec {
                edition: class.specs.len() as u64 + 1,
                has_extra: class.now.has_extra ^ (edit == Edit::Extra),
            };
            class.specs.push(spec);
            spec
        })
    }

    /// Notes that the API server has it now.
    pub(super) fn becomes(&self, class: usize, spec: Spec) {
        self.with(class, |class| {
            if class.now != spec {
                class.before = class.now;
            }
            class.now = spec;
        });
    }

    /// Notes that a change of a class begins. `closely` is the longest time of a call.
    pub(super) fn begins(&self, class: usize, now: Duration, closely: Duration) {
        self.with(class, |class| {
            class.begun += 1;
            class.is_close = class.last.is_some_and(|last| now - last < closely);
        });
    }

    /// Notes that it is over.
    pub(super) fn ends(&self, class: usize, now: Duration) {
        self.with(class, |class| {
            class.ended += 1;
            class.last = Some(now);
        });
    }

    /// Returns a number of the present state of a class, and what it says. Returns `None` if it is
    /// changing, or if a driver may be at work with a state before the one before.
    pub(super) fn settled(&self, class: usize) -> Option<(u64, Spec)> {
        self.with(class, |class| {
            let is_settled = class.begun == class.ended && !class.is_close;
            is_settled.then_some((class.begun, class.now))
        })?
    }

    /// Returns what a class says, and the time of its last change. Returns `None` if it is changing or
    /// never was.
    pub(super) fn changed(&self, class: usize) -> Option<(Spec, Duration)> {
        self.with(class, |class| {
            let last = class.last.filter(|_| class.begun == class.ended);
            last.map(|last| (class.now, last))
        })?
    }

    /// Returns whether a class may have said this at some time.
    pub(super) fn was(&self, class: usize, spec: Spec) -> bool {
        let is_there = self.with(class, |class| class.specs.contains(&spec));
        is_there.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_specs_have_the_same_edition_and_an_edit_can_be_taken_back() {
        let editions = Editions::start();
        let first = editions.now(0).unwrap();
        let text = editions.plan(0, Edit::Text).unwrap();
        assert_eq!((text.edition, text.has_extra), (2, false));
        editions.becomes(0, text);
        let extra = editions.plan(0, Edit::Extra).unwrap();
        assert_eq!((extra.edition, extra.has_extra), (3, true));
        // The API server has refused it.
        assert_eq!(editions.plan(0, Edit::Back), Some(first));
        editions.becomes(0, first);
        assert_eq!(editions.plan(0, Edit::Back), Some(text));
        assert_eq!(editions.plan(1, Edit::Back).unwrap().edition, 2);
        assert!(editions.was(0, extra));
        let mixed = Spec {
            has_extra: true,
            ..text
        };
        assert!(!editions.was(0, mixed));
    }

    #[test]
    fn a_state_counts_when_it_is_settled() {
        let (editions, at) = (Editions::start(), Duration::from_secs);
        let first = editions.now(0).unwrap();
        assert_eq!(editions.settled(0), Some((0, first)));
        assert_eq!(editions.changed(0), None);
        editions.begins(0, at(1), at(5));
        assert_eq!(editions.settled(0), None);
        editions.ends(0, at(2));
        assert_eq!(editions.settled(0), Some((1, first)));
        assert_eq!(editions.changed(0), Some((first, at(2))));
        editions.begins(0, at(3), at(5));
        editions.ends(0, at(4));
        assert_eq!(editions.settled(0), None);
        assert_eq!(editions.changed(0), Some((first, at(4))));
    }
}
