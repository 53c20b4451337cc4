//! The unix socket's file: its mode, what it may replace, and its removal at the end.

use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixSocket};

use super::Error;

/// The number of connections that may wait to be accepted.
const BACKLOG: u32 = 1024;

/// A listening unix socket. Dropping it removes its file.
///
/// Only its owner may connect (mode 0600): whoever can connect can ask for the secrets of any pod.
/// The driver runs as root, which may connect to every socket.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    listener: Option<UnixListener>,
    identity: (u64, u64),
}

impl Socket {
    /// Creates parent directories, replaces a socket that is at `path`, and listens.
    ///
    /// A provider that crashed leaves its socket behind, and during an update two providers run,
    /// of which the later one serves; so an existing socket is always replaced.
    ///
    /// # Errors
    ///
    /// [`Error::NotASocket`] if anything but a socket is at `path`, which stays;
    /// [`Error::Socket`] if the system refuses.
    pub fn bind(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        match fs::symlink_metadata(&path) {
            Ok(found) if !found.file_type().is_socket() => return Err(Error::NotASocket(path)),
            // If the path cannot be examined, listening fails and names the reason.
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

    /// Returns the socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the listener out, which is possible once.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] the second time.
    pub(super) fn take_listener(&mut self) -> Result<UnixListener, Error> {
        self.listener.take().ok_or_else(|| Error::Socket {
            path: self.path.clone(),
            source: io::Error::other("the listener is already in use"),
        })
    }
}

impl Drop for Socket {
    /// Removes the file unless another provider has bound the same path meanwhile.
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
    let socket = UnixSocket::new_stream()?;
    socket.bind(path)?;
    // The mode is set before `listen`, because nobody can connect earlier.
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok((
        socket.listen(BACKLOG)?,
        identity(&fs::symlink_metadata(path)?),
    ))
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
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
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
