//! Says what to do about a Secret that is not as its class says: what fits the cause, which is not often the class.

use driver::cluster::secrets::{ADOPT, MANAGED};

use super::{
    Then,
    failures::{Failure, NOT_OURS},
    refusal::{after_refusal, is_of_class},
};
use crate::{
    cluster::Read,
    explain::facts::{Facts, VolumeFacts},
};

/// What to do about a Secret.
pub(super) struct Remedy {
    /// What the command needs to be understood.
    pub hint: Option<String>,
    /// The next command.
    pub next: Then,
}

/// A Secret in trouble.
struct Ill<'a> {
    facts: &'a Facts,
    volume: &'a VolumeFacts,
    name: &'a str,
    said: &'a str,
}

/// Says what to do about a Secret.
type OfIll = fn(&Ill<'_>) -> Remedy;

/// Pieces of the driver's words, and what to do about what they say. The first one that fits counts.
const REMEDIES: &[(&str, OfIll)] = &[
    (NOT_OURS, of_others),
    ("it is being deleted", deleted),
    ("keeps the Secret from being deleted", deleted),
    ("the Secret is immutable", immutable),
    ("makes other content of this Secret", of_two_classes),
    ("has been refused before", refused_before),
];

impl Remedy {
    /// Returns what to do about a failure.
    pub(super) fn of(facts: &Facts, volume: &VolumeFacts, failure: &Failure) -> Self {
        let said = failure.said.as_str();
        let name = failure.secret.as_deref().unwrap_or_default();
        let ill = Ill {
            facts,
            volume,
            name,
            said,
        };
        let mut all = REMEDIES.iter();
        let of_words = all.find(|(piece, _)| !name.is_empty() && said.contains(piece));
        match of_words {
            Some((_, remedy)) => remedy(&ill),
            None if said.contains("the API server did not answer") => {
                Self::from(facts.driver_log())
            }
            None if is_of_class(facts, said) => Self::from(Then::from(facts.show_class(volume))),
            None => Self::from(after_refusal(facts, volume, Some(said))),
        }
    }
}

impl From<Then> for Remedy {
    fn from(next: Then) -> Self {
        Self { hint: None, next }
    }
}

/// Somebody else's Secret: the driver would replace its data, which cannot be taken back.
fn of_others(ill: &Ill<'_>) -> Remedy {
    let Ill { facts, name, .. } = ill;
    let kubectl = facts.kubectl();
    let written = facts.secrets.get(*name).and_then(Read::found);
    if written.is_some_and(|written| written.is_of_driver && !written.is_of_others) {
        return Remedy {
            hint: Some(format!(
                "the driver made it, and its label {MANAGED} and its annotations were taken away since, by hand or by a policy or a tool that has to leave them: until they are back, it keeps its old content. This gives it back to the driver, which replaces its data"
            )),
            next: format!("{kubectl} annotate secret {name} {ADOPT}=true").into(),
        };
    }
    Remedy {
        hint: Some(format!(
            "somebody else made it, and something may use it. Give the entry of secretObjects another secretName, and take that in the pod; only if nobody needs the data of {name} any more, let the driver REPLACE it: {kubectl} annotate secret {name} {ADOPT}=true"
        )),
        next: facts.edit_class(ill.volume).into(),
    }
}

/// A Secret that is being deleted, and that something keeps.
fn deleted(ill: &Ill<'_>) -> Remedy {
    let Ill { facts, name, .. } = ill;
    let written = facts.secrets.get(*name).and_then(Read::found);
    let held = written.map(|written| written.finalizers.join(", "));
    let held = held.filter(|held| !held.is_empty());
    let hint = match held {
        Some(held) => format!(
            "finalizer {held} keeps it from going; whoever set that has to take it away, and the driver makes the Secret then"
        ),
        None => "the driver makes it once the former one is gone".to_owned(),
    };
    Remedy {
        hint: Some(hint),
        next: format!(
            "{} get secret {name} -o jsonpath='{{.metadata.deletionTimestamp}} {{.metadata.finalizers}}'",
            facts.kubectl()
        )
        .into(),
    }
}

fn immutable(ill: &Ill<'_>) -> Remedy {
    let Ill { facts, name, .. } = ill;
    Remedy {
        hint: Some("nobody can change an immutable Secret; the driver makes it anew once it is deleted, immutable again if a policy of the cluster makes it so".to_owned()),
        next: format!("{} delete secret {name}", facts.kubectl()).into(),
    }
}

fn of_two_classes(ill: &Ill<'_>) -> Remedy {
    let next = ill.facts.edit_class(ill.volume);
    Remedy {
        hint: Some(
            "another class makes a Secret of this name; each needs its own secretName".to_owned(),
        ),
        next: next.into(),
    }
}

/// A type that was refused once is not tried again by itself.
fn refused_before(ill: &Ill<'_>) -> Remedy {
    let command = ill.said.split_once("To try again: ").map(|(_, rest)| rest);
    let command = command.map(|rest| rest.split(';').next().unwrap_or(rest).trim());
    match command {
        Some(command) => Remedy::from(Then::from(command)),
        None => Remedy::from(Then::from(ill.facts.show_class(ill.volume))),
    }
}
