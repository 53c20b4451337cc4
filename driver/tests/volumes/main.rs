//! Checks volumes in every state while their dependencies fail in every way: the answer to kubelet,
//! what is left behind, and what a container still reads.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test"
)]

mod acts;
mod classes;
mod content;
mod events;
mod harness;
mod leaving;
mod meanwhile;
mod memory;
mod rollbacks;
mod state_dir;
mod states;
mod versions;
