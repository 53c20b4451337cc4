//! Tells on the pod status of a volume what is wrong with it for as long as that lasts: since when, and
//! why. Nothing is written while nothing changes, and a trouble that changes all the time is written
//! about once in the time between two checks.
//!
//! The schema of the CRD has no conditions, so these are annotations. Others may change them: the
//! driver compares them whenever it reads the pod status anyway, and puts them right.

mod pace;
mod reason;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use kube::{Api, api::PostParams, core::ObjectMeta};
use tokio::time::sleep;

use super::{
    super::{
        Cluster, events::REPEAT_EVERY, request::Failure, resources::SecretProviderClassPodStatus,
    },
    ATTEMPTS, is_owned_by,
};
use crate::{error::Result, record::Pod};
use pace::Pace;
pub use reason::{Cause, Trouble};

/// The time before a write about Secrets in which more may change: a check finds one after the other.
const GATHER: Duration = Duration::from_millis(200);
/// How often a pod status that was at rest may be written at once, for somebody who mends one thing after
/// the other.
const WRITES_AT_ONCE: u32 = 4;
/// How often the words of a cause that stays the same may change at once; from then on it is once in
/// [`REPEAT_EVERY`].
const WORDS_AT_ONCE: u32 = 3;

/// A side of a volume that can be in trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aspect {
    /// Whether refreshes succeed, so that the content is fresh.
    Freshness,
    /// Whether the Secrets of the class are in step with the volume.
    Secrets,
}

impl Aspect {
    const ALL: [Self; 2] = [Self::Freshness, Self::Secrets];

    /// Returns the annotations with the time since when there is trouble, and with the reason.
    pub fn annotations(self) -> (&'static str, &'static str) {
        match self {
            Self::Freshness => (
                "secrets-store.csi.k8s.io/stale-since",
                "secrets-store.csi.k8s.io/stale-reason",
            ),
            Self::Secrets => (
                "secrets-store.csi.k8s.io/secrets-out-of-step-since",
                "secrets-store.csi.k8s.io/secrets-out-of-step-reason",
            ),
        }
    }

    fn index(self) -> usize {
        match self {
            Self::Freshness => 0,
            Self::Secrets => 1,
        }
    }
}

/// The pod status of a volume.
#[derive(Debug, Clone, Copy)]
pub struct StatusOf<'a> {
    /// The volume handle.
    pub volume_id: &'a str,
    /// The pod of the volume.
    pub pod: &'a Pod,
    /// The name of the pod status.
    pub name: &'a str,
}

/// What the annotations of one aspect say. A missing one is an empty text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Said {
    since: String,
    reason: String,
}

impl Said {
    fn by(annotations: &BTreeMap<String, String>, aspect: Aspect) -> Self {
        let (since, reason) = aspect.annotations();
        let text = |key| annotations.get(key).cloned().unwrap_or_default();
        Self {
            since: text(since),
            reason: text(reason),
        }
    }
}

/// What is known of one aspect of a volume.
#[derive(Debug, Clone)]
struct State {
    /// What the pod status should say; `None` until that is known.
    wanted: Option<Said>,
    /// What it said when it was read or written last, if that was since the driver started.
    found: Option<Said>,
    /// The digest of the causes that the pod status should say.
    causes: u64,
    /// How often the words changed while the causes were the same.
    rewordings: Pace,
}

impl Default for State {
    fn default() -> Self {
        Self {
            wanted: None,
            found: None,
            causes: 0,
            rewordings: Pace::new(WORDS_AT_ONCE, REPEAT_EVERY),
        }
    }
}

impl State {
    /// Returns whether the pod status has to be written. Trouble is written in any case; that there
    /// is none only if the pod status is known to say something else.
    fn differs(&self) -> bool {
        match (&self.wanted, &self.found) {
            (Some(wanted), Some(found)) => wanted != found,
            (Some(wanted), None) => *wanted != Said::default(),
            (None, _) => false,
        }
    }

