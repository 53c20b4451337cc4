//! What every run needs whose drivers are processes of this machine.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{ControlPlane, Run, binaries, failed};
use crate::binaries::Binaries;
use crate::cluster::Result;

/// The number of attempts to remove a directory, and the time between two.
const REMOVALS: u32 = 50;
const BETWEEN_REMOVALS: Duration = Duration::from_millis(100);

/// An API server without nodes, and a directory for drivers and the provider.
pub(crate) struct Site {
    pub(crate) run: Run,
    pub(crate) plane: ControlPlane,
    pub(crate) directory: Directory,
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
        let directory = Directory(directory.keep());
        let plane = ControlPlane::start(real, binaries, directory.path()).await?;
        Ok(Self {
            run: Run::now(plane.version().await?, binaries),
            plane,
            directory,
        })
    }
}

/// A directory that is removed when it is dropped, also if drivers that were killed still write to it for a
/// moment.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        for left in (0..REMOVALS).rev() {
            match std::fs::remove_dir_all(&self.0) {
                Ok(()) => return,
                Err(error) if error.kind() == ErrorKind::NotFound => return,
                Err(error) if left == 0 => {
                    eprintln!("{} is left: {error}", self.0.display());
                }
                Err(_) => std::thread::sleep(BETWEEN_REMOVALS),
            }
        }
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
