//! Writes down what a volume holds: in its record on the node, and in its pod status.

use std::io;

use tonic::Code;

use super::{PublishRequest, Volumes, threads::blocking};
use crate::{
    cluster::pod_status::{DesiredPodStatus, NewOrder, Written},
    error::{Error, Result},
    record::{Object, Record, Records, StagedRecord},
};

impl Volumes {
    /// Takes the room for a record, before anything is done that could not be recorded.
    pub(super) async fn stage_record(&self, record: &Record) -> Result<StagedRecord> {
        let (records, copy) = (self.records.clone(), record.clone());
        blocking(move || records.stage(&copy))
            .await
            .map_err(|error| not_recorded(&self.records, record, &error))
    }

    /// Makes a record valid, and with it the volume a published one.
    pub(super) async fn commit_record(&self, staged: StagedRecord, record: Record) -> Result<()> {
        let copy = record.clone();
        blocking(move || staged.commit(&copy))
            .await
            .map_err(|error| not_recorded(&self.records, &record, &error))
    }

    /// Replaces the record of a volume.
    pub(super) async fn write_record(&self, record: Record) -> Result<()> {
        let staged = self.stage_record(&record).await?;
        self.commit_record(staged, record).await
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
        let desired = DesiredPodStatus {
            volume_id: &request.volume_id,
            pod: &request.pod,
            class: &request.class,
            target_path: request.target.as_str(),
            node: &self.node,
            objects,
            new_order,
        };
        self.cluster.write_pod_status(&desired, before).await
    }
}

/// Returns the error of a record that could not be written.
pub(super) fn not_recorded(records: &Records, record: &Record, error: &io::Error) -> Error {
    let code = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::ResourceExhausted,
        _ => Code::Internal,
    };
    Error::new(
        code,
        format!(
            "failed to record the volume of pod {} on the node's disk, in {}: {error}",
            record.pod,
            records.directory().display()
        ),
    )
}