    /// Sets what the pod status should say. Trouble that lasts keeps its beginning. Its reason follows
    /// when its causes change; if only the words of one do, for a few times and then once in
    /// [`REPEAT_EVERY`].
    fn set(&mut self, trouble: Option<Trouble>) {
        let Some(trouble) = trouble else {
            self.wanted = Some(Said::default());
            return;
        };
        let Trouble { since, reason, .. } = trouble;
        let is_other = std::mem::replace(&mut self.causes, trouble.identity) != trouble.identity;
        match &mut self.wanted {
            Some(lasts) if !lasts.since.is_empty() => {
                if lasts.reason != reason && (is_other || self.rewordings.take()) {
                    lasts.reason = reason;
                }
            }
            wanted => {
                let since = format!("{since:.0}");
                *wanted = Some(Said { since, reason });
                self.keep_beginning();
            }
        }
    }

    /// Notes what the pod status says.
    fn find(&mut self, found: Said) {
        let is_first = self.found.is_none();
        self.found = Some(found);
        if is_first {
            self.keep_beginning();
        }
    }

    /// Takes over the beginning of trouble that an earlier run of the driver has written.
    fn keep_beginning(&mut self) {
        let (Some(wanted), Some(found)) = (&mut self.wanted, &self.found) else {
            return;
        };
        let time = |said: &Said| said.since.parse::<Timestamp>().ok();
        if let (Some(since), Some(earlier)) = (time(wanted), time(found))
            && earlier < since
        {
            wanted.since.clone_from(&found.since);
        }
    }
}

struct Volume {
    aspects: [State; 2],
    /// Whether a task writes the pod status.
    is_writing: bool,
    writes: Pace,
}

impl Volume {
    fn new(every: Duration) -> Self {
        Self {
            aspects: Default::default(),
            is_writing: false,
            writes: Pace::new(WRITES_AT_ONCE, every),
        }
    }

    /// Returns whether a task has to be started that writes the pod status.
    fn begins_to_write(&mut self) -> bool {
        let begins = !self.is_writing && self.aspects.iter().any(State::differs);
        self.is_writing |= begins;
        begins
    }
}

/// The lasting trouble of all volumes, by volume handle.
#[derive(Default)]
pub(in super::super) struct Troubles(Mutex<HashMap<String, Volume>>);

impl Troubles {
    fn volumes(&self) -> MutexGuard<'_, HashMap<String, Volume>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what a pod status says. Returns whether it has to be written.
    fn seen(&self, volume_id: &str, metadata: &ObjectMeta) -> bool {
        let none = BTreeMap::new();
        let annotations = metadata.annotations.as_ref().unwrap_or(&none);
        let mut volumes = self.volumes();
        let Some(volume) = volumes.get_mut(volume_id) else {
            return false;
        };
        for aspect in Aspect::ALL {
            volume.aspects[aspect.index()].find(Said::by(annotations, aspect));
        }
        volume.begins_to_write()
    }

    /// Returns what a pod status lacks, or `None` if it is as wanted.
    fn change(&self, volume_id: &str) -> Option<BTreeMap<&'static str, Option<String>>> {
        let mut change = BTreeMap::new();
        let volumes = self.volumes();
        for aspect in Aspect::ALL {
            let state = &volumes.get(volume_id)?.aspects[aspect.index()];
            if let (true, Some(wanted)) = (state.differs(), &state.wanted) {
                let (since, reason) = aspect.annotations();
                let text = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
                change.insert(since, text(&wanted.since));
                change.insert(reason, text(&wanted.reason));
            }
        }
        Some(change).filter(|change| !change.is_empty())
    }

    /// Returns how long a task has to wait before it writes; `None` if the volume is gone.
    fn wait(&self, volume_id: &str) -> Option<Duration> {
        let volumes = self.volumes();
        let volume = volumes.get(volume_id)?;
        let gathers = volume.aspects[Aspect::Secrets.index()].differs();
        let gather = if gathers { GATHER } else { Duration::ZERO };
        Some(volume.writes.wait().max(gather))
    }

    /// Notes that a pod status is being written.
    fn writes(&self, volume_id: &str) {
        if let Some(volume) = self.volumes().get_mut(volume_id) {
            volume.writes.done();
        }
    }

    /// Notes that a task has ended. Returns whether it has to go on, because something has changed.
    fn ended(&self, volume_id: &str, succeeded: bool) -> bool {
        let mut volumes = self.volumes();
        let Some(volume) = volumes.get_mut(volume_id) else {
            return false;
        };
        volume.is_writing = succeeded && volume.aspects.iter().any(State::differs);
        volume.is_writing
    }
}

