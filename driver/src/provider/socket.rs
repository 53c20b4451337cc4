//! Finds the socket of a provider.
//!
//! A socket is looked up again for every call, so that a provider that restarted, moved or was
//! replaced is found without a restart of the driver.

use std::{
    fs, io,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use crate::{
    error::{Error, Reason, Result},
    quoted::quoted,
};

/// The longest time that a first mount waits for a socket; it is less when the deadline is near.
/// On a new node the provider's pod often starts together with the first pod that needs it.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The most sockets that an error message names.
const MOST_NAMED: usize = 20;

/// The extension of a provider's socket.
const ENDING: &str = ".sock";

/// The directories in which sockets are searched.
pub(super) struct Sockets {
    search: Vec<PathBuf>,
}

impl Sockets {
    pub(super) fn new(search: Vec<PathBuf>) -> Self {
        Self { search }
    }

    /// Returns the provider's socket, from the first directory that has one.
    ///
    /// # Errors
    /// Names the directories and the sockets that are there.
    pub(super) fn find(&self, name: &str) -> Result<PathBuf> {
        match self.look(name)? {
            Some(found) => Ok(found),
            None => Err(self.not_found(name)),
        }
    }

    /// Waits a moment for a provider that is starting.
    ///
    /// # Errors
    /// Returns the error of [`Sockets::find`] after the wait.
    pub(super) async fn wait(&self, name: &str, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let give_up = Instant::now() + LONGEST_WAIT.min(left / 4);
        loop {
            if self.look(name)?.is_some() {
                return Ok(());
            }
            if Instant::now() >= give_up {
                return Err(self.not_found(name));
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    /// Returns the name and the socket of every provider, each name once.
    pub(super) fn all(&self) -> Vec<(String, PathBuf)> {
        let mut names: Vec<String> = self
            .files()
            .filter_map(|file| Some(file.strip_suffix(ENDING)?.to_owned()))
            .filter(|name| is_provider_name(name))
            .collect();
        names.sort();
        names.dedup();
        names
            .into_iter()
            .filter_map(|name| {
                let found = self.look(&name).ok()??;
                Some((name, found))
            })
            .collect()
    }

    fn look(&self, name: &str) -> Result<Option<PathBuf>> {
        if !is_provider_name(name) {
            return Err(lookup(format!(
                "invalid provider: provider {} is not a provider name; spec.provider of the SecretProviderClass has 1 to 30 letters, digits, \"-\" or \"_\"",
                quoted(name, 60)
            )));
        }
        for directory in &self.search {
            let path = directory.join(format!("{name}{ENDING}"));
            match self.socket_at(&path) {
                Ok(None) => {}
                Ok(found) => return Ok(found),
                Err(error) => {
                    return Err(lookup(format!(
                        "provider {name:?}: cannot look at {}: {error}",
                        path.display()
                    )));
                }
            }
        }
        Ok(None)
    }

    /// Returns the socket that is at a path, if there is one. Any other file in its place is an error.
    ///
    /// A link is followed to a socket in one of the directories, and not beyond them: it could lead into a
    /// file system that does not answer, and whoever looks there waits with all that the driver does.
    fn socket_at(&self, path: &Path) -> io::Result<Option<PathBuf>> {
        let Some(there) = unless_absent(fs::symlink_metadata(path))? else {
            return Ok(None);
        };
        if !there.is_symlink() {
            let is_socket = there.file_type().is_socket();
            let found = is_socket.then(|| path.to_owned());
            return found
                .map(Some)
                .ok_or_else(|| io::Error::other("it is not a socket"));
        }
        let to = fs::read_link(path)?;
        let parent = path.parent().unwrap_or(path);
        let to = parent.join(to);
        // The directories themselves are the operator's, and may have another name behind a link.
        let is_inside = to.parent().is_some_and(|parent| {
            self.search.iter().any(|directory| {
                directory == parent
                    || fs::canonicalize(directory).is_ok_and(|directory| directory == parent)
            })
        });
        if !is_inside || to.file_name().is_none() {
            return Err(io::Error::other(
                "it is a link that leads out of the directories of provider sockets; make the socket itself there, or a link to one beside it",
            ));
        }
        match unless_absent(fs::symlink_metadata(&to))? {
            Some(there) if there.file_type().is_socket() => Ok(Some(to)),
            Some(_) => Err(io::Error::other(
                "it is a link to something that is not a socket",
            )),
            None => Ok(None),
        }
    }

    fn not_found(&self, name: &str) -> Error {
        let searched: Vec<_> = self
            .search
            .iter()
            .map(|d| d.display().to_string())
            .collect();
        let mut there: Vec<String> = self.files().take(MOST_NAMED).collect();
        there.sort();
        if there.is_empty() {
            there.push("none".to_owned());
        }
        lookup(format!(
            "provider not found: provider {name:?} has no socket {name}.sock in {}; the sockets there are: {}. Is the provider running on this node, and is spec.provider of the SecretProviderClass right?",
            searched.join(", "),
            there.join(", "),
        ))
    }

    /// Returns the names of all sockets.
    fn files(&self) -> impl Iterator<Item = String> {
        self.search
            .iter()
            .filter_map(|directory| fs::read_dir(directory).ok())
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.ends_with(ENDING))
    }
}

fn lookup(message: String) -> Error {
    Error::precondition(message).with_reason(Reason::FailedToLookupProviderGrpcClient)
}

/// Returns whether a name is valid, so that it cannot leave the socket directory. The form is that
/// of upstream's `pluginNameRe` (`pkg/secrets-store/provider_client.go`), which also allows the empty name.
fn is_provider_name(name: &str) -> bool {
    (1..=30).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// Takes it that nothing is there, if the system says so.
fn unless_absent<T>(looked: io::Result<T>) -> io::Result<Option<T>> {
    match looked {
        Ok(found) => Ok(Some(found)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use super::*;

    #[test]
    fn a_link_is_followed_to_a_socket_beside_it_only() {
        let dir = tempfile::tempdir().unwrap();
        let [first, second, outside] = ["first", "second", "outside"].map(|name| {
            let directory = dir.path().join(name);
            fs::create_dir(&directory).unwrap();
            directory
        });
        symlink(&second, dir.path().join("other-name")).unwrap();
        let sockets = Sockets::new(vec![first.clone(), dir.path().join("other-name")]);
        let _listeners = [&first, &second, &outside]
            .map(|directory| UnixListener::bind(directory.join("there.sock")).unwrap());
        let found = |to: &Path| {
            let link = first.join("linked.sock");
            let _absent = fs::remove_file(&link);
            symlink(to, &link).unwrap();
            sockets.find("linked").map_err(|error| error.to_string())
        };
        let there = first.join("there.sock");
        assert_eq!(sockets.find("there").unwrap(), there);
        assert_eq!(found(Path::new("there.sock")).unwrap(), there);
        assert_eq!(found(&there).unwrap(), there);
        let second = second.join("there.sock");
        assert_eq!(found(&second).unwrap(), second);
        for out in [
            outside.join("there.sock"),
            "../outside/there.sock".into(),
            "../first/there.sock".into(),
            "/".into(),
            "..".into(),
            ".".into(),
        ] {
            let error = found(&out).unwrap_err();
            assert!(error.contains("leads out of the directories"), "{error}");
        }
        let error = found(Path::new("linked.sock")).unwrap_err();
        assert!(error.contains("not a socket"), "{error}");
        let error = found(Path::new("absent.sock")).unwrap_err();
        assert!(error.contains("has no socket"), "{error}");
    }
}
