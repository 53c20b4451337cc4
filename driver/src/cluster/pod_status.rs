//! Writes the SecretProviderClassPodStatus of a volume, with as few requests as possible: one
//! create on a first publish, one read and one replacement when the content has changed, and now and
//! then one cheap read.

mod desired;
mod trouble;

use kube::{
    Api,
    api::{DeleteParams, GetParams, PostParams, Preconditions},
};

use super::{Cluster, request::Failure, resources::SecretProviderClassPodStatus};
use crate::{
    error::{Error, Result},
    record::Pod,
};
pub use desired::{CONTENT_CHANGED, CONTENT_CHANGES, DesiredPodStatus, NewOrder};
use desired::{is_owned_by, merged};
pub(super) use trouble::Troubles;
pub use trouble::{Aspect, Cause, StatusOf, Trouble};

/// The number of attempts to write an object that others write or delete at the same time.
const ATTEMPTS: usize = 5;

/// A pod status after it was written, or as it was found when nothing had to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The object's name.
    pub name: String,
    /// Its resource version; empty if the API server gives none.
    pub resource_version: String,
}

/// The first request of a write: whether there is an object of that name is usually known.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    Create,
    Read,
}

/// The action for a complete pod status of this volume that names other versions.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OtherVersions {
    Replace,
    Leave,
}

impl Cluster {
    /// Writes the pod status of a volume, unless it is as desired already. Returns the object's name
    /// and resource version.
    ///
    /// The name is `<pod>-<namespace>-<class>`. If another volume of a living pod has that name,
    /// this volume's gets a suffix and keeps it: `before` is the name under which it was written
    /// last, if it was.
    ///
    /// An object that an earlier pod of the same name left behind, here or on another node, is
    /// replaced once the API server says that this pod is alive, and so is one that has lost its
    /// owner. The object of a living pod is never replaced for one that has gone, whose kubelet may
    /// not know that yet: then nothing is written, and the resource version that is returned is empty.
    ///
    /// # Errors
    /// Fails if the API server does not answer, or refuses the object.
    pub async fn write_pod_status(
        &self,
        desired: &DesiredPodStatus<'_>,
        before: Option<&str>,
    ) -> Result<Written> {
        let own = desired.own_name();
        let name = if before == Some(&own) {
            own
        } else {
            desired.name()
        };
        let first = match before {
            Some(before) if before == name => First::Read,
            _ => First::Create,
        };
        let put = self.put(desired, name, first, OtherVersions::Replace);
        let (name, stored) = put.await.map_err(|error| desired.failed(error))?;
        Ok(Written {
            name,
            resource_version: stored
                .and_then(|stored| stored.metadata.resource_version)
                .unwrap_or_default(),
        })
    }

    /// Returns whether the pod status of a volume exists and is complete, in the API server's cache.
    ///
    /// # Errors
    /// Fails if the API server does not answer.
    pub async fn has_pod_status(&self, desired: &DesiredPodStatus<'_>, name: &str) -> Result<bool> {
        let found = self.look_at_pod_status(desired, name).await;
        let missing = found.map_err(|error| desired.failed(error))?;
        Ok(missing.is_none())
    }

    /// Checks that the pod status of a volume exists and is complete, in the API server's cache, and
    /// writes it again if it is not and the pod is alive. Returns whether it was written.
    ///
    /// `name` is the name under which it was written last. A pod status that names other versions
    /// stays: a refresh writes them before the volume has them.
    ///
    /// # Errors
    /// Fails if the API server does not answer, refuses the object, or stores another one than was sent.
    pub async fn keep_pod_status(
        &self,
        desired: &DesiredPodStatus<'_>,
        name: &str,
    ) -> Result<bool> {
        let kept = async {
            let Some(first) = self.look_at_pod_status(desired, name).await? else {
                return Ok(false);
            };
            if !self.is_alive(desired.pod).await? {
                return Ok(false);
            }
            let name = name.to_owned();
            let put = self.put(desired, name, first, OtherVersions::Leave).await?;
            match put.1 {
                None => Ok(false),
                Some(stored) if desired.is_complete(&stored) => Ok(true),
                Some(_) => Err(Error::precondition(
                    "the API server has stored it without its owner or a part of its status. Does an admission webhook change objects of this kind?",
                )),
            }
        };
        kept.await.map_err(|error| desired.failed(error))
    }

