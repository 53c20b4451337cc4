//! The one door to what the volumes of this node hold.
//!
//! A volume has content for its readers when all of these are so, and at no other time:
//!
//! - it is recorded, so that its publish has come to its end, or is the one that is at its last
//!   step just now and says so itself; and the record is that of this pod at this place;
//! - a tmpfs is mounted at its target;
//! - the content is complete: `..data` leads to a directory, or there are the files that a
//!   provider has written itself.
//!
//! A directory on which nothing is mounted, as after a reboot of the node, and a tmpfs that is
//! being filled hold nothing. That is no trouble of anybody's, and nothing is said about it.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use jiff::Timestamp;

use super::Volume;
use crate::{
    files::{read, swap},
    mount::{self, State},
    volume::record::{Content, Record, Records},
};

/// Which of several contents is the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    /// The resource version of the pod status that was written with it, if that is a number.
    pub(super) order: Option<u64>,
    /// When it came into its volume, by the node's clock.
    pub(super) since: Timestamp,
}

impl Stamp {
    pub(super) fn is_newer_than(&self, other: &Self) -> bool {
        match (self.order, other.order) {
            (Some(ours), Some(theirs)) => (ours, self.since) > (theirs, other.since),
            _ => self.since > other.since,
        }
    }
}

/// The content that a volume has.
pub(super) struct Held {
    pub(super) volume: Volume,
    target: PathBuf,
    content: Content,
    version: read::Version,
    orders: BTreeMap<String, String>,
    /// Whether the record is still in memory only.
    is_pending: bool,
}

impl Held {
    /// Finds the content of a volume, if it has any. `pending` is the record of a publish that is
    /// at its last step.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn find(
        records: &Records,
        volume: &Volume,
        pending: Option<&Record>,
    ) -> io::Result<Option<Self>> {
        let pending = pending.filter(|record| record.volume_id == volume.id);
        let record = match pending {
            Some(record) => Some(record.clone()),
            None => records.get(&volume.id),
        };
        let is_of = |record: &Record| {
            record.target_path == volume.target && record.pod.uid == volume.pod.uid
        };
        let Some(record) = record.filter(is_of) else {
            return Ok(None);
        };
        if !is_complete(&volume.target, record.content)? {
            return Ok(None);
        }
        Ok(Some(Self {
            version: version(&volume.target, record.content)?,
            volume: volume.clone(),
            target: record.target_path,
            content: record.content,
            orders: record.orders,
            is_pending: pending.is_some(),
        }))
    }

    /// Reads the files whose path `wanted` says yes to, up to a number of bytes. None when the content has been replaced or
    /// taken down since it was found; finding it again helps.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn read(
        &self,
        records: &Records,
        most_bytes: u64,
        wanted: impl Fn(&str) -> bool,
    ) -> io::Result<Option<read::Snapshot>> {
        let snapshot = match read::snapshot(&self.target, most_bytes, wanted) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            snapshot => snapshot?,
        };
        // A volume that is taken down loses its record first, then its files one by one.
        let still = is_complete(&self.target, self.content)?
            && version(&self.target, self.content)? == self.version
            && (self.content == Content::Provider || snapshot.version == self.version)
            && (self.is_pending || records.get(&self.volume.id).is_some());
        Ok(still.then_some(snapshot))
    }

    /// When this content came, among all of them.
    pub(super) fn stamp(&self) -> Stamp {
        let order = self.orders.get(&self.version.directory);
        Stamp {
            order: order.and_then(|order| order.parse().ok()),
            since: self.version.since,
        }
    }
}

/// Whether a tmpfs is mounted there with whatever makes its content complete.
fn is_complete(target: &Path, content: Content) -> io::Result<bool> {
    if mount::state(target)? != State::Mounted {
        return Ok(false);
    }
    match content {
        Content::Driver => swap::is_complete(target),
        Content::Provider => Ok(!swap::is_empty(target)?),
    }
}

/// Which content it is. What a provider has written itself has one name, whatever lies there.
fn version(target: &Path, content: Content) -> io::Result<read::Version> {
    let version = read::version(target)?;
    Ok(match content {
        Content::Driver => version,
        Content::Provider => read::Version {
            directory: String::new(),
            ..version
        },
    })
}
