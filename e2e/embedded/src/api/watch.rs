//! Watches: the initial objects if the client asks for them, then every change. Each is a JSON
//! document on a line.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{Stream, stream};
use serde_json::{Value, json};
use tokio::{sync::watch, time::Instant};

use super::{
    body::{Target, at_version},
    selectors::Selector,
    status::Status,
    store::{Change, Store},
};

/// One watch request.
pub(super) struct Watch {
    store: Arc<Store>,
    target: Target,
    selector: Selector,
    announcements: watch::Receiver<u64>,
    /// The revision up to which all changes were sent.
    seen: u64,
    end: Instant,
    /// Lines that were not sent yet.
    ready: Vec<u8>,
    /// Whether the watch ends after them.
    over: bool,
}

/// The parameters of a watch request.
pub(super) struct Start {
    /// The revision after which to begin; with none or 0, the current objects come first.
    pub(super) resource_version: Option<u64>,
    /// `sendInitialEvents`: the current objects come first, and a bookmark after them.
    pub(super) initial_events: bool,
    pub(super) timeout: Duration,
}

impl Watch {
    /// Begins a watch.
    ///
    /// # Errors
    /// Returns 404 when the kind is not served.
    pub(super) fn begin(
        store: Arc<Store>,
        target: Target,
        selector: Selector,
        start: &Start,
    ) -> Result<Watch, Status> {
        let announcements = store
            .announcements(&target.resource.qualified)
            .ok_or_else(Status::no_such_resource)?;
        let mut watch = Watch {
            seen: start.resource_version.unwrap_or(0),
            store,
            target,
            selector,
            announcements,
            end: Instant::now() + start.timeout,
            ready: Vec::new(),
            over: false,
        };
        if start.initial_events || watch.seen == 0 {
            watch.list();
        }
        if start.initial_events {
            watch.bookmark();
        }
        Ok(watch)
    }

    fn list(&mut self) {
        let namespace =
            (!self.target.namespace.is_empty()).then_some(self.target.namespace.as_str());
        let (revision, objects) = self.store.list(&self.target.resource.qualified, namespace);
        self.seen = revision;
        for object in objects {
            if self.selector.matches(&object) {
                self.line("ADDED", &object);
            }
        }
    }

    fn bookmark(&mut self) {
        let bookmark = json!({
            "kind": self.target.resource.kind,
            "apiVersion": self.target.resource.api_version(&self.target.version),
            "metadata": {
                "resourceVersion": self.seen.to_string(),
                "creationTimestamp": null,
                "annotations": {"k8s.io/initial-events-end": "true"},
            },
        });
        self.raw_line("BOOKMARK", &bookmark);
    }

    fn line(&mut self, kind: &str, object: &Value) {
        let object = at_version(&self.target.resource, &self.target.version, object);
        self.raw_line(kind, &object);
    }

    fn raw_line(&mut self, kind: &str, object: &Value) {
        self.ready.extend_from_slice(b"{\"type\":\"");
        self.ready.extend_from_slice(kind.as_bytes());
        self.ready.extend_from_slice(b"\",\"object\":");
        self.ready.extend_from_slice(object.to_string().as_bytes());
        self.ready.extend_from_slice(b"}\n");
    }

    fn change(&mut self, change: &Change) {
        let namespace = &self.target.namespace;
        if !namespace.is_empty() && change.new["metadata"]["namespace"] != *namespace {
            return;
        }
        let before = change
            .old
            .as_ref()
            .is_some_and(|old| self.selector.matches(old));
        let after = !change.deleted && self.selector.matches(&change.new);
        match (before, after) {
            (false, true) => self.line("ADDED", &change.new),
            (true, true) => self.line("MODIFIED", &change.new),
            (true, false) if change.deleted => self.line("DELETED", &change.new),
            (true, false) => {
                // It left the selection: send the last selected state, at the revision of the change.
                let mut last = change.old.as_deref().cloned().unwrap_or_default();
                last["metadata"]["resourceVersion"] =
                    change.new["metadata"]["resourceVersion"].clone();
                self.line("DELETED", &last);
            }
            (false, false) => {}
        }
    }

    fn read_changes(&mut self) {
        match self
            .store
            .changes_since(&self.target.resource.qualified, self.seen)
        {
            Ok((revision, changes)) => {
                self.seen = self.seen.max(revision);
                changes.iter().for_each(|change| self.change(change));
            }
            Err(status) => {
                let status = status.to_value();
                self.raw_line("ERROR", &status);
                self.over = true;
            }
        }
    }

    /// Returns the next lines; none when the watch is over.
    async fn next(&mut self) -> Option<Bytes> {
        while self.ready.is_empty() {
            if self.over {
                return None;
            }
            self.announcements.mark_unchanged();
            self.read_changes();
            if !self.ready.is_empty() {
                break;
            }
            tokio::select! {
                changed = self.announcements.changed() => self.over = changed.is_err(),
                () = tokio::time::sleep_until(self.end) => return None,
            }
        }
        Some(std::mem::take(&mut self.ready).into())
    }

    /// Returns the lines as a stream.
    pub(super) fn into_stream(self) -> impl Stream<Item = Bytes> + Send {
        stream::unfold(self, |mut watch| async move {
            watch.next().await.map(|lines| (lines, watch))
        })
    }
}
