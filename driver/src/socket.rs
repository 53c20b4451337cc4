//! Listens on sockets in the file system, and keeps accepting through a shortage of descriptors.
//!
//! Two drivers may serve the same path for a while: during an update with surge, or after a pod was
//! deleted by force. The one that started last owns the path. So a socket is bound under another name
//! and renamed over the path, which is never empty meanwhile; and a driver that ends removes the path
//! only if its own socket is there. If the other driver ends first, the remaining one notices that the
//! path is deserted, and binds again.
//!
//! A driver that is stopped between the two steps leaves its socket under the other name. The next one
//! removes it: a lock on the directory, which goes with its holder, says that nobody is between them.

use std::{
    convert::Infallible,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt as _, MetadataExt as _},
            net,
        },
    },
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, fchmod, fstat},
};
use tokio::{
    net::{UnixListener, UnixSocket, UnixStream},
    sync::mpsc,
    time::{Instant, Sleep, sleep},
};
use tokio_stream::Stream;

/// The number of connections that may wait to be accepted. The kernel lowers it to its own limit
/// (`net.core.somaxconn`).
const BACKLOG: u32 = u32::MAX;

/// The number of digits of the name under which a socket is bound.
const DIGITS: usize = 7;

/// The pause in accepting after the system had no descriptor or no memory.
const REST: Duration = Duration::from_millis(250);

/// The shortest time between two log lines about failed accepting.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// The number of attempts to lock the directory of a socket, and the pause between two. A driver holds
/// the lock for less than a millisecond.
const LOCK_ATTEMPTS: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// The time between two checks of whether the path of a socket is deserted.
const CHECK_EVERY: Duration = Duration::from_secs(5);
/// The number of checks in a row that find the path deserted before the driver binds again. Another
/// driver may be about to bind.
const CHECKS: u32 = 2;

/// The path of a socket, with the means to tell whether the socket is still there.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Keeps the inode, so that no other file gets its number while this value exists.
    inode: OwnedFd,
}

/// The file at a socket's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtPath {
    /// The socket that this process created there.
    Ours,
    /// Something else, usually the socket of another process.
    Another,
    /// Nothing.
    Nothing,
}

impl SocketFile {
    /// Returns what is at the path now.
    ///
    /// # Errors
    /// When the path cannot be examined.
    pub fn look(&self) -> io::Result<AtPath> {
        let there = match fs::symlink_metadata(&self.path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(AtPath::Nothing),
            Err(error) => return Err(error),
        };
        let ours = fstat(&self.inode)?;
        if (there.dev(), there.ino()) == (ours.st_dev, ours.st_ino) {
            Ok(AtPath::Ours)
        } else {
            Ok(AtPath::Another)
        }
    }

    /// Returns whether the path is deserted: nothing is there, or a socket on which no process listens.
    async fn is_deserted(&self) -> io::Result<bool> {
        match self.look()? {
            AtPath::Ours => return Ok(false),
            AtPath::Nothing => return Ok(true),
            AtPath::Another => {}
        }
        match UnixStream::connect(&self.path).await.map_err(|e| e.kind()) {
            Err(io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => Ok(true),
            // A listener without room for a connection still listens.
            Ok(_) | Err(_) => Ok(false),
        }
    }

    /// Binds again whenever the path is deserted for some seconds, and sends the new listener to
    /// `anew`. Leaves a path alone that another process serves. Logs failures and tries again. Does
    /// not return.
    pub async fn keep(&mut self, anew: mpsc::Sender<UnixListener>) -> Infallible {
        let mut deserted = 0;
        loop {
            sleep(CHECK_EVERY).await;
            deserted = match self.is_deserted().await {
                Ok(true) => deserted + 1,
                Ok(false) => 0,
                Err(error) => {
                    tracing::warn!(socket = %self.path.display(), %error, "the socket cannot be examined; trying again");
                    0
                }
            };
            if deserted < CHECKS {
                continue;
            }
            deserted = 0;
            match listen_privately(&self.path) {
                Ok((listener, file)) => {
                    *self = file;
                    tracing::warn!(socket = %self.path.display(), "the driver's socket was replaced or removed; listening there again");
                    // Sending fails if the server is about to end.
                    let _ = anew.send(listener).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "the driver's socket was replaced or removed, and the driver cannot listen there; trying again");
                }
            }
        }
    }

    /// Removes the socket from the path if it is still there. Any other file stays.
    ///
    /// # Errors
    /// When the path cannot be examined or the socket cannot be removed.
    pub fn remove(&self) -> io::Result<()> {
        match self.look()? {
            AtPath::Ours => fs::remove_file(&self.path),
            AtPath::Another | AtPath::Nothing => Ok(()),
        }
    }
}

