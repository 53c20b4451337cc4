//! End-to-end tests of the driver: clusters behind one interface, the demo and the budgets. The
//! scenarios are in `tests/scenarios`.
//!
//! ```text
//! chaos              faults of all kinds, and an observer: what `e2e chaos` runs
//! demo               what the command `e2e` runs
//! comparison         this driver and the existing one side by side: what `e2e bench` runs
//! scale              hundreds of drivers in front of one API server: what `e2e scale` runs
//! budget, footprint  measurements of the release build
//! load, soak         the same, for long or with much to do
//!   bench            calls the CSI socket and measures the driver
//! embedded           the clusters: an API server and a kubelet of our own,
//! local, kind        real Kubernetes on this machine, and in Docker
//!   guard, real      what local and kind share
//!   previous         installations to upgrade from
//!   install          manifests and images of the driver and the tests' provider
//!   images           images of this workspace's executables
//! namespace          objects, pods and events: what is alike on all clusters
//! manifest           manifests as values
//!   cluster          what differs between the clusters
//!     tree, reader   what `probe` reads in a volume
//! providers          real providers
//!   openbao          a real server for two of them
//!   stores           fakes of their stores
//! binaries, host, isolated, skipped, user      leaves
//! ```

mod bench;
pub mod binaries;
pub mod budget;
pub mod chaos;
pub mod cluster;
pub mod comparison;
pub mod demo;
pub mod embedded;
pub mod footprint;
mod guard;
mod host;
pub mod images;
pub mod install;
pub mod isolated;
pub mod kind;
pub mod load;
pub mod local;
pub mod manifest;
pub mod namespace;
pub mod openbao;
pub mod previous;
pub mod providers;
pub mod reader;
mod real;
pub mod scale;
pub mod skipped;
pub mod soak;
pub mod stores;
pub mod tree;
pub mod user;
