//! The embedded cluster: an API server and a kubelet of our own, for tests without Kubernetes.

pub mod api;
