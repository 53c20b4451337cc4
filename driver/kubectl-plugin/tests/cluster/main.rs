//! Runs the plugin against an API server whose objects are those of clusters in order and in trouble. The
//! node's driver is played here; the scenarios of `e2e` have the real one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test"
)]

mod doctor;
mod drivers;
mod explain;
mod looks;
mod net;
mod restarts;
mod situations;
mod starts;
mod waits;
mod workload;
mod world;
