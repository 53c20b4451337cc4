//! Temporary: declares the leaf modules so that they build and test on their own.

pub mod config;
pub mod logging;
pub mod metrics;
pub mod registration;

/// Everything asked of the API server.
pub mod cluster {
    pub mod resources;
}
