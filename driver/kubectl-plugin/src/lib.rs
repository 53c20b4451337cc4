//! `kubectl secrets-store`, a plugin of kubectl.
//!
//! ```text
//! explain        a pod: what is mounted, what is due, what is wrong, and the next command to type
//! doctor         the cluster and its nodes: what the driver needs and has not
//! lint           finds mistakes in SecretProviderClasses, pods and Helm values, offline
//! installation   where the driver is in the cluster, and what it says of a node
//! due            when a volume is refreshed next, and whether that is late
//! time           times for people
//! api_access     why the driver cannot ask the API server
//! text           texts of others, as they may be shown
//! cluster        requests to the API server, with the rights of the person who asks
//! ```

mod api_access;
pub mod cluster;
pub mod doctor;
mod due;
pub mod explain;
pub mod installation;
pub mod lint;
mod text;
mod time;
