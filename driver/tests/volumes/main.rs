//! Checks volumes in every state while their dependencies fail in every way: the answer to kubelet,
//! what is left behind, and what a container still reads.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test"
)]

mod acts;
mod checks;
mod classes;
mod content;
mod errors;
mod events;
mod harness;
mod leaving;
mod meanwhile;
mod memory;
mod mistakes;
mod rest;
mod rollbacks;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../api/server.rs"]
mod server;
mod state_dir;
mod states;
mod status;
mod sub_paths;
mod trouble;
mod unchanged;
mod versions;
