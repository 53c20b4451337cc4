//! Adopts volumes that another driver has published beside this one, as the old driver does during an update that
//! starts the new one first: the records tell of them. Without this, their Secrets would be kept, and metrics would
//! count them, only from their next change on.

use std::{collections::HashSet, io, sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{
    memory::Memory,
    metrics::Metrics,
    record::{Record, Records, Writer},
    sync::SecretSync,
};

/// Finds the volumes that are published and not known.
pub struct Adoption {
    /// The records of all volumes.
    pub records: Records,
    /// Knows the volumes whose Secrets are kept.
    pub sync: Arc<SecretSync>,
    /// Knows what volumes take.
    pub memory: Arc<Memory>,
    /// Counts volumes.
    pub metrics: Metrics,
}

impl Adoption {
    /// Looks once in an interval until `stop`.
    ///
    /// A volume is adopted with the second look that finds it: with the first one it may be about to be published
    /// or unpublished here.
    pub async fn run(self, interval: Duration, stop: CancellationToken) {
        let this = Arc::new(self);
        let mut before = HashSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(interval) => {}
            }
            let looking = Arc::clone(&this);
            let found = tokio::task::spawn_blocking(move || looking.look(&before));
            before = match found.await {
                Ok(Ok(unknown)) => unknown,
                Ok(Err(error)) => {
                    tracing::debug!(%error, "the records could not be listed; trying again");
                    HashSet::new()
                }
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            };
        }
    }

    /// Adopts the unknown volumes among those of the look before. Returns the other unknown ones. May block.
    fn look(&self, before: &HashSet<String>) -> io::Result<HashSet<String>> {
        let mut unknown = HashSet::new();
        let is_known = |volume_id: &str| self.sync.knows(volume_id);
        self.records.each_other(is_known, |record| {
            if before.contains(&record.volume_id) {
                self.adopt(&record);
            } else {
                unknown.insert(record.volume_id);
            }
        })?;
        Ok(unknown)
    }

    fn adopt(&self, record: &Record) {
        let volume_id = &record.volume_id;
        tracing::info!(volume_id, pod = %record.pod, "another driver has published this volume; it is kept here from now on");
        self.metrics
            .success(&record.provider, volume_id, record.last_success);
        self.metrics.volume_fresh(volume_id, record.is_fresh());
        let is_charged = record.writer == Writer::Driver;
        self.memory
            .found(&record.target_path, &record.pod.namespace, is_charged);
        self.sync.volume_found(record);
    }
}
