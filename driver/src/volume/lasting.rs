//! Repeats the events of volumes for as long as what they report lasts.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;

use super::{PublishRequest, Volumes};
use crate::cluster::events::{Series, Severity};

/// The reason of the event about refreshes that fail.
pub(super) const FAILED: &str = "MountRotationFailed";
/// The reason of the event about content that a refresh has changed.
const CHANGED: &str = "MountContentChanged";

/// The events that are repeated, by volume and reason.
#[derive(Clone, Default)]
pub(super) struct Lasting(Arc<Mutex<HashMap<String, BTreeMap<&'static str, Told>>>>);

/// What the pod of a volume is told with one reason.
#[derive(Default)]
struct Told {
    series: Option<Series>,
    message: String,
    /// How often it has happened since the pod was told last.
    untold: u32,
}

impl Lasting {
    fn volumes(&self) -> MutexGuard<'_, HashMap<String, BTreeMap<&'static str, Told>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets an event, because what it reports is over, or because it could not be posted.
    pub(super) fn over(&self, volume_id: &str, reason: &'static str) {
        if let Some(told) = self.volumes().get_mut(volume_id) {
            told.remove(reason);
        }
    }

    /// Forgets a volume that is gone.
    pub(super) fn gone(&self, volume_id: &str) {
        self.volumes().remove(volume_id);
    }
}

impl Volumes {
    /// Announces an event on the pod of a volume, which [`repeat`](Self::repeat) posts again. Returns
    /// whether it was accepted.
    pub(super) fn announce_lasting(
        &self,
        request: &PublishRequest,
        severity: Severity,
        reason: &'static str,
        message: &str,
        ended: impl FnOnce(bool) + Send + 'static,
    ) -> bool {
        let series = self
            .cluster
            .begin_series(&request.pod, severity, reason, message, ended);
        let Some(series) = series else {
            return false;
        };
        let told = Told {
            series: Some(series),
            message: message.to_owned(),
            untold: 0,
        };
        let mut volumes = self.lasting.volumes();
        let volume = volumes.entry(request.volume_id.clone()).or_default();
        volume.insert(reason, told);
        true
    }

    /// Posts an event once more that was announced on the pod of a volume, if it is time. It may have
    /// another message now.
    pub(super) fn repeat(
        &self,
        request: &PublishRequest,
        severity: Severity,
        reason: &'static str,
        message: Option<&str>,
    ) {
        let mut volumes = self.lasting.volumes();
        let told = volumes
            .get_mut(&request.volume_id)
            .and_then(|volume| volume.get_mut(reason));
        if let Some(told) = told
            && let Some(series) = &mut told.series
        {
            let message = message.unwrap_or(&told.message);
            let series = (series, 1, 1);
            self.cluster
                .repeat(&request.pod, severity, reason, message, series);
        }
    }

    /// Notes that a refresh has changed the content of a volume. `same_versions` says that the provider
    /// reports the versions of before.
    pub(super) fn content_changed(
        &self,
        request: &PublishRequest,
        at: Timestamp,
        same_versions: bool,
    ) {
        let although = if same_versions {
            ", although the provider reports the same versions of its objects"
        } else {
            ""
        };
        let mut volumes = self.lasting.volumes();
        let volume = volumes.entry(request.volume_id.clone()).or_default();
        let told = volume.entry(CHANGED).or_default();
        told.untold = told.untold.saturating_add(1);
        told.message = format!(
            "the volume of SecretProviderClass {} has new content since {at:.0}{although}",
            request.class
        );
    }

    /// Tells the pod of a volume of changes of the content that it has not been told of, if it is
    /// time. Changes that follow each other closely are one event, which counts them.
    pub(super) fn tell_of_changes(&self, request: &PublishRequest) {
        let mut volumes = self.lasting.volumes();
        let told = volumes
            .get_mut(&request.volume_id)
            .and_then(|volume| volume.get_mut(CHANGED));
        let Some(told) = told.filter(|told| told.untold > 0) else {
            return;
        };
        let (pod, message) = (&request.pod, &told.message);
        let severity = Severity::Normal;
        let is_told = match &mut told.series {
            Some(series) => {
                let series = (series, 1, told.untold);
                self.cluster.repeat(pod, severity, CHANGED, message, series)
            }
            none => {
                *none = self
                    .cluster
                    .begin_series(pod, severity, CHANGED, message, |_| {});
                none.is_some()
            }
        };
        if is_told {
            told.untold = 0;
        }
    }
}
