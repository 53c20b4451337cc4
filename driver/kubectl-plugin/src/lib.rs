//! `kubectl secrets-store`, a plugin of kubectl.
//!
//! ```text
//! lint   finds mistakes in SecretProviderClasses, pods and Helm values, offline
//! ```

pub mod lint;
