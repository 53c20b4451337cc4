//! Reconciles one Secret of a class: with a check first, which only reads, or by writing at once.
//!
//! The desired data comes from the newest content of the class's volumes on this node. A digest of
//! it is remembered, so that a check reads no volume while nothing has changed.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    SecretSync, Volume,
    cache::{CachedVolume, SecretKey},
    content::{Origin, Stamp, VolumeContent},
    desired::{Batch, Computed, Entry, SecretData, compute},
    parsing::Caller,
};
use crate::{
    cluster::{
        Class,
        resources::SecretObject,
        secrets::{
            Data, DesiredSecret, Digest, ErrorType, IfAbsent, Owner, PodOwners, Reconciled,
            SyncError,
        },
    },
    record::Record,
};

/// The number of attempts to read a volume whose content is replaced at the same time.
const ATTEMPTS: usize = 3;
/// The time from a change of a class on within which its volumes are refreshed: kubelet looks at each every
/// 60 to 90 seconds, and two minutes after a failure; the provider may be busy.
const REFRESHED_WITHIN: Duration = Duration::from_secs(300);

/// A Secret of a class that is being reconciled.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) key: &'a SecretKey,
    pub(super) class: &'a Arc<Class>,
    pub(super) object: &'a SecretObject,
}

impl SecretSync {
    /// Reconciles a Secret whose volume has changed, by writing at once. `record` is the record of
    /// the volume's publish, which is at its last step. Returns `None` if no volume has content, or
    /// if the Secret is left to other nodes, or a refresh is about to bring an object of it. The caller
    /// has the Secret's turn.
    pub(super) async fn write(
        &self,
        target: Target<'_>,
        record: &Record,
        batch: &mut Batch,
    ) -> Result<Option<Reconciled>, SyncError> {
        let entry = Entry::new(target.class, target.object)?;
        let volumes = self.cache.volumes_of(&target.key.class);
        let reconciled = self.write_from(target, &volumes, Some(record), batch);
        match reconciled.await {
            // A publish that needs its Secrets must not end without.
            Err(error) if error.is_awaited() && !self.errors_fail_publish => Ok(None),
            reconciled => reconciled.map_err(|error| entry.error(error)),
        }
    }

    /// Checks a Secret, and writes it if anything differs. Returns `None` as [`Self::write`] does.
    /// The caller has the Secret's turn.
    pub(super) async fn check(
        &self,
        target: Target<'_>,
        batch: &mut Batch,
    ) -> Result<Option<Reconciled>, SyncError> {
        let entry = Entry::new(target.class, target.object)?;
        let reconciled = async {
            let volumes = self.cache.volumes_of(&target.key.class);
            let (mut volumes, new): (Vec<_>, Vec<_>) = volumes
                .into_iter()
                .partition(|cached| cached.owners.is_some());
            volumes.extend(self.with_owners(new).await?);
            if let Some(found) = self.compare(target, &volumes, batch).await? {
                self.cache.set_reconciled(target.key, found);
                return Ok(Some(found));
            }
            // Pods may have ended since their owners were read.
            let volumes = self.with_owners(volumes).await?;
            self.write_from(target, &volumes, None, batch).await
        };
        match reconciled.await {
            Err(error) if error.is_awaited() => Ok(None),
            reconciled => reconciled.map_err(|error| entry.error(error)),
        }
    }

    /// Compares a Secret with the content of some volumes, which are not read again if neither they
    /// nor the class have changed. Returns `None` if something is to be written, or may be.
    async fn compare(
        &self,
        target: Target<'_>,
        volumes: &[CachedVolume],
        batch: &mut Batch,
    ) -> Result<Option<Reconciled>, SyncError> {
        let owners = owners(volumes);
        if let Some((digest, stamp)) = self.remembered(target, volumes).await? {
            let desired = target.desired(Data::Digest(digest), stamp, &owners);
            return self.cluster.check_secret(&desired).await;
        }
        let Some((data, stamp)) = self.compute(target, volumes, None, batch).await? else {
            return Ok(None);
        };
        let desired = target.desired(Data::Values(&data), stamp, &owners);
        let found = self.cluster.check_secret(&desired).await?;
        if found.is_none() {
            batch.put_back(&target.key.name, data);
        }
        Ok(found)
    }

