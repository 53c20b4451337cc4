//! The content of the stores, and the calls to them.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};

use super::{Call, Service};

/// The token, key or session that every login returns.
pub(super) const SESSION: &str = "ASIAEXAMPLESESSION";

/// The content of the stores, and the calls to them.
#[derive(Default)]
pub(super) struct State {
    objects: BTreeMap<(Service, String), Vec<String>>,
    denied: BTreeSet<(Service, String)>,
    pub(super) calls: Vec<Call>,
}

/// A version of an object.
pub(super) struct Version<'a> {
    pub(super) value: &'a str,
    /// The number of the version, from 1.
    pub(super) number: usize,
    /// An id of 32 hexadecimal digits, which tells nothing about the value.
    pub(super) id: String,
}

impl State {
    pub(super) fn put(&mut self, service: Service, name: String, value: String) {
        self.objects.entry((service, name)).or_default().push(value);
    }

    pub(super) fn remove(&mut self, service: Service, name: String) {
        self.objects.remove(&(service, name));
    }

    pub(super) fn clear(&mut self) {
        self.objects.clear();
    }

    pub(super) fn deny(&mut self, service: Service, operation: String) {
        self.denied.insert((service, operation));
    }

    pub(super) fn reset(&mut self) {
        self.denied.clear();
        self.calls.clear();
    }

    /// Records a call. Returns whether the operation is allowed.
    pub(super) fn allows(&mut self, service: Service, operation: &str, object: &str) -> bool {
        self.calls.push(Call {
            service: Some(service),
            operation: operation.to_owned(),
            object: object.to_owned(),
        });
        !self.denied.contains(&(service, operation.to_owned()))
    }

    /// Returns the latest version of an object.
    pub(super) fn latest(&self, service: Service, name: &str) -> Option<Version<'_>> {
        let versions = self.objects.get(&(service, name.to_owned()))?;
        let value = versions.last()?;
        let number = versions.len();
        let digest = Sha256::digest(format!("{name}/{number}"));
        let id = digest[..16].iter().map(|byte| format!("{byte:02x}"));
        Some(Version {
            value,
            number,
            id: id.collect(),
        })
    }
}
