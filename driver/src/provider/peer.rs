//! Connects to a provider's socket, and checks as which user the provider runs.
//!
//! A socket directory in which others than root can make files lets any pod that has it mounted pose as
//! a provider, and receive tokens and parameters. The kernel tells who listens on a socket (`SO_PEERCRED`
//! in unix(7)): root, the driver's own user and the owner of the directory are trusted, since each of
//! them could replace the socket anyway. Google's provider runs as user 1000, and gives the directory to
//! that user. Others are trusted if `--provider-uids` names them.
//!
//! Whoever can make files there can also put a link in the place of a socket after the driver has looked
//! at it, and connect(2) follows links. So the driver opens what it looks at, and connects to what it
//! opened.

use std::{
    fmt,
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::Path,
};

use tokio::net::UnixStream;

/// The users as which a provider may run.
#[derive(Clone, Debug)]
pub struct Trusted {
    /// The users of `--provider-uids`. `None` for any user.
    pub uids: Option<Vec<u32>>,
    /// The user as which the driver runs.
    pub own: u32,
}

/// The provider runs as a user that is not trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stranger {
    uid: u32,
}

impl fmt::Display for Stranger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "runs as user {}, which is neither root nor the owner of the socket's directory, so it was sent nothing; if it may have the secrets of this node, name its user in --provider-uids of the driver (chart value providerUIDs), otherwise find out which pod made the socket",
            self.uid
        )
    }
}

impl std::error::Error for Stranger {}

/// Connects to a socket on which a trusted user listens.
///
/// # Errors
/// The system's error, or one whose inner error is a [`Stranger`].
pub(super) async fn connect(socket: &Path, trusted: &Trusted) -> io::Result<UnixStream> {
    let stream = connect_to(&open(socket)?).await?;
    let Some(uids) = &trusted.uids else {
        return Ok(stream);
    };
    let uid = stream.peer_cred()?.uid();
    let is_trusted = uid == 0
        || uid == trusted.own
        || uids.contains(&uid)
        || socket.parent().is_some_and(|directory| {
            fs::metadata(directory).is_ok_and(|metadata| metadata.uid() == uid)
        });
    if is_trusted {
        return Ok(stream);
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        Stranger { uid },
    ))
}

/// Opens a socket's file, without connecting to it.
///
/// # Errors
/// The system's error, or that something else has taken the place of the socket.
fn open(socket: &Path) -> io::Result<File> {
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(socket)?;
    if opened.metadata()?.file_type().is_socket() {
        Ok(opened)
    } else {
        Err(io::Error::other(
            "something else has taken the place of the socket meanwhile",
        ))
    }
}

/// Connects to an open socket's file, whatever is at its path by now.
async fn connect_to(socket: &File) -> io::Result<UnixStream> {
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
}

/// Returns the [`Stranger`] among the sources of an error.
pub(super) fn stranger<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Stranger> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(stranger) = error.downcast_ref() {
            return Some(stranger);
        }
        // An error of the system does not count the error that it wraps as its source.
        let wrapped = error.downcast_ref().and_then(io::Error::get_ref);
        next = match wrapped {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::{fs::symlink, net::UnixListener};

    fn listen(at: &Path) -> UnixListener {
        let listener = UnixListener::bind(at).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    fn is_connected_to(listener: &UnixListener) -> bool {
        match listener.accept() {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                false
            }
        }
    }

    /// A link takes the place of a socket after it was found, and after it was opened.
    #[tokio::test]
    async fn a_link_in_the_place_of_the_socket_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, other) = (dir.path().join("test.sock"), dir.path().join("other.sock"));
        let (provider, stranger) = (listen(&socket), listen(&other));
        let any = Trusted { uids: None, own: 0 };
        connect(&socket, &any).await.unwrap();
        assert!(is_connected_to(&provider));

        let opened = open(&socket).unwrap();
        fs::rename(&socket, dir.path().join("moved.sock")).unwrap();
        symlink(&other, &socket).unwrap();
        connect_to(&opened).await.unwrap();
        assert!(is_connected_to(&provider));

        let error = connect(&socket, &any).await.unwrap_err().to_string();
        assert!(error.contains("taken the place of the socket"), "{error}");
        assert!(!is_connected_to(&provider));
        assert!(!is_connected_to(&stranger));
    }

    /// What the driver says of a provider that has gone is the system's word.
    #[tokio::test]
    async fn the_systems_errors_stay() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("test.sock");
        let any = Trusted { uids: None, own: 0 };
        let kind = async || connect(&socket, &any).await.unwrap_err().kind();
        assert_eq!(kind().await, io::ErrorKind::NotFound);
        drop(listen(&socket));
        assert_eq!(kind().await, io::ErrorKind::ConnectionRefused);
    }
}
