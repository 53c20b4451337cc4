//! Collects what the driver says of Secrets that it could not bring in step with their class: on the pod status, one
//! line for each, and in events.

use driver::cluster::pod_status::Aspect;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;

use super::{
    events::{RECENT, has_name, text},
    secrets::keys_of,
};
use crate::{
    cluster::Read,
    explain::facts::{Facts, VolumeFacts, time_of},
};

/// The reason of the events about Secrets that could not be written.
pub(super) const FAILED: &str = "FailedToCreateSecret";
/// What the driver says of a Secret of somebody else.
pub(super) const NOT_OURS: &str = "exists that the driver did not make";
/// What a text that was cut ends with.
const CUT: char = '…';

/// What the driver said of a Secret of a class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// The Secret; none if it is about all of the class.
    pub secret: Option<String>,
    /// The driver's words.
    pub said: String,
    /// When an event said so; none for what the pod status says now.
    pub at: Option<Timestamp>,
}

/// What the driver says of the Secrets of a class.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// The present failures, in the order in which the driver tells them.
    pub all: Vec<Failure>,
    /// Since when one of the Secrets is not as the class says, if the pod status says so.
    pub since: Option<String>,
    /// The number of Secrets that fail besides and are named nowhere.
    pub untold: usize,
}

impl Failures {
    /// Returns whether a failure of a Secret is told, or one of all Secrets of the class.
    pub(super) fn tell_of(&self, secret: &str) -> bool {
        let mut named = self.all.iter().map(|failure| failure.secret.as_deref());
        named.any(|name| name.is_none_or(|name| name == secret))
    }

    /// Collects those of a volume. What is over is left out.
    pub(super) fn of(facts: &Facts, volume: &VolumeFacts) -> Self {
        let (since, reason) = Aspect::Secrets.annotations();
        let status = volume.pod_status.found();
        let annotations = status.and_then(|status| status.metadata.annotations.as_ref());
        let annotation = |key: &str| annotations.and_then(|all| all.get(key));
        let since = annotation(since).cloned();
        let noted = since.as_ref().and_then(|_| annotation(reason));
        let (lines, number) = noted.map_or((Vec::new(), 0), |noted| lines(noted));
        let of_status: Vec<_> = lines
            .iter()
            .map(|line| Failure::of_line(line, None))
            .collect();
        let written = noted_at(volume).or_else(|| since.as_ref()?.parse().ok());
        let of_events = events(facts, volume);
        let mut all: Vec<Failure> = Vec::new();
        let mut number_over = 0;
        for mut failure in of_status {
            if failure.is_over(facts, volume, written) {
                number_over += 1;
                continue;
            }
            // The event has all of what the pod status has no room for.
            let event = of_events.iter().find(|event| event.has_all_of(&failure));
            if let Some(event) = event.filter(|_| failure.said.ends_with(CUT)) {
                failure.said.clone_from(&event.said);
            }
            all.push(failure);
        }
        let begin = since.as_ref().and_then(|since| since.parse().ok());
        let lacks_some = number > lines.len() || number_over > 0;
        for event in of_events {
            let is_told = all.iter().any(|failure| failure.secret == event.secret);
            let is_of_now = lacks_some && begin.is_some() && event.at >= begin;
            // Where the pod status does not tell of it, an event says nothing of a Secret that is there.
            let is_open = event.is_missing(facts) || event.is_unseen(facts, volume);
            let counts = !is_told && (is_of_now || is_open);
            if counts && !event.is_over(facts, volume, event.at) {
                all.push(event);
            }
        }
        let known = all.len() + number_over;
        Self {
            untold: number.saturating_sub(known),
            all,
            since,
        }
    }
}

/// Returns the lines of a reason that are about a Secret each, and the number of Secrets that fail.
fn lines(reason: &str) -> (Vec<&str>, usize) {
    let mut lines: Vec<_> = reason.lines().filter(|line| !line.is_empty()).collect();
    let more = lines.last().and_then(|last| {
        let count = last.strip_prefix("and ")?.strip_suffix(" more")?;
        count.parse::<usize>().ok()
    });
    if more.is_some() {
        lines.pop();
    }
    let mut number = lines.len() + more.unwrap_or(0);
    // Former versions of the driver name one, and how many there are.
    let former = lines.first().and_then(|first| {
        let (count, rest) = first.split_once(" Secrets. ")?;
        Some((count.parse::<usize>().ok()?, rest))
    });
    if let Some((count, rest)) = former {
        number = number.max(count);
        lines[0] = rest;
    }
    (lines, number)
}

/// Returns the last event about each Secret of a class.
fn events(facts: &Facts, volume: &VolumeFacts) -> Vec<Failure> {
    let mut all: Vec<Failure> = Vec::new();
    if facts.is_mounted(volume) != Some(true) {
        return all;
    }
    let events = facts.events.found().into_iter().flatten();
    let is_of_class = |event: &&Event| {
        let is_failure = event.reason.as_deref() == Some(FAILED);
        is_failure && has_name(text(event), &volume.class_name)
    };
    for event in events.filter(is_of_class) {
        let failure = Failure::of_line(text(event), time_of(event));
        let is_known = all.iter().any(|other| other.secret == failure.secret);
        if failure.secret.is_some() && !is_known {
            all.push(failure);
        }
    }
    all
}

