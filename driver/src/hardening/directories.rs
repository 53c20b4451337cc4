//! Checks who can change the directories that the driver trusts.

use std::{
    fs::{self, Metadata, Permissions},
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use nix::unistd::geteuid;

use crate::config::{Config, Endpoint};

/// The bits of a mode that let others than the owner make and replace files.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Checks the directories of the state and of all sockets, as far as they exist. Takes all rights of others
/// on the state directory away if they can write to it, and warns of directories in which others can
/// replace sockets.
///
/// # Errors
/// When the state directory is a file or a link, or belongs to somebody else: its records decide which
/// mounts the driver removes.
pub fn check(config: &Config) -> io::Result<()> {
    check_state(&config.state_dir).map_err(|error| {
        let what = format!(
            "the state directory {}: {error}",
            config.state_dir.display()
        );
        io::Error::new(error.kind(), what)
    })?;
    let endpoint = match &config.endpoint {
        Endpoint::Unix(path) => path.parent(),
        Endpoint::Tcp(_) => None,
    };
    let registration = config.registration_dir.as_deref();
    for (directory, holds) in [
        (config.state_dir.parent(), "the state directory"),
        (endpoint, "the CSI socket"),
        (registration, "the registration socket"),
    ] {
        if let Some(directory) = directory {
            warn_of(directory, holds);
        }
    }
    for directory in config.provider_dirs() {
        warn_of(&directory, "sockets of providers");
    }
    Ok(())
}

fn check_state(directory: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(directory) {
        Ok(metadata) => metadata,
        // The driver makes it, with mode 0700.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !metadata.is_dir() {
        return Err(io::Error::other(
            "it is not a directory; remove it, or name another one with --state-dir",
        ));
    }
    if !is_trusted(&metadata) {
        return Err(io::Error::other(format!(
            "it belongs to user {}, who could make the driver remove mounts; give it to root with mode 0700, or remove it",
            metadata.uid()
        )));
    }
    let mode = metadata.mode() & 0o777;
    if mode & WRITABLE_BY_OTHERS != 0 {
        fs::set_permissions(directory, Permissions::from_mode(0o700))?;
        tracing::warn!(
            directory = %directory.display(),
            mode = format!("{mode:04o}"),
            "others could write to the state directory; its mode is now 0700"
        );
    }
    Ok(())
}

fn warn_of(directory: &Path, holds: &str) {
    // What does not exist is made by root, and a directory that cannot be examined fails when it is used.
    let Ok(metadata) = fs::metadata(directory) else {
        return;
    };
    let mode = metadata.mode() & 0o7777;
    if mode & WRITABLE_BY_OTHERS != 0 {
        tracing::warn!(
            directory = %directory.display(),
            mode = format!("{mode:04o}"),
            "others than its owner can make files in the directory of {holds}; give it mode 0755"
        );
    }
    if !is_trusted(&metadata) {
        tracing::info!(
            directory = %directory.display(),
            owner = metadata.uid(),
            "the directory of {holds} belongs to a user other than root, who can replace them"
        );
    }
}

/// Returns whether a directory belongs to root or to the driver's own user.
fn is_trusted(metadata: &Metadata) -> bool {
    [0, geteuid().as_raw()].contains(&metadata.uid())
}
