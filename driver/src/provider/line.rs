//! A line in which namespaces take turns, and the classes of a namespace take turns.
//!
//! The namespace goes next whose last turn is the longest ago, or which has waited for the longest time since it
//! came, whichever is later; in it the class of which the same is true; and of its entries the first one. A namespace
//! with a hundred entries therefore does not delay an entry of another namespace that comes later, whichever of its
//! entries are served first. No entry can be passed forever: those before it have their turn and stand behind it
//! then. Entries that leave without a turn cost nobody anything.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// The namespace and the name of a SecretProviderClass.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ClassName {
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
}

impl ClassName {
    pub(super) fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

/// The entries that wait, each for a class.
pub(super) struct Line<T> {
    waiting: Vec<Waiting<T>>,
    /// The number of arrivals and turns so far: a clock by which they are compared.
    clock: u64,
    /// The last turn of each namespace and class of which an entry waits, or its arrival if it has had none since.
    namespaces: HashMap<Arc<str>, u64>,
    classes: HashMap<ClassName, u64>,
}

struct Waiting<T> {
    class: ClassName,
    entry: T,
}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self {
            waiting: Vec::new(),
            clock: 0,
            namespaces: HashMap::new(),
            classes: HashMap::new(),
        }
    }
}

impl<T> Line<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Adds an entry.
    pub(super) fn push(&mut self, class: ClassName, entry: T) {
        let now = self.tick();
        self.namespaces
            .entry(Arc::clone(&class.namespace))
            .or_insert(now);
        self.classes.entry(class.clone()).or_insert(now);
        self.waiting.push(Waiting { class, entry });
    }

    /// Returns the class of each entry. A class comes as often as it has entries.
    pub(super) fn classes(&self) -> impl Iterator<Item = &ClassName> {
        self.waiting.iter().map(|waiting| &waiting.class)
    }

    /// Removes the entries that do not wait any more.
    pub(super) fn retain(&mut self, waits: impl Fn(&T) -> bool) {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| waits(&waiting.entry));
        if self.waiting.len() < before {
            self.forget_absent();
        }
    }

    /// Takes the next entry of those whose class `may_go`.
    pub(super) fn take(&mut self, may_go: impl Fn(&ClassName) -> bool) -> Option<(ClassName, T)> {
        self.take_if(|class, _| may_go(class), |_| true)
    }

    /// Takes the next entry of those that `may_go`, if it is `ready`. If it is not, all entries
    /// wait until it is.
    pub(super) fn take_if(
        &mut self,
        may_go: impl Fn(&ClassName, &T) -> bool,
        ready: impl Fn(&T) -> bool,
    ) -> Option<(ClassName, T)> {
        let may_go = self
            .waiting
            .iter()
            .enumerate()
            .filter(|(_, waiting)| may_go(&waiting.class, &waiting.entry));
        let (at, chosen) = may_go.min_by_key(|(at, waiting)| {
            let class = &waiting.class;
            let namespace = self.namespaces.get(&class.namespace);
            (namespace, self.classes.get(class), *at)
        })?;
        if !ready(&chosen.entry) {
            return None;
        }
        let chosen = self.waiting.remove(at);
        let now = self.tick();
        self.namespaces
            .insert(Arc::clone(&chosen.class.namespace), now);
        self.classes.insert(chosen.class.clone(), now);
        self.forget_absent();
        Some((chosen.class, chosen.entry))
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Forgets the turns of those who do not wait: they come later than all who do.
    fn forget_absent(&mut self) {
        let waiting = &self.waiting;
        let classes: HashSet<&ClassName> = waiting.iter().map(|waiting| &waiting.class).collect();
        self.classes.retain(|class, _| classes.contains(class));
        let namespaces: HashSet<&str> = classes
            .iter()
            .map(|class| class.namespace.as_ref())
            .collect();
        self.namespaces
            .retain(|namespace, _| namespaces.contains(namespace.as_ref()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Comes(u8, u8),
        /// The entries of the classes whose bit is set may go.
        Goes(u16),
        /// The entries whose number has this remainder stop waiting.
        Leave(usize),
    }

    /// An entry that waits: its number, its namespace and class, and who was served while it could have been.
    type Waits = (usize, (u8, u8), Vec<(u8, u8)>);

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0_u8..4, 0_u8..4).prop_map(|(namespace, class)| Step::Comes(namespace, class)),
            2 => any::<u16>().prop_map(Step::Goes),
            1 => Just(Step::Goes(u16::MAX)),
            1 => (0_usize..5).prop_map(Step::Leave),
        ]
    }

    fn bit(namespace: u8, class: u8) -> u16 {
        1 << (namespace * 4 + class)
    }

    proptest! {
        /// Whichever entries may go at a time, nobody has two turns while somebody else waits who could go in both:
        /// no namespace, no class of a namespace, and no entry of a class goes before an earlier one.
        #[test]
        fn nobody_has_two_turns_while_somebody_waits(steps in prop::collection::vec(step(), 1..120)) {
            let mut line = Line::default();
            let mut waiting: Vec<Waits> = Vec::new();
            for (number, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Comes(namespace, class) => {
                        let name = ClassName::new(&namespace.to_string(), &class.to_string());
                        line.push(name, (number, (namespace, class)));
                        waiting.push((number, (namespace, class), Vec::new()));
                    }
                    Step::Leave(remainder) => {
                        line.retain(|(number, _)| number % 5 != remainder);
                        waiting.retain(|(number, ..)| number % 5 != remainder);
                    }
                    Step::Goes(mask) => {
                        let may_go = |(namespace, class): (u8, u8)| mask & bit(namespace, class) != 0;
                        let taken = line.take_if(|_, (_, class)| may_go(*class), |_| true);
                        let could = waiting.iter().any(|(_, class, _)| may_go(*class));
                        prop_assert_eq!(taken.is_some(), could);
                        let Some((_, (taken, class))) = taken else { continue };
                        waiting.retain(|(number, ..)| *number != taken);
                        for (number, own, served) in &mut waiting {
                            if !may_go(*own) {
                                continue;
                            }
                            if *own == class {
                                prop_assert!(*number > taken, "an earlier entry of its class waits");
                                served.clear();
                                continue;
                            }
                            let is_its = |one: &&(u8, u8)| match own.0 == class.0 {
                                true => **one == class,
                                false => one.0 == class.0,
                            };
                            let turns = served.iter().filter(is_its).count();
                            prop_assert_eq!(turns, 0, "{:?} had a turn, and {:?} waits", class, own);
                            served.push(class);
                        }
                        // Whoever had a turn with another entry has to wait for the others.
                        for (_, own, served) in &mut waiting {
                            if own.0 == class.0 {
                                served.retain(|one| one.0 == class.0 && *own != class);
                            }
                        }
                    }
                }
            }
            prop_assert_eq!(line.classes().count(), waiting.len());
            prop_assert_eq!(line.namespaces.is_empty(), waiting.is_empty());
            prop_assert!(line.classes.len() <= waiting.len());
        }
    }
}
