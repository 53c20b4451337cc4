//! Names, addresses and places that the cluster's parts agree on.

/// Everything the cluster writes, but for what kubelet and the driver insist on having elsewhere.
pub(super) const STATE: &str = "/var/tmp/e2e-local";
/// Held by whoever runs the cluster or tears it down.
pub(super) const LOCK: &str = "/var/tmp/e2e-local.lock";
/// kubelet's root. CSI drivers expect this path.
pub(super) const KUBELET_ROOT: &str = "/var/lib/kubelet";
/// The node's name, the same as in the embedded cluster.
pub(super) const NODE: &str = "node-1";
/// The bridge to which pods are attached. It is the node's network, too: nothing listens on an
/// address that others can reach.
pub(super) const BRIDGE: &str = "e2e0";
pub(super) const NODE_ADDRESS: &str = "10.88.0.1";
pub(super) const PODS: &str = "10.88.0.0/16";
pub(super) const SERVICES: &str = "10.96.0.0/16";
/// The service `kubernetes` in namespace `default`.
pub(super) const SERVICE_ADDRESS: &str = "10.96.0.1";
/// Where pods ask for names, in vain.
pub(super) const DNS_ADDRESS: &str = "10.96.0.10";
pub(super) const API_PORT: u16 = 6443;
pub(super) const ETCD_PORT: u16 = 12379;
/// containerd's socket below the state directory.
pub(super) const CONTAINERD_SOCKET: &str = "containerd.sock";
