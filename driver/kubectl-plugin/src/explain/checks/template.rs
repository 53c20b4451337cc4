//! Finds pods that their workload does not replace by itself although it has another template by now.

use k8s_openapi::api::apps::v1::StatefulSet;
use kube::ResourceExt as _;

use super::Found;
use crate::{cluster::Read, explain::facts::Facts, installation::is_ready};

/// The label of a pod that names the revision of the template that it was made from.
const REVISION: &str = "controller-revision-hash";

/// A StatefulSet has another template, and waits for this pod before it replaces any: what was mended there does not reach
/// the pod.
pub(super) fn earlier(facts: &Facts) -> Option<Found> {
    let set = facts.stateful_set.as_ref().and_then(Read::found)?;
    if is_ready(&facts.pod) || facts.is_deleted() || facts.has_ended() {
        return None;
    }
    let latest = set.status.as_ref()?.update_revision.as_ref()?;
    let own = facts.pod.labels().get(REVISION)?;
    if own == latest || keeps(set, &facts.pod.name_any()) {
        return None;
    }
    let strategy = set.spec.update_strategy.as_ref();
    let strategy = strategy.and_then(|strategy| strategy.type_.as_deref());
    let why = match (strategy, set.spec.pod_management_policy.as_deref()) {
        (Some("OnDelete"), _) => {
            "it replaces no pod by itself (updateStrategy OnDelete). For the new template, delete the pod"
        }
        // It deletes one that is not ready.
        (_, Some("Parallel")) => return None,
        _ => {
            "it replaces no pod while one is not ready. If the new template mends this, delete the pod"
        }
    };
    let what = format!(
        "the pod is of an earlier template of StatefulSet {}: {why}",
        set.name_any()
    );
    Some(Found::new(what, facts.new_pod()))
}

/// Returns whether a pod of this name gets the earlier template again: its number is below the partition.
fn keeps(set: &StatefulSet, pod: &str) -> bool {
    let strategy = set.spec.update_strategy.as_ref();
    let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
    let partition = rolling.and_then(|rolling| rolling.partition).unwrap_or(0);
    let number = pod
        .rsplit_once('-')
        .and_then(|(_, number)| number.parse::<i32>().ok());
    number.is_some_and(|number| number < partition)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::{
        RollingUpdateStatefulSetStrategy, StatefulSetSpec, StatefulSetUpdateStrategy,
    };

    use super::*;

    #[test]
    fn a_pod_below_the_partition_gets_the_earlier_template_again() {
        for (partition, pod, expected) in [
            (None, "web-0", false),
            (Some(0), "web-0", false),
            (Some(2), "web-1", true),
            (Some(2), "web-2", false),
            (Some(2), "web-10", false),
            (Some(2), "web", false),
        ] {
            let rolling = RollingUpdateStatefulSetStrategy {
                partition,
                ..Default::default()
            };
            let strategy = StatefulSetUpdateStrategy {
                rolling_update: Some(rolling),
                ..Default::default()
            };
            let set = StatefulSet {
                spec: StatefulSetSpec {
                    update_strategy: Some(strategy),
                    ..Default::default()
                },
                ..Default::default()
            };
            assert_eq!(keeps(&set, pod), expected, "{partition:?} {pod}");
        }
    }
}
