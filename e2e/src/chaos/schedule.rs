//! What a run does, and when: a pure list that a seed decides, and that can be printed, stored, cut
//! and run again.

mod check;

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::editions::Edit;
use super::random::Random;
use super::store::{CLASSES, SELDOM};
use super::tenants::{TRICKS, WEBHOOK};

/// The number of well-behaved pods that can be there at the same time. Pods of the same number have
/// the same name.
pub(super) const PODS: usize = 8;
/// The time in which the steps of a round begin.
const STORM: Duration = Duration::from_secs(25);
/// The longest time that a fault lasts.
const LONGEST_FAULT: u64 = 8_000;

/// The steps of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// The seed that it was made from.
    pub seed: u64,
    /// Rounds, one after another: the steps of a round, and then a calm in which all has to converge.
    pub(super) rounds: Vec<Vec<Step>>,
}

/// A step of a round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Step {
    /// The milliseconds after the beginning of the round.
    pub(super) at: u64,
    /// The action or fault.
    #[serde(flatten)]
    pub(super) what: What,
}

/// An action of somebody, or a fault. `lasts` is in milliseconds. A number of a node counts modulo
/// the nodes that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "what")]
pub(super) enum What {
    /// A pod comes, unless it is there.
    Create { pod: usize, node: usize },
    /// A pod is deleted.
    Delete { pod: usize },
    /// A pod is deleted by force: it is gone from the API before its volumes are.
    ForceDelete { pod: usize },
    /// A pod may run no longer than it has: it fails, and its object stays without its volumes.
    Expire { pod: usize },
    /// A pod is deleted by force, and one of the same name comes at once on another node.
    Move { pod: usize, node: usize },
    /// The store gets new values of a class's objects.
    Rotate { class: usize },
    /// A class changes.
    EditClass { class: usize, edit: Edit },
    /// A class is deleted, and made anew after a while, as it was or with another text.
    RemakeClass {
        class: usize,
        lasts: u64,
        anew: bool,
    },
    /// Somebody deletes the statuses of a pod.
    DeleteStatus { pod: usize },
    /// Somebody changes the versions in the statuses of a pod.
    AlterStatus { pod: usize },
    /// Somebody deletes a synced Secret.
    DeleteSecret { class: usize },
    /// Somebody changes a value of a synced Secret, or removes a key. If `order`, the Secret also has the
    /// order of content from another cluster, as one that was restored from a backup.
    AlterSecret {
        class: usize,
        remove: bool,
        order: bool,
    },
    /// The driver is killed.
    KillDriver { node: usize },
    /// A second driver serves at the socket of the first. It ends, or it is killed and leaves its socket.
    TwoDrivers {
        node: usize,
        lasts: u64,
        killed: bool,
    },
    /// The provider answers late.
    ProviderSlow { node: usize, lasts: u64, by: u64 },
    /// The provider does not answer, and is killed after that.
    ProviderHung { node: usize, lasts: u64 },
    /// The provider is stopped; its socket is absent or dead.
    ProviderGone {
        node: usize,
        lasts: u64,
        socket: bool,
    },
    /// The provider fails, or its answers must not be used.
    ProviderWrong { node: usize, lasts: u64, how: usize },
    /// The provider is killed.
    KillProvider { node: usize },
    /// A second provider takes the socket, and goes again.
    ReplaceProvider { node: usize, lasts: u64 },
    /// The API server answers the driver late.
    ApiSlow { lasts: u64, by: u64 },
    /// The API server refuses every second request of the driver with this status.
    ApiRefuses { lasts: u64, status: u16 },
    /// The API server answers every second write of the driver with a conflict.
    ApiConflicts { lasts: u64 },
    /// The API server answers half of the driver's reads with what was true at the beginning of the
    /// fault.
    ApiPast { lasts: u64 },
    /// The API server refuses each write of a Secret, as a quota does.
    SecretsRefused { lasts: u64 },
    /// The API server closes the driver's connections.
    ApiGone { lasts: u64 },
    /// The API server does not answer the driver.
    ApiHung { lasts: u64 },
    /// kubelet publishes each volume again while it is being published, and gives calls up early, as one
    /// does that starts anew again and again. The provider answers as much as `by` later, and its store
    /// changes meanwhile.
    RepeatCalls { node: usize, lasts: u64, by: u64 },
    /// kubelet starts anew.
    RestartKubelet { node: usize },
    /// The node loses its power.
    Reboot { node: usize },
    /// Somebody empties the directory of the providers' sockets.
    WipeProviders { node: usize },
    /// Somebody empties the directory of kubelet's registration sockets, and kubelet starts anew.
    WipeRegistry { node: usize },
    /// Somebody empties the driver's own directory: its socket and the records.
    WipePlugin { node: usize },
    /// The disk with the records is read-only.
    DiskReadOnly { node: usize, lasts: u64 },
    /// The disk with the records is full.
    DiskFull { node: usize, lasts: u64 },
    /// A crash leaves half a record.
    TearRecord { node: usize },
    /// The clock of a node is stepped by so many seconds, and the driver starts anew.
    StepClock { node: usize, by: i64 },
    /// The driver's memory limit is close to what is mounted.
    MemoryNear { node: usize, lasts: u64 },
    /// Somebody mounts so many times on each volume of a pod, which is deleted then.
    BuryVolumes { pod: usize, mounts: usize },
    /// The hostile tenant runs pods.
    Hostile { node: usize, lasts: u64, how: usize },
}

