//! Shows how many volumes of the node are fresh, and how many have Secrets that are not in step.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use prometheus_client::{
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{
    Metrics,
    labels::{LabelSet, OS_TYPE},
};

pub(super) struct Series {
    by_state: Family<LabelSet, Gauge>,
    out_of_step: Family<LabelSet, Gauge>,
    volumes: Mutex<HashMap<String, State>>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct State {
    is_stale: bool,
    is_out_of_step: bool,
}

impl Series {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let series = Self {
            by_state: Family::default(),
            out_of_step: Family::default(),
            volumes: Mutex::default(),
        };
        registry.register(
            "secrets_store_volumes",
            "Mounted volumes by state: fresh, or stale because refreshes fail",
            series.by_state.clone(),
        );
        registry.register(
            "secrets_store_volumes_out_of_step",
            "Mounted volumes with Secrets that could not be written as their class says",
            series.out_of_step.clone(),
        );
        series
    }

    fn volumes(&self) -> MutexGuard<'_, HashMap<String, State>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the change of the state of one volume; `None` if there is no such volume.
    fn show(&self, before: Option<State>, now: Option<State>) {
        for (state, change) in [(before, -1), (now, 1)] {
            let Some(state) = state else { continue };
            let label = if state.is_stale { "stale" } else { "fresh" };
            let labels = vec![("state", label.into())];
            self.by_state.get_or_create(&labels).inc_by(change);
            let out_of_step = self.out_of_step.get_or_create(&vec![OS_TYPE]);
            out_of_step.inc_by(if state.is_out_of_step { change } else { 0 });
        }
    }
}

impl Metrics {
    /// Notes that a volume is mounted, and whether its last refresh or mount succeeded.
    pub fn volume_fresh(&self, volume_id: &str, is_fresh: bool) {
        let series = &self.0.volumes;
        let mut volumes = series.volumes();
        let before = volumes.get(volume_id).copied();
        let now = State {
            is_stale: !is_fresh,
            ..before.unwrap_or_default()
        };
        volumes.insert(volume_id.to_owned(), now);
        series.show(before, Some(now));
    }

    /// Notes whether the Secrets of a mounted volume are in step.
    pub fn volume_in_step(&self, volume_id: &str, is_in_step: bool) {
        let series = &self.0.volumes;
        let mut volumes = series.volumes();
        let before = volumes.get(volume_id).copied();
        let now = State {
            is_out_of_step: !is_in_step,
            ..before.unwrap_or_default()
        };
        volumes.insert(volume_id.to_owned(), now);
        series.show(before, Some(now));
    }

    /// Forgets the state of a volume that is gone, or was not mounted after all.
    pub fn volume_has_no_state(&self, volume_id: &str) {
        let series = &self.0.volumes;
        let before = series.volumes().remove(volume_id);
        series.show(before, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever happens to volumes, the gauges count them.
        #[test]
        fn volumes_are_counted_by_state(
            acts in prop::collection::vec((0_usize..4, 0_u8..5), 0..60)
        ) {
            let metrics = Metrics::new();
            let mut model: HashMap<usize, (bool, bool)> = HashMap::new();
            for (volume, act) in acts {
                let id = volume.to_string();
                match act {
                    0 | 1 => {
                        metrics.volume_fresh(&id, act == 0);
                        model.entry(volume).or_default().0 = act == 1;
                    }
                    2 | 3 => {
                        metrics.volume_in_step(&id, act == 2);
                        model.entry(volume).or_default().1 = act == 3;
                    }
                    _ => {
                        metrics.volume_gone(&id);
                        model.remove(&volume);
                    }
                }
            }
            let page = metrics.render();
            let shown = |name: &str, label: &str| {
                let mut lines = page.lines().filter(|l| l.starts_with(name) && l.contains(label));
                lines.next().map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
            };
            let count = |is: fn(&(bool, bool)) -> bool| model.values().filter(|s| is(s)).count();
            prop_assert_eq!(shown("secrets_store_volumes{", "fresh"), count(|s| !s.0));
            prop_assert_eq!(shown("secrets_store_volumes{", "stale"), count(|s| s.0));
            prop_assert_eq!(shown("secrets_store_volumes_out_of_step{", ""), count(|s| s.1));
        }
    }
}
