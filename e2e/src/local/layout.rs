//! Names, addresses and paths that several parts of the cluster use.

/// The state directory. Only what kubelet and the driver need elsewhere is outside of it.
pub(super) const STATE: &str = "/var/tmp/e2e-local";
/// The lock that a process holds while it runs the cluster or tears it down.
pub(super) const LOCK: &str = "/var/tmp/e2e-local.lock";
/// kubelet's root, where CSI drivers expect it.
pub(super) const KUBELET_ROOT: &str = "/var/lib/kubelet";
/// The node's name, the same as in the embedded cluster.
pub(super) const NODE: &str = "node-1";
/// The bridge to which pods are attached. The node's daemons listen on it, too, so that other
/// machines cannot reach them.
pub(super) const BRIDGE: &str = "e2e0";
pub(super) const NODE_ADDRESS: &str = "10.88.0.1";
pub(super) const PODS: &str = "10.88.0.0/16";
pub(super) const SERVICES: &str = "10.96.0.0/16";
/// The service `kubernetes` in namespace `default`.
pub(super) const SERVICE_ADDRESS: &str = "10.96.0.1";
/// The name server that pods are told to ask. There is none.
pub(super) const DNS_ADDRESS: &str = "10.96.0.10";
pub(super) const API_PORT: u16 = 6443;
pub(super) const ETCD_PORT: u16 = 12379;
/// containerd's socket below the state directory.
pub(super) const CONTAINERD_SOCKET: &str = "containerd.sock";