impl What {
    /// Returns the name of the kind, as in a schedule.
    pub(super) fn kind(&self) -> String {
        let value = serde_json::to_value(self).unwrap_or_default();
        value["what"].as_str().unwrap_or_default().to_owned()
    }

    /// Returns whether it is an action of users, not a fault.
    pub(super) fn is_action(&self) -> bool {
        matches!(
            self,
            Self::Create { .. }
                | Self::Delete { .. }
                | Self::ForceDelete { .. }
                | Self::Expire { .. }
                | Self::Move { .. }
                | Self::Rotate { .. }
                | Self::EditClass { .. }
                | Self::RemakeClass { .. }
                | Self::DeleteStatus { .. }
                | Self::AlterStatus { .. }
                | Self::DeleteSecret { .. }
                | Self::AlterSecret { .. }
        )
    }

    /// Returns the node whose driver starts anew because of this, at its beginning, meanwhile or at its end.
    pub(super) fn restarts_driver_of(&self) -> Option<usize> {
        match *self {
            Self::KillDriver { node }
            | Self::TwoDrivers { node, .. }
            | Self::Reboot { node }
            | Self::WipePlugin { node }
            | Self::DiskReadOnly { node, .. }
            | Self::DiskFull { node, .. }
            | Self::TearRecord { node }
            | Self::StepClock { node, .. }
            | Self::MemoryNear { node, .. } => Some(node),
            _ => None,
        }
    }

    /// Returns the node of a fault that must not meet another one of that node: each changes the
    /// node's processes or mounts, and changes them back.
    fn alone_on(&self) -> Option<usize> {
        match *self {
            Self::TwoDrivers { node, .. }
            | Self::ReplaceProvider { node, .. }
            | Self::ProviderGone { node, .. }
            | Self::ProviderHung { node, .. }
            | Self::ProviderSlow { node, .. }
            | Self::ProviderWrong { node, .. }
            | Self::RepeatCalls { node, .. }
            | Self::KillProvider { node }
            | Self::Reboot { node }
            | Self::WipeProviders { node }
            | Self::WipePlugin { node }
            | Self::WipeRegistry { node }
            | Self::DiskReadOnly { node, .. }
            | Self::DiskFull { node, .. }
            | Self::TearRecord { node }
            | Self::StepClock { node, .. }
            | Self::MemoryNear { node, .. } => Some(node),
            _ => None,
        }
    }

    /// Returns the milliseconds that it lasts.
    pub(super) fn lasts(&self) -> u64 {
        let value = serde_json::to_value(self).unwrap_or_default();
        value["lasts"].as_u64().unwrap_or(1_500)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind())?;
        let value = serde_json::to_value(self).unwrap_or_default();
        for (name, value) in value.as_object().into_iter().flatten() {
            if name != "what" {
                write!(f, " {name}={value}")?;
            }
        }
        Ok(())
    }
}

impl Schedule {
    /// Returns the schedule of a seed.
    pub fn of_seed(seed: u64, rounds: usize, nodes: usize) -> Self {
        let mut random = Random(seed);
        let rounds = (0..rounds)
            .map(|number| round(&mut random, number, Kind::of(seed, number), nodes))
            .collect();
        Self { seed, rounds }
    }

