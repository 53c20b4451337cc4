//! Watches something that has a history: it may only go forward in it.

use std::fmt::Debug;

/// The states that something may have had, in their order, and the state in which it was seen last.
#[derive(Debug)]
pub(crate) struct History<T> {
    states: Vec<T>,
    at: usize,
    /// What was seen and must not be.
    pub(crate) problems: Vec<String>,
}

impl<T: PartialEq + Debug> History<T> {
    pub(crate) fn new() -> Self {
        Self {
            states: Vec::new(),
            at: 0,
            problems: Vec::new(),
        }
    }

    /// Adds a state that may be seen from now on.
    pub(crate) fn add(&mut self, state: T) {
        self.states.push(state);
    }

    /// Returns all states, those before too.
    pub(crate) fn all(&self) -> &[T] {
        &self.states
    }

    /// Returns the states up to the one in which it was seen last.
    pub(crate) fn so_far(&self) -> &[T] {
        &self.states[..self.states.len().min(self.at + 1)]
    }

    pub(crate) fn newest(&self) -> Option<&T> {
        self.states.last()
    }

    /// Notes that something was seen that is true of this state.
    pub(crate) fn see(&mut self, what: &str, seen: &dyn Debug, is: impl Fn(&T) -> bool) {
        if let Some(further) = self.states[self.at..].iter().position(&is) {
            self.at += further;
            return;
        }
        let was = self.states[..self.at].iter().rposition(is);
        let why = match was {
            Some(index) => format!(
                "has gone back in time, from state {} to state {index}",
                self.at
            ),
            None => format!("is as it never was: {seen:?}; at state {}", self.at),
        };
        // The first few tell all.
        if self.problems.len() < 3 {
            self.problems.push(format!("{what} {why}"));
        }
    }

    /// Notes something else that must not be.
    pub(crate) fn problem(&mut self, why: String) {
        if self.problems.len() < 3 {
            self.problems.push(why);
        }
    }
}
