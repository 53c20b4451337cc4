//! The time of what depends on nothing but its input: whether a volume is due, the checks of a provider's
//! files, the data of Secrets, certificates. `cargo bench` runs it.

#![allow(clippy::unwrap_used, reason = "a benchmark")]

use std::collections::BTreeMap;
use std::time::Duration;

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use driver::cluster::{Class, interval::Intervals, resources::SecretObject};
use driver::config::RepublishErrors;
use driver::files::{File, Payload};
use driver::record::{ClassState, Record};
use driver::secret::Secret;
use driver::sync::pure::{desired_bytes, pair_bytes};
use driver::volume::policy::Policy;
use jiff::Timestamp;
use serde_json::json;

const CHAIN: &[u8] = include_bytes!("../src/sync/tls/fixtures/chain.pem");
const CERTIFICATE: &[u8] = include_bytes!("../src/sync/tls/fixtures/prime256v1.crt.pem");
const KEY: &[u8] = include_bytes!("../src/sync/tls/fixtures/prime256v1.key.pem");
const RSA: &[u8] = include_bytes!("../src/sync/tls/fixtures/rsa.key.pem");
const RSA_CERTIFICATE: &[u8] = include_bytes!("../src/sync/tls/fixtures/rsa.crt.pem");
const PKCS12: &[u8] = include_bytes!("../src/sync/tls/fixtures/modern.p12");

fn main() {
    divan::main();
}

/// A look at a volume that is not due.
#[divan::bench]
fn policy_due(bencher: Bencher<'_, '_>) {
    let minute = Duration::from_secs(60);
    let policy = Policy {
        enabled: true,
        intervals: Intervals {
            refresh: 10 * minute,
            least: minute,
            sync: minute,
        },
        errors: RepublishErrors::Mask,
        first_wait: minute,
        longest_wait: minute,
    };
    let class = class(0).identity;
    let now = Timestamp::now();
    let record: Record = serde_json::from_value(json!({
        "volumeId": "csi-0123456789abcdef", "targetPath": "/var/lib/kubelet/pods/u/mount",
        "pod": {"name": "web", "namespace": "default", "uid": "u"},
        "class": class, "provider": "vault", "podStatus": "web-default-db",
        "objects": [{"id": "secret/one", "version": "v1"}], "content": "driver",
        "lastSuccess": now,
    }))
    .unwrap();
    assert_eq!(policy.due(&record, &class, None, now).unwrap(), None);
    bencher.bench(|| policy.due(black_box(&record), black_box(&class), None, now));
}

/// The paths, modes and tree of an answer.
#[divan::bench(args = [2, 20, 1000])]
fn payload_checks(bencher: Bencher<'_, '_>, files: usize) {
    let answer = move || -> Vec<(String, File)> {
        let file = |n| {
            (
                format!("app/config-{}/object-{n}", n % 7),
                File::new(0o644, vec![b'x'; 64]),
            )
        };
        (0..files).map(file).collect()
    };
    assert_eq!(Payload::new(answer()).unwrap().len(), files);
    let bencher = bencher.counter(divan::counter::ItemsCount::new(files));
    bencher.with_inputs(answer).bench_values(Payload::new);
}

/// The data of Secrets of two keys each, one of which is a field of a JSON object.
#[divan::bench(args = [1, 20])]
fn desired_secrets(bencher: Bencher<'_, '_>, secrets: usize) {
    let class = class(secrets);
    let object = json!({"password": "x".repeat(64), "rest": "y".repeat(1024)});
    let files = BTreeMap::from([
        ("plain".to_owned(), Secret::from("z".repeat(1024))),
        ("object".to_owned(), Secret::from(object.to_string())),
    ]);
    assert_eq!(desired_bytes(&class, &files), Ok(secrets * (1024 + 64)));
    bencher.bench(|| desired_bytes(black_box(&class), black_box(&files)));
}

/// A key and its certificate in PEM.
#[divan::bench]
fn tls_pem_ecdsa(bencher: Bencher<'_, '_>) {
    tls(bencher, &[CERTIFICATE, KEY].concat());
}

#[divan::bench]
fn tls_pem_rsa(bencher: Bencher<'_, '_>) {
    tls(bencher, &[RSA_CERTIFICATE, RSA].concat());
}

/// A key, its certificate and the chain to the root.
#[divan::bench]
fn tls_pem_with_chain(bencher: Bencher<'_, '_>) {
    tls(bencher, &[CERTIFICATE, CHAIN, KEY].concat());
}

/// An archive, whose key derivation takes most of the time.
#[divan::bench]
fn tls_pkcs12(bencher: Bencher<'_, '_>) {
    tls(bencher, PKCS12);
}

fn tls(bencher: Bencher<'_, '_>, object: &[u8]) {
    pair_bytes(object).unwrap();
    let bencher = bencher.counter(BytesCount::of_slice(object));
    bencher.bench(|| pair_bytes(black_box(object)));
}

/// Returns a class with so many Secrets.
fn class(secrets: usize) -> Class {
    let secret = |n| -> SecretObject {
        let data = json!([
            {"objectName": "plain", "key": "plain"},
            {"objectName": "object", "key": "password", "jsonKey": "password"},
        ]);
        let object = json!({"secretName": format!("secret-{n}"), "type": "Opaque", "data": data});
        serde_json::from_value(object).unwrap()
    };
    Class {
        identity: ClassState {
            name: "db".to_owned(),
            uid: "u".to_owned(),
            generation: Some(1),
            resource_version: "7".to_owned(),
            annotations: BTreeMap::new(),
        },
        provider: "vault".to_owned(),
        parameters: BTreeMap::new(),
        secret_objects: (0..secrets).map(secret).collect(),
        too_much: None,
    }
}
