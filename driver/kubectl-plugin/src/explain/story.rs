//! The story of a pod, for people and for machines.

mod notes;
mod refreshes;
mod unknown;

use std::fmt;

use driver::cluster::pod_status::{CONTENT_CHANGED, CONTENT_CHANGES};
use jiff::Timestamp;
use kube::ResourceExt as _;
use serde::Serialize;

use super::{
    checks::{self, Trouble},
    facts::{Facts, VolumeFacts},
    state,
    workload::Missing,
};
use crate::{
    cluster::Read,
    explain::checks::{Next, next_refresh, shown_name},
    installation::is_ready,
    text::{one_line, visible},
    time::shown,
};

/// The seconds for which a refresh is due now: kubelet's next look is within them.
const DUE_NOW: i64 = 90;
/// The objects of a volume, and the Secrets of a class, that the text names.
const SHOWN: usize = 8;

/// What there is to say of a pod.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Story {
    /// The time of the story.
    pub time: Timestamp,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// What the pod does, as `kubectl get pod` shows it.
    pub state: String,
    /// The pod's node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// What is wrong; the reason first.
    pub trouble: Vec<Trouble>,
    /// What a pod waits for that is not ready, as far as it is not told as what is wrong.
    pub waits: Vec<Trouble>,
    /// The volumes of the driver.
    pub volumes: Vec<Volume>,
    /// What is worth knowing and not wrong.
    pub notes: Vec<String>,
    /// What could not be read, and why.
    pub unknown: Vec<String>,
    /// Whether enough could be read to say that nothing is wrong: a pod that is not ready needs its classes and
    /// pod statuses for that.
    pub known: bool,
}

/// What there is to say of a volume.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// Its name in the pod.
    pub name: String,
    /// Its class.
    pub class: String,
    /// The class's provider.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    /// Whether it is mounted, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mounted: Option<bool>,
    /// Since when.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mounted_since: Option<Timestamp>,
    /// When the provider answered last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_success: Option<Timestamp>,
    /// Since when refreshes fail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stale_since: Option<Timestamp>,
    /// When the content changed last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_change: Option<Timestamp>,
    /// The number of contents that it has had.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub contents: Option<u64>,
    /// When the next refresh is due, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_refresh: Option<Timestamp>,
    /// `due`, `never` (as the volume or its class says), `off` (rotation is off) or `unknown`.
    pub refreshes: &'static str,
    /// What is known of its refreshes where the node's driver could not be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refreshes_note: Option<String>,
    /// The mounted objects with their versions.
    pub objects: Vec<Object>,
    /// The paths of its first files, as the driver on the node sees them.
    pub files: Vec<String>,
    /// The number of its files, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_count: Option<usize>,
    /// The Secrets that the class makes.
    pub secrets: Vec<Secret>,
}

/// A mounted object.
#[derive(Debug, Clone, Serialize)]
pub struct Object {
    /// Its id.
    pub id: String,
    /// Its version.
    pub version: String,
}

/// A Secret that a class makes.
#[derive(Debug, Clone, Serialize)]
pub struct Secret {
    /// Its name.
    pub name: String,
    /// Whether it exists, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exists: Option<bool>,
}

impl Story {
    /// Tells it.
    pub(super) fn of(facts: &Facts) -> Self {
        let pod = &facts.pod;
        let (trouble, waits) = checks::all(facts);
        Self {
            time: facts.now,
            namespace: pod.namespace().unwrap_or_default(),
            pod: pod.name_any(),
            state: state::of(pod),
            node: facts.node.as_ref().map(|node| node.name.clone()),
            volumes: facts
                .volumes
                .iter()
                .map(|volume| Volume::of(facts, volume))
                .collect(),
            notes: lines(notes::of(facts, &trouble)),
            trouble,
            waits,
            unknown: lines(unknown::of(facts)),
            known: is_known(facts),
        }
    }