    /// Writes a Secret from the newest content of some volumes.
    async fn write_from(
        &self,
        target: Target<'_>,
        volumes: &[CachedVolume],
        pending: Option<&Record>,
        batch: &mut Batch,
    ) -> Result<Option<Reconciled>, SyncError> {
        let computed = self.compute(target, volumes, pending, batch).await?;
        let Some((data, stamp)) = computed else {
            return Ok(None);
        };
        let owners = owners(volumes);
        if owners.is_empty() {
            return Err(SyncError::unavailable(
                "the owners of the pods could not be determined yet; trying again",
            ));
        }
        let if_absent = if self.cache.is_left_to_others(target.key, stamp.order) {
            IfAbsent::Leave
        } else {
            IfAbsent::Create
        };
        let desired = target.desired(Data::Values(&data), stamp, &owners);
        let started = Instant::now();
        let reconciled = self.cluster.reconcile_secret(&desired, if_absent).await;
        if reconciled.as_ref().is_err_and(SyncError::is_awaited) {
            // The Secret is of a later state of the class. It is computed anew when that is known.
            self.cache.expedite_class(&target.key.class);
        }
        let reconciled = reconciled?;
        self.cache.set_reconciled(target.key, reconciled);
        let (namespace, secret) = (desired.namespace, desired.name);
        match reconciled {
            Reconciled::Absent => {
                tracing::debug!(
                    namespace,
                    secret,
                    "it is missing; a node with newer content, if there is one, creates it first"
                );
                return Ok(None);
            }
            Reconciled::Unchanged | Reconciled::Overtaken { .. } => {}
            Reconciled::Created | Reconciled::Updated | Reconciled::Recreated => {
                let class = &target.key.class.name;
                tracing::info!(namespace, secret, class, result = ?reconciled, "Secret written");
                let provider = &target.class.provider;
                self.metrics.secret_synced(provider, started.elapsed());
            }
        }
        Ok(Some(reconciled))
    }

    /// Returns the volumes whose pods still need Secrets, with the owners that those pods give them.
    async fn with_owners(
        &self,
        volumes: Vec<CachedVolume>,
    ) -> Result<Vec<CachedVolume>, SyncError> {
        let mut alive = Vec::new();
        for mut cached in volumes {
            let volume = &cached.volume;
            let owners = self.cluster.pod_owners(&volume.pod, &volume.pod_status);
            match owners.await.map_err(SyncError::unavailable)? {
                Some(owners) if !owners.pod_ended => {
                    self.cache.set_owners(&volume.id, Some(owners.clone()));
                    cached.owners = Some(owners);
                    alive.push(cached);
                }
                Some(_) => {}
                // The pod is gone, or only its pod status is.
                None => self.cache.expedite_pod_status(&cached),
            }
        }
        Ok(alive)
    }

    /// Computes the data of a Secret from the newest content of some volumes, and returns it with
    /// the age of the content. Returns `None` if no volume has content.
    async fn compute(
        &self,
        target: Target<'_>,
        volumes: &[CachedVolume],
        pending: Option<&Record>,
        batch: &mut Batch,
    ) -> Result<Option<(SecretData, Stamp)>, SyncError> {
        let name = target.key.name.as_str();
        for _ in 0..ATTEMPTS {
            let Some(content) = self.newest(target, volumes, pending).await? else {
                return Ok(None);
            };
            let (stamp, origin) = (content.stamp(), content.origin(target.class));
            let awaits = self.awaits(target, &content);
            if let Some(computed) = batch.take(name, &origin) {
                return computed
                    .map(|data| Some((data, stamp)))
                    .map_err(|error| awaited(error, awaits));
            }
            let is_versioned = content.is_versioned();
            let (class, first) = (Arc::clone(target.class), name.to_owned());
            let (records, refused) = (self.records.clone(), Arc::clone(&self.refused));
            let job = move |caller: &Caller| {
                compute(&class, &first, &content, &records, &refused, caller)
            };
            let computed = self.parsing.run(&target.key.class.namespace, job).await;
            let computed = computed
                .and_then(|read| read)
                .map_err(SyncError::unavailable)?;
            if let Some(computed) = computed {
                if is_versioned {
                    self.remember(target, &origin, &computed);
                }
                *batch = Batch::new(origin.clone(), computed);
                let computed = batch.take(name, &origin);
                let computed = computed.unwrap_or_else(|| {
                    Err(SyncError::unavailable(
                        "its data was not computed, which is a bug in the driver",
                    ))
                });
                return computed
                    .map(|data| Some((data, stamp)))
                    .map_err(|error| awaited(error, awaits));
            }
        }
        Err(SyncError::unavailable(
            "the volume kept changing while it was read; trying again",
        ))
    }

