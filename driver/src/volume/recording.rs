//! Writes down what a volume holds: in its record on the node, and in its pod status.

use std::io;

use tonic::Code;

use super::{PublishRequest, Volumes, threads::blocking};
use crate::{
    cluster::pod_status::{DesiredPodStatus, NewOrder, Written},
    error::{Error, Result},
    record::{Object, Record, StagedRecord},
};

impl Volumes {
    /// Takes the room for a record, before anything is done that could not be recorded.
    pub(super) async fn stage_record(&self, record: &Record) -> Result<StagedRecord> {
        let (records, copy) = (self.records.clone(), record.clone());
        blocking(move || records.stage(&copy))
            .await
            .map_err(|error| self.not_recorded(record, &error))
    }

    /// Makes a record valid, and with it the volume a published one.
    pub(super) async fn commit_record(&self, staged: StagedRecord, record: Record) -> Result<()> {
        let copy = record.clone();
        blocking(move || staged.commit(&copy))
            .await
            .map_err(|error| self.not_recorded(&record, &error))
    }

    /// Replaces the record of a volume.
    pub(super) async fn write_record(&self, record: Record) -> Result<()> {
        let staged = self.stage_record(&record).await?;
        self.commit_record(staged, record).await
    }

    fn not_recorded(&self, record: &Record, error: &io::Error) -> Error {
        let code = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::ResourceExhausted,
            _ => Code::Internal,
        };
        Error::new(
            code,
            format!(
                "failed to record the volume of pod {} on the node's disk, in {}: {error}",
                record.pod,
                self.records.directory().display()
            ),
        )
    }

    /// Writes the pod status of a volume. `new_order` says that the content gets a new order, and why.
    /// `before` is the name of the present pod status.
    pub(super) async fn write_pod_status(
        &self,
        request: &PublishRequest,
        objects: &[Object],
        new_order: Option<NewOrder>,
        before: Option<&str>,
    ) -> Result<Written> {
        let desired = self.desired_pod_status(request, objects, new_order);
        self.cluster.write_pod_status(&desired, before).await
    }

    fn desired_pod_status<'a>(
        &'a self,
        request: &'a PublishRequest,
        objects: &'a [Object],
        new_order: Option<NewOrder>,
    ) -> DesiredPodStatus<'a> {
        DesiredPodStatus {
            volume_id: &request.volume_id,
            pod: &request.pod,
            class: &request.class,
            target_path: request.target.as_str(),
            node: &self.node,
            objects,
            new_order,
        }
    }

    /// Makes sure that the pod status exists, when there is nothing new to write into it. A failure
    /// is only logged: the volume is fresh all the same, and the next refresh tries again.
    pub(super) async fn keep_pod_status(&self, request: &PublishRequest, record: &Record) {
        let objects = record.told_objects();
        let desired = self.desired_pod_status(request, &objects, None);
        let name = &record.pod_status;
        match self.cluster.keep_pod_status(&desired, name).await {
            Ok(false) => {}
            Ok(true) => self
                .sync
                .pod_status_is_new(&request.pod, &request.volume_id),
            Err(error) => tracing::debug!(%error, "trying again"),
        }
    }
}
