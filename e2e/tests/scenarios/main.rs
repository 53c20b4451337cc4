//! The scenarios: actions of a user, and the volumes, pod statuses and events that have to follow.
//!
//! All are in one executable, which links once. A scenario has an embedded cluster of its own, or a
//! namespace on a shared local or kind cluster, and does not know which. Its result is compared
//! with a snapshot, in which names and times that differ from run to run are replaced.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    reason = "a failed step of a scenario is a failed test"
)]

mod alerts;
mod availability;
mod classes;
mod content;
mod groups;
mod harness;
mod known;
mod lifecycle;
mod objects;
mod paths;
mod plugin;
mod pods;
mod providers;
mod restarts;
mod rollouts;
mod rotation;
mod secrets;
mod settings;
mod target;
mod tokens;
mod upgrades;
mod upstream;
