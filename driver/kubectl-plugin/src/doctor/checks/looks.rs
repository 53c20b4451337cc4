//! Checks whether kubelet looks at the volumes of a node in time. A look that fails before it reaches the driver, or that
//! never comes, is no failure that the driver knows of.

use std::collections::BTreeMap;

use super::{
    super::{facts::Facts, nodes::named, overdue::Overdue},
    Found,
};
use crate::time::shown;

/// The volumes that a line names.
const NAMED: usize = 3;

pub(super) fn overdue(facts: &Facts, found: &mut Found<'_>) {
    let driver = facts.csi_driver.found();
    // Otherwise kubelet is not asked to look, which is a finding of its own.
    if driver.is_none_or(|driver| driver.spec.requires_republish != Some(true)) {
        return;
    }
    let mut by_node: BTreeMap<&str, Vec<&Overdue>> = BTreeMap::new();
    for overdue in &facts.overdue.volumes {
        by_node.entry(&overdue.node).or_default().push(overdue);
    }
    for (node, volumes) in by_node {
        let Some(first) = volumes.first() else {
            continue;
        };
        let shown: Vec<_> = volumes
            .iter()
            .take(NAMED)
            .map(|volume| {
                let due = shown(volume.due, facts.now);
                format!("volume {} of pod {} at {due}", volume.volume, volume.pod)
            })
            .collect();
        let more = match volumes.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        let what = format!(
            "on {}: volumes were due for a refresh, and kubelet has not asked the driver since: {}{more}; its looks at them fail, or it is busy with other pods",
            named(&[node]),
            shown.join(", ")
        );
        let (name, namespace) = (&first.pod.name, &first.pod.namespace);
        let next = format!("kubectl secrets-store explain pod {name} -n {namespace}");
        found.add_of_nodes(vec![node.to_owned()], what, next);
    }
}
