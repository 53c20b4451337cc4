//! Answers a look at a volume of which everything is as the last look found it.
//!
//! kubelet looks at each volume forty to sixty times an hour, and nearly always there is nothing to do.
//! Examining record, mount and content takes a thread that may block, and the way there and back takes
//! longer than the work. So the driver remembers on what the answer of the last look depended, as a
//! digest. The next look examines the same things, as far as the kernel has them in memory. If nothing
//! differs, the answer is the same; if anything does, or cannot be told without waiting, the volume is
//! examined as if nobody had ever looked.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;

use super::{PublishRequest, Volumes, looks::freshness};
use crate::{
    cluster::{Class, Freshness},
    files::{Stamp, layout},
    mount::FileSystemId,
    record::{ClassState, Record, Writer},
};

/// What a look found on the node.
#[derive(Debug, Clone, Copy, Hash)]
pub(super) struct Evidence {
    /// The file system at the target.
    pub(super) mount: FileSystemId,
    /// The file of the record, from before it was read.
    pub(super) record: Stamp,
}

/// A look that found nothing to do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Verdict {
    mount: FileSystemId,
    /// The digest of all that it depended on, besides the content and the time.
    depends_on: u64,
    /// The end of the interval. There is none if the volume is never due.
    until: Option<Timestamp>,
}

/// Makes digests that nobody outside of the process can predict.
#[derive(Default)]
pub(super) struct Digests(RandomState);

impl Digests {
    fn of(&self, request: &PublishRequest, evidence: &Evidence, class: Option<&ClassState>) -> u64 {
        let asked = (
            request.target.as_str(),
            &request.pod.uid,
            &request.class,
            request.every,
        );
        self.0.hash_one((asked, evidence, class))
    }
}

impl Volumes {
    /// Returns whether an earlier look found nothing to do and everything is as it was then. Does not
    /// wait, for a disk or for a request. `since_last` is the time since the last look.
    pub(super) fn is_unchanged(
        &self,
        verdict: &Verdict,
        since_last: Option<Duration>,
        request: &PublishRequest,
    ) -> bool {
        if verdict.until.is_some_and(|until| self.clock.now() >= until) {
            return false;
        }
        let class = self
            .policy
            .enabled
            .then(|| self.known_class(since_last, request));
        if matches!(class, Some(None)) {
            return false;
        }
        let Some(root) = verdict.mount.glimpse(request.target.as_path()) else {
            return false;
        };
        let Some(record) = Stamp::of(&self.records.path(&request.volume_id)) else {
            return false;
        };
        let mount = verdict.mount;
        let class = class.flatten();
        let class = class.as_ref().map(|class| &class.identity);
        let now = self.digests.of(request, &Evidence { mount, record }, class);
        now == verdict.depends_on && layout::is_complete(&root).unwrap_or(false)
    }

    /// Returns the class as it is remembered, if that is new enough for a look.
    fn known_class(
        &self,
        since_last: Option<Duration>,
        request: &PublishRequest,
    ) -> Option<Arc<Class>> {
        let (namespace, name) = (&request.pod.namespace, &request.class);
        let (class, age) = self.cluster.remembered_class(namespace, name)?;
        let between_reads = self.between_reads(&class.identity, request);
        match freshness(since_last, between_reads) {
            Freshness::Within(most) if age < most => Some(class),
            _ => None,
        }
    }

    /// Remembers a look that found nothing to do. `class` is what it found the class to be; none if
    /// volumes are not refreshed.
    pub(super) fn remember_look(
        &self,
        request: &PublishRequest,
        record: &Record,
        evidence: Option<Evidence>,
        class: Option<&ClassState>,
    ) {
        // Files of a provider are listed, which takes as long as there are some.
        let is_fit =
            |evidence: &Evidence| evidence.record.is_settled() && record.writer == Writer::Driver;
        let Some(evidence) = evidence.filter(is_fit) else {
            return;
        };
        let until = match class {
            Some(class) => self.policy.interval_ends(record, class, request.every),
            None => Ok(None),
        };
        // An interval that cannot be read is an error of each look.
        let Ok(until) = until else { return };
        let verdict = Verdict {
            mount: evidence.mount,
            depends_on: self.digests.of(request, &evidence, class),
            until,
        };
        self.looks.remember(&request.volume_id, verdict);
    }
}
