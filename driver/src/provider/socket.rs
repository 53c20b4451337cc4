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
            match is_socket(&path) {
                Ok(true) => return Ok(Some(path)),
                Ok(false) => {}
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

/// Returns whether there is a socket. Any other file in its place is an error.
fn is_socket(path: &Path) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => Ok(true),
        Ok(_) => Err(io::Error::other("it is not a socket")),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}
