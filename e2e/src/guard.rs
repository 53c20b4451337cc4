//! The guard of a cluster on this machine: a process that tears the cluster down when the process
//! that started it is gone, and the lock that both hold in turn.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

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

/// The time between two attempts to take a lock.
const AGAIN: Duration = Duration::from_millis(50);

/// A lock on a file that exists while the lock is held, and has the id of the process that holds it.
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
        Self::take_after(path, Duration::ZERO, |_| on_wait())
    }

    /// Takes the lock; when another process holds it for longer than `patience`, calls `on_wait` with the id
    /// of that process, as far as it is known, and waits on.
    ///
    /// # Errors
    /// When the file cannot be opened or locked.
    pub(crate) fn take_after(
        path: &Path,
        patience: Duration,
        mut on_wait: impl FnMut(Option<u32>),
    ) -> Result<Self> {
        let started = Instant::now();
        loop {
            let mut file = File::options()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(path)
                .map_err(|error| failed(path, &error))?;
            if file.try_lock().is_err() {
                if started.elapsed() < patience {
                    std::thread::sleep(AGAIN);
                    continue;
                }
                let holder = fs::read_to_string(path).unwrap_or_default();
                on_wait(holder.trim().parse().ok());
                file.lock().map_err(|error| failed(path, &error))?;
            }
            // The process that held it before has removed its file.
            let inode = file.metadata().map_err(|error| failed(path, &error))?.ino();
            if fs::metadata(path).is_ok_and(|current| current.ino() == inode) {
                let told = file
                    .set_len(0)
                    .and_then(|()| writeln!(file, "{}", std::process::id()));
                told.map_err(|error| failed(path, &error))?;
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]

    use std::sync::mpsc;

    use super::*;

    #[test]
    fn who_waits_for_long_hears_for_whom() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let first = Lock::take(&path, || panic!("nobody holds it")).unwrap();
        let (tell, told) = mpsc::channel();
        let waiting = {
            let path = path.clone();
            std::thread::spawn(move || {
                let on_wait = |holder| tell.send(holder).unwrap();
                Lock::take_after(&path, Duration::from_millis(200), on_wait).map(drop)
            })
        };
        let started = Instant::now();
        assert_eq!(told.recv().unwrap(), Some(std::process::id()));
        assert!(started.elapsed() > Duration::from_millis(100));
        drop(first);
        waiting.join().unwrap().unwrap();
        assert!(!path.exists());
        // One that is released within that time is no reason to tell.
        let first = Lock::take(&path, || panic!("nobody holds it")).unwrap();
        let release = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(first);
        });
        let on_wait = |_| panic!("it waits for {path:?} for too short");
        Lock::take_after(&path, Duration::from_secs(60), on_wait).unwrap();
        release.join().unwrap();
    }
}
