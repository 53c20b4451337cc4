//! Finds out whether what a volume failed for is there now.

use jiff::Timestamp;

use super::{refusal::may_be_of_class, volume::found_provider};
use crate::{
    explain::facts::{Facts, VolumeFacts},
    installation::DRIVER,
    time::span,
};

/// The seconds within which kubelet tries again at the latest, and says so if it fails.
const TRIES_WITHIN: i64 = 180;

/// Returns what is there now, although kubelet or the driver says that it was not found.
pub(super) fn mended(facts: &Facts, volume: &VolumeFacts, said: &str) -> Option<String> {
    let node = facts.node.as_ref();
    if said.contains("not found in the list of registered CSI drivers") {
        let drivers = &node?.csi_node.found()?.spec.drivers;
        let is_registered = drivers.iter().any(|driver| driver.name == DRIVER);
        return is_registered.then(|| "the driver is registered there now".to_owned());
    }
    // Both the answer to a missing socket and that of one on which nobody listens ask this.
    if said
        .to_lowercase()
        .contains("is the provider running on this node")
    {
        return provider(facts, volume, said);
    }
    let is_about_class = said.contains("correct secretProviderClass");
    if is_about_class && said.contains("not found") {
        volume.class.found()?;
        return Some(format!("class {} exists now", volume.class_name));
    }
    let secret = &volume.source.node_publish_secret_ref.as_ref()?.name;
    let is_about_secret = said.contains(secret.as_str()) && said.contains("not found");
    (is_about_secret && facts.secrets.get(secret)?.found().is_some())
        .then(|| format!("Secret {secret} exists now"))
}

/// Returns that the class was changed after something was said at `at` that a change of it may mend, while kubelet has not
/// tried again.
pub(super) fn changed(
    facts: &Facts,
    volume: &VolumeFacts,
    said: &str,
    at: Option<Timestamp>,
) -> Option<String> {
    let changed = volume.changed_at()?;
    let ago = facts.now.duration_since(changed);
    let is_of_now = at.is_some_and(|at| changed.as_second() > at.as_second());
    let is_open = is_of_now && ago.as_secs() <= TRIES_WITHIN;
    (is_open && may_be_of_class(facts, said)).then(|| {
        format!(
            "class {} was changed after that, {} ago",
            volume.class_name,
            span(ago)
        )
    })
}

/// Returns that the provider of the class accepts connections on the node.
fn provider(facts: &Facts, volume: &VolumeFacts, said: &str) -> Option<String> {
    let name = &volume.class.found()?.spec.provider;
    let found = found_provider(facts, name)?;
    if !found.socket.answers {
        return None;
    }
    Some(match said.contains(&format!("provider \"{name}\"")) {
        true => format!("provider {name} is there now and answers"),
        false => format!(
            "class {} names provider {name} now, which is there and answers",
            volume.class_name
        ),
    })
}
