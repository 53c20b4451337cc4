//! What every run needs whose drivers are processes of this machine.

use tempfile::TempDir;

use super::{ControlPlane, Run, binaries, failed};
use crate::binaries::Binaries;
use crate::cluster::Result;

/// An API server without nodes, and a directory for drivers and the provider.
pub(crate) struct Site {
    pub(crate) run: Run,
    pub(crate) plane: ControlPlane,
    /// Removed when it is dropped.
    pub(crate) directory: TempDir,
}

impl Site {
    /// Starts a real control plane, or else the embedded API server.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn prepare(real: bool, binaries: &Binaries) -> Result<Self> {
        // Short, because the paths of sockets below it may have 107 bytes at most.
        let directory = tempfile::Builder::new()
            .prefix("e2e-")
            .tempdir()
            .map_err(|error| failed("a directory", &error))?;
        let plane = ControlPlane::start(real, binaries, directory.path()).await?;
        Ok(Self {
            run: Run::now(plane.version().await?),
            plane,
            directory,
        })
    }
}

/// Builds what [`binaries`] builds, without blocking this thread.
///
/// # Errors
/// When it does not build.
pub(crate) async fn built() -> Result<Binaries> {
    let built = tokio::task::spawn_blocking(binaries).await;
    built
        .map_err(|error| failed("build", &error))?
        .map_err(|error| failed("build", &error))
}
