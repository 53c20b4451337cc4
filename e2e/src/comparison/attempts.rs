//! What becomes of calls that a driver answers with an error: they are counted and, as kubelet does, made
//! again. A driver that fails now and then is measured like one that does not.

use std::time::{Duration, Instant};

use futures::future::join_all;
use proto::csi::node_client::NodeClient;
use tonic::Status;
use tonic::transport::Channel;

use super::report::Figure;
use crate::bench::{Backoff, Node, Volume};

/// The time in which a volume has to be published, or unpublished, at last.
const PATIENCE: Duration = Duration::from_secs(180);
/// The length of a message that is shown.
const SHOWN: usize = 240;

/// What a round has measured so far.
#[derive(Default)]
pub(super) struct Round {
    pub(super) figures: Vec<Figure>,
    /// Sentences about what went wrong.
    pub(super) notes: Vec<String>,
    tallies: Vec<Tally>,
}

/// The failed calls of one operation.
struct Tally {
    operation: &'static str,
    failed: usize,
    volumes: usize,
    given_up: usize,
    /// The first error.
    example: Option<String>,
}

/// What became of one volume.
#[derive(Default)]
pub(super) struct Outcome {
    /// The time of the first attempt in milliseconds.
    pub(super) time: f64,
    /// The number of attempts that failed.
    failed: usize,
    example: Option<String>,
    given_up: bool,
}

impl Outcome {
    /// Returns whether the first attempt succeeded.
    pub(super) fn is_smooth(&self) -> bool {
        self.failed == 0
    }

    fn fail(&mut self, status: &Status) {
        self.failed += 1;
        let text = || format!("{:?}: {}", status.code(), status.message());
        self.example.get_or_insert_with(text);
    }
}

impl Round {
    pub(super) fn add(&mut self, name: &str, unit: &'static str, value: f64) {
        self.figures.push(Figure::of(name, unit, value));
    }

    /// Adds a figure that is one figure of this round divided by another, if both were measured.
    pub(super) fn add_ratio(&mut self, name: &str, dividend: &str, divisor: &str) {
        let value = |name: &str| {
            let mut figures = self.figures.iter();
            figures.find_map(|figure| figure.value_of(name))
        };
        if let (Some(dividend), Some(divisor)) = (value(dividend), value(divisor)) {
            self.add(name, "", dividend / divisor);
        }
    }

    /// Counts what became of the volumes of an operation.
    pub(super) fn count(&mut self, operation: &'static str, outcomes: &[Outcome]) {
        let known = self
            .tallies
            .iter()
            .position(|tally| tally.operation == operation);
        let at = known.unwrap_or_else(|| {
            self.tallies.push(Tally {
                operation,
                failed: 0,
                volumes: 0,
                given_up: 0,
                example: None,
            });
            self.tallies.len() - 1
        });
        let tally = &mut self.tallies[at];
        tally.failed += outcomes.iter().map(|outcome| outcome.failed).sum::<usize>();
        tally.volumes += outcomes.len();
        tally.given_up += outcomes.iter().filter(|outcome| outcome.given_up).count();
        if tally.example.is_none() {
            tally.example = outcomes.iter().find_map(|outcome| outcome.example.clone());
        }
    }

    /// Turns the counts into figures and notes.
    pub(super) fn finish(&mut self) {
        for tally in std::mem::take(&mut self.tallies) {
            let Tally {
                operation,
                failed,
                volumes,
                given_up,
                example,
            } = tally;
            self.add(&format!("failed calls, {operation}"), "", count(failed));
            if let Some(example) = example {
                let words: Vec<&str> = example.split_whitespace().collect();
                let example: String = words.join(" ").chars().take(SHOWN).collect();
                self.notes.push(format!(
                    "{operation}: {failed} calls for {volumes} volumes failed, the first with `{example}`"
                ));
            }
            if given_up > 0 {
                self.notes.push(format!(
                    "{operation}: {given_up} volumes were given up after {} s",
                    PATIENCE.as_secs()
                ));
            }
        }
    }
}

/// Makes the first attempt for a volume.
pub(super) async fn attempt<'v, C, F>(node: &Node, volume: &'v Volume, call: C) -> Outcome
where
    C: Fn(NodeClient<Channel>, &'v Volume) -> F,
    F: Future<Output = (f64, Result<(), Status>)>,
{
    let (time, answer) = call(node.client(), volume).await;
    let mut outcome = Outcome {
        time,
        ..Outcome::default()
    };
    if let Err(status) = answer {
        outcome.fail(&status);
    }
    outcome
}

/// Makes attempts with kubelet's waits for a volume whose first one failed, until one succeeds or the
/// patience ends.
async fn insist<'v, C, F>(node: &Node, volume: &'v Volume, call: C, first: &mut Outcome)
where
    C: Fn(NodeClient<Channel>, &'v Volume) -> F,
    F: Future<Output = (f64, Result<(), Status>)>,
{
    let (started, mut backoff) = (Instant::now(), Backoff::default());
    let mut done = first.is_smooth();
    while !done {
        if started.elapsed() > PATIENCE {
            first.given_up = true;
            return;
        }
        tokio::time::sleep(backoff.next()).await;
        match call(node.client(), volume).await.1 {
            Ok(()) => done = true,
            Err(status) => first.fail(&status),
        }
    }
}

/// Insists on all volumes at the same time.
pub(super) async fn insist_on_all<'v, C, F>(
    node: &Node,
    volumes: &'v [Volume],
    call: C,
    outcomes: &mut [Outcome],
) where
    C: Fn(NodeClient<Channel>, &'v Volume) -> F + Copy,
    F: Future<Output = (f64, Result<(), Status>)>,
{
    let volumes = volumes.iter().zip(outcomes);
    join_all(volumes.map(|(volume, outcome)| insist(node, volume, call, outcome))).await;
}

fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}