/// Listens on a socket in the file system to which only the process's own user can connect. Replaces
/// a socket that another process has there. Must be called from within a runtime.
///
/// The socket has mode 0600 from its first moment. A umask would do that too, but it belongs to
/// the whole process and would change the modes of files that other threads create meanwhile; a
/// `chmod` after the bind leaves a moment in which other users may connect. Linux gives the file
/// that `bind` creates the mode of the unbound socket, so the mode is set on that.
///
/// # Errors
/// The system's error, or that there is a file that is not a socket, which stays.
pub fn listen_privately(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let at_path =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => {
            let text = "there is a file that is not a socket; remove it";
            return Err(at_path(io::Error::new(io::ErrorKind::AlreadyExists, text)));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(at_path(error)),
    }
    let directory = path.parent().unwrap_or(path);
    // Closing it unlocks it.
    let locked = lock(directory);
    if locked.is_some() {
        remove_unplaced(directory);
    }
    let socket = UnixSocket::new_stream()?;
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    // kubelet ignores names that begin with a dot. A socket's path may have 107 bytes; this name is
    // no longer than the usual ones.
    let new = path.with_file_name(format!(".{:0DIGITS$x}", rand::random::<u32>() >> 4));
    socket.bind(&new).map_err(at_path)?;
    let placed = || {
        let inode = open(&new, OFlag::O_PATH | OFlag::O_NOFOLLOW, Mode::empty())?;
        let listener = socket.listen(BACKLOG)?;
        fs::rename(&new, path)?;
        let path = path.to_owned();
        Ok((listener, SocketFile { path, inode }))
    };
    let placed: io::Result<_> = placed();
    placed.map_err(|error| {
        // The file is this call's own. The first error is the one to report.
        let _ = fs::remove_file(&new);
        at_path(error)
    })
}

/// Locks a directory, in which no other driver that does the same binds a socket until the lock is
/// dropped. Returns `None` if that is not possible: then nothing is cleaned up.
fn lock(directory: &Path) -> Option<fs::File> {
    let directory = fs::File::open(directory).ok()?;
    for _ in 0..LOCK_ATTEMPTS {
        match directory.try_lock() {
            Ok(()) => return Some(directory),
            Err(fs::TryLockError::WouldBlock) => std::thread::sleep(LOCK_PAUSE),
            Err(fs::TryLockError::Error(_)) => break,
        }
    }
    tracing::debug!(
        "the directory of a socket cannot be locked; what a crash has left there stays"
    );
    None
}

/// Removes the sockets of drivers that were stopped before they gave them their path. A driver of an
/// earlier version does not lock the directory; its socket stays once it listens.
fn remove_unplaced(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
        let name = entry.file_name();
        if !is_socket || !name.to_str().is_some_and(is_unplaced) {
            continue;
        }
        let socket = entry.path();
        let refused = net::UnixStream::connect(&socket)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        if refused && let Err(error) = fs::remove_file(&socket) {
            tracing::warn!(socket = %socket.display(), %error, "a socket that a stopped driver has left cannot be removed");
        }
    }
}

/// Returns whether a name is one under which a driver binds before it renames.
fn is_unplaced(name: &str) -> bool {
    let digits = name.strip_prefix('.').unwrap_or_default();
    digits.len() == DIGITS
        && digits
            .bytes()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The connections of a listener, and then of the listeners that replace it.
pub struct Renewed {
    listener: UnixListener,
    newer: mpsc::Receiver<UnixListener>,
}

impl Renewed {
    /// Accepts from `listener`, until another one is sent.
    pub fn new(listener: UnixListener) -> (Self, mpsc::Sender<UnixListener>) {
        let (anew, newer) = mpsc::channel(1);
        (Self { listener, newer }, anew)
    }
}

impl Stream for Renewed {
    type Item = io::Result<UnixStream>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        while let Poll::Ready(Some(listener)) = this.newer.poll_recv(cx) {
            this.listener = listener;
        }
        let (stream, _) = ready!(this.listener.poll_accept(cx))?;
        Poll::Ready(Some(Ok(stream)))
    }
}

/// The connections of a stream, without errors. After an error there is a pause, so that a process
/// without descriptors neither ends nor spins.
pub struct Accepting<S> {
    incoming: S,
    what: &'static str,
    rest: Option<Pin<Box<Sleep>>>,
    complained: Option<Instant>,
}

impl<S> Accepting<S> {
    /// Accepts from `incoming`; `what` names it in the log.
    pub fn new(what: &'static str, incoming: S) -> Self {
        Self {
            incoming,
            what,
            rest: None,
            complained: None,
        }
    }

    fn complain(&mut self, error: &io::Error) {
        let now = Instant::now();
        if self
            .complained
            .is_none_or(|last| now - last >= COMPLAIN_EVERY)
        {
            self.complained = Some(now);
            tracing::warn!(socket = self.what, %error, "no connection can be accepted at the moment; trying again");
        }
    }
}

