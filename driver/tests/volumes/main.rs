//! Volumes in every state that they can be in, while everything that they need fails in every way
//! that it can: what kubelet is told, what is left, and what a container still reads.

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