impl Cluster {
    /// Adds a mounted volume, whose pod status can tell of trouble. If that changes all the time, it is
    /// written once in `every`.
    pub fn add_volume(&self, volume_id: &str, every: Duration) {
        let mut volumes = self.troubles.volumes();
        let volume = volumes.entry(volume_id.to_owned());
        volume.or_insert_with(|| Volume::new(every));
    }

    /// Removes a volume that is gone.
    pub fn remove_volume(&self, volume_id: &str) {
        self.troubles.volumes().remove(volume_id);
    }

    /// Tells on the pod status of a volume, in the background, since when an aspect of it is in
    /// trouble and why, or that it is not. Sends nothing if the pod status says so already. What
    /// cannot be written now is written with the next call.
    pub fn set_trouble(&self, status: StatusOf<'_>, aspect: Aspect, trouble: Option<Trouble>) {
        let begins = {
            let mut volumes = self.troubles.volumes();
            let Some(volume) = volumes.get_mut(status.volume_id) else {
                return;
            };
            volume.aspects[aspect.index()].set(trouble);
            volume.begins_to_write()
        };
        if begins {
            self.write_troubles(status);
        }
    }

    /// Compares a pod status that was just read or written with what it should say.
    pub(super) fn compare_troubles(&self, status: StatusOf<'_>, metadata: &ObjectMeta) {
        if self.troubles.seen(status.volume_id, metadata) {
            self.write_troubles(status);
        }
    }

    fn write_troubles(&self, status: StatusOf<'_>) {
        // All volumes fail then, and the next call finds out whether it is there again.
        if self.is_away() {
            self.troubles.ended(status.volume_id, false);
            return;
        }
        let (cluster, pod) = (self.clone(), status.pod.clone());
        let (volume_id, name) = (status.volume_id.to_owned(), status.name.to_owned());
        tokio::spawn(async move {
            while let Some(wait) = cluster.troubles.wait(&volume_id) {
                if !wait.is_zero() {
                    sleep(wait).await;
                }
                let written = cluster.replace_troubles(&volume_id, &pod, &name).await;
                if let Err(error) = &written {
                    tracing::debug!(pod = %pod, %error, "the trouble of the volume could not be written to its pod status; trying again");
                }
                let succeeded = matches!(written, Ok(true));
                if !cluster.troubles.ended(&volume_id, succeeded) {
                    return;
                }
            }
        });
    }

    /// Writes what the pod status lacks. Returns `false` if there is no pod status of this volume now.
    async fn replace_troubles(&self, volume_id: &str, pod: &Pod, name: &str) -> Result<bool> {
        let api: Api<SecretProviderClassPodStatus> = self.pod_statuses(pod).await?;
        // The pod statuses of a namespace are written one after the other.
        let _turn = self.events.turn(&pod.namespace).await;
        for _ in 0..ATTEMPTS {
            let existing = match self.read(api.get(name)).await {
                Err(Failure::Refused { code: 404, .. }) => return Ok(false),
                found => found.map_err(Failure::into_error)?,
            };
            if !is_owned_by(&existing, &pod.uid) {
                return Ok(false);
            }
            self.troubles.seen(volume_id, &existing.metadata);
            let Some(change) = self.troubles.change(volume_id) else {
                return Ok(true);
            };
            let mut update = existing;
            let annotations = update.metadata.annotations.get_or_insert_default();
            for (key, value) in change {
                match value {
                    Some(value) => annotations.insert(key.to_owned(), value),
                    None => annotations.remove(key),
                };
            }
            self.troubles.writes(volume_id);
            // A right to patch is not needed; the resource version keeps what others write meanwhile.
            let how = PostParams::default();
            match self.in_turn(api.replace(name, &how, &update)).await {
                Ok(written) => {
                    self.troubles.seen(volume_id, &written.metadata);
                    return Ok(true);
                }
                Err(Failure::Refused {
                    code: 404 | 409, ..
                }) => {}
                Err(failure) => return Err(failure.into_error()),
            }
        }
        Ok(false)
    }
}
