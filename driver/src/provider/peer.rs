//! Connects to a provider's socket, and checks as which user the provider runs.
//!
//! A socket directory in which others than root can make files lets any pod that has it mounted pose as
//! a provider, and receive tokens and parameters. The kernel tells who listens on a socket (`SO_PEERCRED`
//! in unix(7)): root, the driver's own user and the owner of the directory are trusted, since each of
//! them could replace the socket anyway. Google's provider runs as user 1000, and gives the directory to
//! that user. Others are trusted if `--provider-uids` names them.

use std::{fmt, fs, io, os::unix::fs::MetadataExt as _, path::Path};

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
    let stream = UnixStream::connect(socket).await?;
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