    /// Adds what there is to say of the other pods of its workload.
    #[must_use]
    pub fn with(mut self, missing: Missing) -> Self {
        self.trouble.extend(missing.trouble);
        self.notes.extend(lines(missing.notes));
        self.unknown.extend(lines(missing.unknown));
        self
    }
}

fn lines(lines: Vec<String>) -> Vec<String> {
    lines.iter().map(|line| visible(line)).collect()
}

fn is_known(facts: &Facts) -> bool {
    let has_all = facts
        .volumes
        .iter()
        .all(|volume| volume.class.unknown().is_none() && volume.pod_status.unknown().is_none());
    has_all || is_ready(&facts.pod) || facts.has_ended()
}

impl Volume {
    fn of(facts: &Facts, volume: &VolumeFacts) -> Self {
        let record = facts.record(volume);
        let status = volume.pod_status.found();
        let annotation = |key: &str| status.and_then(|status| status.annotations().get(key));
        let mounted = facts.is_mounted(volume);
        let since = status.and_then(|status| status.metadata.creation_timestamp.as_ref());
        let class = volume.class.found();
        let (next_refresh, refreshes) = match next_refresh(facts, volume) {
            Next::At(time) => (Some(time), "due"),
            Next::Never => (None, "never"),
            Next::Off => (None, "off"),
            Next::Unknown => (None, "unknown"),
        };
        let objects = match (record, status) {
            (Some(record), _) => {
                let objects = record.objects.iter();
                objects
                    .map(|object| (object.id.clone(), object.version.clone()))
                    .collect()
            }
            (None, Some(status)) => {
                let objects = status.status.objects.iter();
                objects
                    .map(|object| (object.id.clone(), object.version.clone()))
                    .collect()
            }
            (None, None) => Vec::new(),
        };
        let made = class
            .into_iter()
            .flat_map(|class| &class.spec.secret_objects);
        let secrets = made.map(|made| Secret {
            name: made.secret_name.clone(),
            exists: match facts.secrets.get(&made.secret_name) {
                Some(Read::Is(_)) => Some(true),
                Some(Read::Missing) => Some(false),
                _ => None,
            },
        });
        let changed = annotation(CONTENT_CHANGED).and_then(|time| time.parse().ok());
        Self {
            name: volume.name.clone(),
            class: volume.class_name.clone(),
            provider: class
                .map(|class| class.spec.provider.clone())
                .or_else(|| record.map(|record| record.provider.clone())),
            mounted,
            mounted_since: since.map(|time| time.0).filter(|_| mounted == Some(true)),
            last_success: record.map(|record| record.last_success),
            stale_since: record.and_then(|record| record.stale_since),
            last_change: record.map(|record| record.last_change).or(changed),
            contents: annotation(CONTENT_CHANGES).and_then(|count| count.parse().ok()),
            next_refresh,
            refreshes,
            refreshes_note: refreshes::known(facts, volume),
            objects: objects
                .into_iter()
                .map(|(id, version)| Object { id, version })
                .collect(),
            files: record.map_or_else(Vec::new, |record| record.files.clone()),
            file_count: record.and_then(|record| record.file_count),
            secrets: secrets.collect(),
        }
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, now: Timestamp) -> fmt::Result {
        let provider = self.provider.as_deref().unwrap_or("unknown");
        match self.class.as_str() {
            "" => writeln!(f, "  {} (no class)", self.name)?,
            class => writeln!(
                f,
                "  {} (class {}, provider {})",
                self.name,
                visible(class),
                visible(&shown_name(provider))
            )?,
        }
        match (self.mounted, self.mounted_since) {
            (Some(true), Some(since)) => writeln!(f, "    mounted since {}", shown(since, now))?,
            (Some(true), None) => writeln!(f, "    mounted")?,
            (Some(false), _) => writeln!(f, "    not mounted")?,
            (None, _) => writeln!(f, "    not known whether it is mounted")?,
        }
        if !self.objects.is_empty() {
            let named = self.objects.iter().take(SHOWN);
            let named: Vec<_> = named
                .map(|object| one_line(&format!("{} at {}", object.id, object.version), 120))
                .collect();
            writeln!(f, "    holds {}", list(&named, self.objects.len()))?;
        }
        match self.file_count {
            Some(0) => writeln!(f, "    has no files")?,
            Some(count) => {
                let named: Vec<_> = self.files.iter().map(|file| one_line(file, 120)).collect();
                writeln!(f, "    files: {}", list(&named, count))?;
            }
            None => {}
        }
        if let Some(changed) = self
            .last_change
            .filter(|changed| *changed > Timestamp::UNIX_EPOCH)
        {
            let contents = match self.contents {
                Some(1) => ", the first content".to_owned(),
                Some(count) => format!(", content number {count}"),
                None => String::new(),
            };
            writeln!(f, "    content since {}{contents}", shown(changed, now))?;
        }
        if let Some(success) = self.last_success {
            let next = match (self.refreshes, self.next_refresh) {
                _ if self.stale_since.is_some() => {
                    "the driver tries again at each look of kubelet, less and less often".to_owned()
                }
                (_, Some(next)) if now.duration_since(next).as_secs() > DUE_NOW => {
                    format!("the next refresh was due {}", shown(next, now))
                }
                (_, Some(next)) if next <= now => "the next refresh is due now".to_owned(),
                (_, Some(next)) => format!("the next refresh is due {}", shown(next, now)),
                ("never", _) => "no further refresh, as it says `never`".to_owned(),
                ("off", _) => "no refresh, as rotation is off".to_owned(),
                _ => "the next refresh is not known".to_owned(),
            };
            writeln!(f, "    asked for last {}; {next}", shown(success, now))?;
        }
        if let Some(known) = &self.refreshes_note {
            writeln!(f, "    {}", visible(known))?;
        }
        if !self.secrets.is_empty() {
            let state = |secret: &Secret| match secret.exists {
                Some(true) => format!("{} (there)", visible(&secret.name)),
                Some(false) => format!("{} (missing)", visible(&secret.name)),
                None => format!("{} (not known)", visible(&secret.name)),
            };
            let named: Vec<_> = self.secrets.iter().take(SHOWN).map(state).collect();
            writeln!(f, "    Secrets: {}", list(&named, self.secrets.len()))?;
        }
        Ok(())
    }
}

