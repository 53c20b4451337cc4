//! The guard of a cluster on this machine: a process that tears the cluster down when the process
//! that started it is gone, and the lock that both hold in turn.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::cluster::{Error, Result};

/// Starts `<program> guard`, whose standard input ends with this process.
///
/// # Errors
/// When it cannot be started.
pub(crate) fn spawn(program: &Path, stdout: Stdio) -> Result<Child> {
    Command::new(program)
        .arg("guard")
        // An interrupt at the terminal goes to the test, and the test's end to the guard.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(stdout)
        .spawn()
        .map_err(|error| failed(program, &error))
}

/// Blocks until the process that started this guard is gone.
pub(crate) fn wait_for_parent() {
    let _read_to_its_end = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
}

/// A lock on a file that exists while the lock is held.
pub(crate) struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock; calls `on_wait` before it waits for another process.
    ///
    /// # Errors
    /// When the file cannot be opened or locked.
    pub(crate) fn take(path: &Path, mut on_wait: impl FnMut()) -> Result<Self> {
        loop {
            let file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(path)
                .map_err(|error| failed(path, &error))?;
            if file.try_lock().is_err() {
                on_wait();
                file.lock().map_err(|error| failed(path, &error))?;
            }
            // The process that held it before has removed its file.
            let inode = file.metadata().map_err(|error| failed(path, &error))?.ino();
            if fs::metadata(path).is_ok_and(|current| current.ino() == inode) {
                let path = path.to_owned();
                return Ok(Self { file, path });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _absent = fs::remove_file(&self.path);
        let _closed_anyway = self.file.unlock();
    }
}

fn failed(path: &Path, error: &std::io::Error) -> Error {
    Error::Start(format!("{}: {error}", path.display()))
}
