//! Clusters behind one interface, the scenarios and their snapshots, and the demo.

pub mod binaries;
pub mod budget;
pub mod cluster;
pub mod demo;
pub mod embedded;
mod guard;
mod host;
pub mod images;
pub mod install;
pub mod kind;
pub mod local;
pub mod manifest;
pub mod namespace;
pub mod previous;
pub mod reader;
mod real;
pub mod skipped;
pub mod tree;
pub mod user;
