//! The Secrets of the classes that pods run with.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Secret;

use super::super::super::store::{CLASSES, EXTRA, WITH_CERTIFICATE, content};
use super::super::super::tenants::{
    EDITION, EDITION_KEY, EXTRA_KEY, KEYS, OTHER_KEYS, SAYS, TLS_KEYS, TLS_SECRET,
};
use super::super::super::world::World;

/// Returns how a Secret differs from what its class declares and the store has.
pub(super) fn wrong_secret(
    world: &World,
    class: usize,
    secret: Option<Secret>,
    owners: &BTreeSet<(String, String)>,
    is_first: bool,
) -> Option<String> {
    let Some(secret) = secret else {
        return Some("is missing".to_owned());
    };
    let there = secret.metadata.owner_references.iter().flatten();
    let there: BTreeSet<&String> = there.map(|owner| &owner.uid).collect();
    if let Some((name, _)) = owners.iter().find(|(_, uid)| !there.contains(uid)) {
        return Some(format!("is not owned by {name}"));
    }
    let name = CLASSES.get(class).copied().unwrap_or_default();
    let latest = world.store.latest_number(class);
    let spec = world.editions.now(class)?;
    let metadata = [&secret.metadata.labels, &secret.metadata.annotations];
    let edition = spec.edition.to_string();
    let says = |all: &Option<BTreeMap<String, String>>| {
        all.as_ref().and_then(|all| all.get(SAYS)) == Some(&edition)
    };
    if is_first && !metadata.into_iter().all(says) {
        return Some(format!("has not label and annotation {SAYS}: {edition}"));
    }
    let extra = spec.has_extra.then_some((EXTRA_KEY, EXTRA));
    let of_first = KEYS.into_iter().chain(extra).filter(|_| is_first);
    let values = of_first.chain(OTHER_KEYS.into_iter().filter(|_| !is_first));
    let values = values.map(|(key, object)| (key, content(name, object, latest)));
    let edition = (EDITION_KEY, content(name, EDITION, spec.edition));
    let mut data = secret.data.unwrap_or_default();
    for (key, expected) in values.chain(is_first.then_some(edition)) {
        let value = data.remove(key);
        if value.is_none_or(|value| value.0 != expected.into_bytes()) {
            return Some(format!(
                "has not contents number {latest} and {spec:?} in {key}"
            ));
        }
    }
    let more: Vec<&String> = data.keys().collect();
    (!more.is_empty()).then(|| format!("has keys that its class does not declare: {more:?}"))
}

/// Returns what is wrong with the Secret of a certificate.
pub(super) fn wrong_certificate(world: &World, secret: Option<Secret>) -> Option<String> {
    let number = world.store.latest_number(WITH_CERTIFICATE);
    let expected = world.store.certificate(number)?;
    let Some(secret) = secret else {
        return Some(format!("Secret {TLS_SECRET} is missing"));
    };
    let data = secret.data.unwrap_or_default();
    let is = |(key, expected): (&&str, &&String)| {
        let value = data.get(*key);
        value.is_some_and(|value| value.0 == expected.as_bytes())
    };
    let expected = [&expected.chain, &expected.key];
    let wrong = TLS_KEYS.iter().zip(&expected).find(|pair| !is(*pair));
    let (key, _) = wrong?;
    Some(format!(
        "Secret {TLS_SECRET} has not {key} of number {number}"
    ))
}
