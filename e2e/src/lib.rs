//! Clusters behind one interface, the scenarios and their snapshots, and the demo.

pub mod binaries;
pub mod budget;
pub mod cluster;
pub mod demo;
pub mod embedded;
mod host;
pub mod images;
mod install;
pub mod kind;
pub mod local;
pub mod reader;
mod real;
pub mod tree;
pub mod user;
