//! Clusters behind one interface, the scenarios and their snapshots, and the demo.

pub mod embedded;