    /// Returns the digest of the data that was computed before, and the age of the content. Returns
    /// `None` if anything may have changed since.
    async fn remembered(
        &self,
        target: Target<'_>,
        volumes: &[CachedVolume],
    ) -> Result<Option<(Digest, Stamp)>, SyncError> {
        let newest = self.newest(target, volumes, None).await?;
        let Some(newest) = newest.filter(VolumeContent::is_versioned) else {
            return Ok(None);
        };
        let computed = self
            .cache
            .computed(target.key, &newest.origin(target.class));
        let digest = computed
            .transpose()
            .map_err(|error| awaited(error, self.awaits(target, &newest)))?;
        Ok(digest.map(|digest| (digest, newest.stamp())))
    }

    /// Returns whether a refresh with the present state of the class is on its way to a volume: kubelet's
    /// next look makes it.
    fn awaits(&self, target: Target<'_>, content: &VolumeContent) -> bool {
        let is_recent = |age: Duration| age < REFRESHED_WITHIN;
        self.refreshes
            && content.awaits(target.class)
            && self
                .cache
                .class_age(&target.key.class)
                .is_some_and(is_recent)
    }

    fn remember(&self, target: Target<'_>, origin: &Origin, computed: &Computed) {
        for (name, computed) in computed {
            let digest = match computed {
                Ok(data) => Ok(Data::digest(data)),
                // The next attempt may not meet this error.
                Err(error) if error.error_type() == ErrorType::Unavailable => continue,
                Err(error) => Err(error.clone()),
            };
            let key = target.key.class.secret(name);
            self.cache.set_computed(&key, origin.clone(), digest);
        }
    }

    /// Finds the newest content of some volumes. It may come at any time, so that this is the place to look that
    /// the class is not older: no Secret is made of content and class that never belonged together.
    async fn newest(
        &self,
        target: Target<'_>,
        volumes: &[CachedVolume],
        pending: Option<&Record>,
    ) -> Result<Option<VolumeContent>, SyncError> {
        let (records, pending) = (self.records.clone(), pending.cloned());
        let tmpfs = Arc::clone(&self.tmpfs);
        let volumes: Vec<Volume> = volumes.iter().map(|v| v.volume.clone()).collect();
        let newest = super::blocking(move || {
            VolumeContent::newest(&records, &tmpfs, &volumes, pending.as_ref())
        });
        let newest = newest.await.map_err(SyncError::unavailable)?;
        let is_ahead = |newest: &VolumeContent| newest.is_ahead_of(target.class);
        if newest.as_ref().is_some_and(is_ahead) {
            // The Secret may be one that the class lists no more.
            self.cache.expedite_class(&target.key.class);
            let later = "the volume has content of a later state of the class, which is read now";
            return Err(SyncError::unavailable(later).awaited());
        }
        Ok(newest)
    }
}

/// Marks the error about a missing object that a refresh is about to bring.
fn awaited(error: SyncError, awaits: bool) -> SyncError {
    match error.error_type() {
        ErrorType::ObjectNotFound if awaits => error.awaited(),
        _ => error,
    }
}

impl Target<'_> {
    fn desired<'a>(
        &'a self,
        data: Data<'a>,
        stamp: Stamp,
        owners: &'a [Owner],
    ) -> DesiredSecret<'a> {
        DesiredSecret {
            namespace: &self.key.class.namespace,
            name: &self.key.name,
            type_: &self.object.type_,
            labels: &self.object.labels,
            annotations: &self.object.annotations,
            data,
            class: &self.class.identity,
            since: stamp.since,
            order: stamp.order,
            owners,
        }
    }
}

/// Returns all owners that the pods of some volumes give their Secrets.
fn owners(volumes: &[CachedVolume]) -> Vec<Owner> {
    PodOwners::merged(volumes.iter().filter_map(|cached| cached.owners.as_ref()))
}
