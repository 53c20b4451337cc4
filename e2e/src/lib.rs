//! Clusters behind one interface, the scenarios and their snapshots, and the demo.

pub mod binaries;
pub mod cluster;
pub mod embedded;
pub mod images;
pub mod kind;
pub mod tree;
