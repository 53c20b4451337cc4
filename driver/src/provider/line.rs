//! A line in which namespaces take turns, and the classes of a namespace do.
//!
//! Whoever comes is given a number: one more than the last number of the same namespace, or than
//! the number that was served last, whichever is larger. Numbers are served in their order. So
//! one who comes with a hundred at once waits behind one of another namespace who comes after
//! them, and nobody can be passed for ever, because those who come later have larger numbers.

use std::{collections::HashMap, sync::Arc};

/// For whom something is done: a SecretProviderClass.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Owner {
    pub(super) namespace: Arc<str>,
    pub(super) class: Arc<str>,
}

impl Owner {
    pub(super) fn new(namespace: &str, class: &str) -> Self {
        Self {
            namespace: namespace.into(),
            class: class.into(),
        }
    }
}

/// Those who wait.
pub(super) struct Line<T> {
    waiting: Vec<Waiting<T>>,
    arrivals: u64,
    served: u64,
    of_namespaces: HashMap<Arc<str>, u64>,
    of_classes: HashMap<Owner, u64>,
}

struct Waiting<T> {
    owner: Owner,
    arrival: u64,
    /// The number among namespaces, and the one among the classes of the namespace.
    number: u64,
    of_class: u64,
    what: T,
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

    /// Puts one at its place in the line.
    pub(super) fn push(&mut self, owner: Owner, what: T) {
        let served = self.served;
        let next = |last: Option<&u64>| last.copied().unwrap_or_default().max(served) + 1;
        let number = next(self.of_namespaces.get(&owner.namespace));
        let of_class = next(self.of_classes.get(&owner));
        self.of_namespaces
            .insert(Arc::clone(&owner.namespace), number);
        self.of_classes.insert(owner.clone(), of_class);
        self.arrivals += 1;
        self.waiting.push(Waiting {
            owner,
            arrival: self.arrivals,
            number,
            of_class,
            what,
        });
    }

    /// For whom those who wait do so, each as often as it waits.
    pub(super) fn owners(&self) -> impl Iterator<Item = &Owner> {
        self.waiting.iter().map(|waiting| &waiting.owner)
    }

    /// Takes away those who need not wait any more.
    pub(super) fn retain(&mut self, waits: impl Fn(&T) -> bool) {
        self.waiting.retain(|waiting| waits(&waiting.what));
    }

    /// Takes the one whose turn it is among those who `may_go`, if there is one.
    pub(super) fn take(&mut self, may_go: impl Fn(&Owner) -> bool) -> Option<(Owner, T)> {
        self.take_if(|owner, _| may_go(owner), |_, _| true)
    }

    /// Takes the one whose turn it is among those who `may_go`, if it is `ready`. If it is not,
    /// everybody waits for it.
    pub(super) fn take_if(
        &mut self,
        may_go: impl Fn(&Owner, &T) -> bool,
        ready: impl Fn(&Owner, &T) -> bool,
    ) -> Option<(Owner, T)> {
        let may_go: Vec<usize> = self
            .waiting
            .iter()
            .enumerate()
            .filter(|(_, waiting)| may_go(&waiting.owner, &waiting.what))
            .map(|(at, _)| at)
            .collect();
        let (first, namespace, number) = self
            .indexed(&may_go)
            .min_by_key(|(_, waiting)| (waiting.number, waiting.arrival))
            .map(|(at, waiting)| (at, Arc::clone(&waiting.owner.namespace), waiting.number))?;
        // It is this namespace's turn; within it, the turn of the class that was served least.
        let (at, chosen) = self
            .indexed(&may_go)
            .filter(|(_, waiting)| waiting.owner.namespace == namespace)
            .min_by_key(|(_, waiting)| (waiting.of_class, waiting.arrival))?;
        if !ready(&chosen.owner, &chosen.what) {
            return None;
        }
        // The namespace's smallest number is used up, whoever had it.
        let larger = chosen.number;
        if let Some(first) = self.waiting.get_mut(first) {
            first.number = larger;
        }
        let chosen = self.waiting.remove(at);
        self.served = self.served.max(number);
        let served = self.served;
        self.of_namespaces.retain(|_, last| *last > served);
        self.of_classes.retain(|_, last| *last > served);
        Some((chosen.owner, chosen.what))
    }

    fn indexed(&self, places: &[usize]) -> impl Iterator<Item = (usize, &Waiting<T>)> {
        places
            .iter()
            .filter_map(|at| Some((*at, self.waiting.get(*at)?)))
    }
}
