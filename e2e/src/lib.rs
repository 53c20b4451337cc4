//! Clusters behind one interface, the scenarios and their snapshots, and the demo.

pub mod binaries;
pub mod budget;
pub mod cluster;
pub mod demo;
pub mod embedded;
pub mod images;
pub mod tree;
