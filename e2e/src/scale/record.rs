//! What happened when: answers of drivers, and the load on the API server and the provider, second by
//! second.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::bench::Requests;

/// An answer of a driver to kubelet.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) at: Instant,
    /// The time in milliseconds.
    pub(super) time: f64,
    /// The code and the message of a failure.
    pub(super) failure: Option<String>,
    /// Whether it is the first publish of a volume.
    pub(super) is_first: bool,
}

/// The load of about a second.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// The end.
    pub(super) at: Instant,
    pub(super) seconds: f64,
    pub(super) requests: Requests,
    /// The calls to the provider.
    pub(super) provider: f64,
    /// The CPU time of all drivers, in seconds.
    pub(super) cpu: f64,
}

/// A phase of the run.
#[derive(Clone, Debug)]
pub(super) struct Phase {
    pub(super) name: &'static str,
    pub(super) begin: Instant,
    pub(super) end: Instant,
    /// The resident memory of the drivers at the end in MiB: the mean, and the largest of all during the
    /// phase.
    pub(super) memory: f64,
    pub(super) peak: f64,
}

/// Everything that was recorded.
#[derive(Debug, Default)]
pub(super) struct Record {
    answers: Mutex<Vec<Answer>>,
    samples: Mutex<Vec<Sample>>,
    phases: Mutex<Vec<Phase>>,
    notes: Mutex<Vec<String>>,
}

impl Record {
    pub(super) fn answer(&self, answer: Answer) {
        lock(&self.answers).push(answer);
    }

    pub(super) fn sample(&self, sample: Sample) {
        lock(&self.samples).push(sample);
    }

    pub(super) fn phase(&self, phase: Phase) {
        lock(&self.phases).push(phase);
    }

    /// Adds a sentence to the report.
    pub(super) fn note(&self, note: String) {
        lock(&self.notes).push(note);
    }

    pub(super) fn notes(&self) -> Vec<String> {
        lock(&self.notes).clone()
    }

    pub(super) fn phases(&self) -> Vec<Phase> {
        lock(&self.phases).clone()
    }

    pub(super) fn samples(&self) -> Vec<Sample> {
        lock(&self.samples).clone()
    }

    /// Returns the number of volumes that were published the first time since an instant.
    pub(super) fn first_publishes(&self, since: Instant) -> usize {
        let answers = lock(&self.answers);
        let first = answers
            .iter()
            .rev()
            .take_while(|answer| answer.at >= since || !answer.is_first);
        first
            .filter(|answer| answer.at >= since && answer.is_first && answer.failure.is_none())
            .count()
    }

    /// Returns the answers to calls that began in a phase.
    pub(super) fn answers_of(&self, phase: &Phase) -> Vec<Answer> {
        let answers = lock(&self.answers);
        let of_phase = answers
            .iter()
            .filter(|answer| (phase.begin..phase.end).contains(&answer.at));
        of_phase.cloned().collect()
    }

    /// Returns the samples that ended in a phase.
    pub(super) fn samples_of(&self, phase: &Phase) -> Vec<Sample> {
        let mut samples = self.samples();
        samples.retain(|sample| sample.at > phase.begin && sample.at <= phase.end);
        samples
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
