//! A published volume kept fresh: the steps of a refresh, and what a failure comes to.

use std::collections::BTreeMap;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    Outcome, PublishRequest, Volumes,
    content::{Stage, commit_content, directory, refit, stage_files},
    policy::{INTERVAL, Word, is_another, sends_versions},
    threads::blocking,
    unless,
};
use crate::{
    cluster::{Class, events::Severity},
    error::{Error, Result},
    files::read,
    provider::{Reply, Urgency},
    record::{self, Age, Content, Names, Object, Record},
};

impl Volumes {
    /// Refreshes a published volume if it is due and not left alone after a failure.
    pub(super) async fn keep_fresh(
        &self,
        record: Record,
        request: &PublishRequest,
        cancelled: &CancellationToken,
    ) -> Result<Outcome> {
        if !self.policy.enabled {
            return Ok(Outcome::AlreadyPublished);
        }
        let known = self.failing.newest_class(&request.volume_id, &record.class);
        let class = unless(cancelled, self.class_since(request, &known)).await;
        if class
            .as_ref()
            .is_ok_and(|class| class.identity.age(&known) == Age::OlderContent)
        {
            tracing::warn!(
                class = request.class,
                "the API server answers with an older state of the SecretProviderClass than the driver has seen; the volume is not refreshed until the API server has caught up. If it was restored from a backup, change the class or restart the pods"
            );
            return Ok(Outcome::AlreadyPublished);
        }
        let seen = class.as_ref().ok().map(|class| &class.identity);
        let due = match &class {
            // Nothing will change before there is a class again; the volume's owner should know.
            Err(error) if error.code() == Code::NotFound => Ok(true),
            // What was mounted says when the volume is due; a class that cannot be read does not.
            _ => self
                .policy
                .due(
                    &record,
                    seen.unwrap_or(&record.class),
                    request.every,
                    self.clock.now(),
                )
                .map(|due| due.is_some()),
        };
        if let Ok(false) = due {
            return Ok(Outcome::AlreadyPublished);
        }
        if let Some(error) = self.failing.waits(&request.volume_id, seen) {
            return match self.policy.surface_errors {
                true => Err(error.not_final()),
                false => Ok(Outcome::AlreadyPublished),
            };
        }
        let seen = seen.cloned();
        let counted = self.metrics.refresh(&record.provider);
        let refreshed = match (due, class) {
            (Ok(_), Ok(class)) => self.refresh(&record, class, request, cancelled).await,
            (Err(error), _) | (_, Err(error)) => Err(error),
        };
        match refreshed {
            Ok(changed) => {
                counted.succeeded(changed);
                self.failing.succeeded(&request.volume_id);
                if let Some(times) = self.restless.refreshed(&request.volume_id, changed) {
                    self.changes_always(request, times);
                }
                // The record knows what an earlier driver has told. Where it could not be written,
                // this driver knows what it has told itself.
                let told = self.failing.told().since(&request.volume_id);
                if let Some(since) = told.or(record.failing_since) {
                    self.fresh_again(request, since).await;
                }
                Ok(Outcome::Refreshed { changed })
            }
            Err(error) if cancelled.is_cancelled() => {
                counted.not_counted();
                Err(error.not_final())
            }
            Err(error) => {
                counted.failed(error.reason().label());
                self.refresh_failed(record, seen, request, &error).await;
                match self.policy.surface_errors {
                    true => Err(error.not_final()),
                    false => Ok(Outcome::Kept(error)),
                }
            }
        }
    }

    /// Reads the class as the API server remembers it. Where that is older than what is known
    /// here, or there is none, reads it as it is now.
    async fn class_since(&self, request: &PublishRequest, known: &record::Class) -> Result<Class> {
        let (namespace, name) = (&request.pod.namespace, &request.class);
        let remembered = self.cluster.cached_class(namespace, name).await;
        let mut class = match remembered {
            Ok(class) if class.identity.age(known) == Age::Current => return Ok(class),
            Err(error) if error.code() != Code::NotFound => return Err(error),
            Ok(_) | Err(_) => self.cluster.class(namespace, name).await?,
        };
        if class.identity.age(known) == Age::OlderMetadata {
            // The same content; what is known of its annotations is newer.
            class.identity = known.clone();
        }
        Ok(class)
    }

