//! A line in which namespaces take turns, and the classes of a namespace take turns.
//!
//! An entry is given a number when it arrives: one more than the last number of its namespace, or
//! than the number that was served last, whichever is larger. Numbers are served in ascending
//! order. A namespace with a hundred entries therefore does not delay an entry of another namespace
//! that arrives later, and no entry can be passed forever, because later entries have larger
//! numbers.

use std::{collections::HashMap, sync::Arc};

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
    waiting: Vec<Numbered<T>>,
    arrivals: u64,
    served: u64,
    of_namespaces: HashMap<Arc<str>, u64>,
    of_classes: HashMap<ClassName, u64>,
}

struct Numbered<T> {
    class: ClassName,
    arrival: u64,
    /// The number that decides between namespaces.
    number: u64,
    /// The number that decides between the classes of the namespace.
    of_class: u64,
    entry: T,
}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self {
            waiting: Vec::new(),
            arrivals: 0,
            served: 0,
            of_namespaces: HashMap::new(),
            of_classes: HashMap::new(),
        }
    }
}

impl<T> Line<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Adds an entry.
    pub(super) fn push(&mut self, class: ClassName, entry: T) {
        let served = self.served;
        let next = |last: Option<&u64>| last.copied().unwrap_or_default().max(served) + 1;
        let number = next(self.of_namespaces.get(&class.namespace));
        let of_class = next(self.of_classes.get(&class));
        self.of_namespaces
            .insert(Arc::clone(&class.namespace), number);
        self.of_classes.insert(class.clone(), of_class);
        self.arrivals += 1;
        self.waiting.push(Numbered {
            class,
            arrival: self.arrivals,
            number,
            of_class,
            entry,
        });
    }

    /// Returns the class of each entry. A class comes as often as it has entries.
    pub(super) fn classes(&self) -> impl Iterator<Item = &ClassName> {
        self.waiting.iter().map(|waiting| &waiting.class)
    }

    /// Removes the entries that do not wait any more.
    pub(super) fn retain(&mut self, waits: impl Fn(&T) -> bool) {
        self.waiting.retain(|waiting| waits(&waiting.entry));
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
        let may_go: Vec<usize> = self
            .waiting
            .iter()
            .enumerate()
            .filter(|(_, waiting)| may_go(&waiting.class, &waiting.entry))
            .map(|(at, _)| at)
            .collect();
        let (first, namespace, number) = self
            .indexed(&may_go)
            .min_by_key(|(_, waiting)| (waiting.number, waiting.arrival))
            .map(|(at, waiting)| (at, Arc::clone(&waiting.class.namespace), waiting.number))?;
        // This namespace has its turn, and in it the class that was served least.
        let (at, chosen) = self
            .indexed(&may_go)
            .filter(|(_, waiting)| waiting.class.namespace == namespace)
            .min_by_key(|(_, waiting)| (waiting.of_class, waiting.arrival))?;
        if !ready(&chosen.entry) {
            return None;
        }
        // The smallest number of the namespace is used up, even if another entry had it.
        let larger = chosen.number;
        if let Some(first) = self.waiting.get_mut(first) {
            first.number = larger;
        }
        let chosen = self.waiting.remove(at);
        self.served = self.served.max(number);
        let served = self.served;
        self.of_namespaces.retain(|_, last| *last > served);
        self.of_classes.retain(|_, last| *last > served);
        Some((chosen.class, chosen.entry))
    }

    fn indexed(&self, indices: &[usize]) -> impl Iterator<Item = (usize, &Numbered<T>)> {
        indices
            .iter()
            .filter_map(|at| Some((*at, self.waiting.get(*at)?)))
    }
}
