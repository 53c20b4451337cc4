//! Checks of what is on one node, by what its driver says.

use jiff::SignedDuration;

use super::{super::nodes::Asked, Words};
use crate::time::{shown, span};

/// The difference of clocks that makes tokens and certificates fail.
const SKEW: SignedDuration = SignedDuration::from_secs(30);
/// The share of the room for content from which on it is nearly full, in percent.
const FULL: u64 = 85;
/// The failed calls that are not by chance.
const MANY: u64 = 10;

pub(super) fn socket(asked: &Asked) -> Vec<Words> {
    let Some(status) = asked
        .status()
        .filter(|status| !status.driver.answers && status.driver.path.is_some())
    else {
        return Vec::new();
    };
    let why = status.driver.error.as_deref().unwrap_or("no connection");
    vec![format!("the driver's socket accepts no connection ({why})").into()]
}

pub(super) fn provider_sockets(asked: &Asked) -> Vec<Words> {
    let Some(status) = asked.status() else {
        return Vec::new();
    };
    if status.providers.is_empty() {
        let directories: Vec<_> = status
            .provider_directories
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        let directories = directories.join(" or ");
        return vec![format!("no provider has a socket in {directories}; install one").into()];
    }
    let silent = status
        .providers
        .iter()
        .filter(|provider| !provider.socket.answers);
    silent
        .map(|provider| {
            let why = provider.socket.error.as_deref().unwrap_or("no connection");
            let what = format!(
                "provider {} does not answer ({why}); look at its pod",
                provider.name
            );
            Words {
                what,
                next: Some(format!(
                    "kubectl get pods -A -o wide --field-selector spec.nodeName={}",
                    asked.node
                )),
            }
        })
        .collect()
}

/// Most calls to a provider fail.
pub(super) fn provider_calls(asked: &Asked) -> Vec<Words> {
    let calls = asked.status().into_iter().flat_map(|status| &status.calls);
    let failing = calls.filter(|calls| {
        let failed: u64 = calls.failed.values().sum();
        failed >= MANY && failed > calls.succeeded
    });
    failing
        .map(|calls| {
            let codes: Vec<_> = calls.failed.keys().map(String::as_str).collect();
            format!(
                "most calls to provider {} have failed since the driver started ({}); look at its log and its store",
                calls.provider,
                codes.join(", ")
            )
            .into()
        })
        .collect()
}

pub(super) fn propagation(asked: &Asked) -> Vec<Words> {
    let point = asked
        .status()
        .and_then(|status| status.unseen_below.as_ref());
    let words = point.map(|point| {
        format!("what the driver mounts below {} is not seen outside its container; set mountPropagation: Bidirectional", point.display())
    });
    words.map(Words::from).into_iter().collect()
}

pub(super) fn memory(asked: &Asked) -> Vec<Words> {
    let Some(memory) = asked.status().and_then(|status| status.memory) else {
        return Vec::new();
    };
    let percent = memory.used.saturating_mul(100) / memory.room.max(1);
    if percent < FULL {
        return Vec::new();
    }
    // Steps of five, so that nodes that are alike have the same words.
    let what = format!(
        "mounted content takes {}% or more of the room for it ({} MiB of a limit of {} MiB); raise linux.driver.resources.limits.memory",
        percent / 5 * 5,
        memory.room >> 20,
        memory.limit >> 20
    );
    vec![what.into()]
}

pub(super) fn clock(asked: &Asked) -> Vec<Words> {
    let Some(status) = asked.status() else {
        return Vec::new();
    };
    let skew = status.time.duration_since(asked.at);
    let took = SignedDuration::try_from(asked.took).unwrap_or_default();
    if skew.abs() <= SKEW + took {
        return Vec::new();
    }
    let which = if skew.is_negative() {
        "behind"
    } else {
        "before"
    };
    let what = format!(
        "its clock is {} {which} this machine's; tokens and certificates fail when clocks differ",
        span(SignedDuration::from_mins(skew.abs().as_mins().max(1)))
    );
    vec![what.into()]
}

pub(super) fn stale(asked: &Asked) -> Vec<Words> {
    let Some(status) = asked.status() else {
        return Vec::new();
    };
    let stale: Vec<_> = status
        .volumes
        .iter()
        .filter(|volume| volume.stale_since.is_some())
        .collect();
    let oldest = stale.iter().min_by_key(|volume| volume.stale_since);
    let words = oldest.map(|oldest| {
        let since = oldest
            .stale_since
            .map_or_else(String::new, |since| shown(since, status.time));
        let what = format!(
            "refreshes of {} of {} volumes fail, those of pod {} since {since}",
            stale.len(),
            status.volumes.len(),
            oldest.pod
        );
        Words::of_pod(what, &oldest.pod)
    });
    words.into_iter().collect()
}

pub(super) fn mount_gone(asked: &Asked) -> Vec<Words> {
    let Some(status) = asked.status() else {
        return Vec::new();
    };
    let gone: Vec<_> = status
        .volumes
        .iter()
        .filter(|volume| !volume.mounted)
        .collect();
    let words = gone.first().map(|first| {
        let what = format!(
            "{} of {} recorded volumes are not mounted, that of pod {} among them",
            gone.len(),
            status.volumes.len(),
            first.pod
        );
        Words::of_pod(what, &first.pod)
    });
    words.into_iter().collect()
}
