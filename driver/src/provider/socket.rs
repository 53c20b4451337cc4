//! Where a provider is: its socket.
//!
//! A socket is looked up again for every call: a provider that restarted, moved or was replaced
//! is found without a restart of the driver.

use std::{
    fs, io,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use crate::error::{Error, Reason, Result};

/// How long a first mount waits for a socket, at most; less when its deadline is near. On a new
/// node the provider's pod often starts together with the first pod that needs it.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How many sockets an error message names.
const MOST_NAMED: usize = 20;

/// The ending of a provider's socket.
const ENDING: &str = ".sock";

/// The directories of sockets.
pub(super) struct Sockets {
    search: Vec<PathBuf>,
}

impl Sockets {
    pub(super) fn new(search: Vec<PathBuf>) -> Self {
        Self { search }
    }

    /// The provider's socket. The first directory that has one wins.
    ///
    /// # Errors
    /// Says where was searched and what is there.
    pub(super) fn find(&self, name: &str) -> Result<PathBuf> {
        match self.look(name)? {
            Some(found) => Ok(found),
            None => Err(self.not_found(name)),
        }
    }

    /// The same, for who can wait a moment until the provider has started.
    ///
    /// # Errors
    /// As [`Sockets::find`], after the wait.
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

    /// Name and socket of every provider there is, each name once.
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
                "invalid provider: provider {name:.60?} is not a provider name; spec.provider of the SecretProviderClass has 1 to 30 letters, digits, \"-\" or \"_\""
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

    /// The names of the sockets there are.
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

/// Whether a name cannot leave the socket directory. The form is that of upstream's
/// `pluginNameRe` (`pkg/secrets-store/provider_client.go`), which also allows the empty name.
fn is_provider_name(name: &str) -> bool {
    (1..=30).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// Whether there is a socket. Something else in its place is an error.
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
