//! A small Kubernetes in one process: an API server, and nodes with a kubelet that treats a CSI
//! driver as the real one does. It is for tests of CSI drivers and needs neither Docker nor the
//! Kubernetes binaries.
//!
//! ```text
//! test process                               one process per node
//!   api           the API server      <----    kubelet      registers, publishes, reports
//!   controllers   pods onto nodes              daemonsets   manifests into containers
//!   cluster       both of them                 processes    real executables
//!   control       looks and breaks    ---->    control
//!                                              namespaces   mounts and network of its own
//! ```
//!
//! Everything that a driver touches is real but the API server and the kubelet: its process, its
//! sockets, its mounts. It needs Linux, and root or user namespaces; nothing leaves the machine.

pub mod api;
mod apply;
mod cluster;
mod control;
mod controllers;
mod daemonsets;
mod error;
mod exchange;
mod kubelet;
mod namespaces;
mod node;
mod processes;

pub use apply::apply;
pub use cluster::{Cluster, Options};
pub use controllers::is_ready;
pub use error::{Error, Result};
pub use exchange::{HttpAnswer, get};
pub use namespaces::{KUBELET_ROOT, SHARED};
pub use node::take_over;
pub use processes::Status;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Returns the path at which a driver is told to mount a volume of a pod.
pub fn target_path(pod_uid: &str, volume: &str) -> PathBuf {
    kubelet::target(Path::new(KUBELET_ROOT), pod_uid, volume)
}

/// Locks a mutex, also one that a panic poisoned: no holder leaves a value incomplete.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Formats bytes as lower-case hexadecimal.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Waits until a check holds, for tests.
#[cfg(test)]
async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    const LIMIT: std::time::Duration = std::time::Duration::from_secs(10);
    let deadline = tokio::time::Instant::now() + LIMIT;
    while !holds().await {
        let now = tokio::time::Instant::now();
        assert!(now < deadline, "not in {LIMIT:?}: {what}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}