    /// Returns the schedule of a seed for so many minutes, on so many nodes. It begins with the rounds of
    /// the same seed for fewer minutes.
    pub fn of_minutes(seed: u64, minutes: f64, nodes: usize) -> Self {
        let rounds = (minutes.clamp(0.0, 10_000.0) * 60.0 / STORM.as_secs_f64()).ceil();
        Self::of_seed(seed, (rounds as usize).max(1), nodes)
    }

    /// Parses what [`Display`](fmt::Display) writes: a first line with the seed, then one JSON
    /// object per line, and an empty line between rounds.
    ///
    /// # Errors
    /// Names the line that is none, or whose step is not possible; when there is no step.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut lines = text.lines().enumerate();
        let first = lines.next().map(|(_, line)| line).unwrap_or_default();
        let seed = first.strip_prefix("seed ").and_then(|n| n.parse().ok());
        let seed = seed.ok_or("line 1 is not seed NUMBER")?;
        let mut rounds = vec![Vec::new()];
        for (number, line) in lines {
            if line.trim().is_empty() {
                rounds.push(Vec::new());
                continue;
            }
            let step = serde_json::from_str(line);
            let step: Step = step.map_err(|error| format!("line {}: {error}", number + 1))?;
            let checked = check::check(&step);
            checked.map_err(|error| format!("line {}: {error}", number + 1))?;
            if let Some(round) = rounds.last_mut() {
                round.push(step);
            }
        }
        rounds.retain(|round| !round.is_empty());
        if rounds.is_empty() {
            return Err("it has no step, so nothing would be tried".to_owned());
        }
        Ok(Self { seed, rounds })
    }

    /// Returns the number of steps.
    pub fn len(&self) -> usize {
        self.rounds.iter().map(Vec::len).sum()
    }

    /// Returns whether it has no step.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}", self.seed)?;
        for (number, round) in self.rounds.iter().enumerate() {
            if number > 0 {
                writeln!(f)?;
            }
            for step in round {
                let line = serde_json::to_string(step).map_err(|_| fmt::Error)?;
                writeln!(f, "{line}")?;
            }
        }
        Ok(())
    }
}

/// The kind of a round. Each seed begins with another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Faults of all kinds.
    Mixed,
    /// The same, and one of the provider that lasts so long that somebody has to be told.
    Long,
    /// No fault but the hostile tenant, so that the time of each publish counts.
    Hostile,
}

impl Kind {
    fn of(seed: u64, number: usize) -> Self {
        match seed.wrapping_add(number as u64) % 3 {
            0 => Self::Mixed,
            1 => Self::Long,
            _ => Self::Hostile,
        }
    }
}

/// Makes a round. The first one begins with all pods.
fn round(random: &mut Random, number: usize, kind: Kind, nodes: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    if number == 0 {
        for pod in 0..PODS {
            let at = 100 * pod as u64;
            let node = pod % nodes;
            let what = What::Create { pod, node };
            steps.push(Step { at, what });
        }
    }
    let end = STORM.as_millis() as u64;
    let mut at = 1_500;
    while at < end {
        let what = action(random, nodes);
        // No pod can be ready without its class.
        let counts = kind == Kind::Hostile && matches!(what, What::RemakeClass { .. });
        if !counts {
            steps.push(Step { at, what });
        }
        at += 200 + random.below(800);
    }
    let mut busy = vec![0; nodes];
    let mut at = 1_000 + random.below(2_000);
    if kind == Kind::Long {
        let what = long_fault(random, nodes);
        place(&mut steps, &mut busy, at, what);
    }
    for what in rare(random, kind, nodes) {
        // A long fault leaves its node no time for another.
        if what
            .alone_on()
            .is_none_or(|node| busy.get(node).is_some_and(|until| *until < end))
        {
            place(&mut steps, &mut busy, at, what);
        }
    }
    while at < end {
        let what = match kind {
            Kind::Hostile => hostile(random, nodes),
            Kind::Mixed | Kind::Long => fault(random, nodes),
        };
        at += 400 + random.below(2_400);
        if what
            .alone_on()
            .is_some_and(|node| busy.get(node).is_some_and(|until| *until >= at))
        {
            continue;
        }
        place(&mut steps, &mut busy, at, what);
        if let What::ApiPast { .. } = what {
            // Without a change, the past is the present.
            let class = random.index(CLASSES.len());
            let edit = edit(random);
            let what = What::EditClass { class, edit };
            steps.push(Step { at: at + 300, what });
        }
    }
    steps.sort_by_key(|step| step.at);
    steps
}

