//! Tells a pod that files which it mounts with `subPath` do not follow a refresh: Kubernetes binds the
//! file that was there when the container started.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{PublishRequest, Volumes};
use crate::cluster::events::Severity;

const REASON: &str = "MountSubPathNotRefreshed";

/// The volumes whose pods have been looked at, and told if there was something to tell.
#[derive(Clone, Default)]
pub(super) struct Told(Arc<Mutex<HashSet<String>>>);

impl Told {
    /// Returns whether a volume comes for the first time.
    fn first(&self, volume_id: &str) -> bool {
        self.volumes().insert(volume_id.to_owned())
    }

    /// Forgets a volume that is gone, or whose pod could not be told.
    pub(super) fn forget(&self, volume_id: &str) {
        self.volumes().remove(volume_id);
    }

    fn volumes(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Volumes {
    /// Announces on the pod that its mounts with `subPath` keep the content of before: when the volume
    /// changes for the first time, and again with later changes, if it is time. Reads the pod when the volume changes for the first time.
    pub(super) async fn tell_of_sub_paths(&self, request: &PublishRequest) {
        let volume_id = &request.volume_id;
        if !self.told_of_sub_paths.first(volume_id) {
            return self.repeat(request, Severity::Warning, REASON, None);
        }
        let told = self.told_of_sub_paths.clone();
        let containers = match self
            .cluster
            .containers_with_sub_paths(&request.pod, request.target.volume())
            .await
        {
            Ok(containers) => containers,
            Err(error) => {
                tracing::debug!(%error, "the pod could not be read, so it is told of mounts with subPath later");
                return told.forget(volume_id);
            }
        };
        let Some(names) = containers else { return };
        let forgotten = volume_id.clone();
        let accepted = self.announce_lasting(request, Severity::Warning, REASON, &format!(
            "the volume of SecretProviderClass {} has new content, which {names} mounts with subPath: such a mount keeps the content with which the container started. Mount the whole volume and read the file in it, or replace the pod",
            request.class
        ), move |is_posted| {
            if !is_posted {
                told.forget(&forgotten);
            }
        });
        if !accepted {
            self.told_of_sub_paths.forget(volume_id);
        }
    }
}
