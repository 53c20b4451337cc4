//! Feeds bytes from outside to the code that reads them, for tests and for fuzzing.
//!
//! Each [`Target`] reads one kind of input, and panics if the result breaks a promise: a path that
//! leaves its volume, an error that is too long or has control characters, a certificate that does
//! not belong to its key. A test feeds the corpus in `driver/fuzz/corpus` and random changes of it
//! to each target, and bounds the time and the memory of each input. `driver/fuzz` is a program that
//! searches for inputs that reach new code.

use std::{fmt::Display, time::Duration};

use crate::{cluster, csi, metrics, mount, provider, record, registration, sync};

/// The longest error in bytes. One text of others in it may have 300 characters, each of which is
/// escaped as up to ten.
const LONGEST_ERROR: usize = 4096;

/// The code that reads one kind of input.
pub struct Target {
    /// The name, which is that of its directory in the corpus.
    pub name: &'static str,
    /// Reads an input.
    pub run: fn(&[u8]),
    /// The memory in bytes that reading an input may take, besides 32 bytes for each of its bytes.
    pub memory: usize,
    /// The CPU time that reading an input may take, without optimization and on a busy machine.
    pub time: Duration,
}

const MIB: usize = 1 << 20;

/// All targets.
pub const TARGETS: [Target; 11] = [
    // What kubelet sends to the CSI socket. The author of a pod chooses the attributes.
    target("csi_request", csi::fuzz_requests, MIB),
    // What a provider answers, and the headers of its refusal.
    target("provider_answer", provider::fuzz, MIB),
    // A record on the node's disk.
    target("record", record::fuzz, MIB),
    // An object with certificates and keys: PEM or PKCS#12.
    // The rounds of key derivation that an archive may take are several seconds of work.
    Target {
        time: Duration::from_secs(25),
        ..target("tls", sync::fuzz_tls, 8 * MIB)
    },
    // A class, and the files of a volume.
    target("class", sync::fuzz_class, 8 * MIB),
    // A Secret that others may have changed.
    target("secret", cluster::secrets::fuzz, MIB),
    // The interval in an attribute or an annotation.
    target("interval", cluster::interval::fuzz, MIB),
    // A line of the table of mounts, in which others choose the paths.
    target("mount_table", mount::fuzz_table, MIB),
    // The frames that kubelet sends to the registration socket.
    target("authority", registration::fuzz_authority, MIB),
    // A connection to the registration socket.
    target(
        "registration",
        |bytes| wait(registration::fuzz(bytes)),
        8 * MIB,
    ),
    // A connection to the ports of metrics and health.
    target("http", |bytes| wait(metrics::fuzz_server(bytes)), 8 * MIB),
];

const fn target(name: &'static str, run: fn(&[u8]), memory: usize) -> Target {
    Target {
        name,
        run,
        memory,
        time: Duration::from_secs(5),
    }
}

/// Fails if an error cannot be shown: it is too long, or has control characters.
pub(crate) fn assert_readable(error: &dyn Display) {
    let text = error.to_string();
    assert!(
        text.len() <= LONGEST_ERROR,
        "an error of {} bytes",
        text.len()
    );
    assert!(!text.chars().any(char::is_control), "{text:?}");
}

/// Runs a future in this thread.
fn wait(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(future),
        Err(error) => unreachable!("no runtime: {error}"),
    }
}

#[cfg(test)]
mod tests;
