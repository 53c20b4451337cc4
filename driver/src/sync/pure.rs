//! The work on Secrets that depends on nothing but its input, for `cargo bench`.

use std::collections::BTreeMap;

use super::{
    desired::{Entry, Sources, data},
    parsing::{Caller, RefusedObjects},
    tls::{KeyFormat, Material, pair},
};
use crate::{cluster::Class, secret::Secret};

/// Computes the data of each Secret of a class from the files of a volume; returns the number of bytes of
/// all values.
///
/// # Errors
/// Fails if an entry of the class is wrong, or a file that it names is not there.
pub fn desired_bytes(class: &Class, files: &BTreeMap<String, Secret>) -> Result<usize, String> {
    let (refused, caller) = (RefusedObjects::default(), Caller::default());
    let mut sources = Sources::parse(class.secret_objects.iter(), files, &refused, &caller);
    let mut bytes = 0;
    for object in class.secret_objects.iter() {
        let computed = Entry::new(class, object).and_then(|entry| data(entry, &mut sources));
        let values = computed.map_err(|error| error.to_string())?;
        bytes += values
            .values()
            .map(|value| value.expose().len())
            .sum::<usize>();
    }
    Ok(bytes)
}

/// Reads an object with certificates and a key, and pairs them; returns the number of bytes of `tls.crt` and
/// `tls.key`.
///
/// # Errors
/// Fails if the object cannot be read, or the key belongs to no certificate.
pub fn pair_bytes(object: &[u8]) -> Result<usize, String> {
    let caller = Caller::default();
    let material = Material::read(object, &caller).map_err(|error| error.to_string())?;
    let paired = pair(&material, &material, KeyFormat::Original, &caller);
    let pair = paired.map_err(|error| error.to_string())?;
    Ok(pair.certificate.expose().len() + pair.key.expose().len())
}
