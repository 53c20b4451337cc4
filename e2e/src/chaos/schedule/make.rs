//! Makes the rounds of a seed.

use super::super::actor::{ALTERATIONS, WRONG};
use super::super::editions::Edit;
use super::super::features;
use super::super::random::Random;
use super::super::store::{CLASSES, LARGE, SELDOM};
use super::super::tenants::{TRICKS, WEBHOOK};
use super::kinds::HUNG_FOR_LONG;
use super::{PODS, STORM, Step, What};

/// The longest time that a fault lasts.
const LONGEST_FAULT: u64 = 8_000;
/// The time between two single failures: each has an effect for as long as one attempt lasts.
const BETWEEN_SINGLES: u64 = 5_500;
/// The number of faults that are drawn for a moment until one can strike then.
const DRAWS: usize = 3;
/// The way in which a request fails that has none.
const SILENT: usize = 4;
/// The number of ways in which a request fails.
pub(super) const WAYS: usize = SILENT + 1;
/// The way in which another write is first, which nobody may notice.
const CONFLICT: usize = 3;

/// The kind of a round. Seeds begin with one of the first three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Faults of all kinds.
    Mixed,
    /// The same, and one of the provider that lasts so long that somebody has to be told.
    Long,
    /// No fault but the hostile tenant, so that the time of each publish counts.
    Hostile,
    /// Good minutes in which single requests and calls fail.
    Single,
}

impl Kind {
    pub(super) fn of(seed: u64, number: usize) -> Self {
        match (seed % 3 + number as u64) % 4 {
            0 => Self::Mixed,
            1 => Self::Long,
            2 => Self::Hostile,
            _ => Self::Single,
        }
    }

    /// Returns whether nothing disturbs for which a pod could have to wait long.
    fn is_calm(self) -> bool {
        matches!(self, Self::Hostile | Self::Single)
    }
}

/// What hangs in a round with a long fault for longer than the round lasts.
#[derive(Clone, Copy, Debug)]
enum Hangs {
    Disk,
    Provider,
    Nothing,
}

impl Hangs {
    /// Each run has the disk or the provider in its first round of the kind that has time for that. Where kubelet
    /// is not patient, its deadline is over before that of the driver.
    fn of(seed: u64, number: usize) -> Self {
        match (is_patient(seed), number.saturating_sub(1) / 4 % 3) {
            (true, 0) => Self::Provider,
            (true, 1) | (false, 0 | 2) => Self::Disk,
            _ => Self::Nothing,
        }
    }
}

/// Returns whether kubelet waits for answers longer than the driver waits for that of a provider to a refresh.
pub(in super::super) fn is_patient(seed: u64) -> bool {
    !(seed / 8).is_multiple_of(2)
}

/// Makes a round of a seed. The first one begins with all pods.
pub(super) fn round(random: &mut Random, seed: u64, number: usize, nodes: usize) -> Vec<Step> {
    let kind = Kind::of(seed, number);
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
        let counts = kind.is_calm() && matches!(what, What::RemakeClass { .. });
        if !counts {
            steps.push(Step { at, what });
        }
        at += 200 + random.below(800);
    }
    for feature in 0..features::CLASSES {
        let number = random.below(1 << 32);
        let what = What::ChangeFeature { feature, number };
        let at = 1_500 + random.below(end - 1_500);
        steps.push(Step { at, what });
    }
    if kind == Kind::Single {
        singles(random, &mut steps, nodes);
        steps.sort_by_key(|step| step.at);
        return steps;
    }
    let mut busy = vec![0; nodes];
    let mut at = 1_000 + random.below(2_000);
    if kind == Kind::Long {
        let what = long_fault(random, number, Hangs::of(seed, number), nodes);
        place(&mut steps, &mut busy, at, what);
    }
    for what in rare(random, number, kind, nodes) {
        // A long fault leaves its node no time for another.
        if what
            .alone_on()
            .is_none_or(|node| busy.get(node).is_some_and(|until| *until < end))
        {
            place(&mut steps, &mut busy, at, what);
        }
    }
    while at < end {
        at += 400 + random.below(2_400);
        let mut draw = || match kind {
            Kind::Hostile | Kind::Single => hostile(random, nodes),
            Kind::Mixed | Kind::Long => fault(random, nodes),
        };
        let is_free = |what: &What| {
            let node = what.alone_on().and_then(|node| busy.get(node));
            node.is_none_or(|until| *until < at)
        };
        let what = (0..DRAWS).map(|_| draw()).find(is_free);
        let Some(what) = what else {
            continue;
        };
        place(&mut steps, &mut busy, at, what);
        if let What::ApiPast { .. } = what {
            // Without a change, the past is the present. A class that is not remembered is read twice.
            let class = match random.below(3) {
                0 => random.index(CLASSES.len()),
                _ => LARGE.0,
            };
            let edit = edit(random);
            let what = What::EditClass { class, edit };
            steps.push(Step { at: at + 300, what });
        }
    }
    // It waits for the others to end, and so makes a round longer: not the first one of a run.
    if number > 0 && !kind.is_calm() {
        let node = random.index(nodes);
        place(&mut steps, &mut busy, end, What::AnswersCompete { node });
    }
    steps.sort_by_key(|step| step.at);
    steps
}