    /// The steps of a refresh, in their order. Up to the commit of the staged files nothing that
    /// a reader sees has changed, and whatever the disk may refuse has been asked of it. Returns
    /// whether the content changed.
    async fn refresh(
        &self,
        record: &Record,
        class: Class,
        request: &PublishRequest,
        cancelled: &CancellationToken,
    ) -> Result<bool> {
        let held = refit(request, &self.tmpfs).await?;
        let sends = sends_versions(&class.identity)?;
        let reply = self
            .ask_again(record, &class, sends, request, cancelled)
            .await?;
        let staged = stage_files(
            request,
            &held,
            &self.tmpfs,
            &self.memory,
            reply.files,
            Some(record.content),
        )
        .await?;
        let versions_changed = reply.objects != record.objects;
        let now = self.clock.now();
        let changed = match &staged {
            Stage::Files(..) | Stage::TakenOver => true,
            Stage::Unchanged => false,
            Stage::OfProvider => versions_changed,
        };
        // The store may have gone back to what this volume has held all the time.
        let (namespace, name) = (&request.pod.namespace, &class.identity.name);
        let renews = !changed && self.sync.was_overtaken(namespace, name);
        let mut fresh = Record {
            class: class.identity.clone(),
            provider: class.provider.clone(),
            objects: reply.objects,
            content: staged.content(),
            last_success: now,
            last_change: if changed { now } else { record.last_change },
            failing_since: None,
            ..record.clone()
        };
        let place_before = match changed {
            true => Some(self.stage_record(record).await?),
            false => None,
        };
        let place = self.stage_record(&fresh).await?;
        if changed || versions_changed || renews {
            let gets_order = (changed || renews).then_some(now);
            let written = self
                .write_pod_status(
                    request,
                    &fresh.objects,
                    gets_order,
                    Some(&record.pod_status),
                )
                .await?;
            fresh.pod_status = written.name;
            if let Some(place) = place_before {
                staged.order(&mut fresh, written.resource_version);
                // Before the swap: whatever stops the driver between the two, the content that
                // is found later has the order that belongs to it.
                let before = Record {
                    pod_status: fresh.pod_status.clone(),
                    orders: fresh.orders.clone(),
                    ..record.clone()
                };
                self.commit_record(place, before).await?;
            } else if renews && !written.resource_version.is_empty() {
                let name = directory(request, &held, fresh.content).await?;
                fresh.orders = BTreeMap::from([(name, written.resource_version)]);
            }
        } else {
            self.keep_pod_status(request, record).await;
        }
        let new = staged.new_directory();
        commit_content(request, &held, &self.tmpfs, &self.memory, staged).await?;
        if let Some(new) = new {
            fresh.orders.retain(|other, _| *other == new);
        }
        fresh.files = self.names(request, sends).await;
        self.metrics
            .success(&class.provider, &record.volume_id, now);
        if let Err(error) = self.commit_record(place, fresh.clone()).await {
            // The volume is fresh all the same, and its Secrets must follow. The record from
            // before makes the next look another refresh, which tries to write it again.
            tracing::warn!(%error, "the volume was refreshed, but its record could not be written");
        }
        if changed || renews || class.identity != record.class {
            // The volume is fresh and recorded, and its pod runs. The pod has been told of a Secret
            // that is not in step, which is tried again without the provider.
            if let Err(error) = self.sync.volume_mounted(&fresh, &class).await {
                tracing::debug!(%error, "the volume was refreshed, but not all of its Secrets were written");
            }
        }
        Ok(changed)
    }

    /// Asks the provider of a published volume. Where the class wants that, and the content is whole
    /// and of this class, the provider is told which versions are mounted. Some providers need more
    /// rights for that, or go wrong by it, so that it is asked once more without when it fails.
    async fn ask_again(
        &self,
        record: &Record,
        class: &Class,
        sends: bool,
        request: &PublishRequest,
        cancelled: &CancellationToken,
    ) -> Result<Reply> {
        let mut versions: &[Object] = &[];
        if !is_another(&record.class, &class.identity)
            && record.files.is_some()
            && self.names(request, sends).await == record.files
        {
            versions = &record.objects;
        }
        let ask = self.ask_provider(request, class, versions, Urgency::Refresh);
        let reply = self.while_wanted(&request.pod, cancelled, ask).await;
        if versions.is_empty() {
            return reply;
        }
        let mounted = record.files.as_ref().map_or(0, |names| names.files);
        match &reply {
            Err(error) => {
                tracing::info!(%error, "the provider failed after it was told which versions are mounted; asking it again without them");
            }
            // It left out what it takes for mounted, and a volume holds what an answer holds.
            Ok(reply) if record.content == Content::Driver && reply.files.len() < mounted => {
                tracing::info!(
                    "the provider answered with fewer files than are mounted after it was told which versions are; asking it again without them"
                );
            }
            Ok(_) => return reply,
        }
        // An answer holds memory until it is dropped.
        drop(reply);
        let ask = self.ask_provider(request, class, &[], Urgency::Refresh);
        self.while_wanted(&request.pod, cancelled, ask).await
    }