impl<S, C> Stream for Accepting<S>
where
    S: Stream<Item = io::Result<C>> + Unpin,
{
    type Item = io::Result<C>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(rest) = &mut this.rest {
                ready!(rest.as_mut().poll(cx));
                this.rest = None;
            }
            match ready!(Pin::new(&mut this.incoming).poll_next(cx)) {
                Some(Ok(connection)) => return Poll::Ready(Some(Ok(connection))),
                None => return Poll::Ready(None),
                Some(Err(error)) => {
                    this.complain(&error);
                    this.rest = Some(Box::pin(sleep(REST)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::fs::PermissionsExt as _, os::unix::net as blocking};
    use tokio_stream::StreamExt as _;

    fn names(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap();
        names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[tokio::test]
    async fn a_socket_is_private_and_alone_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csi.sock");
        let (_listener, file) = listen_privately(&path).unwrap();
        assert_eq!(names(dir.path()), ["csi.sock"]);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        assert_eq!(file.look().unwrap(), AtPath::Ours);
        file.remove().unwrap();
        assert_eq!(file.look().unwrap(), AtPath::Nothing);
        file.remove().unwrap();
    }

    #[tokio::test]
    async fn the_last_one_owns_the_path_whoever_ends_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csi.sock");
        let mut earlier = Vec::new();
        for _ in 0..20 {
            let (listener, file) = listen_privately(&path).unwrap();
            for (_, before) in &earlier {
                let before: &SocketFile = before;
                assert_eq!(before.look().unwrap(), AtPath::Another);
                before.remove().unwrap();
            }
            assert_eq!(file.look().unwrap(), AtPath::Ours);
            // Without its listener, and then without itself, the inode's number is free again.
            earlier.truncate(5);
            earlier.push((listener, file));
            assert_eq!(names(dir.path()), ["csi.sock"]);
        }
    }

    #[tokio::test]
    async fn what_a_stopped_driver_has_left_goes_and_what_others_have_stays() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        drop(blocking::UnixListener::bind(at(".0123abc")).unwrap());
        drop(blocking::UnixListener::bind(at("other.sock")).unwrap());
        drop(blocking::UnixListener::bind(at(".0123ABC")).unwrap());
        let _listens = blocking::UnixListener::bind(at(".7654fed")).unwrap();
        fs::write(at(".1111111"), "precious").unwrap();
        let (_listener, _file) = listen_privately(&at("csi.sock")).unwrap();
        let mut left = names(dir.path());
        left.sort();
        let expected = [".0123ABC", ".1111111", ".7654fed", "csi.sock", "other.sock"];
        assert_eq!(left, expected);
    }

    /// Another driver may be about to give its socket the path.
    #[tokio::test]
    async fn nothing_is_removed_while_another_driver_binds() {
        let dir = tempfile::tempdir().unwrap();
        drop(blocking::UnixListener::bind(dir.path().join(".0123abc")).unwrap());
        let other = lock(dir.path()).unwrap();
        let path = dir.path().join("csi.sock");
        let (_listener, _file) = listen_privately(&path).unwrap();
        assert_eq!(names(dir.path()).len(), 2);
        drop(other);
        let (_listener, _file) = listen_privately(&path).unwrap();
        assert_eq!(names(dir.path()), ["csi.sock"]);
    }

    #[tokio::test]
    async fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csi.sock");
        fs::write(&path, "precious").unwrap();
        let error = listen_privately(&path).unwrap_err().to_string();
        assert!(
            error.ends_with("csi.sock: there is a file that is not a socket; remove it"),
            "{error}"
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        assert_eq!(names(dir.path()), ["csi.sock"]);
        let missing = dir.path().join("missing/csi.sock");
        assert!(listen_privately(&missing).is_err());
    }

    /// kubelet dials anew for each call, and a node's pods start together.
    #[tokio::test]
    async fn many_connect_before_one_is_accepted() {
        let system = fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
        let most = system.trim().parse::<usize>().unwrap().min(400);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csi.sock");
        let (listener, _file) = listen_privately(&path).unwrap();
        let mut dialled = Vec::new();
        for at in 0..most {
            let socket = UnixSocket::new_stream().unwrap();
            // A blocking connect would wait for ever where this one is refused.
            let connecting = tokio::time::timeout(REST, socket.connect(&path));
            let connected = connecting.await;
            assert!(
                matches!(connected, Ok(Ok(_))),
                "connection {at}: {connected:?}"
            );
            dialled.push(connected);
        }
        for _ in 0..most {
            listener.accept().await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn accepting_rests_after_an_error_and_goes_on() {
        let (one, two) = blocking::UnixStream::pair().unwrap();
        let shortage = || Err(io::Error::from_raw_os_error(nix::libc::EMFILE));
        let came = [shortage(), shortage(), Ok(one), shortage(), Ok(two)];
        let started = Instant::now();
        let mut accepting = Accepting::new("test", tokio_stream::iter(came));
        let mut accepted = 0;
        while let Some(connection) = accepting.next().await {
            assert!(connection.is_ok());
            accepted += 1;
        }
        assert_eq!(accepted, 2);
        assert!(started.elapsed() >= REST * 3, "{:?}", started.elapsed());
    }
}
