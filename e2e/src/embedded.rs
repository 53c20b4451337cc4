//! The embedded cluster.

mod daemonsets;
mod kubelet;
mod namespaces;
mod processes;
