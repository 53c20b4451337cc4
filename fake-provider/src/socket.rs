//! The unix socket's life on disk: what may be replaced, and what is removed in the end.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

use crate::Error;

/// A listening unix socket that takes its file away when it is dropped.
#[derive(Debug)]
pub(crate) struct Socket {
    path: PathBuf,
    listener: Option<UnixListener>,
    identity: (u64, u64),
}

impl Socket {
    /// Creates parent directories, replaces a stale socket, and listens.
    ///
    /// # Errors
    ///
    /// [`Error::NotASocket`] if anything but a socket is at `path`, which is left alone;
    /// [`Error::Socket`] for whatever the system refuses.
    pub(crate) fn bind(path: PathBuf) -> Result<Self, Error> {
        match fs::symlink_metadata(&path) {
            Ok(found) if !found.file_type().is_socket() => return Err(Error::NotASocket(path)),
            // Absent, stale, or out of reach: listening tells.
            _ => {}
        }
        match listen(&path) {
            Ok((listener, identity)) => Ok(Self {
                path,
                listener: Some(listener),
                identity,
            }),
            Err(source) => Err(Error::Socket { path, source }),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The listener, which can be taken once.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] the second time.
    pub(crate) fn take_listener(&mut self) -> Result<UnixListener, Error> {
        self.listener.take().ok_or_else(|| Error::Socket {
            path: self.path.clone(),
            source: io::Error::other("the listener is already in use"),
        })
    }
}

impl Drop for Socket {
    /// Leaves the file alone if it is no longer ours: in an update the next provider may have
    /// bound the same path already.
    fn drop(&mut self) {
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|now| identity(&now) == self.identity);
        if !ours {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(socket = %self.path.display(), %error, "could not remove the socket");
        }
    }
}

fn listen(path: &Path) -> io::Result<(UnixListener, (u64, u64))> {
    if let Some(parent) = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
    {
        fs::create_dir_all(parent)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    Ok((listener, identity(&fs::symlink_metadata(path)?)))
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_the_last_owner_removes_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/for/it/p.sock");
        let first = Socket::bind(path.clone()).unwrap();
        let second = Socket::bind(path.clone()).unwrap();
        drop(first);
        assert!(path.exists(), "the first removed the second's socket");
        drop(second);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_is_not_a_socket_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.sock");
        fs::write(&path, "mine").unwrap();
        let error = Socket::bind(path.clone()).unwrap_err();
        assert!(matches!(error, Error::NotASocket(_)), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }
}