    /// Reads the names of the files of a volume whose class wants versions to be sent. None also
    /// when they cannot be read, so that none are sent.
    pub(super) async fn names(&self, request: &PublishRequest, sends: bool) -> Option<Names> {
        if !sends {
            return None;
        }
        let volume = request.target.as_path().to_owned();
        let names = blocking(move || read::all_names(&volume)).await;
        names
            .inspect_err(|error| tracing::debug!(%error, "no versions are sent to the provider"))
            .map(|(files, digest)| Names { files, digest })
            .ok()
    }

    /// Makes sure of the pod status when there is nothing new to say in it. The volume is fresh
    /// without it, and it is looked at again.
    async fn keep_pod_status(&self, request: &PublishRequest, record: &Record) {
        let mounted = self.mounted(request, &record.objects, None);
        let name = &record.pod_status;
        match self.cluster.keep_pod_status(&mounted, name).await {
            Ok(false) => {}
            Ok(true) => self
                .sync
                .pod_status_is_new(&request.pod, &request.volume_id),
            Err(error) => tracing::debug!(%error, "trying again"),
        }
    }

    /// Says to whoever runs the pod that each refresh changes the content of its volume.
    fn changes_always(&self, request: &PublishRequest, times: u32) {
        let restless = self.restless.clone();
        let volume_id = request.volume_id.clone();
        let untold = move |posted: bool| {
            if !posted {
                restless.untold(&volume_id);
            }
        };
        let accepted = self.cluster.announce(&request.pod, Severity::Warning, "MountChangesAtEachRefresh", &format!(
            "each of the last {times} refreshes changed the volume of SecretProviderClass {}. If its objects do not change that often, one of them holds something that the store makes anew for each request: name the field that is wanted (Vault and OpenBao: without secretKey an object is the whole answer, with its request ID), or set the annotation {INTERVAL} of the class to a longer time",
            request.class
        ), untold);
        if !accepted {
            self.restless.untold(&request.volume_id);
        }
    }

    /// Says to whoever runs the pod that the failures are over. When that cannot be said now, the
    /// record remembers it for the next refresh.
    async fn fresh_again(&self, request: &PublishRequest, since: Timestamp) {
        let announced = self.cluster.announce(&request.pod, Severity::Normal, "MountRotationComplete", &format!(
            "the volume of SecretProviderClass {} is fresh again; refreshes had failed since {since:.0}",
            request.class
        ), self.when_posted(request, since, Word::Complete));
        if announced {
            return;
        }
        self.failing
            .told()
            .ended(&request.volume_id, since, Word::Complete, false);
        let (records, volume_id) = (self.records.clone(), request.volume_id.clone());
        let remembered = blocking(move || {
            let Some(mut record) = records.get(&volume_id) else {
                return Ok(());
            };
            record.failing_since = Some(since);
            records.put(&record)
        });
        if let Err(error) = remembered.await {
            tracing::warn!(%error, "the record could not be written, so no event will report the end of this failure");
        }
    }

    /// Notes what the pod is being told of failures that began at `since`. Returns what is to be
    /// called when posting it has ended.
    fn when_posted(
        &self,
        request: &PublishRequest,
        since: Timestamp,
        word: Word,
    ) -> impl FnOnce(bool) + Send + 'static {
        let (told, volume_id) = (self.failing.told().clone(), request.volume_id.clone());
        told.says(&volume_id, since, word);
        move |posted| told.ended(&volume_id, since, word, posted)
    }

    /// Leaves a volume alone for a while, and says so once to whoever runs its pod.
    async fn refresh_failed(
        &self,
        record: Record,
        class: Option<record::Class>,
        request: &PublishRequest,
        error: &Error,
    ) {
        let wait = self
            .failing
            .failed(&request.volume_id, class, error, &self.policy);
        tracing::warn!(%error, again_in_seconds = wait.as_secs(), "the refresh failed; the volume keeps what it holds");
        let told = self.failing.told().since(&request.volume_id);
        // What an earlier driver has recorded may not have been posted before it ended. So each
        // driver tells it once: an event more is better than none.
        let since = told
            .or(record.failing_since)
            .unwrap_or_else(|| self.clock.now());
        if told.is_none() {
            let announced = self.cluster.announce(&request.pod, Severity::Warning, "MountRotationFailed", &format!(
                "the volume of SecretProviderClass {} keeps the content of {:.0} because it cannot be refreshed: {error}",
                request.class, record.last_success
            ), self.when_posted(request, since, Word::Failed));
            if !announced {
                // The next failure is.
                self.failing
                    .told()
                    .ended(&request.volume_id, since, Word::Failed, false);
                return;
            }
        }
        if record.failing_since.is_some() {
            return;
        }
        // Where the disk did not take it, the next failure tries again.
        let failing = Record {
            failing_since: Some(since),
            ..record
        };
        if let Err(error) = self.write_record(failing).await {
            tracing::warn!(%error, "the record could not be written; if the driver restarts, no event may report the end of this failure");
        }
    }
}