/// Adds a fault as soon as the faults before it on the same node are over.
fn place(steps: &mut Vec<Step>, busy: &mut [u64], at: u64, what: What) {
    let mut at = at;
    if let Some(until) = what.alone_on().and_then(|node| busy.get_mut(node)) {
        at = at.max(*until + 1);
        // A fault also takes a moment to end.
        *until = at + what.lasts() + 1_500;
    }
    steps.push(Step { at, what });
}

/// Returns the faults with which a round begins so that a short run has each of them: they would seldom
/// come by chance.
fn rare(random: &mut Random, kind: Kind, nodes: usize) -> Vec<What> {
    let node = random.index(nodes);
    let other = (node + 1) % nodes;
    let lasts = 3_000 + random.below(LONGEST_FAULT - 3_000);
    let by = [-86_400, -3_600, 3_600, 86_400][random.index(4)];
    let clock_and_memory = |node| {
        [
            What::StepClock { node, by },
            What::MemoryNear { node, lasts },
        ]
    };
    match kind {
        Kind::Mixed => {
            let mut faults = vec![What::Reboot { node }, What::WipePlugin { node: other }];
            // A long fault leaves a single node no time.
            faults.extend(
                (nodes == 1)
                    .then(|| clock_and_memory(node))
                    .into_iter()
                    .flatten(),
            );
            faults.extend((0..nodes).map(|node| repeat_calls(random, node, lasts)));
            // Longer than a call of kubelet.
            let lasts = 12_000 + random.below(4_000);
            faults.push(What::SecretsRefused { lasts });
            faults.push(bury(random));
            faults
        }
        Kind::Long => (0..nodes).flat_map(clock_and_memory).collect(),
        Kind::Hostile => Vec::new(),
    }
}

fn action(random: &mut Random, nodes: usize) -> What {
    let pod = random.index(PODS);
    let class = random.index(CLASSES.len());
    let node = random.index(nodes);
    match random.below(25) {
        0..5 => What::Create { pod, node },
        5..7 => What::Delete { pod },
        7 => What::ForceDelete { pod },
        8..10 => What::Move { pod, node },
        // A rotation of this class would hide whether it follows its edits.
        10..15 if class == SELDOM => What::EditClass {
            class,
            edit: edit(random),
        },
        10..17 => What::Rotate { class },
        17 => What::EditClass {
            class,
            edit: edit(random),
        },
        18 => What::RemakeClass {
            class,
            lasts: 100 + random.below(3_000),
            anew: random.below(2) == 0,
        },
        19 => What::DeleteStatus { pod },
        20 => What::AlterStatus { pod },
        21 => What::DeleteSecret { class },
        22 => What::Expire { pod },
        _ => What::AlterSecret {
            class,
            remove: random.below(2) == 0,
            order: random.below(2) == 0,
        },
    }
}

fn edit(random: &mut Random) -> Edit {
    [Edit::Extra, Edit::Text, Edit::Text, Edit::Back][random.index(4)]
}

fn bury(random: &mut Random) -> What {
    What::BuryVolumes {
        pod: random.index(PODS),
        mounts: 1 + random.index(60),
    }
}

fn repeat_calls(random: &mut Random, node: usize, lasts: u64) -> What {
    let by = 100 + random.below(1_900);
    What::RepeatCalls { node, lasts, by }
}