/// Returns the named ones of so many as a text.
fn list(named: &[String], all: usize) -> String {
    let named_all = named.join(", ");
    match all.saturating_sub(named.len()) {
        0 => named_all,
        more => format!("{named_all} and {more} more"),
    }
}

impl fmt::Display for Story {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let node = self
            .node
            .as_deref()
            .map_or("no node".to_owned(), |node| format!("node {node}"));
        writeln!(
            f,
            "pod {}/{}: {}, on {node}",
            self.namespace,
            self.pod,
            visible(&self.state)
        )?;
        if self.trouble.is_empty() {
            let nothing = match self.unknown.is_empty() {
                true => "Nothing is wrong with its volumes.",
                false => {
                    "Nothing is known to be wrong with its volumes; what could not be read is at the end."
                }
            };
            writeln!(f, "\n{nothing}")?;
        }
        match self.trouble.len() {
            0 => {}
            1 => writeln!(f, "\nWrong:")?,
            _ => writeln!(f, "\nWrong, the reason first:")?,
        }
        for trouble in &self.trouble {
            trouble.write(f)?;
        }
        if !self.waits.is_empty() {
            writeln!(f, "\nIt waits for:")?;
        }
        for waits in &self.waits {
            waits.write(f)?;
        }
        if !self.volumes.is_empty() {
            writeln!(f, "\nVolumes:")?;
        }
        for volume in &self.volumes {
            volume.write(f, self.time)?;
        }
        for (title, lines) in [("To know", &self.notes), ("Not known", &self.unknown)] {
            if !lines.is_empty() {
                writeln!(f, "\n{title}:")?;
            }
            for line in lines {
                writeln!(f, "  - {line}")?;
            }
        }
        Ok(())
    }
}
