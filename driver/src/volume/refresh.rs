//! Refreshes a published volume, and reports failures to its pod.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    Outcome, PublishRequest, Volumes,
    ask::unless,
    content::Stage,
    failing::Notice,
    lasting::FAILED,
    looks::freshness,
    policy::{INTERVAL, check_switches, sends_versions},
    threads::blocking,
    unchanged::Evidence,
};
use crate::{
    cluster::{
        Class,
        events::Severity,
        pod_status::{Aspect, Cause, NewOrder, StatusOf, Trouble},
    },
    config::RepublishErrors,
    error::{Error, Result},
    record::{Age, ClassState, Record, StagedRecord},
};

/// The reason of the event about content that changes at each refresh.
const RESTLESS: &str = "MountChangesAtEachRefresh";

impl Volumes {
    /// Refreshes a published volume, if it is due and not left alone after a failure. The look is the time
    /// since kubelet's last one at the volume, and what this one found on the node.
    pub(super) async fn keep_fresh(
        &self,
        record: Record,
        (since_last, evidence): (Option<Duration>, Option<Evidence>),
        request: &PublishRequest,
        cancelled: &CancellationToken,
    ) -> Result<Outcome> {
        if !self.policy.enabled {
            self.remember_look(request, &record, evidence, None);
            return Ok(Outcome::AlreadyPublished);
        }
        let known = self.failing.newest_class(&request.volume_id, &record.class);
        let freshness = freshness(since_last, self.between_reads(&known, request));
        let class = self.class_for_look(&record, request, &known, freshness);
        let class = unless(cancelled, class).await;
        if class
            .as_ref()
            .is_ok_and(|class| class.identity.age(&known) == Age::OlderContent)
        {
            tracing::warn!(
                class = request.class,
                "the API server answers with an older state of the SecretProviderClass than the driver has seen; the volume is not refreshed until the API server has caught up. If it was restored from a backup, change the class or replace the pods"
            );
            return Ok(Outcome::AlreadyPublished);
        }
        let due = self.is_due(&record, &class, request);
        if let Ok(false) = due {
            if let Ok(class) = &class {
                self.end_failures(&record, request).await;
                self.remember_look(request, &record, evidence, Some(&class.identity));
            }
            return Ok(Outcome::AlreadyPublished);
        }
        let seen = class.as_ref().ok().map(|class| &class.identity);
        if let Some(error) = self.failing.waits(&request.volume_id, seen) {
            self.repeat_failure(&record, request, &error);
            return match self.policy.errors {
                RepublishErrors::Surface => Err(error.not_final()),
                RepublishErrors::Mask => Ok(Outcome::AlreadyPublished),
            };
        }
        let seen = seen.cloned();
        let counted = self.metrics.refresh(&record.provider);
        let refreshed = match (due, class) {
            (Ok(_), Ok(class)) => self.refresh(&record, class, request, cancelled).await,
            (Err(error), _) | (_, Err(error)) => Err(error),
        };
        match refreshed {
            Ok(fresh) => {
                let changed = fresh.last_change != record.last_change;
                if changed {
                    let same_versions = fresh.objects == record.objects;
                    self.content_changed(request, fresh.last_change, same_versions);
                }
                self.tell_of_changes(request);
                let status = status_of(&fresh);
                self.cluster.set_trouble(status, Aspect::Freshness, None);
                counted.succeeded(changed);
                self.refresh_succeeded(&record, request, changed).await;
                if changed {
                    self.tell_of_sub_paths(request).await;
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
                match self.policy.errors {
                    RepublishErrors::Surface => Err(error.not_final()),
                    RepublishErrors::Mask => Ok(Outcome::Kept(error)),
                }
            }
        }
    }

    /// Returns whether a volume is due. `class` is its class as it was just read.
    ///
    /// # Errors
    /// The class has a value that is wrong.
    fn is_due(
        &self,
        record: &Record,
        class: &Result<Arc<Class>>,
        request: &PublishRequest,
    ) -> Result<bool> {
        let class = match class {
            Ok(class) => &class.identity,
            // Nothing changes before the class exists again, and the pod should be told.
            Err(error) if error.code() == Code::NotFound => return Ok(true),
            // A class that cannot be read does not make a volume due; the recorded one may.
            Err(_) => &record.class,
        };
        let now = self.clock.now();
        let due = self.policy.due(record, class, request.every, now)?;
        Ok(due.is_some())
    }

    /// Carries out the steps of a refresh, in their order. Until the staged files are committed,
    /// nothing that a reader sees changes; before that, the records have got their room on the disk.
    /// Returns the new record, whose last change is a new one if the content changed.
    async fn refresh(
        &self,
        record: &Record,
        class: Arc<Class>,
        request: &PublishRequest,
        cancelled: &CancellationToken,
    ) -> Result<Record> {
        let class = unless(cancelled, self.with_parameters(class, request)).await?;
        let mount = self.refit(request).await?;
        let sends_versions = sends_versions(&class.identity)?;
        check_switches(&class.identity)?;
        let reply = self
            .ask_again(record, &class, sends_versions, request, cancelled)
            .await?;
        let staged = self
            .stage_files(request, &mount, reply.files, Some(record.writer))
            .await?;
        let versions_changed = reply.objects != record.objects;
        let now = self.clock.now();
        let changed = match &staged {
            Stage::Files(..) | Stage::TakenOver => true,
            Stage::Unchanged => false,
            Stage::OfProvider => versions_changed,
        };
        // Another volume got newer content, and the store has gone back to the content of this one:
        // then this content needs a new order.
        let (namespace, name) = (&request.pod.namespace, &class.identity.name);
        let renews = !changed && self.sync.was_overtaken(namespace, name);
        let mut fresh = Record {
            class: class.identity.clone(),
            provider: class.provider.clone(),
            objects: reply.objects,
            changes_of_versions: match (versions_changed, changed) {
                (true, _) => 0,
                (false, true) => record.changes_of_versions.saturating_add(1),
                (false, false) => record.changes_of_versions,
            },
            writer: staged.writer(),
            last_success: now,
            last_change: if changed { now } else { record.last_change },
            failing_since: None,
            coming: None,
            ..record.clone()
        };
        let staged_before = if changed {
            let before = Record {
                coming: staged.coming(&class.identity),
                ..record.clone()
            };
            Some((self.stage_record(&before).await?, before))
        } else {
            None
        };
        let staged_record = self.stage_record(&fresh).await?;
        if changed || versions_changed || renews {
            let new_order = match (changed, renews) {
                (true, _) => Some(NewOrder::Changed(now)),
                (false, true) => Some(NewOrder::Confirmed),
                (false, false) => None,
            };
            let before = Some(record.pod_status.as_str());
            let written = self
                .write_pod_status(request, &fresh.told_objects(), new_order, before)
                .await?;
            fresh.pod_status = written.name;
            if let Some((staged_before, before)) = staged_before {
                staged.order(&mut fresh, written.resource_version);
                // Before the swap: if the driver stops between the two, the content that is found
                // later has the order that belongs to it, and the next change another number than
                // the one that the pod status has.
                let before = Record {
                    pod_status: fresh.pod_status.clone(),
                    changes_of_versions: fresh.changes_of_versions,
                    orders: fresh.orders.clone(),
                    ..before
                };
                if let Err(error) = self.commit_record(staged_before, before).await {
                    self.tell_former(request, record, &fresh.pod_status).await;
                    return Err(error);
                }
            } else if renews && !written.resource_version.is_empty() {
                let name = self.directory(request, &mount, fresh.writer).await?;
                fresh.orders = BTreeMap::from([(name, written.resource_version)]);
            }
        }
        let new = staged.new_directory();
        if let Err(error) = self.commit_content(request, &mount, staged).await {
            let present = self.directory(request, &mount, fresh.writer).await;
            if new.is_some() && present.ok() != new {
                self.tell_former(request, record, &fresh.pod_status).await;
            }
            return Err(error);
        }
        if let Some(new) = new {
            fresh.orders.retain(|other, _| *other == new);
        }
        fresh.files = self.names(request, sends_versions).await;
        self.record_refresh(staged_record, &fresh).await;
        self.correct_pod_status(request, &fresh).await;
        if changed || renews || class.identity != record.class {
            // The refresh has succeeded. Sync has told the pod of a Secret that could not be written,
            // and writes it again without the provider.
            if let Err(error) = self.sync.volume_mounted(&fresh, &class).await {
                tracing::debug!(%error, "the volume was refreshed, but not all of its Secrets were written");
            }
        }
        Ok(fresh)
    }

    /// Writes the objects of the record into the pod status again, because the volume has kept its former content.
    async fn tell_former(&self, request: &PublishRequest, record: &Record, name: &str) {
        let objects = record.told_objects();
        let written = self
            .write_pod_status(request, &objects, None, Some(name))
            .await;
        if let Err(error) = written {
            tracing::debug!(%error, "the pod status names objects that are not mounted until the next refresh that succeeds");
        }
    }

    /// Writes the pod status again if it was missing during the refresh and a check has written it, with the
    /// versions of the record from before.
    async fn correct_pod_status(&self, request: &PublishRequest, fresh: &Record) {
        if !self.sync.take_status_written(&request.volume_id) {
            return;
        }
        let before = Some(fresh.pod_status.as_str());
        let objects = fresh.told_objects();
        let written = self.write_pod_status(request, &objects, None, before).await;
        if let Err(error) = written {
            tracing::debug!(%error, "the next refresh tries again");
            self.sync.status_may_be_old(&request.volume_id);
        }
    }

    /// Records a refresh whose content is in place. If the record cannot be written, the volume is
    /// fresh all the same, and its Secrets must follow; with the old record the next publish refreshes
    /// the volume again, and tries to write the record again.
    async fn record_refresh(&self, staged: StagedRecord, fresh: &Record) {
        self.metrics
            .success(&fresh.provider, &fresh.volume_id, fresh.last_success);
        if let Err(error) = self.commit_record(staged, fresh.clone()).await {
            tracing::warn!(%error, "the volume was refreshed, but its record could not be written");
        }
    }

    /// Ends the pause after earlier failures, and announces on the pod what the refresh has shown.
    async fn refresh_succeeded(&self, record: &Record, request: &PublishRequest, changed: bool) {
        self.failing.succeeded(&request.volume_id);
        self.lasting.over(&request.volume_id, FAILED);
        self.metrics.volume_fresh(&request.volume_id, true);
        if let Some(times) = self.restless.refreshed(&request.volume_id, changed) {
            self.announce_changes(request, times);
        } else if changed && self.restless.is_told(&request.volume_id) {
            self.repeat(request, Severity::Warning, RESTLESS, None);
        }
        // The record says what an earlier driver has told, or this one, unless the record could not be
        // written.
        let told = self.failing.notices().failing_since(&request.volume_id);
        if let Some(since) = told.or(record.failing_since) {
            self.announce_recovery(request, since).await;
        }
    }

    /// Ends the trouble that refreshes of a volume had before it was published anew, after a reboot for
    /// example. Nothing else would end it before the next refresh, which a class may want an hour later.
    pub(super) async fn publish_succeeded(
        &self,
        request: &PublishRequest,
        earlier: Option<&Record>,
        pod_status: &str,
    ) {
        let volume_id = &request.volume_id;
        self.failing.succeeded(volume_id);
        self.lasting.over(volume_id, FAILED);
        self.metrics.volume_fresh(volume_id, true);
        let status = StatusOf {
            volume_id,
            pod: &request.pod,
            name: pod_status,
        };
        self.cluster.set_trouble(status, Aspect::Freshness, None);
        let told = self.failing.notices().failing_since(volume_id);
        if let Some(since) = told.or(earlier.and_then(|earlier| earlier.failing_since)) {
            self.announce_recovery(request, since).await;
        }
    }

    /// Ends the trouble of a volume that needs no refresh although the last one here has failed: another driver beside
    /// this one has refreshed it since. Nothing else would end it before the next refresh.
    async fn end_failures(&self, record: &Record, request: &PublishRequest) {
        if record.is_fresh() && self.failing.has_failed(&request.volume_id) {
            self.cluster
                .set_trouble(status_of(record), Aspect::Freshness, None);
            self.refresh_succeeded(record, request, false).await;
        }
    }

    /// Announces on the pod that each refresh changes the content of its volume.
    fn announce_changes(&self, request: &PublishRequest, times: u32) {
        let restless = self.restless.clone();
        let volume_id = request.volume_id.clone();
        let untold = move |is_posted: bool| {
            if !is_posted {
                restless.untold(&volume_id);
            }
        };
        let accepted = self.announce_lasting(request, Severity::Warning, RESTLESS, &format!(
            "each of the last {times} refreshes changed the volume of SecretProviderClass {}. If its objects do not change that often, an object contains something that differs in each answer of the store, such as a request ID. Select the field that the pod needs (Vault and OpenBao: set secretKey), or set a longer interval in the annotation {INTERVAL} of the class",
            request.class
        ), untold);
        if !accepted {
            self.restless.untold(&request.volume_id);
        }
    }

    /// Announces on the pod that the failures are over. If the event cannot be posted now, the record
    /// keeps the failure for the next refresh.
    async fn announce_recovery(&self, request: &PublishRequest, since: Timestamp) {
        let announced = self.cluster.announce(&request.pod, Severity::Normal, "MountRotationComplete", &format!(
            "the volume of SecretProviderClass {} was refreshed; before that, refreshes had failed since {since:.0}",
            request.class
        ), self.when_posted(request, since, Notice::Recovered));
        if announced {
            return;
        }
        self.failing
            .notices()
            .ended(&request.volume_id, since, Notice::Recovered, false);
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

    /// Remembers the event about failures that began at `since`. Returns the function to call when
    /// the attempt to post it has ended.
    fn when_posted(
        &self,
        request: &PublishRequest,
        since: Timestamp,
        notice: Notice,
    ) -> impl FnOnce(bool) + Send + 'static {
        let (notices, volume_id) = (self.failing.notices().clone(), request.volume_id.clone());
        notices.posting(&volume_id, since, notice);
        move |is_posted| notices.ended(&volume_id, since, notice, is_posted)
    }

    /// Leaves a volume alone for a while, and announces that once on its pod.
    async fn refresh_failed(
        &self,
        record: Record,
        class: Option<ClassState>,
        request: &PublishRequest,
        error: &Error,
    ) {
        let wait = self
            .failing
            .failed(&request.volume_id, class, error, &self.policy);
        tracing::warn!(%error, again_in_seconds = wait.as_secs(), "the refresh failed; the volume keeps what it holds");
        let told = self.failing.notices().failing_since(&request.volume_id);
        // An earlier driver may have recorded the failure and ended before its event was posted. So
        // each driver posts one: two events are better than none.
        let since = told
            .or(record.failing_since)
            .unwrap_or_else(|| self.clock.now());
        self.metrics.volume_fresh(&request.volume_id, false);
        let trouble = Trouble::new(since, [&cause(error)]);
        self.cluster
            .set_trouble(status_of(&record), Aspect::Freshness, Some(trouble));
        if told.is_some() {
            self.repeat_failure(&record, request, error);
        } else {
            let message = failure_message(&record, request, error);
            let ended = self.when_posted(request, since, Notice::Failing);
            let announced =
                self.announce_lasting(request, Severity::Warning, FAILED, &message, ended);
            if !announced {
                // The next failure announces it.
                self.failing
                    .notices()
                    .ended(&request.volume_id, since, Notice::Failing, false);
                return;
            }
        }
        if record.failing_since.is_some() {
            return;
        }
        // If the record cannot be written, the next failure tries again.
        let failing = Record {
            failing_since: Some(since),
            ..record
        };
        if let Err(error) = self.write_record(failing).await {
            tracing::warn!(%error, "the record could not be written; if the driver restarts, no event may report the end of this failure");
        }
    }

    /// Tells the pod again, if it is time, that the refreshes of its volume fail.
    fn repeat_failure(&self, record: &Record, request: &PublishRequest, error: &Error) {
        let message = failure_message(record, request, error);
        self.repeat(request, Severity::Warning, FAILED, Some(&message));
    }
}

fn failure_message(record: &Record, request: &PublishRequest, error: &Error) -> String {
    format!(
        "the volume of SecretProviderClass {} could not be refreshed and keeps the content of its last refresh or mount, {:.0}: {error}",
        request.class, record.last_success
    )
}

/// Returns the cause of trouble for the pod status. A provider may say the same in other words each time, as
/// with the ID of a request.
fn cause(error: &Error) -> Cause {
    let identity = format!("{} {:?}", error.reason().label(), error.code());
    Cause::new(&identity, &error.to_string())
}

fn status_of(record: &Record) -> StatusOf<'_> {
    StatusOf {
        volume_id: &record.volume_id,
        pod: &record.pod,
        name: &record.pod_status,
    }
}
