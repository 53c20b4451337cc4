//! Tools for authors of providers for the Secrets Store CSI driver:
//!
//! - [`server`] is the server half of a provider. `examples/directory.rs` is a provider built on it,
//!   and `docs/writing-a-provider.md` explains it.
//! - [`check`] is a conformance checker. The program `provider-check` runs it against a socket.
//! - [`fake`] is a provider for tests and demos, built on [`server`]. The program `fake-provider`
//!   runs it.
//!
//! The server uses neither of the others, and the checker and the fake provider do not know each other.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub mod check;
pub mod fake;
pub mod server;

/// Locks a mutex, also after a panic of another holder: no guarded value is ever half-written
/// between two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
