//! Holds what is remembered of classes, within bounds.
//!
//! A tenant decides how many classes its pods name and how large they are. What is too much is taken from
//! the namespace that has the most, so that the others keep theirs.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::Answer;
use crate::cluster::{Class, class::text_of};

/// The largest number of classes that are remembered.
pub(super) const MOST: usize = 1024;

/// The time after which a class that nobody needed is forgotten. kubelet looks at each volume within 90
/// seconds.
pub(super) const UNUSED: Duration = Duration::from_secs(600);

/// The bytes of the parameters of all remembered classes, and of one. A class of which the parameters
/// are not remembered is read for each refresh.
pub(super) const MOST_PARAMETERS: usize = 1 << 20;
pub(super) const MOST_PARAMETERS_OF_ONE: usize = 64 << 10;

/// The bytes of text in `secretObjects` of all remembered classes, each of which may have 128 KiB. Also
/// a class of a volume that was never mounted is remembered.
pub(super) const MOST_TEXT: usize = 8 << 20;

/// What is remembered of a class.
#[derive(Debug)]
pub(super) struct Remembered {
    /// The last answer that says something about the class, also that there is none.
    pub(super) lasting: Option<Answer>,
    /// The last failure to get one. It is shared only by those who waited for it.
    pub(super) failed: Option<Answer>,
    /// The time at which a look last gave up waiting for an answer.
    pub(super) late: Option<Instant>,
    needed: Instant,
    /// The bytes of text in `secretObjects`.
    text: usize,
    /// The bytes of the parameters.
    parameters: usize,
}

/// The remembered classes by namespace and name.
#[derive(Default)]
pub(super) struct Store {
    classes: HashMap<String, Remembered>,
    /// How many callers wait for the parameters of a class.
    waiting: HashMap<String, usize>,
}

impl Store {
    /// Returns what is remembered of a class that is needed now.
    pub(super) fn get(&mut self, key: &str, now: Instant) -> Option<&Remembered> {
        let remembered = self.classes.get_mut(key)?;
        remembered.needed = now;
        Some(remembered)
    }

    /// Returns what is remembered of a class, for which that does not count as a need.
    pub(super) fn look(&self, key: &str) -> Option<&Remembered> {
        self.classes.get(key)
    }

    /// Notes that an answer is late.
    pub(super) fn late(&mut self, key: &str, now: Instant) {
        self.entry(key, now).late = Some(now);
        self.bound_classes();
    }

    fn entry(&mut self, key: &str, now: Instant) -> &mut Remembered {
        let entry = self.classes.entry(key.to_owned());
        entry.or_insert(Remembered {
            lasting: None,
            failed: None,
            late: None,
            needed: now,
            text: 0,
            parameters: 0,
        })
    }

    /// Notes a caller that waits for the parameters of a class.
    pub(super) fn waits(&mut self, key: &str) {
        *self.waiting.entry(key.to_owned()).or_default() += 1;
    }

    /// Notes that a caller waits no longer. After the last one, the parameters are bounded again.
    pub(super) fn waits_no_longer(&mut self, key: &str) {
        let Entry::Occupied(mut waiting) = self.waiting.entry(key.to_owned()) else {
            return;
        };
        *waiting.get_mut() -= 1;
        if *waiting.get() == 0 {
            waiting.remove();
            self.bound_parameters();
        }
    }

    /// Remembers an answer.
    pub(super) fn remember(&mut self, key: &str, answer: Answer) {
        let now = Instant::now();
        self.classes
            .retain(|_, remembered| now.duration_since(remembered.needed) < UNUSED);
        let remembered = self.entry(key, now);
        if answer.is_lasting() {
            let class = answer.class.as_ref();
            remembered.text = class.map_or(0, |class| text_of(&class.secret_objects));
            remembered.parameters = class.map_or(0, |class| parameters(class));
            remembered.lasting = Some(answer);
            remembered.failed = None;
            remembered.late = None;
        } else {
            remembered.failed = Some(answer);
        }
        self.bound_parameters();
        self.bound_classes();
    }

    /// Forgets parameters that are too large, except those that somebody waits for.
    fn bound_parameters(&mut self) {
        let waiting = &self.waiting;
        for (key, remembered) in &mut self.classes {
            if remembered.parameters > MOST_PARAMETERS_OF_ONE && !waiting.contains_key(key) {
                remembered.forget_parameters();
            }
        }
        let bounded = |key: &str, remembered: &Remembered| match waiting.contains_key(key) {
            true => 0,
            false => remembered.parameters,
        };
        while self.sum(bounded) > MOST_PARAMETERS {
            let Some(key) = self.least_needed(bounded) else {
                return;
            };
            if let Some(remembered) = self.classes.get_mut(&key) {
                remembered.forget_parameters();
            }
        }
    }

    /// Forgets classes of which there are too many, or that are too large.
    fn bound_classes(&mut self) {
        while self.classes.len() > MOST {
            let Some(key) = self.least_needed(|_, _| 1) else {
                return;
            };
            self.classes.remove(&key);
        }
        let text = |_: &str, remembered: &Remembered| remembered.text;
        while self.sum(text) > MOST_TEXT {
            let Some(key) = self.least_needed(text) else {
                return;
            };
            self.classes.remove(&key);
        }
    }

    fn sum(&self, weight: impl Fn(&str, &Remembered) -> usize) -> usize {
        let weights = self.classes.iter().map(|(key, of)| weight(key, of));
        weights.sum()
    }

    /// Returns one of the classes that have a weight, of the namespace that has most of it: one that is not
    /// there, or else the one that was needed last the longest time ago.
    fn least_needed(&self, weight: impl Fn(&str, &Remembered) -> usize) -> Option<String> {
        let mut namespaces: HashMap<&str, usize> = HashMap::new();
        for (key, remembered) in &self.classes {
            *namespaces.entry(namespace(key)).or_default() += weight(key, remembered);
        }
        let (most, _) = namespaces.into_iter().max_by_key(|(_, weight)| *weight)?;
        let of_most = self
            .classes
            .iter()
            .filter(|(key, of)| namespace(key) == most && weight(key, of) > 0);
        of_most
            .min_by_key(|(_, of)| (of.is_there(), of.needed))
            .map(|(key, _)| key.clone())
    }
}

impl Remembered {
    /// Returns whether there is such a class, as far as is known.
    fn is_there(&self) -> bool {
        self.lasting
            .as_ref()
            .is_some_and(|answer| answer.class.is_ok())
    }

    fn forget_parameters(&mut self) {
        self.parameters = 0;
        if let Some(answer) = &mut self.lasting
            && let Ok(class) = &answer.class
        {
            answer.class = Ok(Arc::new(class.without_parameters()));
        }
    }
}

fn namespace(key: &str) -> &str {
    key.split_once('/').map_or(key, |(namespace, _)| namespace)
}

/// Returns the bytes of the parameters of a class.
fn parameters(class: &Class) -> usize {
    let parameters = class.parameters.iter();
    parameters.map(|(key, value)| key.len() + value.len()).sum()
}

#[cfg(test)]
mod tests;