/// Adds the single failures of a round: of the API server and of a provider. The last one has no answer; any
/// after it would meet its effect.
fn singles(random: &mut Random, steps: &mut Vec<Step>, nodes: usize) {
    let provider = |random: &mut Random, hangs| What::ProviderFailsOnce {
        node: random.index(nodes),
        hangs,
    };
    let api = |random: &mut Random, how| What::ApiFailsOnce {
        kind: random.index(1_000),
        how,
    };
    let how = random.index(SILENT);
    let failures = [
        api(random, CONFLICT),
        provider(random, false),
        api(random, how),
        match random.below(2) {
            0 => provider(random, true),
            _ => api(random, SILENT),
        },
    ];
    let mut at = 2_000;
    for what in failures {
        steps.push(Step { at, what });
        if let What::ProviderFailsOnce { hangs: false, .. } = what {
            let what = api(random, CONFLICT);
            steps.push(Step { at, what });
        }
        at += BETWEEN_SINGLES;
    }
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
/// come by chance. Of two rounds of a kind each has a part of them, which leaves the nodes time for others.
fn rare(random: &mut Random, number: usize, kind: Kind, nodes: usize) -> Vec<What> {
    let node = random.index(nodes);
    let other = (node + 1) % nodes;
    let lasts = 3_000 + random.below(LONGEST_FAULT - 3_000);
    let short = 2_000 + random.below(3_000);
    let by = [-86_400, -3_600, 3_600, 86_400][random.index(4)];
    // A long fault leaves a single node no time, and a short one not for all of them.
    let (is_first, is_single) = ((number / 4).is_multiple_of(2), nodes == 1);
    let clock = |node| What::StepClock { node, by };
    let memory = |node| What::MemoryNear { node, lasts };
    // Longer than a call of kubelet.
    let refused = What::SecretsRefused {
        lasts: 12_000 + random.below(4_000),
    };
    match kind {
        Kind::Mixed if is_first => {
            let mut faults = vec![What::Reboot { node }];
            faults.push(match is_single {
                true => clock(node),
                false => What::DriverPaused {
                    node: other,
                    lasts: short,
                },
            });
            faults.extend([repeat_calls(random, other, lasts), refused]);
            faults
        }
        Kind::Mixed => {
            let mut faults = vec![What::WipePlugin { node: other }];
            faults.push(match is_single {
                true => memory(node),
                false => What::DiskHung { node, lasts: short },
            });
            faults.extend([repeat_calls(random, node, lasts), bury(random)]);
            faults
        }
        Kind::Long if is_first => (0..nodes)
            .flat_map(|node| [clock(node), propagation_lost(random, node)])
            .collect(),
        Kind::Long => (0..nodes)
            .flat_map(|node| [memory(node), other_bound(random, node, lasts)])
            .collect(),
        Kind::Hostile | Kind::Single => Vec::new(),
    }
}

fn action(random: &mut Random, nodes: usize) -> What {
    let pod = random.index(PODS);
    let class = random.index(CLASSES.len());
    let node = random.index(nodes);
    match random.below(26) {
        0..5 => What::Create { pod, node },
        5..7 => What::Delete { pod },
        7 => What::ForceDelete { pod },
        8..10 => What::Move { pod, node },
        // A rotation of this class would hide whether it follows its edits.
        10..15 if class == SELDOM => What::EditClass {
            class,
            edit: edit(random),
        },
        10..14 | 16 => What::Rotate { class },
        14 | 15 => What::RollBack { class },
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
        23 => What::AdornSecret { class },
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

fn propagation_lost(random: &mut Random, node: usize) -> What {
    What::PropagationLost {
        node,
        pod: random.index(PODS),
        lasts: 4_000 + random.below(3_000),
    }
}

fn other_bound(random: &mut Random, node: usize, lasts: u64) -> What {
    let bytes = [1 << 20, 16 << 20][random.index(2)];
    What::OtherBound { node, lasts, bytes }
}

fn repeat_calls(random: &mut Random, node: usize, lasts: u64) -> What {
    let by = 100 + random.below(1_900);
    What::RepeatCalls { node, lasts, by }
}

fn fault(random: &mut Random, nodes: usize) -> What {
    let node = random.index(nodes);
    let lasts = 500 + random.below(LONGEST_FAULT - 500);
    match random.below(51) {
        0..4 => What::KillDriver { node },
        4 | 45 => What::TwoDrivers {
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
        9 | 46 | 47 => What::ProviderWrong {
            node,
            lasts,
            how: random.index(WRONG.len()),
        },
        10 => What::KillProvider { node },
        11 => What::ReplaceProvider { node, lasts },
        12 => What::ApiSlow {
            lasts,
            by: 50 + random.below(1_500),
        },
        13 => What::ApiRefuses {
            lasts,
            status: [403, 404, 429, 500, 503][random.index(5)],
        },
        14 => What::ApiConflicts { lasts },
        15..17 => What::ApiPast { lasts },
        17 => What::ApiGone { lasts },
        18 => What::ApiHung { lasts },
        19 => What::RestartKubelet { node },
        20 => What::Reboot { node },
        21 | 50 => What::WipeProviders { node },
        22 => What::WipePlugin { node },
        23 => What::DiskReadOnly { node, lasts },
        24 | 48 => What::DiskFull { node, lasts },
        25 | 49 => What::TearRecord { node },
        26 => What::StepClock {
            node,
            by: [-86_400, -3_600, -40, 40, 3_600, 86_400][random.index(6)],
        },
        27 => What::MemoryNear { node, lasts },
        28..30 => repeat_calls(random, node, lasts),
        30..32 => What::WipeRegistry { node },
        32 => What::SecretsRefused { lasts },
        33 => bury(random),
        34 => What::DiskHung { node, lasts },
        35 => What::DriverPaused { node, lasts },
        36 => propagation_lost(random, node),
        37 => What::UnmountVolumes {
            pod: random.index(PODS),
        },
        40 => other_bound(random, node, lasts),
        43 | 44 => What::AlterFiles {
            pod: random.index(PODS),
            how: random.index(ALTERATIONS.len()),
        },
        38 | 39 => What::VolumesReadOnly {
            pod: random.index(PODS),
            lasts,
        },
        _ => hostile(random, nodes),
    }
}

/// Returns a fault that lasts for most of a round. A disk that hangs for long makes a round longer, and so does a
/// provider that does not answer until the driver has given up: not the first one of a run, but an early one.
fn long_fault(random: &mut Random, number: usize, hangs: Hangs, nodes: usize) -> What {
    let node = random.index(nodes);
    let lasts = HUNG_FOR_LONG + random.below(5_000);
    match hangs {
        Hangs::Disk if number > 0 => return What::DiskHung { node, lasts },
        Hangs::Provider if number > 0 => {
            let lasts = lasts + 5_000;
            return What::ProviderHung { node, lasts };
        }
        _ => {}
    }
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
            how: random.index(WRONG.len()),
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
