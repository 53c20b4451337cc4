//! The annotations of a class that the driver reads.

use driver::{
    record::{ASKED, NUMBER_VERSIONS},
    volume::policy::{Every, INTERVAL, SEND_VERSIONS},
};

use super::{Findings, names::meant, pod::MODE, yaml::Node};

pub(super) const KEY_FORMAT: &str = "secrets-store.csi.k8s.io/tls-key-format";
pub(super) const PREFIX: &str = "secrets-store.csi.k8s.io/";

/// The annotations that the driver reads.
const KNOWN: [&str; 5] = [INTERVAL, ASKED, SEND_VERSIONS, NUMBER_VERSIONS, KEY_FORMAT];

/// Returns the annotation that is meant by one that the driver does not read, if it is only a little different.
pub(crate) fn misspelt(name: &str) -> Option<&'static str> {
    match KNOWN.contains(&name) {
        true => None,
        false => meant(name, &KNOWN),
    }
}

/// Returns the annotation of a class that one of another object is, or is meant to be.
pub(crate) fn meant_for_driver(name: &str) -> Option<&'static str> {
    let known = KNOWN.iter().find(|known| **known == name);
    known.copied().or_else(|| meant(name, &KNOWN))
}

/// Checks the driver's annotations of a class.
pub(super) fn check(object: &Node, file: &mut Findings<'_>) {
    let annotations = object.get("metadata").and_then(|m| m.get("annotations"));
    for (key, value) in annotations.map_or(&[][..], Node::fields) {
        if !key.text.starts_with(PREFIX) {
            if let Some(name) = misspelt(&key.text) {
                let how = format!(
                    "the driver does not know the annotation {}; write {name}",
                    key.text
                );
                file.add(key.line, how);
            }
            continue;
        }
        let Some(text) = value.text() else {
            file.add(
                value.line,
                format!(
                    "the value of annotation {} must be a text; put it in quotes",
                    key.text
                ),
            );
            continue;
        };
        match key.text.as_str() {
            INTERVAL => {
                if let Err(why) = Every::parse(text) {
                    file.add(
                        value.line,
                        format!("annotation {INTERVAL} is {text:?}: {why}"),
                    );
                }
            }
            SEND_VERSIONS | NUMBER_VERSIONS if !["true", "false"].contains(&text) => {
                file.add(
                    value.line,
                    format!(
                        "annotation {} is {text:?}; it must be \"true\" or \"false\"",
                        key.text
                    ),
                );
            }
            KEY_FORMAT if !["traditional", "original"].contains(&text) => {
                file.add(
                    value.line,
                    format!(
                        "annotation {KEY_FORMAT} is {text:?}; it must be traditional or original"
                    ),
                );
            }
            name if KNOWN.contains(&name) => {}
            MODE => file.add(key.line, format!("{MODE} is no annotation of a class; write it into volumeAttributes of the pod's volume")),
            name => {
                let instead = meant(name, &KNOWN).map_or_else(
                    || format!("there are {}", KNOWN.join(", ")),
                    |name| format!("write {name}"),
                );
                file.add(
                    key.line,
                    format!("the driver does not know the annotation {name}; {instead}"),
                );
            }
        }
    }
}
