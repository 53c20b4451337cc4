//! Checks of the socket's file: its name, its place, and who may connect.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::{Check, Finding, Subject, failed};

const UPSTREAM_CLIENT: &str = "https://github.com/kubernetes-sigs/secrets-store-csi-driver/blob/main/pkg/secrets-store/provider_client.go";
const UNIX_SOCKETS: &str = "https://man7.org/linux/man-pages/man7/unix.7.html";

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "socket-type",
        rule: "A unix socket is at the path.",
        source: UPSTREAM_CLIENT,
        run: |s| Box::pin(async { kind(s) }),
    },
    Check {
        name: "socket-name",
        rule: "The socket is <name>.sock, with a name of at most 30 letters, digits, '-' and '_'.",
        source: UPSTREAM_CLIENT,
        run: |s| Box::pin(async { name(s) }),
    },
    Check {
        name: "socket-owner",
        rule: "The socket belongs to root, or to the user who checks it.",
        source: UNIX_SOCKETS,
        run: |s| Box::pin(async { owner(s) }),
    },
    Check {
        name: "socket-mode",
        rule: "Others may not connect: the socket is not writable to them.",
        source: UNIX_SOCKETS,
        run: |s| Box::pin(async { mode(s) }),
    },
    Check {
        name: "socket-directory",
        rule: "Others may not replace the socket: its directory is not writable to them.",
        source: UNIX_SOCKETS,
        run: |s| Box::pin(async { directory(s) }),
    },
];

/// Returns the owner and the mode of the socket, to compare them after a restart.
pub(super) fn owner_and_mode(subject: &Subject) -> Result<(u32, u32), Finding> {
    let metadata = examine(&subject.settings.socket)?;
    Ok((metadata.uid(), metadata.mode() & 0o777))
}

fn examine(path: &Path) -> Result<Metadata, Finding> {
    fs::metadata(path).map_err(|error| failed(format!("{}: {error}", path.display())))
}

fn kind(subject: &Subject) -> Result<(), Finding> {
    if examine(&subject.settings.socket)?.file_type().is_socket() {
        return Ok(());
    }
    Err(failed("something else is at the path"))
}

fn name(subject: &Subject) -> Result<(), Finding> {
    let file = subject.settings.socket.file_name().unwrap_or_default();
    let file = file.to_string_lossy();
    let name = file.strip_suffix(".sock").unwrap_or_default();
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > 30 || !name.chars().all(allowed) {
        return Err(failed(format!("the driver cannot look up {file:?}")));
    }
    Ok(())
}

fn owner(subject: &Subject) -> Result<(), Finding> {
    let owner = examine(&subject.settings.socket)?.uid();
    let user = examine(Path::new("/proc/self"))?.uid();
    if owner == 0 || owner == user {
        return Ok(());
    }
    Err(failed(format!("it belongs to user {owner}")))
}

fn mode(subject: &Subject) -> Result<(), Finding> {
    let mode = examine(&subject.settings.socket)?.mode() & 0o777;
    if mode & 0o002 == 0 {
        return Ok(());
    }
    Err(failed(format!("its mode is {mode:04o}")))
}

fn directory(subject: &Subject) -> Result<(), Finding> {
    let socket = std::path::absolute(&subject.settings.socket);
    let socket = socket.map_err(|error| failed(error.to_string()))?;
    let directory = socket.parent().unwrap_or(Path::new("/"));
    let mode = examine(directory)?.mode() & 0o7777;
    // In a sticky directory only the owner of a file may replace it.
    if mode & 0o002 == 0 || mode & 0o1000 != 0 {
        return Ok(());
    }
    let directory = directory.display();
    Err(failed(format!("the mode of {directory} is {mode:04o}")))
}
