//! The one door to what the volumes of this node hold.
//!
//! A volume has content for its readers when all of these are so, and at no other time:
//!
//! - it is recorded, so that its publish has come to its end, or is the one that is at its last
//!   step just now and says so itself; and the record is that of this pod at this place;
//! - what is mounted at its target is a volume of this driver or an earlier one, and not something
//!   that another program has mounted there or over it;
//! - the content is complete: `..data` leads to a directory, or there are the files that a
//!   provider has written itself.
//!
//! A directory on which nothing is mounted, as after a reboot of the node, and a tmpfs that is
//! being filled hold nothing. That is no trouble of anybody's, and nothing is said about it.

use std::{collections::BTreeMap, io, os::fd::OwnedFd};

use jiff::Timestamp;

use super::Volume;
use crate::{
    cluster::Class,
    files::{layout, read},
    mount::{Tmpfs, VolumeMount},
    record::{Content, Record, Records},
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
    mount: VolumeMount,
    content: Content,
    version: read::Version,
    orders: BTreeMap<String, String>,
    /// Whether the record is still in memory only.
    is_pending: bool,
}

/// What decides which Secrets come out of a content: which content of which volume it is, and
/// which state of the class is applied to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Origin {
    volume: String,
    version: read::Version,
    class: (String, String),
}

impl Held {
    /// Finds the content of a volume, if it has any. `pending` is the record of a publish that is
    /// at its last step.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn find(
        records: &Records,
        tmpfs: &Tmpfs,
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
        let Some(mount) = tmpfs.volume(&volume.target)? else {
            return Ok(None);
        };
        let version = match mount.open_if_there()? {
            Some(root) if is_complete(&root, record.content)? => version(&root, record.content)?,
            _ => return Ok(None),
        };
        Ok(Some(Self {
            mount,
            version,
            volume: volume.clone(),
            content: record.content,
            orders: record.orders,
            is_pending: pending.is_some(),
        }))
    }

    /// Reads the files whose path `wanted` says yes to, up to a number of bytes. None when the
    /// content has been replaced, covered or taken down since it was found; finding it again helps.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn read(
        &self,
        records: &Records,
        most_bytes: u64,
        wanted: impl Fn(&str) -> bool,
    ) -> io::Result<Option<read::Snapshot>> {
        let Some(root) = self.mount.open_if_there()? else {
            return Ok(None);
        };
        let snapshot = match read::snapshot(&root, most_bytes, wanted) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            snapshot => snapshot?,
        };
        // A volume that is taken down loses its record first, then its files one by one.
        let still = self.mount.open_if_there()?.is_some()
            && is_complete(&root, self.content)?
            && version(&root, self.content)? == self.version
            && (self.content == Content::Provider || snapshot.version == self.version)
            && (self.is_pending || records.get(&self.volume.id).is_some());
        Ok(still.then_some(snapshot))
    }

    /// What decides about the Secrets that a class makes of it.
    pub(super) fn origin(&self, class: &Class) -> Origin {
        let class = &class.identity;
        Origin {
            volume: self.volume.id.clone(),
            version: self.version.clone(),
            class: (class.uid.clone(), class.resource_version.clone()),
        }
    }

    /// Whether other content has another version. A provider that writes its files itself may
    /// write into those that are there.
    pub(super) fn is_versioned(&self) -> bool {
        self.content == Content::Driver
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

/// Whether the content of a volume is complete.
fn is_complete(root: &OwnedFd, content: Content) -> io::Result<bool> {
    match content {
        Content::Driver => layout::is_complete(root),
        Content::Provider => Ok(!layout::is_empty(root)?),
    }
}

/// Returns which content it is. What a provider has written itself has one name, whatever lies
/// there.
fn version(root: &OwnedFd, content: Content) -> io::Result<read::Version> {
    let version = read::version(root)?;
    Ok(match content {
        Content::Driver => version,
        Content::Provider => read::Version {
            directory: String::new(),
            ..version
        },
    })
}
