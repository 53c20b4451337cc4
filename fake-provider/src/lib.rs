//! What the author of a provider for the Secrets Store CSI driver needs:
//!
//! - [`server`] is the server half of a provider. `examples/directory.rs` is a provider built on it.
//! - [`fake`] is a provider for tests and demos, built on [`server`]. The program `fake-provider`
//!   runs it.
//!
//! The server does not use the fake provider.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub mod fake;
pub mod server;

/// Locks a mutex, also after a panic of another holder: no guarded value is ever half-written
/// between two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
