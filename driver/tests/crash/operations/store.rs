//! The store and the class of a run: what they serve and say, and what the pod and its Secrets should have of it.

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt as _};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use super::{Operation, Run, Then};
use crate::{
    node::{Data, KEY_FORMAT},
    reader::Tree,
};

/// The object with a certificate and its key, and what becomes of it in a Secret (docs/tls.md).
pub(super) const PEM: &str = "pem";
const CERTIFICATE: &str = include_str!("../../../src/sync/tls/fixtures/prime256v1.crt.pem");
const KEY: &str = include_str!("../../../src/sync/tls/fixtures/prime256v1.key.pem");
const TRADITIONAL_KEY: &str =
    include_str!("../../../src/sync/tls/fixtures/prime256v1.traditional.pem");

impl Run {
    /// Puts the next values into the store.
    pub(super) fn put_store(&mut self) {
        self.expect_store();
        self.serve_store();
    }

    /// Expects the next values.
    pub(super) fn expect_store(&mut self) {
        self.version += 1;
        self.node.files.lock().unwrap().add(self.tree());
        self.expect_secret();
    }

    /// Has the store serve the values that are expected.
    pub(super) fn serve_store(&self) {
        let objects: Vec<Value> = self
            .objects(self.version)
            .into_iter()
            .map(|(name, (mode, content))| {
                let version = version(&content);
                json!({"name": name, "mode": mode, "content": content, "version": version})
            })
            .collect();
        self.node.put_store(&json!(objects));
    }

    pub(super) fn edit_class(&mut self) {
        self.class.generation += 1;
        let tree = self.tree();
        let is_new = self.node.files.lock().unwrap().newest() != Some(&tree);
        if is_new {
            self.node.files.lock().unwrap().add(tree);
        }
        self.expect_secret();
        self.put_class();
    }

    pub(super) fn put_class(&self) {
        self.node.put_class(&self.class);
    }

    /// Has the provider refuse, from now on, what is asked of it.
    pub(super) fn refuse(&mut self) {
        self.class.faults = Some(self.refusal);
        self.class.generation += 1;
        self.put_class();
    }

    /// Has the provider hang from now on.
    pub(super) fn hang(&mut self) {
        self.class.faults = Some("[{hang: true}]");
        self.class.generation += 1;
        self.put_class();
    }

    /// Has the provider take longer than the interval in which the driver looks for the pod.
    pub(super) fn slow(&mut self) {
        self.class.faults = Some("[{delay: 12s}]");
        self.class.generation += 1;
        self.put_class();
    }

    pub(super) fn heal(&mut self) {
        let hangs = matches!(
            self.operation,
            Operation::HungPublish
                | Operation::HungRefresh
                | Operation::SlowPublish
                | Operation::SlowRefresh
        );
        if hangs || self.operation.is_refused() && self.then == Then::Changed {
            self.admit();
        }
    }

    pub(super) fn admit(&mut self) {
        if self.class.faults.take().is_some() {
            self.class.generation += 1;
            self.put_class();
        }
    }

    /// Adds the present data of the Secret to its history.
    pub(super) fn expect_secret(&self) {
        let data = self.secret_data("creds");
        self.node.secret.lock().unwrap().add(data);
    }

    /// Returns the values in the store, with those that the operation needs besides.
    pub(super) fn objects(&self, version: u32) -> BTreeMap<String, (&'static str, String)> {
        let mut objects = objects(version);
        if self.has_other_modes {
            for (mode, _) in objects.values_mut() {
                *mode = if *mode == "0400" { "0444" } else { "0400" };
            }
        }
        if self.operation == Operation::AnnotatedClass {
            let content = format!("pem of version {version}; \n{KEY}{CERTIFICATE}");
            objects.insert(PEM.to_owned(), ("0400", content));
        }
        objects
    }

    /// Returns the files that the pod should have.
    pub(super) fn tree(&self) -> Tree {
        let wanted = |name: &str| {
            let only = self.class.objects.as_ref();
            only.is_none_or(|only| only.contains(&name))
        };
        let files = self.objects(self.version).into_iter();
        let files = files.filter(|(name, _)| wanted(name));
        files
            .map(|(name, (_, content))| (name, content.into_bytes()))
            .collect()
    }

    /// Returns the files whose modes are others than those of the store.
    pub(super) fn with_wrong_modes(&self) -> Vec<String> {
        let target = self.node.target();
        let objects = self.objects(self.version).into_iter();
        let wrong = objects.filter(|(name, (mode, _))| {
            let wanted = u32::from_str_radix(mode, 8).unwrap();
            // What the class does not name is not there.
            let there = fs::metadata(target.join(name));
            there.is_ok_and(|there| there.permissions().mode() & 0o7777 != wanted)
        });
        wrong.map(|(name, _)| name).collect()
    }

    /// Returns the data that a Secret of the class should have.
    pub(super) fn secret_data(&self, name: &str) -> Data {
        self.secret_data_of(name, self.version)
    }

    /// The same with the values of a version.
    pub(super) fn secret_data_of(&self, name: &str, version: u32) -> Data {
        let secrets = self.class.secret_objects.as_array()?;
        let secret = secrets.iter().find(|secret| secret["secretName"] == name)?;
        let objects = self.objects(version);
        let entries = secret["data"].as_array()?.iter().filter_map(|entry| {
            let (_, content) = objects.get(entry["objectName"].as_str()?)?;
            let key = entry["key"].as_str()?;
            let content = match (key, self.class.annotation) {
                ("tls.crt", _) => CERTIFICATE,
                ("tls.key", Some((KEY_FORMAT, _))) => KEY,
                ("tls.key", _) => TRADITIONAL_KEY,
                _ => content,
            };
            Some((key.to_owned(), BASE64_STANDARD.encode(content)))
        });
        Some(entries.collect())
    }
}

/// Returns an entry of `secretObjects`, of some objects and keys.
pub(super) fn secret(name: &str, kind: &str, data: &[(&str, &str)]) -> Value {
    let data: Vec<Value> = data
        .iter()
        .map(|(object, key)| json!({"objectName": object, "key": key}))
        .collect();
    json!({"secretName": name, "type": kind, "labels": {"team": "shop"}, "data": data})
}

/// Returns the version of a value, which is a part of it.
pub(super) fn version(content: &str) -> String {
    let (_, after) = content.split_once(" of version ").unwrap_or_default();
    let (number, _) = after.split_once(';').unwrap_or_default();
    format!("v{number}")
}

/// Returns the values in the store by the names of their objects, with their modes. From version to
/// version one object comes and one goes.
fn objects(version: u32) -> BTreeMap<String, (&'static str, String)> {
    let object = |name: &str| format!("{name} of version {version}; ");
    [
        ("pw".to_owned(), ("0400", object("pw"))),
        (
            "db/password".to_owned(),
            ("0640", object("password").repeat(300)),
        ),
        ("token".to_owned(), ("0644", object("token"))),
        (format!("only-{version}"), ("0644", object("only"))),
    ]
    .into()
}