fn fault(random: &mut Random, nodes: usize) -> What {
    let node = random.index(nodes);
    let lasts = 500 + random.below(LONGEST_FAULT - 500);
    match random.below(36) {
        0..4 => What::KillDriver { node },
        4 => What::TwoDrivers {
            node,
            lasts,
            killed: random.below(2) == 0,
        },
        5..7 => What::ProviderSlow {
            node,
            lasts,
            by: 200 + random.below(3_000),
        },
        7 => What::ProviderHung { node, lasts },
        8 => What::ProviderGone {
            node,
            lasts,
            socket: random.below(2) == 0,
        },
        9 => What::ProviderWrong {
            node,
            lasts,
            how: random.index(8),
        },
        10 => What::KillProvider { node },
        11 => What::ReplaceProvider { node, lasts },
        12 => What::ApiSlow {
            lasts,
            by: 50 + random.below(1_500),
        },
        13 => What::ApiRefuses {
            lasts,
            status: [403, 429, 500, 503][random.index(4)],
        },
        14 => What::ApiConflicts { lasts },
        15..17 => What::ApiPast { lasts },
        17 => What::ApiGone { lasts },
        18 => What::ApiHung { lasts },
        19 => What::RestartKubelet { node },
        20 => What::Reboot { node },
        21 => What::WipeProviders { node },
        22 => What::WipePlugin { node },
        23 => What::DiskReadOnly { node, lasts },
        24 => What::DiskFull { node, lasts },
        25 => What::TearRecord { node },
        26 => What::StepClock {
            node,
            by: [-86_400, -3_600, -40, 40, 3_600, 86_400][random.index(6)],
        },
        27 => What::MemoryNear { node, lasts },
        28..30 => repeat_calls(random, node, lasts),
        30..32 => What::WipeRegistry { node },
        32 => What::SecretsRefused { lasts },
        33 => bury(random),
        _ => hostile(random, nodes),
    }
}

fn long_fault(random: &mut Random, nodes: usize) -> What {
    let node = random.index(nodes);
    let lasts = 24_000 + random.below(4_000);
    match random.below(3) {
        0 => What::ProviderGone {
            node,
            lasts,
            socket: random.below(2) == 0,
        },
        1 => What::ProviderHung { node, lasts },
        _ => What::ProviderWrong {
            node,
            lasts,
            how: random.index(8),
        },
    }
}

fn hostile(random: &mut Random, nodes: usize) -> What {
    let (node, how) = (random.index(nodes), random.index(TRICKS));
    let lasts = match how {
        // Some rounds of requests that have no answer.
        WEBHOOK => 20_000 + random.below(8_000),
        _ => 2_000 + random.below(LONGEST_FAULT - 2_000),
    };
    What::Hostile { node, lasts, how }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_decides_the_schedule_and_it_is_read_as_it_is_printed() {
        let schedule = Schedule::of_seed(7, 3, 2);
        assert_eq!(schedule, Schedule::of_seed(7, 3, 2));
        assert_ne!(schedule, Schedule::of_seed(8, 3, 2));
        assert_eq!(Schedule::parse(&schedule.to_string()).unwrap(), schedule);
        let error = Schedule::parse("seed 1\n{\"at\": 1, \"what\": \"dance\"}").unwrap_err();
        assert!(error.starts_with("line 2: "), "{error}");
    }

    #[test]
    fn every_kind_occurs_and_no_two_faults_of_a_node_that_exclude_each_other_meet() {
        let mut kinds = BTreeSet::new();
        for seed in 0..60 {
            for round in Schedule::of_seed(seed, 3, 2).rounds {
                for (number, step) in round.iter().enumerate() {
                    kinds.insert(step.what.kind());
                    let Some(node) = step.what.alone_on() else {
                        continue;
                    };
                    let mut later = round[number + 1..].iter();
                    let meets = later.find(|later| {
                        later.what.alone_on() == Some(node)
                            && later.at < step.at + step.what.lasts()
                    });
                    assert_eq!(meets, None, "{step:?}");
                }
            }
        }
        assert_eq!(kinds.len(), 40, "{kinds:?}");
    }

    #[test]
    fn a_short_run_has_the_faults_that_would_come_seldom_by_chance() {
        for nodes in [1, 2] {
            for seed in 0..60 {
                let rounds = Schedule::of_seed(seed, 3, nodes).rounds;
                let kinds: BTreeSet<String> = rounds
                    .iter()
                    .flatten()
                    .map(|step| step.what.kind())
                    .collect();
                for kind in [
                    "reboot",
                    "wipe-plugin",
                    "repeat-calls",
                    "memory-near",
                    "step-clock",
                    "bury-volumes",
                ] {
                    assert!(
                        kinds.contains(kind),
                        "{nodes} nodes, seed {seed}: {kinds:?}"
                    );
                }
            }
        }
    }
}
