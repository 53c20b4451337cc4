//! What else the documents promise of a class and a volume, besides content that follows a store: two pods use it all
//! the time, and once everything has converged, each of their files, Secrets, pod statuses and events is known exactly.
//!
//! | class | what it asks for |
//! |---|---|
//! | [`NUMBERED`] | numbers in its versions, as its provider gives each content the same one; a container mounts a file with `subPath` |
//! | [`INTERVAL`] | a refresh every hour; its volume asks for one every few seconds |
//! | [`SHARED`] | two classes of two pods that list the same Secret, in turn or both |
//! | [`LISTS`] | Secrets of all objects, of fields and decoded values, of another type, of somebody else, more than a class may have |
//! | [`WRITTEN`] | files that the provider writes itself |

mod check;
mod classes;
mod outcome;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::lock;
use super::store::Store;
pub(super) use check::{lacking, untold, watch};
pub(super) use classes::{class, name_of, of_somebody_else, pods, status_names, volumes_of};
use outcome::Secrets;

/// The number of classes. The first half of them is mounted by the first pod, the rest by the second.
pub(super) const CLASSES: usize = 6;
pub(super) const NUMBERED: usize = 0;
const INTERVAL: usize = 1;
/// The two classes that list one Secret.
const SHARED: [usize; 2] = [2, 5];
const LISTS: usize = 3;
const WRITTEN: usize = 4;
/// What the classes say at first: one of the two lists the Secret.
const FIRST: [u64; CLASSES] = [2, 0, 3, 8, 1, 2];
/// The Secret that somebody else has made.
pub(super) const TAKEN: &str = "features-taken";
/// The pods.
pub(super) const PODS: [&str; 2] = ["features-0", "features-1"];

/// What the classes say, and what was seen when everything had converged.
pub(super) struct Features(Mutex<State>);

struct State {
    /// What decides what each class says.
    numbers: [u64; CLASSES],
    /// The UIDs of the pods that are there, with their nodes.
    pods: Vec<(String, String)>,
    /// The classes that say something else since everything had converged.
    changed: BTreeSet<usize>,
    /// Whether the content has changed since the first pod began.
    is_followed: bool,
    /// Whether a pod waits for its Secrets, so that none may fail.
    waits: bool,
    /// Whether records were lost since everything had converged: a driver counts changes anew then.
    is_unrecorded: bool,
    settled: Seen,
    seen: Seen,
}

impl State {
    /// Returns whether a class lists Secrets.
    fn lists_any(&self, class: usize) -> bool {
        let number = self.numbers.get(class).copied().unwrap_or_default();
        !outcome::lists(class, number, self.waits).secrets.is_empty()
    }
}

/// What was seen at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    /// The Secrets as they have to be.
    secrets: Secrets,
    /// The classes whose pod statuses tell of trouble, with its beginning.
    trouble: Vec<(usize, String)>,
    /// The version of the object whose version has a number.
    version: String,
}

impl Features {
    /// Returns the state before the pods are there. `waits` says whether a publish fails as long as its Secrets
    /// cannot be written.
    pub(super) fn start(waits: bool) -> Self {
        Self(Mutex::new(State {
            numbers: FIRST,
            pods: Vec::new(),
            changed: BTreeSet::new(),
            is_followed: false,
            waits,
            is_unrecorded: false,
            settled: Seen::default(),
            seen: Seen::default(),
        }))
    }

    /// Returns what decides what a class says.
    pub(super) fn number(&self, class: usize) -> u64 {
        lock(&self.0).numbers.get(class).copied().unwrap_or(0)
    }

    /// Returns whether a publish fails as long as its Secrets cannot be written.
    pub(super) fn waits(&self) -> bool {
        lock(&self.0).waits
    }

    /// Returns whether a class may be changed: of those whose Secrets depend on what there was before, one, and that
    /// once, until all has converged.
    pub(super) fn may_change(&self, class: usize) -> bool {
        let changed = &lock(&self.0).changed;
        match class {
            LISTS => !changed.contains(&LISTS),
            class if SHARED.contains(&class) => SHARED.iter().all(|one| !changed.contains(one)),
            INTERVAL => false,
            _ => true,
        }
    }

    /// Returns whether a class lists the Secret of two, and did so when everything had converged.
    fn lists_since_settled(&self, class: usize) -> bool {
        let state = lock(&self.0);
        state.lists_any(class) && !state.changed.contains(&class)
    }

    /// Returns whether another class lists the Secret of a class, too.
    pub(super) fn is_contested(&self, class: usize) -> bool {
        let state = lock(&self.0);
        let mut others = SHARED.iter().filter(|other| **other != class);
        SHARED.contains(&class) && others.any(|other| state.lists_any(*other))
    }

    /// Notes that a class says something else.
    pub(super) fn becomes(&self, class: usize, number: u64) {
        let mut state = lock(&self.0);
        if let Some(before) = state.numbers.get_mut(class) {
            *before = number;
        }
        state.changed.insert(class);
        state.is_followed |= class == NUMBERED && !state.pods.is_empty();
    }

    /// Notes the UIDs of the pods, with their nodes.
    pub(super) fn begin(&self, pods: Vec<(String, String)>) {
        lock(&self.0).pods = pods;
    }

    /// Notes that all pods are deleted.
    pub(super) fn end(&self) {
        lock(&self.0).pods.clear();
    }

    /// Returns the UIDs of the pods that are there, with their nodes and the numbers of their classes.
    pub(super) fn there(&self) -> Vec<(String, String, Vec<usize>)> {
        let pods = lock(&self.0).pods.clone();
        let pods = pods.into_iter().enumerate();
        pods.map(|(pod, (uid, node))| (uid, node, volumes_of(pod)))
            .collect()
    }

    /// Returns the paths of the volumes on a node, as this process has them.
    pub(super) fn volumes(&self, node: &str, root: &Path) -> Vec<PathBuf> {
        let there = self.there().into_iter().filter(|(_, of, _)| of == node);
        let volumes = there.flat_map(|(uid, _, classes)| {
            classes
                .into_iter()
                .map(move |class| path_of(&uid, class, root))
        });
        volumes.collect()
    }

    /// Returns the number of volumes on a node whose pod statuses tell that a Secret fails.
    pub(super) fn out_of_step(&self, node: &str) -> usize {
        let there = self.there().into_iter().filter(|(_, of, _)| of == node);
        let here: Vec<usize> = there.flat_map(|(_, _, classes)| classes).collect();
        let trouble = &lock(&self.0).seen.trouble;
        trouble
            .iter()
            .filter(|(class, _)| here.contains(class))
            .count()
    }

    /// Notes that everything has converged: what was seen last is what the next change begins with.
    pub(super) fn settles(&self) {
        let mut state = lock(&self.0);
        state.settled = state.seen.clone();
        state.changed.clear();
        state.is_unrecorded = false;
    }

    /// Notes that a driver does not know any more how often content has changed.
    pub(super) fn records_are_lost(&self) {
        lock(&self.0).is_unrecorded = true;
    }
}

/// Returns the path of a volume, as this process has it.
fn path_of(uid: &str, class: usize, root: &Path) -> PathBuf {
    let target = embedded::target_path(uid, name_of(class));
    root.join(target.strip_prefix("/").unwrap_or(&target))
}

/// Returns the files that a volume of a class has.
fn files(class: usize, number: u64, store: &Store) -> Vec<(&'static str, String)> {
    let mut files = classes::files(class, number);
    files.extend((class == INTERVAL).then(|| classes::from_store(store)));
    files
}
