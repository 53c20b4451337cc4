//! Brings what was found into the order of the pod's start: what blocks it now comes first, and mistakes that come
//! later are behind that.

use super::{Trouble, start::Step};
use crate::explain::{
    facts::Facts,
    state::{self, is_sidecar},
};

/// A stage of the start of a pod. kubelet comes to one once it is through with those before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Scheduling,
    Volumes,
    /// What becomes of volumes that are mounted, and of their Secrets: nothing of it holds the start up by itself.
    Mounted,
    Sandbox,
    /// The init container of this number.
    Init(usize),
    /// The other containers, and sidecars that have started: all at the same time.
    Containers,
    /// What others say of the pod once its containers are ready.
    Gates,
}

/// Where something belongs that was found.
#[derive(Debug, Clone, Default)]
pub(super) struct Place {
    /// The stage; none for what matters at all of them.
    pub stage: Option<Stage>,
    /// The container.
    pub container: Option<String>,
    /// Whether it waits for what the driver makes: what is wrong with the driver is the reason then.
    pub needs_driver: bool,
}

impl Place {
    /// Returns the place of what a check of the pod or of a volume found.
    pub(super) fn of_check(check: &str) -> Self {
        let stage = match check {
            "node" | "finalizers" | "termination" | "pod-failed" | "earlier-template" => None,
            "unscheduled" => Some(Stage::Scheduling),
            "sandbox" => Some(Stage::Sandbox),
            _ => Some(Stage::Volumes),
        };
        Self::at(stage)
    }

    pub(super) fn at(stage: impl Into<Option<Stage>>) -> Self {
        Self {
            stage: stage.into(),
            ..Self::default()
        }
    }

    /// Returns the place of a container.
    pub(super) fn of_container(facts: &Facts, name: &str) -> Self {
        Self {
            container: Some(name.to_owned()),
            ..Self::at(stage_of(facts, name))
        }
    }
}

/// Returns the stage at which a container is started. Once all init containers are through, a sidecar is as any other.
pub(super) fn stage_of(facts: &Facts, container: &str) -> Stage {
    let spec = facts.pod.spec.iter();
    let mut init = spec.flat_map(|spec| spec.init_containers.iter().flatten());
    match init.position(|init| init.name == container) {
        Some(_) if state::is_initialized(&facts.pod) && is_sidecar(&facts.pod, container) => {
            Stage::Containers
        }
        Some(index) => Stage::Init(index),
        None => Stage::Containers,
    }
}

/// Sorts what was found. `steps` are what the start of the pod waits for.
pub(super) fn sort(all: &mut [(Place, Trouble)], steps: &[Step]) {
    let now = steps.iter().map(|step| step.stage).min();
    // A pod may be ready in between.
    let is_of_containers = |stage: &Stage| *stage > Stage::Sandbox;
    let mut stages = all.iter().filter_map(|(place, _)| place.stage);
    let now = now.or_else(|| stages.find(is_of_containers).map(|_| Stage::Containers));
    let waits = |place: &Place| place.stage == now && place.needs_driver;
    let for_driver = now.is_some() && all.iter().any(|(place, _)| waits(place));
    all.sort_by_key(|(place, _)| rank(place, now, for_driver));
}

/// Returns the rank of what was found. `now` is the stage at which the pod is, and `for_driver` whether it waits there
/// for the driver.
fn rank(place: &Place, now: Option<Stage>, for_driver: bool) -> (u8, Option<Stage>) {
    let (Some(stage), Some(now)) = (place.stage, now) else {
        return (0, None);
    };
    if stage == now {
        return (if place.needs_driver { 2 } else { 0 }, None);
    }
    match stage {
        stage if stage <= Stage::Mounted && for_driver => (1, None),
        stage if stage < now => (3, None),
        stage => (4, Some(stage)),
    }
}

/// Returns the steps of which nothing was found that says the same.
pub(super) fn untold(steps: Vec<Step>, all: &[(Place, Trouble)]) -> Vec<Step> {
    let is_told = |step: &Step| {
        all.iter()
            .any(|(place, _)| match (&place.container, place.stage) {
                (_, None) => true,
                (Some(container), _) => step.container.as_ref() == Some(container),
                (None, Some(stage)) => step.container.is_none() && step.stage == stage,
            })
    };
    steps.into_iter().filter(|step| !is_told(step)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(stage: Stage, needs_driver: bool) -> Place {
        Place {
            needs_driver,
            ..Place::at(stage)
        }
    }

    /// What blocks the pod now comes before what is over, and that before what comes later; what waits for the driver
    /// comes behind what is wrong with the driver.
    #[test]
    fn what_blocks_now_is_first() {
        let of =
            |stage, needs_driver, now| rank(&place(stage, needs_driver), Some(now), needs_driver);
        let now = Stage::Init(1);
        assert!(of(now, false, now) < of(Stage::Volumes, false, now));
        assert!(of(Stage::Volumes, false, now) < of(Stage::Init(2), false, now));
        assert!(of(Stage::Init(2), false, now) < of(Stage::Containers, false, now));
        let driver = rank(&place(Stage::Volumes, false), Some(now), true);
        assert!(driver < of(now, true, now));
        assert!(of(now, false, now) < driver);
        assert_eq!(rank(&Place::default(), Some(now), false), (0, None));
    }
}