/// Returns when the annotations of a pod status were written last, if its metadata says so.
fn noted_at(volume: &VolumeFacts) -> Option<Timestamp> {
    let managed = volume
        .pod_status
        .found()?
        .metadata
        .managed_fields
        .as_ref()?;
    let (_, reason) = Aspect::Secrets.annotations();
    let field = format!("/f:metadata/f:annotations/f:{}", reason.replace('/', "~1"));
    let of_reason = managed.iter().filter(|entry| {
        let fields = entry.fields_v1.as_ref();
        fields.is_some_and(|fields| fields.0.pointer(&field).is_some())
    });
    of_reason
        .filter_map(|entry| Some(entry.time.as_ref()?.0))
        .max()
}

impl Failure {
    /// Reads the words of the driver, which name the class and the Secret first.
    fn of_line(line: &str, at: Option<Timestamp>) -> Self {
        Self {
            secret: secret_of(line).map(str::to_owned),
            said: line.to_owned(),
            at,
        }
    }

    /// Returns whether it is known that its Secret does not exist.
    pub(super) fn is_missing(&self, facts: &Facts) -> bool {
        let read = self
            .secret
            .as_ref()
            .and_then(|name| facts.secrets.get(name));
        read.is_some_and(Read::is_missing)
    }

    /// Returns whether it is of the present as far as is known, where the pod status cannot be read.
    fn is_unseen(&self, facts: &Facts, volume: &VolumeFacts) -> bool {
        let is_recent = |at| facts.now.duration_since(at).as_secs() <= RECENT;
        volume.pod_status.unknown().is_some() && self.at.is_none_or(is_recent)
    }

    /// Returns whether it is over: the class makes no such Secret any more, or the Secret is in order and the driver
    /// has written it since `told`.
    fn is_over(&self, facts: &Facts, volume: &VolumeFacts, told: Option<Timestamp>) -> bool {
        let Some(secret) = &self.secret else {
            return false;
        };
        if volume.class.found().is_some() && !volume.makes(secret) {
            return true;
        }
        let read = facts.secrets.get(secret);
        let Some(written) = read.and_then(Read::found) else {
            return false;
        };
        let has_all = written.keys.as_ref().is_none_or(|keys| {
            let wanted = keys_of(facts, secret);
            wanted.is_none_or(|(_, wanted)| wanted.iter().all(|key| keys.contains(*key)))
        });
        if written.is_deleted || !written.is_managed || !has_all {
            return false;
        }
        let is_later = |told: Timestamp| {
            let since = written.by_driver;
            since.is_some_and(|since| since.as_second() > told.as_second())
        };
        self.said.contains(NOT_OURS) || told.is_some_and(is_later)
    }

    /// Returns whether it has the words of another one, of which the end was cut off.
    fn has_all_of(&self, cut: &Self) -> bool {
        self.secret == cut.secret && self.said.starts_with(cut.said.trim_end_matches(CUT))
    }
}

/// Returns the Secret that the driver's words are about: `SecretProviderClass db, Secret creds: ...`.
fn secret_of(line: &str) -> Option<&str> {
    let line = line.trim_start();
    if let Some(rest) = line.strip_prefix("Secret ") {
        let name = rest.split([' ', ':']).next()?;
        return Some(name).filter(|name| !name.is_empty());
    }
    let rest = line.strip_prefix("SecretProviderClass ")?;
    let end = rest.find([',', ':'])?;
    let (_, rest) = rest.split_at(end);
    if let Some(rest) = rest.strip_prefix(", Secret ") {
        return rest.split(':').next();
    }
    let rest = rest.strip_prefix(": secretName \"")?;
    rest.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_a_reason_name_a_secret_each() {
        let usual = "SecretProviderClass app, Secret db: there is no object fo: see Secret x: y";
        for (reason, names, number) in [
            (usual.to_owned(), vec![Some("db")], 1),
            (
                format!("SecretProviderClass app: it is wrong\n{usual}"),
                vec![None, Some("db")],
                2,
            ),
            (
                format!(
                    "SecretProviderClass app: secretName \"my_db\" cannot be the name\n{usual}"
                ),
                vec![Some("my_db"), Some("db")],
                2,
            ),
            (format!("{usual}\nand 12 more"), vec![Some("db")], 13),
            (format!("2 Secrets. {usual}"), vec![Some("db")], 2),
            ("Secret a.b: no".to_owned(), vec![Some("a.b")], 1),
            ("the volume is away".to_owned(), vec![None], 1),
            (String::new(), vec![], 0),
        ] {
            let (lines, found) = lines(&reason);
            let told: Vec<_> = lines.into_iter().map(secret_of).collect();
            assert_eq!((told, found), (names, number), "{reason}");
        }
    }
}
