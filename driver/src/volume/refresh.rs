//! A published volume kept fresh: the steps of a refresh, and what a failure comes to.

use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    Outcome, PublishRequest, Volumes,
    content::{Stage, commit_files, stage_files},
    record::{self, Record},
    unless,
};
use crate::{
    cluster::{Class, events::Severity},
    error::{Error, Result},
    provider::Urgency,
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
        let reading = self
            .cluster
            .remembered_class(&request.pod.namespace, &request.class);
        let class = unless(cancelled, reading).await;
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
                self.failing.forget(&request.volume_id);
                if let Some(since) = record.failing_since {
                    self.cluster.announce(&request.pod, Severity::Normal, "MountRotationComplete", &format!(
                        "the volume of SecretProviderClass {} is fresh again; refreshes had failed since {since:.0}",
                        request.class
                    ));
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

    /// The steps of a refresh, in their order. Up to the commit of the staged files nothing that
    /// a reader sees has changed. Returns whether the content changed.
    async fn refresh(
        &self,
        record: &Record,
        class: Class,
        request: &PublishRequest,
        cancelled: &CancellationToken,
    ) -> Result<bool> {
        let ask = self.ask_provider(request, &class, &record.objects, Urgency::Refresh);
        let reply = unless(cancelled, ask).await?;
        let staged = stage_files(request, reply.files, Some(record.content)).await?;
        let versions_changed = reply.objects != record.objects;
        let now = self.clock.now();
        let changed = match &staged {
            Stage::Files(_) => true,
            Stage::Unchanged => false,
            Stage::OfProvider => versions_changed,
        };
        let mut record = record.clone();
        if changed || versions_changed {
            let written = self
                .write_pod_status(request, &reply.objects, changed.then_some(now))
                .await?;
            record.pod_status = written.name;
            if changed {
                staged.order(&mut record, written.resource_version);
                // Before the swap: whatever stops the driver between the two, the content that
                // is found later has the order that belongs to it.
                self.commit(record.clone()).await?;
            }
        }
        if let Stage::Files(staged) = staged {
            let directory = staged.directory().to_owned();
            commit_files(request, staged).await?;
            record.orders.retain(|other, _| *other == directory);
        }
        self.metrics.success(&class.provider, now);
        let identity = class.identity.clone();
        let class_changed = class.identity != record.class;
        let pod_status = record.pod_status.clone();
        self.commit(Record {
            class: identity,
            provider: class.provider.clone(),
            objects: reply.objects,
            last_success: now,
            last_change: if changed { now } else { record.last_change },
            failing_since: None,
            ..record
        })
        .await?;
        if changed || class_changed {
            // The volume is fresh and recorded, and its pod runs. The pod has been told of a Secret
            // that is not in step, which is tried again without the provider.
            if let Err(error) = self.sync_secrets(request, &pod_status, &class).await {
                tracing::debug!(%error, "refreshed, but for its Secrets");
            }
        }
        Ok(changed)
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
        if record.failing_since.is_some() {
            return;
        }
        self.cluster.announce(&request.pod, Severity::Warning, "MountRotationFailed", &format!(
            "the volume of SecretProviderClass {} keeps the content of {:.0} because it cannot be refreshed: {error}",
            request.class, record.last_success
        ));
        let failing = Record {
            failing_since: Some(self.clock.now()),
            ..record
        };
        if let Err(error) = self.commit(failing).await {
            tracing::warn!(%error, "after a restart of the driver this failure will be announced again");
        }
    }
}
