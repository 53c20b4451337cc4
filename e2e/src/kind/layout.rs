//! Names and nodes of the cluster, on which its parts agree.

use std::time::Duration;

/// The cluster's name.
pub(super) const NAME: &str = "e2e";
/// The path of `probe` on every node.
pub(super) const PROBE: &str = "/usr/local/bin/e2e-probe";
/// The time in which everything installed has to run, and a node has to come back.
pub(super) const START_LIMIT: Duration = Duration::from_secs(120);

/// The number of nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Nodes {
    /// One, as in `kind/one-node.yaml`.
    #[default]
    One,
    /// Three, as in `kind/three-nodes.yaml`.
    Three,
}

impl Nodes {
    /// Returns the path of kind's configuration.
    pub(super) fn configuration(self) -> &'static str {
        match self {
            Self::One => "kind/one-node.yaml",
            Self::Three => "kind/three-nodes.yaml",
        }
    }

    /// Returns the names that kind gives to the nodes; those that run pods are the last ones.
    pub(super) fn names(self) -> Vec<String> {
        let suffixes: &[&str] = match self {
            Self::One => &["control-plane"],
            Self::Three => &["control-plane", "worker", "worker2"],
        };
        suffixes
            .iter()
            .map(|suffix| format!("{NAME}-{suffix}"))
            .collect()
    }

    /// Returns the names of the nodes that run the pods of scenarios.
    pub fn for_pods(self) -> Vec<String> {
        let mut names = self.names();
        match self {
            Self::One => names,
            Self::Three => names.split_off(1),
        }
    }
}
