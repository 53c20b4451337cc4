//! Finds and reads the content of the volumes of this node. Secrets are made of nothing else.
//!
//! A volume has content only if all of these are true:
//!
//! - It is recorded, for this pod and this target path, so its publish has ended; or its publish is
//!   at its last step and passes the record that it is about to write.
//! - A volume of this driver or an earlier one is mounted at its target path, and not something that
//!   another program has mounted there or over it.
//! - The content is complete: `..data` leads to a directory, or there are files that a provider has
//!   written itself.
//!
//! A directory on which nothing is mounted, as after a reboot of the node, and a tmpfs that is being
//! filled have no content. That is not an error, and no pod is told about it.

use std::{collections::BTreeMap, io, os::fd::OwnedFd};

use jiff::Timestamp;

use super::Volume;
use crate::{
    cluster::Class,
    files::{
        layout,
        read::{self, ContentId},
    },
    mount::{Tmpfs, VolumeMount},
    record::{Age, ClassState, Record, Records, Writer},
};

/// The age of a content, which decides which of several is the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    /// The resource version of the pod status that was written with the content, if it is a number.
    pub(super) order: Option<u64>,
    /// The time at which the content came into its volume, by the node's clock.
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

/// The content of a mounted volume.
pub(super) struct VolumeContent {
    pub(super) volume: Volume,
    mount: VolumeMount,
    writer: Writer,
    id: ContentId,
    orders: BTreeMap<String, String>,
    /// The state of the class that the content was mounted or refreshed with.
    class: ClassState,
    /// Whether refreshes of the volume fail.
    is_failing: bool,
    /// Whether the record has not been written to disk yet.
    is_pending: bool,
}

/// The origin of computed Secrets: the volume, its content, and the state of the
/// class. The same origin gives the same Secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Origin {
    volume: String,
    content: ContentId,
    class: (String, String),
}

impl VolumeContent {
    /// Finds the newest content of some volumes, if any has content. `pending` is the record of a
    /// publish that is at its last step.
    ///
    /// # Errors
    /// Fails if no content was found, and a volume could not be examined.
    pub(super) fn newest(
        records: &Records,
        tmpfs: &Tmpfs,
        volumes: &[Volume],
        pending: Option<&Record>,
    ) -> io::Result<Option<Self>> {
        let (mut newest, mut failed) = (None::<Self>, None);
        for volume in volumes {
            match Self::find(records, tmpfs, volume, pending) {
                Ok(Some(found)) => {
                    let is_newest = |other: &Self| found.stamp().is_newer_than(&other.stamp());
                    if newest.as_ref().is_none_or(is_newest) {
                        newest = Some(found);
                    }
                }
                Ok(None) => {}
                Err(error) => failed = Some(error),
            }
        }
        match (newest, failed) {
            (None, Some(error)) => Err(error),
            (newest, _) => Ok(newest),
        }
    }

    /// Finds the content of a volume, if it has any.
    fn find(
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
        let id = match mount.open_if_there()? {
            Some(root) if is_complete(&root, record.writer)? => content_id(&root, record.writer)?,
            _ => return Ok(None),
        };
        let record = if pending.is_some() || knows(&record, &id) {
            Some(record)
        } else {
            records.get(&volume.id).filter(is_of)
        };
        let Some(record) = record else {
            return Ok(None);
        };
        Ok(Some(Self {
            mount,
            volume: volume.clone(),
            writer: record.writer,
            class: record.class_of(&id.directory).clone(),
            orders: record.orders,
            is_failing: record.failing_since.is_some(),
            is_pending: pending.is_some(),
            id,
        }))
    }

    /// Reads the files for whose paths `includes` returns `true`, up to a number of bytes. Returns
    /// `None` if the content has been replaced, covered or taken down since it was found; the caller
    /// has to find it again.
    ///
    /// # Errors
    /// Fails if the volume cannot be read.
    pub(super) fn read(
        &self,
        records: &Records,
        max_bytes: u64,
        includes: impl Fn(&str) -> bool,
    ) -> io::Result<Option<read::Snapshot>> {
        let Some(root) = self.mount.open_if_there()? else {
            return Ok(None);
        };
        let snapshot = match read::snapshot(&root, max_bytes, includes) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            snapshot => snapshot?,
        };
        // An unpublish removes the record first, then the files one by one.
        let still = self.mount.open_if_there()?.is_some()
            && is_complete(&root, self.writer)?
            && content_id(&root, self.writer)? == self.id
            && (self.writer == Writer::Provider || snapshot.id == self.id)
            && (self.is_pending || records.get(&self.volume.id).is_some());
        Ok(still.then_some(snapshot))
    }

    /// Returns the origin of the Secrets that a class makes of this content.
    pub(super) fn origin(&self, class: &Class) -> Origin {
        let class = &class.identity;
        Origin {
            volume: self.volume.id.clone(),
            content: self.id.clone(),
            class: (class.uid.clone(), class.resource_version.clone()),
        }
    }

    /// Returns whether the next refresh of the volume is the first one with this state of its class, and
    /// nothing is known that keeps it from being made.
    pub(super) fn awaits(&self, class: &Class) -> bool {
        let (mounted, class) = (&self.class, &class.identity);
        let is_earlier = mounted.uid != class.uid || mounted.age(class) == Age::OlderContent;
        is_earlier && !self.is_failing
    }

    /// Returns whether this content is of a later state of its class than the one that is known here: another driver
    /// beside this one has refreshed the volume, or this one is about to remember what it has read.
    pub(super) fn is_ahead_of(&self, class: &Class) -> bool {
        let age = class.identity.age(&self.class);
        matches!(age, Age::OlderContent | Age::Unsure)
    }

    /// Returns whether different content always has a different identity. A provider that writes its
    /// files itself may change them in place.
    pub(super) fn is_versioned(&self) -> bool {
        self.writer == Writer::Driver
    }

    /// Returns the age of this content.
    pub(super) fn stamp(&self) -> Stamp {
        let order = self.orders.get(&self.id.directory);
        Stamp {
            order: order.and_then(|order| order.parse().ok()),
            since: self.id.since,
        }
    }
}

/// Returns whether the content of a volume is complete.
fn is_complete(root: &OwnedFd, writer: Writer) -> io::Result<bool> {
    match writer {
        Writer::Driver => layout::is_complete(root),
        Writer::Provider => Ok(!layout::is_unfinished(root)? && !layout::is_empty(root)?),
    }
}

/// Returns whether a record knows a content, which a refresh may have put in place after the record was read.
fn knows(record: &Record, content: &ContentId) -> bool {
    record.orders.is_empty() || record.orders.contains_key(&content.directory)
}

/// Returns the identity of the content. Files that a provider has written itself have one directory
/// name, whatever they are.
fn content_id(root: &OwnedFd, writer: Writer) -> io::Result<ContentId> {
    let id = read::content_id(root)?;
    Ok(match writer {
        Writer::Driver => id,
        Writer::Provider => ContentId {
            directory: String::new(),
            ..id
        },
    })
}
