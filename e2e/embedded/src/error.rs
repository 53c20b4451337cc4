//! Errors of a cluster.

/// The reason why a cluster did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refuses a request.
    #[error("{what}: {source}")]
    Api {
        /// The request.
        what: String,
        /// The answer.
        source: kube::Error,
    },
    /// A manifest is not one.
    #[error("manifest: {0}")]
    Manifest(String),
    /// There is no such node, or it did not do as told.
    #[error("node {node}: {reason}")]
    Node {
        /// The node's name.
        node: String,
        /// The node's answer.
        reason: String,
    },
    /// The cluster did not come up.
    #[error("start of the cluster: {0}")]
    Start(String),
}

/// The result of asking a cluster.
pub type Result<T> = std::result::Result<T, Error>;

pub(crate) fn api_error(what: String) -> impl FnOnce(kube::Error) -> Error {
    move |source| Error::Api { what, source }
}
