//! Checks the sandbox of the pod, which kubelet makes once its volumes are mounted.

use super::{
    Found,
    containers::fine,
    events::{is_recent, text, waits},
    start::{NO_SANDBOX, of_containers_since},
};
use crate::explain::facts::{Facts, time_of};

/// Pieces of what is said when the network of the node is the reason, in lower case.
const OF_NETWORK: [&str; 6] = [
    "cni",
    "network for sandbox",
    "network plugin",
    "networkplugin",
    "pod network",
    "plugin type=",
];

/// kubelet cannot make it. What it says is quoted; what the pod asks of its sandbox is named besides.
pub(super) fn sandbox(facts: &Facts) -> Option<Found> {
    if !waits(facts) {
        return None;
    }
    let event = facts.event(&[NO_SANDBOX], |_| true)?;
    if !is_recent(facts, event) || of_containers_since(facts, time_of(event)) {
        return None;
    }
    let what = format!(
        "{}kubelet cannot make the sandbox of the pod, without which no container starts{}",
        fine(facts),
        asked(facts, text(event))
    );
    Some(Found::new(what, facts.describe()).said_by(Some(event)))
}

/// Returns what the sandbox needs, as far as the message or the pod says it.
fn asked(facts: &Facts, said: &str) -> String {
    let said = said.to_lowercase();
    if OF_NETWORK.iter().any(|piece| said.contains(piece)) {
        return "; it speaks of the network of the node".to_owned();
    }
    let spec = facts.pod.spec.as_ref();
    let class = spec.and_then(|spec| spec.runtime_class_name.as_ref());
    let class = class.map(|class| format!("runtimeClassName: {class}"));
    let has_no_host_users = spec.is_some_and(|spec| spec.host_users == Some(false));
    let users = has_no_host_users.then(|| "hostUsers: false".to_owned());
    let fields: Vec<_> = class.into_iter().chain(users).collect();
    match fields.is_empty() {
        true => String::new(),
        false => format!(
            "; the pod has {}, for which the node has to be set up",
            fields.join(" and ")
        ),
    }
}
