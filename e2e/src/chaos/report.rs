//! What a run tells: a timeline, the number of steps and checks by kind, and what was found.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::lock;

/// The number of findings after which no more are noted: they would be of the same kind.
const MOST_FINDINGS: usize = 20;

/// Collects what happens.
pub(super) struct Log {
    started: Instant,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    timeline: Vec<(Duration, String)>,
    findings: Vec<Finding>,
    steps: BTreeMap<String, u64>,
    struck: BTreeMap<String, u64>,
    left_out: BTreeMap<String, LeftOut>,
    checks: BTreeMap<&'static str, u64>,
    longest: BTreeMap<&'static str, Duration>,
    broken_off: Option<String>,
}

/// The steps of a kind that a cluster cannot do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// The number of these steps.
    pub times: u64,
    /// The reason.
    pub why: &'static str,
}

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The time since the beginning of the run.
    pub at: Duration,
    /// The name of the invariant.
    pub invariant: &'static str,
    /// What was seen.
    pub seen: String,
}

/// The result of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The broken promises; none in a good run.
    pub findings: Vec<Finding>,
    /// What happened, in order.
    pub timeline: Vec<(Duration, String)>,
    /// The steps by kind.
    pub steps: BTreeMap<String, u64>,
    /// The times that a fault was seen to strike, by kind.
    pub struck: BTreeMap<String, u64>,
    /// The steps that were left out because the cluster cannot do them, by kind.
    pub left_out: BTreeMap<String, LeftOut>,
    /// The checks by kind.
    pub checks: BTreeMap<&'static str, u64>,
    /// The longest time of each kind that was measured.
    pub longest: BTreeMap<&'static str, Duration>,
    /// Why the run itself failed, so that it says nothing about the driver.
    pub broken_off: Option<String>,
}

impl Log {
    pub(super) fn start() -> Self {
        Self {
            started: Instant::now(),
            inner: Mutex::default(),
        }
    }

    /// Notes an event of the timeline.
    pub(super) fn tell(&self, text: impl Into<String>) {
        let at = self.started.elapsed();
        lock(&self.inner).timeline.push((at, text.into()));
    }

    /// Notes a broken promise, once for each thing seen.
    pub(super) fn find(&self, invariant: &'static str, seen: String) {
        let at = self.started.elapsed();
        let mut inner = lock(&self.inner);
        let is_known = |known: &Finding| known.invariant == invariant && known.seen == seen;
        if inner.findings.len() >= MOST_FINDINGS || inner.findings.iter().any(is_known) {
            return;
        }
        inner
            .timeline
            .push((at, format!("FOUND {invariant}: {seen}")));
        inner.findings.push(Finding {
            at,
            invariant,
            seen,
        });
    }

    /// Notes that the run itself failed; the first reason counts.
    pub(super) fn break_off(&self, why: String) {
        self.tell(format!("BROKEN OFF {why}"));
        lock(&self.inner).broken_off.get_or_insert(why);
    }

    /// Returns whether the run ends: a promise was broken, or the run itself failed.
    pub(super) fn is_over(&self) -> bool {
        let inner = lock(&self.inner);
        !inner.findings.is_empty() || inner.broken_off.is_some()
    }

    /// Counts a step.
    pub(super) fn step(&self, kind: String) {
        *lock(&self.inner).steps.entry(kind).or_default() += 1;
    }

    /// Counts a fault that was seen to strike.
    pub(super) fn struck(&self, kind: &str, times: u64) {
        let mut inner = lock(&self.inner);
        *inner.struck.entry(kind.to_owned()).or_default() += times;
    }

    /// Counts a step that is left out, with the reason.
    pub(super) fn leave_out(&self, kind: String, why: &'static str) {
        let mut inner = lock(&self.inner);
        let left_out = inner
            .left_out
            .entry(kind)
            .or_insert(LeftOut { times: 0, why });
        left_out.times += 1;
    }

    /// Counts checks.
    pub(super) fn checked(&self, kind: &'static str, times: u64) {
        *lock(&self.inner).checks.entry(kind).or_default() += times;
    }

    /// Notes a time, of which the longest is told.
    pub(super) fn took(&self, kind: &'static str, time: Duration) {
        let mut inner = lock(&self.inner);
        let longest = inner.longest.entry(kind).or_default();
        *longest = time.max(*longest);
    }

    pub(super) fn outcome(&self) -> Outcome {
        let inner = lock(&self.inner);
        Outcome {
            findings: inner.findings.clone(),
            timeline: inner.timeline.clone(),
            steps: inner.steps.clone(),
            struck: inner.struck.clone(),
            left_out: inner.left_out.clone(),
            checks: inner.checks.clone(),
            longest: inner.longest.clone(),
            broken_off: inner.broken_off.clone(),
        }
    }
}

impl Outcome {
    /// Returns whether no promise was broken, by a run that did not fail itself.
    pub fn is_good(&self) -> bool {
        self.findings.is_empty() && self.broken_off.is_none()
    }

    /// Returns the timeline as text, one line for each event.
    pub fn timeline(&self) -> String {
        let mut text = String::new();
        for (at, event) in &self.timeline {
            // Writing to a string does not fail.
            let _written = writeln!(text, "{:9.3}  {event}", at.as_secs_f64());
        }
        text
    }
}

/// The numbers of a run, as a table.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "actions and faults (and how often they were seen to strike)"
        )?;
        for (kind, times) in &self.steps {
            write!(f, "  {kind:<20} {times:>8}")?;
            match self.struck.get(kind) {
                Some(struck) => writeln!(f, " {struck:>10}")?,
                None => writeln!(f)?,
            }
        }
        if !self.left_out.is_empty() {
            writeln!(f, "left out, because it could not be done")?;
        }
        for (kind, LeftOut { times, why }) in &self.left_out {
            writeln!(f, "  {kind:<20} {times:>8}  {why}")?;
        }
        writeln!(f, "checks")?;
        for (kind, times) in &self.checks {
            writeln!(f, "  {kind:<40} {times:>10}")?;
        }
        writeln!(f, "longest, in seconds")?;
        for (kind, time) in &self.longest {
            writeln!(f, "  {kind:<40} {:>10.2}", time.as_secs_f64())?;
        }
        Ok(())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            at,
            invariant,
            seen,
        } = self;
        write!(f, "{:9.3}  {invariant}: {seen}", at.as_secs_f64())
    }
}