    /// Looks at a pod status in the API server's cache. Returns the first request that writes it, or nothing
    /// if it is complete.
    async fn look_at_pod_status(
        &self,
        desired: &DesiredPodStatus<'_>,
        name: &str,
    ) -> Result<Option<First>> {
        let api = self.pod_statuses(desired.pod).await?;
        match self.read(api.get_with(name, &GetParams::any())).await {
            Ok(existing) if desired.is_complete(&existing) => {
                self.compare_troubles(desired.named(name), &existing.metadata);
                Ok(None)
            }
            Ok(_) => Ok(Some(First::Read)),
            Err(Failure::Refused { code: 404, .. }) => Ok(Some(First::Create)),
            Err(failure) => Err(failure.into_error()),
        }
    }

    /// Writes a pod status, unless it is as desired, and compares what it says about troubles. Returns its name,
    /// and what is stored, or nothing if the pod is gone.
    async fn put(
        &self,
        desired: &DesiredPodStatus<'_>,
        name: String,
        first: First,
        other_versions: OtherVersions,
    ) -> Result<(String, Option<SecretProviderClassPodStatus>)> {
        let put = self.create_or_replace(desired, name, first, other_versions);
        let (name, stored) = put.await?;
        if let Some(stored) = &stored {
            self.compare_troubles(desired.named(&name), &stored.metadata);
        }
        Ok((name, stored))
    }

    /// Creates or replaces the pod status. Returns the same as [`Self::put`].
    async fn create_or_replace(
        &self,
        desired: &DesiredPodStatus<'_>,
        mut name: String,
        mut first: First,
        other_versions: OtherVersions,
    ) -> Result<(String, Option<SecretProviderClassPodStatus>)> {
        let api = self.pod_statuses(desired.pod).await?;
        for _ in 0..ATTEMPTS {
            let object = desired.object(&name);
            if std::mem::replace(&mut first, First::Create) == First::Create {
                let how = PostParams::default();
                match self.in_turn(api.create(&how, &object)).await {
                    Ok(created) => return Ok((name, Some(created))),
                    Err(Failure::Refused { code: 409, .. }) => {}
                    Err(failure) => return Err(failure.into_error()),
                }
            }
            let existing = match self.read(api.get(&name)).await {
                Ok(existing) => existing,
                // Deleted before it was read.
                Err(Failure::Refused { code: 404, .. }) => continue,
                Err(failure) => return Err(failure.into_error()),
            };
            if desired.is_of_another_volume(&existing) {
                let own = desired.own_name();
                if name == own {
                    return Err(Error::internal(format!("{name} belongs to another volume")));
                }
                name = own;
                continue;
            }
            let is_ours = is_owned_by(&existing, &desired.pod.uid);
            if !is_ours && !self.is_alive(desired.pod).await? {
                return Ok((name, None));
            }
            if other_versions == OtherVersions::Leave && desired.is_complete(&existing) {
                return Ok((name, Some(existing)));
            }
            let Some(update) = merged(&existing, object) else {
                return Ok((name, Some(existing)));
            };
            match self
                .in_turn(api.replace(&name, &PostParams::default(), &update))
                .await
            {
                Ok(replaced) => return Ok((name, Some(replaced))),
                Err(Failure::Refused {
                    code: 404 | 409, ..
                }) => {}
                Err(failure) => return Err(failure.into_error()),
            }
        }
        Err(Error::unavailable(format!(
            "{name} kept changing; trying again later"
        )))
    }

    async fn pod_statuses(&self, pod: &Pod) -> Result<Api<SecretProviderClassPodStatus>> {
        let client = self.client().await?;
        Ok(Api::namespaced(client, &pod.namespace))
    }

    /// Deletes the pod status of a publish that failed after it was written. An object that does not
    /// belong to this pod stays. An object that cannot be deleted now is deleted with the pod, which
    /// owns it.
    ///
    /// # Errors
    /// Fails if the API server does not answer, or refuses to delete it.
    pub async fn delete_pod_status(&self, pod: &Pod, name: &str) -> Result<()> {
        let api = self.pod_statuses(pod).await?;
        let existing = match self.read(api.get(name)).await {
            Err(Failure::Refused { code: 404, .. }) => return Ok(()),
            found => found.map_err(Failure::into_error)?,
        };
        if !is_owned_by(&existing, &pod.uid) {
            return Ok(());
        }
        let only_this = DeleteParams {
            preconditions: Some(Preconditions {
                uid: existing.metadata.uid,
                resource_version: existing.metadata.resource_version,
            }),
            ..DeleteParams::default()
        };
        match self.in_turn(api.delete(name, &only_this)).await {
            Ok(_)
            | Err(Failure::Refused {
                code: 404 | 409, ..
            }) => Ok(()),
            Err(failure) => Err(failure.into_error()),
        }
    }
}
