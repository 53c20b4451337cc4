//! The scenarios: what a user does with the driver, and what must then be in the volumes, in the
//! pod statuses and in the events.
//!
//! One binary, so that it links once. Each scenario gets a cluster of its own, or on clusters
//! that are slow to make a namespace of its own, and does not know which cluster that is. What it
//! sees is asserted as a snapshot with names and times that differ from run to run redacted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    reason = "a failed step of a scenario is a failed test"
)]

mod availability;
mod classes;
mod content;
mod groups;
mod harness;
mod lifecycle;
mod objects;
mod paths;
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
